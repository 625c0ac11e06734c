//! The arithmetic of a state on its way in: which pages count, and what their sum is. It does no
//! input or output of its own.
//!
//! Pages come over what is below (a live database's pages, or nothing). Each is as of the position
//! from which the records go on, or as of a later one. Then the records come, until the state that
//! the primary names. There the sum decides.

use crate::checksum::{Checksum, PageHash, PageKey};
use crate::engine::history::intake_error::IntakeError;
use crate::error::Result;
use crate::page::{PageNo, PageSet, PageSize};
use crate::txid::Position;
use crate::wire::{PageChange, PageRun, SnapEnd, TxnBegin, TxnEnd};

/// Where the pages are: those that came, and those below them.
pub(crate) trait PageStore {
    fn write(&mut self, number: PageNo, page: &[u8]) -> Result<()>;
    /// A page that came.
    fn read(&mut self, number: PageNo, page: &mut [u8]) -> Result<()>;
    /// A run of pages below.
    fn read_below(&mut self, first: PageNo, pages: &mut [u8]) -> Result<()>;
    /// Forgets pages that came and are above a number.
    fn cut_above(&mut self, last: u32) -> Result<()>;
}

/// A state that is coming in.
#[derive(Debug)]
pub(crate) struct Overlay {
    page_size: PageSize,
    key: PageKey,
    /// Pages that came.
    have: PageSet,
    /// Of the pages below, those up to this one count where none came.
    below: u32,
    /// The sum over the pages that count.
    sum: Checksum,
    /// The state that the records must reach; known when all pages have come.
    end: Option<SnapEnd>,
    /// The position of the last record that the replica applied.
    position: Position,
    txn: Option<TxnBegin>,
}

impl Overlay {
    /// An overlay over `below` pages. Records go on from `position`.
    pub(crate) fn new(page_size: PageSize, key: PageKey, position: Position, below: u32) -> Overlay {
        let (have, sum) = (PageSet::default(), Checksum::EMPTY);
        Overlay { page_size, key, have, below, sum, end: None, position, txn: None }
    }

    pub(crate) fn key(&self) -> PageKey {
        self.key
    }

    pub(crate) fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The position of the last record that the replica applied.
    pub(crate) fn position(&self) -> Position {
        self.position
    }

    /// Adds pages that an earlier attempt brought. Sums nothing.
    pub(crate) fn resume(&mut self, have: PageSet) {
        self.have = have;
    }

    /// Sets the sum of the pages that are there: what is below is known, or came in order.
    pub(crate) fn trust(&mut self, sum: Checksum) {
        self.sum = sum;
    }

    /// Whether all pages have come.
    pub(crate) fn ended(&self) -> bool {
        self.end.is_some()
    }

    /// What came, at the end.
    pub(crate) fn into_parts(self) -> (PageSet, Position, u32) {
        (self.have, self.position, self.end.map_or(0, |end| end.pages))
    }

    /// Adds a run of pages that none came for before, and that are in the file already.
    pub(crate) fn append(&mut self, run: &PageRun<'_>) {
        for (number, _, hash) in run.iter() {
            if !number.is_lock_page(self.page_size) {
                self.sum = self.sum.with(hash);
            }
            self.have.insert(number);
        }
    }

    /// Adds a run of pages that take the place of those that counted.
    pub(crate) fn patch(&mut self, run: &PageRun<'_>, store: &mut dyn PageStore) -> Result<(), IntakeError> {
        if self.end.is_some() {
            return Err(IntakeError::garbled("pages behind the end of a heal"));
        }
        let size = self.page_size;
        for (number, page, hash) in run.iter().filter(|(n, ..)| !n.is_lock_page(size)) {
            let old = self.counts(number).then(|| self.hash(number, store)).transpose()?;
            self.put(number, (old, hash), page, store)?;
        }
        Ok(())
    }

    /// All pages have come. Returns true when the state is exact already.
    pub(crate) fn end(&mut self, end: SnapEnd, store: &mut dyn PageStore) -> Result<bool, IntakeError> {
        if self.end.is_some() || end.exact_at.number() < self.position.number() || end.pages == 0 {
            return Err(IntakeError::garbled("a snapshot ends twice, before its begin, or without pages"));
        }
        self.end = Some(end);
        self.exact(store)
    }

    pub(crate) fn txn_begin(&mut self, begin: TxnBegin) -> Result<(), IntakeError> {
        if self.end.is_none() || self.txn.is_some() || begin.page_size != self.page_size {
            return Err(IntakeError::garbled("a transaction out of place in a snapshot"));
        }
        if begin.before != self.position {
            return Err(IntakeError::mismatch(self.position, begin.before));
        }
        self.txn = Some(begin);
        Ok(())
    }

