//! What a recorder of the application's gets.

use std::collections::BTreeMap;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshot};

use replite::Db;
use tower::ServiceExt;

use crate::fork::*;
use crate::support::*;

const GUIDE: &str = include_str!("../../docs/guide.md");

/// Adds what was counted since the last time, and notes the gauges.
fn count(counters: &mut BTreeMap<String, u64>, gauges: &mut BTreeMap<String, f64>, snapshot: Snapshot) {
    for (key, unit, description, value) in snapshot.into_vec() {
        let (key, labels): (_, Vec<_>) = (key.key().name().to_string(), key.key().labels().collect());
        assert!(GUIDE.contains(&format!("`{key}`")), "{key} is not in the guide");
        let of = labels.iter().find(|label| label.key() == "database").unwrap_or_else(|| panic!("{key}"));
        assert!(["app", "alone"].contains(&of.value()), "{key}: {labels:?}");
        assert!(unit.is_some() && description.is_some(), "it is not said what {key} is");
        match value {
            DebugValue::Counter(value) => *counters.entry(key).or_insert(0) += value,
            // Several nodes are called `app` here.
            DebugValue::Gauge(value) if of.value() == "alone" => drop(gauges.insert(key, value.into_inner())),
            DebugValue::Gauge(_) => {}
            DebugValue::Histogram(_) => panic!("{key} is neither"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_a_snapshot_and_a_verification_are_counted_under_the_names_of_the_guide() {
    // A recorder is there for all of a process.
    if !alone(a_heal_a_snapshot_and_a_verification_are_counted_under_the_names_of_the_guide) {
        return;
    }
    // Neither opening a database nor answering Prometheus installs a recorder: this one is the first.
    let other = Db::temporary(|config| config.database("other")).await.unwrap();
    let scrape = http::Request::get("/metrics").body(()).unwrap();
    assert_eq!(other.probes().oneshot(scrape).await.unwrap().status(), 200);
    other.shutdown().await;
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

    let (mut counters, mut gauges) = (BTreeMap::new(), BTreeMap::new());
    // A replica is ready before that is counted.
    until("the snapshot is counted", || {
        count(&mut counters, &mut gauges, counted.snapshot());
        counters.get("replite_snapshots_total").is_some_and(|times| *times > 0)
    });
    let alone = Db::temporary(|config| config.database("alone")).await.unwrap();
    until("its gauges are set", || {
        count(&mut counters, &mut gauges, counted.snapshot());
        gauges.get("replite_live") == Some(&1.0) && gauges.contains_key("replite_verification_holds")
    });
    assert!(gauges["replite_log_bytes"] > 0.0 && gauges["replite_replicas"] == 0.0, "{gauges:?}");
    assert!(gauges["replite_lag_seconds"].is_nan(), "a primary has none");
    alone.shutdown().await;
    count(&mut counters, &mut gauges, counted.snapshot());
    assert_eq!((gauges["replite_live"], gauges["replite_can_read"]), (0.0, 0.0));
    assert!(gauges["replite_log_bytes"].is_nan(), "what is closed has no log");
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
