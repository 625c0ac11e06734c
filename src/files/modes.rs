//! The modes and owners of what is made here: those of the database.

#[cfg(unix)]
use std::fs;
use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};
#[cfg(unix)]
use crate::files::paths::database_of;

/// A database that is not there yet, and that nothing was said of.
pub(crate) const PRIVATE: u32 = 0o600;

/// Files that are for their owner alone, whatever the database's mode is.
#[cfg(unix)]
const SECRET: [&str; 2] = ["channel-key", "database-keys"];

/// Takes from a file of ours what others may do with it and not with the database.
pub(super) fn limit(file: &File, path: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let now = file.metadata().map_err(Error::io("stat", path))?.mode() & 0o777;
        set_mode(file, path, now & database_mode(path))?;
    }
    #[cfg(not(unix))]
    let _ = (file, path);
    Ok(())
}

/// Gives a file this mode, whatever the process's mask.
pub(crate) fn set_mode(file: &File, path: &Path, mode: u32) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let now = file.metadata().map_err(Error::io("stat", path))?.mode();
        if now & 0o777 != mode {
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(Error::io("chmod", path))?;
        }
    }
    #[cfg(not(unix))]
    let _ = (file, path, mode);
    Ok(())
}

#[cfg(unix)]
pub(super) fn database_mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    if is_secret(path) {
        return PRIVATE;
    }
    let database = database_of(path).and_then(|database| fs::metadata(database).ok());
    // Its owner, who may be us, writes to them.
    database.map_or(PRIVATE, |meta| meta.mode() & 0o666 | PRIVATE)
}

/// Whether a file, also one that is to take its place, has more in it than who reads the database
/// may know.
#[cfg(unix)]
fn is_secret(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    SECRET.iter().any(|secret| name.starts_with(secret))
}

#[cfg(unix)]
pub(super) fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Gives what was just made its mode, and the database's owner where we may. A node that runs as
/// another user later must be able to open it.
#[cfg(unix)]
pub(super) fn give(file: &File, path: &Path, mode: Option<u32>) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    if let Some(mode) = mode {
        set_mode(file, path, mode)?;
    }
    let database = database_of(path).and_then(|database| fs::metadata(database).ok());
    if let Some(database) = database.filter(|_| own_user() == 0) {
        let (user, group) = (database.uid(), database.gid());
        let now = file.metadata().map_err(Error::io("stat", path))?;
        if (now.uid(), now.gid()) != (user, group) {
            std::os::unix::fs::fchown(file, Some(user), Some(group)).map_err(Error::io("chown", path))?;
        }
    }
    Ok(())
}
