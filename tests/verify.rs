//! Verification: it holds beside everything else that goes on, and finds what the disk or a stray hand changed.

#[path = "support/lib.rs"]
mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use replite::{Db, Error, Event, Events, Txid, Verification};
use support::*;

/// Another process at the database, one statement after the other, until it is killed: the shell where there is one.
#[test]
#[ignore = "runs as the child of another test"]
fn foreign_writer() {
    if !is_child() {
        return;
    }
    let connection = plain(&PathBuf::from(variable("DB")));
    speak("open");
    for n in 0i64.. {
        connection.execute("INSERT INTO t(who, n, v) VALUES ('foreign', ?1, randomblob(3000))", [n]).unwrap();
        if n % 50 == 0 {
            speak("wrote");
            // Refused, but tried.
            let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        }
    }
}

/// Flips a bit of the file at a byte, and leaves the time of its last change as it was, as a disk would.
fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.set_modified(modified).unwrap();
}

/// The same from another process: a descriptor of the file that is closed in this one would cost SQLite its locks.
#[test]
#[ignore = "runs as the child of another test"]
fn flipping_process() {
    if is_child() {
        flip(&PathBuf::from(variable("DB")), variable("AT").parse().unwrap());
        speak("flipped");
    }
}

fn flip_outside(path: &Path, at: u64) {
    let at = at.to_string();
    Process::start("flipping_process", &[("DB", path.to_str().unwrap()), ("AT", &at)]).expect("flipped");
}

async fn next_failed(events: &mut Events) -> Verification {
    within("a failed verification", async {
        loop {
            match events.next().await {
                Some(Event::VerificationFailed(found)) => return found,
                Some(_) => {}
                None => panic!("no more events"),
            }
        }
    })
    .await
}

/// Rows that are long enough to have pages of their own, the last of them in `marker`.
async fn fill(db: &Db, rows: i64) -> Txid {
    let commit = db.write(move |tx| {
        let sql = "INSERT INTO t(n, v) VALUES (?1, 'marker' || hex(randomblob(3000)))";
        for n in 0..rows {
            tx.execute(sql, [n])?;
        }
        Ok::<_, Error>(())
    });
    commit.await.unwrap().txid.unwrap()
}

/// Waits until the WAL was begun anew, so that what was written before is read from the file.
fn until_in_the_file(db: &Db) {
    until("the WAL to be begun anew", || db.status().wal_frames <= 1);
}

fn page_size(db: &Db) -> u64 {
    db.read(|conn| Ok::<_, Error>(conn.query_row("PRAGMA page_size", [], |r| r.get::<_, i64>(0))?)).unwrap()
        as u64
}

/// The place of the newest row's text in the file.
fn marker_in(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes.windows(6).rposition(|w| w == b"marker").unwrap() as u64
}

