//! A disk that is full at any write, for a while: no commit is lost, none fails for the log's sake, and all is well again
//! when there is room.
//!
//! `REPLITE_ROUNDS` says how many writes fail, one run each; they are spread evenly over all.
#![cfg(target_os = "linux")]

#[path = "../../support/lib.rs"]
mod support;

use std::path::{Path, PathBuf};

use replite::rusqlite::ErrorCode;
use replite::{Config, Db, Error};
use replite_power::cuts::number;
use replite_power::model::{self, Said, say};
use replite_power::stage::Stage;
use replite_power::trace::{self, Change};
use support::*;

/// Writes that fail in a run of continuous integration, of each kind of node.
const ROUNDS: u64 = 40;
/// So many of the calls that need room fail, in turn. A replica tries again later and later.
const PRIMARY_LENGTHS: [u64; 3] = [1, 4, 40];
const REPLICA_LENGTHS: [u64; 3] = [1, 2, 4];
/// Transactions of one run.
const TRANSACTIONS: u64 = 120;

fn writing(path: &Path, port: u16) -> Config {
    primary(path, port).wal_limit(64 * 1024).migrate(model::migrate)
}

/// Starts a child that is recorded, and for which there is no room at times.
fn start(stage: &Stage, entry: impl Fn(), variables: &[(&str, &str)]) -> Process {
    let recorded = stage.variables();
    let recorded = recorded.iter().map(|(name, value)| (*name, value.as_str()));
    let all: Vec<_> = recorded.chain(variables.iter().copied()).collect();
    Process::start(entry, &all)
}

fn retry<T>(what: &str, mut go: impl FnMut() -> Result<T, Error>, may: fn(&Error) -> bool) -> T {
    let mut done = None;
    until(what, || {
        match go() {
            Ok(value) => done = Some(value),
            Err(error) => assert!(may(&error), "{what}: {error:?}"),
        }
        done.is_some()
    });
    done.unwrap()
}

/// What a full disk is to an application: SQLite's own word, or the operating system's.
fn no_room(error: &Error) -> bool {
    match error {
        Error::Sqlite(e) => {
            matches!(
                e.sqlite_error_code(),
                Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure | ErrorCode::CannotOpen)
            )
        }
        Error::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
        Error::Unsupported { .. } | Error::Migration(_) | Error::Stopped(_) => {
            let text = format!("{error:?}");
            ["No space", "database or disk is full", "disk I/O error"].iter().any(|what| text.contains(what))
        }
        _ => false,
    }
}

/// A commit fails only because SQLite found no room for it.
fn sqlite_had_none(error: &Error) -> bool {
    matches!(error, Error::Sqlite(e) if matches!(e.sqlite_error_code(), Some(ErrorCode::DiskFull | ErrorCode::SystemIoFailure)))
}

/// A file system that needs room to write over what is there may have none just when the WAL is begun anew. Then the node
/// stands still, loudly, until it is opened again.
fn stands_still(problem: &str) -> bool {
    problem.contains("the WAL could not be begun anew") && problem.contains("No space")
}

