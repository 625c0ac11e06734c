//! Opening a database as a node.

mod elected;
mod keys;

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::checksum::Fingerprint;
use crate::context::{LeaseContext, NodeContext};
use crate::db::config::{Config, RoleHook, Start};
#[cfg(feature = "metrics")]
use crate::db::figures;
use crate::db::{Db, identity, preflight, snapshot};
use crate::election::Settings;
use crate::engine::{EngineOptions, Opening, ReplicaEngine};
use crate::error::{Error, Result};
use crate::files::{self, Paths};
use crate::members::MembersDoor;
use crate::net::{Endpoint, Listener, ServerTls};
use crate::node::certificates::{self, CertificateWatch};
use crate::node::database::{Database, LastHandle};
use crate::node::disk_use::DiskUse;
use crate::node::elector::{Elector, Parts};
use crate::node::host::ListenerGuard;
use crate::node::open_files;
use crate::node::pool::{Expect, Pool};
use crate::node::slot::{EngineSlot, Running};
use crate::node::supervisor::{Hooks, Supervisor, TurnHook, Turns};
use crate::node::tenancy::Tenancy;
use crate::node::verifier::Verifier;
use crate::node::writer::ConnectionKind;
use crate::node::writer::Writer;
use crate::peer::Incarnation;
use crate::primary::{KeySearch, Recovery, ReplicaServer};
use crate::proxy::AppDoor;
use crate::report::Condition;
use crate::secret::Keyring;
use crate::sqlite::defend;
use crate::status::{Addresses, PeerInfo, Role};
use crate::threads::blocking_for_caller as blocking;
use keys::{KeysFound, keys_of};

/// Where a panic of the application's code was.
const OPENING: &str = "while the database was opened";

/// See [`Db::open`].
pub(super) async fn open(config: Config) -> Result<Db> {
    let start = config.check()?;
    let listener = match config.listen {
        Some(address) => Some(Listener::bind(address).await?),
        None => None,
    };
    let addresses = config.advertised(listener.as_ref().map(Listener::address));
    let role = match &start {
        Start::Primary => Role::Promoting,
        Start::Replica(_) => Role::Replica,
        Start::Lease(..) => Role::Starting,
    };
    let mut claimed = blocking(OPENING, move || ClaimedNode::new(config, addresses, role)).await?;
    let mut listener_guard = ListenerGuard::new(
        &claimed.node,
        &claimed.replica_server,
        (&claimed.members, &claimed.app),
        &claimed.tracker,
        listener,
    );
    // It ends with the node, also when the node does not open.
    if let Some(watch) = claimed.certificates.take() {
        claimed.tracker.spawn(watch.run(claimed.node.clone()));
    }
    let opened = claimed.open(start, &mut listener_guard).await;
    if opened.is_err() {
        listener_guard.close().await;
    }
    opened
}

/// A node that has its place, its id, and nothing open.
struct ClaimedNode {
    config: Config,
    paths: Paths,
    claim: open_files::Claim,
    node: Arc<NodeContext>,
    certificates: Option<CertificateWatch>,
    replica_server: Arc<ReplicaServer>,
    members: MembersDoor,
    app: AppDoor,
    tracker: TaskTracker,
    options: EngineOptions,
    /// The database has tables.
    has_content: bool,
    app_tls: ServerTls,
    /// The files go with this page key, which is not here.
    lost_key: Option<Fingerprint>,
}

/// A node whose files are open, and that does nothing yet.
struct OpenedNode {
    claimed: ClaimedNode,
    files: Files,
    recovered: u64,
    elected: Option<Elected>,
}

/// What a node with a lease has besides.
struct Elected {
    elector: Elector,
    settings: Settings,
    tenancy: Tenancy,
}

enum Files {
    Primary(Box<Opening>),
    Replica(Arc<ReplicaEngine>),
}

