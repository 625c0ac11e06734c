//! Locks that stay whatever others in this process do, and a watch over those that don't.
//!
//! SQLite's locks are POSIX locks: they belong to a process and a file. When anything in the
//! process closes any descriptor of that file, all of them are gone, and no one is told. A library
//! that copies the database does it, a second SQLite, `std::fs::read`. So what a node holds for
//! life it holds by descriptors of its own, as open file description locks (`fcntl(2)`). These are
//! CKPT, on a replica WRITE, and shares in what says that the database is open and its `-shm`
//! mapped. To all connections, in this process and others, they are as much in the way as POSIX
//! locks.
//!
//! The node watches and mends what remains of the damage: the locks of this process's own SQLite
//! connections, which are a matter of moments.
//!
//! Only Linux has such locks. Elsewhere SQLite's own have to do.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crate::descriptors::{NodeFile, open_file};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::lock::lock;
use crate::report::Condition;
use crate::sqlite::ffi::{Handle, Lock, Owner, Slot};

/// SQLite's shared lock on the database file: every open connection of a WAL database has it.
const SHARED: LockPlace = LockPlace { file: 0, start: 0x4000_0002, length: 510 };
/// All that SQLite locks in a database file.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
const WHOLE: LockPlace = LockPlace { file: 0, start: 0x4000_0000, length: 512 };
/// In `-shm`: the process has it mapped. A process that finds no one there begins it anew.
const MAPPED: LockPlace = LockPlace { file: 1, start: 128, length: 1 };
/// The first of the eight locks of the wal-index.
const SLOTS: u64 = 120;
/// In both files, far after their ends: a POSIX lock that no one else takes. While it is there,
/// SQLite's are.
const MARKER: u64 = 0x7fff_ffff_ffff_0000;

/// Descriptors that could not be closed yet, because the process had locks on their files.
static PARKED: Mutex<Vec<File>> = Mutex::new(Vec::new());

#[derive(Clone, Copy, Debug)]
struct LockPlace {
    /// The database, or its `-shm`.
    file: usize,
    start: u64,
    length: u64,
}

impl LockPlace {
    fn slot(slot: Slot) -> LockPlace {
        LockPlace { file: 1, start: SLOTS + slot.number(), length: 1 }
    }

    fn marker(file: usize) -> LockPlace {
        LockPlace { file, start: MARKER, length: 1 }
    }
}

fn opened(path: &Path) -> std::io::Result<File> {
    open_file(|| File::options().read(true).write(true).open(path)).map(NodeFile::into_file)
}

/// The locks of one open database.
#[derive(Debug)]
pub(crate) struct FileLocks {
    files: Option<[File; 2]>,
    path: PathBuf,
    /// Of which files the marker is this process's, or was until it was lost.
    marked: [AtomicBool; 2],
    released: AtomicBool,
    losses: AtomicU64,
    /// A bit for each read mark that may have been moved under a reader whose lock was lost.
    doubts: AtomicU8,
}

impl FileLocks {
    /// Opens the files, which SQLite has open and mapped already. Nothing where there are no such
    /// locks.
    pub(crate) fn open(path: &Path) -> Result<Option<FileLocks>> {
        close_unlocked();
        if !cfg!(all(target_os = "linux", target_pointer_width = "64")) {
            return Ok(None);
        }
        let open = |path: &Path| opened(path).map_err(Error::io("open", path));
        let files = Some([open(path)?, open(&Paths::new(path).shm())?]);
        let locks = FileLocks {
            files,
            path: path.to_path_buf(),
            marked: Default::default(),
            released: AtomicBool::new(false),
            losses: AtomicU64::new(0),
            doubts: AtomicU8::new(0),
        };
        locks.set(Owner::Descriptor, Some(false), SHARED)?;
        locks.set(Owner::Descriptor, Some(false), MAPPED)?;
        Ok(Some(locks))
    }

    /// The database file.
    pub(crate) fn database(&self) -> Option<&File> {
        self.files.as_ref().map(|files| &files[0])
    }

    /// Its `-shm`.
    pub(crate) fn shm(&self) -> Option<&File> {
        self.files.as_ref().map(|files| &files[1])
    }

