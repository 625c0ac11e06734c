//! A primary that lives holds back all writes, and goes on, in this epoch or another, or hands its
//! role over.

use std::sync::mpsc;
use std::time::Instant;

use super::*;
use crate::ends::comes;
use crate::fence::boot_time;

const SHORT: Duration = Duration::from_millis(100);

fn insert(tx: &mut Transaction<'_>) -> Result<usize> {
    Ok(tx.execute("INSERT INTO t DEFAULT VALUES", [])?)
}

fn not_primary<T>(done: &Result<T>) -> bool {
    matches!(done, Err(Error::NotPrimary { primary: None }))
}

/// Whether another connection gets the write lock within no time.
fn others_write(db: &Db) -> bool {
    let other = rusqlite::Connection::open(db.path()).unwrap();
    other.busy_timeout(Duration::ZERO).unwrap();
    match other.execute_batch("BEGIN IMMEDIATE; ROLLBACK") {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.sqlite_error_code(), Some(rusqlite::ErrorCode::DatabaseBusy), "{error}");
            false
        }
    }
}

/// Whether the node is a primary like any other.
fn goes_on(db: &Db) {
    let state = db.roles().borrow().clone();
    assert_eq!((state.role, state.primary.as_ref()), (Role::Primary, Some(db.node())));
    assert!(others_write(db) && db.inner.node.takes_requests() && db.health().can_write);
}

/// Both nodes write and follow as if nothing had happened.
async fn writes_and_replicates(one: &Db, two: &Db) -> Txid {
    goes_on(one);
    let other = rusqlite::Connection::open(one.path()).unwrap();
    other.execute_batch("INSERT INTO t DEFAULT VALUES").unwrap();
    let txid = one.write(insert).await.unwrap().txid.unwrap();
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    assert_eq!(rows(one), rows(two));
    txid
}

