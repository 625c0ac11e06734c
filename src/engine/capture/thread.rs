//! The primary's owner thread: it watches the wal-index, captures commits, restarts the WAL,
//! changes epochs.

mod hold;
mod pauses;

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::context::RoleChange;
use crate::engine::capture::brake::Brake;
use crate::engine::capture::group_sync::GroupSync;
use crate::engine::capture::thread::pauses::Pauses;
use crate::engine::capture::waker::Waker;
use crate::engine::checkpoint::backfill;
use crate::engine::checkpoint::backfill::DRAIN_MAX;
use crate::engine::checkpoint::bound::BRAKE_TIMES;
use crate::engine::checkpoint::pacer::RestartPacer;
use crate::engine::checkpoint::restart::{Restart, keep_from_others, restart};
use crate::engine::file::epochs::write_epochs;
use crate::engine::file::term::Term;
use crate::engine::file::unsynced_marker;
use crate::engine::history::append_or_gap::{self, append_or_gap};
use crate::engine::history::epoch::{expect_newer, open_epoch};
use crate::engine::history::wal_records::{Capture, Sink};
use crate::engine::recover::opened::Opened;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::report::Condition;
use crate::threads;
use crate::txid::{Epoch, Position};
use crate::wal::IndexHeader;

/// After the last commit the thread keeps looking for this long before it sleeps, where commits
/// wait for no fsync: a wake-up costs more. Beside an fsync it would only take a core from others.
const SPIN: Duration = Duration::from_micros(30);
/// How long the thread tries for the write lock when the WAL is to be restarted.
const WRITE_WAIT: Duration = Duration::from_millis(20);
/// A header that stays torn for this long, with the write lock free, is one that a dead writer
/// left.
const TORN_AFTER: Duration = Duration::from_millis(20);

/// How long the thread tries for the write lock when it is to open an epoch. And how long it waits
/// between two looks at what else was committed meanwhile.
const EPOCH_WAIT: Duration = Duration::from_secs(5);
const EPOCH_STEP: Duration = Duration::from_millis(1);
/// How long the thread retries an append to the log that fails, and not for want of room. And how
/// long it waits between two tries.
const APPEND_WAIT: Duration = Duration::from_secs(5);
const APPEND_STEP: Duration = Duration::from_millis(20);

/// A request to the thread.
pub(in crate::engine) enum CaptureCommand {
    /// Open this epoch.
    OpenEpoch(Epoch, mpsc::SyncSender<Result<()>>),
    /// Take WRITE within this time, to keep it for now, and bring all that is committed to the
    /// disk. The thread goes on.
    Hold { limit: Duration, held: mpsc::SyncSender<Result<Position>> },
    /// Give back what `Hold` took.
    Release(mpsc::SyncSender<Result<()>>),
    /// Take WRITE within this time, to keep it, and end with all that was committed until then.
    Leave { limit: Duration, held: mpsc::SyncSender<Result<()>>, left: mpsc::SyncSender<Opened> },
}

pub(in crate::engine) struct CaptureLoop {
    pub(in crate::engine) base: Arc<Term>,
    pub(in crate::engine) capture: Capture,
    pub(in crate::engine) group_sync: Arc<GroupSync>,
    pub(in crate::engine) waker: Arc<Waker>,
    pub(in crate::engine) commands: mpsc::Receiver<CaptureCommand>,
    pub(in crate::engine) pacer: RestartPacer,
    pub(in crate::engine) brake: Arc<Brake>,
    /// WRITE is held, and nothing is committed, until it is given back or the thread ends.
    pub(in crate::engine) holds: bool,
    /// Where the database goes when the thread ends. WRITE is held for it.
    pub(in crate::engine) left: Option<mpsc::SyncSender<Opened>>,
}

impl CaptureLoop {
    pub(in crate::engine) fn start(self) -> Result<JoinHandle<()>> {
        threads::start("replite-capture", self, CaptureLoop::watch, CaptureLoop::end)
    }

