//! What a commit costs in bytes: on the wire, in the log, on the disk; and on a far and narrow link.

use std::path::Path;
use std::time::{Duration, Instant};

use replite::{Db, Durability, Error, Txid, lease};

use crate::home::{Counted, Other, config, counted, directory, primary, runtime};
use crate::support::Wire;
use crate::{figure, quantile};

const RUNS: usize = 5;
/// Rows that are there before.
const ROWS: i64 = 20_000;

/// A primary, and a replica in another process behind what counts. The bytes are those that TCP
/// carries to the replica: its acknowledgements, and what TCP and IP add, are not in it.
struct Pair {
    primary: Db,
    replica: Other,
    bytes: Counted,
    dir: tempfile::TempDir,
}

impl Pair {
    /// With tables: one that grows, one whose rows are updated, and one with an index.
    fn new() -> Pair {
        let dir = directory();
        let db = primary(&dir.path().join("p.db"), Durability::Synced);
        let fill = "CREATE TABLE log (id INTEGER PRIMARY KEY, v);
            CREATE TABLE counts (id INTEGER PRIMARY KEY, n INTEGER, v);
            CREATE TABLE found (id INTEGER PRIMARY KEY, k INTEGER, v);
            CREATE INDEX found_k ON found (k);
            WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 20000)
            INSERT INTO counts SELECT i, i, hex(randomblob(40)) FROM c;
            INSERT INTO found SELECT id, random(), v FROM counts";
        db.write_blocking(|tx| Ok::<_, Error>(tx.execute_batch(fill)?)).expect("rows");
        let (url, bytes) = counted(&db);
        let replica = Other::start_at(&dir.path().join("r.db"), &url, false);
        Pair { primary: db, replica, bytes, dir }
    }

    fn write(&self, sql: &'static str, value: i64) -> Txid {
        let run = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.prepare_cached(sql)?.execute([value])?)
        };
        self.primary.write_blocking(run).expect("a commit").txid.expect("it wrote")
    }

    /// Bytes of each commit, where each is on the replica before the next begins.
    fn one_by_one(&mut self, sql: &'static str, value: impl Fn(i64) -> i64) -> f64 {
        const COMMITS: i64 = 500;
        let last = self.write(sql, value(0));
        self.arrived(last);
        let before = self.bytes.to_replica();
        for n in 1..=COMMITS {
            let txid = self.write(sql, value(n));
            self.arrived(txid);
        }
        (self.bytes.to_replica() - before) as f64 / COMMITS as f64
    }

    fn arrived(&mut self, txid: Txid) {
        self.replica.say(&format!("wait {txid}"));
        assert_eq!(self.replica.hear(), "applied");
    }
}

const APPEND: &str = "INSERT INTO log(v) VALUES (printf('%080d', ?1))";
const UPDATE: &str = "UPDATE counts SET n = n + 1 WHERE id = ?1";
const INSERT: &str = "INSERT INTO found(k, v) VALUES (?1, printf('%080d', ?1))";

/// A place that looks random, and is the same in each run.
fn scattered(n: i64) -> i64 {
    n.wrapping_mul(0x9E37_79B9_7F4A_7C15_u64 as i64) ^ (n << 7)
}

pub(crate) fn commits() {
    let mut pair = Pair::new();
    let (mut append, mut update, mut insert, mut loaded) = (vec![], vec![], vec![], vec![]);
    for run in 0..RUNS as i64 {
        append.push(pair.one_by_one(APPEND, |n| n));
        update.push(pair.one_by_one(UPDATE, |n| scattered(n + run).rem_euclid(ROWS) + 1));
        insert.push(pair.one_by_one(INSERT, |n| scattered(n + 1000 * run)));
        loaded.push(at_a_rate(&mut pair));
    }
    figure("wire_append_bytes", "bytes", append);
    figure("wire_update_bytes", "bytes", update);
    figure("wire_insert_bytes", "bytes", insert);
    figure("wire_loaded_bytes", "bytes", loaded);
}

