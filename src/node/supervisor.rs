//! What a node does at the moment, and how that changes: the one place where a role begins and
//! ends.
//!
//! Each change runs on a thread of its own, and a caller that leaves changes nothing. Streams and
//! the application's hooks run on the runtime in which the database was opened, so changes can be
//! asked for on any other.

mod demotion;
mod handover;
mod hooks;
mod promotion;
#[cfg(all(test, target_os = "linux"))]
mod tests;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::{NodeContext, RoleChange};
use crate::engine::{EngineOptions, PrimaryEngine};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::net::Endpoint;
use crate::node::slot::{EngineSlot, Running};
use crate::node::writer::Writer;
use crate::primary::ReplicaServer;
use crate::report::Condition;
use crate::status::Role;
use crate::threads;
use crate::txid::{Epoch, Position};

pub(crate) use hooks::{Hooks, TurnHook};

/// Between two looks whether a change has ended, for the close.
const CLOSE_STEP: Duration = Duration::from_millis(1);

/// Begins and ends a database's roles, one at a time.
pub(crate) struct Supervisor {
    turns: Arc<Turns>,
    /// A change of the role holds the lock.
    standing: Arc<tokio::sync::Mutex<BesideEngine>>,
}

/// What a change of the role works with.
pub(crate) struct Turns {
    pub(crate) node: Arc<NodeContext>,
    pub(crate) slot: Arc<EngineSlot>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) replica_server: Arc<ReplicaServer>,
    pub(crate) tracker: TaskTracker,
    /// The application's.
    pub(crate) runtime: Handle,
    pub(crate) options: EngineOptions,
    pub(crate) hooks: Hooks,
    /// Who is the primary is fixed by the configuration, and by hand.
    pub(crate) fixed: bool,
    /// Held while the node says that it leads, and while it is fenced: the one or the other comes
    /// first. It has the number that the node was at when it was fenced.
    pub(crate) edge: Mutex<Option<u64>>,
}

/// What goes on beside the engine.
#[derive(Default)]
struct BesideEngine {
    following: Option<Following>,
    /// What the application does because its node is the primary no more.
    on_demote: Option<JoinHandle<()>>,
}

/// A primary that is followed.
struct Following {
    primary: Endpoint,
    ends: CancellationToken,
    task: JoinHandle<()>,
}

/// A change that runs, and to whom it is told.
struct Change<T> {
    turns: Arc<Turns>,
    standing: OwnedMutexGuard<BesideEngine>,
    done: Option<Result<T>>,
    reply: oneshot::Sender<Result<T>>,
}

impl Supervisor {
    pub(crate) fn new(turns: Turns) -> Supervisor {
        Supervisor { turns: Arc::new(turns), standing: Arc::default() }
    }

    /// Begins the role that the node has when it starts.
    ///
    /// # Cancel safety
    /// As of all changes: dropped after it was polled, it goes on to its end.
    pub(crate) async fn begin(&self, primary: Option<Endpoint>) -> Result<()> {
        self.change(move |turns, standing| match (turns.slot.get()?, primary) {
            (Running::Primary(engine), _) => {
                turns.greet(standing)?;
                turns.lead(&engine)
            }
            (Running::Replica(_), primary) => turns.follow(standing, primary),
        })
        .await
    }

    /// Has the replica follow this primary, or none. The one that it follows already goes on.
    ///
    /// # Errors
    /// [`Error::Internal`] on a primary.
    pub(crate) async fn follow(&self, primary: Option<Endpoint>) -> Result<()> {
        self.change(move |turns, standing| turns.follow(standing, primary)).await
    }

    /// Ends the stream from the primary, and takes in all that came. The node stays a replica,
    /// without a stream. Returns the state that a primary vouches for; none when none vouches for
    /// what is here. On a primary it is what the log has.
    pub(crate) async fn prepare(&self) -> Result<Option<Position>> {
        self.change(|turns, standing| match turns.slot.get()? {
            Running::Primary(engine) => Ok(engine.log().tip()),
            Running::Replica(engine) => {
                turns.follow(standing, None)?;
                engine.vouched()
            }
        })
        .await
    }

