//! The units that streams and logs are made of.
use bytes::{Bytes, BytesMut};

use crate::checksum::PageHash;
use crate::error::Result;
use crate::page::{PageNo, PageSize};
use crate::status::PeerInfo;
use crate::txid::{Epoch, EpochHistory, Position};

/// Largest payload of a unit.
pub(crate) const PAYLOAD_MAX_BYTES: usize = 1024 * 1024 + 64 * 1024;
/// Bytes of a unit's header.
pub(crate) const HEADER_BYTES: usize = 24;
pub(crate) const VERSION: u16 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    TxnBegin = 1,
    Page = 2,
    TxnEnd = 3,
    Hello = 4,
    Welcome = 5,
    Epochs = 6,
    Heartbeat = 7,
    Ack = 8,
    SnapBegin = 9,
    SnapPiece = 10,
    SnapEnd = 11,
    Goodbye = 12,
    Segment = 13,
}

/// One unit as it came: framing checked, hash not yet.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) kind: Kind,
    pub(crate) hash: [u8; 16],
    /// Header and payload.
    pub(crate) raw: Bytes,
}

impl Unit {
    pub(crate) fn payload(&self) -> &[u8] {
        &self.raw[HEADER_BYTES..]
    }
    /// Checks the hash and reads the fields.
    pub(crate) fn decode(&self) -> Result<Message<'_>, WireError> {
        unimplemented!()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a unit of {0} bytes; the limit is {PAYLOAD_MAX_BYTES}")]
    TooLarge(usize),
    #[error("unit version {0}; this node reads {VERSION}")]
    Version(u16),
    #[error("unknown unit kind {0} that may not be skipped")]
    UnknownKind(u8),
    #[error("a unit's hash does not match its bytes")]
    Hash,
    #[error("{0}")]
    Fields(&'static str),
}

/// A unit's fields. `Page` borrows from the unit.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Message<'a> {
    TxnBegin(TxnBegin),
    Page { number: PageNo, hash: PageHash, page: &'a [u8] },
    TxnEnd(TxnEnd),
    Hello(Hello),
    Welcome(Welcome),
    Epochs(EpochHistory),
    Heartbeat(Heartbeat),
    Ack(Ack),
    SnapBegin(SnapBegin),
    SnapPiece { first: PageNo, position: Position, pages: &'a [u8] },
    SnapEnd(SnapEnd),
    Goodbye(Goodbye),
    Segment(Segment),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TxnBegin {
    pub(crate) before: Position,
    pub(crate) epoch: Epoch,
    pub(crate) page_size: PageSize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TxnEnd {
    pub(crate) after: Position,
    /// The database's size in pages after the transaction.
    pub(crate) pages: u32,
    /// How many page units the record has.
    pub(crate) changed: u32,
    pub(crate) unix_micros: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    /// Proof over both nonces, the request's identity and the rest of this unit (see the server).
    pub(crate) proof: [u8; 32],
    pub(crate) peer: PeerInfo,
    pub(crate) position: Option<Position>,
    pub(crate) history: EpochHistory,
    pub(crate) resume: Option<(Position, PageNo)>,
}

/// What the primary decided about a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Plan {
    /// The log continues the replica's position.
    Log = 1,
    /// The replica is empty, or behind the log: a snapshot comes.
    Snapshot = 2,
    /// The replica's position is not in the history: a snapshot comes, and what it has is to be kept.
    Diverged = 3,
    /// The snapshot that was begun goes on.
    Resume = 4,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Welcome {
    pub(crate) peer: PeerInfo,
    pub(crate) epoch: Epoch,
    pub(crate) plan: Plan,
    pub(crate) position: Position,
    pub(crate) page_size: PageSize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Heartbeat {
    pub(crate) position: Position,
    pub(crate) unix_micros: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ack {
    pub(crate) applied: Option<Position>,
    pub(crate) synced: Option<Position>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SnapBegin {
    /// The position of the first piece; records after it follow the pieces.
    pub(crate) first: Position,
    /// The page that the pieces begin with: 1, or more when an earlier snapshot is resumed.
    pub(crate) from: PageNo,
    pub(crate) page_size: PageSize,
    /// Whether what the replica has is off the history and must be kept aside before it is replaced.
    pub(crate) diverged: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SnapEnd {
    /// The state from which on the snapshot is exact: the position of the last piece.
    pub(crate) exact_at: Position,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Goodbye {
    pub(crate) reason: String,
}

/// The head of a log segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) before: Position,
}

/// Encodes a unit behind `out`.
pub(crate) fn encode(_message: &Message<'_>, _out: &mut BytesMut) {
    unimplemented!()
}

/// Encodes a page unit whose hash is known already.
pub(crate) fn encode_page(_number: PageNo, _hash: PageHash, _page: &[u8], _out: &mut BytesMut) {
    unimplemented!()
}

/// Cuts a stream of bytes into units. Never allocates for what a header claims, only for what has arrived.
#[derive(Debug, Default)]
pub(crate) struct Decoder {}

impl Decoder {
    pub(crate) fn push(&mut self, _bytes: Bytes) {
        unimplemented!()
    }
    /// The next whole unit, if it has arrived. Unknown kinds with the may-skip flag are passed over.
    pub(crate) fn next(&mut self) -> Result<Option<Unit>, WireError> {
        unimplemented!()
    }
}
