//! What one database file needs to know.

use std::sync::Arc;
use std::time::Duration;

use crate::checksum::{Fingerprint, PageKey};
use crate::context::NodeContext;
use crate::files::Paths;
use crate::log::LogOptions;
use crate::sqlite::StandingMark;

/// When the primary acknowledges a commit.
///
/// ```
/// use replite::{Config, Durability};
///
/// // For data that can be had again: an import, a cache.
/// let config = Config::new("cache.db").durability(Durability::Unsynced);
/// # drop(config);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Durability {
    /// After an fsync that all commits share which wait for one. The primary ships nothing to a
    /// replica before it is on its own disk. So no replica is ever ahead of the primary.
    #[default]
    Synced,
    /// Without waiting for an fsync, like SQLite's `synchronous = NORMAL`. A power cut can take the
    /// commits since the last checkpoint. Replicas can then be ahead of the primary. A killed
    /// process loses nothing.
    ///
    /// Suppose that the machine went down before the primary closed the database. The next
    /// [`Db::open`](crate::Db::open) then asks its replicas for the transactions that go on where
    /// its own end. It asks those that connect to its [`Config::listen`](crate::Config::listen)
    /// address within [`Config::recovery_timeout`](crate::Config::recovery_timeout). No one can
    /// write meanwhile.
    ///
    /// What no replica gives back in that time is lost. A replica that has it keeps it apart
    /// ([`Db::lost`](crate::Db::lost)) and follows the primary.
    ///
    /// An endpoint that the application mounts is not up before `open` returns. Without a listener
    /// of its own the primary asks no replica.
    Unsynced,
}

impl Durability {
    /// Whether a record goes to the log and to replicas before its frames are fsynced. A power
    /// cut may then take commits from the WAL that the log and the replicas have. A marker says
    /// so while the database is open.
    pub(in crate::engine) fn ships_unsynced(self) -> bool {
        match self {
            Durability::Synced => false,
            Durability::Unsynced => true,
        }
    }
}

/// What one database file needs to know.
#[derive(Clone, Debug)]
pub(crate) struct EngineOptions {
    pub(crate) paths: Paths,
    pub(crate) durability: Durability,
    /// The node restarts the WAL when it is longer than this.
    pub(crate) wal_limit_bytes: u64,
    pub(crate) log: LogOptions,
    /// Most bytes that `lost`, what heals replaced, may take up.
    pub(crate) lost_bytes: u64,
    /// Longest that a foreign commit may stay unseen, where the kernel does not tell of it.
    pub(crate) poll_max: Duration,
    /// A primary goes on from a database whose WAL is gone while a node was copying frames into it.
    pub(crate) accept_damaged: bool,
    /// The mode that a database file gets which this node makes.
    pub(crate) database_mode: Option<u32>,
    /// What all readers of this process share while the database is open.
    pub(crate) read_mark: Arc<StandingMark>,
}

impl EngineOptions {
    /// What the database's pages are hashed with.
    pub(crate) fn page_key(&self) -> PageKey {
        self.log.page_key
    }

    /// Where the files are, and what says of them that they go with this key.
    pub(crate) fn keyed(&self) -> (&Paths, Fingerprint) {
        (&self.paths, self.page_key().fingerprint())
    }

    /// The same with the keys that the node has by now.
    pub(crate) fn now(&self, node: &NodeContext) -> EngineOptions {
        let mut options = self.clone();
        options.log.page_key = node.database_keys.get().page;
        options
    }
}
