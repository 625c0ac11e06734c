//! The handle that an application holds.

mod captured;
mod channel;
mod checkpoint;
mod config;
mod events;
mod figures;
mod identity;
mod lease;
#[cfg(feature = "members")]
mod members;
mod open;
mod preflight;
mod probes;
mod repair;
mod roles;
mod shutdown;
mod snapshot;
mod sql;
mod status;
#[cfg(all(test, feature = "tls"))]
mod tests;
mod verify;
#[cfg(feature = "members")]
mod witness;
mod write;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::watch;

use crate::engine::{Durability, Lost};
use crate::error::{Error, Result};
use crate::node::database::LastHandle;
use crate::node::slot::Running;
use crate::peer::NodeId;
use crate::proxy::{ForwardedApp, PrimaryClient, ReplayLayer};
use crate::server::{Mount, ReplicationService};
use crate::session::{self, Session};
use crate::status::{LoggedTransaction, PeerInfo, Role};
use crate::threads::blocking;
use crate::token::Token;
use crate::txid::{Place, Position, Txid};

pub use crate::node::writer::{Commit, ConnectionKind, WriterGuard};
pub use config::Config;
pub use events::Events;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use identity::fuzz_identity;
#[cfg(test)]
pub(crate) use identity::fuzz_identity_seed;
pub use repair::Repair;
pub use snapshot::Snapshot;
#[cfg(feature = "members")]
pub use witness::Witness;

/// A replicated SQLite database: one node's handle. Clones share it.
///
/// Dropping the last clone closes the database: its threads stop, its tasks end, and the file is
/// free again. On a plain thread the drop waits for that. Inside a tokio runtime it returns at
/// once, and a background thread does the closing, because no async task should wait for a disk.
/// Opening the same file meanwhile waits for it. A process that ends meanwhile loses nothing that
/// was acknowledged.
///
/// [`Db::shutdown`] also waits until replicas have what was captured, and returns when all is done.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::Db;
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let commit = db.execute("INSERT INTO notes VALUES ('a')", []).await?;
/// let count: i64 = db.query_row("SELECT count(*) FROM notes", [], |row| row.get(0))?;
/// assert_eq!((commit.value, count), (1, 1));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Db {
    pub(crate) inner: Arc<LastHandle>,
}

impl Db {
    /// Opens the database as a node. A primary creates its database when there is none. A replica
    /// is filled from its primary; it may open before that is up, and waits for it in the
    /// background.
    ///
    /// It spawns its tasks on the runtime in which it runs, which needs tokio's time and net
    /// drivers.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let dir = tempfile::tempdir().unwrap();
    /// use replite::{Config, Db};
    ///
    /// let db = Db::open(Config::new(dir.path().join("app.db")).migrate(|conn| {
    ///     conn.execute_batch("CREATE TABLE IF NOT EXISTS visits (at TEXT)")
    /// }))
    /// .await?;
    /// let commit = db.execute("INSERT INTO visits VALUES ('now')", []).await?;
    /// assert_eq!(commit.value, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`Error::Config`] when the configuration contradicts itself, or the node could never
    ///   replicate with it.
    /// - [`Error::Unsupported`] when the database can't be served.
    /// - [`Error::AlreadyOpen`] when it is open as a node already.
    /// - [`Error::Corrupt`], [`Error::Newer`] and [`Error::Damaged`] when files are not what they
    ///   should be.
    /// - [`Error::Migration`] when what [`Config::migrate`] runs fails.
    /// - [`Error::Io`] and [`Error::Sqlite`] when the system or SQLite fails.
    ///
    /// # Cancel safety
    /// Dropping the future leaves no thread of the node. The opening itself may still run to its
    /// end.
    pub async fn open(config: Config) -> Result<Db> {
        open::open(config).await
    }

