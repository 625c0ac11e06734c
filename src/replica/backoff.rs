//! How long to wait before the next try.

use std::time::Duration;

use tokio::time::Instant;

use crate::random;

/// First wait: a primary that restarts is back within it, more or less.
const FIRST: Duration = Duration::from_millis(50);
/// Longest wait: what a replica may be late after an outage. Requests that are held for the primary
/// have to wait for it, too.
const LONGEST: Duration = Duration::from_secs(1);
/// Shortest and longest wait for a node that is about to be the primary. Requests that are held
/// wait for it, too.
const SOONEST: Duration = Duration::from_millis(5);
const SOON: Duration = Duration::from_millis(100);
/// For how long a node that is not the primary may be about to be: longer than a promotion takes,
/// as a rule.
const SOON_FOR: Duration = Duration::from_secs(5);

/// Doubles from try to try. Each wait is drawn from its upper half: replicas don't come all at
/// once.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
    /// For a node that is about to be the primary.
    soon: Duration,
    /// When these tries began.
    since: Instant,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff { next: FIRST, soon: SOONEST, since: Instant::now() }
    }
}

impl Backoff {
    pub(super) fn reset(&mut self) {
        *self = Backoff::default();
    }

    pub(super) fn next(&mut self) -> Duration {
        // Without random numbers the waits are merely not spread.
        let [byte] = random::array().unwrap_or_default();
        self.draw(byte)
    }

    /// How long to wait for a node that says that it is not the primary. In the first seconds it
    /// may be about to be.
    pub(super) fn soon(&mut self) -> Duration {
        if self.since.elapsed() >= SOON_FOR {
            return self.next();
        }
        let [byte] = random::array().unwrap_or_default();
        let wait = self.soon;
        self.soon = (wait * 2).min(SOON);
        spread(wait, byte)
    }

    fn draw(&mut self, random: u8) -> Duration {
        let wait = self.next;
        self.next = (wait * 2).min(LONGEST);
        spread(wait, random)
    }
}

/// From the upper half of a wait.
fn spread(wait: Duration, random: u8) -> Duration {
    wait / 2 + wait / 2 * u32::from(random) / 255
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

    #[tokio::test(start_paused = true)]
    async fn a_node_that_is_about_to_be_the_primary_is_asked_often_and_not_for_ever() {
        let mut backoff = Backoff::default();
        for _ in 0..6 {
            backoff.next();
        }
        assert!(backoff.soon() + backoff.soon() <= SOONEST * 3, "a handoff takes milliseconds");
        while backoff.since.elapsed() < SOON_FOR {
            let wait = backoff.soon();
            assert!((SOONEST..=SOON).contains(&wait), "{wait:?}");
            tokio::time::advance(wait).await;
        }
        assert!(backoff.soon() >= LONGEST / 2, "it is not in the first seconds any more");
        backoff.reset();
        assert!(backoff.soon() <= SOONEST);
    }
}
