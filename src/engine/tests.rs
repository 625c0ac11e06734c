//! The engine against plain SQLite: whatever is done to a primary's file, by any connection, a
//! follower that is fed from its log has the same pages.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusqlite::Connection;

use crate::checksum::PageKey;
use crate::ends::Ends;
use crate::engine::file::reader::reader;
use crate::engine::*;
use crate::error::{Error, PeerProblem, Result};
use crate::files::Paths;
use crate::keys::DatabaseKeys;
use crate::lock::lock;
use crate::log::{LogOptions, Lookup};
use crate::page::PageNo;
use crate::peer::{Incarnation, NodeId};
use crate::secret::Keyring;
use crate::status::{Addresses, PeerInfo, Role};
use crate::txid::{Position, Txid};
use crate::wire::{self, Decoder, HealBegin, Message, PageRun, SnapBegin, SnapEnd};

/// The page key of all databases of these tests.
pub(super) const KEY: PageKey = KEYS.page;
pub(super) const KEYS: DatabaseKeys = DatabaseKeys::fixed(7);

pub(super) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub(super) fn new() -> Home {
        Home { dir: tempfile::tempdir().unwrap() }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn options(&self, name: &str) -> EngineOptions {
        EngineOptions {
            paths: Paths::new(self.path(name)),
            durability: Durability::Synced,
            wal_limit_bytes: 64 * 1024,
            log: LogOptions {
                page_key: KEY,
                segment_bytes: 256 * 1024,
                keep_bytes: 64 << 20,
                keep_age: Duration::from_secs(3600),
                quota_bytes: 64 << 20,
                tail_bytes: 64 * 1024,
            },
            lost_bytes: 1 << 30,
            poll_max: Duration::from_millis(10),
            accept_damaged: false,
            database_mode: None,
            read_mark: Arc::default(),
        }
    }

    pub(super) fn primary(&self, name: &str) -> PrimaryEngine {
        PrimaryEngine::open(self.options(name), node()).unwrap()
    }

    pub(super) fn follower(&self, name: &str) -> ReplicaEngine {
        ReplicaEngine::open(self.options(name), node()).unwrap()
    }
}

pub(super) fn node() -> Arc<crate::context::NodeContext> {
    let me = PeerInfo {
        node: NodeId::random(),
        incarnation: Incarnation::random(),
        addresses: Addresses::default(),
    };
    crate::context::NodeContext::new(
        me,
        "test".into(),
        "db".into(),
        (Keyring::new(&[]).unwrap(), crate::channel::Channel::open()),
        Role::Primary,
        crate::context::LeaseContext::fixed(),
        KEYS,
    )
}

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::yield_now();
    }
}

/// Waits until the engine has taken in everything that was committed, and says the position.
pub(super) fn settled(engine: &PrimaryEngine) -> Position {
    until("capture", || {
        engine.base.check().unwrap();
        engine.base.header().is_some_and(|h| h.max_frame == engine.base.tip().frame)
            && engine.base.node.applied.position() == Some(engine.base.tip().position)
    });
    engine.base.tip().position
}

pub(super) fn applied(follower: &ReplicaEngine) -> Option<Position> {
    lock(&follower.shared.term).as_ref().map(|b| b.tip().position)
}

pub(super) fn send(follower: &ReplicaEngine, units: BytesMut) -> Result<(), StreamError> {
    let mut decoder = Decoder::new(Some(KEY));
    decoder.push(units.freeze());
    let mut all = Vec::new();
    while let Some(unit) = decoder.next().unwrap() {
        all.push(unit);
    }
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(follower.feed(all))
}

pub(super) fn standing(
    follower: &ReplicaEngine,
) -> (ReplicaStanding, tokio::sync::mpsc::Receiver<wire::Want>) {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(follower.standing()).unwrap()
}

