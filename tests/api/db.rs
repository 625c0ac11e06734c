//! A lone primary by its public handle.

use std::collections::HashSet;
use std::path::Path;

use crate::support::*;
use replite::rusqlite::{self, Connection};
use replite::{Commit, Config, Db, Durability, Error, Txid, Unsupported};

async fn open(dir: &tempfile::TempDir) -> Db {
    let config = Config::new(dir.path().join("app.db")).migrate(|c| c.execute_batch(SCHEMA));
    Db::open(config).await.unwrap()
}

#[derive(Debug)]
enum Own {
    Refused,
    Db,
}

impl From<Error> for Own {
    fn from(_: Error) -> Own {
        Own::Db
    }
}

impl From<rusqlite::Error> for Own {
    fn from(_: rusqlite::Error) -> Own {
        Own::Db
    }
}

fn add(tx: &rusqlite::Transaction<'_>) -> rusqlite::Result<usize> {
    tx.execute("INSERT INTO t(who) VALUES ('x')", [])
}

#[tokio::test]
async fn an_error_or_a_panic_rolls_back_and_the_next_write_works() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let refused = db
        .write(|tx| {
            add(tx)?;
            Err::<(), _>(Own::Refused)
        })
        .await;
    assert!(matches!(refused, Err(Own::Refused)));
    let panicked: Result<Commit<()>, Error> = db
        .write(|tx| {
            add(tx)?;
            panic!("on purpose")
        })
        .await;
    assert!(matches!(panicked, Err(Error::Panicked(why)) if why == "on purpose"));
    assert_eq!(count(&db), 0);
    let nothing = db.write(|_| Ok::<_, Error>(())).await.unwrap();
    assert_eq!(nothing.txid, None, "nothing was written");
    let same = db.write(|tx| Ok::<_, Own>(tx.execute("UPDATE t SET who = 'y'", [])?)).await.unwrap();
    assert_eq!(same.value, 0);
    let done = db.write(|tx| Ok::<_, Own>(add(tx)?)).await.unwrap();
    db.wait_for(done.txid.unwrap()).await.unwrap();
    assert_eq!(count(&db), 1);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_inside_a_write_and_a_blocking_one_on_a_worker_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let inner = db.clone();
    let nested = db
        .write(move |_| Ok::<_, Error>(inner.write_blocking(|tx| Ok::<_, Error>(add(tx)?)).err()))
        .await
        .unwrap();
    assert!(matches!(nested.value, Some(Error::Reentrant)));
    let worker = db.clone();
    let told = tokio::spawn(async move { worker.write_blocking(|tx| Ok::<_, Error>(add(tx)?)).err() });
    assert!(matches!(told.await.unwrap(), Some(Error::BlockingInAsync)));
    assert!(matches!(db.writer().err(), Some(Error::BlockingInAsync)));
    let blocking = db.clone();
    tokio::task::spawn_blocking(move || {
        blocking.write_blocking(|tx| Ok::<_, Error>(add(tx)?)).unwrap();
        let mut guard = blocking.writer().unwrap();
        assert!(matches!(blocking.write_blocking(|tx| Ok::<_, Error>(add(tx)?)), Err(Error::Reentrant)));
        guard
            .execute_batch("INSERT INTO t(who) VALUES ('g'); INSERT INTO t(who) VALUES ('g'); VACUUM")
            .unwrap();
        assert!(guard.flush().unwrap().is_some());
        assert_eq!(guard.flush().unwrap(), None);
        // What replaces our hook takes nothing from capture.
        guard.execute_batch("PRAGMA wal_autocheckpoint = 1000").unwrap();
        guard
            .execute_batch(
                "INSERT INTO t(who) VALUES ('h'); BEGIN; INSERT INTO t(who) VALUES ('rolled back')",
            )
            .unwrap();
        drop(guard);
        let after = blocking.write_blocking(|tx| Ok::<_, Error>(add(tx)?)).unwrap();
        assert!(after.txid.is_some(), "a commit without the hook is still seen");
    })
    .await
    .unwrap();
    assert_eq!(count(&db), 5);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writers_each_have_a_transaction_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for _ in 0..10 {
                    ids.push(db.write(|tx| Ok::<_, Error>(add(tx)?)).await.unwrap().txid.unwrap());
                }
                ids
            })
        })
        .collect();
    let mut ids = HashSet::new();
    for task in tasks {
        let own: Vec<Txid> = task.await.unwrap();
        assert!(own.is_sorted());
        ids.extend(own);
    }
    assert_eq!(ids.len(), 640);
    let last = ids.iter().max().unwrap();
    db.wait_for(*last).await.unwrap();
    assert_eq!(db.position().unwrap().txid(), *last, "the numbers are those that capture counts");
    assert_eq!(count(&db), 640);
    db.shutdown().await;
}

