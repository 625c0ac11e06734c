//! A read mark that the node shares for all connections of its process.
//!
//! A reader shares one of five locks of the wal-index for as long as it reads. SQLite counts such
//! locks by process: the first connection that takes one asks the kernel, and the last one that
//! gives it up. While the node has the one that new readers choose, neither of them does.
//!
//! The node moves no mark. It shares the one that readers have chosen, when one has, and gives it
//! up with the next commit. So it is a reader like any other, which is as far as the newest one.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rusqlite::OpenFlags;

use crate::descriptors;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::sqlite::ffi::{Handle, Lock, Slot};
use crate::sqlite::shm::WalIndex;

/// The least time between two marks. Sharing one and giving it up are two locks, about 1 us in all
/// where no one reads. So they take half a percent of a core at most, whatever is committed.
const APART: Duration = Duration::from_micros(200);

/// The mark that a node shares, if it shares one.
#[derive(Debug)]
pub(crate) struct StandingMark {
    /// None is shared, or it may not be the one that new readers choose.
    away: AtomicBool,
    sharing: Mutex<MarkState>,
}

#[derive(Debug, Default)]
struct MarkState {
    open: Option<Open>,
    /// When it last shared one.
    joined: Option<Instant>,
}

/// A connection of its own, which never reads.
#[derive(Debug)]
struct Open {
    index: WalIndex,
    /// The shared mark, 0 to 4.
    mark: Option<usize>,
    /// The last field: the wal-index is mapped while it is open.
    handle: Handle,
}

impl Default for StandingMark {
    fn default() -> StandingMark {
        StandingMark { away: AtomicBool::new(true), sharing: Mutex::default() }
    }
}

impl StandingMark {
    /// Begins, for a database that is open in this process. Without a descriptor to spare there is
    /// no standing mark: readers then ask the kernel as they do without a node.
    pub(crate) fn open(&self, path: &Path) {
        let mut sharing = lock(&self.sharing);
        if sharing.open.is_some() {
            return;
        }
        match Open::new(path) {
            Ok(open) => sharing.open = Some(open),
            Err(error) => tracing::debug!(%error, "there is no standing read mark"),
        }
    }

    /// Ends, before the database is closed.
    pub(crate) fn close(&self) {
        let mut sharing = lock(&self.sharing);
        self.away.store(true, Ordering::SeqCst);
        sharing.open = None;
    }

    /// Shares the mark that readers have chosen since the last commit, if one has. Costs nothing
    /// while it is shared already.
    #[inline]
    pub(crate) fn join(&self) {
        if self.away.load(Ordering::Relaxed) {
            self.join_now();
        }
    }

    #[cold]
    fn join_now(&self) {
        // Another thread that has the lock does the same.
        let Some(mut sharing) = self.try_sharing() else { return };
        if sharing.joined.is_some_and(|joined| joined.elapsed() < APART) {
            return;
        }
        let Some(open) = &mut sharing.open else { return };
        // First this, then the look: a commit comes before the look, or finds this.
        self.away.store(false, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let joined = open.join();
        self.away.store(!joined, Ordering::SeqCst);
        if joined {
            sharing.joined = Some(Instant::now());
        }
    }

    /// Gives the mark up: new readers may choose another one from now on, or a thread of the node
    /// needs all of them without a reader.
    pub(crate) fn leave(&self) {
        fence(Ordering::SeqCst);
        if !self.away.load(Ordering::SeqCst) {
            let mut sharing = lock(&self.sharing);
            self.away.store(true, Ordering::SeqCst);
            if let Some(open) = &mut sharing.open {
                open.leave();
            }
        }
    }

    /// Gives up a mark that is not the right one any more, and shares that one.
    pub(crate) fn look(&self) {
        let Some(sharing) = self.try_sharing() else { return };
        let right = sharing.open.as_ref().is_none_or(|open| open.mark == open.chosen());
        drop(sharing);
        if !right {
            self.leave();
        }
        self.join();
    }

    fn try_sharing(&self) -> Option<MutexGuard<'_, MarkState>> {
        match self.sharing.try_lock() {
            Ok(sharing) => Some(sharing),
            Err(TryLockError::Poisoned(sharing)) => Some(sharing.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The shared mark.
    #[cfg(test)]
    pub(crate) fn mark(&self) -> Option<usize> {
        lock(&self.sharing).open.as_ref().and_then(|open| open.mark)
    }
}

impl Open {
    fn new(path: &Path) -> Result<Open> {
        // The reserve is for what nothing goes on without.
        if !descriptors::refill() {
            return Err(Error::io("open", path)(std::io::Error::other("no descriptor is to spare")));
        }
        let mut handle = Handle::open_spare(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        Ok(Open { index: WalIndex::new(&mut handle)?, mark: None, handle })
    }

    /// The mark that a new reader takes without moving one. Where there is none, the next reader
    /// moves one.
    fn chosen(&self) -> Option<usize> {
        let newest = self.index.glance().0;
        if self.index.backfilled() == newest {
            return Some(0);
        }
        (1..5).rev().find(|mark| self.index.read_mark(*mark) == newest)
    }

    fn join(&mut self) -> bool {
        let chosen = self.chosen();
        if chosen.is_some() && chosen == self.mark {
            return true;
        }
        self.leave();
        let Some(mark) = chosen else { return false };
        match self.handle.try_lock(Slot::read(mark), Lock::Shared) {
            Ok(true) => self.mark = Some(mark),
            Ok(false) => return false,
            Err(error) => {
                tracing::debug!(%error, "no read mark is shared");
                return false;
            }
        }
        // It may have been moved before the lock was there, but not after it.
        if self.chosen() != Some(mark) {
            self.leave();
        }
        self.mark.is_some()
    }

    fn leave(&mut self) {
        if let Some(mark) = self.mark.take()
            && let Err(error) = self.handle.unlock(Slot::read(mark), Lock::Shared)
        {
            tracing::debug!(%error, "a read mark stays shared");
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
        mark.open(&path);
        (mark, connection)
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
        let mut handle = Handle::open(&dir.path().join("a.db"), false).unwrap();
        handle.map(0, false).unwrap();
        handle.try_lock(Slot::read(mark), Lock::Exclusive).unwrap()
    }

    #[test]
    fn it_shares_what_a_reader_has_chosen_until_the_next_commit() {
        let dir = tempfile::tempdir().unwrap();
        let (mark, connection) = database(&dir);
        for _ in 0..3 {
            connection.execute(WRITE, []).unwrap();
            mark.leave();
            mark.join();
            mark.look();
            assert_eq!(mark.mark(), None, "no one has read since");
            read(&connection);
            let found = joined(&mark);
            assert!((1..5).contains(&found) && !is_free(&dir, found));
            // Other readers are there beside it, and writers.
            read(&connection);
            connection.execute(WRITE, []).unwrap();
            mark.leave();
            assert!(is_free(&dir, found));
        }
        mark.close();
        mark.join();
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
        // A commit that it was not told of.
        connection.execute(WRITE, []).unwrap();
        read(&connection);
        mark.look();
        assert!(is_free(&dir, 0));
        assert!(joined(&mark) > 0);
    }
}