/// Does what the stream does: continues from the log where that is possible, else sends a snapshot
/// to who has nothing, and all pages to who has something else.
fn feed(
    engine: &PrimaryEngine,
    follower: &ReplicaEngine,
    pieces_between: &mut dyn FnMut(),
) -> Result<(), StreamError> {
    let (standing, mut wants) = standing(follower);
    let mut out = BytesMut::new();
    wire::encode(&Message::Epochs((*engine.base.node.applied.history()).clone()), &mut out);
    let found = standing.position.map(|p| (p, engine.log().find(p.number()).unwrap()));
    let first = engine.base.tip().position;
    let page_size = engine.page_size();
    let mut lsn = match (found, engine.log().find(first.number()).unwrap()) {
        (Some((position, Lookup::At { lsn, before })), _) if position == before => lsn,
        (Some(_), Lookup::At { lsn, .. }) => {
            send(follower, std::mem::take(&mut out))?;
            compare(engine, follower, &mut wants, pieces_between)?;
            lsn
        }
        (None, Lookup::At { lsn, .. }) => {
            let begin = SnapBegin { first, from: PageNo::FIRST, page_size, pages: 0 };
            wire::encode(&Message::SnapBegin(begin), &mut out);
            let last = send_pieces(engine, &mut out, pieces_between);
            until("capture", || engine.base.tip().position.number() >= last.position.number());
            let end = SnapEnd { exact_at: last.position, pages: last.pages };
            wire::encode(&Message::SnapEnd(end), &mut out);
            lsn
        }
        (_, found) => panic!("{first} is {found:?}"),
    };
    send(follower, std::mem::take(&mut out))?;
    loop {
        let bytes = engine.log().read_disk(lsn, 100_000).unwrap();
        if bytes.is_empty() {
            return Ok(());
        }
        lsn += bytes.len() as u64;
        // Units may be cut anywhere: the decoder of this whole call puts them together.
        out.extend_from_slice(&bytes);
        let whole = whole_units(&out);
        send(follower, out.split_to(whole))?;
    }
}

/// Has the follower compare all pages with those of the primary, which meanwhile stays as it is,
/// and sends all, whatever it asks for. Says how many pages it had.
pub(super) fn compare(
    engine: &PrimaryEngine,
    follower: &ReplicaEngine,
    wants: &mut tokio::sync::mpsc::Receiver<wire::Want>,
    pieces_between: &mut dyn FnMut(),
) -> Result<usize, StreamError> {
    let (tip, page_size, mut out, mut had) = (engine.base.tip(), engine.page_size(), BytesMut::new(), 0);
    let (first, pages) = (tip.position, tip.pages);
    let begin = HealBegin { from: first, page_size, pages, compare: true, diverged: true };
    wire::encode(&Message::HealBegin(begin), &mut out);
    let sums = vec![[0; 16]; pages as usize];
    wire::encode(&Message::Sums { first: PageNo::FIRST, span: 1, sums: &sums }, &mut out);
    let sent = wire::Sent { position: first, pages };
    wire::encode(&Message::Sent(sent), &mut out);
    send(follower, std::mem::take(&mut out))?;
    loop {
        let want = wants.blocking_recv().unwrap();
        if want.runs.is_empty() {
            wire::encode(&Message::SnapEnd(SnapEnd { exact_at: first, pages }), &mut out);
            return send(follower, out).map(|()| had);
        }
        had += want.runs.iter().flat_map(|run| &run.hashes).filter(|hash| **hash != [0; 16]).count();
        send_pieces(engine, &mut out, pieces_between);
        wire::encode(&Message::Sent(sent), &mut out);
        send(follower, std::mem::take(&mut out))?;
    }
}

/// All pages, and the empty piece after the last.
fn send_pieces(engine: &PrimaryEngine, out: &mut BytesMut, between: &mut dyn FnMut()) -> Piece {
    let mut next = PageNo::FIRST;
    loop {
        let piece = engine.read_piece(next, 16 * 1024).unwrap();
        if piece.data.is_empty() {
            return piece;
        }
        let run = PageRun::hashed(next, &piece.data, engine.page_size(), &KEY);
        wire::encode_run(&run, piece.position, out);
        next = PageNo::new(next.get() + run.count()).unwrap();
        between();
    }
}

fn whole_units(bytes: &[u8]) -> usize {
    let mut at = 0;
    while at + wire::HEADER_BYTES <= bytes.len() {
        let length = crate::wal::le_u32(&bytes[at..]) as usize + wire::HEADER_BYTES;
        if at + length > bytes.len() {
            break;
        }
        at += length;
    }
    at
}

