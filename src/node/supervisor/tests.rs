//! Nodes that change their roles.

mod changes;
mod fences;
mod handover;
mod hooks;

use std::path::Path;

use rusqlite::Transaction;

use super::*;
use crate::db::{Config, Db};
use crate::lease::Fixed;
use crate::secret::Secret;
use crate::txid::Txid;

const LIMIT: Duration = Duration::from_secs(20);

fn config(path: &Path) -> Config {
    let create = |conn: &mut rusqlite::Connection| {
        conn.execute_batch("CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY)")?;
        Ok::<_, Error>(())
    };
    Config::new(path)
        .database("notes")
        .secret(Secret::fixed([7; 32]))
        .listen(([127, 0, 0, 1], 0).into())
        .migrate(create)
}

fn endpoint(db: &Db) -> Endpoint {
    Endpoint::parse(&db.node().addresses.replication).unwrap()
}

/// Writes a row through whichever of the two is the primary by now.
async fn write(dbs: &[Db; 2]) -> Txid {
    loop {
        for db in dbs {
            let insert = |tx: &mut Transaction<'_>| {
                tx.execute("INSERT INTO t DEFAULT VALUES", []).map_err(Error::from)
            };
            match db.write(insert).await {
                Ok(commit) => return commit.txid.unwrap(),
                Err(Error::NotPrimary { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
        tokio::task::yield_now().await;
    }
}

/// A primary and its replica.
async fn pair(dir: &tempfile::TempDir) -> [Db; 2] {
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let follows = Fixed::replica_of(&one.node().addresses.replication);
    let two = Db::open(config(&dir.path().join("b.db")).lease(follows)).await.unwrap();
    two.ready().await.unwrap();
    [one, two]
}

fn rows(db: &Db) -> i64 {
    let count = |conn: &rusqlite::Connection| {
        Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?)
    };
    db.read(count).expect("no read fails")
}
