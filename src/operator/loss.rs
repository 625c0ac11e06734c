//! What is lost when a node leads with what it has.

use std::cmp::Ordering;
use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::nodes::Nodes;
use super::problem::OperatorError;
use super::table::Short;
use super::view::{LeaseStands, NodeView, View};
use crate::context::OperatorCommand;
use crate::net::Endpoint;
use crate::peer::NodeId;
use crate::txid::Position;

/// How long a promotion may take: the lease time, what the application does then, and the way.
const PROMOTION_LIMIT: Duration = Duration::from_secs(160);

/// What another state has that this one has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Difference {
    /// Nothing: this one has all of it, or it is older.
    Nothing,
    /// So many transactions of the same history.
    Transactions(u64),
    /// What was committed in a later epoch. So many transactions at least; it may be more.
    LaterEpoch {
        /// The later epoch's number.
        epoch: u64,
        /// By how many its number of transactions is higher.
        at_least: u64,
    },
    /// Another branch of history: it has commits that this one never had.
    OtherBranch,
    /// All of it: nothing is here.
    Everything,
}

impl Difference {
    /// What the state `there` has that the state `here` has not, as far as positions tell.
    fn between(here: Option<Position>, there: Option<Position>) -> Difference {
        let Some(there) = there else { return Difference::Nothing };
        let Some(here) = here else { return Difference::Everything };
        if here == there {
            return Difference::Nothing;
        }
        let missing = there.number().saturating_sub(here.number());
        match there.epoch().number().cmp(&here.epoch().number()) {
            Ordering::Equal if there.epoch() != here.epoch() => Difference::OtherBranch,
            Ordering::Equal if there.number() == here.number() => Difference::OtherBranch,
            Ordering::Equal if missing > 0 => Difference::Transactions(missing),
            Ordering::Equal => Difference::Nothing,
            Ordering::Greater => Difference::LaterEpoch { epoch: there.epoch().number(), at_least: missing },
            // An older epoch went on where the newer one had begun already.
            Ordering::Less if missing > 0 => Difference::OtherBranch,
            Ordering::Less => Difference::Nothing,
        }
    }

    /// Whether it is nothing.
    pub fn is_nothing(self) -> bool {
        self == Difference::Nothing
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Difference::Nothing => f.write_str("nothing more"),
            Difference::Transactions(1) => f.write_str("1 transaction more"),
            Difference::Transactions(number) => write!(f, "{number} transactions more"),
            Difference::LaterEpoch { epoch, at_least } => {
                write!(f, "what was committed in epoch {epoch}, {at_least} transactions at least")
            }
            Difference::OtherBranch => f.write_str("another branch of history, with commits of its own"),
            Difference::Everything => f.write_str("all that there is"),
        }
    }
}

/// What leaves the history when a node leads with what it has. What other nodes have of it they
/// keep when they return ([`Db::lost`](crate::Db::lost)).
///
/// ```
/// use replite::operator::Loss;
///
/// fn may_go_on_alone(loss: &Loss) -> bool {
///     loss.held_by.is_none() && loss.is_nothing()
/// }
/// # let _ = may_go_on_alone;
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Loss {
    /// The node that is to lead.
    pub node: NodeId,
    /// What it has.
    pub position: Option<Position>,
    /// The holder that renews its lease at present: the node will not get it.
    pub held_by: Option<NodeId>,
    /// The node that the record says held the lease last.
    pub last_holder: Option<NodeId>,
    /// What the last holder had when it wrote the record, which the node has not. None: no record
    /// says what that was.
    pub of_record: Option<Difference>,
    /// The last holder ended in good order, and its record says all that it had.
    pub record_is_final: bool,
    /// What each node that answered has, and this one has not.
    pub of_nodes: Vec<(NodeId, Difference)>,
    /// Nodes that did not answer: what they have is not known.
    pub silent: Vec<NodeView>,
}

impl Loss {
    fn of(view: &View, node: NodeId, position: Option<Position>) -> Loss {
        let lease = view.lease();
        let holder = lease.and_then(|lease| lease.holder.as_ref());
        let renewed = lease.is_some_and(|lease| lease.renewed == Some(true));
        let held = lease.is_some_and(|lease| lease.state == LeaseStands::Held) && renewed;
        let others = || view.nodes.iter().filter(|other| other.node != Some(node));
        let of_node = |other: &NodeView| {
            let there = other.answer.as_ref()?.position;
            Some((other.node?, Difference::between(position, there)))
        };
        Loss {
            node,
            position,
            held_by: holder.map(|holder| holder.node).filter(|holder| held && *holder != node),
            last_holder: holder.map(|holder| holder.node),
            // A holder that has just begun does not say it yet.
            of_record: holder
                .and_then(|holder| holder.position)
                .map(|there| Difference::between(position, Some(there))),
            record_is_final: lease.is_some_and(|lease| lease.state == LeaseStands::Released),
            of_nodes: others().filter_map(of_node).collect(),
            silent: others().filter(|other| other.answer.is_none()).cloned().collect(),
        }
    }

