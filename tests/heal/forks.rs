//! Nodes that left the history: they are led back by their difference, and what they had is kept.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::{Db, LostBranch};

use crate::fork::*;
use crate::support::*;

/// Something random through a node's writer, as one transaction or as what can't be one.
async fn mutate(db: &Db, rng: &mut StdRng) {
    let at = rng.random_range(0..2000);
    let sql = match rng.random_range(0..12) {
        0 => "VACUUM".into(),
        1 => format!("DELETE FROM t WHERE id % {} = 0", rng.random_range(2..9)),
        2 => format!("CREATE TABLE IF NOT EXISTS x{} (a, b)", at % 7),
        3 => format!("DROP TABLE IF EXISTS x{}", at % 7),
        4 => format!("INSERT INTO t(who, v) VALUES ('big', randomblob({}))", at * 20),
        5..8 => format!(
            "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < {})
             INSERT INTO t(who, n, v) SELECT 'many', i, randomblob(100) FROM c",
            at % 200 + 1
        ),
        _ => format!("UPDATE t SET n = n + 1, v = randomblob(120) WHERE id BETWEEN {at} AND {at} + 9"),
    };
    run(db, sql).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_promoted_by_mistake_heals_and_its_branch_is_kept() {
    let fork = Fork::new();
    let a = open(fork.primary("a")).await;
    let many = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 20000)
                INSERT INTO t(who, n, v) SELECT 'before', i, randomblob(300) FROM c";
    run(&a, many.into()).await;
    for n in 0..50 {
        insert(&a, "before", n).await;
    }
    a.shutdown().await;
    let common = position(&a);
    fork.copy("a", "b");
    let (a, b) = (open(fork.primary("a")).await, open(fork.alone("b")).await);
    for n in 0..100 {
        let sql = match n {
            7 => "DELETE FROM t WHERE id = 8000".into(),
            8 => "CREATE TABLE \"new \"\"one\" (a, b); INSERT INTO \"new \"\"one\" VALUES (x'00ff', 1.5)"
                .into(),
            _ => format!("UPDATE t SET who = 'lost' WHERE id = {}", n * 150 + 1),
        };
        run(&b, sql).await;
        if n % 10 == 0 {
            insert(&a, "kept", n).await;
        }
    }
    b.shutdown().await;
    let tip = position(&b);
    let size = fs::metadata(fork.path("b")).unwrap().len() / 4096;
    assert!(size > 1500, "{size} pages");

    let b = open(fork.replica("b")).await;
    let mut events = b.events();
    let (pages, kept) = healed(&mut events).await;
    equal(&a, &b).await;
    assert!((90..150).contains(&pages), "{pages} pages came for about a hundred that differ");
    let branch = only_branch(&b).await;
    assert_eq!((branch.fork, branch.tip), (Some(common), tip));
    assert_eq!(Some(branch.path()), kept.as_deref());
    assert!((90..150).contains(&branch.pages), "{branch:?}");
    assert!(branch.record_bytes > 100 * 100);
    shown(&branch, &fork.path("export"));
    let status = b.status();
    assert_eq!((status.heals, status.problem), (1, None));
    a.shutdown().await;
    b.shutdown().await;
}

/// A lost branch of a hundred transactions: 98 updates, a deletion, a new table.
fn shown(branch: &LostBranch, export: &Path) {
    assert!((100..=101).contains(&branch.transactions().unwrap().len()));
    let mut pages = 0;
    branch
        .visit_pages(|_, page| {
            pages += 1;
            assert_eq!(page.len(), 4096);
            Ok(())
        })
        .unwrap();
    assert_eq!(pages, branch.pages);
    let rows = branch.rows().unwrap().unwrap();
    assert!(!rows.truncated);
    let who = |side: &Option<serde_json::Map<String, serde_json::Value>>| side.as_ref()?.get("who").cloned();
    let updates = rows.rows.iter().filter(|r| who(&r.lost) == Some("lost".into()));
    assert!(updates.clone().all(|r| who(&r.kept) == Some("before".into()) && r.rowid % 150 == 1));
    assert_eq!(updates.count(), 98);
    let deleted = rows.rows.iter().find(|r| r.rowid == 8000).unwrap();
    assert_eq!((&deleted.lost, who(&deleted.kept)), (&None, Some("before".into())));
    let new = rows.rows.iter().find(|r| r.table == "new \"one").unwrap();
    assert_eq!(new.lost.as_ref().unwrap()["a"], serde_json::json!({ "blob": "00ff" }));

    branch.export(export).unwrap();
    assert!(branch.export(export).is_err(), "what is there is not overwritten");
    let file = plain(export);
    let count = |sql: &str| file.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
    assert_eq!(count("SELECT count(*) FROM replite_pages") as u64, branch.pages);
    assert_eq!(count("SELECT count(*) FROM lost_t WHERE who = 'lost' AND replite_rowid = id"), 98);
    assert_eq!(count("SELECT count(*) FROM \"lost_new \"\"one\" WHERE a = x'00ff' AND b = 1.5"), 1);
    let tip: String =
        file.query_row("SELECT value FROM replite_branch WHERE name = 'tip'", [], |r| r.get(0)).unwrap();
    assert_eq!(tip, branch.tip.to_string());
}

