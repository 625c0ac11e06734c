//! How long the WAL becomes beside writers and readers that never pause, and what the writers pay
//! for that.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Durability, Error};

use crate::figure;
use crate::home::{directory, primary, raw};

const RUNS: usize = 5;
const TIME: Duration = Duration::from_secs(6);
const WRITE: &str = "INSERT OR REPLACE INTO t(id, k, v) VALUES (?1 % 2000, ?1, randomblob(1000))";

/// Readers that overlap, in a process of their own, while this lives.
struct Readers(Child);

impl Drop for Readers {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn readers(path: &Path, (count, millis): (u32, u64)) -> Option<Readers> {
    let child = (count > 0).then(|| {
        this()
            .env("REPLITE_BENCH_READERS", path)
            .env("COUNT", count.to_string())
            .env("MILLIS", millis.to_string())
            .spawn()
            .expect("a process")
    });
    child.map(Readers)
}

fn this() -> Command {
    Command::new(std::env::current_exe().expect("a path"))
}

fn number(name: &str) -> u64 {
    std::env::var(name).expect(name).parse().expect("a number")
}

/// Runs as the other process, if this is it.
pub(crate) fn child() -> bool {
    if let Some(path) = std::env::var_os("REPLITE_BENCH_WRITER") {
        let connection = Connection::open(&path).expect("a database");
        connection.busy_timeout(Duration::from_secs(5)).expect("a timeout");
        connection.pragma_update(None, "synchronous", "OFF").expect("a pragma");
        let mut insert = connection.prepare(WRITE).expect("sql");
        let (rate, peak) = beside(path.as_ref(), |n| {
            insert.execute([n]).expect("a row");
        });
        println!("{rate} {peak}");
        return true;
    }
    let Some(path) = std::env::var_os("REPLITE_BENCH_READERS") else { return false };
    let (count, time) = (number("COUNT") as u32, Duration::from_millis(number("MILLIS")));
    std::thread::scope(|scope| {
        for at in 0..count {
            let path = PathBuf::from(&path);
            scope.spawn(move || {
                let connection = Connection::open(path).expect("a database");
                sleep(time * at / count);
                loop {
                    connection.execute_batch("BEGIN; SELECT count(*) FROM t").expect("a read");
                    sleep(time);
                    connection.execute_batch("COMMIT").expect("its end");
                }
            });
        }
    });
    true
}

/// Writes for a while; commits a second, and the WAL's greatest length in MiB.
fn beside(path: &Path, mut write: impl FnMut(i64)) -> (f64, f64) {
    let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let watch = {
        let (peak, stop, wal) = (peak.clone(), stop.clone(), format!("{}-wal", path.display()));
        move || {
            while !stop.load(Ordering::Relaxed) {
                peak.fetch_max(std::fs::metadata(&wal).map_or(0, |m| m.len()), Ordering::Relaxed);
                sleep(Duration::from_millis(2));
            }
        }
    };
    let watching = std::thread::spawn(watch);
    let (begin, mut count) = (Instant::now(), 0);
    while begin.elapsed() < TIME {
        write(count);
        count += 1;
    }
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    watching.join().expect("its end");
    (rate, peak.load(Ordering::Relaxed) as f64 / (1 << 20) as f64)
}

/// A foreign writer that syncs nothing, in another process.
fn foreign(path: &Path) -> (f64, f64) {
    let output =
        this().env("REPLITE_BENCH_WRITER", path).stderr(Stdio::inherit()).output().expect("a process");
    let text = String::from_utf8(output.stdout).expect("text");
    let mut numbers = text.split_whitespace().map(|n| n.parse().expect("a number"));
    (numbers.next().expect("a rate"), numbers.next().expect("a peak"))
}

pub(crate) fn bounded() {
    let loads =
        [("foreign", (0, 0)), ("foreign_8x20ms", (8, 20)), ("foreign_3x1500ms", (3, 1500)), ("own", (0, 0))];
    for (load, reading) in loads {
        let (mut peaks, mut ratios, mut rates, mut raw_peaks) = (vec![], vec![], vec![], vec![]);
        for _ in 0..RUNS {
            let dir = directory();
            let (ours, theirs) = (dir.path().join("p.db"), dir.path().join("raw.db"));
            let connection = raw(&theirs, "NORMAL");
            let reading_raw = readers(&theirs, reading);
            let (base, raw_peak) = if load == "own" {
                let mut insert = connection.prepare(WRITE).expect("sql");
                beside(&theirs, |n| {
                    insert.execute([n]).expect("a row");
                })
            } else {
                foreign(&theirs)
            };
            drop(reading_raw);
            let db = primary(&ours, Durability::Unsynced);
            let _readers = readers(&ours, reading);
            let (rate, peak) = if load == "own" {
                beside(&ours, |n| {
                    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
                        Ok::<_, Error>(tx.prepare_cached(WRITE)?.execute([n])?)
                    };
                    db.write_blocking(write).expect("a commit");
                })
            } else {
                foreign(&ours)
            };
            peaks.push(peak);
            raw_peaks.push(raw_peak);
            ratios.push(rate / base);
            rates.push(rate);
        }
        figure(&format!("wal_peak_mib_{load}"), "MiB", peaks);
        figure(&format!("wal_peak_raw_mib_{load}"), "MiB", raw_peaks);
        figure(&format!("wal_commits_ratio_{load}"), "x", ratios);
        figure(&format!("wal_commits_{load}"), "/s", rates);
    }
}
