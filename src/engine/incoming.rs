//! A state on its way in: pages in a file that, over what is here already, become exact. Then the
//! checksum verifies them.
//!
//! In `<state directory>/incoming`, `pages` holds the pages at their places. Where the database is
//! empty, they go to their places in its file at once, and `first` holds the first one. `state`
//! says how far a snapshot has come, `held` which pages a comparison has.
//!
//! A snapshot can't go on when the primary's log does not reach back to its begin any more. Then it
//! becomes a comparison over what came of it.
//!
//! Pages may come newer than the position that the records go on from. The replica applies those
//! records to the file, up to the state that the primary names. A change that lies over another
//! image than the page has is left out: the page is newer, or not right. Then the checksum decides.

pub(in crate::engine) mod heal;
pub(in crate::engine) mod overlay;
mod pages;
mod progress;

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use crate::checksum::{FINGERPRINT_BYTES, PageKey};
use crate::descriptors::NodeFile;
use crate::engine::file::database::OpenDatabase;
use crate::engine::history::intake_error::IntakeError;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::overlay::{Overlay, PageStore};
pub(in crate::engine) use crate::engine::incoming::pages::{PlacedPages, in_place};
use crate::engine::incoming::progress::Saver;
pub(in crate::engine) use crate::engine::incoming::progress::{FillProgress, progress};
use crate::error::{Error, Result};
use crate::files::{self, Paths, replace_file, sync_directory};
use crate::page::{PageNo, PageSet, PageSize};
use crate::threads;
use crate::txid::Position;
use crate::wal::le_u32;
use crate::wire::{HealBegin, PageChange, PageRun, SnapBegin, SnapEnd, TxnBegin, TxnEnd};

const HELD_MAGIC: [u8; 8] = *b"repheld3";
const HELD_HEAD_BYTES: usize = 8 + FINGERPRINT_BYTES + 4 + 4;
/// Bytes that one read takes when the replica hashes pages again that came earlier.
const HASH_CHUNK_BYTES: usize = 4 * HASH_RUN_BYTES;
/// Bytes that one thread hashes of them at a time.
const HASH_RUN_BYTES: usize = 256 * 1024;

/// A state that is coming in, over nothing or over the pages of a live database.
#[derive(Debug)]
pub(in crate::engine) struct IncomingState {
    paths: Paths,
    pages: PlacedPages,
    /// Notes the pages that the file has, for a comparison that has to begin again.
    held: Option<NodeFile>,
    /// The page that the next piece of a snapshot begins with.
    next: u32,
    saver: Saver,
    overlay: Overlay,
}

/// A state that is exact and verified.
#[derive(Debug)]
pub(in crate::engine) struct Ready {
    pub(in crate::engine) pages: PlacedPages,
    /// The pages that the file has; all others are those of the live database.
    pub(in crate::engine) have: PageSet,
    pub(in crate::engine) position: Position,
    pub(in crate::engine) size: u32,
    pub(in crate::engine) page_size: PageSize,
}

/// What lies under the pages that have come: the live database, if there is one.
pub(in crate::engine) type Under<'a> = Option<&'a mut WalAppender>;

/// An empty database that is open, and whose file a snapshot can go into at once.
pub(in crate::engine) type EmptyFile = Option<Arc<OpenDatabase>>;

/// Forgets what was begun.
pub(in crate::engine) fn discard(paths: &Paths) -> Result<()> {
    files::remove_directory(&paths.incoming())
}

/// The pages of an [`IncomingState`], for a call.
struct IncomingPages<'a> {
    paths: &'a Paths,
    pages: &'a PlacedPages,
    held: Option<&'a mut NodeFile>,
    live: Under<'a>,
}

