//! [`sqlx`] pools on a database that [`replite`] replicates.
//!
//! Each instance of the application has a pool on its own full copy. Reads run on it at SQLite's
//! speed. Writes are taken on the primary alone, and are refused at once on every other instance,
//! so that `replite`'s layer can run the request on the primary.
//!
//! ```
//! use replite::{Config, Db};
//!
//! # async fn example(migrator: sqlx::migrate::Migrator) -> Result<(), Box<dyn std::error::Error>> {
//! // `sqlx::migrate!()`: it runs on whichever instance is the primary.
//! let config = Config::from_env("REPLITE_")?.migrate(replite_sqlx::migrations(migrator));
//! let db = Db::open(config).await?;
//! let pool = replite_sqlx::pool(&db).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # What the pool does
//!
//! - It waits until this instance has a state, and never makes a database file.
//! - `PRAGMA query_only` is on wherever this instance is not the primary. The pool sets it each time
//!   that a connection is taken out, so that it follows a change of roles. It does so in place of
//!   sqlx's own test of the connection, which is a call to the same thread.
//! - A commit has returned when it is on the disk, if that is what the database was configured for
//!   ([`Db::durability`]).
//! - It checkpoints nothing: the node does that.
//! - It does not run [`Config::on_connect`](replite::Config::on_connect). Functions and collations of
//!   sqlx are options of a connection: [`connect_options`].
//! - It does not keep the database open. After [`Db::shutdown`] it gives out connections that only
//!   read. Close it after that: requests that other instances sent on may need it until then.
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
//! struct AppError(sqlx::Error);
//!
//! impl IntoResponse for AppError {
//!     fn into_response(self) -> Response {
//!         let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
//!         if replite_sqlx::needs_primary(&self.0) {
//!             response.extensions_mut().insert(NeedsPrimary::new());
//!         }
//!         response
//!     }
//! }
//! ```
//!
//! - **A transaction that writes begins by `pool.begin_with("BEGIN IMMEDIATE")`.** One that reads first
//!   and writes then fails with `SQLITE_BUSY_SNAPSHOT` when another connection has committed between.
//!   That is so with SQLite everywhere.
//! - **A connection is taken out for a piece of work**, not kept for hours: it has the role of the
//!   moment when it was taken. As a replica's it goes on refusing writes. As a primary's that is none
//!   any more, its writes wait for a lock, and fail with `SQLITE_BUSY` after `busy_timeout`: "database
//!   is locked". A request that had its connection at that moment gets this error, too.
//! - **[`Config::on_promote`](replite::Config::on_promote) writes through the handle that it is given.**
//!   The instance is not the primary yet, and the pool refuses.
//! - **Temporary tables are writes** for SQLite: a read that makes one needs the primary.
//!
//! Read your own writes, with cookies or tokens, works as it is: the response of a request that
//! wrote names what the pool had committed by then.
//!
//! # sea-orm
//!
//! [sea-orm](https://docs.rs/sea-orm) works on such a pool:
//! `SqlxSqliteConnector::from_sqlx_sqlite_pool(pool)`. Its errors hide sqlx's: [`needs_primary`] knows
//! them with this crate's feature `sea-orm`, and without it says no of each.
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
use std::sync::Arc;

