//! What the writer calls its commits, whatever an application does with its connection.

use crate::support::*;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_of_one_database_is_none_of_another_whose_write_is_around_it() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    std::fs::create_dir(&one).unwrap();
    std::fs::create_dir(&two).unwrap();
    let (a, b) = (open(&one).await, open(&two).await);
    // B's WAL is the longer one.
    for _ in 0..20 {
        run(&b, "INSERT INTO t VALUES (zeroblob(20000))").await;
    }
    let (outer, inner) = (a.clone(), b.clone());
    let blocking = tokio::task::spawn_blocking(move || {
        let nothing = outer.write_blocking(|_| {
            let mut guard = inner.writer()?;
            guard.execute_batch("INSERT INTO t VALUES (1)")?;
            // On another thread than the one that has the guard, too.
            let connection = &mut *guard;
            std::thread::scope(|scope| {
                scope.spawn(move || connection.execute_batch("INSERT INTO t VALUES (2)")).join().unwrap()
            })?;
            guard.flush()
        });
        let nothing = nothing.unwrap();
        assert_eq!(nothing.txid, None, "nothing was written to this one");
        assert!(nothing.value.is_some(), "but to the other");
        let both = outer.write_blocking(|tx| {
            inner.writer()?.execute_batch("INSERT INTO t VALUES (3)")?;
            tx.execute_batch("INSERT INTO t VALUES (1)")?;
            inner.writer()?.execute_batch("INSERT INTO t VALUES (4)")?;
            Ok::<_, Error>(())
        });
        both.unwrap().txid.unwrap()
    });
    let first = blocking.await.unwrap().number();
    assert_eq!(run(&a, "INSERT INTO t VALUES (2)").await.unwrap().number(), first + 1);
    a.shutdown().await;
    b.shutdown().await;
}

/// Writes one row after the other, until it is killed.
#[test]
#[ignore = "runs as the child of another test"]
fn process_that_writes() {
    if !is_child() {
        return;
    }
    let connection = plain(std::path::Path::new(&variable("DB")));
    speak("ready");
    loop {
        match connection.execute_batch("INSERT INTO t VALUES (1)") {
            Err(error) if error.sqlite_error_code() != Some(rusqlite::ErrorCode::DatabaseBusy) => {
                panic!("{error}")
            }
            // The others get the lock now and then.
            _ => std::thread::sleep(std::time::Duration::from_micros(300)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_has_its_own_number_while_another_process_writes_all_the_time() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(dir.path()).await;
    let process = Process::start(process_that_writes, &[("DB", db.path().to_str().unwrap())]);
    process.expect("ready");
    let begin = db.position().unwrap().number();
    let (mut last, end) = (0, std::time::Instant::now() + LIMIT);
    // Until the other process was in the way often enough: ours are as many as the rounds.
    for n in 0u64.. {
        if n >= 30 && last >= begin + n + 30 {
            break;
        }
        assert!(std::time::Instant::now() < end, "the other process hardly writes");
        // Told from those of the other process by the pages that it changes.
        let ours = match n % 3 {
            0 => "INSERT INTO t VALUES (zeroblob(200000))",
            // It ends its transaction, and begins another.
            1 => "INSERT INTO t VALUES (1); COMMIT; BEGIN IMMEDIATE; INSERT INTO t VALUES (zeroblob(200000))",
            _ => "",
        };
        let commit = loop {
            match db.write(move |tx| Ok::<_, Error>(tx.execute_batch(ours)?)).await {
                Err(Error::Busy { .. }) => {}
                Err(Error::Sqlite(error))
                    if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {}
                commit => break commit.unwrap(),
            }
        };
        let Some(txid) = commit.txid else {
            assert_eq!(ours, "", "it was written");
            continue;
        };
        assert_ne!(ours, "", "nothing was written: {txid} is somebody else's");
        assert!(txid.number() > last);
        last = txid.number();
        within("capture", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
        let before = Txid::new(txid.epoch(), last - 1);
        let logged = db.transactions(Some(before), 1).await.unwrap();
        assert_eq!(logged[0].position.txid(), txid);
        assert!(logged[0].changed_pages >= 48, "{txid} is somebody else's: {logged:?}");
    }
    process.kill();
    db.shutdown().await;
}
