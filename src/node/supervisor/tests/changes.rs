//! Two nodes that change their roles, and callers that leave.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::ends::{Ends, alone, comes, descriptors, threads};
use crate::error::PeerProblem;
use crate::status::Event;
use crate::txid::Txid;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_change_roles_a_hundred_times_and_nobody_who_reads_or_waits_learns_of_it() {
    let name = "two_nodes_change_roles_a_hundred_times_and_nobody_who_reads_or_waits_learns_of_it";
    if !tokio::task::block_in_place(|| alone(&format!("node::supervisor::tests::changes::{name}"))) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let follows =
        config(&dir.path().join("b.db")).lease(Fixed::replica_of(&one.node().addresses.replication));
    let two = Db::open(follows).await.unwrap();
    two.ready().await.unwrap();
    let dbs = [one, two];
    let ends = AtomicBool::new(false);
    let (reads, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = |db: &Db| {
        db.read(|conn| {
            Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))? as u64)
        })
    };
    let mut events = dbs[0].events();
    let mut positions = dbs.each_ref().map(Db::watch);
    let first = std::sync::Mutex::new(None);
    let work = async {
        let _ends = Ends(&ends);
        let mut primary = 0;
        for round in 0..100 {
            let txid = write(&dbs).await;
            written.fetch_add(1, Ordering::AcqRel);
            let (led, followed) = (&dbs[primary], &dbs[1 - primary]);
            followed.wait_for_timeout(txid, LIMIT).await.unwrap();
            // One who waits for what comes after the change.
            let next = Txid::new(txid.epoch(), txid.number() + 1);
            let early = tokio::time::timeout(Duration::from_millis(1), led.wait_for(next)).await;
            assert!(early.is_err(), "nobody has written it");
            let snapshots = tokio::task::block_in_place(|| dbs.each_ref().map(|db| count(db).unwrap()));
            assert_eq!(snapshots, [written.load(Ordering::Acquire); 2]);
            led.demote(&followed.node().addresses.replication).await.unwrap();
            assert_eq!(led.role(), Role::Replica);
            assert!(matches!(led.inner.slot.primary(), Err(Error::NotPrimary { .. })));
            followed.promote().await.unwrap();
            assert_eq!(
                (followed.role(), followed.node()),
                (Role::Primary, &followed.roles().borrow().primary.clone().unwrap())
            );
            let waits = async {
                let txid = write(&dbs).await;
                written.fetch_add(1, Ordering::AcqRel);
                led.wait_for_timeout(txid, LIMIT).await.unwrap();
                txid
            };
            let txid = tokio::time::timeout(LIMIT, waits).await.expect("the old primary follows the new one");
            assert_eq!(txid.number(), next.number(), "round {round}");
            primary = 1 - primary;
            if round == 3 {
                // All kinds of threads and descriptors have been there by now.
                *first.lock().unwrap() = Some((threads(), descriptors(dir.path())));
            }
        }
    };
    std::thread::scope(|scope| {
        for db in &dbs {
            scope.spawn(|| {
                let mut before = 0;
                while !ends.load(Ordering::Acquire) {
                    let now = count(db).expect("no read fails");
                    assert!(now >= before, "{now} rows after {before}");
                    before = now;
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work));
    });
    assert!(reads.load(Ordering::Relaxed) > 1000);
    let first = first.into_inner().unwrap().unwrap();
    // Blocking threads of the runtime come and go.
    comes("threads and descriptors as before", || {
        let now = (threads(), descriptors(dir.path()));
        now.0 <= first.0 + 2 && now.1 <= first.1 + 2
    })
    .await;
    let mut roles = 0;
    while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await {
        match event.unwrap() {
            Event::Role { .. } => roles += 1,
            Event::Missed { events: missed, .. } => roles += missed,
            _ => {}
        }
    }
    assert!(roles >= 100, "{roles} events of roles");
    for positions in &mut positions {
        assert!(positions.has_changed().unwrap(), "the watch lives on");
    }
    for db in &dbs {
        assert!(db.verify().await.unwrap().holds());
        assert_eq!(count(db).unwrap(), written.load(Ordering::Acquire));
        assert!(db.health().can_read, "{:?}", db.health());
    }
    assert_eq!(dbs[0].position().map(|at| at.number()), dbs[1].position().map(|at| at.number()));
    for db in dbs {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_has_nothing_stays_one_and_follows_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let late = rusqlite::Connection::open(dir.path().join("b.db")).unwrap();
    late.execute_batch("CREATE TABLE u(a)").unwrap();
    drop(late);
    let follows = config(&dir.path().join("b.db")).lease(Fixed::replica_of("http://127.0.0.1:9"));
    let two = Db::open(follows).await.unwrap();
    let refused = two.promote().await;
    assert!(matches!(refused, Err(Error::NoState(_))), "{refused:?}");
    assert_eq!(two.role(), Role::Replica);
    let to = Some(endpoint(&one));
    for _ in 0..2 {
        // The second time it goes on.
        two.inner.supervisor.follow(to.clone()).await.unwrap();
    }
    let txid = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    for db in [two, one] {
        db.shutdown().await;
    }
}

fn next_epoch(db: &Db) -> Epoch {
    let newest = db.inner.node.applied.history().epoch();
    Epoch::new(newest.number() + 3, 0xbeef)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_caller_leaves_goes_on_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let txid = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    // Each is polled once.
    let _ = tokio::time::timeout(Duration::ZERO, one.inner.supervisor.demote()).await;
    comes("the demotion", || one.role() == Role::Replica).await;
    let epoch = next_epoch(&two);
    let _ = tokio::time::timeout(Duration::ZERO, two.inner.supervisor.promote(epoch, false)).await;
    comes("the promotion", || two.role() == Role::Primary).await;
    assert_eq!(two.inner.node.applied.history().epoch(), epoch);
    assert_eq!(two.roles().borrow().epoch, epoch);
    one.inner.supervisor.follow(Some(endpoint(&two))).await.unwrap();
    let txid = write(&[two.clone(), two.clone()]).await;
    assert_eq!(txid.epoch(), epoch);
    one.wait_for_timeout(txid, LIMIT).await.unwrap();
    for db in [one, two] {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_asked_for_from_a_runtime_that_is_not_the_applications_and_outlive_it() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let txid = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    let (a, b, epoch) = (one.clone(), two.clone(), next_epoch(&two));
    let driver = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let last = a.inner.supervisor.demote().await.unwrap().unwrap();
            // The link is cut by the demotion alone; what was on its way is there.
            assert_eq!(b.inner.supervisor.prepare().await.unwrap(), Some(last));
            assert_eq!(b.role(), Role::Replica);
            b.inner.supervisor.promote(epoch, false).await.unwrap();
            a.inner.supervisor.follow(Some(endpoint(&b))).await.unwrap();
        });
    });
    tokio::task::block_in_place(|| driver.join().unwrap());
    // The stream did not end with that runtime.
    for _ in 0..3 {
        let txid = write(&[two.clone(), two.clone()]).await;
        one.wait_for_timeout(txid, LIMIT).await.unwrap();
    }
    for db in [one, two] {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_is_not_newer_is_refused_and_all_goes_on_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let before = one.inner.node.applied.history().epoch();
    let old =
        |done: Result<()>| matches!(done, Err(Error::Peer { problem: PeerProblem::OldEpoch { .. }, .. }));
    for epoch in [Epoch::new(before.number(), 7), Epoch::new(before.number() - 1, 7)] {
        assert!(old(one.inner.supervisor.renew(epoch).await), "{epoch}");
        assert!(old(two.inner.supervisor.promote(epoch, false).await), "{epoch}");
        assert!(old(two.inner.supervisor.promote(epoch, true).await), "{epoch}");
    }
    assert_eq!((one.role(), two.role()), (Role::Primary, Role::Replica));
    let epoch = next_epoch(&one);
    one.inner.supervisor.renew(epoch).await.unwrap();
    let txid = write(&[one.clone(), one.clone()]).await;
    assert_eq!((txid.epoch(), one.roles().borrow().epoch), (epoch, epoch));
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    for db in [one, two] {
        db.shutdown().await;
    }
}

