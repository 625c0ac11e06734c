//! Why something that an operator asked for was not done.

use crate::error::PeerProblem;
use crate::peer::NodeId;

/// Why something that an operator asked for was not done, or may not have been.
///
/// ```
/// use replite::operator::OperatorError;
///
/// assert!(OperatorError::Store("no such directory".into()).is_unreachable());
/// assert!(!OperatorError::NoRecord.is_unreachable());
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// This node has a fixed primary, or was shut down.
    #[error("there is no lease: the primary is fixed by configuration, or the node was shut down")]
    NoLease,
    /// What was given is of no use: a URL, a name, a secret. Nothing was done.
    #[error("{0}")]
    Invalid(String),
    /// The lease's store can't be reached, or refuses. Nothing was changed.
    #[error("the lease's store can't be used: {0}")]
    Store(String),
    /// The store did not say whether the record was changed. It may be, also later: look at it.
    #[error("it is not known whether the record was changed, so look at it: {0}")]
    Unknown(String),
    /// Others wrote the record whenever it was to be changed. Nothing was changed. Try again.
    #[error("others wrote the record each of {tries} times; try again")]
    Contended {
        /// How often it was tried.
        tries: u32,
    },
    /// The store has no record. It is the wrong one, or the record was removed.
    #[error("the store has no record of a lease: it is the wrong one, or the record was removed")]
    NoRecord,
    /// The record can't be understood, or is that of another cluster or database. It stays as it
    /// is.
    #[error("the record can't be used: {0}")]
    Unusable(String),
    /// The record was moved to another store ([`Operator::move_to`]).
    ///
    /// [`Operator::move_to`]: crate::operator::Operator::move_to
    #[error("the lease was moved from this store to {to}")]
    Moved {
        /// Where to, as the operator called it.
        to: String,
    },
    /// No node has held the lease yet, or the last holder gave it back.
    #[error("no node holds the lease")]
    NoHolder,
    /// A node holds the lease and renews it, and what was asked for needs one that is not renewed.
    #[error("node {holder} holds the lease and renews it: end it first")]
    Renewed {
        /// That node.
        holder: NodeId,
    },
    /// To give a node a command needs the cluster's secret
    /// ([`Operator::secret`](crate::operator::Operator::secret)).
    #[error("asking or commanding a node needs the cluster's secret")]
    NoSecret,
    /// Neither the record nor an address that was given leads to this node.
    #[error("the record does not name node {0}: give its URL")]
    UnknownNode(NodeId),
    /// The node can't be reached, or it is not one of this cluster. It was sent no command.
    #[error("{url}: {problem}")]
    Unreachable {
        /// Where it was looked for.
        url: String,
        /// What is wrong with it.
        #[source]
        problem: PeerProblem,
    },
    /// The node was sent the command, and no answer came. It may carry it out all the same.
    #[error("{url} was sent the command and may carry it out, so look again: {problem}")]
    NotAnswered {
        /// Where it is.
        url: String,
        /// How the answer failed to come.
        #[source]
        problem: PeerProblem,
    },
    /// The node did not do it.
    #[error("node {node} has not done it: {why}")]
    Refused {
        /// The node.
        node: NodeId,
        /// Why, in its words.
        why: String,
    },
    /// The members that keep the record did not do it.
    #[error("the members have not changed: {0}")]
    Members(String),
    /// The store that the record was to be moved to has one already. Nothing was changed.
    #[error("the other store is not empty: it has {there}; this one has {here}")]
    Occupied {
        /// What this store has.
        here: String,
        /// What the other one has.
        there: String,
    },
    /// The record was changed while it was being moved: a node is at work. What was copied into the
    /// other store is of no use.
    #[error(
        "a node wrote the record while it was being moved: end all nodes, empty the other store, and \
         try again"
    )]
    MovedUnder,
}

impl OperatorError {
    /// Whether a store or a node could not be reached at all.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, OperatorError::Store(_) | OperatorError::Unreachable { .. })
    }
}
