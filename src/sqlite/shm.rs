//! The wal-index in shared memory, read and written as SQLite's protocol has it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use std::sync::{PoisonError, RwLock};

use crate::error::{Error, Result};
use crate::files::Paths;
use crate::sqlite::ffi::Handle;
use crate::wal::{
    ATTEMPTED_OFFSET, BACKFILLED_OFFSET, INDEX_HEAD_BYTES, INDEX_HEADER_BYTES, IndexHeader,
    READ_MARKS_OFFSET, REGION_BYTES, SLOTS, SLOTS_OFFSET, page_number_offset, region_of, region_zero,
    slot_of,
};

/// Of a wal-index that is corrupt.
const CURE: &str = "is SQLite's wal-index, with no data of its own: close all connections to the database, \
    remove it, and start the node again";

/// The file of a database's wal-index.
fn shm_path(handle: &Handle) -> std::path::PathBuf {
    Paths::new(handle.path()).shm()
}

/// The regions of a database's wal-index that were mapped so far.
///
/// Relaxed atomics read and write the words, with fences around a publish. The other party is
/// SQLite, in this process or another, which uses plain accesses and its own barrier.
#[derive(Debug)]
pub(crate) struct WalIndex {
    first: Region,
    regions: RwLock<Vec<Region>>,
}

#[derive(Clone, Copy, Debug)]
struct Region(NonNull<u8>);

// SAFETY: a region is shared memory that every thread and process may access; all access here is by
// atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(handle: &mut Handle, at: usize, extend: bool) -> Result<Region> {
        let pointer = handle.map(at, extend)?.ok_or_else(|| Error::Corrupt {
            path: shm_path(handle),
            offset: (at * REGION_BYTES) as u64,
            what: "the wal-index is shorter than its header says".into(),
            cure: CURE,
        })?;
        Ok(Region(pointer))
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= REGION_BYTES, "offset {offset}");
        // SAFETY: the offset is inside the region and aligned (regions are page-aligned). The
        // region stays mapped while the engine's connections are open, which outlive the
        // `WalIndex`.
        unsafe { AtomicU32::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }

    fn slot(&self, slot: u32) -> &AtomicU16 {
        assert!(slot < SLOTS, "slot {slot}");
        // SAFETY: as in `word`; slots are two bytes and begin at an even offset.
        unsafe { AtomicU16::from_ptr(self.0.as_ptr().add(SLOTS_OFFSET + slot as usize * 2).cast()) }
    }

    /// The newest frame up to `max` that holds the page, among this region's.
    fn lookup(&self, region: usize, page: u32, max: u32) -> Option<u32> {
        let zero = region_zero(region);
        let mut found = None;
        let mut slot = slot_of(page);
        for _ in 0..SLOTS {
            let entry = u32::from(self.slot(slot).load(Ordering::Relaxed));
            if entry == 0 {
                break;
            }
            let frame = zero + entry;
            // Entries above `max` may be half written by another writer's transaction: only their
            // number is read.
            if frame <= max
                && found.is_none_or(|f| frame > f)
                && self.word(page_number_offset(frame)).load(Ordering::Relaxed) == page
            {
                found = Some(frame);
            }
            slot = (slot + 1) & (SLOTS - 1);
        }
        found
    }
}

impl WalIndex {
    /// Maps the first region.
    pub(crate) fn new(handle: &mut Handle) -> Result<WalIndex> {
        let first = Region::map(handle, 0, true)?;
        Ok(WalIndex { first, regions: RwLock::new(vec![first]) })
    }

