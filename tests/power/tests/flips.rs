//! Bits that flip in a closed node's files: it opens as what it was, or says what is wrong; it neither panics nor hangs,
//! nor takes anything else for its state than, at worst, the very page that was hit.
//!
//! `REPLITE_ROUNDS` says how often each file is hit, `REPLITE_SEED` where.
#![cfg(target_os = "linux")]

#[path = "../../support/lib.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::{Config, Db, Error, Event};
use replite_power::cuts::{fast_directory, number};
use replite_power::disk::{Disk, Names, Style, copy_tree, files_below};
use replite_power::model::{self, Said};
use replite_power::stage::Stage;
use replite_power::trace::{self, Change, kind};
use support::*;

/// Hits of each file in a run of continuous integration.
const ROUNDS: u64 = 8;
/// Transactions that the late replica has, and that all others have.
const LATE: u64 = 60;
const ALL: u64 = 110;

/// What was said by panics, whichever thread they ended.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn writing(path: &Path, port: u16) -> Config {
    primary(path, port).wal_limit(128 * 1024).migrate(model::migrate)
}

fn following(path: &Path, url: &str) -> Config {
    replica(path, url).wal_limit(128 * 1024)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

async fn write(db: &Db, until: u64) {
    loop {
        let done = db.write(|tx| Ok::<_, Error>(model::write(tx, "a")?)).await.unwrap();
        if done.value >= until {
            db.wait_for(done.txid.unwrap()).await.unwrap();
            break;
        }
    }
}

/// Closed nodes, each in a directory of its own.
struct Closed {
    room: tempfile::TempDir,
}

impl Closed {
    fn at(&self, name: &str) -> PathBuf {
        self.room.path().join(name)
    }

    async fn make() -> Closed {
        let closed = Closed { room: fast_directory() };
        for name in ["primary", "replica"] {
            std::fs::create_dir(closed.at(name)).unwrap();
        }
        let p = Db::open(writing(&closed.at("primary/p.db"), 0)).await.unwrap();
        let url = p.node().addresses.replication.clone();
        for (count, after) in [(LATE, "late"), (ALL, "")] {
            let r = Db::open(following(&closed.at("replica/r.db"), &url)).await.unwrap();
            within("ready", r.ready()).await.unwrap();
            write(&p, count).await;
            r.wait_for_timeout(p.position().unwrap().txid(), LIMIT).await.unwrap();
            r.shutdown().await;
            if !after.is_empty() {
                copy_tree(&closed.at("replica"), &closed.at(after));
            }
        }
        closed.interrupted(&url);
        p.shutdown().await;
        closed
    }

    /// A replica that was cut off just before its first snapshot was complete.
    fn interrupted(&self, url: &str) {
        let stage = Stage::new("snapshot");
        let recorded = stage.variables();
        let path = stage.watched().join("r.db");
        let mut variables: Vec<_> = recorded.iter().map(|(name, value)| (*name, value.as_str())).collect();
        variables.extend([("DB", path.to_str().unwrap()), ("URL", url)]);
        let process = Process::start(following_process, &variables);
        process.expect("ready");
        stage.between(|| drop(process.kill()));
        let changes = trace::read(&stage.trace(), &stage.watched());
        let saved =
            |c: &Change| matches!(c, Change::Synced { path, .. } if kind(path) == "directory incoming");
        let last = changes.iter().rposition(saved).unwrap();
        let mut disk = Disk::empty(Names::Journal);
        changes[..=last].iter().for_each(|change| disk.apply(change));
        disk.cut(Style::Everything, &mut StdRng::seed_from_u64(0), &self.at("snapshot"));
    }
}

#[test]
#[ignore = "runs as the child of another test"]
fn following_process() {
    if !is_child() {
        return;
    }
    runtime().block_on(async {
        let db = Db::open(following(&PathBuf::from(variable("DB")), &variable("URL"))).await.unwrap();
        db.ready().await.unwrap();
        speak("ready");
        hear();
    });
}

/// Flips some bits of a file; says the first byte. The time of the file is kept in half of the cases.
fn flip(path: &Path, rng: &mut StdRng) -> Option<(usize, bool)> {
    let mut bytes = std::fs::read(path).unwrap();
    if bytes.is_empty() {
        return None;
    }
    let modified = std::fs::metadata(path).unwrap().modified().unwrap();
    let at = rng.random_range(0..bytes.len());
    for near in 0..rng.random_range(1..4) {
        if let Some(byte) = bytes.get_mut(at + near) {
            *byte ^= 1 << rng.random_range(0..8);
        }
    }
    std::fs::write(path, bytes).unwrap();
    let kept = rng.random_bool(0.5);
    if kept {
        std::fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
    }
    Some((at, kept))
}

/// What became of a node that was hit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Became {
    /// What it was.
    Itself,
    /// It does not open, with an error that says why.
    Refused,
    /// It opens, and has no state that it would serve until it is filled.
    Told,
    /// All is as before but the page that was hit, which nobody has read.
    Unseen,
}