pub(super) fn catch_up(engine: &PrimaryEngine, follower: &ReplicaEngine) {
    feed(engine, follower, &mut || {}).unwrap();
    let goal = settled(engine);
    until("apply", || {
        if let Some(error) = lock(&follower.shared.failure).take() {
            panic!("apply failed: {error}");
        }
        if applied(follower).is_some_and(|p| p.number() < goal.number()) {
            feed(engine, follower, &mut || {}).unwrap();
        }
        applied(follower) == Some(goal)
    });
}

fn image(path: &Path) -> Vec<u8> {
    let mut connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(5)).unwrap();
    let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok");
    connection.serialize("main").unwrap().to_vec()
}

pub(super) fn assert_same(one: &Path, other: &Path) {
    let (a, b) = (image(one), image(other));
    assert_eq!(a.len(), b.len(), "sizes differ");
    if let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) {
        panic!("the databases differ at byte {at} of {}", a.len());
    }
}

/// Something random, done by a plain connection.
fn mutate(connection: &Connection, rng: &mut StdRng) {
    let run = |sql: &str| connection.execute_batch(sql).unwrap();
    match rng.random_range(0..100) {
        0..60 => {
            let size = rng.random_range(1..600);
            connection
                .execute("INSERT INTO t(k, v) VALUES (?1, randomblob(?2))", (rng.random_range(0..500), size))
                .unwrap();
        }
        60..70 => run("UPDATE t SET v = randomblob(length(v)) WHERE id % 7 = 3"),
        70..78 => run("DELETE FROM t WHERE id % 5 = 1"),
        78..82 => {
            connection
                .execute("INSERT INTO t(k, v) VALUES (1, zeroblob(?1))", [rng.random_range(1..300_000)])
                .unwrap();
        }
        82..86 => {
            let n = rng.random_range(0..1000);
            run(&format!(
                "CREATE TABLE IF NOT EXISTS x{n}(a, b); INSERT INTO x{n} VALUES (1, 2); CREATE INDEX IF NOT \
                 EXISTS i{n} ON x{n}(a)"
            ));
        }
        86..89 => {
            let table: Option<String> = connection
                .query_row("SELECT name FROM sqlite_schema WHERE name LIKE 'x%' LIMIT 1", [], |r| r.get(0))
                .ok();
            if let Some(table) = table {
                run(&format!("DROP TABLE {table}"));
            }
        }
        89..92 => run(
            "BEGIN; SAVEPOINT a; DELETE FROM t WHERE id % 3 = 0; ROLLBACK TO a; INSERT INTO t(k, v) VALUES \
             (9, 'x'); COMMIT",
        ),
        92..94 => run("BEGIN; DELETE FROM t; ROLLBACK"),
        94..96 => run("UPDATE t SET k = k"),
        96..98 => run("PRAGMA incremental_vacuum(5)"),
        _ => run("VACUUM"),
    }
}

pub(super) fn open_plain(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(10)).unwrap();
    connection
}

#[test]
fn random_sql_of_a_foreign_connection_arrives_page_by_page_at_every_page_size() {
    for (round, size) in [512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536].into_iter().enumerate() {
        let home = Home::new();
        let mut rng = StdRng::seed_from_u64(round as u64);
        let plain = open_plain(&home.path("p.db"));
        plain
            .execute_batch(&format!(
                "PRAGMA page_size = {size}; PRAGMA auto_vacuum = {}; CREATE TABLE t(id INTEGER PRIMARY KEY, \
                 k, v); CREATE INDEX tk ON t(k)",
                round % 3
            ))
            .unwrap();
        let engine = home.primary("p.db");
        assert_eq!(engine.page_size().get(), size);
        let follower = home.follower("r.db");
        for step in 0..150 {
            mutate(&plain, &mut rng);
            if step % 10 == 0 {
                catch_up(&engine, &follower);
            }
            if step % 50 == 49 {
                catch_up(&engine, &follower);
                assert_same(&home.path("p.db"), &home.path("r.db"));
            }
        }
        catch_up(&engine, &follower);
        assert_same(&home.path("p.db"), &home.path("r.db"));
        assert_exact(&engine);
    }
}

