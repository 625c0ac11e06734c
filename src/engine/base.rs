//! What the threads of one open database share: the wal-index, the WAL, the tip, and how a page is read as of a frame.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use bytes::BytesMut;

use crate::checksum::PageHash;
use crate::engine::anchor::{Anchor, Anchors, FileState, Witness, Witnesses};
use crate::engine::bound::Bound;
use crate::engine::newest::{Found, Newest};
use crate::engine::numbers::{Asked, Patience, Progress};
use crate::engine::wal_file::WalFile;
use crate::engine::watch::{Astray, Watch};
use crate::engine::{Durability, EngineOptions, Piece, WalFigures, unsynced};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::node::{Node, Part};
use crate::page::{PageNo, PageSize};
use crate::sqlite::{FileLocks, Handle, Slot, WalIndex};
use crate::status::{Event, Role};
use crate::txid::Position;
use crate::wal::{FRAME_HEADER_BYTES, IndexHeader, Salts, WalSum, frame_bytes, frame_offset, region_of};

/// Commit boundaries that are remembered within a generation, so that a backfill that readers hold back can still
/// stop at a known position.
const BOUNDARIES_MAX: usize = 1024;
/// How long somebody may take to write the wal-index's header, for which SQLite needs less than a microsecond unless the system takes its processor away;
/// and how long between two looks.
const HEADER_WAIT: Duration = Duration::from_millis(200);
const HEADER_STEP: Duration = Duration::from_micros(100);

/// The last commit that this node has taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Tip {
    pub(super) salts: Salts,
    pub(super) frame: u32,
    pub(super) sum: WalSum,
    pub(super) position: Position,
    pub(super) pages: u32,
}

/// State that is common to a primary and a replica with an open file.
#[derive(Debug)]
pub(super) struct Base {
    pub(super) options: EngineOptions,
    pub(super) node: Arc<Node>,
    pub(super) page_size: PageSize,
    pub(super) index: WalIndex,
    pub(super) wal: WalFile,
    pub(super) log: Arc<Log>,
    tip: Mutex<Tip>,
    tip_moved: Condvar,
    pub(super) progress: Progress,
    pub(super) asked: Mutex<Asked>,
    boundaries: Mutex<Vec<Tip>>,
    pub(super) anchors: Mutex<Anchors>,
    /// Read-held while a page is looked up and read; write-held while the WAL is restarted.
    pub(super) generation: RwLock<()>,
    /// Held by whoever copies frames into the database file.
    pub(super) backfill: Mutex<()>,
    pub(super) stop: AtomicBool,
    pub(super) bound: Bound,
    locks: Option<Arc<FileLocks>>,
    pub(super) watch: Watch,
    /// The log could not be written and waits for a whole transaction to begin again behind.
    pub(super) log_broken: Mutex<bool>,
    failed: Mutex<Option<String>>,
    /// The files are not those that were opened, or not as they were left.
    lost: AtomicBool,
}

impl Base {
    #[expect(clippy::too_many_arguments, reason = "the parts of one struct, made in one place")]
    pub(super) fn new(
        options: EngineOptions,
        node: Arc<Node>,
        page_size: PageSize,
        index: WalIndex,
        wal: WalFile,
        log: Arc<Log>,
        anchors: Anchors,
        tip: Tip,
        locks: Option<Arc<FileLocks>>,
        watch: Watch,
    ) -> Arc<Base> {
        Arc::new(Base {
            options,
            node,
            page_size,
            index,
            wal,
            log,
            tip: Mutex::new(tip),
            tip_moved: Condvar::new(),
            progress: Progress::default(),
            asked: Mutex::default(),
            boundaries: Mutex::new(vec![tip]),
            anchors: Mutex::new(anchors),
            generation: RwLock::new(()),
            backfill: Mutex::new(()),
            stop: AtomicBool::new(false),
            bound: Bound::default(),
            locks,
            watch,
            log_broken: Mutex::new(false),
            failed: Mutex::new(None),
            lost: AtomicBool::new(false),
        })
    }

    pub(super) fn tip(&self) -> Tip {
        *lock(&self.tip)
    }

