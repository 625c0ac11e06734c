//! Opening a database as a node.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::context::NodeContext;
use crate::db::config::Config;
use crate::db::{Db, identity, preflight, snapshot};
use crate::engine::{Opening, ReplicaEngine};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::net::{Endpoint, Listener};
use crate::node::database::{Database, LastHandle};
use crate::node::host::ListenerGuard;
use crate::node::open_files;
use crate::node::pool::{Expect, Pool};
use crate::node::slot::{EngineSlot, Running};
use crate::node::supervisor::Supervisor;
use crate::node::verifier::Verifier;
use crate::node::writer::ConnectionKind;
use crate::node::writer::Writer;
use crate::peer::Incarnation;
use crate::primary::{Recovery, ReplicaServer};
use crate::report::Condition;
use crate::secret::Keyring;
use crate::sqlite::defend;
use crate::status::{Addresses, PeerInfo, Role};
use crate::threads::blocking_for_caller as blocking;

/// Where a panic of the application's code was.
const OPENING: &str = "while the database was opened";

/// See [`Db::open`].
pub(super) async fn open(config: Config) -> Result<Db> {
    let primary = config.check()?;
    let keys = Keyring::new(&config.secrets)?;
    let listener = match config.listen {
        Some(address) => Some(Listener::bind(address, !keys.is_open()).await?),
        None => None,
    };
    let addresses = config.advertised(listener.as_ref().map(Listener::address));
    let follows = primary.is_some();
    let begun = blocking(OPENING, move || OpenedNode::new(config, keys, addresses, follows)).await?;
    let mut listener_guard = ListenerGuard::new(&begun.node, &begun.replica_server, &begun.tracker, listener);
    let opened = begun.finish(&mut listener_guard, primary).await;
    if opened.is_err() {
        listener_guard.close().await;
    }
    opened
}

/// A node whose files are open, and that does nothing yet.
struct OpenedNode {
    config: Config,
    paths: Paths,
    claim: open_files::Claim,
    node: Arc<NodeContext>,
    replica_server: Arc<ReplicaServer>,
    tracker: TaskTracker,
    files: Files,
}

enum Files {
    Primary(Box<Opening>),
    Replica(Arc<ReplicaEngine>),
}

impl OpenedNode {
    /// Blocks.
    fn new(config: Config, keys: Keyring, addresses: Addresses, follows: bool) -> Result<OpenedNode> {
        let database = config.database_name()?;
        let (paths, claim) = preflight::claim(&config.path, config.allow_network_filesystem)?;
        preflight::state_dir(&paths, follows, config.database_mode)?;
        snapshot::clear(&paths);
        let me = PeerInfo {
            node: identity::node_id(&paths, &config.cluster, &database)?,
            incarnation: Incarnation::random(),
            addresses,
        };
        let role = if follows { Role::Replica } else { Role::Primary };
        let node = NodeContext::new(me, config.cluster.clone(), database, keys, role);
        let options = config.engine_options(paths.clone());
        let files = match follows {
            true => Files::Replica(Arc::new(ReplicaEngine::open(options, node.clone())?)),
            false => Files::Primary(Box::new(Opening::begin(options, node.clone())?)),
        };
        let (replica_server, tracker) = (ReplicaServer::new(node.clone()), TaskTracker::new());
        Ok(OpenedNode { config, paths, claim, node, replica_server, tracker, files })
    }

    /// Makes the node complete and starts its tasks, on the runtime of the caller.
    async fn finish(self, listener_guard: &mut ListenerGuard, primary: Option<Endpoint>) -> Result<Db> {
        let OpenedNode { config, paths, claim, node, replica_server, tracker, files } = self;
        let (files, recovered) = match files {
            Files::Primary(opening) if opening.may_miss() && !config.recovery_timeout.is_zero() => {
                let (opening, recovered) = recover(opening, listener_guard, config.recovery_timeout).await?;
                (Files::Primary(opening), recovered)
            }
            files => (files, 0),
        };
        let verify_every = config.verify_every;
        let inner = blocking(OPENING, move || {
            let writer = Arc::new(Writer::new(node.clone(), config.writer_setup(paths.database())));
            let running = match files {
                Files::Primary(opening) => {
                    let engine = Arc::new(opening.finish()?);
                    writer.open(&engine)?;
                    Running::Primary(engine)
                }
                Files::Replica(engine) => Running::Replica(engine),
            };
            let slot = EngineSlot::new(node.clone(), running);
            let (replicas, tasks) = (replica_server.clone(), tracker.clone());
            // With its owner: when nothing waits for it any more, it is closed.
            Ok(LastHandle(Arc::new(Database {
                verifier: Verifier::new(node.clone(), slot.clone(), config.verify_limit),
                pool: pool(&config, paths.database(), slot.clone(), node.files()),
                supervisor: Supervisor::new(node.clone(), slot.clone(), writer.clone(), replicas, tasks),
                node,
                paths,
                slot,
                writer,
                replica_server,
                tracker,
                wait_timeout: config.wait_timeout,
                grace: config.grace,
                opened: Instant::now(),
                recovered,
                ending: AtomicBool::new(false),
                closed: AtomicBool::new(false),
                ended: CancellationToken::new(),
                claim: Mutex::new(Some(claim)),
                _keep: config.keep,
            })))
        });
        let inner = inner.await?;
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
        if let Some(period) = verify_every {
            inner.tracker.spawn(inner.verifier.clone().repeat(period));
        }
        Ok(Db { inner: Arc::new(inner) })
    }
}

/// Has replicas give back what a power cut took. Returns how many transactions these were.
async fn recover(
    opening: Box<Opening>,
    listener_guard: &mut ListenerGuard,
    limit: Duration,
) -> Result<(Box<Opening>, u64)> {
    if listener_guard.listener.is_none() {
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
