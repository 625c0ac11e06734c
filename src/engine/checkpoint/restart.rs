//! How a node begins the WAL anew under readers, and keeps others from doing so.

use std::time::{Duration, Instant};

use crate::engine::checkpoint::backfill::{DRAIN_MAX, REST_MAX_FRAMES};
use crate::engine::checkpoint::backfill::{LOCK_STEP, copy, lock_file, rest, safe_frame};
use crate::engine::checkpoint::generation::begin_generation;
use crate::engine::file::database::{OpenDatabase, Tip, index_header};
use crate::engine::file::term::Term;
use crate::error::Error;
use crate::error::Result;
use crate::page::PageNo;
use crate::sqlite::{Handle, Lock, Slot};
use crate::wal::{frame_offset, push_frame};
use std::sync::TryLockError;

/// Pause between tries of a lock of readers that take long.
const LONG_STEP: Duration = Duration::from_millis(1);

/// What came of trying to restart the WAL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) enum Restart {
    /// A new generation began; the tip is its first frame.
    Done(Tip),
    /// Too much is left to copy, or another thread copies.
    NotYet,
    /// Everything is copied, but readers stayed in the WAL.
    Readers,
}

/// Begins the WAL anew. The caller holds CKPT and WRITE, and the tip is the header's end.
pub(in crate::engine) fn restart(base: &Term, handle: &mut Handle, drain: Duration) -> Result<Restart> {
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
    if !lock_marks(base, handle, drain, || base.stopping())? {
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

/// Whether the tip is the header's end still. WRITE is held, but a descriptor that was closed in
/// this process may have dropped it. The node sees that a while later, and it has waited for
/// readers meanwhile.
fn is_the_end(base: &OpenDatabase, tip: &Tip) -> Result<bool> {
    match base.header() {
        Some(header) if header.salts != tip.salts || header.max_frame < tip.frame => {
            Err(Error::Disturbed("somebody else began the WAL anew, whose locks were dropped here".into()))
        }
        header => Ok(header.is_some_and(|header| header.max_frame == tip.frame)),
    }
}

/// Copies the rest and says that all is copied. Returns false while a reader is in the way.
fn complete(base: &Term, handle: &mut Handle, tip: &Tip) -> Result<bool> {
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

pub(in crate::engine) fn unlock_marks(handle: &mut Handle) -> Result<()> {
    (1..5).try_for_each(|mark| handle.unlock(Slot::read(mark), Lock::Exclusive))
}

/// Takes READ1..4, or none of them.
pub(in crate::engine) fn lock_marks(
    base: &OpenDatabase,
    handle: &mut Handle,
    limit: Duration,
    gives_up: impl Fn() -> bool,
) -> Result<bool> {
    let begun = Instant::now();
    for mark in 1..5 {
        loop {
            // All is copied: the node's own is none of these, or it goes.
            base.options.read_mark.follow();
            let locked = handle.try_lock(Slot::read(mark), Lock::Exclusive);
            if let Ok(true) = locked {
                break;
            }
            // All is copied: no reader joins this mark any more.
            base.bound.mark(mark, Some(base.index.read_mark(mark)));
            base.bound.pin(true);
            if locked.is_err() || begun.elapsed() >= limit || gives_up() {
                (1..mark).try_for_each(|held| handle.unlock(Slot::read(held), Lock::Exclusive))?;
                return locked;
            }
            // After `DRAIN_MAX` the loop looks less often for a reader that stays.
            std::thread::sleep(if begun.elapsed() < DRAIN_MAX { LOCK_STEP } else { LONG_STEP });
        }
    }
    Ok(true)
}

/// Rewrites page 1 as it is. The WAL has a frame then that is not backfilled, and no other process
/// restarts it. The caller holds WRITE, and the tip is the header's end.
fn append_identity(base: &OpenDatabase, handle: &mut Handle) -> Result<Tip> {
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

/// Sees to it that no other process restarts the WAL once WRITE is given back: not everything may
/// count as backfilled then. The caller holds WRITE, and the tip is the header's end.
pub(in crate::engine) fn keep_from_others(base: &OpenDatabase, handle: &mut Handle) -> Result<Tip> {
    let tip = base.tip();
    // Frames that others wrote are not backfilled either.
    if base.index.backfilled() < tip.frame || !is_the_end(base, &tip)? {
        return Ok(tip);
    }
    let kept = append_identity(base, handle);
    if kept.is_err() {
        // There is no room for a frame. Then the last one counts as not backfilled, and the header
        // changes. A reader that has seen everything backfilled can't become a writer then.
        base.index.set_backfilled(tip.frame.saturating_sub(1));
        if let Some(header) = base.header() {
            let change = header.change.wrapping_add(1);
            base.index.publish(&index_header(base, &tip, change, header.big_endian));
        }
    }
    kept
}
