//! One database file.
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::Result;
use crate::log::{Log, LogOptions};
use crate::node::Node;
use crate::page::{PageNo, PageSize};
use crate::txid::{EpochHistory, Position, Txid};
use crate::wire::Unit;

/// When a commit is acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Durability {
    /// After an fsync that is shared by all commits that wait for one. Nothing is shipped before it is synced.
    #[default]
    Synced,
    /// Without waiting for an fsync, like SQLite's `synchronous = NORMAL`.
    Unsynced,
}

#[derive(Clone, Debug)]
pub(crate) struct EngineOptions {
    pub(crate) path: PathBuf,
    /// The directory beside the database: `<path>-replite`.
    pub(crate) side: PathBuf,
    pub(crate) durability: Durability,
    /// The WAL is restarted when it is longer than this.
    pub(crate) wal_limit_bytes: u64,
    pub(crate) log: LogOptions,
    /// Longest that a foreign commit may stay unseen.
    pub(crate) poll_max: Duration,
}

/// A primary's open database: capture, checkpoints, snapshots.
pub(crate) struct Engine {}

/// What the writer knew when its transaction held the write lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {}

/// A run of pages for a snapshot.
pub(crate) struct Piece {
    pub(crate) first: PageNo,
    /// A committed state that is not older than any byte of the piece's pages that a log record after
    /// the snapshot's first piece does not replace.
    pub(crate) position: Position,
    /// The database's size in pages at that state. `first` beyond it: the piece is empty and the last.
    pub(crate) pages: u32,
    pub(crate) data: Bytes,
}

/// WAL figures for status.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WalFigures {
    pub(crate) frames: u32,
    pub(crate) backfilled: u32,
}

impl Engine {
    /// Opens (and creates) the database as the primary, recovers the position, opens a new epoch,
    /// sets `node.applied`, starts the threads. Blocks.
    pub(crate) fn open(_options: EngineOptions, _node: Arc<Node>) -> Result<Engine> {
        unimplemented!()
    }
    /// Call after BEGIN IMMEDIATE, on the thread whose connection holds the write lock.
    pub(crate) fn begun(&self) -> Result<Begun> {
        unimplemented!()
    }
    /// Call after COMMIT; `frame` is what the WAL hook said during it, if it was called. `None`: nothing written.
    pub(crate) fn committed(&self, _begun: Begun, _frame: Option<u32>) -> Result<Option<Txid>> {
        unimplemented!()
    }
    /// Blocks until the transaction is on the disk; callers share one fsync.
    pub(crate) fn sync(&self, _txid: Txid) -> Result<()> {
        unimplemented!()
    }
    /// Opens a new epoch with a number above `above`, because a peer with a higher one was heard.
    pub(crate) fn raise_epoch(&self, _above: u64) -> Result<()> {
        unimplemented!()
    }
    pub(crate) fn log(&self) -> &Arc<Log> {
        unimplemented!()
    }
    pub(crate) fn page_size(&self) -> PageSize {
        unimplemented!()
    }
    /// Reads up to `max_bytes` (at least one page) of pages from `first` on. Blocks.
    pub(crate) fn read_piece(&self, _first: PageNo, _max_bytes: usize) -> Result<Piece> {
        unimplemented!()
    }
    pub(crate) fn wal(&self) -> WalFigures {
        unimplemented!()
    }
    /// Stops and joins the threads; all further calls fail with `ShutDown`. Idempotent. Blocks.
    pub(crate) fn close(&self) {
        unimplemented!()
    }
}

/// A replica's database, there or yet to come, and the thread that applies to it.
pub(crate) struct Follower {}

/// Where a replica stands, for its hello.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub(crate) position: Option<Position>,
    pub(crate) history: Arc<EpochHistory>,
    /// A snapshot that was begun: the position of its first piece, and the first page that is missing.
    pub(crate) resume: Option<(Position, PageNo)>,
    pub(crate) page_size: Option<PageSize>,
}

impl Follower {
    /// Opens what is there, starts the apply thread, sets `node.applied` when there is a state. Blocks.
    pub(crate) fn open(_options: EngineOptions, _node: Arc<Node>) -> Result<Follower> {
        unimplemented!()
    }
    /// True once the database file can be opened and read; may fall back to false.
    pub(crate) fn readable(&self) -> watch::Receiver<bool> {
        unimplemented!()
    }
    /// Forgets what an earlier stream left unfinished and says where the replica stands.
    pub(crate) async fn standing(&self) -> Result<Standing> {
        unimplemented!()
    }
    /// Hands over data units (EPOCHS, TXN_*, PAGE, SNAP_*) in order; waits while the bounded queue is full.
    /// An error of the apply thread comes back from this or a later call; the stream must then be ended.
    pub(crate) async fn feed(&self, _units: Vec<Unit>) -> Result<()> {
        unimplemented!()
    }
    /// The newest position that is fsynced; the thread syncs by itself a short time after it applied.
    pub(crate) fn synced(&self) -> watch::Receiver<Option<Position>> {
        unimplemented!()
    }
    pub(crate) fn wal(&self) -> WalFigures {
        unimplemented!()
    }
    pub(crate) fn log_bytes(&self) -> u64 {
        unimplemented!()
    }
    pub(crate) fn close(&self) {
        unimplemented!()
    }
}
