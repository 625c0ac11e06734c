//! `kill -9` of either side at any moment: nothing acknowledged is lost, and both go on where they
//! were.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::Connection;
use replite::{Db, Error, Event};

use crate::support::*;

/// A primary with two writers, in a process of its own.
#[test]
#[ignore = "runs as the child of another test"]
fn primary_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(Db::open(primary(&path, port))).unwrap();
    speak(&format!("open {}", db.position().unwrap()));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in ["a", "b"] {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || {
                let last: i64 = db
                    .read(|c| {
                        let sql = "SELECT coalesce(max(n), 0) FROM t WHERE who = ?1";
                        Ok::<_, Error>(c.query_row(sql, [writer], |r| r.get(0))?)
                    })
                    .unwrap();
                for n in last + 1.. {
                    if stop.load(std::sync::atomic::Ordering::SeqCst) {
                        break;
                    }
                    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
                        let sql = "INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(?3))";
                        Ok::<_, Error>(tx.execute(sql, (writer, n, n % 3000))?)
                    };
                    let txid = db.write_blocking(write).unwrap().txid.unwrap();
                    speak(&format!("ack {writer} {n} {txid}"));
                }
            });
        }
        let _ends = Ends(&stop);
        assert_eq!(hear(), "stop");
    });
    let last = db.writer().unwrap().flush().unwrap();
    assert_eq!(last, None, "nothing was committed through the guard");
    speak(&format!("rest {}", db.position().unwrap()));
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_primary_keeps_what_it_acknowledged_and_its_replica_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let port = own_port();
    let start = || {
        let (path, port) = (p.to_str().unwrap(), port.to_string());
        Process::start(primary_process, &[("DB", path), ("PORT", &port)])
    };
    let db = Db::open(replica(&r, &format!("http://127.0.0.1:{port}"))).await.unwrap();
    let mut events = db.events();
    let mut rng = StdRng::seed_from_u64(1);
    let mut acknowledged: BTreeMap<String, i64> = BTreeMap::new();
    let mut foreign = 0;
    for round in 0..15 {
        let process = start();
        process.expect("open");
        {
            let shell = plain(&p);
            for _ in 0..rng.random_range(0..10) {
                foreign += 1;
                shell.execute("INSERT INTO t(who, n) VALUES ('shell', ?1)", [foreign]).unwrap();
            }
        }
        let mut lines = Vec::new();
        for _ in 0..rng.random_range(1..150) {
            lines.push(process.expect("ack"));
        }
        if round == 0 {
            // What follows must not need a snapshot.
            within("ready", db.ready()).await.unwrap();
            while events.next().await.is_some_and(|e| !matches!(e, Event::SnapshotFinished { .. })) {}
        }
        lines.extend(process.kill());
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            if words[0] == "ack" {
                acknowledged.insert(words[1].into(), words[2].parse().unwrap());
            }
        }
        acknowledged.insert("shell".into(), foreign);
        let shell = plain(&p);
        for (who, last) in &acknowledged {
            let (rows, most): (i64, i64) = shell
                .query_row("SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = ?1", [who], |r| {
                    Ok((r.get(0)?, r.get(1)?))
                })
                .unwrap();
            assert!(most >= *last, "round {round}: {who} had {last} acknowledged, and {most} are there");
            assert_eq!(rows, most, "round {round}: a hole in what {who} wrote");
        }
    }
    let mut process = start();
    process.expect("open");
    process.say("stop");
    let rest = process.expect("rest");
    let position: replite::Position = rest.split(' ').nth(1).unwrap().parse().unwrap();
    db.wait_for_timeout(position.txid(), LIMIT).await.unwrap();
    assert_eq!(db.position(), Some(position), "the replica stands exactly where the primary does");
    assert_same_pages(&p, &r);
    db.shutdown().await;
    drop(db);
    let mut connected = 0;
    while let Some(event) = events.next().await {
        assert!(
            !matches!(event, Event::SnapshotStarted { .. } | Event::Missed { .. }),
            "{event:?}: a restart cost more"
        );
        connected += usize::from(matches!(event, Event::Connected { .. }));
    }
    assert!(connected > 0, "the replica was never told of a restart");
    process.kill();
}

