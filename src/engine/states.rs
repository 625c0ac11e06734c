//! Every combination of what may be left of a database's files: each is opened, as a primary's and
//! as a replica's, and compared with an independent account of which states were ever committed.
//! `docs/design.md` has the table.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::Connection;

use crate::engine::checkpoint::backfill::backfill_some;
use crate::engine::file::anchor::FileState;
use crate::engine::file::witnesses::CopyTag;
use crate::engine::tests::{Home, node, settled};
use crate::engine::*;
use crate::error::Error;
use crate::lock::lock;
use crate::page::PageSize;
use crate::wal::{FRAME_HEADER_BYTES, FrameHeader, frame_bytes, frame_offset};

const PAGE: usize = 512;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NewestAnchor {
    AtRest,
    Backfilling,
    None,
    OlderGeneration,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum WalFile {
    Whole,
    CutBefore,
    CutAfter,
    FlippedBefore,
    OtherSalts,
    Gone,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Database {
    AsLeft,
    ChangedBySqlite,
    Replaced,
    Backup,
    Cut,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LogFiles {
    Reaches,
    Behind,
    Ahead,
    Gone,
}

const NEWEST: [NewestAnchor; 4] =
    [NewestAnchor::AtRest, NewestAnchor::Backfilling, NewestAnchor::None, NewestAnchor::OlderGeneration];
const WALS: [WalFile; 6] = [
    WalFile::Whole,
    WalFile::CutBefore,
    WalFile::CutAfter,
    WalFile::FlippedBefore,
    WalFile::OtherSalts,
    WalFile::Gone,
];
const DATABASES: [Database; 5] =
    [Database::AsLeft, Database::ChangedBySqlite, Database::Replaced, Database::Backup, Database::Cut];
const LOGS: [LogFiles; 4] = [LogFiles::Reaches, LogFiles::Behind, LogFiles::Ahead, LogFiles::Gone];

type Tree = BTreeMap<PathBuf, Vec<u8>>;

fn tree(path: &Path) -> Tree {
    let mut found = Tree::new();
    let mut left = vec![path.to_path_buf()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let entry = entry.unwrap().path();
            if entry.is_dir() {
                left.push(entry);
            } else {
                found.insert(entry.strip_prefix(path).unwrap().to_path_buf(), fs::read(&entry).unwrap());
            }
        }
    }
    found
}

fn plant(path: &Path, tree: &Tree) {
    for (name, bytes) in tree {
        let to = path.join(name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(to, bytes).unwrap();
    }
}

/// All pages, as SQLite reads them.
fn image(path: &Path) -> Vec<u8> {
    #[allow(unused_mut, reason = "rusqlite before 0.41 serializes through a shared reference")]
    let mut connection = plain(path);
    connection.serialize("main").unwrap().to_vec()
}

/// A connection that leaves the files as they are when it closes.
fn plain(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
    connection
}

/// What was there at one moment or another.
struct World {
    /// Each state that was committed, by its bytes, with a name; those of the history with their
    /// number.
    committed: HashMap<Vec<u8>, (String, Option<u64>)>,
    /// Number of the state that the file alone is at rest at, and of the last one in the WAL.
    rest: u64,
    last: u64,
    at_rest: Tree,
    backfilling: Tree,
    older_anchors: Vec<u8>,
    epochs: Vec<u8>,
    modified: i64,
    database: Vec<u8>,
    half_copied: Vec<u8>,
    changed: Vec<u8>,
    replaced: Vec<u8>,
    backup: Vec<u8>,
    wal: Vec<u8>,
    foreign_wal: Vec<u8>,
    /// Frames of the two anchors.
    rest_frame: u32,
    copied_frame: u32,
    log: Tree,
    log_behind: Tree,
    log_ahead: Tree,
}

struct Maker {
    home: Home,
    number: u64,
    committed: HashMap<Vec<u8>, (String, Option<u64>)>,
}

impl Maker {
    fn path(&self, name: &str) -> PathBuf {
        self.home.path(name)
    }

    /// One transaction: two rows get values that never were, and sometimes there is one more.
    fn write(&mut self, engine: &PrimaryEngine) {
        let n = self.number as i64;
        let sql = format!(
            "BEGIN IMMEDIATE; UPDATE t SET v = randomblob(300) WHERE n IN ({}, {}); {} COMMIT",
            n % 12,
            n * 5 % 12 + 20,
            if n % 3 == 0 { "INSERT INTO t(v) VALUES (randomblob(400));" } else { "" }
        );
        plain(&self.path("a.db")).execute_batch(&sql).unwrap();
        self.note(engine);
    }

    fn note(&mut self, engine: &PrimaryEngine) {
        self.number = settled(engine).number();
        let image = image(&self.path("a.db"));
        self.committed.insert(image, (format!("state {}", self.number), Some(self.number)));
    }

    fn files(&self) -> Tree {
        let mut files = tree(&self.path("."));
        files.retain(|name, _| !name.to_string_lossy().ends_with("-shm"));
        files
    }
}

fn state_file(name: &str) -> PathBuf {
    Path::new("a.db-replite").join(name)
}

fn log_of(files: &Tree) -> Tree {
    files
        .iter()
        .filter(|(name, _)| name.starts_with(state_file("log")))
        .map(|(n, b)| (n.clone(), b.clone()))
        .collect()
}

/// The file of a tree of database and WAL, after SQLite has done something with them and copied all
/// back.
fn by_sqlite(maker: &Maker, files: &Tree, sql: &str) -> (Vec<u8>, Connection, tempfile::TempDir) {
    let _ = maker;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    fs::write(&path, &files[Path::new("a.db")]).unwrap();
    fs::write(dir.path().join("a.db-wal"), &files[Path::new("a.db-wal")]).unwrap();
    let connection = plain(&path);
    let copy = |c: &Connection| c.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    copy(&connection);
    connection.execute_batch(sql).unwrap();
    copy(&connection);
    (fs::read(&path).unwrap(), connection, dir)
}

impl World {
    fn new() -> World {
        let home = Home::new();
        Connection::open(home.path("a.db"))
            .unwrap()
            .execute_batch(
                "PRAGMA page_size = 512; PRAGMA journal_mode = WAL; CREATE TABLE t(n INTEGER PRIMARY KEY, v);
                 WITH RECURSIVE c(i) AS (VALUES (0) UNION ALL SELECT i + 1 FROM c LIMIT 40)
                 INSERT INTO t SELECT i, randomblob(300) FROM c",
            )
            .unwrap();
        let mut maker = Maker { home, number: 0, committed: HashMap::new() };
        let generation = |engine: &PrimaryEngine| lock(&engine.base.anchors).generation();
        // A first generation, and what it left.
        let mut options = maker.home.options("a.db");
        options.wal_limit_bytes = 8 << 10;
        let engine = PrimaryEngine::open(options.clone(), node()).unwrap();
        maker.note(&engine);
        let first = generation(&engine);
        while generation(&engine) < first + 2 {
            maker.write(&engine);
        }
        engine.close();
        drop(engine);
        let older = maker.files();
        let older_number = maker.number;
        let engine = PrimaryEngine::open(options.clone(), node()).unwrap();
        maker.note(&engine);
        let second = generation(&engine);
        while generation(&engine) < second + 2 {
            maker.write(&engine);
        }
        engine.close();
        drop(engine);
        // The generation that is looked at: no one else copies.
        options.wal_limit_bytes = 64 << 20;
        let engine = PrimaryEngine::open(options, node()).unwrap();
        maker.note(&engine);
        for _ in 0..4 {
            maker.write(&engine);
        }
        backfill_some(&engine.base, &mut lock(&engine.second), false).unwrap();
        let newest = lock(&engine.base.anchors).newest_first()[0];
        let FileState::AtRest { position, modified } = newest.file else { panic!("{newest:?}") };
        // A backfill that is not said to be all leaves the last frame out.
        let (rest, rest_frame) = (position.number(), newest.frame);
        let at_rest = maker.files();
        for _ in 0..2 {
            maker.write(&engine);
        }
        let log_behind = log_of(&maker.files());
        for _ in 0..2 {
            maker.write(&engine);
        }
        let target = engine.base.tip();
        let witnesses = engine.base.witnesses(&mut lock(&engine.second), rest_frame, &target).unwrap();
        assert!(witnesses.iter().count() > 2, "{witnesses:?}");
        let length =
            fs::metadata(maker.path("a.db")).unwrap().len().max(u64::from(target.pages) * PAGE as u64);
        let mark = CopyTag { offset: length, nonce: [7; CopyTag::BYTES] };
        let copying = FileState::Backfilling(witnesses.marked(Some(mark)));
        engine.base.write_anchor(&target, copying, true).unwrap();
        let backfilling = maker.files();
        for _ in 0..3 {
            maker.write(&engine);
        }
        let files = maker.files();
        let last = maker.number;
        for _ in 0..2 {
            maker.write(&engine);
        }
        let log_ahead = log_of(&maker.files());
        let database = files[Path::new("a.db")].clone();
        let wal = files[Path::new("a.db-wal")].clone();
        // What a copy that was cut short leaves: its mark is after its end.
        let mut half_copied = database.clone();
        let size = PageSize::new(PAGE as u32).unwrap();
        for frame in rest_frame + 1..rest_frame + 1 + (target.frame - rest_frame) / 2 {
            let at = frame_offset(frame, size) as usize;
            let page = FrameHeader::parse(wal[at..][..FRAME_HEADER_BYTES].try_into().unwrap()).page as usize;
            let end = half_copied.len().max(page * PAGE);
            half_copied.resize(end, 0);
            half_copied[(page - 1) * PAGE..][..PAGE].copy_from_slice(&wal[at + FRAME_HEADER_BYTES..][..PAGE]);
        }
        let end = half_copied.len().max(target.pages as usize * PAGE);
        half_copied.resize(end, 0);
        half_copied.extend_from_slice(&[7; CopyTag::BYTES]);
        let sql = "UPDATE t SET v = randomblob(300) WHERE n IN (3, 9, 25); INSERT INTO t(v) VALUES \
            (randomblob(400))";
        let (changed, connection, dir) = by_sqlite(&maker, &files, sql);
        maker.committed.insert(image(&dir.path().join("a.db")), ("changed by SQLite".into(), None));
        connection.execute_batch("UPDATE t SET v = randomblob(300) WHERE n IN (5, 11, 30)").unwrap();
        maker.committed.insert(image(&dir.path().join("a.db")), ("changed twice by SQLite".into(), None));
        let foreign_wal = fs::read(dir.path().join("a.db-wal")).unwrap();
        drop((connection, dir));
        let (replaced, connection, dir) = by_sqlite(&maker, &older, "SELECT 1");
        let to = dir.path().join("backup.db");
        let mut copy = Connection::open(&to).unwrap();
        let backup = rusqlite::backup::Backup::new(&connection, &mut copy).unwrap();
        backup.run_to_completion(100, Duration::ZERO, None).unwrap();
        drop(backup);
        drop(copy);
        // In place of a WAL database, whose journal mode it has.
        let backup = fs::read(&to).unwrap();
        maker.committed.insert(image(&to), ("a backup".into(), None));
        assert!(
            older_number < rest && maker.committed.contains_key(&replaced),
            "an older state of the history"
        );
        engine.close();
        World {
            committed: maker.committed,
            rest,
            last,
            older_anchors: older[&state_file("anchors")].clone(),
            epochs: files[&state_file("epochs")].clone(),
            modified,
            database,
            half_copied,
            changed,
            replaced,
            backup,
            wal,
            foreign_wal,
            rest_frame,
            copied_frame: target.frame,
            log: log_of(&files),
            log_behind,
            log_ahead,
            at_rest,
            backfilling,
        }
    }

    /// Puts the files of a combination into a directory.
    fn plant(&self, home: &Home, (newest, wal, database, log): Combination) {
        let root = home.path(".");
        let frame = if newest == NewestAnchor::Backfilling { self.copied_frame } else { self.rest_frame };
        let left = if newest == NewestAnchor::Backfilling { &self.half_copied } else { &self.database };
        let bytes = match database {
            Database::AsLeft => left.clone(),
            Database::ChangedBySqlite => self.changed.clone(),
            Database::Replaced => self.replaced.clone(),
            Database::Backup => self.backup.clone(),
            Database::Cut => left[..left.len() * 6 / 10 + 100].to_vec(),
        };
        let path = home.path("a.db");
        fs::write(&path, bytes).unwrap();
        if database == Database::AsLeft {
            let time = UNIX_EPOCH + Duration::from_nanos(self.modified as u64);
            fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
        let size = PageSize::new(PAGE as u32).unwrap();
        let cut =
            |frame: u32| self.wal[..frame_offset(frame, size) as usize + frame_bytes(size) / 2].to_vec();
        let bytes = match wal {
            WalFile::Whole => Some(self.wal.clone()),
            WalFile::CutBefore => Some(cut(frame / 2)),
            WalFile::CutAfter => Some(cut(frame + 5)),
            WalFile::FlippedBefore => {
                let mut bytes = self.wal.clone();
                bytes[frame_offset(frame / 2, size) as usize + FRAME_HEADER_BYTES + 99] ^= 16;
                Some(bytes)
            }
            WalFile::OtherSalts => Some(self.foreign_wal.clone()),
            WalFile::Gone => None,
        };
        if let Some(bytes) = bytes {
            fs::write(home.path("a.db-wal"), bytes).unwrap();
        }
        fs::create_dir(home.path("a.db-replite")).unwrap();
        let anchors = match newest {
            NewestAnchor::AtRest => Some(&self.at_rest[&state_file("anchors")]),
            NewestAnchor::Backfilling => Some(&self.backfilling[&state_file("anchors")]),
            NewestAnchor::None => None,
            NewestAnchor::OlderGeneration => Some(&self.older_anchors),
        };
        if let Some(anchors) = anchors {
            fs::write(root.join(state_file("anchors")), anchors).unwrap();
        }
        fs::write(root.join(state_file("epochs")), &self.epochs).unwrap();
        match log {
            LogFiles::Reaches => plant(&root, &self.log),
            LogFiles::Behind => plant(&root, &self.log_behind),
            LogFiles::Ahead => plant(&root, &self.log_ahead),
            LogFiles::Gone => {}
        }
    }

    /// The last transaction that the log has.
    fn logged(&self, log: LogFiles) -> u64 {
        match log {
            LogFiles::Reaches => self.last,
            LogFiles::Behind => self.rest + 2,
            LogFiles::Ahead => self.last + 2,
            LogFiles::Gone => 0,
        }
    }

    /// What SQLite reads from files.
    fn read_by_sqlite(&self, files: &Tree) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        plant(dir.path(), files);
        let path = dir.path().join("a.db");
        std::panic::catch_unwind(|| image(&path)).unwrap_or_default()
    }

    /// Opens a combination as a primary, and says in a word what came of it.
    fn primary(&self, combination: Combination) -> String {
        let (newest, wal, database, log) = combination;
        let home = Home::new();
        self.plant(&home, combination);
        let before = tree(&home.path("."));
        let options = || {
            let mut options = home.options("a.db");
            options.wal_limit_bytes = 64 << 20;
            options
        };
        let what = format!("{combination:?}");
        let told = std::cell::RefCell::new(String::new());
        let engine = match PrimaryEngine::open(options(), node()) {
            Ok(engine) => engine,
            Err(Error::Damaged { what: why, .. }) => {
                let says = ["transaction", "Either", "integrity_check"].iter().any(|word| why.contains(word));
                assert!(
                    says && why.contains("accept_damaged") || why.contains("restore it"),
                    "{what}: {why}"
                );
                let mut after = tree(&home.path("."));
                after.retain(|name, _| before.contains_key(name));
                assert!(after == before, "{what}: refused, and changed something: {why}");
                let again = PrimaryEngine::open(options(), node()).map(drop);
                assert!(matches!(again, Err(Error::Damaged { .. })), "{what}: refused once: {again:?}");
                let complete = database == Database::AsLeft
                    && matches!(newest, NewestAnchor::AtRest | NewestAnchor::Backfilling)
                    && matches!(log, LogFiles::Reaches | LogFiles::Ahead)
                    && wal != WalFile::OtherSalts;
                assert!(!complete, "{what}: all is there, and it is refused: {why}");
                *told.borrow_mut() = why.split_once(". ").map_or(why.clone(), |(first, _)| first.to_string());
                return "refused".into();
            }
            Err(error) => panic!("{what}: {error:?}"),
        };
        let position = settled(&engine);
        let found = image(&home.path("a.db"));
        let Some((name, number)) = self.committed.get(&found) else {
            panic!("{what}: a state that was never committed, as {position}");
        };
        engine.close();
        drop(engine);
        // What some file had is in the history, or in `lost`.
        let kept = tree(&home.path("a.db-replite"));
        let kept = |prefix: &str| {
            kept.keys().any(|name| name.starts_with("lost") && name.to_string_lossy().contains(prefix))
        };
        let here = number.unwrap_or(0);
        if here < self.logged(log) {
            assert!(kept("log-"), "{what}: {name}, and the log's transactions are nowhere");
        }
        let whole = matches!(wal, WalFile::Whole | WalFile::FlippedBefore);
        if whole && here < self.last {
            assert!(
                kept("log-") && self.logged(log) >= self.last || kept("wal-"),
                "{what}: {name}, and the WAL's transactions are nowhere"
            );
        }
        // But for what SQLite itself does not read any more.
        let foreign = database == Database::ChangedBySqlite || wal == WalFile::OtherSalts;
        let read = self.committed.get(&self.read_by_sqlite(&before));
        if foreign && number.is_some() && read.is_none_or(|(_, number)| number.is_none()) {
            assert!(kept("branch-") || kept("wal-"), "{what}: {name}, and what others committed is nowhere");
        }
        let again = PrimaryEngine::open(options(), node())
            .unwrap_or_else(|error| panic!("{what}: opened once, then: {error}"));
        assert_eq!(settled(&again), position, "{what}: {name}");
        again.close();
        assert_eq!(image(&home.path("a.db")), found, "{what}");
        name.clone()
    }

    /// Opens a combination as a replica: what is read from it is the state that it says.
    fn replica(&self, combination: Combination) -> String {
        let home = Home::new();
        self.plant(&home, combination);
        let mut options = home.options("a.db");
        options.wal_limit_bytes = 64 << 20;
        let follower =
            ReplicaEngine::open(options, node()).unwrap_or_else(|error| panic!("{combination:?}: {error}"));
        let position = lock(&follower.shared.term).as_ref().map(|base| base.tip().position);
        let readable = *follower.readable().borrow();
        let name = match position.filter(|_| readable) {
            None => "compared".to_string(),
            Some(position) => {
                let found = self.committed.get(&image(&home.path("a.db")));
                let Some((name, number)) = found else {
                    panic!("{combination:?}: a state that was never committed, as {position}");
                };
                let foreign = number.is_none();
                assert!(
                    foreign || *number == Some(position.number()),
                    "{combination:?}: {name} as {position}"
                );
                name.clone()
            }
        };
        follower.close();
        name
    }
}

type Combination = (NewestAnchor, WalFile, Database, LogFiles);

#[test]
fn whatever_is_left_of_the_files_a_node_has_a_committed_state_or_refuses() {
    // Some of them, to look at: part of what a combination is written as, such as "(AtRest, Whole,
    // Cut, Gone)".
    let only = std::env::var("REPLITE_STATES").unwrap_or_default();
    let world = World::new();
    if !only.is_empty() {
        tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).init();
    }
    let mut all = Vec::new();
    for newest in NEWEST {
        for wal in WALS {
            for database in DATABASES {
                all.extend(LOGS.map(|log| (newest, wal, database, log)));
            }
        }
    }
    let (next, results, wrong) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(combination) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if !format!("{combination:?}").contains(&only) {
                        continue;
                    }
                    // All of them, whatever one of them does.
                    let of = |open: &dyn Fn() -> String| {
                        std::panic::catch_unwind(std::panic::AssertUnwindSafe(open)).unwrap_or_else(|panic| {
                            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                            lock(&wrong).push(text);
                            "wrong".into()
                        })
                    };
                    let found = (of(&|| world.primary(*combination)), of(&|| world.replica(*combination)));
                    lock(&results).insert(format!("{combination:?}"), found);
                }
            });
        }
    });
    let results = lock(&results);
    let mut table = String::new();
    for (combination, (primary, replica)) in results.iter() {
        writeln!(table, "{combination}: {primary}; {replica}").unwrap();
    }
    println!("rest {} last {}\n{table}", world.rest, world.last);
    let refused = results.values().filter(|(primary, _)| primary == "refused").count();
    assert!(results.len() == all.len() || !only.is_empty());
    println!("{refused} of {} are refused", all.len());
    let wrong = lock(&wrong);
    assert!(wrong.is_empty(), "{} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}
