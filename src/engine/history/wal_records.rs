//! Committed frames become transaction records.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::{Bytes, BytesMut};

use crate::checksum::{Checksum, PageHash};
use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::hash_cache::HashCache;
use crate::engine::history::images::{WholePages, newest_images};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::sqlite::Handle;
use crate::txid::{Epoch, EpochHistory, Position, Txid};
use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, IndexHeader, WalSum, frame_bytes, frame_offset};
use crate::wire::{
    self, Changes, CompactTxn, HEADER_BYTES, Message, PageChange, TXN_CHANGES_MAX_BYTES, TxnBegin, TxnEnd,
};

/// Capture reads frames in runs of about this size. It takes a larger transaction page by page.
const RUN_BYTES: usize = 512 * 1024;
/// Records of one batch, in bytes, unless told otherwise.
const BATCH_BYTES: usize = 512 * 1024;

/// Takes encoded records. `after` is there when the bytes end with a whole record.
pub(in crate::engine) trait Sink {
    /// Called before the first byte of anything up to this transaction is handed on.
    fn committed(&mut self, number: u64) -> Result<()>;
    /// Up to which transaction that would not wait.
    fn on_disk(&self) -> u64;
    fn records(&mut self, units: Bytes, after: Option<Position>) -> Result<()>;
}

/// Reads what was committed after a tip. One thread uses it.
#[derive(Debug)]
pub(in crate::engine) struct Capture {
    pub(in crate::engine) base: Arc<OpenDatabase>,
    pub(in crate::engine) handle: Handle,
    pub(in crate::engine) cache: HashCache,
    /// The last commit that capture read. When `advance` has returned, all commits up to it are
    /// handed on.
    pub(in crate::engine) tip: Tip,
    /// Says the epoch of each transaction.
    pub(in crate::engine) history: Arc<EpochHistory>,
    /// Capture hands records on when they are together larger than this.
    pub(in crate::engine) batch_bytes: usize,
    /// SQLite wrote these frames, which may repeat a commit. A node, as a replica, writes each as
    /// the transaction that it is.
    pub(in crate::engine) repeats: bool,
    /// How many losses of locks there were when capture last looked at the tip.
    losses: u64,
    run: Vec<u8>,
    out: BytesMut,
    /// The changes of the record in the making, as long as they fit one unit.
    changes: BytesMut,
    /// What a page that is being taken was before.
    page: Vec<u8>,
    /// The runs by which it differs.
    runs: BytesMut,
    /// The pages that the log has whole.
    images: WholePages,
}

/// One commit's frames, first to last, and what the last says.
#[derive(Clone, Copy, Debug)]
struct CommitFrames {
    first: u32,
    last: u32,
    pages: u32,
    sum: WalSum,
}

impl Capture {
    pub(in crate::engine) fn new(
        base: Arc<OpenDatabase>,
        handle: Handle,
        tip: Tip,
        history: Arc<EpochHistory>,
    ) -> Capture {
        let size = base.page_size;
        let frames = (RUN_BYTES / frame_bytes(size)).max(1);
        Capture {
            run: vec![0; frames * frame_bytes(size)],
            page: vec![0; size.bytes()],
            out: BytesMut::new(),
            changes: BytesMut::new(),
            runs: BytesMut::new(),
            images: WholePages::new(&base.options.log, base.log.renewals()),
            cache: HashCache::new(),
            base,
            handle,
            tip,
            history,
            batch_bytes: BATCH_BYTES,
            repeats: true,
            losses: 0,
        }
    }

    /// Reads all commits up to the header's end and hands them on.
    pub(in crate::engine) fn advance(&mut self, header: &IndexHeader, sink: &mut dyn Sink) -> Result<()> {
        if header.salts != self.tip.salts || header.max_frame < self.tip.frame {
            return Err(Error::Disturbed(format!(
                "the WAL was restarted by somebody else (frame {} became {})",
                self.tip.frame, header.max_frame
            )));
        }
        if self.base.locks_lost() != self.losses {
            self.losses = self.base.locks_lost();
            self.expect_tip()?;
        }
        self.images.wrote(0, self.base.log.renewals(), Instant::now());
        self.base.map_to(&mut self.handle, header.max_frame)?;
        let frame = frame_bytes(self.base.page_size);
        while self.tip.frame < header.max_frame {
            let first = self.tip.frame + 1;
            let count = ((header.max_frame - self.tip.frame) as usize).min(self.run.len() / frame);
            let mut run = std::mem::take(&mut self.run);
            let read =
                self.base.wal.read(&mut run[..count * frame], frame_offset(first, self.base.page_size));
            let taken = read.and_then(|()| self.take_run(&run[..count * frame], first, sink));
            self.run = run;
            if !taken? {
                let commit = self.find_end(first, header.max_frame)?;
                self.take_large(commit, sink)?;
            }
            // However small their records are: who waits for them shall not wait for more.
            self.hand_on(sink)?;
        }
        if self.tip.sum != header.frame_sum {
            return Err(Error::Disturbed(format!(
                "frame {} of the WAL has another checksum than its index says",
                header.max_frame
            )));
        }
        self.hand_on(sink)
    }

