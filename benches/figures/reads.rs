//! Reads, alone and beside apply.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Db, Durability, Error};

use crate::home::{INSERT, directory, has, primary, replica, runtime};
use crate::{figure, quantile};

const RUNS: usize = 7;
const ROWS: i64 = 1000;
const READS: i64 = 100_000;
const POINT: &str = "SELECT k FROM t WHERE id = ?1";

fn filled(db: &Db) {
    let commit = db
        .write_blocking(|tx| {
            for k in 0..ROWS {
                tx.prepare_cached(INSERT)?.execute([k])?;
            }
            Ok::<_, Error>(())
        })
        .expect("rows");
    runtime().block_on(db.wait_for(commit.txid.expect("a commit"))).expect("captured");
}

fn read(db: &Db, id: i64) -> i64 {
    db.read(|c| Ok::<_, Error>(c.prepare_cached(POINT)?.query_row([id], |r| r.get(0))?)).expect("a row")
}

fn raw_reads(raw: &Connection) -> f64 {
    let begin = Instant::now();
    for i in 0..READS {
        let row =
            raw.prepare_cached(POINT).and_then(|mut s| s.query_row([i % ROWS + 1], |r| r.get::<_, i64>(0)));
        row.expect("a row");
    }
    begin.elapsed().as_secs_f64()
}

fn reads(db: &Db) -> f64 {
    let begin = Instant::now();
    for i in 0..READS {
        read(db, i % ROWS + 1);
    }
    begin.elapsed().as_secs_f64()
}

pub(crate) fn points() {
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Synced);
    filled(&p);
    let r = replica(&dir.path().join("r.db"), &p);
    let raw = Connection::open(p.path()).expect("a connection");
    let raw_replica = Connection::open(r.path()).expect("a connection");
    let (mut at_primary, mut at_replica) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let base = raw_reads(&raw);
        at_primary.push(reads(&p) / base);
        let base = raw_reads(&raw_replica);
        at_replica.push(reads(&r) / base);
    }
    figure("read_primary_ratio", "x", at_primary);
    figure("read_replica_ratio", "x", at_replica);
}

/// p99 of point reads for a while, in microseconds.
fn p99(db: &Db, time: Duration) -> f64 {
    let (begin, mut samples) = (Instant::now(), Vec::new());
    while begin.elapsed() < time {
        for i in 0..1000 {
            let one = Instant::now();
            read(db, i % ROWS + 1);
            samples.push(one.elapsed().as_secs_f64() * 1e6);
        }
    }
    quantile(&mut samples, 0.99)
}

pub(crate) fn beside_apply() {
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Unsynced);
    filled(&p);
    let r = replica(&dir.path().join("r.db"), &p);
    let mut ratios = Vec::new();
    for _ in 0..5 {
        let idle = p99(&r, Duration::from_millis(1000));
        let stop = AtomicBool::new(false);
        let busy = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut due = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([1])?))
                        .expect("a commit");
                    due += Duration::from_millis(1);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                }
            });
            let busy = p99(&r, Duration::from_millis(2000));
            stop.store(true, Ordering::Relaxed);
            busy
        });
        ratios.push(busy / idle);
    }
    figure("replica_read_p99_ratio", "x", ratios);
}

pub(crate) fn apply_under_readers() {
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Synced);
    filled(&p);
    let r = replica(&dir.path().join("r.db"), &p);
    let (stop, busy) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut samples = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let held = r.read(|c| {
                        let tx = c.unchecked_transaction()?;
                        tx.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))?;
                        std::thread::sleep(Duration::from_millis(20));
                        Ok::<_, Error>(())
                    });
                    busy.fetch_add(u64::from(held.is_err()), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
        }
        for n in 0..400 {
            let begin = Instant::now();
            let id = ROWS + 1 + n;
            p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([n])?))
                .expect("a commit");
            while !has(&r, id) {
                std::hint::spin_loop();
            }
            samples.push(begin.elapsed().as_secs_f64() * 1e3);
            std::thread::sleep(Duration::from_millis(2));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(busy.into_inner(), 0, "a reader was refused");
    figure("apply_under_readers_p99_ms", "ms", vec![quantile(&mut samples, 0.99)]);
}
