//! The directory beside a database, `<database>-replite`, and the files in it: for nobody who may not read the database.
//!
//! Directories are made for their owner alone. A file gets the database's mode and, where that is for us to give, its owner, as SQLite does it with the `-wal`.
//! No symbolic link is followed, and what is made anew was not there: who could put a link or a file of his own there would have us write over what he can't, or read what he wrote.

mod positioned;
pub(crate) mod reserve;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, Unsupported};

pub(crate) use positioned::{read_exact_at, sync_directory, write_all_at};
pub(crate) use reserve::replace_file;

/// What the directory's name has behind the database's.
const SUFFIX: &str = "-replite";
/// A database that is not there yet, and that nothing was said of.
pub(crate) const PRIVATE: u32 = 0o600;

/// The directory beside a database.
pub(crate) fn of(database: &Path) -> PathBuf {
    let mut side = database.as_os_str().to_owned();
    side.push(SUFFIX);
    side.into()
}

/// Makes the directory beside a database, for its owner alone. One that is there is tightened if others can read it.
///
/// # Errors
/// [`Error::Unsupported`] when one is there that others could have prepared, or can change; nothing is changed then. [`Error::Io`].
pub(crate) fn make(side: &Path) -> Result<()> {
    if new_directory(side)? {
        return Ok(());
    }
    let refused = |what| {
        let reason = Unsupported::SideDirectory(what);
        Err(Error::Unsupported { path: side.to_path_buf(), reason })
    };
    let meta = fs::symlink_metadata(side).map_err(Error::io("stat", side))?;
    if meta.is_symlink() {
        return refused("it is a symbolic link: put the directory itself there");
    }
    if !meta.is_dir() {
        return refused("it is no directory: move it away");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        // By a descriptor, so that what is looked at is what is changed.
        let directory = open_directory(side)?;
        let meta = directory.metadata().map_err(Error::io("stat", side))?;
        let owner = database_of(side).and_then(|database| fs::metadata(database).ok()).map(|meta| meta.uid());
        if meta.uid() != own_user() && owner != Some(meta.uid()) {
            return refused(
                "it belongs neither to this process's user nor to the database's owner: look at what is in it, then `chown` it or move it away",
            );
        }
        let others = meta.mode() & 0o022;
        if others != 0 && !(others == 0o020 && group_owns_all(side, meta.gid())) {
            return refused(
                "others may write to it: look at what is in it, then `chmod 700` it or move it away",
            );
        }
        set_mode(&directory, side, 0o700)?;
    }
    Ok(())
}

/// Makes a directory below that one, for its owner alone.
pub(crate) fn make_directory(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent().filter(|parent| below(parent)) {
        make_directory(parent)?;
    }
    if !new_directory(path)? {
        #[cfg(unix)]
        set_mode(&open_directory(path)?, path, 0o700)?;
    }
    Ok(())
}

/// Whether a directory is below a database's, and not that itself.
fn below(path: &Path) -> bool {
    let sides = |path: &Path| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().ends_with(SUFFIX.as_bytes()))
    };
    !sides(path) && path.ancestors().any(sides)
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
    give(&open_directory(path)?, path, None)?;
    Ok(true)
}

/// Makes a file anew, to be written and read. What is there under its name is removed, and not looked at: a file of ours that was left half done.
pub(crate) fn create(path: &Path) -> Result<File> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
        _ => {}
    }
    let mut options = options(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, PRIVATE);
    let file = options.create_new(true).open(path).map_err(Error::io("create", path))?;
    #[cfg(unix)]
    give(&file, path, Some(database_mode(path)))?;
    Ok(file)
}

/// Opens a file to be written and read, or makes it. Says whether it made it.
pub(crate) fn open_or_create(path: &Path) -> Result<(File, bool)> {
    match open_to_write(path) {
        Ok(file) => {
            limit(&file, path)?;
            Ok((file, false))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok((create(path)?, true)),
        Err(e) => Err(Error::io("open", path)(e)),
    }
}

pub(crate) fn open_to_write(path: &Path) -> io::Result<File> {
    options(true).open(path).map_err(of_link)
}

pub(crate) fn open(path: &Path) -> io::Result<File> {
    options(false).open(path).map_err(of_link)
}

/// A whole small file.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Copies a file to one that is made anew.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut source = open(from).map_err(Error::io("open", from))?;
    let mut target = create(to)?;
    io::copy(&mut source, &mut target).map_err(Error::io("copy", to))?;
    target.sync_all().map_err(Error::io("fsync", to))
}

/// Makes a file for the application, anywhere, with something of the database in it: who can't read that can't read this. The database is
/// told by a file that has its mode.
pub(crate) fn create_like(path: &Path, like: &Path) -> Result<File> {
    let mut options = options(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
        let mode = fs::metadata(like).map_err(Error::io("stat", like))?.mode();
        options.mode(mode & 0o666);
    }
    #[cfg(not(unix))]
    let _ = like;
    options.create_new(true).open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::FileExists { path: path.to_path_buf() },
        _ => Error::io("create", path)(error),
    })
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

/// Makes an empty database file of this mode; SQLite gives it to all that belongs to it. To close what is returned may take SQLite's locks on it away:
/// see `sqlite::park`.
pub(crate) fn create_database(path: &Path, mode: u32) -> Result<File> {
    let mut options = options(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, PRIVATE);
    let file = options.create_new(true).open(path).map_err(Error::io("create", path))?;
    set_mode(&file, path, mode)?;
    Ok(file)
}

