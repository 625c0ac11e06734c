//! WRITE is taken to keep it: for a while, or to the end of the primary's role.

use std::io;
use std::time::{Duration, Instant};

use crate::engine::capture::thread::{CaptureLoop, EPOCH_STEP};
use crate::engine::checkpoint::backfill::LOCK_STEP;
use crate::engine::history::append_or_gap;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::sqlite::Slot;
use crate::txid::Position;

/// For how long the thread looks for WRITE in short steps.
const SHORT: Duration = Duration::from_millis(5);

impl CaptureLoop {
    /// Takes WRITE and keeps it. Returns the state with all that is committed, which is in the log
    /// and on the disk. After an error WRITE is not held.
    pub(super) fn hold(&mut self, limit: Duration) -> Result<Position> {
        // The brake would look for WRITE all the while, and may have it.
        self.brake.ease(&self.base)?;
        let held = self.take_write(limit).and_then(|()| {
            self.holds = true;
            self.final_position()
        });
        if held.is_err() {
            self.release()?;
        }
        held
    }

    /// Gives back what `hold` took, if it is held.
    pub(super) fn release(&mut self) -> Result<()> {
        self.brake.tighten();
        if std::mem::take(&mut self.holds) {
            self.base.give_back(&mut self.capture.handle, Slot::WRITE)?;
        }
        Ok(())
    }

    /// Another node goes on from there.
    fn final_position(&mut self) -> Result<Position> {
        self.settled()?;
        let (base, position) = (&self.base, self.capture.tip.position);
        if base.options.durability.ships_unsynced() {
            base.sync_wal()?;
        }
        // Otherwise capture synced the WAL before it put the last record into the log.
        if *lock(&base.log_broken) || base.log.tip() != Some(position) {
            let source = io::Error::other("it lacks the last transactions, and begins anew after the next");
            let path = base.options.paths.log();
            return Err(Error::Io { op: "hand on", path, source });
        }
        // After a power cut this node has the state that another one goes on from, and the records
        // that lead there.
        append_or_gap::sync(base)?;
        Ok(position)
    }

    /// Takes WRITE to keep it. Captures meanwhile what others commit until then: a writer may wait
    /// for that with WRITE held.
    pub(super) fn take_write(&mut self, limit: Duration) -> Result<()> {
        if self.holds {
            return Ok(());
        }
        let (begun, end) = (Instant::now(), Instant::now() + limit);
        let base = self.base.clone();
        while !base.try_hold(&mut self.capture.handle, Slot::WRITE)? {
            if base.stopping() {
                return Err(Error::ShutDown);
            }
            if Instant::now() >= end {
                return Err(Error::Timeout { what: "the write lock".into(), after: limit });
            }
            if let Some(header) = base.header() {
                self.capture(&header)?;
            }
            // The brake may hold it until the WAL has begun anew.
            self.maybe_restart()?;
            // A commit of another process takes less than a millisecond.
            std::thread::sleep(if begun.elapsed() < SHORT { LOCK_STEP } else { EPOCH_STEP });
        }
        Ok(())
    }
}