#[test]
#[ignore = "runs as the child of another test"]
fn writing_process() {
    if !is_child() {
        return;
    }
    let path = PathBuf::from(variable("DB"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let open = || retry("open", || runtime.block_on(Db::open(writing(&path, 0))), no_room);
    let mut db = open();
    let mut last = 0;
    while last < TRANSACTIONS {
        match db.write_blocking(|tx| Ok::<_, Error>(model::write(tx, "a")?)) {
            Ok(done) => {
                last = done.value;
                say(&format!("ack {last}"));
            }
            Err(error) if stands_still(&error.to_string()) => {
                runtime.block_on(db.shutdown());
                db = open();
                // The last one may have been committed before it could be acknowledged.
                let sql = "SELECT seq FROM head";
                last = db.read(|c| Ok::<_, Error>(c.query_row(sql, [], |r| r.get(0))?)).unwrap();
            }
            Err(error) => assert!(sqlite_had_none(&error), "a commit: {error:?}"),
        }
    }
    let position = retry("the position", || db.writer()?.flush(), no_room);
    assert_eq!(position, None, "nothing was committed through the guard");
    // It finds out within a second that there is room again.
    until("room", || db.health().can_write);
    speak(&format!("rest {} {}", db.position().unwrap(), db.health().can_write));
    runtime.block_on(db.shutdown());
    speak("closed");
    hear();
}

/// Calls of a run that need room, as the recorder counts them.
fn calls(changes: &[Change]) -> u64 {
    let needs = |c: &&Change| {
        matches!(
            c,
            Change::Create { .. } | Change::Write { .. } | Change::Rename { .. } | Change::Mkdir { .. }
        )
    };
    changes.iter().filter(needs).count() as u64
}

fn spread(total: u64) -> Vec<u64> {
    let rounds = number("REPLITE_ROUNDS", ROUNDS).min(total);
    (0..rounds).map(|round| 1 + round * total / rounds).collect()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// One life of a primary. Returns the calls that needed room.
fn primary_life(full: &str) -> u64 {
    let stage = Stage::new("full-primary");
    let path = stage.watched().join("p.db");
    let process = start(&stage, writing_process, &[("DB", path.to_str().unwrap()), ("POWER_FULL", full)]);
    let rest = process.expect("rest");
    process.expect("closed");
    process.kill();
    let changes = trace::read(&stage.trace(), &stage.watched());
    let said = Said::read(&changes);
    let words: Vec<&str> = rest.split(' ').collect();
    assert_eq!(words[2], "true", "full at {full}: it can't write again");
    let position: replite::Position = words[1].parse().unwrap();
    let (_, sum) = model::pages(&path).unwrap();
    assert_eq!(sum, position.checksum().as_u128(), "full at {full}");
    assert_eq!(said.check(&plain(&path), changes.len()).unwrap(), TRANSACTIONS, "full at {full}");
    model::stock(&path).unwrap();
    runtime().block_on(async {
        let db = Db::open(primary(&path, 0)).await.unwrap();
        assert_eq!(db.position(), Some(position), "full at {full}: opened again");
        db.shutdown().await;
    });
    calls(&changes)
}

#[test]
fn a_primary_without_room_at_any_write_loses_nothing_and_goes_on() {
    let total = primary_life("0:0");
    let places = spread(total);
    for (from, length) in places.iter().zip(PRIMARY_LENGTHS.iter().cycle()) {
        primary_life(&format!("{from}:{length}"));
    }
    println!("{} of {total} writes of a primary found no room", places.len());
}

#[test]
#[ignore = "runs as the child of another test"]
fn following_process() {
    if !is_child() {
        return;
    }
    let path = PathBuf::from(variable("DB"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let config = || replica(&path, &variable("URL")).wal_limit(64 * 1024);
    let mut db = retry("open", || runtime.block_on(Db::open(config())), no_room);
    let goal: replite::Position = hear().parse().unwrap();
    until("the goal", || {
        if db.status().problem.is_some_and(|problem| stands_still(&problem)) {
            runtime.block_on(db.shutdown());
            db = retry("open", || runtime.block_on(Db::open(config())), no_room);
        }
        db.position() == Some(goal)
    });
    runtime.block_on(db.shutdown());
    speak("closed");
    hear();
}

/// One life of a replica: a snapshot, and what its primary commits meanwhile and then.
fn replica_life(full: &str, url: &str, primary: &Db) -> u64 {
    let stage = Stage::new("full-replica");
    let path = stage.watched().join("r.db");
    let variables = [("DB", path.to_str().unwrap()), ("URL", url), ("POWER_FULL", full)];
    let mut process = start(&stage, following_process, &variables);
    // Before that it is the one page of an empty database.
    let there = || std::fs::metadata(&path).is_ok_and(|meta| meta.len() > 4096);
    until("the snapshot", there);
    for _ in 0..TRANSACTIONS / 2 {
        primary.write_blocking(|tx| Ok::<_, Error>(model::write(tx, "a")?)).unwrap();
    }
    primary.writer().unwrap().flush().unwrap();
    let goal = runtime().block_on(async {
        let txid = primary.write(|tx| Ok::<_, Error>(model::write(tx, "a")?)).await.unwrap().txid.unwrap();
        primary.wait_for(txid).await.unwrap();
        primary.position().unwrap()
    });
    process.say(&goal.to_string());
    process.expect("closed");
    process.kill();
    model::stock(&path).unwrap();
    let (pages, sum) = model::pages(&path).unwrap();
    assert_eq!(sum, goal.checksum().as_u128(), "full at {full}");
    assert_eq!(pages, model::pages(primary.path()).unwrap().0, "full at {full}");
    let calls = calls(&trace::read(&stage.trace(), &stage.watched()));
    runtime().block_on(async {
        let db = Db::open(replica(&path, "http://127.0.0.1:1")).await.unwrap();
        // Where the last calls of its life found no room, nothing on its disk may say any more which
        // state this is. Then it says none before its primary does.
        let said = db.position();
        assert!(said == Some(goal) || said.is_none() && to_the_end(full, calls), "full at {full}: {said:?}");
        db.shutdown().await;
        let db = Db::open(replica(&path, url)).await.unwrap();
        within("the primary's word", db.wait_for(goal.txid())).await.unwrap();
        assert_eq!(db.position(), Some(goal), "full at {full}: opened again");
        db.shutdown().await;
    });
    calls
}

/// Whether the calls that found no room are among the last ones of a life, which are those of its
/// close. Calls that failed are not among those that are counted.
fn to_the_end(full: &str, calls: u64) -> bool {
    const OF_THE_CLOSE: u64 = 16;
    let (from, _) = full.split_once(':').unwrap();
    from.parse::<u64>().unwrap() + OF_THE_CLOSE > calls
}

#[test]
fn a_replica_without_room_at_any_write_comes_to_the_state_of_its_primary() {
    let dir = tempfile::tempdir().unwrap();
    let above = runtime();
    let primary = above.block_on(Db::open(writing(&dir.path().join("p.db"), 0))).unwrap();
    for _ in 0..30 {
        primary.write_blocking(|tx| Ok::<_, Error>(model::write(tx, "a")?)).unwrap();
    }
    let url = primary.node().addresses.replication.clone();
    let total = replica_life("0:0", &url, &primary);
    let places = spread(total);
    for (from, length) in places.iter().zip(REPLICA_LENGTHS.iter().cycle()) {
        replica_life(&format!("{from}:{length}"), &url, &primary);
    }
    println!("{} of {total} writes of a replica found no room", places.len());
    above.block_on(primary.shutdown());
}