    /// Begins to watch. Only the holder of CKPT does: a node that ended in another process has been
    /// watching until then. That node's marker may still be there, because its process ends just
    /// now. Then the file is watched from a later look on.
    pub(crate) fn watch(&self) -> Result<()> {
        for file in [0, 1] {
            if self.set(Owner::Process, Some(true), LockPlace::marker(file))? {
                self.marked[file].store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Tries to hold a lock of the wal-index until [`FileLocks::release`]; false while another
    /// owner has it.
    pub(crate) fn try_hold(&self, slot: Slot) -> Result<bool> {
        self.set(Owner::Descriptor, Some(true), LockPlace::slot(slot))
    }

    /// Gives a lock of the wal-index back that [`FileLocks::try_hold`] took.
    pub(crate) fn give_back(&self, slot: Slot) -> Result<()> {
        self.set(Owner::Descriptor, None, LockPlace::slot(slot)).map(drop)
    }

    /// Gives back what is held. The connections have to be closed: others may be the last from now
    /// on.
    pub(crate) fn release(&self) {
        self.released.store(true, Ordering::Release);
        // While CKPT is ours: the marker belongs to the process. From then on it may be that of the
        // next node in it.
        for file in [0, 1] {
            if self.marked[file].swap(false, Ordering::AcqRel)
                && let Err(error) = self.set(Owner::Process, None, LockPlace::marker(file))
            {
                Condition::LockWatchNotEnded { error: &error }.say();
            }
        }
        for place in [LockPlace { file: 1, start: SLOTS, length: 9 }, SHARED] {
            if let Err(error) = self.set(Owner::Descriptor, None, place) {
                Condition::LockNotReleased { error: &error }.say();
            }
        }
    }

    /// How often the process's locks were lost.
    pub(crate) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Looks whether the locks of this process's connections stand, and takes them again where not.
    /// True when they were lost.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel does not answer, or another process is in the way. The next
    /// call looks for them again.
    pub(crate) fn mend(&self, handle: &mut Handle) -> Result<bool> {
        let lost = |file: usize| self.marked[file].load(Ordering::Acquire) && !self.stand(file);
        if self.released.load(Ordering::Acquire) {
            return Ok(false);
        }
        if !lost(0) && !lost(1) {
            if !self.marked.iter().all(|marked| marked.load(Ordering::Acquire)) {
                self.watch()?;
            }
            return Ok(false);
        }
        // What every open connection has for its life.
        for place in [SHARED, MAPPED] {
            if !self.set(Owner::Process, Some(false), place)? {
                return Err(self.in_the_way());
            }
        }
        // What they have for moments: SQLite's own account says whether a connection here believes
        // to hold it.
        let reads = (0..5).map(|mark| (Slot::read(mark), false));
        for (slot, exclusive) in reads.chain([(Slot::WRITE, true)]) {
            if handle.try_lock(slot, Lock::Exclusive)? {
                handle.unlock(slot, Lock::Exclusive)?;
                continue;
            }
            if !exclusive {
                self.doubts.fetch_or(1 << slot.number(), Ordering::AcqRel);
            }
            // Or it is another process's, which is then in the way, and rightly so. If that process
            // gives it back just now, it is no one's.
            if self.set(Owner::Process, Some(exclusive), LockPlace::slot(slot))?
                && handle.try_lock(slot, Lock::Exclusive)?
            {
                handle.unlock(slot, Lock::Exclusive)?;
            }
        }
        self.watch()?;
        self.losses.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Whether a reader here may need an older state than the mark of this slot says.
    pub(crate) fn doubts(&self, slot: Slot) -> bool {
        self.doubts.load(Ordering::Acquire) & (1 << slot.number()) != 0
    }

    /// The slot was seen without a reader.
    pub(crate) fn doubt_no_more(&self, slot: Slot) {
        self.doubts.fetch_and(!(1 << slot.number()), Ordering::AcqRel);
    }

    fn in_the_way(&self) -> Error {
        Error::io("lock", &self.path)(std::io::Error::other("another process is in the way"))
    }

    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn stand(&self, file: usize) -> bool {
        let marker = LockPlace::marker(file);
        let Some(files) = &self.files else { return true };
        let holder = super::ffi::lock_holder(&files[file], marker.start, marker.length);
        // A kernel that does not answer is no reason to take anything.
        holder.is_err() || matches!(holder, Ok(Some(pid)) if pid == std::process::id() as i32)
    }

    #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
    fn stand(&self, _: usize) -> bool {
        true
    }

    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    fn set(&self, owner: Owner, exclusive: Option<bool>, place: LockPlace) -> Result<bool> {
        let Some(files) = &self.files else { return Ok(false) };
        let set = super::ffi::set_lock(&files[place.file], owner, exclusive, place.start, place.length);
        set.map_err(Error::io("lock", &self.path))
    }

    #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
    fn set(&self, _: Owner, _: Option<bool>, _: LockPlace) -> Result<bool> {
        Ok(true)
    }
}

impl Drop for FileLocks {
    fn drop(&mut self) {
        self.release();
        park(self.files.take().into_iter().flatten());
    }
}

/// A database file that no connection has open in WAL mode or is reading or writing, here or
/// elsewhere, for as long as this lives. Only Linux can tell.
#[derive(Debug)]
pub(crate) struct Alone(Option<File>);

impl Alone {
    /// Nothing when another owner has the file.
    pub(crate) fn with(path: &Path) -> Result<Option<Alone>> {
        let file = opened(path).map_err(Error::io("open", path))?;
        let alone = Alone(Some(file));
        #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
        if let Some(file) = &alone.0
            && !super::ffi::set_lock(file, Owner::Descriptor, Some(true), WHOLE.start, WHOLE.length)
                .map_err(Error::io("lock", path))?
        {
            return Ok(None);
        }
        Ok(Some(alone))
    }

    pub(crate) fn file(&self) -> Option<&File> {
        self.0.as_ref()
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
        if let Some(file) = &self.0 {
            // Should it stay, closing the descriptor gives it back.
            let _ = super::ffi::set_lock(file, Owner::Descriptor, None, WHOLE.start, WHOLE.length);
        }
        park(self.0.take());
    }
}

/// Keeps descriptors of a database until their closing can lose no lock of this process.
pub(crate) fn park(files: impl IntoIterator<Item = File>) {
    lock(&PARKED).extend(files);
    close_unlocked();
}

/// Closes descriptors that are no longer used, where no one holds a lock on their files: one of
/// this process would be lost.
pub(crate) fn close_unlocked() {
    lock(&PARKED).retain(|file| !unlocked(file));
}

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn unlocked(file: &File) -> bool {
    // A lock on everything but the marker, which goes with the descriptor. So no one takes a lock
    // between this look and the closing.
    matches!(super::ffi::set_lock(file, Owner::Descriptor, Some(true), 0, MARKER), Ok(true))
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn unlocked(_: &File) -> bool {
    true
}
