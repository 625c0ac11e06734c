//! `kill -9`, again and again: of a primary beside strangers that write and copy its WAL back, and
//! of a replica in whatever it does.
//!
//! `REPLITE_ROUNDS` sets how many rounds there are (200 and 100 if not set, for primary and
//! replica), `REPLITE_SEED` what happens in them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Lost, Position};

use crate::support::*;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Everything is begun anew and dropped all the time. The log, in segments of a megabyte, still
/// reaches behind the WAL: what is lost with a WAL is made good from it only as far as it reaches.
fn restless(config: Config) -> Config {
    config.wal_limit(64 * 1024).log_retention(4 << 20, Duration::from_secs(3600)).log_quota(6 << 20)
}

fn total(connection: &Connection) -> i64 {
    connection.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

#[test]
#[ignore = "runs as the child of another test"]
fn primary_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = match runtime.block_on(Db::open(restless(primary(&path, port)))) {
        Err(Error::Damaged { .. }) => {
            speak("damaged");
            return;
        }
        opened => opened.unwrap(),
    };
    let rows = db.read(|c| Ok::<_, Error>(total(c))).unwrap();
    // Whether this state is the first of the epoch that begins now, because nobody knew it by name.
    let position = db.position().unwrap();
    speak(&format!("open {position} {rows} {}", position.epoch() == db.status().epoch));
    let verified = runtime.block_on(db.verify()).unwrap();
    speak(&format!("verified {}", verified.holds()));
    assert_eq!(hear(), "write");
    std::thread::scope(|scope| {
        for writer in ["a", "b"] {
            let db = &db;
            scope.spawn(move || {
                let sql = "SELECT coalesce(max(n), 0) FROM t WHERE who = ?1";
                let last = db.read(|c| Ok::<i64, Error>(c.query_row(sql, [writer], |r| r.get(0))?)).unwrap();
                for n in last + 1.. {
                    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
                        let sql = "INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(?3))";
                        // Few of them are long, for all of it is read in each round.
                        let bytes = if n % 40 == 0 { 20_000 } else { n % 200 };
                        Ok::<_, Error>(tx.execute(sql, (writer, n, bytes))?)
                    };
                    db.write_blocking(write).unwrap();
                    speak(&format!("ack {writer} {n}"));
                }
            });
        }
    });
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// An administrator's mistake, and its cure: the WAL is in the bin, not gone.
fn bin_wal(path: &Path) {
    std::fs::rename(beside(path, "-wal"), beside(path, "-bin")).unwrap();
    let _ = std::fs::remove_file(beside(path, "-shm"));
}

fn take_wal_out_of_the_bin(path: &Path) {
    std::fs::rename(beside(path, "-bin"), beside(path, "-wal")).unwrap();
    let _ = std::fs::remove_file(beside(path, "-shm"));
}

fn written_by(connection: &Connection, who: &str) -> (i64, i64) {
    let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = ?1";
    connection.query_row(sql, [who], |r| Ok((r.get(0)?, r.get(1)?))).unwrap()
}

fn assert_all_there(connection: &Connection, acknowledged: &BTreeMap<String, i64>, when: &str) {
    for (who, last) in acknowledged {
        let (rows, most) = written_by(connection, who);
        assert!(most >= *last, "{when}: {who} had {last} acknowledged, and {most} are there");
        assert_eq!(rows, most, "{when}: a hole in what {who} wrote");
    }
}

/// Whether the newest anchor says that frames were being copied into the file: only then may a file
/// without them be damaged. Read from the two slots as they are, without what the node makes of
/// them.
fn copying(path: &Path) -> bool {
    let anchors = std::fs::read(path.with_extension("db-replite").join("anchors")).unwrap();
    let slots = [0, 4096].into_iter().filter_map(|at| anchors.get(at..at + 256));
    let newest = slots.max_by_key(|slot| u64::from_le_bytes(slot[16..24].try_into().unwrap())).unwrap();
    newest[92] != 0
}

fn salts(path: &Path) -> [u8; 8] {
    let wal = std::fs::read(beside(path, "-wal")).unwrap_or_default();
    wal.get(16..24).map_or([0; 8], |salts| salts.try_into().unwrap())
}

/// What strangers do with a node's file: each commit is one transaction.
struct Stranger {
    wrote: i64,
}

impl Stranger {
    fn write(&mut self, connection: &Connection) {
        self.wrote += 1;
        connection.execute("INSERT INTO t(who, n) VALUES ('stranger', ?1)", [self.wrote]).unwrap();
    }

