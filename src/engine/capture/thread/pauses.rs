//! How long capture sleeps between two looks for commits of others.
//!
//! Short at first, then longer, up to the option's `poll_max`. After some quiet the kernel is asked
//! for word of the next write to the WAL, and capture hardly looks by itself. A commit's frames are
//! in the WAL before the wal-index says so, and an fsync may lie between the two. So capture looks
//! as often as before for a while after the watch has begun, and again after each word.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::engine::capture::waker::Waker;
use crate::files::{Notice, on_write};

/// First sleep when nothing happens.
const SLEEP_MIN: Duration = Duration::from_millis(1);
/// Quiet for that long, it asks for word. For as long after that it relies on its looks alone.
const QUIET: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 2000 });
/// Longest sleep under a watch. Something may write that the kernel says nothing of.
const WATCHED: Duration = Duration::from_secs(1);

pub(super) struct Pauses {
    wal: PathBuf,
    max: Duration,
    /// When something happened last, or a watch began.
    since: Instant,
    sleep: Duration,
    watch: WalWatch,
    told: Arc<AtomicBool>,
    tell: Arc<dyn Fn() + Send + Sync>,
}

enum WalWatch {
    None,
    /// The system gives none for this file.
    Refused,
    Stands {
        _until: Notice,
    },
}

impl Pauses {
    pub(super) fn new(wal: PathBuf, max: Duration, waker: Arc<Waker>) -> Pauses {
        let told = Arc::new(AtomicBool::new(false));
        let tell = {
            let told = told.clone();
            Arc::new(move || {
                told.store(true, Ordering::Release);
                waker.ask();
            })
        };
        Pauses { wal, max, since: Instant::now(), sleep: SLEEP_MIN, watch: WalWatch::None, told, tell }
    }

    /// Since when nothing has happened.
    pub(super) fn quiet(&self) -> Duration {
        self.since.elapsed()
    }

    /// Something happened. What is written from now on tells no one.
    pub(super) fn restart(&mut self) {
        (self.since, self.sleep) = (Instant::now(), SLEEP_MIN);
        if let WalWatch::Stands { .. } = self.watch {
            self.watch = WalWatch::None;
        }
    }

    /// The next sleep. `waits`: capture has something to look after in any case.
    pub(super) fn next(&mut self, waits: bool) -> Duration {
        if self.told.swap(false, Ordering::AcqRel) {
            self.restart();
        }
        let quiet = self.quiet() > QUIET && !waits;
        match self.watch {
            WalWatch::Stands { .. } if quiet => return self.max.max(WATCHED),
            WalWatch::None if quiet => {
                let notice = on_write(&self.wal, self.tell.clone());
                self.watch = notice.map_or(WalWatch::Refused, |notice| WalWatch::Stands { _until: notice });
                (self.since, self.sleep) = (Instant::now(), SLEEP_MIN);
            }
            _ => {}
        }
        let sleep = self.sleep.min(self.max);
        self.sleep = (self.sleep * 2).min(self.max);
        sleep
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;
    use crate::engine::tests::{Home, node, open_plain, settled, until};
    use crate::engine::{EngineOptions, PrimaryEngine};

    #[test]
    fn a_watch_begins_after_some_quiet_and_ends_with_the_first_write() {
        let dir = tempfile::tempdir().unwrap();
        let wal = dir.path().join("a.db-wal");
        std::fs::write(&wal, b"").unwrap();
        let mut pauses = Pauses::new(wal.clone(), Duration::from_millis(20), Arc::default());
        let watched = |pauses: &Pauses| matches!(pauses.watch, WalWatch::Stands { .. });
        let ages = |pauses: &mut Pauses| pauses.since -= QUIET * 2;
        for _ in 0..2 {
            let first: Vec<_> = (0..7).map(|_| pauses.next(false).as_millis()).collect();
            assert_eq!(first, [1, 2, 4, 8, 16, 20, 20]);
            ages(&mut pauses);
            pauses.next(true);
            assert!(!watched(&pauses), "it has something to wait for");
            assert_eq!(pauses.next(false), SLEEP_MIN, "a commit may be under way");
            assert!(watched(&pauses));
            ages(&mut pauses);
            assert_eq!(pauses.next(false), WATCHED);
            assert_eq!(pauses.next(true).as_millis(), 2, "with something to wait for");
            std::fs::write(&wal, b"frames").unwrap();
            until("the word", || pauses.told.load(Ordering::Acquire));
        }
        std::fs::remove_file(&wal).unwrap();
        pauses.next(false);
        ages(&mut pauses);
        pauses.next(false);
        assert!(matches!(pauses.watch, WalWatch::Refused));
        assert_eq!(pauses.next(false).as_millis(), 2);
    }

    #[test]
    fn a_commit_of_others_ends_a_long_sleep() {
        let home = Home::new();
        let foreign = open_plain(&home.path("p.db"));
        foreign.execute_batch("CREATE TABLE t(a)").unwrap();
        // By its own looks it would see none in time.
        let options = EngineOptions { poll_max: Duration::from_secs(600), ..home.options("p.db") };
        let engine = PrimaryEngine::open(options, node()).unwrap();
        let before = settled(&engine).number();
        let position = || engine.base.node.applied.position().unwrap().number();
        for n in 1..=3 {
            until("a long sleep", || engine.waker.sleeps() > Duration::from_secs(60));
            foreign.execute_batch("INSERT INTO t VALUES (1)").unwrap();
            until("the commit", || position() == before + n);
        }
    }
}
