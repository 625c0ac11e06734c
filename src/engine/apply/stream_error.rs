//! Why a replica's stream ends.

use std::time::Duration;

use crate::engine::history::intake_error::IntakeError;
use crate::error::Error;
use crate::page::PageSize;

/// Why a replica's stream ends. The status shows it, and the replica tries the next stream. No call
/// of an application returns it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// A verification found bad pages: the hello of the next stream says so.
    #[error("a verification failed; the pages are compared")]
    Verified,
    /// A heal waits, because another one ended a short while ago.
    #[error(
        "this node was healed a moment ago, and its state is off the primary's again: the next heal begins \
         {pause:?} after the last; look for what writes to its file, or for a second primary"
    )]
    HealPaused {
        /// The pause between two heals, at present.
        pause: Duration,
    },
    /// No transaction changes the size of pages: the next stream brings a snapshot.
    #[error("the database here has pages of {ours:?}, the primary's of {theirs:?}: a snapshot replaces it")]
    OtherPageSize { ours: PageSize, theirs: PageSize },
    /// The file must be emptied for the snapshot, and others have it open.
    #[error(
        "a snapshot has come that the database here can't take in as it is, and others have that open: \
         it is replaced as soon as all of their connections are closed"
    )]
    OpenElsewhere,
    /// The file that the snapshot was for is not empty any more.
    #[error("somebody wrote to the database here while a snapshot came")]
    WrittenMeanwhile,
    /// The stream of which a heal asks for pages was gone before.
    #[error("the stream that a heal needs has ended")]
    Gone,
    /// The primary, the link or this node failed.
    #[error(transparent)]
    Failed(#[from] Error),
}

impl From<IntakeError> for StreamError {
    fn from(error: IntakeError) -> StreamError {
        StreamError::Failed(error.of_peer("the primary"))
    }
}

impl StreamError {
    pub(in crate::engine) fn garbled(what: impl Into<String>) -> StreamError {
        StreamError::Failed(Error::garbled("the primary", what))
    }
}
