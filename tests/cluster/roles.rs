//! Roles that change by hand while everything runs: under other libraries' connections, with a link
//! that is cut, on a disk that is full, and under `kill -9`.
//!
//! `REPLITE_ROUNDS` sets how often a node is killed (30 if not set), `REPLITE_SEED` when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::{Connection, Transaction};
use replite::{Config, Db, Error, LostKind, Position, Role, lease};

use crate::support::*;

const INSERT: &str = "INSERT INTO t(who, n) VALUES (?1, ?2)";

fn url(db: &Db) -> String {
    db.node().addresses.replication.clone()
}

/// A node that may lead, and follows this one at first.
fn follower(path: &Path, port: u16, of: &str) -> Config {
    primary(path, port).lease(lease::Fixed::replica_of(of))
}

async fn pair(dir: &Path) -> [Db; 2] {
    let one = Db::open(primary(&dir.join("a.db"), 0)).await.unwrap();
    let two = Db::open(follower(&dir.join("b.db"), 0, &url(&one))).await.unwrap();
    within("ready", two.ready()).await.unwrap();
    [one, two]
}

/// Hands over from the one to the other, and says where.
async fn hand_over(from: &Db, to: &Db) -> Position {
    let last = within("the demotion", from.demote(&url(to))).await.unwrap().unwrap();
    within("the last of it", to.wait_for_timeout(last.txid(), LIMIT)).await.unwrap();
    within("the promotion", to.promote()).await.unwrap();
    last
}

/// Connections that were there before write on the new primary, and not on the new replica, with the
/// statements that they had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_others_go_on_over_a_change_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let dbs = pair(dir.path()).await;
    let mut last = Some(insert(&dbs[0], "first", 0).await);
    within("it is there", dbs[1].wait_for_timeout(last.unwrap(), LIMIT)).await.unwrap();
    let others = dbs.each_ref().map(|db| {
        let connection = Connection::open(db.path()).unwrap();
        connection.busy_timeout(Duration::from_millis(50)).unwrap();
        connection
    });
    // Ones in the middle of reading.
    let readers = dbs.each_ref().map(|db| {
        let connection = Connection::open(db.path()).unwrap();
        connection.execute_batch("BEGIN; SELECT count(*) FROM t").unwrap();
        connection
    });
    let mut writes = others.each_ref().map(|connection| connection.prepare(INSERT).unwrap());
    let mut led = 0;
    for round in 0..6i64 {
        let begun = Instant::now();
        writes[led].execute(("other", round)).unwrap();
        let refused = writes[1 - led].execute(("other", round)).unwrap_err();
        let code = refused.sqlite_error_code();
        assert_eq!(code, Some(replite::rusqlite::ErrorCode::DatabaseBusy), "{refused}");
        assert!(begun.elapsed() < LIMIT / 4, "its own limit is over soon");
        // The one that follows is connected again, and has it.
        let sql = "SELECT count(*) FROM t";
        let has_it = move |c: &Connection| Ok(c.query_row(sql, [], |r| r.get::<_, i64>(0))? == round + 2);
        within("it follows", dbs[1 - led].wait_until(has_it)).await.unwrap();
        last = Some(hand_over(&dbs[led], &dbs[1 - led]).await.txid());
        led = 1 - led;
        assert_eq!((dbs[led].role(), dbs[1 - led].role()), (Role::Primary, Role::Replica));
    }
    for connection in readers {
        let rows: i64 = connection.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
        assert_eq!(rows, 1, "the snapshot that it began with");
    }
    within("it follows", dbs[1 - led].wait_for_timeout(last.unwrap(), LIMIT)).await.unwrap();
    assert_eq!((count(&dbs[0]), count(&dbs[1])), (7, 7));
    drop(writes);
    for db in dbs {
        db.shutdown().await;
    }
}

