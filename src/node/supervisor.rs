//! What a node does at the moment, and how that changes: the one place where a role begins and
//! ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::{NodeContext, RoleChange};
use crate::engine::PrimaryEngine;
use crate::error::{Error, Result};
use crate::net::Endpoint;
use crate::node::slot::{EngineSlot, Running};
use crate::node::writer::Writer;
use crate::primary::ReplicaServer;
use crate::threads::blocking;

/// Begins and ends a database's roles, one at a time.
pub(crate) struct Supervisor {
    node: Arc<NodeContext>,
    slot: Arc<EngineSlot>,
    writer: Arc<Writer>,
    replica_server: Arc<ReplicaServer>,
    tracker: TaskTracker,
    /// Set while the node is a replica. A change of the role holds the lock.
    following: Mutex<Option<Following>>,
}

/// A primary that is followed.
struct Following {
    primary: Endpoint,
    ends: CancellationToken,
    task: JoinHandle<()>,
}

impl Supervisor {
    pub(crate) fn new(
        node: Arc<NodeContext>,
        slot: Arc<EngineSlot>,
        writer: Arc<Writer>,
        replica_server: Arc<ReplicaServer>,
        tracker: TaskTracker,
    ) -> Supervisor {
        Supervisor { node, slot, writer, replica_server, tracker, following: Mutex::default() }
    }

    /// Begins the role that the node has when it starts.
    pub(crate) async fn begin(&self, primary: Option<Endpoint>) -> Result<()> {
        let mut following = self.following.lock().await;
        match (self.slot.get()?, primary) {
            (Running::Primary(engine), _) => self.lead(engine),
            (Running::Replica(_), Some(primary)) => *following = Some(self.follow(primary)?),
            // There is no primary to follow yet.
            (Running::Replica(_), None) => {}
        }
        Ok(())
    }

    /// Serves what the engine has. Replicas can join before the role changes: a node that hears of
    /// the primary finds one.
    fn lead(&self, engine: Arc<PrimaryEngine>) {
        let epoch = self.node.applied.history().epoch();
        self.replica_server.set(Some(engine));
        self.node.change_role(RoleChange::Leads { me: self.node.me.clone(), epoch });
    }

    fn follow(&self, primary: Endpoint) -> Result<Following> {
        let Running::Replica(engine) = self.slot.get()? else {
            return Err(Error::Internal("a primary follows nobody".into()));
        };
        let ends = self.node.stop.child_token();
        let task =
            crate::replica::spawn(self.node.clone(), engine, primary.clone(), ends.clone(), &self.tracker);
        Ok(Following { primary, ends, task })
    }

    /// Makes the replica a primary, of an epoch with a number above this and all known ones. Read
    /// connections, their snapshots and all waits live on.
    ///
    /// # Errors
    /// [`Error::NoState`] when no primary vouches for what is here, and what the application's
    /// migrations say. The node is a replica then, as before. After any other error replication has
    /// stopped.
    #[cfg_attr(not(test), expect(dead_code, reason = "the role of a node is fixed by its configuration"))]
    pub(crate) async fn promote(&self, above: u64) -> Result<()> {
        let mut following = self.following.lock().await;
        let Running::Replica(replica) = self.slot.get()? else { return Ok(()) };
        let primary = match following.take() {
            Some(following) => Some(following.end().await),
            None => None,
        };
        let (slot, writer) = (self.slot.clone(), self.writer.clone());
        let promoted = blocking(move || {
            let engine = Arc::new(replica.stop()?.into_primary(above)?);
            set(&slot, Running::Primary(engine.clone()))?;
            let opened = writer.open(&engine);
            if slot.get().is_err() {
                // The database was closed meanwhile, and its writer before this one opened.
                writer.close();
                return Err(Error::ShutDown);
            }
            if opened.is_err() {
                set(&slot, Running::Replica(Arc::new(engine.stop(LEAVE_LIMIT)?.into_replica()?)))?;
            }
            Ok(opened.map(|()| engine))
        });
        let refused = match promoted.await {
            Ok(Ok(engine)) => {
                self.lead(engine);
                return Ok(());
            }
            Ok(Err(error)) | Err(error @ Error::NoState(_)) => error,
            Err(error) => return Err(self.stopped(error)),
        };
        if let Some(primary) = primary {
            *following = Some(self.follow(primary)?);
        }
        Err(refused)
    }

