//! A replica's clock, as far as its primary knows it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::lock::lock;

use tokio::time::Instant;

/// What the replica's clock shows at least: what it said last, and what has passed here since. A
/// heartbeat has it. By its own clock alone the replica then tells how old the heartbeat is when it
/// comes, however much was before it on the link.
#[derive(Clone, Debug, Default)]
pub(super) struct ReplicaClock(Arc<Mutex<Option<(u64, Instant)>>>);

impl ReplicaClock {
    /// The replica said so, in microseconds.
    pub(super) fn said(&self, micros: u64) {
        *self.lock() = Some((micros, Instant::now()));
    }

    pub(super) fn now(&self) -> u64 {
        self.lock().map_or(0, |(said, at)| said.saturating_add(at.elapsed().as_micros() as u64))
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, Instant)>> {
        lock(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_clock_goes_on_from_what_was_said_last() {
        let clock = ReplicaClock::default();
        assert_eq!(clock.now(), 0, "nothing was said yet");
        clock.clone().said(5_000_000);
        tokio::time::advance(Duration::from_millis(1500)).await;
        assert_eq!(clock.now(), 6_500_000);
        clock.said(u64::MAX);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(clock.now(), u64::MAX, "nobody's number overflows");
    }
}
