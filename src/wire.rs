//! The units that streams and logs are made of: bytes, nothing else.
//!
//! All numbers are little endian. A unit is a header of 24 bytes and a payload:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | length of the payload, at most [`PAYLOAD_MAX_BYTES`] |
//! | 4 | 1 | kind |
//! | 5 | 1 | flags; bit 0: a reader that does not know the kind may skip the unit; all else 0 |
//! | 6 | 2 | version, 3 |
//! | 8 | 16 | hash |
//! | 24 | length | payload |
//!
//! The hash of a PAGE unit is the page's hash ([`PageKey::hash_of_numbered`] of the payload): one
//! hash serves framing and database checksum. So a reader of pages needs the database's page key.
//! Its header is covered by other means. The kind picks the hash's key, any flag is refused, and
//! the length is part of what is hashed.
//!
//! The hash of every other unit is the first 16 bytes of BLAKE3, keyed with a published constant.
//! It is over bytes 0 to 7 of the header and the payload. In it the pages of a SNAP_PIECE stand as
//! their hashes: each byte of a snapshot is hashed once.
//!
//! Payloads. `position` is 40 bytes (epoch number 8, epoch branch 8, transaction number 8, checksum
//! 16), `epoch` its first 16. `optional position` is a byte 0, or a byte 1 and a position. `peer`
//! is a length (2 bytes, at most [`PEER_MAX_BYTES`]) and a JSON object. `keys` are the database's
//! page key (28), then a byte 0, or a byte 1 and its token key (32). Nothing may follow the last
//! field.
//!
//! The fields by kind:
//!
//! - 1 TXN_BEGIN: position before, epoch, page size (4).
//! - 2 PAGE: page number (4), the page.
//! - 3 TXN_END: position after, pages in the database (4), changed pages in the record (4),
//!   microseconds since 1970 (8).
//! - 4 HELLO: proof (32), keys, optional position, a byte 0 or a byte 1 and what a snapshot is
//!   resumed with: position, page number (4). Then suspect (1: 0 or 1), count of marks (1) and as
//!   many positions, peer, epoch history.
//! - 5 WELCOME: epoch, plan (1: see [`Plan`]), position, page size (4), keys, packed (1: 0 or 1),
//!   peer. What follows it is packed as `packing` says, or it is not.
//! - 6 EPOCHS: epoch history: count (4), then per epoch: epoch, first transaction (8), checksum
//!   before it (16).
//! - 7 HEARTBEAT: position, microseconds of the replica's clock (8): those of its last ACK, and
//!   what has passed since. Then microseconds of the primary's lease clock (8; all ones: it leads
//!   by no lease).
//! - 8 ACK: optional position applied, optional position synced, microseconds of the replica's
//!   clock (8).
//! - 9 SNAP_BEGIN: position of the first piece, first page (4), page size (4), pages in the
//!   database now (4).
//! - 10 SNAP_PIECE: first page (4), position, page size as the power of two (1), pages.
//! - 11 SNAP_END: position at which the snapshot, or the heal, is exact; pages in the database
//!   there (4).
//! - 12 GOODBYE: reason: UTF-8, at most [`REASON_MAX_BYTES`].
//! - 13 SEGMENT: address of the segment's first record byte (8), position before its first record.
//!   Then the address where the segment before it ends (8; all ones: it follows none), and the
//!   fingerprint of the page key (16).
//! - 14 HEAL_BEGIN: position that the records go on from, page size (4), pages in the database now
//!   (4). Then compare (1: 0 or 1) and diverged (1: 0 or 1).
//! - 15 SUMS: first page (4), pages in each sum (4), sums of page hashes (16 each).
//! - 16 WANT: runs. Each is first page (4), count of pages (4), the hash of each page as it is here
//!   (16 each; zeros: it is not here).
//! - 17 SENT: position of the last page that was read, pages in the database there (4).
//! - 18 DRAIN: none. From the primary: its application is about to end, and the replica sends it no
//!   more requests. From the replica: all requests that it had sent are answered.
//! - 19 STANDING: proof (32), optional position, highest epoch number (8), fit (1: 0 or 1), has
//!   state (1: 0 or 1), has content (1: 0 or 1), peer.
//! - 20 HANDOFF: stage (1: see [`HandoffStage`]). From a primary that hands its lease over.
//! - 21 OFFER: attempt (16), the primary's last position. To the replica that is to have the lease.
//! - 22 ACCEPT: attempt (16), accepted (1: 0 or 1), text: UTF-8. The answer to an OFFER: the id of
//!   the boot of the replica's machine, at most [`BOOT_ID_MAX_BYTES`], or why it declines, at most
//!   256 bytes.
//! - 23 HANDED: attempt (16), version: length (2) and UTF-8, at most 1024 bytes; the record, at
//!   most [`LEASE_RECORD_MAX_BYTES`]. To the replica that accepted.
//! - 24 PATCH: a change: page number (varint), flags (1; bit 0: the page replaces an image, bit 1:
//!   the runs lie over that image, otherwise over zeros). Then the hash of the replaced image (16)
//!   by bit 0, the hash of the page (16), bytes of the runs (varint), runs. A run is how far it
//!   begins after the one before (varint), its length (varint) and its bytes. A varint has seven
//!   bits a byte, the lowest first, and at most 32.
//! - 25 TXN: a transaction whose changes come to [`TXN_CHANGES_MAX_BYTES`] at most. Flags (1; bit
//!   0: it begins an epoch, bit 1: it dropped pages), page size as the power of two (1), position
//!   before, pages in the database (4), microseconds since 1970 (8). Then the epoch by bit 0, the
//!   sum of the hashes of the dropped pages (16) by bit 1, and changes. The checksum after it is
//!   that before it, without the dropped and replaced hashes, with those of the pages.
//! - 26 NEXT, in streams alone: a TXN without its position before, which is where the record before
//!   it in the stream ended. Its hash is the first 4 bytes of the TXN's, then zeros.
//!
//! The header's layout and the hash of SEGMENT never change with the version, and a SEGMENT has at
//! most [`SEGMENT_MAX_BYTES`]. So every version can tell the segment of another from a damaged one.
use bytes::Bytes;

