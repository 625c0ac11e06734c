//! One fsync of the WAL for all commits that wait for one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::engine::file::term::Term;
use crate::error::{Cause, Error, Result};
use crate::lock::lock;
use crate::threads::caught;

/// Which commits are on the disk, and which thread is bringing more of them there.
#[derive(Debug)]
pub(in crate::engine) struct GroupSync {
    base: Arc<Term>,
    state: Mutex<SyncState>,
    changed: Condvar,
    /// What the state says is on the disk, for who asks without waiting.
    on_disk: AtomicU64,
}

#[derive(Debug)]
struct SyncState {
    /// Every transaction up to this number is on the disk.
    synced: u64,
    /// The highest number that any thread waits for. Each transaction was in the WAL before a
    /// thread asked for it.
    wanted: u64,
    /// A thread is in fsync.
    leading: bool,
    /// How many threads wait for that to end.
    followers: u32,
    /// An fsync failed. What it left on the disk is not known and no later fsync can tell, so the
    /// primary acknowledges no commit any more.
    failed: Option<Cause>,
}

impl GroupSync {
    /// Everything up to `synced` is on the disk already.
    pub(in crate::engine) fn new(base: Arc<Term>, synced: u64) -> GroupSync {
        let state = SyncState { synced, wanted: synced, leading: false, followers: 0, failed: None };
        let (state, on_disk) = (Mutex::new(state), AtomicU64::new(synced));
        GroupSync { base, state, changed: Condvar::new(), on_disk }
    }

    /// Every transaction up to this one is on the disk.
    pub(in crate::engine) fn on_disk(&self) -> u64 {
        self.on_disk.load(Ordering::Acquire)
    }

    /// Blocks until the transaction, which is in the WAL, is on the disk. The first thread to come
    /// fsyncs for all that have come by then; the others wait. Only those that wait are woken, and
    /// they find the lock free.
    pub(in crate::engine) fn sync(&self, number: u64) -> Result<()> {
        let mut state = lock(&self.state);
        state.wanted = state.wanted.max(number);
        loop {
            if state.synced >= number {
                return Ok(());
            }
            if let Some(why) = &state.failed {
                return Err(Error::Stopped(why.clone()));
            }
            if state.leading {
                state.followers += 1;
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.followers -= 1;
                continue;
            }
            state.leading = true;
            let target = state.wanted;
            drop(state);
            // A panic is a failure like others: the thread gives up the lead, whatever happens.
            let result = caught("an fsync of the WAL", || self.base.sync_wal()).flatten();
            state = lock(&self.state);
            state.leading = false;
            match &result {
                Ok(()) => self.reached(&mut state, target),
                Err(error) => state.failed = Some(error.cause()),
            }
            self.wake(state);
            return result.map_err(|error| {
                // What the application does with the news does not hold the others up.
                self.base.fail(&error);
                Error::Stopped(error.cause())
            });
        }
    }

    /// Has each thread that wants an fsync wait for one, as on a disk that takes its time.
    #[cfg(test)]
    pub(in crate::engine) fn hold(&self, hold: bool) {
        let mut state = lock(&self.state);
        state.leading = hold;
        self.wake(state);
    }

    /// The highest number that anybody has waited for.
    #[cfg(test)]
    pub(in crate::engine) fn wanted(&self) -> u64 {
        lock(&self.state).wanted
    }

    /// Notes that everything up to `number` came to the disk by other means.
    pub(in crate::engine) fn synced(&self, number: u64) {
        let mut state = lock(&self.state);
        self.reached(&mut state, number);
        self.wake(state);
    }

    fn reached(&self, state: &mut SyncState, number: u64) {
        state.synced = state.synced.max(number);
        self.on_disk.store(state.synced, Ordering::Release);
    }

    /// Wakes who waits, after the lock is given back.
    fn wake(&self, state: MutexGuard<'_, SyncState>) {
        let waited_for = state.followers > 0;
        drop(state);
        if waited_for {
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::options::Durability;
    use crate::engine::tests::{Home, node, open_plain, settled, until};

    /// A subscriber that panics with each event.
    struct Bomb;

    impl tracing::Subscriber for Bomb {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            panic!("the subscriber panics");
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }

    /// Has the descriptor of the WAL be one that can't be synced.
    #[cfg(target_os = "linux")]
    fn break_wal(path: &std::path::Path) {
        use std::os::fd::AsRawFd;
        let wal = crate::files::Paths::new(path).wal();
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut broken = 0;
        for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
            if std::fs::read_link(entry.path()).is_ok_and(|to| to == wal) {
                let number = entry.file_name().to_str().unwrap().parse().unwrap();
                // SAFETY: both are open; only what the number stands for changes.
                assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), number) }, number);
                broken += 1;
            }
        }
        assert!(broken > 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn whoever_waits_for_an_fsync_that_fails_is_told_also_when_the_telling_panics() {
        let home = Home::new();
        let mut options = home.options("p.db");
        options.durability = Durability::Unsynced;
        let path = std::fs::canonicalize(options.paths.database().parent().unwrap()).unwrap().join("p.db");
        let engine = crate::engine::PrimaryEngine::open(options, node()).unwrap();
        let group_sync = engine.group_sync.clone();
        let number = engine.captured().unwrap().number() + 1;
        lock(&group_sync.state).leading = true;
        let (tell, told) = std::sync::mpsc::channel();
        let waiting = group_sync.clone();
        std::thread::spawn(move || tell.send(waiting.sync(number)));
        until("the wait", || lock(&group_sync.state).wanted >= number);
        // It waits, for it had the mutex from there on. The thread that led has ended, and tells no
        // one.
        lock(&group_sync.state).leading = false;
        break_wal(&path);
        let led = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            tracing::subscriber::with_default(Bomb, || group_sync.sync(number))
        }));
        let waited = told.recv_timeout(Duration::from_secs(60)).expect("it waits for ever");
        assert!(matches!(waited, Err(Error::Stopped(_))), "{waited:?}");
        assert!(matches!(led, Ok(Err(Error::Stopped(_)))), "{led:?}");
        assert!(matches!(engine.begun(), Err(Error::Stopped(_))));
        assert!(engine.base.node.failure().is_some());
    }

    #[test]
    fn what_is_on_the_disk_is_handed_on_while_later_commits_wait_for_theirs() {
        let home = Home::new();
        let engine = home.primary("p.db");
        let foreign = open_plain(&home.path("p.db"));
        foreign.execute_batch("CREATE TABLE t(a)").unwrap();
        let before = settled(&engine).number();
        // Capture takes the first commit, and comes no further meanwhile.
        let log = engine.hold_log();
        foreign.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        until("the append", || engine.group_sync.on_disk() > before);
        foreign.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        engine.group_sync.sync(before + 2).unwrap();
        engine.group_sync.hold(true);
        foreign.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        drop(log);
        let position = || engine.base.node.applied.position().unwrap().number();
        until("the second commit", || position() == before + 2);
        until("the wait", || engine.group_sync.wanted() == before + 3);
        assert_eq!(position(), before + 2);
        engine.group_sync.hold(false);
        assert_eq!(settled(&engine).number(), before + 3);
    }
}
