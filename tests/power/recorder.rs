//! Preloaded into a process, it stands before the C library's file functions, and appends each change that is made
//! below one directory to a trace, in the order in which the changes were made, also by several processes.
//!
//! `POWER_WATCH` names the directory, `POWER_TRACE` the trace. `POWER_FULL=<from>:<count>` makes that many calls
//! that need room fail for want of it, from the given one on, counted from 1; of the first one half is written.
//!
//! A file is known by its inode number: that can't go to another file while anybody has it open, and the trace tells of
//! each file that is made. An fsync is two records, so that what was written while it was under way does not count as
//! synced. All own input and output is by system calls, so that it does not come by here again.

use std::ffi::{CStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libc::{c_char, c_int, c_long, c_uint, c_void, iovec, mode_t, off64_t, size_t, ssize_t};

const CREATE: u8 = 1;
const LENGTH: u8 = 2;
const WRITE: u8 = 3;
const SYNC: u8 = 4;
const SYNCED: u8 = 5;
const RENAME: u8 = 6;
const UNLINK: u8 = 7;
const MKDIR: u8 = 8;
const RMDIR: u8 = 9;

/// Longest path that is looked at.
const PATH_MAX: usize = 4096;

struct Recorder {
    /// Ends with a slash.
    watch: Vec<u8>,
    trace: c_int,
    full_from: u64,
    full_count: u64,
    /// Times can't be set, as of a file that is somebody else's.
    no_times: bool,
}

static RECORDER: OnceLock<Option<Recorder>> = OnceLock::new();
static ONE: Mutex<()> = Mutex::new(());
/// Calls that need room.
static ROOM: AtomicU64 = AtomicU64::new(0);
static SYNCS: AtomicU64 = AtomicU64::new(0);

fn recorder() -> Option<&'static Recorder> {
    RECORDER.get_or_init(begin).as_ref()
}

fn begin() -> Option<Recorder> {
    let bytes = |name: &str| std::env::var_os(name).map(OsString::into_vec);
    let (mut watch, mut trace) = (bytes("POWER_WATCH")?, bytes("POWER_TRACE")?);
    watch.push(b'/');
    trace.push(0);
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
    // SAFETY: the path ends with a zero and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, trace.as_ptr(), flags, 0o600) };
    let full = std::env::var("POWER_FULL").ok();
    let (from, count) = full.as_deref().and_then(|f| f.split_once(':')).unwrap_or(("0", "0"));
    Some(Recorder {
        watch,
        trace: fd as c_int,
        full_from: from.parse().unwrap_or(0),
        full_count: count.parse().unwrap_or(0),
        no_times: std::env::var_os("POWER_NO_TIMES").is_some(),
    })
}

/// Held over a change and its record.
struct Turn {
    trace: c_int,
    _one: MutexGuard<'static, ()>,
}

impl Turn {
    fn take(recorder: &Recorder) -> Turn {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a call with plain numbers. Other processes have openings of their own, which it excludes.
        unsafe { libc::syscall(libc::SYS_flock, recorder.trace, libc::LOCK_EX) };
        Turn { trace: recorder.trace, _one: one }
    }

