//! Roles that change at run time: failovers, restarts, the change itself, and what a lease asks of
//! its store.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use replite::lease::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use replite::{Config, Db, Durability, Error, Role, lease};

use crate::heals::gigabyte;
use crate::home::{INSERT, SCHEMA, config, directory, runtime};
use crate::members::{Members, Record};
use crate::{figure, rounds};

/// What takes longer shows where the time went: seconds of a failover, milliseconds of a restart.
const SLOW_FAILOVER: f64 = 2.3;
const SLOW_RESTART: f64 = 300.0;

/// The primary is killed. From then on one client of another node writes until it is told of a
/// success.
pub(crate) fn failover() {
    failovers(Record::Directory, ["failover_p50_s", "failover_max_s"], 50);
}

/// The same where the nodes keep the record themselves: with the primary a member of them is gone.
/// It says how often that was the one that leads the members.
pub(crate) fn members_failover() {
    failovers(Record::Members, ["members_failover_p50_s", "members_failover_max_s"], 30);
}

fn failovers(record: Record, names: [&str; 2], all: usize) {
    let mut members = Members::start(record);
    let (mut seconds, mut led_members) = (Vec::new(), 0);
    for round in 0..rounds(&names, all) {
        let led = members.level();
        led_members += usize::from(members.leads_members(led));
        pause(round);
        let through = members.other(led, round);
        let killed = members.kill(led);
        let begin = Instant::now();
        let by = members.write(through);
        let took = begin.elapsed().as_secs_f64();
        if took > SLOW_FAILOVER {
            eprintln!("round {round}: {took:.3} s through {through}, by {by}");
            members.show(killed);
        }
        seconds.push(took);
        members.start_again(led);
    }
    members.level();
    let most = seconds.iter().copied().fold(0.0, f64::max);
    if matches!(record, Record::Members) {
        println!("{}: {led_members} times the one that led the members was killed", names[0]);
    }
    figure(names[0], "s", seconds);
    println!("{}: {most:.2} s", names[1]);
}

/// What goes from one idle node to another, in a minute each time: renewals, Raft, the stream.
/// Headers of TCP and IP are not counted. What one sends another one receives: a node has two
/// thirds of the sum.
pub(crate) fn members_idle() {
    const WINDOW: Duration = Duration::from_secs(60);
    let bytes = Arc::new(AtomicU64::new(0));
    let members = Members::counted(&bytes);
    members.write(members.level());
    members.level();
    // What the start has begun ends.
    std::thread::sleep(Duration::from_secs(3));
    let mut sums = Vec::new();
    for _ in 0..rounds(&["members_bytes_per_minute"], 3).max(1) {
        let before = bytes.load(Ordering::Relaxed);
        std::thread::sleep(WINDOW);
        sums.push((bytes.load(Ordering::Relaxed) - before) as f64 * 2.0 / 3.0 / 1e6);
    }
    figure("members_bytes_per_minute", "MB of a node, sent and received", sums);
}

/// The primary is killed and started again at once. From its start on one client of it writes until
/// it is told of a success.
pub(crate) fn restart() {
    let mut members = Members::start(Record::Directory);
    let mut times = Vec::new();
    for round in 0..rounds(&["restart_takeover_ms"], 50) {
        let led = members.level();
        pause(round);
        let killed = members.kill(led);
        members.reap(led);
        let begin = Instant::now();
        members.start_again(led);
        let by = members.write(led);
        let took = begin.elapsed().as_secs_f64() * 1e3;
        if took > SLOW_RESTART || by != led {
            eprintln!("round {round}: {took:.0} ms, by {by}");
            members.show(killed);
        }
        times.push(took);
    }
    figure("restart_takeover_ms", "ms", times);
}

/// Kills fall anywhere between two renewals of the lease.
fn pause(round: usize) {
    std::thread::sleep(Duration::from_millis(round as u64 * 197 % 500));
}

fn node(path: &Path) -> Config {
    config(path)
        .durability(Durability::Synced)
        .listen("127.0.0.1:0".parse().expect("an address"))
        .migrate(|c| c.execute_batch(SCHEMA))
}

async fn insert(db: &Db, k: i64) -> replite::Txid {
    let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?)
    };
    db.write(insert).await.expect("a commit").txid.expect("a commit")
}

