//! `kill -9`, again and again: of a primary beside strangers that write and copy its WAL back, and of a replica in whatever it does.
//!
//! `REPLITE_ROUNDS` sets how many rounds there are (200 and 100 if not set, for primary and replica), `REPLITE_SEED` what happens in them.

#[path = "support/lib.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Position};

use support::*;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Everything is begun anew and dropped all the time.
fn restless(config: Config) -> Config {
    config.wal_limit(64 * 1024).log_retention(1 << 20, Duration::from_secs(3600))
}

fn total(connection: &Connection) -> i64 {
    connection.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

#[test]
#[ignore = "runs as the child of another test"]
fn primary_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = || restless(primary(&path, port));
    let db = match runtime.block_on(Db::open(config())) {
        Err(Error::Damaged { .. }) => {
            speak("damaged");
            runtime.block_on(Db::open(config().accept_damaged(true))).unwrap()
        }
        opened => opened.unwrap(),
    };
    let rows = db.read(|c| Ok::<_, Error>(total(c))).unwrap();
    speak(&format!("open {} {rows}", db.position().unwrap()));
    let verified = runtime.block_on(db.verify()).unwrap();
    speak(&format!("verified {}", verified.holds()));
    std::thread::scope(|scope| {
        for writer in ["a", "b"] {
            let db = &db;
            scope.spawn(move || {
                let sql = "SELECT coalesce(max(n), 0) FROM t WHERE who = ?1";
                let last = db.read(|c| Ok::<i64, Error>(c.query_row(sql, [writer], |r| r.get(0))?)).unwrap();
                for n in last + 1.. {
                    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
                        let sql = "INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(?3))";
                        Ok::<_, Error>(tx.execute(sql, (writer, n, n % 3000))?)
                    };
                    db.write_blocking(write).unwrap();
                    speak(&format!("ack {writer} {n}"));
                }
            });
        }
    });
}

/// What strangers do with a node's file: each commit is one transaction.
struct Stranger {
    wrote: i64,
}

impl Stranger {
    fn write(&mut self, connection: &Connection) {
        self.wrote += 1;
        connection.execute("INSERT INTO t(who, n) VALUES ('stranger', ?1)", [self.wrote]).unwrap();
    }

