//! What the log holds, transaction by transaction.
use std::io;
use std::ops::ControlFlow;
use std::time::{Duration, SystemTime};

use super::scan::{Edge, Stretch, hop};
use super::{Log, Lookup};
use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::files;
use crate::status::LoggedTransaction;
use crate::txid::{EpochHistory, EpochStart, Position};
use crate::wire::TxnEnd;

/// Transactions that are read at a time when a state is looked for.
const LOOKED_UP_AT_ONCE: usize = 4096;

impl Log {
    /// At most `most` transactions after number `after`, oldest first, without those that are not
    /// in the log any more. Reads small records from disk, and what is around the pages of others.
    /// Blocks.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] when a segment is damaged.
    pub(crate) fn list(&self, after: u64, most: usize) -> Result<Vec<LoggedTransaction>> {
        let mut listed = Vec::new();
        let oldest = self.start().map_or(0, |position| position.number());
        let mut next = match self.find(after.max(oldest))? {
            Lookup::At { lsn, .. } => Some(lsn),
            // Dropped since it was asked for the start, or there is nothing yet.
            Lookup::TooOld | Lookup::NotYet => None,
        };
        while let Some(lsn) = next.filter(|_| listed.len() < most) {
            next = self.list_segment(lsn, most, &mut listed)?;
        }
        Ok(listed)
    }

    /// The state with this checksum to which a record led, the newest of them. Blocks.
    ///
    /// # Errors
    /// Those of [`Log::list`].
    pub(crate) fn state_with(&self, checksum: Checksum) -> Result<Option<Position>> {
        let mut found = self.start().filter(|start| start.checksum() == checksum);
        let mut after = self.start().map_or(0, |start| start.number());
        loop {
            let some = self.list(after, LOOKED_UP_AT_ONCE)?;
            // No one has verified that the numbers of older segments grow.
            let last = some.last().map(|last| last.position.number()).filter(|last| *last > after);
            let Some(last) = last else { return Ok(found) };
            after = last;
            found = some.iter().rev().map(|t| t.position).find(|p| p.checksum() == checksum).or(found);
        }
    }

    /// The epochs that its transactions are of, as far back as it reaches; none when it is empty,
    /// or names what can't follow one another. Blocks.
    ///
    /// # Errors
    /// Those of [`Log::list`].
    pub(crate) fn epochs(&self) -> Result<EpochHistory> {
        let mut history = EpochHistory::default();
        let Some(mut before) = self.start() else { return Ok(history) };
        let start = |epoch, before: Position| EpochStart {
            epoch,
            first: before.number().saturating_add(1),
            before: before.checksum(),
        };
        history.push(start(before.epoch(), before));
        loop {
            let some = self.list(before.number(), LOOKED_UP_AT_ONCE)?;
            for position in some.iter().map(|logged| logged.position) {
                if position.number() <= before.number() || position.epoch().number() < before.epoch().number()
                {
                    return Ok(EpochHistory::default());
                }
                if position.epoch() != before.epoch() {
                    if position.epoch().number() == before.epoch().number() {
                        return Ok(EpochHistory::default());
                    }
                    history.push(start(position.epoch(), before));
                }
                before = position;
            }
            if some.is_empty() {
                return Ok(history);
            }
        }
    }

    /// Lists from a record's beginning to its segment's end. Where the next segment begins, if
    /// there is one.
    fn list_segment(
        &self,
        from: u64,
        most: usize,
        listed: &mut Vec<LoggedTransaction>,
    ) -> Result<Option<u64>> {
        let (path, stretch, next) = {
            let state = self.lock();
            let behind = state.segments.partition_point(|s| s.start <= from);
            let Some(segment) = behind.checked_sub(1).map(|i| &state.segments[i]) else { return Ok(None) };
            let until = segment.end.min(state.complete);
            let next = state.segments.get(behind).map(|s| s.start);
            (segment.path.clone(), Stretch { segment: segment.start, from, until }, next)
        };
        let file = match files::open(&path) {
            Ok(file) => file,
            // Dropped since the lock was given back: what is younger is still there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(next),
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let mut begun = from;
        hop(&file, &path, stretch, |lsn, edge| {
            match edge {
                Edge::Begin(_) => begun = lsn,
                Edge::End(end) => listed.push(logged(&end, lsn - begun)),
            }
            if listed.len() < most { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        Ok(next)
    }
}

/// What is told of a transaction, from the end of its record.
pub(crate) fn logged(end: &TxnEnd, log_bytes: u64) -> LoggedTransaction {
    LoggedTransaction {
        position: end.after,
        time: SystemTime::UNIX_EPOCH + Duration::from_micros(end.unix_micros),
        changed_pages: end.changed,
        pages: end.pages,
        log_bytes,
    }
}
