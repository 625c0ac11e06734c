//! Verification: it holds beside everything else that goes on, and finds what the disk or a stray
//! hand changed.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use replite::rusqlite::Transaction;
use replite::{Db, Error, Event, Events, Role, Txid, Verification};

/// Another process at the database, one statement after the other, until it is killed: the shell
/// where there is one.
#[test]
#[ignore = "runs as the child of another test"]
fn foreign_writer() {
    if !is_child() {
        return;
    }
    let connection = plain(&PathBuf::from(variable("DB")));
    speak("open");
    let others = || connection.query_row("PRAGMA data_version", [], |r| r.get::<_, i64>(0)).unwrap();
    for n in 0i64.. {
        let before = others();
        connection.execute("INSERT INTO t(who, n, v) VALUES ('foreign', ?1, randomblob(3000))", [n]).unwrap();
        if n % 50 == 0 {
            speak("wrote");
            // Refused, but tried.
            let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        }
        // It syncs while it has the write lock; on a slow disk nobody else would get that.
        until("others commit", || others() != before);
    }
}

/// Flips a bit of the file at a byte, and leaves the time of its last change as it was, as a disk
/// would.
fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.set_modified(modified).unwrap();
}

/// The same from another process: a descriptor of the file that is closed in this one would cost
/// SQLite its locks.
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
    Process::start(flipping_process, &[("DB", path.to_str().unwrap()), ("AT", &at)]).expect("flipped");
}

