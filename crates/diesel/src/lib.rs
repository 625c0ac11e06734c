//! [`diesel`] pools on a database that [`replite`] replicates.
//!
//! Each instance of the application has a pool on its own full copy. Reads run on it at SQLite's
//! speed. Writes are taken on the primary alone, and are refused at once on every other instance,
//! so that `replite`'s layer can run the request on the primary.
//!
//! ```
//! use diesel_migrations::EmbeddedMigrations;
//! use replite::{Config, Db};
//!
//! # async fn example(migrations: EmbeddedMigrations) -> Result<(), Box<dyn std::error::Error>> {
//! // `embed_migrations!()`: they run on whichever instance is the primary.
//! let config = Config::from_env("REPLITE_")?.migrate(replite_diesel::migrations(migrations));
//! let db = Db::open(config).await?;
//! let pool = replite_diesel::pool(&db).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What the pool does
//!
//! - It waits until this instance has a state, and never makes a database file.
//! - `PRAGMA query_only` is on wherever this instance is not the primary. The pool sets it each time
//!   that a connection is taken out, in place of diesel's own test of the connection. So it follows
//!   a change of roles.
//! - A commit has returned when it is on the disk, if that is what the database was configured for
//!   ([`Db::durability`]).
//! - A write waits five seconds for another one (`busy_timeout`, which diesel leaves at zero).
//! - It checkpoints nothing: the node does that.
//! - It does not run [`Config::on_connect`](replite::Config::on_connect). What diesel's connections need
//!   besides is a `connection_customizer`: [`pool_with`].
//! - It does not keep the database open. After [`Db::shutdown`] it gives out connections that only
//!   read.
//!
//! # What the application does
//!
//! - **Its errors say when they need the primary**: [`needs_primary`]. A request that only reads runs
//!   on the instance that got it. When it tried to write, its response needs a mark:
//!
//! ```
//! # use axum::http::StatusCode;
//! # use axum::response::{IntoResponse, Response};
//! use replite::NeedsPrimary;
//!
//! struct AppError(diesel::result::Error);
//!
//! impl IntoResponse for AppError {
//!     fn into_response(self) -> Response {
//!         let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
//!         if replite_diesel::needs_primary(&self.0) {
//!             response.extensions_mut().insert(NeedsPrimary::new());
//!         }
//!         response
//!     }
//! }
//! ```
//!
//! - **A transaction that writes is an `immediate_transaction`.** One that reads first and writes then
//!   fails when another connection has committed between. That is so with SQLite everywhere.
//! - **A connection is taken out for a piece of work**, not kept for hours: it has the role of the
//!   moment when it was taken. As a replica's it goes on refusing writes. As a primary's that is none
//!   any more, its writes wait for a lock, and fail after the five seconds: "database is locked". A
//!   request that had its connection at that moment gets this error, too.
//! - **[`Config::on_promote`](replite::Config::on_promote) writes through the handle that it is given.**
//!   The instance is not the primary yet, and the pool refuses.
//! - **Temporary tables are writes** for SQLite: a read that makes one needs the primary.
//!
//! Read your own writes, with cookies or tokens, works as it is: the response of a request that
//! wrote names what the pool had committed by then.
//!
//! # What a lease's end can cost
//!
//! When a node loses its lease, its handle refuses commits from that instant. A pool does with the
//! next connection that is taken out, and a migration goes on to its end. What commits between is on
//! this instance alone. It is kept when the node follows the new primary ([`Db::lost`]); no response
//! has a token for it.
#![warn(missing_docs)]

mod migrate;

use std::error::Error as StdError;

use diesel::connection::SimpleConnection;
use diesel::r2d2::{self, ManageConnection, R2D2Connection};
use diesel::result::Error as DieselError;
use diesel::{Connection, SqliteConnection};
use replite::{Db, Durability, NeedsPrimary, Role, RoleState};
use tokio::sync::watch;

pub use migrate::{MigrationError, migrations};
pub use {diesel, diesel_migrations, replite};

/// A pool of diesel's, with this crate's connections.
pub type Pool = r2d2::Pool<Manager>;

/// What every connection has. diesel would not wait for another writer at all.
const SETTINGS: &str = "PRAGMA busy_timeout = 5000; PRAGMA wal_autocheckpoint = 0;";