/// What serves a primary's role ends with it: a third node that followed it is sent away, and let
/// in by the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_demoted_serves_no_replica_and_has_no_writer() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let follows = Fixed::replica_of(&one.node().addresses.replication);
    let three = Db::open(config(&dir.path().join("c.db")).lease(follows)).await.unwrap();
    three.ready().await.unwrap();
    let mut events = three.events();
    one.inner.supervisor.demote().await.unwrap();
    let sent_away = async {
        loop {
            if let Event::Disconnected { why, .. } = events.next().await.unwrap() {
                break why;
            }
        }
    };
    let why = tokio::time::timeout(LIMIT, sent_away).await.unwrap();
    assert!(why.contains("not the primary"), "{why}");
    assert!(!one.inner.replica_server.serves() && one.inner.replica_server.replicas().is_empty());
    assert!(!one.inner.writer.is_open());
    for db in [three, two, one] {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_ends_a_change_that_waits_and_the_file_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let other = rusqlite::Connection::open(one.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let demoted = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.demote().await })
    };
    comes("it is told", || one.status().problem.is_some_and(|p| p.contains("the write lock"))).await;
    assert_eq!(one.role(), Role::Fencing);
    // One that waits for its turn.
    let queued = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.follow(None).await })
    };
    tokio::time::timeout(LIMIT, one.shutdown()).await.unwrap();
    assert!(matches!(demoted.await.unwrap(), Err(Error::ShutDown)));
    assert!(matches!(queued.await.unwrap(), Err(Error::ShutDown)));
    other.execute_batch("ROLLBACK").unwrap();
    drop(other);
    let again = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    write(&[again.clone(), again.clone()]).await;
    again.shutdown().await;
}

