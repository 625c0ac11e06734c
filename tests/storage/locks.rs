//! What drops the process's locks on the database files is noticed and mended.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::*;
use replite::rusqlite::Connection;
use replite::{Db, Error, Event, Events};

/// Runs SQL in another process, by a plain connection that does not wait. What it said.
fn elsewhere(path: &Path, sql: &str) -> String {
    let variables = [("DATABASE", path.to_str().unwrap()), ("SQL", sql)];
    Process::start(other_process, &variables).success().pop().expect("a word of the process")
}

#[test]
#[ignore = "run by other tests, as another process"]
fn other_process() {
    if !is_child() {
        return;
    }
    let connection = plain(Path::new(&variable("DATABASE")));
    connection.busy_timeout(std::time::Duration::ZERO).unwrap();
    let said = connection.prepare(&variable("SQL")).and_then(|mut statement| {
        let mut rows = statement.query([])?;
        Ok(rows.next()?.map_or_else(|| "done".to_string(), |row| format!("{:?}", row.get_ref(0).unwrap())))
    });
    speak(&said.unwrap_or_else(|error| error.to_string()));
}

async fn pair(dir: &Path) -> (Db, Db) {
    let p = Db::open(primary(&dir.join("p.db"), 0)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let r = Db::open(replica(&dir.join("r.db"), &url)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    (p, r)
}

/// What a careless library does.
fn open_and_close(path: &Path) {
    drop(std::fs::File::open(path).unwrap());
}

fn shm(path: &Path) -> PathBuf {
    let mut shm = path.as_os_str().to_owned();
    shm.push("-shm");
    shm.into()
}

async fn lost(events: &mut Events) -> u64 {
    loop {
        if let Some(Event::LocksLost { times, .. }) = within("the event", events.next()).await {
            return times;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_that_were_dropped_are_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = pair(dir.path()).await;
    insert(&p, "before", 1).await;
    for (round, name) in [(1, "database"), (2, "shm")] {
        for db in [&p, &r] {
            let mut events = db.events();
            open_and_close(&if name == "shm" { shm(db.path()) } else { db.path().to_path_buf() });
            assert_eq!(lost(&mut events).await, round, "{name}");
            until("the locks stand", || db.status().problem.is_none());
            assert_eq!(db.status().locks_lost, round);
        }
        // As before: no other process checkpoints, and none writes to a replica.
        until("nobody else checkpoints", || {
            elsewhere(p.path(), "PRAGMA wal_checkpoint(TRUNCATE)") == "Integer(1)"
        });
        assert_eq!(elsewhere(r.path(), "DELETE FROM t"), "database is locked");
        assert_eq!(elsewhere(p.path(), "INSERT INTO t(who) VALUES ('elsewhere')"), "done");
        let last = insert(&p, "after", 1).await;
        r.wait_for_timeout(last, LIMIT).await.unwrap();
    }
    assert_eq!(count(&r), 5);
    p.wait_for(p.position().unwrap().txid()).await.unwrap();
    assert_same_pages(p.path(), r.path());
    r.shutdown().await;
    p.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_slips_in_while_they_are_dropped_all_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = pair(dir.path()).await;
    for n in 0..50 {
        insert(&p, "before", n).await;
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for db in [&p, &r] {
                    open_and_close(&shm(db.path()));
                    open_and_close(db.path());
                }
            }
        });
        let _ends = Ends(&stop);
        for _ in 0..20 {
            assert_eq!(elsewhere(p.path(), "PRAGMA wal_checkpoint(TRUNCATE)"), "Integer(1)");
            assert_eq!(elsewhere(p.path(), "PRAGMA journal_mode = DELETE"), "database is locked");
            for sql in ["INSERT INTO t(who) VALUES ('slipped in')", "VACUUM", "PRAGMA journal_mode = DELETE"]
            {
                assert_eq!(elsewhere(r.path(), sql), "database is locked", "{sql}");
            }
        }
    });
    let last = insert(&p, "after", 1).await;
    r.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_eq!((p.status().problem, r.status().problem), (None, None));
    assert!(p.status().locks_lost > 0 && r.status().locks_lost > 0, "nothing was dropped");
    assert_same_pages(p.path(), r.path());
    r.shutdown().await;
    p.shutdown().await;
    // Nothing is left behind: others can do all of it now.
    assert_eq!(elsewhere(p.path(), "PRAGMA wal_checkpoint(TRUNCATE)"), "Integer(0)");
    assert_eq!(elsewhere(r.path(), "PRAGMA journal_mode = DELETE"), "Text([100, 101, 108, 101, 116, 101])");
}

