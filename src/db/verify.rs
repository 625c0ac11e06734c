//! Verification of the whole database, on demand.

use crate::db::Db;
use crate::error::Result;
use crate::status::Verification;

impl Db {
    /// Hashes the whole database at one state, the last one that this node has taken in, and
    /// compares with its [`Position`](crate::Position): whether the disk still has what was
    /// committed. Readers, writers and replication go on meanwhile. The result is also an
    /// [`Event`](crate::Event) and in [`Status::verification`](crate::Status::verification); while
    /// it is a bad one, [`Status::problem`](crate::Status::problem) says so.
    ///
    /// One verification of a database runs at a time: a call during one shares its result, whose
    /// state may be a little older than the call. While it runs, the WAL is not begun anew, and
    /// grows by what is written meanwhile. It uses up to two cores, and a mebibyte or two of
    /// memory; with [`Config::verify_limit`](crate::Config::verify_limit) one core, and less of the
    /// disk.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let db = replite::Db::open(replite::Config::new(dir.path().join("app.db"))).await?;
    /// let verification = db.verify().await?;
    /// assert!(verification.holds(), "bad pages: {:?}", verification.bad_pages);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::NoState`](crate::Error::NoState) on a replica that has not been filled yet,
    /// [`Error::Timeout`](crate::Error::Timeout) when readers hold all of SQLite's read marks for
    /// ten seconds, [`Error::Io`](crate::Error::Io) and [`Error::Sqlite`](crate::Error::Sqlite)
    /// when the files can't be read, [`Error::ThreadPanicked`](crate::Error::ThreadPanicked),
    /// [`Error::Stopped`](crate::Error::Stopped) and [`Error::ShutDown`](crate::Error::ShutDown),
    /// at once, when the node stops. That the pages are not those of the position is no error, but
    /// what the [`Verification`] says.
    ///
    /// # Cancel safety
    /// Dropped, the verification goes on to its end.
    pub async fn verify(&self) -> Result<Verification> {
        self.inner.readable()?;
        self.inner.verifier.verify().await
    }
}