/// A replica in a process of its own.
#[test]
#[ignore = "runs as the child of another test"]
fn replica_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(replica(&PathBuf::from(variable("DB")), &variable("URL"))).await.unwrap();
        match db.position() {
            Some(position) => speak(&format!("open {position}")),
            None => speak("empty"),
        }
        let mut events = db.events();
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                match event {
                    Event::SnapshotStarted { why, .. } => speak(&format!("snapshot {why}")),
                    Event::SnapshotFinished { position, .. } => speak(&format!("filled {position}")),
                    _ => {}
                }
            }
        });
        let mut positions = db.watch();
        while positions.changed().await.is_ok() {
            if let Some(position) = *positions.borrow_and_update() {
                speak(&format!("at {position}"));
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_goes_on_where_it_was_also_within_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(primary(&p, 0)).await.unwrap();
    let bulk = db
        .write(|tx| {
            Ok::<_, Error>(tx.execute_batch(
                "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 40000)
             INSERT INTO t(who, n, v) SELECT 'bulk', i, randomblob(2000) FROM c",
            )?)
        })
        .await
        .unwrap();
    // Captured, so that it comes with the snapshot and not behind it.
    db.wait_for_timeout(bulk.txid.unwrap(), LIMIT).await.unwrap();
    let url = db.node().addresses.replication.clone();
    let start = || Process::start(replica_process, &[("DB", r.to_str().unwrap()), ("URL", &url)]);
    let mut rng = StdRng::seed_from_u64(2);
    let pages = |c: &Connection| c.query_row("PRAGMA page_count", [], |r| r.get::<_, i64>(0)).unwrap();
    // Within the snapshot, which comes into the database's file. That is empty to everybody until
    // all of it is there. From some time on its progress is durable, and it goes on from there.
    for round in 0..9u64 {
        let before = std::fs::metadata(&r).ok().map(|m| m.len());
        let process = start();
        let goal = round * (9 << 20);
        until("some of the snapshot", || {
            let now = std::fs::metadata(&r).map_or(0, |m| m.len());
            now > goal && Some(now) != before
        });
        process.kill();
        let there = plain(&r);
        if there.table_exists(None, "t").unwrap() {
            let rows: i64 = there.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
            assert_eq!(rows, 40_000);
        }
        assert_eq!(image(&r).len() as i64 / 4096, pages(&there));
    }
    let mut n = 0;
    for round in 0..15 {
        let process = start();
        for _ in 0..rng.random_range(20..120) {
            n += 1;
            insert(&db, "w", n).await;
        }
        let begins = process.next_line().unwrap();
        if round == 0 && begins == "empty" {
            process.expect("filled");
        } else {
            assert!(begins.starts_with("open "), "round {round}: the state was kept, not {begins}");
        }
        for _ in 0..rng.random_range(1..10) {
            n += 1;
            insert(&db, "w", n).await;
            let said = process.next_line().expect("the replica goes on");
            assert!(said.starts_with("at "), "round {round}: a restart needed a {said}");
        }
        for said in process.kill() {
            assert!(said.starts_with("at "), "round {round}: a restart needed a {said}");
        }
    }
    let process = start();
    n += 1;
    let txid = insert(&db, "w", n).await;
    db.wait_for(txid).await.unwrap();
    let position = db.position().unwrap();
    while process.expect("at") != format!("at {position}") {}
    assert_same_pages(&p, &r);
    process.kill();
    // Killed, and without anybody who recovers it but stock SQLite.
    assert_same_pages(&p, &r);
    db.shutdown().await;
}
