use bytes::BytesMut;
use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::checksum::Checksum;
use crate::hex::unhex_lossy;
use crate::peer::{Incarnation, NodeId};
use crate::status::Addresses;
use crate::txid::{EpochStart, NUMBER_MAX, Txid};
use crate::wire::handoff::{DECLINED_MAX_BYTES, VERSION_MAX_BYTES};
use crate::wire::*;

const KEY: PageKey = PageKey::from_bytes([7; 28]);

fn position(n: u64) -> Position {
    Position::new(Txid::new(Epoch::new(3, 0xabcd), n), Checksum::from_u128(u128::from(n) << 70 | 5))
}

fn size() -> PageSize {
    PageSize::new(512).unwrap()
}

fn page_no(n: u32) -> PageNo {
    PageNo::new(n).unwrap()
}

fn peer() -> PeerInfo {
    PeerInfo {
        node: NodeId::from_u128(7),
        incarnation: Incarnation::from_u128(8),
        addresses: Addresses {
            replication: "http://10.0.0.1:8081/_replite".into(),
            app: "http://10.0.0.1:8081".into(),
            public: None,
            labels: BTreeMap::from([("region".into(), "ams".into())]),
        },
    }
}

fn keys() -> PeerKeys {
    PeerKeys::of(DatabaseKeys::fixed(7), true)
}

fn history() -> EpochHistory {
    let mut history = EpochHistory::default();
    for n in 1..4 {
        history.push(EpochStart { epoch: Epoch::new(n, n * 9), first: n * 10, before: Checksum::EMPTY });
    }
    history
}

fn page_of(number: PageNo, page: &[u8]) -> Message<'_> {
    let hash = KEY.hash(number, page);
    Message::Change(PageChange { number, hash, replaced: None, image: Image::Whole(page) })
}

static PAGES: [u8; 1024] = [0x5a; 1024];

/// A page that has changed, as a PATCH or a TXN has it.
fn change(number: u32, old: Option<&[u8]>, page: &'static [u8]) -> PageChange<'static> {
    let number = page_no(number);
    let runs = Box::leak(Box::default());
    let image = difference(old, page, runs);
    let replaced = old.map(|old| KEY.hash(number, old));
    PageChange { number, hash: KEY.hash(number, page), replaced, image }
}

/// A transaction in one unit, of the epoch before or of another, which drops pages or does not.
fn txn(epoch: Epoch, dropped: u128) -> Message<'static> {
    let before = position(1);
    let changes = [change(300, Some(&ZERO), &SPARSE), change(2, None, &SPARSE)];
    let mut sum = before.checksum().minus(Checksum::from_u128(dropped));
    let encoded = Box::leak(Box::<BytesMut>::default());
    for change in changes {
        sum = change.replaced.map_or(sum, |replaced| sum.without(replaced)).with(change.hash);
        encode_change(&change, encoded);
    }
    let begin = TxnBegin { before, epoch, page_size: size() };
    let end =
        TxnEnd { after: Position::new(Txid::new(epoch, 2), sum), pages: 300, changed: 2, unix_micros: 9 };
    Message::Txn(CompactTxn { begin, end, changes: Changes::of(encoded) })
}

static ZERO: [u8; 512] = [0; 512];
static SPARSE: [u8; 512] = {
    let mut page = [0; 512];
    (page[9], page[300], page[301]) = (1, 2, 3);
    page
};

