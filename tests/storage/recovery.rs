//! A primary without fsyncs whose machine lost its power: replicas give back what they have of the
//! tail.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replite::{Config, Db, Durability, Error, Position, lease};

use crate::fork::*;
use crate::support::*;

/// A WAL that is not begun anew in a test: what is in it and not on the disk can be lost.
fn unsynced(fork: &Fork) -> Config {
    fork.primary("a").durability(Durability::Unsynced).wal_limit(1 << 30)
}

#[test]
#[ignore = "runs as the child of another test"]
fn unsynced_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let config = primary(&path, port).durability(Durability::Unsynced).wal_limit(1 << 30);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(Db::open(config)).unwrap();
    speak("open");
    loop {
        let rows: i64 = hear().parse().unwrap();
        let mut last = None;
        for n in 0..rows {
            let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
                let sql = "INSERT INTO t(who, n, v) VALUES ('a', ?1, randomblob(?2))";
                Ok::<_, Error>(tx.execute(sql, (n, 100 + n % 9 * 2000))?)
            };
            last = db.write_blocking(write).unwrap().txid;
        }
        runtime.block_on(db.wait_for(last.unwrap())).unwrap();
        speak(&format!("at {}", db.position().unwrap()));
    }
}

/// A primary in a process of its own, and a copy of its files as its disk would have them after a
/// power cut.
struct Victim {
    process: Process,
    path: PathBuf,
    disk: tempfile::TempDir,
}

impl Victim {
    fn start(fork: &Fork) -> Victim {
        let (path, port) = (fork.path("a"), fork.port.to_string());
        let process = Process::start(unsynced_process, &[("DB", path.to_str().unwrap()), ("PORT", &port)]);
        process.expect("open");
        Victim { process, path, disk: tempfile::tempdir().unwrap() }
    }

    fn write(&mut self, rows: i64) -> Position {
        self.process.say(&rows.to_string());
        self.process.expect("at").split_once(' ').unwrap().1.parse().unwrap()
    }

    /// The disk has what there is now, and nothing that comes later. Nobody writes.
    fn on_disk(&self) {
        take_over(&self.path, &self.disk.path().join(self.path.file_name().unwrap()));
    }

    /// The power is cut: the process ends, and its files are those of the disk, on a machine that
    /// was booted since.
    fn power_cut(self) {
        self.process.kill();
        take_over(&self.disk.path().join(self.path.file_name().unwrap()), &self.path);
        let _ = fs::remove_file(self.path.with_extension("db-shm"));
        assert!(marker(&self.path).exists());
        fs::write(marker(&self.path), "another boot").unwrap();
    }
}

/// The files of one node become those of another.
fn take_over(from: &Path, to: &Path) {
    for end in ["db", "db-wal"] {
        fs::copy(from.with_extension(end), to.with_extension(end)).unwrap();
    }
    let state_dir = to.with_extension("db-replite");
    let _ = fs::remove_dir_all(&state_dir);
    copy_tree(&from.with_extension("db-replite"), &state_dir);
}

fn marker(path: &Path) -> PathBuf {
    path.with_extension("db-replite").join("unsynced")
}

/// Waits until the node has the state.
async fn reached(db: &Db, position: Position) {
    within("a state", db.ready()).await.unwrap();
    db.wait_for_timeout(position.txid(), LIMIT).await.unwrap();
    assert_eq!(db.position(), Some(position));
}

