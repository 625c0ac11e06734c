//! The members that keep the lease's record, asked on one of them.

use crate::db::Db;
use crate::error::shown;
use crate::members::{MemberAnswer, MemberChange, MemberNode};
use crate::net::Endpoint;
use crate::operator::{MembersView, OperatorError};

/// Bytes of the members' words that are shown.
const WORDS_MAX_BYTES: usize = 1024;

impl Db {
    /// Who the members are that keep the lease's record, by their own words. With
    /// [`lease::Members`](crate::lease::Members) only.
    ///
    /// # Errors
    /// [`OperatorError::NoLease`] with another lease, and on a node that was shut down.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn members(&self) -> Result<MembersView, OperatorError> {
        let introduced = on_its_runtime(self, |member| async move { member.introduced().await }).await?;
        Ok(MembersView::of(&introduced))
    }

    /// Makes the node at this URL, which is that of its replication endpoint, one of the members.
    /// Its own configuration names it as one. It takes what they agreed on first, and has a vote
    /// from then on.
    ///
    /// ```no_run
    /// # async fn example(db: replite::Db) -> Result<(), replite::operator::OperatorError> {
    /// db.add_member("replite://10.0.0.4:7000").await?;
    /// db.remove_member("replite://10.0.0.1:7000").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperatorError::Members`] with the members' reason: the node does not answer, or names
    /// other members; another change is under way; the members have no leader. Then look at
    /// [`Db::members`]: it may be done in part, and can be asked for again.
    /// [`OperatorError::NoLease`] and [`OperatorError::Invalid`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn add_member(&self, url: &str) -> Result<(), OperatorError> {
        self.change_members(MemberChange::Add { url: normal(url)? }).await
    }

    /// The node at this URL keeps the record no more. It may be gone. As a replica it goes on.
    ///
    /// # Errors
    /// As for [`Db::add_member`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn remove_member(&self, url: &str) -> Result<(), OperatorError> {
        self.change_members(MemberChange::Remove { url: normal(url)? }).await
    }

    async fn change_members(&self, change: MemberChange) -> Result<(), OperatorError> {
        let changed = on_its_runtime(self, |member| async move { member.changed_by_any(change).await });
        match changed.await? {
            MemberAnswer::Changed => Ok(()),
            MemberAnswer::Unable { why, .. } => Err(OperatorError::Members(shown(&why, WORDS_MAX_BYTES))),
            _ => Err(OperatorError::Members("a member answers another question".into())),
        }
    }
}

/// Its connections belong to the runtime of the lease.
async fn on_its_runtime<T, F>(
    db: &Db,
    work: impl FnOnce(std::sync::Arc<MemberNode>) -> F,
) -> Result<T, OperatorError>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let member = db.inner.members.get().ok_or(OperatorError::NoLease)?;
    let runtime = member.runtime().ok_or(OperatorError::NoLease)?;
    runtime.spawn(work(member.clone())).await.map_err(|_| OperatorError::NoLease)
}

fn normal(url: &str) -> Result<String, OperatorError> {
    let endpoint = Endpoint::parse(url);
    endpoint.map(|to| to.to_string()).map_err(|error| OperatorError::Invalid(error.to_string()))
}
