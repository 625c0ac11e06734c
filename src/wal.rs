//! SQLite's WAL and wal-index as bytes: headers, frames, checksums, the layout of the index.
//!
//! The formats are SQLite's published ones (<https://sqlite.org/fileformat2.html#walformat>,
//! <https://sqlite.org/walformat.html>). Nothing here does input or output.

use crate::page::{PageNo, PageSize};

/// Bytes of the WAL file's header.
pub(crate) const WAL_HEADER_BYTES: usize = 32;
/// Bytes of a frame's header.
pub(crate) const FRAME_HEADER_BYTES: usize = 24;
/// The format that SQLite writes since 3.7.0, in the WAL's header and in the index.
const FORMAT: u32 = 3_007_000;
/// The WAL's magic number; its lowest bit is set when checksums are over big-endian words.
const MAGIC: u32 = 0x377f_0682;

/// Bytes of one copy of the index header; two copies follow each other.
pub(crate) const INDEX_HEADER_BYTES: usize = 48;
/// Where the checkpoint information begins in the index: backfilled, marks, locks, attempted.
pub(crate) const BACKFILLED_OFFSET: usize = 96;
/// Where the five read marks begin in the index.
pub(crate) const READ_MARKS_OFFSET: usize = 100;
/// Where the frame up to which a backfill was begun stands in the index.
pub(crate) const ATTEMPTED_OFFSET: usize = 128;
/// Bytes of the index before its first page number.
pub(crate) const INDEX_HEAD_BYTES: usize = 136;
/// A read mark that no reader uses.
pub(crate) const READ_MARK_UNUSED: u32 = u32::MAX;

/// Bytes of one region of the index.
pub(crate) const REGION_BYTES: usize = 32_768;
/// Page numbers in a region, except the first.
const REGION_FRAMES: u32 = 4096;
/// Page numbers in the first region, which also holds the head.
const FIRST_REGION_FRAMES: u32 = REGION_FRAMES - (INDEX_HEAD_BYTES as u32) / 4;
/// Where the hash slots begin in a region.
pub(crate) const SLOTS_OFFSET: usize = 16_384;
/// Hash slots in a region.
pub(crate) const SLOTS: u32 = 8192;
const _: () = assert!(SLOTS_OFFSET + SLOTS as usize * 2 == REGION_BYTES);
const _: () = assert!(SLOTS_OFFSET == REGION_FRAMES as usize * 4);

/// The two running words of a WAL checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct WalSum(pub(crate) u32, pub(crate) u32);

impl WalSum {
    /// Continues the sum over `bytes`, a multiple of eight, read as words of the given order.
    pub(crate) fn over(self, bytes: &[u8], big_endian: bool) -> WalSum {
        debug_assert!(bytes.len().is_multiple_of(8));
        let WalSum(mut a, mut b) = self;
        if big_endian {
            for pair in bytes.chunks_exact(8) {
                a = a.wrapping_add(be_u32(&pair[..4])).wrapping_add(b);
                b = b.wrapping_add(be_u32(&pair[4..])).wrapping_add(a);
            }
        } else {
            for pair in bytes.chunks_exact(8) {
                a = a.wrapping_add(le_u32(&pair[..4])).wrapping_add(b);
                b = b.wrapping_add(le_u32(&pair[4..])).wrapping_add(a);
            }
        }
        WalSum(a, b)
    }
}

/// The two salts of one generation of the WAL, as they stand in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Salts(pub(crate) [u8; 8]);

pub(crate) fn be_u32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

