//! The retained transaction records of a node.
//!
//! The log is a directory of append-only segments. A segment is a file named `<start>.log`, `start`
//! being 16 hex digits. It begins with one SEGMENT unit ([`crate::wire`]; 96 bytes), which repeats
//! `start` and states the position before the segment's first record, and which page key the
//! records go with. The rest is records:
//!
//! ```text
//! 0000000000000000.log   SEGMENT | TXN | TXN | TXN_BEGIN (PATCH or PAGE)* TXN_END | TXN | ...
//! 0000000004000a10.log   SEGMENT | TXN ...
//! ```
//!
//! **Addresses.** A log address ("LSN") counts record bytes only. A byte at `offset` of a segment's
//! file has the address `start + offset - 96`. A reader that crosses into the next segment
//! therefore sees records and nothing else. A segment ends between two records.
//!
//! Within one opening of the log an address never stands for two different bytes. When bytes are
//! taken back ([`Log::abort`], [`Log::reset`]) the log goes on in a new segment, one address
//! *beyond* the old end. A reader at an address that was taken back gets an error. A reader that
//! stands exactly where the kept bytes end may go on by [`Log::step_over`].
//!
//! **Continuity.** A SEGMENT unit names the address at which the segment before it ends, or says
//! that it follows none (after a reset). A segment before that one whose file ends earlier, or is
//! missing, is a gap.
//!
//! **Opening.** `open` reads the last segment, verifies every hash in it, and cuts off what follows
//! its last complete record. It verifies the segment before that, too, which may not have been
//! fsynced. A segment is fsynced, at the latest, when the second one after it begins. It trusts the
//! heads and lengths of older ones; a replica that receives their units verifies them anyway. At a
//! gap it drops everything before it. A segment whose head was written by another version is an
//! error, and then nothing is changed. Segments of another page key are moved away before
//! ([`move_other`]).
//!
//! **Crash points.** A torn append, a torn head of a new segment, an aborted record: `open` cuts
//! them off. A removal that did not reach the disk: the segment is back. If it no longer fits the
//! ones after it, `open` drops it again.
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::watch;

use crate::checksum::PageKey;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::lock;
use crate::txid::Position;
use crate::wire::Decoder;

mod marks;
mod read;
mod recover;
mod scan;
mod segments;
mod state;
mod tail;
#[cfg(test)]
pub(crate) mod tests;
mod transactions;

pub(crate) use marks::Touched;
#[cfg(test)]
pub(crate) use marks::mark_numbers;
pub(crate) use recover::{key_of, move_other};
pub(crate) use segments::no_room;
use state::LogState;
use tail::Tail;
pub(crate) use transactions::logged;

/// What to do about a segment that is corrupt.
const CURE: &str = "has transactions for replicas that are behind, and for what a damaged database \
    lacks: verify the database, and when that is sound, stop the node, move the directory of the log away \
    and start it again; replicas that are behind compare their pages then";
/// Files of dropped segments that may wait for the next sync to be removed.
const GARBAGE_MAX: usize = 2;

#[derive(Clone, Copy, Debug)]
pub(crate) struct LogOptions {
    /// The database's: what the pages in its records are hashed with.
    pub(crate) page_key: PageKey,
    pub(crate) segment_bytes: u64,
    /// Segments are dropped, oldest first, when all together are larger than this ...
    pub(crate) keep_bytes: u64,
    /// ... or when their newest record was appended longer ago than this, counted from when the log
    /// was opened at the earliest.
    pub(crate) keep_age: Duration,
    /// Segments that a connected replica still needs are kept up to this size all together. The log
    /// never exceeds it.
    pub(crate) quota_bytes: u64,
    /// Newest bytes kept in memory for streams.
    pub(crate) tail_bytes: usize,
}

/// Byte addresses in the log ("LSN") grow for ever, across segments and restarts.
pub(crate) struct Log {
    dir: PathBuf,
    options: LogOptions,
    /// Locked before `tail`. Held while bytes are written, never during an fsync of what was
    /// appended.
    state: Mutex<LogState>,
    tail: Mutex<Tail>,
    end: watch::Sender<u64>,
    /// Held in an fsync: of two at a time, one alone is told of a failure.
    syncing: Mutex<()>,
    /// Locked after `state`. Held while files are removed without that.
    removing: Mutex<()>,
}

/// What `Log::find` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lookup {
    /// The record that follows the transaction with the asked number begins at `lsn`, and states
    /// `before`. Also for the tip: then `lsn` is the end of the last complete record.
    At { lsn: u64, before: Position },
    /// Older than the log reaches.
    TooOld,
    /// Newer than the log's tip.
    NotYet,
}