async fn end(dbs: [Db; 2]) {
    for db in dbs {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_yields_writes_on_and_takes_no_requests() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let supervisor = &one.inner.supervisor;
    supervisor.yields().await.unwrap();
    let state = one.roles().borrow().clone();
    assert_eq!((state.role, state.primary), (Role::Primary, None));
    let node = &one.inner.node;
    assert!(node.leads() && !node.takes_requests());
    let health = one.health();
    assert!(health.live && health.can_read && !health.can_write, "{health:?}");
    assert!(health.reasons.iter().any(|reason| reason.contains("hands the lease")), "{health:?}");
    // What runs still writes, however it does.
    let txid = one.write(insert).await.unwrap().txid.unwrap();
    let txid = one.write_wait(SHORT, insert).await.unwrap().txid.unwrap().max(txid);
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    assert!(matches!(two.inner.supervisor.yields().await, Err(Error::NotPrimary { .. })));
    supervisor.release_hold().await.unwrap();
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_was_committed_is_in_the_final_position_and_nothing_else_ever() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let supervisor = &one.inner.supervisor;
    let before = one.write(insert).await.unwrap().txid.unwrap();
    let other = rusqlite::Connection::open(one.path()).unwrap();
    for round in 1..=20 {
        supervisor.yields().await.unwrap();
        other.execute_batch("INSERT INTO t DEFAULT VALUES").unwrap();
        let begun = Instant::now();
        let last = supervisor.withhold(LIMIT).await.unwrap();
        eprintln!("held after {:?}", begun.elapsed());
        assert_eq!(last.number(), before.number() + round, "the other's commit is in it");
        let engine = one.inner.slot.primary().unwrap();
        assert_eq!((engine.log().tip(), one.position()), (Some(last), Some(last)));
        // Streams go on.
        two.wait_for_timeout(last.txid(), LIMIT).await.unwrap();
        assert_eq!(two.position(), Some(last));
        assert!(not_primary(&one.write(insert).await) && !others_write(&one));
        let (blocking, holder) = (one.clone(), one.clone());
        let blocked = tokio::task::spawn_blocking(move || blocking.write_blocking(insert)).await.unwrap();
        let guard = tokio::task::spawn_blocking(move || holder.writer().map(drop)).await.unwrap();
        assert!(not_primary(&blocked) && not_primary(&guard), "{blocked:?} {guard:?}");
        assert_eq!(rows(&one), rows(&two));
        // Once more changes nothing.
        assert_eq!(supervisor.withhold(LIMIT).await.unwrap(), last);
        supervisor.release_hold().await.unwrap();
    }
    writes_and_replicates(&one, &two).await;
    // What is not withheld is released all the same.
    supervisor.release_hold().await.unwrap();
    assert!(one.verify().await.unwrap().holds());
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_of_another_connection_is_not_waited_for_longer_and_all_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let supervisor = &one.inner.supervisor;
    let other = rusqlite::Connection::open(one.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO t DEFAULT VALUES").unwrap();
    supervisor.yields().await.unwrap();
    let refused = supervisor.withhold(SHORT).await;
    assert!(
        matches!(&refused, Err(Error::Timeout { what, after: SHORT }) if what.contains("the write lock")),
        "{refused:?}"
    );
    // It still yields, and writes as before.
    assert!(one.inner.node.leads() && !one.inner.node.takes_requests() && one.inner.writer.is_open());
    other.execute_batch("COMMIT").unwrap();
    one.write(insert).await.unwrap();
    supervisor.release_hold().await.unwrap();
    writes_and_replicates(&one, &two).await;
    // A transaction that ends in time.
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO t DEFAULT VALUES").unwrap();
    let held = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.withhold(LIMIT).await })
    };
    comes("the writer is closed", || !one.inner.writer.is_open()).await;
    other.execute_batch("COMMIT").unwrap();
    let last = held.await.unwrap().unwrap();
    assert!(!others_write(&one));
    two.wait_for_timeout(last.txid(), LIMIT).await.unwrap();
    assert_eq!(rows(&one), rows(&two));
    supervisor.release_hold().await.unwrap();
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guard_is_not_waited_for_longer_and_what_it_commits_stays() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let (holder, (tell, told), (go, goes)) = (one.clone(), mpsc::channel(), mpsc::channel::<()>());
    let held = tokio::task::spawn_blocking(move || {
        let mut guard = holder.writer().unwrap();
        guard.execute_batch("BEGIN; INSERT INTO t DEFAULT VALUES").unwrap();
        tell.send(()).unwrap();
        goes.recv().unwrap();
        guard.execute_batch("COMMIT").unwrap();
        guard.flush().unwrap().unwrap()
    });
    tokio::task::block_in_place(|| told.recv().unwrap());
    let refused = one.inner.supervisor.withhold(SHORT).await;
    assert!(
        matches!(&refused, Err(Error::Timeout { what, .. }) if what.contains("the writer connection")),
        "{refused:?}"
    );
    assert!(one.inner.writer.is_open());
    go.send(()).unwrap();
    let txid = held.await.unwrap();
    let last = one.inner.supervisor.withhold(LIMIT).await.unwrap();
    assert_eq!((last.txid(), rows(&one)), (txid, 1));
    one.inner.supervisor.release_hold().await.unwrap();
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_runs_ends_and_those_that_wait_are_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let (begun, has_begun) = mpsc::channel();
    let (go, goes) = mpsc::channel::<()>();
    let runs = {
        let one = one.clone();
        tokio::spawn(async move {
            let closure = move |tx: &mut Transaction<'_>| {
                insert(tx)?;
                begun.send(()).unwrap();
                goes.recv().unwrap();
                Ok::<_, Error>(())
            };
            one.write(closure).await
        })
    };
    tokio::task::block_in_place(|| has_begun.recv().unwrap());
    let waits = {
        let one = one.clone();
        tokio::spawn(async move { one.write(insert).await })
    };
    comes("it is queued", || one.inner.writer.queued() == 1).await;
    let held = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.withhold(LIMIT).await })
    };
    let waited = tokio::time::timeout(LIMIT, waits).await.unwrap().unwrap();
    assert!(not_primary(&waited), "{waited:?}");
    assert!(!runs.is_finished() && !held.is_finished());
    go.send(()).unwrap();
    let txid = runs.await.unwrap().unwrap().txid.unwrap();
    assert_eq!(held.await.unwrap().unwrap().txid(), txid, "it was made before, and is acknowledged");
    assert_eq!(rows(&one), 1);
    // Who waits for a primary waits for what comes of this.
    let waits = {
        let one = one.clone();
        tokio::spawn(async move { one.write_wait(LIMIT, insert).await })
    };
    comes("it waits", || one.inner.node.roles.receiver_count() > 0).await;
    one.inner.supervisor.yields().await.unwrap();
    assert!(!waits.is_finished());
    one.inner.supervisor.release_hold().await.unwrap();
    assert!(waits.await.unwrap().is_ok());
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

