//! Whole nodes whose lease is in an object.

use std::path::Path;
use std::time::Duration;

use replite::lease::ObjectStore;
use replite::{Config, Db, Error, Role, Secret, Txid};
use replite_stores::s3::{BUCKET, Fault, Rule, S3Server};

/// For all that has an end: these machines may be busy.
const LIMIT: Duration = Duration::from_secs(60);
const LEASE_TIME: Duration = Duration::from_secs(2);

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

async fn comes(what: &str, done: impl Fn() -> bool) {
    within(what, async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn open(server: &S3Server, path: &Path) -> Db {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let store = ObjectStore::with_options(&format!("s3://{BUCKET}/app"), server.options()).unwrap();
    let config = Config::new(path)
        .database("app")
        .secret(Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap())
        .listen("127.0.0.1:0".parse().unwrap())
        .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)"))
        .lease(store)
        .lease_time(LEASE_TIME)
        .bootstrap(2);
    Db::open(config).await.unwrap()
}

async fn leader(dbs: &[Db]) -> usize {
    comes("a primary", || dbs.iter().any(|db| db.role() == Role::Primary)).await;
    dbs.iter().position(|db| db.role() == Role::Primary).unwrap()
}

/// Writes through whichever leads.
async fn write(dbs: &[Db]) -> Txid {
    within("a write", async {
        loop {
            for db in dbs {
                let insert = |tx: &mut replite::rusqlite::Transaction<'_>| {
                    Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (1)", [])?)
                };
                match db.write(insert).await {
                    Ok(commit) => return commit.txid.unwrap(),
                    Err(Error::NotPrimary { .. } | Error::ShutDown) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

fn rows(db: &Db) -> i64 {
    db.read(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_goes_and_comes_back_and_then_the_primary_goes() {
    let server = S3Server::start(Path::new(env!("CARGO_BIN_EXE_s3-server"))).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut dbs = Vec::new();
    for name in ["a", "b"] {
        dbs.push(open(&server, &dir.path().join(name).join("app.db")).await);
    }
    for db in &dbs {
        within("a state", db.ready()).await.unwrap();
    }
    write(&dbs).await;
    // It answers with errors, or with nothing: the primary stops, reads go on, and all comes back.
    for fault in [Fault::Answer { status: 500, code: "InternalError".into() }, Fault::Hang] {
        leader(&dbs).await;
        server.fault(Rule::all(fault)).await.unwrap();
        comes("no primary", || dbs.iter().all(|db| db.role() != Role::Primary)).await;
        for db in &dbs {
            assert!(rows(db) > 0);
        }
        server.calm().await.unwrap();
        write(&dbs).await;
    }
    // Both have all of it. The other one takes over.
    let txid = write(&dbs).await;
    for db in &dbs {
        within("the transaction", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
    }
    let gone = dbs.remove(leader(&dbs).await);
    within("the end", gone.shutdown()).await;
    write(&dbs).await;
    assert_eq!(rows(&dbs[0]), 5);
}
