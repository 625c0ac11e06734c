//! `failover [--seed S] [--rounds N] [--seconds T] [--faults a,b] [--nodes n] [--dir D] [--fixed yes]
//! [--keep yes] [--first yes] [--plan yes] [--store S]` checks, or says what it would do. `failover node ..` is
//! one of its nodes. `failover list` names the faults.

use std::collections::BTreeMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use replite_failover::faults::FAULTS;
use replite_failover::round::{Order, drawn};
use replite_failover::series::{Series, rounds};
use replite_failover::store::StoreKind;

fn main() -> Result<ExitCode, Box<dyn Error>> {
    match std::env::args().nth(1).as_deref() {
        Some("node") => return replite_failover::node::run().map(|()| ExitCode::SUCCESS),
        Some("list") => {
            FAULTS.iter().for_each(|(name, weight, place)| println!("{name:24} {weight:3} {place:?}"));
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let mut words = std::env::args().skip(1);
    let mut arguments = BTreeMap::new();
    while let Some(name) = words.next() {
        let value = words.next().ok_or_else(|| format!("{name} has no value"))?;
        arguments.insert(name.trim_start_matches("--").to_string(), value);
    }
    let mut argument = |name: &str| arguments.remove(name);
    let faults = argument("faults").map(|list| list.split(',').map(str::to_string).collect::<Vec<_>>());
    let faults = faults.unwrap_or_default();
    if let Some(unknown) = faults.iter().find(|name| !FAULTS.iter().any(|fault| fault.0 == **name)) {
        return Err(format!("there is no fault {unknown}; `list` names them").into());
    }
    let order = Order {
        binary: std::env::current_exe()?,
        dir: argument("dir").map_or_else(|| std::env::temp_dir().join("replite-failover"), Into::into),
        faults,
        nodes: argument("nodes").map(|nodes| nodes.parse()).transpose()?,
        fixed: argument("fixed").is_some(),
        store: argument("store").map_or(Ok(StoreKind::Directory), |name| StoreKind::named(&name))?,
        keep: argument("keep").is_some(),
    };
    let time = argument("seconds").map(|time| time.parse().map(Duration::from_secs)).transpose()?;
    let series = Series {
        seed: argument("seed").map_or(Ok(1), |seed| seed.parse())?,
        rounds: argument("rounds").map_or(Ok(if time.is_some() { u64::MAX } else { 10 }), |n| n.parse())?,
        time,
        first: argument("first").is_some(),
    };
    let plan = argument("plan").is_some();
    if let Some(unknown) = arguments.keys().next() {
        return Err(format!("what is --{unknown}?").into());
    }
    if plan {
        for seed in series.seed..series.seed.saturating_add(series.rounds) {
            let (_, setting, steps) = drawn(&order, seed);
            let names: Vec<&str> = steps.iter().map(|step| step.fault).collect();
            println!("{seed}: {} nodes: {}", setting.nodes, names.join(" "));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let failed = runtime.block_on(rounds(&order, series))?;
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
