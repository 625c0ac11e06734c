//! The retained transaction records of a node.
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::error::Result;
use crate::txid::Position;

#[derive(Clone, Copy, Debug)]
pub(crate) struct LogOptions {
    pub(crate) segment_bytes: u64,
    /// Segments are dropped, oldest first, when all together are larger than this ...
    pub(crate) keep_bytes: u64,
    /// ... or when their newest record is older than this.
    pub(crate) keep_age: Duration,
    /// Segments that a connected replica still needs are kept up to this size all together.
    pub(crate) pinned_bytes: u64,
    /// Newest bytes kept in memory for streams.
    pub(crate) tail_bytes: usize,
}

/// Byte addresses in the log ("LSN") grow for ever, across segments and restarts.
#[derive(Debug)]
pub(crate) struct Log {}

/// What `Log::find` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Found {
    /// The record that follows the transaction with the asked number begins at `lsn`, and states `before`.
    /// Also for the tip: then `lsn` is the end.
    At { lsn: u64, before: Position },
    /// Older than the log reaches.
    Behind,
    /// Newer than the log's tip.
    Beyond,
}

impl Log {
    /// Opens the log in `dir` (created when missing) and cuts off a torn or unfinished tail.
    pub(crate) fn open(_dir: &Path, _options: LogOptions) -> Result<Arc<Log>> {
        unimplemented!()
    }
    /// The position after the last complete record; `None` while the log is empty and was never `reset`.
    pub(crate) fn tip(&self) -> Option<Position> {
        unimplemented!()
    }
    /// The position before the oldest record.
    pub(crate) fn start(&self) -> Option<Position> {
        unimplemented!()
    }
    /// The end: everything before it may be read (it may end in the middle of a record).
    pub(crate) fn end(&self) -> u64 {
        unimplemented!()
    }
    pub(crate) fn bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Appends whole units. `after` is the position after them when they end a record.
    /// On an error the log is as before the call; the caller then declares a gap by `reset`.
    pub(crate) fn append(&self, _units: Bytes, _after: Option<Position>) -> Result<()> {
        unimplemented!()
    }
    /// Takes back what was appended since the last complete record.
    pub(crate) fn abort(&self) -> Result<()> {
        unimplemented!()
    }
    /// Drops all records; the next one must follow `at`.
    pub(crate) fn reset(&self, _at: Position) -> Result<()> {
        unimplemented!()
    }
    /// Drops the complete records after the one that ended at `number` (crash recovery only).
    pub(crate) fn cut_after(&self, _number: u64) -> Result<()> {
        unimplemented!()
    }
    /// fsyncs what was appended.
    pub(crate) fn sync(&self) -> Result<()> {
        unimplemented!()
    }
    pub(crate) fn find(&self, _number: u64) -> Result<Found> {
        unimplemented!()
    }
    /// The bytes at `lsn`, at most `max`, from memory; `None` when they must be read from disk or `lsn` is the end.
    pub(crate) fn read_memory(&self, _lsn: u64, _max: usize) -> Option<Bytes> {
        unimplemented!()
    }
    /// The same from disk; empty at the end. Blocks. Error when the bytes were dropped.
    pub(crate) fn read_disk(&self, _lsn: u64, _max: usize) -> Result<Bytes> {
        unimplemented!()
    }
    /// The end, to wait for more.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        unimplemented!()
    }
    /// Keeps what is at and after `lsn` (up to `pinned_bytes`) until the pin is dropped or moved on.
    pub(crate) fn pin(self: &Arc<Self>, _lsn: u64) -> Pin {
        unimplemented!()
    }
}

#[derive(Debug)]
pub(crate) struct Pin {}

impl Pin {
    pub(crate) fn advance(&self, _lsn: u64) {
        unimplemented!()
    }
}
