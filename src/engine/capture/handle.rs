//! A primary's open database, and its threads.

use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::checksum::PageKey;
use crate::engine::capture::brake::{Brake, BrakeLoop, WriteLock};
use crate::engine::capture::group_sync::GroupSync;
#[cfg(test)]
use crate::engine::capture::startup::Opening;
use crate::engine::capture::thread::{CaptureCommand, CaptureLoop};
use crate::engine::capture::waker::Waker;
use crate::engine::checkpoint::bound;
use crate::engine::checkpoint::pacer::RestartPacer;
use crate::engine::checkpoint::thread::Checkpointer;
use crate::engine::figures::WalFigures;
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::doubt;
use crate::engine::file::reader::{reader, share_reads};
use crate::engine::file::term::Term;
use crate::engine::history::epoch::draw_epoch;
use crate::engine::history::wal_records::Capture;
#[cfg(test)]
use crate::engine::options::EngineOptions;
use crate::engine::recover::opened::Opened;
use crate::engine::source::Piece;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::log::Log;
use crate::page::{PageNo, PageSize};
use crate::report::Condition;
use crate::sqlite::Handle;
use crate::status::Checkpoint;
use crate::txid::{Epoch, EpochHistory, Position};
use crate::wal::Salts;

/// A primary's open database.
#[derive(Debug)]
pub(crate) struct PrimaryEngine {
    pub(in crate::engine) base: Arc<Term>,
    pub(in crate::engine) group_sync: Arc<GroupSync>,
    pub(in crate::engine) waker: Arc<Waker>,
    pub(in crate::engine) brake: Arc<Brake>,
    pub(in crate::engine) commands: mpsc::SyncSender<CaptureCommand>,
    /// Reads the file for snapshots.
    pub(in crate::engine) second: Arc<Mutex<Handle>>,
    /// Where our own writer's last commit ended. The next one need not wait for capture then.
    pub(in crate::engine) last: Mutex<Option<LastCommit>>,
    /// Where the last record ends that still goes to replicas.
    streams_end: OnceLock<u64>,
    pub(in crate::engine) threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A commit's place in the WAL and its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) struct LastCommit {
    pub(in crate::engine) salts: Salts,
    pub(in crate::engine) frame: u32,
    pub(in crate::engine) number: u64,
}

/// What a primary reads with beside capture.
#[derive(Debug)]
pub(in crate::engine) struct Connections {
    snapshots: Handle,
    brake: Handle,
    checkpointer: Handle,
}

impl Connections {
    pub(in crate::engine) fn open(base: &OpenDatabase) -> Result<Connections> {
        Ok(Connections { snapshots: reader(base)?, brake: reader(base)?, checkpointer: reader(base)? })
    }
}

impl PrimaryEngine {
    /// Opens the database as the primary, with what this node has of it. Blocks.
    #[cfg(test)]
    pub(crate) fn open(
        options: EngineOptions,
        node: Arc<crate::context::NodeContext>,
    ) -> Result<PrimaryEngine> {
        Opening::begin(options, node, None)?.finish(None)
    }

