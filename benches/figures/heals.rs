//! Nodes that left the history, and nodes that were killed.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use replite::rusqlite::Connection;
use replite::{Config, Db, Durability, Error, Event, PageSize, lease};

use super::figure;
use super::home::{config, counted, directory, primary, runtime};

const PAGE_BYTES: u64 = 4096;
/// Rows of about a page each: a gigabyte.
const ROWS: i64 = 262_144;
const RUNS: usize = 5;

/// A database of a gigabyte, made by plain SQLite.
pub(crate) fn gigabyte(path: &Path) {
    let connection = Connection::open(path).expect("a database");
    let sql = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
        CREATE TABLE t(id INTEGER PRIMARY KEY, k INTEGER, v);
        WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 262144)
        INSERT INTO t SELECT i, 0, randomblob(3800) FROM c";
    connection.execute_batch(sql).expect("rows");
}

/// A hundred transactions on a node that takes itself for the primary.
fn lose(config: Config, round: usize) {
    let db = runtime().block_on(Db::open(config.durability(Durability::Unsynced))).expect("a second primary");
    for n in 0..100 {
        let id = (n * 2_617 + round as i64 * 31) % ROWS + 1;
        let update = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("UPDATE t SET k = k + 1 WHERE id = ?1", [id])?)
        };
        db.write_blocking(update).expect("a commit");
    }
    runtime().block_on(db.shutdown());
}

pub(crate) fn heals() {
    let home = directory();
    let (path, other) = (home.path().join("p.db"), home.path().join("r.db"));
    gigabyte(&path);
    let db = primary(&path, Durability::Synced);
    let (url, bytes) = counted(&db);
    let follow = || config(&other).lease(lease::Fixed::replica_of(&url));
    let filled = runtime().block_on(Db::open(follow())).expect("a replica");
    runtime().block_on(filled.ready()).expect("ready");
    runtime().block_on(filled.shutdown());
    for compared in [false, true] {
        let (mut seconds, mut ratios) = (Vec::new(), Vec::new());
        for round in 0..RUNS {
            lose(config(&other), round);
            if compared {
                std::fs::remove_dir_all(home.path().join("r.db-replite/log")).expect("a log");
            }
            bytes.reset();
            let begin = Instant::now();
            let replica = runtime().block_on(Db::open(follow())).expect("a replica");
            let mut events = replica.events();
            runtime().block_on(async {
                while !matches!(events.next().await.expect("an event"), Event::Healed { .. }) {}
            });
            seconds.push(begin.elapsed().as_secs_f64());
            let lost = runtime().block_on(replica.lost()).expect("a list").pop().expect("a branch");
            let pages = lost.branch().expect("a branch").pages;
            ratios.push(bytes.both_ways() as f64 / (pages * PAGE_BYTES) as f64);
            runtime().block_on(replica.shutdown());
        }
        let prefix = if compared { "heal_compare" } else { "heal" };
        figure(&format!("{prefix}_seconds"), "s", seconds);
        figure(&format!("{prefix}_bytes_ratio"), "x", ratios);
    }
    runtime().block_on(db.shutdown());
}

/// What [`open_after_kill`] kills: a primary with four megabytes in its WAL.
pub(crate) fn doomed(path: &Path) {
    let db = primary(path, Durability::Unsynced);
    let mut frames = 0;
    let mut id = 0;
    while frames < 1000 {
        id = (id + 7_919) % ROWS;
        let update = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("UPDATE t SET k = k + 1 WHERE id = ?1", [id + 1])?)
        };
        db.write_blocking(update).expect("a commit");
        frames = db.status().wal_frames;
    }
    println!("ready");
    loop {
        std::thread::park();
    }
}

pub(crate) fn open_after_kill() {
    let home = directory();
    let path = home.path().join("p.db");
    gigabyte(&path);
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let mut child = std::process::Command::new(std::env::current_exe().expect("a path"))
            .env("REPLITE_BENCH_DOOMED", &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut ready = [0; 5];
        child.stdout.take().expect("a pipe").read_exact(&mut ready).expect("a process that speaks");
        child.kill().expect("a process");
        child.wait().expect("a process");
        let begin = Instant::now();
        let db = primary(&path, Durability::Synced);
        runs.push(begin.elapsed().as_secs_f64() * 1e3);
        runtime().block_on(db.shutdown());
    }
    figure("open_after_kill_ms", "ms", runs);
}

/// What a page became, in the runs of bytes that differ: a row of 100 bytes came into a leaf of a
/// table. Both images are in the cache, as they are where they were hashed just before.
pub(crate) fn patches() {
    const PAGES: usize = 16;
    const ROUNDS: usize = 256;
    let bytes = PAGE_BYTES as usize;
    let old: Vec<u8> = (0..bytes * PAGES).map(|n| (n * 31 % 251) as u8).collect();
    let mut new = old.clone();
    for page in new.chunks_mut(bytes) {
        for at in (3..7).chain(60..62).chain(2000..2100) {
            page[at] ^= 0x55;
        }
    }
    let runs = (0..21)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..ROUNDS {
                for (old, new) in old.chunks(bytes).zip(new.chunks(bytes)) {
                    assert!(replite::testing::change_bytes(std::hint::black_box(old), new) < 120);
                }
            }
            begin.elapsed().as_secs_f64() * 1e6 / (PAGES * ROUNDS) as f64
        })
        .collect();
    figure("patch_us_per_page", "us", runs);
}

/// The hash of a page before and after its change.
pub(crate) fn hashes() {
    let size = PageSize::new(PAGE_BYTES as u32).expect("a page size");
    let home = directory();
    let db = primary(&home.path().join("p.db"), Durability::Synced);
    let bytes: Vec<u8> = (0..PAGE_BYTES * 4096).map(|n| (n * 31 % 251) as u8).collect();
    let runs = (0..21)
        .map(|_| {
            let begin = Instant::now();
            std::hint::black_box(db.checksum_of(std::hint::black_box(&bytes), size));
            begin.elapsed().as_secs_f64() * 1e6 / 4096.0 * 2.0
        })
        .collect();
    runtime().block_on(db.shutdown());
    figure("hash_us_per_page", "us", runs);
}
