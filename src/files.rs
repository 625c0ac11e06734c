//! The state directory of a database, and the files in it. Only a user who can read the database
//! can read them.
//!
//! Directories are made for their owner alone. A file gets the database's mode and, where that is
//! for us to give, its owner: SQLite does the same with the `-wal`.
//!
//! Nothing here follows a symbolic link, and what is made anew was not there. Otherwise a user who
//! can put something there could have us write over files that are not that user's, or read forged
//! ones.

mod certificates;
pub(crate) mod channel_key;
mod inode;
pub(crate) mod keys;
pub(crate) mod lease;
#[cfg(feature = "members")]
pub(crate) mod member;
mod modes;
mod names;
mod notice;
mod paths;
mod positioned;
pub(crate) mod reserve;
pub(crate) mod sealed;
mod secret;
mod state_directory;

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

use crate::descriptors::{self, NodeFile};
use crate::error::{Error, Result};
use crate::files::modes::limit;
#[cfg(unix)]
use crate::files::modes::{database_mode, give};

pub(crate) use certificates::CertificateFiles;
pub(crate) use inode::Inode;
pub(crate) use modes::{PRIVATE, set_mode};
#[cfg(feature = "members")]
pub(crate) use names::list;
pub(crate) use names::{absent, parent_of, place, remove, remove_directory, sync_directory, sync_name};
pub(crate) use notice::{Notice, on_write};
pub(crate) use paths::{Paths, beside};
pub(crate) use positioned::{read_at, read_exact_at, write_all_at};
pub(crate) use reserve::{replace_file, replace_file_when};
pub(crate) use state_directory::{
    check_directory, make_above, make_directory, make_named_directory, make_state_dir,
};

/// Makes a file anew, to be written and read. A file that has its name is one of ours that was left
/// half done: this removes it without looking at it.
pub(crate) fn create(path: &Path) -> Result<NodeFile> {
    remove(path)?;
    let mut options = options(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, PRIVATE);
    let file = opened(options.create_new(true), path).map_err(Error::io("create", path))?;
    #[cfg(unix)]
    give(&file, path, Some(database_mode(path)))?;
    Ok(file)
}

/// Opens a file to be written and read, or makes it. Says whether it made it.
pub(crate) fn open_or_create(path: &Path) -> Result<(NodeFile, bool)> {
    match open_to_write(path) {
        Ok(file) => {
            limit(&file, path)?;
            Ok((file, false))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok((create(path)?, true)),
        Err(e) => Err(Error::io("open", path)(e)),
    }
}

pub(crate) fn open_to_write(path: &Path) -> io::Result<NodeFile> {
    opened(&options(true), path).map_err(of_link)
}

pub(crate) fn open(path: &Path) -> io::Result<NodeFile> {
    opened(&options(false), path).map_err(of_link)
}

/// The bytes of a small file; no more than `most`, should it have more.
pub(crate) fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Copies a file to one that is made anew.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = open(from).map_err(Error::io("open", from))?;
    let mut target = create(to)?;
    io::copy(&mut source, &mut target).map_err(Error::io("copy", to))?;
    target.sync_all().map_err(Error::io("fsync", to))
}

/// Makes a file for the application, anywhere, with something of the database in it. It is no more
/// open than the file `like`, which has the database's mode.
pub(crate) fn create_like(path: &Path, like: &Path) -> Result<NodeFile> {
    let mut options = options(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        let mode = fs::metadata(like).map_err(Error::io("stat", like))?.mode();
        options.mode(mode & 0o666);
    }
    #[cfg(not(unix))]
    let _ = like;
    opened(options.create_new(true), path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::FileExists { path: path.to_path_buf() },
        _ => Error::io("create", path)(error),
    })
}

/// Makes an empty database file of this mode; SQLite gives the mode to all that belongs to it. To
/// close what is returned may take SQLite's locks on it away: see `sqlite::park`.
pub(crate) fn create_database(path: &Path, mode: u32) -> Result<fs::File> {
    let mut options = options(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, PRIVATE);
    let file = opened(options.create_new(true), path).map_err(Error::io("create", path))?;
    set_mode(&file, path, mode)?;
    Ok(file.into_file())
}

/// Opens or makes a file, where there is no descriptor left with one of the reserve.
fn opened(options: &OpenOptions, path: &Path) -> io::Result<NodeFile> {
    descriptors::open_file(|| options.open(path))
}

fn options(write: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(write);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
    }
    options
}

