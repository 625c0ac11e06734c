//! A deploy: each of three nodes is ended by SIGTERM and started again, under clients of all of
//! them and a writer that knows nothing of this crate. No request fails, and none is done twice.

use crate::fleet::roll;

/// How often all nodes are replaced. The figure `rolling_deploy_failed` does it more often.
const ROUNDS: usize = 3;

#[test]
fn a_rolling_deploy_fails_no_request() {
    let (seen, ends) = roll(tempfile::tempdir().unwrap(), ROUNDS);
    println!(
        "{} requests, the longest took {:?}; the foreign writer wrote {} and was refused {} times; ends took {ends:?}",
        seen.requests, seen.longest, seen.foreign, seen.refused
    );
    assert!(seen.failed.is_empty(), "{} of {}: {:#?}", seen.failed.len(), seen.requests, seen.failed);
    assert!(seen.foreign > 0, "the foreign writer wrote nothing, and shows nothing");
}
