//! What the threads of one open database share: the wal-index, the WAL, the tip, and how a thread
//! reads a page as of a frame.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::checksum::PageKey;
use crate::context::NodeContext;
use crate::engine::figures::WalFigures;
use crate::engine::file::anchor::{Anchor, Anchors, FileState};
use crate::engine::file::progress::{Asked, CaptureProgress};
use crate::engine::file::unsynced_marker;
use crate::engine::file::wal_bound::Bound;
use crate::engine::file::wal_file::WalFile;
use crate::engine::file::watch::{Astray, Watch};
use crate::engine::file::witnesses::Witnesses;
use crate::engine::options::EngineOptions;
use crate::error::{Blame, Cause, Error, Result};
use crate::lock::lock;
use crate::log::Log;
use crate::page::PageSize;
use crate::report::Condition;
use crate::sqlite::{FileLocks, Handle, Lock, Slot, WalIndex};
use crate::txid::Position;
use crate::wal::{IndexHeader, frame_bytes};

pub(in crate::engine) use crate::engine::file::tip::Tip;

/// Commit boundaries of a generation that the node remembers. A backfill that readers hold back can
/// then still stop at a known position.
const BOUNDARIES_MAX: usize = 1024;
/// How long another process may take to write the wal-index's header. SQLite needs less than a
/// microsecond, unless the system takes its processor away. And how long to wait between two looks.
const HEADER_WAIT: Duration = Duration::from_millis(200);
const HEADER_STEP: Duration = Duration::from_micros(100);

/// What a role does when the files turn out not to be what they were.
pub(in crate::engine) type WhenLost = fn(&OpenDatabase, &Error);

/// State that is common to a primary and a replica with an open file.
#[derive(Debug)]
pub(in crate::engine) struct OpenDatabase {
    pub(in crate::engine) options: EngineOptions,
    pub(in crate::engine) node: Arc<NodeContext>,
    pub(in crate::engine) page_size: PageSize,
    pub(in crate::engine) page_key: PageKey,
    pub(in crate::engine) index: WalIndex,
    pub(in crate::engine) wal: WalFile,
    pub(in crate::engine) log: Arc<Log>,
    tip: Mutex<Tip>,
    tip_moved: Condvar,
    /// The same for tasks.
    moved: watch::Sender<()>,
    pub(in crate::engine) progress: CaptureProgress,
    pub(in crate::engine) asked: Mutex<Asked>,
    boundaries: Mutex<Vec<Tip>>,
    pub(in crate::engine) anchors: Mutex<Anchors>,
    /// Read-held while a thread looks a page up and reads it. Write-held while a thread restarts
    /// the WAL.
    pub(in crate::engine) generation: RwLock<()>,
    /// The thread that copies frames into the database file holds it.
    pub(in crate::engine) backfill: Mutex<()>,
    pub(in crate::engine) bound: Bound,
    locks: Option<Arc<FileLocks>>,
    pub(in crate::engine) watch: Watch,
    /// The node could not write the log, which waits to begin again after a whole transaction.
    pub(in crate::engine) log_broken: Mutex<bool>,
    /// Why no one can believe the files any more.
    broken: Mutex<Option<Cause>>,
    when_lost: Mutex<WhenLost>,
    /// The files are not those that the node opened, or not as the node left them.
    lost: AtomicBool,
}

impl OpenDatabase {
    #[expect(clippy::too_many_arguments, reason = "the parts of one struct, made in one place")]
    pub(in crate::engine) fn new(
        options: EngineOptions,
        node: Arc<NodeContext>,
        page_size: PageSize,
        index: WalIndex,
        wal: WalFile,
        log: Arc<Log>,
        anchors: Anchors,
        tip: Tip,
        locks: Option<Arc<FileLocks>>,
        watch: Watch,
    ) -> Arc<OpenDatabase> {
        Arc::new(OpenDatabase {
            page_key: options.page_key(),
            options,
            node,
            page_size,
            index,
            wal,
            log,
            tip: Mutex::new(tip),
            tip_moved: Condvar::new(),
            moved: watch::Sender::new(()),
            progress: CaptureProgress::default(),
            asked: Mutex::default(),
            boundaries: Mutex::new(vec![tip]),
            anchors: Mutex::new(anchors),
            generation: RwLock::new(()),
            backfill: Mutex::new(()),
            bound: Bound::default(),
            locks,
            watch,
            log_broken: Mutex::new(false),
            broken: Mutex::new(None),
            when_lost: Mutex::new(|_, _| {}),
            lost: AtomicBool::new(false),
        })
    }

