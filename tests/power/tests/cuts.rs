//! The power goes at any moment: what was synced is there, of the rest any sectors. Both kinds of nodes find their exact
//! state again, with all that was acknowledged.
//!
//! `REPLITE_ROUNDS` says how many states are tried in each test, `REPLITE_SEED` which.
#![cfg(target_os = "linux")]

#[path = "../../support/lib.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use replite::rusqlite::{self, TransactionBehavior};
use replite::{Config, Db, Durability, Error, Event, Lost, Role};
use replite_power::cuts::{Cut, choose, make, number, run, stopped, syncs};
use replite_power::disk::{Disk, Names};
use replite_power::model::{self, Said, say};
use replite_power::stage::Stage;
use replite_power::trace::{self, Change};
use support::*;

/// States that a run of continuous integration tries in each test.
const ROUNDS: u64 = 500;
/// One second life for so many states, and so many states of that.
const SECOND_EVERY: u64 = 25;
const SECOND_STATES: usize = 20;

/// Starts a child that is recorded.
fn start(stage: &Stage, entry: impl Fn(), variables: &[(&str, &str)]) -> Process {
    let recorded = stage.variables();
    let recorded = recorded.iter().map(|(name, value)| (*name, value.as_str()));
    let all: Vec<_> = recorded.chain(variables.iter().copied()).collect();
    Process::start(entry, &all)
}

fn kill(stage: &Stage, process: Process) {
    stage.between(|| drop(process.kill()));
}

fn small(config: Config) -> Config {
    config.wal_limit(128 * 1024).log_retention(2 << 20, Duration::from_secs(3600))
}

fn writing(path: &Path, port: u16) -> Config {
    let durability = match std::env::var_os("UNSYNCED") {
        Some(_) => Durability::Unsynced,
        None => Durability::Synced,
    };
    small(primary(path, port)).migrate(model::migrate).durability(durability)
}

fn seq(db: &Db) -> u64 {
    db.read(|c| Ok::<_, Error>(c.query_row("SELECT seq FROM head", [], |r| r.get(0))?)).unwrap()
}

/// Says the positions of all transactions that the log has and that were not said yet.
fn say_positions(runtime: &tokio::runtime::Runtime, db: &Db, said: &mut u64) {
    for transaction in runtime.block_on(db.transactions(None, usize::MAX)).unwrap() {
        if transaction.position.number() > *said {
            say(&format!("position {}", transaction.position));
            *said = transaction.position.number();
        }
    }
}

/// A primary with two writers and a reader that stays for a while, in a process of its own.
#[test]
#[ignore = "runs as the child of another test"]
fn writing_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(Db::open(writing(&path, port))).unwrap();
    // So many more, or up to there.
    let more = std::env::var("MORE").ok().map(|more| seq(&db) + more.parse::<u64>().unwrap());
    let target = more.unwrap_or_else(|| variable("TARGET").parse().unwrap());
    let position = db.position().unwrap();
    say(&format!("position {position}"));
    say(&format!("base {}", position.number() - seq(&db)));
    speak("open");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for who in ["a", "b"] {
            let (db, stop) = (&db, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let done = db.write_blocking(|tx| Ok::<_, Error>(model::write(tx, who)?)).unwrap();
                    say(&format!("ack {}", done.value));
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                db.read(|c| {
                    let tx = c.unchecked_transaction()?;
                    let here: u64 = tx.query_row("SELECT seq FROM head", [], |r| r.get(0))?;
                    until("others commit", || stop.load(Ordering::SeqCst) || seq(&db) > here + 5);
                    Ok::<_, Error>(())
                })
                .unwrap();
                let here = seq(&db);
                until("others commit", || stop.load(Ordering::SeqCst) || seq(&db) > here + 30);
            }
        });
        if std::env::var_os("SYNCED").is_some() {
            scope.spawn(|| {
                let mut last = 0;
                until_stopped(&stop, || {
                    for replica in db.status().replicas {
                        if let Some(position) = replica.synced.filter(|p| p.number() > last) {
                            last = position.number();
                            say(&format!("synced {last}"));
                        }
                    }
                });
            });
        }
        let _ends = Ends(&stop);
        let mut said = 0;
        until("the target", || {
            say_positions(&runtime, &db, &mut said);
            // One of its own epoch among them.
            seq(&db) >= target && db.position().is_some_and(|p| p.epoch() == db.status().epoch)
        });
        say_positions(&runtime, &db, &mut said);
        speak("target");
        assert_eq!(hear(), "stop");
    });
    runtime.block_on(db.shutdown());
    speak("closed");
    hear();
}

