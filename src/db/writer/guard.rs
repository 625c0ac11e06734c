//! The full writer connection on loan, and what is set right when it comes back.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;
use std::time::Duration;

use rusqlite::Connection;

use super::Shared;
use super::inside::Inside;
use crate::engine::Durability;
use crate::error::Result;
use crate::sqlite::hook_commits;
use crate::txid::Txid;

/// The full writer connection, for whoever holds this guard; all other writes wait.
///
/// Transactions are the holder's own business; one that is open when the guard is dropped is rolled back. Commits
/// are captured and shipped like all others. [`WriterGuard::flush`] makes them durable and tells the last one.
///
/// What the holder changed of the connection stays, but for the WAL hook, `synchronous`, `wal_autocheckpoint` and the busy timeout:
/// those are as they were before when the guard is dropped.
pub struct WriterGuard<'a> {
    connection: MutexGuard<'a, Option<Connection>>,
    shared: &'a Shared,
    /// The last transaction before the guard.
    before: u64,
    /// Keeps the guard on the thread that took it.
    _inside: Inside,
}

impl<'a> WriterGuard<'a> {
    /// The connection is open.
    pub(super) fn new(
        connection: MutexGuard<'a, Option<Connection>>,
        shared: &'a Shared,
        inside: Inside,
    ) -> Result<WriterGuard<'a>> {
        let engine = shared.engine.get()?;
        engine.pace();
        let before = engine.captured()?.number();
        Ok(WriterGuard { connection, shared, before, _inside: inside })
    }

    /// Waits until everything that was committed is durable; says the last transaction since the guard was taken
    /// or last flushed.
    ///
    /// # Errors
    /// [`Error::Stopped`](crate::Error::Stopped) when replication has stopped, [`Error::ShutDown`](crate::Error::ShutDown) after a
    /// shutdown.
    pub fn flush(&mut self) -> Result<Option<Txid>> {
        let engine = self.shared.engine.get()?;
        let last = engine.captured()?;
        if self.shared.durability == Durability::Synced {
            engine.sync(last)?;
        }
        let new = last.number() > self.before;
        self.before = last.number();
        Ok(new.then_some(last))
    }
}

impl fmt::Debug for WriterGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriterGuard").finish_non_exhaustive()
    }
}

impl Deref for WriterGuard<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match &*self.connection {
            Some(connection) => connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl DerefMut for WriterGuard<'_> {
    fn deref_mut(&mut self) -> &mut Connection {
        match &mut *self.connection {
            Some(connection) => connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl Drop for WriterGuard<'_> {
    fn drop(&mut self) {
        let shared = self.shared;
        if !self.is_autocommit() {
            let _ = self.execute_batch("ROLLBACK");
        }
        if let Err(error) = shared.settings.restore(self) {
            // Commits are captured all the same; they may cost more.
            tracing::warn!(%error, "the writer connection could not be set right");
        }
    }
}

/// What the way in which we commit needs of a connection, as it was when the application had prepared it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    synchronous: i64,
    busy: Duration,
}

impl Settings {
    pub(super) fn of(connection: &Connection) -> rusqlite::Result<Settings> {
        let synchronous = connection.pragma_query_value(None, "synchronous", |r| r.get(0))?;
        let busy: i64 = connection.pragma_query_value(None, "busy_timeout", |r| r.get(0))?;
        Ok(Settings { synchronous, busy: Duration::from_millis(busy.max(0) as u64) })
    }

    /// Sets all of it again, and our WAL hook.
    pub(super) fn restore(self, connection: &Connection) -> rusqlite::Result<()> {
        connection.busy_timeout(self.busy)?;
        connection.pragma_update(None, "synchronous", self.synchronous)?;
        // This takes every WAL hook away, so ours comes after it.
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        hook_commits(connection);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::db::{Config, Db};
    use crate::sqlite::CommitCount;

    #[tokio::test]
    async fn the_wal_hook_is_back_after_a_guard() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::new(dir.path().join("a.db")).migrate(|c| c.execute_batch("CREATE TABLE t(a)"));
        let db = Db::open(config).await.unwrap();
        let copy = db.clone();
        tokio::task::spawn_blocking(move || {
            // This takes the hook away.
            copy.writer().unwrap().execute_batch("PRAGMA wal_autocheckpoint = 1000").unwrap();
            let count = CommitCount::begin();
            copy.writer().unwrap().execute_batch("INSERT INTO t VALUES (1)").unwrap();
            assert!(count.one().is_some(), "it told of the commit");
        })
        .await
        .unwrap();
        db.shutdown().await;
    }
}
