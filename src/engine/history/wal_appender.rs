//! How a replica writes the WAL: verified transactions become frames that readers see at once.

use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::{Checksum, PageHash};
use crate::engine::file::database::{OpenDatabase, Tip, index_header};
use crate::engine::file::hash_cache::HashCache;
use crate::engine::history::intake_error::IntakeError;
use crate::error::Result;
use crate::hex::hex;
use crate::lock::lock;
use crate::page::PageNo;
use crate::sqlite::Handle;
use crate::txid::{Epoch, EpochHistory, Position};
use crate::wal::{FRAME_HEADER_BYTES, WalSum, frame_bytes, frame_offset, push_frame, region_of};
use crate::wire::{PageChange, TxnBegin, TxnEnd, WireError};

/// The appender writes frames to the WAL when they are together larger than this.
const WRITE_BYTES: usize = 512 * 1024;

/// Appends transactions to the WAL. `handle` holds CKPT and WRITE as long as it lives.
#[derive(Debug)]
pub(in crate::engine) struct WalAppender {
    pub(in crate::engine) base: Arc<OpenDatabase>,
    pub(in crate::engine) handle: Handle,
    cache: HashCache,
    /// The state after the last whole transaction that the appender took, published or not.
    run: Tip,
    /// What readers see.
    published: Tip,
    txn: Option<Txn>,
    /// Frames that are not in the file yet; the first of them is `buffered + 1`.
    frames: Vec<u8>,
    buffered: u32,
    /// The last page that came, and its image in `held_image`: only what comes next tells whether
    /// it ends its transaction.
    held: Option<PageNo>,
    held_image: Vec<u8>,
    last_frame: u32,
    sum: WalSum,
    big_endian: bool,
    page: Vec<u8>,
}

/// The most pages of a database (SQLite's limit).
const PAGES_MAX: u32 = u32::MAX - 1;

/// A page and its number.
pub(in crate::engine) type NumberedPage = (PageNo, Bytes);

/// A transaction that is coming in.
#[derive(Debug)]
struct Txn {
    begin: TxnBegin,
    checksum: Checksum,
    changed: u32,
    /// The highest page number.
    highest: u32,
}

impl WalAppender {
    pub(in crate::engine) fn new(base: Arc<OpenDatabase>, handle: Handle) -> Result<WalAppender> {
        let tip = base.tip();
        let header = base.settled_header()?;
        Ok(WalAppender {
            cache: HashCache::new(),
            run: tip,
            published: tip,
            txn: None,
            frames: Vec::new(),
            buffered: tip.frame,
            held: None,
            held_image: vec![0; base.page_size.bytes()],
            last_frame: tip.frame,
            sum: tip.sum,
            big_endian: header.big_endian,
            page: vec![0; base.page_size.bytes()],
            base,
            handle,
        })
    }

    /// The position after the last whole transaction that the appender took.
    pub(in crate::engine) fn position(&self) -> Position {
        self.run.position
    }

    /// The last frame of the last whole transaction that the appender took.
    pub(in crate::engine) fn last_frame(&self) -> u32 {
        self.run.frame
    }

    /// Bytes of frames of whole transactions that no reader sees yet.
    pub(in crate::engine) fn unpublished_bytes(&self) -> u64 {
        u64::from(self.run.frame - self.published.frame) * u64::from(self.base.page_size.get())
    }

    /// Whether a transaction has begun and not ended.
    pub(in crate::engine) fn in_transaction(&self) -> bool {
        self.txn.is_some()
    }

    /// A record begins.
    pub(in crate::engine) fn begin(
        &mut self,
        begin: TxnBegin,
        history: &EpochHistory,
    ) -> Result<(), IntakeError> {
        if self.txn.is_some() {
            return Err(IntakeError::garbled("a transaction begins inside of another"));
        }
        if begin.page_size != self.base.page_size {
            return Err(IntakeError::garbled("a transaction of another page size"));
        }
        if begin.before != self.run.position {
            return Err(IntakeError::mismatch(self.run.position, begin.before));
        }
        self.expect_epoch(begin.epoch, history)?;
        self.txn = Some(Txn { begin, checksum: self.run.position.checksum(), changed: 0, highest: 0 });
        Ok(())
    }

    fn expect_epoch(&self, epoch: Epoch, history: &EpochHistory) -> Result<(), IntakeError> {
        match history.epoch_of(self.run.position.number() + 1) {
            Some(known) if known == epoch => Ok(()),
            known => Err(IntakeError::mismatch(known.unwrap_or(Epoch::new(0, 0)), epoch)),
        }
    }

