//! The brake keeps a primary's WAL short while others write faster than the checkpointer copies it
//! back. It makes our own writer wait, and holds WRITE.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::engine::capture::waker::Waker;
use crate::engine::checkpoint::backfill::LOCK_STEP;
use crate::engine::checkpoint::bound::{BRAKE_TIMES, COPY_MAX, LATE_TIMES, REST_TIMES, Teller};
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::term::Term;
use crate::error::Result;
use crate::lock::lock;
use crate::sqlite::{Handle, Lock, Slot};
use crate::threads;

/// How often the brake looks at the WAL's length. Capture and our own writer say when it is too
/// long, but they may be waiting for a disk.
const LOOK: Duration = Duration::from_millis(50);
/// The same while the brake holds a writer back.
const STEP: Duration = Duration::from_millis(1);
/// How long the brake tries for WRITE at a time, without sleeping: a process that writes all the
/// time leaves it free for microseconds.
const TRY: Duration = Duration::from_millis(20);
/// Longest pause in which writers get through on a slow disk. SQLite looks for a lock at least
/// every 100 ms.
const GAP: Duration = Duration::from_millis(250);
/// SQLite looks at least this often for a lock that it waits for. A connection that waited longer
/// gets the lock before our own writer. Otherwise our writer would take it the moment that it is
/// free, again and again.
const OTHERS_FIRST: Duration = Duration::from_millis(120);
/// Longest that the brake holds our own writer back at a time.
const WRITER_MAX: Duration = Duration::from_secs(5);

/// The lock of writers. Capture and the brake share it.
#[derive(Debug)]
pub(in crate::engine) struct WriteLock {
    handle: Handle,
    taken: bool,
    /// Since when WRITE is held.
    since: Option<Instant>,
    /// Until when WRITE is held for the sake of the WAL's length, if it is.
    pub(in crate::engine) until: Option<Instant>,
}

impl WriteLock {
    pub(in crate::engine) fn new(handle: Handle) -> WriteLock {
        WriteLock { handle, taken: false, since: None, until: None }
    }

    /// Takes WRITE, if it is not held already.
    pub(in crate::engine) fn take(&mut self, limit: Duration) -> Result<bool> {
        self.take_by(limit, || std::thread::sleep(LOCK_STEP))
    }

    fn take_by(&mut self, limit: Duration, pause: impl Fn()) -> Result<bool> {
        let end = Instant::now() + limit;
        while !self.taken {
            self.taken = self.handle.try_lock(Slot::WRITE, Lock::Exclusive)?;
            if !self.taken {
                if Instant::now() >= end {
                    return Ok(false);
                }
                pause();
            } else {
                self.since = Some(Instant::now());
            }
        }
        Ok(true)
    }

    /// Gives WRITE back, unless the brake holds it for the WAL's length. Not everything may count
    /// as backfilled.
    pub(in crate::engine) fn give_back(&mut self) -> Result<()> {
        if self.taken && self.until.is_none() {
            self.taken = false;
            self.handle.unlock(Slot::WRITE, Lock::Exclusive)?;
        }
        Ok(())
    }
}

/// What writers, capture and the brake's thread have in common.
#[derive(Debug)]
pub(in crate::engine) struct Brake {
    pub(in crate::engine) write: Mutex<WriteLock>,
    /// Our own writer waits.
    on: AtomicBool,
    /// WRITE is held.
    held: AtomicBool,
    /// No writer is to be held back: capture is about to take WRITE and to keep it, or has it.
    eased: AtomicBool,
    /// The frame beyond which the thread pulls the brake.
    at: AtomicU32,
    /// Until when our own writer lets others go first.
    gate: Mutex<Option<Instant>>,
    opened: Condvar,
    thread: OnceLock<Thread>,
}

impl Brake {
    pub(in crate::engine) fn new(base: &OpenDatabase, write: WriteLock) -> Brake {
        Brake {
            write: Mutex::new(write),
            on: AtomicBool::new(false),
            held: AtomicBool::new(false),
            eased: AtomicBool::new(false),
            at: AtomicU32::new(base.limit_frames(BRAKE_TIMES, 1)),
            gate: Mutex::new(None),
            opened: Condvar::new(),
            thread: OnceLock::new(),
        }
    }

