//! An open database of a node, whatever its role.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::{NodeContext, RoleChange};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::lock::lock;
use crate::members::MembersDoor;
use crate::net::ServerTls;
use crate::node::disk_use::DiskUse;
use crate::node::elector::Elector;
use crate::node::open_files::Claim;
use crate::node::pool::{Pool, PooledConnection};
use crate::node::slot::EngineSlot;
use crate::node::supervisor::Supervisor;
use crate::node::tenancy::Tenancy;
use crate::node::verifier::Verifier;
use crate::node::writer::Writer;
use crate::primary::ReplicaServer;
use crate::proxy::AppDoor;
use crate::report::Condition;
use crate::server::{Mount, ReplicationService};
use crate::sqlite::{last_code, unreadable};
use crate::threads;

/// How long the end of the streams is waited for: they have a second for what is captured, and one
/// for their last word.
const STREAMS_LIMIT: Duration = Duration::from_secs(3);
/// How long the end waits until the lease is handed over or given back, beside the requests that
/// run. Without that the others wait for its time.
const LEAVE_LIMIT: Duration = Duration::from_secs(8);
/// How long a shutdown waits for connections and tasks before it goes on without them.
const TASKS_LIMIT: Duration = Duration::from_secs(5);

/// How long requests may take to end that other nodes forwarded on the private channel.
const FORWARDS_LIMIT: Duration = Duration::from_secs(5);

/// An open database of a node: its engine, its connections, and what ends with it.
pub(crate) struct Database {
    pub(crate) node: Arc<NodeContext>,
    pub(crate) paths: Paths,
    pub(crate) pool: Pool,
    pub(crate) slot: Arc<EngineSlot>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) supervisor: Arc<Supervisor>,
    /// Where the role is a matter of a lease.
    pub(crate) elector: Option<Elector>,
    pub(crate) verifier: Arc<Verifier>,
    pub(crate) replica_server: Arc<ReplicaServer>,
    pub(crate) members: MembersDoor,
    /// The application's service, once it was given.
    pub(crate) app: AppDoor,
    pub(crate) tracker: TaskTracker,
    pub(crate) wait_timeout: Duration,
    /// How long a handoff waits for requests that run.
    pub(crate) drain_limit: Duration,
    pub(crate) grace: Duration,
    /// For the applications of other nodes.
    pub(crate) app_tls: ServerTls,
    pub(crate) opened: Instant,
    /// What the files take up, for gauges.
    pub(crate) disk_use: DiskUse,
    /// Transactions that replicas gave back.
    pub(crate) recovered: u64,
    /// A caller is about to close it.
    pub(crate) ending: AtomicBool,
    /// It is closed, or being closed: nothing new is begun.
    pub(crate) closed: AtomicBool,
    /// Cancelled when everything has ended.
    pub(crate) ended: CancellationToken,
    pub(crate) claim: Mutex<Option<Claim>>,
    /// Its lock is kept to the end.
    pub(crate) tenancy: Mutex<Option<Tenancy>>,
    /// Dropped last.
    pub(crate) _keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Db").field("path", &self.paths.database()).finish_non_exhaustive()
    }
}

impl Database {
    /// Reads as little as can be, to see whether that works.
    pub(crate) fn try_read(&self) {
        let Ok(lease) = self.lease(Some(Duration::ZERO)) else { return };
        match lease.query_row("PRAGMA schema_version", [], |_| Ok(())) {
            Ok(()) => self.node.read_worked(),
            Err(_) => self.judge(&lease),
        }
    }

