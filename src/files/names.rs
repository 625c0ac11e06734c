//! Names of files: made durable, and given where nothing has them.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::descriptors::{self, open_file};
use crate::error::{Error, Result};

/// The directory that a path's name is in.
pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes created, renamed and removed names of a directory durable.
///
/// # Errors
/// [`Error::Io`]. One whose `op` is "open" says nothing of what is on the disk: there was no
/// descriptor to ask with.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    // Elsewhere a directory can't be opened as a file, and its entries are durable with their
    // files.
    if cfg!(unix) {
        let directory = open_file(|| File::open(path)).map_err(Error::io("open", path))?;
        directory.sync_all().map_err(Error::io("fsync", path))?;
    }
    Ok(())
}

/// The names in a directory that are text; `None` when it is not there.
///
/// # Errors
/// [`Error::Io`].
#[cfg(feature = "members")]
pub(crate) fn list(path: &Path) -> Result<Option<Vec<String>>> {
    let entries = match descriptors::list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(Error::io("list", path))?,
    };
    let names =
        entries.map(|entry| Ok(entry.map_err(Error::io("list", path))?.file_name().into_string().ok()));
    Ok(Some(names.filter_map(Result::transpose).collect::<Result<_>>()?))
}

/// Makes a file's name durable.
pub(crate) fn sync_name(path: &Path) -> Result<()> {
    sync_directory(parent_of(path))
}

/// Removes a file; false when there was none.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", path)(error)),
    }
}

/// Removes a directory and all that is in it, if it is there.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    match descriptors::remove_directory(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Gives a complete file its name, where nothing has that.
///
/// # Errors
/// [`Error::FileExists`], [`Error::Io`].
pub(crate) fn place(new: &Path, path: &Path) -> Result<()> {
    // Unlike a rename, a link replaces nothing.
    match fs::hard_link(new, path) {
        Ok(()) => fs::remove_file(new).map_err(Error::io("remove", new)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::FileExists { path: path.to_path_buf() })
        }
        // Some file systems have none.
        Err(_) => {
            absent(path)?;
            fs::rename(new, path).map_err(Error::io("rename", path))
        }
    }
}

/// Fails where something has this name, be it a link to nothing.
///
/// # Errors
/// [`Error::FileExists`], [`Error::Io`].
pub(crate) fn absent(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(_) => Err(Error::FileExists { path: path.to_path_buf() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("stat", path)(error)),
    }
}
