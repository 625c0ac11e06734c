//! Every decoder, as a function of bytes from anywhere: none of them may panic, hang, or allocate
//! what the bytes only claim.
//!
//! `fuzz/` runs them under coverage guidance. The test here runs them over the corpus that is kept
//! there, and over mutations of it. A format that a hash guards also gets the hash that fits:
//! otherwise nothing after the hash would be reached.

use std::fs;
use std::pin::pin;
use std::sync::OnceLock;
use std::task::{Context, Waker};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::channel::{Binding, Channel, Traffic};
use crate::context::{LeaseContext, NodeContext};
use crate::handshake::{Answer, Knock, Refusal, TunnelKnock};
use crate::keys::DatabaseKeys;
use crate::log::{Log, LogOptions, Lookup};
use crate::net::Endpoint;
use crate::page::PageSize;
use crate::peer::{Incarnation, NodeId, PeerKey};
use crate::secret::{Keyring, Secret};
use crate::status::{Addresses, PeerInfo, Role};
use crate::token::Token;
use crate::txid::{EpochHistory, EpochStart, NUMBER_MAX};
use crate::wire::{self, Completer, Decoder, Kind, Message, RecordPart, TxnBegin, TxnEnd, Unit, Unpacker};
use crate::{Checksum, Epoch, Position, Txid};

/// The keys of the inputs.
const KEYS: DatabaseKeys = DatabaseKeys::fixed(7);

/// A decoder and its name, under which `fuzz/` knows it.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("wire", wire),
    ("wire_sealed", wire_sealed),
    ("packed", packed),
    ("log", log),
    ("log_sealed", log_sealed),
    ("state_files", crate::engine::fuzz_state_files),
    ("wal", wal),
    ("btree", crate::engine::fuzz_btree),
    ("lost", crate::engine::fuzz_lost),
    ("identity", identity),
    ("handshake", handshake),
    ("tls", tls),
    ("texts", texts),
    ("http", http),
    ("record", crate::lease::record::fuzz_record),
    #[cfg(feature = "members")]
    ("members", crate::members::storage::fuzz_members),
    #[cfg(feature = "members")]
    ("members_words", crate::members::fuzz_members_words),
];

/// Units out of chunks of any size; what decodes encodes to the same bytes.
pub fn wire(data: &[u8]) {
    let Some((&size, rest)) = data.split_first() else { return };
    let mut decoder = Decoder::new(Some(KEYS.page));
    for chunk in rest.chunks(usize::from(size) + 1) {
        decoder.push(Bytes::copy_from_slice(chunk));
        while let Ok(Some(unit)) = decoder.next() {
            round_trip(&unit);
        }
    }
    assert!(decoder.buffered() <= rest.len());
}

/// The fields of a unit of any kind, after a hash that fits.
pub fn wire_sealed(data: &[u8]) {
    let Some((&kind, payload)) = data.split_first() else { return };
    let mut decoder = Decoder::new(Some(KEYS.page));
    decoder.push(wire::sealed(kind, payload, KEYS.page));
    if let Ok(Some(unit)) = decoder.next() {
        round_trip(&unit);
    }
}

/// The most bytes that [`packed`] makes of an input: few can become many.
const UNPACKED_MAX_BYTES: usize = 4 << 20;

/// What a primary's stream is after its welcome, out of chunks of any size: blocks, units in them,
/// and the transactions that go on from each other.
pub fn packed(data: &[u8]) {
    let Some((&size, rest)) = data.split_first() else { return };
    let Ok(mut unpacker) = Unpacker::new() else { return };
    let (mut decoder, mut completer, mut made) = (Decoder::new(Some(KEYS.page)), Completer::default(), 0);
    for chunk in rest.chunks(usize::from(size) + 1) {
        unpacker.push(Bytes::copy_from_slice(chunk));
        loop {
            let bytes = match unpacker.next() {
                Ok(Some(bytes)) => bytes,
                Ok(None) => break,
                Err(_) => return,
            };
            made += bytes.len();
            decoder.push(bytes);
            while let Ok(Some(unit)) = decoder.next() {
                round_trip(&completer.complete(unit));
            }
            if made > UNPACKED_MAX_BYTES {
                return;
            }
        }
    }
}

