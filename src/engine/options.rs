//! What one database file needs to know.

use std::time::Duration;

use crate::files::Paths;
use crate::log::LogOptions;

/// When a commit is acknowledged.
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
    /// After an fsync that is shared by all commits that wait for one. Nothing is shipped to a replica before it
    /// is on the primary's disk, so that no replica is ever ahead of it.
    #[default]
    Synced,
    /// Without waiting for an fsync, like SQLite's `synchronous = NORMAL`: a power cut can take the commits since
    /// the last checkpoint, and replicas can then be ahead of the primary. A killed process loses nothing.
    ///
    /// When a primary is opened that was not closed before the machine went down, [`Db::open`](crate::Db::open) asks the replicas that connect to its
    /// [`Config::listen`](crate::Config::listen) address within [`Config::recovery_timeout`](crate::Config::recovery_timeout) for the transactions that go on where
    /// its own end, and nobody can write meanwhile. What no replica gives back in that time is lost; a replica that has it
    /// keeps it apart ([`Db::lost`](crate::Db::lost)) and follows the primary. An endpoint that the application mounts is not up before `open` returns: without an own listener
    /// nobody is asked.
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
