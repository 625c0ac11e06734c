//! The files of segments, and their names.
use std::io;
use std::path::{Path, PathBuf};

use crate::descriptors::NodeFile;
use crate::error::{Error, Result};
use crate::files;
use crate::hex::unhex_u64;
use crate::report::Condition;

/// The file of the segment that begins at an address.
pub(super) fn path(dir: &Path, start: u64) -> PathBuf {
    dir.join(format!("{start:016x}.log"))
}

/// The address in a segment's file name; `None` for other files.
pub(super) fn start_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    unhex_u64(digits).filter(|_| !digits.bytes().any(|b| b.is_ascii_uppercase()))
}

/// Opens a segment to be appended to or cut.
pub(super) fn open_to_write(path: &Path) -> Result<NodeFile> {
    files::open_to_write(path).map_err(Error::io("open", path))
}

/// Removes segments that no reader needs. One that can't be removed now goes when the log is next
/// opened.
pub(super) fn remove(paths: &[PathBuf]) {
    for path in paths {
        if let Err(error) = files::remove(path) {
            Condition::SegmentNotRemoved { path, error: &error }.say();
        }
    }
}

/// Whether records must go to make room: a disk, a quota of the system's, the limit of a file's
/// size, or the log's own quota.
pub(crate) fn no_room(error: &Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    let full = |kind| matches!(kind, StorageFull | QuotaExceeded | FileTooLarge);
    matches!(error, Error::Io { source, .. } if full(source.kind()))
}
