//! A state on its way in: pages in a file beside the database that, over what is here already, become exact and are verified.
//!
//! `<side>/incoming/pages` holds the pages at their places, `<side>/incoming/state` how far a snapshot has come,
//! `<side>/incoming/held` which pages a comparison brought. Pages may come newer than the position they were read at; the log
//! records that follow are applied to the file until the state that the primary names, and then the checksum decides.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::checksum::{Checksum, PageHash};
use crate::engine::anchor::replace_file;
use crate::engine::append::Appender;
use crate::engine::wal_file::{read_exact_at, sync_directory, write_all_at};
use crate::error::{Error, Result};
use crate::page::{PageNo, PageSet, PageSize};
use crate::txid::Position;
use crate::wal::le_u32;
use crate::wire::{HealBegin, SnapBegin, SnapEnd, TxnBegin, TxnEnd};

const MAGIC: [u8; 8] = *b"repincom";
const HELD_MAGIC: [u8; 8] = *b"repheld1";
const VERSION: u32 = 1;
const STATE_BYTES: usize = 8 + 4 + 4 + 4 + Position::BYTES + 16;
/// Progress is made durable after so many bytes.
const PROGRESS_BYTES: u64 = 64 << 20;
/// Bytes that are read at a time when pages that came earlier are hashed again.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// A state that is being received, over nothing or over the pages of a live database.
#[derive(Debug)]
pub(super) struct Incoming {
    directory: PathBuf,
    file: File,
    /// Notes the pages that the file has, for a comparison that has to be begun again.
    held: Option<File>,
    page_size: PageSize,
    /// The page that the next piece of a snapshot begins with.
    next: u32,
    /// Pages that the file has.
    have: PageSet,
    /// Of the live database, the pages up to this one count where the file has none.
    below: u32,
    /// The sum over the pages that count.
    sum: Checksum,
    since_progress: u64,
    /// The state that the records must reach; known when the pieces are complete.
    end: Option<SnapEnd>,
    /// The position of the last record that was applied to the file.
    position: Position,
    txn: Option<TxnBegin>,
}

/// How far an earlier attempt came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub(super) first: Position,
    pub(super) next: PageNo,
    pub(super) page_size: PageSize,
}

/// A state that is exact and verified.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) directory: PathBuf,
    pub(super) file: File,
    /// The pages that the file has; all others are those of the live database.
    pub(super) have: PageSet,
    pub(super) position: Position,
    pub(super) pages: u32,
    pub(super) page_size: PageSize,
}

/// What lies under the pages that have come: the live database, if there is one.
pub(super) type Under<'a> = Option<&'a mut Appender>;

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

/// Forgets what was begun.
pub(super) fn discard(side: &Path) -> Result<()> {
    let directory = side.join("incoming");
    match fs::remove_dir_all(&directory) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", &directory)(e)),
        _ => Ok(()),
    }
}

impl Incoming {
    fn new(side: &Path, page_size: PageSize, first: Position) -> Result<Incoming> {
        let directory = side.join("incoming");
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        let path = directory.join("pages");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        Ok(Incoming {
            directory,
            file,
            held: None,
            page_size,
            next: 1,
            have: PageSet::default(),
            below: 0,
            sum: Checksum::EMPTY,
            since_progress: 0,
            end: None,
            position: first,
            txn: None,
        })
    }

    /// Begins a snapshot, or goes on with the one that [`progress`] told of.
    pub(super) fn begin(side: &Path, begin: SnapBegin) -> Result<Incoming> {
        let earlier = progress(side)
            .filter(|p| p.first == begin.first && p.next == begin.from && p.page_size == begin.page_size);
        if begin.from != PageNo::FIRST && earlier.is_none() {
            return Err(garbled("a snapshot that goes on with something else than what is here"));
        }
        if earlier.is_none() {
            discard(side)?;
        }
        let mut incoming = Incoming::new(side, begin.page_size, begin.first)?;
        // What lies behind the progress that was made durable may be anything.
        incoming.set_length(begin.from.offset(begin.page_size))?;
        incoming.next = begin.from.get();
        (1..incoming.next).filter_map(PageNo::new).for_each(|page| incoming.have.insert(page));
        incoming.sum = incoming.hash_held()?;
        incoming.save_progress(begin.first)?;
        sync_directory(side)?;
        Ok(incoming)
    }

