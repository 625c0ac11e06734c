//! What the streams of a primary need of the database that they serve.

use bytes::Bytes;
use tokio::sync::watch;

use crate::checksum::PageKey;
use crate::engine::{Piece, PrimaryEngine};
use crate::error::Result;
use crate::log::{Lookup, Pin};
use crate::page::{PageNo, PageSize};
use crate::txid::Position;

/// What a stream needs of the database that it serves: see [`PrimaryEngine`] and
/// [`Log`](crate::log::Log).
pub(crate) trait StreamSource: Send + Sync + 'static {
    fn page_size(&self) -> PageSize;
    fn page_key(&self) -> PageKey;
    /// Blocks.
    fn read_piece(&self, first: PageNo, max_bytes: usize) -> Result<Piece>;
    /// Blocks.
    fn raise_epoch(&self, above: u64) -> Result<()>;
    /// Has the log take in everything that is committed by now. Blocks.
    fn settle(&self) -> Result<()>;
    fn tip(&self) -> Option<Position>;
    fn end(&self) -> u64;
    /// Blocks.
    fn find(&self, number: u64) -> Result<Lookup>;
    fn read_memory(&self, lsn: u64, max: usize) -> Option<Bytes>;
    /// Blocks.
    fn read_disk(&self, lsn: u64, max: usize) -> Result<Bytes>;
    /// Where a reader that stands between two records goes on after a record was taken back there.
    fn step_over(&self, lsn: u64) -> u64;
    fn watch(&self) -> watch::Receiver<u64>;
    fn pin(&self, lsn: u64) -> Box<dyn LogPin>;
    /// Where the last record ends that is still sent; none while the primary goes on.
    fn last(&self) -> Option<u64> {
        None
    }
}

/// Keeps the log from an address on, until it is dropped.
pub(crate) trait LogPin: Send + Sync {
    fn advance(&self, lsn: u64);
}

impl StreamSource for PrimaryEngine {
    fn page_size(&self) -> PageSize {
        PrimaryEngine::page_size(self)
    }

    fn page_key(&self) -> PageKey {
        PrimaryEngine::page_key(self)
    }

    fn read_piece(&self, first: PageNo, max_bytes: usize) -> Result<Piece> {
        PrimaryEngine::read_piece(self, first, max_bytes)
    }

    fn raise_epoch(&self, above: u64) -> Result<()> {
        PrimaryEngine::raise_epoch(self, above)
    }

    fn settle(&self) -> Result<()> {
        self.captured().map(drop)
    }

    fn tip(&self) -> Option<Position> {
        self.log().tip()
    }

    fn end(&self) -> u64 {
        self.log().end()
    }

    fn find(&self, number: u64) -> Result<Lookup> {
        self.log().find(number)
    }

    fn read_memory(&self, lsn: u64, max: usize) -> Option<Bytes> {
        self.log().read_memory(lsn, max)
    }

    fn read_disk(&self, lsn: u64, max: usize) -> Result<Bytes> {
        self.log().read_disk(lsn, max)
    }

    fn step_over(&self, lsn: u64) -> u64 {
        self.log().step_over(lsn)
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.log().watch()
    }

    fn pin(&self, lsn: u64) -> Box<dyn LogPin> {
        Box::new(self.log().pin(lsn))
    }

    fn last(&self) -> Option<u64> {
        PrimaryEngine::last(self)
    }
}

impl LogPin for Pin {
    fn advance(&self, lsn: u64) {
        Pin::advance(self, lsn);
    }
}
