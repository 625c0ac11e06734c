//! The register that a lease's record is kept in.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

/// What the methods of a [`Store`] return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A register for the record of one database's lease: bytes that are replaced only over the version
/// that was read. Nothing else is asked of it: no clock, no time to live, no lock, no thread. A key
/// of etcd with its revision is one, an object with `If-Match`, a directory in which files are only
/// ever created.
///
/// The contract, which `replite::testing::lease::conformance` checks:
///
/// 1. All handles to one register see one sequence of records. A swap that was done took the place
///    of the very record that `expected` names: no two swaps succeed over one version.
/// 2. A version is never used again, whatever happens to the register. A record that is written
///    again byte for byte has another version.
/// 3. A read returns a record that is, or was, the register's. It may be an old one.
/// 4. [`SwapError::Conflict`] and [`SwapError::Unavailable`] say that the swap was not done and
///    never will be. Where that can't be proved, the answer is [`SwapError::Unknown`]: it may have
///    been done, and it may still be done at any later time.
/// 5. A future that is dropped leaves a swap as [`SwapError::Unknown`] does.
/// 6. A record that was written is on the disk of whatever keeps it, before the swap is done.
///
/// Records have up to 16 KiB. The node bounds the time that each call takes; a store needs no
/// timeouts of its own. All calls of a node are made on a runtime of its own, with time and IO
/// enabled, which no code of the application runs on. An [`Operator`](crate::operator::Operator)
/// calls it on its caller's.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The record; none where there has never been one.
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>>;

    /// Replaces the record of this version, or writes the first one where there is none. Returns
    /// the new version.
    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>>;

    /// A hint: returns when the record has changed since the call, or may have. It may never
    /// return.
    fn changed(&self) -> StoreFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// How long a record counts without a renewal, where [`Config::lease_time`] does not say it.
    /// From one second to a minute; the slower the store, the longer.
    ///
    /// [`Config::lease_time`]: crate::Config::lease_time
    fn lease_time(&self) -> Duration;
}

/// A record and the version that a swap has to name to replace it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Stored {
    /// The bytes that were written.
    pub record: Vec<u8>,
    /// Which record of the register it is.
    pub version: Version,
}

impl Stored {
    /// A record of this version.
    pub fn new(record: Vec<u8>, version: Version) -> Stored {
        Stored { record, version }
    }
}

/// Names one record of a register, in the store's own words: a revision, an ETag, the number of a
/// file.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Version(String);

impl Version {
    /// A version from the store's text for it.
    pub fn new(text: impl Into<String>) -> Version {
        Version(text.into())
    }

    /// The store's text for it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The register could not be read. Whether there is a record is not known.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ReadError(String);

impl ReadError {
    /// Says what is wrong, in words for an operator.
    pub fn new(problem: impl Into<String>) -> ReadError {
        ReadError(problem.into())
    }
}

/// Why a swap was not done, or may not have been.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SwapError {
    /// The register has another record than the expected one. Nothing was written.
    #[error("another record is there")]
    Conflict,
    /// The store can't be reached, or refuses. Nothing was written, nor will be.
    #[error("{0}")]
    Unavailable(String),
    /// It may have been written, or may be at any later time.
    #[error("it is not known whether the record was written: {0}")]
    Unknown(String),
}
