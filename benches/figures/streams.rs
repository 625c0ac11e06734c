//! The stream: lag, catch-up, snapshot, one large transaction.

use std::time::{Duration, Instant};

use replite::{Db, Durability, Error, Plaintext, lease};

use crate::home::{
    INSERT, Other, SCHEMA, config, directory, idle_memory, monotonic_ns, peak_memory, primary, primary_of,
    replica, runtime,
};
use crate::{figure, quantile};

/// Commits returned here until rows are seen by SELECT in another process.
pub(crate) fn lag() {
    const COMMITS: i64 = 1000;
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Synced);
    let mut other = Other::start(&dir.path().join("r.db"), &p);
    let (mut p50, mut p99) = (Vec::new(), Vec::new());
    let mut next = 1;
    for _ in 0..5 {
        let mut lags = lags(&p, &mut other, next, COMMITS);
        next += COMMITS;
        p50.push(quantile(&mut lags, 0.5));
        p99.push(quantile(&mut lags, 0.99));
    }
    figure("lag_p50_us", "us", p50);
    figure("lag_p99_us", "us", p99);
}

/// Microseconds for each of so many commits; the first has this id.
fn lags(p: &Db, other: &mut Other, next: i64, commits: i64) -> Vec<f64> {
    other.say(&format!("watch {next} {commits}"));
    assert_eq!(other.hear(), "watching");
    let mut returned = Vec::new();
    for k in 0..commits {
        p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?)).expect("a commit");
        returned.push(monotonic_ns());
        std::thread::sleep(Duration::from_millis(1));
    }
    let seen = other.hear();
    let seen = seen.split_whitespace().map(|n| n.parse::<u64>().expect("a time"));
    seen.zip(&returned).map(|(s, r)| s.saturating_sub(*r) as f64 / 1e3).collect()
}

/// What TLS costs a commit on its way, to the same without: two pairs of a primary and a replica in
/// another process, in turn.
pub(crate) fn tls_lag() {
    const COMMITS: i64 = 1000;
    let dir = directory();
    let pair = |name: &str, clear: bool| {
        let mut config = config(&dir.path().join(format!("{name}-p.db")));
        if clear {
            config = config.plaintext(Plaintext::Loopback);
        }
        let p = primary_of(config);
        let other = Other::start_in(&dir.path().join(format!("{name}-r.db")), &p, clear);
        (p, other)
    };
    let (mut private, mut clear) = (pair("tls", false), pair("clear", true));
    let (mut ratios, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..9 {
        let p50 =
            |(p, other): &mut (Db, Other)| quantile(&mut lags(p, other, 1 + round * COMMITS, COMMITS), 0.5);
        let (a, b) = (p50(&mut private), p50(&mut clear));
        ratios.push(a / b);
        with.push(a);
        without.push(b);
    }
    figure("tls_lag_ratio", "x", ratios);
    figure("tls_lag_p50_us", "us", with);
    figure("clear_lag_p50_us", "us", without);
}

/// What TLS leaves of the speed of a snapshot of 512 MiB, with both sides on the machine's cores.
pub(crate) fn tls_snapshot() {
    const ROWS: i64 = 131_072;
    let dir = directory();
    // Answers both.
    let p = primary_of(config(&dir.path().join("p.db")).plaintext(Plaintext::Loopback));
    p.write_blocking(|tx| {
        let sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
                   INSERT INTO t(k, v) SELECT i, randomblob(3900) FROM c";
        Ok::<_, Error>(tx.execute(sql, [ROWS])?)
    })
    .expect("a commit");
    runtime().block_on(p.checkpoint(Duration::from_secs(30))).expect("a checkpoint");
    let bytes = std::fs::metadata(p.path()).map_or(0, |m| m.len()) as f64;
    let private = p.node().addresses.replication.replace("http://", "replite://").replace("/_replite", "");
    let speed = |url: &str, clear: bool| {
        let path = dir.path().join("r.db");
        let mut config = config(&path).lease(lease::Fixed::replica_of(url));
        if clear {
            config = config.plaintext(Plaintext::Loopback);
        }
        let begin = Instant::now();
        let r = runtime().block_on(Db::open(config)).expect("a replica");
        runtime().block_on(r.ready()).expect("ready");
        let speed = bytes / 1e6 / begin.elapsed().as_secs_f64();
        runtime().block_on(r.shutdown());
        drop(r);
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir_all(dir.path().join("r.db-replite"));
        speed
    };
    let (mut ratios, mut with, mut without) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..7 {
        let (a, b) = (speed(&private, false), speed(&p.node().addresses.replication, true));
        ratios.push(a / b);
        with.push(a);
        without.push(b);
    }
    figure("tls_snapshot_ratio", "x", ratios);
    figure("tls_snapshot_speed", "MB/s", with);
    figure("clear_snapshot_speed", "MB/s", without);
}

/// The same where the application serves the endpoint, as it does by default, in one process: until
/// the transaction is applied. Its server holds small pieces back for as long as it may.
pub(crate) fn lag_mounted() {
    const COMMITS: i64 = 500;
    let dir = directory();
    let listener = runtime().block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let p = config(&dir.path().join("p.db")).advertise(&url).migrate(|c| c.execute_batch(SCHEMA));
    let p = runtime().block_on(Db::open(p)).expect("a primary");
    let app = axum::Router::new().nest_service("/_replite", p.service());
    runtime().spawn(async move { axum::serve(listener, app).await });
    let r = config(&dir.path().join("r.db")).lease(lease::Fixed::replica_of(&url));
    let r = runtime().block_on(Db::open(r)).expect("a replica");
    runtime().block_on(r.ready()).expect("ready");
    let (mut p50, mut p90) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let mut waiting = Vec::new();
        for k in 0..COMMITS {
            let insert = |tx: &mut replite::rusqlite::Transaction<'_>| {
                Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?)
            };
            let (txid, r) = (p.write_blocking(insert).expect("a commit").txid.expect("a commit"), r.clone());
            let begin = Instant::now();
            // The next commit does not wait for it.
            waiting.push(runtime().spawn(async move {
                r.wait_for(txid).await.expect("applied");
                begin.elapsed().as_secs_f64() * 1e6
            }));
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut lags: Vec<f64> =
            waiting.into_iter().map(|lag| runtime().block_on(lag).expect("a task")).collect();
        p50.push(quantile(&mut lags, 0.5));
        p90.push(quantile(&mut lags, 0.9));
    }
    figure("lag_mounted_p50_us", "us", p50);
    figure("lag_mounted_p90_us", "us", p90);
    runtime().block_on(r.shutdown());
    runtime().block_on(p.shutdown());
}

