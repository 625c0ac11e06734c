//! What a closure that is given to `write`, a guard and a migration may rely on.

use std::future::{Future, poll_fn};
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::task::Poll;
use std::time::Duration;

use crate::support::*;
use replite::rusqlite::{self, Transaction};
use replite::{Blame, Commit, Config, Db, Error, Txid, lease};

async fn open(path: &Path) -> Db {
    Db::open(Config::new(path).migrate(|c| c.execute_batch(SCHEMA))).await.unwrap()
}

fn add(tx: &mut Transaction<'_>) -> Result<usize, Error> {
    Ok(tx.execute("INSERT INTO t(who) VALUES ('x')", [])?)
}

/// Has the guard on a thread of its own until the sender is dropped.
async fn hold_guard(db: &Db) -> (std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>) {
    let (held, is_held) = tokio::sync::oneshot::channel();
    let (end, may_end) = channel::<()>();
    let db = db.clone();
    let thread = std::thread::spawn(move || {
        let guard = db.writer().unwrap();
        held.send(()).unwrap();
        let _ = may_end.recv();
        drop(guard);
    });
    is_held.await.unwrap();
    (end, thread)
}

#[tokio::test]
async fn a_write_that_is_dropped_before_it_starts_never_runs() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir.path().join("app.db")).await;
    let (release, holder) = hold_guard(&db).await;
    let ran = Arc::new(AtomicBool::new(false));
    {
        let flag = ran.clone();
        let mut write = pin!(db.write(move |tx| {
            flag.store(true, Ordering::SeqCst);
            add(tx)
        }));
        let queued = poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx).is_pending())).await;
        assert!(queued);
    }
    drop(release);
    holder.join().unwrap();
    // Behind it in the queue, so that it had its turn.
    db.write(add).await.unwrap();
    assert!(!ran.load(Ordering::SeqCst));
    assert_eq!(count(&db), 1);
    db.shutdown().await;
}

#[tokio::test]
async fn a_write_that_is_dropped_after_it_started_runs_to_its_end_and_commits() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir.path().join("app.db")).await;
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (end, may_end) = channel::<()>();
    {
        let mut write = Box::pin(db.write(move |tx| {
            begun.send(()).unwrap();
            let _ = may_end.recv();
            add(tx)
        }));
        tokio::select! {
            _ = &mut write => panic!("it ended by itself"),
            begun = has_begun => begun.unwrap(),
        }
    }
    drop(end);
    db.write(|_| Ok::<_, Error>(())).await.unwrap();
    assert_eq!(count(&db), 1);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_inside_a_write_is_told_for_one_database_and_works_for_another() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (open(&dir.path().join("a.db")).await, open(&dir.path().join("b.db")).await);
    let runtime = tokio::runtime::Handle::current();
    let nested = |a: Db, b: Db| {
        move |tx: &mut Transaction<'_>| {
            add(tx)?;
            b.write_blocking(|tx| {
                add(tx)?;
                let back = a.write_blocking(add);
                assert!(matches!(back, Err(Error::Reentrant)), "{back:?}");
                assert!(matches!(b.writer().err(), Some(Error::Reentrant)));
                Ok::<_, Error>(())
            })
        }
    };
    a.write(nested(a.clone(), b.clone())).await.unwrap();
    b.write(nested(b.clone(), a.clone())).await.unwrap();
    let (one, two) = (a.clone(), b.clone());
    tokio::task::spawn_blocking(move || {
        one.write_blocking(nested(one.clone(), two.clone())).unwrap();
        let guard = one.writer().unwrap();
        let asked = std::thread::scope(|s| {
            // Another thread just waits for its turn.
            let (waits, end) = (one.clone(), channel::<()>());
            s.spawn(move || {
                drop(end.0);
                waits.write_blocking(add).unwrap();
            });
            let _ = end.1.recv();
            let inside = one.write_blocking(add).err();
            drop(guard);
            inside
        });
        assert!(matches!(asked, Some(Error::Reentrant)));
        let guard = one.writer().unwrap();
        two.write_blocking(add).unwrap();
        let entered = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            runtime.block_on(async { one.write(add).await.err() })
        }));
        assert!(matches!(entered.unwrap(), Some(Error::Reentrant)), "it would wait for this very guard");
        drop(guard);
        one.write_blocking(add).unwrap();
    })
    .await
    .unwrap();
    assert_eq!((count(&a), count(&b)), (5, 4));
    a.shutdown().await;
    b.shutdown().await;
}

/// A value whose destructor panics where no other panic is under way.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("a destructor, on purpose");
        }
    }
}

