//! What happens, and what is to be done about it.

use std::time::Duration;

use super::Instant;
use crate::lease::Version;
use crate::lease::record::{Attempt, Record};
use crate::peer::{Incarnation, NodeId};
use crate::status::{PeerInfo, WaitReason};
use crate::txid::{Epoch, Position};

/// What happens.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one for each decision")]
pub(crate) enum Input {
    /// Time has passed: the instant that was asked for has come, or something may have changed.
    Tick,
    /// The store hints that the record has changed.
    Changed,
    /// A read of the register, and when it was begun.
    Read {
        begun: Instant,
        outcome: Result<Option<(Record, Version)>, Unread>,
    },
    Swapped {
        attempt: Attempt,
        outcome: Swapped,
    },
    /// The answers of those that were asked, when all have come or the limit has passed.
    Peers {
        round: u64,
        answers: Vec<PeerAnswer>,
    },
    /// The stream from the primary is ended, and all that came is applied: this is the state, if a
    /// primary vouches for one.
    Prepared {
        position: Option<Position>,
    },
    /// The node serves as the primary, or does not.
    Promoted(Result<(), String>),
    /// A running primary goes on with the new epoch.
    Renewed(Result<(), String>),
    /// It serves no more, and this is all that it committed.
    Demoted {
        position: Option<Position>,
    },
    /// What [`Action::Withhold`] came to.
    Withheld {
        attempt: Attempt,
        outcome: Result<Accepted, String>,
    },
    /// The primary that this node follows offers it the lease. All up to this position is on the
    /// disk here.
    Offered {
        attempt: Attempt,
        position: Position,
    },
    /// The primary says that this record is in the register, and names this node as the holder.
    Handed {
        record: Box<Record>,
        version: Version,
    },
    /// A peer named an epoch.
    Heard(u64),
    Command(Command),
}

/// A replica has all that this node committed, and is about to lead.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Accepted {
    /// The last state: nothing is committed here any more.
    pub(crate) position: Position,
    /// The id of the boot of the replica's machine.
    pub(crate) boot: String,
}

/// Why there is no record to see.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Unread {
    /// The store can't be reached.
    Unavailable(String),
    /// What is there is no record of this cluster and database, or can't be understood.
    NotOurs { version: Version, why: String },
}

/// How a swap ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Swapped {
    Done(Version),
    Conflict,
    Unavailable(String),
    Unknown(String),
}

/// What a peer says of itself, when it is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct PeerAnswer {
    pub(crate) peer: PeerInfo,
    pub(crate) position: Option<Position>,
    /// The highest epoch number that it knows.
    pub(crate) epoch: u64,
    /// It would take the lease, and could: it saw the record lately, is healthy, does not drain,
    /// and has not just failed.
    pub(crate) fit: bool,
    pub(crate) has_state: bool,
    pub(crate) has_content: bool,
}

/// What an operator, or the node's own end, asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    /// Take the lease with what is here, whatever others have.
    PromoteUnchecked,
    /// Hand the lease to this node; none: to the replica that has the most.
    Handoff { to: Option<NodeId> },
    /// End: hand the lease over, or give it back in good order.
    Leave,
}

/// Why the lease was not handed over.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum NotHanded {
    #[error("this node does not lead")]
    NotPrimary,
    #[error("the lease is about to be handed to another node")]
    UnderWay,
    #[error("node {0} is not connected to this one as a replica")]
    NotConnected(NodeId),
    #[error("no replica is connected that could lead")]
    NoTarget,
    #[error("node {0} can't lead now: it did not answer, is unwell, drains or is no candidate")]
    NotFit(NodeId),
    /// Commits go on here, as if nothing had been.
    #[error("node {to} does not have the lease: {why}")]
    Aborted { to: NodeId, why: String },
    /// Commits go on here, in a new epoch.
    #[error("the lease's store did not take the record that names node {0}")]
    NotWritten(NodeId),
    #[error("the lease of this node ended before another one had it")]
    Ended,
}

