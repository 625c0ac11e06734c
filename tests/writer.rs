//! What the writer calls its commits, whatever an application does with its connection.

use replite::{Commit, Config, ConnectionKind, Db, Error, Txid};

async fn open(dir: &std::path::Path) -> Db {
    let aux = rusqlite::Connection::open(dir.join("aux.db")).unwrap();
    aux.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE a(x)").unwrap();
    let attach = format!("ATTACH '{}' AS aux", dir.join("aux.db").display());
    let config = Config::new(dir.join("app.db"))
        .on_connect(move |conn, kind| match kind {
            ConnectionKind::Writer => conn.execute_batch(&attach),
            _ => Ok(()),
        })
        .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS main.t(x)"));
    Db::open(config).await.unwrap()
}

async fn run(db: &Db, sql: &'static str) -> Option<Txid> {
    let commit = db.write(move |tx| Ok::<_, Error>(tx.execute_batch(sql)?)).await.unwrap();
    let Commit { txid, .. } = commit;
    if let Some(txid) = txid {
        db.wait_for(txid).await.unwrap();
        assert!(db.position().unwrap().number() >= txid.number());
    }
    txid
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_to_an_attached_database_alone_is_none_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path()).await;
    let first = run(&db, "INSERT INTO t VALUES (1)").await.unwrap().number();
    for _ in 0..3 {
        assert_eq!(run(&db, "INSERT INTO aux.a VALUES (1)").await, None);
    }
    assert_eq!(
        run(&db, "INSERT INTO t VALUES (2); INSERT INTO aux.a VALUES (2)").await.unwrap().number(),
        first + 1
    );
    assert_eq!(run(&db, "INSERT INTO t VALUES (3)").await.unwrap().number(), first + 2);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_inside_of_a_closure_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path()).await;
    let first = run(&db, "INSERT INTO t VALUES (1)").await.unwrap().number();
    let several =
        "INSERT INTO t VALUES (2); COMMIT; INSERT INTO t VALUES (3); BEGIN; INSERT INTO t VALUES (4)";
    assert_eq!(run(&db, several).await.unwrap().number(), first + 3);
    assert_eq!(run(&db, "INSERT INTO t VALUES (5)").await.unwrap().number(), first + 4);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_came_between_a_rollback_and_a_new_begin_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path()).await;
    let first = run(&db, "INSERT INTO t VALUES (1)").await.unwrap().number();
    let path = db.path().to_path_buf();
    let write = db.write(move |tx| {
        tx.execute_batch("ROLLBACK")?;
        rusqlite::Connection::open(&path)?.execute_batch("INSERT INTO t VALUES (2)")?;
        tx.execute_batch("BEGIN IMMEDIATE; INSERT INTO t VALUES (3)")?;
        Ok::<_, Error>(())
    });
    let txid = write.await.unwrap().txid.unwrap();
    assert_eq!(txid.number(), first + 2);
    assert_eq!(run(&db, "INSERT INTO t VALUES (4)").await.unwrap().number(), first + 3);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_handle_may_be_dropped_inside_of_a_write() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path()).await;
    let (begin, begun) = std::sync::mpsc::channel();
    let (inside, last) = (db.clone(), db.clone());
    let write = tokio::spawn(async move {
        let done = last.write(move |tx| {
            begun.recv().unwrap();
            tx.execute("INSERT INTO t VALUES (1)", [])?;
            drop(inside);
            Ok::<_, Error>(())
        });
        // Dropped after the job was queued: nobody waits for its result.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(200), done).await;
    });
    write.await.unwrap();
    drop(db);
    begin.send(()).unwrap();
    let again = tokio::time::timeout(std::time::Duration::from_secs(20), async {
        loop {
            match Db::open(Config::new(dir.path().join("app.db"))).await {
                Ok(db) => break db,
                Err(Error::AlreadyOpen { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    });
    let again = again.await.expect("the writer's thread waits for itself");
    again.shutdown().await;
}
