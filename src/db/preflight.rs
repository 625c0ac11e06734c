//! Refuses what can't be served, before anything is changed.

use std::fs;
use std::path::{Path, PathBuf};

use rusqlite::OpenFlags;

use crate::error::{Error, Result, Unsupported};
use crate::files::{self, Paths};
use crate::node::open_files::Claim;
use crate::sqlite::{Handle, OLDEST, connect, park};

/// Checks the place and the file; gives the paths, without symbolic links, and the claim on them.
pub(super) fn claim(path: &Path, allow_network: bool) -> Result<(Paths, Claim)> {
    let no = |reason| Error::Unsupported { path: path.to_path_buf(), reason };
    if rusqlite::version_number() < OLDEST.0 {
        let found = rusqlite::version().to_string();
        return Err(no(Unsupported::SqliteTooOld { found, needed: OLDEST.1 }));
    }
    let path = resolve(path)?;
    let no = |reason| Error::Unsupported { path: path.clone(), reason };
    let directory = path.parent().map(Path::to_path_buf).ok_or_else(|| no(Unsupported::NotAFile))?;
    if !allow_network && let Some(name) = network_file_system(&directory)? {
        return Err(no(Unsupported::NetworkFileSystem(name)));
    }
    writable(&directory).map_err(|e| no(Unsupported::ReadOnlyDirectory(e.to_string())))?;
    match fs::metadata(&path) {
        Ok(meta) if !meta.is_file() => return Err(no(Unsupported::NotAFile)),
        Ok(meta) if meta.permissions().readonly() => {
            return Err(no(Unsupported::ReadOnlyDirectory("the file itself is read-only".into())));
        }
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("stat", &path)(e)),
        _ => {}
    }
    // Before anything opens the file: closing a second opening would drop the first one's locks.
    let claim = Claim::enter(&path)?;
    if path.exists() {
        is_database(&path)?;
    }
    Ok((Paths::new(path), claim))
}

/// The absolute path, symbolic links followed: SQLite puts the WAL beside the file itself. Makes
/// the directories above a file that is not there.
fn resolve(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(path) => Ok(path),
        // The file would be made wherever the link points to, and its WAL beside it.
        Err(_) if path.is_symlink() => {
            Err(Error::Unsupported { path: path.to_path_buf(), reason: Unsupported::DanglingLink })
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let name = path.file_name().ok_or_else(|| Error::Unsupported {
                path: path.to_path_buf(),
                reason: Unsupported::NotAFile,
            })?;
            files::make_above(path)?;
            let parent = files::parent_of(path);
            Ok(fs::canonicalize(parent).map_err(Error::io("open directory", parent))?.join(name))
        }
        Err(e) => Err(Error::io("resolve", path)(e)),
    }
}

/// Makes the state directory. What would refuse the database itself comes before: by now a
/// primary's database has been made, and turned to WAL.
pub(super) fn state_dir(paths: &Paths, replica: bool, mode: Option<u32>) -> Result<()> {
    let (path, state_dir) = (paths.database(), paths.state_dir());
    if state_dir.symlink_metadata().is_ok() {
        files::make_state_dir(state_dir)?;
        if !replica {
            create_database(path, mode)?;
        }
        return Ok(());
    }
    if !replica {
        create_database(path, mode)?;
    }
    if path.exists() || !replica {
        let handle = Handle::open(path, !replica)?;
        if !replica {
            turn_to_wal(path, &handle)?;
        }
    }
    files::make_state_dir(state_dir)?;
    files::sync_name(path)
}

/// A database that is not there yet gets the mode that the configuration says. SQLite makes it, if
/// that says nothing.
fn create_database(path: &Path, mode: Option<u32>) -> Result<()> {
    match mode {
        Some(mode) if !path.exists() => files::create_database(path, mode).map(|file| park([file])),
        _ => Ok(()),
    }
}

fn turn_to_wal(path: &Path, handle: &Handle) -> Result<()> {
    let mode = |sql| handle.connection().query_row(sql, [], |r| r.get::<_, String>(0));
    let mut now = mode("PRAGMA journal_mode")?;
    if now != "wal" {
        now = handle.turn_to_wal()?;
    }
    if now == "wal" {
        return Ok(());
    }
    Err(Error::Unsupported { path: path.to_path_buf(), reason: Unsupported::NotWal(now) })
}

