//! The steps that change the files. In a test one of them can be the last, as in a crash.

use std::path::Path;

use crate::error::Result;
use crate::files;
use crate::files::sealed::Sealed;

/// Replaces a file, durably.
pub(super) fn replace(kind: &Sealed, path: &Path, fields: &[u8]) -> Result<()> {
    step()?;
    kind.replace(path, fields)
}

/// Removes a file.
pub(super) fn remove(path: &Path) -> Result<()> {
    step()?;
    files::remove(path).map(drop)
}

/// Makes names of a directory durable.
pub(super) fn sync(directory: &Path) -> Result<()> {
    step()?;
    files::sync_directory(directory)
}

#[cfg(not(test))]
fn step() -> Result<()> {
    Ok(())
}

#[cfg(test)]
use testing::step;

#[cfg(test)]
pub(super) mod testing {
    use std::cell::Cell;

    use crate::error::{Error, Result};

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Makes a call that ends after so many steps. Whether it came to its end.
    pub(in crate::members::storage) fn after(steps: usize, call: impl FnOnce() -> Result<()>) -> bool {
        LEFT.set(Some(steps));
        let done = call();
        LEFT.set(None);
        done.is_ok()
    }

    pub(super) fn step() -> Result<()> {
        match LEFT.get() {
            Some(0) => Err(Error::Internal("a crash, in a test".into())),
            left => {
                LEFT.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }
}