/// Every kind, with and without its optional fields.
fn every_kind() -> Vec<Message<'static>> {
    let hello = |position: Option<Position>, resume| {
        let (suspect, marks) = (position.is_some(), position.into_iter().collect());
        let (peer, history) = (peer(), history());
        let keys = PeerKeys { token: None, ..keys() };
        Message::Hello(Hello { proof: [9; 32], keys, peer, position, history, resume, suspect, marks })
    };
    let welcome = |plan| {
        let (epoch, position) = (Epoch::new(3, 4), position(5));
        let (page_size, packed) = (size(), plan != Plan::Recover);
        Message::Welcome(Welcome { peer: peer(), epoch, plan, position, page_size, keys: keys(), packed })
    };
    let standing = |position: Option<Position>, fit| {
        let (proof, has_content, epoch) = ([8; 32], fit, 1 << 33);
        let has_state = position.is_some();
        Message::Standing(Standing { proof, position, epoch, fit, has_state, has_content, peer: peer() })
    };
    vec![
        Message::TxnBegin(TxnBegin { before: position(1), epoch: Epoch::new(4, 4), page_size: size() }),
        page_of(page_no(77), &PAGES[..512]),
        Message::TxnEnd(TxnEnd { after: position(2), pages: 10, changed: 3, unix_micros: 1 << 50 }),
        hello(None, None),
        hello(Some(position(4)), Some((position(3), page_no(9)))),
        welcome(Plan::Log),
        welcome(Plan::Snapshot),
        welcome(Plan::Heal),
        welcome(Plan::Resume),
        welcome(Plan::Compare),
        welcome(Plan::Recover),
        Message::Epochs(history()),
        Message::Heartbeat(Heartbeat { position: position(6), clock: 12, lease_clock: Some(13) }),
        Message::Ack(Ack { applied: None, synced: None, clock: 0 }),
        Message::Ack(Ack { applied: Some(position(8)), synced: Some(position(7)), clock: 1 << 40 }),
        Message::SnapBegin(SnapBegin { first: position(1), from: page_no(2), page_size: size(), pages: 11 }),
        Message::SnapPiece { position: position(9), run: PageRun::hashed(page_no(2), &PAGES, size(), &KEY) },
        Message::SnapEnd(SnapEnd { exact_at: position(11), pages: 12 }),
        Message::HealBegin(HealBegin {
            from: position(3),
            page_size: size(),
            pages: 9,
            compare: true,
            diverged: false,
        }),
        Message::Sums { first: page_no(65), span: 64, sums: &[[1; 16], [2; 16]] },
        Message::Want(Want {
            runs: vec![
                WantRun { first: page_no(2), hashes: vec![[3; 16]; 2] },
                WantRun { first: page_no(9), hashes: vec![[0; 16]] },
            ],
        }),
        Message::Sent(Sent { position: position(12), pages: 9 }),
        Message::Goodbye(Goodbye { reason: "bis bald, schöne Welt".into() }),
        Message::Drain,
        Message::Segment(Segment {
            start: 1 << 40,
            before: position(0),
            follows: None,
            key: KEY.fingerprint(),
        }),
        Message::Segment(Segment {
            start: 1 << 40,
            before: position(0),
            follows: Some(77),
            key: KEY.fingerprint(),
        }),
        Message::Heartbeat(Heartbeat { position: position(6), clock: 12, lease_clock: None }),
        standing(None, false),
        standing(Some(position(13)), true),
        Message::Handoff(HandoffStage::GoesOn),
        Message::Handoff(HandoffStage::Begins),
        Message::Handoff(HandoffStage::Done),
        Message::Offer(LeaseOffer { attempt: 7 << 70, position: position(14) }),
        Message::Accept(Accept { attempt: 7 << 70, answer: Ok("b0".into()) }),
        Message::Accept(Accept { attempt: 8, answer: Err("it drains".into()) }),
        Message::Handed(Handed { attempt: 7 << 70, version: "42", record: b"{\"format\": 1}" }),
        Message::Change(change(77, Some(&ZERO), &SPARSE)),
        Message::Change(change(1 << 30, None, &SPARSE)),
        txn(position(1).epoch(), 0),
        txn(Epoch::new(4, 4), 5),
    ]
}

/// Units as their kinds, lengths and payloads, in three segments: what is after each begins where
/// the one before it ends.
fn program(log: &[u8]) -> Vec<u8> {
    let (head, records) = log.split_at(SEGMENT_BYTES);
    let each = records.len() as u64 / 3;
    let mut program = Vec::new();
    for n in 0..3u64 {
        let before = position(n + 1);
        let segment =
            Segment { start: n * each, before, follows: (n > 0).then_some(n * each), key: KEY.fingerprint() };
        let own = encoded(&Message::Segment(segment));
        let head = if n == 0 { head } else { &own };
        let bytes = [head, &records[(n * each) as usize..((n + 1) * each) as usize]].concat();
        let mut decoder = Decoder::new(Some(KEY));
        decoder.push(bytes.into());
        while let Ok(Some(unit)) = decoder.next() {
            program.push(unit.kind as u8);
            program.extend_from_slice(&(unit.payload().len() as u16).to_le_bytes());
            program.extend_from_slice(unit.payload());
        }
    }
    program
}

/// Inputs of the decoders' fuzz targets: each unit whole, its payload after its kind, and a log of
/// records.
pub(crate) fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut stream = vec![100];
    for (at, message) in every_kind().iter().enumerate() {
        let raw = encoded(message);
        stream.extend_from_slice(&raw);
        let name = format!("{at:02}");
        seeds.push(("wire_sealed", name, [&raw[4..5], &raw[HEADER_BYTES..]].concat()));
    }
    seeds.push(("wire", "stream".into(), stream));
    seeds.push(("packed", "stream".into(), crate::wire::next::packed_seed()));
    let mut log = BytesMut::new();
    let (before, epoch) = (position(1), position(1).epoch());
    encode(&Message::Segment(Segment { start: 0, before, follows: None, key: KEY.fingerprint() }), &mut log);
    for n in 1..4 {
        encode(&Message::TxnBegin(TxnBegin { before: position(n), epoch, page_size: size() }), &mut log);
        encode(&page_of(page_no(n as u32), &PAGES[..512]), &mut log);
        let end = TxnEnd { after: position(n + 1), pages: 9, changed: 1, unix_micros: n };
        encode(&Message::TxnEnd(end), &mut log);
    }
    seeds.push(("log_sealed", "three".into(), program(&log)));
    // Where no log gets to: the address is after the kind and the length.
    let mut far = program(&log);
    far[3..11].copy_from_slice(&(u64::MAX - 9).to_le_bytes());
    seeds.push(("log_sealed", "far".into(), far));
    let end = (log.len() - SEGMENT_BYTES) as u64;
    let first = (log.len() as u16).to_le_bytes();
    let second = Segment { start: end, before: position(4), follows: Some(end), key: KEY.fingerprint() };
    encode(&Message::Segment(second), &mut log);
    seeds.push(("log", "two".into(), [first.as_slice(), &log].concat()));
    seeds
}