    /// Moves the tip; waiters in this crate and outside are woken by the caller through `node.applied`.
    pub(super) fn set_tip(&self, tip: Tip) {
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
        self.tip_moved.notify_all();
    }

    /// Moves the tip to a state that does not follow from the commits before it. From now on no boundary before it is one:
    /// an anchor there would have its commit counted like any other.
    pub(super) fn leap(&self, tip: Tip) {
        lock(&self.boundaries).clear();
        self.set_tip(tip);
    }

    /// The newest known commit boundary at or before `frame`.
    pub(super) fn boundary(&self, frame: u32) -> Option<Tip> {
        lock(&self.boundaries).iter().rev().find(|t| t.frame <= frame).copied()
    }

    /// No backfill ends between this frame and the last one that was taken.
    pub(super) fn forget_boundaries(&self, from: u32) {
        lock(&self.boundaries).retain(|tip| tip.frame < from);
    }

    /// Capture has taken a commit.
    pub(super) fn taken(&self, before: &Tip, now: &Tip) {
        let asked = lock(&self.asked).hear(before, now);
        if asked {
            // Who has looked already waits by the time that this has the lock.
            drop(lock(&self.tip));
            self.tip_moved.notify_all();
        }
    }

    /// Waits until the tip has reached the frame, or the WAL was restarted (then it had).
    pub(super) fn wait_tip(&self, salts: Salts, frame: u32) -> Result<Tip> {
        self.wait_captured(|tip| (tip.salts != salts || tip.frame >= frame).then_some(*tip))
    }