    /// Fails unless the commit that capture took last is still there. Of two writers, one without
    /// its lock, each may have written over the other's.
    fn expect_tip(&self) -> Result<()> {
        if self.tip.frame == 0 {
            return Ok(());
        }
        let mut bytes = [0; FRAME_HEADER_BYTES];
        self.base.wal.read(&mut bytes, frame_offset(self.tip.frame, self.base.page_size))?;
        let found = FrameHeader::parse(&bytes);
        if (found.sum, found.salts) == (self.tip.sum, self.tip.salts) {
            return Ok(());
        }
        Err(Error::Disturbed(format!(
            "frame {} of the WAL was written over after it was committed",
            self.tip.frame
        )))
    }

    /// Takes the commits that lie wholly in the run. Returns false when not even one does.
    fn take_run(&mut self, run: &[u8], first: u32, sink: &mut dyn Sink) -> Result<bool> {
        let frame = frame_bytes(self.base.page_size);
        let (mut begin, mut taken) = (0, false);
        for at in 0..run.len() / frame {
            let head = self.frame_header(&run[at * frame..], first + at as u32)?;
            if head.commit == 0 {
                continue;
            }
            let last = first + at as u32;
            let commit =
                CommitFrames { first: first + begin as u32, last, pages: head.commit, sum: head.sum };
            self.take_small(commit, &run[begin * frame..(at + 1) * frame])?;
            // What is on the disk does not wait for the next fsync.
            if self.out.len() > self.batch_bytes || self.tip.position.number() == sink.on_disk() {
                self.hand_on(sink)?;
            }
            (begin, taken) = (at + 1, true);
        }
        Ok(taken)
    }

    fn frame_header(&self, bytes: &[u8], frame: u32) -> Result<FrameHeader> {
        let head = FrameHeader::parse(bytes);
        if head.salts != self.tip.salts || head.page == 0 {
            return Err(Error::Corrupt {
                path: self.base.options.paths.wal(),
                offset: frame_offset(frame, self.base.page_size),
                what: "a committed frame is of another generation".into(),
                cure: "has SQLite's commits, and somebody else wrote to it: start the node again, which \
                    finds out from the log what it has",
            });
        }
        Ok(head)
    }

    /// Finds the commit frame of a transaction that is longer than a run.
    fn find_end(&self, first: u32, max: u32) -> Result<CommitFrames> {
        let mut bytes = [0; FRAME_HEADER_BYTES];
        for frame in first..=max {
            self.base.progress.step();
            self.base.wal.read(&mut bytes, frame_offset(frame, self.base.page_size))?;
            let head = self.frame_header(&bytes, frame)?;
            if head.commit != 0 {
                return Ok(CommitFrames { first, last: frame, pages: head.commit, sum: head.sum });
            }
        }
        Err(Error::Disturbed(format!("the WAL's index ends at frame {max}, which is no commit")))
    }

    /// Takes a commit whose frames are all at hand.
    fn take_small(&mut self, commit: CommitFrames, frames: &[u8]) -> Result<()> {
        let frame = frame_bytes(self.base.page_size);
        let newest = newest_images(frames, frame);
        self.changes.clear();
        let mut record = LogRecord::begin(self, commit);
        let mark = self.out.len();
        for at in newest {
            let (header, page) = frames[at * frame..(at + 1) * frame].split_at(FRAME_HEADER_BYTES);
            let Some(number) = PageNo::new(FrameHeader::parse(header).page) else { continue };
            self.take_page(&mut record, number, self.base.page_key.hash(number, page), page)?;
        }
        if self.is_repeated(&record) {
            self.out.truncate(mark);
            if record.whole {
                PageNo::new(record.last_page).into_iter().for_each(|page| self.images.take_back(page));
            }
            self.move_on(Tip { frame: commit.last, sum: commit.sum, ..self.tip });
            return Ok(());
        }
        self.finish(record)
    }

