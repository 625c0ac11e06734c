//! The read mark that a node shares for all connections of its process: what readers see beside all
//! that moves it, and when it is held.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use replite::rusqlite::{Connection, OptionalExtension, Transaction, params};
use replite::{Config, Db, Error, lease};

use crate::support::*;

const ACCOUNTS: i64 = 200;
const WAL_LIMIT: u64 = 256 * 1024;

/// Whether this process has the lock of a read mark, as the kernel says.
fn has_mark(path: &Path) -> bool {
    let inode = std::fs::metadata(format!("{}-shm", path.display())).unwrap().ino();
    let (own, file) = (std::process::id().to_string(), format!(":{inode}"));
    std::fs::read_to_string("/proc/locks").unwrap().lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let first: u64 = words[words.len() - 2].parse().unwrap_or_default();
        words[1] == "POSIX" && words[4] == own && words[5].ends_with(&file) && (123..128).contains(&first)
    })
}

fn url(db: &Db) -> String {
    db.node().addresses.replication.clone()
}

fn follower(path: &Path, of: &Db) -> Config {
    primary(path, 0).lease(lease::Fixed::replica_of(url(of)))
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_the_mark_of_its_readers_until_the_next_commit() {
    if !alone(a_node_has_the_mark_of_its_readers_until_the_next_commit) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"), 0)).await.unwrap();
    let two = Db::open(follower(&dir.path().join("b.db"), &one)).await.unwrap();
    within("ready", two.ready()).await.unwrap();
    for round in 0..3 {
        for db in [&one, &two] {
            let last = insert(&one, "one", round).await;
            within("it is there", two.wait_for_timeout(last, LIMIT)).await.unwrap();
            until("no one reads, and no mark is held", || !has_mark(db.path()));
            // A read of the pool's, or of a connection that is not.
            if round == 0 {
                assert_eq!(count(db), count(&one));
            } else {
                let plain = Connection::open(db.path()).unwrap();
                plain.query_row("SELECT count(*) FROM t", [], |_| Ok(())).unwrap();
            }
            until("the mark of the reader before", || has_mark(db.path()));
        }
    }
    let paths = [one.path().to_owned(), two.path().to_owned()];
    assert!(has_mark(&paths[1]));
    for db in [two, one] {
        db.shutdown().await;
    }
    assert!(!paths.iter().any(|path| has_mark(path)));
}

/// Moves money from one account to another, and counts that it did.
fn transfer(transaction: &Transaction<'_>, n: i64) -> replite::rusqlite::Result<()> {
    let (from, to) = (n * 7 % ACCOUNTS, n * 13 % ACCOUNTS);
    for (account, amount) in [(from, -1), (to, 1)] {
        let sql = "UPDATE account SET money = money + ?2, v = randomblob(300) WHERE id = ?1";
        transaction.prepare_cached(sql)?.execute(params![account, amount])?;
    }
    transaction.prepare_cached("UPDATE transfers SET n = n + 1")?.execute([]).map(drop)
}

/// How many transfers there were, of a whole state; nothing where there is none yet.
fn transfers(connection: &Connection) -> replite::rusqlite::Result<Option<i64>> {
    // Several statements of one transaction: all of one state.
    let transaction = connection.unchecked_transaction()?;
    let mut count = transaction.prepare_cached("SELECT n FROM transfers")?;
    let Some(before) = count.query_row([], |row| row.get(0)).optional()? else { return Ok(None) };
    let (accounts, money): (i64, i64) = transaction
        .prepare_cached("SELECT count(*), sum(money) FROM account")?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let after: i64 = count.query_row([], |row| row.get(0))?;
    assert_eq!((accounts, money, after), (ACCOUNTS, 0, before), "no state that was committed");
    Ok(Some(before))
}

/// Reads until it is to stop; how often.
fn read_on(
    stop: &AtomicBool,
    pause: Duration,
    mut read: impl FnMut() -> replite::rusqlite::Result<Option<i64>>,
) -> u64 {
    let (mut last, mut times) = (None, 0);
    while !stop.load(Ordering::Relaxed) {
        let found = read().unwrap();
        assert!(found >= last, "back from {last:?} to {found:?}");
        (last, times) = (found, times + 1);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
    times
}

/// Reads both files, and writes to that of the primary: by transfers, and by VACUUM now and then.
#[test]
#[ignore = "runs as the child of another test"]
fn another_process() {
    if !is_child() {
        return;
    }
    let paths = ["ONE", "TWO"].map(variable);
    let stop = AtomicBool::new(false);
    let (mut written, mut vacuumed) = (0, 0);
    std::thread::scope(|scope| {
        for path in &paths {
            let connection = plain(Path::new(path));
            let stop = &stop;
            scope.spawn(move || read_on(stop, Duration::from_micros(300), || transfers(&connection)));
        }
        scope.spawn(|| {
            hear();
            stop.store(true, Ordering::Relaxed);
        });
        let mut writers = paths.each_ref().map(|path| {
            let connection = plain(Path::new(path));
            connection.busy_timeout(Duration::from_millis(20)).unwrap();
            connection
        });
        speak("begun");
        let mut n = 0;
        while !stop.load(Ordering::Relaxed) {
            for writer in &mut writers {
                n += 1;
                if n % 500 < 2 {
                    vacuumed += u64::from(writer.execute_batch("VACUUM").is_ok());
                }
                let begun =
                    writer.transaction_with_behavior(replite::rusqlite::TransactionBehavior::Immediate);
                let done = begun.and_then(|transaction| {
                    transfer(&transaction, n)?;
                    transaction.commit()
                });
                written += u64::from(done.is_ok());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    speak(&format!("{written} {vacuumed}"));
}

/// Has all threads stop when it is dropped.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Hands over from the one to the other. A replica that lacked much when the primary stepped down is
/// served no more: then that one leads again, until it lacks less.
async fn hand_over(from: &Db, to: &Db) {
    for _ in 0..20 {
        let last = within("the demotion", from.demote(&url(to))).await.unwrap().unwrap();
        let has_all = to.wait_for_timeout(last.txid(), Duration::from_secs(2)).await.is_ok();
        let leads = if has_all { to } else { from };
        within("the promotion", leads.promote()).await.unwrap();
        if has_all {
            return;
        }
        within("it follows", to.wait_for_timeout(last.txid(), LIMIT)).await.unwrap();
    }
    panic!("it lacks something each time");
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_see_whole_states_in_order_beside_all_that_moves_the_mark() {
    const ROUNDS: usize = 6;
    const WRITES: i64 = 600;
    if !alone(readers_see_whole_states_in_order_beside_all_that_moves_the_mark) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"), 0)).await.unwrap();
    let two = Db::open(follower(&dir.path().join("b.db"), &one)).await.unwrap();
    let fill = |tx: &mut Transaction<'_>| {
        tx.execute_batch(
            "CREATE TABLE account(id INTEGER PRIMARY KEY, money, v); CREATE TABLE transfers(n)",
        )?;
        for id in 0..ACCOUNTS {
            tx.execute("INSERT INTO account VALUES (?1, 0, randomblob(300))", [id])?;
        }
        Ok::<_, Error>(tx.execute("INSERT INTO transfers VALUES (0)", [])?)
    };
    let filled = one.write(fill).await.unwrap().txid.unwrap();
    within("it is there", two.wait_for_timeout(filled, LIMIT)).await.unwrap();
    let nodes = [one, two];
    let [a, b] = nodes.each_ref().map(|db| db.path().to_str().unwrap().to_string());
    let mut other = Process::start(another_process, &[("ONE", &a), ("TWO", &b)]);
    other.expect("begun");

    let (stop, held, longest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let reads: Vec<u64> = std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for db in &nodes {
            let stop = &stop;
            // One without a pause keeps the mark where the node finds it.
            for pause in [Duration::ZERO, Duration::from_micros(200)] {
                let pooled = move || db.read(|c| Ok::<_, Error>(transfers(c)?)).map_err(|e| panic!("{e}"));
                readers.push(scope.spawn(move || read_on(stop, pause, pooled)));
            }
            let connection = plain(db.path());
            readers.push(
                scope.spawn(move || read_on(stop, Duration::from_micros(500), || transfers(&connection))),
            );
            // One that stays for a while, at an older state.
            let connection = plain(db.path());
            readers.push(scope.spawn(move || {
                read_on(stop, Duration::ZERO, || {
                    let transaction = connection.unchecked_transaction()?;
                    let found = transfers_in(&transaction)?;
                    std::thread::sleep(Duration::from_millis(15));
                    assert_eq!(transfers_in(&transaction)?, found, "the state that it began with");
                    Ok(found)
                })
            }));
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for db in &nodes {
                    held.fetch_add(u64::from(has_mark(db.path())), Ordering::Relaxed);
                    let wal = std::fs::metadata(format!("{}-wal", db.path().display()));
                    longest.fetch_max(wal.map_or(0, |wal| wal.len()), Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        // Also should it fail: the threads are waited for.
        let stops = Stops(&stop);
        tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(async {
                for round in 0..ROUNDS {
                    let (leads, follows) = (&nodes[round % 2], &nodes[(round + 1) % 2]);
                    for n in 0..WRITES {
                        // The brake holds WRITE for 4 s at most, and for the copy: with the load
                        // of other tests that may be longer than a write waits.
                        let write = || leads.write(move |tx| Ok::<_, Error>(transfer(tx, n)?));
                        while let Err(error) = within("a write", write()).await {
                            assert!(matches!(error, Error::Busy { .. }), "{error}");
                        }
                    }
                    hand_over(leads, follows).await;
                }
            });
        });
        drop(stops);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    other.say("end");
    let said = other.success();
    let [written, vacuumed] = said[0].split(' ').map(|n| n.parse::<i64>().unwrap()).collect::<Vec<_>>()[..]
    else {
        panic!("{said:?}")
    };
    assert!(written > 100 && vacuumed > 0, "{said:?}");
    assert!(reads.iter().all(|reads| *reads > 20), "{reads:?}");
    assert!(held.load(Ordering::Relaxed) > 0, "the mark was never held");
    let longest = longest.load(Ordering::Relaxed);
    assert!(longest <= 8 * WAL_LIMIT, "a WAL of {longest} bytes");

    let [one, two] = nodes;
    let last = insert(&one, "last", 0).await;
    within("it is there", two.wait_for_timeout(last, LIMIT)).await.unwrap();
    let all = one.read(|c| Ok::<_, Error>(transfers(c)?)).unwrap().unwrap();
    assert_eq!(all, ROUNDS as i64 * WRITES + written);
    assert_same_pages(one.path(), two.path());
    for db in [two, one] {
        db.shutdown().await;
    }
}

fn transfers_in(transaction: &Transaction<'_>) -> replite::rusqlite::Result<Option<i64>> {
    transaction.prepare_cached("SELECT n FROM transfers")?.query_row([], |row| row.get(0)).optional()
}