    /// Begins a heal over a live database of so many pages, whose state is led back by what comes.
    pub(super) fn over(side: &Path, begin: HealBegin, pages: u32) -> Result<Incoming> {
        let held = begin.compare.then(|| read_held(side, begin.page_size)).flatten();
        if held.is_none() {
            discard(side)?;
        }
        let mut incoming = Incoming::new(side, begin.page_size, begin.from)?;
        incoming.below = pages;
        if begin.compare {
            let path = incoming.directory.join("held");
            let file = OpenOptions::new().create(true).append(true).open(&path);
            let mut file = file.map_err(Error::io("open", &path))?;
            match held {
                Some(have) => incoming.have = have,
                None => {
                    let head = [HELD_MAGIC.as_slice(), &begin.page_size.get().to_le_bytes()].concat();
                    file.write_all(&head).map_err(Error::io("write", &path))?;
                }
            }
            incoming.held = Some(file);
        }
        Ok(incoming)
    }

    fn path(&self) -> PathBuf {
        self.directory.join("pages")
    }

    fn set_length(&self, bytes: u64) -> Result<()> {
        self.file.set_len(bytes).map_err(Error::io("truncate", self.path()))
    }

    fn hash_held(&self) -> Result<Checksum> {
        let size = self.page_size.bytes();
        let mut buffer = vec![0; HASH_CHUNK_BYTES.max(size)];
        let (mut sum, mut next) = (Checksum::EMPTY, 1);
        while next < self.next {
            let count = ((self.next - next) as usize).min(buffer.len() / size);
            let bytes = &mut buffer[..count * size];
            let offset = u64::from(next - 1) * size as u64;
            read_exact_at(&self.file, bytes, offset).map_err(Error::io("read", self.path()))?;
            sum = add_pages(sum, next, bytes, self.page_size);
            next += count as u32;
        }
        Ok(sum)
    }

