//! How long the WAL may become, what keeps it from beginning anew, and for how long the brake holds
//! writers back for its sake.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::file::anchor::FileState;
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::term::Term;
use crate::error::Result;
use crate::lock::lock;
use crate::report::{Condition, Part};
use crate::status::{Checkpoint, WalReason};
use crate::wal::frame_bytes;

/// Beyond this many times its limit, the brake holds writers back until the WAL has begun anew.
pub(in crate::engine) const BRAKE_TIMES: u32 = 2;
/// Beyond this many times its limit, the brake waits for readers as long as it may. On a slow disk
/// it lets next to nothing through.
pub(in crate::engine) const LATE_TIMES: u32 = 4;
/// Longest that the brake holds writers back for a copy, without a pause in which some get through.
pub(in crate::engine) const COPY_MAX: Duration = Duration::from_secs(1);
/// Longest that it holds them back for readers at the limit; it grows with the square of the WAL's
/// length.
const READERS_AT_LIMIT: Duration = Duration::from_millis(250);
/// Longest that it holds them back for readers at all: the usual busy timeout is 5 s.
const READERS_MAX: Duration = Duration::from_secs(4);
/// A reader that has stayed for less is no reason to report.
const READER_SHORT: Duration = Duration::from_millis(100);
/// Writers go on for this many times as long as the brake held them back for readers in vain.
pub(in crate::engine) const REST_TIMES: u32 = 10;
/// How often a caller that waits for a new beginning looks for it.
const ASK_STEP: Duration = Duration::from_millis(2);
/// How long the WAL has been beyond twice its limit when the node reports it. And how long beyond
/// four times.
const TELL_AFTER: Duration = Duration::from_secs(1);
const TELL_AFTER_LATE: Duration = Duration::from_millis(250);

impl OpenDatabase {
    /// How many frames make this many times the limit, or a part of it.
    pub(in crate::engine) fn limit_frames(&self, times: u32, part: u32) -> u32 {
        let frames = self.options.wal_limit_bytes / frame_bytes(self.page_size) as u64;
        (frames.saturating_mul(times.into()) / u64::from(part)).clamp(1, u32::MAX.into()) as u32
    }

    /// How long it is worth while to hold writers back, for a WAL of this many frames. None when it
    /// would be in vain.
    pub(in crate::engine) fn patience(&self, frames: u32) -> Option<Duration> {
        let asked = self.bound.asked();
        let late = frames > self.limit_frames(LATE_TIMES, 1);
        let readers = lock(&self.bound.readers);
        if !readers.pinned {
            // No waiting brings to the disk what the disk refuses.
            let futile = self.node.has_problem(Part::Checkpoint) && !late && asked.is_none();
            let most = asked.filter(|_| frames <= self.limit_frames(BRAKE_TIMES, 1)).unwrap_or(COPY_MAX);
            return (!futile).then_some(COPY_MAX.min(most));
        }
        let oldest = readers.oldest();
        if oldest > READERS_MAX {
            return None;
        }
        if let Some(left) = asked {
            return Some(left.min(READERS_MAX));
        }
        let times = f64::from(frames) / f64::from(self.limit_frames(1, 1));
        let most = READERS_AT_LIMIT.mul_f64((times * times).min(64.0)).min(READERS_MAX);
        // The readers that are there now, and then those that came meanwhile.
        let needed = readers.longest.max(oldest) * 2;
        (late || needed <= most).then_some(most)
    }

    /// Why a WAL of this many frames has not begun anew. An open transaction of another connection
    /// may keep the node from taking WRITE.
    pub(in crate::engine) fn why_long(&self, frames: u32, open: bool) -> WalReason {
        let pinned = self.bound.pinned();
        let stay = lock(&self.bound.readers).oldest() >= READER_SHORT;
        if pinned && stay {
            WalReason::Readers
        } else if self.bound.largest.load(Ordering::Relaxed) > frames / 2 {
            WalReason::LargeTransaction
        } else if pinned {
            WalReason::Readers
        } else if open {
            WalReason::OpenTransaction
        } else if self.node.has_problem(Part::Checkpoint) {
            WalReason::Failing
        } else {
            WalReason::Slow
        }
    }

    /// Whether the database file alone is all that is committed, and the WAL has nothing but page 1
    /// as it is there.
    fn begun_anew(&self) -> bool {
        let (tip, frames) = (self.tip(), self.index.glance().0);
        frames <= 1
            && tip.frame == frames
            && matches!(self.file_state(), FileState::AtRest { position, .. } if position == tip.position)
    }
}

/// Has the WAL begun anew, and waits for it. Blocks for at most `limit`.
pub(in crate::engine) fn checkpoint(base: &Term, limit: Duration, wake: impl Fn()) -> Result<Checkpoint> {
    let (end, before) = (Instant::now() + limit, base.bound.restarts());
    loop {
        base.check()?;
        if base.bound.restarts() != before || base.begun_anew() {
            return Ok(Checkpoint::Done);
        }
        if Instant::now() >= end {
            let (frames, backfilled) = (base.index.glance().0, base.index.backfilled());
            return Ok(Checkpoint::Busy { frames, backfilled, why: base.why_long(frames, false) });
        }
        // Again and again: a thread that asked before may have been served in between.
        base.bound.ask(end);
        wake();
        std::thread::sleep(ASK_STEP.min(end.saturating_duration_since(Instant::now())));
    }
}

/// Says when the WAL is beyond twice its limit.
#[derive(Debug, Default)]
pub(in crate::engine) struct Teller {
    since: Option<Instant>,
    /// What the node reported, and how many frames there were. It reports once for each doubling.
    told: Option<(WalReason, u32)>,
}

impl Teller {
    pub(in crate::engine) fn look(&mut self, base: &OpenDatabase, frames: u32, open: bool) {
        if frames <= base.limit_frames(BRAKE_TIMES, 1) {
            if self.told.is_some() {
                base.node.report(Condition::WalShort);
            }
            *self = Teller::default();
            return;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let (why, limit) = (base.why_long(frames, open), base.options.wal_limit_bytes);
        let after = match frames > base.limit_frames(LATE_TIMES, 1) {
            true if why == WalReason::LargeTransaction => Duration::ZERO,
            true => TELL_AFTER_LATE,
            false => TELL_AFTER,
        };
        if since.elapsed() < after {
            return;
        }
        let doubled = self.told.is_none_or(|(_, told)| frames / 2 >= told);
        if !doubled && self.told.is_some_and(|(told, _)| told == why) {
            return;
        }
        let bytes = u64::from(frames) * frame_bytes(base.page_size) as u64;
        base.node.report(Condition::WalGrows { database: base.path(), bytes, limit, why, doubled });
        let told = self.told.map_or(frames, |(_, told)| if doubled { frames } else { told });
        self.told = Some((why, told));
    }
}
