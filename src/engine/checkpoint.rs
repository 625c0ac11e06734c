//! Copying frames back into the database file, and beginning the WAL anew.
//!
//! Everybody else's checkpoints are refused while we hold the CKPT lock; these are ours.

use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use crate::engine::anchor::{Anchor, FileState, Mark, Witnesses};
use crate::engine::base::{Base, Tip, lock};
use crate::engine::logging;
use crate::engine::newest::{Found, Newest};
use crate::error::{Error, Result};
use crate::page::PageNo;
use crate::sqlite::{Handle, Lock, Slot};
use crate::wal::{
    FRAME_HEADER_BYTES, IndexHeader, READ_MARK_UNUSED, Salts, frame_bytes, frame_offset, push_frame,
    wal_header,
};

/// Frames that may be left to copy while the write lock is held.
pub(super) const REST_MAX_FRAMES: u32 = 256;
/// Pages are copied in runs of about this size, before each of which the files are looked at.
const RUN_BYTES: usize = 256 * 1024;
/// The most that is written to the file at once.
const WRITE_BYTES: usize = 64 * 1024;
/// Longest that new writers wait while readers drain from the WAL.
pub(super) const DRAIN_MAX: Duration = Duration::from_millis(30);
/// Pause between tries of a lock that is held for microseconds by others.
pub(super) const LOCK_STEP: Duration = Duration::from_micros(30);
/// The same for locks of readers that take long.
const LONG_STEP: Duration = Duration::from_millis(1);

/// Copies what readers allow, without stopping anybody. Returns the frame that the file now stands at.
pub(super) fn backfill_some(
    base: &Arc<Base>,
    handle: &mut Handle,
    may_complete: bool,
) -> Result<Option<u32>> {
    let _one = lock(&base.backfill);
    let tip = base.tip();
    // Once capture has stopped, CKPT is no longer ours; and frames of a generation that is not the tip's are never ours
    // to copy, nor to count.
    let ours = |h: IndexHeader| h.salts == tip.salts && h.max_frame >= tip.frame;
    if base.check().is_err() || !base.header().is_some_and(ours) {
        return Ok(None);
    }
    base.expect_as_left()?;
    let done = base.index.backfilled();
    base.map_to(handle, tip.frame)?;
    let safe = safe_frame(base, handle, tip.frame)?;
    let Some(target) = base.boundary(safe).filter(|t| t.salts == tip.salts && t.frame > done) else {
        base.bound.pin(safe < tip.frame);
        return Ok(None);
    };
    if !lock_file(base, handle)? {
        return Ok(None);
    }
    let result = copy(base, handle, &target, done);
    handle.unlock(Slot::READ0, Lock::Exclusive)?;
    result?;
    // A writer that sees everything backfilled may restart the WAL by itself. Only who holds the write
    // lock for life may say "everything".
    let full = base.header().is_none_or(|h| h.max_frame <= target.frame);
    let visible = if full && !may_complete { target.frame - 1 } else { target.frame };
    base.index.set_backfilled(visible);
    base.bound.pin(false);
    rest(base, &target)?;
    Ok(Some(visible))
}

/// Takes READ0, which readers have who use no frame of the WAL.
fn lock_file(base: &Base, handle: &mut Handle) -> Result<bool> {
    let locked = try_for(handle, Slot::READ0, Lock::Exclusive, DRAIN_MAX)?;
    base.bound.mark(0, (!locked).then_some(0));
    base.bound.pin(!locked);
    Ok(locked)
}

/// Notes that the file alone is the state at `target`.
fn rest(base: &Base, target: &Tip) -> Result<()> {
    let file = base.at_rest(target.position)?;
    base.write_anchor(target, file, false)
}

