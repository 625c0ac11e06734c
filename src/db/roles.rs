//! The node's role, and the primary by hand, where no lease decides.

use tokio::sync::watch;

use crate::db::Db;
use crate::error::{Error, Result};
use crate::net::Endpoint;
use crate::status::{Role, RoleState};
use crate::txid::Position;

impl Db {
    /// What this node does at the moment.
    pub fn role(&self) -> Role {
        self.inner.node.roles.borrow().role
    }

    /// The role and the primary, to watch.
    pub fn roles(&self) -> watch::Receiver<RoleState> {
        self.inner.node.roles.subscribe()
    }

    /// Makes this replica the primary, by hand, where [`lease::Fixed`](crate::lease::Fixed) says
    /// who it is. It goes on from the state that it has: first have the primary that there is step
    /// down ([`Db::demote`]), and wait for its last transaction here.
    ///
    /// ```no_run
    /// # async fn example(blue: replite::Db, green: replite::Db) -> Result<(), replite::Error> {
    /// // From blue to green, here in one process. From the first line on no write is done.
    /// let last = blue.demote("http://10.0.0.2:8080").await?;
    /// if let Some(last) = last {
    ///     green.wait_for(last.txid()).await?;
    /// }
    /// green.promote().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// In between no node is the primary: writes fail with
    /// [`Error::NotPrimary`](crate::Error::NotPrimary), and the replay layer holds what needs the
    /// primary. Reads go on. When green does not get to the last transaction, because the link to
    /// it is cut, `blue.promote()` takes all of it back.
    ///
    /// Done the other way around, both are primaries for a while. Each takes an epoch above the
    /// other's when a replica tells it of that one. What was committed on the side that the
    /// replicas leave is in no history any more; a node that follows the other keeps it apart
    /// ([`Db::lost`]).
    ///
    /// The configuration says what the node is when it starts again: change it, too.
    ///
    /// # Errors
    /// [`Error::NoState`](crate::Error::NoState) when no primary vouches for what is here, what
    /// [`Config::migrate`](crate::Config::migrate) fails with,
    /// [`Error::OnPromote`](crate::Error::OnPromote). The node is a replica then, as before.
    /// [`Error::Config`](crate::Error::Config) on a node with a lease, and on a follower
    /// ([`Config::follower_secret`](crate::Config::follower_secret)).
    /// [`Error::ShutDown`](crate::Error::ShutDown). After any other error replication has stopped.
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it still goes on to its end.
    pub async fn promote(&self) -> Result<()> {
        self.check_may_lead()?;
        self.inner.supervisor.promote_by_hand().await
    }

    pub(super) fn check_may_lead(&self) -> Result<()> {
        match self.inner.node.keys.is_follower() {
            true => Err(Error::Config("a follower never leads: it has no secret of members".into())),
            false => Ok(()),
        }
    }

    /// Makes this primary a replica of the node whose replication endpoint has this URL, by hand,
    /// where [`lease::Fixed`](crate::lease::Fixed) says who the primary is; see [`Db::promote`].
    /// From now on writes are refused. Those that have begun end, and are acknowledged. The call
    /// waits for them, and for other connections and processes that write, for as long as they do.
    /// [`Status::problem`](crate::Status::problem) says so then. Returns the last state of this
    /// node's history. The replicas that are connected have been sent all of it, if they took it
    /// within a second.
    ///
    /// On a replica it only changes whom the node follows.
    ///
    /// # Errors
    /// [`Error::InvalidText`](crate::Error::InvalidText) and
    /// [`Error::Config`](crate::Error::Config) for a URL that is none, and on a node with a lease;
    /// [`Error::ShutDown`](crate::Error::ShutDown). After any other error replication has stopped.
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it still goes on to its end.
    pub async fn demote(&self, primary: &str) -> Result<Option<Position>> {
        let primary = Endpoint::parse(primary)?;
        self.inner.supervisor.demote_by_hand(primary).await
    }
}