impl Files {
    /// Starts the engine of the role that they were opened for. Blocks.
    fn run(self, writer: &Writer) -> Result<Running> {
        match self {
            Files::Primary(opening) => {
                let engine = Arc::new(opening.finish(None)?);
                writer.open(&engine)?;
                Ok(Running::Primary(engine))
            }
            Files::Replica(engine) => Ok(Running::Replica(engine)),
        }
    }
}

impl ClaimedNode {
    /// Blocks.
    fn new(config: Config, addresses: Addresses, role: Role) -> Result<ClaimedNode> {
        let database = config.database_name()?;
        let app_tls = config.app_tls()?;
        // Makes the directory in which the secret's file may be made, too.
        let (paths, claim) = preflight::claim(&config.file()?, config.allow_network_filesystem)?;
        let keys = Keyring::with_followers(&config.all_secrets()?, &config.follower_secrets)?;
        let has_content = role == Role::Starting && preflight::has_content(paths.database())?;
        preflight::state_dir(&paths, role != Role::Promoting, config.database_mode)?;
        snapshot::clear(&paths);
        let me = PeerInfo {
            node: identity::node_id(&paths, &config.cluster, &database)?,
            incarnation: Incarnation::random(),
            addresses,
        };
        let KeysFound { keys: database_keys, lost } = keys_of(&paths, role)?;
        let lease = match role {
            Role::Starting => files::lease::open(&paths, config.failover_loss)?,
            _ => LeaseContext::fixed(),
        };
        let key = (&paths, me.node);
        let (channel, mut certificates) = certificates::channel(&config.certificates, key, config.plaintext)?;
        channel.set_shut_out(config.shut_out.iter().copied())?;
        let keys = (keys, channel.compressing(config.compression));
        let node = NodeContext::new(me, config.cluster.clone(), database, keys, role, lease, database_keys);
        if let Some(allowed) = config.plaintext {
            node.report(Condition::Plaintext { allowed: &allowed });
        }
        if let Some(watch) = &mut certificates {
            watch.look(&node);
        }
        if role == Role::Starting {
            // Nothing is acknowledged without a lease.
            node.fence.close();
        }
        let (replica_server, tracker) = (ReplicaServer::new(node.clone()), TaskTracker::new());
        let options = config.engine_options(paths.clone(), database_keys.page);
        Ok(ClaimedNode {
            config,
            paths,
            claim,
            node,
            certificates,
            replica_server,
            members: MembersDoor::default(),
            app: AppDoor::default(),
            tracker,
            options,
            has_content,
            app_tls,
            lost_key: lost,
        })
    }

    /// Opens the files and starts what the node does, on the runtime of the caller.
    async fn open(self, start: Start, listener_guard: &mut ListenerGuard) -> Result<Db> {
        let (opened, follows) = match start {
            Start::Primary => (self.open_primary(listener_guard).await?, None),
            Start::Replica(primary) => (self.open_replica().await?, Some(primary)),
            Start::Lease(store, lease_time) => {
                (self.open_elected(store, lease_time, listener_guard).await?, None)
            }
        };
        opened.finish(listener_guard, follows).await
    }

    /// A node that lost the keys of its database asks its replicas for them. Without an answer it
    /// draws new ones: what is here begins a new branch.
    async fn find_keys(&mut self, listener_guard: &mut ListenerGuard) -> Result<()> {
        let Some(key) = self.lost_key else { return Ok(()) };
        let (limit, drawn) = (self.config.recovery_timeout, self.node.database_keys.get());
        let found = if listener_guard.has_listener && !limit.is_zero() {
            self.node.report(Condition::KeysAsked { limit });
            let search = KeySearch::new(key);
            self.replica_server.find_keys(search.clone());
            listener_guard.open();
            let found = search.finish(limit).await;
            self.node.report(match found {
                Some((_, node)) => Condition::KeysFound { node },
                None => Condition::KeysNotFound,
            });
            found
        } else {
            self.node.report(Condition::KeysNotAsked);
            None
        };
        let keys = found.map_or(drawn, |(keys, _)| keys);
        let paths = self.paths.clone();
        blocking(OPENING, move || files::keys::write(&paths, &keys)).await?;
        self.node.database_keys.set(keys);
        self.options = self.options.now(&self.node);
        Ok(())
    }