impl PageStore for IncomingPages<'_> {
    fn write(&mut self, number: PageNo, page: &[u8]) -> Result<()> {
        self.pages.write(number, page)?;
        match &mut self.held {
            Some(held) => held
                .write_all(&number.get().to_le_bytes())
                .map_err(Error::io("write", self.paths.incoming_held())),
            None => Ok(()),
        }
    }

    fn read(&mut self, number: PageNo, page: &mut [u8]) -> Result<()> {
        self.pages.read(number, page)
    }

    fn read_below(&mut self, first: PageNo, pages: &mut [u8]) -> Result<()> {
        match &mut self.live {
            Some(live) => live.read_run(first, pages),
            None => Err(Error::Internal(format!("a snapshot does not have its {first:?}"))),
        }
    }

    fn cut_above(&mut self, last: u32) -> Result<()> {
        self.pages.cut_above(last)
    }
}

impl IncomingState {
    fn new(
        (paths, key): (&Paths, PageKey),
        page_size: PageSize,
        first: Position,
        below: u32,
        place: EmptyFile,
    ) -> Result<IncomingState> {
        files::make_directory(&paths.incoming())?;
        let pages = PlacedPages::open(paths, page_size, place)?;
        let overlay = Overlay::new(page_size, key, first, below);
        let (saver, paths) = (Saver::new(paths, pages.clone()), paths.clone());
        Ok(IncomingState { paths, pages, held: None, next: 1, saver, overlay })
    }

    /// Begins a snapshot, or goes on with the one that [`progress`] told of.
    pub(in crate::engine) fn begin(
        paths: &Paths,
        key: PageKey,
        begin: SnapBegin,
        place: EmptyFile,
    ) -> Result<IncomingState, IntakeError> {
        let earlier = progress(paths, key)
            .filter(|p| p.first == begin.first && p.next == begin.from && p.page_size == begin.page_size)
            .filter(|p| !p.in_place || place.is_some());
        if begin.from != PageNo::FIRST && earlier.is_none() {
            return Err(IntakeError::garbled(
                "a snapshot that goes on with something else than what is here",
            ));
        }
        if earlier.is_none() {
            discard(paths)?;
        }
        let place = place.filter(|_| earlier.is_none_or(|earlier| earlier.in_place));
        let mut incoming = IncomingState::new((paths, key), begin.page_size, begin.first, 0, place)?;
        // What lies after the progress that was made durable may be anything.
        incoming.pages.cut_above(begin.from.get() - 1)?;
        incoming.next = begin.from.get();
        incoming.hash_held()?;
        incoming.saver.now(incoming.so_far()?, key)?;
        sync_directory(paths.state_dir())?;
        Ok(incoming)
    }

    /// Begins a heal over a live database of `pages` pages, whose state the heal leads back.
    /// Without such a database it leads back what came of a snapshot.
    pub(in crate::engine) fn over(
        paths: &Paths,
        key: PageKey,
        begin: HealBegin,
        pages: u32,
        place: EmptyFile,
    ) -> Result<IncomingState> {
        // What came into an empty database's file is of no use elsewhere.
        let place = place.filter(|_| in_place(paths));
        if place.is_none() && in_place(paths) {
            discard(paths)?;
        }
        let mut held = begin.compare.then(|| read_held(paths, key, begin.page_size)).flatten();
        if begin.compare && held.is_none() {
            held = hold_progress(paths, key, begin.page_size)?;
        }
        if held.is_none() {
            discard(paths)?;
        }
        let mut incoming = IncomingState::new((paths, key), begin.page_size, begin.from, pages, place)?;
        if begin.compare {
            let path = incoming.paths.incoming_held();
            let (mut file, _) = files::open_or_create(&path)?;
            file.seek(SeekFrom::End(0)).map_err(Error::io("seek", &path))?;
            match held {
                Some(have) => incoming.overlay.resume(have),
                None => {
                    file.write_all(&held_head(key, begin.page_size, 0)).map_err(Error::io("write", &path))?;
                }
            }
            incoming.held = Some(file);
        }
        Ok(incoming)
    }

    /// The state that came so far.
    pub(in crate::engine) fn position(&self) -> Position {
        self.overlay.position()
    }

