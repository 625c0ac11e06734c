//! Modification times that tell whether another process wrote to a file.

use std::fs::{self, File, Metadata};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// When a file was last modified, in nanoseconds since 1970.
pub(crate) fn modified_of(meta: &Metadata, path: &Path) -> Result<i64> {
    let time = meta.modified().map_err(Error::io("stat", path))?;
    Ok(time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64))
}

/// Gives a file a modification time that no later write will give it, and returns it. The kernel
/// takes the time of a write from a clock that may stand still for milliseconds. Some file systems
/// keep whole seconds. So two writes may have the same time.
///
/// Returns `None` where the time can't be set, which only the file's owner may do. No other process
/// may be writing. Works by the file's descriptor where there is one: at the path there may be
/// another file by now.
pub(crate) fn stamp(path: &Path, open: Option<&File>) -> Result<Option<i64>> {
    /// What the coarsest file systems keep.
    const COARSEST_MICROS: i64 = 2_000_000;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64);
    for micros in [now, now - COARSEST_MICROS] {
        if let Err(error) = set_modified(path, open, micros) {
            tracing::debug!(path = %path.display(), %error, "the modification time can't be set");
            return Ok(None);
        }
        let meta =
            open.map_or_else(|| fs::metadata(path), File::metadata).map_err(Error::io("stat", path))?;
        let found = modified_of(&meta, path)?;
        // A rounded time may come again as long as its second lasts. Then the loop sets one that is
        // over.
        if found == micros * 1000 || micros < now {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Sets the time by name, or by a descriptor that stays open: closing one of a database would drop
/// SQLite's locks on it.
#[cfg(unix)]
fn set_modified(path: &Path, open: Option<&File>, micros: i64) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, futimens, utimensat};

    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let (tv_sec, rest) = (micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000));
    let last_modification = Timespec { tv_sec, tv_nsec: (rest * 1000) as _ };
    let times = Timestamps { last_access, last_modification };
    match open {
        Some(file) => Ok(futimens(file, &times)?),
        None => Ok(utimensat(CWD, path, &times, AtFlags::empty())?),
    }
}

#[cfg(not(unix))]
fn set_modified(path: &Path, _: Option<&File>, micros: i64) -> std::io::Result<()> {
    let time = UNIX_EPOCH + std::time::Duration::from_micros(micros.max(0) as u64);
    fs::OpenOptions::new().write(true).open(path)?.set_modified(time)
}