    /// Makes the primary a replica of another. Read connections, their snapshots and all waits live
    /// on. Writes that are queued are refused.
    ///
    /// # Errors
    /// [`Error::Timeout`] when others write for longer than `limit`. The node is the primary then,
    /// as before. After any other error replication has stopped.
    #[cfg_attr(not(test), expect(dead_code, reason = "the role of a node is fixed by its configuration"))]
    pub(crate) async fn demote(&self, primary: Endpoint, limit: Duration) -> Result<()> {
        let mut following = self.following.lock().await;
        let Running::Primary(engine) = self.slot.get()? else { return Ok(()) };
        // Requests wait for the next primary from now on, and replicas look for it.
        let epoch = self.node.applied.history().epoch();
        self.node.change_role(RoleChange::Follows { primary: None, epoch });
        self.replica_server.set(None);
        let (slot, writer, led) = (self.slot.clone(), self.writer.clone(), engine.clone());
        let demoted = blocking(move || {
            let left = writer.close_within(limit).and_then(|()| {
                led.stop(limit).inspect_err(|error| {
                    // It goes on.
                    if matches!(error, Error::Timeout { .. })
                        && let Err(error) = writer.reopen(&led)
                    {
                        led.fail(&error);
                    }
                })
            });
            let replica = Arc::new(left?.into_replica()?);
            set(&slot, Running::Replica(replica))
        });
        match demoted.await {
            Ok(()) => {
                *following = Some(self.follow(primary)?);
                Ok::<_, Error>(())
            }
            Err(error @ Error::Timeout { .. }) => {
                self.lead(engine);
                Err(error)
            }
            Err(error) => Err(self.stopped(error)),
        }
    }

    /// Between two roles nothing can be gone on with.
    fn stopped(&self, error: Error) -> Error {
        if !matches!(error, Error::ShutDown) {
            self.node.fail(&error);
        }
        error
    }
}

/// How long others may write to a database that could not be made a primary's.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// Closes what comes too late.
fn set(slot: &EngineSlot, running: Running) -> Result<()> {
    match slot.set(running) {
        None => Ok(()),
        Some(late) => {
            late.close();
            Err(Error::ShutDown)
        }
    }
}

