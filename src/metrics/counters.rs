//! The counters: which there are, and what they count. The table of conditions says when each is
//! added to.

#[cfg(feature = "prometheus")]
use std::collections::BTreeMap;
#[cfg(feature = "prometheus")]
use std::sync::Mutex;

#[cfg(feature = "prometheus")]
use crate::lock::lock;

/// A counter.
#[derive(Debug)]
pub(crate) struct Counter {
    pub(crate) name: &'static str,
    pub(crate) help: &'static str,
    /// Its label beside the database's name, and all values of that.
    #[cfg_attr(not(feature = "prometheus"), allow(dead_code, reason = "a recorder learns them by itself"))]
    pub(crate) label: Option<(&'static str, &'static [&'static str])>,
}

const fn counter(name: &'static str, help: &'static str) -> Counter {
    Counter { name, help, label: None }
}

/// All of them.
pub(crate) const COUNTERS: &[Counter] = &[
    counter("replite_heals_total", "Heals that ended: the state here was led back to the primary's."),
    counter("replite_healed_pages_total", "Pages that came for heals."),
    counter("replite_lost_branches_total", "Heals whose replaced history was kept."),
    counter("replite_snapshots_total", "Snapshots that were taken over."),
    counter("replite_lag_unknown_total", "Times that a replica could not tell by how much it lags."),
    counter("replite_stream_losses_total", "Streams from the primary that ended."),
    counter("replite_replicas_joined_total", "Streams to replicas that began."),
    counter("replite_replicas_left_total", "Streams to replicas that ended."),
    Counter {
        name: "replite_verifications_total",
        help: "Verifications, by their result.",
        label: Some(("result", &["holds", "differs"])),
    },
    counter("replite_repaired_pages_total", "Bad pages of a primary that were written anew."),
    counter("replite_log_gaps_total", "Times that the log lost its past."),
    counter("replite_wal_grows_total", "Doublings of the WAL beyond its limit."),
    counter("replite_locks_lost_total", "Times that locks on the files were dropped."),
    counter("replite_stopped_total", "Times that replication of the database has stopped."),
    counter("replite_promotions_failed_total", "Times that this node failed to become the primary."),
    counter("replite_handoffs_total", "Leases that this node handed to another."),
    counter("replite_handoffs_failed_total", "Handoffs that did not come about."),
    counter("replite_leases_ended_total", "Leases of this node that ended before they were renewed."),
    counter("replite_lease_store_went_back_total", "Times that the lease's store went back."),
    counter("replite_operator_commands_total", "Commands that an operator gave to this node."),
    counter("replite_certificates_taken_total", "Times that other certificates were taken from the files."),
    counter("replite_certificates_not_taken_total", "Times that certificates could not be used."),
    counter("replite_other_secret_total", "Knocks with another secret at this node's endpoint."),
];

/// What a node that answers for itself has counted since it was opened.
#[cfg(feature = "prometheus")]
#[derive(Debug, Default)]
pub(crate) struct CounterStore(Mutex<BTreeMap<(&'static str, &'static str), u64>>);

#[cfg(feature = "prometheus")]
impl CounterStore {
    pub(crate) fn add(&self, name: &'static str, labels: &[(&'static str, &'static str)], by: u64) {
        let value = labels.first().map_or("", |(_, value)| value);
        let mut all = lock(&self.0);
        let count = all.entry((name, value)).or_default();
        *count = count.saturating_add(by);
    }

    /// By name and value of the label, which is empty where there is none.
    pub(crate) fn all(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        lock(&self.0).clone()
    }
}
