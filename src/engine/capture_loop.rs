//! The primary's owner thread: it watches the wal-index, captures commits, restarts the WAL, changes epochs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::engine::Durability;
use crate::engine::anchor;
use crate::engine::base::{Base, lock};
use crate::engine::capture::{Capture, Sink};
use crate::engine::checkpoint::{self, DRAIN_MAX, Restart, keep_from_others, restart, try_for};
use crate::engine::sync::Syncer;
use crate::engine::unsynced;
use crate::error::{Error, Result};
use crate::node::Part;
use crate::sqlite::{Lock, Slot};
use crate::status::{Event, Role};
use crate::threads;
use crate::txid::{Epoch, EpochStart, NUMBER_MAX, Position};

/// After the last commit the thread keeps looking for this long before it sleeps: a wake-up costs more.
const SPIN: Duration = Duration::from_micros(30);
/// First sleep when nothing happens; doubled up to the option's `poll_max`.
const SLEEP_MIN: Duration = Duration::from_millis(1);
/// How long the write lock is tried for when the WAL is to be restarted.
const WRITE_WAIT: Duration = Duration::from_millis(20);
/// Pause after a failed restart, doubled each time.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A header that stays torn for so long, with the write lock free, was left by a writer that died.
const TORN_AFTER: Duration = Duration::from_millis(20);

/// How long the write lock is tried for when an epoch is to be opened, and how long between two looks at what else
/// was committed meanwhile.
const EPOCH_WAIT: Duration = Duration::from_secs(5);
const EPOCH_STEP: Duration = Duration::from_millis(1);

/// Wakes the capture thread; free when it is awake.
#[derive(Debug, Default)]
pub(super) struct Waker {
    thread: OnceLock<Thread>,
    asleep: AtomicBool,
}

impl Waker {
    pub(super) fn wake(&self) {
        if self.asleep.swap(false, Ordering::AcqRel)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    fn sleep(&self, limit: Duration, again: impl Fn() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        // Whoever committed before the store did not wake us.
        if !again() {
            std::thread::park_timeout(limit);
        }
        self.asleep.store(false, Ordering::Release);
    }
}

/// A request to the thread.
pub(super) enum Command {
    /// Open an epoch with a number above this one.
    RaiseEpoch(u64, mpsc::SyncSender<Result<()>>),
}

pub(super) struct CaptureLoop {
    pub(super) base: Arc<Base>,
    pub(super) capture: Capture,
    pub(super) syncer: Arc<Syncer>,
    pub(super) waker: Arc<Waker>,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) restart_after: Instant,
    pub(super) restart_pause: Duration,
    pub(super) warned_frames: u32,
}

impl CaptureLoop {
    pub(super) fn start(self) -> Result<JoinHandle<()>> {
        threads::start("replite-capture", self, CaptureLoop::watch, CaptureLoop::end)
    }

    fn end(mut self, ended: Result<()>) {
        match ended {
            // Told, and for good. The log is what the next start has.
            _ if self.base.lost() => {
                if let Err(error) = self.last_words() {
                    tracing::error!(%error, "the log does not have the last commits");
                }
            }
            Err(error) => self.base.fail(&error),
            Ok(()) => {}
        }
        self.base.node.applied.close();
        // CKPT goes: not while the other thread copies in its name.
        let base = self.base.clone();
        let _nobody_copies = lock(&base.backfill);
        drop(self.capture);
        base.release_locks();
    }