/// The kept checksum is that of all pages.
pub(super) fn assert_exact(engine: &PrimaryEngine) {
    let position = settled(engine);
    until("a hash of one generation", || {
        let mut handle = lock(&engine.second);
        let tip = engine.base.tip();
        assert_eq!(tip.position, position, "nobody writes");
        let sum = engine.base.hash_all(&mut handle, tip.frame, tip.pages);
        // The WAL may have been begun anew in the middle of it.
        let one = sum.is_ok() && engine.base.tip().salts == tip.salts;
        assert!(!one || sum.as_ref().is_ok_and(|sum| *sum == position.checksum()), "{sum:?} at {position}");
        one
    });
}

#[test]
fn a_snapshot_is_exact_although_the_primary_writes_all_the_time() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain
        .execute_batch(
            "CREATE TABLE t(id INTEGER PRIMARY KEY, k, v);
             WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
             INSERT INTO t(k, v) SELECT i, randomblob(300) FROM n",
        )
        .unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    let mut rng = StdRng::seed_from_u64(7);
    feed(&engine, &follower, &mut || mutate(&plain, &mut rng)).unwrap();
    catch_up(&engine, &follower);
    assert_same(&home.path("p.db"), &home.path("r.db"));
}

#[test]
fn both_sides_reopen_at_their_exact_position_without_starting_over() {
    let home = Home::new();
    let mut rng = StdRng::seed_from_u64(11);
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let mut last = None;
    for round in 0..12 {
        let engine = home.primary("p.db");
        let now = settled(&engine);
        if let Some(last) = last {
            assert_eq!(now, last, "round {round}");
        }
        let follower = home.follower("r.db");
        if round > 0 {
            assert_eq!(applied(&follower), Some(now), "round {round}: the replica kept its state");
        }
        for _ in 0..20 {
            mutate(&plain, &mut rng);
        }
        catch_up(&engine, &follower);
        last = Some(settled(&engine));
        assert_same(&home.path("p.db"), &home.path("r.db"));
    }
}

#[test]
fn commits_made_while_no_engine_ran_become_history() {
    let home = Home::new();
    let mut rng = StdRng::seed_from_u64(13);
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let mut last = 0;
    for round in 0..6 {
        let engine = home.primary("p.db");
        let follower = home.follower("r.db");
        assert!(settled(&engine).number() >= last);
        catch_up(&engine, &follower);
        assert_same(&home.path("p.db"), &home.path("r.db"));
        last = settled(&engine).number();
        drop((engine, follower));
        for _ in 0..10 {
            mutate(&plain, &mut rng);
        }
        if round % 2 == 1 {
            // The last to close copies the WAL back and deletes it: the position can then not be
            // known.
            plain.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        }
    }
}

#[test]
fn the_wal_stays_bounded_beside_readers_that_never_pause() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    catch_up(&engine, &follower);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // An assertion that fails ends the readers, too.
        let _end = Stop(&stop);
        for name in ["p.db", "r.db"] {
            for _ in 0..3 {
                let (path, stop) = (home.path(name), &stop);
                scope.spawn(move || {
                    let reader = Connection::open(path).unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        // Equal in every committed state, and never busy.
                        let (n, k): (i64, i64) = reader
                            .query_row("SELECT count(*), coalesce(sum(k), 0) FROM t", [], |r| {
                                Ok((r.get(0)?, r.get(1)?))
                            })
                            .unwrap();
                        assert_eq!(k, 0, "{n} rows");
                    }
                });
            }
        }
        // A table of as many pages all the time: the readers of one that grows would take ever
        // longer.
        let (mut restarts, mut longest) = ((0, 0), 0);
        let mut i = 0;
        until("restarts on both sides", || {
            i += 1;
            plain
                .execute_batch(&format!(
                    "BEGIN; INSERT OR REPLACE INTO t(id, k, v) VALUES ({0}, {i}, randomblob(900));
                     INSERT OR REPLACE INTO t(id, k, v) VALUES ({0} + 1, -{i}, 1); COMMIT",
                    i % 200 * 2
                ))
                .unwrap();
            if i % 10 == 0 {
                catch_up(&engine, &follower);
                let replica = lock(&follower.shared.term).clone().unwrap();
                longest = longest.max(engine.base.wal_bytes()).max(replica.wal_bytes());
                restarts = (engine.base.bound.restarts(), replica.bound.restarts());
            }
            i >= 400 && restarts.0 > 3 && restarts.1 > 3
        });
        assert!(longest <= 8 * 64 * 1024, "{longest} bytes");
    });
    assert_same(&home.path("p.db"), &home.path("r.db"));
}

