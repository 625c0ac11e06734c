//! The state directory of a database, `<database>-replite`. The node makes it for its owner alone,
//! and refuses one that others could have prepared.

use std::fs;
#[cfg(unix)]
use std::fs::OpenOptions;
use std::io;
use std::path::Path;

#[cfg(unix)]
use crate::descriptors::{NodeFile, open_file};
use crate::error::{Error, Result, Unsupported};
#[cfg(unix)]
use crate::files::modes::{give, own_user, set_mode};
#[cfg(unix)]
use crate::files::of_link;
use crate::files::paths::SUFFIX;
#[cfg(unix)]
use crate::files::paths::database_of;
use crate::files::{parent_of, sync_name};

/// Makes the state directory, for its owner alone. Tightens one that is there and that others can
/// read.
///
/// # Errors
/// [`Error::Unsupported`] when one is there that others could have prepared, or can change. Nothing
/// is changed then. [`Error::Io`].
pub(crate) fn make_state_dir(state_dir: &Path) -> Result<()> {
    if new_directory(state_dir)? { Ok(()) } else { check(state_dir, true) }
}

/// Makes a directory that the application named, for its owner alone. One that is there stays as it
/// is. The one above it must be there.
///
/// # Errors
/// As for [`check_directory`].
pub(crate) fn make_named_directory(path: &Path) -> Result<()> {
    if new_directory(path)? { Ok(()) } else { check_directory(path) }
}

/// Makes the directories above a database file that are missing, for their owner alone, and leaves
/// those that are there as they are.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn make_above(path: &Path) -> Result<()> {
    let above = parent_of(path);
    if fs::metadata(above).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        make_above(above)?;
        new_directory(above)?;
        sync_name(above)?;
    }
    Ok(())
}

/// Refuses a directory that others could have prepared, or can change.
///
/// # Errors
/// [`Error::Unsupported`] then. [`Error::Io`].
pub(crate) fn check_directory(path: &Path) -> Result<()> {
    check(path, false)
}

fn check(path: &Path, tighten: bool) -> Result<()> {
    let refused = |what| {
        let reason = Unsupported::StateDirectory(what);
        Err(Error::Unsupported { path: path.to_path_buf(), reason })
    };
    let meta = fs::symlink_metadata(path).map_err(Error::io("stat", path))?;
    if meta.is_symlink() {
        return refused("it is a symbolic link: put the directory itself there");
    }
    if !meta.is_dir() {
        return refused("it is no directory: move it away");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // By a descriptor: what is looked at is what is changed.
        let directory = open_directory(path)?;
        let meta = directory.metadata().map_err(Error::io("stat", path))?;
        let owner = database_of(path).and_then(|database| fs::metadata(database).ok()).map(|meta| meta.uid());
        if meta.uid() != own_user() && owner != Some(meta.uid()) {
            return refused(
                "it belongs neither to this process's user nor to the database's owner: look at what is in \
                 it, then `chown` it or move it away",
            );
        }
        let others = meta.mode() & 0o022;
        if others != 0 && !(others == 0o020 && group_owns_all(path, meta.gid())) {
            return refused(
                "others may write to it: look at what is in it, then `chmod 700` it or move it away",
            );
        }
        if tighten {
            set_mode(&directory, path, 0o700)?;
        }
    }
    #[cfg(not(unix))]
    let _ = tighten;
    Ok(())
}

/// Makes a directory below that one, for its owner alone.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent().filter(|parent| below(parent)) {
        make_directory(parent)?;
    }
    if !new_directory(path)? {
        #[cfg(unix)]
        set_mode(&*open_directory(path)?, path, 0o700)?;
    }
    Ok(())
}

/// Whether a directory is below a database's, and not that itself.
fn below(path: &Path) -> bool {
    let ours = |path: &Path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().ends_with(SUFFIX.as_bytes()))
    };
    !ours(path) && path.ancestors().any(ours)
}

/// False: there is something of this name.
fn new_directory(path: &Path) -> Result<bool> {
    #[cfg_attr(not(unix), expect(unused_mut, reason = "it has no mode there"))]
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    match builder.create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
        made => made.map_err(Error::io("create", path))?,
    }
    #[cfg(unix)]
    give(&*open_directory(path)?, path, None)?;
    Ok(true)
}

/// Whether the directory that the database is in is open to the same group. That group can put
/// another database there, and has nothing to gain. Orchestrators open a whole volume to a group of
/// its own, again at each start.
#[cfg(unix)]
fn group_owns_all(state_dir: &Path, group: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    const STICKY: u32 = 0o1000;
    fs::metadata(parent_of(state_dir))
        .is_ok_and(|meta| meta.gid() == group && meta.mode() & (STICKY | 0o022) == 0o020)
}

#[cfg(unix)]
fn open_directory(path: &Path) -> Result<NodeFile> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags.bits() as i32);
    open_file(|| options.open(path)).map_err(of_link).map_err(Error::io("open directory", path))
}