    pub(in crate::engine) fn tip(&self) -> Tip {
        *lock(&self.tip)
    }

    /// Moves the tip. The caller wakes waiters in this crate and outside through `node.applied`.
    pub(in crate::engine) fn set_tip(&self, tip: Tip) {
        let before = std::mem::replace(&mut *lock(&self.tip), tip);
        let mut boundaries = lock(&self.boundaries);
        if before.salts != tip.salts {
            boundaries.clear();
        }
        if boundaries.len() == BOUNDARIES_MAX {
            // Every second one suffices: a backfill only stops a little earlier.
            let mut keep = false;
            boundaries.retain(|_| {
                keep = !keep;
                keep
            });
        }
        boundaries.push(tip);
        drop(boundaries);
        self.options.read_mark.follow();
        self.wake();
    }

    /// Moves the tip to a state that does not follow from the commits before it. From now on no
    /// boundary before it is one: the next start would count its commit from an anchor there like
    /// any other.
    pub(in crate::engine) fn leap(&self, tip: Tip) {
        lock(&self.boundaries).clear();
        self.set_tip(tip);
    }

    /// The newest known commit boundary at or before `frame`.
    pub(in crate::engine) fn boundary(&self, frame: u32) -> Option<Tip> {
        lock(&self.boundaries).iter().rev().find(|t| t.frame <= frame).copied()
    }

    /// No backfill ends between this frame and the last one that capture took.
    pub(in crate::engine) fn forget_boundaries(&self, from: u32) {
        lock(&self.boundaries).retain(|tip| tip.frame < from);
    }

    /// Capture has taken a commit.
    pub(in crate::engine) fn taken(&self, before: &Tip, now: &Tip) {
        let asked = lock(&self.asked).hear(before, now);
        if asked {
            // A thread that has looked already waits by the time that this has the lock.
            drop(lock(&self.tip));
            self.tip_moved.notify_all();
        }
    }

