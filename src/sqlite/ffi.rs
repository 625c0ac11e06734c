//! A dedicated connection's database file, by the methods of SQLite's own `sqlite3_file`.
//!
//! Going through that handle, and not through a descriptor of our own, keeps us in the lock domain
//! of every other connection. No descriptor of the database is ever closed beside SQLite: that
//! would drop the process's POSIX locks.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::{io, ptr};

use rusqlite::{Connection, OpenFlags, ffi};

use crate::descriptors::{self, Share, used_up};
use crate::error::{Error, Result, Unsupported};
use crate::fence::Fence;
use crate::sqlite::connect;
use crate::wal::REGION_BYTES;

/// One of the eight locks of the wal-index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot(u8);

impl Slot {
    /// Held by the one connection that writes.
    pub(crate) const WRITE: Slot = Slot(0);
    /// Held by the one connection that checkpoints.
    pub(crate) const CHECKPOINT: Slot = Slot(1);
    /// The readers that use no frame of the WAL.
    pub(crate) const READ0: Slot = Slot(3);

    pub(super) fn number(self) -> u64 {
        u64::from(self.0)
    }

    /// The lock of read mark `mark`, 0 to 4.
    pub(crate) fn read(mark: usize) -> Slot {
        assert!(mark < 5, "SQLite has five read marks, not {mark}");
        Slot(3 + mark as u8)
    }
}

/// How a lock is held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lock {
    Shared,
    Exclusive,
}

/// A connection of our own and its file's methods. Used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Handle {
    file: NonNull<ffi::sqlite3_file>,
    path: PathBuf,
    /// Locks of the wal-index that are held. While a sibling connection is open, closing releases
    /// none of them.
    held: Vec<(Slot, Lock)>,
    /// Keeps `file` alive.
    connection: Connection,
}

impl Drop for Handle {
    fn drop(&mut self) {
        for (slot, lock) in std::mem::take(&mut self.held) {
            // Nothing can be done about a failure here; the process's end releases them.
            let _ = self.shm_lock(slot, ffi::SQLITE_SHM_UNLOCK | lock.flag());
        }
    }
}

// SAFETY: `file` belongs to `connection`, which is Send, and nothing of either is bound to a
// thread. Every method that reads, writes or locks takes `&mut self`, which keeps two threads from
// using them at once.
unsafe impl Send for Handle {}

impl Handle {
    /// Opens a connection, and reads once so that SQLite recovers the WAL and maps the wal-index.
    pub(crate) fn open(path: &Path, create: bool) -> Result<Handle> {
        let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
        if create {
            flags |= OpenFlags::SQLITE_OPEN_CREATE;
        }
        let opens = || connect(path, flags);
        let connection = descriptors::open((Share::Node, 1), |_| used_up(), opens)?;
        let unsupported = |reason| Error::Unsupported { path: path.to_path_buf(), reason };
        let file = main_file(&connection).ok_or_else(|| unsupported(Unsupported::NoSharedMemory))?;
        let handle = Handle { file, path: path.to_path_buf(), held: Vec::new(), connection };
        // SAFETY: `file` is open, so that its methods are set, and they are constant.
        let methods = unsafe { &*(*handle.file.as_ptr()).pMethods };
        if methods.iVersion < 2 || methods.xShmMap.is_none() || methods.xShmLock.is_none() {
            return Err(unsupported(Unsupported::NoSharedMemory));
        }
        Ok(handle)
    }

    /// The connection itself, for SQL.
    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Turns the database to WAL, and says which journal mode it has then. The statement's own
    /// commit comes after the row that says "wal", and may fail.
    pub(crate) fn turn_to_wal(&self) -> rusqlite::Result<String> {
        let mut statement = self.connection.prepare("PRAGMA journal_mode = WAL")?;
        let mut rows = statement.query([])?;
        let mut mode = String::new();
        while let Some(row) = rows.next()? {
            mode = row.get(0)?;
        }
        Ok(mode)
    }

    fn methods(&self) -> &ffi::sqlite3_io_methods {
        // SAFETY: `file` stays open as long as `connection`, and the methods of an open file are
        // set and constant.
        unsafe { &*(*self.file.as_ptr()).pMethods }
    }

