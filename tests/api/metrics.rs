//! What a recorder of the application's gets.

use std::collections::BTreeMap;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshot};

use crate::fork::*;
use crate::support::*;

const GUIDE: &str = include_str!("../../docs/guide.md");

/// Adds what was counted since the last time.
fn count(counters: &mut BTreeMap<String, u64>, snapshot: Snapshot) {
    for (key, _, _, value) in snapshot.into_vec() {
        let (key, labels): (_, Vec<_>) = (key.key().name().to_string(), key.key().labels().collect());
        assert!(GUIDE.contains(&format!("`{key}`")), "{key} is not in the guide");
        assert!(labels.iter().any(|l| l.key() == "database" && l.value() == "app"), "{key}: {labels:?}");
        let DebugValue::Counter(value) = value else { panic!("{key} is no counter") };
        *counters.entry(key).or_insert(0) += value;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_a_snapshot_and_a_verification_are_counted_under_the_names_of_the_guide() {
    // A recorder is there for all of a process.
    if !alone(a_heal_a_snapshot_and_a_verification_are_counted_under_the_names_of_the_guide) {
        return;
    }
    let recorder = DebuggingRecorder::new();
    let counted = recorder.snapshotter();
    recorder.install().unwrap();

    let fork = Fork::new();
    let a = open(fork.primary("a")).await;
    insert(&a, "before", 1).await;
    a.shutdown().await;
    fork.copy("a", "b");
    let (a, b) = (open(fork.primary("a")).await, open(fork.alone("b")).await);
    insert(&a, "kept", 1).await;
    insert(&b, "lost", 1).await;
    b.shutdown().await;
    let b = open(fork.replica("b")).await;
    until("the heal", || b.status().heals == 1);
    let c = open(fork.replica("c")).await;
    within("the snapshot", c.ready()).await.unwrap();
    assert!(c.verify().await.unwrap().holds());

    let mut counters = BTreeMap::new();
    // A replica is ready before that is counted.
    until("the snapshot is counted", || {
        count(&mut counters, counted.snapshot());
        counters.get("replite_snapshots_total").is_some_and(|times| *times > 0)
    });
    let expected = [
        ("replite_heals_total", 1),
        ("replite_lost_branches_total", 1),
        ("replite_snapshots_total", 1),
        ("replite_verifications_total", 1),
    ];
    for (name, value) in expected {
        assert_eq!(counters.get(name), Some(&value), "{name} in {counters:?}");
    }
    for (name, least) in [("replite_healed_pages_total", 1), ("replite_replicas_joined_total", 2)] {
        assert!(counters.get(name).is_some_and(|value| *value >= least), "{name} in {counters:?}");
    }
}