fn round_trip(unit: &Unit) {
    let Ok(message) = unit.decode() else { return };
    let mut again = BytesMut::new();
    match &message {
        // JSON has more than one form of the same.
        Message::Hello(_) | Message::Welcome(_) | Message::Standing(_) => {}
        message => {
            wire::encode(message, &mut again);
            assert_eq!(again, unit.raw, "{message:?}");
        }
    }
    for part in message.parts() {
        if let RecordPart::Change(change) = part {
            let mut page = [7; 512];
            let made = change.make(&mut page, &KEYS.page);
            assert!(made.is_err() || KEYS.page.hash(change.number, &page) == change.hash);
        }
    }
}

/// A log of one segment, or of two that may follow each other.
pub fn log(data: &[u8]) {
    let Some((cut, rest)) = data.split_first_chunk() else { return };
    let (first, second) = rest.split_at(usize::from(u16::from_le_bytes(*cut)).min(rest.len()));
    read_log([first, second].into_iter());
}

/// The highest bit of a unit's kind in [`log_sealed`]: its hash does not hold.
const BROKEN: u8 = 0x80;

/// A log of segments whose units have hashes that fit, unless the input says that they do not. Each
/// input unit is its kind, the length of its payload (2 bytes) and the payload; a SEGMENT begins a
/// file.
pub fn log_sealed(mut data: &[u8]) {
    let mut segments: Vec<Vec<u8>> = Vec::new();
    while let Some((&[kind, l0, l1], rest)) = data.split_first_chunk() {
        let (payload, rest) = rest.split_at(usize::from(u16::from_le_bytes([l0, l1])).min(rest.len()));
        let mut unit = wire::sealed(kind & !BROKEN, payload, KEYS.page).to_vec();
        if kind & BROKEN != 0 {
            unit[8] ^= 1;
        }
        if kind & !BROKEN == Kind::Segment as u8 || segments.is_empty() {
            segments.push(Vec::new());
        }
        segments.last_mut().expect("one was pushed").extend(unit);
        data = rest;
    }
    read_log(segments.iter().map(Vec::as_slice).take(8));
}

/// Opens a log of these segments, and asks it for all that it knows.
fn read_log<'a>(segments: impl Iterator<Item = &'a [u8]>) {
    let options = LogOptions {
        page_key: KEYS.page,
        segment_bytes: 4096,
        keep_bytes: 1 << 20,
        keep_age: std::time::Duration::from_secs(3600),
        quota_bytes: 1 << 20,
        tail_bytes: 0,
    };
    let dir = tempfile::tempdir().expect("a directory");
    // A segment is named by the address that its head states.
    let start =
        |segment: &[u8]| segment.get(24..32).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes);
    for segment in segments.filter(|s| !s.is_empty()) {
        fs::write(dir.path().join(format!("{:016x}.log", start(segment))), segment).expect("a file");
    }
    let Ok(log) = Log::open(dir.path(), options) else { return };
    assert!(log.complete() <= log.end());
    let tip = log.tip().map_or(0, Position::number);
    let start = log.start().map_or(0, Position::number);
    for number in [0, start, start.saturating_add(1), tip / 2, tip.saturating_sub(1), tip, u64::MAX] {
        if let Ok(Lookup::At { lsn, before }) = log.find(number) {
            assert!(lsn <= log.complete() && before.number() == number);
            let _ = (log.read_disk(lsn, 1 << 16), log.step_over(lsn), log.touched(before));
            let _ = log.records(lsn, log.complete(), |_, _| Ok(()));
        }
    }
    let _ = (log.marks(), log.list(0, 1000), log.state_with(Checksum::EMPTY));
    // Whatever the log was, it goes on, and is the same when it is opened again.
    let Some(before) = log.tip().filter(|tip| tip.number() < NUMBER_MAX) else { return };
    let after = Position::new(Txid::new(before.epoch(), before.number() + 1), Checksum::EMPTY);
    let page_size = PageSize::new(512).expect("a page size");
    let mut record = BytesMut::new();
    wire::encode(&Message::TxnBegin(TxnBegin { before, epoch: after.epoch(), page_size }), &mut record);
    wire::encode(&Message::TxnEnd(TxnEnd { after, pages: 1, changed: 0, unix_micros: 0 }), &mut record);
    log.append(record.freeze(), Some(after)).expect("a record");
    drop(log);
    let log = Log::open(dir.path(), options).expect("a log that was open");
    assert_eq!(log.tip(), Some(after));
}