    async fn open_primary(mut self, listener_guard: &mut ListenerGuard) -> Result<OpenedNode> {
        self.find_keys(listener_guard).await?;
        let limit = self.config.recovery_timeout;
        let (claimed, opening) = blocking(OPENING, move || {
            let opening = Box::new(Opening::begin(self.options.clone(), self.node.clone(), None)?);
            Ok((self, opening))
        })
        .await?;
        let (opening, recovered) = match opening.may_miss() && !limit.is_zero() {
            true => recover(opening, listener_guard, limit).await?,
            false => (opening, 0),
        };
        Ok(OpenedNode { claimed, files: Files::Primary(opening), recovered, elected: None })
    }

    async fn open_replica(self) -> Result<OpenedNode> {
        blocking(OPENING, move || {
            let engine = Arc::new(self.replica_engine()?);
            Ok(OpenedNode { claimed: self, files: Files::Replica(engine), recovered: 0, elected: None })
        })
        .await
    }

    fn replica_engine(&self) -> Result<ReplicaEngine> {
        ReplicaEngine::open(self.options.clone(), self.node.clone())
    }
}

impl OpenedNode {
    /// Makes the node complete and starts its tasks, on the runtime of the caller.
    async fn finish(self, listener_guard: &mut ListenerGuard, primary: Option<Endpoint>) -> Result<Db> {
        let (verify_every, has_content) = (self.claimed.config.verify_every, self.claimed.has_content);
        let (runtime, handle) = (Handle::current(), Arc::new(OnceLock::new()));
        let hooks = hooks(&self.claimed.config, &handle);
        let (inner, settings) = blocking(OPENING, move || self.complete(runtime, hooks)).await?;
        let inner = Arc::new(inner);
        let _ = handle.set(Arc::downgrade(&inner));
        let pool = Arc::downgrade(&inner.0);
        inner.node.when_renewed(move || {
            if let Some(inner) = pool.upgrade() {
                inner.pool.renew();
            }
        });
        // First: a replica that knocks at once is let in.
        inner.supervisor.begin(primary).await?;
        listener_guard.open();
        listener_guard.leave_open();
        if let (Some(elector), Some(settings)) = (&inner.elector, settings) {
            elector.begin(Parts {
                settings,
                supervisor: inner.supervisor.clone(),
                slot: inner.slot.clone(),
                replica_server: inner.replica_server.clone(),
                paths: inner.paths.clone(),
                drain_limit: inner.drain_limit,
                has_content,
            });
            let database = Arc::downgrade(&inner.0);
            inner.node.lease.commands.open(move |command| {
                let database = database.upgrade();
                Box::pin(async move {
                    let database = database.ok_or("it is closed")?;
                    let elector = database.elector.as_ref().ok_or("it has no lease")?;
                    elector.obey(command, &database.node).await.map_err(|error| error.to_string())
                })
            });
        }
        #[cfg(feature = "metrics")]
        inner.tracker.spawn(figures::record(Arc::downgrade(&inner.0), inner.node.clone()));
        if let Some(period) = verify_every {
            inner.tracker.spawn(inner.verifier.clone().repeat(period));
        }
        Ok(Db { inner })
    }

