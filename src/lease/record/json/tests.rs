use super::super::{STARTERS_MAX, URLS_MAX_BYTES};
use super::*;
use crate::checksum::Checksum;
use crate::txid::{NUMBER_MAX, Txid};

fn addresses(host: &str) -> Addresses {
    Addresses::new(format!("http://{host}:8081")).replication(format!("http://{host}:8081/_replite"))
}

fn position(epoch: Epoch, number: u64) -> Position {
    Position::new(Txid::new(epoch, number), Checksum::from_u128(number.into()))
}

fn tenure() -> Tenure {
    let epoch = Epoch::new(3, 0xbeef);
    Tenure {
        holder: Holder {
            node: NodeId::from_u128(1),
            incarnation: Incarnation::from_u128(0xa1),
            boot: "6f1c0d6e-2f0a-4a0e-9d55-0f4d6d1c2b3a".into(),
            addresses: addresses("10.0.0.1").public("https://one.example.org").label("region", "ams"),
        },
        epoch,
        began: Some(position(Epoch::new(2, 0xfeed), 76)),
        lease_clock: Duration::from_micros(12_345_678),
        position: Some(position(epoch, 99)),
    }
}

fn known(number: u128) -> KnownNode {
    let peer = PeerInfo {
        node: NodeId::from_u128(number),
        incarnation: Incarnation::from_u128(number + 0xa0),
        addresses: addresses(&format!("10.0.0.{number}")),
    };
    KnownNode { peer, has_state: true, has_content: false }
}

fn record() -> Record {
    Record {
        cluster: "test".into(),
        database: "app".into(),
        attempt: Attempt(0x0123_4567_89ab_cdef),
        state: LeaseState::Held(tenure()),
        lease_time: Duration::from_secs(2),
        paused: false,
        nodes: vec![known(2)],
    }
}

/// Format 1, as nodes have written it.
const WRITTEN: &str = r#"{
  "format": 1,
  "checksum": "0e6b3bb84638fe6374bbf2a494bf22b0",
  "record": {
    "cluster": "test",
    "database": "app",
    "attempt": "00000000000000000123456789abcdef",
    "state": "held",
    "paused": false,
    "lease_time_ms": 2000,
    "tenure": {
      "node": "00000000-0000-0000-0000-000000000001",
      "incarnation": "00000000-0000-0000-0000-0000000000a1",
      "boot": "6f1c0d6e-2f0a-4a0e-9d55-0f4d6d1c2b3a",
      "addresses": {
        "replication": "http://10.0.0.1:8081/_replite",
        "app": "http://10.0.0.1:8081",
        "public": "https://one.example.org",
        "labels": {
          "region": "ams"
        }
      },
      "epoch": "0000000000000003-000000000000beef",
      "began": "0000000000000002-000000000000feed-000000000000004c-0000000000000000000000000000004c",
      "lease_clock_us": 12345678,
      "position": "0000000000000003-000000000000beef-0000000000000063-00000000000000000000000000000063"
    },
    "nodes": [
      {
        "node": "00000000-0000-0000-0000-000000000002",
        "incarnation": "00000000-0000-0000-0000-0000000000a2",
        "addresses": {
          "replication": "http://10.0.0.2:8081/_replite",
          "app": "http://10.0.0.2:8081"
        },
        "has_state": true,
        "has_content": false
      }
    ]
  }
}
"#;

fn decode(bytes: impl AsRef<[u8]>) -> Result<Record, RecordError> {
    Record::decode(bytes.as_ref(), "test", "app")
}

/// What [`fuzz_record`] begins with.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let released = Record { state: LeaseState::Released(tenure()), ..record() };
    let gathering = Record { state: LeaseState::Gathering, paused: true, nodes: Vec::new(), ..record() };
    let body = serde_json::to_vec(&Body::of(&record())).unwrap();
    let newer = br#"{"format":2,"what":["follows"],"is":"another matter"}"#.to_vec();
    let records = [("held", record()), ("released", released), ("gathering", gathering)];
    let records = records.into_iter().map(|(name, record)| (name, record.encode()));
    records.chain([("body", body), ("newer", newer)]).collect()
}

/// The same with other JSON in the record, and the checksum that fits.
fn sealed(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut body = serde_json::to_value(Body::of(&record())).unwrap();
    change(&mut body);
    written(&serde_json::from_value(body).unwrap())
}