    fn watch(&mut self) -> Result<()> {
        let _ = self.waker.thread.set(std::thread::current());
        let (mut active, mut sleep) = (Instant::now(), SLEEP_MIN);
        let mut torn: Option<Instant> = None;
        while !self.base.stopping() && !self.base.lost() {
            while let Ok(command) = self.commands.try_recv() {
                self.obey(command)?;
            }
            // All of it, not the frame count alone: a writer that died after the first copy that it writes, which is the
            // second, has left the count as it was, and nobody else can read or write until that is mended.
            match self.base.header() {
                Some(h) if h.max_frame != self.capture.tip.frame || h.salts != self.capture.tip.salts => {
                    self.capture(&h)?;
                    (active, sleep, torn) = (Instant::now(), SLEEP_MIN, None);
                }
                Some(_) => torn = None,
                None if torn.get_or_insert_with(Instant::now).elapsed() > TORN_AFTER => self.mend_header()?,
                None => {}
            }
            self.maybe_restart()?;
            if active.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            let (index, frame) = (&self.base.index, self.capture.tip.frame);
            let ended = || self.base.stopping() || self.base.lost();
            self.waker.sleep(sleep, || index.glance().0 != frame || ended());
            sleep = (sleep * 2).min(self.base.options.poll_max);
        }
        if self.base.lost() {
            return Ok(());
        }
        // What is committed is handed on, so that the next start finds log and anchor at the end.
        if let Some(header) = self.base.header() {
            self.capture(&header)?;
        }
        self.rest()
    }

    /// Brings what is committed to the log. Descriptor and mapping still have files that were removed.
    fn last_words(&mut self) -> Result<()> {
        if let Some(header) = self.base.header() {
            self.capture(&header)?;
        }
        self.base.log.sync()
    }

    fn capture(&mut self, header: &crate::wal::IndexHeader) -> Result<()> {
        let mut sink = ToLog { base: &self.base, syncer: &self.syncer };
        // Always the end, whoever asked for it: part of a record may be out, and nothing can be put behind that.
        self.capture.advance(header, &mut sink).map_err(|error| match error {
            Error::Stopped(_) | Error::ShutDown => error,
            other => Error::Stopped(other.to_string()),
        })
    }

    /// Leaves everything so that the next start needs no replay.
    fn rest(&mut self) -> Result<()> {
        self.base.sync_wal()?;
        self.base.log.sync()?;
        // Not between the anchor of somebody who copies and what it says.
        let base = self.base.clone();
        let _nobody_copies = lock(&base.backfill);
        self.base.expect_as_left()?;
        let file = self.base.left_behind(&mut self.capture.handle)?;
        self.base.write_anchor(&self.capture.tip, file, true)?;
        unsynced::end(&self.base.options.side)
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        match command {
            Command::RaiseEpoch(above, reply) => {
                let result = self.raise_epoch(above);
                let failed = matches!(&result, Err(Error::Stopped(_)));
                let copy = if let Err(e) = &result { Err(Error::Stopped(e.to_string())) } else { Ok(()) };
                // The asker may have gone; the epoch is open all the same.
                let _ = reply.send(result);
                if failed { copy } else { Ok(()) }
            }
        }
    }

    fn raise_epoch(&mut self, above: u64) -> Result<()> {
        if self.capture.history.epoch().number() > above {
            return Ok(());
        }
        // No commit may be under way: its writer would name it by the old epoch. That writer may wait for capture, which
        // therefore goes on meanwhile.
        let end = Instant::now() + EPOCH_WAIT;
        while !try_for(&mut self.capture.handle, Slot::WRITE, Lock::Exclusive, EPOCH_STEP)? {
            if self.base.stopping() {
                return Err(Error::ShutDown);
            }
            if Instant::now() >= end {
                return Err(Error::Timeout { what: "the write lock".into(), after: EPOCH_WAIT });
            }
            if let Some(header) = self.base.header() {
                self.capture(&header)?;
            }
        }
        let result = self.settled().and_then(|()| {
            if self.base.options.durability == Durability::Unsynced {
                // An epoch must not be on the disk before the transactions that it follows.
                self.base.sync_wal()?;
            }
            let mut history = (*self.capture.history).clone();
            open_epoch(&mut history, above, self.capture.tip.position)?;
            anchor::write_epochs(&self.base.options.side, &history, true)?;
            self.base.node.applied.lead(history.clone(), self.capture.tip.position);
            self.base.node.roles.send_modify(|state| state.epoch = history.epoch());
            self.capture.history = Arc::new(history);
            Ok(())
        });
        self.capture.handle.unlock(Slot::WRITE, Lock::Exclusive)?;
        result
    }