pub(crate) fn le_u32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn ne_u32(bytes: &[u8]) -> u32 {
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The WAL's header for a new generation, and the checksum that its first frame continues.
pub(crate) fn wal_header(size: PageSize, sequence: u32, salts: Salts) -> ([u8; WAL_HEADER_BYTES], WalSum) {
    let big_endian = cfg!(target_endian = "big");
    let mut header = [0; WAL_HEADER_BYTES];
    header[0..4].copy_from_slice(&(MAGIC | u32::from(big_endian)).to_be_bytes());
    header[4..8].copy_from_slice(&FORMAT.to_be_bytes());
    header[8..12].copy_from_slice(&size.get().to_be_bytes());
    header[12..16].copy_from_slice(&sequence.to_be_bytes());
    header[16..24].copy_from_slice(&salts.0);
    let sum = WalSum::default().over(&header[..24], big_endian);
    header[24..28].copy_from_slice(&sum.0.to_be_bytes());
    header[28..32].copy_from_slice(&sum.1.to_be_bytes());
    (header, sum)
}

/// The header of one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FrameHeader {
    pub(crate) page: u32,
    /// The database's size in pages after the commit that this frame ends; zero within a
    /// transaction.
    pub(crate) commit: u32,
    pub(crate) salts: Salts,
    pub(crate) sum: WalSum,
}

impl FrameHeader {
    pub(crate) fn parse(bytes: &[u8]) -> FrameHeader {
        let mut salts = [0; 8];
        salts.copy_from_slice(&bytes[8..16]);
        FrameHeader {
            page: be_u32(&bytes[0..4]),
            commit: be_u32(&bytes[4..8]),
            salts: Salts(salts),
            sum: WalSum(be_u32(&bytes[16..20]), be_u32(&bytes[20..24])),
        }
    }
}

/// Appends a frame to `out` and returns the running checksum after it.
pub(crate) fn push_frame(
    out: &mut Vec<u8>,
    page_no: PageNo,
    commit: u32,
    salts: Salts,
    page: &[u8],
    sum: WalSum,
    big_endian: bool,
) -> WalSum {
    let mut header = [0; FRAME_HEADER_BYTES];
    header[0..4].copy_from_slice(&page_no.get().to_be_bytes());
    header[4..8].copy_from_slice(&commit.to_be_bytes());
    header[8..16].copy_from_slice(&salts.0);
    let sum = sum.over(&header[..8], big_endian).over(page, big_endian);
    header[16..20].copy_from_slice(&sum.0.to_be_bytes());
    header[20..24].copy_from_slice(&sum.1.to_be_bytes());
    out.extend_from_slice(&header);
    out.extend_from_slice(page);
    sum
}

/// Where a frame begins in the WAL file; frames count from 1.
pub(crate) fn frame_offset(frame: u32, size: PageSize) -> u64 {
    debug_assert!(frame > 0);
    WAL_HEADER_BYTES as u64 + u64::from(frame - 1) * frame_bytes(size) as u64
}

/// Bytes of a frame with its header.
pub(crate) fn frame_bytes(size: PageSize) -> usize {
    FRAME_HEADER_BYTES + size.bytes()
}

/// The index header: what readers take as the committed end of the WAL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct IndexHeader {
    /// Counts commits; a change tells readers to drop their caches.
    pub(crate) change: u32,
    pub(crate) big_endian: bool,
    /// Zero in the index of a database that was never written in WAL mode.
    page_size: u16,
    pub(crate) max_frame: u32,
    pub(crate) pages: u32,
    pub(crate) frame_sum: WalSum,
    pub(crate) salts: Salts,
}

impl IndexHeader {
    /// A header for this end of the WAL.
    pub(crate) fn of(
        size: PageSize,
        change: u32,
        big_endian: bool,
        max_frame: u32,
        pages: u32,
        frame_sum: WalSum,
        salts: Salts,
    ) -> IndexHeader {
        // SQLite keeps the page size in 16 bits: 65,536 is stored as 1.
        let page_size = ((size.get() & 0xff00) | (size.get() >> 16)) as u16;
        IndexHeader { change, big_endian, page_size, max_frame, pages, frame_sum, salts }
    }

