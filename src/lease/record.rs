//! The record of a lease: JSON that an operator can read, with a checksum.

mod json;

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::peer::{Incarnation, NodeId};
use crate::status::{Addresses, PeerInfo};
use crate::txid::{Epoch, Position};

/// The most bytes that a record has.
pub(crate) const RECORD_MAX_BYTES: usize = 16 * 1024;
/// The most nodes that a record names.
pub(crate) const KNOWN_NODES_MAX: usize = 64;
/// Nodes that may start a cluster together. The record has room for all of them, each with URLs of
/// [`URLS_MAX_BYTES`] in sum, and without labels.
pub(crate) const STARTERS_MAX: usize = 16;
/// The most bytes that the URLs of such a node have in sum.
pub(crate) const URLS_MAX_BYTES: usize = 512;
/// The longest id of a boot: that of Linux has 36 bytes.
pub(crate) const BOOT_MAX_BYTES: usize = 64;
/// How long a record may count when it is not renewed.
pub(crate) const LEASE_TIMES: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(60);

/// Names one swap: random, and fresh for each. A record is ours when it carries an attempt that we
/// sent.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Attempt(pub(crate) u128);

/// What the register holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    pub(crate) cluster: String,
    pub(crate) database: String,
    pub(crate) attempt: Attempt,
    pub(crate) state: LeaseState,
    /// How long the record counts when it is not renewed.
    pub(crate) lease_time: Duration,
    /// An operator wants no election.
    pub(crate) paused: bool,
    /// The nodes that are known, the best known first. What does not fit is left out.
    pub(crate) nodes: Vec<KnownNode>,
}

/// What a record says of the lease.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum LeaseState {
    /// A cluster that starts for the first time: its nodes enter themselves, and none leads.
    Gathering,
    Held(Tenure),
    /// The holder ended in good order, with this as its last state.
    Released(Tenure),
}

/// The holder, its epoch, and how far it was when it wrote the record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Tenure {
    pub(crate) holder: Holder,
    pub(crate) epoch: Epoch,
    /// The state that the epoch goes on from. None: a first epoch, or one that an operator asked
    /// for, whose holder has not yet opened the database as the primary and so can't name it.
    pub(crate) began: Option<Position>,
    /// The holder's time since it took this epoch.
    pub(crate) lease_clock: Duration,
    /// The holder's position, read after the clock. None as long as `began` is.
    pub(crate) position: Option<Position>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Holder {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    /// The id of the boot of its machine; empty where the system has none.
    pub(crate) boot: String,
    pub(crate) addresses: Addresses,
}

/// A node that the one who wrote the record knew of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct KnownNode {
    pub(crate) peer: PeerInfo,
    /// While the nodes gather: it has a state of the cluster already.
    pub(crate) has_state: bool,
    /// While they gather: its database has something in it.
    pub(crate) has_content: bool,
}

/// Why bytes are no record of this database's lease.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// It has more than [`RECORD_MAX_BYTES`].
    #[error("the lease's record has {0} bytes; at most {RECORD_MAX_BYTES} are possible")]
    TooLong(usize),
    /// What is wrong with it.
    #[error("the lease's record is garbled: {0}")]
    Garbled(String),
    /// A later version of the crate wrote it. It stays as it is.
    #[error("the lease's record has format {0}, which this version of replite does not know")]
    Newer(u64),
    /// It is that of another cluster, with this name.
    #[error("the lease's record is that of cluster {0:?}")]
    OtherCluster(String),
    /// It is that of another database, with this name.
    #[error("the lease's record is that of database {0:?}")]
    OtherDatabase(String),
}

#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use json::fuzz_record;
#[cfg(test)]
pub(crate) use json::seeds;