    fn check(&self, op: &'static str, code: c_int) -> Result<()> {
        if code == ffi::SQLITE_OK {
            return Ok(());
        }
        let source = match code & 0xff {
            ffi::SQLITE_FULL => io::Error::from(io::ErrorKind::StorageFull),
            _ => io::Error::other(format!("SQLite's VFS answers {code}")),
        };
        Err(Error::Io { op, path: self.path.clone(), source })
    }

    fn missing(&self, op: &'static str) -> Error {
        Error::Io { op, path: self.path.clone(), source: io::ErrorKind::Unsupported.into() }
    }

    /// Fills `buffer` from the database file; bytes beyond its end read as zero.
    pub(crate) fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let method = self.methods().xRead.ok_or_else(|| self.missing("read"))?;
        let (data, length) = (buffer.as_mut_ptr().cast::<c_void>(), buffer.len() as c_int);
        // SAFETY: `data` has room for `length` bytes, and `file` is open.
        let code = unsafe { method(self.file.as_ptr(), data, length, offset as i64) };
        // A short read has filled the rest with zeros.
        if code == ffi::SQLITE_IOERR_SHORT_READ { Ok(()) } else { self.check("read", code) }
    }

    /// Writes to the database file. The caller holds the checkpoint lock, and READ0, exclusive,
    /// where readers may look.
    pub(crate) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        // unixWrite masks the length to 17 bits.
        assert!(bytes.len() < 128 * 1024, "a write of {} bytes would be cut", bytes.len());
        let method = self.methods().xWrite.ok_or_else(|| self.missing("write"))?;
        let (data, length) = (bytes.as_ptr().cast::<c_void>(), bytes.len() as c_int);
        // SAFETY: `data` holds `length` bytes, and `file` is open.
        let code = unsafe { method(self.file.as_ptr(), data, length, offset as i64) };
        self.check("write", code)
    }

    /// fsyncs the database file.
    pub(crate) fn sync(&mut self) -> Result<()> {
        let method = self.methods().xSync.ok_or_else(|| self.missing("fsync"))?;
        // SAFETY: `file` is open.
        let code = unsafe { method(self.file.as_ptr(), ffi::SQLITE_SYNC_NORMAL) };
        self.check("fsync", code)
    }

    /// Cuts the database file.
    pub(crate) fn truncate(&mut self, bytes: u64) -> Result<()> {
        let method = self.methods().xTruncate.ok_or_else(|| self.missing("truncate"))?;
        // SAFETY: `file` is open.
        let code = unsafe { method(self.file.as_ptr(), bytes as i64) };
        self.check("truncate", code)
    }

    /// The database file's length in bytes.
    pub(crate) fn size(&mut self) -> Result<u64> {
        let method = self.methods().xFileSize.ok_or_else(|| self.missing("stat"))?;
        let mut size = 0;
        // SAFETY: `size` outlives the call, and `file` is open.
        let code = unsafe { method(self.file.as_ptr(), &mut size) };
        self.check("stat", code)?;
        Ok(size.max(0) as u64)
    }

    /// Tries a lock of the wal-index; false when another owner holds it.
    pub(crate) fn try_lock(&mut self, slot: Slot, lock: Lock) -> Result<bool> {
        let code = self.shm_lock(slot, ffi::SQLITE_SHM_LOCK | lock.flag())?;
        if code & 0xff == ffi::SQLITE_BUSY {
            return Ok(false);
        }
        self.check("lock", code)?;
        self.held.push((slot, lock));
        Ok(true)
    }

    /// Gives a lock back.
    pub(crate) fn unlock(&mut self, slot: Slot, lock: Lock) -> Result<()> {
        let code = self.shm_lock(slot, ffi::SQLITE_SHM_UNLOCK | lock.flag())?;
        self.held.retain(|held| *held != (slot, lock));
        self.check("unlock", code)
    }

    fn shm_lock(&mut self, slot: Slot, flags: c_int) -> Result<c_int> {
        let method = self.methods().xShmLock.ok_or_else(|| self.missing("lock"))?;
        // SAFETY: the wal-index is mapped by this connection (it has read), and `file` is open.
        Ok(unsafe { method(self.file.as_ptr(), c_int::from(slot.0), 1, flags) })
    }

    /// Maps a region of the wal-index. Nothing when it does not exist and is not to be made.
    pub(super) fn map(&mut self, region: usize, extend: bool) -> Result<Option<NonNull<u8>>> {
        let method = self.methods().xShmMap.ok_or_else(|| self.missing("map"))?;
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: `pointer` outlives the call, and `file` is open. SQLite unmaps the region when
        // the last connection of the process to this database closes, not before.
        let code = unsafe {
            method(
                self.file.as_ptr(),
                region as c_int,
                REGION_BYTES as c_int,
                c_int::from(extend),
                (&raw mut pointer).cast(),
            )
        };
        self.check("map", code)?;
        Ok(NonNull::new(pointer.cast::<u8>()))
    }
}