    /// Reads one copy of the header; nothing when it is not initialised, of another format, or
    /// torn.
    pub(crate) fn parse(bytes: &[u8; INDEX_HEADER_BYTES]) -> Option<IndexHeader> {
        let sum = WalSum::default().over(&bytes[..40], cfg!(target_endian = "big"));
        let stored = WalSum(ne_u32(&bytes[40..44]), ne_u32(&bytes[44..48]));
        if sum != stored || bytes[12] == 0 || ne_u32(&bytes[0..4]) != FORMAT {
            return None;
        }
        let mut salts = [0; 8];
        salts.copy_from_slice(&bytes[32..40]);
        Some(IndexHeader {
            change: ne_u32(&bytes[8..12]),
            big_endian: bytes[13] != 0,
            page_size: u16::from_ne_bytes([bytes[14], bytes[15]]),
            max_frame: ne_u32(&bytes[16..20]),
            pages: ne_u32(&bytes[20..24]),
            frame_sum: WalSum(ne_u32(&bytes[24..28]), ne_u32(&bytes[28..32])),
            salts: Salts(salts),
        })
    }

    pub(crate) fn encode(&self) -> [u8; INDEX_HEADER_BYTES] {
        let mut bytes = [0; INDEX_HEADER_BYTES];
        bytes[0..4].copy_from_slice(&FORMAT.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.change.to_ne_bytes());
        bytes[12] = 1;
        bytes[13] = u8::from(self.big_endian);
        bytes[14..16].copy_from_slice(&self.page_size.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.max_frame.to_ne_bytes());
        bytes[20..24].copy_from_slice(&self.pages.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.frame_sum.0.to_ne_bytes());
        bytes[28..32].copy_from_slice(&self.frame_sum.1.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.salts.0);
        let sum = WalSum::default().over(&bytes[..40], cfg!(target_endian = "big"));
        bytes[40..44].copy_from_slice(&sum.0.to_ne_bytes());
        bytes[44..48].copy_from_slice(&sum.1.to_ne_bytes());
        bytes
    }
}

/// The region of the index that holds a frame's page number.
pub(crate) fn region_of(frame: u32) -> usize {
    debug_assert!(frame > 0);
    if frame <= FIRST_REGION_FRAMES {
        0
    } else {
        ((frame - FIRST_REGION_FRAMES - 1) / REGION_FRAMES + 1) as usize
    }
}

/// The frame before the first of a region.
pub(crate) fn region_zero(region: usize) -> u32 {
    if region == 0 { 0 } else { FIRST_REGION_FRAMES + (region as u32 - 1) * REGION_FRAMES }
}

/// Where the page number of a frame stands in its region.
pub(crate) fn page_number_offset(frame: u32) -> usize {
    let region = region_of(frame);
    let first = if region == 0 { INDEX_HEAD_BYTES } else { 0 };
    first + (frame - region_zero(region) - 1) as usize * 4
}

/// The first hash slot to look at for a page.
pub(crate) fn slot_of(page: u32) -> u32 {
    page.wrapping_mul(383) & (SLOTS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_lie_in_their_regions_without_gap_or_overlap() {
        let mut last = (0, INDEX_HEAD_BYTES - 4);
        for frame in 1..20_000 {
            let here = (region_of(frame), page_number_offset(frame));
            let next = if last.1 + 4 == SLOTS_OFFSET { (last.0 + 1, 0) } else { (last.0, last.1 + 4) };
            assert_eq!(here, next, "frame {frame}");
            assert!(frame > region_zero(here.0) && frame - region_zero(here.0) <= REGION_FRAMES);
            last = here;
        }
        assert_eq!(FIRST_REGION_FRAMES, 4062);
    }

    #[test]
    fn headers_round_trip_and_a_flipped_bit_is_seen() {
        let of = |bytes| {
            let size = PageSize::new(bytes).unwrap();
            IndexHeader::of(size, 7, false, 99, 12, WalSum(1, 2), Salts([9; 8]))
        };
        for (bytes, stored) in [(512, 512), (4096, 4096), (32_768, 32_768), (65_536, 1)] {
            assert_eq!(of(bytes).page_size, stored, "{bytes}");
        }
        let header = of(4096);
        let bytes = header.encode();
        assert_eq!(IndexHeader::parse(&bytes), Some(header));
        for bit in 0..INDEX_HEADER_BYTES * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(IndexHeader::parse(&flipped), None, "bit {bit}");
        }
    }
}