    /// Captures to the very end. WRITE is held.
    fn settled(&mut self) -> Result<()> {
        let header =
            self.base.header().ok_or_else(|| Error::Stopped("the wal-index header is torn".into()))?;
        self.capture(&header)
    }

    fn maybe_restart(&mut self) -> Result<()> {
        if self.base.wal_bytes() <= self.base.options.wal_limit_bytes || Instant::now() < self.restart_after {
            return Ok(());
        }
        let rest = self.capture.tip.frame.saturating_sub(self.base.index.backfilled());
        if rest > checkpoint::REST_MAX_FRAMES {
            return Ok(());
        }
        let done = self.restart();
        match done {
            Ok(true) => {
                self.restart_pause = RESTART_PAUSE;
                self.warned_frames = 0;
                self.base.node.set_problem(Part::Checkpoint, None);
                return Ok(());
            }
            // The node is being closed: it ends with the loop, in order.
            Ok(false) | Err(Error::ShutDown) => {}
            // Full or failing disk: the WAL grows meanwhile, and nothing is lost.
            Err(error @ Error::Io { .. }) => {
                tracing::warn!(%error, "the WAL could not be restarted");
                self.base.note_room(&error);
                self.base.node.set_problem(Part::Checkpoint, Some(error.to_string()));
            }
            Err(error) => return Err(error),
        }
        self.restart_after = Instant::now() + self.restart_pause;
        self.restart_pause = (self.restart_pause * 2).min(RESTART_PAUSE_MAX);
        warn_if_long(&self.base, &mut self.warned_frames);
        Ok(())
    }

    fn restart(&mut self) -> Result<bool> {
        if !try_for(&mut self.capture.handle, Slot::WRITE, Lock::Exclusive, WRITE_WAIT)? {
            return Ok(false);
        }
        let result = self.restart_locked();
        self.capture.handle.unlock(Slot::WRITE, Lock::Exclusive)?;
        result
    }

    fn restart_locked(&mut self) -> Result<bool> {
        self.settled()?;
        let done = match restart(&self.base, &mut self.capture.handle, DRAIN_MAX) {
            Ok(Restart::Done(tip)) => {
                self.capture.tip = tip;
                self.syncer.synced(tip.position.number());
                return Ok(true);
            }
            Ok(_) => Ok(false),
            Err(error) => Err(error),
        };
        // Whatever happened: WRITE is not given back while everything counts as backfilled.
        self.capture.tip = keep_from_others(&self.base, &mut self.capture.handle)?;
        done
    }

    /// A foreign writer died inside of its header write. Readers and writers would have SQLite recover, for which it needs
    /// CKPT, which we hold for life. One of the header's two copies is whole: it takes the place of the other.
    fn mend_header(&mut self) -> Result<()> {
        if !self.capture.handle.try_lock(Slot::WRITE, Lock::Exclusive)? {
            return Ok(()); // Somebody writes: the header may be about to be whole.
        }
        let mended = match (self.base.header(), self.base.index.header_left()) {
            (Some(_), _) => Ok(()),
            (None, Some(left)) => {
                tracing::warn!("a writer died while it published its commit; the wal-index is mended");
                self.base.index.publish(&left);
                Ok(())
            }
            (None, None) => Err(Error::Stopped("both copies of the wal-index header are torn".into())),
        };
        self.capture.handle.unlock(Slot::WRITE, Lock::Exclusive)?;
        mended
    }
}

/// Adds an epoch with a number above `above` and all known ones.
pub(super) fn open_epoch(
    history: &mut crate::txid::EpochHistory,
    above: u64,
    position: Position,
) -> Result<()> {
    let mut branch = [0; 8];
    getrandom::fill(&mut branch).map_err(|e| Error::Stopped(format!("no random numbers: {e}")))?;
    let above = history.epoch().number().max(above);
    let number = above
        .checked_add(1)
        .filter(|number| *number <= NUMBER_MAX)
        .ok_or_else(|| Error::garbled("a peer", "an epoch that leaves no room for a higher one"))?;
    history.push(EpochStart {
        epoch: Epoch::new(number, u64::from_le_bytes(branch)),
        first: position.number() + 1,
        before: position.checksum(),
    });
    Ok(())
}