    pub(in crate::engine) fn start(
        base: Arc<OpenDatabase>,
        handle: Handle,
        history: EpochHistory,
        connections: Connections,
    ) -> Result<PrimaryEngine> {
        let base = Term::new(base);
        base.when_lost(|database, error| database.node.fail(error));
        if let Some(found) = doubt::text(&base.options.paths) {
            base.node.report(Condition::PagesDoubted { found: &found });
        }
        let tip = base.tip();
        let second = Arc::new(Mutex::new(connections.snapshots));
        let group_sync = Arc::new(GroupSync::new(base.clone(), tip.position.number()));
        let waker = Arc::new(Waker::default());
        let (commands, receiver) = mpsc::sync_channel(4);
        let brake = Arc::new(Brake::new(&base, WriteLock::new(connections.brake)));
        let capture_loop = CaptureLoop {
            base: base.clone(),
            capture: Capture::new(base.database().clone(), handle, tip, Arc::new(history)),
            group_sync: group_sync.clone(),
            waker: waker.clone(),
            commands: receiver,
            pacer: RestartPacer::new(),
            brake: brake.clone(),
            holds: false,
            left: None,
        };
        let checkpointer = Checkpointer {
            base: base.clone(),
            handle: connections.checkpointer,
            replica: None,
            log_synced: Instant::now(),
            applied_synced: Instant::now(),
        };
        let (last, streams_end, threads) = Default::default();
        let engine =
            PrimaryEngine { base, group_sync, waker, brake, commands, second, last, streams_end, threads };
        // Dropping the engine closes it again, should another thread not start.
        share_reads(&engine.base);
        // From here on that thread ends it.
        let capture = capture_loop.start().inspect_err(|_| engine.base.release_locks())?;
        lock(&engine.threads).push(capture);
        let checkpointer = checkpointer.spawn()?;
        let (thread, base) = (checkpointer.thread().clone(), engine.base.clone());
        lock(&engine.threads).push(checkpointer);
        let brake = BrakeLoop::start(base, engine.brake.clone(), engine.waker.clone(), thread)?;
        lock(&engine.threads).push(brake);
        Ok(engine)
    }

    /// Stops replication of this database for good, loudly.
    pub(crate) fn fail(&self, error: &Error) {
        self.base.fail(error);
    }

    /// Fails when the primary can't vouch for commits any more, and says why.
    pub(crate) fn check(&self) -> Result<()> {
        self.base.check()?;
        // The threads end by themselves only after a failure. Should one have ended in some other
        // way, that is a failure now.
        if lock(&self.threads).iter().any(JoinHandle::is_finished) {
            self.base.check()?;
            self.base.fail(&Error::Internal("a thread of the engine has ended".into()));
        }
        self.base.check()
    }

    /// Call before BEGIN. Waits, for a bounded time, while the WAL is longer than it may be.
    pub(crate) fn pace(&self) {
        self.brake.wait(&self.base);
    }

    /// Copies all that is committed back and begins the WAL anew. Blocks for at most `limit`.
    pub(crate) fn checkpoint(&self, limit: Duration) -> Result<Checkpoint> {
        self.check()?;
        bound::checkpoint(&self.base, limit, || self.brake.wake())
    }

    /// Opens a new epoch with a number above `above`, because this node heard of a peer with a
    /// higher one. Blocks.
    pub(crate) fn raise_epoch(&self, above: u64) -> Result<()> {
        let is_above = || self.base.node.applied.history().epoch().number() > above;
        if is_above() {
            return Ok(());
        }
        let epoch = draw_epoch(above).map_err(|error| error.of_peer("a replica"))?;
        match self.open_epoch(epoch) {
            // Another one came first.
            Err(Error::Peer { .. }) if is_above() => Ok(()),
            opened => opened,
        }
    }

    /// Opens this epoch, and goes on in it. Blocks.
    ///
    /// # Errors
    /// [`Error::Peer`] when it is not above all that the history has, [`Error::Timeout`] when
    /// others write for too long. The epoch before goes on then.
    pub(crate) fn open_epoch(&self, epoch: Epoch) -> Result<()> {
        self.ask(|reply| CaptureCommand::OpenEpoch(epoch, reply))
    }

