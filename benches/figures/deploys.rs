//! What a deploy costs: the pause of a handoff, and all nodes replaced one after the other.

use crate::app::ForwardWay;
use crate::fleet::{Fleet, roll};
use crate::home::directory;
use crate::{figure, quantile, rounds};

/// Tasks of the primary that write all the time.
const WRITERS: usize = 4;

/// Three processes under load hand the lease on. From the last commit that the one side was told of
/// to the first one on the other.
pub(crate) fn handoffs() {
    let fleet = Fleet::start(directory(), WRITERS, ForwardWay::Channel);
    let mut pauses = Vec::new();
    for _ in 0..rounds(&["handoff_pause_p50_ms", "handoff_pause_p99_ms"], 200) {
        pauses.push(fleet.hand_over().as_secs_f64() * 1e3);
    }
    println!("handoff_pause_p99_ms: {:.2} ms", quantile(&mut pauses, 0.99));
    figure("handoff_pause_p50_ms", "ms", pauses);
    fleet.end();
}

/// All three are replaced, one after the other, under eight clients and a foreign writer.
pub(crate) fn rolling() {
    let rounds = rounds(&["rolling_deploy_failed", "shutdown_ms"], 100);
    let (seen, ends) = roll(directory(), rounds, ForwardWay::Channel);
    for failed in &seen.failed {
        eprintln!("{failed}");
    }
    println!(
        "rolling_deploy_failed: {} of {} requests, {rounds} rounds over all nodes; the longest took {:.0} ms; a \
         foreign writer wrote {} and was refused {} times",
        seen.failed.len(),
        seen.requests,
        seen.longest.as_secs_f64() * 1e3,
        seen.foreign,
        seen.refused
    );
    figure("shutdown_ms", "ms", ends.iter().map(|end| end.as_secs_f64() * 1e3).collect());
}