fn encoded(message: &Message<'_>) -> Bytes {
    let mut out = BytesMut::new();
    encode(message, &mut out);
    out.freeze()
}

/// A unit of any bytes with a hash that holds.
fn sealed(kind: u8, flags: u8, payload: &[u8]) -> Bytes {
    let mut raw = (payload.len() as u32).to_le_bytes().to_vec();
    raw.extend_from_slice(&[kind, flags, VERSION as u8, 0]);
    raw.extend_from_slice(&[0; 16]);
    raw.extend_from_slice(payload);
    let hash = if kind == 2 { KEY.hash_of_numbered(payload).to_bytes() } else { fields::hash_of(&raw) };
    raw[8..24].copy_from_slice(&hash);
    raw.into()
}

fn first(bytes: impl Into<Bytes>) -> Result<Option<Unit>, WireError> {
    let mut decoder = Decoder::new(Some(KEY));
    decoder.push(bytes.into());
    decoder.next()
}

fn fields_error(raw: Bytes) -> bool {
    let unit = first(raw).unwrap().unwrap();
    matches!(unit.decode(), Err(WireError::Fields(_)))
}

#[test]
fn every_kind_round_trips_and_stays_a_slice_of_its_chunk() {
    let messages = every_kind();
    let mut out = BytesMut::new();
    for message in &messages {
        encode(message, &mut out);
    }
    let whole = out.freeze();
    let mut decoder = Decoder::new(Some(KEY));
    decoder.push(whole.clone());
    for message in &messages {
        let unit = decoder.next().unwrap().unwrap();
        assert_eq!(&unit.decode().unwrap(), message);
        assert!(whole.as_ptr_range().contains(&unit.raw.as_ptr()), "{:?} was copied", unit.kind);
    }
    assert!(decoder.next().unwrap().is_none());
    assert_eq!(decoder.buffered(), 0);
}