    /// Maps the regions up to this one.
    pub(crate) fn ensure(&self, handle: &mut Handle, region: usize, extend: bool) -> Result<()> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        while regions.len() <= region {
            let next = Region::map(handle, regions.len(), extend)?;
            regions.push(next);
        }
        Ok(())
    }

    fn region(&self, region: usize) -> Region {
        self.regions.read().unwrap_or_else(PoisonError::into_inner)[region]
    }

    fn first(&self) -> &Region {
        &self.first
    }

    /// The header, if both copies agree and are sound; nothing while a writer writes it.
    pub(crate) fn header(&self) -> Option<IndexHeader> {
        let one = self.copy(0);
        fence(Ordering::SeqCst);
        let two = self.copy(INDEX_HEADER_BYTES);
        fence(Ordering::SeqCst);
        if one == two { IndexHeader::parse(&one) } else { None }
    }

    fn copy(&self, at: usize) -> [u8; INDEX_HEADER_BYTES] {
        let region = self.first();
        let mut bytes = [0; INDEX_HEADER_BYTES];
        for (i, word) in bytes.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&region.word(at + i * 4).load(Ordering::Relaxed).to_ne_bytes());
        }
        bytes
    }

    /// The header that a writer left when it died while writing it. It is the second copy, which is
    /// written first, when that is whole. Otherwise it is the first, which was not begun then. Each
    /// says a committed end. The caller holds WRITE.
    pub(crate) fn header_left(&self) -> Option<IndexHeader> {
        fence(Ordering::SeqCst);
        let left = IndexHeader::parse(&self.copy(INDEX_HEADER_BYTES));
        left.or_else(|| IndexHeader::parse(&self.copy(0)))
    }

    /// The frame count alone, to see cheaply whether anything happened. Not to be trusted for more.
    pub(crate) fn glance(&self) -> (u32, u32) {
        let region = self.first();
        (region.word(16).load(Ordering::Acquire), region.word(8).load(Ordering::Acquire))
    }

    /// Makes a new end of the WAL visible to readers: second copy, barrier, first copy.
    pub(crate) fn publish(&self, header: &IndexHeader) {
        let region = self.first();
        let bytes = header.encode();
        let write = |at: usize| {
            for (i, word) in bytes.chunks_exact(4).enumerate() {
                let word = u32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
                region.word(at + i * 4).store(word, Ordering::Relaxed);
            }
        };
        fence(Ordering::SeqCst);
        write(INDEX_HEADER_BYTES);
        fence(Ordering::SeqCst);
        write(0);
        fence(Ordering::SeqCst);
    }

    /// Leaves one copy of the header as a writer that is killed while it writes that copy does.
    #[cfg(test)]
    pub(crate) fn tear(&self, copy: usize) {
        self.first().word(copy * INDEX_HEADER_BYTES + 40).fetch_xor(1, Ordering::SeqCst);
    }

    pub(crate) fn backfilled(&self) -> u32 {
        self.first().word(BACKFILLED_OFFSET).load(Ordering::Acquire)
    }

    pub(crate) fn set_backfilled(&self, frame: u32) {
        fence(Ordering::SeqCst);
        self.first().word(BACKFILLED_OFFSET).store(frame, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn set_attempted(&self, frame: u32) {
        self.first().word(ATTEMPTED_OFFSET).store(frame, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn read_mark(&self, mark: usize) -> u32 {
        self.first().word(READ_MARKS_OFFSET + mark * 4).load(Ordering::Acquire)
    }

    /// Sets a read mark. The caller holds that mark's lock, exclusive.
    pub(crate) fn set_read_mark(&self, mark: usize, frame: u32) {
        self.first().word(READ_MARKS_OFFSET + mark * 4).store(frame, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// The page of a frame, as the index has it; zero when its region is not mapped here yet.
    pub(crate) fn page_of(&self, frame: u32) -> u32 {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions
            .get(region_of(frame))
            .map_or(0, |region| region.word(page_number_offset(frame)).load(Ordering::Relaxed))
    }

    /// Shows the page of each of these frames, in order. Regions that are not mapped here yet are
    /// left out.
    pub(crate) fn each_page(&self, first: u32, last: u32, mut see: impl FnMut(u32, u32)) {
        let mut frame = first.max(1);
        while frame <= last {
            let at = region_of(frame);
            let Some(region) = self.regions.read().unwrap_or_else(PoisonError::into_inner).get(at).copied()
            else {
                return;
            };
            let end = region_zero(at + 1).min(last);
            for frame in frame..=end {
                see(frame, region.word(page_number_offset(frame)).load(Ordering::Relaxed));
            }
            frame = end + 1;
        }
    }

    /// The newest frame in `min..=max` that holds the page.
    pub(crate) fn lookup(&self, page: u32, min: u32, max: u32) -> Option<u32> {
        if max == 0 || min > max {
            return None;
        }
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        for region in (region_of(min.max(1))..=region_of(max)).rev() {
            if let Some(frame) = regions[region].lookup(region, page, max) {
                return (frame >= min).then_some(frame);
            }
        }
        None
    }

    /// Enters a frame into the index. Its region is mapped; no reader sees it before the header is
    /// published. The caller holds WRITE.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the region's hash table has no free slot, which that of a sound
    /// index always has.
    pub(crate) fn append(&self, handle: &Handle, frame: u32, page: u32) -> Result<()> {
        let region = self.region(region_of(frame));
        let entry = frame - region_zero(region_of(frame));
        if entry == 1 {
            // The first entry of a region: whatever an older generation left there goes.
            let from = if region_of(frame) == 0 { INDEX_HEAD_BYTES } else { 0 };
            for offset in (from..REGION_BYTES).step_by(4) {
                region.word(offset).store(0, Ordering::Relaxed);
            }
        } else if region.word(page_number_offset(frame)).load(Ordering::Relaxed) != 0 {
            // A writer that died in a transaction left entries after the last commit.
            self.clean_above(frame - 1);
        }
        let mut slot = slot_of(page);
        for _ in 0..SLOTS {
            if region.slot(slot).load(Ordering::Relaxed) == 0 {
                region.word(page_number_offset(frame)).store(page, Ordering::Relaxed);
                fence(Ordering::Release);
                region.slot(slot).store(entry as u16, Ordering::Relaxed);
                return Ok(());
            }
            slot = (slot + 1) & (SLOTS - 1);
        }
        Err(Error::Corrupt {
            path: shm_path(handle),
            offset: (region_of(frame) * REGION_BYTES) as u64,
            what: format!(
                "the wal-index has no room for frame {frame}, though a region has two slots for each of its \
                 frames"
            ),
            cure: CURE,
        })
    }

    /// Removes the entries above `max_frame` from its region: those of a transaction that was not
    /// committed. Later regions are cleared when they are begun anew. The caller holds WRITE.
    pub(crate) fn clean_above(&self, max_frame: u32) {
        if max_frame == 0 {
            return;
        }
        let at = region_of(max_frame);
        let region = self.region(at);
        let limit = max_frame - region_zero(at);
        for slot in 0..SLOTS {
            if u32::from(region.slot(slot).load(Ordering::Relaxed)) > limit {
                region.slot(slot).store(0, Ordering::Relaxed);
            }
        }
        for offset in (page_number_offset(max_frame) + 4..SLOTS_OFFSET).step_by(4) {
            region.word(offset).store(0, Ordering::Relaxed);
        }
    }
}
