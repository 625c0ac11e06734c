//! A copy of the database as a plain file.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::{fs, io};

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags, ffi};
use tokio::io::{AsyncRead, ReadBuf};
use uuid::Uuid;

use crate::db::Db;
use crate::error::{Error, Result};
use crate::files::{self, Paths};
use crate::node::open_files;
use crate::sqlite::connect_alone;
use crate::threads::blocking;
use crate::txid::Position;

/// What the names of temporary copies begin with.
const TEMPORARY: &str = "snapshot-";

impl Db {
    /// Copies a committed state into a new plain SQLite file, while everything goes on. The state
    /// has the transaction of the position that is returned, and may have later ones. The file
    /// appears at `path` only when it is complete and on the disk, and replaces nothing. No user
    /// can read it who can't read the database.
    ///
    /// # Errors
    /// - Those of [`Db::read_async`].
    /// - [`Error::NoState`] also while no primary vouches for what is here.
    /// - [`Error::FileExists`] when something of that name is there.
    /// - [`Error::Io`] when the file can't be written.
    /// - [`Error::Config`] when `path` belongs to a database that is open as a node in this
    ///   process.
    /// - [`Error::Config`] also when a `-wal` or `-journal` of an earlier file is beside `path`.
    ///
    /// # Cancel safety
    /// Dropped, the copy still runs to its end.
    pub async fn snapshot_to(&self, path: impl AsRef<Path>) -> Result<Position> {
        let (db, path) = (self.clone(), path.as_ref().to_path_buf());
        blocking(move || db.place_snapshot(&path)).await
    }

    /// Copies a committed state and gives it to be read, such as for a download: a whole plain
    /// SQLite file. The copy is made in a temporary file beside the database, which needs as much
    /// room. It is gone when the [`Snapshot`] is dropped.
    ///
    /// ```
    /// # async fn example(db: replite::Db) -> Result<axum::body::Body, replite::Error> {
    /// let snapshot = db.snapshot().await?;
    /// let headers = [("content-length", snapshot.len().to_string())];
    /// let body = axum::body::Body::from_stream(tokio_util::io::ReaderStream::new(snapshot));
    /// # drop(headers);
    /// # Ok(body)
    /// # }
    /// ```
    ///
    /// # Errors
    /// - Those of [`Db::read_async`].
    /// - [`Error::NoState`] also while no primary vouches for what is here.
    /// - [`Error::Io`] when the copy can't be written.
    ///
    /// # Cancel safety
    /// Dropped, the copy still runs to its end, and is removed.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        let db = self.clone();
        blocking(move || db.take_snapshot()).await
    }

    fn vouched(&self) -> Result<Position> {
        let none = || Error::NoState("no primary is known to vouch for the state that is here".into());
        self.position().ok_or_else(none)
    }

    fn take_snapshot(&self) -> Result<Snapshot> {
        self.inner.readable()?;
        self.inner.expect_files()?;
        let position = self.vouched()?;
        let path = self.inner.paths.state_dir().join(format!("{TEMPORARY}{}", Uuid::new_v4()));
        let temporary = Temporary(path.clone());
        // SQLite writes into what is there.
        drop(files::create(&path)?);
        self.copy(&path)?;
        let file = files::open(&path).map_err(Error::io("open", &path))?;
        let bytes = file.metadata().map_err(Error::io("stat", &path))?.len();
        Ok(Snapshot {
            file: tokio::fs::File::from_std(file.into_file()),
            position,
            bytes,
            _temporary: temporary,
        })
    }

    fn place_snapshot(&self, path: &Path) -> Result<Position> {
        self.inner.readable()?;
        self.inner.expect_files()?;
        let path = plain(path)?;
        check(&path)?;
        let position = self.vouched()?;
        let new = files::beside(&path, &format!(".new-{}", Uuid::new_v4()));
        let made = files::create_like(&new, self.inner.paths.database()).map(drop);
        let placed = made.and_then(|()| self.copy(&new)).and_then(|()| {
            // Meanwhile somebody may have opened a database there.
            check(&path)?;
            files::place(&new, &path)?;
            files::sync_name(&path)
        });
        if placed.is_err() {
            // The error that is returned says more than this one could.
            let _ = fs::remove_file(&new);
        }
        placed.map(|()| position)
    }

    fn copy(&self, new: &Path) -> Result<()> {
        self.read(|conn| {
            let mut target = connect_alone(new, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
            copy_whole(conn, &mut target)?;
            // A plain file of its own, without a WAL beside it.
            target.pragma_update(None, "journal_mode", "DELETE")?;
            target.close().map_err(|(_, e)| Error::from(e))
        })?;
        fs::File::open(new).and_then(|f| f.sync_all()).map_err(Error::io("fsync", new))
    }
}

/// A copy of the database that is read; see [`Db::snapshot`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::Db;
/// use tokio::io::AsyncReadExt;
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let mut snapshot = db.snapshot().await?;
/// let mut copy = Vec::new();
/// snapshot.read_to_end(&mut copy).await.expect("the temporary file can be read");
/// assert_eq!(copy.len() as u64, snapshot.len());
/// assert!(copy.starts_with(b"SQLite format 3\0"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Snapshot {
    // Before the file's name: some systems remove no file that is open.
    file: tokio::fs::File,
    position: Position,
    bytes: u64,
    _temporary: Temporary,
}

impl Snapshot {
    /// A position that is in the copy; later transactions may be, too.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The copy's length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a database has at least one page")]
    pub fn len(&self) -> u64 {
        self.bytes
    }
}

impl AsyncRead for Snapshot {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.file).poll_read(cx, into)
    }
}

/// A file that goes with this.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // What can't be removed now is removed when the database is next opened.
        let _ = fs::remove_file(&self.0);
    }
}

/// Removes the copies that a killed process left.
pub(super) fn clear(paths: &Paths) {
    let Ok(entries) = fs::read_dir(paths.state_dir()) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            drop(Temporary(entry.path()));
        }
    }
}

/// The path without symbolic links in its directory.
fn plain(path: &Path) -> Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::Config(format!("a snapshot needs a file name, not {}", path.display())))?;
    let directory = files::parent_of(path);
    Ok(fs::canonicalize(directory).map_err(Error::io("open directory", directory))?.join(name))
}

/// Refuses what must not be replaced, and where SQLite would find another file's changes.
fn check(path: &Path) -> Result<()> {
    if open_files::belongs_to_open(path)? {
        return Err(Error::Config(format!("{} belongs to a database that is open here", path.display())));
    }
    files::absent(path)?;
    let paths = Paths::new(path);
    for left in [paths.wal(), paths.journal()] {
        if left.symlink_metadata().is_ok() {
            return Err(Error::Config(format!(
                "{} is of an earlier file, and SQLite would take it for changes to the snapshot",
                left.display()
            )));
        }
    }
    Ok(())
}

/// Copies a whole database in one step: all of it is of one state. Busy is an error here, not a
/// pause.
fn copy_whole(from: &Connection, to: &mut Connection) -> Result<()> {
    match Backup::new(from, to)?.step(-1)? {
        StepResult::Done => Ok(()),
        StepResult::Busy => Err(not_copied(ffi::SQLITE_BUSY)),
        StepResult::Locked => Err(not_copied(ffi::SQLITE_LOCKED)),
        other => Err(Error::Internal(format!("a copy in one step ended with {other:?}"))),
    }
}

/// Another connection was in the way of a copy.
fn not_copied(code: i32) -> Error {
    let text = "the database could not be copied".to_string();
    Error::Sqlite(rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(text)))
}
