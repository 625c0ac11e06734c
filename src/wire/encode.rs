//! Units to bytes.
use bytes::{BufMut, BytesMut};

use crate::checksum::PageHash;
use crate::page::PageNo;
use crate::status::{Addresses, PeerInfo};
use crate::txid::Position;
use crate::wire::change::{Image, PageChange, put_change};
use crate::wire::fields::{hash_of, piece_hash};
use crate::wire::handoff::DECLINED_MAX_BYTES;
use crate::wire::piece::PageRun;
use crate::wire::record::put_txn;
use crate::wire::{
    Accept, Ack, FOLLOWS_NONE, Goodbye, HEADER_BYTES, Handed, HealBegin, Hello, Kind, LeaseOffer, MARKS_MAX,
    Message, NO_LEASE, PAYLOAD_MAX_BYTES, PEER_MAX_BYTES, PIECE_FIELDS_BYTES, PeerKeys, REASON_MAX_BYTES,
    Segment, SnapBegin, Standing, TxnBegin, TxnEnd, VERSION, Want, Welcome,
};

/// Appends a unit to `out`.
///
/// # Panics
/// When a page or a snapshot piece is larger than a unit may be: the caller chooses their size.
pub(crate) fn encode(message: &Message<'_>, out: &mut BytesMut) {
    if let Message::Change(PageChange { number, hash, image: Image::Whole(page), .. }) = *message {
        return encode_page(number, hash, page, out);
    }
    let at = out.len();
    out.put_bytes(0, HEADER_BYTES);
    let kind = put_fields(message, out);
    let payload = out.len() - at - HEADER_BYTES;
    assert!(payload <= PAYLOAD_MAX_BYTES, "a {kind:?} unit of {payload} bytes");
    let unit = &mut out[at..];
    unit[..8].copy_from_slice(&head(kind, payload));
    let hash = match message {
        Message::SnapPiece { run, .. } => piece_hash(unit, run),
        _ => hash_of(unit),
    };
    unit[8..HEADER_BYTES].copy_from_slice(&hash);
}

/// Encodes a page unit whose hash is known already.
///
/// # Panics
/// When the page is larger than a unit may be.
pub(crate) fn encode_page(number: PageNo, hash: PageHash, page: &[u8], out: &mut BytesMut) {
    let payload = 4 + page.len();
    assert!(payload <= PAYLOAD_MAX_BYTES, "a page of {} bytes", page.len());
    out.reserve(HEADER_BYTES + payload);
    out.put_slice(&head(Kind::Page, payload));
    out.put_slice(&hash.to_bytes());
    out.put_u32_le(number.get());
    out.put_slice(page);
}

/// Writes pages in a row as snapshot pieces.
pub(crate) fn encode_run(run: &PageRun<'_>, position: Position, out: &mut BytesMut) {
    for run in run.pieces() {
        encode(&Message::SnapPiece { position, run }, out);
    }
}

/// Writes a change as it stands in a TXN unit, after others.
pub(crate) fn encode_change(change: &PageChange<'_>, out: &mut BytesMut) {
    put_change(change, out);
}

/// Whether a peer can be told to others in full. If not, its labels, and then its addresses, are
/// left out.
pub(crate) fn peer_fits(peer: &PeerInfo) -> bool {
    json(peer).is_some()
}

pub(super) fn head(kind: Kind, payload: usize) -> [u8; 8] {
    let [l0, l1, l2, l3] = (payload as u32).to_le_bytes();
    let [v0, v1] = VERSION.to_le_bytes();
    [l0, l1, l2, l3, kind as u8, 0, v0, v1]
}