/// Headers of the WAL's frames and of the wal-index.
pub fn wal(data: &[u8]) {
    use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, INDEX_HEADER_BYTES, IndexHeader};
    if data.len() >= FRAME_HEADER_BYTES {
        let _ = FrameHeader::parse(data);
    }
    if let Some(header) = data.first_chunk::<INDEX_HEADER_BYTES>().and_then(IndexHeader::parse) {
        assert_eq!(IndexHeader::parse(&header.encode()), Some(header));
    }
}

/// Lines `name: value` as headers.
fn headers(data: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = parts.next().and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Some(name), Some(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers
}

/// The headers of a client's request.
pub fn http(data: &[u8]) {
    crate::proxy::fuzz_headers(headers(data));
}

fn keys() -> Keyring {
    Keyring::new(&[Secret::fixed([7; 32])]).expect("one secret")
}

/// The heads of an exchange.
pub fn handshake(data: &[u8]) {
    let (headers, keys) = (headers(data), keys());
    let _ = Knock::read(&headers, &keys, Binding::NONE);
    let knock = Knock {
        version: 1,
        cluster: "test".into(),
        database: "app".into(),
        node: NodeId::from_u128(1),
        incarnation: Incarnation::from_u128(2),
        nonce: [3; 32],
        binding: Binding::NONE,
    };
    let _ = Answer::read(&headers, &knock, &keys);
    let _ = Refusal::read(&headers, "app");
    let _ = TunnelKnock::read(&headers, &keys);
}

/// What a peer says first in TLS, to the side that was dialled (where the first byte is even) or to
/// the one that dialled, until it hangs up.
pub fn tls(data: &[u8]) {
    static CHANNEL: OnceLock<Channel> = OnceLock::new();
    let Some((&side, rest)) = data.split_first() else { return };
    let channel = CHANNEL.get_or_init(|| Channel::ephemeral(None).expect("a key"));
    let io = tokio::io::join(rest, tokio::io::sink());
    let begun = async {
        match side % 2 {
            0 => channel.accept(io).await,
            _ => channel.connect(io, Traffic::Exchanges).await,
        }
    };
    // It may wait for a moment to have its own last word read.
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build();
    let _entered = RUNTIME.get_or_init(|| runtime().expect("a runtime")).enter();
    // All that comes is there, so it never waits. Nothing that was said before it fits its keys.
    let begun = pin!(begun).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(begun, std::task::Poll::Ready(Err(_))));
}

/// The small files of the state directory that say who the node is, which keys it has, and of whom
/// it has heard.
pub fn identity(data: &[u8]) {
    crate::db::fuzz_identity(data);
    crate::files::keys::fuzz_keys(data);
    crate::files::lease::fuzz_lease(data);
    crate::files::channel_key::fuzz_channel_key(data);
}

