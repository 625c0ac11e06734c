//! A register in this process.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::lease::record::RECORD_MAX_BYTES;
use crate::lease::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::random;

/// A register in the memory of this process, for tests. Clones are handles to the same one.
///
/// ```
/// use replite::lease::Store;
/// use replite::testing::lease::Memory;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let register = Memory::new();
/// let version = register.swap(None, b"a record").await?;
/// assert_eq!(register.stored().map(|stored| stored.version), Some(version));
/// // An operator deletes it.
/// register.remove();
/// assert!(register.read().await?.is_none());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Memory {
    content: Arc<watch::Sender<Content>>,
    /// In each version: two registers have none in common.
    name: u64,
    lease_time: Duration,
}

#[derive(Debug, Default)]
struct Content {
    stored: Option<Stored>,
    /// Versions that were given.
    versions: u64,
}

impl Default for Memory {
    fn default() -> Memory {
        Memory::new()
    }
}

impl Memory {
    /// An empty register, with a lease time of one second.
    pub fn new() -> Memory {
        Memory {
            content: Arc::new(watch::Sender::new(Content::default())),
            // A system without random numbers runs no node.
            name: random::array().map_or(0, u64::from_le_bytes),
            lease_time: Duration::from_secs(1),
        }
    }

    /// With another lease time, in this handle and its clones.
    #[must_use]
    pub fn with_lease_time(mut self, time: Duration) -> Memory {
        self.lease_time = time;
        self
    }

    /// What it holds.
    pub fn stored(&self) -> Option<Stored> {
        self.content.borrow().stored.clone()
    }

    /// Writes a record over any other, as an operator does with the store's own tools.
    pub fn put(&self, record: impl Into<Vec<u8>>) -> Version {
        let mut version = Version::new("");
        self.content.send_modify(|content| version = self.write(content, record.into()));
        version
    }

    /// Removes the record, as an operator does.
    pub fn remove(&self) {
        self.content.send_modify(|content| content.stored = None);
    }

    fn write(&self, content: &mut Content, record: Vec<u8>) -> Version {
        content.versions += 1;
        let version = Version::new(format!("{:016x}-{}", self.name, content.versions));
        content.stored = Some(Stored::new(record, version.clone()));
        version
    }
}

impl Store for Memory {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(async { Ok(self.stored()) })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            if record.len() > RECORD_MAX_BYTES {
                return Err(SwapError::Unavailable("the record is too long".into()));
            }
            let mut swapped = Err(SwapError::Conflict);
            self.content.send_if_modified(|content| {
                if content.stored.as_ref().map(|stored| &stored.version) == expected {
                    swapped = Ok(self.write(content, record.to_vec()));
                }
                swapped.is_ok()
            });
            swapped
        })
    }

    fn changed(&self) -> StoreFuture<'_, ()> {
        let mut changes = self.content.subscribe();
        Box::pin(async move {
            // The sender is this handle's.
            let _ = changes.changed().await;
        })
    }

    fn lease_time(&self) -> Duration {
        self.lease_time
    }
}
