//! The register as a directory in which files are only ever created.

mod entry;
mod names;
mod register;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use self::register::{Glance, NumberedFiles};
use super::store::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::error::Error;
use crate::threads::blocking;

/// How often [`Store::changed`] looks at the directory.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A lease for several processes of one host: a directory on a local file system. All of them name
/// the same one, and no other database uses it.
///
/// Each record is a file with the next number, such as `lease-00000000000000000042`. The one with
/// the highest number counts. After its first line, which is the store's own, it is JSON that an
/// operator can read. Some older ones stay beside it. The directory is made where there is none,
/// but not the one above it. Other files in it are left alone.
///
/// Only the user of the processes can read the files. A directory that others can write to is
/// refused.
///
/// The file system must have hard links. That of a network does not do. Its clients may see each
/// other's files late, and processes of several hosts would have several primaries.
///
/// ```
/// use std::sync::Arc;
///
/// use replite::lease::{Directory, Store};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # let data = tempfile::tempdir()?;
/// # runtime.block_on(async {
/// let store: Arc<dyn Store> = Arc::new(Directory::new(data.path().join("lease")));
/// assert!(store.read().await?.is_none());
/// let first = store.swap(None, b"a record").await?;
/// let second = store.swap(Some(&first), b"the next one").await?;
/// // The first is not there any more: nothing takes its place.
/// assert!(store.swap(Some(&first), b"another").await.is_err());
/// assert_eq!(store.read().await?.map(|stored| stored.version), Some(second));
/// # Ok(())
/// # })
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Directory {
    register: Arc<NumberedFiles>,
}

impl Directory {
    /// The store in this directory. Nothing is looked at yet. A relative path is taken from where
    /// the process is now.
    pub fn new(directory: impl Into<PathBuf>) -> Directory {
        let path = directory.into();
        let path = std::path::absolute(&path).unwrap_or(path);
        Directory { register: Arc::new(NumberedFiles::new(path)) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.register.path()
    }

    async fn glance(&self, last: Option<Glance>) -> Option<Glance> {
        let register = self.register.clone();
        // None where the runtime ends.
        blocking(move || Ok(register.glance(last))).await.ok()
    }
}

impl Store for Directory {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        let register = self.register.clone();
        Box::pin(async move {
            let read = blocking(move || Ok(register.current())).await;
            let current = read.map_err(|error| ReadError::new(error.to_string()))?.map_err(ReadError::new)?;
            Ok(current.map(|entry| Stored::new(entry.record, entry.version)))
        })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        let (register, expected, record) = (self.register.clone(), expected.cloned(), record.to_vec());
        Box::pin(async move {
            // It goes on where this future is dropped.
            let swapped = blocking(move || Ok(register.swap(expected.as_ref(), &record))).await;
            swapped.map_err(|error: Error| SwapError::Unknown(error.to_string()))?
        })
    }

    /// Looks at the directory's time ten times a second, and at the files only when that has
    /// changed.
    fn changed(&self) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let Some(first) = self.glance(None).await else { return std::future::pending().await };
            let mut last = first.clone();
            while last.highest == first.highest {
                tokio::time::sleep(LOOK_EVERY).await;
                match self.glance(Some(last)).await {
                    Some(glance) => last = glance,
                    None => return std::future::pending().await,
                }
            }
        })
    }

    /// Two seconds.
    fn lease_time(&self) -> Duration {
        Duration::from_secs(2)
    }
}

#[cfg(test)]
mod tests;