/// What stands between the fork and the heal.
#[derive(Clone, Copy, Debug)]
enum Trail {
    /// Both logs reach back to the fork.
    Logs,
    /// The replica's log is gone.
    NoLog,
    /// Beside its own commits, somebody wrote to the replica's file while its node was down.
    Strays,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_both_sides_did_since_the_fork_the_replica_ends_as_the_primary() {
    for seed in 0..18 {
        let trail = [Trail::Logs, Trail::NoLog, Trail::Strays][seed as usize % 3];
        eprintln!("seed {seed}, {trail:?}");
        after_a_fork(seed, trail).await;
    }
}

async fn after_a_fork(seed: u64, trail: Trail) {
    let mut rng = StdRng::seed_from_u64(seed);
    let fork = Fork::new();
    let a = open(fork.primary("a")).await;
    for _ in 0..rng.random_range(1..20) {
        mutate(&a, &mut rng).await;
    }
    a.shutdown().await;
    fork.copy("a", "b");
    let (a, b) = (open(fork.primary("a")).await, open(fork.alone("b")).await);
    for _ in 0..rng.random_range(0..20) {
        mutate(&a, &mut rng).await;
    }
    for _ in 0..rng.random_range(1..20) {
        mutate(&b, &mut rng).await;
    }
    b.shutdown().await;
    let mut tip = Some(position(&b));
    match trail {
        Trail::Logs => {}
        Trail::NoLog => fs::remove_dir_all(fork.path("b").with_extension("db-replite").join("log")).unwrap(),
        Trail::Strays => {
            plain(&fork.path("b")).execute_batch("INSERT INTO t(who) VALUES ('stray')").unwrap();
            tip = None;
        }
    }
    // The heal meets commits that are made meanwhile.
    let (stop, a2) = (Arc::new(AtomicBool::new(false)), a.clone());
    let busy = stop.clone();
    let writer = tokio::spawn(async move {
        while !busy.load(Ordering::SeqCst) {
            mutate(&a2, &mut rng).await;
        }
    });
    let b = open(fork.replica("b")).await;
    healed(&mut b.events()).await;
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    equal(&a, &b).await;
    let branch = only_branch(&b).await;
    assert!(tip.is_none_or(|tip| tip == branch.tip), "{branch:?} is not of {tip:?}");
    a.shutdown().await;
    b.shutdown().await;
    // And once more from its own files.
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    equal(&a, &b).await;
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_wrote_to_a_replica_never_passes_for_the_primarys_transactions() {
    let fork = Fork::new();
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    for n in 0..5 {
        insert(&a, "both", n).await;
    }
    equal(&a, &b).await;
    b.shutdown().await;
    insert(&a, "a", 0).await;
    a.shutdown().await;
    let here = position(&a);
    // The same number, in the file of a node that opened no epoch, and that is then made the
    // primary.
    plain(&fork.path("b")).execute_batch("INSERT INTO t(who) VALUES ('stranger')").unwrap();
    let b = open(fork.primary("b")).await;
    assert_eq!(position(&b).number(), here.number());
    assert!(position(&b).epoch().number() > here.epoch().number(), "{} like {here}", position(&b));
    let a = open(fork.replica("a")).await;
    healed(&mut a.events()).await;
    equal(&b, &a).await;
    assert_eq!(only_branch(&a).await.tip, here);
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_the_disk_damaged_is_healed_when_a_transaction_meets_it() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    flip_row(&fork, "b", 4500);
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    let mut events = b.events();
    // Another column of the same row, and so of the same page.
    run(&a, "UPDATE t SET n = -1 WHERE id = 4500".into()).await;
    let (pages, kept) = healed(&mut events).await;
    assert!(pages <= 8, "{pages} pages came for one that was damaged");
    equal(&a, &b).await;
    let branch = only_branch(&b).await;
    assert!(branch.damaged && kept.is_some(), "{branch:?}");
    assert_eq!(b.status().problem, None);
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_the_disk_damaged_and_nobody_touches_is_healed_after_a_verification() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    flip_row(&fork, "b", 4500);
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    let mut events = b.events();
    let found = b.verify().await.unwrap();
    assert!(!found.holds());
    let (pages, kept) = healed(&mut events).await;
    assert!(pages <= 8 && kept.is_some(), "{pages} pages came for one that was damaged");
    let found = b.verify().await.unwrap();
    assert!(found.holds(), "{found:?}");
    assert_eq!(b.status().problem, None);
    equal(&a, &b).await;
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_the_primarys_disk_damaged_is_passed_by_comparison() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    let a = open(small_log(&fork)).await;
    let marked = "UPDATE t SET v = 'marked-' || hex(randomblob(100)) WHERE id = 10";
    run(&a, marked.into()).await;
    // More than the newest two segments, which are verified at open.
    for _ in 0..3 {
        run(&a, format!("INSERT INTO t(who, v) VALUES ('big', randomblob({}))", 3 << 20)).await;
    }
    a.shutdown().await;
    let log = fork.path("a").with_extension("db-replite").join("log");
    let mut segments: Vec<_> = fs::read_dir(&log).unwrap().map(|e| e.unwrap().path()).collect();
    segments.sort();
    assert!(segments.len() > 2, "{segments:?}");
    let with_mark = |path: &&PathBuf| fs::read(path).unwrap().windows(7).any(|w| w == b"marked-");
    flip_where(segments.iter().rev().find(with_mark).unwrap(), b"marked-");
    let (a, b) = (open(small_log(&fork)).await, open(fork.replica("b")).await);
    let (pages, kept) = healed(&mut b.events()).await;
    assert!(pages > 1000 && kept.is_none(), "{pages} pages, kept at {kept:?}");
    equal(&a, &b).await;
    a.shutdown().await;
    b.shutdown().await;
}