    /// Has the capture thread do something. Blocks.
    fn ask<T>(&self, make: impl FnOnce(mpsc::SyncSender<Result<T>>) -> CaptureCommand) -> Result<T> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.commands.send(make(reply)).map_err(|_| self.gone())?;
        self.waker.ask();
        answer.recv().map_err(|_| self.gone())?
    }

    fn gone(&self) -> Error {
        self.base.check().err().unwrap_or(Error::ShutDown)
    }

    /// Until [`PrimaryEngine::release`] no writer is held back for the sake of the WAL's length.
    pub(crate) fn ease(&self) -> Result<()> {
        self.brake.ease(&self.base)
    }

    /// Has no connection write from now on, until [`PrimaryEngine::release`]. Returns the state
    /// with all that is committed, which is in the log and on the disk: another primary goes on
    /// from there. Reads and streams go on. The caller has closed its own writer. Blocks, for at
    /// most `limit` for writers of other processes, and for the disk.
    ///
    /// # Errors
    /// [`Error::Timeout`] when others write for longer, [`Error::Io`] when the log can't be synced.
    /// All is as before then.
    pub(crate) fn hold(&self, limit: Duration) -> Result<Position> {
        self.ask(|held| CaptureCommand::Hold { limit, held })
    }

    /// Lets connections write again. Blocks.
    pub(crate) fn release(&self) -> Result<()> {
        self.ask(CaptureCommand::Release)
    }

    /// What comes into the log from now on goes to no replica.
    pub(crate) fn end_streams(&self) {
        let _ = self.streams_end.set(self.log().end());
        // Streams that have sent it all wait for more.
        self.log().wake();
    }

    /// Where the last record ends that still goes to replicas; none while this goes on as the
    /// primary.
    pub(crate) fn last(&self) -> Option<u64> {
        self.streams_end.get().copied()
    }

    pub(crate) fn log(&self) -> &Arc<Log> {
        &self.base.log
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.base.page_size
    }

    /// What its pages are hashed with.
    pub(crate) fn page_key(&self) -> PageKey {
        self.base.page_key
    }

    /// Reads up to `max_bytes` (at least one page) of pages from `first` on. Blocks.
    pub(crate) fn read_piece(&self, first: PageNo, max_bytes: usize) -> Result<Piece> {
        self.base.check()?;
        self.base.read_piece(&mut lock(&self.second), first, max_bytes)
    }

    pub(crate) fn wal(&self) -> WalFigures {
        self.base.figures()
    }

    /// A commit found no room.
    pub(crate) fn no_room(&self) {
        self.base.node.no_room("SQLite found no room for a commit");
    }

    /// Fails, and stops for good, when the files at the paths are not those that are open. Does the
    /// same when another process wrote to the database.
    pub(crate) fn expect_files(&self) -> Result<()> {
        self.base.sound()?;
        self.base.expect_files()
    }

    /// Has commits wait for their fsync, as on a disk that takes its time.
    #[cfg(test)]
    pub(crate) fn hold_syncs(&self, hold: bool) {
        self.group_sync.hold(hold);
    }

    /// Capture appends nothing until this is dropped.
    #[cfg(test)]
    pub(crate) fn hold_log(&self) -> std::sync::MutexGuard<'_, bool> {
        lock(&self.base.log_broken)
    }

    /// The highest transaction whose fsync anyone has waited for.
    #[cfg(test)]
    pub(crate) fn wants_sync(&self) -> u64 {
        self.group_sync.wanted()
    }

    /// Ends the primary's role: no connection writes any more, what is committed is captured and on
    /// the disk, the threads have ended. The caller has closed its own writer. Blocks, for at most
    /// `limit` for writers of other processes, and for the disk.
    ///
    /// # Errors
    /// [`Error::Timeout`] when others write for longer; this is still the primary then. After any
    /// other error the engine has stopped for good.
    pub(crate) fn stop(&self, limit: Duration) -> Result<Opened> {
        let (left, opened) = mpsc::sync_channel(1);
        self.ask(|held| CaptureCommand::Leave { limit, held, left })?;
        self.close();
        opened.recv().map_err(|_| self.gone())
    }

    /// Stops and joins the threads; all further calls fail with `ShutDown`. Blocks.
    pub(crate) fn close(&self) {
        stop_threads(&self.base, &self.threads, &self.waker);
    }
}

impl Drop for PrimaryEngine {
    fn drop(&mut self) {
        self.close();
    }
}

fn stop_threads(base: &Term, threads: &Mutex<Vec<JoinHandle<()>>>, waker: &Waker) {
    base.end();
    waker.wake();
    for thread in std::mem::take(&mut *lock(threads)) {
        thread.thread().unpark();
        // The thread has said how it ended.
        let _ = thread.join();
    }
}