/// Copies the newest image of each page in `done+1 ..= target` and fsyncs. READ0 is held, exclusive.
pub(super) fn copy(base: &Base, handle: &mut Handle, target: &Tip, done: u32) -> Result<()> {
    // What is copied must be on the disk in the WAL first, and in the log: after this, the file can't
    // go back to the state that the log's tip may need.
    base.sync_wal()?;
    if let Err(error) = logging::sync(base) {
        tracing::warn!(%error, "the log can't be synced before a backfill");
    }
    let bytes = u64::from(target.pages) * u64::from(base.page_size.get());
    // What was there before, but for a mark that an earlier copy has left.
    let before = handle.size()? / u64::from(base.page_size.get()) * u64::from(base.page_size.get());
    let mark = new_mark(before.max(bytes))?;
    let witnesses = base.witnesses(handle, done, target)?;
    base.write_anchor(target, FileState::Backfilling(witnesses.marked(Some(mark))), true)?;
    base.writing(|| {
        set_mark(handle, mark);
        Ok(())
    })?;
    base.index.set_attempted(target.frame);
    let (mut newest, mut pages, mut images) =
        (Newest::ascending(&base.index, done + 1, target.frame), Vec::new(), Images::default());
    let first = PageNo::FIRST.get();
    let run = (RUN_BYTES / base.page_size.bytes()).max(1);
    while newest.next(&mut pages) {
        pages.retain(|(page, _)| *page > first && *page <= target.pages);
        for run in pages.chunks(run) {
            // Each time: a large copy takes a while.
            base.writing(|| images.copy(base, handle, run))?;
            if base.stopping() {
                return Err(Error::ShutDown);
            }
        }
    }
    // The last: while it is the older one, not all was copied.
    if let Some(frame) = base.index.lookup(first, done + 1, target.frame) {
        base.writing(|| images.copy(base, handle, &[(first, frame)]))?;
    }
    base.writing(|| handle.truncate(before.max(bytes)))?;
    handle.sync()
}

/// What is on its way from the WAL to the file.
#[derive(Default)]
struct Images {
    frames: Vec<u8>,
    pages: Vec<u8>,
}

impl Images {
    /// Copies pages from their frames, neighbours by one write; frames that are neighbours are read at once.
    fn copy(&mut self, base: &Base, handle: &mut Handle, run: &[Found]) -> Result<()> {
        let (size, frame) = (base.page_size.bytes(), frame_bytes(base.page_size));
        for neighbours in run.chunk_by(|(one, _), (other, _)| one + 1 == *other) {
            for pages in neighbours.chunks((WRITE_BYTES / size).max(1)) {
                self.pages.clear();
                for frames in pages.chunk_by(|(_, one), (_, other)| one + 1 == *other) {
                    self.frames.resize(frames.len() * frame, 0);
                    base.wal.read(&mut self.frames, frame_offset(frames[0].1, base.page_size))?;
                    for frame in self.frames.chunks_exact(frame) {
                        self.pages.extend_from_slice(&frame[FRAME_HEADER_BYTES..]);
                    }
                }
                if let Some(page) = PageNo::new(pages[0].0) {
                    handle.write(&self.pages, page.offset(base.page_size))?;
                }
            }
        }
        Ok(())
    }
}

/// A mark behind the end of a file of so many bytes.
fn new_mark(offset: u64) -> Result<Mark> {
    let mut nonce = [0; Mark::BYTES];
    getrandom::fill(&mut nonce).map_err(|e| Error::Stopped(format!("no random numbers: {e}")))?;
    Ok(Mark { offset, nonce })
}

/// Without it only a hash of everything tells later that the file is still this one.
fn set_mark(handle: &mut Handle, mark: Mark) {
    if let Err(error) = handle.write(&mark.nonce, mark.offset) {
        tracing::debug!(%error, "the file is not marked");
    }
}

/// Whether the file is still the one that was marked: nobody has put another in its place, nor cut it.
pub(super) fn is_marked(handle: &mut Handle, mark: Option<Mark>) -> Result<bool> {
    let Some(mark) = mark else { return Ok(false) };
    let mut found = [0; Mark::BYTES];
    handle.read(&mut found, mark.offset)?;
    Ok(found == mark.nonce && handle.size()? == mark.offset + Mark::BYTES as u64)
}

/// Marks a file whose content was proved, and that has no time which says so. The mark that it has already stays.
pub(super) fn mark_again(base: &Base, handle: &mut Handle) -> Result<Option<Mark>> {
    if let FileState::Backfilling(witnesses) = base.file_state()
        && is_marked(handle, witnesses.mark)?
    {
        return Ok(witnesses.mark);
    }
    let size = u64::from(base.page_size.get());
    let mark = new_mark((handle.size()? / size).max(u64::from(base.tip().pages)) * size)?;
    set_mark(handle, mark);
    Ok(Some(mark))
}

