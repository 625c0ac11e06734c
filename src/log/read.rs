//! Reading the log while it grows.
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};

use super::scan::{Edge, HEAD_BYTES, Index, Stretch, hop};
use super::state::{LogState, Seg};
use super::{CURE, Log, Lookup};
use crate::error::{Error, Result};
use crate::files;

/// Where a search begins.
struct Search {
    path: PathBuf,
    stretch: Stretch,
    indexed: bool,
}

impl Log {
    /// Where the record after the transaction `number` begins. May read from disk, at most a
    /// segment.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when a segment of an earlier opening is damaged. Then
    /// nothing can be streamed from before the damage.
    pub(crate) fn find(&self, number: u64) -> Result<Lookup> {
        let search = match self.search(number) {
            Ok(search) => search,
            Err(found) => return Ok(found),
        };
        let file = match files::open(&search.path) {
            Ok(file) => file,
            // Dropped since the lock was given back.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Lookup::TooOld),
            Err(error) => return Err(Error::io("open", &search.path)(error)),
        };
        let mut index = Index::default();
        let mut found = None;
        hop(&file, &search.path, search.stretch, |lsn, edge| {
            let Edge::Begin(before) = edge else { return ControlFlow::Continue(()) };
            index.note(before.number(), lsn);
            if before.number() == number {
                found = Some(Lookup::At { lsn, before });
            }
            if found.is_some() && search.indexed { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if !search.indexed {
            let mut state = self.lock();
            if let Some(segment) = state.segments.iter_mut().find(|s| s.path == search.path) {
                segment.index.get_or_insert(index);
            }
        }
        found.ok_or_else(|| Error::Corrupt {
            path: search.path,
            offset: HEAD_BYTES + search.stretch.from - search.stretch.segment,
            what: format!("the record after transaction {number} is missing"),
            cure: CURE,
        })
    }

    /// The stretch of a segment to search in, or the answer.
    fn search(&self, number: u64) -> Result<Search, Lookup> {
        let state = self.lock();
        let tip = state.tip.ok_or(Lookup::TooOld)?;
        if number >= tip.number() {
            let at_tip = Lookup::At { lsn: state.complete, before: tip };
            return Err(if number == tip.number() { at_tip } else { Lookup::NotYet });
        }
        let after = state.segments.partition_point(|s| s.before.number() <= number);
        let segment = after.checked_sub(1).map(|i| &state.segments[i]).ok_or(Lookup::TooOld)?;
        let from = segment.index.as_ref().map(|i| i.before(number).unwrap_or(segment.start));
        Ok(Search {
            path: segment.path.clone(),
            stretch: Stretch {
                segment: segment.start,
                from: from.unwrap_or(segment.start),
                until: segment.end.min(state.complete),
            },
            indexed: from.is_some(),
        })
    }

    /// The bytes at `lsn`, at most `max`, from memory; `None` when they must be read from disk or
    /// `lsn` is the end.
    pub(crate) fn read_memory(&self, lsn: u64, max: usize) -> Option<Bytes> {
        self.lock_tail().read(lsn, max)
    }

    /// The same from disk; empty at the end. Blocks. Not cut at a unit's boundary.
    ///
    /// # Errors
    /// [`Error::Io`] of kind `NotFound` when the bytes were dropped or taken back, or `lsn` is
    /// beyond the end.
    pub(crate) fn read_disk(&self, lsn: u64, max: usize) -> Result<Bytes> {
        let (path, offset, length) = {
            let state = self.lock();
            if lsn == state.end {
                return Ok(Bytes::new());
            }
            let segment = segment_at(&state, lsn).filter(|s| lsn < s.end).ok_or_else(|| self.gone(lsn))?;
            (segment.path.clone(), HEAD_BYTES + lsn - segment.start, segment.end - lsn)
        };
        let file = match files::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.gone(lsn)),
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let mut buffer = BytesMut::zeroed(usize::try_from(length).unwrap_or(usize::MAX).min(max));
        let got = files::read_at(&file, &mut buffer, offset).map_err(Error::io("read", &path))?;
        // Cut since the lock was given back.
        if got < buffer.len() { Err(self.gone(lsn)) } else { Ok(buffer.freeze()) }
    }

    /// Where a reader that stands at `lsn` goes on: as a rule at `lsn` itself. When the log has
    /// taken back what followed a record there, it is where the record begins that came in its
    /// place, or the end.
    pub(crate) fn step_over(&self, lsn: u64) -> u64 {
        let state = self.lock();
        let after = state.segments.partition_point(|s| s.start <= lsn);
        match after.checked_sub(1).map(|i| &state.segments[i]) {
            Some(segment) if lsn == segment.end => {
                state.segments.get(after).map_or(state.complete.max(lsn), |s| s.start)
            }
            _ => lsn,
        }
    }

    /// What a bad byte at an address, or close to it, is.
    pub(crate) fn corrupt(&self, lsn: u64, what: String) -> Error {
        let state = self.lock();
        let (path, offset) = match segment_at(&state, lsn) {
            Some(segment) => (segment.path.clone(), HEAD_BYTES + lsn - segment.start),
            None => (self.dir.clone(), 0),
        };
        Error::Corrupt { path, offset, what, cure: CURE }
    }

    fn gone(&self, lsn: u64) -> Error {
        let source =
            io::Error::new(io::ErrorKind::NotFound, format!("address {lsn} is not in the log any more"));
        Error::Io { op: "read the log in", path: self.dir.clone(), source }
    }
}

/// The segment that begins at or before `lsn`.
fn segment_at(state: &LogState, lsn: u64) -> Option<&Seg> {
    let after = state.segments.partition_point(|s| s.start <= lsn);
    state.segments.get(after.checked_sub(1)?)
}