    /// A changed page of the record.
    pub(in crate::engine) fn change(&mut self, change: &PageChange<'_>) -> Result<(), IntakeError> {
        let PageChange { number, hash, .. } = *change;
        if number.is_lock_page(self.base.page_size) {
            return Err(IntakeError::garbled("a page that the database can't have"));
        }
        if self.txn.is_none() {
            return Err(IntakeError::garbled("a page outside of a transaction"));
        }
        let known = number.get() <= self.run.pages;
        let old = match change.base() {
            Some(base) => Some(self.expect_base(number, base, known)?),
            None if known => Some(self.old_hash(number)?),
            None => None,
        };
        change.make(&mut self.page, &self.base.page_key).map_err(|error| match error {
            // Over the right base: so what is here is not what its hash says.
            WireError::Patch if change.base().is_some() => {
                IntakeError::mismatch(format!("{number:?} as the record has it"), error)
            }
            _ => IntakeError::garbled(error.to_string()),
        })?;
        if let Some(txn) = &mut self.txn {
            if let Some(old) = old {
                txn.checksum = txn.checksum.without(old);
            }
            txn.checksum = txn.checksum.with(hash);
            txn.changed += 1;
            txn.highest = txn.highest.max(number.get());
        }
        self.cache.set(number, hash);
        self.push_held(0)?;
        self.held = Some(number);
        std::mem::swap(&mut self.held_image, &mut self.page);
        Ok(())
    }

    /// Reads into `page` the image that a change lies over. It must be the one that the change
    /// names.
    fn expect_base(&mut self, number: PageNo, base: PageHash, known: bool) -> Result<PageHash, IntakeError> {
        if !known {
            return Err(IntakeError::mismatch(format!("an image of {number:?}"), "no such page"));
        }
        self.old_image(number)?;
        let old = self.cache.get(number).unwrap_or_else(|| self.base.page_key.hash(number, &self.page));
        if old != base {
            let text = |hash: PageHash| format!("{number:?} with the hash {}", hex(&hash.to_bytes()));
            return Err(IntakeError::mismatch(text(base), text(old)));
        }
        Ok(old)
    }

    /// The record ends: its pages must lead to the position that it states.
    pub(in crate::engine) fn end(&mut self, end: TxnEnd) -> Result<(), IntakeError> {
        let Some(txn) = self.txn.take() else {
            return Err(IntakeError::garbled("a transaction ends that did not begin"));
        };
        // Such a page would count and not be there.
        if txn.highest > end.pages || end.pages > PAGES_MAX {
            return Err(IntakeError::garbled("a transaction with pages that the database can't have"));
        }
        let mut checksum = txn.checksum;
        for number in (end.pages + 1..=self.run.pages).filter_map(PageNo::new) {
            if !number.is_lock_page(self.base.page_size) {
                checksum = checksum.without(self.old_hash(number)?);
            }
        }
        let found =
            Position::new(crate::txid::Txid::new(txn.begin.epoch, self.run.position.number() + 1), checksum);
        // A commit frame says the size; with zero pages it would be no commit frame.
        if found != end.after || end.changed != txn.changed || txn.changed == 0 || end.pages == 0 {
            return Err(IntakeError::mismatch(end.after, found));
        }
        self.push_held(end.pages)?;
        self.base.bound.transaction(self.last_frame - self.run.frame);
        self.run =
            Tip { frame: self.last_frame, sum: self.sum, position: end.after, pages: end.pages, ..self.run };
        Ok(())
    }

    /// Writes the page that the appender held back as a frame. `commit` is the database's size when
    /// the page ends a transaction.
    fn push_held(&mut self, commit: u32) -> Result<()> {
        let Some(number) = self.held.take() else { return Ok(()) };
        let frame = self.last_frame + 1;
        if self.frames.is_empty() {
            self.buffered = self.last_frame;
        }
        self.base.index.ensure(&mut self.handle, region_of(frame), true)?;
        let (salts, image) = (self.run.salts, &self.held_image);
        self.sum = push_frame(&mut self.frames, number, commit, salts, image, self.sum, self.big_endian);
        self.base.index.append(&self.handle, frame, number.get())?;
        self.last_frame = frame;
        if self.frames.len() >= WRITE_BYTES {
            self.write_frames()?;
        }
        Ok(())
    }