use crate::checksum::{FINGERPRINT_BYTES, Fingerprint, PAGE_KEY_BYTES, PageKey};
use crate::keys::{DatabaseKeys, TOKEN_KEY_BYTES, TokenKey};
use crate::page::{PageNo, PageSize};
use crate::status::PeerInfo;
use crate::txid::{Epoch, EpochHistory, Position};

mod change;
mod decoder;
mod encode;
mod fields;
mod handoff;
mod kind;
mod next;
mod packing;
mod piece;
mod record;
#[cfg(test)]
mod tests;

pub(crate) use change::{Image, PageChange, difference};
pub(crate) use decoder::{Decoder, Header};
pub(crate) use encode::{encode, encode_change, encode_page, encode_run, peer_fits};
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use fields::sealed;
pub(crate) use handoff::{
    Accept, BOOT_ID_MAX_BYTES, Handed, HandoffStage, LEASE_RECORD_MAX_BYTES, LeaseOffer,
};
pub(crate) use kind::Kind;
pub(crate) use next::{Completer, Shortener};
pub(crate) use packing::{Packer, Unpacker};
pub(crate) use piece::PageRun;
pub(crate) use record::{
    Changes, CompactTxn, RecordPart, TXN_CHANGES_MAX_BYTES, TXN_MAX_BYTES, TxnBegin, TxnEnd,
};
#[cfg(test)]
pub(crate) use tests::seeds;

