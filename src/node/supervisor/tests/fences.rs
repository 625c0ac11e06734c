//! What is under way when a primary's time is over.

use std::sync::mpsc;

use super::*;
use crate::ends::comes;
use crate::fence::boot_time;

/// A primary whose time ends, if no one ends it before, in an hour.
async fn leased(dir: &tempfile::TempDir) -> Db {
    let db = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    db.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
    db
}

fn insert(tx: &mut Transaction<'_>) -> Result<usize> {
    Ok(tx.execute("INSERT INTO t DEFAULT VALUES", [])?)
}

/// Tells on which thread it was dropped.
struct Dropped(mpsc::Sender<std::thread::ThreadId>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _ = self.0.send(std::thread::current().id());
    }
}

fn not_primary<T>(done: &Result<T>) -> bool {
    matches!(done, Err(Error::NotPrimary { .. }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_runs_across_the_fence_commits_nothing_and_those_behind_it_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let db = leased(&dir).await;
    let (begun, has_begun) = mpsc::channel();
    let (goes_on, may_go_on) = mpsc::channel::<()>();
    let runs = {
        let db = db.clone();
        tokio::spawn(async move {
            let closure = move |tx: &mut Transaction<'_>| {
                insert(tx)?;
                begun.send(()).unwrap();
                may_go_on.recv().unwrap();
                Ok::<_, Error>(())
            };
            db.write(closure).await
        })
    };
    tokio::task::block_in_place(|| has_begun.recv().unwrap());
    let (tell, dropped) = mpsc::channel();
    let waits = {
        let (db, tells) = (db.clone(), Dropped(tell));
        let closure = move |tx: &mut Transaction<'_>| {
            let _of_the_application = &tells;
            insert(tx)
        };
        tokio::spawn(async move { db.write(closure).await })
    };
    let blocks = {
        let db = db.clone();
        tokio::task::spawn_blocking(move || db.write_blocking(insert))
    };
    comes("it is queued", || db.inner.writer.queued() == 1).await;
    db.inner.supervisor.fence();
    assert_eq!(db.role(), Role::Fencing);
    // The one that runs still does.
    let waited = tokio::time::timeout(LIMIT, waits).await.unwrap().unwrap();
    assert!(not_primary(&waited), "{waited:?}");
    assert_ne!(dropped.recv().unwrap(), std::thread::current().id(), "no lease waits for a destructor");
    assert!(not_primary(&db.write(insert).await));
    assert!(!runs.is_finished());
    goes_on.send(()).unwrap();
    let ran = runs.await.unwrap();
    assert!(not_primary(&ran), "{ran:?}");
    assert!(not_primary(&blocks.await.unwrap()));
    assert_eq!(rows(&db), 0);
    db.inner.supervisor.demote().await.unwrap();
    assert_eq!((db.role(), rows(&db)), (Role::Replica, 0));
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_fsync_ends_after_the_fence_is_unknown_by_its_name_and_kept_for_a_renewal() {
    let dir = tempfile::tempdir().unwrap();
    let db = leased(&dir).await;
    let engine = db.inner.slot.primary().unwrap();
    let before = db.position().unwrap();
    engine.hold_syncs(true);
    let write = {
        let db = db.clone();
        tokio::spawn(async move { db.write(insert).await })
    };
    comes("it waits for the disk", || engine.wants_sync() > before.number()).await;
    db.inner.supervisor.fence();
    engine.hold_syncs(false);
    let Err(Error::OutcomeUnknown { txid: Some(txid), cause }) = write.await.unwrap() else {
        panic!("it was acknowledged");
    };
    assert_eq!(txid.number(), before.number() + 1);
    assert!(cause.text().contains("time as the primary"), "{cause}");
    // The same node takes the lease anew.
    db.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
    let epoch = Epoch::new(txid.epoch().number() + 1, 3);
    db.inner.supervisor.renew(epoch).await.unwrap();
    assert_eq!(db.role(), Role::Primary);
    db.wait_for_timeout(txid, LIMIT).await.unwrap();
    let next = db.write(insert).await.unwrap().txid.unwrap();
    assert_eq!((next.epoch(), next.number()), (epoch, txid.number() + 1));
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_across_the_fence_commits_nothing_and_does_not_vouch_for_what_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let db = leased(&dir).await;
    let (holder, (tell, told), (go, goes)) = (db.clone(), mpsc::channel(), mpsc::channel::<()>());
    let held = tokio::task::spawn_blocking(move || {
        let mut guard = holder.writer().unwrap();
        guard.execute_batch("INSERT INTO t DEFAULT VALUES").unwrap();
        guard.execute_batch("BEGIN; INSERT INTO t DEFAULT VALUES").unwrap();
        tell.send(()).unwrap();
        goes.recv().unwrap();
        let committed = guard.execute_batch("COMMIT");
        assert!(committed.is_err() && guard.is_autocommit(), "it is rolled back: {committed:?}");
        assert!(guard.execute_batch("INSERT INTO t DEFAULT VALUES").is_err(), "nor anything after it");
        let flushed = guard.flush();
        assert!(matches!(flushed, Err(Error::OutcomeUnknown { txid: Some(_), .. })), "{flushed:?}");
        assert!(guard.flush().unwrap().is_none(), "nothing since");
    });
    tokio::task::block_in_place(|| told.recv().unwrap());
    db.inner.supervisor.fence();
    let demoted = {
        let db = db.clone();
        tokio::spawn(async move { db.inner.supervisor.demote().await })
    };
    comes("it is told", || db.status().problem.is_some_and(|p| p.contains("the writer connection"))).await;
    // Reads go on all the while.
    assert_eq!((rows(&db), db.role()), (1, Role::Fencing));
    go.send(()).unwrap();
    held.await.unwrap();
    demoted.await.unwrap().unwrap();
    assert_eq!((db.role(), rows(&db), db.status().problem), (Role::Replica, 1, None));
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_never_ends_is_interrupted_by_the_fence() {
    let dir = tempfile::tempdir().unwrap();
    let db = leased(&dir).await;
    let (begun, has_begun) = mpsc::channel();
    let runs = {
        let db = db.clone();
        tokio::spawn(async move {
            let closure = move |tx: &mut Transaction<'_>| {
                begun.send(()).unwrap();
                let endless = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c)
                               SELECT max(i) FROM c";
                Ok::<_, Error>(tx.query_row(endless, [], |r| r.get::<_, i64>(0))?)
            };
            db.write(closure).await
        })
    };
    tokio::task::block_in_place(|| has_begun.recv().unwrap());
    db.inner.supervisor.fence();
    // The demotion interrupts it where it had not begun when the fence did.
    tokio::time::timeout(LIMIT, db.inner.supervisor.demote()).await.unwrap().unwrap();
    let ran = runs.await.unwrap();
    assert!(not_primary(&ran), "{ran:?}");
    db.shutdown().await;
}