/// Ends threads that look at it, also when an assertion fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_replicas_file_refuses_every_foreign_write() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v); INSERT INTO t(k) VALUES (1)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    catch_up(&engine, &follower);
    let foreign = Connection::open(home.path("r.db")).unwrap();
    foreign.busy_timeout(Duration::ZERO).unwrap();
    for sql in ["INSERT INTO t(k) VALUES (2)", "VACUUM", "CREATE TABLE u(a)", "PRAGMA user_version = 7"] {
        let error = foreign.execute_batch(sql).unwrap_err();
        assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy), "{sql}");
    }
    let (busy, _, _): (i64, i64, i64) = foreign
        .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))
        .unwrap();
    assert_eq!(busy, 1, "a checkpoint is refused");
    let rows: i64 = foreign.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(rows, 1);
}

#[test]
fn a_transaction_that_does_not_lead_to_its_position_is_refused_and_nothing_of_it_is_seen() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v); INSERT INTO t(k) VALUES (1)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    catch_up(&engine, &follower);
    let before = applied(&follower).unwrap();
    let next = Txid::new(before.epoch(), before.number() + 1);
    let mut out = BytesMut::new();
    let epoch = engine.base.node.applied.history().epoch_of(next.number()).unwrap();
    let begin = wire::TxnBegin { before, epoch, page_size: engine.page_size() };
    wire::encode(&Message::TxnBegin(begin), &mut out);
    let page = vec![1; engine.page_size().bytes()];
    let number = PageNo::new(2).unwrap();
    wire::encode_page(number, KEY.hash(number, &page), &page, &mut out);
    let after = Position::new(Txid::new(epoch, next.number()), before.checksum());
    let pages = engine.base.tip().pages;
    wire::encode(&Message::TxnEnd(wire::TxnEnd { after, pages, changed: 1, unix_micros: 0 }), &mut out);
    send(&follower, out).unwrap();
    let error = std::cell::RefCell::new(None);
    until("the refusal", || {
        *error.borrow_mut() = lock(&follower.shared.failure).take();
        error.borrow().is_some()
    });
    let error = error.into_inner();
    let mismatch = |problem: &PeerProblem| matches!(problem, PeerProblem::Mismatch { .. });
    assert!(
        matches!(&error, Some(StreamError::Failed(Error::Peer { problem, .. })) if mismatch(problem)),
        "{error:?}"
    );
    assert_eq!(applied(&follower), Some(before));
    plain.execute_batch("INSERT INTO t(k) VALUES (2)").unwrap();
    catch_up(&engine, &follower);
    assert_same(&home.path("p.db"), &home.path("r.db"));
}

/// The kinds of POSIX locks that this process holds on a file, as the kernel says.
#[cfg(target_os = "linux")]
fn posix_locks(path: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(path).unwrap().ino().to_string();
    let all = std::fs::read_to_string("/proc/locks").unwrap();
    let fields = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = fields.filter(|f| {
        f.get(4).is_some_and(|pid| *pid == std::process::id().to_string())
            && f.get(5).and_then(|file| file.rsplit(':').next()) == Some(&inode)
    });
    ours.map(|f| f[3].to_string()).collect()
}

#[test]
#[cfg(target_os = "linux")]
fn a_replica_that_was_filled_by_a_snapshot_keeps_its_lock_on_the_database_file() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v); INSERT INTO t(k) VALUES (1)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    catch_up(&engine, &follower);
    // After this the snapshot is over and done with.
    standing(&follower);
    // SQLite's shared one, and the marker that says that it stands; else another process deletes
    // the WAL when it closes. The kernel's list is not read in one piece, so that locks of other
    // tests may push a line out of sight.
    until("both locks", || {
        let mut locks = posix_locks(&home.path("r.db"));
        locks.sort();
        locks == ["READ", "WRITE"]
    });
    assert_eq!(follower.wal().locks_lost, 0, "they were not taken again");
}