/// Takes from a file of ours what others may do with it and not with the database.
fn limit(file: &File, path: &Path) -> Result<()> {
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

/// The database that a path below its side directory belongs to.
#[cfg(unix)]
fn database_of(path: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    path.ancestors().find_map(|above| {
        let name = above.file_name()?.as_bytes().strip_suffix(SUFFIX.as_bytes())?;
        Some(above.with_file_name(std::ffi::OsStr::from_bytes(name)))
    })
}

#[cfg(unix)]
fn database_mode(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    let database = database_of(path).and_then(|database| fs::metadata(database).ok());
    // Its owner, who may be us, writes to them.
    database.map_or(PRIVATE, |meta| meta.mode() & 0o666 | PRIVATE)
}

/// Whether the directory that the database is in is open to the same group: that can put another database there, and has nothing to gain. Orchestrators
/// open a whole volume to a group of its own, again at each start.
#[cfg(unix)]
fn group_owns_all(side: &Path, group: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    const STICKY: u32 = 0o1000;
    let parent = side.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::metadata(parent).is_ok_and(|meta| meta.gid() == group && meta.mode() & (STICKY | 0o022) == 0o020)
}

#[cfg(unix)]
fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Gives what was just made its mode, and the database's owner where we may: a node that runs as another user later must be able to open it.
#[cfg(unix)]
fn give(file: &File, path: &Path, mode: Option<u32>) -> Result<()> {
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

#[cfg(unix)]
fn open_directory(path: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::DIRECTORY;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path);
    opened.map_err(of_link).map_err(Error::io("open directory", path))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o777
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refused(made: Result<()>) -> &'static str {
        match made {
            Err(Error::Unsupported { reason: Unsupported::SideDirectory(why), .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_have_the_databases_mode_and_owner_and_directories_are_their_owners() {
        let dir = tempfile::tempdir().unwrap();
        let database = dir.path().join("a.db");
        let side = of(&database);
        make(&side).unwrap();
        assert_eq!(mode(&side), 0o700);
        create(&side.join("before")).unwrap();
        assert_eq!(mode(&side.join("before")), 0o600);
        let root = own_user() == 0;
        for wanted in [0o600, 0o640, 0o664, 0o666, 0o755, 0o400] {
            let _ = fs::remove_file(&database);
            fs::write(&database, "").unwrap();
            chmod(&database, wanted);
            if root {
                std::os::unix::fs::chown(&database, Some(1234), Some(1235)).unwrap();
            }
            let below = side.join("lost").join(format!("{wanted:o}"));
            make_directory(&below).unwrap();
            for file in [side.join("file"), below.join("file")] {
                create(&file).unwrap();
                assert_eq!(mode(&file), wanted & 0o666 | 0o600, "{}", file.display());
                let meta = fs::metadata(&file).unwrap();
                assert!(!root || (meta.uid(), meta.gid()) == (1234, 1235));
            }
            assert_eq!(mode(&below), 0o700);
            chmod(&side.join("file"), 0o777);
            assert!(!open_or_create(&side.join("file")).unwrap().1);
            assert_eq!(mode(&side.join("file")), wanted & 0o666 | 0o600);
            let copy = dir.path().join(format!("copy-{wanted:o}"));
            create_like(&copy, &database).unwrap();
            assert_eq!(mode(&copy) & !wanted, 0);
        }
        // Root's own directory beside the database of another.
        make(&side).unwrap();
    }

    #[test]
    fn a_directory_of_ours_is_tightened_and_one_that_others_can_change_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let side = of(&dir.path().join("a.db"));
        fs::create_dir(&side).unwrap();
        for open in [0o755, 0o750, 0o711, 0o700] {
            chmod(&side, open);
            make(&side).unwrap();
            assert_eq!(mode(&side), 0o700);
        }
        for open in [0o770, 0o702, 0o777, 0o1777] {
            chmod(&side, open);
            assert!(refused(make(&side)).contains("chmod 700"));
            assert_eq!(mode(&side), open & 0o777, "left as it is");
        }
        // A volume of a group.
        chmod(dir.path(), 0o2770);
        chmod(&side, 0o2770);
        make(&side).unwrap();
        assert_eq!(mode(&side), 0o700);
        chmod(&side, 0o777);
        refused(make(&side));
        for other in [0o1770, 0o772, 0o750] {
            chmod(dir.path(), other);
            chmod(&side, 0o770);
            refused(make(&side));
        }
        chmod(dir.path(), 0o700);
        if own_user() == 0 {
            chmod(&side, 0o700);
            std::os::unix::fs::chown(&side, Some(1234), None).unwrap();
            assert!(refused(make(&side)).contains("belongs neither"));
            fs::write(dir.path().join("a.db"), "").unwrap();
            std::os::unix::fs::chown(dir.path().join("a.db"), Some(1234), None).unwrap();
            make(&side).unwrap();
        }
        fs::remove_dir(&side).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        chmod(&elsewhere, 0o755);
        symlink(&elsewhere, &side).unwrap();
        assert!(refused(make(&side)).contains("symbolic link"));
        assert_eq!(mode(&elsewhere), 0o755);
        fs::remove_file(&side).unwrap();
        fs::write(&side, "").unwrap();
        assert!(refused(make(&side)).contains("no directory"));
    }

    #[test]
    fn no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (side, victim) = (of(&dir.path().join("a.db")), dir.path().join("victim"));
        make(&side).unwrap();
        fs::write(&victim, "precious").unwrap();
        let link = side.join("link");
        symlink(&victim, &link).unwrap();
        assert!(open(&link).unwrap_err().to_string().contains("symbolic link"));
        assert!(open_to_write(&link).is_err() && read(&link).is_err() && open_or_create(&link).is_err());
        let directory = side.join("log");
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
