//! A fixed set of rounds over each store. `REPLITE_STORE` names one, `REPLITE_SEED` says the first
//! round, `REPLITE_SECONDS` how long they take over each: 14400 for a night.
#![cfg(target_os = "linux")]

use std::path::PathBuf;
use std::time::Duration;

use replite_failover::round::Order;
use replite_failover::series::{Series, rounds};
use replite_failover::store::{Store, StoreKind};

/// The first seed over each store, and the seconds that a run of continuous integration takes, with
/// the last round. The six after the first seed over a directory have all that can be wrong with a
/// handoff.
const SERIES: [(&str, u64, u64); 4] =
    [("directory", 21_381, 120), ("members", 900, 80), ("etcd", 900, 35), ("objects", 900, 35)];

fn variable(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn clusters_keep_what_they_promise_whatever_fails() {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_failover"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let only = std::env::var("REPLITE_STORE").ok();
    for (name, seed, seconds) in SERIES {
        if only.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let store = StoreKind::named(name).unwrap();
        if runtime.block_on(Store::start(store, &binary)).unwrap().is_none() {
            println!("skipped: {name} is not here");
            continue;
        }
        println!("the record is kept by: {name}");
        let order = Order {
            binary: binary.clone(),
            dir: std::env::temp_dir().join(format!("replite-failover-{}-{name}", std::process::id())),
            faults: Vec::new(),
            nodes: None,
            fixed: false,
            store,
            keep: false,
        };
        let series = Series {
            seed: variable("REPLITE_SEED").unwrap_or(seed),
            rounds: u64::MAX,
            time: Some(Duration::from_secs(variable("REPLITE_SECONDS").unwrap_or(seconds))),
            first: true,
        };
        let failed = runtime.block_on(rounds(&order, series)).unwrap();
        assert_eq!(failed, [0; 0], "rounds of these seeds failed; what they did is above");
        // Nothing is left of rounds that held.
        std::fs::remove_dir(&order.dir).unwrap();
    }
}
