//! Whether a power cut may have taken commits of this node.
//!
//! A primary that does not sync its commits makes `<state directory>/unsynced` when it opens the
//! database, and removes it when it has closed it. The file names the boot of the machine. What a
//! process wrote survives its death. Nothing that was not synced survives the death of the system.

use std::fs;

use crate::error::{Error, Result};
use crate::files::{self, Paths, replace_file};
use crate::report::Condition;

/// A UUID, new with each boot of Linux.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The most bytes of the file that the node reads. It is more than a boot's id has, so a longer
/// file is none.
const MAX_BYTES: u64 = 64;

/// Whether commits may have been lost: no primary closed the database, and this is another boot, or
/// none that is known.
pub(in crate::engine) fn may_be_lost(paths: &Paths) -> Result<bool> {
    let path = paths.unsynced();
    match files::read(&path, MAX_BYTES) {
        Ok(then) => Ok(then.is_empty() || then != boot_id()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Whether a primary that does not sync its commits left the database without closing it.
pub(in crate::engine) fn was_open(paths: &Paths) -> bool {
    paths.unsynced().exists()
}

/// From now on commits may be lost. Durable.
pub(in crate::engine) fn begin(paths: &Paths) -> Result<()> {
    replace_file(&paths.unsynced(), &boot_id())
}

/// From now on commits may have been lost on this boot, too.
pub(in crate::engine) fn doubt(paths: &Paths) {
    let known = files::read(&paths.unsynced(), MAX_BYTES).is_ok_and(|then| then.is_empty());
    if !known && let Err(error) = replace_file(&paths.unsynced(), b"") {
        Condition::UnsyncedNotNoted { error: &error }.say();
    }
}

/// Everything is synced.
pub(in crate::engine) fn end(paths: &Paths) -> Result<()> {
    // Whether the removal is durable does not matter: then no replica has what this node does not.
    files::remove(&paths.unsynced()).map(drop)
}

/// Empty where there is none.
fn boot_id() -> Vec<u8> {
    fs::read(BOOT_ID).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_the_boots_id_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        begin(&paths).unwrap();
        assert_eq!(fs::read(paths.unsynced()).unwrap(), fs::read(BOOT_ID).unwrap_or_default());
        assert!((boot_id().len() as u64) < MAX_BYTES);
        fs::write(paths.unsynced(), [boot_id(), vec![b'x'; 100]].concat()).unwrap();
        assert!(may_be_lost(&paths).unwrap(), "more than a boot's id");
        doubt(&paths);
        assert_eq!(fs::read(paths.unsynced()).unwrap(), b"");
    }

    #[test]
    fn only_another_boot_loses_what_was_not_closed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        assert!(!may_be_lost(&paths).unwrap());
        begin(&paths).unwrap();
        assert_eq!(may_be_lost(&paths).unwrap(), boot_id().is_empty());
        for other in [&b"another boot"[..], b""] {
            fs::write(paths.unsynced(), other).unwrap();
            assert!(may_be_lost(&paths).unwrap());
        }
        begin(&paths).unwrap();
        doubt(&paths);
        assert!(may_be_lost(&paths).unwrap(), "an fsync failed");
        end(&paths).unwrap();
        end(&paths).unwrap();
        assert!(!may_be_lost(&paths).unwrap());
    }
}
