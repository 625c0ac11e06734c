//! Verification of a whole database, against one thread of plain BLAKE3 over the same file.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use replite::{Db, Durability, Error};

use crate::figure;
use crate::home::{directory, primary, runtime};

const RUNS: usize = 7;
/// One GiB of pages, in transactions of this many rows.
const ROWS: i64 = 16;
const TRANSACTIONS: i64 = 64;

/// A verification is run beside nothing else, with the file in the system's cache, as plain BLAKE3
/// is.
pub(crate) fn whole() {
    let dir = directory();
    let path = dir.path().join("p.db");
    let db = primary(&path, Durability::Unsynced);
    for n in 0..TRANSACTIONS {
        let fill = |tx: &mut replite::rusqlite::Transaction<'_>| {
            for _ in 0..ROWS {
                tx.execute("INSERT INTO t(k, v) VALUES (?1, randomblob(1048000))", [n])?;
            }
            Ok::<_, Error>(())
        };
        db.write_blocking(fill).expect("a write");
    }
    settle(&db);
    let (mut plain, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..RUNS {
        // In another process: a descriptor that this one closes would cost SQLite its locks.
        let raw = plain_gb_per_s(&path);
        let begin = Instant::now();
        let verification = runtime().block_on(db.verify()).expect("a verification");
        assert!(verification.holds());
        let verified = verification.bytes as f64 / 1e9 / begin.elapsed().as_secs_f64();
        plain.push(raw);
        ours.push(verified);
        ratios.push(verified / raw);
    }
    figure("verify_gb_per_s", "GB/s", ours);
    figure("verify_plain_gb_per_s", "GB/s", plain);
    figure("verify_ratio", "x", ratios);
    runtime().block_on(db.shutdown());
}

/// Waits until nearly all of it is in the file.
fn settle(db: &Db) {
    while db.status().wal_frames > 1000 {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn plain_gb_per_s(path: &Path) -> f64 {
    let child = std::process::Command::new(std::env::current_exe().expect("a path"))
        .env("REPLITE_BENCH_BLAKE3", path)
        .output()
        .expect("a process");
    String::from_utf8_lossy(&child.stdout).trim().parse().expect("a figure")
}

/// Runs as the other process, if this is it.
pub(crate) fn child() -> bool {
    let Some(path) = std::env::var_os("REPLITE_BENCH_BLAKE3") else { return false };
    let begin = Instant::now();
    let mut file = std::fs::File::open(path).expect("a file");
    let (mut hasher, mut buffer, mut bytes) = (blake3::Hasher::new(), vec![0; 1 << 20], 0);
    loop {
        let read = file.read(&mut buffer).expect("a read");
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        bytes += read;
    }
    std::hint::black_box(hasher.finalize());
    println!("{}", bytes as f64 / 1e9 / begin.elapsed().as_secs_f64());
    true
}
