//! Follows a primary: connect, verify, hand over what comes, acknowledge, back off.

mod acks;
mod backoff;
mod connection;
mod give_back;
mod lag;
mod pace;
#[cfg(test)]
mod tests;
mod units;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::{NodeContext, RoleChange};
use crate::engine::{ReplicaEngine, ReplicaStanding, StreamError};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::net::Endpoint;
use crate::report::{Condition, Part};
use crate::threads::{aside, blocking, caught_task};
use crate::txid::{Epoch, Position};
use crate::wire::{Unit, Want};

use backoff::Backoff;
use connection::PrimaryConnection;
use lag::Lagging;

/// What takes over the primary's history on this node.
pub(crate) trait Feed: Send + Sync + 'static {
    /// See [`ReplicaEngine::standing`].
    fn standing(
        &self,
    ) -> impl Future<Output = Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError>> + Send;
    /// The stream's units, from the welcome on; see [`ReplicaEngine::feed`].
    fn feed(&self, units: Vec<Unit>) -> impl Future<Output = Result<(), StreamError>> + Send;
    /// The pages of the answer to a primary's question, encoded; see [`ReplicaEngine::answers`].
    fn answer(&self, want: Want) -> impl Future<Output = Result<Bytes>> + Send;
    /// See [`ReplicaEngine::log`].
    fn log(&self) -> Option<Arc<Log>>;
    /// See [`ReplicaEngine::taken`].
    fn taken(&self) -> u64;
    /// See [`ReplicaEngine::synced`].
    fn synced(&self) -> watch::Receiver<Option<Position>>;
}

impl Feed for ReplicaEngine {
    async fn standing(&self) -> Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError> {
        ReplicaEngine::standing(self).await
    }

    async fn feed(&self, units: Vec<Unit>) -> Result<(), StreamError> {
        ReplicaEngine::feed(self, units).await
    }

    async fn answer(&self, want: Want) -> Result<Bytes> {
        let answers = self.answers();
        blocking(move || answers(want)).await
    }

    fn log(&self) -> Option<Arc<Log>> {
        ReplicaEngine::log(self)
    }

    fn taken(&self) -> u64 {
        ReplicaEngine::taken(self)
    }

    fn synced(&self) -> watch::Receiver<Option<Position>> {
        ReplicaEngine::synced(self)
    }
}

/// Starts to follow the primary at `primary`, until that is to end or the node has stopped. All
/// tasks are the tracker's.
pub(crate) fn spawn<F: Feed>(
    node: Arc<NodeContext>,
    feed: Arc<F>,
    primary: Endpoint,
    ends: CancellationToken,
    tracker: &TaskTracker,
) -> JoinHandle<()> {
    tracker.spawn(follow(node, feed, primary, ends, tracker.clone()))
}

async fn follow<F: Feed>(
    node: Arc<NodeContext>,
    feed: Arc<F>,
    primary: Endpoint,
    ends: CancellationToken,
    tracker: TaskTracker,
) {
    let lagging = Lagging::new();
    let always = async {
        let mut backoff = Backoff::default();
        loop {
            let streams = streams(&node, &*feed, &primary, &tracker, &lagging, &mut backoff);
            let Err(error) = caught_task("following the primary", streams).await;
            // Said like the end of a stream, and the next one is tried in the same way.
            lagging.disconnected();
            lagging.publish(&node);
            node.report_aside(Condition::FollowingPanicked { primary: &primary, error: &error });
            let epoch = node.roles.borrow().epoch;
            aside(|| without_primary(&node, epoch));
            tokio::time::sleep(backoff.next()).await;
        }
    };
    tokio::select! {
        () = always => {}
        () = lagging.keep_published(&node) => {}
        () = ends.cancelled() => {}
        // Nothing is taken in any more.
        () = node.stopped() => {}
    }
}

/// One stream after the other.
async fn streams<F: Feed>(
    node: &Arc<NodeContext>,
    feed: &F,
    primary: &Endpoint,
    tracker: &TaskTracker,
    lagging: &Lagging,
    backoff: &mut Backoff,
) -> Infallible {
    let mut reporter = Reporter::new(node.clone(), primary.clone());
    without_primary(node, node.applied.history().epoch());
    loop {
        let mut session = PrimaryConnection::new(node, feed, primary, tracker, lagging);
        let error = session.run(&mut reporter).await;
        if session.was_fruitful() {
            backoff.reset();
        }
        let epoch = session.epoch().unwrap_or_else(|| node.roles.borrow().epoch);
        // The connection is closed before the application is told that the primary is away.
        drop(session);
        lagging.disconnected();
        lagging.publish(node);
        without_primary(node, epoch);
        reporter.ended(&error);
        tokio::time::sleep(backoff.next()).await;
    }
}

fn without_primary(node: &NodeContext, epoch: Epoch) {
    let epoch = epoch.max(node.roles.borrow().epoch);
    node.change_role(RoleChange::Follows { primary: None, epoch });
}

/// What an error of a stream means: not all of them are the primary's, or the link's.
fn what_ended(error: &StreamError) -> &'static str {
    match error {
        StreamError::Failed(Error::Peer { .. }) => "can't follow the primary; trying again",
        StreamError::HealPaused { .. } => "the next heal waits",
        _ => "what comes from the primary can't be taken in here; trying again",
    }
}

/// Says each problem once, however often it is met in a row.
struct Reporter {
    node: Arc<NodeContext>,
    primary: Endpoint,
    said: Option<String>,
    connected: bool,
}

impl Reporter {
    fn new(node: Arc<NodeContext>, primary: Endpoint) -> Reporter {
        let said = node.problem_of(Part::Stream);
        Reporter { node, primary, said, connected: false }
    }

    fn connected(&mut self, peer: &crate::status::PeerInfo, plan: crate::wire::Plan) {
        self.connected = true;
        self.node.report(Condition::Following { primary: &self.primary, peer, plan: &plan });
    }

    /// Something was taken in: what was wrong is over.
    fn healthy(&mut self) {
        if self.said.take().is_some() {
            self.node.report(Condition::StreamWorks);
        }
    }

    fn ended(&mut self, error: &StreamError) {
        // This stream has stopped, and not replication.
        let problem = match error {
            StreamError::Failed(error) => error.cause().to_string(),
            reason => reason.to_string(),
        };
        if std::mem::take(&mut self.connected) {
            self.node.report(Condition::StreamLost { problem: &problem });
        }
        let still = self.said.as_ref() == Some(&problem);
        let closed = matches!(error, StreamError::Failed(Error::ShutDown));
        let (primary, what) = (&self.primary, what_ended(error));
        let new = !still && !closed;
        self.node.report(Condition::NotFollowing { primary, problem: &problem, what, new });
        if still {
            tracing::debug!(primary = %self.primary, problem, "still");
            return;
        }
        if closed {
            tracing::debug!(primary = %self.primary, "the follower is shut down");
        }
        self.said = Some(problem);
    }
}
