//! What others can make happen as often as they like, and the node tells only now and then.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::lock::lock;

/// How often it is told at most.
const EVERY: Duration = Duration::from_secs(60);
/// How long it counts as going on after the last time.
const LASTS: Duration = Duration::from_secs(90);

#[derive(Debug, Default)]
pub(crate) struct Seldom(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    told: Option<Instant>,
    last: Option<Instant>,
    /// Times since it was told.
    times: u64,
}

impl Seldom {
    /// It happened. Returns how often since it was told last, when it is to be told now.
    pub(crate) fn happened(&self) -> Option<u64> {
        self.lock().happened(Instant::now())
    }

    /// Whether it goes on.
    pub(crate) fn lasts(&self) -> bool {
        self.lock().last.is_some_and(|last| last.elapsed() < LASTS)
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        lock(&self.0)
    }
}

impl Seen {
    fn happened(&mut self, now: Instant) -> Option<u64> {
        self.last = Some(now);
        self.times += 1;
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < EVERY) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_others_together() {
        let start = Instant::now();
        let mut seen = Seen::default();
        assert_eq!(seen.happened(start), Some(1));
        for ms in 1..1000 {
            assert_eq!(seen.happened(start + Duration::from_millis(ms)), None);
        }
        assert_eq!(seen.happened(start + EVERY), Some(1000));
        assert_eq!(seen.happened(start + EVERY), None);
    }
}