    fn note(&self, kind: u8, inode: u64, numbers: [u64; 2], paths: [&[u8]; 2], data: &[u8]) {
        let mut record = vec![0; 4];
        record.push(kind);
        record.extend_from_slice(&inode.to_le_bytes());
        record.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        record.extend(paths.iter().flat_map(|p| (p.len() as u16).to_le_bytes()));
        paths.iter().for_each(|p| record.extend_from_slice(p));
        record.extend_from_slice(data);
        let length = record.len() as u32;
        record[..4].copy_from_slice(&length.to_le_bytes());
        let mut rest = &record[..];
        while !rest.is_empty() {
            // SAFETY: `rest` is readable for its length.
            let done = unsafe { libc::syscall(libc::SYS_write, self.trace, rest.as_ptr(), rest.len()) };
            assert!(done > 0, "the trace can't be written");
            rest = &rest[done as usize..];
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // SAFETY: a call with plain numbers.
        unsafe { libc::syscall(libc::SYS_flock, self.trace, libc::LOCK_UN) };
    }
}

/// Whether a path is one that is recorded. The wal-index is memory, and never outlives the machine.
fn watched(recorder: &Recorder, path: &[u8]) -> bool {
    path.starts_with(&recorder.watch) && !path.ends_with(b"-shm")
}

fn stat(fd: c_int) -> Option<libc::stat64> {
    // SAFETY: zeros are a valid value of this plain struct.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` outlives the call.
    (unsafe { libc::fstat64(fd, &mut stat) } == 0).then_some(stat)
}

/// The path behind a descriptor.
fn path_of(fd: c_int) -> Option<Vec<u8>> {
    let link = format!("/proc/self/fd/{fd}\0");
    let mut path = vec![0; PATH_MAX];
    // SAFETY: `link` ends with a zero, and `path` has room for `PATH_MAX` bytes.
    let length = unsafe { libc::readlink(link.as_ptr().cast(), path.as_mut_ptr().cast(), PATH_MAX) };
    path.truncate(usize::try_from(length).ok()?);
    if let Some(alive) = path.strip_suffix(b" (deleted)") {
        path = alive.to_vec();
    }
    Some(path)
}

/// A descriptor's file, if it is recorded.
fn file(fd: c_int) -> Option<(&'static Recorder, Vec<u8>, libc::stat64)> {
    let recorder = recorder()?;
    let stat = stat(fd)?;
    if !matches!(stat.st_mode & libc::S_IFMT, libc::S_IFREG | libc::S_IFDIR) {
        return None;
    }
    let path = path_of(fd)?;
    // The directory itself may be synced, too.
    (watched(recorder, &path) || path == recorder.watch[..recorder.watch.len() - 1])
        .then_some((recorder, path, stat))
}

/// A path that a call was given, relative to a descriptor or not, if it is recorded.
fn named(directory: c_int, path: *const c_char) -> Option<(&'static Recorder, Vec<u8>)> {
    let recorder = recorder()?;
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller passes a path that ends with a zero, as the function that it called demands.
    let given = unsafe { CStr::from_ptr(path) }.to_bytes();
    let whole = if given.first() == Some(&b'/') {
        given.to_vec()
    } else if directory == libc::AT_FDCWD {
        return None;
    } else {
        [&path_of(directory)?, &b"/"[..], given].concat()
    };
    watched(recorder, &whole).then_some((recorder, whole))
}

fn modified(stat: &libc::stat64) -> u64 {
    (stat.st_mtime as u64) * 1_000_000_000 + stat.st_mtime_nsec as u64
}

fn fail(code: c_int) -> c_int {
    // SAFETY: the pointer is to this thread's own number.
    unsafe { *libc::__errno_location() = code };
    -1
}

/// Whether there is room for this call: `None`, or that it is the first for which there is none.
fn no_room(recorder: &Recorder, path: &[u8]) -> Option<bool> {
    if path.ends_with(b"/acks") {
        return None;
    }
    let call = ROOM.fetch_add(1, Ordering::Relaxed) + 1;
    let wanting = recorder.full_from..recorder.full_from.saturating_add(recorder.full_count);
    wanting.contains(&call).then_some(call == recorder.full_from)
}

fn open_at(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    let open = || {
        // SAFETY: the arguments are those of the caller, who calls `openat` or what amounts to it.
        (unsafe { libc::syscall(libc::SYS_openat, directory, path, flags | libc::O_LARGEFILE, mode) })
            as c_int
    };
    let changes = flags & (libc::O_CREAT | libc::O_TRUNC) != 0 && flags & libc::O_TMPFILE != libc::O_TMPFILE;
    let Some((recorder, name)) = (if changes { named(directory, path) } else { None }) else { return open() };
    let turn = Turn::take(recorder);
    // SAFETY: the path is the caller's.
    let there = unsafe { libc::faccessat(directory, path, libc::F_OK, 0) } == 0;
    if !there && flags & libc::O_CREAT != 0 && no_room(recorder, &name).is_some() {
        return fail(libc::ENOSPC);
    }
    let fd = open();
    if fd >= 0
        && let Some(stat) = stat(fd)
    {
        if !there {
            turn.note(CREATE, stat.st_ino, [0, modified(&stat)], [&name, b""], b"");
        } else if flags & libc::O_TRUNC != 0 {
            turn.note(LENGTH, stat.st_ino, [0, modified(&stat)], [&name, b""], b"");
        }
    }
    fd
}

/// Opens a file.
///
/// # Safety
/// As the C library's function of this name, which takes the mode only when it needs one: on Linux a variable argument
/// is passed like any other, and one that was not passed is not looked at.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// As `open`.
///
/// # Safety
/// As `open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(libc::AT_FDCWD, path, flags, mode)
}

/// As `open`.
///
/// # Safety
/// As `open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    open_at(directory, path, flags, mode)
}

/// As `open`.
///
/// # Safety
/// As `open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    open_at(directory, path, flags, mode)
}