/// The pages that are not the same, from 0.
fn differing(ours: &[u8], theirs: &[u8]) -> Vec<usize> {
    let page = |bytes: &[u8], n: usize| bytes.get(n * 4096..(n + 1) * 4096).map(<[u8]>::to_vec);
    (0..ours.len().max(theirs.len()) / 4096).filter(|n| page(ours, *n) != page(theirs, *n)).collect()
}

fn unseen(path: &Path, whole: &[u8], hit: &str, at: usize) -> Result<Became, String> {
    // What is copied page by page is whole, and what is read by SQL may not be.
    let (pages, _) = model::pages(path)?;
    match differing(&pages, whole)[..] {
        [] => Ok(Became::Itself),
        [page] if kind(hit) == "database" && page == at / 4096 => Ok(Became::Unseen),
        ref more => Err(format!("pages {more:?} are others")),
    }
}

async fn open(config: Config) -> Result<Result<Db, Error>, String> {
    tokio::time::timeout(LIMIT, Db::open(config)).await.map_err(|_| "it hangs".to_string())
}

fn typed(error: &Error) -> Result<Became, String> {
    match error {
        Error::Corrupt { .. } | Error::Unsupported { .. } | Error::Newer { .. } | Error::Mismatch { .. } => {}
        Error::Sqlite(e)
            if matches!(e.sqlite_error_code(), Some(replite::rusqlite::ErrorCode::DatabaseCorrupt)) => {}
        other => return Err(format!("it does not open: {other:?}")),
    }
    Ok(Became::Refused)
}

async fn check_primary(
    dir: &Path,
    hit: &str,
    at: usize,
    whole: &[u8],
    late: &Path,
) -> Result<Became, String> {
    let path = dir.join("p.db");
    let db = match open(writing(&path, 0)).await? {
        Ok(db) => db,
        Err(error) => return typed(&error),
    };
    let became = unseen(&path, whole, hit, at)?;
    if became == Became::Itself {
        let last =
            db.read(|c| Ok::<_, Error>(Said::by("a", ALL).check(c, 1))).map_err(|e| e.to_string())??;
        if last != ALL {
            return Err(format!("state {last} is there"));
        }
    }
    let position = db.position().ok_or("no position")?;
    if became == Became::Itself && position.checksum().as_u128() != model::pages(&path)?.1 {
        return Err(format!("{position} is not the checksum"));
    }
    // A replica that was away comes to the same state, whatever the log has become.
    let url = db.node().addresses.replication.clone();
    let r = Db::open(following(&late.join("r.db"), &url)).await.map_err(|e| e.to_string())?;
    let done = equal(&r, &db).await;
    let said = r.status().problem;
    // The hit page need not be among those that it was sent.
    let whole = model::pages(r.path())?.0 == whole && r.position() == db.position();
    r.shutdown().await;
    db.shutdown().await;
    match became {
        _ if done => Ok(became),
        Became::Unseen if whole || said.is_some() => Ok(became),
        _ => Err(format!("a late replica does not catch up: {said:?}")),
    }
}