    fn checkpoint(connection: &Connection, rng: &mut StdRng) {
        let mode = ["PASSIVE", "FULL", "RESTART", "TRUNCATE"][rng.random_range(0..4)];
        let sql = format!("PRAGMA wal_checkpoint({mode})");
        // Busy, as long as a node holds the checkpoint lock.
        let _busy: i64 = connection.query_row(&sql, [], |r| r.get(0)).unwrap();
    }

    /// With the stock shell, which copies the WAL back and deletes it when it is the last to close.
    fn shell(&mut self, path: &Path) {
        self.wrote += 1;
        let sql = format!(
            "PRAGMA busy_timeout = 20000; INSERT INTO t(who, n) VALUES ('stranger', {});",
            self.wrote
        );
        let done = std::process::Command::new("sqlite3").arg(path).arg(sql).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }
}

/// How often something happened.
#[derive(Default, Debug)]
struct Figures {
    copying: u64,
    copied_by_others: u64,
    /// Of these, both.
    copied_on: u64,
    wal_taken_away: u64,
    wal_put_back: u64,
}

/// A primary that is killed, and what must be true of it.
struct Victim {
    path: PathBuf,
    port: u16,
    rng: StdRng,
    round: u64,
    acknowledged: BTreeMap<String, i64>,
    /// As much as the node certainly has in its log.
    captured: BTreeMap<String, i64>,
    stranger: Stranger,
    /// Transactions that are no row: the number of a position less the rows.
    others: Option<i64>,
    /// Killed while it copied frames into the file.
    copying: bool,
    /// Somebody else copied all of the WAL back, and it was dropped or begun anew.
    copied_by_others: bool,
    /// Somebody else copied frames into the file, which stayed in the WAL: the old images of their
    /// pages are gone.
    copied: bool,
    /// The salts of the WAL in which there are frames of a state that became history as a whole:
    /// the log begins with that state, and has nothing to make them good from.
    unlogged: Option<[u8; 8]>,
    without_wal: bool,
    figures: Figures,
}

impl Victim {
    fn start(&self) -> (Process, String) {
        let variables = [("DB", self.path.to_str().unwrap()), ("PORT", &self.port.to_string())];
        let process = Process::start(primary_process, &variables);
        let first = process.next_line().unwrap();
        (process, first)
    }

    /// Opens the node, and looks whether its position and its rows are right.
    fn open(&mut self) -> (Process, Position) {
        let (mut process, mut open) = self.start();
        if open == "damaged" && self.without_wal {
            // Killed while the WAL was copied back: the log has not what the file lacks. The WAL
            // has.
            process.kill();
            take_wal_out_of_the_bin(&self.path);
            self.without_wal = false;
            self.figures.wal_put_back += 1;
            assert!(self.copying, "round {}: nothing was being copied, and it is damaged", self.round);
            (process, open) = self.start();
        }
        let round = self.round;
        assert_ne!(
            open, "damaged",
            "round {round}: no WAL was taken away; copied by others: {}",
            self.copied_by_others
        );
        let mut words = open.split(' ').skip(1);
        let position: Position = words.next().unwrap().parse().unwrap();
        let rows: i64 = words.next().unwrap().parse().unwrap();
        let found = position.number() as i64 - rows;
        if words.next().unwrap() == "true" {
            self.unlogged = Some(salts(&self.path));
        }
        match self.others.filter(|_| !self.copied_by_others && !self.copied) {
            Some(others) => assert_eq!(found, others, "round {round}: {position} with {rows} rows"),
            // What the log does not have and somebody else copied is one transaction, however many
            // it was.
            None => self.others = Some(found),
        }
        assert_eq!(process.expect("verified"), "verified true", "round {round}");
        // Commits that were not in the log yet were nowhere but in the WAL.
        let there = if self.without_wal { &self.captured } else { &self.acknowledged };
        let connection = plain(&self.path);
        assert_all_there(&connection, there, &format!("round {round}, {open}, no WAL: {}", self.without_wal));
        for (who, last) in &mut self.acknowledged {
            *last = written_by(&connection, who).1;
        }
        self.stranger.wrote = self.acknowledged.get("stranger").copied().unwrap_or(0);
        self.captured = self.acknowledged.clone();
        (process, position)
    }

    /// Has the node write beside strangers, and kills it.
    fn kill(&mut self, mut process: Process) {
        process.say("write");
        if self.rng.random_range(0..3) > 0 {
            let connection = plain(&self.path);
            for _ in 0..self.rng.random_range(0..6) {
                match self.rng.random_range(0..12) {
                    0 => self.stranger.shell(&self.path),
                    1..6 => self.stranger.write(&connection),
                    _ => Stranger::checkpoint(&connection, &mut self.rng),
                }
            }
        }
        std::thread::park_timeout(Duration::from_micros(self.rng.random_range(0..40_000)));
        for line in process.kill() {
            let words: Vec<&str> = line.split(' ').collect();
            if words[0] == "ack" {
                self.acknowledged.insert(words[1].into(), words[2].parse().unwrap());
            }
        }
    }