    /// Makes the replica the primary, of exactly this epoch. The fence has been set for it. Read
    /// connections, their snapshots and all waits live on. Who is held for want of a primary goes
    /// on when the call returns.
    ///
    /// `unchecked`: no primary vouches for what is here, or may not. It becomes history all the
    /// same, and replaces what the other nodes have.
    ///
    /// # Errors
    /// - [`Error::Peer`] when the epoch is not above all that are known here.
    /// - [`Error::NoState`] when no primary vouches for what is here.
    /// - What the application's migrations say, and [`Error::OnPromote`].
    /// - [`Error::NotPrimary`] when the fence ended before the node led.
    /// - [`Error::Damaged`] and the like when the files, unchecked, are no state that a primary
    ///   can go on from.
    ///
    /// The node is a replica then, as before, and what was committed meanwhile stays in its
    /// history. After any other error replication has stopped.
    pub(crate) async fn promote(&self, epoch: Epoch, unchecked: bool) -> Result<()> {
        self.change(move |turns, standing| turns.promote(standing, Some(epoch), unchecked)).await
    }

    /// The primary opens this epoch and goes on in it. One that was fenced, or withheld writes,
    /// takes them again. It acknowledges none before its fence is set for this epoch.
    ///
    /// # Errors
    /// [`Error::Peer`] when the epoch is not above all that are known here, [`Error::Timeout`] when
    /// others write for too long, [`Error::NotPrimary`] on a replica.
    pub(crate) async fn renew(&self, epoch: Epoch) -> Result<()> {
        self.change(move |turns, _| {
            let engine = turns.slot.primary()?;
            engine.open_epoch(epoch)?;
            engine.release()?;
            turns.lead_on(&engine, &mut lock(&turns.edge))
        })
        .await
    }

    /// Acknowledges nothing from now on. What is queued is refused, what runs is interrupted, and
    /// no connection of this node commits. Waits for nothing.
    pub(crate) fn fence(&self) {
        if cfg!(replite_no_fence) {
            return;
        }
        let Turns { node, writer, edge, .. } = &*self.turns;
        // First: the application's code may run while another thread has the edge.
        node.fence.close();
        let number = self.turns.number();
        {
            let mut edge = lock(edge);
            let role = node.roles.borrow().role;
            if matches!(role, Role::Primary | Role::Promoting) {
                edge.get_or_insert(number);
                node.change_role(RoleChange::Stands { role: Role::Fencing, waits_for: None });
            }
        }
        writer.refuse();
        writer.interrupt();
    }

    /// Makes the primary a replica that follows none, fenced or not. Read connections, their
    /// snapshots and all waits live on. Writes that are queued are refused, and what runs ends.
    /// Waits for as long as others write. Returns the last state of this node's history, all of
    /// which was on its way to the replicas that are connected, within a second. A node that was
    /// fenced sends what was committed when this begins, and nothing after that.
    ///
    /// On a replica it does nothing, and returns what [`Supervisor::prepare`] does.
    ///
    /// # Errors
    /// [`Error::ShutDown`]. After any other error replication has stopped.
    pub(crate) async fn demote(&self) -> Result<Option<Position>> {
        self.change(|turns, standing| turns.demote(standing)).await
    }

    /// [`Supervisor::promote`] by hand, in an epoch above all that are known here.
    pub(crate) async fn promote_by_hand(&self) -> Result<()> {
        self.change(|turns, standing| {
            turns.expect_fixed()?;
            turns.promote(standing, None, false)
        })
        .await
    }

    /// [`Supervisor::demote`] by hand. The node follows this primary from then on.
    pub(crate) async fn demote_by_hand(&self, primary: Endpoint) -> Result<Option<Position>> {
        self.change(|turns, standing| {
            turns.expect_fixed()?;
            let position = turns.demote(standing)?;
            turns.follow(standing, Some(primary))?;
            Ok(position)
        })
        .await
    }

    /// Runs a change on a thread of its own, one at a time.
    async fn change<T: Send + 'static>(
        &self,
        run: impl FnOnce(&Turns, &mut BesideEngine) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let standing = tokio::select! {
            biased;
            () = self.turns.node.stop.cancelled() => return Err(Error::ShutDown),
            standing = self.standing.clone().lock_owned() => standing,
        };
        let (reply, answer) = oneshot::channel();
        let change = Change { turns: self.turns.clone(), standing, done: None, reply };
        let work = move |change: &mut Change<T>| {
            change.done = Some(run(&change.turns, &mut change.standing));
            Ok(())
        };
        threads::start("replite-role", change, work, |change, ended| {
            let Change { turns, standing, done, reply } = change;
            let done = match ended {
                Ok(()) => done.unwrap_or(Err(Error::ShutDown)),
                // No one knows how far it came.
                Err(error) => Err(turns.stopped(error)),
            };
            // The next one begins before the caller of this one knows.
            drop((standing, turns));
            let _ = reply.send(done);
        })?;
        answer.await.unwrap_or(Err(Error::ShutDown))
    }

    /// Returns when no change is under way. The node is closed: those that wait end, and no other
    /// begins. Blocks.
    pub(crate) fn close(&self) {
        while self.standing.try_lock().is_err() {
            std::thread::sleep(CLOSE_STEP);
        }
    }
}

