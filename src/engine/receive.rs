//! A snapshot on its way in: a file beside the database that becomes exact, is verified, and then replaces it.
//!
//! `<side>/incoming/pages` holds the pages at their places, `<side>/incoming/state` how far it has come. Pages may
//! come newer than the position they were read at; the log records that follow the pieces are applied to
//! the file until the state that the last piece names, and then the checksum decides.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use crate::checksum::{Checksum, PageHash};
use crate::engine::anchor::replace_file;
use crate::engine::wal_file::{read_exact_at, sync_directory, write_all_at};
use crate::error::{Error, Result};
use crate::page::{PageNo, PageSize};
use crate::txid::Position;
use crate::wal::le_u32;
use crate::wire::{SnapBegin, SnapEnd, TxnBegin, TxnEnd};

const MAGIC: [u8; 8] = *b"repincom";
const VERSION: u32 = 1;
const STATE_BYTES: usize = 8 + 4 + 4 + 4 + Position::BYTES + 16;
/// Progress is made durable after so many bytes.
const PROGRESS_BYTES: u64 = 64 << 20;
/// Bytes that are read at a time when pages that came earlier are hashed again.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// A snapshot that is being received.
#[derive(Debug)]
pub(super) struct Incoming {
    directory: PathBuf,
    file: File,
    first: Position,
    page_size: PageSize,
    /// The page that the next piece begins with.
    next: u32,
    /// Pages that the file has.
    held: u32,
    /// The sum over the pages that the file has.
    sum: Checksum,
    since_progress: u64,
    /// The state that the records must reach; known when the pieces are complete.
    exact_at: Option<Position>,
    /// The position of the last record that was applied to the file.
    position: Position,
    txn: Option<TxnBegin>,
    pub(super) diverged: bool,
}

/// How far an earlier attempt came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) first: Position,
    pub(super) next: PageNo,
    pub(super) page_size: PageSize,
}

/// A snapshot that is exact and verified.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) directory: PathBuf,
    pub(super) file: File,
    pub(super) position: Position,
    pub(super) pages: u32,
    pub(super) page_size: PageSize,
    pub(super) diverged: bool,
}

/// What an earlier attempt left, if it can be gone on with.
pub(super) fn progress(side: &Path) -> Option<Progress> {
    let bytes = fs::read(side.join("incoming").join("state")).ok()?;
    let bytes: [u8; STATE_BYTES] = bytes.try_into().ok()?;
    let (body, check) = bytes.split_last_chunk::<16>()?;
    if blake3::hash(body).as_bytes()[..16] != *check || body[..8] != MAGIC || le_u32(&body[8..]) != VERSION {
        return None;
    }
    let page_size = PageSize::new(le_u32(&body[12..])).ok()?;
    let next = PageNo::new(le_u32(&body[16..]))?;
    let first = Position::from_bytes(body[20..].try_into().ok()?);
    let there = fs::metadata(side.join("incoming").join("pages")).ok()?.len();
    (there >= next.offset(page_size)).then_some(Progress { first, next, page_size })
}

/// Forgets a snapshot that was begun.
pub(super) fn discard(side: &Path) -> Result<()> {
    let directory = side.join("incoming");
    match fs::remove_dir_all(&directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &directory)(e)),
        _ => Ok(()),
    }
}

impl Incoming {
    /// Begins a snapshot, or goes on with the one that [`progress`] told of.
    pub(super) fn begin(side: &Path, begin: SnapBegin) -> Result<Incoming> {
        let directory = side.join("incoming");
        let earlier = progress(side)
            .filter(|p| p.first == begin.first && p.next == begin.from && p.page_size == begin.page_size);
        if begin.from != PageNo::FIRST && earlier.is_none() {
            return Err(garbled("a snapshot that goes on with something else than what is here"));
        }
        if earlier.is_none() {
            discard(side)?;
        }
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        let path = directory.join("pages");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        // What lies behind the progress that was made durable may be anything.
        file.set_len(begin.from.offset(begin.page_size)).map_err(Error::io("truncate", &path))?;
        let mut incoming = Incoming {
            directory,
            file,
            first: begin.first,
            page_size: begin.page_size,
            next: begin.from.get(),
            held: begin.from.get() - 1,
            sum: Checksum::EMPTY,
            since_progress: 0,
            exact_at: None,
            position: begin.first,
            txn: None,
            diverged: begin.diverged,
        };
        incoming.sum = incoming.hash_held()?;
        incoming.save_progress()?;
        sync_directory(side)?;
        Ok(incoming)
    }

    fn path(&self) -> PathBuf {
        self.directory.join("pages")
    }

    fn hash_held(&self) -> Result<Checksum> {
        let size = self.page_size.bytes();
        let mut buffer = vec![0; HASH_CHUNK_BYTES.max(size)];
        let (mut sum, mut next) = (Checksum::EMPTY, 1);
        while next <= self.held {
            let count = ((self.held - next + 1) as usize).min(buffer.len() / size);
            let bytes = &mut buffer[..count * size];
            let offset = u64::from(next - 1) * size as u64;
            read_exact_at(&self.file, bytes, offset).map_err(Error::io("read", self.path()))?;
            sum = add_pages(sum, next, bytes, self.page_size);
            next += count as u32;
        }
        Ok(sum)
    }

