//! A watch over the locks that SQLite holds for this process.
//!
//! POSIX locks belong to a process and a file. When anybody in the process closes any descriptor of that file, all of them
//! are gone, and nobody is told: a library that copies the database, a second SQLite, `std::fs::read`. Then other
//! processes may checkpoint, begin the WAL anew or write to a replica.
//!
//! The watch has a descriptor of its own on the database and on its `-shm`, through which the kernel says whether the locks stand and
//! through which they are taken again. They are not closed while anybody holds a lock there. Where the kernel can't be asked there is no watch.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::sqlite::ffi::{Handle, Lock, Slot};

/// SQLite's shared lock on the database file: every open connection of a WAL database has it.
const SHARED: (u64, u64) = (0x4000_0002, 510);
/// A lock of our own on the database file, far behind its end: nobody else takes it, so that its being there says that ours are.
const MARKER: (u64, u64) = (0x7fff_ffff_ffff_0000, 1);
/// The first of the eight locks in `-shm`, and the one that says that the process has it mapped.
const SHM_LOCKS: u64 = 120;
const SHM_MAPPED: (u64, u64) = (128, 1);

/// Descriptors that could not be closed yet, because the process had locks on their files.
static PARKED: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Watches over one open database.
#[derive(Debug)]
pub(crate) struct LockWatch {
    /// There until dropped.
    files: Option<(File, File)>,
    path: PathBuf,
    /// The write lock, too, is held for life.
    replica: bool,
    /// Lost, and not yet known to have done no harm.
    suspect: AtomicBool,
    losses: AtomicU64,
}

impl LockWatch {
    /// Begins to watch; the locks are held. Nothing where it can't be done.
    pub(crate) fn begin(path: &Path, replica: bool) -> Option<LockWatch> {
        close_unlocked();
        let begun = Self::open(path, replica);
        if let Err(error) = &begun {
            tracing::debug!(%error, "there is no watch over the file locks");
        }
        begun.ok()
    }

    fn open(path: &Path, replica: bool) -> Result<LockWatch> {
        if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
            return Err(Error::io("watch", path)(std::io::ErrorKind::Unsupported.into()));
        }
        let mut shm = path.as_os_str().to_owned();
        shm.push("-shm");
        let open =
            |path: &Path| File::options().read(true).write(true).open(path).map_err(Error::io("open", path));
        let files = Some((open(path)?, open(Path::new(&shm))?));
        let (suspect, losses) = (AtomicBool::new(false), AtomicU64::new(0));
        let watch = LockWatch { files, path: path.to_path_buf(), replica, suspect, losses };
        if watch.take(0, true, MARKER)? && watch.ours() {
            return Ok(watch);
        }
        Err(Error::io("lock", path)(std::io::Error::other("its locks can't be seen")))
    }

    /// Whether the locks stand, and always did, or are known to have been missed by nobody. Costs two system calls.
    pub(crate) fn stand(&self) -> bool {
        !self.suspect.load(Ordering::Acquire) && self.ours()
    }

    fn ours(&self) -> bool {
        let owner = SHM_LOCKS + if self.replica { 0 } else { 1 };
        self.is_ours(0, MARKER) && self.is_ours(1, (owner, 1))
    }

    /// From now on they count as lost, until [`LockWatch::trust`]. False when somebody found that before.
    pub(crate) fn suspect(&self) -> bool {
        let first = !self.suspect.swap(true, Ordering::AcqRel);
        if first {
            self.losses.fetch_add(1, Ordering::Relaxed);
        }
        first
    }

    pub(crate) fn trust(&self) {
        self.suspect.store(false, Ordering::Release);
    }

    /// How often they were lost.
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Takes what this process should hold; false while another process is in the way. Of what is a matter of moments, readers' marks and
    /// the write lock of a primary, SQLite's own account says whether somebody here believes to hold it.
    pub(crate) fn retake(&self, handle: &mut Handle) -> Result<bool> {
        let owner = (SHM_LOCKS + 1, 1);
        let taken = self.take(0, true, MARKER)?
            && self.take(0, false, SHARED)?
            && self.take(1, false, SHM_MAPPED)?
            && self.take(1, true, owner)?
            && (!self.replica || self.take(1, true, (SHM_LOCKS, 1))?);
        if !taken {
            return Ok(false);
        }
        let moments = (0..5).map(|mark| (Slot::read(mark), SHM_LOCKS + 3 + mark as u64, false));
        let writer = (!self.replica).then_some((Slot::WRITE, SHM_LOCKS, true));
        for (slot, at, exclusive) in moments.chain(writer) {
            if handle.try_lock(slot, Lock::Exclusive)? {
                handle.unlock(slot, Lock::Exclusive)?;
            } else {
                // Held by somebody here, or by another process, which is then in the way: both are fine. What is taken too much goes
                // with the next checkpoint.
                self.take(1, exclusive, (at, 1))?;
            }
        }
        Ok(true)
    }

    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn is_ours(&self, file: usize, (start, length): (u64, u64)) -> bool {
        let holder =
            self.file(file).and_then(|file| super::ffi::lock_holder(file, start, length).ok().flatten());
        holder == Some(std::process::id() as i32)
    }

    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn take(&self, file: usize, exclusive: bool, (start, length): (u64, u64)) -> Result<bool> {
        let Some(file) = self.file(file) else { return Ok(false) };
        super::ffi::lock_for_process(file, exclusive, start, length).map_err(Error::io("lock", &self.path))
    }

    #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
    fn is_ours(&self, _: usize, _: (u64, u64)) -> bool {
        true
    }

    #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
    fn take(&self, _: usize, _: bool, _: (u64, u64)) -> Result<bool> {
        Ok(true)
    }

    /// The database, or its `-shm`.
    fn file(&self, which: usize) -> Option<&File> {
        self.files.as_ref().map(|(database, shm)| if which == 0 { database } else { shm })
    }
}

impl Drop for LockWatch {
    fn drop(&mut self) {
        if let Some((database, shm)) = self.files.take() {
            PARKED.lock().unwrap_or_else(PoisonError::into_inner).extend([database, shm]);
        }
        close_unlocked();
    }
}

/// Closes descriptors of watches that have ended, as far as nobody holds a lock on their files: in this process it would be lost.
fn close_unlocked() {
    let mut parked = PARKED.lock().unwrap_or_else(PoisonError::into_inner);
    parked.retain(|file| !unlocked(file));
}

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn unlocked(file: &File) -> bool {
    // Our own marker goes with the descriptor; it is behind all others.
    matches!(super::ffi::lock_holder(file, 0, MARKER.0), Ok(None))
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn unlocked(_: &File) -> bool {
    true
}
