//! Walking through a segment's records: all bytes verified, or from header to header.
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use bytes::{Bytes, BytesMut};

use super::CURE;
use crate::checksum::PageKey;
use crate::error::{Error, Result};
use crate::files;
use crate::txid::Position;
use crate::wire::{
    Decoder, HEADER_BYTES, Header, RecordPart, SEGMENT_BYTES, Segment, TXN_MAX_BYTES, TxnEnd, Unit,
};

/// Bytes of a segment's file before its first record.
pub(super) const HEAD_BYTES: u64 = SEGMENT_BYTES as u64;
/// Bytes between two entries of a segment's index: what a search reads at most, besides one record.
const INDEX_EVERY_BYTES: u64 = 256 * 1024;
/// Bytes read at one time while all is verified.
const SCAN_READ_BYTES: usize = 256 * 1024;
/// Bytes read at one time while hopping: some small records, or what is around a page.
const HOP_READ_BYTES: usize = 4096;
/// The longest unit that hopping reads in full.
const HOP_UNIT_BYTES: usize = HEADER_BYTES + TXN_MAX_BYTES;

/// Some of the record boundaries of a segment: transaction number before, and address.
#[derive(Clone, Debug, Default)]
pub(super) struct Index(Vec<(u64, u64)>);

impl Index {
    /// Notes a boundary if the last one noted is far enough away.
    pub(super) fn note(&mut self, number: u64, lsn: u64) {
        if self.0.last().is_none_or(|&(_, last)| lsn >= last + INDEX_EVERY_BYTES) {
            self.0.push((number, lsn));
        }
    }

    /// The last noted boundary at or before the one after transaction `number`.
    pub(super) fn before(&self, number: u64) -> Option<u64> {
        let after = self.0.partition_point(|&(n, _)| n <= number);
        Some(self.0.get(after.checked_sub(1)?)?.1)
    }

    pub(super) fn cut(&mut self, lsn: u64) {
        self.0.retain(|&(_, at)| at < lsn);
    }
}

/// What a segment was found to hold.
#[derive(Debug)]
pub(super) struct Scan {
    /// The address after the last complete record.
    pub(super) end: u64,
    /// The position after it.
    pub(super) tip: Position,
    pub(super) index: Index,
    /// Why the scan ended before the end of the file, if bytes are there that make no sense.
    pub(super) problem: Option<String>,
}

/// Verifies a segment's records up to the file offset `until`.
pub(super) fn scan(file: &File, path: &Path, head: Segment, until: u64, key: PageKey) -> Result<Scan> {
    let mut walk = Walk {
        found: Scan { end: head.start, tip: head.before, index: Index::default(), problem: None },
        open: None,
    };
    let mut decoder = Decoder::new(Some(key));
    let mut offset = HEAD_BYTES;
    while offset < until {
        let wanted = usize::try_from(until - offset).unwrap_or(usize::MAX).min(SCAN_READ_BYTES);
        let mut buffer = BytesMut::zeroed(wanted);
        let got = files::read_at(file, &mut buffer, offset).map_err(Error::io("read", path))?;
        if got == 0 {
            break;
        }
        buffer.truncate(got);
        offset += got as u64;
        decoder.push(buffer.freeze());
        loop {
            let unit = match decoder.next() {
                Ok(Some(unit)) => unit,
                Ok(None) => break,
                Err(error) => return Ok(walk.stopped(error.to_string())),
            };
            let end = head.start + (offset - HEAD_BYTES) - decoder.buffered() as u64;
            if let Err(problem) = walk.step(&unit, end) {
                return Ok(walk.stopped(problem));
            }
        }
    }
    Ok(walk.found)
}

/// The state of a scan.
struct Walk {
    found: Scan,
    /// Within a record: its changes so far.
    open: Option<u32>,
}

impl Walk {
    fn stopped(mut self, problem: String) -> Scan {
        self.found.problem = Some(problem);
        self.found
    }

