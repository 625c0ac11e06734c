//! Ways to the disk, which is a higher floor's.

use std::fmt;

use crate::error::Result;

/// What puts something on the disk, durably, before it returns. It blocks.
pub(crate) struct ToDisk<T>(Box<dyn Fn(T) -> Result<()> + Send + Sync>);

impl<T> ToDisk<T> {
    pub(crate) fn new(keep: impl Fn(T) -> Result<()> + Send + Sync + 'static) -> ToDisk<T> {
        ToDisk(Box::new(keep))
    }

    /// It is forgotten with the node.
    pub(crate) fn nowhere() -> ToDisk<T> {
        ToDisk::new(|_| Ok(()))
    }

    pub(super) fn keep(&self, value: T) -> Result<()> {
        (self.0)(value)
    }
}

impl<T> fmt::Debug for ToDisk<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToDisk").finish_non_exhaustive()
    }
}
