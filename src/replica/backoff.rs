//! How long to wait before the next try.

use std::time::Duration;

use crate::random;

/// First wait: a primary that restarts is back within it, more or less.
const FIRST: Duration = Duration::from_millis(50);
/// Longest wait: what a replica may be late after an outage. Requests that are held for the primary
/// have to wait for it, too.
const LONGEST: Duration = Duration::from_secs(1);

/// Doubles from try to try. Each wait is drawn from its upper half: replicas don't come all at
/// once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { next: FIRST }
    }
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        self.next = FIRST;
    }

    pub(super) fn next(&mut self) -> Duration {
        // Without random numbers the waits are merely not spread.
        let [byte] = random::array().unwrap_or_default();
        self.draw(byte)
    }

    fn draw(&mut self, random: u8) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        wait / 2 + wait / 2 * u32::from(random) / 255
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_limit_and_start_over() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.draw(255), FIRST);
        assert_eq!(backoff.draw(0), FIRST);
        for _ in 0..20 {
            assert!(backoff.next() <= LONGEST);
        }
        assert_eq!(backoff.draw(255), LONGEST);
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
