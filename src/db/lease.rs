//! What an application, or its operator, asks of the lease.

use std::time::Duration;

use crate::db::Db;
use crate::error::{Error, Result};
use crate::fence::boot_time;
use crate::lease::record::LEASE_TIMES;
use crate::status::Role;

/// How long a promotion may take, with the application's own part in it.
const PROMOTION_LIMIT: Duration = Duration::from_secs(90);

impl Db {
    /// Makes this node the primary with what it has, whatever other nodes have: an operator's word,
    /// where no node may lead by itself. Such as when only a node is left that is too old, or none
    /// has a state; when the record of the lease is gone; or to bring a cluster with a fixed
    /// primary to a lease.
    ///
    /// What others have and this node has not leaves the history. They keep it when they return
    /// ([`Db::lost`]). So look at [`Db::status`] of every node that runs, and choose the one that
    /// is furthest. A holder of the lease that lives keeps it: the node waits for the lease time,
    /// and takes the lease only when no other has renewed it.
    ///
    /// Returns when this node is the primary.
    ///
    /// # Errors
    /// [`Error::Config`] on a node with a fixed primary, [`Error::Timeout`] when another node holds
    /// the lease or the promotion fails; the log says which. [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn promote_unchecked(&self) -> Result<()> {
        let Some(elector) = &self.inner.elector else {
            return Err(Error::Config("the primary is fixed by configuration: there is no lease".into()));
        };
        let mut roles = self.roles();
        elector.promote_unchecked().await?;
        let limit = *LEASE_TIMES.end() + PROMOTION_LIMIT;
        let leads = roles.wait_for(|state| matches!(state.role, Role::Primary | Role::Stopped));
        match tokio::time::timeout(limit, leads).await {
            Ok(Ok(state)) if state.role == Role::Primary => Ok(()),
            Ok(_) => Err(Error::ShutDown),
            Err(_) => Err(Error::Timeout { what: "the lease, or the promotion".into(), after: limit }),
        }
    }

    /// For how long this node may still acknowledge commits, unless it renews its lease meanwhile,
    /// which it does four times in that time. Zero on a node that does not lead; none where the
    /// primary is fixed.
    pub fn lease_left(&self) -> Option<Duration> {
        self.inner.node.fence.until().map(|until| until.saturating_sub(boot_time()))
    }
}