/// Largest payload of a unit: a snapshot piece of a megabyte and its fields, or sixteen times the
/// largest page.
pub(crate) const PAYLOAD_MAX_BYTES: usize = 1024 * 1024 + 64 * 1024;
/// Bytes of a unit's header.
pub(crate) const HEADER_BYTES: usize = 24;
/// The version of the units, one for all kinds.
pub(crate) const VERSION: u16 = 3;
/// Bytes of the pages of a snapshot piece that we send, unless one page is more. They are small
/// because what came of a piece before its connection breaks has come for nothing.
const PIECE_BYTES: usize = 32 * 1024;
/// The most that the pages of one snapshot piece may come to.
pub(crate) const PIECE_MAX_BYTES: usize = 1024 * 1024;
/// Longest JSON of a peer: room for four URLs and a few dozen labels.
pub(crate) const PEER_MAX_BYTES: usize = 4096;
/// The reason of a goodbye when the node ends. A replica knows it by this text.
pub(crate) const SHUTTING_DOWN: &str = "shutting down";
/// Why a stream ends when the node is not the primary any more.
pub(crate) const NOT_PRIMARY: &str = "this node is not the primary any more";
/// Longest reason of a goodbye: some sentences.
pub(crate) const REASON_MAX_BYTES: usize = 1024;
/// The most positions of its log that a replica names in its hello: one for each power of two.
pub(crate) const MARKS_MAX: usize = 64;
/// The most pages that one WANT asks for.
pub(crate) const WANT_MAX_PAGES: usize = 16 * 1024;
/// The most pages that one sum of a SUMS stands for.
pub(crate) const SPAN_MAX_PAGES: u32 = 512;
/// The most bytes of a STANDING unit, with its header.
pub(crate) const STANDING_MAX_BYTES: usize =
    HEADER_BYTES + HELLO_PROOF_BYTES + 1 + Position::BYTES + 8 + 3 + 2 + PEER_MAX_BYTES;
/// The longest payload of a HELLO: two optional fields, all marks, a peer and a full history.
pub(crate) const HELLO_MAX_BYTES: usize = HELLO_PROOF_BYTES
    + KEYS_BYTES
    + 2 * (1 + Position::BYTES)
    + 4
    + 2
    + MARKS_MAX * Position::BYTES
    + 2
    + PEER_MAX_BYTES
    + 4
    + EpochHistory::MAX * EpochHistory::ENTRY_BYTES;
/// Where the proof of a HELLO, or of a STANDING, ends in its payload; the proof covers the payload
/// from here on.
pub(crate) const HELLO_PROOF_BYTES: usize = 32;

/// The key of every hash but those of pages. It is published: the hash guards against accidents.
const UNIT_KEY: [u8; 32] = *b"replite unit hash, version 1 ...";
/// Header flag: a reader that does not know the kind passes the unit over.
const MAY_SKIP: u8 = 1;
/// Bytes of a snapshot piece before its pages: page number, position and page size.
pub(crate) const PIECE_FIELDS_BYTES: usize = 4 + Position::BYTES + 1;

/// Bytes of a SEGMENT unit, with its header.
pub(crate) const SEGMENT_BYTES: usize = HEADER_BYTES + 8 + Position::BYTES + 8 + FINGERPRINT_BYTES;
/// The most that one has in any version.
pub(crate) const SEGMENT_MAX_BYTES: usize = 512;
const _: () = assert!(SEGMENT_BYTES <= SEGMENT_MAX_BYTES);
/// Bytes of a peer's keys.
const KEYS_BYTES: usize = PAGE_KEY_BYTES + 1 + TOKEN_KEY_BYTES;
/// What the heartbeat of a primary without a lease says in place of a time.
const NO_LEASE: u64 = u64::MAX;
/// The highest address at which a segment may begin.
const ADDRESS_MAX: u64 = u64::MAX >> 1;
/// What a segment that follows none says in place of an address.
const FOLLOWS_NONE: u64 = u64::MAX;

const _: () = assert!(4 + PageSize::MAX_BYTES as usize <= PAYLOAD_MAX_BYTES);
const _: () = assert!(PIECE_FIELDS_BYTES + PIECE_MAX_BYTES <= PAYLOAD_MAX_BYTES);
// The longest WANT: each page a run of its own.
const _: () = assert!(WANT_MAX_PAGES * (8 + 16) <= PAYLOAD_MAX_BYTES);
const _: () = assert!(HELLO_MAX_BYTES <= PAYLOAD_MAX_BYTES);

/// One unit as it came: framing checked, hash not yet.
#[derive(Clone, Debug)]
pub(crate) struct Unit {
    pub(crate) kind: Kind,
    pub(crate) hash: [u8; 16],
    /// Header and payload.
    pub(crate) raw: Bytes,
    /// What pages are hashed with, where pages may be.
    pub(crate) page_key: Option<PageKey>,
}