fn put_fields(message: &Message<'_>, out: &mut BytesMut) -> Kind {
    match message {
        // `encode_page` encodes a whole page, because its hash is another one.
        Message::Change(change) => {
            put_change(change, out);
            Kind::Patch
        }
        Message::Txn(txn) => put_txn(txn, out),
        Message::TxnBegin(m) => put_txn_begin(m, out),
        Message::TxnEnd(m) => put_txn_end(m, out),
        Message::Hello(m) => put_hello(m, out),
        Message::Welcome(m) => put_welcome(m, out),
        Message::Epochs(history) => {
            out.put_slice(&history.encode());
            Kind::Epochs
        }
        Message::Heartbeat(m) => {
            out.put_slice(&m.position.to_bytes());
            out.put_u64_le(m.clock);
            out.put_u64_le(m.lease_clock.unwrap_or(NO_LEASE));
            Kind::Heartbeat
        }
        Message::Ack(m) => put_ack(m, out),
        Message::SnapBegin(m) => put_snap_begin(m, out),
        Message::SnapPiece { position, run } => {
            out.reserve(PIECE_FIELDS_BYTES + run.bytes().len());
            out.put_u32_le(run.first().get());
            out.put_slice(&position.to_bytes());
            out.put_u8(run.page_size().power());
            out.put_slice(run.bytes());
            Kind::SnapPiece
        }
        Message::SnapEnd(m) => {
            out.put_slice(&m.exact_at.to_bytes());
            out.put_u32_le(m.pages);
            Kind::SnapEnd
        }
        Message::HealBegin(m) => put_heal_begin(m, out),
        Message::Sums { first, span, sums } => {
            out.put_u32_le(first.get());
            out.put_u32_le(*span);
            out.put_slice(sums.as_flattened());
            Kind::Sums
        }
        Message::Want(m) => put_want(m, out),
        Message::Sent(m) => {
            out.put_slice(&m.position.to_bytes());
            out.put_u32_le(m.pages);
            Kind::Sent
        }
        Message::Drain => Kind::Drain,
        Message::Standing(m) => put_standing(m, out),
        Message::Handoff(stage) => {
            out.put_u8(*stage as u8);
            Kind::Handoff
        }
        Message::Offer(m) => put_offer(m, out),
        Message::Accept(m) => put_accept(m, out),
        Message::Handed(m) => put_handed(m, out),
        Message::Goodbye(m) => put_goodbye(m, out),
        Message::Segment(m) => put_segment(m, out),
    }
}

fn put_txn_begin(m: &TxnBegin, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.before.to_bytes());
    out.put_slice(&m.epoch.to_bytes());
    out.put_u32_le(m.page_size.get());
    Kind::TxnBegin
}

fn put_txn_end(m: &TxnEnd, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.after.to_bytes());
    out.put_u32_le(m.pages);
    out.put_u32_le(m.changed);
    out.put_u64_le(m.unix_micros);
    Kind::TxnEnd
}

fn put_hello(m: &Hello, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.proof);
    put_keys(&m.keys, out);
    put_optional(m.position, out);
    match m.resume {
        None => out.put_u8(0),
        Some((position, page)) => {
            out.put_u8(1);
            out.put_slice(&position.to_bytes());
            out.put_u32_le(page.get());
        }
    }
    out.put_u8(u8::from(m.suspect));
    let marks = &m.marks[..m.marks.len().min(MARKS_MAX)];
    out.put_u8(marks.len() as u8);
    marks.iter().for_each(|mark| out.put_slice(&mark.to_bytes()));
    put_peer(&m.peer, out);
    out.put_slice(&m.history.encode());
    Kind::Hello
}

fn put_welcome(m: &Welcome, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.epoch.to_bytes());
    out.put_u8(m.plan as u8);
    out.put_slice(&m.position.to_bytes());
    out.put_u32_le(m.page_size.get());
    put_keys(&m.keys, out);
    out.put_u8(u8::from(m.packed));
    put_peer(&m.peer, out);
    Kind::Welcome
}

fn put_ack(m: &Ack, out: &mut BytesMut) -> Kind {
    put_optional(m.applied, out);
    put_optional(m.synced, out);
    out.put_u64_le(m.clock);
    Kind::Ack
}

fn put_snap_begin(m: &SnapBegin, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.first.to_bytes());
    out.put_u32_le(m.from.get());
    out.put_u32_le(m.page_size.get());
    out.put_u32_le(m.pages);
    Kind::SnapBegin
}

