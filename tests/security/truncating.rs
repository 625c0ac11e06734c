//! Connections that end where nobody meant them to: with a clean end or a reset, within a
//! transaction, a snapshot or a heal.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::Db;

use crate::relay::*;
use crate::support::*;
use crate::world::*;

fn seed() -> StdRng {
    let seed = std::env::var("REPLITE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random());
    println!("REPLITE_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Transactions that are longer than what TLS or HTTP carries at once.
async fn large(world: &World) {
    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
        let sql = "UPDATE t SET v = zeroblob(0) WHERE n < 3; CREATE TABLE IF NOT EXISTS big(v);
            INSERT INTO big WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 40)
            SELECT randomblob(8000) FROM c; DELETE FROM big WHERE rowid % 2";
        Ok::<_, replite::Error>(tx.execute_batch(sql)?)
    };
    world.primary.write(write).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_cut_within_transactions_is_said_and_nothing_is_half_taken() {
    let mut random = seed();
    let world = World::new().await;
    let (mut relays, mut replicas) = (Vec::new(), Vec::new());
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        for round in 0..16 {
            let deed = if round % 2 == 0 { Deed::Finish } else { Deed::Reset };
            let way = if round % 4 < 3 { Way::Down } else { Way::Up };
            let most = if way == Way::Down { 400_000 } else { 3000 };
            let at = random.random_range(0..most);
            let before = relay.done();
            relay.fault(Some(Fault { way, at, deed }));
            relay.cut();
            within("the cut", async {
                while relay.done() == before {
                    large(&world).await;
                }
            })
            .await;
            says(&replica, "that it is cut").await;
            relay.fault(None);
            relay.cut();
            world.level(&replica).await;
        }
        assert_eq!(replica.status().heals, 0);
        replicas.push(replica);
        relays.push(relay);
    }
    world.end(replicas, &relays.iter().collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_cut_within_a_snapshot_gives_no_state_and_goes_on_later() {
    let mut random = seed();
    let world = World::new().await;
    for _ in 0..8 {
        large(&world).await;
    }
    for door in DOORS {
        for (name, deed) in [("finish", Deed::Finish), ("reset", Deed::Reset)] {
            let relay = world.relay(door).await;
            let at = random.random_range(20_000..400_000);
            relay.fault(Some(Fault { way: Way::Down, at, deed }));
            let replica = world.replica(&format!("{door:?}-{name}.db"), door, &relay).await;
            comes("the cut", || relay.done() > 0).await;
            says(&replica, "that it is cut").await;
            relay.fault(None);
            relay.cut();
            world.level(&replica).await;
            assert_nothing_seen(&relay);
            replica.shutdown().await;
            assert_prefix(world.primary.path(), replica.path());
            assert_same_pages(world.primary.path(), replica.path());
        }
    }
    world.end(Vec::new(), &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_that_is_cut_within_a_heal_leaves_a_state_that_is_healed_later() {
    let world = World::new().await;
    for _ in 0..4 {
        large(&world).await;
    }
    for door in DOORS {
        for deed in [Deed::Finish, Deed::Reset] {
            let relay = world.relay(door).await;
            let name = format!("{door:?}-{deed:?}.db");
            let replica = world.replica(&name, door, &relay).await;
            world.level(&replica).await;
            replica.shutdown().await;
            drop(replica);
            // Another program changes rows while the node is away.
            let path = world.dir.path().join(&name);
            plain(&path).execute_batch("UPDATE big SET v = randomblob(8000)").unwrap();
            relay.fault(Some(Fault { way: Way::Down, at: 30_000, deed }));
            let replica = Db::open(world.config(&name, door, &relay)).await.unwrap();
            comes("the cut", || relay.done() > 0).await;
            says(&replica, "that it is cut").await;
            relay.fault(None);
            relay.cut();
            world.level(&replica).await;
            comes("the heal", || replica.status().problem.is_none()).await;
            assert_nothing_seen(&relay);
            replica.shutdown().await;
            assert_prefix(world.primary.path(), replica.path());
            assert_same_pages(world.primary.path(), replica.path());
        }
    }
    world.end(Vec::new(), &[]).await;
}
