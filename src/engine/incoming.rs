//! A state on its way in: pages in a file beside the database that, over what is here already, become exact and are verified.
//!
//! `<side>/incoming/pages` holds the pages at their places, `<side>/incoming/state` how far a snapshot has come,
//! `<side>/incoming/held` which pages a comparison has. A snapshot that can't be gone on with, because the primary's log does not reach back to its begin any more,
//! becomes a comparison over what came of it. IncomingPages may come newer than the position they were read at; the log
//! records that follow are applied to the file until the state that the primary names, and then the checksum decides.

pub(in crate::engine) mod heal;
pub(in crate::engine) mod overlay;

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::checksum::PageHash;
use crate::engine::history::intake_error::IntakeError;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::overlay::{Overlay, Store};
use crate::error::{Error, Result};
use crate::files::{self, read_exact_at, replace_file, sync_directory, write_all_at};
use crate::page::{PageNo, PageSet, PageSize};
use crate::txid::Position;
use crate::wal::le_u32;
use crate::wire::{HealBegin, SnapBegin, SnapEnd, TxnBegin, TxnEnd};

const MAGIC: [u8; 8] = *b"repincom";
const HELD_MAGIC: [u8; 8] = *b"repheld2";
const HELD_HEAD_BYTES: usize = 8 + 4 + 4;
const VERSION: u32 = 1;
const STATE_BYTES: usize = 8 + 4 + 4 + 4 + Position::BYTES + 16;
/// FillProgress is made durable after so many bytes, or after so long.
const PROGRESS_BYTES: u64 = 64 << 20;
const PROGRESS_EVERY: Duration = Duration::from_secs(5);
/// Bytes that are read at a time when pages that came earlier are hashed again.
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// A state that is being received, over nothing or over the pages of a live database.
#[derive(Debug)]
pub(in crate::engine) struct IncomingState {
    directory: PathBuf,
    file: File,
    /// Notes the pages that the file has, for a comparison that has to be begun again.
    held: Option<File>,
    /// The page that the next piece of a snapshot begins with.
    next: u32,
    since_progress: u64,
    last_progress: Instant,
    overlay: Overlay,
}

/// How far an earlier attempt came.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct FillProgress {
    pub(in crate::engine) first: Position,
    pub(in crate::engine) next: PageNo,
    pub(in crate::engine) page_size: PageSize,
}

/// A state that is exact and verified.
#[derive(Debug)]
pub(in crate::engine) struct Ready {
    pub(in crate::engine) directory: PathBuf,
    pub(in crate::engine) file: File,
    /// The pages that the file has; all others are those of the live database.
    pub(in crate::engine) have: PageSet,
    pub(in crate::engine) position: Position,
    pub(in crate::engine) pages: u32,
    pub(in crate::engine) page_size: PageSize,
}

/// What lies under the pages that have come: the live database, if there is one.
pub(in crate::engine) type Under<'a> = Option<&'a mut WalAppender>;

/// What an earlier attempt left, if it can be gone on with.
///
/// A file of a newer version is no error, unlike those of the other side files: there is nothing here that the primary
/// does not have, so that who can't read it begins anew.
pub(in crate::engine) fn progress(side: &Path) -> Option<FillProgress> {
    let mut bytes = Vec::new();
    // One byte more than there should be is enough to see that it is none of ours.
    let file = files::open(&side.join("incoming").join("state")).ok()?;
    file.take(STATE_BYTES as u64 + 1).read_to_end(&mut bytes).ok()?;
    let bytes: [u8; STATE_BYTES] = bytes.try_into().ok()?;
    let (body, check) = bytes.split_last_chunk::<16>()?;
    if blake3::hash(body).as_bytes()[..16] != *check || body[..8] != MAGIC || le_u32(&body[8..]) != VERSION {
        return None;
    }
    let page_size = PageSize::new(le_u32(&body[12..])).ok()?;
    let next = PageNo::new(le_u32(&body[16..]))?;
    let first = Position::from_bytes(body[20..].try_into().ok()?)?;
    let there = fs::metadata(side.join("incoming").join("pages")).ok()?.len();
    (there >= next.offset(page_size)).then_some(FillProgress { first, next, page_size })
}

/// Forgets what was begun.
pub(in crate::engine) fn discard(side: &Path) -> Result<()> {
    files::remove_directory(&side.join("incoming"))
}

/// The pages of an [`IncomingState`], for a call.
struct IncomingPages<'a> {
    directory: &'a Path,
    file: &'a File,
    held: Option<&'a mut File>,
    page_size: PageSize,
    live: Under<'a>,
}

