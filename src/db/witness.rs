//! A member without a database.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use crate::context::{LeaseContext, NodeContext};
use crate::db::config::{Config, ConfiguredStore, Start};
use crate::db::identity;
use crate::error::{Error, Result};
use crate::files::{self, Paths};
use crate::keys::DatabaseKeys;
use crate::lock::lock;
use crate::members::{MemberNode, MembersConfig, MembersDoor};
use crate::net::Listener;
use crate::node::certificates::{self, CertificateWatch};
use crate::node::host::ListenerGuard;
use crate::node::tenancy::Tenancy;
use crate::operator::MembersView;
use crate::peer::Incarnation;
use crate::primary::ReplicaServer;
use crate::proxy::AppDoor;
use crate::report::Condition;
use crate::secret::Keyring;
use crate::server::{Mount, ReplicationService};
use crate::status::{Addresses, PeerInfo, Role};
use crate::threads::{self, blocking_for_caller as blocking};

/// Where a panic of the application's code was.
const OPENING: &str = "while the witness was opened";

/// One of the [`lease::Members`](crate::lease::Members) that keep a lease's record, without a
/// database. Two full instances and a witness survive the loss of any one of the three.
///
/// It needs some megabytes of memory, a few kilobytes of disk, and a way to the two others. It
/// holds no data of the application, serves no reads, and never leads. It has the cluster's secret,
/// as all members do.
///
/// ```no_run
/// use replite::{Config, Secret, Witness, lease};
///
/// # async fn example(secret: Secret) -> Result<(), replite::Error> {
/// let members = ["replite://10.0.0.1:7000", "replite://10.0.0.2:7000", "replite://10.0.0.3:7000"];
/// let config = Config::new("/var/lib/witness/app.db") // its directory is app.db-replite beside it
///     .listen(([10, 0, 0, 3], 7000).into())
///     .secret(secret)
///     .lease(lease::Members::new(members));
/// Witness::run(config, async {
///     let _ = tokio::signal::ctrl_c().await; // and SIGTERM
/// })
/// .await
/// # }
/// ```
///
/// Of the [`Config`] it takes what says where its files are, how it is reached and what it speaks,
/// and the lease. The path is that of a database that is not there: cluster and database have the
/// same names as on the other nodes.
///
/// Dropping the last clone ends it.
#[derive(Clone)]
pub struct Witness(Arc<Inner>);

struct Inner {
    node: Arc<NodeContext>,
    replica_server: Arc<ReplicaServer>,
    door: MembersDoor,
    tracker: TaskTracker,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// No other process has its files, until it has ended.
    tenancy: Mutex<Option<Tenancy>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.node.stop.cancel();
    }
}

impl Witness {
    /// Runs a witness until `end` is ready, and ends it.
    ///
    /// # Errors
    /// As for [`Witness::start`].
    ///
    /// # Cancel safety
    /// Dropping the future ends the witness.
    pub async fn run(config: Config, end: impl Future<Output = ()>) -> Result<()> {
        let witness = Witness::start(config).await?;
        end.await;
        witness.shutdown().await;
        Ok(())
    }

    /// Starts a witness. Its listener and connections are tasks of the caller's runtime.
    ///
    /// # Errors
    /// [`Error::Config`]: the lease is not kept by members, or this URL is none of theirs; the
    /// errors of [`Db::open`](crate::Db::open) that have to do with files, addresses and secrets.
    /// [`Error::AlreadyOpen`] when another process has its files.
    pub async fn start(config: Config) -> Result<Witness> {
        let Start::Lease(ConfiguredStore::Members(list), lease_time) = config.check()? else {
            return Err(Error::Config("a witness needs `lease::Members`".into()));
        };
        let listener = match config.listen {
            Some(address) => Some(Listener::bind(address).await?),
            None => None,
        };
        let addresses = config.advertised(listener.as_ref().map(Listener::address));
        let members = MembersConfig { list, witness: true, mounted: config.listen.is_none(), lease_time };
        let opened = blocking(OPENING, move || open(&config, addresses, members)).await;
        let (node, member, certificates, tenancy) = opened?;
        if let Some(allowed) = node.channel.plaintext() {
            node.report(Condition::Plaintext { allowed: &allowed });
        }
        let (replica_server, tracker) = (ReplicaServer::new(node.clone()), TaskTracker::new());
        let door = MembersDoor::default();
        door.open(member.clone());
        let (runs, running) = oneshot::channel();
        let state = Work { node: node.clone(), member, runs: Some(runs) };
        let thread = threads::start("replite-member", state, work, |Work { node, .. }, ended| {
            if let Err(error) = ended {
                node.report_aside(Condition::MemberStopped { error: &error });
            }
        })?;
        // One that ended has said how.
        let _ = running.await;
        if let Some(watch) = certificates {
            tracker.spawn(watch.run(node.clone()));
        }
        let mut guard =
            ListenerGuard::new(&node, &replica_server, (&door, &AppDoor::default()), &tracker, listener);
        guard.open();
        guard.leave_open();
        let (thread, tenancy) = (Mutex::new(Some(thread)), Mutex::new(Some(tenancy)));
        Ok(Witness(Arc::new(Inner { node, replica_server, door, tracker, thread, tenancy })))
    }