/// A closed primary whose file has all there is: its path, and the place of a row's text in it.
async fn closed_primary(dir: &Path, port: u16) -> (PathBuf, u64) {
    let path = dir.join("p.db");
    let db = Db::open(primary(&path, port)).await.unwrap();
    fill(&db, 200).await;
    until_in_the_file(&db);
    let verification = db.verify().await.unwrap();
    assert!(verification.holds(), "{verification:?}");
    db.shutdown().await;
    let at = marker_in(&path) + 100;
    (path, at)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_holds_beside_writers_checkpoints_and_apply() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let primary = Db::open(primary(&p, 0)).await.unwrap();
    let replica = Db::open(replica(&r, &primary.node().addresses.replication)).await.unwrap();
    within("ready", replica.ready()).await.unwrap();
    // Large enough that much is committed while it is hashed.
    fill(&primary, 5000).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..2i64)
        .map(|writer| {
            let (db, stop) = (primary.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut n = 0i64;
                while !stop.load(Ordering::Relaxed) {
                    n += 1;
                    db.write_blocking(|tx| {
                        tx.execute(
                            "UPDATE t SET v = hex(randomblob(3000)) WHERE id = ?1",
                            [(n * 37 + writer) % 5000],
                        )?;
                        if n % 100 == 0 {
                            tx.execute("DELETE FROM t WHERE id % 50 = ?1", [n / 100 % 50])?;
                        }
                        tx.execute("INSERT INTO t(n, v) VALUES (?1, hex(randomblob(3000)))", [n])
                            .map(drop)
                            .map_err(Error::from)
                    })
                    .unwrap();
                }
            })
        })
        .collect();
    let foreign = Process::start("foreign_writer", &[("DB", p.to_str().unwrap())]);
    foreign.expect("open");
    let mut positions = Vec::new();
    for _ in 0..15 {
        foreign.expect("wrote");
        let (ours, theirs) = tokio::join!(primary.verify(), replica.verify());
        for verification in [ours.unwrap(), theirs.unwrap()] {
            assert!(verification.holds(), "{verification:?}");
            assert!(verification.bad_pages.is_empty() && verification.all_named);
            positions.push(verification.position);
        }
    }
    foreign.kill();
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    positions.dedup();
    assert!(positions.len() > 10, "hardly anything was committed between: {positions:?}");
    assert_eq!(primary.status().verification.map(|v| v.holds()), Some(true));
    assert_eq!(primary.status().problem, None);
    let last = insert(&primary, "w", 0).await;
    replica.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    replica.shutdown().await;
    primary.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flipped_in_a_closed_file_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = closed_primary(dir.path(), 0).await;
    flip(&path, at);
    let db = Db::open(primary(&path, 0)).await.unwrap();
    let mut events = db.events();
    let found = db.verify().await.unwrap();
    assert!(!found.holds());
    assert_eq!(next_failed(&mut events).await, found);
    let page = at / page_size(&db) + 1;
    let named: Vec<u64> = found.bad_pages.iter().map(|page| u64::from(page.get())).collect();
    assert_eq!((named, found.all_named), (vec![page], true));
    let status = db.status();
    assert_eq!(status.verification, Some(found));
    let problem = status.problem.unwrap();
    assert!(problem.contains(&format!("bad are {page}")), "{problem}");
    assert!(db.health().reasons.contains(&problem));
    db.shutdown().await;
    // With the bit as it was all is well again.
    flip(&path, at);
    let db = Db::open(primary(&path, 0)).await.unwrap();
    assert!(db.verify().await.unwrap().holds());
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_the_log_does_not_know_is_bad_without_a_name() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = closed_primary(dir.path(), 0).await;
    fs::remove_dir_all(dir.path().join("p.db-replite/log")).unwrap();
    flip(&path, at);
    let db = Db::open(primary(&path, 0)).await.unwrap();
    insert(&db, "w", 1).await;
    let found = db.verify().await.unwrap();
    assert!(!found.holds() && found.bad_pages.is_empty() && !found.all_named, "{found:?}");
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_byte_that_somebody_writes_beneath_running_nodes_is_found_and_the_problem_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let source = Db::open(primary(&p, 0)).await.unwrap();
    let target = Db::open(replica(&r, &source.node().addresses.replication)).await.unwrap();
    within("ready", target.ready()).await.unwrap();
    let last = fill(&source, 200).await;
    target.wait_for_timeout(last, LIMIT).await.unwrap();
    for db in [&source, &target] {
        until_in_the_file(db);
        let size = page_size(db);
        let page = 20;
        let mut events = db.events();
        flip_outside(db.path(), size * (page - 1) + 100);
        let found = db.verify().await.unwrap();
        assert!(!found.holds());
        assert_eq!(next_failed(&mut events).await, found);
        let named: Vec<u64> = found.bad_pages.iter().map(|page| u64::from(page.get())).collect();
        assert_eq!(named, [page]);
        assert!(db.status().problem.is_some());
        flip_outside(db.path(), size * (page - 1) + 100);
        assert!(db.verify().await.unwrap().holds());
        assert_eq!(db.status().problem, None);
    }
    target.shutdown().await;
    source.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_runs_by_itself_from_time_to_time() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = closed_primary(dir.path(), 0).await;
    flip(&path, at);
    let db = Db::open(primary(&path, 0).verify_every(Duration::from_millis(20))).await.unwrap();
    let mut events = db.events();
    let found = next_failed(&mut events).await;
    assert_eq!(found.bad_pages.len(), 1);
    flip_outside(&path, at);
    within("a good one", async {
        while !matches!(events.next().await, Some(Event::Verified(found)) if found.holds()) {}
    })
    .await;
    assert_eq!(db.status().problem, None);
    db.shutdown().await;
}

#[test]
fn callers_share_one_and_a_shutdown_ends_it_at_once() {
    // In a process of its own, whose threads are all of this test.
    Process::start("sharing_and_ending", &[]).expect("ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn sharing_and_ending() {
    if !is_child() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = closed_primary(dir.path(), 0).await;
    // A byte a second: it would take days.
    let db = Db::open(primary(&path, 0).verify_limit(1.try_into().unwrap())).await.unwrap();
    let first = tokio::spawn({
        let db = db.clone();
        async move { db.verify().await }
    });
    until("its thread", || threads().iter().any(|name| name == "replite-verify"));
    let mut second = Box::pin(db.verify());
    assert!(futures_util::poll!(&mut second).is_pending());
    assert_eq!(threads().iter().filter(|name| *name == "replite-verify").count(), 1);
    // Writers and reads go on.
    insert(&db, "w", 1).await;
    within("shutdown", db.shutdown()).await;
    assert!(matches!(within("the first", first).await.unwrap(), Err(Error::ShutDown)));
    assert!(matches!(within("the second", second).await, Err(Error::ShutDown)));
    assert!(matches!(db.verify().await, Err(Error::ShutDown)));
    assert!(!threads().iter().any(|name| name == "replite-verify"));
    speak("ended");
}

/// The names of this process's threads.
fn threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.map(|task| name(task.unwrap()).trim().to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_a_state_has_nothing_to_verify() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(replica(&dir.path().join("r.db"), "http://127.0.0.1:1")).await.unwrap();
    assert!(matches!(db.verify().await, Err(Error::NoState(_))));
    db.shutdown().await;
}
