//! Which files are whose: a file is open once, snapshots replace nothing that is in use, and what
//! is refused is left as it was.
#![cfg(unix)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::*;
use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Unsupported};

async fn open(path: &Path) -> Db {
    Db::open(Config::new(path).migrate(|c| c.execute_batch(SCHEMA))).await.unwrap()
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn one_file_is_open_once_by_whatever_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    // Claimed before there is a file.
    let db = open(&path).await;
    fs::hard_link(&path, dir.path().join("hard.db")).unwrap();
    symlink(&path, dir.path().join("soft.db")).unwrap();
    symlink(dir.path(), dir.path().join("round")).unwrap();
    for name in ["app.db", "hard.db", "soft.db", "round/app.db", "round/round/hard.db"] {
        let twice = Db::open(Config::new(dir.path().join(name))).await;
        assert!(matches!(twice, Err(Error::AlreadyOpen { .. })), "{name}");
    }
    symlink(dir.path().join("nothing.db"), dir.path().join("dangling.db")).unwrap();
    let dangling = Db::open(Config::new(dir.path().join("dangling.db"))).await;
    assert!(matches!(dangling, Err(Error::Unsupported { reason: Unsupported::DanglingLink, .. })));
    assert!(!dir.path().join("nothing.db").exists());
    insert(&db, "still", 1).await;
    db.shutdown().await;
}

#[tokio::test]
async fn a_snapshot_replaces_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (db, other) = (open(&dir.path().join("a.db")).await, open(&dir.path().join("b.db")).await);
    insert(&db, "a", 1).await;
    db.wait_for(insert(&db, "a", 2).await).await.unwrap();
    fs::hard_link(dir.path().join("b.db"), dir.path().join("hard.db")).unwrap();
    symlink(dir.path().join("b.db"), dir.path().join("soft.db")).unwrap();
    let before = names(dir.path());
    for name in
        ["a.db", "b.db", "hard.db", "soft.db", "a.db-wal", "b.db-shm", "b.db-journal", "b.db-replite/node"]
    {
        let refused = db.snapshot_to(dir.path().join(name)).await;
        assert!(matches!(refused, Err(Error::Config(_))), "{name}: {refused:?}");
    }
    for left in ["copy.db-wal", "copy.db-journal"] {
        fs::write(dir.path().join(left), "of an earlier file").unwrap();
        let refused = db.snapshot_to(dir.path().join("copy.db")).await;
        assert!(matches!(refused, Err(Error::Config(why)) if why.contains(left)));
        fs::remove_file(dir.path().join(left)).unwrap();
    }
    assert_eq!(names(dir.path()), before, "nothing was left behind");
    db.snapshot_to(dir.path().join("copy.db")).await.unwrap();
    insert(&db, "a", 3).await;
    fs::write(dir.path().join("empty.db"), "").unwrap();
    fs::create_dir(dir.path().join("directory.db")).unwrap();
    symlink(dir.path().join("nowhere"), dir.path().join("dangling.db")).unwrap();
    let before = names(dir.path());
    for name in ["copy.db", "empty.db", "directory.db", "dangling.db"] {
        let refused = db.snapshot_to(dir.path().join(name)).await;
        assert!(matches!(&refused, Err(Error::FileExists { path }) if path.ends_with(name)), "{refused:?}");
    }
    assert_eq!(names(dir.path()), before, "nothing was left behind");
    let copy = Connection::open(dir.path().join("copy.db")).unwrap();
    assert_eq!(copy.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap(), 2);
    let missing = db.snapshot_to(dir.path().join("missing/copy.db")).await;
    assert!(matches!(missing, Err(Error::Io { .. })));
    insert(&other, "b", 1).await;
    assert_eq!((count(&db), count(&other)), (3, 1));
    // Once it is closed, its file is a file like others.
    other.shutdown().await;
    let closed = db.snapshot_to(dir.path().join("b.db")).await;
    assert!(matches!(closed, Err(Error::FileExists { .. })));
    db.shutdown().await;
}

#[tokio::test]
async fn what_is_refused_gets_no_directory_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let reader = Connection::open(&path).unwrap();
    reader.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1); BEGIN; SELECT * FROM t").unwrap();
    // Its journal mode can't be changed while somebody reads.
    let state = || (names(dir.path()), fs::metadata(&path).unwrap().modified().unwrap());
    let before = state();
    let refused = Db::open(Config::new(&path)).await;
    assert!(matches!(refused, Err(Error::Sqlite(_) | Error::Unsupported { .. })), "{refused:?}");
    assert_eq!(state(), before);
    reader.execute_batch("COMMIT").unwrap();
    drop(reader);
    let db = Db::open(Config::new(&path)).await.unwrap();
    assert!(dir.path().join("app.db-replite").is_dir());
    db.shutdown().await;
}
