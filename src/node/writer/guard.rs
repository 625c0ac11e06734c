//! The full writer connection on loan, and what is set right when it comes back.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};

use crate::error::{Error, Result};
use crate::node::writer::returned::Borrows;
use crate::node::writer::{OpenWriter, WriterShared};
use crate::report::Condition;
use crate::session;
use crate::txid::Txid;

/// The full writer connection, for the holder of this guard; all other writes wait.
///
/// Transactions are the holder's own business. Dropping the guard rolls back one that is open.
/// When this node's time as the primary is over, COMMIT fails, and the transaction is rolled back.
/// Commits are captured and shipped like all others. [`WriterGuard::flush`] makes them durable and
/// tells the last one.
///
/// What the holder changed of the connection stays, but for what the node relies on. Dropping the
/// guard restores the WAL hook, `synchronous`, `wal_autocheckpoint`, `query_only` and the busy
/// timeout. On a node with a lease the commit hook is the node's own, too. The guard also restores
/// the flags of `sqlite3_db_config` that defend the schema.
///
/// `PRAGMA locking_mode = EXCLUSIVE` is not authorized: no connection could read or write any more.
/// SQLite refuses another journal mode than WAL ("locked").
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::Db;
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// # tokio::task::spawn_blocking(move || {
/// let mut writer = db.writer()?; // blocks
/// writer.execute_batch("VACUUM; INSERT INTO notes VALUES ('a')")?;
/// let last = writer.flush()?; // on the disk
/// assert!(last.is_some());
/// # Ok::<_, replite::Error>(())
/// # })
/// # .await
/// # .expect("no panic")?;
/// # Ok(())
/// # }
/// ```
pub struct WriterGuard<'a> {
    open: MutexGuard<'a, Option<OpenWriter>>,
    shared: &'a WriterShared,
    /// Keeps the guard on the thread that took it.
    _inside: Borrows<'a>,
}

