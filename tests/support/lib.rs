//! What the cluster tests share: other processes, a TCP proxy that delays and cuts, comparisons.
#![allow(dead_code, unused_imports, reason = "each test binary uses its part of it")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Secret, Txid, lease};

/// The secret of all tests' clusters.
pub(crate) fn secret() -> Secret {
    Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap()
}

pub(crate) const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, who, n, v)";

/// A primary's configuration: small WAL, so that it is restarted often.
pub(crate) fn primary(path: &Path, port: u16) -> Config {
    Config::new(path)
        .database("app")
        .secret(secret())
        .wal_limit(256 * 1024)
        .listen(SocketAddr::from(([127, 0, 0, 1], port)))
        .migrate(|conn| conn.execute_batch(SCHEMA))
}

pub(crate) fn replica(path: &Path, url: &str) -> Config {
    Config::new(path)
        .database("app")
        .secret(secret())
        .wal_limit(256 * 1024)
        .lease(lease::Fixed::replica_of(url))
}

/// Where a node with a listener of its own listens, by its URL.
pub(crate) fn address(url: &str) -> SocketAddr {
    url.split('/').nth(2).unwrap().parse().unwrap()
}

pub(crate) async fn insert(db: &Db, who: &'static str, n: i64) -> Txid {
    let commit = db
        .write(move |tx| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(200))", (who, n))?)
        })
        .await
        .unwrap();
    commit.txid.unwrap()
}

pub(crate) fn count(db: &Db) -> i64 {
    db.read(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?)).unwrap()
}

pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

/// Waits for a condition that nothing announces.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A plain connection that knows nothing of us, but that it leaves the WAL alone when it is the
/// last to close: a node that was killed may have commits there that its log does not have yet.
pub(crate) fn plain(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(20)).unwrap();
    connection
        .set_db_config(replite::rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
        .unwrap();
    connection
}

/// All pages of a database as plain SQLite reads them, after it found them whole.
pub(crate) fn image(path: &Path) -> Vec<u8> {
    #[allow(unused_mut, reason = "some versions of rusqlite serialize a shared connection")]
    let mut connection = plain(path);
    let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok", "{}", path.display());
    connection.serialize("main").unwrap().to_vec()
}

pub(crate) fn assert_same_pages(one: &Path, other: &Path) {
    let (a, b) = (image(one), image(other));
    assert_eq!(a.len(), b.len(), "sizes differ");
    if let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) {
        panic!("the databases differ at byte {at} of {}", a.len());
    }
}

mod ends;
#[path = "../../src/testing/link.rs"]
mod link;
mod ports;
mod process;

pub(crate) use ends::{Ends, LIMIT, comes};
pub(crate) use ports::{own_port, three_ports};
pub(crate) use process::*;

/// A TCP proxy on loopback that delays each piece of data, and cuts connections when told to.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    link: link::Link,
}

impl Wire {
    pub(crate) async fn start(to: SocketAddr, delay: Duration) -> Wire {
        let link = link::Link::start(to, delay).await.unwrap();
        Wire { address: link.address, link }
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.link.cut();
    }

    /// So many bytes a second come through, either way.
    pub(crate) fn throttle(&self, rate: u64) {
        self.link.throttle(Some(rate));
    }

    /// As many as come, again.
    pub(crate) fn let_through(&self) {
        self.link.throttle(None);
    }

    /// Whether new connections are let in.
    pub(crate) fn let_in(&self, yes: bool) {
        self.link.let_in(yes);
    }
}