/// The last frame that no reader needs to stay out of the file.
fn safe_frame(base: &Base, handle: &mut Handle, max: u32) -> Result<u32> {
    let mut safe = max;
    // The marks are looked at as they are now, and no loss of locks is behind them that nobody saw.
    base.mend_locks(handle)?;
    let newest = base.index.glance().0;
    for mark in 1..5 {
        let doubt = base.doubts(Slot::read(mark));
        let frame = if doubt { 0 } else { base.index.read_mark(mark) };
        if frame >= safe && !doubt {
            if frame >= newest {
                base.bound.mark(mark, None);
            }
            continue;
        }
        if handle.try_lock(Slot::read(mark), Lock::Exclusive)? {
            base.index.set_read_mark(mark, if mark == 1 { safe } else { READ_MARK_UNUSED });
            handle.unlock(Slot::read(mark), Lock::Exclusive)?;
            base.doubt_no_more(Slot::read(mark));
            base.bound.mark(mark, None);
        } else {
            safe = frame;
            base.bound.mark(mark, (frame < newest).then_some(frame));
        }
    }
    Ok(safe)
}

/// Tries a lock again and again, in short steps, for a bounded time.
pub(super) fn try_for(handle: &mut Handle, slot: Slot, lock: Lock, limit: Duration) -> Result<bool> {
    let end = Instant::now() + limit;
    loop {
        if handle.try_lock(slot, lock)? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(LOCK_STEP);
    }
}

/// What came of trying to restart the WAL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Restart {
    /// A new generation began; the tip is its first frame.
    Done(Tip),
    /// Too much is left to copy, or somebody else copies.
    NotYet,
    /// Everything is copied, but readers stayed in the WAL.
    Readers,
}

/// Begins the WAL anew. The caller holds CKPT and WRITE, and the tip is the header's end.
pub(super) fn restart(base: &Arc<Base>, handle: &mut Handle, drain: Duration) -> Result<Restart> {
    let _one = match base.backfill.try_lock() {
        Ok(held) => held,
        Err(TryLockError::Poisoned(held)) => held.into_inner(),
        Err(TryLockError::WouldBlock) => return Ok(Restart::NotYet),
    };
    base.expect_as_left()?;
    let tip = base.tip();
    if tip.frame.saturating_sub(base.index.backfilled()) > REST_MAX_FRAMES {
        return Ok(Restart::NotYet);
    }
    if !complete(base, handle, &tip)? {
        return Ok(Restart::Readers);
    }
    if !lock_marks(base, handle, drain)? {
        return Ok(Restart::Readers);
    }
    if !is_the_end(base, &tip)? {
        unlock_marks(handle)?;
        return Ok(Restart::Readers);
    }
    let begun = {
        let _nobody_reads_frames = base.generation.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        begin_generation(base, handle, &tip)
    };
    unlock_marks(handle)?;
    begun.map(Restart::Done)
}

/// Whether the tip is the header's end still. WRITE is held; but a descriptor that was closed in this process may have dropped it, which is seen a while
/// later, and readers were waited for.
fn is_the_end(base: &Base, tip: &Tip) -> Result<bool> {
    match base.header() {
        Some(header) if header.salts != tip.salts || header.max_frame < tip.frame => {
            Err(Error::Stopped("somebody else began the WAL anew, whose locks were dropped here".into()))
        }
        header => Ok(header.is_some_and(|header| header.max_frame == tip.frame)),
    }
}

/// Copies the rest and says that all is copied; false while a reader is in the way.
fn complete(base: &Arc<Base>, handle: &mut Handle, tip: &Tip) -> Result<bool> {
    let done = base.index.backfilled();
    if done >= tip.frame {
        return Ok(true);
    }
    if safe_frame(base, handle, tip.frame)? < tip.frame {
        base.bound.pin(true);
        return Ok(false);
    }
    if !lock_file(base, handle)? {
        return Ok(false);
    }
    let copied = copy(base, handle, tip, done).and_then(|()| {
        let bytes = u64::from(tip.pages) * u64::from(base.page_size.get());
        if handle.size()? > bytes {
            base.writing(|| handle.truncate(bytes))?;
            handle.sync()?;
        }
        Ok(())
    });
    handle.unlock(Slot::READ0, Lock::Exclusive)?;
    copied?;
    base.index.set_backfilled(tip.frame);
    rest(base, tip)?;
    Ok(true)
}

