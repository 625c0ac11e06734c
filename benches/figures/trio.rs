//! Three processes, a primary and two replicas, on the machine's cores: what a commit costs all of them,
//! how late it is seen by who sleeps until then, and what they cost while nothing happens.

use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Db, Durability, Error};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::home::{INSERT, Other, Usage, config, directory, monotonic_ns, primary, raw, runtime};
use crate::{figure, quantile};

const RUNS: usize = 7;
const WRITERS: i64 = 64;

struct Trio {
    p: Db,
    others: [Other; 2],
    dir: TempDir,
}

impl Trio {
    fn start() -> Trio {
        let dir = directory();
        let p = primary(&dir.path().join("p.db"), Durability::Synced);
        let others = ["a.db", "b.db"].map(|name| Other::start(&dir.path().join(name), &p));
        Trio { p, others, dir }
    }

    /// What the primary and both replicas have used by now, when they have all that was committed.
    fn usage(&mut self) -> [Usage; 2] {
        let last = self.p.position().expect("a state").txid();
        for other in &mut self.others {
            other.say(&format!("wait {last}"));
            assert_eq!(other.hear(), "applied");
        }
        let replicas = self.others.each_mut().map(Other::usage);
        [Usage::now(), replicas[0] + replicas[1]]
    }
}

async fn commit(db: &Db, k: i64) {
    db.write(move |tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?)).await.expect("a commit");
}

/// Microseconds a commit, one after the other, of a task of a runtime's worker.
fn in_turn<F: Future<Output = ()> + Send>(count: i64, write: impl Fn(i64) -> F + Send + 'static) -> f64 {
    let run = async move {
        let begin = Instant::now();
        for k in 0..count {
            write(k).await;
        }
        begin.elapsed().as_secs_f64() * 1e6 / count as f64
    };
    runtime().block_on(async { runtime().spawn(run).await.expect("a task") })
}

/// Raw SQLite, asked by async code as it would be without this crate: through a channel, on a thread of
/// its own.
fn raw_writer(path: &Path, synchronous: &str) -> mpsc::Sender<(i64, oneshot::Sender<()>)> {
    let connection = raw(path, synchronous);
    let (asks, asked) = mpsc::channel::<(i64, oneshot::Sender<()>)>();
    std::thread::spawn(move || {
        let mut insert = connection.prepare(INSERT).expect("sql");
        while let Ok((k, reply)) = asked.recv() {
            insert.execute([k]).expect("a row");
            let _ = reply.send(());
        }
    });
    asks
}

/// A lone writer, beside raw SQLite in the same shape; and what each commit costs.
pub(crate) fn lone() {
    const COMMITS: i64 = 800;
    let mut trio = Trio::start();
    let raw = raw_writer(&trio.dir.path().join("raw.db"), "FULL");
    let (mut ratios, mut rates) = (vec![], vec![]);
    let mut switches = [const { Vec::new() }; 2];
    for _ in 0..RUNS {
        let asks = raw.clone();
        let base = in_turn(COMMITS, move |k| {
            let (reply, done) = oneshot::channel();
            asks.send((k, reply)).expect("the writer");
            async { done.await.expect("a commit") }
        });
        let before = trio.usage();
        let db = trio.p.clone();
        let ours = in_turn(COMMITS, move |k| {
            let db = db.clone();
            async move { commit(&db, k).await }
        });
        let after = trio.usage();
        ratios.push(base / ours);
        rates.push(1e6 / ours);
        for (switches, (after, before)) in switches.iter_mut().zip(after.into_iter().zip(before)) {
            switches.push((after - before).switches as f64 / COMMITS as f64);
        }
    }
    figure("commit_async_two_replicas_ratio", "x", ratios);
    figure("commit_async_two_replicas_rate", "/s", rates);
    let [primary, replicas] = switches;
    figure("switches_per_commit_primary", "", primary);
    figure("switches_per_commit_two_replicas", "", replicas);
}