    fn checkpoint(connection: &Connection, rng: &mut StdRng) {
        let mode = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][rng.random_range(0..4)];
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        // Busy, as long as a node holds the checkpoint lock.
        let _busy: i64 = connection.query_row(&sql, [], |r| r.get(0)).unwrap();
    }

    /// With the stock shell, which is the last to close, and so copies the WAL back and deletes it.
    fn shell(&mut self, path: &Path) {
        self.wrote += 1;
        let sql = format!(
            "PRAGMA busy_timeout = 20000; INSERT INTO t(who, n) VALUES ('stranger', {});",
            self.wrote
        );
        let done = std::process::Command::new("sqlite3").arg(path).arg(sql).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_is_killed_again_and_again_keeps_every_acknowledged_row_and_its_position() {
    let (rounds, seed) = (number("REPLITE_ROUNDS", 200), number("REPLITE_SEED", 1));
    eprintln!("REPLITE_ROUNDS={rounds} REPLITE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), free_port());
    let replica = Db::open(restless(replica(&r, &format!("http://127.0.0.1:{port}")))).await.unwrap();
    let mut acknowledged: BTreeMap<String, i64> = BTreeMap::new();
    let mut stranger = Stranger { wrote: 0 };
    // Transactions that are no row: the number of a position less the rows.
    let mut others: Option<i64> = None;
    let (mut last_to_close, mut damaged) = (false, 0);
    for round in 0..rounds {
        let process =
            Process::start("primary_process", &[("DB", p.to_str().unwrap()), ("PORT", &port.to_string())]);
        let first = process.next_line().unwrap();
        let open = if first == "damaged" {
            assert!(last_to_close, "round {round}: nobody but us has closed it, and it is damaged");
            damaged += 1;
            process.expect("open")
        } else {
            first
        };
        let mut words = open.split(' ').skip(1);
        let position: Position = words.next().unwrap().parse().unwrap();
        let rows: i64 = words.next().unwrap().parse().unwrap();
        let found = position.number() as i64 - rows;
        match others.filter(|_| !last_to_close) {
            Some(others) => assert_eq!(found, others, "round {round}: {position} with {rows} rows"),
            // What somebody else wrote and closed is one transaction, however many it was.
            None => others = Some(found),
        }
        assert_eq!(process.expect("verified"), "verified true", "round {round}");
        last_to_close = false;
        if rng.random_range(0..3) > 0 {
            let connection = plain(&p);
            for _ in 0..rng.random_range(0..6) {
                match rng.random_range(0..2) {
                    0 => stranger.write(&connection),
                    _ => Stranger::checkpoint(&connection, &mut rng),
                }
            }
        }
        std::thread::park_timeout(Duration::from_micros(rng.random_range(0..40_000)));
        for line in process.kill() {
            let words: Vec<&str> = line.split(' ').collect();
            if words[0] == "ack" {
                acknowledged.insert(words[1].into(), words[2].parse().unwrap());
            }
        }
        match rng.random_range(0..8) {
            0 => {
                stranger.shell(&p);
                last_to_close = true;
            }
            1 | 2 => stranger.write(&plain(&p)),
            _ => {}
        }
        acknowledged.insert("stranger".into(), stranger.wrote);
        let connection = plain(&p);
        for (who, last) in &acknowledged {
            let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = ?1";
            let (rows, most): (i64, i64) =
                connection.query_row(sql, [who], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
            assert!(most >= *last, "round {round}: {who} had {last} acknowledged, and {most} are there");
            assert_eq!(rows, most, "round {round}: a hole in what {who} wrote");
        }
        if round % 10 == 0 {
            let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
            assert_eq!(ok, "ok", "round {round}");
        }
    }
    eprintln!("{rounds} kills, {} rows, taken for damaged {damaged} times", total(&plain(&p)));
    let db = match Db::open(restless(primary(&p, port))).await {
        Err(Error::Damaged { .. }) if last_to_close => {
            Db::open(restless(primary(&p, port)).accept_damaged(true)).await.unwrap()
        }
        opened => opened.unwrap(),
    };
    let last = insert(&db, "last", 0).await;
    within("the replica", replica.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(replica.verify().await.unwrap().holds());
    db.shutdown().await;
    replica.shutdown().await;
}

#[test]
#[ignore = "runs as the child of another test"]
fn replica_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let _db =
            Db::open(restless(replica(&PathBuf::from(variable("DB")), &variable("URL")))).await.unwrap();
        speak("open");
        std::future::pending::<()>().await;
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_again_and_again_is_always_a_state_of_the_primary() {
    let (rounds, seed) = (number("REPLITE_ROUNDS", 200).div_ceil(2), number("REPLITE_SEED", 2));
    eprintln!("REPLITE_ROUNDS={} REPLITE_SEED={seed}", rounds * 2);
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(restless(primary(&p, 0))).await.unwrap();
    let url = db.node().addresses.replication.clone();
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    let writer = {
        let (db, stop, written) = (db.clone(), stop.clone(), written.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                insert(&db, "w", written.load(Ordering::SeqCst) + 1).await;
                written.fetch_add(1, Ordering::SeqCst);
                if written.load(Ordering::SeqCst) % 64 == 0 {
                    // The primary goes on for as long as the rounds do.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        })
    };
    let mut strays = 0;
    for round in 0..rounds {
        let process = Process::start("replica_process", &[("DB", r.to_str().unwrap()), ("URL", &url)]);
        process.expect("open");
        std::thread::park_timeout(Duration::from_micros(rng.random_range(0..80_000)));
        process.kill();
        if !r.exists() {
            continue;
        }
        let connection = plain(&r);
        let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok", "round {round}");
        let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = 'w'";
        let (rows, most): (i64, i64) = connection.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        assert!(
            rows == most && most <= written.load(Ordering::SeqCst) + 1,
            "round {round}: {rows} up to {most}"
        );
        match rng.random_range(0..10) {
            0 | 1 => {
                strays += 1;
                let mark = format!("stray-{strays}-");
                connection.execute("INSERT INTO t(who, v) VALUES ('stranger', ?1)", [mark]).unwrap();
            }
            2 if round % 4 == 0 => {
                // Its disk is exchanged; what was kept there goes with it.
                drop(connection);
                strays = 0;
                for entry in std::fs::read_dir(dir.path()).unwrap() {
                    let path = entry.unwrap().path();
                    if !path.file_name().unwrap().to_string_lossy().starts_with("r.db") {
                        continue;
                    }
                    if path.is_dir() {
                        std::fs::remove_dir_all(path).unwrap();
                    } else {
                        std::fs::remove_file(path).unwrap();
                    }
                }
            }
            _ => {}
        }
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    let replica = Db::open(restless(replica(&r, &url))).await.unwrap();
    let last = insert(&db, "last", 0).await;
    within("the replica", replica.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(replica.verify().await.unwrap().holds());
    let mut kept = Vec::new();
    for branch in replica.lost().await.unwrap() {
        branch
            .visit_pages(|_, page| {
                kept.extend_from_slice(page);
                Ok(())
            })
            .unwrap();
    }
    for n in 1..=strays {
        let mark = format!("stray-{n}-");
        assert!(kept.windows(mark.len()).any(|w| w == mark.as_bytes()), "{mark} of {strays} is nowhere");
    }
    eprintln!("{rounds} kills, {} rows, {strays} strays", total(&plain(&p)));
    replica.shutdown().await;
    db.shutdown().await;
}