/// What was committed before the hold is answered before the hold is there, also where the disk
/// takes its time: the fence that comes next would make the answer unknown.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_committed_before_is_acknowledged_before_the_final_position_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let engine = one.inner.slot.primary().unwrap();
    let before = one.position().unwrap();
    engine.hold_syncs(true);
    let write = {
        let one = one.clone();
        tokio::spawn(async move { one.write(insert).await.unwrap().txid.unwrap() })
    };
    let blocking = {
        let one = one.clone();
        tokio::task::spawn_blocking(move || one.write_blocking(insert).unwrap())
    };
    // One of each kind: the writer's thread may wait for the disk itself, and a second one for it.
    comes("they wait for the disk", || rows(&one) == 2).await;
    let held = {
        let one = one.clone();
        tokio::spawn(async move {
            let last = one.inner.supervisor.withhold(LIMIT).await;
            one.inner.supervisor.fence();
            last
        })
    };
    comes("the writer is closed", || !one.inner.writer.is_open()).await;
    engine.hold_syncs(false);
    let last = held.await.unwrap().unwrap();
    assert_eq!(last.number(), before.number() + 2);
    assert!(write.await.unwrap() <= last.txid());
    assert!(blocking.await.unwrap().txid.unwrap() <= last.txid());
    one.inner.supervisor.demote().await.unwrap();
    end([one, two]).await;
}

/// What a write gave, for a caller who left: the application's code runs before it is answered.
struct Slow(mpsc::Sender<()>, mpsc::Receiver<()>);

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.0.send(());
        let _ = self.1.recv();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_is_not_answered_yet_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let engine = one.inner.slot.primary().unwrap();
    engine.hold_syncs(true);
    let ((tell, told), (go, goes)) = (mpsc::channel(), mpsc::channel());
    let write = {
        let one = one.clone();
        let run = move |tx: &mut Transaction<'_>| insert(tx).map(|_| Slow(tell, goes));
        tokio::spawn(async move { one.write(run).await.map(drop) })
    };
    comes("it is committed", || rows(&one) == 1).await;
    write.abort();
    assert!(write.await.unwrap_err().is_cancelled());
    engine.hold_syncs(false);
    tokio::task::block_in_place(|| told.recv().unwrap());
    let supervisor = one.inner.supervisor.clone();
    let mut withhold = tokio::spawn(async move { supervisor.withhold(LIMIT).await });
    let early = tokio::time::timeout(SHORT, &mut withhold).await;
    assert!(early.is_err(), "its caller may not know yet: {early:?}");
    go.send(()).unwrap();
    withhold.await.unwrap().unwrap();
    one.inner.supervisor.release_hold().await.unwrap();
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_withheld_writes_goes_on_in_a_new_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let supervisor = &one.inner.supervisor;
    for fenced in [false, true] {
        supervisor.yields().await.unwrap();
        let last = supervisor.withhold(LIMIT).await.unwrap();
        if fenced {
            supervisor.fence();
            assert!(not_primary(&supervisor.release_hold().await), "it is over");
            assert!(!others_write(&one), "nothing comes late");
            one.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
        }
        let epoch = Epoch::new(last.epoch().number() + 2, 7);
        // One that is refused leaves all as it was.
        let old = supervisor.renew(Epoch::new(last.epoch().number(), 1)).await;
        assert!(matches!(old, Err(Error::Peer { .. })), "{old:?}");
        assert!(!one.inner.writer.is_open() && !others_write(&one));
        supervisor.renew(epoch).await.unwrap();
        let txid = writes_and_replicates(&one, &two).await;
        assert_eq!((txid.epoch(), txid.number()), (epoch, last.number() + 2));
    }
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_withheld_writes_hands_over_at_the_position_that_it_told() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    write(&[one.clone(), one.clone()]).await;
    let mut dbs = [one, two];
    for round in 0..10 {
        let [led, follows] = &dbs;
        led.inner.supervisor.yields().await.unwrap();
        let begun = Instant::now();
        let last = led.inner.supervisor.withhold(LIMIT).await.unwrap();
        let held = begun.elapsed();
        follows.wait_for_timeout(last.txid(), LIMIT).await.unwrap();
        led.inner.supervisor.fence();
        let (offered, begun) = (begun.elapsed(), Instant::now());
        let epoch = Epoch::new(last.epoch().number() + 1, round);
        follows.inner.node.fence.set(boot_time() + Duration::from_secs(3600));
        follows.inner.supervisor.promote(epoch, false).await.unwrap();
        let promoted = begun.elapsed();
        let first = follows.write(insert).await.unwrap().txid.unwrap();
        let (wrote, begun) = (begun.elapsed(), Instant::now());
        assert_eq!((first.epoch(), first.number()), (epoch, last.number() + 1));
        assert_eq!(led.inner.supervisor.demote().await.unwrap(), Some(last));
        eprintln!(
            "held {held:?}, there {offered:?}, promoted {promoted:?}, first commit {wrote:?}, demoted {:?}",
            begun.elapsed()
        );
        assert!(!led.inner.node.is_fenced(), "nothing came late");
        led.inner.supervisor.follow(Some(endpoint(follows))).await.unwrap();
        led.wait_for_timeout(first, LIMIT).await.unwrap();
        assert_eq!(rows(led), rows(follows));
        dbs.reverse();
    }
    for db in &dbs {
        assert!(db.verify().await.unwrap().holds());
    }
    assert!(dbs[0].lost().await.unwrap().is_empty() && dbs[1].lost().await.unwrap().is_empty());
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_ends_the_time_while_writes_are_withheld_is_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let other = rusqlite::Connection::open(one.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO t DEFAULT VALUES").unwrap();
    let held = {
        let one = one.clone();
        tokio::spawn(async move { one.inner.supervisor.withhold(Duration::from_secs(1)).await })
    };
    comes("the writer is closed", || !one.inner.writer.is_open()).await;
    one.inner.supervisor.fence();
    assert_eq!(one.role(), Role::Fencing);
    let held = held.await.unwrap();
    assert!(matches!(held, Err(Error::Timeout { .. } | Error::NotPrimary { .. })), "{held:?}");
    assert!(!one.inner.writer.is_open(), "it takes no writes again");
    assert!(not_primary(&one.inner.supervisor.release_hold().await));
    assert!(not_primary(&one.inner.supervisor.withhold(LIMIT).await));
    assert!(not_primary(&one.inner.supervisor.yields().await));
    assert_eq!(one.role(), Role::Fencing);
    other.execute_batch("ROLLBACK").unwrap();
    one.inner.supervisor.demote().await.unwrap();
    assert_eq!(one.role(), Role::Replica);
    end([one, two]).await;
}

