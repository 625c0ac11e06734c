//! What the members agree on: the register of one record, and how each entry of the log changes it.
//!
//! All of it is JSON on the disk and between members. What is read is bounded: a record, a version
//! and an address by themselves, and numbers so that one more is always a number.

use std::collections::BTreeSet;

use base64ct::{Base64Unpadded, Encoding};
use openraft::entry::EntryPayload;
use openraft::{LogId, Membership, Snapshot, SnapshotMeta, StoredMembership, Vote};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

use crate::lease::record::{RECORD_MAX_BYTES, URLS_MAX_BYTES};
use crate::lease::{SwapError, Version};
use crate::members::quiet::QuietRuntime;

openraft::declare_raft_types!(
    /// The types that Raft is run with. A member's id is random, drawn with its Raft directory.
    pub(crate) TypeConfig:
        D = Proposal,
        R = Ruling,
        NodeId = u64,
        Node = Member,
        Entry = openraft::Entry<TypeConfig>,
        SnapshotData = Agreed,
        AsyncRuntime = QuietRuntime,
);

/// An entry of the log.
pub(crate) type LogEntry = openraft::Entry<TypeConfig>;

/// Log indexes and terms go no further. No cluster comes there, and no sum overflows.
pub(crate) const NUMBER_MAX: u64 = 1 << 53;
/// Members that there may be at once, learners and those that leave counted.
pub(crate) const MEMBERS_MAX: usize = 32;
/// The longest version: three numbers of sixteen digits.
const VERSION_MAX_BYTES: usize = 3 * 16 + 2;

/// What a client has the members do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Proposal {
    /// Replaces the record of this version, or writes the first one.
    Swap {
        #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "some_version")]
        expected: Option<String>,
        /// Random, fresh for each swap: one that is sent twice is known again.
        nonce: u64,
        #[serde(with = "base64")]
        record: Vec<u8>,
    },
}

impl Proposal {
    /// A swap that the members can take.
    ///
    /// # Errors
    /// [`SwapError::Conflict`] when no record of theirs can have that version,
    /// [`SwapError::Unavailable`] when the record is too long.
    pub(crate) fn swap(expected: Option<&Version>, nonce: u64, record: &[u8]) -> Result<Proposal, SwapError> {
        if record.len() > RECORD_MAX_BYTES {
            let bytes = record.len();
            return Err(SwapError::Unavailable(format!("the record has {bytes} bytes: too many")));
        }
        if expected.is_some_and(|version| version.as_str().len() > VERSION_MAX_BYTES) {
            return Err(SwapError::Conflict);
        }
        let expected = expected.map(|version| version.as_str().to_owned());
        Ok(Proposal::Swap { expected, nonce, record: record.to_vec() })
    }
}

/// What came of an entry when it was applied. It is the same on each member.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ruling {
    /// The record is the register's, with this version.
    Done(#[serde(deserialize_with = "version")] String),
    /// The register had another version, and is as it was: this record, by this swap.
    Conflict(Option<Holds>),
    /// The entry was none of a client's.
    Nothing,
}

/// Which record the register has, and the nonce of the swap that wrote it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Holds {
    #[serde(deserialize_with = "version")]
    pub(crate) version: String,
    pub(crate) nonce: u64,
}

/// Where a member is reached, and what it is.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Member {
    #[serde(deserialize_with = "url")]
    pub(crate) url: String,
    /// It has no database.
    #[serde(default)]
    pub(crate) witness: bool,
}

/// What the entries up to one of them made of the register, and of who the members are.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Agreed {
    pub(crate) last_applied: Option<LogId<u64>>,
    /// The newest that was applied. It takes effect before, when it is in the log.
    pub(crate) membership: StoredMembership<u64, Member>,
    pub(crate) register: Option<AgreedRecord>,
}

/// The record that the register holds.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AgreedRecord {
    #[serde(deserialize_with = "version")]
    pub(crate) version: String,
    /// That of the swap which wrote it.
    pub(crate) nonce: u64,
    #[serde(with = "base64")]
    pub(crate) record: Vec<u8>,
}

