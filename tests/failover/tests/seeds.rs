//! A fixed set of rounds. `REPLITE_SEED` says the first one, `REPLITE_SECONDS` how long they
//! take: 14400 for a night.
#![cfg(target_os = "linux")]

use std::path::PathBuf;
use std::time::Duration;

use replite_failover::round::Order;
use replite_failover::series::{Series, rounds};

/// What a run of continuous integration takes, with the last round.
const SECONDS: u64 = 210;
/// The next six have all that can be wrong with a handoff.
const SEED: u64 = 21_381;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn clusters_keep_what_they_promise_whatever_fails() {
    let order = Order {
        binary: PathBuf::from(env!("CARGO_BIN_EXE_failover")),
        dir: std::env::temp_dir().join(format!("replite-failover-{}", std::process::id())),
        faults: Vec::new(),
        nodes: None,
        fixed: false,
        keep: false,
    };
    let series = Series {
        seed: variable("REPLITE_SEED").unwrap_or(SEED),
        rounds: u64::MAX,
        time: Some(Duration::from_secs(variable("REPLITE_SECONDS").unwrap_or(SECONDS))),
        first: true,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let failed = runtime.block_on(rounds(&order, series)).unwrap();
    assert_eq!(failed, [0; 0], "rounds of these seeds failed; what they did is above");
    // Nothing is left of rounds that held.
    std::fs::remove_dir(&order.dir).unwrap();
}
