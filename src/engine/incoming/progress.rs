//! How far a snapshot has come: what is durable of it. A thread of its own syncs while more comes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::checksum::{FINGERPRINT_BYTES, PageKey};
use crate::engine::incoming::pages::{PlacedPages, bytes_there, in_place};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::files::sealed::{CHECK_BYTES, HEAD_BYTES, Sealed};
use crate::page::{PageNo, PageSize};
use crate::threads::SideThread;
use crate::txid::Position;
use crate::wal::le_u32;

/// The page size, the next page, the position of the first piece, the page key's fingerprint.
pub(super) const STATE: Sealed = Sealed {
    magic: *b"repincom",
    oldest: 2,
    version: 2,
    max_bytes: (HEAD_BYTES + STATE_BYTES + CHECK_BYTES) as u64,
    cure: "says how far a snapshot has come, which begins anew without it",
};
const STATE_BYTES: usize = 4 + 4 + Position::BYTES + FINGERPRINT_BYTES;
/// The replica makes its progress durable after this many bytes, or after this long.
const BYTES: u64 = 64 << 20;
const EVERY: Duration = Duration::from_secs(5);
/// Where the disk is slower than what comes, so many bytes are written and not durable at most.
/// Then the replica waits.
const AHEAD_BYTES: u64 = 4 * BYTES;

/// How far an earlier attempt came.
#[derive(Clone, Copy, Debug)]
pub(in crate::engine) struct FillProgress {
    pub(in crate::engine) first: Position,
    pub(in crate::engine) next: PageNo,
    pub(in crate::engine) page_size: PageSize,
    /// The pages are in the file of the database, which was empty.
    pub(in crate::engine) in_place: bool,
}

/// What an earlier attempt left, if the replica can go on with it.
///
/// Unlike for other files of the state directory, another version is no error, and neither is
/// another page key. The primary has all that is here, and the snapshot begins anew.
pub(in crate::engine) fn progress(paths: &Paths, key: PageKey) -> Option<FillProgress> {
    let fields = STATE.read(&paths.incoming_state()).ok()??;
    let fields: [u8; STATE_BYTES] = fields.try_into().ok()?;
    let page_size = PageSize::new(le_u32(&fields)).ok()?;
    let next = PageNo::new(le_u32(&fields[4..]))?;
    let (first, of) = fields[8..].split_first_chunk()?;
    let first = Position::from_bytes(first)?;
    if *of != key.fingerprint().0 {
        return None;
    }
    let there = bytes_there(paths, page_size)?;
    let in_place = in_place(paths);
    (there >= next.offset(page_size)).then_some(FillProgress { first, next, page_size, in_place })
}

/// Makes durable how far a snapshot has come.
#[derive(Debug)]
pub(super) struct Saver {
    pages: PlacedPages,
    state: PathBuf,
    /// Bytes since a save began, and those that one under way is about.
    since: u64,
    saving: u64,
    last: Instant,
    under_way: Option<SideThread>,
    /// The disk failed a save. What it has of the pages is not known any more, and the next sync
    /// may say nothing of it.
    failed: bool,
}

impl Saver {
    pub(super) fn new(paths: &Paths, pages: PlacedPages) -> Saver {
        let (state, last) = (paths.incoming_state(), Instant::now());
        Saver { pages, state, since: 0, saving: 0, last, under_way: None, failed: false }
    }

    /// So many bytes came. Says how far it is now with `at`, when it is time to.
    pub(super) fn came(&mut self, bytes: u64, at: FillProgress, key: PageKey) -> Result<()> {
        self.since += bytes;
        let waits = self.since + self.saving >= AHEAD_BYTES;
        let busy = self.under_way.as_ref().is_some_and(|under_way| !under_way.is_finished());
        if self.since < BYTES && self.last.elapsed() < EVERY || busy && !waits {
            return Ok(());
        }
        self.end()?;
        match SideThread::start("replite-progress", self.save(at, key)) {
            Ok(under_way) => {
                self.under_way = Some(under_way);
                (self.since, self.saving, self.last) = (0, self.since, Instant::now());
                Ok(())
            }
            // There is no thread to be had.
            Err(_) => self.now(at, key),
        }
    }

    /// Says how far it is, where that is not said yet. That is durable on return.
    pub(super) fn keep(&mut self, at: FillProgress, key: PageKey) -> Result<()> {
        self.end()?;
        if self.since == 0 { Ok(()) } else { self.now(at, key) }
    }

