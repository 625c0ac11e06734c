//! Reads, alone and beside apply.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Db, Durability, Error};

use crate::home::{INSERT, Spoken, directory, has, primary, raw, replica, runtime};
use crate::{figure, quantile};

const RUNS: usize = 7;
const ROWS: i64 = 1000;
const READS: i64 = 100_000;
const TURN: i64 = 20_000;
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

/// Seconds for this many point reads.
fn timed(count: i64, mut read: impl FnMut(i64)) -> f64 {
    let begin = Instant::now();
    for i in 0..count {
        read(i % ROWS + 1);
    }
    begin.elapsed().as_secs_f64()
}

fn plain_read(plain: &Connection, id: i64) {
    let row = plain.prepare_cached(POINT).and_then(|mut s| s.query_row([id], |r| r.get::<_, i64>(0)));
    row.expect("a row");
}

fn plain_reads(plain: &Connection) -> f64 {
    timed(READS, |id| plain_read(plain, id))
}

fn reads(db: &Db) -> f64 {
    timed(READS, |id| {
        read(db, id);
    })
}

/// Seconds until two threads have done the same at one time.
fn twice<T: Sync>(one: &T, other: &T, reads: impl Fn(&T) -> f64 + Sync) -> f64 {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| reads(one));
        reads(other);
    });
    begin.elapsed().as_secs_f64()
}

/// Does `work` while something is written 1,000 times a second.
fn beside_writes<T>(write: impl Fn(i64) + Send + Sync, work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut due, mut n) = (Instant::now(), 0);
            while !stop.load(Ordering::Relaxed) {
                write(n);
                n += 1;
                due += Duration::from_millis(1);
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    })
}

/// Raw SQLite with the same rows, in a process of its own: in ours it would gain, too.
struct Raw(Spoken);

impl Raw {
    fn start(dir: &Path) -> Raw {
        Raw(Spoken::start(&[("REPLITE_BENCH_RAW", dir.join("raw.db").as_os_str())]))
    }

    /// Seconds for the reads, in the way that the word says.
    fn reads(&mut self, how: &str) -> f64 {
        self.0.say(how);
        self.0.hear().parse().expect("seconds")
    }
}

/// Runs as the process of raw SQLite, if this is it.
pub(crate) fn child() -> bool {
    let Some(path) = std::env::var_os("REPLITE_BENCH_RAW") else { return false };
    let path = Path::new(&path);
    let writer = raw(path, "NORMAL");
    for k in 0..ROWS {
        writer.execute(INSERT, [k]).expect("a row");
    }
    let open = || Mutex::new(Connection::open(path).expect("a connection"));
    let (one, other) = (open(), open());
    let reads = |of: &Mutex<Connection>| plain_reads(&of.lock().expect("a connection"));
    println!("ready");
    let writer = Mutex::new(writer);
    for line in std::io::stdin().lines() {
        let write = |n| {
            writer.lock().expect("the writer").execute(INSERT, [n]).expect("a row");
        };
        println!(
            "{}",
            match line.expect("a line").as_str() {
                "alone" => reads(&one),
                "twice" => twice(&one, &other, reads),
                "written" => beside_writes(write, || reads(&one)),
                _ => break,
            }
        );
    }
    true
}

fn nodes(dir: &Path) -> (Db, Db) {
    let p = primary(&dir.join("p.db"), Durability::Unsynced);
    filled(&p);
    let r = replica(&dir.join("r.db"), &p);
    (p, r)
}

/// What a task waits for one row.
pub(crate) fn from_async() {
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Unsynced);
    filled(&p);
    let mut micros = Vec::new();
    for _ in 0..7 {
        let db = p.clone();
        let run = async move {
            let begin = Instant::now();
            for id in 1..=5000 {
                let read = db.read_async(move |c| {
                    let mut select = c.prepare_cached("SELECT k FROM t WHERE id = ?1")?;
                    Ok::<_, Error>(select.query_row([id % ROWS + 1], |row| row.get::<_, i64>(0))?)
                });
                read.await.expect("a row");
            }
            begin.elapsed().as_secs_f64() * 1e6 / 5000.0
        };
        micros.push(runtime().block_on(async { runtime().spawn(run).await.expect("a task") }));
    }
    figure("read_async_us", "us", micros);
}

