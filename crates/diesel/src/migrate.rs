//! diesel's migrations, run by the node that is the primary.

use diesel::connection::SimpleConnection;
use diesel::migration::{Migration, MigrationSource};
use diesel::sqlite::Sqlite;
use diesel::{Connection, ConnectionError, SqliteConnection};
use diesel_migrations::MigrationHarness;
use replite::rusqlite;

/// Why the migrations were not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// diesel has done none, or some. Those that it did stay.
    #[error("diesel's migrations")]
    Migrate(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The connection for them could not be made.
    #[error("the connection for diesel's migrations")]
    Connection(#[from] ConnectionError),
    /// The connection for them does not work.
    #[error("the connection for diesel's migrations")]
    Settings(#[from] diesel::result::Error),
    /// The path of the database is no UTF-8.
    #[error("the path of the database is no UTF-8")]
    Path,
}

/// diesel's migrations for [`Config::migrate`](replite::Config::migrate): `embed_migrations!()`, or
/// another source. They run on whichever node is the primary, before it says so and each time that
/// it becomes one. Replicas get the schema from there, and
/// [`Db::wait_until`](replite::Db::wait_until) waits for it.
///
/// The table `__diesel_schema_migrations` is kept as diesel keeps it: its command
/// `diesel migration list` shows what was run, and an application that was there before goes on
/// where it was.
///
/// ```
/// # use diesel_migrations::EmbeddedMigrations;
/// # use replite::Config;
/// # fn example(migrations: EmbeddedMigrations) -> Config {
/// Config::new("data/app.db").migrate(replite_diesel::migrations(migrations))
/// # }
/// ```
///
/// Migrations that a newer build has run are no error: an instance of an older build can be the
/// primary in the midst of a deployment, or after it was taken back. So a schema must suit the
/// version before it as well.
///
/// A failed one makes [`Db::open`](replite::Db::open) fail with
/// [`replite::Error::Migration`], or the node stay a replica.
pub fn migrations<M>(
    source: M,
) -> impl Fn(&mut rusqlite::Connection) -> Result<(), MigrationError> + Send + Sync + 'static
where
    M: MigrationSource<Sqlite> + Send + Sync + 'static,
{
    move |connection| {
        let path = connection.path().ok_or(MigrationError::Path)?;
        let mut own = SqliteConnection::establish(&crate::url(path))?;
        own.batch_execute(crate::SETTINGS)?;
        let done = own.run_pending_migrations(Lent(&source)).map(drop);
        done.map_err(MigrationError::Migrate)
    }
}

/// A source that is there for the next time, too.
struct Lent<'a, M>(&'a M);

impl<M: MigrationSource<Sqlite>> MigrationSource<Sqlite> for Lent<'_, M> {
    fn migrations(&self) -> diesel::migration::Result<Vec<Box<dyn Migration<Sqlite>>>> {
        self.0.migrations()
    }
}
