//! Counters of what happens on a node, through the `metrics` crate: whatever recorder the application has installed gets them.
//! `docs/guide.md` names them all.

use crate::status::Event;

/// Counts what an event says.
pub(crate) fn count(database: &str, event: &Event) {
    let add = |name: &'static str, by: u64| {
        metrics::counter!(name, "database" => database.to_string()).increment(by);
    };
    let verified = |result: &'static str| {
        let labels = [("database", database.to_string()), ("result", result.to_string())];
        metrics::counter!("replite_verifications_total", &labels).increment(1);
    };
    match event {
        Event::Healed { pages, lost, .. } => {
            add("replite_heals_total", 1);
            add("replite_healed_pages_total", *pages);
            if lost.is_some() {
                add("replite_lost_branches_total", 1);
            }
        }
        Event::SnapshotFinished(_) => add("replite_snapshots_total", 1),
        Event::Disconnected(_) => add("replite_stream_losses_total", 1),
        Event::ReplicaJoined(_) => add("replite_replicas_joined_total", 1),
        Event::ReplicaLeft(_) => add("replite_replicas_left_total", 1),
        Event::Verified(_) => verified("holds"),
        Event::VerificationFailed(_) => verified("differs"),
        Event::Repaired { pages, .. } => add("replite_repaired_pages_total", pages.len() as u64),
        Event::LogGap(_) => add("replite_log_gaps_total", 1),
        Event::WalGrows { .. } => add("replite_wal_grows_total", 1),
        Event::LocksLost { .. } => add("replite_locks_lost_total", 1),
        Event::Stopped(_) => add("replite_stopped_total", 1),
        Event::OtherSecret { times, .. } => add("replite_other_secret_total", *times),
        Event::Role(_)
        | Event::Connected(_)
        | Event::SnapshotStarted(_)
        | Event::HealStarted(_)
        | Event::Kept(_)
        | Event::Missed(_) => {}
    }
}
