//! When the engine tries a restart of the WAL again, after one that did not succeed.

use std::time::{Duration, Instant};

/// Pause after a try in vain, doubled each time.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Pause for the disk after a try that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// Paces the restarts of one WAL.
#[derive(Debug)]
pub(in crate::engine) struct RestartPacer {
    due: Instant,
    pause: Duration,
    failed_until: Instant,
}

impl RestartPacer {
    pub(in crate::engine) fn new() -> RestartPacer {
        let now = Instant::now();
        RestartPacer { due: now, pause: PAUSE, failed_until: now }
    }

    /// Whether the pause after the last try in vain is over. A restart that a caller waits for
    /// comes before that.
    pub(in crate::engine) fn is_due(&self, now: Instant) -> bool {
        now >= self.due
    }

    /// Whether the disk has had its pause after a failure. The engine tries nothing before that.
    pub(in crate::engine) fn disk_rested(&self, now: Instant) -> bool {
        now >= self.failed_until
    }

    /// The WAL has begun anew.
    pub(in crate::engine) fn succeeded(&mut self) {
        self.pause = PAUSE;
    }

    /// Readers or writers were in the way.
    pub(in crate::engine) fn in_vain(&mut self, now: Instant) {
        self.due = now + self.pause;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    /// The disk is full or failing.
    pub(in crate::engine) fn failed(&mut self, now: Instant) {
        self.failed_until = now + FAILURE_PAUSE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_its_maximum_and_a_success_resets_it() {
        let mut pacer = RestartPacer::new();
        let now = Instant::now();
        assert!(pacer.is_due(now) && pacer.disk_rested(now));
        let pause = |pacer: &mut RestartPacer| {
            pacer.in_vain(now);
            assert!(pacer.disk_rested(now), "the disk did nothing wrong");
            let first = (0..=10_000).find(|ms| pacer.is_due(now + Duration::from_millis(*ms)));
            first.unwrap()
        };
        let pauses: Vec<u64> = (0..9).map(|_| pause(&mut pacer)).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        pacer.succeeded();
        assert_eq!(pause(&mut pacer), 50);
    }

    #[test]
    fn a_disk_that_failed_rests_and_the_other_pause_stays() {
        let mut pacer = RestartPacer::new();
        let now = Instant::now();
        pacer.failed(now);
        assert!(pacer.is_due(now) && !pacer.disk_rested(now + Duration::from_millis(999)));
        assert!(pacer.disk_rested(now + FAILURE_PAUSE));
    }
}