    /// A connection to read with. The caller waits for it for `patience`, or else for the
    /// configured time.
    pub(crate) fn lease(&self, patience: Option<Duration>) -> Result<PooledConnection<'_>> {
        self.pool.lease(patience).inspect_err(|error| match error {
            Error::Sqlite(rusqlite::Error::SqliteFailure(code, _)) if unreadable(code.extended_code) => {
                self.node.read_failed(&error.to_string());
            }
            // Said by the engine.
            _ => {}
        })
    }

    /// Whether a read that failed says that the database can't be read.
    pub(crate) fn judge(&self, lease: &PooledConnection<'_>) {
        let code = last_code(lease);
        if unreadable(code) {
            lease.spoil();
            self.node.read_failed(&rusqlite::ffi::Error::new(code).to_string());
        }
    }

    /// Fails when the files are not those that were opened.
    pub(crate) fn expect_files(&self) -> Result<()> {
        self.slot.get()?.expect_files()
    }

    /// Fails while there is nothing to read.
    pub(crate) fn readable(&self) -> Result<()> {
        if self.node.astray() {
            // The replica opens what is at the path now.
            let changed = || Error::Disturbed(self.node.problem().unwrap_or_default());
            return Err(self.node.failure().map_or_else(changed, Error::Stopped));
        }
        if self.slot.is_readable()? {
            return Ok(());
        }
        let problem = self.node.problem();
        Err(Error::NoState(problem.unwrap_or_else(|| "the replica is not filled yet".into())))
    }

    pub(crate) fn service(&self, mount: Mount) -> ReplicationService {
        let (node, replica_server) = (self.node.clone(), self.replica_server.clone());
        ReplicationService::new(node, replica_server, self.tracker.clone(), mount)
            .with_members(self.members.clone())
            .with_app(self.app.clone())
    }

    pub(crate) async fn drain(&self) {
        let alone = self.node.leads() && self.replica_server.channels().is_empty();
        self.node.begin_draining(alone);
        // Another node can take over before this one ends: with all that was committed here.
        if let Some(elector) = &self.elector
            && tokio::time::timeout(self.drain_limit + LEAVE_LIMIT, elector.leave()).await.is_err()
        {
            self.node.report(Condition::LeaseNotGivenBack);
        }
        self.node.drain.cancel();
        if tokio::time::timeout(STREAMS_LIMIT, self.replica_server.deserted()).await.is_err() {
            self.node.report(Condition::StreamsLate);
        }
    }

    /// Ends streams and tasks with a limit. Blocks.
    pub(crate) fn end_tasks(&self) {
        // A runtime of its own: the one that the tasks run in may have ended.
        let clock = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(clock) => clock,
            Err(error) => return self.node.report(Condition::CloseClockMissing { error: &error }),
        };
        clock.block_on(async {
            self.drain().await;
            if tokio::time::timeout(FORWARDS_LIMIT, self.app.done()).await.is_err() {
                self.node.report(Condition::ForwardsLate);
            }
            self.node.stop.cancel();
            self.tracker.close();
            if tokio::time::timeout(TASKS_LIMIT, self.tracker.wait()).await.is_err() {
                self.node.report(Condition::TasksLate);
            }
        });
    }

    /// A caller that opens the file anew waits for us from now on.
    pub(crate) fn announce(&self) {
        if let Some(claim) = &*lock(&self.claim) {
            claim.closing();
        }
    }

    /// Ends everything that is ours. Blocks for as long as the last fsyncs take.
    pub(crate) fn close(&self) {
        // The node gives the file back even when code of the application panics. After that it says
        // that everything has ended.
        let _said_at_the_end = self.ended.clone().drop_guard();
        let _claim = lock(&self.claim).take();
        let _tenancy = lock(&self.tenancy).take();
        self.closed.store(true, Ordering::Release);
        self.node.stop.cancel();
        threads::aside(|| self.app.close());
        self.tracker.close();
        if let Some(elector) = &self.elector {
            elector.close();
        }
        self.replica_server.set(None);
        self.pool.close();
        // The verifier reads through connections of its own, which have to be closed before the
        // others.
        self.verifier.close();
        // First: a role that is about to begin finds that it is too late.
        let running = self.slot.take();
        self.writer.close();
        if let Some(running) = running {
            running.close();
        }
        // A change that was under way finds that, and ends.
        self.supervisor.close();
        self.replica_server.set(None);
        crate::sqlite::close_unlocked();
        self.node.applied.close();
        threads::aside(|| self.node.change_role(RoleChange::Stopped));
    }
}

/// What the clones of a handle share: with the last of them the database is closed.
pub(crate) struct LastHandle(pub(crate) Arc<Database>);

impl Deref for LastHandle {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.0
    }
}

impl fmt::Debug for LastHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        // At once: what is dropped with a runtime's tasks, such as the listener, is free soon then.
        self.node.stop.cancel();
        if may_wait_here() {
            self.announce();
            self.close();
        } else {
            close_behind(&self.0, false);
        }
    }
}

/// Whether the last fsyncs may hold up this thread: not one that drives async tasks, nor one of our
/// own, which would wait for itself.
fn may_wait_here() -> bool {
    let ours = std::thread::current().name().is_some_and(|name| name.starts_with("replite-"));
    !ours && tokio::runtime::Handle::try_current().is_err()
}

/// Closes on a thread of its own: neither a dropped future nor a runtime that ends leaves it half
/// done.
pub(crate) fn close_behind(inner: &Arc<Database>, gently: bool) {
    inner.announce();
    let work = move |inner: &mut Arc<Database>| {
        if gently {
            inner.end_tasks();
        }
        Ok(())
    };
    let started = threads::start("replite-close", inner.clone(), work, |inner, ended| {
        inner.close();
        if let Err(error) = ended {
            inner.node.report(Condition::CloseNotAwaited { error: &error });
        }
    });
    if let Err(error) = started {
        inner.close();
        inner.node.report(Condition::CloseThreadMissing { error: &error });
    }
}
