//! What a file is, whatever its name.

use std::fs::{self, Metadata};
use std::path::Path;

/// Device and inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Inode {
    pub(crate) device: u64,
    pub(crate) number: u64,
}

impl Inode {
    /// `None` where the system has no such thing.
    #[cfg(unix)]
    pub(crate) fn of(meta: &Metadata) -> Option<Inode> {
        use std::os::unix::fs::MetadataExt;
        Some(Inode { device: meta.dev(), number: meta.ino() })
    }

    /// `None` where the system has no such thing.
    #[cfg(not(unix))]
    pub(crate) fn of(_: &Metadata) -> Option<Inode> {
        None
    }

    /// The one of a file that is there, links followed.
    pub(crate) fn at(path: &Path) -> Option<Inode> {
        Inode::of(&fs::metadata(path).ok()?)
    }
}
