//! What an operator asks of the lease, here or through the node's endpoint.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::context::{NodeContext, OperatorCommand};
use crate::error::{Error, Result};
use crate::lease::Store;
use crate::lease::record::LEASE_TIMES;
use crate::node::elector::Elector;
use crate::peer::NodeId;
use crate::status::{Event, Role};

/// How long a promotion may take, with the application's own part in it.
const PROMOTION_LIMIT: Duration = Duration::from_secs(90);

impl Elector {
    /// Carries out an operator's command. Returns the node that has the lease then.
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub(crate) async fn obey(&self, command: OperatorCommand, node: &NodeContext) -> Result<NodeId> {
        match command {
            OperatorCommand::Handoff { to } => self.handoff(to).await,
            OperatorCommand::PromoteUnchecked => self.promoted_unchecked(node).await.map(|()| node.me.node),
            // The door answers that by itself.
            OperatorCommand::Describe => Ok(node.me.node),
        }
    }

    /// Takes the lease with what is here, whatever others have, and returns when this node is the
    /// primary.
    ///
    /// # Errors
    /// [`Error::Timeout`] when another node holds the lease or the promotion fails.
    /// [`Error::ShutDown`].
    pub(crate) async fn promoted_unchecked(&self, node: &NodeContext) -> Result<()> {
        if node.leads() {
            return Ok(());
        }
        let (mut roles, mut events) = (node.roles.subscribe(), node.events());
        self.promote_unchecked().await?;
        let (begun, limit) = (Instant::now(), *LEASE_TIMES.end() + PROMOTION_LIMIT);
        let leads = roles.wait_for(|state| matches!(state.role, Role::Primary | Role::Stopped));
        let not_taken = async {
            loop {
                match events.recv().await {
                    Ok(Event::LeaseNotTaken { holder }) => return holder,
                    // One that was missed costs time alone.
                    Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        let timeout = |what: String| Error::Timeout { what, after: begun.elapsed() };
        tokio::select! {
            leads = tokio::time::timeout(limit, leads) => match leads {
                Ok(Ok(state)) if state.role == Role::Primary => Ok(()),
                Ok(_) => Err(Error::ShutDown),
                Err(_) => Err(timeout("the lease, or the promotion".into())),
            },
            holder = not_taken => Err(timeout(format!("the lease, which node {holder} holds and renews"))),
        }
    }

    /// Does something with the lease's store where its client runs: on the thread of the election.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub(crate) async fn with_store<T, F>(&self, work: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let runtime = self.runtime.get().ok_or(Error::ShutDown)?;
        runtime.spawn(work(self.store.clone())).await.map_err(|_| Error::ShutDown)
    }
}