    fn save_progress(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("fsync", self.path()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.page_size.get().to_le_bytes());
        bytes.extend_from_slice(&self.next.to_le_bytes());
        bytes.extend_from_slice(&self.first.to_bytes());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..16]);
        replace_file(&self.directory, "state", &bytes)?;
        self.since_progress = 0;
        Ok(())
    }

    /// A run of pages, in order.
    pub(super) fn piece(&mut self, first: PageNo, pages: &[u8]) -> Result<()> {
        let count = (pages.len() / self.page_size.bytes()) as u32;
        if self.exact_at.is_some()
            || first.get() != self.next
            || !pages.len().is_multiple_of(self.page_size.bytes())
        {
            return Err(garbled("a snapshot piece out of order"));
        }
        let Some(next) = self.next.checked_add(count) else {
            return Err(garbled("a snapshot of too many pages"));
        };
        write_all_at(&self.file, pages, first.offset(self.page_size))
            .map_err(Error::io("write", self.path()))?;
        self.sum = add_pages(self.sum, self.next, pages, self.page_size);
        self.next = next;
        self.held = next - 1;
        self.since_progress += pages.len() as u64;
        if self.since_progress >= PROGRESS_BYTES {
            self.save_progress()?;
        }
        Ok(())
    }

    /// The pieces are complete. True when the snapshot is exact already.
    pub(super) fn end(&mut self, end: SnapEnd) -> Result<bool> {
        if self.exact_at.is_some() || end.exact_at.number() < self.first.number() {
            return Err(garbled("a snapshot ends twice, or before its begin"));
        }
        self.exact_at = Some(end.exact_at);
        self.save_progress()?;
        self.exact()
    }

    pub(super) fn txn_begin(&mut self, begin: TxnBegin) -> Result<()> {
        if self.exact_at.is_none() || self.txn.is_some() || begin.page_size != self.page_size {
            return Err(garbled("a transaction out of place in a snapshot"));
        }
        if begin.before != self.position {
            return Err(mismatch(self.position, begin.before));
        }
        self.txn = Some(begin);
        Ok(())
    }

    pub(super) fn page(&mut self, number: PageNo, hash: PageHash, page: &[u8]) -> Result<()> {
        if self.txn.is_none() || page.len() != self.page_size.bytes() || number.is_lock_page(self.page_size) {
            return Err(garbled("a page out of place in a snapshot"));
        }
        if number.get() <= self.held {
            self.sum = self.sum.without(self.held_hash(number)?);
        } else {
            // Pages between are on their way in the same transaction; until then they are zeros.
            for between in (self.held + 1..number.get()).filter_map(PageNo::new) {
                if !between.is_lock_page(self.page_size) {
                    let zeros = vec![0; self.page_size.bytes()];
                    write_all_at(&self.file, &zeros, between.offset(self.page_size))
                        .map_err(Error::io("write", self.path()))?;
                    self.sum = self.sum.with(PageHash::of(between, &zeros));
                }
            }
            self.held = number.get();
        }
        write_all_at(&self.file, page, number.offset(self.page_size))
            .map_err(Error::io("write", self.path()))?;
        self.sum = self.sum.with(hash);
        Ok(())
    }

    fn held_hash(&self, number: PageNo) -> Result<PageHash> {
        let mut page = vec![0; self.page_size.bytes()];
        read_exact_at(&self.file, &mut page, number.offset(self.page_size))
            .map_err(Error::io("read", self.path()))?;
        Ok(PageHash::of(number, &page))
    }

    /// A record ends. True when the snapshot has become exact.
    pub(super) fn txn_end(&mut self, end: TxnEnd) -> Result<bool> {
        if self.txn.take().is_none() || end.after.number() != self.position.number() + 1 {
            return Err(garbled("a transaction ends out of place in a snapshot"));
        }
        if end.pages > self.held {
            return Err(garbled("a transaction without all of its pages"));
        }
        for number in (end.pages + 1..=self.held).filter_map(PageNo::new) {
            if !number.is_lock_page(self.page_size) {
                self.sum = self.sum.without(self.held_hash(number)?);
            }
        }
        if end.pages < self.held {
            self.held = end.pages;
            let bytes = u64::from(end.pages) * u64::from(self.page_size.get());
            self.file.set_len(bytes).map_err(Error::io("truncate", self.path()))?;
        }
        self.position = end.after;
        self.exact()
    }

    fn exact(&self) -> Result<bool> {
        match self.exact_at {
            Some(at) if self.position.number() < at.number() => Ok(false),
            Some(at) if self.position != at || self.sum != at.checksum() => {
                Err(mismatch(at, format!("{} with checksum {}", self.position, self.sum)))
            }
            Some(_) => Ok(true),
            None => Ok(false),
        }
    }

    /// Hands the finished file over, synced.
    pub(super) fn finish(self) -> Result<Ready> {
        self.file.sync_all().map_err(Error::io("fsync", self.path()))?;
        Ok(Ready {
            directory: self.directory,
            file: self.file,
            position: self.position,
            pages: self.held,
            page_size: self.page_size,
            diverged: self.diverged,
        })
    }
}

impl Ready {
    /// One page of the verified state.
    pub(super) fn read(&self, number: PageNo, buffer: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, buffer, number.offset(self.page_size))
            .map_err(Error::io("read", self.directory.join("pages")))
    }
}

fn add_pages(mut sum: Checksum, first: u32, pages: &[u8], size: PageSize) -> Checksum {
    for (number, page) in (first..).zip(pages.chunks_exact(size.bytes())) {
        if let Some(number) = PageNo::new(number).filter(|n| !n.is_lock_page(size)) {
            sum = sum.with(PageHash::of(number, page));
        }
    }
    sum
}

fn garbled(what: &str) -> Error {
    Error::garbled("the primary", what)
}

fn mismatch(expected: impl ToString, found: impl ToString) -> Error {
    Error::Mismatch { expected: expected.to_string(), found: found.to_string() }
}
