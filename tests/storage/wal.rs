//! How long the WAL becomes beside writers and readers in other processes, and what tells of it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::*;
use replite::rusqlite::{Connection, Transaction};
use replite::{Checkpoint, Config, Db, Durability, Error, Event, Events, WalReason};

/// Ends with its parent's word, or with its parent.
fn end_when_told() {
    std::thread::spawn(|| {
        hear();
        std::process::exit(0);
    });
}

/// Writes rows of 3,000 bytes to a file that it knows nothing of, as fast as its pace allows, and
/// says how far it is.
#[test]
#[ignore = "runs as the child of another test"]
fn foreign_writer() {
    if !is_child() {
        return;
    }
    end_when_told();
    let connection = Connection::open(variable("DB")).unwrap();
    // What many libraries set.
    connection.busy_timeout(Duration::from_secs(5)).unwrap();
    connection.pragma_update(None, "synchronous", variable("SYNCHRONOUS")).unwrap();
    let pace = Duration::from_micros(variable("PACE").parse().unwrap());
    let mut insert = connection
        .prepare("INSERT OR REPLACE INTO t(id, who, n, v) VALUES (?1 % 500, 'foreign', ?1, randomblob(3000))")
        .unwrap();
    for n in 1.. {
        if let Err(error) = insert.execute([n]) {
            speak(&format!("failed {error}"));
            return;
        }
        if n % 50 == 0 || !pace.is_zero() {
            speak(&format!("rows {n}"));
        }
        if !pace.is_zero() {
            std::thread::sleep(pace);
        }
    }
}

/// Readers that hold a transaction each, and overlap, so that there is always one.
#[test]
#[ignore = "runs as the child of another test"]
fn foreign_readers() {
    if !is_child() {
        return;
    }
    end_when_told();
    let (count, time): (u32, u64) = (variable("COUNT").parse().unwrap(), variable("MILLIS").parse().unwrap());
    let time = Duration::from_millis(time);
    let read = move |at| -> replite::rusqlite::Result<()> {
        let connection = Connection::open(variable("DB"))?;
        std::thread::sleep(time * at / count);
        loop {
            connection.execute_batch("BEGIN; SELECT count(*) FROM t")?;
            speak(&format!("reading {at}"));
            std::thread::sleep(time);
            connection.execute_batch("COMMIT")?;
        }
    };
    std::thread::scope(|scope| {
        for at in 0..count {
            // It never waits, and never fails.
            scope.spawn(move || speak(&format!("refused {at}: {:?}", read(at))));
        }
    });
}

/// All of the readers read until now, and none was refused. They end.
fn all_read(readers: Process, count: usize) {
    let lines = readers.kill();
    let refused: Vec<_> = lines.iter().filter(|line| !line.starts_with("reading ")).collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(lines.iter().collect::<HashSet<_>>().len(), count);
}

fn writer(path: &Path, synchronous: &str, pace_micros: u64) -> Process {
    let pace = pace_micros.to_string();
    let variables = [("DB", path.to_str().unwrap()), ("SYNCHRONOUS", synchronous), ("PACE", &pace)];
    Process::start(foreign_writer, &variables)
}

fn readers(path: &Path, count: u32, millis: u64) -> Process {
    let (count, millis) = (count.to_string(), millis.to_string());
    let variables = [("DB", path.to_str().unwrap()), ("COUNT", &count), ("MILLIS", &millis)];
    Process::start(foreign_readers, &variables)
}

/// Waits until a foreign writer has written so many rows.
fn written(writer: &Process, rows: u64) {
    let mut progress = Instant::now();
    loop {
        let line = writer.next_line().expect("the writer makes progress");
        match line.split_once(' ') {
            Some(("rows", n)) if n.parse::<u64>().unwrap() >= rows => return,
            Some(("rows", _)) => progress = Instant::now(),
            Some(("failed", _)) => panic!("{line}"),
            _ => assert!(progress.elapsed() < LIMIT, "{line}"),
        }
    }
}

fn wal_of(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-wal", path.display()))
}

