//! What an application, or its operator, asks of the lease.

use std::time::Duration;

use crate::db::Db;
use crate::error::{Error, Result};
use crate::fence::boot_time;
use crate::operator::{Operator, OperatorError};
use crate::peer::NodeId;
use crate::session;
use crate::status::{PeerInfo, Role, RoleState};

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
    /// [`Error::Config`] on a node with a fixed primary and on a follower, [`Error::Timeout`] when
    /// another node holds the lease or the promotion fails; the log says which.
    /// [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn promote_unchecked(&self) -> Result<()> {
        self.check_may_lead()?;
        let Some(elector) = &self.inner.elector else {
            return Err(Error::Config("the primary is fixed by configuration: there is no lease".into()));
        };
        elector.promoted_unchecked(&self.inner.node).await
    }

    /// Pauses elections: from now on no node takes the lease by itself when its holder is gone,
    /// until [`Db::resume_failover`]. The primary goes on. It renews its lease, and takes it over
    /// when it was only restarted. An operator's word goes, too: [`Db::promote_unchecked`].
    ///
    /// It is written into the lease's record, for all nodes. A process that has no database open
    /// does the same by [`Operator::pause`](crate::operator::Operator::pause).
    ///
    /// ```no_run
    /// # async fn example(db: replite::Db) -> Result<(), replite::operator::OperatorError> {
    /// db.pause_failover().await?;
    /// // The machines are moved.
    /// db.resume_failover().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperatorError`]: the store can't be reached, has no record of this database, or others
    /// write it all the time. [`OperatorError::NoLease`] where the primary is fixed, and on a node
    /// that was shut down.
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn pause_failover(&self) -> Result<(), OperatorError> {
        self.set_paused(true).await
    }

    /// Lets nodes elect a primary again; see [`Db::pause_failover`].
    ///
    /// # Errors
    /// As for [`Db::pause_failover`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn resume_failover(&self) -> Result<(), OperatorError> {
        self.set_paused(false).await
    }

    async fn set_paused(&self, paused: bool) -> Result<(), OperatorError> {
        let Some(elector) = &self.inner.elector else { return Err(OperatorError::NoLease) };
        let (cluster, database) = (self.inner.node.cluster.clone(), self.inner.node.database.clone());
        let set = elector.with_store(|store| async move {
            Operator::new(store, cluster, database).set_paused(paused).await
        });
        set.await.unwrap_or(Err(OperatorError::NoLease))
    }

    /// Hands the lease to another node while both live: to the one that is named, or (`None`) to
    /// the replica that has the most. Nothing that was acknowledged is lost, and no node commits
    /// for some milliseconds.
    ///
    /// ```no_run
    /// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
    /// let primary = db.handoff(None).await?;
    /// println!("{} leads now", primary.node);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// New requests that write are held on all nodes, and those that run have the time of
    /// [`Config::drain_limit`](crate::Config::drain_limit). Then writes are refused here
    /// ([`Error::NotPrimary`]), the other node gets the last of what was committed, and leads as
    /// soon as it is in the lease's record. The requests go on there.
    ///
    /// A request's handler may call it, too: its own request is not waited for.
    ///
    /// Returns the new primary when this node follows it. While another handoff is under way, the
    /// call joins it, unless it names another node. A primary that is named itself is returned at
    /// once.
    ///
    /// # Errors
    /// - [`Error::HandoffFailed`] when it came to nothing, and why: no replica that could lead is
    ///   connected; another connection kept the write lock for a second; the other node ended, was
    ///   cut off or did not answer. This node leads on, unless the text says that its lease ended.
    /// - [`Error::NotPrimary`] on a node that does not lead.
    /// - [`Error::Config`] where the primary is fixed.
    /// - [`Error::Timeout`] when the other node has the lease, and this one has not heard within a
    ///   minute and a half that it leads.
    /// - [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn handoff(&self, to: Option<NodeId>) -> Result<PeerInfo> {
        let Some(elector) = &self.inner.elector else {
            return Err(Error::Config("the primary is fixed by configuration: there is no lease".into()));
        };
        session::hands_over(&self.inner.node);
        let node = elector.handoff(to).await?;
        let mut roles = self.roles();
        // The one that has the lease may be gone by now, and another lead in its place.
        let leads = roles.wait_for(|state| state.role == Role::Stopped || has_primary(state));
        match tokio::time::timeout(PROMOTION_LIMIT, leads).await {
            Ok(Ok(state)) => match &state.primary {
                Some(primary) if node == self.inner.node.me.node || state.role != Role::Primary => {
                    Ok(primary.clone())
                }
                Some(_) => {
                    let what =
                        format!("node {node} had the lease and did not keep it; this node leads again");
                    Err(Error::HandoffFailed(what))
                }
                None => Err(Error::ShutDown),
            },
            Ok(Err(_)) => Err(Error::ShutDown),
            Err(_) => Err(Error::Timeout { what: format!("node {node} to lead"), after: PROMOTION_LIMIT }),
        }
    }

    /// For how long this node may still acknowledge commits, unless it renews its lease meanwhile,
    /// which it does four times in that time. Zero on a node that does not lead; none where the
    /// primary is fixed.
    pub fn lease_left(&self) -> Option<Duration> {
        self.inner.node.fence.until().map(|until| until.saturating_sub(boot_time()))
    }
}

/// Whether this node knows who leads.
fn has_primary(state: &RoleState) -> bool {
    matches!(state.role, Role::Replica | Role::Primary) && state.primary.is_some()
}
