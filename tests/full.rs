//! A disk that is full: here, files that may not grow (`ulimit -f`), in a process of its own.
#![cfg(unix)]

#[path = "support/lib.rs"]
mod support;

use std::path::PathBuf;

use replite::{Db, Error, Event};
use support::*;

/// A primary whose files may not grow beyond a mebibyte: its log soon can't be written.
#[test]
#[ignore = "runs as the child of another test"]
fn cramped_primary() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime
        .block_on(Db::open(primary(&PathBuf::from(variable("DB")), variable("PORT").parse().unwrap())));
    let db = db.unwrap();
    let mut events = db.events();
    runtime.spawn(async move {
        while let Some(event) = events.next().await {
            if matches!(event, Event::LogGap(_)) {
                speak("gap");
            }
        }
    });
    speak("open");
    for n in 0..600i64 {
        let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
            let sql = "INSERT OR REPLACE INTO t(id, n, v) VALUES (?1 % 20, ?1, randomblob(3000))";
            Ok::<_, Error>(tx.execute(sql, [n])?)
        };
        // The log is never the reason that a commit fails.
        db.write_blocking(write).unwrap();
    }
    speak("written");
    while db.writer().unwrap().flush().is_err() {}
    speak(&format!("rest {}", db.position().unwrap()));
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_costs_no_commit_and_replicas_come_to_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), free_port());
    let mut process = Process::start_limited(
        "cramped_primary",
        &[("DB", p.to_str().unwrap()), ("PORT", &port.to_string())],
        Some(1024 * 1024),
    );
    process.expect("open");
    let db = Db::open(replica(&r, &format!("http://127.0.0.1:{port}"))).await.unwrap();
    process.expect("gap");
    process.expect("written");
    let rest = process.expect("rest");
    let position: replite::Position = rest.split(' ').nth(1).unwrap().parse().unwrap();
    db.wait_for_timeout(position.txid(), LIMIT).await.unwrap();
    assert_eq!(db.position(), Some(position));
    assert_same_pages(&p, &r);
    process.say("end");
    db.shutdown().await;
}

/// A replica whose files may not grow: it can't take what comes, says so, and stays alive.
#[test]
#[ignore = "runs as the child of another test"]
fn cramped_replica() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(replica(&PathBuf::from(variable("DB")), &variable("URL"))).await.unwrap();
        if db.position().is_some() {
            db.ready().await.unwrap();
            speak("ready");
        }
        loop {
            if let Some(problem) = db.status().problem {
                speak(&format!("problem {problem}"));
                break;
            }
            tokio::task::yield_now().await;
        }
    });
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_room_says_so_and_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let primary = Db::open(primary(&p, 0)).await.unwrap();
    let url = primary.node().addresses.replication.clone();
    let db = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", db.ready()).await.unwrap();
    db.shutdown().await;
    drop(db);
    // More than its files may hold.
    let mut last = None;
    for n in 0..400 {
        let write = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(n, v) VALUES (?1, randomblob(4000))", [n])?)
        };
        last = primary.write(write).await.unwrap().txid;
    }
    let variables = [("DB", r.to_str().unwrap()), ("URL", url.as_str())];
    let process = Process::start_limited("cramped_replica", &variables, Some(512 * 1024));
    process.expect("problem");
    process.kill();
    let db = Db::open(replica(&r, &url)).await.unwrap();
    db.wait_for_timeout(last.unwrap(), LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    db.shutdown().await;
    primary.shutdown().await;
}
