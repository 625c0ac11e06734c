//! Copies frames back into the database file, and begins the WAL anew.
//!
//! SQLite refuses all others' checkpoints while we hold the CKPT lock; these are ours.

use std::time::{Duration, Instant};

use crate::engine::file::anchor::FileState;
use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::newest::{Found, Newest};
use crate::engine::file::term::Term;
use crate::engine::file::witnesses::CopyTag;
use crate::engine::history::append_or_gap;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::random;
use crate::report::Condition;
use crate::sqlite::{Handle, Lock, Slot};
use crate::wal::{FRAME_HEADER_BYTES, IndexHeader, READ_MARK_UNUSED, frame_bytes, frame_offset};

/// Frames that may be left to copy while the write lock is held.
pub(in crate::engine) const REST_MAX_FRAMES: u32 = 256;
/// A copy takes pages in runs of about this size, and looks at the files before each run.
const RUN_BYTES: usize = 256 * 1024;
/// The most that a copy writes to the file at once.
const WRITE_BYTES: usize = 64 * 1024;
/// Longest that new writers wait while readers drain from the WAL.
pub(in crate::engine) const DRAIN_MAX: Duration = Duration::from_millis(30);
/// Pause between tries of a lock that others hold for microseconds.
pub(in crate::engine) const LOCK_STEP: Duration = Duration::from_micros(30);

/// Copies what readers allow, without stopping any connection. Returns the frame that the file now
/// stands at.
pub(in crate::engine) fn backfill_some(
    base: &Term,
    handle: &mut Handle,
    may_complete: bool,
) -> Result<Option<u32>> {
    let _one = lock(&base.backfill);
    let tip = base.tip();
    // Once capture has stopped, CKPT is no longer ours. Frames of a generation that is not the
    // tip's are never ours to copy, nor to count.
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
    // A writer that sees everything backfilled may restart the WAL by itself. Only a node that
    // holds the write lock for life may say "everything".
    let full = base.header().is_none_or(|h| h.max_frame <= target.frame);
    let visible = if full && !may_complete { target.frame - 1 } else { target.frame };
    base.index.set_backfilled(visible);
    base.bound.pin(false);
    rest(base, &target)?;
    Ok(Some(visible))
}

/// Takes READ0, which readers hold that use no frame of the WAL. The node itself gives it up.
pub(in crate::engine) fn take_file(base: &OpenDatabase, handle: &mut Handle) -> Result<bool> {
    try_for(DRAIN_MAX, || {
        base.options.read_mark.leave();
        handle.try_lock(Slot::READ0, Lock::Exclusive)
    })
}

/// The same, and notes readers that are in the way.
pub(in crate::engine) fn lock_file(base: &OpenDatabase, handle: &mut Handle) -> Result<bool> {
    let locked = take_file(base, handle)?;
    base.bound.mark(0, (!locked).then_some(0));
    base.bound.pin(!locked);
    Ok(locked)
}

/// Notes that the file alone is the state at `target`.
pub(in crate::engine) fn rest(base: &OpenDatabase, target: &Tip) -> Result<()> {
    let file = base.at_rest(target.position)?;
    base.write_anchor(target, file, false)
}

/// Copies the newest image of each page in `done+1 ..= target` and fsyncs. The caller holds READ0,
/// exclusive.
pub(in crate::engine) fn copy(base: &Term, handle: &mut Handle, target: &Tip, done: u32) -> Result<()> {
    // The WAL must have what is copied on the disk first, and so must the log. After this, the file
    // can't go back to the state that the log's tip may need.
    base.sync_wal()?;
    if let Err(error) = append_or_gap::sync(base) {
        base.node.report(Condition::BackfillUnsynced { error: &error });
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
            // Before each run: a large copy takes a while.
            base.writing(|| images.copy(base, handle, run))?;
            if base.stopping() {
                return Err(Error::ShutDown);
            }
        }
    }
    // Page 1 comes last: while the file has the older one, not all was copied.
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
    /// Copies pages from their frames. Neighbouring pages take one write, and neighbouring frames
    /// one read.
    fn copy(&mut self, base: &OpenDatabase, handle: &mut Handle, run: &[Found]) -> Result<()> {
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

/// A mark after the end of a file of this many bytes.
fn new_mark(offset: u64) -> Result<CopyTag> {
    Ok(CopyTag { offset, nonce: random::array()? })
}

/// Without the mark only a hash of everything tells later that the file is still this one.
fn set_mark(handle: &mut Handle, mark: CopyTag) {
    if let Err(error) = handle.write(&mark.nonce, mark.offset) {
        tracing::debug!(%error, "the file is not marked");
    }
}

/// Whether the file is still the one that was marked: no one has put another in its place, nor cut
/// it.
pub(in crate::engine) fn is_marked(handle: &mut Handle, mark: Option<CopyTag>) -> Result<bool> {
    let Some(mark) = mark else { return Ok(false) };
    let mut found = [0; CopyTag::BYTES];
    handle.read(&mut found, mark.offset)?;
    Ok(found == mark.nonce && handle.size()? == mark.offset + CopyTag::BYTES as u64)
}

/// Marks a file whose content was proved, and that has no time which says so. A mark that it has
/// already stays.
pub(in crate::engine) fn mark_again(base: &OpenDatabase, handle: &mut Handle) -> Result<Option<CopyTag>> {
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
pub(in crate::engine) fn safe_frame(base: &OpenDatabase, handle: &mut Handle, max: u32) -> Result<u32> {
    let mut safe = max;
    // The node's own is at the newest frame, or it goes.
    base.options.read_mark.follow();
    // This looks at the marks as they are now, after it has noticed any loss of locks.
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
pub(in crate::engine) fn try_for(
    limit: Duration,
    mut try_lock: impl FnMut() -> Result<bool>,
) -> Result<bool> {
    let end = Instant::now() + limit;
    loop {
        if try_lock()? {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(LOCK_STEP);
    }
}