    fn parts<'a>(&'a mut self, live: Under<'a>) -> (&'a mut Overlay, IncomingPages<'a>) {
        let IncomingState { paths, pages, held, overlay, .. } = self;
        (overlay, IncomingPages { paths, pages, held: held.as_mut(), live })
    }

    /// Takes in what an earlier attempt left.
    fn hash_held(&mut self) -> Result<()> {
        let size = self.overlay.page_size().bytes();
        let mut buffer = vec![0; HASH_CHUNK_BYTES.max(size)];
        let mut next = 1;
        while let Some(first) = PageNo::new(next).filter(|_| next < self.next) {
            let count = ((self.next - next) as usize).min(buffer.len() / size);
            let bytes = &mut buffer[..count * size];
            self.pages.read(first, bytes)?;
            let runs = hash_pages(first, bytes, self.overlay.page_size(), self.overlay.key());
            runs.iter().for_each(|run| self.overlay.append(run));
            next += count as u32;
        }
        Ok(())
    }

    /// How far it is: pieces came last, and the replica applied no record yet. So this is still the
    /// first piece's position.
    fn so_far(&self) -> Result<FillProgress> {
        let (first, page_size) = (self.overlay.position(), self.overlay.page_size());
        let next = PageNo::new(self.next).ok_or_else(|| Error::Internal("a snapshot of no pages".into()))?;
        Ok(FillProgress { first, next, page_size, in_place: self.pages.database().is_some() })
    }

    /// A run of pages of a snapshot, in order.
    pub(in crate::engine) fn piece(&mut self, run: &PageRun<'_>) -> Result<(), IntakeError> {
        self.check(run)?;
        if self.overlay.ended() || run.first().get() != self.next {
            return Err(IntakeError::garbled("a snapshot piece out of order"));
        }
        self.pages.write(run.first(), run.bytes())?;
        self.overlay.append(run);
        self.next += run.count();
        Ok(self.saver.came(run.bytes().len() as u64, self.so_far()?, self.overlay.key())?)
    }

    /// Makes durable how far a snapshot has come.
    pub(in crate::engine) fn keep(&mut self) -> Result<()> {
        self.saver.keep(self.so_far()?, self.overlay.key())
    }

    /// A run of pages that a heal asked for.
    pub(in crate::engine) fn patch(&mut self, run: &PageRun<'_>, live: Under<'_>) -> Result<(), IntakeError> {
        self.check(run)?;
        let (overlay, mut store) = self.parts(live);
        overlay.patch(run, &mut store)
    }

    fn check(&self, run: &PageRun<'_>) -> Result<(), IntakeError> {
        if run.page_size() == self.overlay.page_size() {
            return Ok(());
        }
        Err(IntakeError::garbled("a piece with pages of another size"))
    }

    /// The pieces are complete. Returns true when the state is exact already.
    pub(in crate::engine) fn end(&mut self, end: SnapEnd, live: Under<'_>) -> Result<bool, IntakeError> {
        if live.is_none() && self.held.is_none() && !self.overlay.ended() {
            self.saver.now(self.so_far()?, self.overlay.key())?;
        }
        let (overlay, mut store) = self.parts(live);
        overlay.end(end, &mut store)
    }

    pub(in crate::engine) fn txn_begin(&mut self, begin: TxnBegin) -> Result<(), IntakeError> {
        self.overlay.txn_begin(begin)
    }

    pub(in crate::engine) fn change(
        &mut self,
        change: &PageChange<'_>,
        live: Under<'_>,
    ) -> Result<(), IntakeError> {
        let (overlay, mut store) = self.parts(live);
        overlay.change(change, &mut store)
    }

    /// A record ends. Returns true when the state has become exact.
    pub(in crate::engine) fn txn_end(&mut self, end: TxnEnd, live: Under<'_>) -> Result<bool, IntakeError> {
        let (overlay, mut store) = self.parts(live);
        overlay.txn_end(end, &mut store)
    }

    /// Does something with the pages that a heal compares.
    pub(in crate::engine) fn with<T, E>(
        &mut self,
        live: Under<'_>,
        run: impl FnOnce(&mut Overlay, &mut dyn PageStore) -> Result<T, E>,
    ) -> Result<T, E> {
        let (overlay, mut store) = self.parts(live);
        run(overlay, &mut store)
    }

    /// Hands the finished state over, synced.
    pub(in crate::engine) fn finish(mut self) -> Result<Ready> {
        self.saver.end()?;
        self.pages.sync()?;
        let page_size = self.overlay.page_size();
        let (have, position, size) = self.overlay.into_parts();
        Ok(Ready { pages: self.pages, have, position, size, page_size })
    }
}