impl<'a> WriterGuard<'a> {
    /// The connection is open.
    pub(super) fn new(
        mut open: MutexGuard<'a, Option<OpenWriter>>,
        shared: &'a WriterShared,
        inside: Borrows<'a>,
    ) -> Result<WriterGuard<'a>> {
        if let Some(OpenWriter { connection, commits, engine, .. }) = open.as_mut() {
            shared.expect_open()?;
            engine.check()?;
            engine.pace();
            commits.again(connection);
            commits.reset();
        }
        Ok(WriterGuard { open, shared, _inside: inside })
    }

    /// Waits until everything that was committed is durable. If something was committed through
    /// this guard since it was taken or last flushed, returns the last transaction by now. That is
    /// this guard's own, or a later one of another writer. The wait for capture lasts for as long
    /// as that makes progress.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`](crate::Error::OutcomeUnknown) when something was committed through
    /// this guard and can't be vouched for, such as because the node is not the primary any more.
    /// When nothing was,
    /// [`Error::Stopped`](crate::Error::Stopped) after a failure of replication,
    /// [`Error::ShutDown`](crate::Error::ShutDown) after a shutdown,
    /// [`Error::Timeout`](crate::Error::Timeout).
    pub fn flush(&mut self) -> Result<Option<Txid>> {
        let Some(OpenWriter { connection, commits, engine, .. }) = self.open.as_mut() else {
            return Err(Error::ShutDown);
        };
        // An application that took our hook away may have committed anything.
        let may_have = !commits.again(connection) || commits.count() > 0;
        commits.reset();
        let last = engine.captured();
        if !may_have {
            self.shared.gate.settle(engine, last?)?;
            return Ok(None);
        }
        let passed = last.and_then(|last| self.shared.gate.wait(engine, last).map(|()| Some(last)));
        passed.map_err(Error::of_a_commit).inspect_err(|_| session::outcome_unknown())
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
        match &*self.open {
            Some(open) => &open.connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl DerefMut for WriterGuard<'_> {
    fn deref_mut(&mut self) -> &mut Connection {
        match &mut *self.open {
            Some(open) => &mut open.connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl Drop for WriterGuard<'_> {
    fn drop(&mut self) {
        if !self.is_autocommit() {
            let _ = self.execute_batch("ROLLBACK");
        }
        let Some(OpenWriter { connection, commits, settings, .. }) = self.open.as_mut() else { return };
        if let Err(error) = settings.restore(connection) {
            // Commits are captured all the same; they may cost more.
            Condition::WriterNotReset { error: &error }.say();
        }
        commits.again(connection);
    }
}

/// What the way in which we commit needs of a connection, as it was when the application had
/// prepared it.
#[derive(Clone, Copy, Debug)]
pub(super) struct ConnectionSettings {
    synchronous: i64,
    busy: Duration,
    flags: [bool; FLAGS.len()],
}

const FLAGS: [DbConfig; 4] = [
    DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE,
    DbConfig::SQLITE_DBCONFIG_DEFENSIVE,
    DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA,
    DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA,
];

impl ConnectionSettings {
    pub(super) fn of(connection: &Connection) -> rusqlite::Result<ConnectionSettings> {
        let synchronous = connection.pragma_query_value(None, "synchronous", |r| r.get(0))?;
        let busy: i64 = connection.pragma_query_value(None, "busy_timeout", |r| r.get(0))?;
        let mut flags = [false; FLAGS.len()];
        for (flag, which) in flags.iter_mut().zip(FLAGS) {
            *flag = connection.db_config(which)?;
        }
        Ok(ConnectionSettings { synchronous, busy: Duration::from_millis(busy.max(0) as u64), flags })
    }

    /// Sets all of it again. This takes every WAL hook away.
    pub(super) fn restore(self, connection: &Connection) -> rusqlite::Result<()> {
        connection.busy_timeout(self.busy)?;
        for (flag, which) in self.flags.into_iter().zip(FLAGS) {
            connection.set_db_config(which, flag)?;
        }
        self.mend(connection)?;
        connection.pragma_update(None, "synchronous", self.synchronous)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)
    }

    /// Takes back what prevents all writes. Returns whether there was anything.
    pub(super) fn mend(self, connection: &Connection) -> rusqlite::Result<bool> {
        let query_only: bool = connection.pragma_query_value(None, "query_only", |r| r.get(0))?;
        if query_only {
            connection.pragma_update(None, "query_only", false)?;
        }
        let mode: String = connection.pragma_query_value(None, "locking_mode", |r| r.get(0))?;
        let exclusive = mode.eq_ignore_ascii_case("exclusive");
        if exclusive {
            // It counts from the next read on.
            connection
                .execute_batch("PRAGMA locking_mode = NORMAL; SELECT count(*) FROM main.sqlite_schema")?;
        }
        Ok(query_only || exclusive)
    }
}

/// Refuses to let SQLite lock all others out, our own other connections among them. Such a
/// connection would keep every newcomer from the file, and write nothing itself.
pub(super) fn refuse_exclusive(connection: &mut Connection) -> rusqlite::Result<()> {
    connection.authorizer(Some(|context: AuthContext<'_>| match context.action {
        AuthAction::Pragma { pragma_name, pragma_value: Some(value) }
            if pragma_name.eq_ignore_ascii_case("locking_mode")
                && value.eq_ignore_ascii_case("exclusive") =>
        {
            Authorization::Deny
        }
        _ => Authorization::Allow,
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rusqlite::Connection;
    use rusqlite::config::DbConfig;

    use crate::db::{Config, Db};
    use crate::error::{Error, Result};

    async fn opened(dir: &tempfile::TempDir) -> Db {
        let config = Config::new(dir.path().join("a.db")).migrate(|c| c.execute_batch("CREATE TABLE t(a)"));
        Db::open(config).await.unwrap()
    }

    fn insert(db: &Db) -> Result<Option<crate::txid::Txid>> {
        db.write_blocking(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t VALUES (1)", [])?)).map(|c| c.txid)
    }

    #[tokio::test]
    async fn the_wal_hook_is_back_after_a_guard() {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(&dir).await;
        let copy = db.clone();
        tokio::task::spawn_blocking(move || {
            // This takes the hook away.
            copy.writer().unwrap().execute_batch("PRAGMA wal_autocheckpoint = 1000").unwrap();
            let mut guard = copy.writer().unwrap();
            guard.execute_batch("INSERT INTO t VALUES (1)").unwrap();
            assert_eq!(
                guard.open.as_ref().map(|open| open.commits.count()),
                Some(1),
                "it told of the commit"
            );
            assert!(guard.flush().unwrap().is_some());
            assert!(guard.flush().unwrap().is_none());
        })
        .await
        .unwrap();
        db.shutdown().await;
    }

    #[tokio::test]
    async fn whatever_a_guard_left_behind_the_next_write_works() {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(&dir).await;
        let copy = db.clone();
        tokio::task::spawn_blocking(move || {
            for sql in [
                "PRAGMA locking_mode = EXCLUSIVE",
                "PRAGMA main.locking_mode = exclusive",
                "PRAGMA journal_mode = DELETE",
                "PRAGMA journal_mode = OFF",
                "PRAGMA query_only = 1",
                "PRAGMA busy_timeout = 0",
                "PRAGMA synchronous = OFF",
                "PRAGMA wal_autocheckpoint = 1",
                "PRAGMA journal_size_limit = 0",
                "BEGIN EXCLUSIVE",
                "BEGIN",
            ] {
                let guard = copy.writer().unwrap();
                guard.busy_timeout(Duration::ZERO).unwrap();
                let done = guard.execute_batch(sql);
                assert_eq!(
                    done.is_err(),
                    sql.contains("ing_mode =") || sql.contains("journal_mode = D"),
                    "{sql}: {done:?}"
                );
                // Whether it works or not.
                let _ = guard.execute_batch("INSERT INTO t VALUES (1)");
                drop(guard);
                let txid = insert(&copy).unwrap_or_else(|error| panic!("{sql}: {error}"));
                assert!(txid.is_some(), "{sql}");
                // So does a connection that comes new.
                let path = copy.path().to_path_buf();
                Connection::open(path).unwrap().execute_batch("INSERT INTO t VALUES (1)").unwrap();
            }
            // The same in a closure, which nothing follows that would set it right.
            let read_only = |tx: &mut rusqlite::Transaction<'_>| {
                Ok::<_, Error>(tx.execute_batch("PRAGMA query_only = 1")?)
            };
            copy.write_blocking(read_only).unwrap();
            assert!(insert(&copy).unwrap().is_some());
        })
        .await
        .unwrap();
        assert!(db.status().problem.is_none());
        db.shutdown().await;
    }

    /// With an authorizer of its own an application can do it all the same.
    #[tokio::test]
    async fn an_exclusive_lock_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(&dir).await;
        let copy = db.clone();
        tokio::task::spawn_blocking(move || {
            let mut guard = copy.writer().unwrap();
            let allow = |_: rusqlite::hooks::AuthContext<'_>| rusqlite::hooks::Authorization::Allow;
            guard.authorizer(Some(allow)).unwrap();
            guard.busy_timeout(Duration::ZERO).unwrap();
            guard.execute_batch("PRAGMA locking_mode = EXCLUSIVE").unwrap();
            let _ = guard.execute_batch("INSERT INTO t VALUES (1)");
            drop(guard);
            assert!(insert(&copy).unwrap().is_some());
            Connection::open(copy.path()).unwrap().execute_batch("INSERT INTO t VALUES (1)").unwrap();
        })
        .await
        .unwrap();
        db.shutdown().await;
    }

    #[tokio::test]
    async fn the_defence_is_up_again_after_a_guard() {
        let dir = tempfile::tempdir().unwrap();
        let db = opened(&dir).await;
        let copy = db.clone();
        tokio::task::spawn_blocking(move || {
            let guard = copy.writer().unwrap();
            guard.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, false).unwrap();
            guard.execute_batch("PRAGMA trusted_schema = 1; PRAGMA writable_schema = 1").unwrap();
            drop(guard);
            let guard = copy.writer().unwrap();
            assert!(guard.db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE).unwrap());
            assert!(!guard.db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA).unwrap());
            assert!(!guard.db_config(DbConfig::SQLITE_DBCONFIG_WRITABLE_SCHEMA).unwrap());
        })
        .await
        .unwrap();
        db.shutdown().await;
    }
}