    /// A record changes a page. Where the change lies over another image than the page has, the
    /// page stays as it is: it came from a later state, or it is not right and the sum will say so.
    pub(crate) fn change(
        &mut self,
        change: &PageChange<'_>,
        store: &mut dyn PageStore,
    ) -> Result<(), IntakeError> {
        let number = change.number;
        if self.txn.is_none() || number.is_lock_page(self.page_size) {
            return Err(IntakeError::garbled("a page out of place in a snapshot"));
        }
        let mut page = vec![0; self.page_size.bytes()];
        let old = self.counts(number).then(|| self.image(number, &mut page, store)).transpose()?;
        if change.base().is_some_and(|base| old != Some(base)) {
            return Ok(());
        }
        change.make(&mut page, &self.key).map_err(|error| IntakeError::garbled(error.to_string()))?;
        Ok(self.put(number, (old, change.hash), &page, store)?)
    }

    /// A record ends. Returns true when the state has become exact.
    pub(crate) fn txn_end(&mut self, end: TxnEnd, store: &mut dyn PageStore) -> Result<bool, IntakeError> {
        if self.txn.take().is_none() || end.after.number() != self.position.number() + 1 || end.pages == 0 {
            return Err(IntakeError::garbled("a transaction ends out of place in a snapshot"));
        }
        self.drop_above(end.pages, store)?;
        self.position = end.after;
        self.exact(store)
    }

    /// Takes a page in, in the place of the one that counted so far.
    fn put(
        &mut self,
        number: PageNo,
        (old, new): (Option<PageHash>, PageHash),
        page: &[u8],
        store: &mut dyn PageStore,
    ) -> Result<()> {
        store.write(number, page)?;
        self.sum = old.map_or(self.sum, |old| self.sum.without(old)).with(new);
        self.have.insert(number);
        Ok(())
    }

    fn counts(&self, number: PageNo) -> bool {
        number.get() <= self.below || self.have.contains(number)
    }

    /// The hash of a page that counts.
    fn hash(&self, number: PageNo, store: &mut dyn PageStore) -> Result<PageHash> {
        self.image(number, &mut vec![0; self.page_size.bytes()], store)
    }

    /// Reads a page that counts. Returns its hash.
    fn image(&self, number: PageNo, page: &mut [u8], store: &mut dyn PageStore) -> Result<PageHash> {
        if self.have.contains(number) {
            store.read(number, page)?;
        } else {
            store.read_below(number, page)?;
        }
        Ok(self.key.hash(number, page))
    }

    /// Pages above a size count no longer.
    pub(crate) fn drop_above(&mut self, pages: u32, store: &mut dyn PageStore) -> Result<()> {
        let first = pages.saturating_add(1);
        let mut next = PageNo::new(first);
        while let Some(number) = next.and_then(|next| self.have.from(next).next()) {
            self.uncount(number, store)?;
            next = number.get().checked_add(1).and_then(PageNo::new);
        }
        for number in (first..=self.below).filter_map(PageNo::new) {
            if !self.have.contains(number) {
                self.uncount(number, store)?;
            }
        }
        self.forget_above(pages, store)
    }

    fn uncount(&mut self, number: PageNo, store: &mut dyn PageStore) -> Result<()> {
        if !number.is_lock_page(self.page_size) {
            self.sum = self.sum.without(self.hash(number, store)?);
        }
        Ok(())
    }

    /// Pages above a number count no longer. Nothing ever summed them.
    pub(crate) fn forget_above(&mut self, pages: u32, store: &mut dyn PageStore) -> Result<()> {
        self.below = self.below.min(pages);
        self.have.cut_above(pages);
        store.cut_above(pages)
    }

    fn exact(&mut self, store: &mut dyn PageStore) -> Result<bool, IntakeError> {
        let Some(SnapEnd { exact_at: at, pages }) = self.end else { return Ok(false) };
        if self.position.number() < at.number() {
            return Ok(false);
        }
        self.drop_above(pages, store)?;
        if self.position != at || self.sum != at.checksum() {
            return Err(IntakeError::mismatch(at, format!("{} with checksum {}", self.position, self.sum)));
        }
        Ok(true)
    }

    /// Sums the hashes of the pages of a run that count, for the first time.
    pub(crate) fn count_in(
        &mut self,
        first: PageNo,
        span: u32,
        store: &mut dyn PageStore,
    ) -> Result<Checksum> {
        let mut sum = Checksum::EMPTY;
        for hash in self.hashes(first, span, store)?.into_iter().flatten() {
            sum = sum.with(hash);
            self.sum = self.sum.with(hash);
        }
        Ok(sum)
    }

    /// The hash of each page of a run; none for those that do not count.
    pub(crate) fn hashes(
        &self,
        first: PageNo,
        count: u32,
        store: &mut dyn PageStore,
    ) -> Result<Vec<Option<PageHash>>> {
        let size = self.page_size.bytes();
        let below = self.below.saturating_add(1).saturating_sub(first.get()).min(count);
        let mut run = vec![0; below as usize * size];
        if below > 0 {
            store.read_below(first, &mut run)?;
        }
        let mut pages = run.chunks_exact(size);
        let numbers = (first.get()..first.get().saturating_add(count)).filter_map(PageNo::new);
        numbers
            .map(|number| {
                let page = pages.next();
                if number.is_lock_page(self.page_size) {
                    return Ok(None);
                }
                match page {
                    _ if self.have.contains(number) => self.hash(number, store).map(Some),
                    Some(page) => Ok(Some(self.key.hash(number, page))),
                    None => Ok(None),
                }
            })
            .collect()
    }
}