/// Says what the system says in riddles.
fn of_link(error: io::Error) -> io::Error {
    #[cfg(unix)]
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        return io::Error::new(error.kind(), "it is a symbolic link, which is not followed: remove it");
    }
    error
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::PathBuf;

    use super::modes::own_user;
    use super::*;
    use crate::error::Unsupported;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn state_dir_of(database: &Path) -> PathBuf {
        Paths::new(database).state_dir().to_path_buf()
    }

    fn refused(made: Result<()>) -> &'static str {
        match made {
            Err(Error::Unsupported { reason: Unsupported::StateDirectory(why), .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_have_the_databases_mode_and_owner_and_directories_are_their_owners() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("a.db");
        let state_dir = state_dir_of(&database);
        make_state_dir(&state_dir).unwrap();
        assert_eq!(mode(&state_dir), 0o700);
        create(&state_dir.join("before")).unwrap();
        assert_eq!(mode(&state_dir.join("before")), 0o600);
        let root = own_user() == 0;
        for wanted in [0o600, 0o640, 0o664, 0o666, 0o755, 0o400] {
            let _ = fs::remove_file(&database);
            fs::write(&database, "").unwrap();
            chmod(&database, wanted);
            if root {
                std::os::unix::fs::chown(&database, Some(1234), Some(1235)).unwrap();
            }
            let below = state_dir.join("lost").join(format!("{wanted:o}"));
            make_directory(&below).unwrap();
            for file in [state_dir.join("file"), below.join("file")] {
                create(&file).unwrap();
                assert_eq!(mode(&file), wanted & 0o666 | 0o600, "{}", file.display());
                let meta = fs::metadata(&file).unwrap();
                assert!(!root || (meta.uid(), meta.gid()) == (1234, 1235));
            }
            assert_eq!(mode(&below), 0o700);
            chmod(&state_dir.join("file"), 0o777);
            assert!(!open_or_create(&state_dir.join("file")).unwrap().1);
            assert_eq!(mode(&state_dir.join("file")), wanted & 0o666 | 0o600);
            let copy = dir.path().join(format!("copy-{wanted:o}"));
            create_like(&copy, &database).unwrap();
            assert_eq!(mode(&copy) & !wanted, 0);
        }
        // Root's own directory beside the database of another.
        make_state_dir(&state_dir).unwrap();
    }

    #[test]
    fn a_directory_of_ours_is_tightened_and_one_that_others_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = state_dir_of(&dir.path().join("a.db"));
        fs::create_dir(&state_dir).unwrap();
        for open in [0o755, 0o750, 0o711, 0o700] {
            chmod(&state_dir, open);
            make_state_dir(&state_dir).unwrap();
            assert_eq!(mode(&state_dir), 0o700);
        }
        for open in [0o770, 0o702, 0o777, 0o1777] {
            chmod(&state_dir, open);
            assert!(refused(make_state_dir(&state_dir)).contains("chmod 700"));
            assert_eq!(mode(&state_dir), open & 0o777, "left as it is");
        }
        // A volume of a group.
        chmod(dir.path(), 0o2770);
        chmod(&state_dir, 0o2770);
        make_state_dir(&state_dir).unwrap();
        assert_eq!(mode(&state_dir), 0o700);
        chmod(&state_dir, 0o777);
        refused(make_state_dir(&state_dir));
        for other in [0o1770, 0o772, 0o750] {
            chmod(dir.path(), other);
            chmod(&state_dir, 0o770);
            refused(make_state_dir(&state_dir));
        }
        chmod(dir.path(), 0o700);
        if own_user() == 0 {
            chmod(&state_dir, 0o700);
            std::os::unix::fs::chown(&state_dir, Some(1234), None).unwrap();
            assert!(refused(make_state_dir(&state_dir)).contains("belongs neither"));
            fs::write(dir.path().join("a.db"), "").unwrap();
            std::os::unix::fs::chown(dir.path().join("a.db"), Some(1234), None).unwrap();
            make_state_dir(&state_dir).unwrap();
        }
        fs::remove_dir(&state_dir).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        chmod(&elsewhere, 0o755);
        symlink(&elsewhere, &state_dir).unwrap();
        assert!(refused(make_state_dir(&state_dir)).contains("symbolic link"));
        assert_eq!(mode(&elsewhere), 0o755);
        fs::remove_file(&state_dir).unwrap();
        fs::write(&state_dir, "").unwrap();
        assert!(refused(make_state_dir(&state_dir)).contains("no directory"));
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (state_dir, victim) = (state_dir_of(&dir.path().join("a.db")), dir.path().join("victim"));
        make_state_dir(&state_dir).unwrap();
        fs::write(&victim, "precious").unwrap();
        let link = state_dir.join("link");
        symlink(&victim, &link).unwrap();
        assert!(open(&link).unwrap_err().to_string().contains("symbolic link"));
        assert!(open_to_write(&link).is_err() && read(&link, 64).is_err() && open_or_create(&link).is_err());
        let directory = state_dir.join("log");
        symlink(dir.path(), &directory).unwrap();
        assert!(make_directory(&directory).is_err() && make_directory(&directory.join("below")).is_err());
        assert!(!dir.path().join("below").exists());
        assert!(create_like(&link, &victim).is_err() && create_database(&link, 0o600).is_err());
        create(&link).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        // A link to nothing.
        fs::remove_file(&link).unwrap();
        symlink(dir.path().join("made"), &link).unwrap();
        assert!(open_or_create(&link).is_err());
        assert!(!dir.path().join("made").exists());
    }
}