    /// Takes a commit page by page, and hands it on in pieces.
    fn take_large(&mut self, commit: CommitFrames, sink: &mut dyn Sink) -> Result<()> {
        self.hand_on(sink)?;
        self.base.bound.transaction(commit.last - commit.first + 1);
        sink.committed(self.tip.position.number() + 1)?;
        self.changes.clear();
        let mut record = LogRecord::begin(self, commit);
        self.spill(&mut record);
        let mut image = vec![0; self.base.page_size.bytes()];
        for frame in commit.first..=commit.last {
            self.base.progress.step();
            let page = self.base.index.page_of(frame);
            if self.base.index.lookup(page, commit.first, commit.last) != Some(frame) {
                continue;
            }
            let Some(number) = PageNo::new(page) else { continue };
            self.base.read_frame(frame, &mut image)?;
            self.take_page(&mut record, number, self.base.page_key.hash(number, &image), &image)?;
            if self.out.len() >= BATCH_BYTES {
                self.give(None, sink)?;
            }
        }
        self.finish(record)
    }

    /// Enters one changed page into the record.
    fn take_page(
        &mut self,
        record: &mut LogRecord,
        number: PageNo,
        hash: PageHash,
        page: &[u8],
    ) -> Result<()> {
        // Pages that the transaction itself dropped again are in the WAL, but not in the database.
        if number.get() > record.commit.pages || number.is_lock_page(self.base.page_size) {
            return Ok(());
        }
        record.whole = !self.images.has(number);
        let replaced = match number.get() <= self.tip.pages {
            true if record.whole => Some(self.old_hash(number)?),
            true => Some(self.old_image(number)?),
            false => None,
        };
        match replaced {
            Some(old) => {
                record.same = hash == old;
                record.sum = record.sum.without(old);
            }
            None => record.grown += 1,
        }
        record.sum = record.sum.with(hash);
        record.changed += 1;
        record.last_page = number.get();
        self.cache.set(number, hash);
        let before = replaced.filter(|_| !record.whole).map(|_| &self.page[..]);
        let image = wire::difference(before, page, &mut self.runs);
        let change = PageChange { number, hash, replaced, image };
        if record.in_one_unit {
            wire::encode_change(&change, &mut self.changes);
            if self.changes.len() > TXN_CHANGES_MAX_BYTES {
                self.spill(record);
            }
        } else {
            wire::encode(&Message::Change(change), &mut self.out);
        }
        Ok(())
    }

    /// The record becomes units of its own: it begins, and has the changes that were taken.
    fn spill(&mut self, record: &mut LogRecord) {
        record.in_one_unit = false;
        wire::encode(&Message::TxnBegin(self.begin()), &mut self.out);
        for change in Changes::of(&self.changes) {
            wire::encode(&Message::Change(change), &mut self.out);
        }
        self.changes.clear();
    }

    /// Reads a page as of the commit before, into `page`. Returns its hash.
    fn old_image(&mut self, number: PageNo) -> Result<PageHash> {
        self.base.progress.step();
        self.base.read_page(&mut self.handle, number, self.tip.frame, &mut self.page)?;
        Ok(self.cache.get(number).unwrap_or_else(|| self.base.page_key.hash(number, &self.page)))
    }

    /// The hash of a page as of the commit before.
    fn old_hash(&mut self, number: PageNo) -> Result<PageHash> {
        match self.cache.get(number) {
            Some(hash) => {
                self.base.progress.step();
                Ok(hash)
            }
            None => self.old_image(number),
        }
    }

    /// Whether the record is no transaction. A commit of nothing but an unchanged page 1 is our
    /// own, made to move the WAL on. A commit of nothing but the frame before it is SQLite's.
    /// SQLite makes one after a commit where the disk may harm a sector when it writes to it
    /// (`psow=0`).
    fn is_repeated(&self, record: &LogRecord) -> bool {
        let page = record.last_page;
        record.commit.first == record.commit.last
            && record.changed == 1
            && record.same
            && record.commit.pages == self.tip.pages
            && (page == 1 || self.repeats && self.base.index.page_of(self.tip.frame) == page)
    }

    /// Goes on to the next commit.
    fn move_on(&mut self, tip: Tip) {
        let before = std::mem::replace(&mut self.tip, tip);
        self.base.taken(&before, &tip);
    }

    /// The epoch of the transaction that follows the tip.
    fn epoch(&self) -> Epoch {
        self.history.epoch_of(self.tip.position.number() + 1).unwrap_or(self.tip.position.epoch())
    }

    fn begin(&self) -> TxnBegin {
        TxnBegin { before: self.tip.position, epoch: self.epoch(), page_size: self.base.page_size }
    }