    /// Puts the parts together. Blocks.
    fn complete(self, runtime: Handle, hooks: Hooks) -> Result<(LastHandle, Option<Settings>)> {
        let OpenedNode { claimed, files, recovered, elected } = self;
        let ClaimedNode {
            config,
            paths,
            claim,
            node,
            replica_server,
            members,
            app,
            tracker,
            options,
            app_tls,
            ..
        } = claimed;
        let fixed = elected.is_none();
        let (elector, settings, tenancy) = match elected {
            Some(Elected { elector, settings, tenancy }) => (Some(elector), Some(settings), Some(tenancy)),
            None => (None, None, None),
        };
        let read_mark = options.read_mark.clone();
        let writer = Arc::new(Writer::new(node.clone(), config.writer_setup(paths.database())));
        let slot = EngineSlot::new(node.clone(), files.run(&writer)?);
        let supervisor = Arc::new(Supervisor::new(Turns {
            node: node.clone(),
            slot: slot.clone(),
            writer: writer.clone(),
            replica_server: replica_server.clone(),
            tracker: tracker.clone(),
            runtime,
            options,
            hooks,
            fixed,
            edge: Mutex::default(),
        }));
        // With its owner: when nothing waits for it any more, it is closed.
        let database = Database {
            verifier: Verifier::new(node.clone(), slot.clone(), config.verify_limit),
            pool: pool(&config, paths.database(), slot.clone(), node.files()).sharing(read_mark),
            supervisor,
            elector,
            node,
            paths,
            slot,
            writer,
            replica_server,
            members,
            app,
            tracker,
            wait_timeout: config.wait_timeout,
            drain_limit: config.drain_limit,
            grace: config.grace,
            app_tls,
            opened: Instant::now(),
            disk_use: DiskUse::default(),
            recovered,
            ending: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            ended: CancellationToken::new(),
            claim: Mutex::new(Some(claim)),
            tenancy: Mutex::new(tenancy),
            _keep: config.keep,
        };
        Ok((LastHandle(Arc::new(database)), settings))
    }
}

fn hooks(config: &Config, handle: &Arc<OnceLock<Weak<LastHandle>>>) -> Hooks {
    Hooks {
        on_promote: hook(config.on_promote.clone(), handle),
        on_demote: hook(config.on_demote.clone(), handle),
        limit: config.hook_limit,
    }
}

/// What the application does with the node's role, with a handle that is made only then: a hook
/// keeps no database open.
fn hook(run: Option<RoleHook>, handle: &Arc<OnceLock<Weak<LastHandle>>>) -> Option<TurnHook> {
    let (run, handle) = (run?, handle.clone());
    Some(Arc::new(move || {
        let inner = handle.get()?.upgrade()?;
        Some(run(Db { inner }))
    }))
}

/// Has replicas give back what a power cut took. Returns how many transactions these were.
async fn recover(
    opening: Box<Opening>,
    listener_guard: &mut ListenerGuard,
    limit: Duration,
) -> Result<(Box<Opening>, u64)> {
    if !listener_guard.has_listener {
        listener_guard.node.report(Condition::LossNotAsked);
        return Ok((opening, 0));
    }
    let position = opening.tip();
    let before = position.number();
    listener_guard.node.report(Condition::LossAsked { position, limit });
    let recovery = Recovery::new(*opening);
    listener_guard.replica_server.recover(recovery.clone());
    listener_guard.open();
    let opening = recovery.finish(limit).await.ok_or(Error::ShutDown)?;
    let recovered = opening.tip().number() - before;
    Ok((Box::new(opening), recovered))
}

fn pool(config: &Config, path: &std::path::Path, slot: Arc<EngineSlot>, files: Arc<AtomicU64>) -> Pool {
    let expect: Expect = Box::new(move || slot.get()?.expect_files());
    let (on_connect, trust) = (config.on_connect.clone(), config.trust_schema);
    let prepare = move |conn: &Connection| {
        defend(conn, !trust)?;
        on_connect.as_ref().map_or(Ok(()), |run| run(conn, ConnectionKind::Reader))
    };
    Pool::new(
        path.to_path_buf(),
        config.read_connections,
        config.read_timeout,
        config.statement_cache,
        expect,
        files,
        Box::new(prepare),
    )
}