pub(crate) fn points() {
    let dir = directory();
    let (p, r) = nodes(dir.path());
    let plain = Connection::open(r.path()).expect("a connection");
    let mut raw = Raw::start(dir.path());
    let (mut at_primary, mut at_replica, mut not_ours, mut micros) = (vec![], vec![], vec![], vec![]);
    for _ in 0..RUNS {
        let base = raw.reads("alone");
        let (first, second, third) = (reads(&p), reads(&r), plain_reads(&plain));
        micros.push(base * 1e6 / READS as f64);
        at_primary.push(first / base);
        at_replica.push(second / base);
        not_ours.push(third / base);
    }
    // In short turns: the difference is small.
    let mut pool = vec![];
    for _ in 0..3 * RUNS {
        let through = timed(TURN, |id| {
            read(&r, id);
        });
        let plain = timed(TURN, |id| plain_read(&plain, id));
        pool.push((through - plain) * 1e9 / TURN as f64);
    }
    figure("read_raw_us", "us", micros);
    figure("read_primary_ratio", "x", at_primary);
    figure("read_replica_ratio", "x", at_replica);
    figure("read_plain_ratio", "x", not_ours);
    figure("read_pool_ns", "ns", pool);
}

pub(crate) fn two_threads() {
    let dir = directory();
    let (_p, r) = nodes(dir.path());
    let mut raw = Raw::start(dir.path());
    let open = || Mutex::new(Connection::open(r.path()).expect("a connection"));
    let plain = [open(), open()];
    let plain_reads = |of: &Mutex<Connection>| plain_reads(&of.lock().expect("a connection"));
    let (mut to_raw, mut to_one, mut raw_to_one, mut rates) = (vec![], vec![], vec![], vec![]);
    let mut plain_rates = vec![];
    for _ in 0..RUNS {
        let (raw_one, raw_two) = (raw.reads("alone"), raw.reads("twice"));
        let (one, two) = (reads(&r), twice(&r, &r, reads));
        to_raw.push(raw_two / two);
        to_one.push(2.0 * one / two);
        raw_to_one.push(2.0 * raw_one / raw_two);
        rates.push(2.0 * READS as f64 / two);
        plain_rates.push(2.0 * READS as f64 / twice(&plain[0], &plain[1], plain_reads));
    }
    figure("read_two_threads_ratio", "x", to_raw);
    figure("read_two_to_one_ratio", "x", to_one);
    figure("read_raw_two_to_one_ratio", "x", raw_to_one);
    figure("read_two_threads_per_s", "/s", rates);
    figure("read_plain_two_threads_per_s", "/s", plain_rates);
}

pub(crate) fn under_writes() {
    let dir = directory();
    let (p, r) = nodes(dir.path());
    let plain = Connection::open(r.path()).expect("a connection");
    let mut raw = Raw::start(dir.path());
    let (mut at_primary, mut at_replica, mut not_ours) = (vec![], vec![], vec![]);
    let write = |n| {
        p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([n])?)).expect("a commit");
    };
    for _ in 0..RUNS {
        let base = raw.reads("written");
        at_replica.push(beside_writes(write, || reads(&r)) / base);
        at_primary.push(beside_writes(write, || reads(&p)) / base);
        not_ours.push(beside_writes(write, || plain_reads(&plain)) / base);
    }
    figure("read_under_writes_ratio", "x", at_replica);
    figure("read_under_writes_primary_ratio", "x", at_primary);
    figure("read_under_writes_plain_ratio", "x", not_ours);
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
    let (mut ratios, mut micros) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let idle = p99(&r, Duration::from_millis(1000));
        let write = |n| {
            p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([n])?))
                .expect("a commit");
        };
        let busy = beside_writes(write, || p99(&r, Duration::from_millis(2000)));
        ratios.push(busy / idle);
        micros.push(busy);
    }
    figure("replica_read_p99_ratio", "x", ratios);
    figure("replica_read_p99_us", "us", micros);
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
