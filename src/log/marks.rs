//! What a replica that has left the history asks its own log: where it may have left, and what it
//! did since.
use bytes::Bytes;

use super::{Log, Lookup};
use crate::error::Result;
use crate::page::PageSet;
use crate::txid::Position;
use crate::wire::{MARKS_MAX, Message, RecordPart, Unit};

/// Bytes that are read at a time.
const READ_BYTES: usize = 1 << 20;

/// What the transactions after a state did.
#[derive(Clone, Debug)]
pub(crate) struct Touched {
    /// The pages that they wrote.
    pub(crate) pages: PageSet,
    /// The database's size in pages in that state, if the log has the record that led to it.
    pub(crate) size: Option<u32>,
    /// The least size that it had since, in pages.
    pub(crate) least: u32,
    /// Where their records begin.
    pub(crate) lsn: u64,
}

impl Log {
    /// Some states that records of this log led to, newest first, at distances from the tip that
    /// double, and the oldest that it has. The tip itself is not among them.
    ///
    /// # Errors
    /// Those of [`Log::find`].
    pub(crate) fn marks(&self) -> Result<Vec<Position>> {
        let (Some(tip), Some(start)) = (self.tip(), self.start()) else { return Ok(Vec::new()) };
        let mut marks = Vec::new();
        for number in mark_numbers(start.number(), tip.number()) {
            match self.find(number)? {
                Lookup::At { before, .. } => marks.push(before),
                Lookup::TooOld | Lookup::NotYet => break,
            }
        }
        Ok(marks)
    }

    /// What the transactions after `state`, one of [`Log::marks`], did; `None` when the log does
    /// not reach back to it any more.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); [`Error::Corrupt`](crate::Error::Corrupt).
    pub(crate) fn touched(&self, state: Position) -> Result<Option<Touched>> {
        let Lookup::At { lsn, before } = self.find(state.number())? else { return Ok(None) };
        if before != state {
            return Ok(None);
        }
        let mut size = None;
        if let Some(number) = state.number().checked_sub(1)
            && let Lookup::At { lsn: earlier, .. } = self.find(number)?
        {
            self.records(earlier, lsn, |_, message| {
                if let Some(RecordPart::End(end)) = message.parts().last() {
                    size = Some(end.pages);
                }
                Ok(())
            })?;
        }
        let least = size.unwrap_or(u32::MAX);
        let mut touched = Touched { pages: PageSet::default(), size, least, lsn };
        self.records(lsn, self.complete(), |_, message| {
            for part in message.parts() {
                match part {
                    RecordPart::Change(change) => touched.pages.insert(change.number),
                    RecordPart::End(end) => touched.least = touched.least.min(end.pages),
                    RecordPart::Begin(_) => {}
                }
            }
            Ok(())
        })?;
        Ok(Some(touched))
    }

    /// The address after the last complete record.
    pub(crate) fn complete(&self) -> u64 {
        self.lock().complete
    }

    /// Visits the units from one record boundary to another. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also when the bytes were dropped meanwhile;
    /// [`Error::Corrupt`](crate::Error::Corrupt); what `visit` returns.
    pub(crate) fn records(
        &self,
        lsn: u64,
        until: u64,
        mut visit: impl FnMut(&Unit, Message<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut decoder = self.decoder();
        let mut at = lsn;
        self.bytes_between(lsn, until, |bytes| {
            decoder.push(bytes);
            while let Some(unit) = decoder.next().map_err(|e| self.corrupt(at, e.to_string()))? {
                visit(&unit, unit.decode().map_err(|e| self.corrupt(at, e.to_string()))?)?;
                at += unit.raw.len() as u64;
            }
            Ok(())
        })?;
        match decoder.buffered() {
            0 => Ok(()),
            _ => Err(self.corrupt(at, "a unit goes on beyond its record".into())),
        }
    }

    /// The bytes between two record boundaries, in pieces. Blocks.
    ///
    /// # Errors
    /// As for [`Log::records`].
    pub(crate) fn bytes_between(
        &self,
        mut lsn: u64,
        until: u64,
        mut visit: impl FnMut(Bytes) -> Result<()>,
    ) -> Result<()> {
        while lsn < until {
            let bytes = self.read_disk(lsn, READ_BYTES.min((until - lsn) as usize))?;
            if bytes.is_empty() {
                break;
            }
            lsn = self.step_over(lsn + bytes.len() as u64);
            visit(bytes)?;
        }
        Ok(())
    }
}

/// Which states of a log are marks.
pub(crate) fn mark_numbers(start: u64, tip: u64) -> impl Iterator<Item = u64> {
    let doubling = (0..MARKS_MAX as u32 - 1).map(move |power| tip.saturating_sub(1 << power));
    let oldest = (start < tip).then_some(start);
    doubling.take_while(move |number| *number > start).chain(oldest)
}