fn put_heal_begin(m: &HealBegin, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.from.to_bytes());
    out.put_u32_le(m.page_size.get());
    out.put_u32_le(m.pages);
    out.put_u8(u8::from(m.compare));
    out.put_u8(u8::from(m.diverged));
    Kind::HealBegin
}

fn put_want(m: &Want, out: &mut BytesMut) -> Kind {
    for run in &m.runs {
        out.put_u32_le(run.first.get());
        out.put_u32_le(run.hashes.len() as u32);
        out.put_slice(run.hashes.as_flattened());
    }
    Kind::Want
}

fn put_standing(m: &Standing, out: &mut BytesMut) -> Kind {
    out.put_slice(&m.proof);
    put_optional(m.position, out);
    out.put_u64_le(m.epoch);
    for flag in [m.fit, m.has_state, m.has_content] {
        out.put_u8(u8::from(flag));
    }
    put_peer(&m.peer, out);
    Kind::Standing
}

fn put_goodbye(m: &Goodbye, out: &mut BytesMut) -> Kind {
    let cut = cut_at(&m.reason, REASON_MAX_BYTES);
    out.put_slice(&m.reason.as_bytes()[..cut]);
    Kind::Goodbye
}

fn put_segment(m: &Segment, out: &mut BytesMut) -> Kind {
    out.put_u64_le(m.start);
    out.put_slice(&m.before.to_bytes());
    out.put_u64_le(m.follows.unwrap_or(FOLLOWS_NONE));
    out.put_slice(&m.key.0);
    Kind::Segment
}

fn put_offer(m: &LeaseOffer, out: &mut BytesMut) -> Kind {
    out.put_u128_le(m.attempt);
    out.put_slice(&m.position.to_bytes());
    Kind::Offer
}

fn put_accept(m: &Accept, out: &mut BytesMut) -> Kind {
    out.put_u128_le(m.attempt);
    out.put_u8(u8::from(m.answer.is_ok()));
    match &m.answer {
        Ok(boot) => out.put_slice(boot.as_bytes()),
        Err(why) => out.put_slice(&why.as_bytes()[..cut_at(why, DECLINED_MAX_BYTES)]),
    }
    Kind::Accept
}

fn put_handed(m: &Handed<'_>, out: &mut BytesMut) -> Kind {
    out.put_u128_le(m.attempt);
    out.put_u16_le(m.version.len() as u16);
    out.put_slice(m.version.as_bytes());
    out.put_slice(m.record);
    Kind::Handed
}

fn put_keys(keys: &PeerKeys, out: &mut BytesMut) {
    out.put_slice(&keys.page.to_bytes());
    match keys.token {
        None => out.put_u8(0),
        Some(token) => {
            out.put_u8(1);
            out.put_slice(&token.to_bytes());
        }
    }
}

fn put_optional(position: Option<Position>, out: &mut BytesMut) {
    match position {
        None => out.put_u8(0),
        Some(position) => {
            out.put_u8(1);
            out.put_slice(&position.to_bytes());
        }
    }
}

/// A peer whose description is too long is told with less of it: the stream matters more than a
/// label.
fn put_peer(peer: &PeerInfo, out: &mut BytesMut) {
    let shorter = || {
        let addresses = Addresses { labels: Default::default(), ..peer.addresses.clone() };
        json(&PeerInfo { addresses, ..peer.clone() })
    };
    let bare = || json(&PeerInfo { addresses: Addresses::default(), ..peer.clone() });
    let json = json(peer).or_else(shorter).or_else(bare).unwrap_or_default();
    out.put_u16_le(json.len() as u16);
    out.put_slice(&json);
}

fn json(peer: &PeerInfo) -> Option<Vec<u8>> {
    serde_json::to_vec(peer).ok().filter(|json| json.len() <= PEER_MAX_BYTES)
}

/// The last place at or before `most` where the text can be cut.
fn cut_at(text: &str, most: usize) -> usize {
    (0..=most.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