    fn end(mut self, ended: Result<()>) {
        match ended {
            // The node has reported it, for good. The log is what the next start has.
            _ if self.base.lost() => {
                if let Err(error) = self.last_words() {
                    self.base.node.report(Condition::LastCommitsNotLogged { error: &error });
                }
            }
            Err(error) => self.base.fail(&error),
            Ok(()) => {
                if let Some(left) = self.left.take() {
                    // Where no receiver takes it, it is closed.
                    let _ = left.send(self.opened());
                    return;
                }
            }
        }
        self.base.node.applied.close();
        // CKPT goes, but not while the other thread copies in its name.
        let base = self.base.clone();
        let _nobody_copies = lock(&base.backfill);
        drop(self.capture);
        base.release_locks();
    }

    /// The database without its primary's role.
    fn opened(self) -> Opened {
        let Capture { base, handle, history, .. } = self.capture;
        Opened::new(base, handle, Arc::unwrap_or_clone(history))
    }

    fn watch(&mut self) -> Result<()> {
        let _ = self.waker.thread.set(std::thread::current());
        let options = &self.base.options;
        let mut pauses = Pauses::new(options.paths.wal(), options.poll_max, self.waker.clone());
        let spin = if options.durability.ships_unsynced() { SPIN } else { Duration::ZERO };
        let mut torn: Option<Instant> = None;
        while !self.base.stopping() && !self.base.lost() {
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command)?;
            }
            // All of the header, not the frame count alone. A writer writes the second of the two
            // copies first. One that died after that has left the count as it was. No other process
            // can read or write until that is mended.
            match self.base.header() {
                Some(h) if h.max_frame != self.capture.tip.frame || h.salts != self.capture.tip.salts => {
                    // Before the fsync, which readers need not wait for.
                    self.base.options.read_mark.follow();
                    self.capture(&h)?;
                    pauses.restart();
                    torn = None;
                }
                Some(_) => torn = None,
                None if torn.get_or_insert_with(Instant::now).elapsed() > TORN_AFTER => self.mend_header()?,
                None => {}
            }
            self.maybe_restart()?;
            // A reader may have come since the last commit.
            self.base.options.read_mark.join();
            if pauses.quiet() < spin {
                std::hint::spin_loop();
                continue;
            }
            let (index, frame) = (&self.base.index, self.capture.tip.frame);
            let ended = || self.base.stopping() || self.base.lost();
            let sleep = pauses.next(torn.is_some() || self.wants_restart());
            self.waker.sleep(sleep, || index.glance().0 != frame || ended());
        }
        if self.base.lost() {
            return Ok(());
        }
        // The thread hands on what is committed: the next start then finds log and anchor at the
        // end.
        if let Some(header) = self.base.header() {
            self.capture(&header)?;
        }
        self.rest()
    }

    /// Brings what is committed to the log. Descriptor and mapping still have files that were
    /// removed.
    fn last_words(&mut self) -> Result<()> {
        if let Some(header) = self.base.header() {
            self.capture(&header)?;
        }
        append_or_gap::sync(&self.base)
    }

    fn capture(&mut self, header: &IndexHeader) -> Result<()> {
        self.brake.passed(header.max_frame);
        let mut sink = ToLog { base: &self.base, group_sync: &self.group_sync, brake: &self.brake };
        // Always the end, whatever asked for it: part of a record may be out, and nothing can be
        // put after that.
        self.capture.advance(header, &mut sink).map_err(|error| match error {
            Error::Stopped(_) | Error::ShutDown => error,
            other => Error::Stopped(other.cause()),
        })
    }

    /// Leaves everything so that the next start needs no replay.
    fn rest(&mut self) -> Result<()> {
        self.base.sync_wal()?;
        append_or_gap::sync(&self.base)?;
        // Not between the anchor of a thread that copies and what the anchor says.
        let base = self.base.clone();
        let _nobody_copies = lock(&base.backfill);
        self.base.expect_as_left()?;
        let file = self.base.left_behind(&mut self.capture.handle)?;
        self.base.write_anchor(&self.capture.tip, file, true)?;
        unsynced_marker::end(&self.base.options.paths)
    }

    fn obey(&mut self, command: CaptureCommand) -> Result<()> {
        match command {
            CaptureCommand::OpenEpoch(epoch, reply) => {
                // The asker may have gone. The epoch is open all the same.
                let result = self.open_epoch(epoch);
                answer(&reply, result)
            }
            CaptureCommand::Hold { limit, held } => {
                let result = self.hold(limit);
                answer(&held, result)
            }
            CaptureCommand::Release(reply) => {
                let result = self.release();
                answer(&reply, result)
            }
            CaptureCommand::Leave { limit, held, left } => {
                let taken = self.take_write(limit);
                let failed = match &taken {
                    Err(error) if error.is_fatal() || matches!(error, Error::Io { .. }) => {
                        Err(Error::Stopped(error.cause()))
                    }
                    _ => Ok(()),
                };
                if taken.is_ok() {
                    // From here on no connection commits. The code below captures what there is,
                    // and the thread ends.
                    self.left = Some(left);
                }
                let _ = held.send(taken);
                failed
            }
        }
    }

    fn open_epoch(&mut self, epoch: Epoch) -> Result<()> {
        let newest = self.capture.history.epoch();
        if newest == epoch {
            return Ok(());
        }
        expect_newer(epoch, newest)?;
        if self.holds {
            return self.begin_epoch(epoch);
        }
        // No commit may be under way: its writer would name it by the old epoch. That writer may
        // wait for capture, so capture goes on meanwhile.
        let end = Instant::now() + EPOCH_WAIT;
        let brake = self.brake.clone();
        let mut write = loop {
            let mut write = lock(&brake.write);
            if write.take(EPOCH_STEP)? {
                break write;
            }
            drop(write);
            if self.base.stopping() {
                return Err(Error::ShutDown);
            }
            if Instant::now() >= end {
                return Err(Error::Timeout { what: "the write lock".into(), after: EPOCH_WAIT });
            }
            if let Some(header) = self.base.header() {
                self.capture(&header)?;
            }
        };
        let result = self.begin_epoch(epoch);
        write.give_back()?;
        result
    }

    /// Opens the epoch after all that is committed. WRITE is held.
    fn begin_epoch(&mut self, epoch: Epoch) -> Result<()> {
        self.settled()?;
        if self.base.options.durability.ships_unsynced() {
            // An epoch must not be on the disk before the transactions that it follows.
            self.base.sync_wal()?;
        }
        let mut history = (*self.capture.history).clone();
        open_epoch(&mut history, epoch, self.capture.tip.position)?;
        write_epochs(self.base.options.keyed(), &history, true)?;
        self.base.node.applied.lead(history.clone(), self.capture.tip.position);
        self.base.node.change_role(RoleChange::Epoch(history.epoch()));
        self.capture.history = Arc::new(history);
        Ok(())
    }

    /// Captures to the very end. The caller holds WRITE.
    fn settled(&mut self) -> Result<()> {
        let header = self.mended_header()?;
        self.capture(&header)
    }

    fn maybe_restart(&mut self) -> Result<()> {
        if self.holds {
            // It has the lock by other means than a restart takes it by, and not for long.
            return Ok(());
        }
        if !self.wants_restart() {
            return Ok(());
        }
        let held = self.brake.holds();
        let now = Instant::now();
        if !(held || self.pacer.is_due(now)) || !self.pacer.disk_rested(now) {
            return Ok(());
        }
        let rest = self.capture.tip.frame.saturating_sub(self.base.index.backfilled());
        if rest > backfill::REST_MAX_FRAMES {
            return Ok(());
        }
        match self.restart() {
            Ok(true) => {
                self.pacer.succeeded();
                self.base.node.report(Condition::CheckpointWorks);
                return Ok(());
            }
            // The thread tries again and again.
            Ok(false) if held => return Ok(()),
            // The node is closing: the thread ends with the loop, in order.
            Ok(false) | Err(Error::ShutDown) => {}
            // The disk is full or fails: the WAL grows meanwhile, and nothing is lost.
            Err(error @ Error::Io { .. }) => {
                self.base.node.report(Condition::RestartFails { error: &error });
                self.base.note_room(&error);
                self.pacer.failed(Instant::now());
            }
            Err(error) => return Err(error),
        }
        self.pacer.in_vain(Instant::now());
        Ok(())
    }

    /// The WAL is too long, or writers wait because it was.
    fn wants_restart(&self) -> bool {
        self.brake.holds() || self.base.wal_bytes() > self.base.options.wal_limit_bytes
    }

    fn restart(&mut self) -> Result<bool> {
        let brake = self.brake.clone();
        // The brake's thread has it otherwise, and is about to take it for us.
        let Ok(mut write) = brake.write.try_lock() else { return Ok(false) };
        if !write.take(WRITE_WAIT)? {
            return Ok(false);
        }
        let base = self.base.clone();
        // Capture has what was committed. The rest depends on the disk.
        let on_disk = base.progress.on_disk();
        let left = write.until.map_or(DRAIN_MAX, |until| until.saturating_duration_since(Instant::now()));
        let result = self.restart_locked(left.max(DRAIN_MAX));
        drop(on_disk);
        if matches!(result, Ok(true)) {
            brake.release(&self.base, &mut write, self.base.limit_frames(BRAKE_TIMES, 1))?;
        }
        write.give_back()?;
        result
    }

    fn restart_locked(&mut self, drain: Duration) -> Result<bool> {
        self.settled()?;
        let done = match restart(&self.base, &mut self.capture.handle, drain) {
            Ok(Restart::Done(tip)) => {
                self.capture.tip = tip;
                self.group_sync.synced(tip.position.number());
                return Ok(true);
            }
            Ok(_) => Ok(false),
            Err(error) => Err(error),
        };
        // Whatever happened: the thread does not give WRITE back while everything counts as
        // backfilled.
        self.capture.tip = keep_from_others(&self.base, &mut self.capture.handle)?;
        done
    }

    /// Makes the header whole again after a foreign writer died inside of its header write. Readers
    /// and writers would have SQLite recover, for which it needs CKPT, which we hold for life.
    fn mend_header(&mut self) -> Result<()> {
        let brake = self.brake.clone();
        let Ok(mut write) = brake.write.try_lock() else { return Ok(()) };
        if !write.take(Duration::ZERO)? {
            return Ok(()); // Somebody writes: the header may be about to be whole.
        }
        let mended = self.mended_header();
        write.give_back()?;
        mended.map(drop)
    }

    /// Returns the header with WRITE held: no other process is writing it. Should it be torn, one
    /// of its two copies is whole, and takes the place of the other.
    fn mended_header(&self) -> Result<IndexHeader> {
        match (self.base.header(), self.base.index.header_left()) {
            (Some(header), _) => Ok(header),
            (None, Some(left)) => {
                self.base.node.report(Condition::WriterDied);
                self.base.index.publish(&left);
                Ok(left)
            }
            (None, None) => Err(Error::Disturbed("both copies of the wal-index header are torn".into())),
        }
    }
}