#[test]
fn a_wal_that_somebody_else_has_copied_back_is_not_restarted_behind_our_back() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    plain.execute_batch("INSERT INTO t(k, v) VALUES (1, randomblob(3000))").unwrap();
    // Less than what makes us restart the WAL at once. All is copied back, and the wal-index that
    // says so outlives the opening: this connection stays.
    plain.execute_batch("PRAGMA wal_checkpoint(PASSIVE)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    plain.execute_batch("INSERT INTO t(k, v) VALUES (2, 'x')").unwrap();
    settled(&engine);
    catch_up(&engine, &follower);
    assert_same(&home.path("p.db"), &home.path("r.db"));
}

#[test]
fn nothing_is_copied_back_in_the_name_of_a_generation_that_is_gone() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let engine =
        PrimaryEngine::open(EngineOptions { wal_limit_bytes: 1 << 20, ..home.options("p.db") }, node())
            .unwrap();
    for _ in 0..60 {
        plain.execute_batch("INSERT INTO t(k, v) VALUES (1, randomblob(3000))").unwrap();
    }
    settled(&engine);
    let tip = engine.base.tip();
    // It would keep a writer from that, by chance.
    engine.base.options.read_mark.close();
    // What must not happen: all is said to be copied, and a writer begins the WAL anew.
    let copied = checkpoint::backfill::backfill_some(&engine.base, &mut lock(&engine.second), true).unwrap();
    engine.base.index.set_backfilled(tip.frame);
    plain.execute_batch("INSERT INTO t(k, v) VALUES (2, 'x')").unwrap();
    let header = engine.base.header().unwrap();
    assert!(header.salts != tip.salts && header.max_frame < tip.frame, "{copied:?}");
    until("the stop", || matches!(engine.base.check(), Err(Error::Stopped(_))));
    assert_eq!(
        checkpoint::backfill::backfill_some(&engine.base, &mut lock(&engine.second), false).unwrap(),
        None
    );
    // More than that would hide the new frames from every reader.
    assert!(engine.base.index.backfilled() <= header.max_frame);
    plain.execute_batch("INSERT INTO t(k, v) VALUES (2, 'y')").unwrap();
    let rows: i64 =
        open_plain(&home.path("p.db")).query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    assert_eq!(rows, 62);
}

#[test]
fn no_state_before_one_that_replaced_it_is_anchored() {
    // A reader held a copy back at a state before a heal. Its anchors took the place of the one
    // that named the heal's commit, which the next start then counted like any other: the new state
    // under the old one's next number.
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    // No restart of the WAL takes the frames away meanwhile.
    let engine =
        PrimaryEngine::open(EngineOptions { wal_limit_bytes: 1 << 20, ..home.options("p.db") }, node())
            .unwrap();
    for _ in 0..5 {
        plain.execute_batch("INSERT INTO t(k, v) VALUES (1, randomblob(3000))").unwrap();
        settled(&engine);
    }
    let tip = engine.base.tip();
    let before = engine.base.boundary(tip.frame - 1).unwrap();
    assert_eq!(before.position.number() + 1, tip.position.number());
    engine.base.leap(tip);
    assert_eq!(engine.base.boundary(tip.frame - 1), None);
    assert_eq!(engine.base.boundary(tip.frame), Some(tip));
}

#[test]
fn a_follower_that_was_closed_does_not_look_into_memory_that_is_gone() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    catch_up(&engine, &follower);
    assert!(follower.wal().frames > 0);
    follower.close();
    assert_eq!(follower.wal().frames, 0);
}

#[test]
fn a_header_that_a_dead_writer_left_torn_is_mended_whichever_copy_it_was_in() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let engine = home.primary("p.db");
    let follower = home.follower("r.db");
    for (round, copy) in [0, 1].into_iter().enumerate() {
        plain.execute_batch("INSERT INTO t(k) VALUES (1)").unwrap();
        settled(&engine);
        engine.base.index.tear(copy);
        let other = open_plain(&home.path("p.db"));
        other.execute_batch("INSERT INTO t(k) VALUES (2)").unwrap();
        let rows: i64 = other.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
        assert_eq!(rows, 2 * (round as i64 + 1), "nothing that was committed is lost");
        catch_up(&engine, &follower);
        assert_same(&home.path("p.db"), &home.path("r.db"));
    }
}