impl Unit {
    pub(crate) fn payload(&self) -> &[u8] {
        &self.raw[HEADER_BYTES..]
    }

    /// The version of a SEGMENT unit, at the begin of these bytes, whose hash holds and that
    /// another version wrote.
    pub(crate) fn other_segment(bytes: &[u8]) -> Option<u16> {
        let [l0, l1, l2, l3, kind, _, v0, v1] = *bytes.first_chunk()?;
        let payload = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let raw = bytes.get(..HEADER_BYTES.checked_add(payload)?)?;
        let version = u16::from_le_bytes([v0, v1]);
        let holds = raw[8..HEADER_BYTES] == fields::hash_of(raw);
        (version != VERSION && kind == Kind::Segment as u8 && holds).then_some(version)
    }

    /// Checks the hash and reads the fields. The hash of an [`Image::Whole`] was verified. That of
    /// other changes is not: see [`PageChange::make`].
    ///
    /// # Errors
    /// [`WireError::Hash`] before any field is looked at; then [`WireError::Fields`].
    pub(crate) fn decode(&self) -> Result<Message<'_>, WireError> {
        fields::decode(self.kind, self.hash, &self.raw, self.page_key)
    }
}

/// What is wrong with bytes that should be units.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum WireError {
    #[error("a unit of {0} bytes; the limit is {PAYLOAD_MAX_BYTES}")]
    TooLarge(usize),
    #[error("a unit of {0} bytes, where {1} are the most")]
    Unexpected(usize, usize),
    #[error("unit version {0}; this node reads {VERSION}")]
    Version(u16),
    #[error("unknown unit kind {0} that may not be skipped")]
    UnknownKind(u8),
    #[error("a unit's hash does not match its bytes")]
    Hash,
    #[error("a change that does not make the page that it says")]
    Patch,
    #[error("no memory to pack or unpack a stream")]
    Pack,
    #[error("{0}")]
    Fields(&'static str),
}

