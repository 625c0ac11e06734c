//! What members say to each other: questions and answers, as JSON with its length before it.
//!
//! One connection carries many of both. A number tells which answer belongs to which question, and
//! they come in any order.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{LogId, SnapshotMeta, StoredMembership, Vote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::members::types::{
    Agreed, AgreedRecord, Holds, Member, Proposal, TypeConfig, check_entry, check_log_id, check_members,
    check_vote,
};

/// Bytes of a frame before its JSON: the length of that.
const HEAD_BYTES: usize = 4;
/// The most bytes of a frame's JSON: [`ENTRIES_MAX`] records of 16 KiB in base64.
pub(crate) const FRAME_MAX_BYTES: usize = 512 * 1024;
/// Entries of the log in one message.
pub(crate) const ENTRIES_MAX: u64 = 16;

/// A question, or what is to be done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ask {
    /// Who are you?
    Introduce,
    /// Raft's own, to the member with this id.
    Append {
        to: u64,
        rpc: AppendEntriesRequest<TypeConfig>,
    },
    Vote {
        to: u64,
        rpc: VoteRequest<u64>,
    },
    Snapshot {
        to: u64,
        vote: Vote<u64>,
        meta: SnapshotMeta<u64, Member>,
        state: Box<Agreed>,
    },
    /// What does the register hold?
    Read,
    /// Replaces the record. Passed on already: only the leader does it.
    Swap {
        command: Proposal,
        passed: bool,
    },
    /// Changes who the members are.
    Change {
        change: MemberChange,
        passed: bool,
    },
    /// The member with this id has not what it said to have.
    WentBack {
        to: u64,
    },
    /// Begins with the members on the list, whatever state of the cluster they have.
    Begin,
}

/// A change of the members.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemberChange {
    /// The node at this URL becomes one.
    Add { url: String },
    /// The one at this URL is none any more.
    Remove { url: String },
    /// The member at this URL has a new id, since its Raft directory is gone; or the member with
    /// this id is at a new URL.
    Replace { url: String, id: u64 },
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum MemberAnswer {
    Introduced(Box<Introduction>),
    Appended(AppendEntriesResponse<u64>),
    Voted(VoteResponse<u64>),
    Installed(SnapshotResponse<u64>),
    Register(Option<AgreedRecord>),
    Swapped(SwapOutcome),
    Changed,
    /// It was not done, unless it may have been.
    Unable {
        may_be_done: bool,
        why: String,
    },
}

/// What came of a swap.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SwapOutcome {
    /// The record has this version now.
    Done(String),
    /// The register held this.
    Conflict(Option<Holds>),
    /// No member took it.
    NotSent(String),
    /// It may have been done, or may be later.
    Unknown(String),
}

/// What a node says of itself as one that keeps the record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Introduction {
    /// Its id as a member. None: by its configuration it is none.
    pub(crate) id: Option<u64>,
    pub(crate) witness: bool,
    /// The members by its configuration.
    pub(crate) list: Vec<String>,
    /// It knows of a Raft cluster that it is, or was, part of.
    pub(crate) begun: bool,
    /// The members that there are, as far as it knows.
    pub(crate) membership: StoredMembership<u64, Member>,
    pub(crate) leader: Option<u64>,
    /// The index at which its log ends.
    pub(crate) last_index: Option<u64>,
    /// What it says of its database is known by now.
    pub(crate) ready: bool,
    /// It has a state of the cluster, or took part in beginning one.
    pub(crate) has_state: bool,
    /// Its database has something in it.
    pub(crate) has_content: bool,
}

/// Bytes that are no frame, or whose contents make no sense.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Garbled(pub(crate) String);

/// A frame, whole.
///
/// # Errors
/// What is said is longer than a frame may be.
pub(crate) fn frame<T: Serialize>(number: u64, said: &T) -> Result<Bytes, Garbled> {
    let mut bytes = BytesMut::new();
    bytes.put_u32_le(0);
    let mut writer = bytes.writer();
    serde_json::to_writer(&mut writer, &(number, said)).map_err(|error| Garbled(error.to_string()))?;
    let mut bytes = writer.into_inner();
    let length = bytes.len() - HEAD_BYTES;
    if length > FRAME_MAX_BYTES {
        return Err(Garbled(format!("{length} bytes to say: too many")));
    }
    bytes[..HEAD_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes.freeze())
}

/// Cuts what comes into frames.
#[derive(Debug, Default)]
pub(crate) struct AskFrames(BytesMut);

impl AskFrames {
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The JSON of the next frame, once all of it is here.
    ///
    /// # Errors
    /// It would be longer than any is: nothing that follows can be read.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Garbled> {
        self.next_of(FRAME_MAX_BYTES)
    }

    /// The same, of frames whose JSON has at most so many bytes.
    pub(crate) fn next_of(&mut self, most: usize) -> Result<Option<Bytes>, Garbled> {
        let Some(head) = self.0.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*head) as usize;
        if length > most {
            return Err(Garbled(format!("a message of {length} bytes")));
        }
        if self.0.len() < HEAD_BYTES + length {
            return Ok(None);
        }
        self.0.advance(HEAD_BYTES);
        Ok(Some(self.0.split_to(length).freeze()))
    }
}

