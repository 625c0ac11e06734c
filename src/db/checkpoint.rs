//! Checkpoints on request.

use std::time::Duration;

use crate::db::Db;
use crate::error::Result;
use crate::node::slot::Running;
use crate::status::Checkpoint;
use crate::threads::blocking;

impl Db {
    /// Copies everything that is committed into the database file, and begins the WAL anew, on a
    /// primary and on a replica. It is for a moment at which the file is to be small or whole. A
    /// node does it by itself when the WAL is longer than
    /// [`Config::wal_limit`](crate::Config::wal_limit). `PRAGMA wal_checkpoint` is refused beside a
    /// node, on its own connections, too.
    ///
    /// The call waits for readers up to `limit`; they never wait themselves. Meanwhile it holds
    /// back writers, of this node and of other processes, and on a replica the apply thread. It
    /// never does so for longer than 4 s at a time, nor for a reader that has been there for longer
    /// than that.
    ///
    /// # Errors
    /// [`Error::NoState`](crate::Error::NoState) on a replica that has not been filled yet,
    /// [`Error::Stopped`](crate::Error::Stopped) when replication has stopped,
    /// [`Error::ShutDown`](crate::Error::ShutDown). A disk that fails is a [`Checkpoint::Busy`],
    /// and a problem in the status.
    ///
    /// # Cancel safety
    /// Dropped, it goes on for up to `limit`.
    pub async fn checkpoint(&self, limit: Duration) -> Result<Checkpoint> {
        let db = self.clone();
        blocking(move || match db.inner.slot.get()? {
            Running::Primary(engine) => engine.checkpoint(limit),
            Running::Replica(engine) => engine.checkpoint(limit),
        })
        .await
    }
}