impl Log {
    /// Opens the log in `dir` (created when missing) and cuts off a torn or unfinished tail.
    ///
    /// # Errors
    /// [`Error::Newer`] and [`Error::Older`], with all files left as they are; [`Error::Io`].
    /// Corrupt bytes are no error: `open` cuts them off or drops them, and a log line says so.
    pub(crate) fn open(dir: &Path, options: LogOptions) -> Result<Arc<Log>> {
        let mut state = recover::recover(dir, options.page_key)?;
        state.retain(&options, Instant::now());
        segments::remove(&std::mem::take(&mut state.garbage).paths);
        Ok(Arc::new(Log {
            dir: dir.to_path_buf(),
            options,
            end: watch::Sender::new(state.end),
            tail: Mutex::new(Tail::new(options.tail_bytes)),
            state: Mutex::new(state),
            syncing: Mutex::new(()),
            removing: Mutex::new(()),
        }))
    }

    /// The position after the last complete record; `None` while the log is empty and was never
    /// `reset`.
    pub(crate) fn tip(&self) -> Option<Position> {
        self.lock().tip
    }

    /// The position before the oldest record.
    pub(crate) fn start(&self) -> Option<Position> {
        let state = self.lock();
        state.segments.front().map(|s| s.before).or(state.tip)
    }

    /// The end: everything before it may be read (it may end in the middle of a record).
    pub(crate) fn end(&self) -> u64 {
        *self.end.borrow()
    }

    /// How often all records were dropped since it was opened.
    pub(crate) fn renewals(&self) -> u64 {
        self.lock().renewals
    }

