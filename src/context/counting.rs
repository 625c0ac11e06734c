//! Whether the position names all that a read here may have seen.
//!
//! Readers see a commit as soon as it is in the wal-index. The position has it a moment later: on a
//! primary when capture has it, for which that may wait for the disk.

use std::fmt;
use std::pin::Pin;
use std::sync::OnceLock;

/// Ends with true when the position has what was not counted yet, and with false when it never
/// will: replication has stopped, or the lease has ended.
pub(crate) type Counting = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Asks the engine, which is a higher floor's.
#[derive(Default)]
pub(super) struct AskCounting(OnceLock<Box<dyn Fn() -> Option<Counting> + Send + Sync>>);

impl AskCounting {
    pub(super) fn set(&self, ask: impl Fn() -> Option<Counting> + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(ask));
    }

    pub(super) fn ask(&self) -> Option<Counting> {
        self.0.get().and_then(|ask| ask())
    }
}

impl fmt::Debug for AskCounting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AskCounting").finish_non_exhaustive()
    }
}
