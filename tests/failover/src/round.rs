//! One round: a cluster, clients, faults, and what must hold at its end.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};
use tokio::task::JoinSet;

use crate::check::{Figures, Finals, check};
use crate::client::Client;
use crate::clock::{now, seconds};
use crate::faults::{self, ORDERLY, Step, perform, plan};
use crate::foreign;
use crate::history::{Violation, Write};
use crate::node::{Kept, Standing};
use crate::request::get;
use crate::store::StoreKind;
use crate::world::{LeaseSetting, Setting, World};

/// From the first start to the first primary.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Until all nodes have the same, with nothing wrong any more.
const SAME_LIMIT: Duration = Duration::from_secs(60);
/// Until all requests have ended.
const CLIENTS_LIMIT: Duration = Duration::from_secs(60);
/// All faults of a round.
const FAULTS_LIMIT: Duration = Duration::from_secs(240);
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// What is to be run.
#[derive(Clone, Debug)]
pub struct Order {
    pub binary: PathBuf,
    /// Below it each round has a directory.
    pub dir: PathBuf,
    /// Only these faults; all if none is named.
    pub faults: Vec<String>,
    pub nodes: Option<usize>,
    /// The primary is fixed.
    pub fixed: bool,
    pub store: StoreKind,
    /// Directories stay also where all holds.
    pub keep: bool,
}

/// How a round ended.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub plan: Vec<Step>,
    pub violations: Vec<Violation>,
    pub figures: Figures,
    /// From the end of all faults to the first acknowledged write.
    pub primary_after: Duration,
    pub took: Duration,
    pub diary: String,
    /// Requests that failed where nothing was wrong, if all was done in good order.
    pub failed: Vec<String>,
    pub home: PathBuf,
}

/// What a seed says: the nodes, and the faults.
#[must_use]
pub fn drawn(order: &Order, seed: u64) -> (StdRng, Setting, Vec<Step>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let nodes = order.nodes.unwrap_or(if rng.random_bool(0.2) { 5 } else { 3 });
    let time = Duration::from_millis(rng.random_range(1000..=2500));
    let lease = LeaseSetting {
        store: order.store,
        time: time + order.store.slower(),
        loss: Duration::from_millis(rng.random_range(1000..=4000)),
        drain: Duration::from_millis(if seed.is_multiple_of(2) { 5000 } else { 250 }),
    };
    let setting = Setting {
        nodes,
        lease: (!order.fixed).then_some(lease),
        log_bytes: rng.random_bool(0.3).then_some(256 * 1024),
    };
    let steps = plan(&mut rng, &setting, &order.faults);
    (rng, setting, steps)
}

/// Runs one.
///
/// # Errors
/// The system's.
pub async fn run(order: &Order, seed: u64) -> io::Result<Report> {
    let begin = now();
    let (mut rng, setting, steps) = drawn(order, seed);
    let home = order.dir.join(format!("round-{seed}"));
    if home.exists() {
        std::fs::remove_dir_all(&home)?;
    }
    let world = World::new(setting, home.clone(), &order.binary).await?;
    world.note(format!("{:?}", world.setting));
    let mut tasks = JoinSet::new();
    for member in &world.members {
        world.start(member);
        tasks.spawn(world.clone().watch(member.clone()));
    }
    tasks.spawn(world.clone().watch(world.spare.clone()));
    let all_ready = || world.members.iter().all(|m| m.standing().is_some_and(|s| s.position.is_some()));
    if world.comes(START_LIMIT, || world.leader().is_some() && all_ready()).await {
        world.note("there is a primary, and all nodes have its state");
    } else {
        world.violation("6 a primary", "none, or not all nodes have its state, after the first start");
        world.ask_why().await;
    }
    let (clients, primary_after) = work(&world, &mut rng, seed, &steps).await;
    finish(&world, clients).await;
    let finals = collect(&world).await;
    world.note("all is collected");
    for member in &world.members {
        let ended = member.end(Duration::from_secs(25)).await;
        if !ended.is_some_and(|status| status.success()) {
            world.violation("alive", format!("{} did not end well: {ended:?}", member.name));
        }
    }
    world.note("all have ended");
    tasks.shutdown().await;
    let (found, figures) = check(&world.history(), &finals, &world.setting, world.begin);
    panics(&world);
    let mut violations = world.violations();
    violations.extend(found);
    let took = Duration::from_micros(now() - begin);
    let diary = world.diary();
    let failed = failed(&world, &steps);
    if violations.is_empty() && !order.keep {
        std::fs::remove_dir_all(&home)?;
    }
    Ok(Report { seed, plan: steps, violations, figures, primary_after, took, diary, failed, home })
}

/// The requests that failed on nodes that were there, in a round that has no reason for it.
fn failed(world: &World, steps: &[Step]) -> Vec<String> {
    if !steps.iter().all(|step| ORDERLY.contains(&step.fault)) {
        return Vec::new();
    }
    let history = world.history();
    let of_clients = |write: &&Write| write.client != "foreign" && write.acknowledged().is_none();
    let writes = history.writes.iter().filter(of_clients).filter(|write| !write.away);
    let reads = history.reads.iter().filter(|read| read.status != Some(200) && !read.away);
    let reads = reads.map(|read| {
        let (begin, end) = (world.at(read.begin), world.at(read.end));
        format!("read of {} at {begin:.3}..{end:.3}: {:?} {}", read.asked, read.status, read.text)
    });
    writes.map(|write| write.told(world.begin)).chain(reads).collect()
}

