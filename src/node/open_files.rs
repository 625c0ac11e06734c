//! Which database files are open in this process.
//!
//! A second opening of a file would share the first one's POSIX locks, and drop them when it
//! closes. So each opening claims the file before anything opens it.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::files::{self, Inode, Paths};
use crate::lock::lock;

/// How long an opening waits for a handle of the same file that is being closed.
const CLOSING_WAIT: Duration = Duration::from_secs(10);

static OPEN: Mutex<Vec<OpenFile>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();

/// An open database.
#[derive(Debug)]
struct OpenFile {
    serial: u64,
    /// Without symbolic links.
    paths: Paths,
    /// Its directory and its name there.
    place: (Inode, OsString),
    /// The file, if it was there: it may be known by other names.
    file: Option<Inode>,
    closing: bool,
}

impl OpenFile {
    /// Whether a place or a file is this database. The file may have come or been replaced after
    /// the claim.
    fn is(&self, place: &(Inode, OsString), file: Option<Inode>) -> bool {
        self.place == *place
            || file.is_some() && (file == self.file || file == Inode::at(self.paths.database()))
    }
}

/// Holds a database's place in this process until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim(u64);

impl Claim {
    /// Takes the place of a file, which need not exist yet. Waits for a handle that is just leaving
    /// it.
    pub(crate) fn enter(path: &Path) -> Result<Claim> {
        let place = place(path)?;
        let deadline = Instant::now() + CLOSING_WAIT;
        let mut open = lock(&OPEN);
        loop {
            let file = Inode::at(path);
            let left = deadline.saturating_duration_since(Instant::now());
            match open.iter().find(|entry| entry.is(&place, file)) {
                None => {
                    let serial = open.iter().map(|entry| entry.serial).max().unwrap_or(0) + 1;
                    open.push(OpenFile { serial, paths: Paths::new(path), place, file, closing: false });
                    return Ok(Claim(serial));
                }
                Some(entry) if entry.closing && !left.is_zero() => {}
                Some(_) => {
                    return Err(Error::AlreadyOpen { path: path.to_path_buf(), holder: "this process" });
                }
            }
            open = CHANGED.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Says that the place will soon be free.
    pub(crate) fn closing(&self) {
        if let Some(entry) = lock(&OPEN).iter_mut().find(|entry| entry.serial == self.0) {
            entry.closing = true;
        }
        CHANGED.notify_all();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&OPEN).retain(|entry| entry.serial != self.0);
        CHANGED.notify_all();
    }
}

/// Whether a path is an open database, or a file that belongs to one.
pub(crate) fn belongs_to_open(path: &Path) -> Result<bool> {
    let place = place(path)?;
    let file = Inode::at(path);
    Ok(lock(&OPEN).iter().any(|entry| {
        let beside = entry.paths.beside().iter().any(|theirs| {
            let name = theirs.file_name().unwrap_or_default();
            (entry.place.0 == place.0 && name == place.1) || (file.is_some() && file == Inode::at(theirs))
        });
        let directory = entry.paths.state_dir();
        let inside = Inode::at(directory).is_some_and(|it| it == place.0) || path.starts_with(directory);
        entry.is(&place, file) || beside || inside
    }))
}

fn place(path: &Path) -> Result<(Inode, OsString)> {
    let directory = files::parent_of(path);
    let name = path.file_name().unwrap_or_default();
    if cfg!(unix) {
        let meta = fs::metadata(directory).map_err(Error::io("stat", directory))?;
        return Ok((Inode::of(&meta).unwrap_or_default(), name.to_owned()));
    }
    Ok((Inode::default(), directory.join(name).into_os_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_claimed_once_until_it_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let claim = Claim::enter(&path).unwrap();
        assert!(matches!(Claim::enter(&path), Err(Error::AlreadyOpen { .. })));
        Claim::enter(&dir.path().join("b.db")).unwrap();
        drop(claim);
        Claim::enter(&path).unwrap();
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_came_after_the_claim_is_known_by_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let (path, hard) = (dir.path().join("a.db"), dir.path().join("b.db"));
        let _claim = Claim::enter(&path).unwrap();
        fs::write(&path, "new").unwrap();
        fs::hard_link(&path, &hard).unwrap();
        assert!(matches!(Claim::enter(&path), Err(Error::AlreadyOpen { .. })), "by its place");
        assert!(matches!(Claim::enter(&hard), Err(Error::AlreadyOpen { .. })), "by its inode");
        // Another file takes the name: the place is still taken, and so is the new file.
        fs::write(dir.path().join("c.db"), "newer").unwrap();
        fs::rename(dir.path().join("c.db"), &path).unwrap();
        fs::hard_link(&path, dir.path().join("d.db")).unwrap();
        assert!(matches!(Claim::enter(&dir.path().join("d.db")), Err(Error::AlreadyOpen { .. })));
    }

    #[test]
    fn who_enters_waits_for_who_is_leaving() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let claim = Claim::enter(&path).unwrap();
        claim.closing();
        let (sender, entered) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || sender.send(Claim::enter(&path).map(drop)));
        assert!(entered.recv_timeout(Duration::from_millis(50)).is_err(), "not before it is free");
        drop(claim);
        entered.recv_timeout(CLOSING_WAIT).unwrap().unwrap();
        waiting.join().unwrap().unwrap();
    }

    #[test]
    fn all_files_of_an_open_database_are_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        fs::create_dir(Paths::new(&path).state_dir()).unwrap();
        let claim = Claim::enter(&path).unwrap();
        for name in ["a.db", "a.db-wal", "a.db-shm", "a.db-journal", "a.db-replite/node"] {
            assert!(belongs_to_open(&dir.path().join(name)).unwrap(), "{name}");
        }
        assert!(!belongs_to_open(&dir.path().join("b.db")).unwrap());
        drop(claim);
        assert!(!belongs_to_open(&path).unwrap());
    }
}