/// Bytes of each of 1,000 appends a second.
fn at_a_rate(pair: &mut Pair) -> f64 {
    const COMMITS: u32 = 2000;
    let before = pair.bytes.to_replica();
    let last = paced(COMMITS, 1000, |n| pair.write(APPEND, n));
    pair.arrived(last);
    (pair.bytes.to_replica() - before) as f64 / f64::from(COMMITS)
}

/// So many calls, at so many a second.
fn paced(calls: u32, rate: u32, mut run: impl FnMut(i64) -> Txid) -> Txid {
    let begin = Instant::now();
    let mut last = None;
    for n in 0..calls {
        let due = Duration::from_secs(1) * n / rate;
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        last = Some(run(i64::from(n)));
    }
    let (took, planned) = (begin.elapsed().as_secs_f64(), f64::from(calls) / f64::from(rate));
    if took > 1.05 * planned {
        eprintln!("{calls} commits took {took:.2} s in place of {planned:.2} s: the machine is too busy");
    }
    last.expect("a call")
}

/// What the log has of each append, and what goes to the disk: first with a primary alone, then with
/// a replica on the same disk.
pub(crate) fn files() {
    const COMMITS: i64 = 4000;
    let (mut log, mut primary, mut replica) = (vec![], vec![], vec![]);
    for _ in 0..RUNS {
        let dir = directory();
        let db = crate::home::primary(&dir.path().join("p.db"), Durability::Synced);
        db.write_blocking(|tx| {
            Ok::<_, Error>(tx.execute_batch("CREATE TABLE log (id INTEGER PRIMARY KEY, v)")?)
        })
        .expect("a table");
        let before = to_disk();
        for n in 0..COMMITS {
            let run = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                Ok::<_, Error>(tx.prepare_cached(APPEND)?.execute([n])?)
            };
            db.write_blocking(run).expect("a commit");
        }
        let alone = (to_disk() - before) as f64 / COMMITS as f64;
        primary.push(alone);
        drop(db);
        let mut pair = Pair::new();
        let home = pair.dir.path().join("p.db-replite/log");
        let before = (size(&home), to_disk());
        let last = (0..COMMITS).fold(None, |_, n| Some(pair.write(APPEND, n))).expect("a commit");
        pair.arrived(last);
        let both = (to_disk() - before.1) as f64 / COMMITS as f64;
        log.push((size(&home) - before.0) as f64 / COMMITS as f64);
        replica.push(both - alone);
    }
    figure("log_bytes_per_commit", "bytes", log);
    figure("disk_bytes_per_commit_primary", "bytes", primary);
    figure("disk_bytes_per_commit_replica", "bytes", replica);
}

fn size(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).expect("a directory").flatten();
    files.map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum()
}

/// Bytes that all disks of the machine have written, when nothing waits to be: with what the file
/// system's journal has of it, and with what others write.
fn to_disk() -> u64 {
    assert!(std::process::Command::new("sync").status().is_ok_and(|status| status.success()), "a sync");
    let disks = std::fs::read_dir("/sys/block").expect("the disks").flatten();
    let physical = disks.filter(|disk| disk.path().join("device").exists());
    let sectors = physical.map(|disk| {
        let counts = std::fs::read_to_string(disk.path().join("stat")).expect("a disk's counts");
        counts.split_whitespace().nth(6).and_then(|n| n.parse::<u64>().ok()).expect("sectors written")
    });
    // Linux counts in sectors of 512 bytes, whatever the disk's are.
    sectors.sum::<u64>() * 512
}