async fn next_failed(events: &mut Events) -> Verification {
    within("a failed verification", async {
        loop {
            match events.next().await {
                Some(Event::VerificationFailed { verification: found, .. }) => return found,
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
        let sql = "INSERT INTO t(who, n, v) VALUES ('before', ?1, 'marker' || hex(randomblob(3000)))";
        for n in 0..rows {
            tx.execute(sql, [n])?;
        }
        Ok::<_, Error>(())
    });
    commit.await.unwrap().txid.unwrap()
}

/// Waits until the WAL was begun anew after a transaction, so that its pages are read from the
/// file.
async fn until_in_the_file(db: &Db, last: Txid) {
    while within("a verification", db.verify()).await.unwrap().position.number() < last.number() {}
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
    let last = fill(&db, 200).await;
    until_in_the_file(&db, last).await;
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
    let ends = Ends(&stop);
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
    let foreign = Process::start(foreign_writer, &[("DB", p.to_str().unwrap())]);
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
    drop(ends);
    for writer in writers {
        writer.join().unwrap();
    }
    positions.dedup();
    assert!(positions.len() > 10, "hardly anything was committed between: {positions:?}");
    assert_eq!(primary.status().verification.map(|v| v.holds()), Some(true));
    // What the writers left in the WAL is copied back by itself.
    within("no problem", async {
        while primary.status().problem.is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
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
        until_in_the_file(db, last).await;
        let size = page_size(db);
        let page = 20;
        let mut events = db.events();
        flip_outside(db.path(), size * (page - 1) + 100);
        let found = db.verify().await.unwrap();
        assert!(!found.holds());
        assert_eq!(next_failed(&mut events).await, found);
        let named: Vec<u64> = found.bad_pages.iter().map(|page| u64::from(page.get())).collect();
        assert_eq!(named, [page]);
        if db.role() == Role::Primary {
            assert!(db.status().problem.is_some());
            flip_outside(db.path(), size * (page - 1) + 100);
        } else {
            // The primary has the right page.
            let heal = async { while !matches!(events.next().await, Some(Event::Healed { .. })) {} };
            within("the heal", heal).await;
        }
        assert!(db.verify().await.unwrap().holds());
        assert_eq!(db.status().problem, None);
    }
    target.shutdown().await;
    source.shutdown().await;
}

/// Found by nobody but the verification, and by none after a restart: the next transactions went
/// over it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_verification_found_is_known_after_a_restart_until_it_is_healed() {
    const NOBODY: &str = "http://127.0.0.1:1";
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
    let url = format!("http://127.0.0.1:{port}");
    let source = Db::open(primary(&p, port)).await.unwrap();
    let target = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", target.ready()).await.unwrap();
    let last = fill(&source, 200).await;
    target.wait_for_timeout(last, LIMIT).await.unwrap();
    for db in [&source, &target] {
        until_in_the_file(db, last).await;
        db.shutdown().await;
    }
    let (of_p, of_r) = (marker_in(&p) + 100, marker_in(&r) + 100);
    // What was found, by whoever runs there; it is the same with each start from then on.
    let found = |db: &Db| {
        let problem = db.status().problem.unwrap_or_default();
        problem.contains("the pages are not those of position").then_some(problem)
    };
    flip(&p, of_p);
    flip(&r, of_r);
    for (path, config) in [(&p, primary(&p, port)), (&r, replica(&r, NOBODY))] {
        let db = Db::open(config.clone()).await.unwrap();
        assert_eq!(found(&db), None);
        assert!(!db.verify().await.unwrap().holds());
        assert!(found(&db).is_some());
        db.shutdown().await;
        for _ in 0..2 {
            let db = Db::open(config.clone()).await.unwrap();
            assert!(found(&db).is_some(), "{}: {:?}", path.display(), db.status().problem);
            db.shutdown().await;
        }
    }
    // The disk of the primary has the right bytes again, which a verification finds.
    flip(&p, of_p);
    let source = Db::open(primary(&p, port)).await.unwrap();
    assert!(found(&source).is_some());
    assert!(source.verify().await.unwrap().holds());
    assert_eq!(source.status().problem, None);
    let source = {
        source.shutdown().await;
        Db::open(primary(&p, port)).await.unwrap()
    };
    assert_eq!(found(&source), None);
    // The replica is healed, without a further verification.
    let target = Db::open(replica(&r, &url)).await.unwrap();
    until("the heal", || target.status().heals == 1);
    until("all is well", || target.status().problem.is_none());
    assert!(target.verify().await.unwrap().holds());
    assert_same_pages(&p, &r);
    target.shutdown().await;
    let target = Db::open(replica(&r, NOBODY)).await.unwrap();
    assert_eq!(found(&target), None);
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
        let good =
            |event| matches!(event, Some(Event::Verified { verification, .. }) if verification.holds());
        while !good(events.next().await) {}
    })
    .await;
    assert_eq!(db.status().problem, None);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_at_the_same_time_share_one() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = closed_primary(dir.path(), 0).await;
    // Slow enough that the second call finds the first one's running.
    let db = Db::open(primary(&path, 0).verify_limit(4_000_000.try_into().unwrap())).await.unwrap();
    let mut events = db.events();
    let (one, other) = tokio::join!(db.verify(), db.verify());
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one, other);
    let third = db.verify().await.unwrap();
    let mut told = Vec::new();
    while told.last() != Some(&third) {
        if let Some(Event::Verified { verification: found, .. }) = within("an event", events.next()).await {
            told.push(found);
        }
    }
    assert_eq!(told, [one, third]);
    db.shutdown().await;
}