    /// Accounts for dropped and unwritten pages and ends the record.
    fn finish(&mut self, mut record: LogRecord) -> Result<()> {
        let commit = record.commit;
        self.base.bound.transaction(commit.last - commit.first + 1);
        for number in (commit.pages + 1..=self.tip.pages).filter_map(PageNo::new) {
            if !number.is_lock_page(self.base.page_size) {
                record.sum = record.sum.without(self.old_hash(number)?);
            }
        }
        let new_pages = (self.tip.pages + 1..=commit.pages).filter_map(PageNo::new);
        let size = self.base.page_size;
        let new_pages = new_pages.filter(|n| !n.is_lock_page(size));
        if new_pages.clone().count() != record.grown as usize {
            self.take_unwritten(&mut record, new_pages)?;
        }
        let txid = Txid::new(self.epoch(), self.tip.position.number() + 1);
        let after = Position::new(txid, record.sum);
        let unix_micros =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_micros() as u64);
        let end = TxnEnd { after, pages: commit.pages, changed: record.changed, unix_micros };
        if record.in_one_unit {
            let changes = Changes::of(&self.changes);
            wire::encode(&Message::Txn(CompactTxn { begin: self.begin(), end, changes }), &mut self.out);
        } else {
            wire::encode(&Message::TxnEnd(end), &mut self.out);
        }
        let (frame, sum, pages) = (commit.last, commit.sum, commit.pages);
        self.move_on(Tip { frame, sum, position: after, pages, ..self.tip });
        Ok(())
    }

    /// Takes the pages by which the database grew, and that the transaction did not write. A
    /// replica must get what a reader of them gets.
    fn take_unwritten(
        &mut self,
        record: &mut LogRecord,
        new_pages: impl Iterator<Item = PageNo>,
    ) -> Result<()> {
        let (base, commit, size) = (self.base.clone(), record.commit, self.base.page_size);
        // The pages stay as capture reads them here, whatever a checkpoint copies, and whenever.
        let on_disk = base.progress.on_disk();
        let _nobody_copies = lock(&base.backfill);
        drop(on_disk);
        let mut older = u32::MAX;
        for number in new_pages {
            if base.index.lookup(number.get(), commit.first, commit.last).is_some() {
                continue;
            }
            let mut page = vec![0; size.bytes()];
            if let Some(frame) = base.index.lookup(number.get(), 1, commit.last) {
                older = older.min(frame);
                base.read_frame(frame, &mut page)?;
            } else {
                self.cut_mark(number)?;
                self.handle.read(&mut page, number.offset(size))?;
            }
            self.take_page(record, number, self.base.page_key.hash(number, &page), &page)?;
        }
        // This frame is from when the database was as long before. No copy took it while the
        // database was shorter; now a copy has to.
        if older <= base.index.backfilled() {
            base.index.set_backfilled(older - 1);
        }
        base.forget_boundaries(older);
        Ok(())
    }

    /// Takes the file's mark off, if it lies where this page is. The caller holds `backfill`.
    fn cut_mark(&mut self, number: PageNo) -> Result<()> {
        let size = u64::from(self.base.page_size.get());
        let bytes = self.handle.size()?;
        let whole = bytes / size * size;
        if bytes > whole && whole == number.offset(self.base.page_size) {
            let base = self.base.clone();
            base.writing(|| self.handle.truncate(whole))?;
        }
        Ok(())
    }

    fn give(&mut self, after: Option<Position>, sink: &mut dyn Sink) -> Result<()> {
        let bytes = self.out.len();
        sink.records(self.out.split().freeze(), after)?;
        self.images.wrote(bytes, self.base.log.renewals(), Instant::now());
        Ok(())
    }

    /// Hands on what was encoded, and moves the shared tip.
    fn hand_on(&mut self, sink: &mut dyn Sink) -> Result<()> {
        if !self.out.is_empty() {
            sink.committed(self.tip.position.number())?;
            self.give(Some(self.tip.position), sink)?;
            // One allocation serves many batches, as long as no one keeps the old ones.
            self.out.reserve(BATCH_BYTES / 8 + HEADER_BYTES);
        }
        if self.base.tip() != self.tip {
            self.base.set_tip(self.tip);
        }
        Ok(())
    }
}

/// A record in the making.
#[derive(Debug)]
struct LogRecord {
    commit: CommitFrames,
    sum: Checksum,
    changed: u32,
    /// Pages beyond the size before the commit.
    grown: u32,
    last_page: u32,
    /// Whether the last page was the same before.
    same: bool,
    /// Whether it has the last page whole.
    whole: bool,
    /// Whether its changes fit one unit so far.
    in_one_unit: bool,
}

impl LogRecord {
    fn begin(capture: &Capture, commit: CommitFrames) -> LogRecord {
        let sum = capture.tip.position.checksum();
        LogRecord {
            commit,
            sum,
            changed: 0,
            grown: 0,
            last_page: 0,
            same: false,
            whole: false,
            in_one_unit: true,
        }
    }
}