/// Two nodes of a gigabyte that take turns, by hand: from each call to its end. A promotion has the
/// application's migration in it, and what follows until a first commit is a figure of its own.
pub(crate) fn changes() {
    const ROUNDS: i64 = 20;
    let dir = directory();
    let (path, other) = (dir.path().join("p.db"), dir.path().join("r.db"));
    gigabyte(&path);
    let (mut demotes, mut promotes, mut writes) = (Vec::new(), Vec::new(), Vec::new());
    runtime().block_on(async {
        let mut leads = Db::open(node(&path)).await.expect("a primary");
        let url = leads.node().addresses.replication.clone();
        let mut follows =
            Db::open(node(&other).lease(lease::Fixed::replica_of(url))).await.expect("a replica");
        follows.ready().await.expect("ready");
        let limit = Duration::from_secs(60);
        for round in 0..ROUNDS {
            for k in 0..100 {
                insert(&leads, k).await;
            }
            let last = insert(&leads, round).await;
            follows.wait_for_timeout(last, limit).await.expect("applied");
            let to = follows.node().addresses.replication.clone();
            let begin = Instant::now();
            let last = leads.demote(&to).await.expect("a replica").expect("a state");
            demotes.push(begin.elapsed().as_secs_f64() * 1e3);
            follows.wait_for_timeout(last.txid(), limit).await.expect("applied");
            let begin = Instant::now();
            follows.promote().await.expect("a primary");
            promotes.push(begin.elapsed().as_secs_f64() * 1e3);
            let first = insert(&follows, round).await;
            writes.push(begin.elapsed().as_secs_f64() * 1e3);
            leads.wait_for_timeout(first, limit).await.expect("applied");
            std::mem::swap(&mut leads, &mut follows);
        }
        follows.shutdown().await;
        leads.shutdown().await;
    });
    figure("promote_ms", "ms", promotes);
    figure("promote_first_write_ms", "ms", writes);
    figure("demote_ms", "ms", demotes);
}

/// A store that counts what it is asked.
#[derive(Debug)]
struct Counted {
    store: lease::Directory,
    reads: AtomicU64,
    swaps: AtomicU64,
}

impl Store for Counted {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.store.read()
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        self.swaps.fetch_add(1, Ordering::Relaxed);
        self.store.swap(expected, record)
    }

    fn changed(&self) -> StoreFuture<'_, ()> {
        self.store.changed()
    }

    fn lease_time(&self) -> Duration {
        self.store.lease_time()
    }
}

/// What a primary and a replica ask of the store while nothing happens, in six seconds each time.
pub(crate) fn requests() {
    const WINDOW: Duration = Duration::from_secs(6);
    let dir = directory();
    let stores: Vec<Arc<Counted>> = (0..2)
        .map(|_| {
            let store = lease::Directory::new(dir.path().join("lease"));
            Arc::new(Counted { store, reads: AtomicU64::new(0), swaps: AtomicU64::new(0) })
        })
        .collect();
    let mut dbs = Vec::new();
    for (store, name) in stores.iter().zip(["a.db", "b.db"]) {
        let config = node(&dir.path().join(name)).lease(store.clone() as Arc<dyn Store>).bootstrap(2);
        dbs.push(runtime().block_on(Db::open(config)).expect("a node"));
    }
    for db in &dbs {
        runtime().block_on(db.ready()).expect("ready");
    }
    let led = dbs.iter().position(|db| db.role() == Role::Primary).expect("a primary");
    let asked = |node: usize| {
        let store = &stores[node];
        [store.reads.load(Ordering::Relaxed), store.swaps.load(Ordering::Relaxed)]
    };
    let mut counts = vec![Vec::new(); 4];
    for _ in 0..rounds(&["lease_requests_per_minute"], 10) {
        let before = [asked(led), asked(1 - led)].concat();
        std::thread::sleep(WINDOW);
        let after = [asked(led), asked(1 - led)].concat();
        for (count, (before, after)) in counts.iter_mut().zip(before.iter().zip(after)) {
            count.push((after - before) as f64 * 60.0 / WINDOW.as_secs_f64());
        }
    }
    let whose = ["reads, primary", "swaps, primary", "reads, replica", "swaps, replica"];
    for (whose, counts) in whose.iter().zip(counts) {
        figure("lease_requests_per_minute", whose, counts);
    }
    for db in dbs {
        runtime().block_on(db.shutdown());
    }
}