/// Words that people and clients write: identifiers, tokens, URLs, the bytes of an epoch history.
pub fn texts(data: &[u8]) {
    if let Ok(history) = EpochHistory::decode(data) {
        assert_eq!(history.encode(), data);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    macro_rules! round_trips {
        ($($type:ty),*) => { $(
            if let Ok(value) = text.parse::<$type>() {
                assert_eq!(value.to_string(), text.to_ascii_lowercase());
            }
        )* };
    }
    round_trips!(Txid, Epoch, Position, Checksum, PeerKey);
    if let Ok(txid) = text.parse::<Txid>() {
        let mut history = EpochHistory::default();
        history.push(EpochStart { epoch: txid.epoch(), first: 0, before: Checksum::EMPTY });
        let _ = history.place(txid);
    }
    if let Ok(endpoint) = Endpoint::parse(text) {
        assert_eq!(Endpoint::parse(&endpoint.to_string()).ok(), Some(endpoint));
    }
    let me = PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() };
    let node = NodeContext::new(
        me,
        "test".into(),
        "app".into(),
        (keys(), crate::channel::Channel::open()),
        Role::Primary,
        LeaseContext::fixed(),
        KEYS,
    );
    if let Some(txid) = Token::verify(&node, text) {
        // Hex digits have two forms.
        assert!(Token::sign(&node, txid).as_str().eq_ignore_ascii_case(text));
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::handshake::Asker;

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
    }

    fn inputs(target: &str) -> Vec<Vec<u8>> {
        // A package from a registry comes without it.
        let Ok(entries) = fs::read_dir(corpus(target)) else { return Vec::new() };
        entries.map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
    }

    fn mutated(bytes: &[u8], rng: &mut StdRng) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..rng.random_range(1..5) {
            let at = rng.random_range(0..=bytes.len());
            match rng.random_range(0..4) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, rng.random()),
                2 if at + 4 <= bytes.len() => {
                    let numbers = [0, 1, u32::MAX, i32::MAX as u32, 4096, rng.random()];
                    bytes[at..at + 4].copy_from_slice(&numbers[rng.random_range(0..6)].to_le_bytes());
                }
                _ if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
                _ => bytes.push(rng.random()),
            }
        }
        bytes
    }

    #[test]
    fn no_decoder_falls_over_its_corpus_or_what_is_like_it() {
        let mut rng = StdRng::seed_from_u64(9);
        for (name, run) in TARGETS.iter().copied() {
            let inputs = inputs(name);
            assert!(!inputs.is_empty() || !corpus("wire").exists(), "no corpus for {name}");
            for input in &inputs {
                run(input);
            }
            // Those that write files are slow.
            let rounds = if matches!(name, "log" | "log_sealed" | "lost" | "state_files" | "identity") {
                300
            } else {
                3000
            };
            for _ in 0..rounds {
                let Some(input) = inputs.get(rng.random_range(0..inputs.len().max(1))) else { continue };
                run(&mutated(input, &mut rng));
            }
        }
    }

    /// What both sides say first.
    fn first_flights() -> [(&'static str, Vec<u8>); 2] {
        let begin = |side: u8, heard: &[u8]| {
            let (channel, mut said) = (Channel::ephemeral(None).unwrap(), vec![side ^ 1]);
            let io = tokio::io::join(heard, &mut said);
            let context = &mut Context::from_waker(Waker::noop());
            let ended = match side {
                0 => pin!(channel.accept(io)).poll(context).map(|ended| ended.is_err()),
                _ => pin!(channel.connect(io, Traffic::Exchanges)).poll(context).map(|ended| ended.is_err()),
            };
            assert!(matches!(ended, std::task::Poll::Ready(true)));
            said
        };
        let client = begin(1, &[]);
        [("server", begin(0, &client[1..])), ("client", client)]
    }

    /// Writes the seeds that the corpus began with.
    #[test]
    #[ignore = "writes into the sources"]
    fn write_seeds() {
        let write = |target: &str, name: &str, bytes: &[u8]| {
            fs::create_dir_all(corpus(target)).unwrap();
            fs::write(corpus(target).join(name), bytes).unwrap();
        };
        for (target, name, bytes) in wire::seeds() {
            write(target, &name, &bytes);
        }
        for (target, name, bytes) in crate::engine::fuzz_seeds() {
            write(target, name, &bytes);
        }
        write("identity", "node", &crate::db::fuzz_identity_seed());
        write("identity", "database-keys", &crate::files::keys::fuzz_keys_seed());
        for (name, bytes) in crate::lease::record::seeds() {
            write("record", name, &bytes);
        }
        #[cfg(feature = "members")]
        for (name, bytes) in crate::members::storage::fuzz_members_seeds() {
            write("members", name, &bytes);
        }
        #[cfg(feature = "members")]
        for (name, bytes) in crate::members::fuzz_members_words_seeds() {
            write("members_words", name, &bytes);
        }
        for (name, bytes) in crate::files::lease::fuzz_lease_seeds() {
            write("identity", name, &bytes);
        }
        write("identity", "channel-key", &crate::files::channel_key::fuzz_channel_key_seed().unwrap());
        for (name, bytes) in first_flights() {
            write("tls", name, &bytes);
        }
        let keys = keys();
        let knock = Knock {
            version: 1,
            cluster: "test".into(),
            database: "app".into(),
            node: NodeId::from_u128(1),
            incarnation: Incarnation::from_u128(2),
            nonce: [3; 32],
            binding: Binding::NONE,
        };
        let answer =
            Answer { node: NodeId::from_u128(5), incarnation: Incarnation::from_u128(6), nonce: [9; 32] };
        let asker = Asker {
            keys: keys.clone(),
            cluster: "test".into(),
            database: "app".into(),
            node: knock.node,
            incarnation: knock.incarnation,
            channel: Channel::open(),
        };
        let heads = [
            ("knock", knock.headers(&keys).unwrap()),
            ("answer", answer.headers(&knock, &keys).unwrap()),
            ("refusal", Refusal::Cluster("other".into()).headers()),
            ("tunnel", TunnelKnock::headers(&asker).unwrap()),
        ];
        for (name, headers) in heads {
            let lines = headers
                .iter()
                .map(|(name, value)| [name.as_str().as_bytes(), b":", value.as_bytes()].concat());
            write("handshake", name, &lines.collect::<Vec<_>>().join(&b'\n'));
        }
        let http = "cookie: a=b; replite=v1.x; c=\"d\"\nconnection: upgrade, te\nupgrade: websocket\n\
            forwarded: for=1.2.3.4;proto=https\nx-forwarded-for: 1.1.1.1, 2.2.2.2\n\
            x-forwarded-proto: https\nte: trailers\nreplite-hop: 1\nauthorization: x";
        write("http", "request", http.as_bytes());
        let txid = Txid::new(Epoch::new(3, 0xfeed), 77);
        let position = Position::new(txid, Checksum::from_u128(5));
        let me =
            PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() };
        let node = NodeContext::new(
            me,
            "test".into(),
            "app".into(),
            (self::keys(), crate::channel::Channel::open()),
            Role::Primary,
            LeaseContext::fixed(),
            KEYS,
        );
        write("texts", "txid", txid.to_string().as_bytes());
        write("texts", "position", position.to_string().as_bytes());
        write("texts", "token", Token::sign(&node, txid).as_str().as_bytes());
        write("texts", "url", b"http://[::1]:8081/_replite");
        write("texts", "url_own", b"replite://[::1]:8081");
        write("texts", "peer_key", "0f".repeat(32).as_bytes());
        let mut history = EpochHistory::default();
        for n in 1..4 {
            let epoch = Epoch::new(n, n * 9);
            history.push(EpochStart { epoch, first: n * 10, before: Checksum::EMPTY });
        }
        write("texts", "epochs", &history.encode());
    }
}