    fn step(&mut self, unit: &Unit, end: u64) -> Result<(), String> {
        let message = unit.decode().map_err(|e| e.to_string())?;
        let misplaced = || format!("a {:?} unit where none may be", unit.kind);
        if !unit.kind.is_of_record() {
            return Err(misplaced());
        }
        for part in message.parts() {
            match (part, self.open) {
                (RecordPart::Begin(begin), None) => {
                    if begin.before != self.found.tip {
                        return Err(format!("a record after {} follows {}", begin.before, self.found.tip));
                    }
                    self.open = Some(0);
                }
                (RecordPart::Change(_), Some(pages)) => self.open = Some(pages.saturating_add(1)),
                (RecordPart::End(txn_end), Some(pages)) => {
                    if txn_end.changed != pages || txn_end.after.number() <= self.found.tip.number() {
                        return Err("a record whose end does not fit its pages".to_owned());
                    }
                    self.found.index.note(self.found.tip.number(), self.found.end);
                    self.found.tip = txn_end.after;
                    self.found.end = end;
                    self.open = None;
                }
                _ => return Err(misplaced()),
            }
        }
        Ok(())
    }
}

/// A part of a segment's file, from one record boundary to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    /// The address of the segment's first record byte.
    pub(super) segment: u64,
    pub(super) from: u64,
    pub(super) until: u64,
}

/// Where a record begins or ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Edge {
    Begin(Position),
    /// The end, after the unit that was read.
    End(TxnEnd),
}

/// Visits the edges of each record: a beginning with its address, an end with the address after it.
/// Reads records of one unit, and what is around the pages of others.
pub(super) fn hop(
    file: &File,
    path: &Path,
    stretch: Stretch,
    mut visit: impl FnMut(u64, Edge) -> ControlFlow<()>,
) -> Result<()> {
    let offset_of = |lsn: u64| HEAD_BYTES + lsn - stretch.segment;
    let corrupt = |lsn, what: String| Error::Corrupt {
        path: path.to_path_buf(),
        offset: offset_of(lsn),
        what,
        cure: CURE,
    };
    let mut window = Window { bytes: BytesMut::new(), base: stretch.from };
    let mut lsn = stretch.from;
    while lsn < stretch.until {
        let left = usize::try_from(stretch.until - lsn).unwrap_or(usize::MAX);
        let read = Error::io("read", path);
        let head = window.look(file, lsn, HEADER_BYTES.min(left), left, &offset_of).map_err(read)?;
        let head = *head.first_chunk::<HEADER_BYTES>().ok_or_else(|| corrupt(lsn, "too short".into()))?;
        let header = Header::parse(&head).map_err(|e| corrupt(lsn, e.to_string()))?;
        let after = lsn + header.unit_bytes as u64;
        if let Some(kind) = header.kind.filter(|kind| kind.begins_record() || kind.ends_record()) {
            let (wanted, read) = (header.unit_bytes.min(HOP_UNIT_BYTES).min(left), Error::io("read", path));
            let raw = window.look(file, lsn, wanted, left, &offset_of).map_err(read)?;
            let raw = raw.get(..header.unit_bytes).ok_or_else(|| corrupt(lsn, "a cut record".into()))?;
            let unit = Unit { kind, hash: header.hash, raw: Bytes::copy_from_slice(raw), page_key: None };
            for part in unit.decode().map_err(|e| corrupt(lsn, e.to_string()))?.parts() {
                let visited = match part {
                    RecordPart::Begin(begin) => visit(lsn, Edge::Begin(begin.before)),
                    RecordPart::End(end) => visit(after, Edge::End(end)),
                    RecordPart::Change(_) => ControlFlow::Continue(()),
                };
                if visited.is_break() {
                    return Ok(());
                }
            }
        }
        lsn = after;
    }
    Ok(())
}

/// The bytes of a segment that were read last.
struct Window {
    bytes: BytesMut,
    /// The address of the first of them.
    base: u64,
}

impl Window {
    /// The bytes from an address on: as many as are wanted, unless the file ends before. Reads
    /// more of those that are left, if it has to read.
    fn look(
        &mut self,
        file: &File,
        lsn: u64,
        wanted: usize,
        left: usize,
        offset_of: &dyn Fn(u64) -> u64,
    ) -> io::Result<&[u8]> {
        if lsn + wanted as u64 > self.base + self.bytes.len() as u64 {
            self.bytes.resize(HOP_READ_BYTES.min(left).max(wanted), 0);
            let filled = files::read_at(file, &mut self.bytes, offset_of(lsn))?;
            self.bytes.truncate(filled);
            self.base = lsn;
        }
        Ok(&self.bytes[(lsn - self.base) as usize..])
    }
}