/// A unit's fields. Pages and records borrow from the unit.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Message<'a> {
    TxnBegin(TxnBegin),
    /// A PAGE or a PATCH.
    Change(PageChange<'a>),
    TxnEnd(TxnEnd),
    Txn(CompactTxn<'a>),
    Hello(Hello),
    Welcome(Welcome),
    Epochs(EpochHistory),
    Heartbeat(Heartbeat),
    Ack(Ack),
    SnapBegin(SnapBegin),
    SnapPiece {
        position: Position,
        run: PageRun<'a>,
    },
    SnapEnd(SnapEnd),
    Goodbye(Goodbye),
    Segment(Segment),
    HealBegin(HealBegin),
    /// Sums of the page hashes of `span` pages each, the last one perhaps of fewer.
    Sums {
        first: PageNo,
        span: u32,
        sums: &'a [[u8; 16]],
    },
    Want(Want),
    Sent(Sent),
    /// No more requests are to come, or will come.
    Drain,
    Standing(Standing),
    Handoff(HandoffStage),
    Offer(LeaseOffer),
    Accept(Accept),
    Handed(Handed<'a>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    /// Proof over both nonces, the request's identity and the rest of this unit (see `handshake`).
    pub(crate) proof: [u8; 32],
    /// The keys of the database that the replica has.
    pub(crate) keys: PeerKeys,
    pub(crate) peer: PeerInfo,
    pub(crate) position: Option<Position>,
    pub(crate) history: EpochHistory,
    pub(crate) resume: Option<(Position, PageNo)>,
    /// The replica's pages may not be what its position says: all of them are to be compared.
    pub(crate) suspect: bool,
    /// Some earlier states of the replica, newest first: the fork is looked for among them.
    pub(crate) marks: Vec<Position>,
}

/// What the primary decided about a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Plan {
    /// The log continues the replica's position.
    Log = 1,
    /// The replica is empty: a snapshot comes.
    Snapshot = 2,
    /// The replica left the history at a state that the log reaches back to. It asks for the pages
    /// that its branch touched.
    Heal = 3,
    /// The snapshot that was begun goes on.
    Resume = 4,
    /// The log does not reach back to the replica, or the replica is off the history at no known
    /// state. They compare page hashes.
    Compare = 5,
    /// The primary may have lost what the replica's log has. The replica sends its records after
    /// the welcome's position, and a goodbye.
    Recover = 6,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Welcome {
    pub(crate) peer: PeerInfo,
    pub(crate) epoch: Epoch,
    pub(crate) plan: Plan,
    pub(crate) position: Position,
    pub(crate) page_size: PageSize,
    /// The keys of the database. All that follows goes by them.
    pub(crate) keys: PeerKeys,
    /// What follows is in blocks, some of which are compressed.
    pub(crate) packed: bool,
}

/// The keys of a database, as far as the peer is to have them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PeerKeys {
    pub(crate) page: PageKey,
    /// None: the peer is to make no tokens.
    pub(crate) token: Option<TokenKey>,
}

impl PeerKeys {
    /// What one node tells another; the token key only where both are members.
    pub(crate) fn of(keys: DatabaseKeys, members: bool) -> PeerKeys {
        PeerKeys { page: keys.page, token: members.then_some(keys.token) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Heartbeat {
    pub(crate) position: Position,
    /// At the earliest, the replica's own [`Ack::clock`] when this was said. So one clock tells how
    /// old it is when it comes.
    pub(crate) clock: u64,
    /// Microseconds since the primary took the epoch that the replica was told last, from before
    /// the position was read. None where it leads by no lease.
    pub(crate) lease_clock: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ack {
    pub(crate) applied: Option<Position>,
    pub(crate) synced: Option<Position>,
    /// Microseconds since the replica dialled.
    pub(crate) clock: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SnapBegin {
    /// The position of the first piece; records after it follow the pieces.
    pub(crate) first: Position,
    /// The page that the pieces begin with: 1, or more when an earlier snapshot is resumed.
    pub(crate) from: PageNo,
    pub(crate) page_size: PageSize,
    /// How many pages the database has now; for people, who want to know how far a snapshot is.
    pub(crate) pages: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SnapEnd {
    /// The state from which on the snapshot is exact: the position of the last piece.
    pub(crate) exact_at: Position,
    /// The database's size in pages there.
    pub(crate) pages: u32,
}

/// A replica's state is to be led back by its difference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HealBegin {
    /// The state that the records which follow go on from. Without `compare` it is the replica's
    /// own earlier state.
    pub(crate) from: Position,
    pub(crate) page_size: PageSize,
    /// The database's size in pages now.
    pub(crate) pages: u32,
    /// Sums over all pages follow, for the replica to find out what differs.
    pub(crate) compare: bool,
    /// Whether what the replica has may be off the history and must be kept before it is replaced.
    pub(crate) diverged: bool,
}

/// Pages that a replica asks for. None: it has all that it needs.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Want {
    pub(crate) runs: Vec<WantRun>,
}

/// Pages in a row, each with its hash on the replica: those that differ are sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct WantRun {
    pub(crate) first: PageNo,
    /// Zeros for a page that the replica does not have.
    pub(crate) hashes: Vec<[u8; 16]>,
}

/// All sums, or all pages that were asked for, were sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Sent {
    pub(crate) position: Position,
    pub(crate) pages: u32,
}

/// How a node stands, for a peer that asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Standing {
    /// Proof over both nonces and the rest of this unit (see `handshake`).
    pub(crate) proof: [u8; 32],
    pub(crate) position: Option<Position>,
    /// The highest epoch number that it knows.
    pub(crate) epoch: u64,
    pub(crate) fit: bool,
    pub(crate) has_state: bool,
    pub(crate) has_content: bool,
    pub(crate) peer: PeerInfo,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Goodbye {
    pub(crate) reason: String,
}

/// The head of a log segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Segment {
    /// The address of the first record byte.
    pub(crate) start: u64,
    /// The position before the first record.
    pub(crate) before: Position,
    /// Where the segment that this one continues ends; `None` when the log begins anew here.
    pub(crate) follows: Option<u64>,
    /// Of the key that the pages in its records are hashed with.
    pub(crate) key: Fingerprint,
}