/// A task that waits for a transaction on a replica: from its application until the task runs.
pub(crate) fn wakeups() {
    const COMMITS: u64 = 500;
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Synced);
    let mut other = Other::start(&dir.path().join("r.db"), &p);
    let mut p50 = Vec::new();
    for _ in 0..5 {
        other.say(&format!("wakeups {COMMITS}"));
        assert_eq!(other.hear(), "watching");
        for k in 0..COMMITS as i64 {
            std::thread::sleep(Duration::from_millis(1));
            p.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?))
                .expect("a commit");
        }
        let late = other.hear();
        let mut late: Vec<f64> =
            late.split_whitespace().map(|n| n.parse::<f64>().expect("a time") / 1e3).collect();
        p50.push(quantile(&mut late, 0.5));
    }
    figure("wait_wakeup_us", "us", p50);
}

/// One-page transactions from the log to a replica that was away.
pub(crate) fn catch_up() {
    const COMMITS: i64 = 50_000;
    let dir = directory();
    let p = primary(&dir.path().join("p.db"), Durability::Unsynced);
    let mut rates = Vec::new();
    drop(replica(&dir.path().join("r.db"), &p));
    for _ in 0..5 {
        let mut last = None;
        for k in 0..COMMITS {
            let update = |tx: &mut replite::rusqlite::Transaction<'_>| {
                let sql = "INSERT INTO t(id, k) VALUES (1, ?1) ON CONFLICT DO UPDATE SET k = excluded.k + id";
                Ok::<_, Error>(tx.prepare_cached(sql)?.execute([k])?)
            };
            last = p.write_blocking(update).expect("a commit").txid;
        }
        let last = last.expect("a commit");
        runtime().block_on(p.wait_for_timeout(last, Duration::from_secs(60))).expect("captured");
        let begin = Instant::now();
        let r = replica(&dir.path().join("r.db"), &p);
        runtime().block_on(r.wait_for_timeout(last, Duration::from_secs(60))).expect("applied");
        rates.push(COMMITS as f64 / begin.elapsed().as_secs_f64());
        runtime().block_on(r.shutdown());
    }
    figure("catchup_txn_per_s", "/s", rates);
}

/// A gigabyte: in one transaction beside a replica, and as a snapshot to new ones.
pub(crate) fn bulk() {
    const ROWS: u64 = 262_144;
    let dir = directory();
    let path = dir.path().join("p.db");
    let p = primary(&path, Durability::Synced);
    let mut other = Other::start(&dir.path().join("r.db"), &p);
    other.say("memory");
    let idle_there: u64 = other.hear().parse().expect("a number");
    let idle_here = idle_memory();
    let commit = p
        .write_blocking(|tx| {
            // SQLite's own page cache, which spills to the WAL, is not what is measured.
            tx.execute_batch("PRAGMA cache_size = -2000")?;
            let sql = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < ?1)
                       INSERT INTO t(k, v) SELECT i, randomblob(3900) FROM c";
            Ok::<_, Error>(tx.execute(sql, [ROWS as i64])?)
        })
        .expect("a commit");
    let last = commit.txid.expect("a commit");
    runtime().block_on(p.wait_for_timeout(last, Duration::from_secs(120))).expect("captured");
    other.say(&format!("wait {last}"));
    assert_eq!(other.hear(), "applied");
    let here = peak_memory().saturating_sub(idle_here);
    other.say("peak");
    let there = other.hear().parse::<u64>().expect("a number").saturating_sub(idle_there);
    figure(
        "big_txn_memory_mib",
        "MiB, primary and replica",
        vec![here as f64 / 1024.0, there as f64 / 1024.0],
    );
    drop(other);
    // The frames go back into the file: `cp` copies as much then.
    let bytes = || std::fs::metadata(&path).map_or(0, |m| m.len());
    let end = Instant::now() + Duration::from_secs(60);
    while bytes() < ROWS * 4000 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut ratios = Vec::new();
    let mut speeds = Vec::new();
    for run in 0..4 {
        let (copy, new) = (dir.path().join("copy.db"), dir.path().join(format!("n{run}.db")));
        let begin = Instant::now();
        let copied = std::process::Command::new("cp").arg(&path).arg(&copy).status();
        assert!(copied.expect("cp").success());
        // A replica that is ready has its state on the disk.
        std::fs::File::open(&copy).and_then(|copy| copy.sync_all()).expect("a sync");
        let cp = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let r = replica(&new, &p);
        let fill = begin.elapsed().as_secs_f64();
        ratios.push(cp / fill);
        speeds.push(bytes() as f64 / 1e6 / fill);
        runtime().block_on(r.shutdown());
        drop(r);
        for file in [copy, new] {
            let _ = std::fs::remove_file(file);
        }
    }
    figure("snapshot_cp_ratio", "x", ratios);
    figure("snapshot_speed", "MB/s", speeds);
}