impl Store for IncomingPages<'_> {
    fn write(&mut self, number: PageNo, page: &[u8]) -> Result<()> {
        write_all_at(self.file, page, number.offset(self.page_size))
            .map_err(Error::io("write", self.directory.join("pages")))?;
        match &mut self.held {
            Some(held) => held
                .write_all(&number.get().to_le_bytes())
                .map_err(Error::io("write", self.directory.join("held"))),
            None => Ok(()),
        }
    }

    fn read(&mut self, number: PageNo, page: &mut [u8]) -> Result<()> {
        read_exact_at(self.file, page, number.offset(self.page_size))
            .map_err(Error::io("read", self.directory.join("pages")))
    }

    fn read_below(&mut self, first: PageNo, pages: &mut [u8]) -> Result<()> {
        match &mut self.live {
            Some(live) => live.read_run(first, pages),
            None => Err(Error::Internal(format!("a snapshot does not have its {first:?}"))),
        }
    }

    fn cut_above(&mut self, last: u32) -> Result<()> {
        let bytes = u64::from(last) * u64::from(self.page_size.get());
        let path = || self.directory.join("pages");
        if self.file.metadata().map_err(Error::io("stat", path()))?.len() > bytes {
            self.file.set_len(bytes).map_err(Error::io("truncate", path()))?;
        }
        Ok(())
    }
}

impl IncomingState {
    fn new(side: &Path, page_size: PageSize, first: Position, below: u32) -> Result<IncomingState> {
        let directory = side.join("incoming");
        files::make_directory(&directory)?;
        let (file, _) = files::open_or_create(&directory.join("pages"))?;
        let overlay = Overlay::new(page_size, first, below);
        let last_progress = Instant::now();
        Ok(IncomingState { directory, file, held: None, next: 1, since_progress: 0, last_progress, overlay })
    }

    /// Begins a snapshot, or goes on with the one that [`progress`] told of.
    pub(in crate::engine) fn begin(side: &Path, begin: SnapBegin) -> Result<IncomingState, IntakeError> {
        let earlier = progress(side)
            .filter(|p| p.first == begin.first && p.next == begin.from && p.page_size == begin.page_size);
        if begin.from != PageNo::FIRST && earlier.is_none() {
            return Err(IntakeError::garbled(
                "a snapshot that goes on with something else than what is here",
            ));
        }
        if earlier.is_none() {
            discard(side)?;
        }
        let mut incoming = IncomingState::new(side, begin.page_size, begin.first, 0)?;
        // What lies behind the progress that was made durable may be anything.
        let length = begin.from.offset(begin.page_size);
        incoming.file.set_len(length).map_err(Error::io("truncate", incoming.path()))?;
        incoming.next = begin.from.get();
        incoming.hash_held()?;
        incoming.save_progress(begin.first)?;
        sync_directory(side)?;
        Ok(incoming)
    }

    /// Begins a heal over a live database of so many pages, whose state is led back by what comes; over none, what came of a snapshot is.
    pub(in crate::engine) fn over(side: &Path, begin: HealBegin, pages: u32) -> Result<IncomingState> {
        let mut held = begin.compare.then(|| read_held(side, begin.page_size)).flatten();
        if begin.compare && held.is_none() {
            held = hold_progress(side, begin.page_size)?;
        }
        if held.is_none() {
            discard(side)?;
        }
        let mut incoming = IncomingState::new(side, begin.page_size, begin.from, pages)?;
        if begin.compare {
            let path = incoming.directory.join("held");
            let (mut file, _) = files::open_or_create(&path)?;
            file.seek(SeekFrom::End(0)).map_err(Error::io("seek", &path))?;
            match held {
                Some(have) => incoming.overlay.resume(have),
                None => {
                    file.write_all(&held_head(begin.page_size, 0)).map_err(Error::io("write", &path))?;
                }
            }
            incoming.held = Some(file);
        }
        Ok(incoming)
    }

    fn path(&self) -> PathBuf {
        self.directory.join("pages")
    }

