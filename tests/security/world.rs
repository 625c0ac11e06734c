//! A primary with both of its doors, replicas that come through a relay, and what holds for them
//! whatever the relay does.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use axum::Router;
use replite::{Config, Db, Error, Txid};

use crate::relay::Relay;
use crate::support::*;

/// What the attacker puts where he can.
pub(crate) const MARK: &[u8] = b"ATTACKER";
/// What is in each row.
pub(crate) const ROW: &str = "no eye on the path sees this row";
/// What each database file begins with.
const FILE_BEGINS: &[u8] = b"SQLite format 3";

/// How a replica comes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Door {
    /// The own listener: TLS from the first byte.
    Own,
    /// An endpoint in an axum server: TLS inside of the bodies of one HTTP/2 exchange.
    Mounted,
}

pub(crate) const DOORS: [Door; 2] = [Door::Own, Door::Mounted];

impl Door {
    pub(crate) fn url(self, address: SocketAddr) -> String {
        match self {
            Door::Own => format!("replite://{address}"),
            Door::Mounted => format!("http://{address}/_replite"),
        }
    }
}

/// Where a URL leads.
pub(crate) fn address_of(url: &str) -> SocketAddr {
    url.split("://").nth(1).unwrap().split('/').next().unwrap().parse().unwrap()
}

/// Serves a node's endpoint as an application does.
pub(crate) async fn mount(db: &Db) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().nest_service("/_replite", db.service());
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

/// A primary, all of whose rows are numbered.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) primary: Db,
    own: SocketAddr,
    mounted: SocketAddr,
    next: Arc<AtomicI64>,
}

impl World {
    pub(crate) async fn new() -> World {
        World::with(|config| config).await
    }

    pub(crate) async fn with(change: impl Fn(Config) -> Config) -> World {
        let dir = tempfile::tempdir().unwrap();
        let primary = Db::open(change(primary(&dir.path().join("p.db"), 0))).await.unwrap();
        let own = address_of(&primary.node().addresses.replication);
        let mounted = mount(&primary).await;
        let world = World { dir, primary, own, mounted, next: Arc::default() };
        world.write(20).await;
        world
    }

    pub(crate) fn at(&self, door: Door) -> SocketAddr {
        match door {
            Door::Own => self.own,
            Door::Mounted => self.mounted,
        }
    }

    pub(crate) async fn relay(&self, door: Door) -> Relay {
        Relay::start(self.at(door)).await
    }

    pub(crate) fn config(&self, name: &str, door: Door, relay: &Relay) -> Config {
        replica(&self.dir.path().join(name), &door.url(relay.address))
    }

    /// A replica, however far it gets.
    pub(crate) async fn replica(&self, name: &str, door: Door, relay: &Relay) -> Db {
        Db::open(self.config(name, door, relay)).await.unwrap()
    }

    /// One row in a transaction of its own, so often.
    pub(crate) async fn write(&self, rows: usize) -> Txid {
        let mut last = None;
        for _ in 0..rows {
            last = write_row(&self.primary, &self.next).await;
        }
        last.unwrap()
    }

    /// Writes until it is dropped.
    pub(crate) fn writer(&self) -> Writer {
        let (db, next, stop) = (self.primary.clone(), self.next.clone(), Arc::<AtomicBool>::default());
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) && write_row(&db, &next).await.is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Writer { stop, task: Some(task) }
    }

    /// The replica has what the primary has.
    pub(crate) async fn level(&self, replica: &Db) {
        let txid = self.write(1).await;
        within("the newest row", replica.wait_for_timeout(txid, LIMIT)).await.unwrap();
    }

    /// Ends all nodes, and looks at what they leave.
    pub(crate) async fn end(self, replicas: Vec<Db>, relays: &[&Relay]) {
        let mut paths = Vec::new();
        for replica in &replicas {
            within("a state", replica.ready()).await.unwrap();
        }
        // One row for all: one for each would leave the others a row short.
        let last = self.write(1).await;
        for replica in &replicas {
            within("the last row", replica.wait_for_timeout(last, LIMIT)).await.unwrap();
        }
        for replica in replicas {
            paths.push(replica.path().to_owned());
            assert!(replica.lost().await.unwrap().is_empty(), "something was led astray");
            replica.shutdown().await;
        }
        let rows = self.next.load(Ordering::SeqCst);
        assert_eq!(count(&self.primary), rows, "a row was added or lost");
        assert!(self.primary.lost().await.unwrap().is_empty());
        self.primary.shutdown().await;
        for path in paths {
            assert_prefix(self.primary.path(), &path);
            assert_same_pages(self.primary.path(), &path);
        }
        assert_no_mark(self.dir.path());
        relays.iter().for_each(|relay| assert_nothing_seen(relay));
    }
}

async fn write_row(db: &Db, next: &AtomicI64) -> Option<Txid> {
    let n = next.fetch_add(1, Ordering::SeqCst);
    let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
        let sql = "INSERT INTO t(id, who, n, v) VALUES (?2 + 1, ?1, ?2, randomblob(200))";
        Ok::<_, Error>(tx.execute(sql, (ROW, n))?)
    };
    db.write(insert).await.unwrap().txid
}

/// Writes in the background.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Writer {
    pub(crate) async fn end(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.take().unwrap().await.unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Each node's file is whole, and what it has is what the primary had at some commit.
pub(crate) fn assert_prefix(primary: &Path, other: &Path) {
    let rows = |path: &Path| -> Vec<(i64, String, Vec<u8>)> {
        image(path);
        let connection = plain(path);
        let mut select = connection.prepare("SELECT n, who, v FROM t ORDER BY id").unwrap();
        let rows = select.query_map([], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?))).unwrap();
        rows.map(Result::unwrap).collect()
    };
    let (all, some) = (rows(primary), rows(other));
    assert!(some.len() <= all.len());
    assert!(all.iter().zip(&some).all(|(a, b)| a == b), "{} has other rows", other.display());
    assert!(some.iter().zip(0..).all(|(row, n)| row.0 == n));
}

fn has(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}

/// No file below the directory has anything of the attacker's.
pub(crate) fn assert_no_mark(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            assert_no_mark(&path);
        } else {
            assert!(!has(&std::fs::read(&path).unwrap(), MARK), "{}", path.display());
        }
    }
}

/// No row passed in the clear, and no page.
pub(crate) fn assert_nothing_seen(relay: &Relay) {
    for passed in relay.passed() {
        for bytes in [passed.up, passed.down] {
            assert!(!has(&bytes, ROW.as_bytes()) && !has(&bytes, FILE_BEGINS), "seen in the clear");
        }
    }
}

/// What the node says to be wrong, once it says something.
pub(crate) async fn says(db: &Db, what: &str) -> String {
    says_with(db, "", what).await
}

/// The same with a word in it.
pub(crate) async fn says_with(db: &Db, word: &str, what: &str) -> String {
    let mut said = None;
    comes(what, || {
        said = db.status().problem.filter(|problem| problem.contains(word));
        said.is_some()
    })
    .await;
    said.unwrap()
}
