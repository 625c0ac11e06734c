//! Whether a power cut may have taken commits of this node.
//!
//! `<side>/unsynced` is there from when a primary that does not sync its commits opens the database until it has closed it. It names the boot of the
//! machine: what a process wrote survives its death, and nothing that was not synced survives that of the system.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{self, replace_file};
use crate::report::Condition;

const NAME: &str = "unsynced";
/// A UUID, new with each boot of Linux.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Whether commits may have been lost: the database was not closed, and this is another boot, or nobody knows.
pub(in crate::engine) fn may_be_lost(side: &Path) -> Result<bool> {
    let path = side.join(NAME);
    match files::read(&path) {
        Ok(then) => Ok(then.is_empty() || then != boot_id()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Whether the database was not closed by a primary that does not sync its commits.
pub(in crate::engine) fn was_open(side: &Path) -> bool {
    side.join(NAME).exists()
}

/// From now on commits may be lost. Durable.
pub(in crate::engine) fn begin(side: &Path) -> Result<()> {
    replace_file(side, NAME, &boot_id())
}

/// From now on commits may have been lost on this boot, too.
pub(in crate::engine) fn doubt(side: &Path) {
    let known = files::read(&side.join(NAME)).is_ok_and(|then| then.is_empty());
    if !known && let Err(error) = replace_file(side, NAME, b"") {
        Condition::UnsyncedNotNoted { error: &error }.say();
    }
}

/// Everything is synced.
pub(in crate::engine) fn end(side: &Path) -> Result<()> {
    // Whether the removal is durable does not matter: then no replica has what this node does not.
    files::remove(&side.join(NAME)).map(drop)
}

/// Empty where there is none.
fn boot_id() -> Vec<u8> {
    fs::read(BOOT_ID).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_boot_loses_what_was_not_closed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!may_be_lost(dir.path()).unwrap());
        begin(dir.path()).unwrap();
        assert_eq!(may_be_lost(dir.path()).unwrap(), boot_id().is_empty());
        for other in [&b"another boot"[..], b""] {
            fs::write(dir.path().join(NAME), other).unwrap();
            assert!(may_be_lost(dir.path()).unwrap());
        }
        begin(dir.path()).unwrap();
        doubt(dir.path());
        assert!(may_be_lost(dir.path()).unwrap(), "an fsync failed");
        end(dir.path()).unwrap();
        end(dir.path()).unwrap();
        assert!(!may_be_lost(dir.path()).unwrap());
    }
}