/// Clients work while faults happen. Returns when a write was acknowledged after them.
async fn work(world: &Arc<World>, rng: &mut StdRng, seed: u64, steps: &[Step]) -> (JoinSet<()>, Duration) {
    let mut clients = JoinSet::new();
    for number in 0..rng.random_range(3..=5) {
        clients.spawn(Client::new(world.clone(), number, seed).run());
    }
    if rng.random_bool(0.5) {
        clients.spawn(foreign::run(world.clone(), rng.random()));
    }
    if tokio::time::timeout(FAULTS_LIMIT, perform(world, steps)).await.is_err() {
        world.violation("harness", "the faults did not end");
    }
    heal(world);
    let healed = now();
    world.note("all faults have ended");
    // Lease time, poll, ranks, promotion; a machine with much else to do; and a hook that hangs.
    let limit = world.setting.lease_time() * 2 + Duration::from_secs(10);
    let acknowledged = || {
        let history = world.history();
        history.writes.iter().rev().take(500).any(|w| w.acknowledged().is_some_and(|a| a.began > healed))
    };
    let in_time = world.comes(limit, acknowledged).await;
    if !in_time {
        let standings: Vec<_> = world.members.iter().map(|m| (m.name.clone(), m.standing())).collect();
        world.violation("6 a primary", format!("none within {limit:?} after all faults: {standings:#?}"));
        world.ask_why().await;
        world.comes(SAME_LIMIT, acknowledged).await;
    }
    let took = Duration::from_micros(now() - healed);
    world.note(format!("a write was acknowledged {took:?} after the faults"));
    tokio::time::sleep(Duration::from_millis(1000)).await;
    (clients, took)
}

fn heal(world: &World) {
    world.wires.heal();
    faults::heal(world);
    for member in &world.members {
        // Gone already is as good.
        let _ = std::fs::remove_file(world.home.join(format!("{}.hook", member.name)));
        member.bar(None);
        member.go_on();
        world.start(member);
    }
}

/// Clients end, and all nodes come to the same state.
async fn finish(world: &Arc<World>, mut clients: JoinSet<()>) {
    world.clients.send_replace(false);
    let ended = async { while clients.join_next().await.is_some() {} };
    if tokio::time::timeout(CLIENTS_LIMIT, ended).await.is_err() {
        world.violation("harness", "clients did not end");
    }
    world.note("clients have ended");
    let begin = now();
    let (mut told, mut before) = (Vec::new(), None);
    while seconds(begin, now()) < SAME_LIMIT.as_secs_f64() {
        told.clear();
        for member in &world.members {
            told.push(get::<Standing>(member.listen, "/status", ASK_LIMIT).await);
        }
        let all: Vec<_> = told.iter().flatten().collect();
        let leads = all.iter().filter(|s| s.role == "primary").count();
        let follows = all.iter().filter(|s| s.role == "replica").count();
        let same =
            all.windows(2).all(|two| two[0].position == two[1].position && two[0].epoch == two[1].epoch);
        let known = all.first().is_some_and(|standing| standing.position.is_some());
        // What another program committed may not be captured yet.
        let still = std::mem::replace(&mut before, all.first().map(|standing| standing.position))
            == Some(all.first().and_then(|standing| standing.position));
        if leads == 1 && leads + follows == world.members.len() && same && known && still {
            world.note(format!("all have the same after {:.3} s", seconds(begin, now())));
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    world.violation("same", format!("nodes do not come to one state within {SAME_LIMIT:?}: {told:#?}"));
}

/// What is there at the end; each node has the same.
async fn collect(world: &World) -> Finals {
    let mut finals = Finals::default();
    let mut first: Option<(String, Vec<u8>)> = None;
    for member in &world.members {
        match get::<Vec<Kept>>(member.listen, "/lost", ASK_LIMIT).await {
            Ok(lost) => finals.lost.extend(lost.into_iter().map(|kept| (member.name.clone(), kept))),
            Err(error) => world.violation("2 acknowledged", format!("what {} keeps: {error}", member.name)),
        }
        let path = member.database();
        let read = tokio::task::spawn_blocking(move || image(&path)).await;
        let (rows, image) = match read {
            Ok(Ok(read)) => read,
            other => {
                world.violation("same", format!("{} can't be read: {other:?}", member.name));
                continue;
            }
        };
        match &first {
            None => (finals.rows, first) = (rows, Some((member.name.clone(), image))),
            Some((name, other)) if *other != image => {
                let at = other.iter().zip(&image).position(|(one, two)| one != two);
                let what = format!("{name} and {} differ at byte {at:?} of {}", member.name, image.len());
                world.violation("same", what);
            }
            Some(_) => {}
        }
    }
    finals
}

type Rows = HashMap<(String, u64), u64>;

/// All rows, and all pages, as plain SQLite reads them, after it found them whole.
fn image(path: &Path) -> rusqlite::Result<(Rows, Vec<u8>)> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags)?;
    conn.busy_timeout(Duration::from_secs(10))?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let whole: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    if whole != "ok" {
        return Err(rusqlite::Error::InvalidColumnName(whole));
    }
    let mut rows = Rows::new();
    {
        let mut all = conn.prepare("SELECT client, op FROM log")?;
        let mut all = all.query([])?;
        while let Some(row) = all.next()? {
            *rows.entry((row.get(0)?, row.get::<_, i64>(1)? as u64)).or_default() += 1;
        }
    }
    Ok((rows, conn.serialize("main")?.to_vec()))
}

fn panics(world: &World) {
    for member in &world.members {
        let text = std::fs::read(&member.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if let Some(line) = text.lines().find(|line| line.contains("panicked at")) {
            world.violation("alive", format!("{}: {line}", member.name));
        }
    }
}