#[tokio::test]
async fn every_kind_of_commit_is_named_as_capture_counts_it() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let mut named = Vec::new();
    for sql in [
        "PRAGMA user_version = 1",
        "PRAGMA user_version = 1",
        "CREATE TABLE a(b)",
        "DROP TABLE a",
        "INSERT INTO t(who) VALUES ('x')",
        "UPDATE t SET who = who",
        "UPDATE t SET who = who",
        "DELETE FROM t",
        "SELECT 1",
        "CREATE INDEX ti ON t(who)",
        "REINDEX",
    ] {
        let commit = db.write(move |tx| Ok::<_, Error>(tx.execute_batch(sql)?)).await.unwrap();
        if let Some(txid) = commit.txid {
            db.wait_for(txid).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
            assert_eq!(db.position().unwrap().txid(), txid, "{sql}");
            named.push(sql);
        }
    }
    let changes = ["CREATE TABLE a(b)", "DROP TABLE a", "INSERT INTO t(who) VALUES ('x')", "DELETE FROM t"];
    assert!(changes.iter().all(|sql| named.contains(sql)) && !named.contains(&"SELECT 1"), "{named:?}");
    db.shutdown().await;
}

#[test]
fn a_current_thread_runtime_and_dropping_the_handle_work() {
    open_and_drop(|| 0);
}

#[test]
#[cfg(target_os = "linux")]
fn no_thread_outlives_its_database() {
    if alone(no_thread_outlives_its_database) {
        open_and_drop(threads);
    }
}

/// Opens a database again and again; `threads` says how many of its threads there are.
fn open_and_drop(threads: fn() -> usize) {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for round in 1..=3 {
            let db = open(&dir).await;
            db.write(|tx| Ok::<_, Error>(add(tx)?)).await.unwrap();
            assert_eq!(count(&db), round);
            let twice = Db::open(Config::new(dir.path().join("app.db"))).await;
            assert!(matches!(twice, Err(Error::AlreadyOpen { .. })));
            // Nobody waits for the disk where async tasks run; who opens the file again waits until
            // it is free.
            drop(db);
        }
        let db = open(&dir).await;
        let clone = db.clone();
        db.shutdown().await;
        db.shutdown().await;
        assert!(matches!(clone.write(|tx| Ok::<_, Error>(add(tx)?)).await, Err(Error::ShutDown)));
        assert!(matches!(clone.read(|_| Ok::<_, Error>(())), Err(Error::ShutDown)));
        // The thread that closed says so just before it ends.
        until("no thread is left", || threads() == 0);
    });
    let db = runtime.block_on(open(&dir));
    drop(db);
    assert_eq!(threads(), 0, "a plain thread closes by itself");
}

/// This process's threads that belong to a database, by their names, which are alike for all
/// databases.
#[cfg(target_os = "linux")]
fn threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with("replite-")).count()
}