/// Hashes pages that are here, on several threads.
fn hash_pages(first: PageNo, pages: &[u8], size: PageSize, key: PageKey) -> Vec<PageRun<'_>> {
    let at_once = (HASH_RUN_BYTES / size.bytes()).max(1);
    let firsts = (first.get()..=u32::MAX).step_by(at_once).filter_map(PageNo::new);
    let runs: Vec<(PageNo, &[u8])> = firsts.zip(pages.chunks(at_once * size.bytes())).collect();
    threads::each("replite-hash", &runs, pages.len(), |&(first, pages)| {
        PageRun::hashed(first, pages, size, &key)
    })
}

/// Makes the pages that came of a snapshot, if they are of this size, those that a comparison has.
fn hold_progress(paths: &Paths, key: PageKey, page_size: PageSize) -> Result<Option<PageSet>> {
    let Some(next) = progress(paths, key).filter(|p| p.page_size == page_size).map(|p| p.next.get()) else {
        return Ok(None);
    };
    replace_file(&paths.incoming_held(), &held_head(key, page_size, next - 1))?;
    // With both files there, the node would go on with the snapshot, over newer pages: as good.
    let state = paths.incoming_state();
    fs::remove_file(&state).map_err(Error::io("remove", &state))?;
    Ok(read_held(paths, key, page_size))
}

/// The size of the primary's pages, if some are on their way in.
pub(in crate::engine) fn page_size(paths: &Paths, key: PageKey) -> Option<PageSize> {
    progress(paths, key).map(|progress| progress.page_size).or_else(|| held_size(paths, key))
}

/// The size of the pages that an earlier comparison has.
pub(in crate::engine) fn held_size(paths: &Paths, key: PageKey) -> Option<PageSize> {
    let mut head = [0; HELD_HEAD_BYTES];
    files::open(&paths.incoming_held()).ok()?.read_exact(&mut head).ok()?;
    let size = head.strip_prefix(&held_magic(key)[..])?;
    PageSize::new(le_u32(size)).ok()
}

/// Magic and the page key's fingerprint.
fn held_magic(key: PageKey) -> Vec<u8> {
    [&HELD_MAGIC[..], &key.fingerprint().0].concat()
}

/// What the file begins with: pages up to `last` are there.
fn held_head(key: PageKey, page_size: PageSize, last: u32) -> Vec<u8> {
    [&held_magic(key)[..], &page_size.get().to_le_bytes(), &last.to_le_bytes()].concat()
}

/// The pages that an earlier comparison has, if they are of this size.
pub(in crate::engine) fn read_held(paths: &Paths, key: PageKey, page_size: PageSize) -> Option<PageSet> {
    let there = pages::bytes_there(paths, page_size)? / u64::from(page_size.get());
    let mut bytes = Vec::new();
    // A number may stand there more than once. The replica does not read a file that is none of
    // ours to its end.
    let most = HELD_HEAD_BYTES as u64 + 4 * there.saturating_mul(16);
    files::open(&paths.incoming_held()).ok()?.take(most).read_to_end(&mut bytes).ok()?;
    let numbers =
        bytes.strip_prefix(held_magic(key).as_slice())?.strip_prefix(&page_size.get().to_le_bytes())?;
    let (last, numbers) = numbers.split_first_chunk::<4>()?;
    let mut have = PageSet::default();
    let numbers =
        numbers.chunks_exact(4).map(le_u32).chain(1..=u64::from(u32::from_le_bytes(*last)).min(there) as u32);
    // A comparison treats what such a page holds like any other.
    numbers.filter_map(PageNo::new).filter(|n| u64::from(n.get()) <= there).for_each(|n| have.insert(n));
    Some(have)
}