/// What no primary vouches for becomes history by an operator's word, and by that alone. A file
/// that is damaged does not, and the node goes on as a replica.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_primary_vouches_for_leads_only_unchecked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.db");
    let plain = rusqlite::Connection::open(&path).unwrap();
    plain.execute_batch("CREATE TABLE t(a INTEGER PRIMARY KEY); INSERT INTO t VALUES (7)").unwrap();
    drop(plain);
    let nowhere = Fixed::replica_of("http://127.0.0.1:9");
    let two = Db::open(config(&path).lease(nowhere.clone())).await.unwrap();
    let epoch = Epoch::new(9, 5);
    assert!(matches!(two.inner.supervisor.prepare().await, Ok(None)));
    assert!(matches!(two.inner.supervisor.promote(epoch, false).await, Err(Error::NoState(_))));
    assert!(two.position().is_none());
    two.inner.supervisor.promote(epoch, true).await.unwrap();
    assert_eq!(two.role(), Role::Primary);
    let rows = |db: &Db| {
        db.read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?))
    };
    assert_eq!(rows(&two).unwrap(), 1);
    let txid = write(&[two.clone(), two.clone()]).await;
    assert_eq!(txid.epoch(), epoch);
    // It serves like any other.
    let follows = Fixed::replica_of(&two.node().addresses.replication);
    let three = Db::open(config(&dir.path().join("c.db")).lease(follows)).await.unwrap();
    three.ready().await.unwrap();
    three.wait_for_timeout(txid, LIMIT).await.unwrap();
    three.shutdown().await;
    two.shutdown().await;

    // Bytes in the middle of the file and no log to mend it from.
    let wreck = dir.path().join("d.db");
    let plain = rusqlite::Connection::open(&wreck).unwrap();
    plain.execute_batch("CREATE TABLE t(a); CREATE INDEX i ON t(a)").unwrap();
    for n in 0..2000 {
        plain.execute("INSERT INTO t VALUES (?1)", [n]).unwrap();
    }
    drop(plain);
    let four = Db::open(config(&wreck).lease(nowhere.clone())).await.unwrap();
    four.inner.supervisor.promote(epoch, true).await.unwrap();
    four.inner.supervisor.demote().await.unwrap();
    four.shutdown().await;
    for end in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("d.db{end}")));
    }
    std::fs::remove_dir_all(dir.path().join("d.db-replite/log")).unwrap();
    let mut bytes = std::fs::read(&wreck).unwrap();
    let at = bytes.len() / 2;
    bytes[at..at + 4096].fill(0x5a);
    std::fs::write(&wreck, bytes).unwrap();
    let four = Db::open(config(&wreck).lease(nowhere)).await.unwrap();
    let refused = four.inner.supervisor.promote(Epoch::new(20, 1), true).await;
    assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");
    assert_eq!(four.role(), Role::Replica);
    assert!(four.inner.slot.is_replica() && four.inner.node.failure().is_none());
    four.shutdown().await;
}