/// A peer that names an epoch closes the fence, and the election opens it again where the epoch is
/// not later. The election knows of no end of the lease then, and asks for nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_that_is_closed_for_a_moment_keeps_no_primary_from_going_on() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let (supervisor, fence) = (&one.inner.supervisor, &one.inner.node.fence);
    for held in [false, true] {
        supervisor.yields().await.unwrap();
        if held {
            supervisor.withhold(LIMIT).await.unwrap();
        }
        fence.close();
        supervisor.release_hold().await.unwrap();
        assert!(!one.inner.node.takes_requests() && not_primary(&one.write(insert).await));
        fence.set(boot_time() + Duration::from_secs(3600));
        writes_and_replicates(&one, &two).await;
    }
    end([one, two]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_closed_while_writes_are_withheld_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    for waits in [false, true] {
        let one = Db::open(config(&path)).await.unwrap();
        let txid = one.write(insert).await.unwrap().txid.unwrap();
        let other = rusqlite::Connection::open(one.path()).unwrap();
        if waits {
            other.execute_batch("BEGIN IMMEDIATE").unwrap();
        }
        let held = {
            let one = one.clone();
            tokio::spawn(async move { one.inner.supervisor.withhold(LIMIT).await })
        };
        if waits {
            comes("the writer is closed", || !one.inner.writer.is_open()).await;
        } else {
            assert_eq!(held.await.unwrap().unwrap().txid(), txid);
            assert!(!others_write(&one));
            tokio::time::timeout(LIMIT, one.shutdown()).await.unwrap();
            assert!(others_write(&one));
            continue;
        }
        tokio::time::timeout(LIMIT, one.shutdown()).await.unwrap();
        let held = held.await.unwrap();
        assert!(matches!(held, Err(Error::ShutDown)), "{held:?}");
        other.execute_batch("COMMIT").unwrap();
    }
    // The last handle goes without a word.
    let one = Db::open(config(&path)).await.unwrap();
    one.inner.supervisor.withhold(LIMIT).await.unwrap();
    tokio::task::spawn_blocking(move || drop(one)).await.unwrap();
    let again = Db::open(config(&path)).await.unwrap();
    write(&[again.clone(), again.clone()]).await;
    assert!(again.verify().await.unwrap().holds());
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_waits_for_a_hold_and_none_fails() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let ends = std::sync::atomic::AtomicBool::new(false);
    let work = async {
        let _ends = crate::ends::Ends(&ends);
        for _ in 0..50 {
            write(&[one.clone(), one.clone()]).await;
            one.inner.supervisor.withhold(LIMIT).await.unwrap();
            one.inner.supervisor.release_hold().await.unwrap();
        }
    };
    std::thread::scope(|scope| {
        for busy in [true, false] {
            let (one, ends) = (&one, &ends);
            scope.spawn(move || {
                let own = rusqlite::Connection::open(one.path()).unwrap();
                // What is in the way of a reader is an error.
                own.busy_timeout(Duration::ZERO).unwrap();
                let mut before = 0;
                while !ends.load(std::sync::atomic::Ordering::Acquire) {
                    let now = match busy {
                        true => own.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap(),
                        false => rows(one),
                    };
                    assert!(now >= before, "{now} after {before}");
                    before = now;
                }
            });
        }
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work));
    });
    end([one, two]).await;
}