    /// Says how far it is. That is durable on return.
    pub(super) fn now(&mut self, at: FillProgress, key: PageKey) -> Result<()> {
        self.end()?;
        self.save(at, key)().inspect_err(|_| self.failed = true)?;
        (self.since, self.last) = (0, Instant::now());
        Ok(())
    }

    /// Waits for what is under way.
    ///
    /// # Errors
    /// The disk failed that, or an earlier one.
    pub(super) fn end(&mut self) -> Result<()> {
        let ended = self.under_way.take().map_or(Ok(()), SideThread::end);
        self.saving = 0;
        if ended.is_ok() && self.failed {
            let error = std::io::Error::other("an earlier one failed, and what is there is not known");
            return Err(Error::io("fsync", self.pages.path())(error));
        }
        ended.inspect_err(|_| self.failed = true)
    }

    /// All pages up to the next one are written already: whatever comes meanwhile, they are durable
    /// before the file says so.
    fn save(&self, at: FillProgress, key: PageKey) -> impl FnOnce() -> Result<()> + Send + use<> {
        let mut fields = at.page_size.get().to_le_bytes().to_vec();
        fields.extend_from_slice(&at.next.get().to_le_bytes());
        fields.extend_from_slice(&at.first.to_bytes());
        fields.extend_from_slice(&key.fingerprint().0);
        let (pages, state) = (self.pages.clone(), self.state.clone());
        move || {
            pages.sync()?;
            STATE.replace(&state, &fields)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files;
    use crate::txid::{Epoch, Txid};

    const KEY: PageKey = PageKey::from_bytes([7; 28]);

    fn at(next: u32) -> FillProgress {
        let txid = Txid::new(Epoch::from_bytes(&[1; 16]).unwrap(), 3);
        let first = Position::new(txid, crate::checksum::Checksum::EMPTY);
        let (next, page_size) = (PageNo::new(next).unwrap(), PageSize::new(512).unwrap());
        FillProgress { first, next, page_size, in_place: false }
    }

    fn saver(paths: &Paths) -> Saver {
        files::make_directory(&paths.incoming()).unwrap();
        let (file, _) = files::open_or_create(&paths.incoming_pages()).unwrap();
        file.set_len(1 << 30).unwrap();
        Saver::new(paths, PlacedPages::open(paths, PageSize::new(512).unwrap(), None).unwrap())
    }

    /// What one hears that asks a file.
    fn next(paths: &Paths) -> Option<u32> {
        progress(paths, KEY).map(|progress| progress.next.get())
    }

    #[test]
    fn it_is_said_after_so_many_bytes_and_each_time_further() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let mut saver = saver(&paths);
        saver.came(BYTES - 1, at(2), KEY).unwrap();
        assert_eq!(next(&paths), None);
        saver.came(1, at(3), KEY).unwrap();
        saver.end().unwrap();
        assert_eq!(next(&paths), Some(3));
        saver.came(7, at(4), KEY).unwrap();
        saver.keep(at(5), KEY).unwrap();
        assert_eq!(next(&paths), Some(5));
    }

    #[test]
    fn nothing_waits_for_a_slow_disk_before_too_much_has_come() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let mut saver = saver(&paths);
        let (done, waits) = std::sync::mpsc::channel::<()>();
        let slow = move || {
            // Its other end is dropped.
            let _ = waits.recv();
            Ok(())
        };
        saver.under_way = Some(SideThread::start("slow", slow).unwrap());
        saver.saving = BYTES;
        saver.came(AHEAD_BYTES - BYTES - 1, at(2), KEY).unwrap();
        assert_eq!(next(&paths), None);
        let waiter = std::thread::spawn(move || saver.came(1, at(3), KEY).map(|()| saver));
        assert!(!waiter.is_finished());
        drop(done);
        waiter.join().unwrap().unwrap().end().unwrap();
        assert_eq!(next(&paths), Some(3));
    }

    #[test]
    fn what_a_disk_refuses_is_said_later_and_nothing_is_believed_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let mut saver = saver(&paths);
        std::fs::remove_dir_all(paths.incoming()).unwrap();
        saver.came(BYTES, at(2), KEY).unwrap();
        assert!(matches!(saver.end(), Err(Error::Io { .. })));
        files::make_directory(&paths.incoming()).unwrap();
        assert!(saver.now(at(3), KEY).is_err() && saver.keep(at(3), KEY).is_err());
        assert_eq!(next(&paths), None);
    }
}