impl Ready {
    /// One page of the verified state that the file has.
    pub(in crate::engine) fn read(&self, number: PageNo, buffer: &mut [u8]) -> Result<()> {
        self.pages.read(number, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::incoming::progress::STATE;
    use crate::engine::tests::KEY;
    use crate::files::sealed::Sealed;
    use crate::hex::{hex, unhex_lossy};
    use crate::txid::{Epoch, Txid};

    fn begin(from: PageNo) -> SnapBegin {
        let first = Position::new(Txid::new(Epoch::new(1, 2), 3), crate::Checksum::EMPTY);
        SnapBegin { first, from, page_size: PageSize::new(512).unwrap(), pages: 4 }
    }

    /// Leaves a part of a snapshot of four pages, with its progress.
    fn interrupted(paths: &Paths) -> PageNo {
        let mut incoming = IncomingState::begin(paths, KEY, begin(PageNo::FIRST), None).unwrap();
        let size = PageSize::new(512).unwrap();
        incoming.piece(&PageRun::hashed(PageNo::FIRST, &[7; 4 * 512], size, &KEY)).unwrap();
        incoming.keep().unwrap();
        PageNo::new(5).unwrap()
    }

    #[test]
    fn a_snapshot_goes_on_where_its_progress_says() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let next = interrupted(&paths);
        assert_eq!(progress(&paths, KEY).unwrap().next, next);
        IncomingState::begin(&paths, KEY, begin(next), None).unwrap();
        assert_eq!(fs::metadata(paths.incoming_pages()).unwrap().len(), 4 * 512);
    }

    /// The file of a snapshot of pages of 512 bytes, of which four have come.
    const STATE_FILE: &str = concat!(
        "726570696e636f6d020000000002000005000000010000000000000002000000000000000300000000000000",
        "00000000000000000000000000000000879da2dd53acbf762fed258221cda48f34d33b8e9b8e7df3ea084f6a",
        "083f8b9a",
    );
    /// The file of a comparison that has pages 1 to 3 and page 5.
    const HELD_FILE: &str =
        concat!("72657068656c6433879da2dd53acbf762fed258221cda48f", "000200000300000005000000",);

    #[test]
    fn the_files_bytes_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let next = interrupted(&paths);
        let (state, held) = (paths.incoming_state(), paths.incoming_held());
        assert_eq!(hex(&fs::read(&state).unwrap()), STATE_FILE);
        fs::write(&state, unhex_lossy(STATE_FILE)).unwrap();
        let found = progress(&paths, KEY).unwrap();
        assert_eq!((found.first, found.next), (begin(PageNo::FIRST).first, next));
        fs::write(paths.incoming_pages(), [7; 5 * 512]).unwrap();
        fs::write(&held, unhex_lossy(HELD_FILE)).unwrap();
        let have = read_held(&paths, KEY, PageSize::new(512).unwrap()).unwrap();
        assert_eq!(have.iter().map(PageNo::get).collect::<Vec<_>>(), [1, 2, 3, 5]);
        let head = held_head(KEY, PageSize::new(512).unwrap(), 3);
        assert_eq!([head.as_slice(), &5u32.to_le_bytes()].concat(), unhex_lossy(HELD_FILE));
    }

    #[test]
    fn progress_of_a_newer_version_or_of_too_many_bytes_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let next = interrupted(&paths);
        let state = paths.incoming_state();
        let ours = fs::read(&state).unwrap();
        let newer = Sealed { version: STATE.version + 1, ..STATE }.seal(STATE.open(&ours).unwrap());
        for bytes in [newer, [ours, vec![0]].concat()] {
            interrupted(&paths);
            fs::write(&state, &bytes).unwrap();
            assert!(progress(&paths, KEY).is_none());
            assert!(
                IncomingState::begin(&paths, KEY, begin(next), None).is_err(),
                "what is here is not known"
            );
            assert_eq!(fs::read(&state).unwrap(), bytes, "a refusal leaves it as it is");
            IncomingState::begin(&paths, KEY, begin(PageNo::FIRST), None).unwrap();
            assert_eq!(progress(&paths, KEY).unwrap().next, PageNo::FIRST);
            assert_eq!(fs::metadata(paths.incoming_pages()).unwrap().len(), 0);
        }
    }
}