    fn parts<'a>(&'a mut self, live: Under<'a>) -> (&'a mut Overlay, IncomingPages<'a>) {
        let IncomingState { directory, file, held, overlay, .. } = self;
        let page_size = overlay.page_size();
        (overlay, IncomingPages { directory, file, held: held.as_mut(), page_size, live })
    }

    /// Takes in what an earlier attempt left.
    fn hash_held(&mut self) -> Result<()> {
        let size = self.overlay.page_size().bytes();
        let mut buffer = vec![0; HASH_CHUNK_BYTES.max(size)];
        let mut next = 1;
        while let Some(first) = PageNo::new(next).filter(|_| next < self.next) {
            let count = ((self.next - next) as usize).min(buffer.len() / size);
            let bytes = &mut buffer[..count * size];
            let offset = u64::from(next - 1) * size as u64;
            read_exact_at(&self.file, bytes, offset).map_err(Error::io("read", self.path()))?;
            self.overlay.append(first, bytes);
            next += count as u32;
        }
        Ok(())
    }

    fn save_progress(&mut self, first: Position) -> Result<()> {
        self.file.sync_data().map_err(Error::io("fsync", self.path()))?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.overlay.page_size().get().to_le_bytes());
        bytes.extend_from_slice(&self.next.to_le_bytes());
        bytes.extend_from_slice(&first.to_bytes());
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..16]);
        replace_file(&self.directory, "state", &bytes)?;
        (self.since_progress, self.last_progress) = (0, Instant::now());
        Ok(())
    }

    /// A run of pages of a snapshot, in order.
    pub(in crate::engine) fn piece(&mut self, first: PageNo, pages: &[u8]) -> Result<(), IntakeError> {
        let count = self.count(first, pages)?;
        if self.overlay.ended() || first.get() != self.next {
            return Err(IntakeError::garbled("a snapshot piece out of order"));
        }
        write_all_at(&self.file, pages, first.offset(self.overlay.page_size()))
            .map_err(Error::io("write", self.path()))?;
        self.overlay.append(first, pages);
        self.next += count;
        self.since_progress += pages.len() as u64;
        if self.since_progress >= PROGRESS_BYTES || self.last_progress.elapsed() >= PROGRESS_EVERY {
            self.keep()?;
        }
        Ok(())
    }

    /// Makes durable how far a snapshot has come.
    pub(in crate::engine) fn keep(&mut self) -> Result<()> {
        if self.since_progress == 0 {
            return Ok(());
        }
        // Pieces came last and no record was applied yet, so that this is still the position of the first piece.
        self.save_progress(self.overlay.position())
    }

    /// A run of pages that a heal asked for.
    pub(in crate::engine) fn patch(
        &mut self,
        first: PageNo,
        pages: &[u8],
        live: Under<'_>,
    ) -> Result<(), IntakeError> {
        self.count(first, pages)?;
        let (overlay, mut store) = self.parts(live);
        overlay.patch(first, pages, &mut store)
    }

    fn count(&self, first: PageNo, pages: &[u8]) -> Result<u32, IntakeError> {
        let size = self.overlay.page_size().bytes();
        let count = (pages.len() / size) as u32;
        if !pages.len().is_multiple_of(size) || first.get().checked_add(count).is_none() {
            return Err(IntakeError::garbled("a piece of no whole pages, or of too many"));
        }
        Ok(count)
    }

    /// The pieces are complete. True when the state is exact already.
    pub(in crate::engine) fn end(&mut self, end: SnapEnd, live: Under<'_>) -> Result<bool, IntakeError> {
        if live.is_none() && self.held.is_none() && !self.overlay.ended() {
            self.save_progress(self.overlay.position())?;
        }
        let (overlay, mut store) = self.parts(live);
        overlay.end(end, &mut store)
    }

    pub(in crate::engine) fn txn_begin(&mut self, begin: TxnBegin) -> Result<(), IntakeError> {
        self.overlay.txn_begin(begin)
    }

    pub(in crate::engine) fn page(
        &mut self,
        number: PageNo,
        hash: PageHash,
        page: &[u8],
        live: Under<'_>,
    ) -> Result<(), IntakeError> {
        let (overlay, mut store) = self.parts(live);
        overlay.page(number, hash, page, &mut store)
    }

    /// A record ends. True when the state has become exact.
    pub(in crate::engine) fn txn_end(&mut self, end: TxnEnd, live: Under<'_>) -> Result<bool, IntakeError> {
        let (overlay, mut store) = self.parts(live);
        overlay.txn_end(end, &mut store)
    }

    /// Does something with the pages that a heal compares.
    pub(in crate::engine) fn with<T, E>(
        &mut self,
        live: Under<'_>,
        run: impl FnOnce(&mut Overlay, &mut dyn Store) -> Result<T, E>,
    ) -> Result<T, E> {
        let (overlay, mut store) = self.parts(live);
        run(overlay, &mut store)
    }

    /// Hands the finished state over, synced.
    pub(in crate::engine) fn finish(self) -> Result<Ready> {
        self.file.sync_all().map_err(Error::io("fsync", self.path()))?;
        let page_size = self.overlay.page_size();
        let (have, position, pages) = self.overlay.into_parts();
        Ok(Ready { directory: self.directory, file: self.file, have, position, pages, page_size })
    }
}

/// Has the pages that came of a snapshot, if they are of this size, be those that a comparison has.
fn hold_progress(side: &Path, page_size: PageSize) -> Result<Option<PageSet>> {
    let Some(next) = progress(side).filter(|p| p.page_size == page_size).map(|p| p.next.get()) else {
        return Ok(None);
    };
    let directory = side.join("incoming");
    replace_file(&directory, "held", &held_head(page_size, next - 1))?;
    // With both of them there, the snapshot would be gone on with, over pages that are newer by then: as good.
    let state = directory.join("state");
    fs::remove_file(&state).map_err(Error::io("remove", &state))?;
    Ok(read_held(side, page_size))
}