/// How late small commits are behind a link of 1 Mbit/s that is 50 ms away, 100 ms there and back:
/// 20 a second, and 100. Where the link does not carry so much, each is later than the one before,
/// and the figure says how late the last one is.
pub(crate) fn far() {
    for (name, rate) in [("far_link_lag_ms", 20), ("far_link_lag_100_ms", 100)] {
        let mut lags = far_lags(rate);
        let last = lags[lags.len() - 1];
        figure(name, "ms", vec![quantile(&mut lags, 0.5)]);
        figure(&name.replace("_ms", "_last_ms"), "ms", vec![last]);
    }
}

/// Tells this process that it is in the namespace.
const LOSSY: &str = "REPLITE_BENCH_LOSSY";
/// A loopback of 50 KB/s, both ways together, that loses one packet of a hundred. Without the
/// smaller MTU a packet would be larger than what may go at once.
const LOSES: &str = "ip link set lo up mtu 1500 \
    && tc qdisc add dev lo root tbf rate 400kbit burst 5kb latency 5s \
    && nft add table inet loss \
    && nft 'add chain inet loss in { type filter hook input priority 0; }' \
    && nft 'add rule inet loss in numgen random mod 100 < 1 drop' \
    && exec \"$0\" --bench lossy_link_lag_ms";

/// How late 100 small commits a second are behind a link that loses packets, in a network namespace
/// of its own. It has no delay: the kernel's retransmission is what is late.
pub(crate) fn lossy() {
    if std::env::var_os(LOSSY).is_none() {
        let mut within = std::process::Command::new("unshare");
        within.args(["--map-root-user", "--net", "sh", "-c", LOSES]);
        within.arg(std::env::current_exe().expect("a path")).env(LOSSY, "1");
        if !within.status().is_ok_and(|ended| ended.success()) {
            eprintln!("lossy_link_lag_ms was not measured: it needs unshare, ip, tc and nft");
        }
        return;
    }
    let dir = directory();
    let db = primary(&dir.path().join("p.db"), Durability::Synced);
    let mut lags = lags(&db, dir.path(), db.node().addresses.replication.clone(), 100, || {});
    let last = lags[lags.len() - 1];
    figure("lossy_link_lag_ms", "ms", vec![quantile(&mut lags, 0.5)]);
    figure("lossy_link_lag_p99_ms", "ms", vec![quantile(&mut lags, 0.99)]);
    figure("lossy_link_lag_last_ms", "ms", vec![last]);
}

fn far_lags(rate: u32) -> Vec<f64> {
    let dir = directory();
    let db = primary(&dir.path().join("p.db"), Durability::Synced);
    let to = db.node().addresses.replication.split('/').nth(2).expect("an address").parse();
    let wire = runtime().block_on(Wire::start(to.expect("an address"), Duration::from_millis(50)));
    lags(&db, dir.path(), format!("replite://{}", wire.address), rate, || wire.throttle(125_000))
}

/// Milliseconds for each of ten seconds' commits, in their order, until a replica of this URL has
/// it.
fn lags(db: &Db, dir: &Path, url: String, rate: u32, begins: impl FnOnce()) -> Vec<f64> {
    let follow = config(&dir.join("r.db")).lease(lease::Fixed::replica_of(url));
    let replica = runtime().block_on(Db::open(follow)).expect("a replica");
    runtime().block_on(replica.ready()).expect("ready");
    begins();
    let mut waits = Vec::new();
    let insert = "INSERT INTO t(k, v) VALUES (?1, printf('%080d', ?1))";
    paced(10 * rate, rate, |n| {
        let run = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.prepare_cached(insert)?.execute([n])?)
        };
        let txid = db.write_blocking(run).expect("a commit").txid.expect("it wrote");
        let (replica, returned) = (replica.clone(), Instant::now());
        waits.push(runtime().spawn(async move {
            replica.wait_for_timeout(txid, Duration::from_secs(600)).await.expect("it comes");
            returned.elapsed().as_secs_f64() * 1e3
        }));
        txid
    });
    waits.into_iter().map(|wait| runtime().block_on(wait).expect("a task")).collect()
}
