//! A replica's connection is led to another node than the one that it dialled, byte for byte.

use replite::Db;

use crate::support::*;
use crate::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_led_to_another_node_takes_nothing_there_and_says_why() {
    let world = World::new().await;
    let dir = tempfile::tempdir().unwrap();
    let other = |name: &str| primary(&dir.path().join(name), 0);
    // Others with the same secret, and another replica, which has the same rows.
    let cluster = Db::open(other("cluster.db").cluster("other")).await.unwrap();
    let database = Db::open(other("database.db").database("other")).await.unwrap();
    let stranger = Db::open(other("stranger.db").secret(replite::Secret::generate().unwrap())).await.unwrap();
    let straight = world.relay(Door::Own).await;
    let beside = world.config("beside.db", Door::Own, &straight).listen("127.0.0.1:0".parse().unwrap());
    let beside = Db::open(beside).await.unwrap();
    world.level(&beside).await;
    for db in [&cluster, &database, &stranger] {
        insert(db, "ATTACKER", 1).await;
    }
    let mut relays = Vec::new();
    let mut replicas = vec![beside];
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        for (db, word) in [
            (&cluster, "cluster \"other\""),
            (&database, "does not serve database"),
            (&stranger, "secret"),
            (&replicas[0], "not the primary"),
        ] {
            let at = match door {
                Door::Own => address_of(&db.node().addresses.replication),
                Door::Mounted => mount(db).await,
            };
            relay.lead_to(at);
            relay.cut();
            let missed = world.write(3).await;
            says_with(&replica, word, "where it is").await;
            assert!(replica.position().unwrap().number() < missed.number());
            assert!(!replica.health().can_write, "there is no way to the primary");
            relay.lead_to(world.at(door));
            relay.cut();
            world.level(&replica).await;
        }
        assert_eq!(replica.status().heals, 0);
        replicas.push(replica);
        relays.push(relay);
    }
    world.end(replicas, &relays.iter().collect::<Vec<_>>()).await;
    for db in [cluster, database, stranger] {
        assert_eq!(count(&db), 1);
        db.shutdown().await;
    }
}

/// What one door's replica says is of no use at the other door, whose node speaks another outer
/// protocol.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_led_to_the_other_door_is_told_so() {
    let world = World::new().await;
    let mut relays = Vec::new();
    let mut replicas = Vec::new();
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        replicas.push(replica);
        relays.push(relay);
    }
    relays[0].lead_to(world.at(Door::Mounted));
    relays[0].cut();
    says_with(&replicas[0], "speaks no TLS", "the door").await;
    relays[0].lead_to(world.at(Door::Own));
    relays[0].cut();
    // The own listener has both.
    relays[1].lead_to(world.at(Door::Own));
    relays[1].cut();
    for replica in &replicas {
        world.level(replica).await;
    }
    world.end(replicas, &relays.iter().collect::<Vec<_>>()).await;
}
