//! A deploy: each of three nodes is ended by SIGTERM and started again, under clients of all of
//! them and a writer that knows nothing of this crate. No request fails, and none is done twice.

use crate::app::ForwardWay;
use crate::fleet::roll;

/// How often all nodes are replaced. The figure `rolling_deploy_failed` does it more often.
const ROUNDS: usize = 3;

#[test]
fn a_rolling_deploy_fails_no_request() {
    none_fails(ForwardWay::Channel);
}

/// The nodes forward to each other's application address.
#[test]
fn a_rolling_deploy_fails_no_request_in_the_clear() {
    none_fails(ForwardWay::Http1);
}

fn none_fails(way: ForwardWay) {
    let (seen, ends) = roll(tempfile::tempdir().unwrap(), ROUNDS, way);
    println!(
        "{} requests, the longest took {:?}; the foreign writer wrote {} and was refused {} times; ends took {ends:?}",
        seen.requests, seen.longest, seen.foreign, seen.refused
    );
    assert!(seen.failed.is_empty(), "{} of {}: {:#?}", seen.failed.len(), seen.requests, seen.failed);
    assert!(seen.foreign > 0, "the foreign writer wrote nothing, and shows nothing");
}
