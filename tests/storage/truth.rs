//! What is left of a node's files after a disk, an administrator or a shell had them: a committed
//! state comes of it, or a refusal; and what was committed is in the history, or in `lost`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::Connection;
use replite::{Checkpoint, Config, Db, Error, Event};

use crate::fork::*;
use crate::support::*;

fn beside(path: &Path, end: &str) -> PathBuf {
    PathBuf::from(format!("{}{end}", path.display()))
}

fn remove_wal(path: &Path) {
    for end in ["-wal", "-shm"] {
        let _ = fs::remove_file(beside(path, end));
    }
}

/// What is in `lost`, by the names there.
fn lost(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(beside(path, "-replite").join("lost")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn shell(path: &Path, sql: &str) {
    let done = Command::new("sqlite3").arg(path).arg(sql).output().unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// How an older database gets into the place of a newer one.
#[derive(Clone, Copy, Debug)]
enum Restored {
    /// The shell's `.backup`, whose bytes no record names.
    Backup,
    /// A copy of the closed file, at a state that the log still has.
    Copy,
    /// The same, at a state that is older than the log.
    OldCopy,
}

/// A backup is put in the place of the primary's closed database, and its state directory
/// stays: the state of the backup is history from then on, as documented, and nothing that was
/// acknowledged since is gone without a trace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_database_in_the_place_of_the_primarys_is_history_and_what_it_replaces_is_kept() {
    for how in [Restored::Backup, Restored::Copy, Restored::OldCopy] {
        restored(how).await;
    }
}

async fn restored(how: Restored) {
    let fork = Fork::new();
    let saved = fork.dir.path().join("saved.db");
    let config = || fork.primary("a").wal_limit(64 * 1024);
    let (a, b) = (open(config()).await, open(fork.replica("b")).await);
    for n in 0..50 {
        insert(&a, "before", n).await;
    }
    equal(&a, &b).await;
    match how {
        Restored::Backup => {
            shell(a.path(), &format!(".backup '{}'", saved.display()));
            a.shutdown().await;
        }
        Restored::Copy | Restored::OldCopy => {
            a.shutdown().await;
            // All of it, in one file.
            shell(&fork.path("a"), "PRAGMA wal_checkpoint(TRUNCATE)");
            fs::copy(fork.path("a"), &saved).unwrap();
        }
    }
    let a = open(config()).await;
    let mut last = insert(&a, "after", 0).await;
    for n in 1..400 {
        last = insert(&a, "after", n).await;
    }
    within("the replica has it", b.wait_for(last)).await.unwrap();
    // The file has all of it, and is known by that. Were frames still to be copied into it, an older
    // file would look like one whose WAL is gone, and the log would lead it on to the last row.
    assert_eq!(a.checkpoint(LIMIT).await.unwrap(), Checkpoint::Done);
    a.shutdown().await;
    b.shutdown().await;
    if let Restored::OldCopy = how {
        // As if its records had been dropped by age.
        fs::remove_dir_all(beside(&fork.path("a"), "-replite").join("log")).unwrap();
    }
    remove_wal(&fork.path("a"));
    fs::copy(&saved, fork.path("a")).unwrap();
    let (a, b) = (open(config()).await, open(fork.replica("b")).await);
    // Nobody takes a transaction that is gone for one that is there.
    assert!(matches!(a.wait_for(last).await, Err(Error::Lost { .. })), "{how:?}");
    equal(&a, &b).await;
    assert_eq!((count(&a), count(&b)), (52, 52), "{how:?}: the backup, and the last row of each comparison");
    assert!(!matches!(b.wait_for_timeout(last, Duration::ZERO).await, Ok(())), "{how:?}");
    let kept = (lost(a.path()), lost(b.path()));
    let log = kept.0.iter().any(|name| name.starts_with("log-"));
    assert!(log || matches!(how, Restored::OldCopy), "{how:?}: {kept:?}");
    let branches = b.lost().await.unwrap();
    assert!(!branches.is_empty(), "{how:?}: the replica had all of it, and has kept nothing: {kept:?}");
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_without_its_epochs_and_with_a_cut_wal_has_what_its_log_has() {
    for spoil in ["garbled", "gone"] {
        let fork = Fork::new();
        let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
        for n in 0..50 {
            insert(&a, "row", n).await;
        }
        equal(&a, &b).await;
        let position = position(&a);
        a.shutdown().await;
        let epochs = beside(&fork.path("a"), "-replite").join("epochs");
        match spoil {
            "garbled" => fs::write(&epochs, [3; 200]).unwrap(),
            _ => fs::remove_file(&epochs).unwrap(),
        }
        let wal = fs::File::options().write(true).open(beside(&fork.path("a"), "-wal")).unwrap();
        wal.set_len(30_000).unwrap();
        let _ = fs::remove_file(beside(&fork.path("a"), "-shm"));
        let a = open(fork.primary("a")).await;
        assert_eq!(count(&a), 51, "{spoil}: {:?}", lost(a.path()));
        assert_eq!(a.position().map(|p| p.checksum()), Some(position.checksum()), "{spoil}");
        equal(&a, &b).await;
        assert_eq!(lost(b.path()), Vec::<String>::new(), "{spoil}: the replica was on this history");
        a.shutdown().await;
        b.shutdown().await;
    }
}

const LEDGER: &str = "CREATE TABLE IF NOT EXISTS accounts(id INTEGER PRIMARY KEY, balance, note);
    CREATE TABLE IF NOT EXISTS ledger(n INTEGER PRIMARY KEY, account, delta);
    INSERT OR IGNORE INTO accounts WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM c WHERE i < 199) SELECT i, 0, randomblob(300) FROM c";

fn banker(path: &Path) -> Config {
    Config::new(path)
        .database("app")
        .secret(secret())
        .wal_limit(512 * 1024)
        .migrate(|conn| conn.execute_batch(LEDGER))
}

#[test]
#[ignore = "runs as the child of another test"]
fn banking_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(Db::open(banker(Path::new(&variable("DB"))))).unwrap();
    let last =
        |c: &Connection| c.query_row("SELECT coalesce(max(n), 0) FROM ledger", [], |r| r.get::<_, i64>(0));
    let last = db.read(|c| Ok::<_, Error>(last(c)?)).unwrap();
    for n in last + 1.. {
        db.write_blocking(|tx| {
            let account = n * 37 % 200;
            tx.execute("UPDATE accounts SET balance = balance + ?2 WHERE id = ?1", (account, n))?;
            Ok::<_, Error>(tx.execute("INSERT INTO ledger VALUES (?1, ?2, ?1)", (n, account))?)
        })
        .unwrap();
        speak(&format!("ack {n}"));
    }
}

/// The last transaction of a state, which must be one: who mixes two has accounts that the ledger
/// does not make.
fn audit(path: &Path, when: &str) -> i64 {
    let connection = plain(path);
    let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok", "{when}");
    let ask = |sql: &str| connection.query_row(sql, [], |r| r.get::<_, i64>(0)).unwrap();
    let wrong = "SELECT count(*) FROM accounts WHERE balance != (SELECT coalesce(sum(delta), 0) FROM ledger WHERE account = id)";
    assert_eq!(ask(wrong), 0, "{when}: accounts of one state and a ledger of another");
    let last = ask("SELECT coalesce(max(n), 0) FROM ledger");
    assert_eq!(ask("SELECT count(*) FROM ledger"), last, "{when}");
    last
}

/// One bit flips in the WAL of a primary that was killed, or the WAL is cut: never is a mix of
/// states served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wal_that_a_disk_damaged_makes_no_mix_of_states() {
    let dir = tempfile::tempdir().unwrap();
    let (path, mut rng) = (dir.path().join("p.db"), StdRng::seed_from_u64(9));
    let (mut refused, mut opened) = (0, 0);
    for round in 0..8 {
        let process = Process::start(banking_process, &[("DB", path.to_str().unwrap())]);
        let mut acknowledged = 0;
        let number = |line: &str| line.split(' ').nth(1).map_or(0, |n| n.parse::<i64>().unwrap_or(0));
        for _ in 0..rng.random_range(150..600) {
            acknowledged = number(&process.expect("ack"));
        }
        for line in process.kill() {
            acknowledged = acknowledged.max(number(&line));
        }
        let whole = fs::read(beside(&path, "-wal")).unwrap();
        let frames = (whole.len() - 32) / 4120;
        for way in 0..12 {
            let when = format!("round {round}, way {way}, of {frames} frames");
            let spoiled = dir.path().join(format!("s{round}-{way}.db"));
            fs::copy(&path, &spoiled).unwrap();
            // With the time that the node left on it.
            let left = fs::metadata(&path).unwrap().modified().unwrap();
            fs::File::options().write(true).open(&spoiled).unwrap().set_modified(left).unwrap();
            copy_tree(&beside(&path, "-replite"), &beside(&spoiled, "-replite"));
            let mut wal = whole.clone();
            let at = 32 + rng.random_range(0..frames.min(80)) * 4120 + rng.random_range(24..4120);
            match way % 2 {
                0 => wal[at] ^= 1 << rng.random_range(0..8),
                _ => wal.truncate(at),
            }
            fs::write(beside(&spoiled, "-wal"), wal).unwrap();
            match Db::open(banker(&spoiled)).await {
                Ok(db) => {
                    let last = audit(&spoiled, &when);
                    // What is not in the history any more, as it was not in the log yet, is in the
                    // WAL that was put aside.
                    let kept = lost(&spoiled)
                        .iter()
                        .any(|name| name.starts_with("wal-") || name.starts_with("branch-"));
                    assert!(last >= acknowledged || kept || way % 2 == 1, "{when}: {last} of {acknowledged}");
                    db.shutdown().await;
                    opened += 1;
                }
                Err(Error::Damaged { what, .. }) => {
                    assert!(what.contains("transaction"), "{when}: {what}");
                    refused += 1;
                }
                Err(error) => panic!("{when}: {error}"),
            }
        }
    }
    assert!(opened > refused, "{opened} opened, {refused} refused: the log had nearly all of it");
}

