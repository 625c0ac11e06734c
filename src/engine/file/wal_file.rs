//! The `-wal` file, read, written and synced by position.
//!
//! SQLite puts no lock on this file. So, unlike the database and the `-shm`, it may have
//! descriptors of ours.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::descriptors::{NodeFile, open_file};
use crate::error::{Error, Result};
use crate::files::{self, Paths, read_exact_at, write_all_at};
use crate::page::PageSize;
use crate::report::Condition;
use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, Salts, frame_bytes, frame_offset};

/// Zeros that one write adds.
const EXTEND_BYTES: usize = 1 << 20;
/// The longest part of a WAL that is made before it is needed.
pub(crate) const EXTEND_MAX_BYTES: u64 = 16 << 20;

/// The WAL file of an open database. No process renames or deletes it while a connection of ours is
/// open.
#[derive(Debug)]
pub(crate) struct WalFile {
    file: NodeFile,
    path: PathBuf,
    /// An fsync failed. The kernel says so once, to one of the threads that sync. A later success
    /// does not bring to the disk what is missing there since then.
    lost: AtomicBool,
    /// Writes of this node. One that ends is one more.
    written: AtomicU64,
    /// How many of them are on the disk.
    synced: AtomicU64,
}

/// What lies after the last commit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Behind {
    /// The end of a commit, which does not follow from what is before it.
    pub(crate) commits: bool,
}

impl WalFile {
    pub(crate) fn open(paths: &Paths) -> Result<WalFile> {
        let path = paths.wal();
        let opened = open_file(|| OpenOptions::new().read(true).write(true).open(&path));
        let file = opened.map_err(Error::io("open", &path))?;
        // What is there was not synced by this node.
        let (lost, written, synced) = (AtomicBool::new(false), AtomicU64::new(1), AtomicU64::new(0));
        Ok(WalFile { file, path, lost, written, synced })
    }

    /// The file itself, whatever is at its path by now.
    pub(in crate::engine) fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file's name durable. SQLite does that with its own first sync of a WAL that it
    /// made. Our syncs are of the content only.
    pub(crate) fn sync_name(&self) -> Result<()> {
        files::sync_name(&self.path)
    }

    pub(crate) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        read_exact_at(&self.file, buffer, offset).map_err(Error::io("read", &self.path))
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = write_all_at(&self.file, bytes, offset).map_err(Error::io("write", &self.path));
        self.written.fetch_add(1, Ordering::SeqCst);
        written
    }

    pub(crate) fn sync(&self) -> Result<()> {
        self.expect_sound()?;
        let written = self.written.load(Ordering::SeqCst);
        self.file.sync_data().map_err(|source| {
            self.lost.store(true, Ordering::Release);
            Error::Io { op: "fsync", path: self.path.clone(), source }
        })?;
        self.synced.fetch_max(written, Ordering::SeqCst);
        Ok(())
    }

    /// The same where no other process or connection has written since the last sync. An fsync
    /// waits for the disk also when there is nothing for it to do.
    pub(crate) fn sync_own(&self) -> Result<()> {
        self.expect_sound()?;
        match self.synced.load(Ordering::SeqCst) < self.written.load(Ordering::SeqCst) {
            true => self.sync(),
            false => Ok(()),
        }
    }

    fn expect_sound(&self) -> Result<()> {
        if self.lost.load(Ordering::Acquire) {
            let source = io::Error::other("an earlier fsync failed, and what it left out is not known");
            return Err(Error::Io { op: "fsync", path: self.path.clone(), source });
        }
        Ok(())
    }

    pub(crate) fn bytes(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(Error::io("stat", &self.path))?.len())
    }

    /// Makes the file at least this long, with zeros. An fsync after a commit has no new length to
    /// record then. The caller holds WRITE: no other process may be writing frames there. Where
    /// there is no room for all of it, it takes none: others need some, too.
    pub(crate) fn extend(&self, bytes: u64) -> Result<()> {
        let before = self.bytes()?;
        self.extend_from(before, bytes).inspect_err(|_| {
            if let Err(error) = self.truncate(before) {
                Condition::WalNotTruncated { error: &error }.say();
            }
        })
    }

    fn extend_from(&self, mut at: u64, bytes: u64) -> Result<()> {
        let zeros = vec![0; EXTEND_BYTES];
        while at < bytes {
            let count = (bytes - at).min(EXTEND_BYTES as u64);
            self.write(&zeros[..count as usize], at)?;
            at += count;
        }
        Ok(())
    }

    /// Whether frames of this generation lie after the last commit, and whether one of them ends a
    /// commit.
    pub(crate) fn behind(&self, last: u32, salts: Salts, size: PageSize) -> Result<Option<Behind>> {
        let bytes = self.bytes()?;
        let mut header = [0; FRAME_HEADER_BYTES];
        let mut found = None;
        for frame in last + 1.. {
            let offset = frame_offset(frame, size);
            if offset + frame_bytes(size) as u64 > bytes {
                break;
            }
            self.read(&mut header, offset)?;
            let head = FrameHeader::parse(&header);
            if head.salts == salts {
                found = Some(Behind { commits: head.commit != 0 });
                if head.commit != 0 {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Cuts off frames of this generation after the last commit, if there are any: what a dead
    /// writer or a power cut left there. Such frames may be whole. They may continue a commit that
    /// the node writes once more, bit for bit, in the place of one that was lost. Then they would
    /// count. The caller holds WRITE.
    pub(crate) fn cut_behind(&self, last: u32, salts: Salts, size: PageSize) -> Result<()> {
        if self.behind(last, salts, size)?.is_some() {
            tracing::info!("frames behind the last commit are cut off the WAL");
            self.truncate(frame_offset(last + 1, size))?;
            return self.sync();
        }
        Ok(())
    }

    pub(crate) fn truncate(&self, bytes: u64) -> Result<()> {
        let cut = self.file.set_len(bytes).map_err(Error::io("truncate", &self.path));
        self.written.fetch_add(1, Ordering::SeqCst);
        cut
    }
}
