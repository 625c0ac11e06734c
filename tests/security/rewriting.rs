//! Bytes that are changed on their way.

use crate::relay::*;
use crate::support::*;
use crate::world::*;

/// Bytes of a direction whose fields are all tried: heads of records and of what is in the first.
const FIRST: usize = 100;

/// Positions for a direction of which so many bytes pass: three times as many where `REPLITE_ROUNDS`
/// is set. Each takes some tries of the replica, and so some seconds.
fn positions(length: usize) -> Vec<usize> {
    let more = std::env::var_os("REPLITE_ROUNDS").is_some();
    let fields: &[usize] =
        if more { &[1, 2, 3, 4, 5, 6, 9, 10, 11, 43, 44, 45, 46, 47] } else { &[1, 3, 5, 9, 44] };
    let dense = (0..FIRST).step_by(if more { 11 } else { 40 }).chain(fields.iter().copied());
    let parts = if more { 9 } else { 4 };
    let sparse = (1..parts).map(|n| FIRST + length.saturating_sub(FIRST) * n / parts);
    let mut all: Vec<usize> = dense.chain(sparse).filter(|at| *at < length).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// What came of a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    /// The line broke, and the replica said so.
    Said,
    /// The replica follows all the same.
    Harmless,
}

/// Does the fault to each connection until it was done twice, so that it has ended one, or until the
/// replica follows in spite of it.
async fn suffer(world: &World, relay: &Relay, replica: &replite::Db, fault: Fault) -> Outcome {
    let before = relay.done();
    relay.fault(Some(fault));
    relay.cut();
    comes(&format!("the place of {fault:?}"), || relay.done() > before).await;
    let (mut done, mut later, mut outcome) = (before, 0, None);
    comes(&format!("an end of {fault:?}"), || {
        // In this order: a fault that is done in between is counted, and what the connection before
        // it brought isn't taken for something that came through it.
        let at = replica.position();
        let through = relay.newest_is_faulted();
        let now = relay.done();
        if now > done {
            // What is committed from now on passes after the changed byte.
            (done, later) = (now, world.primary.position().unwrap().number());
        } else if through && at.is_some_and(|at| at.number() > later + 20) {
            outcome = Some(Outcome::Harmless);
        } else if done > before + 1 && replica.status().problem.is_some() {
            outcome = Some(Outcome::Said);
        }
        outcome.is_some()
    })
    .await;
    relay.fault(None);
    relay.cut();
    world.level(replica).await;
    outcome.unwrap()
}

/// The version in a record's head says nothing, and neither does the record that is there for
/// boxes between which know TLS 1.2 only. Neither is protected, for neither is read.
fn means_nothing(bytes: &[u8], at: usize) -> bool {
    let mut begins = 0;
    while let Some(head) = bytes.get(begins..begins + 5) {
        let next = begins + 5 + usize::from(u16::from_be_bytes([head[3], head[4]]));
        if at < next {
            return (begins + 1..begins + 3).contains(&at) || head[0] == 20;
        }
        begins = next;
    }
    false
}

async fn rewrites(door: Door, way: Way) {
    let world = World::new().await;
    let relay = world.relay(door).await;
    let replica = world.replica("r.db", door, &relay).await;
    within("a state", replica.ready()).await.unwrap();
    let writer = world.writer();
    // How much passes until a connection stands and some rows have come.
    let came = relay.came();
    relay.cut();
    comes("another connection", || relay.came() > came).await;
    world.level(&replica).await;
    world.write(50).await;
    world.level(&replica).await;
    let whole = relay.passed().pop().unwrap();
    for (n, at) in positions(whole.way(way).len()).into_iter().enumerate() {
        let deed = match n % 4 {
            0 => Deed::Flip(1),
            1 => Deed::Overwrite,
            2 => Deed::Flip(0x80),
            _ => Deed::Insert,
        };
        let outcome = suffer(&world, &relay, &replica, Fault { way, at, deed }).await;
        // What is in the clear before a mounted door may be changed without a consequence. Where
        // records begin is each connection's own.
        let may_pass = door == Door::Mounted
            || matches!(deed, Deed::Flip(_)) && means_nothing(relay.last_faulted().way(way), at);
        assert!(outcome == Outcome::Said || may_pass, "{deed:?} at {at} of {way:?} did nothing");
    }
    writer.end().await;
    world.end(vec![replica], &[&relay]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_on_its_way_to_the_own_listener_ends_the_line() {
    rewrites(Door::Own, Way::Up).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_on_its_way_from_the_own_listener_ends_the_line() {
    rewrites(Door::Own, Way::Down).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_on_its_way_to_a_mounted_endpoint_changes_no_row() {
    rewrites(Door::Mounted, Way::Up).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_changed_on_its_way_from_a_mounted_endpoint_changes_no_row() {
    rewrites(Door::Mounted, Way::Down).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_left_out_end_the_line() {
    let world = World::new().await;
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        within("a state", replica.ready()).await.unwrap();
        let writer = world.writer();
        for (way, at, bytes) in
            [(Way::Up, 0, 1), (Way::Down, 0, 5), (Way::Down, 4000, 22), (Way::Down, 20_000, 4096)]
        {
            let fault = Fault { way, at, deed: Deed::Drop(bytes) };
            assert_eq!(suffer(&world, &relay, &replica, fault).await, Outcome::Said, "{door:?} {fault:?}");
        }
        writer.end().await;
        world.level(&replica).await;
        assert_nothing_seen(&relay);
        replica.shutdown().await;
        assert_prefix(world.primary.path(), replica.path());
    }
    world.end(Vec::new(), &[]).await;
}
