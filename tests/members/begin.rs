//! How members begin, whatever the order of their starts, and begin again.

use std::time::{Duration, Instant};

use replite::{Config, Db, Role, lease};

use crate::support::{LIMIT, secret, within};
use crate::world::*;

/// A database with something in it, that no node had.
async fn fill(world: &World, node: usize, value: i64) {
    let db = Db::open(world.config(node).lease(lease::Fixed::primary())).await.unwrap();
    write_on(&db, value).await.unwrap();
    end([db]).await;
    std::fs::remove_dir_all(world.state_directory(node)).unwrap();
}

/// None of them becomes the primary, for a time in which those that could would have; and what each
/// says has this in it.
async fn wait_and_say(dbs: &[Db], part: &str) {
    for db in dbs {
        comes(part, || words(db).contains(part)).await;
    }
    let until = Instant::now() + TIME;
    while Instant::now() < until {
        for db in dbs {
            assert_ne!(db.role(), Role::Primary, "{}", words(db));
            assert!(!db.members().await.unwrap().agree);
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_find_a_primary_in_whatever_order_they_start() {
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        let world = World::new(3);
        let first = world.open(order[0]).await;
        // It waits for the others, and says for which.
        comes("the first one's words", || words(&first).contains(&world.url(order[2]))).await;
        let mut dbs = vec![first, world.open(order[1]).await, world.open(order[2]).await];
        let begun = Instant::now();
        let txid = write(&dbs, 1).await;
        all_have(&dbs, txid).await;
        assert_eq!(dbs.iter().filter(|db| db.role() == Role::Primary).count(), 1);
        eprintln!("{order:?}: a primary {:?} after the last one's start", begun.elapsed());
        for db in &dbs {
            members_are(db, "three voters", |view| all_vote(view, 3) && raft_leader(view).is_some()).await;
        }
        // One that ends in good order leaves the lease to another.
        let gone = dbs.remove(primary(&dbs).await);
        end([gone]).await;
        write(&dbs, 2).await;
        end(dbs).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_three_begin_nothing_and_say_who_is_missing() {
    let world = World::new(3);
    let mut dbs = vec![world.open(0).await, world.open(1).await];
    wait_and_say(&dbs, &format!("{} does not", world.url(2))).await;
    dbs.push(world.open(2).await);
    write(&dbs, 1).await;
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_whose_lists_differ_begin_nothing_and_say_so() {
    let world = World::with_more(3, 1);
    let odd = Db::open(world.config(2).lease(world.members_of([0, 2, 3]))).await.unwrap();
    let dbs = [world.open(0).await, world.open(1).await];
    wait_and_say(&dbs, &format!("{} names other members: ", world.url(2))).await;
    let said = words(&dbs[0]);
    assert!(said.contains(&world.url(3)), "{said}");
    end(dbs).await;
    end([odd]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_one_with_a_database_leads_first() {
    let world = World::new(3);
    fill(&world, 1, 7).await;
    let dbs = world.open_all().await;
    let txid = write(&dbs, 8).await;
    assert_eq!(primary(&dbs).await, 1);
    all_have(&dbs, txid).await;
    for db in &dbs {
        assert_eq!(values(db), [7, 8]);
    }
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_databases_none_is_chosen() {
    let world = World::new(3);
    fill(&world, 0, 7).await;
    fill(&world, 2, 8).await;
    let dbs = [world.open(0).await, world.open(1).await, world.open(2).await];
    let (one, other) = (world.url(0).min(world.url(2)), world.url(0).max(world.url(2)));
    wait_and_say(&dbs, &format!("{one} and {other} have databases with content")).await;
    end(dbs).await;
}

/// Another list may have had another history: no node with a state of a cluster begins one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_with_a_state_of_a_cluster_begins_nothing() {
    let world = World::new(3);
    let alone = || {
        let register = world.dir.path().join("lease");
        Db::open(world.config(1).lease(lease::Directory::new(register)).bootstrap(1))
    };
    let db = alone().await.unwrap();
    write(std::slice::from_ref(&db), 7).await;
    end([db]).await;
    let dbs = [world.open(0).await, world.open(1).await, world.open(2).await];
    wait_and_say(&dbs, &format!("{} has a state of a cluster", world.url(1))).await;
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_start_again_at_once_and_the_last_primary_goes_on() {
    let world = World::new(3);
    let dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    // The last one to end is the holder: there is no other to hand the lease to.
    let last = primary(&dbs).await;
    for (node, db) in dbs.iter().enumerate() {
        if node != last {
            end([db.clone()]).await;
        }
    }
    end([dbs[last].clone()]).await;
    drop(dbs);
    let begun = Instant::now();
    let dbs = world.open_all().await;
    write(&dbs, 2).await;
    eprintln!("a primary {:?} after the start of all three", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    end(dbs).await;
}

/// No list of members for a node alone is needed for tests and development: one is a majority.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_is_a_cluster() {
    let world = World::new(1);
    let db = world.open(0).await;
    write(std::slice::from_ref(&db), 1).await;
    end([db]).await;
    let db = world.open(0).await;
    write(std::slice::from_ref(&db), 2).await;
    assert_eq!(values(&db), [1, 2]);
    end([db]).await;
}

/// A replica that is configured with addresses that are no members' says why it has no record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_members_says_that_none_answers() {
    let world = World::with_more(1, 1);
    let config = Config::new(world.path(1));
    std::fs::create_dir_all(world.path(1).parent().unwrap()).unwrap();
    let config = config.database("app").secret(secret()).listen(([127, 0, 0, 1], world.ports[1]).into());
    let db = Db::open(config.lease(world.members()).lease_time(TIME)).await.unwrap();
    comes("the reason", || words(&db).contains(&world.url(0))).await;
    let member = world.open(0).await;
    within("a state", db.wait_for_timeout(write(std::slice::from_ref(&member), 1).await, LIMIT))
        .await
        .unwrap();
    end([db, member]).await;
}
