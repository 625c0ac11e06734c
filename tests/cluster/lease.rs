//! Whole nodes, one of which leads because it holds a lease.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use replite::lease::{self, Store};
use replite::testing::lease::{Faulty, Memory};
use replite::{Config, Db, Error, Role, Secret, Txid, WaitReason};

/// For all that has an end: these machines may be busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Three nodes and the register of their lease.
struct World {
    dir: tempfile::TempDir,
    memory: Memory,
    store: Faulty,
    nodes: usize,
}

impl World {
    fn new(nodes: usize) -> World {
        let memory = Memory::new().with_lease_time(Duration::from_secs(2));
        let dir = tempfile::tempdir().unwrap();
        World { store: Faulty::new(memory.clone(), 1), memory, dir, nodes }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name).join("app.db")
    }

    fn config(&self, name: &str) -> Config {
        let store: Arc<dyn Store> = Arc::new(self.store.clone());
        plain(&self.path(name)).lease(store).bootstrap(self.nodes)
    }

    async fn open(&self, name: &str) -> Db {
        Db::open(self.config(name)).await.unwrap()
    }

    async fn open_all(&self) -> Vec<Db> {
        let mut dbs = Vec::new();
        for name in ["a", "b", "c"].iter().take(self.nodes) {
            dbs.push(self.open(name).await);
        }
        for db in &dbs {
            within("a state", db.ready()).await.unwrap();
        }
        dbs
    }
}

fn plain(path: &Path) -> Config {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    Config::new(path)
        .database("app")
        .secret(Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap())
        .listen("127.0.0.1:0".parse().unwrap())
        .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)"))
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

