//! A replica's path before the replica has a state: whoever opens it has the file that the state
//! comes into.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::*;
use replite::rusqlite::Connection;
use replite::{Db, Error, Event, LostKind};

/// A plain connection in another process; says what it sees each time that it hears something.
#[test]
#[ignore = "runs as the child of another test"]
fn plain_process() {
    if !is_child() {
        return;
    }
    let connection = Connection::open(variable("DB")).unwrap();
    speak(&format!("rows {}", seen(&connection)));
    while hear() != "close" {
        speak(&format!("rows {}", seen(&connection)));
    }
    connection.close().unwrap();
    speak("closed");
    hear();
}

/// Rows of the table; -1: there is none.
fn seen(connection: &Connection) -> i64 {
    let there = "SELECT count(*) FROM sqlite_schema WHERE name = 't'";
    match connection.query_row(there, [], |row| row.get::<_, i64>(0)).unwrap() == 1 {
        true => connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap(),
        false => -1,
    }
}

/// Two connections that others hold: one in this process, one in another.
struct Others {
    here: Connection,
    there: Process,
}

impl Others {
    fn open(path: &Path, sql: &str, rows: i64) -> Others {
        let here = Connection::open(path).unwrap();
        here.execute_batch(sql).unwrap();
        let there = Process::start(plain_process, &[("DB", path.to_str().unwrap())]);
        assert_eq!((there.expect("rows"), seen(&here)), (format!("rows {rows}"), rows));
        Others { here, there }
    }

    fn see(&mut self) -> (i64, i64) {
        self.there.say("look");
        let there = self.there.expect("rows");
        (seen(&self.here), there.strip_prefix("rows ").unwrap().parse().unwrap())
    }

    /// As an application's pool does: without anything that keeps the last one from deleting the
    /// WAL.
    fn close(mut self) {
        self.there.say("close");
        self.there.expect("closed");
        self.here.close().unwrap();
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    PathBuf::from(format!("{}{end}", path.display()))
}

#[cfg(unix)]
fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}