    /// Its endpoint, for the application's server, where it has no listener of its own: as for
    /// [`Db::service`](crate::Db::service).
    pub fn service(&self) -> ReplicationService {
        let Inner { node, replica_server, door, tracker, .. } = &*self.0;
        ReplicationService::new(node.clone(), replica_server.clone(), tracker.clone(), Mount::Mounted)
            .with_members(door.clone())
    }

    /// Who the members are, by their own words; see [`Db::members`](crate::Db::members).
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// Nothing is changed.
    pub async fn members(&self) -> Result<MembersView> {
        let member = self.0.door.get().ok_or(Error::ShutDown)?;
        let runtime = member.runtime().ok_or(Error::ShutDown)?;
        let introduced = runtime.spawn(member.clone().introduced()).await;
        Ok(MembersView::of(&introduced.map_err(|_| Error::ShutDown)?))
    }

    /// What is wrong, while it lasts, in words for operators.
    pub fn problem(&self) -> Option<String> {
        self.0.node.problem()
    }

    /// Ends it, and returns when its files and its address are free.
    ///
    /// # Cancel safety
    /// It ends all the same.
    pub async fn shutdown(&self) {
        let inner = &self.0;
        inner.node.stop.cancel();
        inner.tracker.close();
        inner.tracker.wait().await;
        let thread = lock(&inner.thread).take();
        if let Some(thread) = thread {
            let joined = blocking("at the witness's end", move || {
                // It has said how it ended.
                let _ = thread.join();
                Ok(())
            });
            let _ = joined.await;
        }
        drop(lock(&inner.tenancy).take());
    }
}

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Witness").field("node", &self.0.node.me.node).finish_non_exhaustive()
    }
}

type OpenedWitness = (Arc<NodeContext>, Arc<MemberNode>, Option<CertificateWatch>, Tenancy);

/// Blocks.
fn open(config: &Config, addresses: Addresses, members: MembersConfig) -> Result<OpenedWitness> {
    let database = config.database_name()?;
    let keys = Keyring::with_followers(&config.all_secrets()?, &config.follower_secrets)?;
    if keys.is_follower() {
        return Err(Error::Config("a witness needs the secret of members".into()));
    }
    let paths = Paths::new(&config.path);
    files::make_state_dir(paths.state_dir())?;
    files::sync_name(paths.state_dir())?;
    let me = PeerInfo {
        node: identity::node_id(&paths, &config.cluster, &database)?,
        incarnation: Incarnation::random(),
        addresses,
    };
    let tenancy = Tenancy::enter(&paths, me.incarnation)?;
    if !tenancy.alone {
        return Err(Error::AlreadyOpen { path: paths.state_dir().to_path_buf(), holder: "another process" });
    }
    let key = (&paths, me.node);
    let (channel, certificates) = certificates::channel(&config.certificates, key, config.plaintext)?;
    channel.set_shut_out(config.shut_out.iter().copied())?;
    let (cluster, lease) = (config.cluster.clone(), LeaseContext::fixed());
    // It has no pages and signs no tokens.
    let unused = DatabaseKeys::random()?;
    let node = NodeContext::new(me, cluster, database, (keys, channel), Role::Replica, lease, unused);
    let member = MemberNode::open(node.clone(), &paths, members)?;
    if !member.is_one() {
        let url = &node.me.addresses.replication;
        return Err(Error::Config(format!("`lease::Members` does not name this witness, which is at {url}")));
    }
    Ok((node, member, certificates, tenancy))
}

/// What its thread works with.
struct Work {
    node: Arc<NodeContext>,
    member: Arc<MemberNode>,
    /// Told once others may ask.
    runs: Option<oneshot::Sender<()>>,
}

/// Runs Raft on a runtime of its own.
fn work(Work { node, member, runs }: &mut Work) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start a runtime for", "the witness"))?;
    runtime.block_on(async {
        member.start();
        if let Some(runs) = runs.take() {
            let _ = runs.send(());
        }
        node.stop.cancelled().await;
        member.end().await;
    });
    runtime.shutdown_background();
    Ok(())
}

#[cfg(test)]
mod tests;