async fn untouched(db: &Db) {
    assert_eq!(db.status().heals, 0);
    assert!(db.lost().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_give_back_what_a_power_cut_took_and_nothing_is_healed() {
    let fork = Fork::new();
    let mut victim = Victim::start(&fork);
    let b = open(fork.replica("b")).await;
    let first = victim.write(50);
    reached(&b, first).await;
    victim.on_disk();
    reached(&b, victim.write(100)).await;
    // Its log begins here, with a snapshot: what it has goes on only from what the other one has.
    let c = open(fork.replica("c")).await;
    within("the snapshot", c.ready()).await.unwrap();
    let middle = victim.write(100);
    reached(&b, middle).await;
    b.shutdown().await;
    let tip = victim.write(300);
    reached(&c, tip).await;
    victim.power_cut();
    let kept: i64 = plain(&fork.path("a")).query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(kept, 50, "the tail is gone");

    let b = open(fork.replica("b")).await;
    let config = unsynced(&fork).migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS second(a)"));
    let a = open(config).await;
    assert_eq!(count(&a), 550);
    assert_eq!(a.status().recovered, 500);
    // What the migration wrote comes after it, in an epoch of its own.
    within("the migration", a.wait_until(|conn| conn.table_exists(None, "second"))).await.unwrap();
    let position = a.position().unwrap();
    assert_eq!(position.number(), tip.number() + 1);
    assert_eq!(position.epoch().number(), tip.epoch().number() + 1);
    let last = insert(&a, "a", 1000).await;
    for replica in [&b, &c] {
        replica.wait_for_timeout(last, LIMIT).await.unwrap();
        untouched(replica).await;
        assert_eq!(count(replica), 551);
    }
    assert!(a.verify().await.unwrap().holds());
    let list = a.transactions(None, 10_000).await.unwrap();
    assert_eq!(list.last().unwrap().position.txid(), last, "the log goes on");
    assert_eq!(list.len() as u64, last.number() - list[0].position.number() + 1, "without a gap");
    for db in [a, b, c] {
        db.shutdown().await;
    }
    assert_same_pages(&fork.path("a"), &fork.path("b"));
    assert_same_pages(&fork.path("a"), &fork.path("c"));
    assert!(!marker(&fork.path("a")).exists(), "it was closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_that_outlived_the_transactions_before_it_is_no_hindrance() {
    let fork = Fork::new();
    let mut victim = Victim::start(&fork);
    let b = open(fork.replica("b")).await;
    let first = victim.write(20);
    reached(&b, first).await;
    victim.on_disk();
    let tip = victim.write(30);
    reached(&b, tip).await;
    b.shutdown().await;
    // It opens an epoch behind the tip, of which the disk has nothing but the name.
    let Victim { process, path, disk } = victim;
    process.kill();
    let process = Victim::start(&fork).process;
    let epochs = path.with_extension("db-replite").join("epochs");
    let newest = fs::read(&epochs).unwrap();
    Victim { process, path, disk }.power_cut();
    assert_ne!(fs::read(&epochs).unwrap(), newest);
    fs::write(&epochs, newest).unwrap();
    let b = open(fork.replica("b")).await;
    let a = open(unsynced(&fork)).await;
    assert_eq!(a.status().recovered, 30);
    assert_eq!(count(&a), 50);
    let last = insert(&a, "a", 1000).await;
    b.wait_for_timeout(last, LIMIT).await.unwrap();
    untouched(&b).await;
    assert_eq!(count(&b), 51);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_wrote_on_a_replica_is_not_taken_for_the_primary_s() {
    let fork = Fork::new();
    let mut victim = Victim::start(&fork);
    let b = open(fork.replica("b")).await;
    let common = victim.write(20);
    reached(&b, common).await;
    victim.on_disk();
    let tip = victim.write(30);
    reached(&b, tip).await;
    b.shutdown().await;
    victim.power_cut();
    plain(&fork.path("b")).execute_batch("DELETE FROM t; CREATE TABLE stray(a)").unwrap();
    let b = open(fork.replica("b")).await;
    let a = open(unsynced(&fork)).await;
    assert_eq!(a.status().recovered, tip.number() - common.number());
    assert_eq!(count(&a), 50);
    let last = insert(&a, "a", 1000).await;
    b.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_eq!(count(&b), 51);
    assert_eq!(b.lost().await.unwrap().len(), 1, "the stray commits are kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_breaks_off_gives_whole_transactions_and_comes_again() {
    let fork = Fork::new();
    let mut victim = Victim::start(&fork);
    let wire = Wire::start(([127, 0, 0, 1], fork.port).into(), Duration::from_millis(1)).await;
    let b = open(replica(&fork.path("b"), &format!("http://{}", wire.address))).await;
    let first = victim.write(10);
    reached(&b, first).await;
    victim.on_disk();
    let tip = victim.write(2000);
    reached(&b, tip).await;
    victim.power_cut();
    let cuts = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(150)).await;
            wire.cut();
        }
    });
    let a = open(unsynced(&fork).recovery_timeout(Duration::from_secs(8))).await;
    cuts.abort();
    let recovered = a.status().recovered;
    assert!(recovered > 0, "nothing came back");
    assert_eq!(count(&a) as u64, 10 + recovered, "rows and transactions differ");
    assert!(a.verify().await.unwrap().holds());
    // Whatever the cuts left is healed and kept.
    let last = insert(&a, "a", 10_000).await;
    let b = if cuts.await.is_err() {
        b.shutdown().await;
        open(fork.replica("b")).await
    } else {
        b
    };
    b.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_eq!(b.lost().await.unwrap().is_empty(), recovered == 2000);
    a.shutdown().await;
    b.shutdown().await;
    assert_same_pages(&fork.path("a"), &fork.path("b"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_asked_when_nothing_can_be_lost() {
    let fork = Fork::new();
    let long = 2 * LIMIT;
    // New; closed; killed, on a machine that stayed up; and with fsyncs, where only the marker says
    // what was before.
    let a = within("a new one", open(unsynced(&fork).recovery_timeout(long))).await;
    insert(&a, "a", 1).await;
    assert!(marker(&fork.path("a")).exists());
    a.shutdown().await;
    assert!(!marker(&fork.path("a")).exists());
    let mut victim = Victim::start(&fork);
    let tip = victim.write(100);
    victim.process.kill();
    let a = within("after a kill", open(unsynced(&fork).recovery_timeout(long))).await;
    assert_eq!(count(&a), 101);
    assert_eq!(a.position().unwrap().number(), tip.number());
    a.shutdown().await;
    // Asked in vain: no replica is there.
    fs::write(marker(&fork.path("a")), "another boot").unwrap();
    let wait = Duration::from_millis(100);
    let a = open(fork.primary("a").recovery_timeout(wait)).await;
    assert_eq!((count(&a), a.status().recovered), (101, 0));
    assert!(!marker(&fork.path("a")).exists(), "with fsyncs there is nothing to lose");
    a.shutdown().await;
    fs::write(marker(&fork.path("a")), "another boot").unwrap();
    let off = within("off", open(fork.primary("a").recovery_timeout(Duration::ZERO))).await;
    off.shutdown().await;
    fs::write(marker(&fork.path("a")), "another boot").unwrap();
    let deaf = Config::new(fork.path("a")).database("app").secret(secret()).lease(lease::Fixed::primary());
    let deaf = within("without a listener", open(deaf.recovery_timeout(long))).await;
    assert_eq!(count(&deaf), 101);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_opening_that_is_given_up_frees_address_and_file() {
    let fork = Fork::new();
    open(unsynced(&fork)).await.shutdown().await;
    fs::write(marker(&fork.path("a")), "another boot").unwrap();
    let given_up =
        tokio::time::timeout(Duration::from_millis(300), open(unsynced(&fork).recovery_timeout(LIMIT)));
    assert!(given_up.await.is_err());
    let again = within("the second opening", async {
        loop {
            match Db::open(unsynced(&fork).recovery_timeout(Duration::from_millis(1))).await {
                Ok(db) => return db,
                // The file or the address is not free yet.
                Err(error) => {
                    assert!(matches!(error, Error::AlreadyOpen { .. } | Error::Io { .. }), "{error}")
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    insert(&again, "a", 1).await;
}