impl Lock {
    fn flag(self) -> c_int {
        match self {
            Lock::Shared => ffi::SQLITE_SHM_SHARED,
            Lock::Exclusive => ffi::SQLITE_SHM_EXCLUSIVE,
        }
    }
}

/// The `sqlite3_file` of a connection's main database.
fn main_file(connection: &Connection) -> Option<NonNull<ffi::sqlite3_file>> {
    let mut file: *mut ffi::sqlite3_file = ptr::null_mut();
    // SAFETY: the connection is open, the name is a C string, and FILE_POINTER writes one pointer.
    let code = unsafe {
        ffi::sqlite3_file_control(
            connection.handle(),
            c"main".as_ptr(),
            ffi::SQLITE_FCNTL_FILE_POINTER,
            (&raw mut file).cast(),
        )
    };
    let file = NonNull::new(file).filter(|_| code == ffi::SQLITE_OK)?;
    // SAFETY: SQLite gave the pointer for a connection that is open; an unopened file has no
    // methods.
    let open = unsafe { !(*file.as_ptr()).pMethods.is_null() };
    open.then_some(file)
}

/// Which process holds a lock on any of these bytes, this one included. -1 for a descriptor's lock;
/// this descriptor's own are not seen.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(super) fn lock_holder(file: &std::fs::File, start: u64, length: u64) -> io::Result<Option<i32>> {
    // An open file description's lock has another owner than the process's locks: those are in its
    // way.
    let found = fcntl_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, start, length)?;
    Ok((i32::from(found.l_type) != libc::F_UNLCK).then_some(found.l_pid))
}

/// Whose a lock is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    /// The process's, as SQLite's are: gone when the process closes any descriptor of the file.
    Process,
    /// The descriptor's own: gone when that one is closed. It is in the way of the process's locks,
    /// too.
    Descriptor,
}

