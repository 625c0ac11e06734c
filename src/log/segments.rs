//! Files at explicit offsets, and their names.
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files;
use crate::hex::unhex_u64;

/// The file of the segment that begins at an address.
pub(super) fn path(dir: &Path, start: u64) -> PathBuf {
    dir.join(format!("{start:016x}.log"))
}

/// The address in a segment's file name; `None` for other files.
pub(super) fn start_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    unhex_u64(digits).filter(|_| !digits.bytes().any(|b| b.is_ascii_uppercase()))
}

/// Opens a segment to be appended to or cut.
pub(super) fn open_to_write(path: &Path) -> Result<File> {
    files::open_to_write(path).map_err(Error::io("open", path))
}

/// Removes segments that nobody needs. One that can't be removed now goes when the log is next opened.
pub(super) fn remove(paths: &[PathBuf]) {
    for path in paths {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a log segment can't be removed");
            }
            _ => {}
        }
    }
}

/// Makes creations and removals in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    // Elsewhere a directory can't be opened as a file, and its entries are durable with their files.
    if cfg!(unix) {
        // A descriptor that could not be had says nothing of what is on the disk.
        let opened = File::open(dir).map_err(Error::io("open", dir))?;
        opened.sync_all().map_err(Error::io("fsync", dir))?;
    }
    Ok(())
}

/// Whether records must go to make room: a disk, a quota of the system's, the limit of a file's size, or the log's own quota.
pub(crate) fn no_room(error: &Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
}

/// Reads until `buffer` is full or the file ends; says how much there was.
pub(super) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read_some(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

#[cfg(unix)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

#[cfg(unix)]
pub(super) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(super) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match std::os::windows::fs::FileExt::seek_write(file, &bytes[done..], offset + done as u64)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => done += n,
        }
    }
    Ok(())
}
