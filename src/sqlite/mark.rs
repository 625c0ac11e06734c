//! A read mark that the node shares for all connections of its process.
//!
//! A reader shares one of five locks of the wal-index for as long as it reads. SQLite counts such
//! locks by process: the first connection that takes one asks the kernel, and the last one that
//! gives it up. While the node has the one that new readers choose, neither of them does.
//!
//! The node moves no mark for it. It shares the one that new readers find, and gives it up with the
//! next commit. So to SQLite it is one more reader, which is as far as the newest one.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::lock::lock;
use crate::sqlite::ffi::{Handle, Lock, Slot};
use crate::sqlite::shm::WalIndex;

/// The least time between two marks. Sharing one and giving it up are two locks, about 1 us in all
/// where no one reads. So they take half a percent of a core at most, whatever is committed.
const APART: Duration = Duration::from_micros(200);

/// The mark that a node shares, if it shares one.
#[derive(Debug, Default)]
pub(crate) struct StandingMark {
    /// It is open and shares none.
    away: AtomicBool,
    /// A thread wanted to give the mark up while another one had the lock. That one does it: no
    /// commit waits for a reader's thread.
    moved: AtomicBool,
    open: Mutex<Option<OpenMark>>,
}

/// A connection that does nothing else.
#[derive(Debug)]
struct OpenMark {
    index: WalIndex,
    /// The shared mark, 0 to 4.
    mark: Option<usize>,
    /// When it last tried to share one.
    tried: Option<Instant>,
    /// The last field: the wal-index is mapped while it is open.
    handle: Handle,
}

impl StandingMark {
    /// Begins, by a connection to the open database that has read from it.
    pub(crate) fn open(&self, mut handle: Handle) -> Result<()> {
        let index = WalIndex::new(&mut handle)?;
        let before = lock(&self.open).replace(OpenMark { index, mark: None, tried: None, handle });
        self.away.store(true, Ordering::SeqCst);
        drop(before);
        Ok(())
    }

    /// Ends, before the database is closed.
    pub(crate) fn close(&self) {
        let mut open = lock(&self.open);
        self.away.store(false, Ordering::SeqCst);
        *open = None;
    }

    /// Shares the mark that new readers choose, if they need not move one. Costs nothing while it
    /// is shared already.
    #[inline]
    pub(crate) fn join(&self) {
        if self.away.load(Ordering::Relaxed) {
            self.hold(|open| open.join(&self.away));
        }
    }

    /// New readers may choose another mark from now on: gives up one that they don't.
    pub(crate) fn follow(&self) {
        self.give_up(|open| open.mark != open.chosen());
    }

    /// Gives up any mark: a thread of the node needs all of them without a reader.
    pub(crate) fn leave(&self) {
        self.give_up(|_| true);
    }

    fn give_up(&self, what: impl FnOnce(&OpenMark) -> bool) {
        fence(Ordering::SeqCst);
        if self.away.load(Ordering::SeqCst) {
            return;
        }
        self.moved.store(true, Ordering::SeqCst);
        self.hold(|open| {
            self.moved.store(false, Ordering::SeqCst);
            if what(open) {
                open.leave();
                self.away.store(open.mark.is_none(), Ordering::SeqCst);
            }
        });
    }

    /// A thread that finds another one at it goes on: that one does what is to be done.
    fn hold(&self, work: impl FnOnce(&mut OpenMark)) {
        let mut open = match self.open.try_lock() {
            Ok(open) => open,
            Err(TryLockError::Poisoned(open)) => open.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let Some(opened) = &mut *open else { return };
        work(opened);
        drop(open);
        if self.moved.swap(false, Ordering::SeqCst) {
            self.follow();
        }
    }

    /// The shared mark.
    #[cfg(test)]
    pub(crate) fn mark(&self) -> Option<usize> {
        lock(&self.open).as_ref().and_then(|open| open.mark)
    }
}

impl OpenMark {
    /// The mark that a new reader takes without moving one. Where there is none, the next reader
    /// moves one.
    fn chosen(&self) -> Option<usize> {
        let newest = self.index.glance().0;
        if self.index.backfilled() == newest {
            return Some(0);
        }
        (1..5).rev().find(|mark| self.index.read_mark(*mark) == newest)
    }