    /// Waits until `look` finds something at the tip. `look` says for how long to wait before it
    /// looks again, should the tip not move before.
    pub(in crate::engine) fn wait_moved<T>(
        &self,
        mut look: impl FnMut(&Tip) -> Result<Result<T, Duration>>,
    ) -> Result<T> {
        let mut tip = lock(&self.tip);
        loop {
            match look(&tip)? {
                Ok(found) => return Ok(found),
                Err(left) => {
                    tip = self.tip_moved.wait_timeout(tip, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    /// Has all who wait look again.
    pub(in crate::engine) fn wake(&self) {
        self.tip_moved.notify_all();
        self.moved.send_replace(());
    }

    /// Wakes a task whenever the tip moves. It keeps nothing open.
    pub(in crate::engine) fn moved(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    /// Fails when no one can believe the files any more, and says why.
    pub(in crate::engine) fn intact(&self) -> Result<()> {
        lock(&self.broken).as_ref().map_or(Ok(()), |why| Err(Error::Stopped(why.clone())))
    }

    /// No role can go on with the files: stops replication of this database for good, loudly.
    pub(in crate::engine) fn give_up(&self, error: &Error) {
        if lock(&self.broken).replace(error.cause()).is_none() && self.node.failure().is_none() {
            self.wake();
            self.node.fail(error);
        }
    }

    /// Says so when an error is that of a full disk.
    pub(in crate::engine) fn note_room(&self, error: &Error) {
        if error.no_room() {
            self.node.no_room(error);
        }
    }

    /// Looks whether the files are those that the node opened. Unless a thread copies into the
    /// database just now, looks too whether it is as this node left it.
    ///
    /// # Errors
    /// [`Error::Stopped`] when they are not. From then on the node neither believes nor writes
    /// anything here.
    pub(in crate::engine) fn expect_files(&self) -> Result<()> {
        let found = match self.backfill.try_lock() {
            Err(TryLockError::WouldBlock) => self.watch.astray(),
            Ok(_) | Err(TryLockError::Poisoned(_)) => self.watch.as_left(),
        };
        found.map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// The same for a caller that holds `backfill`.
    pub(in crate::engine) fn expect_as_left(&self) -> Result<()> {
        self.watch.as_left().map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// Fails if another process wrote to the database until now, when a transaction has read all
    /// that it reads. A transaction must not commit what it read from such a file. While a thread
    /// copies frames into it, that thread looks.
    ///
    /// # Errors
    /// As for [`OpenDatabase::expect_files`].
    pub(in crate::engine) fn expect_unwritten(&self) -> Result<()> {
        let _nobody_copies = match self.backfill.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(held)) => held.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        self.watch.written().map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// Writes to the database file, which is then as this node left it. The caller holds
    /// `backfill`, or is alone.
    pub(in crate::engine) fn writing<T>(&self, write: impl FnOnce() -> Result<T>) -> Result<T> {
        self.expect_as_left()?;
        let done = write();
        self.watch.leave()?;
        done
    }

    /// Whether the files are not what they were.
    pub(in crate::engine) fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn lose(&self, found: &Astray) -> Error {
        let cause = Cause::new(found.to_string(), Blame::Outside);
        let error = Error::Stopped(cause.clone());
        // First: the node refuses every commit from now on. The last look of capture then has all
        // that was acknowledged.
        let known = lock(&self.broken).replace(cause).is_some() && self.lost();
        self.lost.store(true, Ordering::Release);
        if !known {
            self.node.set_astray(true);
            self.disown();
            self.wake();
            let when_lost = *lock(&self.when_lost);
            when_lost(self, &error);
        }
        error
    }

    /// Sets what to do when the files turn out not to be what they were.
    pub(in crate::engine) fn when_lost(&self, run: WhenLost) {
        *lock(&self.when_lost) = run;
    }

    /// Has the next start believe nothing of the file but its hash. An anchor of a file at rest
    /// needs no more: it names the file's time.
    fn disown(&self) {
        let file = self.file_state();
        if let FileState::AtRest { .. } = file {
            return;
        }
        let nowhere = Tip { frame: 0, ..self.tip() };
        // Both anchors.
        for _ in 0..2 {
            if let Err(error) = self.write_anchor(&nowhere, file, true) {
                self.node.report(Condition::AnchorNotReplaced { error: &error });
            }
        }
    }

    /// Takes locks again that this process's connections have lost, and says so.
    pub(in crate::engine) fn mend_locks(&self, handle: &mut Handle) -> Result<()> {
        let Some(locks) = &self.locks else { return Ok(()) };
        if locks.mend(handle)? {
            let (database, times) = (self.options.paths.database(), locks.losses());
            self.node.report(Condition::LocksLost { database, times });
        }
        Ok(())
    }

    /// Whether a reader of this process may need an older state than the read mark of this slot
    /// says. The doubt lasts until a thread has seen the mark without a reader.
    pub(in crate::engine) fn doubts(&self, slot: Slot) -> bool {
        self.locks.as_ref().is_some_and(|locks| locks.doubts(slot))
    }

    pub(in crate::engine) fn doubt_no_more(&self, slot: Slot) {
        if let Some(locks) = &self.locks {
            locks.doubt_no_more(slot);
        }
    }

    /// Tries to take a lock for longer than a moment. Where the system has such a lock, nothing
    /// else in this process can drop it by mistake.
    pub(in crate::engine) fn try_hold(&self, handle: &mut Handle, slot: Slot) -> Result<bool> {
        match &self.locks {
            Some(locks) => locks.try_hold(slot),
            None => handle.try_lock(slot, Lock::Exclusive),
        }
    }

    /// Gives back what [`OpenDatabase::try_hold`] took.
    pub(in crate::engine) fn give_back(&self, handle: &mut Handle, slot: Slot) -> Result<()> {
        match &self.locks {
            Some(locks) => locks.give_back(slot),
            None => handle.unlock(slot, Lock::Exclusive),
        }
    }

    /// How often this process's connections have lost their locks.
    pub(in crate::engine) fn locks_lost(&self) -> u64 {
        self.locks.as_deref().map_or(0, FileLocks::losses)
    }

    /// Gives back the locks that are held for life. The threads have ended.
    pub(in crate::engine) fn release_locks(&self) {
        self.options.read_mark.close();
        if let Some(locks) = &self.locks {
            locks.release();
        }
    }

    /// The header, which another process may be writing for a moment.
    pub(in crate::engine) fn settled_header(&self) -> Result<IndexHeader> {
        let end = Instant::now() + HEADER_WAIT;
        loop {
            if let Some(header) = self.header() {
                return Ok(header);
            }
            if Instant::now() >= end {
                return Err(Error::Timeout {
                    what: "the wal-index's header, which somebody is in the middle of writing".into(),
                    after: HEADER_WAIT,
                });
            }
            std::thread::sleep(HEADER_STEP);
        }
    }

    /// The header, if no process is writing it just now.
    pub(in crate::engine) fn header(&self) -> Option<IndexHeader> {
        for _ in 0..1000 {
            if let Some(header) = self.index.header() {
                return Some(header);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Syncs the WAL. After a failure no one knows what of it is on the disk, on this boot of the
    /// machine or another.
    pub(in crate::engine) fn sync_wal(&self) -> Result<()> {
        self.note_sync(self.wal.sync())
    }

    /// The same where WRITE has been held since the last sync: only this node wrote.
    pub(in crate::engine) fn sync_own_wal(&self) -> Result<()> {
        self.note_sync(self.wal.sync_own())
    }

    fn note_sync(&self, synced: Result<()>) -> Result<()> {
        if synced.is_err() && self.options.durability.ships_unsynced() {
            unsynced_marker::doubt(&self.options.paths);
        }
        synced
    }

    /// What the newest anchor says of the database file.
    pub(in crate::engine) fn file_state(&self) -> FileState {
        let newest = lock(&self.anchors).newest_first().first().map(|a| a.file);
        newest.unwrap_or(FileState::Backfilling(Witnesses::default()))
    }

    /// What an anchor is to say of a file that alone is the state at `position`, and that no
    /// process writes to. The caller holds `backfill`, or is alone.
    pub(in crate::engine) fn at_rest(&self, position: Position) -> Result<FileState> {
        self.expect_as_left()?;
        let now = self.watch.modified()?;
        let stamped = match self.file_state() {
            FileState::AtRest { modified, .. } if modified == now => Some(now),
            _ => self.watch.stamp()?,
        };
        // Without such a time only a hash tells later, or the WAL.
        Ok(stamped.map_or(FileState::Backfilling(Witnesses::default()), |modified| FileState::AtRest {
            position,
            modified,
        }))
    }

    /// Writes an anchor for a commit boundary of the generation that is current.
    pub(in crate::engine) fn write_anchor(&self, tip: &Tip, file: FileState, durable: bool) -> Result<()> {
        self.put_anchor(tip, file, false, durable)
    }

    /// Writes, durably, the anchor of a commit frame that the caller is about to write. The anchor
    /// says which state that frame leads to.
    pub(in crate::engine) fn announce(&self, tip: &Tip, file: FileState) -> Result<()> {
        self.put_anchor(tip, file, true, true)
    }

    fn put_anchor(&self, tip: &Tip, file: FileState, ahead: bool, durable: bool) -> Result<()> {
        let mut anchors = lock(&self.anchors);
        let anchor = Anchor {
            generation: anchors.generation(),
            salts: tip.salts,
            frame: tip.frame,
            sum: tip.sum,
            position: tip.position,
            pages: tip.pages,
            file,
            ahead,
        };
        anchors.write(anchor, durable)
    }

    /// The length of the WAL's part that counts.
    pub(in crate::engine) fn wal_bytes(&self) -> u64 {
        u64::from(self.tip().frame) * frame_bytes(self.page_size) as u64
    }

    pub(in crate::engine) fn figures(&self) -> WalFigures {
        WalFigures {
            locks_lost: self.locks_lost(),
            frames: self.tip().frame,
            backfilled: self.index.backfilled(),
        }
    }

    /// The database file, where this node has a descriptor of its own.
    pub(in crate::engine) fn file(&self) -> Option<&File> {
        self.locks.as_deref().and_then(FileLocks::database)
    }

    pub(in crate::engine) fn path(&self) -> &Path {
        self.options.paths.database()
    }
}

/// The index header that makes a tip the end of the WAL.
pub(in crate::engine) fn index_header(
    base: &OpenDatabase,
    tip: &Tip,
    change: u32,
    big_endian: bool,
) -> IndexHeader {
    IndexHeader::of(base.page_size, change, big_endian, tip.frame, tip.pages, tip.sum, tip.salts)
}
