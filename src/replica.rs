//! Follows a primary: connect, verify, hand over what comes, acknowledge, back off.

mod acks;
mod backoff;
mod clocks;
mod connection;
mod give_back;
mod lag;
mod offers;
mod pace;
mod reporter;
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
use crate::error::{Error, PeerProblem, Result};
use crate::handshake::STOPPING;
use crate::keys::DatabaseKeys;
use crate::log::Log;
use crate::net::Endpoint;
use crate::report::Condition;
use crate::threads::{aside, blocking, caught_task};
use crate::txid::{Epoch, Position};
use crate::wire::{NOT_PRIMARY, Unit, Want};

use backoff::Backoff;
use connection::PrimaryConnection;
use lag::Lagging;
use reporter::Reporter;

pub(crate) use units::foreign;

/// What takes over the primary's history on this node.
pub(crate) trait Feed: Send + Sync + 'static {
    /// See [`ReplicaEngine::standing`].
    fn standing(
        &self,
    ) -> impl Future<Output = Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError>> + Send;
    /// Takes the keys of the primary; see [`ReplicaEngine::take_keys`].
    fn take_keys(&self, keys: DatabaseKeys) -> impl Future<Output = Result<(), StreamError>> + Send;
    /// The stream's units, from the welcome on; see [`ReplicaEngine::feed`].
    fn feed(&self, units: Vec<Unit>) -> impl Future<Output = Result<(), StreamError>> + Send;
    /// The pages of the answer to a primary's question, encoded; see [`ReplicaEngine::answers`].
    fn answer(&self, want: Want) -> impl Future<Output = Result<Bytes>> + Send;
    /// See [`ReplicaEngine::log`].
    fn log(&self) -> Option<Arc<Log>>;
    /// See [`ReplicaEngine::taken`].
    fn taken(&self) -> u64;
    /// Has everything that is applied on the disk, at once; see [`ReplicaEngine::sync`].
    fn sync(&self) -> impl Future<Output = Result<()>> + Send;
    /// See [`ReplicaEngine::synced`].
    fn synced(&self) -> watch::Receiver<Option<Position>>;
}

impl Feed for ReplicaEngine {
    async fn standing(&self) -> Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError> {
        ReplicaEngine::standing(self).await
    }

    async fn take_keys(&self, keys: DatabaseKeys) -> Result<(), StreamError> {
        ReplicaEngine::take_keys(self, keys).await
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

    async fn sync(&self) -> Result<()> {
        blocking(ReplicaEngine::sync(self)).await
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
    tracker.spawn(clocks::keep(node.clone(), ends.clone()));
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
        let drained = session.is_drained();
        if is_succeeded(&error) {
            node.lease.offers.hint();
        }
        // The connection is closed before the application is told that the primary is away.
        drop(session);
        lagging.disconnected();
        lagging.publish(node);
        without_primary(node, epoch);
        reporter.ended(&error, drained);
        tokio::time::sleep(if is_early(&error) { backoff.soon() } else { backoff.next() }).await;
    }
}

/// Whether the node that was asked may be about to become the primary, or to leave that to another
/// at the same place: it is asked again before long.
fn is_early(error: &StreamError) -> bool {
    match error {
        StreamError::Failed(Error::Peer { problem, .. }) => match problem {
            PeerProblem::NotPrimary => true,
            PeerProblem::Refused(word) => word == STOPPING,
            _ => false,
        },
        _ => false,
    }
}

/// Whether another node may be the primary by now: the record says which.
fn is_succeeded(error: &StreamError) -> bool {
    match error {
        StreamError::Failed(Error::Peer { problem, .. }) => {
            matches!(problem, PeerProblem::Goodbye(reason) if reason == NOT_PRIMARY)
        }
        _ => false,
    }
}

fn without_primary(node: &NodeContext, epoch: Epoch) {
    let epoch = epoch.max(node.roles.borrow().epoch);
    node.change_role(RoleChange::Follows { primary: None, epoch });
}
