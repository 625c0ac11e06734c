//! What a node says of an election.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::peer::NodeId;
use crate::status::as_unix_millis;
use crate::txid::Position;

/// Why there is no primary, as a node sees it, and why that node does not become it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum WaitReason {
    /// The store has no record of a lease, and this is no first start: the record was removed, or
    /// [`Config::bootstrap`](crate::Config::bootstrap) does not say how many nodes make the first.
    NoRecord,
    /// The cluster starts for the first time, and not all of its nodes are there.
    Gathering {
        /// How many are there.
        present: usize,
        /// How many there will be.
        wanted: usize,
    },
    /// The cluster starts for the first time, and several of its nodes have a database with
    /// content. Keep that of one, and take it away from the others.
    SeveralDatabases,
    /// The store can't be reached.
    StoreUnavailable,
    /// The store's record can't be understood, or is that of another cluster or database.
    RecordNotOurs,
    /// The lease has a holder that can't be reached, and has not ended yet.
    Held,
    /// An operator has paused elections.
    Paused,
    /// This node is configured not to lead.
    NotCandidate,
    /// This node has no state of the cluster that a primary vouches for.
    NoState,
    /// What this node has is not of the last primary's history.
    OtherBranch,
    /// This node lacks more of what the last primary had than
    /// [`Config::failover_loss`](crate::Config::failover_loss) allows.
    Behind {
        /// How old the last primary's state is that this node has, at the time of the record.
        by: Duration,
    },
    /// Another node has more, or is as good, and comes first.
    BetterCandidate {
        /// That node.
        node: NodeId,
    },
    /// A promotion of this node failed a moment ago, or its replication does not work.
    Unfit,
    /// This node is about to end.
    Draining,
    /// This node asked for the lease, and it is not known whether it got it.
    Unsettled,
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WaitReason::NoRecord => f.write_str("there is no record of a lease, and this is no first start"),
            WaitReason::Gathering { present, wanted } => {
                write!(f, "{present} of the cluster's first {wanted} nodes are there")
            }
            WaitReason::SeveralDatabases => {
                f.write_str("several nodes of a first start have a database with content: keep that of one")
            }
            WaitReason::StoreUnavailable => f.write_str("the lease's store can't be reached"),
            WaitReason::RecordNotOurs => f.write_str("the lease's record is not this database's"),
            WaitReason::Held => f.write_str("the lease's holder can't be reached, and its time is not over"),
            WaitReason::Paused => f.write_str("elections are paused"),
            WaitReason::NotCandidate => f.write_str("this node is configured not to lead"),
            WaitReason::NoState => f.write_str("this node has no state that a primary vouches for"),
            WaitReason::OtherBranch => f.write_str("this node's state is not of the last primary's history"),
            WaitReason::Behind { by } => write!(f, "this node is {by:?} behind the last primary"),
            WaitReason::BetterCandidate { node } => write!(f, "node {node} comes first"),
            WaitReason::Unfit => f.write_str("this node is not fit to lead at the moment"),
            WaitReason::Draining => f.write_str("this node is about to end"),
            WaitReason::Unsettled => f.write_str("it is not known whether this node got the lease"),
        }
    }
}

/// One thing that a node decided about the lease, or learnt of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Decision {
    /// When, by the wall clock. In JSON, milliseconds since 1970.
    #[serde(with = "as_unix_millis", rename = "at_ms")]
    pub at: SystemTime,
    /// What, in words for operators.
    pub what: String,
    /// What the peers had answered that the node asked before.
    pub answers: Vec<PeerStanding>,
}

/// How a peer stood when it was asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct PeerStanding {
    /// The peer.
    pub node: NodeId,
    /// What it had, of what a primary vouches for.
    pub position: Option<Position>,
    /// The highest number of an epoch that it knew.
    pub epoch: u64,
    /// Whether it could have led.
    pub fit: bool,
}
