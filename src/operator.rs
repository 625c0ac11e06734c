//! The operator's door: a lease and its nodes, seen and changed from outside. It needs no database,
//! and no primary that runs.
//!
//! [`Operator`] works on the lease's store, and reaches nodes at their replication endpoints. The
//! command `replite` (feature `cli`) does the same from a shell; its page is
//! [`guide::operator`](crate::guide::operator).
//!
//! ```no_run
//! use replite::operator::{Operator, OperatorError};
//! use replite::{Secret, lease};
//!
//! # async fn example(secret: Secret) -> Result<(), OperatorError> {
//! let store = lease::Directory::new("/var/lib/app/lease");
//! let operator = Operator::new(store, "default", "app").secret(secret).by("the night shift");
//! println!("{}", operator.show().await);
//! operator.pause().await?;
//! # Ok(())
//! # }
//! ```

mod loss;
#[cfg(feature = "members")]
mod members;
mod moving;
mod nodes;
mod problem;
mod register;
mod table;
mod view;

use std::time::Duration;

use tokio_util::task::TaskTracker;

use crate::channel::{Certificates, Channel, Plaintext};
use crate::context::OperatorCommand;
use crate::error::Error;
use crate::handshake::Asker;
use crate::lease::record::LeaseState;
use crate::lease::{Lease, LeaseKind};
use crate::net::Endpoint;
use crate::peer::{Incarnation, NodeId};
use crate::secret::{Keyring, Secret};
use crate::threads::blocking;
use nodes::{Nodes, named};
use register::{InRegister, Register, moved_to};

pub use loss::{Difference, Loss, Promotion};
#[cfg(feature = "members")]
pub use members::{MemberView, MembersView};
pub use problem::OperatorError;
pub use view::{HolderView, LeaseStands, LeaseView, NodeAnswer, NodeView, RecordView, View};

/// How long a handoff may take.
const HANDOFF_LIMIT: Duration = Duration::from_secs(60);

/// A lease as an operator has it in hand. Calls to its store are made on the caller's runtime,
/// which needs time and IO; each has a limit of five seconds.
#[derive(Clone, Debug)]
pub struct Operator {
    lease: Lease,
    cluster: String,
    database: String,
    secrets: Vec<Secret>,
    given: Vec<String>,
    by: String,
    plaintext: Option<Plaintext>,
    certificates: Option<Certificates>,
}

/// A node, by its id or by the URL of its replication endpoint.
///
/// ```
/// use replite::operator::Target;
///
/// let by_id: Target = "0198c5a0-4f3e-7cc1-b2a4-9d6f00e1c7aa".into();
/// assert!(matches!(by_id, Target::Node(_)));
/// let by_url: Target = "replite://10.0.0.1:7000".into();
/// assert!(matches!(by_url, Target::Url(_)));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// One that the record names, or that is at an address which was given.
    Node(NodeId),
    /// The one at this URL.
    Url(String),
}

impl From<NodeId> for Target {
    fn from(node: NodeId) -> Target {
        Target::Node(node)
    }
}

impl From<&str> for Target {
    fn from(text: &str) -> Target {
        text.parse().map_or_else(|_| Target::Url(text.to_owned()), Target::Node)
    }
}

impl Operator {
    /// For the lease in this store, of this database in this cluster: what
    /// [`Config::cluster`](crate::Config::cluster) says, `default` if nothing, and
    /// [`Config::database`](crate::Config::database), the name of the database's file without its
    /// extension if nothing.
    pub fn new(lease: impl Into<Lease>, cluster: impl Into<String>, database: impl Into<String>) -> Operator {
        Operator {
            lease: lease.into(),
            cluster: cluster.into(),
            database: database.into(),
            secrets: Vec::new(),
            given: Vec::new(),
            by: "an operator".into(),
            plaintext: None,
            certificates: None,
        }
    }

    /// The cluster's secret. Without one no node is asked, and none can be given a command.
    #[must_use]
    pub fn secret(mut self, secret: Secret) -> Operator {
        self.secrets = vec![secret];
        self
    }

    /// For a cluster whose nodes have [`Config::plaintext`](crate::Config::plaintext), and a build
    /// without TLS: the nodes at `http://` URLs are spoken to in the clear. A node that speaks TLS
    /// only is spoken to in TLS all the same.
    #[must_use]
    pub fn plaintext(mut self, allowed: Plaintext) -> Operator {
        self.plaintext = Some(allowed);
        self
    }

    /// For a cluster whose nodes have [`Config::tls`](crate::Config::tls): a certificate that they
    /// take, and the names of theirs. The files are read for each call.
    #[must_use]
    pub fn tls(mut self, certificates: Certificates) -> Operator {
        self.certificates = Some(certificates);
        self
    }