/// Answers a request. The asker may have gone. After some errors the thread ends.
fn answer<T>(to: &mpsc::SyncSender<Result<T>>, result: Result<T>) -> Result<()> {
    let failed = match &result {
        Err(error) if error.is_fatal() => Err(Error::Stopped(error.cause())),
        _ => Ok(()),
    };
    let _ = to.send(result);
    failed
}

/// Hands records to the log, after they are on the disk in the WAL.
struct ToLog<'a> {
    base: &'a Arc<Term>,
    group_sync: &'a GroupSync,
    brake: &'a Brake,
}

impl Sink for ToLog<'_> {
    fn committed(&mut self, number: u64) -> Result<()> {
        let _on_disk = self.base.progress.on_disk();
        if self.base.options.durability.ships_unsynced() {
            return Ok(());
        }
        self.group_sync.sync(number)
    }

    fn on_disk(&self) -> u64 {
        match self.base.options.durability.ships_unsynced() {
            true => u64::MAX,
            false => self.group_sync.on_disk(),
        }
    }

    fn records(&mut self, units: Bytes, after: Option<Position>) -> Result<()> {
        let on_disk = self.base.progress.on_disk();
        let (begun, mut failed) = (Instant::now(), false);
        while let Err(error) = append_or_gap(self.base, units.clone(), after) {
            // For example because the process has no descriptor left.
            let cause = error.cause().of("the log can't be written");
            if begun.elapsed() >= APPEND_WAIT || self.base.stopping() {
                return Err(Error::Stopped(cause));
            }
            failed = true;
            self.base.node.report(Condition::LogRetried { text: &cause.to_string() });
            std::thread::sleep(APPEND_STEP);
        }
        drop(on_disk);
        if failed && !*lock(&self.base.log_broken) {
            self.base.node.report(Condition::LogWorks);
        }
        // Others write while the thread does this.
        self.brake.passed(self.base.index.glance().0);
        if let Some(after) = after {
            self.base.node.applied.advance(after);
        }
        Ok(())
    }
}
