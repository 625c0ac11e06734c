//! sqlx's migrations, run by the node that is the primary.

use std::path::PathBuf;
use std::sync::Arc;
use std::{io, thread};

use replite::rusqlite;
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};

/// Why the migrations were not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// sqlx has done none, or some. Those that it did stay.
    #[error("sqlx's migrations")]
    Migrate(#[from] MigrateError),
    /// The connection for them could not be made, or not be closed.
    #[error("the connection for sqlx's migrations")]
    Connection(#[from] sqlx::Error),
    /// There is no thread, or no runtime, for sqlx.
    #[error("a runtime for sqlx's migrations")]
    Runtime(#[from] io::Error),
    /// The path of the database is no UTF-8.
    #[error("the path of the database is no UTF-8")]
    Path,
}

/// sqlx's migrations for [`Config::migrate`](replite::Config::migrate): `sqlx::migrate!()`, or a
/// [`Migrator`] made while the program runs. They run on whichever node is the primary, before it
/// says so and each time that it becomes one. Replicas get the schema from there, and
/// [`Db::wait_until`](replite::Db::wait_until) waits for it.
///
/// The table `_sqlx_migrations` is kept as sqlx keeps it: its command `sqlx migrate info` shows what
/// was run, and an application that was there before goes on where it was.
///
/// ```
/// # use replite::Config;
/// # use sqlx::migrate::Migrator;
/// # fn example(migrator: Migrator) -> Config {
/// Config::new("data/app.db").migrate(replite_sqlx::migrations(migrator))
/// # }
/// ```
///
/// Migrations that a newer build has run are no error, as they are to sqlx: an instance of an older
/// build can be the primary in the midst of a deployment, or after it was taken back. So a schema
/// must suit the version before it as well.
///
/// A failed one makes [`Db::open`](replite::Db::open) fail with
/// [`replite::Error::Migration`], or the node stay a replica.
pub fn migrations(
    mut migrator: Migrator,
) -> impl Fn(&mut rusqlite::Connection) -> Result<(), MigrationError> + Send + Sync + 'static {
    migrator.set_ignore_missing(true);
    let migrator = Arc::new(migrator);
    move |connection| {
        let path = PathBuf::from(connection.path().ok_or(MigrationError::Path)?);
        // It may be called on a thread that drives a runtime, where no other one can be driven.
        thread::scope(|scope| {
            let run = thread::Builder::new().name("sqlx-migrations".into());
            let done = run.spawn_scoped(scope, || run_all(&migrator, path))?;
            done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn run_all(migrator: &Migrator, path: PathBuf) -> Result<(), MigrationError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let options = crate::settings(SqliteConnectOptions::new().filename(path));
    runtime.block_on(async {
        let mut connection = options.synchronous(SqliteSynchronous::Full).connect().await?;
        let done = migrator.run(&mut connection).await;
        let closed = connection.close().await;
        done?;
        Ok(closed?)
    })
}