fn lost(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(beside(path, "-replite/lost")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A primary's database with pages of this size, closed.
fn make_primary(path: &Path, page_size: u32) {
    let connection = Connection::open(path).unwrap();
    connection.pragma_update(None, "page_size", page_size).unwrap();
    connection.execute_batch(SCHEMA).unwrap();
}

async fn settle(p: &Db, r: &Db, rows: i64) {
    let mut last = None;
    for n in 0..rows {
        last = Some(insert(p, "w", n).await);
    }
    within("the rows", r.wait_for_timeout(last.unwrap(), LIMIT)).await.unwrap();
}

/// The fill put another file in the place of the one that they had open. They read the dead one for
/// ever, and as the last of it to close they deleted the replica's WAL.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_opened_the_path_before_the_fill_sees_it_come() {
    for before in [Some(""), Some("SELECT * FROM sqlite_schema"), Some("PRAGMA journal_mode = WAL"), None] {
        let dir = tempfile::tempdir().unwrap();
        let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
        let opened = before.map(|sql| Others::open(&r, sql, -1));
        let target = Db::open(replica(&r, &format!("http://127.0.0.1:{port}"))).await.unwrap();
        let mut others = opened.unwrap_or_else(|| Others::open(&r, "", -1));
        let inode_before = inode(&r);
        // The path is claimed: nobody writes what the fill would replace.
        others.here.busy_timeout(std::time::Duration::ZERO).unwrap();
        others.here.execute_batch("CREATE TABLE mine(a)").unwrap_err();
        assert!(matches!(target.read(|_| Ok::<_, Error>(())), Err(Error::NoState(_))));

        let source = Db::open(primary(&p, port)).await.unwrap();
        settle(&source, &target, 300).await;
        assert_eq!(others.see(), (300, 300), "{before:?}");
        settle(&source, &target, 10).await;
        assert_eq!(others.see(), (310, 310), "{before:?}");
        assert_eq!(inode(&r), inode_before, "{before:?}");
        let wal = inode(&beside(&r, "-wal"));
        others.close();
        assert_eq!(inode(&beside(&r, "-wal")), wal, "{before:?}: the live WAL is gone");
        settle(&source, &target, 10).await;
        assert_same_pages(&p, &r);
        assert!(target.verify().await.unwrap().holds());
        assert_eq!(lost(&r), Vec::<PathBuf>::new());
        assert!(!beside(&r, "-replite/incoming").exists());
        target.shutdown().await;
        // The file alone is a state: should somebody delete the WAL, the log leads on from it.
        for end in ["-wal", "-shm"] {
            fs::remove_file(beside(&r, end)).unwrap();
        }
        let target = Db::open(replica(&r, "http://127.0.0.1:1")).await.unwrap();
        assert_eq!(target.position(), source.position(), "{before:?}");
        target.shutdown().await;
        source.shutdown().await;
    }
}

/// Pages of another size are put there while nobody else has the file open; until then the node
/// says what it waits for.
#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_of_another_page_size_fills_the_path_when_nobody_else_has_it() {
    for page_size in [512, 16_384] {
        let dir = tempfile::tempdir().unwrap();
        let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
        make_primary(&p, page_size);
        let mut others = Others::open(&r, "", -1);
        let inode_before = inode(&r);
        let url = format!("http://127.0.0.1:{port}");
        let target = Db::open(replica(&r, &url)).await.unwrap();
        // Who looked at nothing but an empty file has nothing open that could be taken away.
        assert_eq!(others.see(), (-1, -1));
        let source = Db::open(primary(&p, port)).await.unwrap();
        for n in 0..100 {
            insert(&source, "w", n).await;
        }
        let problem = || target.status().problem.unwrap_or_default();
        until("a problem", || problem().contains("connections are closed"));
        assert_eq!(others.see(), (-1, -1));
        // All of them must.
        let Others { here, mut there } = others;
        here.close().unwrap();
        there.say("close");
        there.expect("closed");
        within("the fill", target.ready()).await.unwrap();
        settle(&source, &target, 10).await;
        let mut others = Others::open(&r, "", 110);
        settle(&source, &target, 10).await;
        assert_eq!(others.see(), (120, 120));
        others.close();
        settle(&source, &target, 10).await;
        assert_same_pages(&p, &r);
        assert_eq!(inode(&r), inode_before);
        assert_eq!(lost(&r), Vec::<PathBuf>::new());
        // That nobody was there before is over once the stream goes on.
        until("no problem", || target.status().problem.is_none());
        target.shutdown().await;
        source.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_opened_again_claims_its_path_with_the_primarys_page_size() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    make_primary(&p, 1024);
    let source = Db::open(primary(&p, 0)).await.unwrap();
    let url = source.node().addresses.replication.clone();
    let target = Db::open(replica(&r, "http://127.0.0.1:1")).await.unwrap();
    let others = Others::open(&r, "", -1);
    target.shutdown().await;
    let target = Db::open(replica(&r, &url)).await.unwrap();
    let problem = || target.status().problem.unwrap_or_default();
    until("a problem", || problem().contains("connections are closed"));
    target.shutdown().await;
    others.close();
    let target = Db::open(replica(&r, "http://127.0.0.1:1")).await.unwrap();
    // Who comes now is in nobody's way.
    let mut others = Others::open(&r, "", -1);
    target.shutdown().await;
    let target = Db::open(replica(&r, &url)).await.unwrap();
    settle(&source, &target, 10).await;
    assert_eq!(others.see(), (10, 10));
    others.close();
    assert_same_pages(&p, &r);
    target.shutdown().await;
    source.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_database_of_another_page_size_is_kept_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let foreign = Connection::open(&r).unwrap();
    foreign
        .execute_batch("PRAGMA page_size = 1024; PRAGMA journal_mode = WAL; CREATE TABLE mine(a); INSERT INTO mine VALUES ('precious')")
        .unwrap();
    let source = Db::open(primary(&p, 0)).await.unwrap();
    let target = Db::open(replica(&r, &source.node().addresses.replication)).await.unwrap();
    let mut events = target.events();
    within("a snapshot", async {
        while !matches!(events.next().await, Some(Event::SnapshotStarted { .. })) {}
    })
    .await;
    // It is not taken away from who has it.
    assert_eq!(
        foreign.query_row("SELECT a FROM mine", [], |row| row.get::<_, String>(0)).unwrap(),
        "precious"
    );
    drop(foreign);
    within("the fill", target.ready()).await.unwrap();
    settle(&source, &target, 10).await;
    assert_same_pages(&p, &r);
    let kept = target.lost().await.unwrap();
    assert_eq!((kept.len(), &kept[0].kind), (1, &LostKind::Database), "{kept:?}");
    let mine = plain(&kept[0].path.join("r.db"));
    assert_eq!(mine.query_row("SELECT a FROM mine", [], |row| row.get::<_, String>(0)).unwrap(), "precious");
    target.shutdown().await;
    source.shutdown().await;
}