impl Agreed {
    /// Applies the next entry.
    pub(crate) fn apply(&mut self, entry: LogEntry) -> Ruling {
        self.last_applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Ruling::Nothing,
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Ruling::Nothing
            }
            EntryPayload::Normal(Proposal::Swap { expected, nonce, record }) => {
                if self.register.as_ref().map(|register| &register.version) != expected.as_ref() {
                    let holds = |register: &AgreedRecord| Holds {
                        version: register.version.clone(),
                        nonce: register.nonce,
                    };
                    return Ruling::Conflict(self.register.as_ref().map(holds));
                }
                let version = version_of(&entry.log_id);
                self.register = Some(AgreedRecord { version: version.clone(), nonce, record });
                Ruling::Done(version)
            }
        }
    }

    /// What is wrong with a state that was read.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        self.last_applied.iter().try_for_each(check_log_id)?;
        self.membership.log_id().iter().try_for_each(check_log_id)?;
        if *self.membership.log_id() > self.last_applied {
            return Err("its members are of a later entry");
        }
        check_members(self.membership.membership())
    }
}

/// A state as the snapshot that it is. What stands in its head is in the state, too.
pub(crate) fn snapshot_of(state: Agreed) -> Snapshot<TypeConfig> {
    let meta = SnapshotMeta {
        last_log_id: state.last_applied,
        last_membership: state.membership.clone(),
        snapshot_id: state.last_applied.as_ref().map_or_else(|| "0".into(), version_of),
    };
    Snapshot { meta, snapshot: Box::new(state) }
}

/// The version of a record is the id of its entry: term, leader and index, in hexadecimal digits.
/// The leader's id is drawn with a Raft directory and never again. So no version is used twice,
/// even where all members were made anew and count from the beginning.
pub(crate) fn version_of(id: &LogId<u64>) -> String {
    format!("{:x}-{:x}-{:x}", id.leader_id.term, id.leader_id.node_id, id.index)
}

/// The one of two records of a register that is the newer.
pub(crate) fn newer(one: Option<AgreedRecord>, two: Option<AgreedRecord>) -> Option<AgreedRecord> {
    let place_of = |record: &Option<AgreedRecord>| record.as_ref().and_then(|record| place(&record.version));
    if place_of(&two) > place_of(&one) { two } else { one }
}

/// What says which of two versions is newer.
pub(crate) fn place(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split('-').map(|number| u64::from_str_radix(number, 16).ok());
    Some((numbers.next()??, numbers.nth(1)??))
}

/// What is wrong with an entry that was read. Raft takes all of it for granted.
pub(crate) fn check_entry(entry: &LogEntry) -> Result<(), &'static str> {
    check_log_id(&entry.log_id)?;
    match &entry.payload {
        EntryPayload::Membership(membership) => check_members(membership),
        EntryPayload::Blank | EntryPayload::Normal(_) => Ok(()),
    }
}

/// What is wrong with the id of an entry.
pub(crate) fn check_log_id(id: &LogId<u64>) -> Result<(), &'static str> {
    match id.index <= NUMBER_MAX && id.leader_id.term <= NUMBER_MAX {
        true => Ok(()),
        false => Err("a number is too high"),
    }
}

/// What is wrong with a vote.
pub(crate) fn check_vote(vote: &Vote<u64>) -> Result<(), &'static str> {
    match vote.leader_id.term <= NUMBER_MAX {
        true => Ok(()),
        false => Err("a number is too high"),
    }
}

/// What is wrong with a list of members. Before a cluster begins, it is empty.
pub(crate) fn check_members(membership: &Membership<u64, Member>) -> Result<(), &'static str> {
    if membership.nodes().count() > MEMBERS_MAX {
        return Err("too many members");
    }
    let configs = membership.get_joint_config();
    if configs.len() > 2 {
        return Err("more than two lists of voters");
    }
    if configs.iter().any(BTreeSet::is_empty) {
        return Err("a list without voters");
    }
    match configs.iter().flatten().all(|voter| membership.get_node(voter).is_some()) {
        true => Ok(()),
        false => Err("a voter without an address"),
    }
}

/// A text of at most so many bytes.
fn bounded<'de, D: Deserializer<'de>>(from: D, most: usize, what: &str) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    match text.len() <= most {
        true => Ok(text),
        false => Err(de::Error::custom(format!("{what} has {} bytes: too many", text.len()))),
    }
}

fn url<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    bounded(from, URLS_MAX_BYTES, "a URL")
}

fn version<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    bounded(from, VERSION_MAX_BYTES, "a version")
}