    /// What happens to the file of a dead node.
    fn meddle(&mut self) {
        (self.copied_by_others, self.copied, self.without_wal) = (false, false, false);
        self.copying = copying(&self.path);
        match self.rng.random_range(0..12) {
            0 | 1 => {
                self.stranger.shell(&self.path);
                self.copied_by_others = true;
            }
            2 | 3 => self.stranger.write(&plain(&self.path)),
            4 => {
                self.copied = true;
                Stranger::checkpoint(&plain(&self.path), &mut self.rng);
            }
            5 => {
                // The next writer begins the WAL anew.
                let connection = plain(&self.path);
                Stranger::checkpoint(&connection, &mut self.rng);
                self.stranger.write(&connection);
                self.copied_by_others = true;
            }
            _ => {}
        }
        // One that TRUNCATE left.
        self.copied_by_others |=
            std::fs::metadata(beside(&self.path, "-wal")).is_ok_and(|wal| wal.len() == 0);
        self.figures.copying += u64::from(self.copying);
        self.figures.copied_by_others += u64::from(self.copied_by_others);
        self.figures.copied_on += u64::from(self.copying && self.copied_by_others);
        self.acknowledged.insert("stranger".into(), self.stranger.wrote);
        {
            let connection = plain(&self.path);
            assert_all_there(&connection, &self.acknowledged, &format!("round {}, killed", self.round));
            if self.round.is_multiple_of(10) {
                let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
                assert_eq!(ok, "ok", "round {}", self.round);
            }
        }
        let logged = self.unlogged.is_none_or(|then| then != salts(&self.path));
        if logged && !self.copied && !self.copied_by_others && self.rng.random_range(0..8) == 0 {
            bin_wal(&self.path);
            self.without_wal = true;
            self.figures.wal_taken_away += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_is_killed_again_and_again_keeps_every_acknowledged_row_and_its_position() {
    let (rounds, seed) = (number("REPLITE_ROUNDS", 200), number("REPLITE_SEED", 1));
    eprintln!("REPLITE_ROUNDS={rounds} REPLITE_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
    let follow = || Db::open(restless(replica(&r, &format!("http://127.0.0.1:{port}"))));
    let mut follower = follow().await.unwrap();
    let mut victim = Victim {
        path: p.clone(),
        port,
        rng: StdRng::seed_from_u64(seed),
        round: 0,
        acknowledged: BTreeMap::new(),
        captured: BTreeMap::new(),
        stranger: Stranger { wrote: 0 },
        others: None,
        copying: false,
        copied_by_others: false,
        copied: false,
        unlogged: None,
        without_wal: false,
        figures: Figures::default(),
    };
    for round in 0..rounds {
        victim.round = round;
        let (process, position) = victim.open();
        // What a replica has heard of was in the log, WAL or not.
        let heard = follower.position().map_or(0, Position::number);
        assert!(heard <= position.number(), "round {round}: a replica is at {heard}, we at {position}");
        if round % 16 == 15 {
            // Opened anew, for it pauses between heals that follow each other closely.
            follower.shutdown().await;
            follower = follow().await.unwrap();
            within("the replica", follower.wait_for_timeout(position.txid(), LIMIT)).await.unwrap();
            assert_eq!(follower.position(), Some(position), "round {round}");
            assert_same_pages(&p, &r);
        }
        victim.kill(process);
        victim.meddle();
    }
    let (process, _) = victim.open();
    process.kill();
    let figures = &victim.figures;
    eprintln!("{rounds} kills, {} rows, {figures:?}", total(&plain(&p)));
    // Few rounds need not have all of it.
    assert!(rounds < 100 || figures.copied_by_others.min(figures.wal_taken_away) > 0, "{figures:?}");
    let db = Db::open(restless(primary(&p, port))).await.unwrap();
    let last = insert(&db, "last", 0).await;
    follower.shutdown().await;
    follower = follow().await.unwrap();
    within("the replica", follower.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(follower.verify().await.unwrap().holds());
    db.shutdown().await;
    follower.shutdown().await;
}

#[test]
#[ignore = "runs as the child of another test"]
fn replica_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(restless(replica(&PathBuf::from(variable("DB")), &variable("URL")))).await.unwrap();
        speak("open");
        let state: Position = tokio::task::spawn_blocking(hear).await.unwrap().parse().unwrap();
        within("the state", db.wait_for_timeout(state.txid(), LIMIT)).await.unwrap();
        speak(&format!("at {}", db.position().unwrap()));
        std::future::pending::<()>().await;
    });
}

/// What a stranger writes on a replica.
fn stray(connection: &Connection, number: u64) {
    let mark = format!("stray-{number}-");
    connection.execute("INSERT INTO t(who, v) VALUES ('stranger', ?1)", [mark]).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_again_and_again_is_always_a_state_of_the_primary() {
    let (rounds, seed) = (number("REPLITE_ROUNDS", 200).div_ceil(2), number("REPLITE_SEED", 2));
    eprintln!("REPLITE_ROUNDS={} REPLITE_SEED={seed}", rounds * 2);
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(restless(primary(&p, 0))).await.unwrap();
    let url = db.node().addresses.replication.clone();
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
    // Held while both sides are compared.
    let quiet = Arc::new(tokio::sync::Mutex::new(None));
    let writer = {
        let (db, stop, written, quiet) = (db.clone(), stop.clone(), written.clone(), quiet.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let mut last = quiet.lock().await;
                *last = Some(insert(&db, "w", written.load(Ordering::SeqCst) + 1).await);
                written.fetch_add(1, Ordering::SeqCst);
                if written.load(Ordering::SeqCst) % 64 == 0 {
                    // The primary goes on for as long as the rounds do.
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        })
    };
    let (mut strays, mut looks) = (0, 0);
    for round in 0..rounds {
        let mut process = Process::start(replica_process, &[("DB", r.to_str().unwrap()), ("URL", &url)]);
        process.expect("open");
        std::thread::park_timeout(Duration::from_micros(rng.random_range(0..80_000)));
        if round % 16 == 15 {
            let last = quiet.lock().await;
            // What is acknowledged may not be captured yet.
            let last = last.unwrap_or(db.position().unwrap().txid());
            within("the last commit", db.wait_for_timeout(last, LIMIT)).await.unwrap();
            let state = db.position().unwrap();
            process.say(&state.to_string());
            assert_eq!(process.expect("at"), format!("at {state}"), "round {round}");
            process.kill();
            assert_same_pages(&p, &r);
        } else {
            process.kill();
        }
        let connection = plain(&r);
        if !connection.table_exists(None, "t").unwrap() {
            continue;
        }
        let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
        assert_eq!(ok, "ok", "round {round}");
        let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = 'w'";
        let (rows, most): (i64, i64) = connection.query_row(sql, [], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
        assert!(
            rows == most && most <= written.load(Ordering::SeqCst) + 1,
            "round {round}: {rows} up to {most}"
        );
        looks += 1;
        match rng.random_range(0..10) {
            0 | 1 => {
                strays += 1;
                stray(&connection, strays);
            }
            2 if round % 4 == 0 => {
                // Its disk is exchanged; what was kept there goes with it.
                drop(connection);
                strays = 0;
                for entry in std::fs::read_dir(dir.path()).unwrap() {
                    let path = entry.unwrap().path();
                    if !path.file_name().unwrap().to_string_lossy().starts_with("r.db") {
                        continue;
                    }
                    if path.is_dir() {
                        std::fs::remove_dir_all(path).unwrap();
                    } else {
                        std::fs::remove_file(path).unwrap();
                    }
                }
            }
            _ => {}
        }
    }
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    assert!(rounds < 10 || looks * 2 > rounds, "only {looks} of {rounds} kills left a state");
    // One at least, whatever became of the others.
    let filled = Db::open(restless(replica(&r, &url))).await.unwrap();
    within("a state", filled.ready()).await.unwrap();
    filled.shutdown().await;
    drop(filled);
    strays += 1;
    stray(&plain(&r), strays);
    let replica = Db::open(restless(replica(&r, &url))).await.unwrap();
    let last = insert(&db, "last", 0).await;
    within("the replica", replica.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(replica.verify().await.unwrap().holds());
    let mut kept = Vec::new();
    for branch in replica.lost().await.unwrap().iter().filter_map(Lost::branch) {
        branch
            .visit_pages(|_, page| {
                kept.extend_from_slice(page);
                Ok(())
            })
            .unwrap();
    }
    for n in 1..=strays {
        let mark = format!("stray-{n}-");
        assert!(kept.windows(mark.len()).any(|w| w == mark.as_bytes()), "{mark} of {strays} is nowhere");
    }
    eprintln!("{rounds} kills, {} rows, {strays} strays", total(&plain(&p)));
    replica.shutdown().await;
    db.shutdown().await;
}
