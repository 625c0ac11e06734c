//! An application that turns SQLite's shared cache on for the whole process.

use std::sync::mpsc::channel;

use replite::{Config, Db, Error};

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_a_node_share_no_cache() {
    if !alone(connections_of_a_node_share_no_cache) {
        return;
    }
    // SAFETY: no connection is open.
    unsafe { replite::rusqlite::ffi::sqlite3_enable_shared_cache(1) };
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("a.db"))
        .migrate(|conn| conn.execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1)"));
    let db = Db::open(config).await.unwrap();
    let (begun, has_begun) = channel();
    let (end, may_end) = channel::<()>();
    let writing = db.clone();
    let write = tokio::spawn(async move {
        let run = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            tx.execute_batch("INSERT INTO t VALUES (2)")?;
            begun.send(()).unwrap();
            // Or the test has ended.
            let _ = may_end.recv();
            Ok::<_, Error>(())
        };
        writing.write(run).await
    });
    has_begun.recv().unwrap();
    let rows =
        db.read(|conn| Ok::<i64, Error>(conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?));
    assert_eq!(rows.unwrap(), 1, "readers neither wait for a writer nor see what it has not committed");
    end.send(()).unwrap();
    assert!(write.await.unwrap().unwrap().txid.is_some());
    assert!(db.verify().await.unwrap().holds());
    db.shutdown().await;
}