    /// Bytes of all segment files.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().bytes()
    }

    /// Appends whole units: a part of one record, or the rest of one and whole records after it.
    /// `after` is the position after them when they end a record. On an error the log is as before
    /// the call.
    ///
    /// # Errors
    /// [`Error::Io`], such as for a full disk, a record that the quota has no room for, or a log
    /// that is [doubtful](Log::doubtful). [`Error::Internal`] when the log was never `reset`.
    pub(crate) fn append(&self, units: Bytes, after: Option<Position>) -> Result<()> {
        if units.is_empty() {
            return Ok(());
        }
        let mut state = self.lock();
        if state.make_room(&self.options, units.len() as u64) {
            // Now, not with the next sync: the quota is of the disk.
            segments::remove(&std::mem::take(&mut state.garbage).paths);
            drop(lock(&self.removing));
        }
        let lsn = state.end;
        let begun = state.append(&self.dir, &self.options, &units, after)?;
        self.lock_tail().push(lsn, units);
        // Under the lock: otherwise the end could seem to fall.
        self.end.send_replace(state.end);
        if begun {
            state.retain(&self.options, Instant::now());
        }
        // A removal takes milliseconds, which a commit should not wait for; but the disk is finite.
        if state.garbage.paths.len() > GARBAGE_MAX {
            self.sweep(state);
        }
        Ok(())
    }

    /// Takes back what was appended since the last complete record.
    ///
    /// # Errors
    /// [`Error::Io`] when the file can't be cut; the bytes are taken back nevertheless.
    pub(crate) fn abort(&self) -> Result<()> {
        let mut state = self.lock();
        if state.complete == state.end && !state.sealed {
            return Ok(());
        }
        let Some(tip) = state.tip else { return Ok(()) };
        let lsn = state.complete;
        let (gone, done) = state.take_back(&self.dir, lsn, tip);
        self.moved(&state);
        drop(state);
        segments::remove(&gone);
        done
    }

    /// Drops all records; the next one must follow `at`.
    ///
    /// # Errors
    /// [`Error::Io`] when the new segment can't be written. The records are dropped nevertheless,
    /// and the next append tries again.
    pub(crate) fn reset(&self, at: Position) -> Result<()> {
        self.forget(self.lock(), at)
    }

    /// Whether an fsync failed. The log then takes nothing before it is `reset`.
    pub(crate) fn doubtful(&self) -> bool {
        self.lock().doubtful
    }

    /// Drops all records of a log that is doubtful and whose last one is whole. Returns where the
    /// next one must follow; nothing when the log is not like that.
    ///
    /// # Errors
    /// As for [`Log::reset`].
    pub(crate) fn renew(&self) -> Result<Option<Position>> {
        let state = self.lock();
        match state.tip {
            Some(tip) if state.doubtful && state.complete == state.end => {
                self.forget(state, tip).map(|()| Some(tip))
            }
            _ => Ok(None),
        }
    }

    fn forget(&self, mut state: MutexGuard<'_, LogState>, at: Position) -> Result<()> {
        let gone = state.forget(Some(at));
        self.moved(&state);
        let begun = state.begin_segment(&self.dir).or_else(|error| {
            if !segments::no_room(&error) {
                return Err(error);
            }
            // The old segments may be what fills the disk.
            segments::remove(&gone);
            state.begin_segment(&self.dir)
        });
        // Before the old segments are gone: a crash leaves the old log or the new one.
        let synced = begun.and_then(|()| state.sync_head(&self.dir));
        drop(state);
        segments::remove(&gone);
        synced
    }

    /// Moves all records into another directory. What is left has no position until it is `reset`.
    ///
    /// # Errors
    /// [`Error::Io`]. What was moved by then stays there. What was not is still the log, the newest
    /// part of it.
    pub(crate) fn move_to(&self, kept: &Path) -> Result<()> {
        self.sync()?;
        let mut state = self.lock();
        // Oldest first: what a crash leaves has no gap.
        while let Some(segment) = state.segments.front() {
            let Some(name) = segment.path.file_name() else { break };
            let moved = std::fs::rename(&segment.path, kept.join(name));
            moved.map_err(Error::io("rename", &segment.path))?;
            state.segments.pop_front();
        }
        state.forget(None);
        self.moved(&state);
        drop(state);
        files::sync_directory(kept)?;
        files::sync_directory(&self.dir)
    }

    /// Drops the oldest segment to make room on a full disk, even when a reader needs it. False
    /// when only the current one is left.
    pub(crate) fn drop_oldest(&self) -> bool {
        let mut state = self.lock();
        if state.segments.len() > 1 {
            state.drop_oldest();
        }
        self.sweep(state)
    }

    /// Removes the files that no reader needs, while appends go on. Says whether there were any.
    fn sweep(&self, mut state: MutexGuard<'_, LogState>) -> bool {
        let gone = std::mem::take(&mut state.garbage);
        if gone.paths.is_empty() {
            return false;
        }
        state.dir_dirty = true;
        state.going += gone.bytes;
        let removing = lock(&self.removing);
        drop(state);
        segments::remove(&gone.paths);
        drop(removing);
        self.lock().going -= gone.bytes;
        true
    }

    /// fsyncs what was appended, and removes the files of segments that were dropped. Appends go on
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Io`]: what was appended since the last success may then be lost. It stays so
    /// whatever a later call would find: the log is doubtful.
    pub(crate) fn sync(&self) -> Result<()> {
        let _one = lock(&self.syncing);
        let (files, end, dir) = {
            let mut state = self.lock();
            state.expect_sound(&self.dir)?;
            (state.unsynced(), state.end, std::mem::take(&mut state.dir_dirty))
        };
        let mut synced =
            files.iter().try_for_each(|(f, path)| f.sync_data().map_err(Error::io("fsync", path)));
        if dir {
            synced = synced.and_then(|()| files::sync_directory(&self.dir));
        }
        let mut state = self.lock();
        state.dir_dirty |= dir && synced.is_err();
        state.noted(synced)?;
        // One that is made beside this may have been told instead.
        state.expect_sound(&self.dir)?;
        let is_last = |file: &Arc<_>| files.last().is_some_and(|(last, _)| Arc::ptr_eq(last, file));
        if state.file.as_ref().is_some_and(is_last) {
            state.synced = Some(end);
        }
        state.rotated.retain(|(file, _)| !files.iter().any(|(synced, _)| Arc::ptr_eq(file, synced)));
        state.retain(&self.options, Instant::now());
        self.sweep(state);
        Ok(())
    }

    /// Cuts bytes of this log into units.
    pub(crate) fn decoder(&self) -> Decoder {
        Decoder::new(Some(self.options.page_key))
    }

    /// Has all who watch the end look again.
    pub(crate) fn wake(&self) {
        self.end.send_modify(|_| {});
    }

    /// The end, to wait for more.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// Keeps what is at and after `lsn` (up to `quota_bytes`) until the pin is dropped or moved on.
    pub(crate) fn pin(self: &Arc<Self>, lsn: u64) -> Pin {
        let mut state = self.lock();
        state.next_pin += 1;
        let id = state.next_pin;
        state.pins.insert(id, lsn);
        Pin { log: self.clone(), id }
    }

    /// Tells readers that the end moved otherwise than by an append.
    fn moved(&self, state: &LogState) {
        self.lock_tail().clear();
        self.end.send_replace(state.end);
    }

    fn retain(&self, change: impl FnOnce(&mut LogState)) {
        let mut state = self.lock();
        change(&mut state);
        state.retain(&self.options, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, LogState> {
        lock(&self.state)
    }

    fn lock_tail(&self) -> MutexGuard<'_, Tail> {
        lock(&self.tail)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("dir", &self.dir).field("end", &self.end()).finish_non_exhaustive()
    }
}

/// Keeps a part of the log for a reader; see [`Log::pin`].
#[derive(Debug)]
pub(crate) struct Pin {
    log: Arc<Log>,
    id: u64,
}

impl Pin {
    /// Gives free what is before `lsn`.
    pub(crate) fn advance(&self, lsn: u64) {
        self.log.retain(|state| {
            state.pins.insert(self.id, lsn);
        });
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.log.retain(|state| {
            state.pins.remove(&self.id);
        });
    }
}