/// Writes at an offset, or where the descriptor stands.
fn write_at(fd: c_int, data: *const c_void, length: size_t, offset: Option<off64_t>) -> ssize_t {
    let put = |length: size_t| {
        // SAFETY: the arguments are those of the caller, who calls `write` or `pwrite`; a shorter length is as good.
        (unsafe {
            match offset {
                Some(offset) => libc::syscall(libc::SYS_pwrite64, fd, data, length, offset),
                None => libc::syscall(libc::SYS_write, fd, data, length),
            }
        }) as ssize_t
    };
    let Some((recorder, path, before)) = file(fd) else { return put(length) };
    let turn = Turn::take(recorder);
    let mut most = length;
    match no_room(recorder, &path) {
        None => {}
        Some(true) if length > 1 => most = length / 2,
        Some(_) => return fail(libc::ENOSPC) as ssize_t,
    }
    let at = offset.unwrap_or_else(|| {
        // SAFETY: calls with plain numbers.
        unsafe {
            if libc::syscall(libc::SYS_fcntl, fd, libc::F_GETFL) as c_int & libc::O_APPEND != 0 {
                stat(fd).map_or(0, |s| s.st_size)
            } else {
                libc::lseek64(fd, 0, libc::SEEK_CUR)
            }
        }
    });
    let done = put(most);
    if done > 0 {
        // SAFETY: the caller's data is readable for the length that was written from it.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), done as usize) };
        let time = stat(fd).map_or(0, |s| modified(&s));
        turn.note(WRITE, before.st_ino, [at as u64, time], [&path, b""], bytes);
    }
    done
}

/// Writes.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, data: *const c_void, length: size_t) -> ssize_t {
    write_at(fd, data, length, None)
}

/// Writes at an offset.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(fd: c_int, data: *const c_void, length: size_t, offset: off64_t) -> ssize_t {
    write_at(fd, data, length, Some(offset))
}

/// Writes at an offset.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(
    fd: c_int,
    data: *const c_void,
    length: size_t,
    offset: off64_t,
) -> ssize_t {
    write_at(fd, data, length, Some(offset))
}

fn write_parts(fd: c_int, parts: *const iovec, count: c_int, offset: Option<off64_t>) -> ssize_t {
    let mut total = 0;
    for at in 0..count.max(0) as usize {
        // SAFETY: the caller passes `count` parts.
        let part = unsafe { &*parts.add(at) };
        if part.iov_len == 0 {
            continue;
        }
        let done = write_at(fd, part.iov_base, part.iov_len, offset.map(|o| o + total as off64_t));
        if done < 0 {
            return if total > 0 { total } else { done };
        }
        total += done;
        if (done as usize) < part.iov_len {
            break;
        }
    }
    total
}

/// Writes several parts.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    if file(fd).is_none() {
        // SAFETY: the arguments are those of the caller.
        return (unsafe { libc::syscall(libc::SYS_writev, fd, parts, count) }) as ssize_t;
    }
    write_parts(fd, parts, count, None)
}

/// Writes several parts at an offset.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t) -> ssize_t {
    write_parts(fd, parts, count, Some(offset))
}

/// Writes several parts at an offset.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwritev64(fd: c_int, parts: *const iovec, count: c_int, offset: off64_t) -> ssize_t {
    write_parts(fd, parts, count, Some(offset))
}

fn set_length(fd: c_int, length: off64_t) -> c_int {
    // SAFETY: a call with plain numbers.
    let set = || (unsafe { libc::syscall(libc::SYS_ftruncate, fd, length) }) as c_int;
    let Some((recorder, path, before)) = file(fd) else { return set() };
    let turn = Turn::take(recorder);
    if length > before.st_size && no_room(recorder, &path).is_some() {
        return fail(libc::ENOSPC);
    }
    let done = set();
    if done == 0 {
        let time = stat(fd).map_or(0, |s| modified(&s));
        turn.note(LENGTH, before.st_ino, [length as u64, time], [&path, b""], b"");
    }
    done
}

/// Sets a file's length.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off64_t) -> c_int {
    set_length(fd, length)
}

/// Sets a file's length.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off64_t) -> c_int {
    set_length(fd, length)
}

/// Sets a file's times: noted as a write of nothing.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn utimensat(
    directory: c_int,
    path: *const c_char,
    times: *const libc::timespec,
    flags: c_int,
) -> c_int {
    // SAFETY: the arguments are those of the caller.
    let set = || (unsafe { libc::syscall(libc::SYS_utimensat, directory, path, times, flags) }) as c_int;
    let Some((recorder, name)) = named(directory, path) else { return set() };
    if recorder.no_times {
        return fail(libc::EPERM);
    }
    let turn = Turn::take(recorder);
    let done = set();
    if done == 0 {
        // SAFETY: zeros are a `stat64`, and the path is the caller's.
        let stat = unsafe {
            let mut stat: libc::stat64 = std::mem::zeroed();
            (libc::fstatat64(directory, path, &raw mut stat, 0) == 0).then_some(stat)
        };
        if let Some(stat) = stat {
            turn.note(WRITE, stat.st_ino, [0, modified(&stat)], [&name, b""], b"");
        }
    }
    done
}

