//! The bytes stand still, or come one by one.

use std::time::{Duration, Instant};

use replite::Db;

use crate::relay::*;
use crate::support::*;
use crate::world::*;

/// A stream on which nothing comes counts as not connected after 2.5 s; the rest is for machines
/// that are busy.
const TOLD_WITHIN: Duration = Duration::from_secs(8);

/// Without a word of the primary that answers this node, the lag is unknown after 5 s.
const UNKNOWN_WITHIN: Duration = Duration::from_secs(12);

fn lag_is_unknown(replica: &Db) -> bool {
    replica.status().lag.is_some_and(|lag| lag.transactions.is_none())
}

async fn freezes(door: Door) {
    let world = World::new().await;
    let relay = world.relay(door).await;
    let replica = world.replica("r.db", door, &relay).await;
    world.level(&replica).await;
    for (up, down) in [(Flow::Stopped, Flow::Stopped), (Flow::Free, Flow::Stopped)] {
        comes("a stream", || replica.status().lag.is_some_and(|lag| lag.connected)).await;
        relay.flow(up, down);
        let frozen = Instant::now();
        let missed = world.write(3).await;
        comes("that it is not connected", || {
            let (status, health) = (replica.status(), replica.health());
            status.lag.is_some_and(|lag| !lag.connected) && !health.can_write && !health.reasons.is_empty()
        })
        .await;
        assert!(frozen.elapsed() < TOLD_WITHIN, "{:?}", frozen.elapsed());
        comes("that the lag is unknown", || lag_is_unknown(&replica)).await;
        assert!(frozen.elapsed() < UNKNOWN_WITHIN, "{:?}", frozen.elapsed());
        assert!(replica.position().unwrap().number() < missed.number());
        relay.flow(Flow::Free, Flow::Free);
        world.level(&replica).await;
        comes("all is well", || {
            let status = replica.status();
            status.problem.is_none() && status.lag.is_some_and(|lag| lag.connected)
        })
        .await;
    }
    world.end(vec![replica], &[&relay]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_to_the_own_listener_that_stands_still_is_said_within_seconds() {
    freezes(Door::Own).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_to_a_mounted_endpoint_that_stands_still_is_said_within_seconds() {
    freezes(Door::Mounted).await;
}

/// Nothing that the replica says arrives, and all that the primary says does: its silence ends the
/// stream, and the primary says that it has no replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_not_heard_any_more_is_not_counted_by_the_primary() {
    let world = World::new().await;
    let relay = world.relay(Door::Own).await;
    let replica = world.replica("r.db", Door::Own, &relay).await;
    world.level(&replica).await;
    relay.flow(Flow::Stopped, Flow::Free);
    // All that the primary says comes, and is no older than it says.
    world.level(&replica).await;
    comes("the primary's word", || world.primary.status().replicas.is_empty()).await;
    comes("the replica's word", || replica.status().lag.is_some_and(|lag| !lag.connected)).await;
    relay.flow(Flow::Free, Flow::Free);
    relay.cut();
    world.level(&replica).await;
    world.end(vec![replica], &[&relay]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_trickles_brings_nothing_by_halves_and_its_state_is_said_to_be_old() {
    let world = World::new().await;
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        relay.flow(Flow::Trickle, Flow::Trickle);
        let missed = world.write(3).await;
        comes("that its lag is unknown", || lag_is_unknown(&replica)).await;
        assert!(replica.position().unwrap().number() < missed.number());
        relay.flow(Flow::Free, Flow::Free);
        relay.cut();
        world.level(&replica).await;
        // No connection at all comes about by trickling.
        relay.flow(Flow::Trickle, Flow::Trickle);
        relay.cut();
        says(&replica, "that there is no line").await;
        relay.flow(Flow::Free, Flow::Free);
        relay.cut();
        world.level(&replica).await;
        assert_nothing_seen(&relay);
        replica.shutdown().await;
        assert_prefix(world.primary.path(), replica.path());
    }
    world.end(Vec::new(), &[]).await;
}