/// An error that can't be made of ours.
#[derive(Debug)]
struct Brittle;

impl From<Error> for Brittle {
    fn from(_: Error) -> Brittle {
        panic!("a conversion, on purpose")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_writer_outlives_panics_of_destructors_and_conversions() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir.path().join("app.db")).await;
    // A conversion that panics where the closure's panic is to be told.
    let brittle = db.clone();
    let asked = tokio::spawn(async move {
        brittle.write(|_| -> Result<(), Brittle> { panic!("the closure, on purpose") }).await.map(drop)
    });
    assert!(asked.await.unwrap_err().is_panic(), "its own thread has the panic");
    for followed in [false, true] {
        // A value that nobody takes: its caller leaves while the closure runs.
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (gone, is_gone) = channel::<()>();
        let (go, may_go) = channel::<()>();
        let leaving = db.clone();
        let caller = tokio::spawn(async move {
            // Dropped after the future of the write.
            let _gone = gone;
            let _ = leaving
                .write(move |tx| {
                    begun.send(()).unwrap();
                    let _ = is_gone.recv();
                    let _ = may_go.recv();
                    add(tx)?;
                    Ok::<_, Error>(Bomb)
                })
                .await
                .map(std::mem::forget);
        });
        has_begun.await.unwrap();
        caller.abort();
        // With one behind it in the queue it is the other thread that has the value at the end.
        let mut behind = Box::pin(db.write(add));
        if followed {
            let queued = poll_fn(|cx| Poll::Ready(behind.as_mut().poll(cx).is_pending())).await;
            assert!(queued);
        }
        drop(go);
        within("the next write", behind).await.unwrap();
    }
    let (one, two) = tokio::join!(within("more", db.write(add)), within("more", db.write(add)));
    assert!(one.is_ok() && two.is_ok());
    assert_eq!(count(&db), 6);
    within("shutdown", db.shutdown()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_guard_changed_of_our_way_to_commit_is_set_right() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("app.db"))
        .migrate(|c| c.execute_batch(&format!("{SCHEMA}; PRAGMA synchronous = OFF; PRAGMA busy_timeout = 1")))
        .on_connect(|conn, _| conn.pragma_update(None, "synchronous", "FULL"));
    let db = Db::open(config).await.unwrap();
    let settings = |db: &Db| -> [i64; 3] {
        let guard = db.writer().unwrap();
        ["synchronous", "wal_autocheckpoint", "busy_timeout"]
            .map(|name| guard.pragma_query_value(None, name, |r| r.get(0)).unwrap())
    };
    let blocking = db.clone();
    tokio::task::spawn_blocking(move || {
        let before = settings(&blocking);
        assert_eq!(before, [2, 0, 5000], "as on_connect wanted it, whatever the migration did");
        let guard = blocking.writer().unwrap();
        guard.execute_batch("PRAGMA synchronous = OFF; PRAGMA wal_autocheckpoint = 1; BEGIN").unwrap();
        guard.busy_timeout(Duration::ZERO).unwrap();
        drop(guard);
        assert_eq!(settings(&blocking), before);
    })
    .await
    .unwrap();
    db.write(add).await.unwrap();
    db.shutdown().await;
}

#[derive(Debug, PartialEq, thiserror::Error)]
#[error("version 3 is missing")]
struct ToolError;

