//! How a record is written.
//!
//! ```text
//! { "format": 1, "checksum": "<32 hex digits>", "record": { .. } }
//! ```
//!
//! The checksum is the first 16 bytes of BLAKE3 over the JSON of `record` without white space, its
//! fields in the order of [`Body`]. So an editor may lay the record out anew, or sort its fields.
//! A field that this version does not know makes the record garbled: a new field is a new format.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    Attempt, BOOT_MAX_BYTES, Holder, KNOWN_NODES_MAX, KnownNode, LEASE_TIMES, LeaseState, RECORD_MAX_BYTES,
    Record, RecordError, Tenure,
};
use crate::hex::{hex, unhex};
use crate::peer::{Incarnation, NodeId};
use crate::status::{Addresses, PeerInfo, is_plain};
use crate::txid::{Epoch, Position};

/// The format that is written, and the newest that is read.
const FORMAT: u64 = 1;

/// Characters of what is wrong with a record.
const PROBLEM_CHARS_MAX: usize = 200;

/// All that is read of a record whose format may be another.
#[derive(Deserialize)]
struct FormatOnly {
    format: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    format: u64,
    checksum: String,
    record: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    cluster: String,
    database: String,
    attempt: String,
    state: StateName,
    paused: bool,
    lease_time_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tenure: Option<TenureBody>,
    nodes: Vec<NodeBody>,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StateName {
    Gathering,
    Held,
    Released,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TenureBody {
    node: NodeId,
    incarnation: Incarnation,
    boot: String,
    addresses: AddressesBody,
    epoch: Epoch,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    began: Option<Position>,
    lease_clock_us: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    position: Option<Position>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeBody {
    node: NodeId,
    incarnation: Incarnation,
    addresses: AddressesBody,
    has_state: bool,
    has_content: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AddressesBody {
    replication: String,
    app: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    public: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
}

impl Record {
    /// The bytes for the store, at most [`RECORD_MAX_BYTES`]. What does not fit is left out: the
    /// labels of known nodes from the end, then these nodes, then the holder's labels, then its
    /// addresses.
    ///
    /// Names have the bound of [`Config::cluster`](crate::Config::cluster). Times are rounded down,
    /// the lease clock to microseconds, and the lease time to milliseconds.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut body = Body::of(self);
        loop {
            let bytes = written(&body);
            if bytes.len() <= RECORD_MAX_BYTES || !body.shorten() {
                return bytes;
            }
        }
    }

    /// Reads a record of this cluster and database.
    ///
    /// # Errors
    /// [`RecordError`].
    pub(crate) fn decode(bytes: &[u8], cluster: &str, database: &str) -> Result<Record, RecordError> {
        if bytes.len() > RECORD_MAX_BYTES {
            return Err(RecordError::TooLong(bytes.len()));
        }
        let FormatOnly { format } = parsed(bytes)?;
        if format > FORMAT {
            return Err(RecordError::Newer(format));
        }
        if format != FORMAT {
            return Err(garbled(format!("there is no format {format}")));
        }
        let Envelope { checksum, record, .. } = parsed(bytes)?;
        if !checksum.eq_ignore_ascii_case(&checksum_of(&record)) {
            return Err(garbled("its checksum does not match"));
        }
        if record.cluster != cluster {
            return Err(RecordError::OtherCluster(shown(&record.cluster)));
        }
        if record.database != database {
            return Err(RecordError::OtherDatabase(shown(&record.database)));
        }
        record.into_record()
    }
}

fn parsed<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, RecordError> {
    serde_json::from_slice(bytes).map_err(|error| garbled(error.to_string()))
}

fn garbled(problem: impl AsRef<str>) -> RecordError {
    RecordError::Garbled(shown(problem.as_ref()))
}

/// A text from a record, for a line of a log.
fn shown(text: &str) -> String {
    text.chars().map(|c| if is_plain(c) { c } else { '?' }).take(PROBLEM_CHARS_MAX).collect()
}

fn written(body: &Body) -> Vec<u8> {
    #[derive(Serialize)]
    struct BorrowedEnvelope<'a> {
        format: u64,
        checksum: String,
        record: &'a Body,
    }
    let sealed = BorrowedEnvelope { format: FORMAT, checksum: checksum_of(body), record: body };
    let mut bytes = serde_json::to_vec_pretty(&sealed).expect("strings and numbers");
    bytes.push(b'\n');
    bytes
}

fn checksum_of(body: &Body) -> String {
    let bytes = serde_json::to_vec(body).expect("strings and numbers");
    hex(&blake3::hash(&bytes).as_bytes()[..16])
}

impl Body {
    fn of(record: &Record) -> Body {
        let (state, tenure) = match &record.state {
            LeaseState::Gathering => (StateName::Gathering, None),
            LeaseState::Held(tenure) => (StateName::Held, Some(tenure)),
            LeaseState::Released(tenure) => (StateName::Released, Some(tenure)),
        };
        Body {
            cluster: record.cluster.clone(),
            database: record.database.clone(),
            attempt: hex(&record.attempt.0.to_be_bytes()),
            state,
            paused: record.paused,
            lease_time_ms: record.lease_time.as_millis() as u64,
            tenure: tenure.map(TenureBody::of),
            nodes: record.nodes.iter().take(KNOWN_NODES_MAX).map(NodeBody::of).collect(),
        }
    }

    /// Leaves the next thing out; false when there is none.
    fn shorten(&mut self) -> bool {
        if let Some(node) = self.nodes.iter_mut().rev().find(|node| !node.addresses.labels.is_empty()) {
            node.addresses.labels.clear();
            return true;
        }
        if self.nodes.pop().is_some() {
            return true;
        }
        let Some(TenureBody { addresses, .. }) = &mut self.tenure else { return false };
        if !addresses.labels.is_empty() {
            addresses.labels.clear();
            return true;
        }
        let empty =
            addresses.app.is_empty() && addresses.replication.is_empty() && addresses.public.is_none();
        *addresses = AddressesBody::of(&Addresses::default());
        !empty
    }

    fn into_record(self) -> Result<Record, RecordError> {
        let attempt = unhex(&self.attempt).map(|bytes| Attempt(u128::from_be_bytes(bytes)));
        let attempt = attempt.ok_or_else(|| garbled("its attempt is not 32 hex digits"))?;
        let lease_time = Duration::from_millis(self.lease_time_ms);
        if !LEASE_TIMES.contains(&lease_time) {
            return Err(garbled("its lease time is not one second to a minute"));
        }
        if self.nodes.len() > KNOWN_NODES_MAX {
            return Err(garbled(format!("it names more than {KNOWN_NODES_MAX} nodes")));
        }
        let tenure = self.tenure.map(TenureBody::into_tenure).transpose()?;
        let state = match (self.state, tenure) {
            (StateName::Gathering, None) => LeaseState::Gathering,
            (StateName::Held, Some(tenure)) => LeaseState::Held(tenure),
            (StateName::Released, Some(tenure)) => LeaseState::Released(tenure),
            (StateName::Gathering, Some(_)) => return Err(garbled("it has a holder while nodes gather")),
            (_, None) => return Err(garbled("it has no holder")),
        };
        Ok(Record {
            cluster: self.cluster,
            database: self.database,
            attempt,
            state,
            lease_time,
            paused: self.paused,
            nodes: self.nodes.into_iter().map(NodeBody::into_node).collect::<Result<_, _>>()?,
        })
    }
}

impl TenureBody {
    fn of(tenure: &Tenure) -> TenureBody {
        let Holder { node, incarnation, boot, addresses } = &tenure.holder;
        TenureBody {
            node: *node,
            incarnation: *incarnation,
            // Without one the node waits like all others after a restart.
            boot: if boot.len() > BOOT_MAX_BYTES { String::new() } else { boot.clone() },
            addresses: AddressesBody::of(addresses),
            epoch: tenure.epoch,
            began: tenure.began,
            lease_clock_us: u64::try_from(tenure.lease_clock.as_micros()).unwrap_or(u64::MAX),
            position: tenure.position,
        }
    }

    fn into_tenure(self) -> Result<Tenure, RecordError> {
        let bounded = |position: Position| Position::from_bytes(&position.to_bytes()).is_some();
        if Epoch::from_bytes(&self.epoch.to_bytes()).is_none() {
            return Err(garbled("its epoch is too high"));
        }
        if ![self.began, self.position].into_iter().flatten().all(bounded) {
            return Err(garbled("a position in it is too high"));
        }
        if self.boot.len() > BOOT_MAX_BYTES || !self.boot.chars().all(is_plain) {
            return Err(garbled("the id of its boot is none"));
        }
        let (node, incarnation) = (self.node, self.incarnation);
        Ok(Tenure {
            holder: Holder {
                node,
                incarnation,
                boot: self.boot,
                addresses: self.addresses.into_addresses()?,
            },
            epoch: self.epoch,
            began: self.began,
            lease_clock: Duration::from_micros(self.lease_clock_us),
            position: self.position,
        })
    }
}

impl NodeBody {
    fn of(known: &KnownNode) -> NodeBody {
        NodeBody {
            node: known.peer.node,
            incarnation: known.peer.incarnation,
            addresses: AddressesBody::of(&known.peer.addresses),
            has_state: known.has_state,
            has_content: known.has_content,
        }
    }

    fn into_node(self) -> Result<KnownNode, RecordError> {
        let (node, incarnation) = (self.node, self.incarnation);
        let addresses = self.addresses.into_addresses()?;
        Ok(KnownNode {
            peer: PeerInfo { node, incarnation, addresses },
            has_state: self.has_state,
            has_content: self.has_content,
        })
    }
}

impl AddressesBody {
    fn of(addresses: &Addresses) -> AddressesBody {
        let Addresses { replication, app, public, labels } = addresses.clone();
        AddressesBody { replication, app, public, labels }
    }

    fn into_addresses(self) -> Result<Addresses, RecordError> {
        let AddressesBody { replication, app, public, labels } = self;
        let addresses = Addresses { replication, app, public, labels };
        // Other nodes show them.
        if !addresses.are_plain() {
            return Err(garbled("an address or a label in it has control characters"));
        }
        Ok(addresses)
    }
}

/// A record, or the fields of one with the checksum that fits. What is read is read again.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_record(data: &[u8]) {
    let again = |bytes: &[u8]| {
        if let Ok(record) = Record::decode(bytes, "test", "app") {
            let encoded = record.encode();
            assert!(encoded.len() <= RECORD_MAX_BYTES);
            let decoded = Record::decode(&encoded, "test", "app").expect("a record of ours");
            // White space, which those bytes may do without, can take the place of something.
            if written(&Body::of(&record)).len() <= RECORD_MAX_BYTES {
                assert_eq!(decoded, record);
            }
        }
    };
    again(data);
    if let Ok(body) = serde_json::from_slice(data) {
        again(&written(&body));
    }
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::seeds;