async fn comes(what: &str, done: impl Fn() -> bool) {
    within(what, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// Which of them leads, once one does.
async fn leader(dbs: &[Db]) -> usize {
    comes("a primary", || dbs.iter().any(|db| db.role() == Role::Primary)).await;
    dbs.iter().position(|db| db.role() == Role::Primary).unwrap()
}

/// Writes through whichever leads.
async fn write(dbs: &[Db], value: i64) -> Txid {
    within("a write", async {
        loop {
            for db in dbs {
                let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                    Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (?1)", [value])?)
                };
                match db.write(insert).await {
                    Ok(commit) => return commit.txid.unwrap(),
                    Err(Error::NotPrimary { .. } | Error::ShutDown) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

fn rows(db: &Db) -> Vec<i64> {
    db.read(|conn| {
        let mut select = conn.prepare("SELECT v FROM t ORDER BY v")?;
        let rows = select.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
        Ok::<_, Error>(rows)
    })
    .unwrap()
}

async fn all_have(dbs: &[Db], txid: Txid) {
    for db in dbs {
        within("the transaction", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
    }
}

async fn end(dbs: Vec<Db>) {
    for db in dbs {
        within("the end", db.shutdown()).await;
    }
}

fn waits_for(db: &Db) -> Option<WaitReason> {
    db.roles().borrow().waits_for
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_start_for_the_first_time_find_one_primary_and_its_end_makes_another() {
    let world = World::new(3);
    let dbs = world.open_all().await;
    let first = leader(&dbs).await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    assert_eq!(dbs.iter().filter(|db| db.role() == Role::Primary).count(), 1);
    assert!(dbs[first].lease_left().unwrap() > Duration::ZERO);
    let status = dbs[first].status();
    assert!(status.decisions.iter().any(|decision| decision.what.contains("has the lease")), "{status:?}");

    // It gives the lease back with its last state, and nobody waits for the lease time.
    let mut left = dbs.clone();
    let gone = left.remove(first);
    within("the end", gone.shutdown()).await;
    let next = write(&left, 2).await;
    assert_eq!(next.epoch().number(), txid.epoch().number() + 1);
    all_have(&left, next).await;
    for db in &left {
        assert_eq!(rows(db), [1, 2]);
        assert!(db.lost().await.unwrap().is_empty());
    }
    // It comes back as a replica.
    let again = world.open(["a", "b", "c"][first]).await;
    all_have(std::slice::from_ref(&again), next).await;
    assert_eq!((again.role(), rows(&again)), (Role::Replica, vec![1, 2]));
    left.push(again);
    end(left).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_away_ends_the_lease_and_no_read_and_all_goes_on_when_it_is_back() {
    let world = World::new(3);
    let dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    let led = leader(&dbs).await;
    world.store.away(true);
    comes("the end of the lease", || dbs[led].role() != Role::Primary).await;
    assert_eq!(dbs[led].lease_left(), Some(Duration::ZERO));
    let refused = dbs[led].write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (9)", [])?)).await;
    assert!(matches!(refused, Err(Error::NotPrimary { .. })), "{refused:?}");
    comes("the reason", || {
        dbs.iter().enumerate().any(|(i, db)| i != led && waits_for(db) == Some(WaitReason::StoreUnavailable))
            || dbs.iter().all(|db| db.role() != Role::Primary)
    })
    .await;
    for db in &dbs {
        assert_eq!(rows(db), [1]);
        assert_ne!(db.role(), Role::Primary);
    }
    world.store.away(false);
    let txid = write(&dbs, 2).await;
    all_have(&dbs, txid).await;
    for db in &dbs {
        assert_eq!(rows(db), [1, 2]);
        assert!(db.lost().await.unwrap().is_empty());
    }
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_is_removed_or_garbled_under_a_living_primary_stops_nothing_for_long() {
    let world = World::new(2);
    let dbs = world.open_all().await;
    write(&dbs, 1).await;
    let before = leader(&dbs).await;
    world.memory.remove();
    comes("a new record", || world.memory.stored().is_some()).await;
    let txid = write(&dbs, 2).await;
    all_have(&dbs, txid).await;
    let told = dbs[before].status().decisions;
    assert_eq!(leader(&dbs).await, before, "{told:#?}");
    // What is no record of ours is left as it is, until an operator takes it away.
    world.memory.put("{\"format\": 1, \"checksum\": \"00\", \"record\": {}}");
    comes("the reason", || {
        dbs.iter().any(|db| waits_for(db) == Some(WaitReason::RecordNotOurs))
            && dbs.iter().all(|db| db.role() != Role::Primary)
    })
    .await;
    assert!(dbs.iter().any(|db| db.status().problem.is_some_and(|problem| problem.contains("record"))));
    assert_eq!(rows(&dbs[1 - before]), [1, 2]);
    let word = tokio::time::timeout(LIMIT, dbs[before].promote_unchecked()).await;
    assert!(matches!(word, Ok(Ok(()))), "{word:?}: {:#?}", dbs[before].status());
    let txid = write(&dbs, 3).await;
    all_have(&dbs, txid).await;
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_whose_record_is_gone_while_it_is_down_waits_for_a_word() {
    let world = World::new(2);
    let dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    end(dbs).await;
    world.memory.remove();
    let dbs = [world.open("b").await, world.open("a").await];
    comes("the reason", || dbs.iter().all(|db| waits_for(db) == Some(WaitReason::NoRecord))).await;
    for db in &dbs {
        assert_eq!(rows(db), [1], "reads go on");
    }
    within("the operator's word", dbs[0].promote_unchecked()).await.unwrap();
    let txid = write(&dbs, 2).await;
    all_have(&dbs, txid).await;
    end(dbs.into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_node_never_leads_by_itself_and_the_others_keep_what_it_replaces() {
    let world = World::new(2);
    let dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    end(dbs).await;
    // A node that was never there before, and none that has anything.
    let empty = world.open("new").await;
    comes("the reason", || waits_for(&empty) == Some(WaitReason::NoState)).await;
    within("the operator's word", empty.promote_unchecked()).await.unwrap();
    let txid = write(std::slice::from_ref(&empty), 7).await;
    let old = world.open("a").await;
    all_have(std::slice::from_ref(&old), txid).await;
    assert_eq!(rows(&old), [7]);
    comes("what is kept", || {
        let lost = old.path().with_file_name("app.db-replite").join("lost");
        std::fs::read_dir(lost).is_ok_and(|entries| entries.count() > 0)
    })
    .await;
    assert!(!old.lost().await.unwrap().is_empty());
    end(vec![old, empty]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_lost_its_keys_is_no_heir_and_has_them_back_from_the_next_primary() {
    let world = World::new(2);
    let dbs = world.open_all().await;
    let holder = leader(&dbs).await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    // Without a word: the record says that it has the lease.
    drop(dbs);
    let (name, other) = if holder == 0 { ("a", "b") } else { ("b", "a") };
    let keys = |name: &str| world.path(name).with_file_name("app.db-replite").join("database-keys");
    std::fs::remove_file(keys(name)).unwrap();
    let lost = world.open(name).await;
    comes("the reason", || waits_for(&lost) == Some(WaitReason::NoState)).await;
    assert_eq!(lost.position(), None, "nothing names what is here");
    let dbs = vec![lost, world.open(other).await];
    let txid = write(&dbs, 2).await;
    all_have(&dbs, txid).await;
    assert_eq!(leader(&dbs).await, 1);
    assert_eq!((rows(&dbs[0]), rows(&dbs[1])), (vec![1, 2], vec![1, 2]));
    assert_eq!(std::fs::read(keys(name)).unwrap(), std::fs::read(keys(other)).unwrap());
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_was_there_before_becomes_the_clusters_and_two_are_refused() {
    let world = World::new(2);
    let fill = |name: &str| {
        std::fs::create_dir_all(world.path(name).parent().unwrap()).unwrap();
        let conn = replite::rusqlite::Connection::open(world.path(name)).unwrap();
        conn.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v); INSERT INTO t(v) VALUES (5)").unwrap();
    };
    fill("a");
    fill("b");
    let dbs = [world.open("a").await, world.open("b").await];
    comes("the reason", || dbs.iter().any(|db| waits_for(db) == Some(WaitReason::SeveralDatabases))).await;
    end(dbs.into()).await;
    // The operator keeps one of them.
    std::fs::remove_dir_all(world.dir.path().join("b")).unwrap();
    world.memory.remove();
    let dbs = [world.open("b").await, world.open("a").await];
    let txid = write(&dbs, 6).await;
    all_have(&dbs, txid).await;
    assert_eq!((leader(&dbs).await, rows(&dbs[0])), (1, vec![5, 6]));
    end(dbs.into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_the_application_fails_goes_to_another_node() {
    let world = World::new(2);
    let fails = Arc::new(AtomicBool::new(false));
    let open = async |name: &str| {
        let fails = fails.clone();
        let hook = move |_: Db| {
            let fails = fails.load(Ordering::Acquire);
            async move { if fails { Err(Error::Config("not now".into())) } else { Ok(()) } }
        };
        Db::open(world.config(name).on_promote(hook)).await.unwrap()
    };
    let mut dbs = [open("a").await, open("b").await];
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    let led = leader(&dbs).await;
    fails.store(true, Ordering::Release);
    within("the end", dbs[led].shutdown()).await;
    let other = &dbs[1 - led];
    comes("the reason", || waits_for(other) == Some(WaitReason::Unfit)).await;
    assert_eq!(rows(other), [1], "reads go on");
    let told = other.status().decisions;
    assert!(told.iter().any(|decision| decision.what.contains("back")), "{told:?}");
    // Another one, whose application can.
    let name = ["a", "b"][led];
    dbs[led] = world.open(name).await;
    let txid = write(&dbs, 2).await;
    assert_eq!(leader(&dbs).await, led);
    all_have(&dbs, txid).await;
    // The first one tries again when it is its turn.
    fails.store(false, Ordering::Release);
    within("the end", dbs[led].shutdown()).await;
    write(&dbs, 3).await;
    assert_eq!(dbs[1 - led].role(), Role::Primary);
    end(dbs.into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_goes_from_a_fixed_primary_to_a_lease_and_back_one_node_at_a_time() {
    let world = World::new(2);
    let fixed = |name: &str, listen: Option<std::net::SocketAddr>| {
        let config = plain(&world.path(name));
        match listen {
            Some(address) => config.listen(address),
            None => config,
        }
    };
    let p = Db::open(fixed("p", None)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let address: std::net::SocketAddr = url.split('/').nth(2).unwrap().parse().unwrap();
    let r = Db::open(fixed("r", None).lease(lease::Fixed::replica_of(&url))).await.unwrap();
    let txid = write(std::slice::from_ref(&p), 1).await;
    all_have(std::slice::from_ref(&r), txid).await;

    // To a lease: the primary first, by an operator's word.
    within("the end", p.shutdown()).await;
    drop(p);
    let p = Db::open(world.config("p").listen(address)).await.unwrap();
    comes("the reason", || waits_for(&p) == Some(WaitReason::NoRecord)).await;
    within("the operator's word", p.promote_unchecked()).await.unwrap();
    let txid = write(std::slice::from_ref(&p), 2).await;
    all_have(std::slice::from_ref(&r), txid).await;
    within("the end", r.shutdown()).await;
    drop(r);
    let r = world.open("r").await;
    let txid = write(std::slice::from_ref(&p), 3).await;
    all_have(std::slice::from_ref(&r), txid).await;

    // And back: the replicas first.
    within("the end", r.shutdown()).await;
    drop(r);
    let r = Db::open(fixed("r", None).lease(lease::Fixed::replica_of(&url))).await.unwrap();
    let txid = write(std::slice::from_ref(&p), 4).await;
    all_have(std::slice::from_ref(&r), txid).await;
    within("the end", p.shutdown()).await;
    drop(p);
    let p = Db::open(fixed("p", Some(address))).await.unwrap();
    let txid = write(std::slice::from_ref(&p), 5).await;
    all_have(std::slice::from_ref(&r), txid).await;
    for db in [&p, &r] {
        assert_eq!(rows(db), [1, 2, 3, 4, 5]);
        assert!(db.lost().await.unwrap().is_empty());
    }
    end(vec![r, p]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_down_at_once_come_back_in_any_order_with_all_that_was_acknowledged() {
    let world = World::new(3);
    let mut acknowledged = Vec::new();
    for (round, order) in [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]].iter().enumerate() {
        let mut dbs = Vec::new();
        for name in order {
            dbs.push(world.open(name).await);
        }
        for value in 0..5 {
            let value = round as i64 * 10 + value;
            write(&dbs, value).await;
            acknowledged.push(value);
        }
        let txid = write(&dbs, 1000 + round as i64).await;
        acknowledged.push(1000 + round as i64);
        all_have(&dbs, txid).await;
        acknowledged.sort_unstable();
        for db in &dbs {
            assert_eq!(rows(db), acknowledged);
            assert!(db.lost().await.unwrap().is_empty());
        }
        // Without a word: the last handles go, and no lease is given back.
        drop(dbs);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_loses_answers_and_comes_late_never_makes_two_primaries() {
    let world = World::new(3);
    let dbs = world.open_all().await;
    world.store.lose_answers(0.2);
    world.store.lose_requests(0.1);
    world.store.read_old(0.2);
    world.store.delay(0.1, Duration::from_millis(300));
    let mut last = None;
    for value in 0..60 {
        let txid = write(&dbs, value).await;
        assert!(last.is_none_or(|last: Txid| txid.number() > last.number() && txid.epoch() >= last.epoch()));
        last = Some(txid);
        if value % 20 == 10 {
            let led = leader(&dbs).await;
            // What it was sure of is over: it finds out, or another takes over.
            world.store.away(true);
            comes("the end of the lease", || dbs[led].role() != Role::Primary).await;
            world.store.away(false);
        }
    }
    world.store.calm();
    let txid = write(&dbs, 60).await;
    all_have(&dbs, txid).await;
    for db in &dbs {
        assert_eq!(rows(db), (0..=60).collect::<Vec<_>>());
    }
    end(dbs).await;
}