/// The size of the primary's pages, where some are on their way in.
pub(in crate::engine) fn page_size(side: &Path) -> Option<PageSize> {
    progress(side).map(|progress| progress.page_size).or_else(|| held_size(side))
}

/// The size of the pages that an earlier comparison has.
pub(in crate::engine) fn held_size(side: &Path) -> Option<PageSize> {
    let mut head = [0; HELD_HEAD_BYTES];
    files::open(&side.join("incoming").join("held")).ok()?.read_exact(&mut head).ok()?;
    PageSize::new(le_u32(&head[8..])).ok().filter(|_| head.starts_with(&HELD_MAGIC))
}

/// What the file begins with: pages up to `last` are there.
fn held_head(page_size: PageSize, last: u32) -> Vec<u8> {
    [&HELD_MAGIC[..], &page_size.get().to_le_bytes(), &last.to_le_bytes()].concat()
}

/// The pages that an earlier comparison has, if they are of this size.
pub(in crate::engine) fn read_held(side: &Path, page_size: PageSize) -> Option<PageSet> {
    let directory = side.join("incoming");
    let there = fs::metadata(directory.join("pages")).ok()?.len() / u64::from(page_size.get());
    let mut bytes = Vec::new();
    // A number may stand there more than once; a file that was not written by us is not read to its end.
    let most = HELD_HEAD_BYTES as u64 + 4 * there.saturating_mul(16);
    files::open(&directory.join("held")).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    let numbers = bytes.strip_prefix(HELD_MAGIC.as_slice())?.strip_prefix(&page_size.get().to_le_bytes())?;
    let (last, numbers) = numbers.split_first_chunk::<4>()?;
    let mut have = PageSet::default();
    let numbers =
        numbers.chunks_exact(4).map(le_u32).chain(1..=u64::from(u32::from_le_bytes(*last)).min(there) as u32);
    // What such a page holds is compared like any other.
    numbers.filter_map(PageNo::new).filter(|n| u64::from(n.get()) <= there).for_each(|n| have.insert(n));
    Some(have)
}

impl Ready {
    /// One page of the verified state that the file has.
    pub(in crate::engine) fn read(&self, number: PageNo, buffer: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, buffer, number.offset(self.page_size))
            .map_err(Error::io("read", self.directory.join("pages")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::txid::{Epoch, Txid};

    fn begin(from: PageNo) -> SnapBegin {
        let first = Position::new(Txid::new(Epoch::new(1, 2), 3), crate::Checksum::EMPTY);
        SnapBegin { first, from, page_size: PageSize::new(512).unwrap(), pages: 4 }
    }

    /// Leaves a snapshot of four pages behind, with its progress.
    fn interrupted(side: &Path) -> PageNo {
        let mut incoming = IncomingState::begin(side, begin(PageNo::FIRST)).unwrap();
        incoming.piece(PageNo::FIRST, &[7; 4 * 512]).unwrap();
        incoming.save_progress(begin(PageNo::FIRST).first).unwrap();
        PageNo::new(5).unwrap()
    }

    #[test]
    fn a_snapshot_goes_on_where_its_progress_says() {
        let dir = tempfile::tempdir().unwrap();
        let next = interrupted(dir.path());
        assert_eq!(progress(dir.path()).unwrap().next, next);
        IncomingState::begin(dir.path(), begin(next)).unwrap();
        assert_eq!(fs::metadata(dir.path().join("incoming/pages")).unwrap().len(), 4 * 512);
    }

    #[test]
    fn progress_of_a_newer_version_or_of_too_many_bytes_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let next = interrupted(dir.path());
        let state = dir.path().join("incoming/state");
        let ours = fs::read(&state).unwrap();
        let mut newer = ours[..STATE_BYTES - 16].to_vec();
        newer[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
        let check = blake3::hash(&newer);
        newer.extend_from_slice(&check.as_bytes()[..16]);
        for bytes in [newer, [ours, vec![0]].concat()] {
            interrupted(dir.path());
            fs::write(&state, &bytes).unwrap();
            assert!(progress(dir.path()).is_none());
            assert!(IncomingState::begin(dir.path(), begin(next)).is_err(), "what is here is not known");
            assert_eq!(fs::read(&state).unwrap(), bytes, "a refusal leaves it as it is");
            IncomingState::begin(dir.path(), begin(PageNo::FIRST)).unwrap();
            assert_eq!(progress(dir.path()).unwrap().next, PageNo::FIRST);
            assert_eq!(fs::metadata(dir.path().join("incoming/pages")).unwrap().len(), 0);
        }
    }
}
