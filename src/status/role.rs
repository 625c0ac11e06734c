//! What a node does at the moment.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::peer::PeerKey;
use crate::status::{PeerInfo, WaitReason};
use crate::txid::Epoch;

/// What a node does at the moment.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::{Db, Role};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// match db.role() {
///     Role::Primary => println!("jobs run here"),
///     Role::Replica => println!("jobs run on the primary"),
///     Role::Stopped => println!("an operator must look"),
///     other => println!("{other}"),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Role {
    /// It commits.
    Primary,
    /// It follows a primary.
    Replica,
    /// It has not found out yet who the primary is.
    Starting,
    /// There is no primary. The node asks the others how far they are, and may take the lease.
    Electing,
    /// There is no primary, and this node does not become it: [`RoleState::waits_for`] says why.
    Waiting,
    /// It has the lease, and is about to commit: migrations and
    /// [`Config::on_promote`](crate::Config::on_promote) run.
    Promoting,
    /// It was the primary until its lease ended, and acknowledges nothing more.
    Fencing,
    /// It has stopped, or replication has failed.
    Stopped,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Primary => "primary",
            Role::Replica => "replica",
            Role::Starting => "starting",
            Role::Electing => "electing",
            Role::Waiting => "waiting",
            Role::Promoting => "promoting",
            Role::Fencing => "fencing",
            Role::Stopped => "stopped",
        })
    }
}

/// A node's role, and the primary as far as it is known.
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// let mut roles = db.roles();
/// while roles.changed().await.is_ok() {
///     let state = roles.borrow_and_update().clone();
///     match state.primary {
///         Some(primary) => println!("the primary is at {}", primary.addresses.app),
///         None => println!("there is no primary at the moment"),
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct RoleState {
    /// What this node does.
    pub role: Role,
    /// The newest epoch that this node knows.
    pub epoch: Epoch,
    /// The primary, once it is known and reachable: this node itself, when it is the primary. None
    /// while the primary is about to end and takes no more requests. A primary that hands its lease
    /// to another node is [`Role::Primary`] with none here: what runs on it still commits, until
    /// the lease goes over.
    pub primary: Option<PeerInfo>,
    /// On a replica: the key that this primary has proved. None without TLS.
    pub primary_key: Option<PeerKey>,
    /// While the node waits ([`Role::Waiting`]): for what.
    pub waits_for: Option<WaitReason>,
}