/// Without the link nothing of it comes to an end on the other side, and the first takes it all back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_stepped_down_over_a_cut_link_leads_again_without_a_loss() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"), 0)).await.unwrap();
    let wire = Wire::start(address(&url(&one)), Duration::ZERO).await;
    let through = format!("http://{}", wire.address);
    let two = Db::open(follower(&dir.path().join("b.db"), 0, &through)).await.unwrap();
    within("ready", two.ready()).await.unwrap();
    wire.let_in(false);
    wire.cut();
    let missed = insert(&one, "missed", 1).await;
    let last = within("it waits for no one", one.demote(&url(&two))).await.unwrap().unwrap();
    assert_eq!(last.txid(), missed);
    let waited = two.wait_for_timeout(missed, Duration::ZERO).await;
    assert!(matches!(waited, Err(Error::Timeout { .. })), "{waited:?}");
    for db in [&one, &two] {
        let write = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute(INSERT, ("no", 1))?);
        assert!(matches!(db.write(write).await, Err(Error::NotPrimary { .. })), "no one leads");
    }
    within("it leads again", one.promote()).await.unwrap();
    wire.let_in(true);
    let next = insert(&one, "next", 1).await;
    within("it follows", two.wait_for_timeout(next, LIMIT)).await.unwrap();
    assert_eq!((count(&one), count(&two)), (2, 2));
    assert!(one.lost().await.unwrap().is_empty() && two.lost().await.unwrap().is_empty());
    for db in [two, one] {
        db.shutdown().await;
    }
}

/// A replica that takes nothing holds up no demotion, and is served no more after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_takes_nothing_is_left_behind_at_a_demotion() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(primary(&dir.path().join("a.db"), 0)).await.unwrap();
    let wire = Wire::start(address(&url(&one)), Duration::ZERO).await;
    let two = Db::open(follower(&dir.path().join("b.db"), 0, &format!("http://{}", wire.address)));
    let two = two.await.unwrap();
    within("ready", two.ready()).await.unwrap();
    wire.throttle(1);
    let big = |tx: &mut Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(who, v) VALUES ('big', randomblob(8000000))", [])?)
    };
    one.write(big).await.unwrap();
    assert_eq!(one.status().replicas.len(), 1);
    within("the demotion", one.demote(&url(&two))).await.unwrap();
    assert_eq!(one.role(), Role::Replica);
    within("its stream ends", comes("its stream ends", || one.status().replicas.is_empty())).await;
    for db in [two, one] {
        db.shutdown().await;
    }
}

/// Two that lead at one time: the replica that meets the later one follows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_primaries_the_one_that_is_left_keeps_what_the_other_does_not_have() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(dir.path()).await;
    let shared = insert(&one, "shared", 0).await;
    within("it is there", two.wait_for_timeout(shared, LIMIT)).await.unwrap();
    within("against the order", two.promote()).await.unwrap();
    insert(&one, "one", 1).await;
    let kept = insert(&two, "two", 1).await;
    one.demote(&url(&two)).await.unwrap();
    within("it follows", one.wait_for_timeout(kept, LIMIT)).await.unwrap();
    assert_eq!((count(&one), count(&two)), (2, 2));
    assert_eq!(one.lost().await.unwrap().len(), 1);
    for db in [one, two] {
        db.shutdown().await;
    }
}

#[test]
#[ignore = "runs as the child of another test, on a disk of its own"]
#[cfg(target_os = "linux")]
fn nodes_on_a_small_disk() {
    if !is_child() {
        return;
    }
    let dir = PathBuf::from(variable("DIR"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let dbs = pair(&dir).await;
        let mut led = 0;
        for round in 0..4 {
            let txid = insert(&dbs[led], "before", round).await;
            within("it is there", dbs[1 - led].wait_for_timeout(txid, LIMIT)).await.unwrap();
            let ballast = fill(&dir);
            let last = within("the demotion", dbs[led].demote(&url(&dbs[1 - led]))).await.unwrap().unwrap();
            assert_eq!((last.txid(), dbs[led].role()), (txid, Role::Replica));
            let promoted = within("the promotion", dbs[1 - led].promote()).await;
            let role = if promoted.is_ok() { Role::Primary } else { Role::Replica };
            assert_eq!(dbs[1 - led].role(), role, "{promoted:?}");
            assert_eq!((count(&dbs[0]), count(&dbs[1])), (round + 1, round + 1));
            std::fs::remove_file(ballast).unwrap();
            if promoted.is_err() {
                within("with room", dbs[1 - led].promote()).await.unwrap();
            }
            led = 1 - led;
            speak(&format!("round {promoted:?}"));
        }
        let txid = insert(&dbs[led], "after", 9).await;
        within("it follows", dbs[1 - led].wait_for_timeout(txid, LIMIT)).await.unwrap();
        for db in &dbs {
            assert!(db.verify().await.unwrap().holds());
        }
        for db in dbs {
            db.shutdown().await;
        }
    });
    speak("survived");
}