#[test]
fn any_cut_in_two_gives_the_same_units_and_no_cut_gives_a_unit_early() {
    for message in every_kind() {
        let raw = encoded(&message);
        for cut in 0..raw.len() {
            let mut decoder = Decoder::new(Some(KEY));
            decoder.push(raw.slice(..cut));
            assert!(decoder.next().unwrap().is_none(), "{message:?} cut at {cut}");
            assert_eq!(decoder.buffered(), cut);
            decoder.push(raw.slice(cut..));
            assert_eq!(decoder.next().unwrap().unwrap().decode().unwrap(), message);
        }
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_a_wait_never_another_message() {
    for message in every_kind() {
        let raw = encoded(&message);
        for bit in 0..raw.len() * 8 {
            let mut bad = raw.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            match first(bad) {
                // A length that grew: the rest is waited for.
                Ok(None) => assert!(bit < 32, "bit {bit} of {message:?} swallowed the unit"),
                Ok(Some(unit)) => assert!(unit.decode().is_err(), "bit {bit} of {message:?}"),
                Err(_) => {}
            }
        }
    }
}

#[test]
fn lengths_versions_and_kinds_outside_the_bounds_are_refused() {
    let header = |length: u32, kind: u8, flags: u8, version: u16| {
        let mut raw = length.to_le_bytes().to_vec();
        raw.extend_from_slice(&[kind, flags]);
        raw.extend_from_slice(&version.to_le_bytes());
        raw.extend_from_slice(&[0; 16]);
        raw
    };
    let most = PAYLOAD_MAX_BYTES as u32;
    assert!(first(header(most, 10, 0, VERSION)).unwrap().is_none());
    assert_eq!(
        first(header(most + 1, 10, 0, VERSION)).unwrap_err(),
        WireError::TooLarge(PAYLOAD_MAX_BYTES + 1)
    );
    assert_eq!(first(header(u32::MAX, 10, 0, VERSION)).unwrap_err(), WireError::TooLarge(u32::MAX as usize));
    for version in [0, 1, 2, 4, 256, u16::MAX] {
        assert_eq!(first(header(8, 8, 0, version)).unwrap_err(), WireError::Version(version));
    }
    for kind in [0, 27, 255] {
        assert_eq!(first(header(8, kind, 0, VERSION)).unwrap_err(), WireError::UnknownKind(kind));
        assert_eq!(first(header(8, kind, 2, VERSION)).unwrap_err(), WireError::UnknownKind(kind));
    }
    assert!(first(header(8, 2, 1, VERSION)).is_err());
    // What failed stays failed, whatever else arrives.
    let mut decoder = Decoder::new(Some(KEY));
    decoder.push(header(most + 1, 10, 0, VERSION).into());
    assert!(decoder.next().is_err());
    decoder.push(encoded(&every_kind()[0]));
    assert!(decoder.next().is_err());
}

#[test]
fn a_length_that_is_claimed_is_not_allocated() {
    let mut decoder = Decoder::new(Some(KEY));
    let mut raw = (PAYLOAD_MAX_BYTES as u32).to_le_bytes().to_vec();
    raw.extend_from_slice(&[10, 0, VERSION as u8, 0]);
    raw.extend_from_slice(&[0; 20]);
    decoder.push(raw.into());
    assert!(decoder.next().unwrap().is_none());
    assert!(decoder.partial.capacity() < 1024, "{}", decoder.partial.capacity());
}

#[test]
fn what_comes_first_may_be_as_long_as_the_longest_hello_and_no_longer() {
    let header = |kind: u8, flags: u8, length: usize| {
        let raw = [&(length as u32).to_le_bytes()[..], &[kind, flags, VERSION as u8, 0], &[0; 16]];
        Bytes::from(raw.concat())
    };
    let expecting = |bytes: Bytes| {
        let mut decoder = Decoder::new(Some(KEY));
        decoder.expect_at_most(HELLO_MAX_BYTES);
        decoder.push(bytes);
        decoder
    };
    let too_long = Err(WireError::Unexpected(HELLO_MAX_BYTES + 1, HELLO_MAX_BYTES));
    let refused = |bytes| expecting(bytes).next().map(drop);
    assert_eq!(refused(header(4, 0, HELLO_MAX_BYTES + 1)), too_long);
    assert_eq!(refused(header(10, 0, HELLO_MAX_BYTES + 1)), too_long);
    assert!(refused(header(99, 1, 8)).is_err(), "nothing is skipped before it");
    assert_eq!(expecting(header(4, 0, HELLO_MAX_BYTES)).next().unwrap().map(drop), None);
    // The longest of all passes, and what follows it may be longer.
    let mut history = EpochHistory::default();
    for n in 1..=EpochHistory::MAX as u64 {
        history.push(EpochStart { epoch: Epoch::new(n, 1), first: n, before: Checksum::EMPTY });
    }
    let mut peer = peer();
    let room = PEER_MAX_BYTES - serde_json::to_vec(&peer).unwrap().len();
    peer.addresses.app.push_str(&"a".repeat(room));
    let (marks, position) = (vec![position(1); MARKS_MAX], Some(position(4)));
    let resume = position.map(|position| (position, page_no(9)));
    let (proof, keys, suspect) = ([9; 32], keys(), true);
    let hello = Message::Hello(Hello { proof, keys, peer, position, history, resume, suspect, marks });
    let unit = encoded(&hello);
    assert!((HELLO_MAX_BYTES - 16..=HELLO_MAX_BYTES).contains(&(unit.len() - HEADER_BYTES)));
    let mut decoder = expecting(unit);
    assert_eq!(decoder.next().unwrap().unwrap().decode().unwrap(), hello);
    decoder.push(header(10, 0, HELLO_MAX_BYTES + 1));
    assert!(decoder.next().unwrap().is_none(), "its end is to come");
}

#[test]
fn the_largest_unit_passes() {
    let pages = vec![1; PIECE_MAX_BYTES];
    let run = PageRun::hashed(PageNo::FIRST, &pages, size(), &KEY);
    let message = Message::SnapPiece { position: position(1), run };
    let unit = first(encoded(&message)).unwrap().unwrap();
    assert_eq!(unit.decode().unwrap(), message);
    let full = PAYLOAD_MAX_BYTES - PIECE_FIELDS_BYTES;
    let fields = [&[1, 0, 0, 0], &[0; 40][..], &[9], &vec![0; full]].concat();
    let unit = first(sealed(10, 0, &fields)).unwrap().unwrap();
    assert_eq!(unit.payload().len(), PAYLOAD_MAX_BYTES);
    assert!(unit.decode().is_err(), "{full} is no whole number of pages");
}

#[test]
fn pages_of_every_valid_size_pass_and_of_others_do_not() {
    for shift in 9..=16 {
        let page = vec![shift; 1 << shift];
        let message = page_of(page_no(u32::MAX), &page);
        assert_eq!(first(encoded(&message)).unwrap().unwrap().decode().unwrap(), message);
    }
    for length in [0, 1, 256, 511, 513, 4095, 65_535, 65_537, 131_072] {
        assert!(fields_error(encoded(&page_of(page_no(1), &vec![0; length]))), "{length}");
    }
    assert!(fields_error(sealed(2, 0, &[0; 516])), "page number 0");
    assert!(fields_error(sealed(2, 0, &[0; 3])), "no page number");
}

#[test]
fn fields_outside_their_bounds_are_refused_behind_a_good_hash() {
    for message in every_kind() {
        let raw = encoded(&message);
        let payload = &raw[HEADER_BYTES..];
        // One byte less or more than the fields need; texts and pages have lengths of their own.
        if !matches!(message, Message::Goodbye(_) | Message::Accept(_) | Message::Handed(_)) {
            if let Some((_, short)) = payload.split_last() {
                assert!(fields_error(sealed(raw[4], 0, short)), "{message:?} short");
            }
            assert!(fields_error(sealed(raw[4], 0, &[payload, &[0]].concat())), "{message:?} long");
        }
    }
    let with = |number| Position::new(Txid::new(position(1).epoch(), number), position(1).checksum());
    let beat = |number| Message::Heartbeat(Heartbeat { position: with(number), clock: 0, lease_clock: None });
    assert!(!fields_error(encoded(&beat(NUMBER_MAX))));
    assert!(fields_error(encoded(&beat(NUMBER_MAX + 1))), "a number that no history gets to");
    let segment = |start| {
        Message::Segment(Segment { start, before: position(1), follows: None, key: KEY.fingerprint() })
    };
    assert!(!fields_error(encoded(&segment(ADDRESS_MAX))));
    assert!(fields_error(encoded(&segment(ADDRESS_MAX + 1))), "an address that no log gets to");
    let ack = [2; 1];
    assert!(fields_error(sealed(8, 0, &ack)), "a flag of 2");
    for (kind, at, value) in [(1u8, 56, 1000u32), (9, 44, 0), (9, 40, 0), (5, 57, 3), (10, 0, 0)] {
        let message = every_kind().into_iter().find(|m| encoded(m)[4] == kind).unwrap();
        let mut payload = encoded(&message)[HEADER_BYTES..].to_vec();
        payload[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(fields_error(sealed(kind, 0, &payload)), "kind {kind} at {at}");
    }
    let welcome = encoded(&every_kind()[5]);
    for plan in [0, 7, 255] {
        let mut payload = welcome[HEADER_BYTES..].to_vec();
        payload[16] = plan;
        assert!(fields_error(sealed(5, 0, &payload)), "plan {plan}");
    }
    assert!(!fields_error(sealed(12, 0, &[b'x'; REASON_MAX_BYTES])));
    assert!(fields_error(sealed(12, 0, &[b'x'; REASON_MAX_BYTES + 1])));
    assert!(fields_error(sealed(12, 0, &[0xff, 0xfe])), "not UTF-8");
}

#[test]
fn what_a_handoff_says_is_bounded() {
    assert!(fields_error(sealed(20, 0, &[3])), "a fourth stage");
    let accept = |boot: &[u8]| sealed(22, 0, &[[7; 16].as_slice(), &[1], boot].concat());
    assert!(!fields_error(accept(&[b'x'; BOOT_ID_MAX_BYTES])));
    assert!(fields_error(accept(&[b'x'; BOOT_ID_MAX_BYTES + 1])));
    let decline = |why: &[u8]| sealed(22, 0, &[[7; 16].as_slice(), &[0], why].concat());
    assert!(!fields_error(decline(&[b'x'; DECLINED_MAX_BYTES])));
    assert!(fields_error(decline(&[b'x'; DECLINED_MAX_BYTES + 1])));
    let long = Accept { attempt: 7, answer: Err("ß".repeat(DECLINED_MAX_BYTES)) };
    let unit = first(encoded(&Message::Accept(long))).unwrap().unwrap();
    let Message::Accept(told) = unit.decode().unwrap() else { panic!() };
    assert_eq!(told.answer, Err("ß".repeat(DECLINED_MAX_BYTES / 2)));
    assert!(fields_error(accept(&[0xff, 0xfe])), "not UTF-8");
    assert!(fields_error(accept(b"a\nb")), "a line of its own in a log");
    assert!(fields_error(sealed(22, 0, &[[7; 16].as_slice(), &[2]].concat())), "neither yes nor no");
    let handed = |version: usize, record: usize| {
        let length = (version as u16).to_le_bytes();
        sealed(23, 0, &[[7; 16].as_slice(), &length, &vec![b'v'; version], &vec![1; record]].concat())
    };
    assert!(!fields_error(handed(VERSION_MAX_BYTES, LEASE_RECORD_MAX_BYTES)));
    assert!(fields_error(handed(VERSION_MAX_BYTES + 1, 0)));
    assert!(fields_error(handed(1, LEASE_RECORD_MAX_BYTES + 1)));
    // A length that nothing stands for is not believed.
    assert!(fields_error(sealed(23, 0, &[[7; 16].as_slice(), &[9, 0], b"short"].concat())));
    let most = Handed { attempt: 7, version: "v", record: &[1; LEASE_RECORD_MAX_BYTES] };
    assert!(most.fits());
    assert!(!Handed { record: &[1; LEASE_RECORD_MAX_BYTES + 1], ..most.clone() }.fits());
    assert!(!Handed { version: &"v".repeat(VERSION_MAX_BYTES + 1), ..most }.fits());
}

/// The units that a lease has to do with, by another implementation of the format.
#[test]
fn the_bytes_of_heartbeats_and_standings_stay_what_they_are() {
    let beat = |lease_clock| Message::Heartbeat(Heartbeat { position: position(6), clock: 12, lease_clock });
    let by_lease = concat!(
        "3800000007000300da28db2d05f296136e5252d7f652767f0300000000000000cdab0000000000000600000000",
        "000000050000000000000080010000000000000c000000000000000d00000000000000",
    );
    let without = concat!(
        "380000000700030048af3ae6231ae38abfd2ca20cbe510330300000000000000cdab0000000000000600000000",
        "000000050000000000000080010000000000000c00000000000000ffffffffffffffff",
    );
    let standing = Standing {
        proof: [8; 32],
        position: Some(position(13)),
        epoch: 1 << 33,
        fit: true,
        has_state: true,
        has_content: true,
        peer: peer(),
    };
    let json = concat!(
        r#"{"node":"00000000-0000-0000-0000-000000000007","#,
        r#""incarnation":"00000000-0000-0000-0000-000000000008""#,
        r#","addresses":{"replication":"http://10.0.0.1:8081/_replite","app":"http://10.0.0.1:8081","#,
        r#""labels":{"region":"ams"}}}"#,
    );
    let stands = concat!(
        "2d0100001300030018604caac8e68a87cd82d41e7783c20a080808080808080808080808080808080808080808",
        "0808080808080808080808010300000000000000cdab0000000000000d00000000000000050000000000000040",
        "030000000000000000000002000000010101d700",
    );
    let stands = [unhex_lossy(stands), json.as_bytes().to_vec()].concat();
    let all = [
        (beat(Some(13)), unhex_lossy(by_lease)),
        (beat(None), unhex_lossy(without)),
        (Message::Standing(standing), stands),
    ];
    for (message, bytes) in all {
        assert_eq!(encoded(&message), bytes, "{message:?}");
        assert_eq!(first(bytes).unwrap().unwrap().decode().unwrap(), message);
    }
}

/// The units of small transactions, by another implementation of the format.
#[test]
fn the_bytes_of_changes_stay_what_they_are() {
    let patch = concat!(
        "2b00000018000300f7032369ae8fd140271b9b51f7f028ffac02038fcc25700132f6d5db110ee135d68caedf90",
        "89e8be301f2101cc09df4d33efb807090104ea030101",
    );
    let txn = concat!(
        "7700000019000300d98fd26a20a25ad7e7a8ee48b179c9d000090300000000000000cdab000000000000010000",
        "0000000000050000000000000040000000000000002c0100000900000000000000ac02038fcc25700132f6d5db",
        "110ee135d68caedf9089e8be301f2101cc09df4d33efb807090104ea0301010200994910d4dafa537be830ca12",
        "1d88dd8803030105",
    );
    let (mut old, mut new, mut grown) = ([0; 512], [0; 512], [0; 512]);
    (old[7], old[8], old[9]) = (9, 9, 3);
    (new[7], new[8], new[9], new[500]) = (9, 9, 4, 1);
    grown[3] = 5;
    let (mut runs, mut more, mut encoded_changes) = Default::default();
    let (changed, page) = (page_no(300), page_no(2));
    let (replaced, hash) = (Some(KEY.hash(changed, &old)), KEY.hash(changed, &new));
    let change =
        PageChange { number: changed, hash, replaced, image: difference(Some(&old), &new, &mut runs) };
    let image = difference(None, &grown, &mut more);
    let growth = PageChange { number: page, hash: KEY.hash(page, &grown), replaced: None, image };
    encode_change(&change, &mut encoded_changes);
    encode_change(&growth, &mut encoded_changes);
    let epoch = position(1).epoch();
    let begin = TxnBegin { before: position(1), epoch, page_size: size() };
    let after = Position::new(Txid::new(epoch, 2), Checksum::from_u128(0x933fe53510c5eb4dc67cf9984c740dee));
    let end = TxnEnd { after, pages: 300, changed: 2, unix_micros: 9 };
    let whole = CompactTxn { begin, end, changes: Changes::of(&encoded_changes) };
    for (message, bytes) in [(Message::Change(change), patch), (Message::Txn(whole), txn)] {
        assert_eq!(encoded(&message), unhex_lossy(bytes), "{message:?}");
        assert_eq!(first(unhex_lossy(bytes)).unwrap().unwrap().decode().unwrap(), message);
    }
    let parts: Vec<RecordPart<'_>> = Message::Txn(whole).parts().collect();
    let changes = [RecordPart::Change(change), RecordPart::Change(growth)];
    assert_eq!(parts, [&[RecordPart::Begin(begin)], &changes[..], &[RecordPart::End(end)]].concat());
    let mut made = old;
    change.make(&mut made, &KEY).unwrap();
    assert_eq!(made, new);
}

#[test]
fn a_transaction_of_one_unit_has_changes_in_their_bounds() {
    let Message::Txn(txn) = txn(position(1).epoch(), 0) else { panic!() };
    let with = |begin: TxnBegin, changes: &[u8]| {
        fields_error(encoded(&Message::Txn(CompactTxn {
            begin,
            end: txn.end,
            changes: Changes::of(changes),
        })))
    };
    let mut one = BytesMut::new();
    encode_change(&change(2, None, &SPARSE), &mut one);
    let fit = TXN_CHANGES_MAX_BYTES / one.len();
    assert!(!with(txn.begin, &one.repeat(fit)));
    assert!(with(txn.begin, &one.repeat(fit + 1)), "more than one unit may have");
    assert!(with(txn.begin, &[]), "no pages");
    assert!(with(txn.begin, &one[..one.len() - 1]), "a change that is cut");
    let last = Position::new(Txid::new(position(1).epoch(), NUMBER_MAX), position(1).checksum());
    assert!(with(TxnBegin { before: last, ..txn.begin }, &one), "a number that no history gets to");
    // Flags and page size are the first bytes; after the position come 12 bytes more.
    let raw = encoded(&Message::Txn(txn));
    for (at, value) in [(0, 4), (0, 1), (0, 2), (1, 8), (1, 17), (1, 255)] {
        let mut payload = raw[HEADER_BYTES..].to_vec();
        payload[at] = value;
        assert!(fields_error(sealed(25, 0, &payload)), "{value} at {at}");
    }
    let mut payload = raw[HEADER_BYTES..].to_vec();
    payload[0] = 2;
    payload.splice(54..54, [0; 16]);
    assert!(fields_error(sealed(25, 0, &payload)), "dropped pages of no sum");
    // A change's flags come after its number, here of two bytes.
    let patch = encoded(&Message::Change(change(300, Some(&ZERO), &SPARSE)));
    for flags in [2, 4, 255] {
        let mut payload = patch[HEADER_BYTES..].to_vec();
        payload[2] = flags;
        assert!(fields_error(sealed(24, 0, &payload)), "flags {flags}");
    }
}

#[test]
fn what_is_asked_for_in_a_heal_is_bounded() {
    let round = |message: &Message<'_>| {
        let unit = first(encoded(message)).unwrap().unwrap();
        assert_eq!(unit.decode().unwrap(), *message);
    };
    round(&Message::Want(Want::default()));
    let single = |n: u32| WantRun { first: page_no(n), hashes: vec![[n as u8; 16]] };
    let most: Vec<_> = (1..=WANT_MAX_PAGES as u32).map(single).collect();
    round(&Message::Want(Want { runs: most.clone() }));
    let more = [most, vec![single(7)]].concat();
    assert!(fields_error(encoded(&Message::Want(Want { runs: more }))), "one page more");
    let none = WantRun { first: page_no(1), hashes: Vec::new() };
    assert!(fields_error(encoded(&Message::Want(Want { runs: vec![none] }))), "a run of no pages");
    // A count that nothing stands for is not believed.
    assert!(fields_error(sealed(16, 0, &[1, 0, 0, 0, 0, 64, 0, 0])));
    for span in [0, SPAN_MAX_PAGES + 1] {
        let sums = Message::Sums { first: page_no(1), span, sums: &[[0; 16]] };
        assert!(fields_error(encoded(&sums)), "{span} pages in a sum");
    }
    assert!(fields_error(encoded(&Message::Sums { first: page_no(1), span: 1, sums: &[] })), "no sums");
    let hello = |marks| {
        let (proof, peer, position, history) = ([0; 32], peer(), None, history());
        Message::Hello(Hello {
            proof,
            keys: keys(),
            peer,
            position,
            history,
            resume: None,
            suspect: true,
            marks,
        })
    };
    round(&hello(vec![position(1); MARKS_MAX]));
    // The count of marks stands after proof, two flags and `suspect`.
    let mut payload = encoded(&hello(Vec::new()))[HEADER_BYTES..].to_vec();
    payload[35] = MARKS_MAX as u8 + 1;
    payload.splice(36..36, vec![0; (MARKS_MAX + 1) * Position::BYTES]);
    assert!(fields_error(sealed(4, 0, &payload)), "a mark more");
}

#[test]
fn texts_that_are_too_long_are_told_in_short() {
    let reason = "ß".repeat(REASON_MAX_BYTES);
    let unit = first(encoded(&Message::Goodbye(Goodbye { reason }))).unwrap().unwrap();
    let Message::Goodbye(told) = unit.decode().unwrap() else { panic!() };
    assert_eq!(told.reason, "ß".repeat(REASON_MAX_BYTES / 2));

    let told = |peer: PeerInfo| {
        let hello = Hello {
            proof: [0; 32],
            keys: keys(),
            peer,
            position: None,
            history: history(),
            resume: None,
            suspect: false,
            marks: Vec::new(),
        };
        let unit = first(encoded(&Message::Hello(hello))).unwrap().unwrap();
        let Message::Hello(told) = unit.decode().unwrap() else { panic!() };
        told.peer
    };
    // The longest description that passes, and one byte more.
    let mut long = peer();
    let spare = PEER_MAX_BYTES - serde_json::to_vec(&long).unwrap().len();
    long.addresses.labels.insert("region".into(), "x".repeat("ams".len() + spare));
    assert!(peer_fits(&long));
    assert_eq!(told(long.clone()), long);
    long.addresses.labels.insert("region".into(), "x".repeat("ams".len() + spare + 1));
    assert!(!peer_fits(&long));
    assert_eq!(told(long.clone()).addresses, Addresses { labels: BTreeMap::new(), ..peer().addresses });
    long.addresses.app = "x".repeat(PEER_MAX_BYTES);
    assert_eq!(told(long.clone()), PeerInfo { addresses: Addresses::default(), ..peer() });
}

#[test]
fn unknown_kinds_are_skipped_when_they_may_be_and_their_hash_holds() {
    let (skip, ack) = (
        sealed(200, 1, b"from the future"),
        encoded(&Message::Ack(Ack { applied: None, synced: None, clock: 0 })),
    );
    let mut decoder = Decoder::new(Some(KEY));
    for bytes in [&skip, &skip, &ack] {
        decoder.push(bytes.clone());
    }
    assert_eq!(decoder.next().unwrap().unwrap().kind, Kind::Ack);
    let mut bad = skip.to_vec();
    bad[30] ^= 1;
    assert_eq!(first(bad).unwrap_err(), WireError::Hash);
}

fn drain(chunks: impl Iterator<Item = Bytes>) -> (Vec<Bytes>, Option<WireError>) {
    let (mut decoder, mut units) = (Decoder::new(Some(KEY)), Vec::new());
    for chunk in chunks {
        decoder.push(chunk);
        loop {
            match decoder.next() {
                Ok(Some(unit)) => {
                    // Must not panic, whatever comes of it.
                    let _ = unit.decode();
                    units.push(unit.raw);
                }
                Ok(None) => break,
                Err(error) => return (units, Some(error)),
            }
        }
    }
    (units, None)
}

fn chunked(bytes: Bytes, sizes: Vec<usize>) -> impl Iterator<Item = Bytes> {
    let mut rest = bytes;
    let mut sizes = sizes.into_iter().cycle();
    std::iter::from_fn(move || {
        (!rest.is_empty()).then(|| rest.split_to(sizes.next().unwrap_or(1).clamp(1, rest.len())))
    })
}

proptest! {
    #[test]
    fn chunking_changes_nothing(
        order in prop::collection::vec(0usize..every_kind().len(), 1..12),
        sizes in prop::collection::vec(1usize..600, 1..8),
        damage in prop::option::of((any::<prop::sample::Index>(), 1u8..)),
    ) {
        let messages = every_kind();
        let mut out = BytesMut::new();
        for i in order {
            encode(&messages[i], &mut out);
        }
        if let Some((at, xor)) = damage {
            let at = at.index(out.len());
            out[at] ^= xor;
        }
        let bytes = out.freeze();
        let (whole, whole_error) = drain(std::iter::once(bytes.clone()));
        let (parts, parts_error) = drain(chunked(bytes, sizes));
        prop_assert_eq!(whole, parts);
        prop_assert_eq!(whole_error, parts_error);
    }

    #[test]
    fn any_bytes_in_any_chunks_never_panic(
        kind in any::<u8>(),
        length in 0u32..300,
        noise in prop::collection::vec(any::<u8>(), 0..400),
        sizes in prop::collection::vec(1usize..60, 1..8),
    ) {
        drain(chunked(noise.clone().into(), sizes.clone()));
        let mut raw = length.to_le_bytes().to_vec();
        raw.extend_from_slice(&[kind, 0, VERSION as u8, 0]);
        raw.extend_from_slice(&noise);
        drain(chunked(raw.into(), sizes));
        // After a good hash, so that the fields are reached.
        drain(chunked(sealed(kind % 27, 0, &noise), vec![1000]));
    }
}

/// Such as could write lines of their own into the logs of others.
#[test]
fn peers_with_control_characters_are_refused() {
    let with = |change: fn(&mut Addresses)| {
        let mut peer = peer();
        change(&mut peer.addresses);
        let welcome = Welcome {
            peer,
            epoch: Epoch::new(4, 4),
            plan: Plan::Log,
            position: position(3),
            page_size: size(),
            keys: keys(),
            packed: false,
        };
        let unit = first(encoded(&Message::Welcome(welcome))).unwrap().unwrap();
        unit.decode().map(drop)
    };
    assert_eq!(with(|_| {}), Ok(()));
    for change in [
        |a: &mut Addresses| a.replication = "http://a\n2026 ERROR".into(),
        |a: &mut Addresses| a.app.push('\u{1b}'),
        |a: &mut Addresses| a.public = Some("http://a\r".into()),
        |a: &mut Addresses| drop(a.labels.insert("region".into(), "a\u{202e}b".into())),
        |a: &mut Addresses| drop(a.labels.insert("a\nb".into(), "x".into())),
    ] {
        let refused = with(change);
        assert_eq!(refused, Err(WireError::Fields("addresses or labels with control characters")));
    }
}
