//! The gauges: which there are, and what each shows of a node.

#[cfg(feature = "prometheus")]
use std::collections::BTreeMap;

use std::time::UNIX_EPOCH;

use crate::status::{Health, Role, Status};

/// How a node stands at one time: what its gauges are made of.
#[derive(Clone, Debug)]
pub(crate) struct NodeFigures {
    pub(crate) status: Status,
    pub(crate) health: Health,
    pub(crate) sizes: FileSizes,
    pub(crate) load: NodeLoad,
    /// By name and value of the label.
    #[cfg(feature = "prometheus")]
    pub(crate) counters: BTreeMap<(&'static str, &'static str), u64>,
}

/// Bytes on the disk; none where that could not be seen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct FileSizes {
    pub(crate) database: Option<u64>,
    pub(crate) wal: Option<u64>,
    /// Of all that is in `lost`.
    pub(crate) lost: Option<u64>,
    /// How many things are in there.
    pub(crate) lost_entries: Option<u64>,
}

/// What is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct NodeLoad {
    /// Requests that wait for a primary.
    pub(crate) held: usize,
    /// Requests that are on their way to the primary.
    pub(crate) forwarded: usize,
    /// Requests that run here because this node is the primary.
    pub(crate) running: usize,
    /// Callers that wait for a transaction.
    pub(crate) waiting: usize,
    /// Writes that wait for the writer's thread.
    pub(crate) queued: usize,
    /// Connections that read, and how many of them are in use.
    pub(crate) readers: usize,
    pub(crate) reading: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum GaugeUnit {
    /// A number of things, or 1 for yes and 0 for no.
    Number,
    Bytes,
    Seconds,
}

/// A gauge.
pub(crate) struct Gauge {
    pub(crate) name: &'static str,
    #[cfg_attr(not(feature = "metrics"), allow(dead_code, reason = "Prometheus has it in the name"))]
    pub(crate) unit: GaugeUnit,
    pub(crate) help: &'static str,
    /// Beside the database's name.
    pub(crate) label: Option<(&'static str, &'static str)>,
    /// None: not known, or of no meaning for this node.
    pub(crate) value: fn(&NodeFigures) -> Option<f64>,
}

const fn number(name: &'static str, help: &'static str, value: fn(&NodeFigures) -> Option<f64>) -> Gauge {
    Gauge { name, unit: GaugeUnit::Number, help, label: None, value }
}

const fn bytes(name: &'static str, help: &'static str, value: fn(&NodeFigures) -> Option<f64>) -> Gauge {
    Gauge { name, unit: GaugeUnit::Bytes, help, label: None, value }
}

const fn seconds(name: &'static str, help: &'static str, value: fn(&NodeFigures) -> Option<f64>) -> Gauge {
    Gauge { name, unit: GaugeUnit::Seconds, help, label: None, value }
}

const fn role(name: &'static str, value: fn(&NodeFigures) -> Option<f64>) -> Gauge {
    let help = "1 for the role that the node has, 0 for the others.";
    Gauge { name: "replite_role", unit: GaugeUnit::Number, help, label: Some(("role", name)), value }
}