    fn save_progress(&mut self, first: Position) -> Result<()> {
        self.file.sync_data().map_err(Error::io("fsync", self.path()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.page_size.get().to_le_bytes());
        bytes.extend_from_slice(&self.next.to_le_bytes());
        bytes.extend_from_slice(&first.to_bytes());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..16]);
        replace_file(&self.directory, "state", &bytes)?;
        self.since_progress = 0;
        Ok(())
    }

    /// A run of pages of a snapshot, in order.
    pub(super) fn piece(&mut self, first: PageNo, pages: &[u8]) -> Result<()> {
        let count = self.count(first, pages)?;
        if self.end.is_some() || first.get() != self.next {
            return Err(garbled("a snapshot piece out of order"));
        }
        write_all_at(&self.file, pages, first.offset(self.page_size))
            .map_err(Error::io("write", self.path()))?;
        self.sum = add_pages(self.sum, self.next, pages, self.page_size);
        self.next += count;
        (first.get()..self.next).filter_map(PageNo::new).for_each(|page| self.have.insert(page));
        self.since_progress += pages.len() as u64;
        if self.since_progress >= PROGRESS_BYTES {
            // No record was applied yet, so that this is still the position of the first piece.
            self.save_progress(self.position)?;
        }
        Ok(())
    }

    /// A run of pages that a heal asked for.
    pub(super) fn patch(&mut self, first: PageNo, pages: &[u8], live: &mut Appender) -> Result<()> {
        self.count(first, pages)?;
        if self.end.is_some() {
            return Err(garbled("pages behind the end of a heal"));
        }
        for (number, page) in (first.get()..).zip(pages.chunks_exact(self.page_size.bytes())) {
            if let Some(number) = PageNo::new(number).filter(|n| !n.is_lock_page(self.page_size)) {
                self.put(number, PageHash::of(number, page), page, &mut Some(&mut *live))?;
            }
        }
        Ok(())
    }

    fn count(&self, first: PageNo, pages: &[u8]) -> Result<u32> {
        let count = (pages.len() / self.page_size.bytes()) as u32;
        if !pages.len().is_multiple_of(self.page_size.bytes()) || first.get().checked_add(count).is_none() {
            return Err(garbled("a piece of no whole pages, or of too many"));
        }
        Ok(count)
    }

    /// The pieces are complete. True when the state is exact already.
    pub(super) fn end(&mut self, end: SnapEnd, live: Under<'_>) -> Result<bool> {
        if self.end.is_some() || end.exact_at.number() < self.position.number() || end.pages == 0 {
            return Err(garbled("a snapshot ends twice, before its begin, or without pages"));
        }
        if self.below == 0 {
            self.save_progress(self.position)?;
        }
        self.end = Some(end);
        self.exact(live)
    }

    pub(super) fn txn_begin(&mut self, begin: TxnBegin) -> Result<()> {
        if self.end.is_none() || self.txn.is_some() || begin.page_size != self.page_size {
            return Err(garbled("a transaction out of place in a snapshot"));
        }
        if begin.before != self.position {
            return Err(mismatch(self.position, begin.before));
        }
        self.txn = Some(begin);
        Ok(())
    }

    pub(super) fn page(
        &mut self,
        number: PageNo,
        hash: PageHash,
        page: &[u8],
        mut live: Under<'_>,
    ) -> Result<()> {
        if self.txn.is_none() || page.len() != self.page_size.bytes() || number.is_lock_page(self.page_size) {
            return Err(garbled("a page out of place in a snapshot"));
        }
        self.put(number, hash, page, &mut live)
    }

    /// Takes a page in, in the place of the one that counted so far.
    fn put(&mut self, number: PageNo, hash: PageHash, page: &[u8], live: &mut Under<'_>) -> Result<()> {
        if self.counts(number) {
            self.sum = self.sum.without(self.hash(number, live)?);
        }
        write_all_at(&self.file, page, number.offset(self.page_size))
            .map_err(Error::io("write", self.path()))?;
        self.sum = self.sum.with(hash);
        self.have.insert(number);
        if let Some(held) = &mut self.held {
            let path = self.directory.join("held");
            held.write_all(&number.get().to_le_bytes()).map_err(Error::io("write", path))?;
        }
        Ok(())
    }

    fn counts(&self, number: PageNo) -> bool {
        number.get() <= self.below || self.have.contains(number)
    }

    /// The hash of a page that counts.
    fn hash(&self, number: PageNo, live: &mut Under<'_>) -> Result<PageHash> {
        let mut page = vec![0; self.page_size.bytes()];
        if self.have.contains(number) {
            read_exact_at(&self.file, &mut page, number.offset(self.page_size))
                .map_err(Error::io("read", self.path()))?;
        } else if let Some(live) = live {
            live.read_current(number, &mut page)?;
        } else {
            return Err(Error::Stopped(format!("a snapshot does not have its {number:?}")));
        }
        Ok(PageHash::of(number, &page))
    }

    /// A record ends. True when the state has become exact.
    pub(super) fn txn_end(&mut self, end: TxnEnd, mut live: Under<'_>) -> Result<bool> {
        if self.txn.take().is_none() || end.after.number() != self.position.number() + 1 || end.pages == 0 {
            return Err(garbled("a transaction ends out of place in a snapshot"));
        }
        self.drop_above(end.pages, &mut live)?;
        self.position = end.after;
        self.exact(live)
    }

    /// Pages above a size count no longer.
    pub(super) fn drop_above(&mut self, pages: u32, live: &mut Under<'_>) -> Result<()> {
        let first = pages.saturating_add(1);
        let mut next = PageNo::new(first);
        while let Some(number) = next.and_then(|next| self.have.from(next).next()) {
            self.uncount(number, live)?;
            next = number.get().checked_add(1).and_then(PageNo::new);
        }
        for number in (first..=self.below).filter_map(PageNo::new) {
            if !self.have.contains(number) {
                self.uncount(number, live)?;
            }
        }
        self.forget_above(pages)
    }

    fn uncount(&mut self, number: PageNo, live: &mut Under<'_>) -> Result<()> {
        if !number.is_lock_page(self.page_size) {
            self.sum = self.sum.without(self.hash(number, live)?);
        }
        Ok(())
    }

    fn forget_above(&mut self, pages: u32) -> Result<()> {
        self.below = self.below.min(pages);
        self.have.cut_above(pages);
        let bytes = u64::from(pages) * u64::from(self.page_size.get());
        let longer = self.file.metadata().map_err(Error::io("stat", self.path()))?.len() > bytes;
        if longer { self.set_length(bytes) } else { Ok(()) }
    }

    fn exact(&mut self, mut live: Under<'_>) -> Result<bool> {
        let Some(SnapEnd { exact_at: at, pages }) = self.end else { return Ok(false) };
        if self.position.number() < at.number() {
            return Ok(false);
        }
        self.drop_above(pages, &mut live)?;
        if self.position != at || self.sum != at.checksum() {
            return Err(mismatch(at, format!("{} with checksum {}", self.position, self.sum)));
        }
        Ok(true)
    }

    /// Hands the finished state over, synced.
    pub(super) fn finish(self) -> Result<Ready> {
        self.file.sync_all().map_err(Error::io("fsync", self.path()))?;
        Ok(Ready {
            directory: self.directory,
            file: self.file,
            have: self.have,
            position: self.position,
            pages: self.end.map_or(0, |end| end.pages),
            page_size: self.page_size,
        })
    }

    // ---- what a heal compares

    /// The state that the pages below begin with, when it is known: no comparison is made.
    pub(super) fn trust(&mut self, sum: Checksum) {
        self.sum = sum;
    }

    /// Sums the hashes of the pages of a run that count, for the first time.
    pub(super) fn count_in(&mut self, first: PageNo, span: u32, live: &mut Appender) -> Result<Checksum> {
        let mut sum = Checksum::EMPTY;
        for hash in self.hashes(first, span, live)?.into_iter().flatten() {
            sum = sum.with(hash);
            self.sum = self.sum.with(hash);
        }
        Ok(sum)
    }

    /// Nothing above what was summed is anywhere on the primary.
    pub(super) fn count_no_more(&mut self, summed: u32) -> Result<()> {
        self.forget_above(summed)
    }

    /// The hash of each page of a run; none for those that do not count.
    pub(super) fn hashes(
        &self,
        first: PageNo,
        count: u32,
        live: &mut Appender,
    ) -> Result<Vec<Option<PageHash>>> {
        let size = self.page_size.bytes();
        let below = self.below.saturating_add(1).saturating_sub(first.get()).min(count);
        let mut run = vec![0; below as usize * size];
        live.read_run(first, &mut run)?;
        let mut pages = run.chunks_exact(size);
        let numbers = (first.get()..first.get().saturating_add(count)).filter_map(PageNo::new);
        numbers
            .map(|number| {
                let page = pages.next();
                if number.is_lock_page(self.page_size) {
                    return Ok(None);
                }
                match page {
                    _ if self.have.contains(number) => self.hash(number, &mut None).map(Some),
                    Some(page) => Ok(Some(PageHash::of(number, page))),
                    None => Ok(None),
                }
            })
            .collect()
    }
}

/// The pages that an earlier comparison brought, if they are of this size.
fn read_held(side: &Path, page_size: PageSize) -> Option<PageSet> {
    let directory = side.join("incoming");
    let there = fs::metadata(directory.join("pages")).ok()?.len() / u64::from(page_size.get());
    let mut bytes = Vec::new();
    // A number may stand there more than once; a file that was not written by us is not read to its end.
    let most = 12 + 4 * there.saturating_mul(16);
    File::open(directory.join("held")).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    let numbers = bytes.strip_prefix(HELD_MAGIC.as_slice())?.strip_prefix(&page_size.get().to_le_bytes())?;
    let mut have = PageSet::default();
    let numbers = numbers.chunks_exact(4).filter_map(|n| PageNo::new(le_u32(n)));
    // What such a page holds is compared like any other.
    numbers.filter(|n| u64::from(n.get()) <= there).for_each(|n| have.insert(n));
    Some(have)
}

impl Ready {
    /// One page of the verified state that the file has.
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