fn garbled_because(bytes: impl AsRef<[u8]>) -> String {
    match decode(bytes) {
        Err(RecordError::Garbled(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn format_1_is_read_and_written_as_it_always_was() {
    assert_eq!(decode(WRITTEN).unwrap(), record());
    assert_eq!(String::from_utf8(record().encode()).unwrap(), WRITTEN);
}

#[test]
fn every_state_comes_back_from_its_bytes() {
    for state in [LeaseState::Gathering, LeaseState::Held(tenure()), LeaseState::Released(tenure())] {
        for paused in [false, true] {
            let record = Record { state: state.clone(), paused, ..record() };
            assert_eq!(decode(record.encode()).unwrap(), record);
        }
    }
}

#[test]
fn an_editor_may_lay_a_record_out_anew_but_change_nothing() {
    let value: serde_json::Value = serde_json::from_str(WRITTEN).unwrap();
    // Without white space, and with the fields sorted.
    assert_eq!(decode(value.to_string()).unwrap(), record());
    assert_eq!(decode(WRITTEN.replace('\n', "\r\n\t")).unwrap(), record());
    for (old, new) in
        [("10.0.0.1", "10.0.0.9"), ("false", "true"), ("2000", "2001"), ("\"held", "\"released")]
    {
        let changed = WRITTEN.replacen(old, new, 1);
        assert_ne!(changed, WRITTEN);
        assert_eq!(garbled_because(changed), "its checksum does not match");
    }
}

#[test]
fn a_newer_format_is_told_apart_from_garbage_whatever_else_it_has() {
    assert_eq!(decode(r#"{"format": 2, "x": [1]}"#), Err(RecordError::Newer(2)));
    assert_eq!(decode(format!(r#"{{"format": {}}}"#, u64::MAX)), Err(RecordError::Newer(u64::MAX)));
    garbled_because(r#"{"format": 0}"#);
    garbled_because(r#"{"format": -1}"#);
    garbled_because(r#"{"format": 1}"#);
    garbled_because(r#"{"format": 1e400}"#);
    garbled_because(WRITTEN.replacen("\"cluster\"", "\"new\": 1, \"cluster\"", 1));
}

#[test]
fn a_record_of_another_cluster_or_database_is_named() {
    let of = |cluster, database| Record::decode(WRITTEN.as_bytes(), cluster, database);
    assert_eq!(of("other", "app"), Err(RecordError::OtherCluster("test".into())));
    assert_eq!(of("test", "other"), Err(RecordError::OtherDatabase("app".into())));
}

#[test]
fn what_is_cut_short_or_is_no_json_is_garbled() {
    for end in 0..WRITTEN.len() - 2 {
        garbled_because(&WRITTEN[..end]);
    }
    garbled_because("[".repeat(RECORD_MAX_BYTES));
    garbled_because([0xff; 64]);
    // What is said of it goes to a log, and is short.
    let why = garbled_because(format!(r#"{{"format": 1, "\u001b[31m{}": 1}}"#, "x".repeat(9000)));
    assert!(why.chars().count() <= PROBLEM_CHARS_MAX && why.chars().all(is_plain), "{why}");
}

#[test]
fn values_without_sense_are_garbled_also_where_the_checksum_fits() {
    let position = |epoch: u64, number: u64| json(&position(Epoch::new(epoch, 1), number));
    let tenure = |field: &'static str, value: serde_json::Value| {
        garbled_because(sealed(|body| body["tenure"][field] = value))
    };
    for too_high in [NUMBER_MAX + 1, u64::MAX] {
        tenure("epoch", json(&Epoch::new(too_high, 1)));
        for field in ["began", "position"] {
            tenure(field, position(too_high, 1));
            tenure(field, position(1, too_high));
        }
    }
    tenure("boot", "x".repeat(BOOT_MAX_BYTES + 1).into());
    tenure("boot", "\n".into());
    for lease_time_ms in [0, 999, 60_001, u64::MAX] {
        garbled_because(sealed(|body| body["lease_time_ms"] = lease_time_ms.into()));
    }
    garbled_because(sealed(|body| body["attempt"] = "1".into()));
    garbled_because(sealed(|body| body["state"] = "gathering".into()));
    garbled_because(sealed(|body| body["tenure"] = serde_json::Value::Null));
    garbled_because(sealed(|body| body["nodes"][0]["addresses"]["app"] = "http://a\u{1b}[2J".into()));
    let node = serde_json::to_value(NodeBody::of(&KnownNode {
        peer: PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() },
        ..known(1)
    }));
    let many = |number| vec![node.as_ref().unwrap().clone(); number];
    let compact = |number: usize| {
        let bytes = sealed(|body| body["nodes"] = many(number).into());
        serde_json::from_slice::<serde_json::Value>(&bytes).unwrap().to_string()
    };
    assert_eq!(decode(compact(KNOWN_NODES_MAX)).unwrap().nodes.len(), KNOWN_NODES_MAX);
    garbled_because(compact(KNOWN_NODES_MAX + 1));
}

fn json(value: &impl Serialize) -> serde_json::Value {
    serde_json::to_value(value).unwrap()
}

#[test]
fn what_is_too_long_is_refused_unread() {
    let at_most = format!("{WRITTEN}{}", " ".repeat(RECORD_MAX_BYTES - WRITTEN.len()));
    assert_eq!(decode(&at_most).unwrap(), record());
    assert_eq!(decode(at_most + " "), Err(RecordError::TooLong(RECORD_MAX_BYTES + 1)));
}

#[test]
fn what_does_not_fit_is_left_out_the_least_known_nodes_first() {
    let nodes: Vec<KnownNode> = (2..100).map(known).collect();
    let record = Record { nodes, ..record() };
    let fit = decode(record.encode()).unwrap();
    let (kept, all) = (fit.nodes.len(), &record.nodes);
    assert!((30..=KNOWN_NODES_MAX).contains(&kept), "{kept}");
    assert_eq!(fit.nodes, all[..kept]);
    assert_eq!(fit.state, record.state);
    let one_more = Record { nodes: all[..kept + 1].to_vec(), ..record.clone() };
    assert_eq!(decode(one_more.encode()).unwrap().nodes.len(), kept);
}

/// As long as `Config` lets the names, addresses and labels of a node be: see `check.rs` there.
fn longest() -> Record {
    let mut addresses = addresses("h");
    for number in 0..16 {
        addresses = addresses.label(format!("{number:064}"), "v".repeat(64));
    }
    let spare = crate::wire::PEER_MAX_BYTES - serde_json::to_vec(&known(1).peer).unwrap().len();
    addresses.app += &"x".repeat(spare - 16 * (64 + 64 + 6) - 16);
    let peer = PeerInfo { addresses: addresses.clone(), ..known(1).peer };
    assert!(crate::wire::peer_fits(&peer));
    let mut tenure = tenure();
    tenure.holder.addresses = addresses.clone();
    tenure.holder.boot = "b".repeat(BOOT_MAX_BYTES);
    tenure.epoch = Epoch::new(NUMBER_MAX, u64::MAX);
    let node = KnownNode { peer, ..known(1) };
    Record {
        cluster: "c".repeat(64),
        database: "d".repeat(64),
        state: LeaseState::Held(tenure),
        nodes: vec![node; 8],
        ..record()
    }
}

#[test]
fn the_longest_addresses_that_a_node_may_have_always_fit() {
    let record = longest();
    let bytes = record.encode();
    assert!(bytes.len() <= RECORD_MAX_BYTES, "{}", bytes.len());
    let fit = Record::decode(&bytes, &record.cluster, &record.database).unwrap();
    assert_eq!(fit.state, record.state);
    assert!(fit.nodes.len() >= 2, "{}", fit.nodes.len());
}

#[test]
fn all_nodes_that_may_start_a_cluster_have_room_without_labels() {
    let mut record = Record { state: LeaseState::Gathering, ..longest() };
    record.nodes.resize(STARTERS_MAX, record.nodes[0].clone());
    for (at, known) in record.nodes.iter_mut().enumerate() {
        known.peer.node = NodeId::from_u128(at as u128);
        let addresses = &mut known.peer.addresses;
        addresses.public = Some(String::new());
        let rest = URLS_MAX_BYTES - addresses.replication.len();
        addresses.app = "x".repeat(rest);
    }
    let fit = Record::decode(&record.encode(), &record.cluster, &record.database).unwrap();
    let bare = |known: &KnownNode| {
        let mut known = known.clone();
        known.peer.addresses.labels.clear();
        known
    };
    let kept = |nodes: &[KnownNode]| nodes.iter().map(bare).collect::<Vec<_>>();
    assert_eq!(kept(&fit.nodes), kept(&record.nodes));
    assert!(fit.nodes[15].peer.addresses.labels.is_empty());
}

#[test]
fn a_holder_that_is_longer_than_any_may_be_still_has_a_record() {
    for (label, app) in [("é\"".repeat(RECORD_MAX_BYTES), String::new()), (String::new(), "\\".repeat(9000))]
    {
        let mut tenure = tenure();
        let own = Addresses::new(format!("http://a/{app}")).label("x", label.clone());
        tenure.holder.addresses = own.clone();
        tenure.holder.boot = "b".repeat(100_000);
        let record = Record { state: LeaseState::Held(tenure.clone()), ..record() };
        let bytes = record.encode();
        assert!(bytes.len() <= RECORD_MAX_BYTES);
        let LeaseState::Held(fit) = decode(bytes).unwrap().state else { panic!("it is held") };
        let left = if app.is_empty() { Addresses::new(own.app) } else { Addresses::default() };
        assert_eq!((fit.holder.addresses, fit.holder.boot), (left, String::new()));
        assert_eq!((fit.epoch, fit.position), (tenure.epoch, tenure.position));
    }
}