use replite::{Db, Durability, NeedsPrimary, Role, RoleState};
use sqlx::SqliteConnection;
use sqlx::error::DatabaseError;
use sqlx::sqlite::{SqliteConnectOptions, SqliteError, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use tokio::sync::watch;

pub use migrate::{MigrationError, migrations};
pub use {replite, sqlx};

/// What a write fails with where `query_only` is on, as sqlx writes SQLite's codes.
const SQLITE_READONLY: &str = "8";

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The database was closed, or replication has stopped, before there was a state to read.
    #[error("the replicated database can't be used")]
    Database(#[from] replite::Error),
    /// The first connection could not be made.
    #[error("a connection to the replicated database can't be made")]
    Connection(#[from] sqlx::Error),
}

/// A pool with sqlx's usual limits. It waits until this instance can be read ([`Db::ready`]).
///
/// # Errors
/// [`Error::Database`] as of [`Db::ready`], [`Error::Connection`] when SQLite does not open the file.
///
/// # Cancel safety
/// Nothing happens but the waiting.
pub async fn pool(db: &Db) -> Result<SqlitePool, Error> {
    pool_with(db, SqlitePoolOptions::new(), connect_options(db)).await
}

/// A pool with limits, time limits and connections as the application wants them: begin with
/// [`connect_options`]. The path, and that no file is made, is not the caller's to change.
///
/// The callbacks `after_connect` and `before_acquire` are this crate's. An application with some of
/// its own builds the pool by itself, and calls [`follow`] in both.
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite_sqlx::Error> {
/// use sqlx::sqlite::SqlitePoolOptions;
///
/// let connect = replite_sqlx::connect_options(&db).statement_cache_capacity(500);
/// let pool = replite_sqlx::pool_with(&db, SqlitePoolOptions::new().max_connections(32), connect).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As of [`pool`].
pub async fn pool_with(
    db: &Db,
    options: SqlitePoolOptions,
    connect: SqliteConnectOptions,
) -> Result<SqlitePool, Error> {
    db.ready().await?;
    let (first, later) = (db.roles(), db.roles());
    let options = options
        .test_before_acquire(false)
        .after_connect(move |conn, _| {
            let roles = first.clone();
            Box::pin(async move { follow(conn, &roles).await })
        })
        .before_acquire(move |conn, _| {
            let roles = later.clone();
            Box::pin(async move { follow(conn, &roles).await.map(|()| true) })
        });
    Ok(options.connect_with(connect.filename(db.path()).create_if_missing(false)).await?)
}

/// How a connection to the database is made: an existing file, `synchronous` as the database's
/// durability needs it, and no checkpoints.
pub fn connect_options(db: &Db) -> SqliteConnectOptions {
    let synchronous = match db.durability() {
        Durability::Unsynced => SqliteSynchronous::Normal,
        _ => SqliteSynchronous::Full,
    };
    settings(SqliteConnectOptions::new().filename(db.path())).synchronous(synchronous)
}

/// What all connections have.
fn settings(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options.create_if_missing(false).pragma("wal_autocheckpoint", "0")
}

/// Makes a connection take writes, or refuse them, as this instance's role is now. It is what the
/// pool does with each connection before the application gets it.
///
/// ```
/// # async fn example(db: replite::Db, mut connection: sqlx::SqliteConnection) -> sqlx::Result<()> {
/// let roles = db.roles(); // does not keep the database open, as a handle would
/// replite_sqlx::follow(&mut connection, &roles).await?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// sqlx's, when the connection is broken.
pub async fn follow(conn: &mut SqliteConnection, roles: &watch::Receiver<RoleState>) -> sqlx::Result<()> {
    let primary = roles.borrow().role == Role::Primary;
    let pragma = match primary {
        true => "PRAGMA query_only = OFF",
        false => "PRAGMA query_only = ON",
    };
    sqlx::raw_sql(pragma).execute(conn).await.map(drop)
}

/// Whether this is the error of a write that only the primary takes: SQLite's "attempt to write a
/// readonly database" (`SQLITE_READONLY`) from [`sqlx::Error`], and [`replite::Error::NotPrimary`].
/// It may be the source of another error, also of a transparent one. With the feature `sea-orm` also
/// that of sea-orm's errors, which have no source.
///
/// ```
/// # async fn example(pool: sqlx::SqlitePool) {
/// let written = sqlx::query("INSERT INTO notes VALUES ('a')").execute(&pool).await;
/// if written.is_err_and(|error| replite_sqlx::needs_primary(&error)) {
///     println!("on the primary, please");
/// }
/// # }
/// ```
///
/// On a file that the process may only read, the primary itself has this error. The layer sends
/// nothing on from there.
pub fn needs_primary(error: &(dyn StdError + 'static)) -> bool {
    NeedsPrimary::of(error).is_some() || is_refused(error)
}

fn is_refused(error: &(dyn StdError + 'static)) -> bool {
    if let Some(inside) = hidden(error) {
        return is_refused(inside);
    }
    // A transparent error leads past sqlx's to what is inside of it.
    let boxed = error.downcast_ref::<Box<dyn DatabaseError>>();
    let code = match (error.downcast_ref(), boxed, error.downcast_ref::<SqliteError>()) {
        (Some(sqlx::Error::Database(error)), ..) | (_, Some(error), _) => error.code(),
        (_, _, Some(error)) => error.code(),
        _ => return error.source().is_some_and(is_refused),
    };
    code.is_some_and(|code| code == SQLITE_READONLY)
}

/// The error inside of one that has it for no source.
fn hidden<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    #[cfg(feature = "sea-orm")]
    {
        use sea_orm::{DbErr, RuntimeErr, TransactionError};
        if let Some(RuntimeErr::SqlxError(inside)) = error.downcast_ref() {
            return Some(&**inside);
        }
        if let Some(TransactionError::Connection(inside) | TransactionError::Transaction(inside)) =
            error.downcast_ref::<TransactionError<DbErr>>()
        {
            return Some(inside);
        }
    }
    error.downcast_ref::<Arc<sqlx::Error>>().map(|inside| &**inside as _)
}