/// What a frame says, and its number.
///
/// # Errors
/// It makes no sense to this version.
pub(crate) fn read<T: DeserializeOwned>(json: &[u8]) -> Result<(u64, T), Garbled> {
    serde_json::from_slice(json).map_err(|error| Garbled(format!("a message that makes no sense: {error}")))
}

impl Ask {
    /// Whether only the members themselves say it.
    pub(crate) fn is_of_raft(&self) -> bool {
        matches!(self, Ask::Append { .. } | Ask::Vote { .. } | Ask::Snapshot { .. })
    }

    /// Whether it makes sense. Raft takes all that is checked here for granted.
    pub(crate) fn check(&self) -> Result<(), Garbled> {
        let garbled = |why: &str| Garbled(format!("a message that makes no sense: {why}"));
        match self {
            Ask::Append { rpc, .. } => check_append(rpc),
            Ask::Vote { rpc, .. } => check_vote(&rpc.vote).and_then(|()| check_last(&rpc.last_log_id)),
            Ask::Snapshot { vote, meta, state, .. } => {
                let same = meta.last_log_id == state.last_applied && meta.last_membership == state.membership;
                let fits = if same { Ok(()) } else { Err("a state of another entry") };
                check_vote(vote).and_then(|()| state.check()).and(fits)
            }
            Ask::Introduce
            | Ask::Read
            | Ask::Swap { .. }
            | Ask::Change { .. }
            | Ask::WentBack { .. }
            | Ask::Begin => Ok(()),
        }
        .map_err(garbled)
    }
}

fn check_last(id: &Option<LogId<u64>>) -> Result<(), &'static str> {
    id.iter().try_for_each(check_log_id)
}

/// Entries follow one another, and none is of a later term than the vote.
fn check_append(rpc: &AppendEntriesRequest<TypeConfig>) -> Result<(), &'static str> {
    check_vote(&rpc.vote)?;
    check_last(&rpc.prev_log_id)?;
    check_last(&rpc.leader_commit)?;
    let mut last = rpc.prev_log_id;
    for entry in &rpc.entries {
        check_entry(entry)?;
        let next = last.map_or(0, |last| last.index + 1);
        if entry.log_id.index != next || last > Some(entry.log_id) {
            return Err("entries that do not follow one another");
        }
        last = Some(entry.log_id);
    }
    match last.is_some_and(|last| last.leader_id.term > rpc.vote.leader_id.term) {
        true => Err("an entry of a later term than its sender's"),
        false => Ok(()),
    }
}

impl MemberAnswer {
    /// Whether it makes sense.
    pub(crate) fn check(&self) -> Result<(), Garbled> {
        let garbled = |why: &str| Garbled(format!("an answer that makes no sense: {why}"));
        match self {
            MemberAnswer::Introduced(introduced) => check_members(introduced.membership.membership()),
            MemberAnswer::Appended(AppendEntriesResponse::HigherVote(vote)) => check_vote(vote),
            MemberAnswer::Appended(AppendEntriesResponse::PartialSuccess(id)) => check_last(id),
            MemberAnswer::Voted(said) => check_vote(&said.vote).and_then(|()| check_last(&said.last_log_id)),
            MemberAnswer::Installed(said) => check_vote(&said.vote),
            _ => Ok(()),
        }
        .map_err(garbled)
    }
}

/// What comes on a connection in pieces of any size, as questions and as answers; and as the JSON
/// of one. What makes sense is said again as it was.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_members_words(data: &[u8]) {
    fn again<T: Serialize + DeserializeOwned + std::fmt::Debug>(
        json: &[u8],
        check: fn(&T) -> Result<(), Garbled>,
    ) {
        let Ok((number, said)) = read::<T>(json) else { return };
        let Ok(()) = check(&said) else { return };
        let Ok(whole) = frame(number, &said) else { return };
        let (other, same) = read::<T>(&whole[HEAD_BYTES..]).expect("what was said can be read");
        assert_eq!((other, format!("{same:?}")), (number, format!("{said:?}")));
    }
    let any = |json: &[u8]| {
        again(json, Ask::check);
        again(json, MemberAnswer::check);
    };
    any(data);
    let Some((&size, rest)) = data.split_first() else { return };
    let mut frames = AskFrames::default();
    for piece in rest.chunks(usize::from(size) + 1) {
        frames.push(piece);
        while let Ok(Some(json)) = frames.next() {
            any(&json);
        }
    }
    assert!(frames.0.len() <= rest.len());
}

