//! Whether the position names all that was committed, by whatever connection.
//!
//! Readers see a commit as soon as it is in the wal-index. The position has it a moment later: on a
//! primary when capture has it, for which that may wait for the disk.

use std::fmt;
use std::pin::Pin;
use std::sync::OnceLock;

use crate::txid::Txid;

/// Ends with true when the position has what was not counted yet, and with false when it never
/// will: replication has stopped, or the term has ended.
pub(crate) type Counting = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Knows what is committed: the engine, which is a higher floor's.
pub(crate) trait Counts: Send + Sync {
    /// See [`NodeContext::counting`](crate::context::NodeContext::counting).
    fn counting(&self) -> Option<Counting>;
    /// See [`NodeContext::last_of_ours`](crate::context::NodeContext::last_of_ours).
    fn last_of_ours(&self) -> Option<Txid>;
}

/// Asks it, once it is there.
#[derive(Default)]
pub(super) struct AskCounting(OnceLock<Box<dyn Counts>>);

impl AskCounting {
    pub(super) fn set(&self, counts: impl Counts + 'static) {
        let _ = self.0.set(Box::new(counts));
    }

    pub(super) fn ask(&self) -> Option<Counting> {
        self.0.get().and_then(|counts| counts.counting())
    }

    pub(super) fn last_of_ours(&self) -> Option<Txid> {
        self.0.get()?.last_of_ours()
    }
}

impl fmt::Debug for AskCounting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AskCounting").finish_non_exhaustive()
    }
}