/// Another process's transaction can't be refused. What it commits late is no history of any other
/// node, and is kept when the next primary leads this one on.
#[tokio::test(flavor = "multi_thread")]
async fn what_others_commit_after_the_fence_goes_to_no_replica_and_is_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    one.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
    let txid = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    let other = rusqlite::Connection::open(one.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO t(a) VALUES (1000)").unwrap();
    one.inner.supervisor.fence();
    let demoted = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.demote().await })
    };
    // The streams do not wait for what holds up the rest.
    comes("the streams end", || one.inner.replica_server.replicas().is_empty()).await;
    assert_eq!((one.role(), rows(&one)), (Role::Fencing, 1));
    other.execute_batch("COMMIT").unwrap();
    let last = demoted.await.unwrap().unwrap().unwrap();
    assert_eq!((last.number(), one.role(), rows(&one)), (txid.number() + 1, Role::Replica, 2));
    assert!(one.inner.node.is_fenced(), "no token names what no other node has");
    let refused = other.execute_batch("INSERT INTO t DEFAULT VALUES");
    assert!(refused.is_err(), "a replica takes no writes");
    assert_eq!(two.inner.supervisor.prepare().await.unwrap().unwrap().txid(), txid);
    two.inner.supervisor.promote(Epoch::new(last.epoch().number() + 1, 1), false).await.unwrap();
    one.inner.supervisor.follow(Some(endpoint(&two))).await.unwrap();
    let next = write(&[two.clone(), two.clone()]).await;
    one.wait_for_timeout(next, LIMIT).await.unwrap();
    comes("the next primary vouches for what is here", || !one.inner.node.is_fenced()).await;
    assert_eq!((rows(&one), rows(&two)), (2, 2));
    assert_eq!(one.lost().await.unwrap().len(), 1);
    for db in [one, two] {
        db.shutdown().await;
    }
}