/// What SQLite says of a write where `query_only` is on. diesel gives no code.
const READ_ONLY: &str = "attempt to write a readonly database";

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database was closed, or replication has stopped, before there was a state to read.
    #[error("the replicated database can't be used")]
    Database(#[from] replite::Error),
    /// The first connections could not be made.
    #[error("connections to the replicated database can't be made")]
    Pool(#[from] r2d2::PoolError),
    /// The path of the database is no UTF-8, which diesel needs.
    #[error("the path of the database is no UTF-8")]
    Path,
}

/// A pool with the usual limits. It waits until this instance can be read ([`Db::ready`]).
///
/// # Errors
/// [`Error::Database`] as of [`Db::ready`], [`Error::Pool`] when SQLite does not open the file,
/// [`Error::Path`].
///
/// # Cancel safety
/// Nothing happens but the waiting.
pub async fn pool(db: &Db) -> Result<Pool, Error> {
    pool_with(db, Pool::builder()).await
}

/// A pool with limits, time limits and a `connection_customizer` of the application's. It tests its
/// connections when they are taken out, whatever the builder says: that is when they get their role.
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite_diesel::Error> {
/// let builder = replite_diesel::Pool::builder().max_size(32);
/// let pool = replite_diesel::pool_with(&db, builder).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As of [`pool`].
pub async fn pool_with(db: &Db, builder: r2d2::Builder<Manager>) -> Result<Pool, Error> {
    let manager = Manager::new(db).await?;
    let build = tokio::task::spawn_blocking(move || builder.test_on_check_out(true).build(manager));
    match build.await {
        Ok(built) => Ok(built?),
        Err(ended) => match ended.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(replite::Error::ShutDown.into()),
        },
    }
}

/// Makes the pool's connections, and has each refuse writes, or take them, as the role of this
/// instance is when it is taken out.
#[derive(Debug)]
pub struct Manager {
    url: String,
    settings: String,
    roles: watch::Receiver<RoleState>,
}

impl Manager {
    /// For a pool that is built by other means than [`pool_with`]. It has to test connections when
    /// they are taken out (`test_on_check_out`, which is the default). Waits until this instance can
    /// be read.
    ///
    /// # Errors
    /// [`Error::Database`] as of [`Db::ready`], [`Error::Path`].
    pub async fn new(db: &Db) -> Result<Manager, Error> {
        db.ready().await?;
        let synchronous = match db.durability() {
            Durability::Unsynced => "NORMAL",
            _ => "FULL",
        };
        let url = url(db.path().to_str().ok_or(Error::Path)?);
        let settings = format!("{SETTINGS} PRAGMA synchronous = {synchronous};");
        Ok(Manager { url, settings, roles: db.roles() })
    }

    /// Makes the connection take writes, or refuse them, as the role is now.
    fn follow(&self, connection: &mut SqliteConnection) -> Result<(), r2d2::Error> {
        let primary = self.roles.borrow().role == Role::Primary;
        let pragma = match primary {
            true => "PRAGMA query_only = OFF",
            false => "PRAGMA query_only = ON",
        };
        connection.batch_execute(pragma).map_err(r2d2::Error::QueryError)
    }
}

impl ManageConnection for Manager {
    type Connection = SqliteConnection;
    type Error = r2d2::Error;

    fn connect(&self) -> Result<SqliteConnection, r2d2::Error> {
        let made = SqliteConnection::establish(&self.url);
        let mut connection = made.map_err(r2d2::Error::ConnectionError)?;
        connection.batch_execute(&self.settings).map_err(r2d2::Error::QueryError)?;
        self.follow(&mut connection)?;
        Ok(connection)
    }

    fn is_valid(&self, connection: &mut SqliteConnection) -> Result<(), r2d2::Error> {
        self.follow(connection)
    }

    fn has_broken(&self, connection: &mut SqliteConnection) -> bool {
        std::thread::panicking() || connection.is_broken()
    }
}

/// A URI of an existing file. diesel would make one that is missing.
fn url(path: &str) -> String {
    let path = path.replace('%', "%25").replace('?', "%3f").replace('#', "%23");
    // Two slashes would begin the name of a host.
    let host = if path.starts_with("//") { "//" } else { "" };
    format!("file:{host}{path}?mode=rw")
}

/// Whether this is the error of a write that only the primary takes: SQLite's "attempt to write a
/// readonly database" from [`diesel::result::Error`], also as the source of another error, and
/// [`replite::Error::NotPrimary`]. A transparent error leads past diesel's: give the one inside.
///
/// ```
/// # use diesel::prelude::*;
/// # fn example(connection: &mut SqliteConnection) {
/// let written = diesel::sql_query("INSERT INTO notes VALUES ('a')").execute(connection);
/// if written.is_err_and(|error| replite_diesel::needs_primary(&error)) {
///     println!("on the primary, please");
/// }
/// # }
/// ```
pub fn needs_primary(error: &(dyn StdError + 'static)) -> bool {
    NeedsPrimary::of(error).is_some() || is_refused(error)
}

fn is_refused(error: &(dyn StdError + 'static)) -> bool {
    match error.downcast_ref() {
        Some(DieselError::DatabaseError(_, information)) => information.message() == READ_ONLY,
        // What the work failed with, and not that it could not be undone.
        Some(DieselError::RollbackErrorOnCommit { commit_error, .. }) => is_refused(&**commit_error),
        _ => error.source().is_some_and(is_refused),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_path_is_one_whatever_is_in_it() {
        assert_eq!(super::url("data/50%?#.db"), "file:data/50%25%3f%23.db?mode=rw");
        assert_eq!(super::url("//data/a.db"), "file:////data/a.db?mode=rw");
    }
}
