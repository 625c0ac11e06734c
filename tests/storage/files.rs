//! Files that were cut, flipped, deleted or exchanged while the node was down: a typed error or a
//! clean recovery.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;
use replite::{Db, Error, Event};

struct Pair {
    dir: tempfile::TempDir,
    port: u16,
}

impl Pair {
    fn new() -> Pair {
        Pair { dir: tempfile::tempdir().unwrap(), port: own_port() }
    }

    fn p(&self) -> PathBuf {
        self.dir.path().join("p.db")
    }

    fn r(&self) -> PathBuf {
        self.dir.path().join("r.db")
    }

    fn state_file(&self, of: &str, file: &str) -> PathBuf {
        self.dir.path().join(format!("{of}.db-replite")).join(file)
    }

    async fn primary(&self) -> Db {
        Db::open(primary(&self.p(), self.port)).await.unwrap()
    }

    async fn replica(&self) -> Db {
        let db = Db::open(replica(&self.r(), &format!("http://127.0.0.1:{}", self.port))).await.unwrap();
        within("ready", db.ready()).await.unwrap();
        db
    }

    /// Opens both, writes some, and closes both in a state of equality.
    async fn run(&self, rows: i64) {
        let (p, r) = (self.primary().await, self.replica().await);
        settle(&p, &r, rows).await;
        p.shutdown().await;
        r.shutdown().await;
    }

    /// Both must come to equality again.
    async fn check(&self) {
        let (p, r) = (self.primary().await, self.replica().await);
        settle(&p, &r, 3).await;
        p.shutdown().await;
        r.shutdown().await;
    }
}

async fn settle(p: &Db, r: &Db, rows: i64) {
    let mut last = None;
    for n in 0..rows {
        last = Some(insert(p, "w", n).await);
    }
    let last = last.unwrap();
    p.wait_for_timeout(last, LIMIT).await.unwrap();
    r.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(p.path(), r.path());
}

fn rows(path: &Path) -> i64 {
    plain(path).query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap()
}

fn newest_segment(log: &Path) -> PathBuf {
    let mut all: Vec<_> = fs::read_dir(log).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all.pop().unwrap()
}