    fn write_frames(&mut self) -> Result<()> {
        if !self.frames.is_empty() {
            let offset = frame_offset(self.buffered + 1, self.base.page_size);
            self.base.wal.write(&self.frames, offset)?;
            self.frames.clear();
        }
        Ok(())
    }

    /// The hash of a page as of the last whole transaction.
    fn old_hash(&mut self, number: PageNo) -> Result<PageHash> {
        if let Some(hash) = self.cache.get(number) {
            return Ok(hash);
        }
        self.old_image(number)?;
        Ok(self.base.page_key.hash(number, &self.page))
    }

    /// Reads a page as of the last whole transaction, into `page`.
    fn old_image(&mut self, number: PageNo) -> Result<()> {
        match self.base.index.lookup(number.get(), 1, self.run.frame) {
            // Not in the file yet.
            Some(found) if !self.frames.is_empty() && found > self.buffered => {
                let frame = frame_bytes(self.base.page_size);
                let at = (found - self.buffered - 1) as usize * frame + FRAME_HEADER_BYTES;
                self.page.copy_from_slice(&self.frames[at..at + self.base.page_size.bytes()]);
                Ok(())
            }
            Some(found) => self.base.read_frame(found, &mut self.page),
            None => self.handle.read(&mut self.page, number.offset(self.base.page_size)),
        }
    }

    /// Makes all whole transactions visible to readers.
    pub(in crate::engine) fn publish(&mut self) -> Result<()> {
        if self.run == self.published {
            return Ok(());
        }
        self.write_frames()?;
        let change = self.base.index.glance().1;
        self.base.index.publish(&index_header(
            &self.base,
            &self.run,
            change.wrapping_add(1),
            self.big_endian,
        ));
        self.published = self.run;
        self.base.set_tip(self.run);
        Ok(())
    }

    /// Forgets what is not published.
    pub(in crate::engine) fn abort(&mut self) {
        self.txn = None;
        self.held = None;
        self.frames.clear();
        self.cache.clear();
        if self.last_frame != self.published.frame {
            self.base.index.clean_above(self.published.frame);
        }
        self.run = self.published;
        self.buffered = self.run.frame;
        self.last_frame = self.run.frame;
        self.sum = self.run.sum;
    }

    /// Goes on from a tip that a restart of the WAL, or other code, has set.
    pub(in crate::engine) fn resume(&mut self, tip: Tip) {
        debug_assert!(self.txn.is_none() && self.frames.is_empty());
        self.run = tip;
        self.published = tip;
        self.last_frame = tip.frame;
        self.buffered = tip.frame;
        self.sum = tip.sum;
        self.big_endian = cfg!(target_endian = "big");
    }

    /// Writes one commit of given pages that leads to a state which was verified elsewhere: a
    /// snapshot over a live database. `next` yields each page that differs. This calls
    /// `before_commit` with the tip that the commit frame will be, before it writes that frame.
    pub(in crate::engine) fn replace(
        &mut self,
        next: &mut dyn FnMut(&mut WalAppender) -> Result<Option<NumberedPage>>,
        position: Position,
        size: u32,
        before_commit: &mut dyn FnMut(&Tip) -> Result<()>,
    ) -> Result<()> {
        self.abort();
        while let Some((number, page)) = next(self)? {
            self.push_held(0)?;
            self.held_image.copy_from_slice(&page);
            self.held = Some(number);
        }
        if self.held.is_none() {
            // Nothing differs but the name of the state: page 1 as it is carries the commit.
            let (base, frame) = (self.base.clone(), self.run.frame);
            base.read_page(&mut self.handle, PageNo::FIRST, frame, &mut self.held_image)?;
            self.held = Some(PageNo::FIRST);
        }
        self.write_frames()?;
        self.push_held(size)?;
        self.run = Tip { frame: self.last_frame, sum: self.sum, position, pages: size, ..self.run };
        let base = self.base.clone();
        // A copy that readers stop before this commit would overwrite the anchor that tells what
        // the commit is.
        let _nobody_copies = lock(&base.backfill);
        before_commit(&self.run)?;
        self.publish()?;
        base.leap(self.run);
        Ok(())
    }

    pub(in crate::engine) fn read_current(&mut self, number: PageNo, buffer: &mut [u8]) -> Result<()> {
        self.base.read_page(&mut self.handle, number, self.published.frame, buffer)
    }

    /// Reads the pages of a run, as readers see them.
    pub(in crate::engine) fn read_run(&mut self, first: PageNo, buffer: &mut [u8]) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.base.read_run(&mut self.handle, first, self.published.frame, buffer)
    }
}
