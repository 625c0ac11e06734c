//! What tests of forked histories share.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::fs;
use std::path::{Path, PathBuf};

use replite::{Config, Db, Event, Events, LostBranch, Position};

use crate::support::*;

/// Two homes of one database, on two sides of a fork.
pub(crate) struct Fork {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
}

impl Fork {
    pub(crate) fn new() -> Fork {
        Fork { dir: tempfile::tempdir().unwrap(), port: own_port() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.db"))
    }

    pub(crate) fn primary(&self, name: &str) -> Config {
        primary(&self.path(name), self.port)
    }

    /// Promoted by mistake: nobody can connect to it.
    pub(crate) fn alone(&self, name: &str) -> Config {
        primary(&self.path(name), 0)
    }

    pub(crate) fn replica(&self, name: &str) -> Config {
        replica(&self.path(name), &format!("http://127.0.0.1:{}", self.port))
    }

    /// A closed node's files become those of another node.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        let (from, to) = (self.path(from), self.path(to));
        let beside = |path: &Path, end: &str| PathBuf::from(format!("{}{end}", path.display()));
        fs::copy(&from, &to).unwrap();
        fs::copy(beside(&from, "-wal"), beside(&to, "-wal")).unwrap();
        copy_tree(&beside(&from, "-replite"), &beside(&to, "-replite"));
        fs::remove_file(beside(&to, "-replite").join("node")).unwrap();
    }
}

pub(crate) fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Waits for the end of a heal: the pages that came, and where the lost branch is kept.
pub(crate) async fn healed(events: &mut Events) -> (u64, Option<PathBuf>) {
    within("the heal", async {
        loop {
            match events.next().await {
                Some(Event::Healed { pages, lost, .. }) => return (pages, lost),
                Some(_) => {}
                None => panic!("the node ended"),
            }
        }
    })
    .await
}

pub(crate) async fn open(config: Config) -> Db {
    Db::open(config).await.unwrap()
}

pub(crate) async fn run(db: &Db, sql: String) {
    let db = db.clone();
    let run = move || {
        let mut guard = db.writer().unwrap();
        guard.execute_batch(&sql).unwrap();
        guard.flush().unwrap();
    };
    tokio::task::spawn_blocking(run).await.unwrap();
}

pub(crate) fn position(db: &Db) -> Position {
    db.position().unwrap()
}

pub(crate) async fn equal(p: &Db, r: &Db) {
    let last = insert(p, "last", 0).await;
    within("the last row", r.wait_for(last)).await.unwrap();
    // The replica may have it before the primary says so of itself.
    within("its own last row", p.wait_for(last)).await.unwrap();
    assert_same_pages(p.path(), r.path());
    assert_eq!(r.position(), p.position());
}

pub(crate) async fn only_branch(db: &Db) -> LostBranch {
    let all = db.lost().await.unwrap();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].branch().unwrap().clone()
}

/// A closed pair of equal nodes; the middle row lies in a page of the file that no WAL has any
/// more.
pub(crate) async fn equal_pair(fork: &Fork) {
    let (a, b) = (open(small_log(fork)).await, open(fork.replica("b")).await);
    let many = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 9000)
                INSERT INTO t(who, n, v) SELECT 'old', i, hex(randomblob(150)) FROM c";
    run(&a, many.into()).await;
    for n in 0..600 {
        insert(&a, "later", n).await;
    }
    equal(&a, &b).await;
    b.shutdown().await;
    a.shutdown().await;
}

/// A primary with many log segments.
pub(crate) fn small_log(fork: &Fork) -> Config {
    fork.primary("a").log_retention(16 << 20, std::time::Duration::from_secs(3600))
}

/// Flips a bit of the page of a file that has these bytes, as a disk does it: without a new
/// modification time.
pub(crate) fn flip_where(path: &Path, bytes: &[u8]) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut content = fs::read(path).unwrap();
    let at = content.windows(bytes.len()).position(|w| w == bytes).expect("the bytes are not in the file");
    content[at] ^= 1;
    fs::write(path, &content).unwrap();
    file.set_modified(modified).unwrap();
}

/// Flips a bit of an old row of an equal pair, in the file of one side.
pub(crate) fn flip_row(fork: &Fork, side: &str, id: i64) {
    let sound = plain(&fork.path(if side == "a" { "b" } else { "a" }));
    let value: String = sound.query_row("SELECT v FROM t WHERE id = ?1", [id], |r| r.get(0)).unwrap();
    flip_where(&fork.path(side), value.as_bytes());
}