    /// The WAL has this many frames. Costs nothing while they are few.
    pub(in crate::engine) fn passed(&self, frame: u32) {
        if frame > self.at.load(Ordering::Relaxed) && !self.on.swap(true, Ordering::AcqRel) {
            self.wake();
        }
    }

    pub(in crate::engine) fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Whether the brake holds WRITE until the WAL has begun anew.
    pub(in crate::engine) fn holds(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Holds no writer back until it is tightened, and gives WRITE back.
    pub(in crate::engine) fn ease(&self, base: &OpenDatabase) -> Result<()> {
        self.eased.store(true, Ordering::SeqCst);
        self.release(base, &mut lock(&self.write), base.limit_frames(BRAKE_TIMES, 1))
    }

    /// Takes [`Brake::ease`] back.
    pub(in crate::engine) fn tighten(&self) {
        self.eased.store(false, Ordering::SeqCst);
    }

    fn is_eased(&self) -> bool {
        self.eased.load(Ordering::SeqCst)
    }

    /// Blocks our own writer while the brake is on.
    pub(in crate::engine) fn wait(&self, base: &Term) {
        if !self.on.load(Ordering::Acquire) {
            return;
        }
        let end = Instant::now() + WRITER_MAX;
        let mut gate = lock(&self.gate);
        while self.on.load(Ordering::Acquire) && base.check().is_ok() && Instant::now() < end {
            gate = self.opened.wait_timeout(gate, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        let others = gate.take();
        drop(gate);
        if let Some(others) = others {
            std::thread::sleep(others.saturating_duration_since(Instant::now()));
        }
    }

    /// Lets all writers go on, until the WAL has more than this many frames.
    pub(in crate::engine) fn release(
        &self,
        base: &OpenDatabase,
        write: &mut WriteLock,
        at: u32,
    ) -> Result<()> {
        write.until = None;
        let held = write.since.filter(|_| write.taken).map(|since| since.elapsed());
        let given_back = write.give_back();
        self.at.store(at, Ordering::Relaxed);
        self.held.store(false, Ordering::Release);
        base.bound.squeeze(false);
        let mut gate = lock(&self.gate);
        if held.is_some_and(|held| held >= OTHERS_FIRST) {
            *gate = Some(Instant::now() + OTHERS_FIRST);
        }
        self.on.store(false, Ordering::Release);
        drop(gate);
        self.opened.notify_all();
        given_back
    }
}

/// When the thread pulls the brake again.
struct Rest {
    until: Instant,
    /// Or when the WAL has so many frames.
    at: u32,
    /// The brake waited for readers in vain. This counts as long as readers are what is in the way.
    readers: bool,
}

/// The thread that pulls the brake and lets go.
pub(in crate::engine) struct BrakeLoop {
    base: Arc<Term>,
    brake: Arc<Brake>,
    capture: Arc<Waker>,
    checkpointer: Thread,
    teller: Teller,
    /// Since when WRITE is held, or tried for.
    since: Option<Instant>,
    rest: Option<Rest>,
    /// New generations that the thread knows of.
    restarts: u64,
    /// Capture lags by more frames than the WAL may have.
    behind: bool,
}

impl BrakeLoop {
    pub(in crate::engine) fn start(
        base: Arc<Term>,
        brake: Arc<Brake>,
        capture: Arc<Waker>,
        checkpointer: Thread,
    ) -> Result<JoinHandle<()>> {
        let (teller, restarts) = (Teller::default(), base.bound.restarts());
        let (since, rest, behind) = (None, None, false);
        let state = BrakeLoop { base, brake, capture, checkpointer, teller, since, rest, restarts, behind };
        threads::start("replite-brake", state, BrakeLoop::run, |this, ended| {
            if let Err(error) = ended {
                this.base.fail(&error);
            }
            let at = this.base.limit_frames(BRAKE_TIMES, 1);
            // The end of the process, or of the connection, gives WRITE back otherwise.
            let _ = this.brake.release(&this.base, &mut lock(&this.brake.write), at);
        })
    }

    fn run(&mut self) -> Result<()> {
        let _ = self.brake.thread.set(std::thread::current());
        while self.base.check().is_ok() {
            let step = self.look()?;
            std::thread::park_timeout(step);
        }
        Ok(())
    }

    /// Pulls the brake, lets go, or waits on. Returns how long to wait until the next look.
    fn look(&mut self) -> Result<Duration> {
        let (brake, base) = (self.brake.clone(), self.base.clone());
        let (frames, usual) = (base.index.glance().0, base.limit_frames(BRAKE_TIMES, 1));
        if self.restarts != base.bound.restarts() {
            (self.restarts, self.since, self.rest) = (base.bound.restarts(), None, None);
        }
        let held = self.since.map(|since| since.elapsed());
        // Another connection's transaction is open, and stays so.
        let open = held.is_some_and(|held| held > GAP) && !brake.holds();
        self.teller.look(&base, frames, open);
        if brake.is_eased() || frames <= usual && base.bound.asked().is_none() {
            (self.since, self.rest) = (None, None);
            self.let_all(usual)?;
            return Ok(LOOK);
        }
        // Whatever readers do: what is not in the log yet is bounded, too.
        let behind = frames.saturating_sub(base.tip().frame);
        self.behind = behind > if self.behind { 0 } else { usual };
        let patience = if self.behind { Some(COPY_MAX) } else { base.patience(frames) };
        let pinned = base.bound.pinned() && !self.behind;
        let resting =
            |rest: &Rest| Instant::now() < rest.until && frames < rest.at && (pinned || !rest.readers);
        let resting = self.rest.as_ref().is_some_and(resting);
        match (held, patience) {
            (None, Some(_)) if resting => Ok(if pinned { STEP * 5 } else { STEP }),
            (None, Some(patience)) => {
                let since = *self.since.insert(Instant::now());
                self.pull(since + patience)
            }
            // These readers stay. The thread looks again whether they still do.
            (None, None) => {
                self.let_all(base.tip().frame.saturating_add(usual))?;
                Ok(STEP * 5)
            }
            (Some(held), Some(patience)) if held < patience => {
                self.pull(Instant::now() + patience.saturating_sub(held))
            }
            (Some(held), _) => self.let_go(frames, held),
        }
    }

    /// Holds no writer back until the WAL has this many frames.
    fn let_all(&self, at: u32) -> Result<()> {
        let brake = &self.brake;
        if !brake.on.load(Ordering::Acquire) && !brake.holds() && brake.at.load(Ordering::Relaxed) == at {
            return Ok(());
        }
        brake.release(&self.base, &mut lock(&brake.write), at)
    }

    /// Holds our own writer back, and all others once WRITE is free. Capture and the checkpointer
    /// do the rest.
    fn pull(&mut self, until: Instant) -> Result<Duration> {
        let brake = &self.brake;
        brake.on.store(true, Ordering::Release);
        self.base.bound.squeeze(true);
        let mut write = lock(&brake.write);
        // Capture may have finished meanwhile.
        if !brake.is_eased()
            && self.restarts == self.base.bound.restarts()
            && write.take_by(TRY, std::hint::spin_loop)?
        {
            write.until = Some(until);
            brake.held.store(true, Ordering::Release);
        }
        drop(write);
        self.checkpointer.unpark();
        self.capture.wake();
        Ok(STEP)
    }

    /// The WAL has not begun anew within the time: some writers get through, or all of them go on
    /// for a while.
    fn let_go(&mut self, frames: u32, held: Duration) -> Result<Duration> {
        let (base, brake) = (&self.base, &self.brake);
        let late = frames > base.limit_frames(LATE_TIMES, 1);
        let readers = base.bound.pinned() && !self.behind;
        let (pause, more) = match (readers, base.bound.asked()) {
            // The brake held WRITE for capture, which has finished.
            (true, _) if held < COPY_MAX => (Duration::ZERO, base.limit_frames(BRAKE_TIMES, 1)),
            (true, Some(_)) => (held, u32::MAX),
            (true, None) if late => (held * REST_TIMES, u32::MAX),
            (true, None) => (held * REST_TIMES, base.limit_frames(1, 1)),
            (false, _) if late => (GAP, 1),
            (false, _) => (GAP, base.limit_frames(1, 4)),
        };
        let at = frames.saturating_add(more);
        (self.since, self.rest) = (None, Some(Rest { until: Instant::now() + pause, at, readers }));
        brake.release(base, &mut lock(&brake.write), at - 1)?;
        Ok(STEP)
    }
}