    /// One more node to look at, by the URL of its replication endpoint, such as
    /// `replite://10.0.0.1:7000`: one that the record does not name, or not where it is now.
    #[must_use]
    pub fn node(mut self, url: impl Into<String>) -> Operator {
        self.given.push(url.into());
        self
    }

    /// Who the operator is. The nodes write it into their logs, and believe it.
    #[must_use]
    pub fn by(mut self, name: impl Into<String>) -> Operator {
        self.by = name.into();
        self
    }

    /// The lease, whether it is renewed, and each node's own word. It takes half of the lease time
    /// at most, or three seconds where a node does not answer. What can't be had is said in the
    /// view.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn show(&self) -> View {
        let register = self.register().await;
        let found = match &register {
            Ok(register) => register.look().await,
            Err(error) => Err(OperatorError::Store(error.to_string())),
        };
        let (mut given, mut wrong) = (Vec::new(), Vec::new());
        for url in &self.given {
            match Endpoint::parse(url) {
                Ok(endpoint) => given.push(endpoint),
                Err(error) => wrong.push(NodeView {
                    node: None,
                    url: url.clone(),
                    in_record: false,
                    answer: None,
                    problem: Some(error.to_string()),
                }),
            }
        }
        let record = match &found {
            Ok(InRegister::Record(record, _)) => Some(&**record),
            _ => None,
        };
        let nodes = named(record, &given);
        let (record, mut nodes) = tokio::join!(record_view(&register, found), self.described(nodes));
        nodes.extend(wrong);
        let (cluster, database) = (self.cluster.clone(), self.database.clone());
        View { cluster, database, record, nodes }
    }

    /// Where the record is. Members are reached anew with each call.
    async fn register(&self) -> Result<Register, OperatorError> {
        let store = match &self.lease.0 {
            LeaseKind::Fixed(_) => return Err(OperatorError::NoLease),
            LeaseKind::Store(store) => store.clone(),
            #[cfg(feature = "members")]
            LeaseKind::Members(members) => std::sync::Arc::new(self.outside(members).await?),
        };
        Ok(Register { store, cluster: self.cluster.clone(), database: self.database.clone() })
    }

    async fn described(&self, nodes: Vec<NodeView>) -> Vec<NodeView> {
        match self.nodes().await {
            Ok(asking) => asking.describe(nodes).await,
            Err(error) => {
                let problem = Some(format!("it was not asked: {error}"));
                nodes.into_iter().map(|node| NodeView { problem: problem.clone(), ..node }).collect()
            }
        }
    }

    async fn nodes(&self) -> Result<Nodes, OperatorError> {
        if self.secrets.is_empty() {
            return Err(OperatorError::NoSecret);
        }
        let invalid = |error: Error| OperatorError::Invalid(error.to_string());
        let channel = match self.certificates.clone() {
            None => Channel::ephemeral(self.plaintext).map_err(invalid)?,
            Some(certificates) => {
                certificates.check().map_err(invalid)?;
                let plaintext = self.plaintext;
                let read = blocking(move || {
                    let bytes = certificates.read()?;
                    Channel::certified(&certificates, &bytes, plaintext)
                });
                read.await.map_err(invalid)?
            }
        };
        let asker = Asker {
            keys: Keyring::new(&self.secrets).map_err(invalid)?,
            cluster: self.cluster.clone(),
            database: self.database.clone(),
            // It is no node, and its id is no node's.
            node: NodeId::random(),
            incarnation: Incarnation::random(),
            channel,
        };
        Ok(Nodes { asker, by: self.by.clone(), tracker: TaskTracker::new() })
    }

    /// Pauses elections: no node takes the lease by itself when its holder is gone. The primary
    /// goes on, and takes its lease over when it was only restarted. A handoff goes, too, and so
    /// does a promotion by an operator.
    ///
    /// Only this word in the record is changed. Where a holder renews the record meanwhile it is
    /// tried again, ten times at most.
    ///
    /// # Errors
    /// [`OperatorError`]: the store can't be reached, has no record of this database, or others
    /// write it all the time.
    ///
    /// # Cancel safety
    /// Dropped, it may be done or not.
    pub async fn pause(&self) -> Result<(), OperatorError> {
        self.set_paused(true).await
    }

    /// Lets nodes elect a primary again.
    ///
    /// # Errors
    /// As for [`Operator::pause`].
    ///
    /// # Cancel safety
    /// Dropped, it may be done or not.
    pub async fn resume(&self) -> Result<(), OperatorError> {
        self.set_paused(false).await
    }

    pub(crate) async fn set_paused(&self, paused: bool) -> Result<(), OperatorError> {
        self.register().await?.set_paused(paused).await
    }

    /// Has the node that holds the lease hand it over: to this node, or to the one that is best.
    /// Returns which node has it then.
    ///
    /// # Errors
    /// [`OperatorError::NoHolder`] when no node holds it. [`OperatorError::Refused`] with the
    /// holder's reason, and what else [`OperatorError`] has of stores and nodes that can't be
    /// reached.
    ///
    /// # Cancel safety
    /// A command that was sent is carried out.
    pub async fn handoff(&self, to: Option<NodeId>) -> Result<NodeId, OperatorError> {
        let nodes = self.nodes().await?;
        let (record, _) = self.register().await?.record().await?;
        let LeaseState::Held(tenure) = &record.state else { return Err(OperatorError::NoHolder) };
        let invalid = |error: Error| OperatorError::Invalid(error.to_string());
        let endpoint = Endpoint::parse(&tenure.holder.addresses.replication).map_err(invalid)?;
        let command = OperatorCommand::Handoff { to };
        nodes.command((&endpoint, tenure.holder.node), command, HANDOFF_LIMIT).await
    }

    /// The first of two steps to have a node lead with what it has, whatever others have: says what
    /// will be lost. [`Promotion::confirm`] is the second one.
    ///
    /// ```no_run
    /// # use replite::operator::{Operator, OperatorError};
    /// # async fn example(operator: Operator) -> Result<(), OperatorError> {
    /// let promotion = operator.promotion("http://10.0.0.2:8081").await?;
    /// println!("{promotion}");
    /// if promotion.loss().held_by.is_none() {
    ///     promotion.confirm().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`OperatorError`]: the node is not known or can't be reached, the secret is missing, or the
    /// lease was moved to another store.
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn promotion(&self, node: impl Into<Target>) -> Result<Promotion, OperatorError> {
        let nodes = self.nodes().await?;
        let mut operator = self.clone();
        let node = match node.into() {
            Target::Node(node) => node,
            Target::Url(url) => {
                let found = nodes.at(&url).await?;
                operator.given.push(url);
                found
            }
        };
        let view = operator.show().await;
        if let RecordView::Moved { to } = view.record {
            return Err(OperatorError::Moved { to });
        }
        let chosen = view.nodes.iter().find(|known| known.node == Some(node));
        Promotion::new(nodes, &view, chosen.ok_or(OperatorError::UnknownNode(node))?)
    }

    /// Moves the lease to another store. All nodes are ended, or at least none holds the lease:
    /// where it is held, the call watches it for a lease time, and refuses when it is renewed.
    ///
    /// The record is copied, and a mark stays in the old store. A node that is started with the old
    /// store by mistake waits, serves reads and never leads by itself: the mark is a lease that is
    /// paused, and held by no node. [`Operator::show`] says where the lease went, as `named`.
    ///
    /// A call that failed can be made again: it finds what the first one did.
    ///
    /// # Errors
    /// [`OperatorError::Renewed`], [`OperatorError::Occupied`] when the other store has a record of
    /// its own, [`OperatorError::NoHolder`] where no node has ever led. After
    /// [`OperatorError::MovedUnder`] the copy in the other store is of no use.
    ///
    /// # Cancel safety
    /// Dropped, it may be done in part: at no time two stores have a record by which a node elects
    /// itself.
    pub async fn move_to(&self, other: impl Into<Lease>, named: &str) -> Result<(), OperatorError> {
        let to = Operator { lease: other.into(), ..self.clone() };
        moving::move_record(&self.register().await?, &to.register().await?, named).await
    }
}

async fn record_view(
    register: &Result<Register, OperatorError>,
    found: Result<InRegister, OperatorError>,
) -> RecordView {
    let (record, version) = match found {
        Err(error) => return RecordView::Unreachable { why: error.to_string() },
        Ok(InRegister::Nothing) => return RecordView::Nothing,
        Ok(InRegister::Bad(error, _)) => return RecordView::Unusable { why: error.to_string() },
        Ok(InRegister::Record(record, version)) => (record, version),
    };
    if let Some(to) = moved_to(&record) {
        return RecordView::Moved { to };
    }
    let renewed = match (&record.state, register) {
        // A holder that lives renews it each quarter of the time.
        (LeaseState::Held(_), Ok(register)) => register.is_replaced(&version, record.lease_time / 2).await,
        _ => None,
    };
    RecordView::Lease(Box::new(LeaseView::of(&record, &version, renewed)))
}