/// Waits until both have the same position and pages, or the replica has said again and again what is wrong.
async fn equal(replica: &Db, primary: &Db) -> bool {
    let goal = primary.position().unwrap();
    let (mut positions, mut events, mut refused) = (replica.watch(), replica.events(), 0);
    let wait = async {
        while *positions.borrow_and_update() != Some(goal) {
            tokio::select! {
                moved = positions.changed() => moved.map_err(drop)?,
                event = events.next() => match event {
                    Some(Event::Disconnected { .. }) if refused == REFUSED_MAX => return Err(()),
                    Some(Event::Disconnected { .. }) => refused += 1,
                    _ => {}
                }
            }
        }
        Ok(())
    };
    within("either state", wait).await.is_ok()
        && model::pages(replica.path()).unwrap().0 == model::pages(primary.path()).unwrap().0
}

/// Streams that end before a replica counts as one that can't take what it is sent.
const REFUSED_MAX: u32 = 3;

async fn check_replica(dir: &Path, hit: &str, at: usize, url: &str, primary: &Db) -> Result<Became, String> {
    let path = dir.join("r.db");
    let db = match open(following(&path, url)).await? {
        Ok(db) => db,
        Err(error) => return typed(&error),
    };
    let told = db.position().is_none();
    let done = equal(&db, primary).await;
    let problem = db.status().problem;
    let position = db.position();
    db.shutdown().await;
    match done {
        true if told => Ok(Became::Told),
        true => Ok(Became::Itself),
        false if position == primary.position() => unseen(&path, &model::pages(primary.path())?.0, hit, at),
        false => Err(format!("it stays at {position:?}: {problem:?}")),
    }
}

/// Hits each file of a closed node in turn.
fn hit_all(closed: &Closed, node: &str, check: &dyn Fn(&Path, &str, usize) -> Result<Became, String>) {
    let (rounds, seed) = (number("REPLITE_ROUNDS", ROUNDS), number("REPLITE_SEED", 1));
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut became, mut wrong) = (BTreeMap::new(), Vec::new());
    for file in files_below(&closed.at(node)) {
        for round in 0..rounds {
            let dir = closed.at("hit");
            copy_tree(&closed.at(node), &dir);
            let Some((at, kept)) = flip(&dir.join(&file), &mut rng) else { continue };
            let mut result = check(&dir, &file, at);
            let panics = std::mem::take(&mut *PANICS.lock().unwrap());
            if !panics.is_empty() {
                result = Err(format!("a panic: {panics:?}"));
            }
            match result {
                Ok(end) => *became.entry((kind(&file), end)).or_insert(0) += 1,
                Err(what) => {
                    println!("{node}, round {round}: {file} from byte {at}, its time kept: {kept}: {what}");
                    wrong.push(what);
                }
            }
            std::fs::remove_dir_all(dir).unwrap();
        }
    }
    println!("{node}: {became:?}");
    assert!(wrong.is_empty(), "{}: {} of them; seed {seed}", node, wrong.len());
}

#[test]
fn a_node_whose_files_are_hit_is_what_it_was_or_says_what_is_wrong() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.lock().unwrap().push(info.to_string());
        hook(info);
    }));
    let above = runtime();
    let closed = above.block_on(Closed::make());
    let (whole, _) = model::pages(&closed.at("primary/p.db")).unwrap();
    hit_all(&closed, "primary", &|dir, hit, at| {
        let late = closed.at("late-hit");
        copy_tree(&closed.at("late"), &late);
        let became = runtime().block_on(check_primary(dir, hit, at, &whole, &late));
        std::fs::remove_dir_all(late).unwrap();
        became
    });
    let primary = above.block_on(Db::open(writing(&closed.at("primary/p.db"), 0))).unwrap();
    let url = primary.node().addresses.replication.clone();
    for node in ["replica", "late", "snapshot"] {
        hit_all(&closed, node, &|dir, hit, at| {
            runtime().block_on(check_replica(dir, hit, at, &url, &primary))
        });
    }
    above.block_on(primary.shutdown());
}