/// Says it once for each doubling when readers keep the WAL from being restarted.
pub(super) fn warn_if_long(base: &Base, warned: &mut u32) {
    let frames = base.tip().frame;
    if base.wal_bytes() > base.options.wal_limit_bytes.saturating_mul(4) && frames / 2 > *warned {
        *warned = frames;
        tracing::warn!(frames, "readers stay in the WAL, so that it grows beyond its limit");
        base.node.tell(Event::WalGrows(frames));
    }
}

/// Hands records to the log, after they are on the disk in the WAL.
struct ToLog<'a> {
    base: &'a Arc<Base>,
    syncer: &'a Syncer,
}

impl Sink for ToLog<'_> {
    fn committed(&mut self, number: u64) -> Result<()> {
        match self.base.options.durability {
            Durability::Synced => self.syncer.sync(number),
            Durability::Unsynced => Ok(()),
        }
    }

    fn records(&mut self, units: Bytes, after: Option<Position>) -> Result<()> {
        append_or_gap(self.base, units, after);
        if let Some(after) = after {
            self.base.node.applied.advance(after);
        }
        Ok(())
    }
}

/// Appends to the log. A log that can't be written never stops a commit: it loses its past instead, and says so.
pub(super) fn append_or_gap(base: &Base, units: Bytes, after: Option<Position>) {
    let mut broken = lock(&base.log_broken);
    if !*broken {
        let mut appended = base.log.append(units.clone(), after);
        // A full disk costs the oldest records first.
        while appended.is_err() && base.log.drop_oldest() {
            appended = base.log.append(units.clone(), after);
        }
        match appended {
            Ok(()) => return,
            Err(error) => {
                let means = what_a_gap_means(base.node.roles.borrow().role);
                base.note_room(&error);
                base.node.set_problem(Part::Log, Some(format!("the log can't be written: {error}; {means}")));
                tracing::error!(%error, "the log can't be written: {means}");
                *broken = true;
            }
        }
    }
    // It begins again behind a whole transaction, as soon as the disk allows.
    if let Some(after) = after
        && base.log.reset(after).is_ok()
    {
        *broken = false;
        base.node.set_problem(Part::Log, None);
        base.node.tell(Event::LogGap(after));
    }
}

/// What comes of a log that lost its past.
fn what_a_gap_means(role: Role) -> &'static str {
    match role {
        Role::Replica => {
            "what the primary commits still comes; should it lead this node back, it has to compare all pages"
        }
        _ => "commits go on; replicas that are behind have to compare all their pages with this node's",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{EpochHistory, Txid};

    #[test]
    fn a_log_that_lost_its_past_means_no_snapshot_and_less_on_a_replica() {
        let (primary, replica) = (what_a_gap_means(Role::Primary), what_a_gap_means(Role::Replica));
        assert!(primary.contains("replicas that are behind have to compare"), "{primary}");
        assert!(!replica.contains("replicas") && replica.contains("still comes"), "{replica}");
        assert!(!format!("{primary}{replica}").contains("snapshot"));
    }

    #[test]
    fn an_epoch_that_leaves_no_room_for_a_higher_one_is_refused_and_overflows_nothing() {
        let tip = Position::new(Txid::new(Epoch::new(1, 1), 4), Checksum::EMPTY);
        let opened = |above| {
            let mut history = EpochHistory::default();
            open_epoch(&mut history, above, tip).map(|()| history.epoch().number())
        };
        assert_eq!(opened(NUMBER_MAX - 1).unwrap(), NUMBER_MAX);
        for above in [NUMBER_MAX, NUMBER_MAX + 1, u64::MAX] {
            assert!(matches!(opened(above), Err(Error::Peer { .. })), "{above}");
        }
    }
}
