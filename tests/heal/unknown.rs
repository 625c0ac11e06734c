//! A database where a replica is to be that is no state of the cluster, or whose position has lost
//! its name.

use std::fs;
use std::path::{Path, PathBuf};

use crate::fork::*;
use crate::support::*;
use replite::rusqlite::Connection;
use replite::{Db, Error};

/// A connection that closes as the shell does: as the last one it copies the WAL back and deletes
/// it.
fn shell(path: &Path, sql: &str) {
    let connection = Connection::open(path).unwrap();
    connection.execute_batch(sql).unwrap();
    connection.close().unwrap();
}

/// A file of the replica.
fn beside(fork: &Fork, end: &str) -> PathBuf {
    PathBuf::from(format!("{}{end}", fork.path("b").display()))
}

fn remove_wal(path: &Path) {
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{end}", path.display()));
    }
}

fn lost(fork: &Fork) -> Vec<String> {
    let Ok(entries) = fs::read_dir(beside(fork, "-replite/lost")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// One statement of a shell used to cost a copy of all in `lost`, and a snapshot of all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_shell_wrote_to_a_closed_replica_costs_the_pages_that_it_wrote() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    let wal = beside(&fork, "-wal");
    assert!(wal.exists());
    shell(&fork.path("b"), "UPDATE t SET who = 'stray' WHERE id = 5");
    assert!(!wal.exists());
    // Opened without its primary it is not read from, however often.
    for _ in 0..2 {
        let b = Db::open(replica(&fork.path("b"), "http://127.0.0.1:1")).await.unwrap();
        let refused = b.read(|_| Ok::<_, Error>(()));
        assert!(matches!(&refused, Err(Error::NoState(why)) if why.contains("no state")), "{refused:?}");
        assert_eq!(b.position(), None);
        b.shutdown().await;
    }
    let a = open(small_log(&fork)).await;
    let b = open(fork.replica("b")).await;
    let (pages, kept) = healed(&mut b.events()).await;
    assert!(pages < 60, "{pages} pages came");
    equal(&a, &b).await;
    assert_eq!(b.status().problem, None);
    let branch = only_branch(&b).await;
    assert_eq!(Some(branch.path()), kept.as_deref());
    assert_eq!((branch.record_bytes, branch.fork), (0, None));
    let rows = branch.rows().unwrap().unwrap().rows;
    let stray = rows.iter().find(|row| row.rowid == 5).unwrap();
    assert_eq!(stray.lost.as_ref().unwrap()["who"], "stray");
    assert_eq!(stray.kept.as_ref().unwrap()["who"], "old");
    assert_eq!(lost(&fork).len(), 1, "{:?}", lost(&fork));
    assert!(b.verify().await.unwrap().holds());
    b.shutdown().await;
    // It is a state like any other now.
    let b = open(fork.replica("b")).await;
    assert!(b.position().is_some());
    equal(&a, &b).await;
    b.shutdown().await;
    a.shutdown().await;
}

/// The commits on top of a state without a name were counted, and got names that are other states'.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_on_top_of_a_state_without_a_name_give_it_none() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    shell(&fork.path("b"), "UPDATE t SET who = 'stray' WHERE id = 5");
    let alone = || Db::open(replica(&fork.path("b"), "http://127.0.0.1:1"));
    alone().await.unwrap().shutdown().await;
    plain(&fork.path("b")).execute_batch("UPDATE t SET who = 'more' WHERE id = 6").unwrap();
    let b = alone().await.unwrap();
    assert_eq!(b.position(), None);
    b.read(|_| Ok::<_, Error>(())).unwrap_err();
    b.shutdown().await;
    let (a, b) = (open(small_log(&fork)).await, open(fork.replica("b")).await);
    within("the heal", b.ready()).await.unwrap();
    equal(&a, &b).await;
    let rows = only_branch(&b).await.rows().unwrap().unwrap().rows;
    let whose = |who: &str| rows.iter().filter(|row| row.lost.as_ref().unwrap()["who"] == who).count();
    assert_eq!((whose("stray"), whose("more")), (1, 1));
    b.shutdown().await;
    a.shutdown().await;
}

/// It never started again: the records of its log, which lead on from its file, were of no epoch
/// that it knew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_lost_its_epochs_and_its_wal_comes_back() {
    for harm in ["missing", "empty", "older"] {
        let fork = Fork::new();
        let epochs = beside(&fork, "-replite/epochs");
        equal_pair(&fork).await;
        let older = fs::read(&epochs).unwrap();
        equal_pair(&fork).await;
        match harm {
            "missing" => fs::remove_file(&epochs).unwrap(),
            "empty" => fs::write(&epochs, []).unwrap(),
            _ => fs::write(&epochs, older).unwrap(),
        }
        remove_wal(&fork.path("b"));
        let b = Db::open(fork.replica("b")).await.unwrap_or_else(|error| panic!("{harm}: {error}"));
        let a = open(small_log(&fork)).await;
        within("ready", b.ready()).await.unwrap();
        equal(&a, &b).await;
        assert!(b.verify().await.unwrap().holds(), "{harm}");
        // That nobody was there before is over once the stream goes on.
        until("no problem", || b.status().problem.is_none());
        assert_eq!(lost(&fork), Vec::<String>::new(), "{harm}: nothing was lost");
        b.shutdown().await;
        a.shutdown().await;
    }
}
