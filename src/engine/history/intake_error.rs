//! Why a record, a page or a sum does not fit. The code that finds it does not know where the data
//! came from.

use std::path::Path;

use crate::error::{Error, PeerProblem};
use crate::log::Log;

/// Why this node can't take in a record, a page or a sum. It blames no one yet: the code that took
/// it in knows where it came from.
#[derive(Debug)]
pub(crate) enum IntakeError {
    /// The data does not have the form that it must have, or comes out of order.
    Garbled(String),
    /// Over the pages that are here the record leads elsewhere than it states.
    Mismatch {
        /// What the record states.
        expected: String,
        /// Where the record leads.
        found: String,
    },
    /// Taking the data in failed, whatever it is.
    Failed(Error),
}

impl From<Error> for IntakeError {
    fn from(error: Error) -> IntakeError {
        IntakeError::Failed(error)
    }
}

impl IntakeError {
    pub(in crate::engine) fn garbled(what: impl Into<String>) -> IntakeError {
        IntakeError::Garbled(what.into())
    }

    pub(in crate::engine) fn mismatch(expected: impl ToString, found: impl ToString) -> IntakeError {
        IntakeError::Mismatch { expected: expected.to_string(), found: found.to_string() }
    }

    /// The data came from another node.
    pub(crate) fn of_peer(self, peer: impl Into<String>) -> Error {
        match self {
            IntakeError::Garbled(what) => Error::garbled(peer, what),
            IntakeError::Mismatch { expected, found } => {
                Error::peer(peer, PeerProblem::Mismatch { expected, found })
            }
            IntakeError::Failed(error) => error,
        }
    }

    /// The data is in the files of this node's database.
    pub(in crate::engine) fn of_files(self, database: &Path) -> Error {
        match self {
            IntakeError::Garbled(what) => Error::Damaged { path: database.to_path_buf(), what },
            IntakeError::Mismatch { expected, found } => Error::Mismatch { expected, found },
            IntakeError::Failed(error) => error,
        }
    }

    /// The data came from an address of this node's own log.
    pub(in crate::engine) fn of_log(self, log: &Log, lsn: u64) -> Error {
        match self {
            IntakeError::Garbled(what) => log.corrupt(lsn, what),
            IntakeError::Mismatch { expected, found } => Error::Mismatch { expected, found },
            IntakeError::Failed(error) => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::Blame;
    use crate::log::LogOptions;

    #[test]
    fn the_same_garbage_is_a_peer_s_fault_or_that_of_the_disk_here() {
        let dir = tempfile::tempdir().unwrap();
        let options = LogOptions {
            page_key: crate::engine::tests::KEY,
            segment_bytes: 1 << 16,
            keep_bytes: 1 << 20,
            keep_age: Duration::MAX,
            quota_bytes: 1 << 20,
            tail_bytes: 0,
        };
        let log = Log::open(dir.path(), options).unwrap();
        let wrong: [fn() -> IntakeError; 2] =
            [|| IntakeError::garbled("no record"), || IntakeError::mismatch("a", "b")];
        for wrong in wrong {
            assert_eq!(wrong().of_peer("the primary").blame(), Blame::Peer);
            assert_eq!(wrong().of_log(&log, 0).blame(), Blame::Disk);
            assert_eq!(wrong().of_files(dir.path()).blame(), Blame::Disk);
        }
        let failed = || IntakeError::from(Error::io("read", "a")(std::io::Error::other("x")));
        for error in [failed().of_peer("p"), failed().of_log(&log, 0), failed().of_files(dir.path())] {
            assert!(matches!(&error, Error::Io { .. }), "{error:?}");
        }
    }
}