/// As many writers as there may be, beside one by one in raw SQLite that syncs no commit.
pub(crate) fn group() {
    const COMMITS: i64 = 500;
    let mut trio = Trio::start();
    let raw = raw(&trio.dir.path().join("raw.db"), "NORMAL");
    let (mut ratios, mut rates) = (vec![], vec![]);
    let mut micros = [const { Vec::new() }; 2];
    for _ in 0..RUNS {
        let base = raw_rate(&raw, 20_000);
        let before = trio.usage();
        let begin = Instant::now();
        let tasks: Vec<_> = (0..WRITERS)
            .map(|_| {
                let db = trio.p.clone();
                runtime().spawn(async move {
                    for k in 0..COMMITS {
                        commit(&db, k).await;
                    }
                })
            })
            .collect();
        runtime().block_on(async {
            for task in tasks {
                task.await.expect("a task");
            }
        });
        let rate = (WRITERS * COMMITS) as f64 / begin.elapsed().as_secs_f64();
        let after = trio.usage();
        ratios.push(rate / base);
        rates.push(rate);
        for (micros, (after, before)) in micros.iter_mut().zip(after.into_iter().zip(before)) {
            micros.push((after - before).cpu_ns as f64 / 1e3 / (WRITERS * COMMITS) as f64);
        }
    }
    figure("group_two_replicas_per_s", "/s", rates);
    figure("group_vs_normal_ratio", "x", ratios);
    let [primary, replicas] = micros;
    figure("group_cpu_primary_us", "us a commit", primary);
    figure("group_cpu_two_replicas_us", "us a commit", replicas);
}

fn raw_rate(connection: &Connection, count: i64) -> f64 {
    let mut insert = connection.prepare(INSERT).expect("sql");
    let begin = Instant::now();
    for k in 0..count {
        insert.execute([k]).expect("a row");
    }
    count as f64 / begin.elapsed().as_secs_f64()
}

/// From the acknowledgement until a task of each replica runs that waits for the transaction.
pub(crate) fn lag() {
    const COMMITS: u64 = 500;
    let mut trio = Trio::start();
    let (mut p50, mut p99) = (vec![], vec![]);
    for _ in 0..RUNS {
        trio.usage();
        for other in &mut trio.others {
            other.say(&format!("sleep {COMMITS}"));
            assert_eq!(other.hear(), "sleeps");
        }
        let db = trio.p.clone();
        let returned = runtime().block_on(async {
            let task = runtime().spawn(async move {
                let mut returned = Vec::new();
                for k in 0..COMMITS {
                    commit(&db, k as i64).await;
                    returned.push(monotonic_ns());
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                returned
            });
            task.await.expect("a task")
        });
        let mut lags = Vec::new();
        for other in &mut trio.others {
            let seen = other.hear();
            let seen = seen.split_whitespace().map(|n| n.parse::<u64>().expect("a time"));
            lags.extend(seen.zip(&returned).map(|(s, r)| s.saturating_sub(*r) as f64 / 1e3));
        }
        p50.push(quantile(&mut lags, 0.5));
        p99.push(quantile(&mut lags, 0.99));
    }
    figure("lag_sleeping_p50_us", "us", p50);
    figure("lag_sleeping_p99_us", "us", p99);
}

/// Milliseconds of CPU in a second in which nothing happens: of a primary with two replicas, and of a
/// process with a hundred databases that have none.
pub(crate) fn idle() {
    let mut trio = Trio::start();
    let mut used = [const { Vec::new() }; 2];
    for _ in 0..3 {
        let (before, begin) = (trio.usage(), Instant::now());
        std::thread::sleep(Duration::from_secs(5));
        let (after, seconds) = (trio.usage(), begin.elapsed().as_secs_f64());
        for (used, (after, before)) in used.iter_mut().zip(after.into_iter().zip(before)) {
            used.push((after - before).cpu_ns as f64 / 1e6 / seconds);
        }
    }
    let [primary, replicas] = used;
    figure("idle_ms_per_s", "ms/s", primary);
    figure("idle_replica_ms_per_s", "ms/s", replicas.into_iter().map(|both| both / 2.0).collect());
    drop(trio);
    let dir = directory();
    let count = |of: &str| std::fs::read_dir(of).map_or(0, Iterator::count) as f64;
    let (threads, files) = (count("/proc/self/task"), count("/proc/self/fd"));
    let open = |n| {
        let path = dir.path().join(format!("{n}.db"));
        runtime().block_on(Db::open(config(&path))).expect("a database")
    };
    let all: Vec<Db> = (0..100).map(open).collect();
    let (threads, files) = (count("/proc/self/task") - threads, count("/proc/self/fd") - files);
    let mut used = Vec::new();
    for _ in 0..3 {
        let (before, begin) = (Usage::now(), Instant::now());
        std::thread::sleep(Duration::from_secs(5));
        used.push((Usage::now() - before).cpu_ns as f64 / 1e6 / begin.elapsed().as_secs_f64());
    }
    figure("idle_100_ms_per_s", "ms/s", used);
    figure("idle_100_threads_each", "", vec![threads / 100.0]);
    figure("idle_100_descriptors_each", "", vec![files / 100.0]);
    runtime().block_on(async {
        for db in all {
            db.shutdown().await;
        }
    });
}