    /// Waits until capture has done something, for as long as it does anything.
    pub(super) fn wait_captured<T>(&self, done: impl Fn(&Tip) -> Option<T>) -> Result<T> {
        let mut patience = Patience::new(&self.progress, Instant::now());
        let mut tip = lock(&self.tip);
        loop {
            self.check()?;
            if let Some(found) = done(&tip) {
                return Ok(found);
            }
            let left = patience.left(&self.progress, Instant::now())?;
            tip = self.tip_moved.wait_timeout(tip, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Fails when the engine has stopped, and says why.
    pub(super) fn check(&self) -> Result<()> {
        self.sound()?;
        if self.stopping() { Err(Error::ShutDown) } else { Ok(()) }
    }

    pub(super) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Fails when the engine has stopped by a failure.
    pub(super) fn sound(&self) -> Result<()> {
        lock(&self.failed).as_ref().map_or(Ok(()), |why| Err(Error::Stopped(why.clone())))
    }

    /// Stops replication of this database for good, loudly.
    pub(super) fn fail(&self, error: &Error) {
        if matches!(error, Error::ShutDown) {
            return;
        }
        {
            let mut failed = lock(&self.failed);
            if failed.is_some() {
                return; // The first failure is the cause of the others.
            }
            *failed = Some(error.cause());
        }
        self.tip_moved.notify_all();
        self.node.fail(error);
    }

    /// Whether it has failed, also when it is being closed.
    pub(super) fn failed(&self) -> bool {
        lock(&self.failed).is_some()
    }

    /// Says so when an error is that of a full disk.
    pub(super) fn note_room(&self, error: &Error) {
        if error.no_room() {
            self.node.no_room(error);
        }
    }

    /// Looks whether the files are those that were opened, and the database as this node left it, as far as nobody copies into it just now.
    ///
    /// # Errors
    /// [`Error::Stopped`] when they are not. From then on nothing here is believed, nor written.
    pub(super) fn expect_files(&self) -> Result<()> {
        let found = match self.backfill.try_lock() {
            Err(TryLockError::WouldBlock) => self.watch.astray(),
            Ok(_) | Err(TryLockError::Poisoned(_)) => self.watch.as_left(),
        };
        found.map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// The same for who holds `backfill`.
    pub(super) fn expect_as_left(&self) -> Result<()> {
        self.watch.as_left().map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// Whether nobody else wrote to the database until now, when a transaction has read all that it reads: what is read from such a file is not
    /// committed. While frames are being copied into it, who copies looks.
    ///
    /// # Errors
    /// As for [`Base::expect_files`].
    pub(super) fn expect_unwritten(&self) -> Result<()> {
        let _nobody_copies = match self.backfill.try_lock() {
            Ok(held) => held,
            Err(TryLockError::Poisoned(held)) => held.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        self.watch.written().map_or(Ok(()), |found| Err(self.lose(&found)))
    }

    /// Writes to the database file, which is then as this node left it. The caller holds `backfill`, or is alone.
    pub(super) fn writing<T>(&self, write: impl FnOnce() -> Result<T>) -> Result<T> {
        self.expect_as_left()?;
        let done = write();
        self.watch.leave()?;
        done
    }

    /// Whether the files are not what they were.
    pub(super) fn lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    fn lose(&self, found: &Astray) -> Error {
        let error = Error::Stopped(found.to_string());
        // First: who commits from now on is refused, so that the last look of capture has all that was acknowledged.
        let known = lock(&self.failed).replace(found.to_string()).is_some() && self.lost();
        self.lost.store(true, Ordering::Release);
        if !known {
            self.node.set_astray(true);
            self.disown();
            if self.node.roles.borrow().role == Role::Replica {
                // Which opens what is there, and is led to the primary's state.
                let text = found.to_string();
                tracing::error!(database = %self.options.path.display(), text, "the replica's files are opened anew");
                self.node.set_problem(Part::Engine, Some(text));
            } else {
                self.tip_moved.notify_all();
                self.node.fail(&error);
            }
        }
        error
    }

    /// Has the next start believe nothing of the file but its hash. An anchor of a file at rest needs no more: it names that one's time.
    fn disown(&self) {
        let file = self.file_state();
        if let FileState::AtRest { .. } = file {
            return;
        }
        let nowhere = Tip { frame: 0, ..self.tip() };
        // Both of them.
        for _ in 0..2 {
            if let Err(error) = self.write_anchor(&nowhere, file, true) {
                tracing::error!(%error, "an anchor of files that are not there any more can't be replaced");
            }
        }
    }

    /// Takes locks again that this process's connections have lost, and says so.
    pub(super) fn mend_locks(&self, handle: &mut Handle) -> Result<()> {
        let Some(locks) = &self.locks else { return Ok(()) };
        if locks.mend(handle)? {
            let (database, times) = (self.options.path.clone(), locks.losses());
            tracing::error!(
                database = %database.display(), times,
                "locks were dropped and are taken again: something in this process opened and closed the database by other means than SQLite; use `Db::snapshot_to` for copies"
            );
            self.node.tell(Event::LocksLost { database, times });
        }
        Ok(())
    }

    /// Whether a reader of this process may need an older state than the read mark of this slot says; it is asked until it was seen without one.
    pub(super) fn doubts(&self, slot: Slot) -> bool {
        self.locks.as_ref().is_some_and(|locks| locks.doubts(slot))
    }

    pub(super) fn doubt_no_more(&self, slot: Slot) {
        if let Some(locks) = &self.locks {
            locks.doubt_no_more(slot);
        }
    }

    /// How often this process's connections have lost their locks.
    pub(super) fn locks_lost(&self) -> u64 {
        self.locks.as_deref().map_or(0, FileLocks::losses)
    }

    /// Gives back what is held for life. The threads have ended.
    pub(super) fn release_locks(&self) {
        if let Some(locks) = &self.locks {
            locks.release();
        }
    }

    /// The header, which somebody else may be writing for a moment.
    pub(super) fn settled_header(&self) -> Result<IndexHeader> {
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

    /// The header, if nobody is writing it just now.
    pub(super) fn header(&self) -> Option<IndexHeader> {
        for _ in 0..1000 {
            if let Some(header) = self.index.header() {
                return Some(header);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Reads a page as of a frame: from the WAL, or from the file when the WAL up to that frame does not have it.
    pub(super) fn read_page(
        &self,
        handle: &mut Handle,
        page: PageNo,
        frame: u32,
        buffer: &mut [u8],
    ) -> Result<()> {
        match self.index.lookup(page.get(), 1, frame) {
            Some(found) => self.read_frame(found, buffer),
            None => handle.read(buffer, page.offset(self.page_size)),
        }
    }

    /// Whether two frames have the same page image.
    pub(super) fn is_same_image(&self, one: u32, other: u32) -> Result<bool> {
        let mut images = [vec![0; self.page_size.bytes()], vec![0; self.page_size.bytes()]];
        for (image, frame) in images.iter_mut().zip([one, other]) {
            self.read_frame(frame, image)?;
        }
        Ok(images[0] == images[1])
    }

    pub(super) fn read_frame(&self, frame: u32, buffer: &mut [u8]) -> Result<()> {
        self.wal.read(buffer, frame_offset(frame, self.page_size) + FRAME_HEADER_BYTES as u64)
    }

    /// Reads a run of pages as of a frame. The lock page reads as zeros.
    pub(super) fn read_run(
        &self,
        handle: &mut Handle,
        first: PageNo,
        frame: u32,
        buffer: &mut [u8],
    ) -> Result<()> {
        handle.read(buffer, first.offset(self.page_size))?;
        for (number, page) in (first.get()..).zip(buffer.chunks_exact_mut(self.page_size.bytes())) {
            if let Some(found) = self.index.lookup(number, 1, frame) {
                self.read_frame(found, page)?;
            }
            if PageNo::new(number).is_some_and(|n| n.is_lock_page(self.page_size)) {
                page.fill(0);
            }
        }
        Ok(())
    }

    /// Reads up to `max_bytes` (at least one page) of pages from `first` on, as of the tip.
    pub(super) fn read_piece(&self, handle: &mut Handle, first: PageNo, max_bytes: usize) -> Result<Piece> {
        let size = self.page_size.bytes();
        // No restart of the WAL between looking a frame up and reading it.
        let _generation = self.generation.read().unwrap_or_else(PoisonError::into_inner);
        let tip = self.tip();
        let left = tip.pages.saturating_sub(first.get() - 1) as usize;
        let count = (max_bytes / size).max(1).min(left);
        let mut data = BytesMut::zeroed(count * size);
        if count > 0 {
            self.read_run(handle, first, tip.frame, &mut data)?;
        }
        Ok(Piece { position: tip.position, pages: tip.pages, data: data.freeze() })
    }

    /// Maps the index up to the region of a frame.
    pub(super) fn map_to(&self, handle: &mut Handle, frame: u32) -> Result<()> {
        if frame == 0 { Ok(()) } else { self.index.ensure(handle, region_of(frame), true) }
    }

    /// Syncs the WAL. After a failure nobody knows what of it is on the disk, on this boot of the machine or another.
    pub(super) fn sync_wal(&self) -> Result<()> {
        let synced = self.wal.sync();
        if synced.is_err() && self.options.durability == Durability::Unsynced {
            unsynced::doubt(&self.options.side);
        }
        synced
    }

    /// What the newest anchor says of the database file.
    pub(super) fn file_state(&self) -> FileState {
        let newest = lock(&self.anchors).newest_first().first().map(|a| a.file);
        newest.unwrap_or(FileState::Backfilling(Witnesses::default()))
    }

    /// What an anchor is to say of a file that alone is the state at `position`, and that nobody writes to. The caller holds `backfill`, or is alone.
    pub(super) fn at_rest(&self, position: Position) -> Result<FileState> {
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

    /// Pages behind frame `copied` whose images at `tip` the file does not have yet: the first page, without which a database does not grow,
    /// and which is copied last; the highest ones, which are copied before it; and some between. Where there are others, none whose bytes come back by
    /// themselves when a table is emptied.
    pub(super) fn witnesses(&self, handle: &mut Handle, copied: u32, tip: &Tip) -> Result<Witnesses> {
        const LAST: usize = Witnesses::MAX / 2;
        let (mut found, mut empty) = (Vec::<Witness>::new(), Vec::new());
        let (mut image, mut there) = (vec![0; self.page_size.bytes()], vec![0; self.page_size.bytes()]);
        let mut newest = Newest::descending(&self.index, copied + 1, tip.frame);
        let first = self.index.lookup(PageNo::FIRST.get(), copied + 1, tip.frame);
        let mut pages: Vec<Found> = first.map(|frame| (PageNo::FIRST.get(), frame)).into_iter().collect();
        loop {
            // Beyond the last ones, a page is looked at when one of each step is not found yet.
            let (step, mut wanted) = ((pages.len() / (Witnesses::MAX - LAST)).max(1), 0);
            for (at, (page, frame)) in pages.iter().copied().enumerate() {
                if found.len() == Witnesses::MAX {
                    break;
                }
                let Some(page) = PageNo::new(page).filter(|page| at >= wanted && page.get() <= tip.pages)
                else {
                    continue;
                };
                if found.iter().any(|witness| witness.page() == page) {
                    continue;
                }
                self.read_frame(frame, &mut image)?;
                if let Err(error) = handle.read(&mut there, page.offset(self.page_size)) {
                    // It is about to be written over.
                    tracing::warn!(%error, ?page, "an image that the WAL replaces can't be read");
                    continue;
                }
                if image == there {
                    continue;
                }
                let witness = Witness::new(page, PageHash::of(page, &there));
                if page != PageNo::FIRST && is_empty_leaf(&there) {
                    if empty.len() < Witnesses::MAX && !empty.contains(&witness) {
                        empty.push(witness);
                    }
                    continue;
                }
                found.push(witness);
                if found.len() >= LAST {
                    wanted = at + step;
                }
            }
            if found.len() == Witnesses::MAX || !newest.next(&mut pages) {
                return Ok(found.into_iter().chain(empty).collect());
            }
        }
    }

    /// What the last anchor says of the file; nobody copies any more.
    pub(super) fn left_behind(&self, handle: &mut Handle) -> Result<FileState> {
        match self.file_state() {
            state @ FileState::AtRest { .. } => Ok(state),
            FileState::Backfilling(before) => {
                let witnesses = self.witnesses(handle, 0, &self.tip())?;
                Ok(FileState::Backfilling(witnesses.marked(before.mark)))
            }
        }
    }

    /// Writes an anchor for a commit boundary of the generation that is current.
    pub(super) fn write_anchor(&self, tip: &Tip, file: FileState, durable: bool) -> Result<()> {
        self.put_anchor(tip, file, false, durable)
    }

    /// Writes, durably, the anchor of a commit frame that is about to be written, and that says which state it leads to.
    pub(super) fn announce(&self, tip: &Tip, file: FileState) -> Result<()> {
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
    pub(super) fn wal_bytes(&self) -> u64 {
        u64::from(self.tip().frame) * frame_bytes(self.page_size) as u64
    }

    pub(super) fn figures(&self) -> WalFigures {
        WalFigures {
            locks_lost: self.locks_lost(),
            frames: self.tip().frame,
            backfilled: self.index.backfilled(),
        }
    }

    pub(super) fn path(&self) -> &PathBuf {
        &self.options.path
    }
}

/// Whether a page is a leaf of a table or an index, and has no row.
fn is_empty_leaf(page: &[u8]) -> bool {
    matches!(page, [10 | 13, _, _, 0, 0, ..])
}

/// Locks a mutex; a thread that panicked while it held it left plain data behind.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Page hashes that were computed lately, so that a hot page's old image is not read and hashed again.
/// Direct-mapped and bounded; an entry is the hash of the page as of the last commit.
#[derive(Debug)]
pub(super) struct HashCache {
    entries: Vec<Option<(u32, PageHash)>>,
}

impl HashCache {
    /// Entries, each of 32 bytes: half a mebibyte a database.
    const ENTRIES: usize = 16_384;

    pub(super) fn new() -> HashCache {
        HashCache { entries: vec![None; Self::ENTRIES] }
    }

    pub(super) fn get(&self, page: PageNo) -> Option<PageHash> {
        match self.entries[page.get() as usize % Self::ENTRIES] {
            Some((number, hash)) if number == page.get() => Some(hash),
            _ => None,
        }
    }

    pub(super) fn set(&mut self, page: PageNo, hash: PageHash) {
        self.entries[page.get() as usize % Self::ENTRIES] = Some((page.get(), hash));
    }

    pub(super) fn clear(&mut self) {
        self.entries.fill(None);
    }
}
