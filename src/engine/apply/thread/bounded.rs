//! A replica begins its WAL anew, and applying waits for that when the WAL is too long.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::apply::thread::Apply;
use crate::engine::apply::thread::stage::{Served, State};
use crate::engine::checkpoint::backfill::DRAIN_MAX;
use crate::engine::checkpoint::bound::{BRAKE_TIMES, REST_TIMES, Teller};
use crate::engine::checkpoint::pacer::RestartPacer;
use crate::engine::checkpoint::restart::{Restart, restart};
use crate::engine::history::wal_appender::WalAppender;
use crate::error::{Error, Result};
use crate::report::Condition;

/// Pause between two tries while the apply thread waits for the copy.
const STEP: Duration = Duration::from_millis(1);

/// Frames that wait to be published with more of their batch, in bytes: a batch of small changes
/// may be many pages.
const UNSEEN_MAX_BYTES: u64 = 1 << 20;

/// When the apply thread tries again to begin the WAL anew.
pub(super) struct Bounded {
    pacer: RestartPacer,
    /// The thread waited for readers in vain: it does not wait again before this.
    rest_until: Instant,
    teller: Teller,
}

impl Bounded {
    pub(super) fn new() -> Bounded {
        Bounded { pacer: RestartPacer::new(), rest_until: Instant::now(), teller: Teller::default() }
    }
}

/// Whether the WAL has become so long that it is to be begun anew before more is applied, or so
/// much has come that readers are to see it.
pub(super) fn is_long(live: &WalAppender) -> bool {
    live.last_frame() > live.base.limit_frames(BRAKE_TIMES, 1) || live.unpublished_bytes() > UNSEEN_MAX_BYTES
}

impl Apply {
    /// Begins the WAL anew when it is long. When it is too long, the thread waits for that for as
    /// long as it is worth while. The stream that feeds waits meanwhile, and no reader does.
    pub(super) fn maybe_restart(&mut self) -> Result<()> {
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            let State::Known(Served { term, live, checkpointer, .. }) = &mut self.state else {
                return Ok(());
            };
            let (base, bounded) = (term.clone(), &mut self.bounded);
            if base.check().is_err() || live.in_transaction() {
                return Ok(());
            }
            let frames = base.tip().frame;
            bounded.teller.look(&base, frames, false);
            let asked = base.bound.asked().is_some();
            if !asked && base.wal_bytes() <= self.options.wal_limit_bytes {
                return Ok(());
            }
            let waits = (asked || is_long(live)) && (now >= bounded.rest_until || !base.bound.pinned());
            let patience = if waits { base.patience(frames) } else { None };
            let left = patience.map_or(Duration::ZERO, |patience| patience.saturating_sub(begun.elapsed()));
            if (patience.is_some() || bounded.pacer.is_due(now)) && bounded.pacer.disk_rested(now) {
                match restart(&base, &mut live.handle, left.max(DRAIN_MAX)) {
                    Ok(Restart::Done(tip)) => {
                        live.resume(tip);
                        bounded.pacer.succeeded();
                        bounded.teller.look(&base, tip.frame, false);
                        self.node.report(Condition::CheckpointWorks);
                        return Ok(());
                    }
                    Ok(Restart::Readers) if patience.is_none() => bounded.pacer.in_vain(now),
                    Ok(Restart::NotYet | Restart::Readers) => {}
                    // Full or failing disk: the WAL grows meanwhile, and nothing is lost.
                    Err(error @ Error::Io { .. }) => {
                        self.node.report(Condition::RestartFails { error: &error });
                        base.note_room(&error);
                        bounded.pacer.failed(now);
                    }
                    Err(error) => return Err(error),
                }
            }
            if left.is_zero() || self.shared.stop.load(Ordering::Acquire) {
                base.bound.squeeze(false);
                if waits && base.bound.pinned() {
                    bounded.rest_until = now + begun.elapsed() * if asked { 1 } else { REST_TIMES };
                }
                return Ok(());
            }
            base.bound.squeeze(true);
            if let Some(checkpointer) = checkpointer {
                checkpointer.thread().unpark();
            }
            std::thread::sleep(STEP);
        }
    }
}