/// Sets an open file's times: noted as a write of nothing.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn futimens(fd: c_int, times: *const libc::timespec) -> c_int {
    let none = std::ptr::null::<c_char>();
    // SAFETY: the arguments are those of the caller; without a path the call is about the descriptor.
    let set = || (unsafe { libc::syscall(libc::SYS_utimensat, fd, none, times, 0) }) as c_int;
    let Some((recorder, path, _)) = file(fd) else { return set() };
    if recorder.no_times {
        return fail(libc::EPERM);
    }
    let turn = Turn::take(recorder);
    let done = set();
    if done == 0
        && let Some(stat) = stat(fd)
    {
        turn.note(WRITE, stat.st_ino, [0, modified(&stat)], [&path, b""], b"");
    }
    done
}

fn sync(fd: c_int, call: c_long, data_only: u64) -> c_int {
    // SAFETY: a call with plain numbers.
    let real = || (unsafe { libc::syscall(call, fd) }) as c_int;
    let Some((recorder, path, stat)) = file(fd) else { return real() };
    // SAFETY: a call without arguments.
    let id = (unsafe { libc::getpid() } as u64) << 32 | SYNCS.fetch_add(1, Ordering::Relaxed);
    Turn::take(recorder).note(SYNC, stat.st_ino, [id, data_only], [&path, b""], b"");
    let done = real();
    if done == 0 {
        Turn::take(recorder).note(SYNCED, stat.st_ino, [id, data_only], [&path, b""], b"");
    }
    done
}

/// Syncs a file.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fsync, 0)
}

/// Syncs a file's data.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    sync(fd, libc::SYS_fdatasync, 1)
}

/// Renames.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    let here = libc::AT_FDCWD;
    // SAFETY: the paths are the caller's.
    let real = || (unsafe { libc::syscall(libc::SYS_renameat2, here, from, here, to, 0) }) as c_int;
    let (Some((recorder, old)), Some((_, new))) = (named(here, from), named(here, to)) else { return real() };
    let turn = Turn::take(recorder);
    if no_room(recorder, &new).is_some() {
        return fail(libc::ENOSPC);
    }
    let done = real();
    if done == 0 {
        turn.note(RENAME, 0, [0, 0], [&old, &new], b"");
    }
    done
}

fn remove_at(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the path is the caller's.
    let real = || (unsafe { libc::syscall(libc::SYS_unlinkat, directory, path, flags) }) as c_int;
    let Some((recorder, name)) = named(directory, path) else { return real() };
    let turn = Turn::take(recorder);
    let done = real();
    if done == 0 {
        let kind = if flags & libc::AT_REMOVEDIR == 0 { UNLINK } else { RMDIR };
        turn.note(kind, 0, [0, 0], [&name, b""], b"");
    }
    done
}

/// Removes a file.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    remove_at(libc::AT_FDCWD, path, 0)
}

/// Removes a file or a directory.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    remove_at(directory, path, flags)
}

/// Removes a directory.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    remove_at(libc::AT_FDCWD, path, libc::AT_REMOVEDIR)
}

/// Makes a directory.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the path is the caller's.
    let real = || (unsafe { libc::syscall(libc::SYS_mkdirat, libc::AT_FDCWD, path, mode) }) as c_int;
    let Some((recorder, name)) = named(libc::AT_FDCWD, path) else { return real() };
    let turn = Turn::take(recorder);
    if no_room(recorder, &name).is_some() {
        return fail(libc::ENOSPC);
    }
    let done = real();
    if done == 0 {
        turn.note(MKDIR, 0, [0, 0], [&name, b""], b"");
    }
    done
}

/// Room in advance: refused, so that the caller writes instead.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: off64_t, length: off64_t) -> c_int {
    if file(fd).is_some() {
        return fail(libc::EOPNOTSUPP);
    }
    // SAFETY: a call with plain numbers.
    (unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, length) }) as c_int
}

/// A copy by the kernel: refused, so that the caller reads and writes instead.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut off64_t,
    to: c_int,
    to_at: *mut off64_t,
    length: size_t,
    flags: c_uint,
) -> ssize_t {
    if file(to).is_some() {
        return fail(libc::ENOSYS) as ssize_t;
    }
    // SAFETY: the arguments are those of the caller.
    (unsafe { libc::syscall(libc::SYS_copy_file_range, from, from_at, to, to_at, length, flags) }) as ssize_t
}

/// The same.
///
/// # Safety
/// As the C library's function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile64(
    to: c_int,
    from: c_int,
    from_at: *mut off64_t,
    length: size_t,
) -> ssize_t {
    if file(to).is_some() {
        return fail(libc::ENOSYS) as ssize_t;
    }
    // SAFETY: the arguments are those of the caller.
    (unsafe { libc::syscall(libc::SYS_sendfile, to, from, from_at, length) }) as ssize_t
}