#[test]
#[ignore = "runs as the child of another test"]
fn following_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(replica(Path::new(&variable("DB")), &variable("URL"))).await.unwrap();
        let mut events = db.events();
        db.ready().await.unwrap();
        speak("ready");
        let mut positions = db.watch();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::HealStarted { .. } | Event::SnapshotStarted { .. }) => speak("healed"),
                    Some(_) => {}
                    None => break,
                },
                _ = positions.changed() => {
                    if let Some(position) = *positions.borrow_and_update() {
                        speak(&format!("at {position}"));
                    }
                }
            }
        }
    });
}

/// A replica is killed inside of a large transaction, twice, while another process has its file
/// open, so that the wal-index stays as it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_twice_in_a_large_transaction_leaves_its_readers_a_sound_index() {
    let fork = Fork::new();
    let (a, url) = (open(fork.primary("a")).await, format!("http://127.0.0.1:{}", fork.port));
    insert(&a, "small", 0).await;
    let path = fork.path("b");
    let start = || Process::start(following_process, &[("DB", path.to_str().unwrap()), ("URL", &url)]);
    let process = start();
    process.expect("ready");
    let reader = plain(&path);
    let rows = |c: &Connection| c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap();
    assert_eq!(rows(&reader), 1);
    process.kill();
    let many = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 12000)
        INSERT INTO t(who, n, v) SELECT 'large', i, randomblob(3500) FROM c";
    run(&a, many.into()).await;
    let length = || fs::metadata(beside(&path, "-wal")).map_or(0, |wal| wal.len());
    for _ in 0..2 {
        let wal = fs::File::options().write(true).open(beside(&path, "-wal")).unwrap();
        wal.set_len(64 * 1024).unwrap();
        let process = start();
        while length() < 20_000_000 {
            std::thread::yield_now();
        }
        process.kill();
        assert_eq!(rows(&reader), 1, "half a transaction is seen");
    }
    let process = start();
    let position = position(&a);
    loop {
        let line = process.next_line().expect("the replica goes on");
        assert_ne!(line, "healed", "nothing is wrong with it");
        if line == format!("at {position}") {
            break;
        }
    }
    assert_eq!(rows(&reader), 12_001);
    assert_same_pages(a.path(), &path);
    process.kill();
    a.shutdown().await;
}
