//! One database file: capture and apply, checkpoints, snapshots; owns the position.
//!
//! [`Engine`] is a primary's open file, [`Follower`] a replica's, there or yet to come.

mod anchor;
mod append;
mod apply;
mod base;
mod bound;
mod brake;
mod capture;
mod capture_loop;
mod checkpoint;
mod checkpointer;
mod damage;
mod doubt;
mod follower;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
mod fuzz;
mod hash;
mod heal;
mod intake;
mod judge;
mod locate;
mod logging;
mod lost;
mod mend;
mod newest;
mod numbers;
mod open;
mod opening;
mod overlay;
mod pieces;
mod receive;
mod redo;
mod repair;
mod reserve;
mod sync;
mod unsynced;
mod verify;
mod wal_file;
mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::engine::base::{Base, lock};
use crate::engine::brake::{Brake, BrakeLoop, Write};
use crate::engine::capture::Capture;
use crate::engine::capture_loop::{CaptureLoop, Command, Waker};
use crate::engine::checkpointer::Checkpointer;
use crate::engine::sync::Syncer;
use crate::error::{Error, Result};
use crate::log::{Log, LogOptions};
use crate::node::Part;
use crate::page::{PageNo, PageSize};
use crate::sqlite::Handle;
use crate::status::Checkpoint;
use crate::txid::{EpochHistory, Position, Txid};
use crate::wal::Salts;

pub(crate) use crate::engine::anchor::replace_file;
pub(crate) use crate::engine::follower::{Follower, Standing};
#[cfg(test)]
pub(crate) use crate::engine::fuzz::fuzz_seeds;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use crate::engine::fuzz::{fuzz_btree, fuzz_lost, fuzz_side_files};
#[cfg(test)]
pub(crate) use crate::engine::heal::Heal;
pub use crate::engine::lost::{Lost, LostBranch, LostKind, LostRow, LostRows};
pub(crate) use crate::engine::opening::Opening;
#[cfg(test)]
pub(crate) use crate::engine::overlay::{Overlay, Store};
pub(crate) use crate::engine::pieces::{PIECE_BYTES, answer};
pub(crate) use crate::engine::repair::RightPage;

/// When a commit is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Durability {
    /// After an fsync that is shared by all commits that wait for one. Nothing is shipped to a replica before it
    /// is on the primary's disk, so that no replica is ever ahead of it.
    #[default]
    Synced,
    /// Without waiting for an fsync, like SQLite's `synchronous = NORMAL`: a power cut can take the commits since
    /// the last checkpoint, and replicas can then be ahead of the primary. A killed process loses nothing.
    ///
    /// When a primary is opened that was not closed before the machine went down, [`Db::open`](crate::Db::open) asks the replicas that connect to its
    /// [`Config::listen`](crate::Config::listen) address within [`Config::recovery_wait`](crate::Config::recovery_wait) for the transactions that go on where
    /// its own end, and nobody can write meanwhile. What no replica gives back in that time is lost; a replica that has it
    /// keeps it apart ([`Db::lost`](crate::Db::lost)) and follows the primary. An endpoint that the application mounts is not up before `open` returns: without an own listener
    /// nobody is asked.
    Unsynced,
}

/// What one database file needs to know.
#[derive(Clone, Debug)]
pub(crate) struct EngineOptions {
    pub(crate) path: PathBuf,
    /// The directory beside the database: `<path>-replite`.
    pub(crate) side: PathBuf,
    pub(crate) durability: Durability,
    /// The WAL is restarted when it is longer than this.
    pub(crate) wal_limit_bytes: u64,
    pub(crate) log: LogOptions,
    /// Most bytes that what a heal replaced may take up.
    pub(crate) lost_bytes: u64,
    /// Longest that a foreign commit may stay unseen.
    pub(crate) poll_max: Duration,
    /// A primary goes on from a database whose WAL is gone while frames were being copied into it.
    pub(crate) accept_damaged: bool,
    /// What a database file that is made here gets.
    pub(crate) database_mode: Option<u32>,
}

/// A primary's open database.
#[derive(Debug)]
pub(crate) struct Engine {
    base: Arc<Base>,
    syncer: Arc<Syncer>,
    waker: Arc<Waker>,
    brake: Arc<Brake>,
    commands: mpsc::SyncSender<Command>,
    /// Reads the file for snapshots.
    second: Arc<Mutex<Handle>>,
    /// Where our own writer's last commit ended, so that the next one need not wait for capture.
    last: Mutex<Option<Mark>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A commit's place in the WAL and its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mark {
    salts: Salts,
    frame: u32,
    number: u64,
}

/// A run of pages for a snapshot.
#[derive(Debug)]
pub(crate) struct Piece {
    /// The state when the piece was read. A page may be newer than that, never older; the log records up to the
    /// position of the last piece make it exact.
    pub(crate) position: Position,
    /// The database's size in pages at that state. With `first` beyond it the piece is empty: the last one.
    pub(crate) pages: u32,
    pub(crate) data: Bytes,
}

