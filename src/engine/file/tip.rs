//! Where a node stands: the last commit that it has taken in.

use crate::txid::Position;
use crate::wal::{Salts, WalSum};

/// The last commit that this node has taken in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::engine) struct Tip {
    pub(in crate::engine) salts: Salts,
    pub(in crate::engine) frame: u32,
    pub(in crate::engine) sum: WalSum,
    pub(in crate::engine) position: Position,
    pub(in crate::engine) pages: u32,
}

impl Tip {
    /// Whether this is where the WAL ended so, or after that: when the WAL began anew, all that was
    /// in it was taken in.
    pub(in crate::engine) fn has(&self, salts: Salts, frame: u32) -> bool {
        self.salts != salts || self.frame >= frame
    }
}