#[tokio::test]
async fn a_migration_fails_with_its_own_error_and_leaves_no_node_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.db");
    let failed = Db::open(Config::new(&path).migrate(|conn| {
        conn.execute_batch("CREATE TABLE half(a)")
            .map_err(Box::<dyn std::error::Error + Send + Sync>::from)?;
        Err::<(), Box<dyn std::error::Error + Send + Sync>>(ToolError.into())
    }));
    let Err(error @ Error::Migration(_)) = failed.await else { panic!("not a migration's error") };
    assert_eq!(error.blame(), Blame::Caller);
    let Error::Migration(source) = error else { unreachable!() };
    assert_eq!(source.downcast_ref(), Some(&ToolError));
    let left = Db::open(Config::new(&path).migrate(|conn| conn.execute_batch("BEGIN; CREATE TABLE more(a)")));
    assert!(matches!(left.await, Err(Error::Config(why)) if why.contains("transaction")));
    let panicked = Db::open(Config::new(&path).migrate(|_| -> Result<(), Error> { panic!("on purpose") }));
    assert!(matches!(panicked.await, Err(Error::Panicked(why)) if why == "on purpose"));
    let db = open(&path).await;
    let tables = |name: &'static str| db.read(|conn| Ok::<_, Error>(conn.table_exists(None, name)?)).unwrap();
    assert!(tables("half") && !tables("more"), "what was committed stays, what was open is rolled back");
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_has_its_place_in_history_when_open_returns_and_replicas_run_none() {
    let dir = tempfile::tempdir().unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let mut last: Option<Txid> = None;
    for round in 0..3 {
        let config = primary(&dir.path().join("p.db"), 0)
            .migrate(move |conn| conn.execute_batch(&format!("CREATE TABLE t{round}(a)")));
        let p = Db::open(config).await.unwrap();
        let position = p.position().unwrap();
        assert!(last.is_none_or(|last| position.number() > last.number()), "round {round}");
        p.wait_for_timeout(position.txid(), Duration::ZERO).await.unwrap();
        let done = p.write(|_| Ok::<_, Error>(())).await.unwrap();
        assert_eq!((done.txid, p.position()), (None, Some(position)), "nothing was left to be captured");
        last = Some(position.txid());
        let flag = ran.clone();
        let url = p.node().addresses.replication.clone();
        let config = replica(&dir.path().join("r.db"), &url).migrate(move |_| {
            flag.store(true, Ordering::SeqCst);
            Ok::<_, Error>(())
        });
        let r = Db::open(config).await.unwrap();
        let table = format!("t{round}");
        within("the schema", r.wait_until(move |conn| conn.table_exists(None, table.as_str())))
            .await
            .unwrap();
        r.shutdown().await;
        p.shutdown().await;
    }
    assert!(!ran.load(Ordering::SeqCst));
}

#[tokio::test]
async fn a_lost_primary_leaves_a_replica_fit_to_read_for_the_grace_time() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let open = |name: &str, grace| Db::open(replica(&dir.path().join(name), &url).grace(grace));
    let patient = open("a.db", Duration::from_secs(3600)).await.unwrap();
    let strict = open("b.db", Duration::from_millis(1)).await.unwrap();
    for r in [&patient, &strict] {
        within("ready", r.ready()).await.unwrap();
    }
    p.shutdown().await;
    for r in [&patient, &strict] {
        let mut roles = r.roles();
        within("the loss", roles.wait_for(|state| state.primary.is_none())).await.unwrap();
    }
    let health = patient.health();
    assert!(health.live && health.can_read && !health.can_write, "{health:?}");
    assert!(!health.reasons.is_empty());
    until("the grace time is over", || !strict.health().can_read);
    assert!(strict.health().live && patient.health().can_read);
    patient.shutdown().await;
    strict.shutdown().await;
}

#[test]
fn a_current_thread_runtime_has_room_for_everything() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
        let url = p.node().addresses.replication.clone();
        let config = replica(&dir.path().join("r.db"), &url).lease(lease::Fixed::replica_of(url.clone()));
        let r = Db::open(config).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        assert!(matches!(p.write_blocking(add), Err(Error::BlockingInAsync)));
        let writing = p.clone();
        let blocking = tokio::task::spawn_blocking(move || {
            writing.write_blocking(add)?;
            writing.writer()?.execute_batch("INSERT INTO t(who) VALUES ('guard')")?;
            writing.write_blocking(add)
        });
        let Commit { txid, .. } = within("blocking writes", blocking).await.unwrap().unwrap();
        within("wait_for", r.wait_for_timeout(txid.unwrap(), LIMIT)).await.unwrap();
        let rows = |conn: &rusqlite::Connection| conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0));
        let read: i64 = r.read_async(move |conn| Ok::<_, Error>(rows(conn)?)).await.unwrap();
        assert_eq!(read, 3);
        within("a snapshot", r.snapshot_to(dir.path().join("copy.db"))).await.unwrap();
        within("the end", async {
            r.drain().await;
            r.shutdown().await;
            p.shutdown().await;
        })
        .await;
    });
}

#[test]
fn the_future_of_a_handler_is_send() {
    fn is_handler<F: Future<Output = Result<i64, Error>> + Send + 'static>(_: impl Fn(Db) -> F) {}
    is_handler(|db| async move {
        let mut positions = db.watch();
        let commit = db.write(add).await?;
        db.wait_for(commit.txid.ok_or(Error::ShutDown)?).await?;
        let _ = positions.changed().await;
        db.wait_until(|conn| conn.table_exists(None, "t")).await?;
        tokio::select! {
            () = db.draining() => return Err(Error::ShutDown),
            ready = db.ready() => ready?,
        }
        let rows =
            db.read_async(|conn| Ok::<_, Error>(conn.query_row("SELECT 1", [], |r| r.get(0))?)).await?;
        db.snapshot_to("copy.db").await?;
        db.drain().await;
        db.shutdown().await;
        Ok(rows)
    });
}