/// The kernel does not know of a reader whose lock was dropped, so that another process may move
/// its mark to a newer state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_whose_lock_was_dropped_keeps_its_state() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    // Its rows lie in the database file, and in no frame of the WAL that begins with the node.
    let before = Connection::open(&path).unwrap();
    before.execute_batch(SCHEMA).unwrap();
    let fill = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 2000)
                INSERT INTO t(who, n, v) SELECT 'before', 0, zeroblob(500) FROM c";
    before.execute_batch(fill).unwrap();
    before.close().unwrap();
    let p = Db::open(primary(&path, 0)).await.unwrap();
    let mut events = p.events();
    let reader = Connection::open(&path).unwrap();
    reader.execute_batch("PRAGMA cache_size = 1; BEGIN").unwrap();
    reader.query_row("SELECT n FROM t LIMIT 1", [], |_| Ok(())).unwrap();
    let change = || async {
        p.write(|tx| Ok::<_, Error>(tx.execute("UPDATE t SET n = n + 1", [])?)).await.unwrap();
    };
    open_and_close(&shm(&path));
    change().await;
    assert_eq!(elsewhere(&path, "SELECT sum(n) FROM t"), "Integer(2000)");
    lost(&mut events).await;
    // Each is more than what makes a backfill worth its while, and the reader sees what one would
    // do.
    for _ in 0..40 {
        change().await;
        let sum: i64 = reader.query_row("SELECT sum(n) FROM t", [], |r| r.get(0)).unwrap();
        assert_eq!(sum, 0);
        assert_eq!(elsewhere(&path, "SELECT min(n) = max(n) FROM t"), "Integer(1)");
    }
    reader.execute_batch("COMMIT").unwrap();
    // Without the reader everything is copied back as ever.
    change().await;
    let copied = within("a checkpoint", p.checkpoint(LIMIT)).await.unwrap();
    assert!(matches!(copied, replite::Checkpoint::Done), "{copied:?}");
    p.shutdown().await;
}

/// Opens the database and closes it again, as often as it is told to, and says how often its locks
/// were lost.
#[test]
#[ignore = "runs as the child of another test"]
fn taking_over() {
    if !is_child() {
        return;
    }
    let path = PathBuf::from(variable("DB"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    loop {
        speak("closed");
        hear();
        speak("opening");
        let db = runtime.block_on(Db::open(primary(&path, 0))).unwrap();
        // What a checkpoint needs is looked at before it.
        db.write_blocking(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (1)", [])?)).unwrap();
        let copied = runtime.block_on(db.checkpoint(LIMIT)).unwrap();
        assert!(matches!(copied, replite::Checkpoint::Done), "{copied:?}");
        speak(&format!("open {} {:?}", db.status().locks_lost, db.status().problem));
        hear();
        runtime.block_on(db.shutdown());
    }
}

/// The one who leaves keeps its descriptors open for as long as the other has locks on the files,
/// and its marker with them was taken for a loss: each orderly hand-over was told as an error.
#[test]
fn a_hand_over_to_another_process_is_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let start = || Process::start(taking_over, &[("DB", path.to_str().unwrap())]);
    let mut processes = [start(), start()];
    processes.iter().for_each(|process| drop(process.expect("closed")));
    processes[0].say("open");
    for round in 0..6 {
        let (here, there) = (round % 2, (round + 1) % 2);
        assert_eq!(processes[here].expect("open"), "open 0 None", "round {round}");
        // It waits for the lock that it needs for life.
        processes[there].say("open");
        processes[there].expect("opening");
        processes[here].say("close");
        processes[here].expect("closed");
    }
    processes.into_iter().for_each(|process| drop(process.kill()));
}