/// Tries a lock, or gives one back (`None`); false when another owner is in the way.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
pub(super) fn set_lock(
    file: &std::fs::File,
    owner: Owner,
    exclusive: Option<bool>,
    start: u64,
    length: u64,
) -> io::Result<bool> {
    let kind = match exclusive {
        Some(true) => libc::F_WRLCK,
        Some(false) => libc::F_RDLCK,
        None => libc::F_UNLCK,
    };
    let op = match owner {
        Owner::Process => libc::F_SETLK,
        Owner::Descriptor => libc::F_OFD_SETLK,
    };
    match fcntl_lock(file, op, kind, start, length) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn fcntl_lock(
    file: &std::fs::File,
    op: c_int,
    kind: c_int,
    start: u64,
    length: u64,
) -> io::Result<libc::flock> {
    use std::os::fd::AsRawFd;
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as libc::off_t,
        l_len: length as libc::off_t,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and `lock` is a whole `flock` that outlives the call.
    let code = unsafe { libc::fcntl(file.as_raw_fd(), op, &raw mut lock) };
    if code == -1 { Err(io::Error::last_os_error()) } else { Ok(lock) }
}

/// The extended code of the last call on this connection that failed, or whatever the last one
/// left.
pub(crate) fn last_code(connection: &Connection) -> c_int {
    // SAFETY: the connection is open, and used by this thread alone.
    unsafe { ffi::sqlite3_extended_errcode(connection.handle()) }
}

/// Whether a code says that the database can't be read, rather than that a statement asked for
/// something it can't have.
pub(crate) fn unreadable(code: c_int) -> bool {
    matches!(code & 0xff, ffi::SQLITE_IOERR | ffi::SQLITE_NOTADB | ffi::SQLITE_CORRUPT | ffi::SQLITE_CANTOPEN)
}

/// Commits of one connection to its main database.
#[derive(Debug)]
struct Commits {
    count: AtomicU32,
    /// The frame that the last of them ended with.
    frame: AtomicU32,
    /// What a commit is to come before.
    fence: Arc<Fence>,
}

/// Counts the commits of one connection to its main database by its WAL hook, on whatever thread
/// they are made. Where the fence has a limit, the commit hook refuses those that come after it.
#[derive(Debug)]
pub(crate) struct CommitHook {
    /// Given to SQLite. Freed by `take_off` alone: a borrower of the connection may keep it, and
    /// put another in its place.
    commits: &'static Commits,
    /// Another hook was found where this one should have been. So a connection that is not known
    /// here may have this one.
    strayed: bool,
}

impl CommitHook {
    /// Hooks a connection. Through SQLite itself, because rusqlite's method is another one in each
    /// version.
    pub(crate) fn put_on(connection: &Connection, fence: Arc<Fence>) -> CommitHook {
        let (count, frame) = Default::default();
        let commits = Box::leak(Box::new(Commits { count, frame, fence }));
        let hook = CommitHook { commits, strayed: false };
        hook.swap(connection, true);
        hook
    }

    /// Puts the hook on again, in place of any other. Returns whether it was still there.
    pub(crate) fn again(&mut self, connection: &Connection) -> bool {
        let stayed = self.swap(connection, true);
        self.strayed |= !stayed;
        stayed
    }

    /// Forgets what was counted.
    pub(crate) fn reset(&self) {
        self.commits.count.store(0, Ordering::Relaxed);
    }

    /// How many commits there were since.
    pub(crate) fn count(&self) -> u32 {
        self.commits.count.load(Ordering::Relaxed)
    }

    /// The frame that the last of them ended with.
    pub(crate) fn last(&self) -> Option<u32> {
        (self.count() > 0).then(|| self.commits.frame.load(Ordering::Relaxed))
    }

    /// Takes the hook off a connection that is about to be closed.
    pub(crate) fn take_off(self, connection: &Connection) {
        if self.swap(connection, false) && !self.strayed {
            // SAFETY: it was leaked by `put_on`, no connection has it any more, and it is never
            // used again.
            drop(unsafe { Box::from_raw(ptr::from_ref(self.commits).cast_mut()) });
        }
    }

    /// Whether this hook was the connection's, which has it, or none, now.
    fn swap(&self, connection: &Connection, on: bool) -> bool {
        let context = ptr::from_ref(self.commits).cast_mut().cast::<c_void>();
        if !on || self.commits.fence.until().is_some() {
            let (hook, context) =
                if on { (Some(refuse_late as _), context) } else { (None, ptr::null_mut()) };
            // SAFETY: the connection is open, and the context lives for as long as a connection has
            // it: what `take_off` frees, it has taken off before.
            unsafe { ffi::sqlite3_commit_hook(connection.handle(), hook, context) };
        }
        let (hook, context_then) =
            if on { (Some(count_commit as _), context) } else { (None, ptr::null_mut()) };
        // SAFETY: the connection is open, and the context lives for as long as a connection has it.
        let before = unsafe { ffi::sqlite3_wal_hook(connection.handle(), hook, context_then) };
        before == context
    }
}

/// Not zero: SQLite rolls the transaction back.
unsafe extern "C" fn refuse_late(context: *mut c_void) -> c_int {
    // SAFETY: as for `count_commit`.
    let commits = unsafe { &*context.cast::<Commits>() };
    c_int::from(!commits.fence.is_open())
}

unsafe extern "C" fn count_commit(
    context: *mut c_void,
    _: *mut ffi::sqlite3,
    name: *const c_char,
    frames: c_int,
) -> c_int {
    // SAFETY: SQLite gives the database's name, ended by a zero.
    let name = unsafe { CStr::from_ptr(name) };
    // An attached database has frames of its own.
    if name == c"main" {
        // SAFETY: the context is that of a `CommitHook`, whose `Commits` is freed only when no
        // connection has the hook.
        let commits = unsafe { &*context.cast::<Commits>() };
        commits.frame.store(frames as u32, Ordering::Relaxed);
        commits.count.fetch_add(1, Ordering::Relaxed);
    }
    ffi::SQLITE_OK
}