#[tokio::test]
async fn functions_snapshots_and_unsynced_commits() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("app.db"))
        .durability(Durability::Unsynced)
        .migrate(|c| c.execute_batch(SCHEMA))
        .on_connect(|conn, _| {
            conn.create_scalar_function("twice", 1, rusqlite::functions::FunctionFlags::SQLITE_UTF8, |c| {
                Ok(c.get::<i64>(0)? * 2)
            })
        });
    let db = Db::open(config).await.unwrap();
    let commit = db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(n) VALUES (twice(21))", [])?)).await;
    let txid = commit.unwrap().txid.unwrap();
    db.wait_for(txid).await.unwrap();
    let n: i64 =
        db.read(|c| Ok::<_, Error>(c.query_row("SELECT twice(n) FROM t", [], |r| r.get(0))?)).unwrap();
    assert_eq!(n, 84);
    let nested = db.read(|_| db.read(|c| Ok::<_, Error>(c.is_autocommit())));
    assert!(nested.unwrap());
    let copy = dir.path().join("copy.db");
    let position = db.snapshot_to(&copy).await.unwrap();
    assert_eq!(position.txid(), txid);
    assert!(
        matches!(db.snapshot_to(db.path()).await, Err(Error::Config(_))),
        "never over the database itself"
    );
    let plain = Connection::open(&copy).unwrap();
    assert_eq!(plain.query_row("SELECT n FROM t", [], |r| r.get::<_, i64>(0)).unwrap(), 42);
    // The same to be read, and nothing of it stays.
    let left = dir.path().join("app.db-replite/snapshot-left");
    let mut read = Vec::new();
    let mut snapshot = db.snapshot().await.unwrap();
    assert_eq!(snapshot.position().txid(), txid);
    tokio::io::AsyncReadExt::read_to_end(&mut snapshot, &mut read).await.unwrap();
    assert_eq!(read.len() as u64, snapshot.len());
    drop(snapshot);
    assert_eq!(read, std::fs::read(&copy).unwrap());
    let side = || std::fs::read_dir(left.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name());
    let names: Vec<_> = side().map(|name| name.into_string().unwrap()).collect();
    assert!(!names.is_empty() && !names.iter().any(|name| name.starts_with("snapshot-")), "{names:?}");
    std::fs::write(&left, "of a process that was killed").unwrap();
    assert!(db.health().can_read && db.health().can_write);
    assert_eq!(db.verify_token(db.token(txid).unwrap().as_str()), Some(txid));
    db.shutdown().await;
    let db = Db::open(Config::new(db.path())).await.unwrap();
    assert!(!left.exists());
    db.shutdown().await;
}

#[tokio::test]
async fn what_cannot_be_served_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let reason = |path: &Path| {
        let config = Config::new(path).database("x");
        async {
            match Db::open(config).await {
                Err(Error::Unsupported { reason, .. }) => reason,
                other => panic!("{other:?}"),
            }
        }
    };
    assert_eq!(reason(Path::new(":memory:")).await, Unsupported::InMemory);
    assert_eq!(reason(dir.path()).await, Unsupported::NotAFile);
    let garbage = dir.path().join("garbage.db");
    std::fs::write(&garbage, vec![7; 10_000]).unwrap();
    assert_eq!(reason(&garbage).await, Unsupported::NotADatabase);
    assert_eq!(std::fs::read(&garbage).unwrap(), vec![7; 10_000]);
    if Path::new("/proc/self").exists() {
        let nowhere = reason(Path::new("/proc/x.db")).await;
        assert!(matches!(nowhere, Unsupported::ReadOnlyDirectory(_)), "{nowhere:?}");
    }
    // A rollback-mode database is turned to WAL.
    let old = dir.path().join("old.db");
    Connection::open(&old).unwrap().execute_batch("PRAGMA journal_mode = DELETE; CREATE TABLE t(a)").unwrap();
    let db = Db::open(Config::new(&old)).await.unwrap();
    let mode: String =
        db.read(|c| Ok::<_, Error>(c.query_row("PRAGMA journal_mode", [], |r| r.get(0))?)).unwrap();
    assert_eq!(mode, "wal");
    db.shutdown().await;
}

#[test]
fn futures_are_send() {
    fn send<F: Future + Send>(_: F) {}
    fn check(db: &Db, txid: Txid) {
        let _ = |config| send(Db::open(config));
        let _ = || send(db.write(|tx| Ok::<_, Error>(add(tx)?)));
        let _ = || send(db.read_async(|_| Ok::<_, Error>(())));
        let _ = || send(db.wait_for(txid));
        let _ = || send(db.shutdown());
    }
    let _ = check;
}