/// What is to be done. Each one's end, where it has one, comes back as an input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    Read,
    /// Replace the record of this version. The driver's limit is a quarter of the lease time.
    Swap {
        expected: Option<Version>,
        record: Box<Record>,
    },
    /// Ask these for how they stand. What comes within the limit is the answer.
    AskPeers {
        round: u64,
        peers: Vec<PeerInfo>,
        limit: Duration,
    },
    /// End the stream from the primary, and say what is here then.
    Prepare,
    /// Lead, with an epoch that goes on from what was prepared.
    Promote {
        epoch: Epoch,
        unchecked: bool,
    },
    /// Acknowledge in this epoch until this instant. It only ever grows within an epoch.
    Lease {
        epoch: Epoch,
        until: Instant,
    },
    /// Acknowledge nothing more.
    Fence,
    /// Go on after a fence, as the primary of this epoch. What was withheld for a handoff is given
    /// back.
    Renew {
        epoch: Epoch,
    },
    /// Commit nothing more for a moment, and offer the lease to this replica with what there is:
    ///
    /// 1. Show a primary that takes no new requests, and wait for those that run.
    /// 2. Close the writer and take WRITE. What is captured then is the last state.
    /// 3. Send the offer, and wait until the replica has all of that and answers.
    ///
    /// Each step has its limit. [`Input::Withheld`] has this attempt. [`Action::GoOn`],
    /// [`Action::Renew`] and [`Action::Demote`] end it, also while it is under way; an answer that
    /// comes after that is of no use. While it waits the lease is renewed as always.
    ///
    /// Without a node there is nothing to offer: the node ends, and gives the lease back.
    Withhold {
        to: Option<PeerInfo>,
        attempt: Attempt,
    },
    /// It stays the primary, in the same epoch: WRITE is given back, requests are taken again, and
    /// the replicas are told.
    GoOn,
    /// The register names this node now: it is to be told, and the other replicas that there is
    /// another primary. [`Action::Demote`] follows.
    Handed {
        to: PeerInfo,
        record: Box<Record>,
        version: Version,
    },
    /// What came of [`Command::Handoff`], for all that asked for this one: which node has the
    /// lease.
    HandoffEnded(Result<NodeId, NotHanded>),
    /// The [`Command::Handoff`] that was just given is not followed, whatever becomes of an earlier
    /// one.
    HandoffRefused(NotHanded),
    /// Answer the offer: this node has all, and leads as soon as the register names it. Its time
    /// began before this.
    Accept {
        attempt: Attempt,
        /// The id of the boot of this machine.
        boot: String,
    },
    /// Answer the offer: this node does not lead.
    Decline {
        attempt: Attempt,
        why: String,
    },
    /// Stop leading. Where the writer is closed for a handoff, it stays so.
    Demote,
    /// Follow this node; none: no node that could be followed is known.
    Follow(Option<PeerInfo>),
    /// Keep durably that this epoch number was heard of, before what comes next is done.
    Hear(u64),
    /// Keep durably that this node took part in making the first record.
    MarkBootstrapped,
    /// What others are to see of the node.
    Show(Shown),
    /// Wake at this instant, if nothing else has happened until then.
    Wake(Instant),
    Note(Note),
    /// All that [`Command::Leave`] asked for is done.
    Left,
}

/// What a node does, as far as its role goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Shown {
    Replica,
    /// It asks the others, and is about to take the lease.
    Electing,
    Waiting(WaitReason),
    Promoting,
    Primary,
    Fencing,
}

/// What is worth telling an operator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Note {
    /// The store shows less than this node knows.
    StoreWentBack(String),
    /// Another process has this node's id, and the lease: a copied state directory or machine.
    SameNode { incarnation: Incarnation },
    /// Several nodes of a first start have a database with content, and only one may.
    SeveralWithContent(Vec<NodeId>),
    /// A node of a first start has a state of the cluster: this is none.
    NoFirstStart(NodeId),
    /// The operator's word was not followed: another node leads.
    NotTaken { holder: NodeId },
}

/// What is kept of a decision, for the status.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Decided {
    pub(crate) at: Instant,
    pub(crate) what: Choice,
    /// Of the peers that it asked before.
    pub(crate) answers: Vec<PeerAnswer>,
}

/// What was decided.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Choice {
    Shows(Shown),
    /// Asks for the lease, with this epoch.
    Takes(Epoch),
    /// Has the lease.
    Took(Epoch),
    /// Acknowledges nothing more in this epoch.
    Fences(Epoch),
    /// Gives the lease back.
    Releases(Epoch),
    /// Looks for a replica to hand the lease to.
    SeeksTarget,
    /// Commits nothing more for a moment, and offers the lease to this replica.
    Offers(NodeId),
    /// Writes this node into the register as the next holder, with this epoch.
    HandsOver(NodeId, Epoch),
    /// This node has the lease.
    Handed(NodeId),
    /// The lease was not handed over.
    KeepsOn(NotHanded),
    /// Leads when the register says so: the primary has offered it the lease.
    Accepts,
    Declines(String),
    Follows(Option<NodeId>),
    Notes(Note),
}

/// What a node says of itself when a peer asks; the rest of a [`PeerAnswer`] is in its [`Facts`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct OwnAnswer {
    pub(crate) epoch: u64,
    pub(crate) fit: bool,
}