fn some_version<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    version(from).map(Some)
}

/// A record, in base64 without padding.
mod base64 {
    use super::*;

    pub(super) fn serialize<S: Serializer>(record: &[u8], to: S) -> Result<S::Ok, S::Error> {
        if record.len() > RECORD_MAX_BYTES {
            return Err(ser::Error::custom("a record has too many bytes"));
        }
        to.serialize_str(&Base64Unpadded::encode_string(record))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = bounded(from, (RECORD_MAX_BYTES * 4).div_ceil(3), "a record")?;
        Base64Unpadded::decode_vec(&text).map_err(|_| de::Error::custom("a record is not base64"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use openraft::LeaderId;
    use serde::de::DeserializeOwned;

    use super::*;

    fn reads<T: DeserializeOwned>(json: &str) -> Result<T, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_longer_than_it_may_be_is_not_read() {
        let swap = |expected: &str, record: &str| {
            reads::<Proposal>(&format!(
                r#"{{"swap":{{"expected":"{expected}","nonce":1,"record":"{record}"}}}}"#
            ))
        };
        let of = |bytes: usize| swap("", &Base64Unpadded::encode_string(&vec![7; bytes]));
        assert!(of(RECORD_MAX_BYTES).is_ok());
        assert!(of(RECORD_MAX_BYTES + 1).unwrap_err().contains("too many"));
        assert!(swap("", "==").unwrap_err().contains("base64"));
        let member = |bytes| reads::<Member>(&format!(r#"{{"url":"{}"}}"#, "a".repeat(bytes)));
        assert!(member(URLS_MAX_BYTES).is_ok());
        assert!(member(URLS_MAX_BYTES + 1).unwrap_err().contains("too many"));
        let versions = |bytes: usize| {
            let version = "a".repeat(bytes);
            let register = format!(r#"{{"version":"{version}","nonce":1,"record":""}}"#);
            let done = format!(r#"{{"done":"{version}"}}"#);
            [
                swap(&version, "").is_ok(),
                reads::<Ruling>(&done).is_ok(),
                reads::<AgreedRecord>(&register).is_ok(),
            ]
        };
        assert_eq!(versions(VERSION_MAX_BYTES), [true; 3]);
        assert_eq!(versions(VERSION_MAX_BYTES + 1), [false; 3]);
        let highest = LogId::new(LeaderId::new(u64::MAX, u64::MAX), u64::MAX);
        assert_eq!(version_of(&highest).len(), VERSION_MAX_BYTES);
    }

    #[test]
    fn a_list_of_members_that_raft_could_not_do_with_is_refused() {
        let list = |configs: &str, nodes: u64| {
            let nodes: BTreeMap<u64, Member> = (1..=nodes).map(|id| (id, Member::default())).collect();
            let nodes = serde_json::to_string(&nodes).unwrap();
            check_members(&reads(&format!(r#"{{"configs":{configs},"nodes":{nodes}}}"#)).unwrap())
        };
        for configs in ["[]", "[[1]]", "[[1,2,3]]", "[[1,2],[2,3]]"] {
            assert_eq!(list(configs, 3), Ok(()), "{configs}");
        }
        for configs in ["[[]]", "[[1],[]]", "[[4]]", "[[1],[4]]", "[[1],[2],[3]]"] {
            assert!(list(configs, 3).is_err(), "{configs}");
        }
        assert_eq!(list("[[1]]", MEMBERS_MAX as u64), Ok(()));
        assert!(list("[[1]]", MEMBERS_MAX as u64 + 1).is_err());
    }

    #[test]
    fn numbers_leave_room_for_one_more() {
        let id = |term, index| LogId::new(LeaderId::new(term, u64::MAX), index);
        assert!(check_log_id(&id(NUMBER_MAX, NUMBER_MAX)).is_ok());
        assert!(
            check_log_id(&id(NUMBER_MAX + 1, 0)).is_err() && check_log_id(&id(0, NUMBER_MAX + 1)).is_err()
        );
        assert!(check_vote(&Vote::new(NUMBER_MAX + 1, 1)).is_err() && check_vote(&Vote::new(1, 1)).is_ok());
        let later = Agreed {
            membership: StoredMembership::new(Some(id(1, 1)), Membership::default()),
            last_applied: Some(id(1, 0)),
            register: None,
        };
        assert!(later.check().is_err());
    }
}