/// Tries the directory with a file of our own.
fn writable(directory: &Path) -> std::io::Result<()> {
    let probe = directory.join(format!(".replite-{}", uuid::Uuid::new_v4()));
    fs::File::create_new(&probe)?;
    fs::remove_file(&probe)
}

/// Lets SQLite look at the file, without changing it.
fn is_database(path: &Path) -> Result<()> {
    let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    match connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0)) {
        Ok(_) => Ok(()),
        Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::NotADatabase) => {
            Err(Error::Unsupported { path: path.to_path_buf(), reason: Unsupported::NotADatabase })
        }
        // What that means is another thing for a primary than for a replica.
        Err(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseCorrupt) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Whether the database has tables. One that can't be read has.
pub(super) fn has_content(path: &Path) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let connection = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    let tables = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0));
    Ok(tables.map_or(true, |tables| tables > 0))
}

/// The name of the file system, if it is one that SQLite's locks can't be trusted on.
#[cfg(target_os = "linux")]
fn network_file_system(directory: &Path) -> Result<Option<String>> {
    let stat = rustix::fs::statfs(directory)
        .map_err(|e| Error::io("statfs", directory)(std::io::Error::from_raw_os_error(e.raw_os_error())))?;
    Ok(network_name(stat.f_type as u64 & 0xffff_ffff).map(str::to_string))
}

#[cfg(not(target_os = "linux"))]
fn network_file_system(_directory: &Path) -> Result<Option<String>> {
    Ok(None)
}

/// Magic numbers of `statfs(2)`.
#[cfg(target_os = "linux")]
fn network_name(magic: u64) -> Option<&'static str> {
    Some(match magic {
        0x6969 => "NFS",
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => "SMB",
        0x6573_5546 => "FUSE",
        0x0102_1997 => "9P",
        0x00c3_6400 => "Ceph",
        0x5346_414f => "AFS",
        0x0116_1970 => "GFS2",
        0x7461_636f => "OCFS2",
        0x0bd0_0bd0 => "Lustre",
        0x564c => "NCP",
        0x7375_7245 => "Coda",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    #[cfg(target_os = "linux")]
    fn network_file_systems_are_told_from_local_ones() {
        assert_eq!(network_name(0x6969), Some("NFS"));
        assert_eq!(network_name(0x6573_5546), Some("FUSE"));
        for local in [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x2fc1_2fc1, 0x794c_7630] {
            assert_eq!(network_name(local), None, "{local:x}");
        }
    }

    #[test]
    fn one_file_is_claimed_once_also_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE t(a)").unwrap();
        let (_, claim) = claim(&path, true).unwrap();
        #[cfg(unix)]
        {
            let link = dir.path().join("b.db");
            std::os::unix::fs::symlink(&path, &link).unwrap();
            assert!(matches!(super::claim(&link, true), Err(Error::AlreadyOpen { .. })));
            let hard = dir.path().join("c.db");
            fs::hard_link(&path, &hard).unwrap();
            assert!(matches!(super::claim(&hard, true), Err(Error::AlreadyOpen { .. })));
        }
        drop(claim);
        super::claim(&path, true).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn directories_that_are_missing_are_made_for_their_owner_alone() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("var/data/a.db");
        let (paths, _) = claim(&path, true).unwrap();
        assert!(!paths.database().exists());
        for made in ["var", "var/data"] {
            assert_eq!(fs::metadata(dir.path().join(made)).unwrap().mode() & 0o777, 0o700, "{made}");
        }
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        claim(&open.join("a.db"), true).unwrap();
        assert_eq!(fs::metadata(&open).unwrap().mode() & 0o777, 0o755, "left as it is");
        // A file where a directory would be.
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(claim(&dir.path().join("file/below/a.db"), true), Err(Error::Io { .. })));
    }

    #[test]
    fn what_is_no_database_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        fs::write(&path, vec![b'x'; 8192]).unwrap();
        let refused = |p: &Path| match claim(p, true) {
            Err(Error::Unsupported { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&path), Unsupported::NotADatabase);
        assert_eq!(fs::read(&path).unwrap(), vec![b'x'; 8192]);
        assert_eq!(refused(dir.path()), Unsupported::NotAFile);
        #[cfg(unix)]
        {
            let link = dir.path().join("link.db");
            std::os::unix::fs::symlink(dir.path().join("nothing.db"), &link).unwrap();
            assert_eq!(refused(&link), Unsupported::DanglingLink);
            fs::remove_file(link).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was left behind");
    }
}