impl Turns {
    fn expect_fixed(&self) -> Result<()> {
        if self.fixed {
            return Ok(());
        }
        Err(Error::Config("the lease says which node is the primary: hand it over instead".into()))
    }

    /// The node leads from now on, unless its fence has ended. Replicas can join before the role
    /// changes: a node that hears of the primary finds one.
    fn lead(&self, engine: &Arc<PrimaryEngine>) -> Result<()> {
        let mut edge = lock(&self.edge);
        if !self.node.fence.is_open() {
            return Err(Error::NotPrimary { primary: None });
        }
        self.lead_on(engine, &mut edge)
    }

    /// [`Turns::lead`], be the fence open or not. The caller holds the edge.
    fn lead_on(&self, engine: &Arc<PrimaryEngine>, edge: &mut Option<u64>) -> Result<()> {
        self.may_go_on()?;
        *edge = None;
        self.writer.accept();
        self.replica_server.go_on(engine.clone());
        let epoch = self.node.applied.history().epoch();
        // It follows none any more, and is late for nothing.
        self.node.set_lag(None);
        self.node.report_aside(Condition::StreamWorks);
        self.node.report_aside(Condition::CaughtUp);
        self.node.change_role(RoleChange::Leads { me: self.node.me.clone(), epoch });
        // What came late before that is history now.
        self.node.set_late(false);
        Ok(())
    }

    /// The number of the last transaction that is captured here.
    fn number(&self) -> u64 {
        self.node.applied.position().map_or(0, |position| position.number())
    }

    /// Follows this primary, or none, in place of any other.
    fn follow(&self, standing: &mut BesideEngine, primary: Option<Endpoint>) -> Result<()> {
        let Running::Replica(engine) = self.slot.get()? else {
            return Err(Error::Internal("a primary follows nobody".into()));
        };
        let before = standing.following.as_ref().filter(|now| !now.task.is_finished());
        if before.is_some() && before.map(|now| &now.primary) == primary.as_ref() {
            return Ok(());
        }
        if self.end_following(standing)?.is_some() {
            let epoch = self.node.roles.borrow().epoch;
            self.node.change_role(RoleChange::Follows { primary: None, epoch });
        }
        let Some(primary) = primary else { return Ok(()) };
        self.may_go_on()?;
        let (node, ends) = (self.node.clone(), self.node.stop.child_token());
        let (of, until) = (primary.clone(), ends.clone());
        let _on_it = self.runtime.enter();
        let task = crate::replica::spawn(node, engine, of, until, &self.tracker);
        standing.following = Some(Following { primary, ends, task });
        Ok(())
    }

    /// Returns when nothing is taken in any more: the primary that was followed.
    fn end_following(&self, standing: &mut BesideEngine) -> Result<Option<Endpoint>> {
        let Some(Following { primary, ends, mut task }) = standing.following.take() else { return Ok(None) };
        ends.cancel();
        wait_for(async {
            tokio::select! {
                biased;
                // A panic in it is said.
                _ = &mut task => Ok(Some(primary)),
                // The application's runtime may run nothing any more.
                () = self.node.stop.cancelled() => {
                    task.abort();
                    Err(Error::ShutDown)
                }
            }
        })?
    }

    fn stands(&self, role: Role) {
        self.node.change_role(RoleChange::Stands { role, waits_for: None });
    }

    /// Fails once the node is being closed. Whatever waits asks.
    fn may_go_on(&self) -> Result<()> {
        if self.node.stop.is_cancelled() {
            return Err(Error::ShutDown);
        }
        self.slot.get().map(drop)
    }

    /// Runs this engine from now on. Closes what comes too late.
    fn run(&self, running: Running) -> Result<()> {
        match self.slot.set(running) {
            None => Ok(()),
            Some(late) => {
                late.close();
                Err(Error::ShutDown)
            }
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

/// Waits on this thread, with a clock of its own: the application's runtime may be busy, or gone.
fn wait_for<F: Future>(future: F) -> Result<F::Output> {
    let clock = tokio::runtime::Builder::new_current_thread().enable_time().build();
    Ok(clock.map_err(Error::io("start", "a clock"))?.block_on(future))
}