    /// Whether the node has all that the record and every node has, and every node answered.
    pub fn is_nothing(&self) -> bool {
        self.of_record == Some(Difference::Nothing)
            && self.of_nodes.iter().all(|(_, difference)| difference.is_nothing())
            && self.silent.is_empty()
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "node {} is to lead with what it has: {}", self.node, Short(self.position))?;
        if let Some(holder) = self.held_by {
            writeln!(f, "  node {holder} holds the lease and renews it: this will be refused")?;
        }
        match &self.of_record {
            Some(difference) => {
                let is_silent = self.silent.iter().any(|node| node.node == self.last_holder);
                let may_have_more = is_silent && !self.record_is_final;
                let since = if may_have_more { "; it may have committed more since" } else { "" };
                writeln!(f, "  the last holder had, by its record, {difference}{since}")?;
            }
            None => writeln!(f, "  no record says what the last primary had")?,
        }
        for (node, difference) in &self.of_nodes {
            writeln!(f, "  node {node} has {difference}")?;
        }
        for silent in &self.silent {
            let node = silent.node.map_or("a node".into(), |node| format!("node {node}"));
            writeln!(f, "  {node} at {} did not answer: what it has is not known", silent.url)?;
        }
        if self.is_nothing() {
            writeln!(f, "Nothing is lost.")
        } else {
            writeln!(
                f,
                "What others have and this node has not leaves the history. They keep it in `lost/` when \
                 they return."
            )
        }
    }
}

/// A promotion that is to be confirmed; see
/// [`Operator::promotion`](crate::operator::Operator::promotion). `Display` says what will be lost.
#[derive(Debug)]
pub struct Promotion {
    nodes: Nodes,
    to: Endpoint,
    loss: Loss,
}

impl Promotion {
    pub(super) fn new(nodes: Nodes, view: &View, chosen: &NodeView) -> Result<Promotion, OperatorError> {
        let invalid = |error: crate::error::Error| OperatorError::Invalid(error.to_string());
        let to = Endpoint::parse(&chosen.url).map_err(invalid)?;
        let (Some(node), Some(answer)) = (chosen.node, &chosen.answer) else {
            let why = chosen.problem.clone().unwrap_or_else(|| "it does not answer".into());
            let problem = crate::error::PeerProblem::Connection(why);
            return Err(OperatorError::Unreachable { url: to.to_string(), problem });
        };
        Ok(Promotion { nodes, to, loss: Loss::of(view, node, answer.position) })
    }

    /// What will be lost.
    pub fn loss(&self) -> &Loss {
        &self.loss
    }

    /// Has the node take the lease. It waits for the lease time, and is refused when a holder
    /// renews the lease meanwhile. Returns when the node is the primary.
    ///
    /// # Errors
    /// [`OperatorError::Refused`] with the node's reason, and what else [`OperatorError`] has of
    /// nodes that can't be reached.
    ///
    /// # Cancel safety
    /// A command that was sent is carried out.
    pub async fn confirm(self) -> Result<NodeId, OperatorError> {
        let Promotion { nodes, to, loss } = self;
        nodes.command((&to, loss.node), OperatorCommand::PromoteUnchecked, PROMOTION_LIMIT).await
    }
}

impl fmt::Display for Promotion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.loss.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::operator::view::{HolderView, LeaseView, RecordView};
    use crate::peer::Incarnation;
    use crate::primary::fake::at;
    use crate::status::Addresses;
    use crate::txid::{Epoch, Txid};

    #[test]
    fn what_is_lost_is_what_the_other_state_has_by_its_epoch_and_number() {
        let of = |here, there| Difference::between(Some(here), Some(there));
        assert_eq!(of(at(2, 7), at(2, 7)), Difference::Nothing);
        assert_eq!(of(at(2, 7), at(2, 9)), Difference::Transactions(2));
        assert_eq!(of(at(2, 9), at(2, 7)), Difference::Nothing);
        assert_eq!(of(at(2, 9), at(3, 9)), Difference::LaterEpoch { epoch: 3, at_least: 0 });
        assert_eq!(of(at(2, 5), at(3, 9)), Difference::LaterEpoch { epoch: 3, at_least: 4 });
        assert_eq!(of(at(3, 5), at(2, 9)), Difference::OtherBranch, "it went on in the old epoch");
        assert_eq!(of(at(3, 9), at(2, 5)), Difference::Nothing, "it is older");
        let other = |checksum| Position::new(at(2, 7).txid(), checksum);
        assert_eq!(of(at(2, 7), other(Checksum::EMPTY)), Difference::OtherBranch, "another content");
        let fork = Position::new(Txid::new(Epoch::new(2, 99), 7), at(2, 7).checksum());
        assert_eq!(of(at(2, 7), fork), Difference::OtherBranch, "the same number, another branch");
        assert_eq!(Difference::between(None, Some(at(1, 1))), Difference::Everything);
        assert_eq!(Difference::between(None, None), Difference::Nothing);
    }

    /// What a view says of a promotion of a node with this state, where the record of another one
    /// has this position.
    fn loss(here: Position, of_record: Option<Position>) -> Loss {
        let (me, epoch) = (NodeId::from_u128(1), Epoch::new(2, 2));
        let holder = HolderView {
            node: NodeId::from_u128(2),
            incarnation: Incarnation::NIL,
            addresses: Addresses::default(),
            epoch,
            held: Duration::ZERO,
            position: of_record,
        };
        let lease = LeaseView {
            state: LeaseStands::Held,
            holder: Some(holder),
            lease_time: Duration::from_secs(2),
            paused: false,
            renewed: Some(false),
            version: "1".into(),
        };
        let (cluster, database) = ("default".into(), "app".into());
        let record = RecordView::Lease(Box::new(lease));
        Loss::of(&View { cluster, database, record, nodes: Vec::new() }, me, Some(here))
    }

    #[test]
    fn a_record_that_does_not_say_what_its_holder_had_is_no_word_that_nothing_is_lost() {
        let said = loss(at(2, 7), Some(at(2, 7)));
        assert!(said.is_nothing() && said.to_string().contains("Nothing is lost"), "{said}");
        let unsaid = loss(at(2, 7), None);
        assert!(!unsaid.is_nothing() && unsaid.to_string().contains("no record says"), "{unsaid}");
        assert!(unsaid.last_holder.is_some());
    }
}
