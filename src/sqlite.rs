//! SQLite as the outside world: dedicated connections, their files, and the shared wal-index.
//!
//! All unsafe code of the crate is in the modules `ffi` and `shm`.

pub(crate) mod ffi;
mod locks;
mod mark;
pub(crate) mod shm;

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::descriptors::{self, Share, used_up};

pub(crate) use ffi::{CommitHook, Handle, Lock, Slot, last_code, unreadable};
pub(crate) use locks::{Alone, FileLocks, close_unlocked, park};
pub(crate) use mark::StandingMark;
pub(crate) use shm::WalIndex;

/// The oldest SQLite without the WAL-reset race.
pub(crate) const OLDEST: (i32, &str) = (3_051_003, "3.51.3");

/// How long SQLite itself waits where connections can be in each other's way.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens a connection to a database of a node. It is defended: see [`defend`].
pub(crate) fn connect(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = connect_alone(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    // Closing it must not copy a WAL back and delete it: its commits are counted from there.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    Ok(connection)
}

/// The same to a database that no node has, and that is to be a plain file when it is closed.
pub(crate) fn connect_alone(path: &Path, flags: OpenFlags) -> rusqlite::Result<Connection> {
    // An application that turns SQLite's shared cache on would have our connections share locks and
    // uncommitted pages.
    let private = OpenFlags::SQLITE_OPEN_PRIVATE_CACHE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags | private)?;
    defend(&connection, true)?;
    Ok(connection)
}

/// Descriptors that a connection takes: of the database and of its WAL.
const FILES: usize = 2;

/// [`connect`], and all of its files are open then. Where there are no descriptors left, they are
/// some of the reserve. SQLite by itself opens the WAL with the first statement that reads.
pub(crate) fn connect_whole(path: &Path, flags: OpenFlags, share: Share) -> rusqlite::Result<Connection> {
    let whole = || {
        let connection = connect(path, flags)?;
        // What the files are locked by is for the caller's own statements to wait for.
        connection.busy_timeout(Duration::ZERO)?;
        let read = connection.query_row("PRAGMA schema_version", [], |_| Ok(()));
        connection.busy_timeout(BUSY_TIMEOUT)?;
        match read {
            Err(error) if is_want(&error) => Err(error),
            // Whatever else there is, these statements find.
            _ => Ok(connection),
        }
    };
    descriptors::open((share, FILES), is_want, whole)
}

/// Whether SQLite may have failed for want of descriptors, of which it says nothing. What it says
/// of locks is true.
fn is_want(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    !matches!(error.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked)) && used_up()
}

/// Whether SQL may do nothing that makes a database's file one that SQLite can't read. The schema
/// may then call only those functions and virtual tables that are marked innocuous. Off is what
/// SQLite does by itself.
pub(crate) fn defend(connection: &Connection, on: bool) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, on)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, !on)?;
    Ok(())
}