/// A file that leaves no room for others.
#[cfg(target_os = "linux")]
fn fill(directory: &Path) -> PathBuf {
    use std::io::Write;

    let ballast = directory.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    let mut block = vec![1; 1 << 20];
    while !block.is_empty() {
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    file.sync_all().unwrap();
    ballast
}

#[test]
#[cfg(target_os = "linux")]
fn a_disk_that_is_full_holds_up_no_demotion_and_a_promotion_leads_or_leaves_a_replica() {
    let dir = tempfile::tempdir().unwrap();
    // A file system of memory, which only this process sees.
    let mut unshare = std::process::Command::new("unshare");
    unshare
        .args(["-rm", "sh", "-c", "mount -t tmpfs -o size=16m tmpfs \"$1\" && shift && exec \"$@\"", "sh"])
        .arg(dir.path())
        .arg(this_binary());
    let said =
        Process::start_by(unshare, nodes_on_a_small_disk, &[("DIR", dir.path().to_str().unwrap())]).success();
    assert_eq!(said.last().map(String::as_str), Some("survived"), "{said:?}");
}

/// A node that does what it hears.
#[test]
#[ignore = "runs as the child of another test"]
fn node_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let config = match variable("OF").as_str() {
        "" => primary(&path, port),
        of => follower(&path, port, of),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let db = runtime.block_on(async {
        let db = Db::open(config).await.unwrap();
        db.ready().await.unwrap();
        db
    });
    speak("open");
    loop {
        let line = hear();
        let mut words = line.split(' ');
        match (words.next().unwrap(), words.next()) {
            ("write", None) => {
                for writer in ["a", "b"] {
                    let db = db.clone();
                    std::thread::spawn(move || write(&db, writer));
                }
            }
            ("demote", Some(url)) => {
                let last = runtime.block_on(db.demote(url)).unwrap().unwrap();
                speak(&format!("demoted {last}"));
            }
            ("reach", Some(position)) => {
                let position: Position = position.parse().unwrap();
                runtime.block_on(db.wait_for_timeout(position.txid(), LIMIT)).unwrap();
                // A primary that was killed while it committed puts its WAL aside, as a copy, when it
                // starts: a commit in it was cut short.
                let lost = runtime.block_on(db.lost()).unwrap();
                let branches = lost.iter().filter(|lost| lost.kind != LostKind::Wal).count();
                speak(&format!("reached {branches}"));
            }
            ("promote", None) => {
                runtime.block_on(db.promote()).unwrap();
                speak("promoted");
            }
            ("where", None) => {
                let last = runtime.block_on(async {
                    let write = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute(INSERT, ("last", 1))?);
                    db.write(write).await.unwrap().txid.unwrap()
                });
                runtime.block_on(db.wait_for(last)).unwrap();
                speak(&format!("at {}", db.position().unwrap()));
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Writes until the node leads no more.
fn write(db: &Db, writer: &'static str) {
    let sql = "SELECT coalesce(max(n), 0) FROM t WHERE who = ?1";
    let last = db.read(|c| Ok::<i64, Error>(c.query_row(sql, [writer], |r| r.get(0))?)).unwrap();
    for n in last + 1.. {
        let write = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute(INSERT, (writer, n))?);
        match db.write_blocking(write) {
            Ok(_) => speak(&format!("ack {writer} {n}")),
            Err(Error::NotPrimary { .. }) => return,
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// Two homes, of which one leads.
struct Homes {
    paths: [PathBuf; 2],
    ports: [u16; 2],
    led: usize,
    acknowledged: BTreeMap<String, i64>,
}

impl Homes {
    fn url(&self, node: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[node])
    }

    /// Starts both, the one that leads first.
    fn start(&self) -> [Process; 2] {
        let start = |node: usize, of: &str| {
            let port = self.ports[node].to_string();
            let variables = [("DB", self.paths[node].to_str().unwrap()), ("PORT", &port), ("OF", of)];
            let process = Process::start(node_process, &variables);
            process.expect("open");
            process
        };
        let led = start(self.led, "");
        let followed = start(1 - self.led, &self.url(self.led));
        [led, followed]
    }

    /// What a process acknowledged before it was killed.
    fn heard(&mut self, lines: &[String]) {
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            if words[0] == "ack" {
                let last = self.acknowledged.entry(words[1].into()).or_default();
                *last = words[2].parse::<i64>().unwrap().max(*last);
            }
        }
    }

    /// Both have all that was acknowledged, and are the same; neither had anything that the other
    /// lacks.
    fn compare(&self, [led, followed]: &mut [Process; 2], when: &str) {
        led.say("where");
        let at = led.expect("at");
        followed.say(&format!("reach {}", at.split(' ').nth(1).unwrap()));
        assert_eq!(followed.expect("reached"), "reached 0", "{when}: nothing was put aside");
        for path in &self.paths {
            let connection = plain(path);
            for (who, last) in &self.acknowledged {
                let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = ?1";
                let (rows, most): (i64, i64) =
                    connection.query_row(sql, [who], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
                assert!(most >= *last, "{when}: {who} had {last} acknowledged, and {most} are there");
                assert_eq!(rows, most, "{when}: a hole in what {who} wrote, or something twice");
            }
        }
        assert_same_pages(&self.paths[0], &self.paths[1]);
    }
}

#[test]
fn a_node_that_is_killed_within_a_change_of_roles_loses_nothing_that_was_acknowledged() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (rounds, seed) = (number("REPLITE_ROUNDS", 30), number("REPLITE_SEED", 1));
    eprintln!("REPLITE_ROUNDS={rounds} REPLITE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a.db", "b.db"].map(|name| dir.path().join(name));
    let mut homes = Homes { paths, ports: [own_port(), own_port()], led: 0, acknowledged: BTreeMap::new() };
    let (mut before, mut within) = ([0; 2], [0; 2]);
    for round in 0..rounds {
        let mut processes = homes.start();
        homes.compare(&mut processes, &format!("round {round}"));
        let [mut led, mut followed] = processes;
        led.say("write");
        let first = led.expect("ack");
        homes.heard(&[first]);
        // From a microsecond to 65 ms, each doubling as likely as the next: on every machine some kills
        // come within the change.
        let pause = Duration::from_micros(2_f64.powf(rng.random_range(0.0..16.0)) as u64);
        let in_promotion = rng.random();
        led.say(&format!("demote {}", homes.url(1 - homes.led)));
        let said = if in_promotion {
            let mut lines = Vec::new();
            let last = loop {
                let line = led.next_line().unwrap();
                if let Some(last) = line.strip_prefix("demoted ") {
                    break last.to_string();
                }
                lines.push(line);
            };
            homes.heard(&lines);
            followed.say(&format!("reach {last}"));
            followed.expect("reached");
            followed.say("promote");
            std::thread::park_timeout(pause);
            let said = followed.kill();
            homes.heard(&led.kill());
            homes.led = 1 - homes.led;
            said.iter().any(|line| line == "promoted")
        } else {
            std::thread::park_timeout(pause);
            let lines = led.kill();
            followed.kill();
            homes.heard(&lines);
            lines.iter().any(|line| line.starts_with("demoted"))
        };
        let counted = if said { &mut before } else { &mut within };
        counted[usize::from(in_promotion)] += 1;
    }
    homes.compare(&mut homes.start(), "at the end");
    eprintln!("killed within a change: {within:?}, after it: {before:?} (demotions, promotions)");
    assert!(rounds < 20 || within.iter().all(|killed| *killed > 0), "{within:?}");
}