pub(super) fn unlock_marks(handle: &mut Handle) -> Result<()> {
    (1..5).try_for_each(|mark| handle.unlock(Slot::read(mark), Lock::Exclusive))
}

/// Takes READ1..4, or none of them.
pub(super) fn lock_marks(base: &Base, handle: &mut Handle, limit: Duration) -> Result<bool> {
    let begun = Instant::now();
    for mark in 1..5 {
        loop {
            let locked = handle.try_lock(Slot::read(mark), Lock::Exclusive);
            if let Ok(true) = locked {
                break;
            }
            // All is copied: nobody joins it any more.
            base.bound.mark(mark, Some(base.index.read_mark(mark)));
            base.bound.pin(true);
            if locked.is_err() || begun.elapsed() >= limit || base.stopping() {
                (1..mark).try_for_each(|held| handle.unlock(Slot::read(held), Lock::Exclusive))?;
                return locked;
            }
            // Who stays for longer is not looked for as often.
            std::thread::sleep(if begun.elapsed() < DRAIN_MAX { LOCK_STEP } else { LONG_STEP });
        }
    }
    Ok(true)
}

/// Writes the header and the identity frame of a new generation over the WAL's begin, and publishes it. The file
/// alone holds the tip's state and is synced; CKPT and WRITE are held, and nobody reads from the WAL.
pub(super) fn begin_generation(base: &Arc<Base>, handle: &mut Handle, tip: &Tip) -> Result<Tip> {
    let file = base.at_rest(tip.position)?;
    begin_over(base, handle, tip, file)
}

/// The same over a file that may be no committed state.
pub(super) fn begin_unproved(base: &Arc<Base>, handle: &mut Handle, tip: &Tip) -> Result<Tip> {
    begin_over(base, handle, tip, FileState::Backfilling(Witnesses::default()))
}

fn begin_over(base: &Arc<Base>, handle: &mut Handle, tip: &Tip, file: FileState) -> Result<Tip> {
    let mut page = vec![0; base.page_size.bytes()];
    handle.read(&mut page, 0)?;
    let generation = lock(&base.anchors).generation() + 1;
    let salts = salts_of(tip, generation)?;
    let (header, sum) = wal_header(base.page_size, generation as u32, salts);
    let mut bytes = header.to_vec();
    let big_endian = cfg!(target_endian = "big");
    let sum = push_frame(&mut bytes, PageNo::FIRST, tip.pages, salts, &page, sum, big_endian);
    let new = Tip { salts, frame: 1, sum, ..*tip };
    let (position, pages) = (tip.position, tip.pages);
    let anchor = Anchor { generation, salts, frame: 1, sum, position, pages, file, ahead: false };
    // Before the first byte of the new generation: whoever finds that generation finds its meaning.
    lock(&base.anchors).write(anchor, true)?;
    overwrite(base, handle, &new, &bytes).map_err(|error| {
        // The index says by now that the WAL is empty, and the file may be neither the old WAL nor the new one. Readers
        // have all in the database; but whoever went on from the old tip would mix two generations.
        let error = Error::Stopped(format!("the WAL could not be begun anew: {error}"));
        base.fail(&error);
        error
    })?;
    base.set_tip(new);
    base.bound.restarted();
    Ok(new)
}