fn remove_wal(path: &Path) {
    for end in ["-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        let _ = fs::remove_file(name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_torn_log_is_cut_and_both_sides_go_on() {
    let pair = Pair::new();
    for of in ["p", "r"] {
        for cut in [1u64, 100, 5000] {
            pair.run(10).await;
            let segment = newest_segment(&pair.state_file(of, "log"));
            let file = fs::OpenOptions::new().write(true).open(&segment).unwrap();
            let length = file.metadata().unwrap().len();
            assert!(length > cut, "{length} bytes are less than what is cut");
            file.set_len(length - cut).unwrap();
            pair.check().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_cut_and_flipped_state_files_are_survived_or_told() {
    let pair = Pair::new();
    for of in ["p", "r"] {
        for file in ["anchors", "epochs"] {
            for harm in 0..3 {
                pair.run(5).await;
                let before = rows(&pair.p());
                let path = pair.state_file(of, file);
                match harm {
                    0 => fs::remove_file(&path).unwrap(),
                    1 => fs::write(&path, &fs::read(&path).unwrap()[..20]).unwrap(),
                    _ => {
                        let mut bytes = fs::read(&path).unwrap();
                        bytes.iter_mut().for_each(|b| *b ^= 0x55);
                        fs::write(&path, bytes).unwrap();
                    }
                }
                pair.check().await;
                assert_eq!(rows(&pair.p()), before + 3, "{of} {file} {harm}: rows are missing");
            }
        }
        let log = pair.state_file(of, "log");
        fs::remove_dir_all(&log).unwrap();
        pair.check().await;
        let node = pair.state_file(of, "node");
        let whole = fs::read(&node).unwrap();
        fs::write(&node, &whole[..30]).unwrap();
        let config =
            if of == "p" { primary(&pair.p(), pair.port) } else { replica(&pair.r(), "http://127.0.0.1:1") };
        let told = Db::open(config).await;
        let Err(told @ Error::Corrupt { .. }) = told else { panic!("{told:?}") };
        let text = told.to_string();
        assert!(text.contains("-replite/node") && text.contains("says which node this is"), "{text}");
        assert!(text.contains("remove it"), "{text}");
        // Which is all that there is to do.
        fs::remove_file(&node).unwrap();
        pair.check().await;
    }
}

/// Without its epochs no record and no state of the primary had a name that a replica would take:
/// all of them waited for the next commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_without_its_epochs_serves_its_replicas_before_its_next_commit() {
    for corrupt in [true, false] {
        let pair = Pair::new();
        pair.run(20).await;
        let epochs = pair.state_file("p", "epochs");
        if corrupt {
            fs::write(&epochs, b"no epochs").unwrap();
        } else {
            fs::remove_file(&epochs).unwrap();
        }
        let p = pair.primary().await;
        let state = p.position().unwrap().txid();
        // The one that had it all, and one that has nothing.
        let url = format!("http://127.0.0.1:{}", pair.port);
        for name in ["r.db", "new.db"] {
            let path = pair.dir.path().join(name);
            let r = Db::open(replica(&path, &url)).await.unwrap();
            let came = r.wait_for_timeout(state, LIMIT).await;
            assert!(came.is_ok(), "{name}, corrupt {corrupt}: {came:?}");
            assert_eq!(r.position(), p.position(), "{name}, corrupt {corrupt}");
            assert_same_pages(&pair.p(), &path);
            r.shutdown().await;
        }
        assert_eq!(p.position().unwrap().txid(), state, "somebody has committed");
        assert_eq!(rows(&pair.p()), 20);
        assert_eq!(epochs.with_extension("corrupt").exists(), corrupt);
        p.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wal_that_an_administrator_deleted_is_made_good_from_the_log() {
    let pair = Pair::new();
    pair.run(50).await;
    let before = rows(&pair.p());
    assert!(before >= 50);
    remove_wal(&pair.p());
    assert!(Path::new(&pair.p()).exists());
    pair.check().await;
    assert_eq!(rows(&pair.p()), before + 3, "acknowledged rows are gone");
    remove_wal(&pair.r());
    pair.check().await;
    assert_eq!(rows(&pair.r()), before + 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_file_in_the_databases_place_is_led_on_by_the_log() {
    let pair = Pair::new();
    pair.run(20).await;
    let copy_back = "PRAGMA wal_checkpoint(TRUNCATE)";
    plain(&pair.p()).query_row(copy_back, [], |_| Ok(())).unwrap();
    let older = fs::read(pair.p()).unwrap();
    pair.run(20).await;
    pair.run(20).await;
    let before = rows(&pair.p());
    remove_wal(&pair.p());
    fs::write(pair.p(), older).unwrap();
    assert!(rows(&pair.p()) < before);
    pair.check().await;
    assert_eq!(rows(&pair.p()), before + 3, "acknowledged rows are gone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_was_exchanged_becomes_history_on_the_primary() {
    let pair = Pair::new();
    pair.run(20).await;
    remove_wal(&pair.p());
    fs::remove_file(pair.p()).unwrap();
    let other = replite::rusqlite::Connection::open(pair.p()).unwrap();
    other.execute_batch(SCHEMA).unwrap();
    other.execute_batch("INSERT INTO t(who) VALUES ('restored')").unwrap();
    drop(other);
    pair.check().await;
    assert_eq!((rows(&pair.p()), rows(&pair.r())), (4, 4));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_had_of_its_own_is_kept_aside() {
    let pair = Pair::new();
    // A database where a replica is to be, that never was of the cluster.
    let foreign = replite::rusqlite::Connection::open(pair.r()).unwrap();
    foreign.execute_batch("CREATE TABLE mine(a); INSERT INTO mine VALUES ('precious')").unwrap();
    drop(foreign);
    let (p, r) = (pair.primary().await, pair.replica().await);
    settle(&p, &r, 5).await;
    let kept = r.lost().await.unwrap().remove(0);
    let rows = kept.branch().unwrap().rows().unwrap().unwrap().rows;
    let mine = rows.iter().find(|row| row.table == "mine").unwrap();
    assert_eq!(mine.lost.as_ref().unwrap()["a"], "precious");
    p.shutdown().await;
    r.shutdown().await;
    // Commits that somebody made on the replica's file while the node was down.
    plain(&pair.r()).execute_batch("INSERT INTO t(who) VALUES ('stray')").unwrap();
    let (p, r) = (pair.primary().await, {
        let url = format!("http://127.0.0.1:{}", pair.port);
        Db::open(replica(&pair.r(), &url)).await.unwrap()
    });
    let mut events = r.events();
    within("the copy", async {
        while let Some(event) = events.next().await {
            if matches!(event, Event::Healed { .. }) {
                break;
            }
        }
    })
    .await;
    settle(&p, &r, 3).await;
    p.shutdown().await;
    r.shutdown().await;
    let strays = r.lost().await.unwrap();
    assert_eq!(strays.len(), 2, "the stray row is nowhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_restored_from_an_old_copy_does_not_pass_for_the_old_history() {
    let pair = Pair::new();
    pair.run(5).await;
    let copies = [pair.p(), pair.state_file("p", "anchors"), pair.state_file("p", "epochs"), {
        let mut wal = pair.p().into_os_string();
        wal.push("-wal");
        wal.into()
    }];
    let saved: Vec<Vec<u8>> = copies.iter().map(|f| fs::read(f).unwrap()).collect();
    pair.run(20).await;
    pair.run(20).await;
    remove_wal(&pair.p());
    for (path, bytes) in copies.iter().zip(saved) {
        fs::write(path, bytes).unwrap();
    }
    fs::remove_dir_all(pair.state_file("p", "log")).unwrap();
    let (p, r) = (pair.primary().await, pair.replica().await);
    // Until the replica has heard of it, what this primary commits is no part of the history that
    // the replica knows.
    let mut events = r.events();
    within("the heal", async { while !matches!(events.next().await, Some(Event::Healed { .. })) {} }).await;
    settle(&p, &r, 3).await;
    p.shutdown().await;
    r.shutdown().await;
    assert_eq!(rows(&pair.r()), 8, "the primary decides");
    let lost = fs::read_dir(pair.state_file("r", "lost")).unwrap().count();
    assert_eq!(lost, 1, "what the replica had beyond it is kept");
}