    fn join(&mut self, away: &AtomicBool) {
        if self.mark.is_some() || self.tried.is_some_and(|tried| tried.elapsed() < APART) {
            return;
        }
        // First this, then the look: a commit comes before the look, or finds this.
        away.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(mark) = self.chosen() {
            self.tried = Some(Instant::now());
            if self.handle.try_lock(Slot::read(mark), Lock::Shared).unwrap_or(false) {
                self.mark = Some(mark);
                // It may have been moved before the lock was there, but not after it.
                if self.chosen() != self.mark {
                    self.leave();
                }
            }
        }
        away.store(self.mark.is_none(), Ordering::SeqCst);
    }

    fn leave(&mut self) {
        if let Some(mark) = self.mark {
            // Where the kernel fails, it is shared still: the next commit tries again.
            let left = self.handle.unlock(Slot::read(mark), Lock::Shared);
            self.mark = left.is_err().then_some(mark);
        }
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    const READ: &str = "SELECT count(*) FROM t";
    const WRITE: &str = "INSERT INTO t VALUES (1)";

    fn database(dir: &tempfile::TempDir) -> (StandingMark, Connection) {
        let path = dir.path().join("a.db");
        let connection = Connection::open(&path).unwrap();
        let schema = "PRAGMA journal_mode = WAL; PRAGMA wal_autocheckpoint = 0; CREATE TABLE t(a)";
        connection.execute_batch(schema).unwrap();
        let mark = StandingMark::default();
        mark.open(handle(dir)).unwrap();
        (mark, connection)
    }

    fn handle(dir: &tempfile::TempDir) -> Handle {
        let handle = Handle::open(&dir.path().join("a.db"), false).unwrap();
        read(handle.connection());
        handle
    }

    fn read(connection: &Connection) {
        connection.query_row(READ, [], |_| Ok(())).unwrap();
    }

    /// Joins as soon as it may, and says what.
    fn joined(mark: &StandingMark) -> usize {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            mark.join();
            if let Some(found) = mark.mark() {
                return found;
            }
            assert!(Instant::now() < end, "it never joins");
        }
    }

    /// Whether another connection may have the slot without a reader.
    fn is_free(dir: &tempfile::TempDir, mark: usize) -> bool {
        handle(dir).try_lock(Slot::read(mark), Lock::Exclusive).unwrap()
    }

    #[test]
    fn it_shares_what_a_reader_has_chosen_until_the_next_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (mark, connection) = database(&dir);
        for _ in 0..3 {
            connection.execute(WRITE, []).unwrap();
            mark.follow();
            mark.join();
            assert_eq!(mark.mark(), None, "no one has read since");
            read(&connection);
            let found = joined(&mark);
            assert!((1..5).contains(&found) && !is_free(&dir, found));
            // Other readers are there beside it, and writers.
            read(&connection);
            mark.follow();
            assert_eq!(mark.mark(), Some(found), "it is the newest one still");
            connection.execute(WRITE, []).unwrap();
            mark.follow();
            assert!(is_free(&dir, found));
        }
        read(&connection);
        let found = joined(&mark);
        mark.leave();
        assert!(is_free(&dir, found));
        joined(&mark);
        mark.close();
        mark.join();
        assert_eq!(mark.mark(), None);
        assert!((0..5).all(|mark| is_free(&dir, mark)));
    }

    #[test]
    fn a_commit_does_not_wait_for_a_thread_that_is_at_the_mark() {
        let dir = tempfile::tempdir().unwrap();
        let (mark, connection) = database(&dir);
        read(&connection);
        let found = joined(&mark);
        let held = lock(&mark.open);
        connection.execute(WRITE, []).unwrap();
        mark.follow();
        assert_eq!(held.as_ref().unwrap().mark, Some(found));
        drop(held);
        // The thread that was at it, when it has done what it was at.
        mark.hold(|_| {});
        assert_eq!(mark.mark(), None);
    }

    #[test]
    fn where_all_is_copied_back_it_is_the_mark_of_those_who_read_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (mark, connection) = database(&dir);
        connection.execute(WRITE, []).unwrap();
        connection.query_row("PRAGMA wal_checkpoint", [], |_| Ok(())).unwrap();
        assert_eq!(joined(&mark), 0);
        assert!(!is_free(&dir, 0));
        connection.execute(WRITE, []).unwrap();
        read(&connection);
        mark.follow();
        assert!(is_free(&dir, 0));
        assert!(joined(&mark) > 0);
    }
}