/// All of them; those of one name are next to each other.
pub(crate) const GAUGES: &[Gauge] = &[
    number("replite_live", "1 while the node's threads run.", |f| yes(f.health.live)),
    number("replite_can_read", "1 while reads are answered from a recent state.", |f| yes(f.health.can_read)),
    number("replite_can_write", "1 while writes can be done, here or by the primary.", |f| {
        yes(f.health.can_write)
    }),
    number("replite_problems", "Problems of the node that last.", |f| count(f.status.public_problems.len())),
    role("primary", |f| yes(f.status.role == Role::Primary)),
    role("replica", |f| yes(f.status.role == Role::Replica)),
    role("starting", |f| yes(f.status.role == Role::Starting)),
    role("electing", |f| yes(f.status.role == Role::Electing)),
    role("waiting", |f| yes(f.status.role == Role::Waiting)),
    role("promoting", |f| yes(f.status.role == Role::Promoting)),
    role("fencing", |f| yes(f.status.role == Role::Fencing)),
    role("stopped", |f| yes(f.status.role == Role::Stopped)),
    number("replite_epoch", "Number of the newest epoch that the node knows.", |f| {
        Some(f.status.epoch.number() as f64)
    }),
    number("replite_transaction", "Number of the newest transaction that the node has.", |f| {
        Some(f.status.position?.number() as f64)
    }),
    number("replite_lag_transactions", "Transactions that the primary has and this replica lacks.", |f| {
        Some(f.status.lag?.transactions? as f64)
    }),
    seconds("replite_lag_seconds", "Age of this replica's state, at most.", |f| {
        Some(f.status.lag?.age?.as_secs_f64())
    }),
    number("replite_stream_connected", "1 while the stream from the primary stands.", |f| {
        yes(f.status.lag?.connected)
    }),
    number("replite_replicas", "Replicas that are connected to this primary.", |f| {
        count(f.status.replicas.len())
    }),
    number("replite_replica_lag_transactions", "Transactions that the slowest of them lacks.", slowest),
    bytes("replite_database_bytes", "Size of the database file.", |f| size(f.sizes.database)),
    bytes("replite_wal_bytes", "Size of the WAL file.", |f| size(f.sizes.wal)),
    number("replite_wal_frames", "Frames in the WAL.", |f| Some(f64::from(f.status.wal_frames))),
    number("replite_wal_backfilled_frames", "Frames of the WAL that are in the database file, too.", |f| {
        Some(f64::from(f.status.backfilled_frames))
    }),
    bytes("replite_log_bytes", "Size of the retained log.", |f| Some(f.status.log_bytes as f64)),
    number("replite_log_transactions", "Transactions in the retained log.", |f| {
        let (start, end) = (f.status.log_start?.number(), f.status.position?.number());
        Some(end.saturating_sub(start) as f64)
    }),
    bytes("replite_lost_bytes", "Size of what the node has put aside in `lost`.", |f| size(f.sizes.lost)),
    number("replite_lost_entries", "Branches and files that the node has put aside in `lost`.", |f| {
        size(f.sizes.lost_entries)
    }),
    number("replite_held_requests", "Requests that wait for a primary.", |f| count(f.load.held)),
    number("replite_forwarded_requests", "Requests that are on their way to the primary.", |f| {
        count(f.load.forwarded)
    }),
    number("replite_running_requests", "Requests that run here because this node is the primary.", |f| {
        count(f.load.running)
    }),
    number("replite_waiting_reads", "Callers that wait for a transaction.", |f| count(f.load.waiting)),
    number("replite_queued_writes", "Writes that wait for the writer.", |f| count(f.load.queued)),
    number("replite_read_connections", "Connections that read.", |f| count(f.load.readers)),
    number("replite_read_connections_used", "Connections that read, and are in use.", |f| {
        count(f.load.reading)
    }),
    number("replite_verification_holds", "1 when the last verification found all pages right.", |f| {
        yes(f.status.verification.as_ref()?.holds())
    }),
    seconds("replite_verification_timestamp_seconds", "When the last verification ended, since 1970.", |f| {
        let ended = f.status.verification.as_ref()?.finished;
        Some(ended.duration_since(UNIX_EPOCH).ok()?.as_secs_f64())
    }),
];

fn yes(yes: bool) -> Option<f64> {
    Some(if yes { 1.0 } else { 0.0 })
}

fn count(number: usize) -> Option<f64> {
    Some(number as f64)
}

fn size(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| bytes as f64)
}

/// What the replica lacks that has the least.
fn slowest(figures: &NodeFigures) -> Option<f64> {
    let status = &figures.status;
    let here = status.position.filter(|_| status.role == Role::Primary)?.number();
    // One that has just come has not said yet what it has.
    let least = status.replicas.iter().filter_map(|replica| replica.applied).map(|at| at.number()).min()?;
    Some(here.saturating_sub(least) as f64)
}