impl Following {
    /// Returns when nothing is taken in any more.
    async fn end(self) -> Endpoint {
        self.ends.cancel();
        // A panic in it is said.
        let _ = self.task.await;
        self.primary
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use rusqlite::Transaction;

    use super::*;
    use crate::db::{Config, Db};
    use crate::ends::{Ends, alone, comes, descriptors, threads};
    use crate::lease::Fixed;
    use crate::status::{Event, Role};
    use crate::txid::Txid;

    const LIMIT: Duration = Duration::from_secs(20);

    fn config(path: &Path) -> Config {
        let create = |conn: &mut rusqlite::Connection| {
            conn.execute_batch("CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY)")?;
            Ok::<_, Error>(())
        };
        Config::new(path).database("notes").listen(([127, 0, 0, 1], 0).into()).migrate(create)
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

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_nodes_change_roles_a_hundred_times_and_nobody_who_reads_or_waits_learns_of_it() {
        let name = "two_nodes_change_roles_a_hundred_times_and_nobody_who_reads_or_waits_learns_of_it";
        if !tokio::task::block_in_place(|| alone(&format!("node::supervisor::tests::{name}"))) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
        let follows =
            config(&dir.path().join("b.db")).lease(Fixed::replica_of(&one.node().addresses.replication));
        let two = Db::open(follows).await.unwrap();
        two.ready().await.unwrap();
        let dbs = [one, two];
        let ends = AtomicBool::new(false);
        let (reads, written) = (AtomicU64::new(0), AtomicU64::new(0));
        let count = |db: &Db| {
            db.read(|conn| {
                Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))? as u64)
            })
        };
        let mut events = dbs[0].events();
        let mut positions = dbs.each_ref().map(Db::watch);
        let first = std::sync::Mutex::new(None);
        let work = async {
            let _ends = Ends(&ends);
            let mut primary = 0;
            for round in 0..100 {
                let txid = write(&dbs).await;
                written.fetch_add(1, Ordering::AcqRel);
                let (led, followed) = (&dbs[primary], &dbs[1 - primary]);
                followed.wait_for(txid).await.unwrap();
                // One who waits for what comes after the change.
                let next = Txid::new(txid.epoch(), txid.number() + 1);
                let early = tokio::time::timeout(Duration::from_millis(1), led.wait_for(next)).await;
                assert!(early.is_err(), "nobody has written it");
                let snapshots = tokio::task::block_in_place(|| dbs.each_ref().map(|db| count(db).unwrap()));
                assert_eq!(snapshots, [written.load(Ordering::Acquire); 2]);
                led.inner.supervisor.demote(endpoint(followed), LIMIT).await.unwrap();
                assert_eq!(led.role(), Role::Replica);
                assert!(matches!(led.inner.slot.primary(), Err(Error::NotPrimary { .. })));
                let above = led.inner.node.applied.history().epoch().number();
                followed.inner.supervisor.promote(above).await.unwrap();
                assert_eq!(
                    (followed.role(), followed.node()),
                    (Role::Primary, &followed.roles().borrow().primary.clone().unwrap())
                );
                let waits = async {
                    let txid = write(&dbs).await;
                    written.fetch_add(1, Ordering::AcqRel);
                    led.wait_for(txid).await.unwrap();
                    txid
                };
                let txid =
                    tokio::time::timeout(LIMIT, waits).await.expect("the old primary follows the new one");
                assert_eq!(txid.number(), next.number(), "round {round}");
                primary = 1 - primary;
                if round == 3 {
                    // All kinds of threads and descriptors have been there by now.
                    *first.lock().unwrap() = Some((threads(), descriptors(dir.path())));
                }
            }
        };
        std::thread::scope(|scope| {
            for db in &dbs {
                scope.spawn(|| {
                    let mut before = 0;
                    while !ends.load(Ordering::Acquire) {
                        let now = count(db).expect("no read fails");
                        assert!(now >= before, "{now} rows after {before}");
                        before = now;
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(work));
        });
        assert!(reads.load(Ordering::Relaxed) > 1000);
        let first = first.into_inner().unwrap().unwrap();
        // Blocking threads of the runtime come and go.
        comes("threads and descriptors as before", || {
            let now = (threads(), descriptors(dir.path()));
            now.0 <= first.0 + 2 && now.1 <= first.1 + 2
        })
        .await;
        let mut roles = 0;
        while let Ok(event) = tokio::time::timeout(Duration::ZERO, events.next()).await {
            match event.unwrap() {
                Event::Role { .. } => roles += 1,
                Event::Missed { events: missed, .. } => roles += missed,
                _ => {}
            }
        }
        assert!(roles >= 100, "{roles} events of roles");
        for positions in &mut positions {
            assert!(positions.has_changed().unwrap(), "the watch lives on");
        }
        for db in &dbs {
            assert!(db.verify().await.unwrap().holds());
            assert_eq!(count(db).unwrap(), written.load(Ordering::Acquire));
            assert!(db.health().can_read, "{:?}", db.health());
        }
        assert_eq!(dbs[0].position().map(|at| at.number()), dbs[1].position().map(|at| at.number()));
        for db in dbs {
            db.shutdown().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_primary_that_can_not_leave_stays_one_and_so_does_a_replica_that_has_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
        let nowhere = Endpoint::parse("http://127.0.0.1:9").unwrap();
        let (guard, waits) = (one.clone(), std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let writer = guard.writer().unwrap();
                waits.wait();
                waits.wait();
                drop(writer);
            });
            waits.wait();
            let demoted = one.inner.supervisor.demote(nowhere.clone(), Duration::from_millis(20));
            let refused = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(demoted));
            assert!(matches!(refused, Err(Error::Timeout { .. })), "{refused:?}");
            waits.wait();
        });
        assert_eq!(one.role(), Role::Primary);
        write(&[one.clone(), one.clone()]).await;
        let other = rusqlite::Connection::open(one.path()).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let refused = one.inner.supervisor.demote(nowhere, Duration::from_millis(20)).await;
        assert!(matches!(refused, Err(Error::Timeout { .. })), "{refused:?}");
        other.execute_batch("ROLLBACK").unwrap();
        write(&[one.clone(), one.clone()]).await;
        one.shutdown().await;

        let two = Db::open(config(&dir.path().join("b.db")).lease(Fixed::replica_of("http://127.0.0.1:9")))
            .await
            .unwrap();
        let refused = two.inner.supervisor.promote(0).await;
        assert!(matches!(refused, Err(Error::NoState(_))), "{refused:?}");
        assert_eq!(two.role(), Role::Replica);
        two.shutdown().await;
    }
}
