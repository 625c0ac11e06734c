//! A primary withholds commits, and offers its lease to a replica with the last of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::context::NodeContext;
use crate::election::{Accepted, Input};
use crate::error::{Error, Result};
use crate::lease::record::Attempt;
use crate::node::supervisor::Supervisor;
use crate::primary::ReplicaServer;
use crate::status::PeerInfo;
use crate::wire::HandoffStage;

/// How long other connections, and a write that runs, may keep a handoff from the write lock.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// How long the replica has to get to the last state, and to answer.
const OFFER_LIMIT: Duration = Duration::from_secs(1);
/// All of [`Hands::withhold`] but for the requests that run.
pub(crate) const WITHHOLD_LIMIT: Duration = Duration::from_secs(3);

/// What a handoff works with, beside the supervisor.
pub(super) struct Hands {
    pub(super) node: Arc<NodeContext>,
    pub(super) replica_server: Arc<ReplicaServer>,
    /// How long requests that run may take.
    pub(super) drain_limit: Duration,
}

/// A lease that is to be offered, unless that is given up.
#[derive(Debug)]
pub(super) struct Withhold {
    /// None: to no node. This one ends, and gives the lease back.
    pub(super) to: Option<PeerInfo>,
    pub(super) attempt: Attempt,
    pub(super) given_up: CancellationToken,
}

impl Hands {
    /// Has this node commit nothing more, and offers its lease with that last state.
    pub(super) async fn withhold(&self, supervisor: &Supervisor, offer: &Withhold) -> Input {
        let outcome = self.offer(supervisor, offer).await;
        Input::Withheld { attempt: offer.attempt, outcome }
    }

    /// Given up between two steps. The supervisor's own go on to their end.
    async fn offer(&self, supervisor: &Supervisor, offer: &Withhold) -> Result<Accepted, String> {
        let given_up = || "it was given up".to_string();
        let text = |error: Error| error.to_string();
        supervisor.yields().await.map_err(text)?;
        self.replica_server.tell_handoff(HandoffStage::Begins);
        tokio::select! {
            biased;
            () = offer.given_up.cancelled() => return Err(given_up()),
            // Those that take longer are refused when they write.
            _ = tokio::time::timeout(self.drain_limit, self.node.requests_done()) => {}
        }
        let begun = Instant::now();
        let position = supervisor.withhold(WRITE_LIMIT).await.map_err(text)?;
        tracing::debug!(took = ?begun.elapsed(), %position, "nothing more is committed here");
        let Some(to) = &offer.to else { return Ok(Accepted { position, boot: String::new() }) };
        let begun = Instant::now();
        let accepted = self.replica_server.offer(to, offer.attempt.0, position);
        let accepted = tokio::select! {
            biased;
            () = offer.given_up.cancelled() => return Err(given_up()),
            accepted = tokio::time::timeout(OFFER_LIMIT, accepted) => accepted,
        };
        let boot = accepted.map_err(|_| format!("it did not answer within {OFFER_LIMIT:?}"))?;
        let boot = boot.map_err(|error| error.to_string())?;
        tracing::debug!(took = ?begun.elapsed(), to = %to.node, "the lease is accepted");
        Ok(Accepted { position, boot })
    }
}