/// The greatest length of a WAL while this lives.
struct Peak {
    bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Peak {
    fn of(path: &Path) -> Peak {
        let peak = Peak { bytes: Arc::default(), stop: Arc::default() };
        let (bytes, stop, wal) = (peak.bytes.clone(), peak.stop.clone(), wal_of(path));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                bytes.fetch_max(std::fs::metadata(&wal).map_or(0, |m| m.len()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        peak
    }

    fn expect_at_most(&self, bytes: u64) {
        let peak = self.bytes.load(Ordering::Relaxed);
        assert!(
            0 < peak && peak <= bytes,
            "the WAL had {peak} bytes, {:.1} times its limit",
            peak as f64 / bytes as f64 * 8.0
        );
    }
}

impl Drop for Peak {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

const MIB: u64 = 1 << 20;

fn alone(path: &Path, limit: u64) -> Config {
    primary(path, 0).wal_limit(limit)
}

async fn told(events: &mut Events) -> (u64, u64, WalReason) {
    within("a word of the WAL's length", async {
        loop {
            match events.next().await {
                Some(Event::WalGrows { bytes, limit, why, .. }) => return (bytes, limit, why),
                Some(_) => {}
                None => panic!("the node ended"),
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_writer_at_full_speed_leaves_the_wal_bounded() {
    for synchronous in ["OFF", "NORMAL"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.db");
        let db = Db::open(alone(&path, 4 * MIB)).await.unwrap();
        let peak = Peak::of(&path);
        let writer = writer(&path, synchronous, 0);
        written(&writer, 60_000);
        peak.expect_at_most(8 * 4 * MIB);
        writer.kill();
        // Nothing was lost on the way.
        let last = insert(&db, "ours", 1).await;
        within("capture", db.wait_for(last)).await.unwrap();
        assert!(db.verify().await.unwrap().holds());
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_readers_that_overlap_leave_the_wal_bounded_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(alone(&p, MIB / 2)).await.unwrap();
    let replica = replica(&r, &db.node().addresses.replication).wal_limit(MIB / 2);
    let replica = Db::open(replica).await.unwrap();
    within("ready", replica.ready()).await.unwrap();
    let (one, other) = (readers(&p, 8, 20), readers(&r, 8, 20));
    one.expect("reading");
    other.expect("reading");
    let (peak, replicas) = (Peak::of(&p), Peak::of(&r));
    let writer = writer(&p, "NORMAL", 500);
    written(&writer, 6_000);
    peak.expect_at_most(8 * MIB / 2);
    replicas.expect_at_most(8 * MIB / 2);
    all_read(one, 8);
    all_read(other, 8);
    writer.kill();
    let last = insert(&db, "ours", 1).await;
    within("the end", replica.wait_for_timeout(last, LIMIT)).await.unwrap();
    within("its own", db.wait_for(last)).await.unwrap();
    assert_same_pages(&p, &r);
    replica.shutdown().await;
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_a_second_and_a_half_that_overlap_leave_the_wal_bounded_and_no_writer_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(alone(&path, MIB)).await.unwrap();
    let mut events = db.events();
    let readers = readers(&path, 3, 1500);
    readers.expect("reading");
    let peak = Peak::of(&path);
    let writer = writer(&path, "NORMAL", 2_000);
    // Some 20 MiB: more than twice what may be there at a time.
    written(&writer, 5_000);
    peak.expect_at_most(8 * MIB);
    let (bytes, limit, why) = told(&mut events).await;
    assert!(bytes > 2 * limit && limit == MIB && why == WalReason::Readers, "{bytes} {limit} {why:?}");
    all_read(readers, 3);
    writer.kill();
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_writer_at_full_speed_leaves_the_wal_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(alone(&path, MIB).durability(Durability::Unsynced)).await.unwrap();
    let peak = Peak::of(&path);
    let own = db.clone();
    let write = move || {
        for n in 0..20_000i64 {
            let write = |tx: &mut Transaction<'_>| {
                let sql = "INSERT OR REPLACE INTO t(id, n, v) VALUES (?1 % 500, ?1, randomblob(3000))";
                Ok::<_, Error>(tx.execute(sql, [n])?)
            };
            own.write_blocking(write).unwrap();
        }
    };
    tokio::task::spawn_blocking(write).await.unwrap();
    peak.expect_at_most(8 * MIB);
    db.shutdown().await;
}

/// Readers that stay until others have committed are waited for in vain, again and again. In
/// between our own writer, which is woken, took the lock before anybody who only looks for it now
/// and then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_process_gets_to_write_beside_our_own_writer_at_full_speed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(alone(&path, 256 * 1024).durability(Durability::Unsynced)).await.unwrap();
    let (stop, commits) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let ends = Ends(&stop);
    let mut threads: Vec<_> = (0..2)
        .map(|_| {
            let (db, stop, commits) = (db.clone(), stop.clone(), commits.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let sql =
                        "INSERT OR REPLACE INTO t(id, v) VALUES (abs(random() % 500), randomblob(3000))";
                    db.write_blocking(|tx| Ok::<_, Error>(tx.execute(sql, [])?)).unwrap();
                    commits.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let (reader, ended) = (plain(&path), stop.clone());
    threads.push(std::thread::spawn(move || {
        let committed = |more: u64| {
            let from = commits.load(Ordering::Relaxed);
            until("commits", || {
                ended.load(Ordering::Relaxed) || commits.load(Ordering::Relaxed) >= from + more
            });
        };
        while !ended.load(Ordering::Relaxed) {
            reader.execute_batch("BEGIN; SELECT count(*) FROM t").unwrap();
            committed(5);
            reader.execute_batch("COMMIT").unwrap();
            committed(30);
        }
    }));
    let foreign = writer(&path, "NORMAL", 1_000);
    written(&foreign, 25);
    drop(ends);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    drop(foreign);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stays_is_told_and_keeps_nobody_from_writing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(alone(&path, MIB / 4)).await.unwrap();
    insert(&db, "first", 0).await;
    let mut events = db.events();
    let reader = plain(&path);
    reader.execute_batch("BEGIN; SELECT count(*) FROM t").unwrap();
    let writer = writer(&path, "OFF", 0);
    written(&writer, 2_000);
    let (bytes, limit, why) = told(&mut events).await;
    assert!(bytes > 2 * limit, "{bytes} {limit}");
    assert_eq!(why, WalReason::Readers);
    until("a problem", || db.status().problem.is_some_and(|p| p.contains("readers stay in it")));
    // It has stayed for as long as that: nobody waits for it any more.
    std::thread::sleep(Duration::from_secs(4));
    written(&writer, 20_000);
    assert!(std::fs::metadata(wal_of(&path)).unwrap().len() > 8 * MIB / 4, "it can't be bounded");
    let rows: i64 = reader.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(rows, 1, "it sees what it has seen");
    reader.execute_batch("COMMIT").unwrap();
    until("the end of the problem", || db.status().problem.is_none());
    writer.kill();
    until("a short WAL", || std::fs::metadata(wal_of(&path)).unwrap().len() <= 8 * MIB / 4);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction_is_told_as_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(alone(&path, MIB / 4)).await.unwrap();
    let mut events = db.events();
    let many = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 8000)
                INSERT INTO t(who, n, v) SELECT 'large', i, randomblob(3000) FROM c";
    plain(&path).execute_batch(many).unwrap();
    let (bytes, _, why) = told(&mut events).await;
    assert!(bytes > 20 * MIB, "{bytes}");
    assert_eq!(why, WalReason::LargeTransaction);
    until("the end of the problem", || db.status().problem.is_none());
    until("a short WAL", || std::fs::metadata(wal_of(&path)).unwrap().len() <= MIB);
    db.shutdown().await;
}

/// What the database file alone has.
fn rows_without_wal(path: &Path) -> i64 {
    let copy = path.with_extension("copy");
    std::fs::copy(path, &copy).unwrap();
    plain(&copy).query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_on_request_leaves_all_in_the_file_on_both_sides_or_says_what_is_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(alone(&p, 64 * MIB)).await.unwrap();
    let replica = replica(&r, &db.node().addresses.replication).wal_limit(64 * MIB);
    let replica = Db::open(replica).await.unwrap();
    for n in 0..400 {
        insert(&db, "row", n).await;
    }
    let last = insert(&db, "last", 0).await;
    replica.wait_for_timeout(last, LIMIT).await.unwrap();
    for (node, path) in [(&db, &p), (&replica, &r)] {
        let reader = plain(path);
        reader.execute_batch("BEGIN; SELECT count(*) FROM t").unwrap();
        let busy = node.checkpoint(Duration::from_millis(300)).await.unwrap();
        let Checkpoint::Busy { frames, backfilled, why } = busy else { panic!("{busy:?}") };
        assert_eq!((why, frames > 100, backfilled <= frames), (WalReason::Readers, true, true));
        assert_eq!(count(node), 401, "readers don't wait");
        let waiting = node.clone();
        let mut waiting = tokio::spawn(async move { waiting.checkpoint(LIMIT).await });
        let early = tokio::time::timeout(Duration::from_millis(200), &mut waiting).await;
        assert!(early.is_err(), "it does not wait: {early:?}");
        reader.execute_batch("COMMIT").unwrap();
        assert_eq!(within("the checkpoint", waiting).await.unwrap().unwrap(), Checkpoint::Done);
        assert_eq!(rows_without_wal(path), 401);
        assert!(node.status().wal_frames <= 1, "{:?}", node.status());
        assert_eq!(node.checkpoint(LIMIT).await.unwrap(), Checkpoint::Done, "nothing to do");
        // What others get.
        let pragma = "PRAGMA wal_checkpoint(TRUNCATE)";
        let refused: (i64, i64, i64) =
            reader.query_row(pragma, [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?))).unwrap();
        assert_eq!(refused, (1, -1, -1));
    }
    let after = insert(&db, "after", 0).await;
    replica.wait_for_timeout(after, LIMIT).await.unwrap();
    within("its own", db.wait_for(after)).await.unwrap();
    assert_same_pages(&p, &r);
    replica.shutdown().await;
    assert!(matches!(replica.checkpoint(LIMIT).await, Err(Error::ShutDown | Error::NoState(_))));
    db.shutdown().await;
    assert!(matches!(db.checkpoint(LIMIT).await, Err(Error::ShutDown)));
}