/// No other node has the last position of a lease that ends in order.
#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::await_holding_lock, reason = "the thread that needs it is to wait")]
async fn what_was_acknowledged_before_the_fence_goes_to_the_replicas_however_late_it_is_captured() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    one.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
    let before = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(before, LIMIT).await.unwrap();
    let engine = one.inner.slot.primary().unwrap();
    let held = engine.hold_log();
    let txid = one.write(insert).await.unwrap().txid.unwrap();
    assert_eq!(engine.log().tip().unwrap().txid(), before, "it is acknowledged, and not captured");
    one.inner.supervisor.fence();
    let demoted = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.demote().await })
    };
    let ends = comes("the streams end", || engine.last().is_some());
    let ended = tokio::time::timeout(Duration::from_millis(100), ends).await;
    assert!(ended.is_err(), "the streams end without it");
    drop(held);
    assert_eq!(demoted.await.unwrap().unwrap().unwrap().txid(), txid);
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    assert_eq!(two.inner.supervisor.prepare().await.unwrap().unwrap().txid(), txid);
    for db in [one, two] {
        db.shutdown().await;
    }
}

/// A process that was stopped for longer than its time, at the worst moment.
#[test]
fn a_process_that_slept_through_its_fence_commits_nothing() {
    const CHILD: &str = "REPLITE_TEST_SLEEPER";
    let name = "node::supervisor::tests::fences::a_process_that_slept_through_its_fence_commits_nothing";
    if std::env::var_os(CHILD).is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        return runtime.block_on(sleeper());
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, "1")
        .spawn()
        .unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let stat = format!("/proc/{}/stat", child.id());
    let end = std::time::Instant::now() + LIMIT * 3;
    let stopped = || std::fs::read_to_string(&stat).is_ok_and(|text| text.contains(") T "));
    while !stopped() {
        assert!(std::time::Instant::now() < end, "it never stops");
        assert!(child.try_wait().unwrap().is_none(), "it ended before it stopped");
        std::thread::yield_now();
    }
    // Its fence has certainly ended by then.
    let wakes = boot_time() + SLEEP;
    while boot_time() < wakes {
        std::thread::yield_now();
    }
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    assert!(child.wait().unwrap().success());
}

const SLEEP: Duration = Duration::from_millis(500);

async fn sleeper() {
    let dir = tempfile::tempdir().unwrap();
    let db = leased(&dir).await;
    let node = db.inner.node.clone();
    let write = db.write(move |tx| {
        insert(tx)?;
        node.fence.set(boot_time() + SLEEP / 2);
        // To this very thread: it goes no further.
        // SAFETY: it has no arguments that could be wrong.
        assert_eq!(unsafe { libc::raise(libc::SIGSTOP) }, 0);
        Ok::<_, Error>(())
    });
    let done = write.await;
    assert!(not_primary(&done), "{done:?}");
    // No driver has said anything yet.
    assert_eq!((db.role(), rows(&db)), (Role::Primary, 0));
    assert!(not_primary(&db.write(insert).await));
    db.shutdown().await;
}