    /// Runs `f` with a read-only connection of the pool, on the caller's thread. It is for short
    /// reads of hot rows, which take microseconds: it blocks for as long as `f` runs. Longer reads
    /// belong into [`Db::read_async`].
    ///
    /// Each statement sees the newest committed state; `conn.unchecked_transaction()` holds one
    /// state for several.
    ///
    /// # Errors
    /// What `f` returned, or one of our own: [`Error::NoState`] on a replica that has not been
    /// filled yet, [`Error::PoolExhausted`], [`Error::ShutDown`].
    pub fn read<T, E, F>(&self, f: F) -> Result<T, E>
    where
        F: FnOnce(&Connection) -> Result<T, E>,
        E: From<Error>,
    {
        self.inner.readable()?;
        let lease = self.inner.lease(None)?;
        let result = f(&lease);
        match &result {
            Ok(_) => self.inner.node.read_worked(),
            Err(_) => self.inner.judge(&lease),
        }
        result
    }

    /// [`Db::read`] on a thread where blocking is allowed.
    ///
    /// # Errors
    /// As for [`Db::read`], and [`Error::Panicked`].
    ///
    /// # Cancel safety
    /// Dropped, the read still runs to its end, and its result is lost.
    pub async fn read_async<T, E, F>(&self, f: F) -> Result<T, E>
    where
        F: FnOnce(&Connection) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let db = self.clone();
        match tokio::task::spawn_blocking(move || db.read(f)).await {
            Ok(result) => result,
            Err(error) if error.is_panic() => Err(Error::Panicked("in read_async".into()).into()),
            Err(_) => Err(Error::ShutDown.into()),
        }
    }

    /// Returns once this node has the transaction. Every read here then sees what was committed in
    /// it. The call also waits for a transaction of an epoch that this node has not heard of,
    /// because its primary may have begun anew.
    ///
    /// # Errors
    /// - [`Error::Timeout`] after [`Config::wait_timeout`].
    /// - [`Error::Lost`] when the transaction is on a branch that is known to be lost. Either this
    ///   node's history has left the branch, or this node is the primary and does not have the
    ///   transaction.
    /// - [`Error::TooMany`] when too many wait.
    /// - [`Error::ShutDown`] after [`Db::shutdown`].
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn wait_for(&self, txid: Txid) -> Result<()> {
        self.wait_for_timeout(txid, self.inner.wait_timeout).await
    }

    /// [`Db::wait_for`] with a limit of its own.
    ///
    /// # Errors
    /// As for [`Db::wait_for`].
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn wait_for_timeout(&self, txid: Txid, limit: Duration) -> Result<()> {
        self.inner.node.applied.wait_for(txid, limit).await?;
        session::waited(&self.inner.node, txid);
        Ok(())
    }

    /// At most `most` transactions of this node's retained log, oldest first: those after `after`,
    /// or from the oldest one on. To get the next ones, give the last one's [`Position::txid`]. The
    /// list is empty when `after` is of an epoch that this node has not heard of.
    ///
    /// # Errors
    /// [`Error::Lost`] when `after` is on a branch that is known to be lost, [`Error::Corrupt`]
    /// when the log is damaged, [`Error::Io`], [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// Nothing happens but reading.
    pub async fn transactions(&self, after: Option<Txid>, most: usize) -> Result<Vec<LoggedTransaction>> {
        match after.map(|txid| (txid, self.inner.node.applied.place(txid))) {
            Some((txid, Place::Lost)) => return Err(Error::Lost { txid }),
            // What follows it is not here yet; what has the same numbers here may be of another
            // branch.
            Some((_, Place::Unknown)) => return Ok(Vec::new()),
            Some((_, Place::OnHistory)) | None => {}
        }
        let log = self.inner.slot.get()?.log();
        let Some(log) = log else { return Ok(Vec::new()) };
        blocking(move || log.list(after.map_or(0, Txid::number), most)).await
    }

    /// What this node has put aside, oldest first. There are branches that heals have replaced:
    /// commits that were made here and are not in the primary's history. There are databases, logs
    /// and WALs that had to go from their place. The node keeps all of it in
    /// `<database>-replite/lost` until somebody moves it away. What it can't read there, it lists
    /// as such.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// Nothing happens but reading.
    pub async fn lost(&self) -> Result<Vec<Lost>> {
        let paths = self.inner.paths.clone();
        blocking(move || Lost::list(&paths)).await
    }

    /// Waits until `done` returns `true` for this node's state, and asks again after each change.
    /// For a replica that needs the schema of a newer version before it can work:
    ///
    /// ```no_run
    /// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
    /// db.wait_until(|conn| conn.table_exists(None, "orders")).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::read_async`], and what `done` returned.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn wait_until<F>(&self, done: F) -> Result<()>
    where
        F: Fn(&Connection) -> rusqlite::Result<bool> + Send + Sync + 'static,
    {
        let done = Arc::new(done);
        let mut positions = self.watch();
        self.ready().await?;
        loop {
            positions.mark_unchanged();
            let ask = done.clone();
            let asked = self.read_async(move |conn| {
                // `table_exists` and the like look at what the connection knows of the schema; only
                // a statement that reads has SQLite notice that it has changed.
                conn.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
                ask(conn).map_err(Error::from)
            });
            if asked.await? {
                return Ok(());
            }
            tokio::select! {
                changed = positions.changed() => changed.map_err(|_| Error::ShutDown)?,
                () = self.inner.node.stop.cancelled() => return Err(Error::ShutDown),
            }
        }
    }

    /// The state that this node has; none on a replica that was not filled yet. On the primary it
    /// follows an acknowledged commit within moments; [`Db::wait_for`] waits for that, and
    /// [`Db::captured`] for what any connection has committed. A read may see a commit before the
    /// position has it, on the primary for as long as an fsync takes. Where responses to reads have
    /// tokens ([`SessionTokens`](crate::SessionTokens)), the layer waits.
    ///
    /// On a replica only what a primary vouches for counts. Somebody may have written to its file
    /// while it was closed, or its log may have lost its end. Reads then see more than the position
    /// says, or there is no position, until the primary has decided on the rest.
    /// [`Status::problem`](crate::Status::problem) says so meanwhile.
    pub fn position(&self) -> Option<Position> {
        self.inner.node.applied.position()
    }

    /// The position ([`Db::position`]), to watch. It changes with each transaction that any
    /// connection commits here, or that the node applies. It is for live pages, and for caches that
    /// have to be invalidated: SQLite's update hooks don't fire for what a replica applies.
    pub fn watch(&self) -> watch::Receiver<Option<Position>> {
        self.inner.node.applied.watch()
    }

    /// This node's id, incarnation and addresses.
    pub fn node(&self) -> &PeerInfo {
        &self.inner.node.me
    }

    /// The id that stays the same over restarts.
    pub fn node_id(&self) -> NodeId {
        self.inner.node.me.node
    }

    /// The database file.
    pub fn path(&self) -> &Path {
        self.inner.paths.database()
    }

    /// What was configured. A connection of another library keeps the same promise with
    /// `PRAGMA synchronous = FULL` for [`Durability::Synced`], and `NORMAL` for
    /// [`Durability::Unsynced`].
    pub fn durability(&self) -> Durability {
        self.inner.writer.durability()
    }

    /// Returns once this node can be read: at once on a primary, on any other node when it has a
    /// state. It does not wait for a primary.
    ///
    /// # Errors
    /// [`Error::ShutDown`], [`Error::Stopped`] when replication has failed.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn ready(&self) -> Result<()> {
        let node = &self.inner.node;
        loop {
            let Running::Replica(engine) = self.inner.slot.get()? else { return Ok(()) };
            let mut readable = engine.readable();
            drop(engine);
            let mut roles = node.roles.subscribe();
            tokio::select! {
                biased;
                ready = readable.wait_for(|readable| *readable) => if ready.is_ok() {
                    return Ok(());
                },
                () = node.stop.cancelled() => return Err(Error::ShutDown),
                () = node.stopped() => return Err(node.failure().map_or(Error::ShutDown, Error::Stopped)),
                // An empty node that became the primary.
                _ = roles.wait_for(|state| state.role == Role::Primary) => {}
            }
        }
    }

    /// The replication endpoint, to be mounted at `/_replite` of the application's own server,
    /// which must speak HTTP/2. It needs a secret: behind a reverse proxy everybody comes from a
    /// loopback address. An own listener ([`Config::listen`]) that the public can't reach is the
    /// better choice.
    pub fn service(&self) -> ReplicationService {
        self.inner.service(Mount::Mounted)
    }

    /// The layer that lets every node take every request. Those that may change something go to the
    /// primary, and clients read their own writes on every node. See [`ReplayLayer`].
    pub fn replay_layer(&self) -> ReplayLayer {
        let layer = ReplayLayer::new(self.inner.node.clone()).with_tls(self.inner.app_tls.clone());
        layer.with_app(self.inner.app.clone())
    }

    /// Gives the node the application's service. From then on requests that other nodes forward
    /// reach it on the private channel ([`Config::listen`], or the mounted endpoint), and not at
    /// the application's address. Neither their bodies nor their cookies cross the network in clear
    /// text, and they need no certificates. Call it once on each instance, with the same service
    /// that its server has:
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// use axum::{Router, routing::get};
    /// use replite::Db;
    ///
    /// let db = Db::temporary(|config| config).await?;
    /// let app: Router = Router::new().route("/", get(|| async { "hello" }));
    /// let app = app.layer(db.replay_layer());
    /// db.serve_forwarded(app.clone())?;
    /// // axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>())
    /// # db.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// An instance that has called it forwards on the channel only, and takes the hop of no request
    /// that comes to its public address. To an instance that has not called it yet it sends
    /// nothing: the request waits as for a primary. [`ReplayLayer::forward_in_clear`] is for the
    /// deploy that brings this call. On the service's side the request has a
    /// [`Forwarded`](crate::Forwarded) in its extensions. WebSockets and gRPC go this way, too.
    ///
    /// The node keeps the service until [`Db::shutdown`], with all that is in it, mostly handles of
    /// this database. To drop the handles alone does not close the database then. A follower
    /// ([`Config::follower_secret`]) forwards to the application's address all the same: what it
    /// sends counts as a client's.
    ///
    /// # Errors
    /// [`Error::Config`]: it was given before, or this build has no TLS (feature `tls`).
    pub fn serve_forwarded(&self, app: impl ForwardedApp) -> Result<()> {
        let node = &self.inner.node;
        if !node.channel.has_tls() {
            return Err(crate::channel::no_feature());
        }
        if self.inner.app.give(node, app) {
            Ok(())
        } else {
            Err(Error::Config("the application's service was given before".into()))
        }
    }

    /// A tower service that sends requests to the primary's application, wherever that is: for jobs
    /// and WebSocket handlers on a replica that have to write. [`ReplayLayer::primary_client`]
    /// gives one with a layer's own limits.
    ///
    /// ```no_run
    /// # type BoxError = Box<dyn std::error::Error + Send + Sync>;
    /// # async fn example(db: replite::Db) -> Result<(), BoxError> {
    /// use tower::ServiceExt;
    ///
    /// let body = http_body_util::Full::<bytes::Bytes>::from("hello");
    /// let request = http::Request::post("/api/notes").body(body)?;
    /// let response = db.primary_client().oneshot(request).await?;
    /// assert!(response.status().is_success());
    /// # Ok(())
    /// # }
    /// ```
    pub fn primary_client(&self) -> PrimaryClient {
        self.replay_layer().primary_client()
    }

    /// A token for a transaction: what a client carries to read its own write on another node. The
    /// layer sets and reads them by itself; this is for other ways of carrying them. None on a
    /// follower ([`Config::follower_secret`]), whose tokens no node would take.
    pub fn token(&self, txid: Txid) -> Option<Token> {
        let node = &self.inner.node;
        (!node.keys.is_follower()).then(|| Token::sign(node, txid))
    }

    /// What the request that this task works for did to this database; none outside of the
    /// database's replay layer.
    pub fn session(&self) -> Option<Session> {
        Session::current_of(&self.inner.node)
    }

    /// The transaction of a token's text; none when it is not one of this database, or its proof
    /// does not hold. None, too, on a follower ([`Config::follower_secret`]), which can't tell.
    pub fn verify_token(&self, text: &str) -> Option<Txid> {
        Token::verify(&self.inner.node, text)
    }
}