/// A WAL far beyond its limit, and writers of another process that never pause: the brake has the
/// write lock, or wants it, most of the time.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_wal_and_its_brake_are_not_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    let one = Db::open(config(&path).wal_limit(64 * 1024)).await.unwrap();
    let ends = std::sync::atomic::AtomicBool::new(false);
    // A reader that keeps the WAL from beginning anew.
    let reader = rusqlite::Connection::open(&path).unwrap();
    reader.execute_batch("BEGIN; SELECT count(*) FROM t").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other = rusqlite::Connection::open(&path).unwrap();
            other.busy_timeout(LIMIT).unwrap();
            other.execute_batch("CREATE TABLE u(a)").unwrap();
            while !ends.load(std::sync::atomic::Ordering::Acquire) {
                other.execute_batch("INSERT INTO u VALUES (zeroblob(20000))").unwrap();
            }
        });
        let work = async {
            let _ends = crate::ends::Ends(&ends);
            comes("a long WAL", || one.status().wal_frames > 100).await;
            for _ in 0..20 {
                one.inner.supervisor.yields().await.unwrap();
                let last = one.inner.supervisor.withhold(LIMIT).await.unwrap();
                assert_eq!(one.position(), Some(last));
                assert!(!others_write(&one));
                one.inner.supervisor.release_hold().await.unwrap();
            }
        };
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work));
    });
    drop(reader);
    goes_on(&one);
    assert!(one.verify().await.unwrap().holds());
    one.shutdown().await;
}

/// Has the log's descriptors be some that can't be synced.
fn break_log(db: &Db) {
    use std::os::fd::AsRawFd;
    let log = std::fs::canonicalize(db.inner.paths.log()).unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut broken = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        if std::fs::read_link(entry.path()).is_ok_and(|to| to.starts_with(&log) && to.is_file()) {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            // SAFETY: both are open; only what the number stands for changes.
            assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), number) }, number);
            broken += 1;
        }
    }
    assert!(broken > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_the_log_costs_the_hold_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = pair(&dir).await;
    let supervisor = &one.inner.supervisor;
    for fsync in [true, false] {
        let txid = one.write(insert).await.unwrap().txid.unwrap();
        two.wait_for_timeout(txid, LIMIT).await.unwrap();
        if fsync {
            break_log(&one);
        } else {
            // As after an append that found no room.
            *one.inner.slot.primary().unwrap().hold_log() = true;
        }
        supervisor.yields().await.unwrap();
        let refused = supervisor.withhold(LIMIT).await;
        assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
        assert!(others_write(&one) && one.inner.writer.is_open());
        supervisor.release_hold().await.unwrap();
        writes_and_replicates(&one, &two).await;
        let last = supervisor.withhold(LIMIT).await.unwrap();
        assert_eq!(one.inner.slot.primary().unwrap().log().tip(), Some(last));
        supervisor.release_hold().await.unwrap();
    }
    writes_and_replicates(&one, &two).await;
    end([one, two]).await;
}