#[test]
fn a_shutdown_ends_it_at_once() {
    // In a process of its own, whose threads are all of this test.
    Process::start(verifying_and_ending, &[]).expect("ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn verifying_and_ending() {
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

/// Has the newest anchor say what it says while frames are being copied into the file, as a node
/// leaves it that is killed then: the last of them take the place of this image of a page.
fn killed_in_a_backfill(database: &Path, page: u32, older: &[u8]) {
    let mut path = database.as_os_str().to_owned();
    path.push("-replite/anchors");
    let mut bytes = fs::read(&path).unwrap();
    let sequence = |at: usize| u64::from_le_bytes(bytes[at + 16..at + 24].try_into().unwrap());
    let newest = if bytes.len() > 4096 && sequence(4096) > sequence(0) { 4096 } else { 0 };
    let slot = &mut bytes[newest..newest + 256];
    slot[92..96].copy_from_slice(&1u32.to_le_bytes());
    // In the place of what it says of a file at rest.
    slot[120..216].fill(0);
    slot[120..124].copy_from_slice(&page.to_le_bytes());
    let mut keys = database.as_os_str().to_owned();
    keys.push("-replite/database-keys");
    // After magic and version.
    let key = [&fs::read(keys).unwrap()[12..40], &page.to_le_bytes()].concat();
    let hash = blake3::keyed_hash(&key.try_into().unwrap(), older);
    slot[124..132].copy_from_slice(&hash.as_bytes()[..8]);
    let check = blake3::hash(&slot[..240]);
    slot[240..].copy_from_slice(&check.as_bytes()[..16]);
    fs::write(&path, bytes).unwrap();
}

fn remove_wal(database: &Path) {
    for end in ["-wal", "-shm"] {
        let mut path = database.as_os_str().to_owned();
        path.push(end);
        fs::remove_file(path).unwrap();
    }
}

/// Puts older images of some pages into the file of a closed node: a part of the rows is as before,
/// and the rest as after it.
fn mix(database: &Path, older: &[u8]) {
    let file = fs::File::options().write(true).open(database).unwrap();
    file.write_all_at(&older[100 * 4096..200 * 4096], 100 * 4096).unwrap();
}

/// Takes the end of the file of a closed node away.
fn shorten(database: &Path) {
    fs::File::options().write(true).open(database).unwrap().set_len(50 * 4096).unwrap();
}

/// Changes rows that [`fill`] made, each in its place. The images of before, and the last
/// transaction.
async fn change_all(db: &Db) -> (Vec<u8>, Txid) {
    let before = plain(db.path()).serialize("main").unwrap().to_vec();
    let change = |tx: &mut Transaction<'_>| {
        Ok::<_, Error>(tx.execute("UPDATE t SET who = 'behind' WHERE who = 'before'", [])?)
    };
    db.write(change).await.unwrap();
    // The change alone would not fill the WAL.
    (before, fill(db, 100).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_primary_says_what_it_needs_and_goes_on_only_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(primary(&path, 0)).await.unwrap();
    let last = fill(&db, 200).await;
    until_in_the_file(&db, last).await;
    let (older, last) = change_all(&db).await;
    until_in_the_file(&db, last).await;
    let before = db.position().unwrap();
    db.shutdown().await;
    killed_in_a_backfill(&path, 200, &older[199 * 4096..200 * 4096]);
    mix(&path, &older);
    remove_wal(&path);
    for _ in 0..2 {
        let refused = Db::open(primary(&path, 0)).await;
        let Err(Error::Damaged { path: of, what }) = refused else { panic!("{refused:?}") };
        assert_eq!(of, path);
        assert!(
            what.contains("WAL is gone") && what.contains("replica") && what.contains("accept_damaged"),
            "{what}"
        );
    }
    let db = Db::open(primary(&path, 0).accept_damaged(true)).await.unwrap();
    let after = db.position().unwrap();
    assert!(after.epoch() > before.epoch() && after.number() > before.number(), "{before} {after}");
    assert!(db.verify().await.unwrap().holds());
    assert_eq!(count(&db), 300);
    db.shutdown().await;
    // It is an ordinary database from now on.
    let db = Db::open(primary(&path, 0)).await.unwrap();
    assert!(db.verify().await.unwrap().holds());
    db.shutdown().await;
}

/// The root of the table's tree, gone.
fn wipe(database: &Path) {
    let file = fs::File::options().write(true).open(database).unwrap();
    file.write_all_at(&[0; 4096], 4096).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_sqlite_finds_broken_never_becomes_history() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = closed_primary(dir.path(), 0).await;
    let whole = fs::read(&path).unwrap();
    // Changed by somebody else, while the node was down, and at rest before: no question of a
    // backfill. The log would make it good.
    let (log, aside) = (dir.path().join("p.db-replite/log"), dir.path().join("log"));
    fs::rename(&log, &aside).unwrap();
    wipe(&path);
    let refused = Db::open(primary(&path, 0)).await;
    let Err(Error::Damaged { what, .. }) = refused else { panic!("{refused:?}") };
    assert!(what.contains("integrity_check") && !what.contains("accept_damaged"), "{what}");
    // Nor when damage is accepted.
    killed_in_a_backfill(&path, 2, &[0; 4096]);
    remove_wal(&path);
    let refused = Db::open(primary(&path, 0).accept_damaged(true)).await;
    assert!(matches!(&refused, Err(Error::Damaged { .. })), "{refused:?}");
    // One with which SQLite does not even begin.
    fs::write(&path, &whole).unwrap();
    shorten(&path);
    let refused = Db::open(primary(&path, 0)).await;
    assert!(
        matches!(&refused, Err(Error::Damaged { what, .. }) if what.contains("integrity_check")),
        "{refused:?}"
    );
    // With its log it is what it was, and what was there instead is kept.
    fs::remove_dir_all(&log).unwrap();
    fs::rename(&aside, &log).unwrap();
    let db = Db::open(primary(&path, 0)).await.unwrap();
    assert_eq!(count(&db), 200);
    assert!(db.verify().await.unwrap().holds());
    assert!(db.lost().await.unwrap().iter().any(|lost| lost.branch().is_some_and(|branch| branch.damaged)));
    db.shutdown().await;
    // The bytes as they were are the state that they were.
    fs::write(&path, whole).unwrap();
    let db = Db::open(primary(&path, 0)).await.unwrap();
    assert_eq!(count(&db), 200);
    assert!(db.verify().await.unwrap().holds());
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_replica_is_not_read_from_and_led_back() {
    for (why, harm) in
        [("its WAL is gone", mix as fn(&Path, &[u8])), ("no state of the cluster", |path, _| shorten(path))]
    {
        damaged_replica(why, harm).await;
    }
}

async fn damaged_replica(why: &str, harm: fn(&Path, &[u8])) {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let source = Db::open(primary(&p, 0)).await.unwrap();
    let url = source.node().addresses.replication.clone();
    let target = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", target.ready()).await.unwrap();
    let last = fill(&source, 200).await;
    target.wait_for_timeout(last, LIMIT).await.unwrap();
    let (older, last) = change_all(&source).await;
    target.wait_for_timeout(last, LIMIT).await.unwrap();
    until_in_the_file(&target, last).await;
    target.shutdown().await;
    killed_in_a_backfill(&r, 200, &older[199 * 4096..200 * 4096]);
    harm(&r, &older);
    remove_wal(&r);
    // Without its primary it has nothing to read, and says why.
    let target = Db::open(replica(&r, "http://127.0.0.1:1")).await.unwrap();
    let refused = target.read(|_| Ok::<_, Error>(()));
    assert!(matches!(&refused, Err(Error::NoState(told)) if told.contains(why)), "{refused:?}");
    assert!(target.status().problem.unwrap().contains(why));
    target.shutdown().await;
    let target = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", target.ready()).await.unwrap();
    target.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(target.verify().await.unwrap().holds());
    assert!(!target.lost().await.unwrap().is_empty(), "what was there is kept");
    target.shutdown().await;
    source.shutdown().await;
}

#[test]
fn a_full_hash_at_open_is_told_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    Process::start(opening_process, &[("DB", path.to_str().unwrap())]).expect("told");
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn opening_process() {
    if !is_child() {
        return;
    }
    let lines = Lines::default();
    let writer = lines.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let told = || String::from_utf8(std::mem::take(&mut *lines.0.lock().unwrap())).unwrap();
    let path = PathBuf::from(variable("DB"));
    let (path, _) = closed_primary(path.parent().unwrap(), 0).await;
    told();
    // Nothing was changed: nothing is hashed.
    Db::open(primary(&path, 0)).await.unwrap().shutdown().await;
    let said = told();
    assert!(!said.contains("hash"), "{said}");
    // Somebody touched the file: it may have been written to.
    fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    let db = Db::open(primary(&path, 0)).await.unwrap();
    let said = told();
    assert!(said.contains("hashing the database") && said.contains("hashed the database"), "{said}");
    assert_eq!(db.status().problem, None);
    db.shutdown().await;
    speak("told");
}