#[test]
fn a_new_epoch_that_waits_for_a_writer_does_not_keep_that_writer_from_capture() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
    let engine = home.primary("p.db");
    assert!(matches!(engine.raise_epoch(u64::MAX), Err(Error::Peer { .. })), "there is none above that");
    settled(&engine);
    for _ in 0..20 {
        let before = engine.base.node.applied.history().epoch().number();
        std::thread::scope(|scope| {
            // Not captured yet, as a rule, when the request arrives.
            plain.execute_batch("INSERT INTO t(k) VALUES (1); BEGIN IMMEDIATE").unwrap();
            let raised = scope.spawn(|| engine.raise_epoch(before + 5));
            let waited = Instant::now();
            engine.captured().unwrap();
            assert!(waited.elapsed() < Duration::from_secs(3), "they wait for each other");
            plain.execute_batch("COMMIT").unwrap();
            raised.join().unwrap().unwrap();
        });
        assert_eq!(engine.base.node.applied.history().epoch().number(), before + 6);
    }
}

/// A descriptor that was closed in this process drops its locks, and the other process that commits
/// then is not written over, whatever was made ready.
#[test]
fn the_wal_is_not_begun_anew_over_a_commit_that_came_while_readers_were_waited_for() {
    let home = Home::new();
    let plain = open_plain(&home.path("p.db"));
    plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v); INSERT INTO t(k) VALUES (1)").unwrap();
    let engine = home.primary("p.db");
    plain.execute_batch("INSERT INTO t(k) VALUES (2)").unwrap();
    settled(&engine);
    let mut other = Connection::open(home.path("p.db")).unwrap();
    let reader_of_all = other.transaction().unwrap();
    reader_of_all.query_row("SELECT count(*) FROM t", [], |_| Ok(())).unwrap();
    let base = engine.base.clone();
    let begun = std::thread::scope(|scope| {
        // As a holder of WRITE does it; but no one holds it.
        let restarts = scope.spawn(|| {
            let mut handle = reader(&base).unwrap();
            let begun = checkpoint::restart::restart(&base, &mut handle, Duration::from_secs(60)).unwrap();
            let tip = checkpoint::restart::keep_from_others(&base, &mut handle).unwrap();
            (matches!(begun, checkpoint::restart::Restart::Done(_)), tip)
        });
        until("the copy", || base.index.backfilled() == base.tip().frame && base.bound.pinned());
        plain.execute_batch("INSERT INTO t(k) VALUES (3)").unwrap();
        drop(reader_of_all);
        restarts.join().unwrap()
    });
    assert!(!begun.0, "it was begun over the commit");
    let rows = |connection: &Connection| {
        connection.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap()
    };
    assert_eq!((rows(&plain), rows(&other)), (3, 3));
    settled(&engine);
    assert_exact(&engine);
}

#[test]
fn a_hash_at_open_says_how_far_it_has_come() {
    let home = Home::new();
    let engine = home.primary("p.db");
    let connection = Connection::open(home.path("p.db")).unwrap();
    connection.busy_timeout(Duration::from_secs(5)).unwrap();
    connection.execute_batch("CREATE TABLE t(v); INSERT INTO t VALUES (zeroblob(8000000))").unwrap();
    settled(&engine);
    let (base, seen) = (engine.base.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let ends = Ends(&seen);
        let opening = scope.spawn(|| {
            let mut handle = reader(&base).unwrap();
            while !seen.load(Ordering::Relaxed) {
                // At an opening no thread is there that begins the WAL anew.
                let _generation = base.generation.read().unwrap();
                let tip = base.tip();
                base.hash_all(&mut handle, tip.frame, tip.pages).unwrap();
            }
        });
        until("its progress", || {
            base.node.problem().is_some_and(|p| p.starts_with("hashing the database: "))
        });
        drop(ends);
        opening.join().unwrap();
    });
    // The large transaction may be a problem of its own for a moment.
    until("its end", || base.node.problem().is_none());
}