fn until_stopped(stop: &AtomicBool, mut each: impl FnMut()) {
    while !stop.load(Ordering::SeqCst) {
        each();
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A process that writes through plain SQLite, and syncs each of its commits unless the primary does not either.
#[test]
#[ignore = "runs as the child of another test"]
fn shell_process() {
    if !is_child() {
        return;
    }
    let mut conn = plain(&PathBuf::from(variable("DB")));
    let synchronous = if std::env::var_os("UNSYNCED").is_some() { "NORMAL" } else { "FULL" };
    conn.execute_batch(&format!("PRAGMA synchronous = {synchronous}")).unwrap();
    if std::env::var_os("STRAY").is_some() {
        say("stray");
        conn.execute_batch("INSERT INTO t VALUES (1000, 0, 'stray', 'precious')").unwrap();
        say("strayed");
        speak("end");
        hear();
    }
    let target: u64 = variable("TARGET").parse().unwrap();
    let head =
        |c: &rusqlite::Connection| c.query_row("SELECT seq FROM head", [], |r| r.get::<_, u64>(0)).unwrap();
    loop {
        let here = head(&conn);
        if here >= target {
            break;
        }
        let tx = conn.transaction_with_behavior(TransactionBehavior::Immediate).unwrap();
        let seq = model::write(&tx, "shell").unwrap();
        tx.commit().unwrap();
        say(&format!("ack {seq}"));
        until("others commit", || head(&conn) > seq + 3);
    }
    speak("end");
    hear();
}

/// Checks what both kinds of nodes must be after a power cut.
fn check_state(db: &Db, said: &Said, cut: &Cut) -> Result<u64, String> {
    let position = db.position().ok_or("no position")?;
    let last = db.read(|c| Ok::<_, Error>(said.check(c, cut.at))).map_err(|e| e.to_string())??;
    let (_, sum) = model::pages(db.path())?;
    if sum != position.checksum().as_u128() {
        return Err(format!("state {last} stands at {position}, and its pages' checksum is {sum:032x}"));
    }
    if last > 0 {
        let base = said.base.ok_or("a state before the first")?.1;
        if position.number() != last + base {
            return Err(format!("state {last} (+ {base}) calls itself {position}"));
        }
        if !said.branches.contains(&position.epoch().branch()) {
            return Err(format!("state {last} is of an epoch that was not: {position}"));
        }
        if said.checksums.get(&position.number()).is_some_and(|known| *known != sum) {
            return Err(format!("{position} had another checksum before"));
        }
    }
    Ok(last)
}

/// Checks a state that no primary is known to vouch for: it is one that there was, and what counts is behind it.
fn check_unvouched(db: &Db, said: &Said, cut: &Cut, synced: Option<u64>) -> Result<(), String> {
    let last = db.read(|c| Ok::<_, Error>(said.check(c, cut.at))).map_err(|e| e.to_string())??;
    let number = last + said.base.map_or(0, |base| base.1);
    if let Some(position) = db.position().filter(|position| position.number() >= number) {
        return Err(format!("state {number} is vouched for by nobody, and {position} counts"));
    }
    if synced.is_some_and(|synced| number < synced) {
        return Err(format!("{synced:?} was on the disk, and {number} is there"));
    }
    Ok(())
}

async fn check_log(db: &Db, said: &Said) -> Result<(), String> {
    let logged = db.transactions(None, usize::MAX).await.map_err(|e| e.to_string())?;
    for pair in logged.windows(2) {
        if pair[1].position.number() != pair[0].position.number() + 1 {
            return Err(format!("in the log {} follows {}", pair[1].position, pair[0].position));
        }
    }
    for transaction in &logged {
        let position = transaction.position;
        if said.checksums.get(&position.number()).is_some_and(|known| *known != position.checksum().as_u128())
        {
            return Err(format!("the log has {position}, which was another state"));
        }
    }
    match (logged.last(), db.position()) {
        // What a replica has beyond its log, nobody vouches for: it is compared when the primary is there.
        (Some(last), Some(position)) if last.position.number() > position.number() => {
            Err(format!("the log ends at {}, the state is {position}", last.position))
        }
        (Some(last), Some(position)) if last.position != position && db.role() == Role::Primary => {
            Err(format!("the log ends at {}, the state is {position}", last.position))
        }
        _ => Ok(()),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn check_primary(dir: &Path, said: &Said, cut: &Cut) -> Result<(), String> {
    check_lasting(dir, said, cut, said.acknowledged(cut.at)).map(drop)
}

/// `acknowledged`: what must be there at least.
fn check_lasting(dir: &Path, said: &Said, cut: &Cut, acknowledged: u64) -> Result<u64, String> {
    let path = dir.join("p.db");
    runtime().block_on(async {
        let open = || Db::open(small(Config::new(&path).database("app").secret(secret())));
        let db = open().await.map_err(|e| format!("it does not open: {e}"))?;
        let last = check_state(&db, said, cut)?;
        if last < acknowledged {
            return Err(format!("{acknowledged} was acknowledged, and state {last} is there"));
        }
        check_log(&db, said).await?;
        db.shutdown().await;
        drop(db);
        model::stock(&path)?;
        // What was found is found again.
        let db = open().await.map_err(|e| format!("it does not open again: {e}"))?;
        let again = check_state(&db, said, cut)?;
        db.shutdown().await;
        if again == last { Ok(last) } else { Err(format!("state {last} became {again}")) }
    })
}

/// Several lives of a primary. `more`: further variables of its processes.
fn primary_trace(stage: &Stage, more: &[(&str, &str)]) -> Vec<Change> {
    let path = stage.watched().join("p.db");
    let mut target = 0;
    for end in ["stop", "kill", "stop", "kill"] {
        target += 200;
        let (db, goal, near) =
            (("DB", path.to_str().unwrap()), target.to_string(), (target - 20).to_string());
        let own = [db, ("PORT", "0"), ("TARGET", &goal)];
        let mut process = start(stage, writing_process, &[&own, more].concat());
        process.expect("open");
        let shell = start(stage, shell_process, &[&[db, ("TARGET", &near)], more].concat());
        shell.expect("end");
        kill(stage, shell);
        process.expect("target");
        if end == "stop" {
            process.say("stop");
            process.expect("closed");
        }
        kill(stage, process);
    }
    trace::read(&stage.trace(), &stage.watched())
}

/// Tries states that a power cut may leave, and then, of some of them, those that a second one leaves while the node that
/// finds the first goes on: `life` is that. `follows`: it is a replica.
fn cut_twice(
    stage: &Stage,
    changes: &[Change],
    follows: bool,
    life: &dyn Fn(&Stage),
    check: &(dyn Fn(&Path, &Said, &Cut) -> Result<(), String> + Sync),
) {
    let (rounds, seed) = (number("REPLITE_ROUNDS", ROUNDS), number("REPLITE_SEED", 1));
    let said = Said::read(changes);
    let cuts = choose(changes, rounds as usize, seed);
    println!("{} changes, with syncs of {:?}", changes.len(), syncs(changes));
    println!("{} states, beside syncs of {:?}", cuts.len(), stopped(&cuts));
    run(&Disk::empty, changes, &cuts, stage.dir(), &|dir, cut| check(dir, &said, cut));
    let mut all = Vec::new();
    for first in &choose(changes, (rounds / SECOND_EVERY) as usize, seed + 1) {
        let second = Stage::new("second");
        make(&Disk::empty, changes, first, &second.watched());
        let start = |names| Disk::load(names, &second.watched());
        let starts = [start(Names::Journal), start(Names::Strict)];
        let start = |names| starts[usize::from(names == Names::Strict)].clone();
        life(&second);
        // What was said before the first cut holds on. On a replica, what its primary did was done elsewhere.
        let elsewhere = ["intent", "base", "position"];
        let holds = |(at, change): (usize, &Change)| match change {
            Change::Said(line) => at < first.at || (follows && elsewhere.iter().any(|w| line.starts_with(w))),
            _ => false,
        };
        let words = changes.iter().enumerate().filter(|change| holds(*change)).map(|(_, change)| change);
        let mut whole: Vec<Change> = words.cloned().collect();
        let before = whole.len();
        let more = trace::read(&second.trace(), &second.watched());
        whole.extend_from_slice(&more);
        // An epoch may have begun before the cut and be named first after it.
        let branches = said.branches.clone();
        let mut said = Said::read(&whole);
        said.branches.extend(branches);
        let cuts = choose(&more, SECOND_STATES, first.seed);
        let check = |dir: &Path, cut: &Cut| check(dir, &said, &Cut { at: cut.at + before, ..*cut });
        run(&start, &more, &cuts, second.dir(), &check);
        all.extend(cuts);
    }
    println!("{} states of second cuts, beside syncs of {:?}", all.len(), stopped(&all));
}

#[test]
fn a_primary_keeps_what_it_acknowledged_whenever_the_power_goes() {
    let stage = Stage::new("primary");
    let changes = primary_trace(&stage, &[]);
    let life = |stage: &Stage| {
        let path = stage.watched().join("p.db");
        let variables = [("DB", path.to_str().unwrap()), ("PORT", "0"), ("MORE", "20")];
        let mut process = start(stage, writing_process, &variables);
        process.expect("target");
        process.say("stop");
        process.expect("closed");
        kill(stage, process);
    };
    cut_twice(&stage, &changes, false, &life, &check_primary);
}

#[test]
fn a_primary_of_somebody_else_s_file_keeps_what_it_acknowledged() {
    let set = |changes: &[Change]| {
        let nothing = |change: &&Change| matches!(change, Change::Write { data, .. } if data.is_empty());
        changes.iter().filter(nothing).count()
    };
    let own = Stage::new("own");
    let times = set(&primary_trace(&own, &[]));
    println!("{times} times are set on a file of our own");
    assert!(times > 0);
    let stage = Stage::new("foreign");
    let changes = primary_trace(&stage, &[("POWER_NO_TIMES", "1")]);
    assert_eq!(set(&changes), 0);
    let (rounds, seed) = (number("REPLITE_ROUNDS", ROUNDS), number("REPLITE_SEED", 1));
    let said = Said::read(&changes);
    let cuts = choose(&changes, rounds as usize / 4, seed);
    println!("{} states of a file whose times can't be set", cuts.len());
    run(&Disk::empty, &changes, &cuts, stage.dir(), &|dir, cut| check_primary(dir, &said, cut));
}

#[test]
fn a_primary_without_fsyncs_is_what_it_was_at_some_moment_whenever_the_power_goes() {
    let stage = Stage::new("unsynced");
    let changes = primary_trace(&stage, &[("UNSYNCED", "1")]);
    let (rounds, seed) = (number("REPLITE_ROUNDS", ROUNDS), number("REPLITE_SEED", 1));
    let said = Said::read(&changes);
    let cuts = choose(&changes, rounds as usize, seed);
    println!("{} changes, with syncs of {:?}", changes.len(), syncs(&changes));
    let lost = AtomicU64::new(0);
    let check = |dir: &Path, cut: &Cut| {
        let last = check_lasting(dir, &said, cut, 0)?;
        lost.fetch_add(said.acknowledged(cut.at).saturating_sub(last), Ordering::Relaxed);
        Ok(())
    };
    run(&Disk::empty, &changes, &cuts, stage.dir(), &check);
    // Else nothing was tried. How much it is depends on how many commits the machine makes between
    // two syncs.
    assert!(lost.into_inner() > 0, "nothing was lost");
}

/// A replica in a process of its own.
#[test]
#[ignore = "runs as the child of another test"]
fn following_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db =
        runtime.block_on(Db::open(small(replica(&PathBuf::from(variable("DB")), &variable("URL"))))).unwrap();
    let mut events = db.events();
    runtime.spawn(async move {
        while let Some(event) = events.next().await {
            match event {
                Event::SnapshotFinished { .. } | Event::Healed { .. } => speak("filled"),
                _ => {}
            }
        }
    });
    speak("open");
    runtime.block_on(db.ready()).unwrap();
    let mut target: u64 = variable("TARGET").parse().unwrap();
    loop {
        until("the target", || seq(&db) >= target);
        speak(&format!("at {target}"));
        match hear().as_str() {
            "stop" => break,
            more => target = more.parse().unwrap(),
        }
    }
    runtime.block_on(db.shutdown());
    speak("closed");
    hear();
}

fn check_replica(dir: &Path, said: &Said, cut: &Cut, url: &str, primary: &Db) -> Result<(), String> {
    let path = dir.join("r.db");
    let strayed = said.stray.is_some_and(|at| cut.at > at);
    runtime().block_on(async {
        let open = |url: &str| Db::open(small(replica(&path, url)));
        let db = open("http://127.0.0.1:1").await.map_err(|e| format!("it does not open: {e}"))?;
        let synced = said.replica_synced(cut.at);
        // What is there goes beyond what counts, or nothing is known to count, until the primary decides.
        let unvouched =
            db.status().problem.is_some_and(|problem| problem.contains("no primary that is known"));
        match db.position() {
            _ if unvouched && strayed => {}
            _ if unvouched => {
                check_unvouched(&db, said, cut, synced)?;
                check_log(&db, said).await?;
            }
            // Files that another process changed, and left half copied, are refused.
            None if synced.is_some() && !strayed => {
                return Err(format!("{synced:?} was on the disk, and nothing is there"));
            }
            None => {}
            Some(_) if strayed => {}
            Some(position) => {
                check_state(&db, said, cut)?;
                check_log(&db, said).await?;
                if synced.is_some_and(|number| position.number() < number) {
                    return Err(format!("{synced:?} was on the disk, and {position} is there"));
                }
            }
        }
        let had = db.position();
        db.shutdown().await;
        drop(db);
        if path.exists() && had.is_some() {
            model::stock(&path)?;
        }
        let db = open(url).await.map_err(|e| format!("it does not open again: {e}"))?;
        let goal = primary.position().unwrap();
        db.wait_for_timeout(goal.txid(), LIMIT).await.map_err(|e| format!("{had:?}: {e}"))?;
        if db.position() != Some(goal) {
            return Err(format!("{:?} instead of {goal}", db.position()));
        }
        let (ours, theirs) = (model::pages(&path)?, model::pages(primary.path())?);
        let strayed = said.stray_synced.is_some_and(|at| cut.at > at);
        let kept = !strayed || stray_is_kept(&db, &dir.join("r.db-replite")).await?;
        db.shutdown().await;
        if !kept {
            return Err(format!("from {had:?} to {goal}: what was written here is nowhere"));
        }
        if ours == theirs { Ok(()) } else { Err("the pages are not the primary's".into()) }
    })
}

/// Whether what was written here is in a page that was kept, or in a database that was no state of the cluster, which is
/// kept as it was, with its WAL.
async fn stray_is_kept(db: &Db, state_dir: &Path) -> Result<bool, String> {
    let has = |path: &Path, sql: &str| {
        plain(path).query_row(sql, [], |r| r.get::<_, i64>(0)).is_ok_and(|count| count > 0)
    };
    let lost = db.lost().await.map_err(|e| e.to_string())?;
    for (number, branch) in lost.iter().filter_map(Lost::branch).enumerate() {
        let copy = state_dir.join(format!("exported-{number}.db"));
        branch.export(&copy).map_err(|e| e.to_string())?;
        if has(&copy, "SELECT count(*) FROM replite_pages WHERE instr(page, CAST('precious' AS BLOB))") {
            return Ok(true);
        }
    }
    let kept = std::fs::read_dir(state_dir.join("lost")).into_iter().flatten();
    let databases = kept.map(|entry| entry.unwrap().path().join("r.db")).filter(|path| path.exists());
    let count = "SELECT count(*) FROM t WHERE who = 'stray'";
    Ok(databases.into_iter().any(|path| has(&path, count)))
}

#[test]
fn a_replica_is_a_state_of_its_primary_whenever_the_power_goes() {
    let stage = Stage::new("replica");
    let stage = &stage;
    let (p, r) = (stage.dir().join("p.db"), stage.watched().join("r.db"));
    let port = own_port();
    let url = format!("http://127.0.0.1:{port}/_replite");
    let (mut target, port_text) = (0, port.to_string());
    let write = |target: u64, synced: bool| {
        let target = target.to_string();
        let mut variables = vec![("DB", p.to_str().unwrap()), ("PORT", &port_text), ("TARGET", &target)];
        if synced {
            variables.push(("SYNCED", "1"));
        }
        start(stage, writing_process, &variables)
    };
    for (round, end) in ["kill", "stop", "kill", "stop"].into_iter().enumerate() {
        // Behind the log's reach at the third start, off the history at the fourth.
        if round == 0 || round == 2 {
            target += 220;
            let mut primary = write(target, false);
            primary.expect("target");
            primary.say("stop");
            primary.expect("closed");
            kill(stage, primary);
        }
        if round == 3 {
            let shell = start(stage, shell_process, &[("DB", r.to_str().unwrap()), ("STRAY", "1")]);
            shell.expect("end");
            kill(stage, shell);
        }
        target += 80;
        let mut primary = write(target, true);
        primary.expect("open");
        let text = (target - 20).to_string();
        let variables = [("DB", r.to_str().unwrap()), ("URL", url.as_str()), ("TARGET", text.as_str())];
        let mut process = start(stage, following_process, &variables);
        if round != 1 {
            process.expect("filled");
        }
        primary.expect("target");
        process.expect("at");
        if end == "stop" {
            process.say("stop");
            process.expect("closed");
        }
        kill(stage, process);
        primary.say("stop");
        primary.expect("closed");
        kill(stage, primary);
    }
    let changes = trace::read(&stage.trace(), &stage.watched());
    let above = runtime();
    let primary = above.block_on(Db::open(writing(&p, port))).unwrap();
    let life = |stage: &Stage| {
        let path = stage.watched().join("r.db");
        let text = target.to_string();
        let variables = [("DB", path.to_str().unwrap()), ("URL", url.as_str()), ("TARGET", text.as_str())];
        let mut process = start(stage, following_process, &variables);
        process.expect("at");
        process.say("stop");
        process.expect("closed");
        kill(stage, process);
    };
    cut_twice(stage, &changes, true, &life, &|dir, said, cut| check_replica(dir, said, cut, &url, &primary));
    above.block_on(primary.shutdown());
}
