//! What an operator sees of a lease and its nodes.

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::context::Description;
use crate::lease::Version;
use crate::lease::record::{LeaseState, Record};
use crate::operator::register::tenure;
use crate::peer::{Incarnation, NodeId, PeerKey};
use crate::status::{Addresses, Role, whole_millis};
use crate::txid::{Epoch, Position};

/// A lease and the nodes that it names, at one moment. `Display` makes a table for people, and
/// `Serialize` JSON for programs.
///
/// ```
/// use replite::operator::{LeaseStands, View};
///
/// fn alert(view: &View) -> Option<String> {
///     let Some(lease) = view.lease() else { return Some(view.to_string()) };
///     let led = lease.state == LeaseStands::Held && lease.renewed == Some(true);
///     (!led).then(|| "there is no primary".to_string())
/// }
/// # let _ = alert;
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct View {
    /// The cluster that was asked for.
    pub cluster: String,
    /// The database that was asked for.
    pub database: String,
    /// What the store has.
    pub record: RecordView,
    /// The nodes that the record names, its holder first, and those whose addresses were given.
    /// Without a secret none of them is asked.
    pub nodes: Vec<NodeView>,
}

/// What a lease's store has.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "found", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RecordView {
    /// There is no record.
    Nothing,
    /// The store can't be read.
    #[non_exhaustive]
    Unreachable {
        /// Why.
        why: String,
    },
    /// What is there is garbled, of a newer version, or that of another cluster or database.
    #[non_exhaustive]
    Unusable {
        /// What is wrong with it.
        why: String,
    },
    /// The lease was moved to another store, and no node leads by this one.
    #[non_exhaustive]
    Moved {
        /// Where to, as the operator called it.
        to: String,
    },
    /// A record of this database's lease.
    Lease(Box<LeaseView>),
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct LeaseView {
    /// Whether a node holds it.
    pub state: LeaseStands,
    /// The node that holds it, or held it last.
    pub holder: Option<HolderView>,
    /// How long the record counts when it is not renewed. JSON has it in milliseconds, as
    /// `lease_time_ms`.
    #[serde(rename = "lease_time_ms", serialize_with = "millis")]
    pub lease_time: Duration,
    /// An operator wants no election.
    pub paused: bool,
    /// Whether it was renewed while it was watched for half of its time. None where it is not
    /// held, or where the store did not say.
    pub renewed: Option<bool>,
    /// The store's name for this very record.
    pub version: String,
}

/// What is going on with a lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LeaseStands {
    /// The cluster starts for the first time, and its nodes come together.
    Gathering,
    /// A node holds it, or held it when it was renewed last.
    Held,
    /// Its last holder gave it back.
    Released,
}

/// The holder of a lease, as the record has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct HolderView {
    /// The node.
    pub node: NodeId,
    /// Its run.
    pub incarnation: Incarnation,
    /// Where it is.
    pub addresses: Addresses,
    /// The epoch that it leads.
    pub epoch: Epoch,
    /// The time since it took this epoch, when it wrote the record. JSON has it in milliseconds, as
    /// `held_ms`.
    #[serde(rename = "held_ms", serialize_with = "millis")]
    pub held: Duration,
    /// How far it was then.
    pub position: Option<Position>,
}

/// A node, and what it says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct NodeView {
    /// Its id: by the record, or by its own answer.
    pub node: Option<NodeId>,
    /// Its replication endpoint.
    pub url: String,
    /// Whether the record names it.
    pub in_record: bool,
    /// What it says of itself.
    pub answer: Option<NodeAnswer>,
    /// Why there is no answer.
    pub problem: Option<String>,
}

/// How a node stands, as it says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct NodeAnswer {
    /// Where it says that it can be reached.
    pub addresses: Addresses,
    /// Its key, which it has proved to the one that asked; over a connection without TLS it only
    /// says so. None in a build without TLS.
    pub key: Option<PeerKey>,
    /// What it does.
    pub role: Role,
    /// The newest epoch of its history.
    pub epoch: Epoch,
    /// The highest number of an epoch that it has heard of.
    pub highest_epoch: u64,
    /// How far it is.
    pub position: Option<Position>,
    /// The primary that it knows.
    pub primary: Option<NodeId>,
    /// Whether it would take the lease, were the lease free and it the best.
    pub fit: bool,
    /// Why it would not.
    pub why_not: Option<String>,
    /// What it waits for, while there is no primary.
    pub waits_for: Option<String>,
    /// Whether it is about to end.
    pub draining: bool,
    /// Whether the record, as this node saw it last, says that elections are paused.
    pub paused: Option<bool>,
    /// What is wrong with it, for as long as it lasts.
    pub problem: Option<String>,
}

fn millis<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(whole_millis(*time))
}

impl View {
    /// The lease, if there is one that can be used.
    pub fn lease(&self) -> Option<&LeaseView> {
        match &self.record {
            RecordView::Lease(lease) => Some(lease),
            _ => None,
        }
    }

    /// Whether neither the store nor a node could be reached.
    pub fn is_dark(&self) -> bool {
        let unreachable = matches!(self.record, RecordView::Unreachable { .. });
        unreachable && self.nodes.iter().all(|node| node.answer.is_none())
    }
}

impl LeaseView {
    pub(super) fn of(record: &Record, version: &Version, renewed: Option<bool>) -> LeaseView {
        let state = match record.state {
            LeaseState::Gathering => LeaseStands::Gathering,
            LeaseState::Held(_) => LeaseStands::Held,
            LeaseState::Released(_) => LeaseStands::Released,
        };
        let holder = tenure(record).map(|tenure| HolderView {
            node: tenure.holder.node,
            incarnation: tenure.holder.incarnation,
            addresses: tenure.holder.addresses.clone(),
            epoch: tenure.epoch,
            held: tenure.lease_clock,
            position: tenure.position,
        });
        let (lease_time, paused) = (record.lease_time, record.paused);
        LeaseView { state, holder, lease_time, paused, renewed, version: version.as_str().to_owned() }
    }
}

impl From<Description> for NodeAnswer {
    fn from(said: Description) -> NodeAnswer {
        NodeAnswer {
            addresses: said.peer.addresses,
            key: said.key,
            role: said.role,
            epoch: said.epoch,
            highest_epoch: said.heard,
            position: said.position,
            primary: said.primary,
            fit: said.fit,
            why_not: said.why_not,
            waits_for: said.waits_for,
            draining: said.draining,
            paused: said.paused,
            problem: said.problem,
        }
    }
}