/// A way to a node that lets nothing more come from it once it is told to.
async fn way(to: &Db) -> (String, tokio::sync::watch::Sender<bool>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = &to.node().addresses.replication;
    let to = url.parse::<http::Uri>().unwrap().authority().unwrap().to_string();
    let url = url.replace(&to, &listener.local_addr().unwrap().to_string());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        while let Ok((inner, _)) = listener.accept().await {
            let Ok(outer) = tokio::net::TcpStream::connect(&to).await else { continue };
            let ((mut from, mut back), (mut answers, mut on)) = (inner.into_split(), outer.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from, &mut on).await });
            let mut stopped = stopped.clone();
            tokio::spawn(async move {
                let mut bytes = vec![0; 4096];
                while let Ok(n @ 1..) = answers.read(&mut bytes).await {
                    let _ = stopped.wait_for(|stopped| !stopped).await;
                    if back.write_all(&bytes[..n]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (url, stop)
}

/// Writes are withheld also where the lease is given back: then what a replica still lacks is
/// nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_has_its_time_for_the_last_writes_where_no_other_node_has_them() {
    let dir = tempfile::tempdir().unwrap();
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let (url, stop) = way(&one).await;
    let two = Db::open(config(&dir.path().join("b.db")).lease(Fixed::replica_of(&url))).await.unwrap();
    two.ready().await.unwrap();
    stop.send_replace(true);
    let other = rusqlite::Connection::open(one.path()).unwrap();
    // More than is on its way anywhere.
    other.execute_batch("CREATE TABLE u(a); INSERT INTO u VALUES (randomblob(64000000))").unwrap();
    one.inner.supervisor.withhold(LIMIT).await.unwrap();
    let supervisor = one.inner.supervisor.clone();
    let mut demote = tokio::spawn(async move { supervisor.demote().await });
    comes("the streams are to end", || one.role() == Role::Fencing).await;
    let early = tokio::time::timeout(SHORT * 5, &mut demote).await;
    assert!(early.is_err(), "it does not wait for what is on its way: {early:?}");
    stop.send_replace(false);
    demote.await.unwrap().unwrap();
    end([one, two]).await;
}

struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A process that is killed while it withholds writes.
#[test]
fn a_process_that_dies_with_writes_withheld_leads_again() {
    const CHILD: &str = "REPLITE_TEST_WITHHOLDS";
    let name = "node::supervisor::tests::handover::a_process_that_dies_with_writes_withheld_leads_again";
    let runtime = tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = std::env::var_os(CHILD) {
        return runtime.block_on(async {
            let db = Db::open(config(Path::new(&path))).await.unwrap();
            db.write(insert).await.unwrap();
            db.inner.supervisor.yields().await.unwrap();
            let last = db.inner.supervisor.withhold(LIMIT).await.unwrap();
            std::fs::write(Path::new(&path).with_extension("last"), last.to_string()).unwrap();
            std::future::pending::<()>().await;
        });
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, said) = (dir.path().join("a.db"), dir.path().join("a.last"));
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, &path)
        .spawn()
        .unwrap();
    let mut child = Killed(child);
    let end = Instant::now() + LIMIT * 3;
    let last: Position = loop {
        assert!(Instant::now() < end && child.0.try_wait().unwrap().is_none(), "it never withholds");
        let position = std::fs::read_to_string(&said).ok().and_then(|text| text.parse().ok());
        if let Some(position) = position {
            break position;
        }
        std::thread::yield_now();
    };
    let other = rusqlite::Connection::open(&path).unwrap();
    other.busy_timeout(Duration::ZERO).unwrap();
    other.execute_batch("INSERT INTO t DEFAULT VALUES").unwrap_err();
    drop(child);
    runtime.block_on(async {
        let db = Db::open(config(&path)).await.unwrap();
        assert_eq!(db.position(), Some(last));
        goes_on(&db);
        let next = db.write(insert).await.unwrap().txid.unwrap();
        assert_eq!(next.number(), last.number() + 1);
        assert!(db.verify().await.unwrap().holds());
        db.shutdown().await;
    });
}
