//! Verification of the whole database, on demand.

use crate::checksum::Checksum;
use crate::db::Db;
use crate::error::Result;
use crate::page::PageSize;
use crate::status::Verification;

impl Db {
    /// Hashes the whole database at the last state that this node has taken in, and compares it
    /// with the [`Position`](crate::Position). That tells whether the disk still has what was
    /// committed. Readers, writers and replication go on meanwhile. The result is also an
    /// [`Event`](crate::Event) and in [`Status::verification`](crate::Status::verification). While
    /// it is a bad one, [`Status::problem`](crate::Status::problem) says so.
    ///
    /// One verification of a database runs at a time. A call during one shares its result, whose
    /// state may be a little older than the call. While it runs, the node does not begin the WAL
    /// anew, which grows by what is written meanwhile. A verification uses up to two cores, and a
    /// mebibyte or two of memory. With [`Config::verify_limit`](crate::Config::verify_limit) it
    /// uses one core, and less of the disk.
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
    /// - [`Error::NoState`](crate::Error::NoState) on a replica that has not been filled yet.
    /// - [`Error::Timeout`](crate::Error::Timeout) when readers hold all of SQLite's read marks for
    ///   ten seconds.
    /// - [`Error::Io`](crate::Error::Io) and [`Error::Sqlite`](crate::Error::Sqlite) when the files
    ///   can't be read.
    /// - [`Error::ThreadPanicked`](crate::Error::ThreadPanicked) when a thread of the verification
    ///   panics.
    /// - [`Error::Stopped`](crate::Error::Stopped) and [`Error::ShutDown`](crate::Error::ShutDown),
    ///   at once, when the node stops.
    ///
    /// Pages that are not those of the position are no error: the [`Verification`] says so.
    ///
    /// # Cancel safety
    /// Dropped, the verification goes on to its end.
    pub async fn verify(&self) -> Result<Verification> {
        self.inner.readable()?;
        self.inner.verifier.verify().await
    }

    /// The checksum that this database would have with these bytes, such as a file without a WAL
    /// has them: that of its [`Position`](crate::Position) if they are its pages. The lock page
    /// counts for nothing, and neither does a rest that is no whole page. It needs the database's
    /// own key, so what another database says of the same bytes is another number. Blocks for as
    /// long as the bytes take to hash.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let db = replite::Db::open(replite::Config::new(dir.path().join("app.db"))).await?;
    /// use replite::{Checksum, PageSize};
    ///
    /// let checksum = db.checksum_of(&[0; 8192], PageSize::new(4096)?);
    /// assert_ne!(checksum, Checksum::EMPTY);
    /// # Ok(())
    /// # }
    /// ```
    pub fn checksum_of(&self, bytes: &[u8], page_size: PageSize) -> Checksum {
        self.inner.node.database_keys.get().page.sum(bytes, page_size)
    }
}