/// Puts a new generation of one frame in the place of the old one, first in the index, then in the file.
fn overwrite(base: &Base, handle: &Handle, new: &Tip, bytes: &[u8]) -> Result<()> {
    let big_endian = cfg!(target_endian = "big");
    base.index.set_backfilled(0);
    base.index.set_attempted(0);
    let change = base.header().map_or(0, |h| h.change);
    let mut index = index_header(base, new, change.wrapping_add(1), big_endian);
    index.max_frame = 0;
    base.index.publish(&index);
    base.index.set_read_mark(1, 0);
    for mark in 2..5 {
        base.index.set_read_mark(mark, READ_MARK_UNUSED);
    }
    let long = base.wal.bytes()? > base.options.wal_limit_bytes.saturating_mul(2);
    base.wal.write(bytes, 0)?;
    base.sync_wal()?;
    if long {
        // What a long reader or a large transaction made of it is given back to the file system.
        base.wal.truncate(base.options.wal_limit_bytes.max(bytes.len() as u64))?;
    }
    base.index.append(handle, 1, 1)?;
    base.index.publish(&index_header(base, new, change.wrapping_add(2), big_endian));
    Ok(())
}

/// Rewrites page 1 as it is, so that the WAL has a frame that is not backfilled and nobody else restarts it.
/// WRITE is held and the tip is the header's end.
fn append_identity(base: &Arc<Base>, handle: &mut Handle) -> Result<Tip> {
    let tip = base.tip();
    let header = base.settled_header()?;
    let mut page = vec![0; base.page_size.bytes()];
    base.read_page(handle, PageNo::FIRST, tip.frame, &mut page)?;
    let frame = tip.frame + 1;
    base.map_to(handle, frame)?;
    let mut bytes = Vec::new();
    let sum = push_frame(&mut bytes, PageNo::FIRST, tip.pages, tip.salts, &page, tip.sum, header.big_endian);
    base.wal.write(&bytes, frame_offset(frame, base.page_size))?;
    base.index.clean_above(tip.frame);
    base.index.append(handle, frame, 1)?;
    let new = Tip { frame, sum, ..tip };
    base.index.publish(&index_header(base, &new, header.change.wrapping_add(1), header.big_endian));
    base.set_tip(new);
    Ok(new)
}

/// Sees to it that nobody else restarts the WAL once WRITE is given back: not everything may count as backfilled then.
/// WRITE is held and the tip is the header's end.
pub(super) fn keep_from_others(base: &Arc<Base>, handle: &mut Handle) -> Result<Tip> {
    let tip = base.tip();
    // Frames of somebody else are not backfilled either.
    if base.index.backfilled() < tip.frame || !is_the_end(base, &tip)? {
        return Ok(tip);
    }
    let kept = append_identity(base, handle);
    if kept.is_err() {
        // No room for a frame. Then the last one counts as not backfilled, and the header changes, so that a reader
        // who has seen everything backfilled can't become a writer.
        base.index.set_backfilled(tip.frame.saturating_sub(1));
        if let Some(header) = base.header() {
            let change = header.change.wrapping_add(1);
            base.index.publish(&index_header(base, &tip, change, header.big_endian));
        }
    }
    kept
}

/// The index header that makes a tip the end of the WAL.
pub(super) fn index_header(base: &Base, tip: &Tip, change: u32, big_endian: bool) -> IndexHeader {
    IndexHeader::of(base.page_size, change, big_endian, tip.frame, tip.pages, tip.sum, tip.salts)
}

/// Salts that no other generation of this database, nor of another branch of it, has had. The second follows from the first: see [`are_ours`].
fn salts_of(tip: &Tip, generation: u64) -> Result<Salts> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).map_err(|e| Error::Stopped(format!("no random numbers: {e}")))?;
    let mut hasher = blake3::Hasher::new_derive_key("replite 2026 v1 wal salts");
    hasher.update(&tip.position.to_bytes());
    hasher.update(&generation.to_le_bytes());
    hasher.update(&random);
    let mut first = [0; 4];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    Ok(salts_from(first))
}

fn salts_from(first: [u8; 4]) -> Salts {
    let mut salts = [0; 8];
    let hash = blake3::derive_key("replite 2026 v1 second wal salt", &first);
    salts[..4].copy_from_slice(&first);
    salts[4..].copy_from_slice(&hash[..4]);
    Salts(salts)
}

/// Whether a generation was begun by a node. SQLite adds one to the first salt and draws the second, when it begins a WAL anew.
pub(super) fn are_ours(salts: Salts) -> bool {
    let mut first = [0; 4];
    first.copy_from_slice(&salts.0[..4]);
    salts == salts_from(first)
}
