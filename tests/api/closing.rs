//! How a database is closed, whoever drops what and when.

use std::future::{Future, poll_fn};
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::mpsc::{Sender, channel};
use std::task::Poll;
use std::time::Duration;

use crate::support::*;
use replite::{Config, Db, Error, Role};

async fn open(path: &Path) -> Db {
    Db::open(Config::new(path).migrate(|c| c.execute_batch(SCHEMA))).await.unwrap()
}

async fn is_pending<F: Future>(mut future: Pin<&mut F>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

/// A write that has begun, and ends when the sender is dropped. It keeps no handle.
async fn hold_writer(db: &Db) -> Sender<()> {
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (end, may_end) = channel::<()>();
    let mut write = Box::pin(db.write(move |tx| {
        begun.send(()).unwrap();
        let _ = may_end.recv();
        Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES ('held')", [])?)
    }));
    tokio::select! {
        _ = &mut write => panic!("it ended by itself"),
        begun = has_begun => begun.unwrap(),
    }
    end
}

#[tokio::test]
async fn a_shutdown_whose_future_is_dropped_goes_on_and_every_caller_waits_for_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let db = open(&path).await;
    let end = hold_writer(&db).await;
    {
        let mut dropped = pin!(db.shutdown());
        assert!(is_pending(dropped.as_mut()).await);
    }
    let (one, two) = (db.clone(), db.clone());
    let (one, two) = (tokio::spawn(async move { one.shutdown().await }), async move { two.shutdown().await });
    let mut two = Box::pin(two);
    assert!(is_pending(two.as_mut()).await && !one.is_finished(), "the write is not over");
    // Whoever opens the file anew waits, too, and is not told that it is open.
    let again = tokio::spawn({
        let path = path.clone();
        async move { open(&path).await }
    });
    drop(end);
    within("the shutdowns", async {
        one.await.unwrap();
        two.await;
    })
    .await;
    assert_eq!(db.role(), Role::Stopped);
    let again = within("the second opening", again).await.unwrap();
    assert_eq!(count(&again), 1, "what had begun was committed");
    again.shutdown().await;
}

#[test]
fn the_last_handle_dropped_on_a_runtime_holds_up_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let (done, is_done) = channel();
    let runs = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let db = open(&path).await;
            let end = hold_writer(&db).await;
            // To wait here for the write would be to wait for ever: it ends after this.
            drop(db);
            let mut again = Box::pin(open(&path));
            assert!(is_pending(again.as_mut()).await);
            drop(end);
            let again = within("the second opening", again).await;
            assert_eq!(count(&again), 1);
        });
        done.send(()).unwrap();
    });
    is_done.recv_timeout(LIMIT).expect("the runtime's thread stands still");
    runs.join().unwrap();
}

#[test]
fn a_runtime_that_ends_takes_no_shutdown_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let db = runtime.block_on(async {
        let db = open(&path).await;
        let mut dropped = pin!(db.shutdown());
        let _ = is_pending(dropped.as_mut()).await;
        db.clone()
    });
    drop(runtime);
    let other = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    other.block_on(async {
        within("the shutdown", db.shutdown()).await;
        assert!(matches!(db.read(|_| Ok::<_, Error>(())), Err(Error::ShutDown)));
        within("the second opening", open(&path)).await.shutdown().await;
    });
}

#[tokio::test]
async fn writes_that_nobody_polls_any_more_do_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("app.db")).write_queue(1);
    let db = Db::open(config.migrate(|c| c.execute_batch(SCHEMA))).await.unwrap();
    let end = hold_writer(&db).await;
    let mut queued: Vec<_> = (0..4).map(|_| Box::pin(db.write(|_| Ok::<_, Error>(())))).collect();
    for write in &mut queued {
        assert!(is_pending(write.as_mut()).await);
    }
    let mut shutdown = Box::pin(db.shutdown());
    assert!(is_pending(shutdown.as_mut()).await);
    // Begun before the end, so that what was queued is refused or done, as it comes.
    drop(end);
    within("the end", shutdown).await;
    for write in queued {
        let done = within("an answer", write).await;
        assert!(matches!(done, Ok(_) | Err(Error::ShutDown)), "{done:?}");
    }
}

/// What this process has open below a directory.
#[cfg(target_os = "linux")]
fn open_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let dir = dir.canonicalize().unwrap();
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()).filter(|p| p.starts_with(&dir)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[cfg(target_os = "linux")]
async fn a_handle_that_outlives_the_shutdown_keeps_no_file_open() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let r = Db::open(replica(&dir.path().join("r.db"), &p.node().addresses.replication)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    insert(&p, "x", 1).await;
    assert_eq!(count(&p), 1);
    let service = p.service();
    assert!(open_files(dir.path()).len() > 10);
    within("shutdown", async {
        r.shutdown().await;
        p.shutdown().await;
    })
    .await;
    assert_eq!(open_files(dir.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(p.status().role, Role::Stopped);
    assert!(!p.health().live);
    drop(service);
    assert!(tokio::time::timeout(Duration::from_secs(1), p.draining()).await.is_ok());
}