/// WAL figures for status.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WalFigures {
    pub(crate) locks_lost: u64,
    pub(crate) frames: u32,
    pub(crate) backfilled: u32,
}

impl Engine {
    /// Opens the database as the primary, with what this node has of it. Blocks.
    #[cfg(test)]
    pub(crate) fn open(options: EngineOptions, node: Arc<crate::node::Node>) -> Result<Engine> {
        Opening::begin(options, node)?.finish()
    }

    fn start(base: Arc<Base>, handle: Handle, history: EpochHistory) -> Result<Engine> {
        if let Some(found) = doubt::text(&base.options.side) {
            base.node.set_problem(Part::Pages, Some(found));
        }
        let tip = base.tip();
        let second = Arc::new(Mutex::new(reader(&base)?));
        let syncer = Arc::new(Syncer::new(base.clone(), tip.position.number()));
        let waker = Arc::new(Waker::default());
        let (commands, receiver) = mpsc::sync_channel(4);
        let brake = Arc::new(Brake::new(&base, Write::new(reader(&base)?)));
        let capture_loop = CaptureLoop {
            base: base.clone(),
            capture: Capture::new(base.clone(), handle, tip, Arc::new(history)),
            syncer: syncer.clone(),
            waker: waker.clone(),
            commands: receiver,
            restart_after: Instant::now(),
            restart_pause: Duration::from_millis(50),
            failed_until: Instant::now(),
            brake: brake.clone(),
        };
        let checkpointer = Checkpointer {
            base: base.clone(),
            handle: reader(&base)?,
            replica: None,
            log_synced: Instant::now(),
            applied_synced: Instant::now(),
        };
        let (last, threads) = Default::default();
        let engine = Engine { base, syncer, waker, brake, commands, second, last, threads };
        // Closed again should another not start.
        lock(&engine.threads).push(capture_loop.start()?);
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

    /// Fails when no commit can be vouched for any more, and says why.
    pub(crate) fn check(&self) -> Result<()> {
        self.base.check()?;
        // They end by themselves only after a failure; should one have ended in some other way, it is one now.
        if lock(&self.threads).iter().any(JoinHandle::is_finished) {
            self.base.check()?;
            self.base.fail(&Error::Stopped("a thread of the engine has ended".into()));
        }
        self.base.check()
    }

    /// Call before BEGIN: waits, for a bounded time, while the WAL is longer than it may be.
    pub(crate) fn pace(&self) {
        self.brake.wait(&self.base);
    }

    /// Copies all that is committed back and begins the WAL anew. Blocks for at most so long.
    pub(crate) fn checkpoint(&self, limit: Duration) -> Result<Checkpoint> {
        self.check()?;
        bound::checkpoint(&self.base, limit, || self.brake.wake())
    }

    /// Blocks until the transaction is on the disk; callers share one fsync.
    pub(crate) fn sync(&self, txid: Txid) -> Result<()> {
        self.syncer.sync(txid.number())
    }

    /// Opens a new epoch with a number above `above`, because a peer with a higher one was heard. Blocks.
    pub(crate) fn raise_epoch(&self, above: u64) -> Result<()> {
        let (reply, answer) = mpsc::sync_channel(1);
        let gone = || self.base.check().err().unwrap_or(Error::ShutDown);
        self.commands.send(Command::RaiseEpoch(above, reply)).map_err(|_| gone())?;
        self.waker.wake();
        answer.recv().map_err(|_| gone())?
    }

    pub(crate) fn log(&self) -> &Arc<Log> {
        &self.base.log
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.base.page_size
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

    /// Fails, and stops for good, when the files at the paths are not those that are open, or somebody else wrote to the database.
    pub(crate) fn expect_files(&self) -> Result<()> {
        self.base.sound()?;
        self.base.expect_files()
    }

    /// Stops and joins the threads; all further calls fail with `ShutDown`. Blocks.
    pub(crate) fn close(&self) {
        stop_threads(&self.base, &self.threads, &self.waker);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

fn stop_threads(base: &Base, threads: &Mutex<Vec<JoinHandle<()>>>, waker: &Waker) {
    base.stop.store(true, std::sync::atomic::Ordering::Release);
    waker.wake();
    for thread in std::mem::take(&mut *lock(threads)) {
        thread.thread().unpark();
        // It has said how it ended.
        let _ = thread.join();
    }
}

/// A further connection to an open database.
fn reader(base: &Base) -> Result<Handle> {
    base.expect_files()?;
    let handle = Handle::open(base.path(), false)?;
    handle.connection().query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0))?;
    Ok(handle)
}

fn make_side(options: &EngineOptions) -> Result<()> {
    crate::side::make(&options.side)
}

#[cfg(test)]
mod states;
#[cfg(test)]
mod tests;