/// What [`fuzz_members_words`] begins with.
#[cfg(test)]
pub(crate) fn fuzz_members_words_seeds() -> Vec<(&'static str, Vec<u8>)> {
    tests::seeds()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use openraft::{CommittedLeaderId, EntryPayload, Membership};

    use super::*;
    use crate::members::types::LogEntry;

    pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let id = |index| LogId::new(CommittedLeaderId::new(3, 7), index);
        let member = |url: &str, witness| Member { url: url.into(), witness };
        let members = BTreeMap::from([(7, member("replite://a:1", false)), (9, member("http://b", true))]);
        let membership = Membership::new(vec![BTreeSet::from([7, 9])], members);
        let swap = |expected: Option<&str>| Proposal::Swap {
            expected: expected.map(String::from),
            nonce: 5,
            record: b"a record".to_vec(),
        };
        let payloads = [
            EntryPayload::Membership(membership.clone()),
            EntryPayload::Blank,
            EntryPayload::Normal(swap(None)),
            EntryPayload::Normal(swap(Some("3-7-2"))),
        ];
        let entries = payloads.into_iter().zip(1..).map(|(payload, at)| LogEntry { log_id: id(at), payload });
        let vote = Vote::new_committed(3, 7);
        let append = AppendEntriesRequest {
            vote,
            prev_log_id: Some(id(0)),
            entries: entries.collect(),
            leader_commit: Some(id(2)),
        };
        let register = AgreedRecord { version: "3-7-4".into(), nonce: 5, record: b"a record".to_vec() };
        let membership = StoredMembership::new(Some(id(1)), membership);
        let (last_applied, register) = (Some(id(4)), Some(register));
        let state = Agreed { last_applied, membership: membership.clone(), register: register.clone() };
        let meta = crate::members::types::snapshot_of(state.clone()).meta;
        let introduction = Introduction {
            id: Some(7),
            witness: false,
            list: vec!["replite://a:1".into(), "http://b".into()],
            begun: true,
            membership,
            leader: Some(7),
            last_index: Some(4),
            ready: true,
            has_state: true,
            has_content: false,
        };
        let holds = Holds { version: "3-7-4".into(), nonce: 5 };
        let change = MemberChange::Replace { url: "replite://a:1".into(), id: 11 };
        let ask = |ask: Ask| serde_json::to_vec(&(1, ask)).unwrap();
        let said = |said: MemberAnswer| serde_json::to_vec(&(2, said)).unwrap();
        let frames = [&[5][..], &frame(1, &Ask::Introduce).unwrap(), &frame(2, &Ask::Read).unwrap()].concat();
        vec![
            ("frames", frames),
            ("append", ask(Ask::Append { to: 7, rpc: append })),
            ("vote", ask(Ask::Vote { to: 7, rpc: VoteRequest { vote, last_log_id: Some(id(4)) } })),
            ("snapshot", ask(Ask::Snapshot { to: 7, vote, meta, state: Box::new(state) })),
            ("swap", ask(Ask::Swap { command: swap(Some("3-7-4")), passed: true })),
            ("change", ask(Ask::Change { change, passed: false })),
            ("introduced", said(MemberAnswer::Introduced(Box::new(introduction)))),
            ("appended", said(MemberAnswer::Appended(AppendEntriesResponse::PartialSuccess(Some(id(3)))))),
            ("register", said(MemberAnswer::Register(register))),
            ("swapped", said(MemberAnswer::Swapped(SwapOutcome::Conflict(Some(holds))))),
            ("unable", said(MemberAnswer::Unable { may_be_done: true, why: "it is away".into() })),
        ]
    }

    #[test]
    fn what_is_said_makes_sense_to_the_other_side() {
        for (name, json) in seeds().into_iter().skip(1) {
            let asked = read::<Ask>(&json).ok().map(|(_, ask)| ask.check());
            let said = read::<MemberAnswer>(&json).ok().map(|(_, said)| said.check());
            assert_eq!(asked.or(said), Some(Ok(())), "{name}");
            super::fuzz_members_words(&json);
        }
    }

    #[test]
    fn frames_come_in_any_pieces() {
        let whole = [frame(7, &Ask::Introduce).unwrap(), frame(8, &Ask::Read).unwrap()].concat();
        for cut in 0..whole.len() {
            let mut frames = AskFrames::default();
            let mut found = Vec::new();
            for piece in [&whole[..cut], &whole[cut..]] {
                frames.push(piece);
                while let Some(json) = frames.next().unwrap() {
                    found.push(read::<Ask>(&json).unwrap());
                }
            }
            assert!(matches!(found[..], [(7, Ask::Introduce), (8, Ask::Read)]), "cut at {cut}");
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_by_its_head() {
        let mut frames = AskFrames::default();
        frames.push(&(FRAME_MAX_BYTES as u32 + 1).to_le_bytes());
        assert!(frames.next().is_err());
        let long = MemberAnswer::Unable { may_be_done: false, why: "x".repeat(FRAME_MAX_BYTES) };
        assert!(frame(1, &long).is_err());
        for json in ["", "[]", "[1]", "[1,\"fly\"]", "{}", "[-1,\"read\"]"] {
            assert!(read::<Ask>(json.as_bytes()).is_err(), "{json}");
        }
    }
}
