//! For tests of applications: databases that vanish, and whole clusters in one process.

pub mod lease;
mod link;
mod serve;

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::BytesMut;
use tempfile::TempDir;

use crate::db::{Config, Db};
use crate::engine::Durability;
use crate::error::{Error, Result};
use crate::lease::Fixed;
use crate::lock::lock;
use crate::secret::Secret;
use crate::status::Addresses;
use crate::wire;
use link::Link;
use serve::Stand;

pub use serve::Application;

/// The WAL of a database that is only for tests, in bytes: less to allocate at open.
const WAL_LIMIT_BYTES: u64 = 256 * 1024;
/// How long [`Cluster::caught_up`] and the start wait.
const LIMIT: Duration = Duration::from_secs(30);

/// How many bytes a record says the change of a page in; for figures.
#[doc(hidden)]
pub fn change_bytes(old: &[u8], new: &[u8]) -> usize {
    match wire::difference(Some(old), new, &mut BytesMut::new()) {
        wire::Image::Whole(page) => page.len(),
        wire::Image::Sparse(runs) | wire::Image::Patch(runs) => runs.bytes(),
    }
}

type Configure = Arc<dyn Fn(Config) -> Config + Send + Sync>;

impl Db {
    /// A primary in a temporary directory, without a listener: for tests of one instance. Its files
    /// are removed when the last handle is gone.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// use replite::{Db, Error};
    ///
    /// let db = Db::temporary(|config| {
    ///     config.migrate(|conn| conn.execute_batch("CREATE TABLE t (a)"))
    /// })
    /// .await?;
    /// db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t VALUES (1)", [])?)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::open`], and [`Error::Io`] when there is no temporary directory to be had.
    ///
    /// # Cancel safety
    /// As for [`Db::open`].
    pub async fn temporary(configure: impl FnOnce(Config) -> Config) -> Result<Db> {
        let directory = directory()?;
        let config = Config::new(directory.path().join("app.db"))
            .durability(Durability::Unsynced)
            .wal_limit(WAL_LIMIT_BYTES);
        Db::open(configure(config).keep(Arc::new(directory))).await
    }
}

fn directory() -> Result<TempDir> {
    tempfile::tempdir().map_err(Error::io("create a directory in", std::env::temp_dir()))
}

/// A primary and its replicas in one process, over real sockets on loopback, each with its own
/// files and its own instance of the application. The first node is the primary.
///
/// Faults are made to happen: [`Node::lag`], [`Node::throttle`], [`Node::pause`], [`Node::cut`],
/// [`Node::kill`]. Requests are given to a node's application by `oneshot`, or sent to its
/// [`Node::url`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// use axum::{Router, body::Body, extract::State, routing::get};
/// use replite::{Db, Error, testing::Cluster};
/// use tower::ServiceExt;
///
/// async fn count(State(db): State<Db>) -> Result<String, Error> {
///     db.read(|conn| {
///         let sql = "SELECT count(*) FROM t";
///         Ok(conn.query_row(sql, [], |row| row.get::<_, i64>(0))?.to_string())
///     })
/// }
///
/// let cluster = Cluster::start(3)
///     .config(|config| config.migrate(|conn| conn.execute_batch("CREATE TABLE t (a)")))
///     .app(|db| {
///         Router::new().route("/", get(count)).with_state(db.clone()).layer(db.replay_layer())
///     })
///     .await?;
/// let request = http::Request::get("/").body(Body::empty())?;
/// let response = cluster.node(2).app().oneshot(request).await?;
/// assert_eq!(response.status(), 200);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Cluster<S> {
    nodes: Vec<Node<S>>,
    _directory: TempDir,
}

/// What a cluster is started from; see [`Cluster::start`].
///
/// ```
/// # async fn example() -> Result<(), replite::Error> {
/// use axum::Router;
/// use replite::testing::{Builder, Cluster};
///
/// fn small(nodes: usize) -> Builder {
///     Cluster::start(nodes).config(|config| config.read_connections(2))
/// }
///
/// let cluster = small(3).app(|db| Router::new().layer(db.replay_layer())).await?;
/// # drop(cluster);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a cluster starts when it is given its application"]
pub struct Builder {
    nodes: usize,
    configure: Configure,
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

impl Cluster<()> {
    /// Begins a cluster of so many nodes: one primary, all others replicas.
    pub fn start(nodes: usize) -> Builder {
        Builder { nodes, configure: Arc::new(|config| config) }
    }
}

impl Builder {
    /// Changes the configuration of every node. Paths, addresses, lease and secrets are the
    /// cluster's.
    pub fn config(mut self, change: impl Fn(Config) -> Config + Send + Sync + 'static) -> Builder {
        self.configure = Arc::new(change);
        self
    }

    /// Starts the nodes, each with the application that is made for its database, mostly a router
    /// with [`Db::replay_layer`] around it. Returns when every node can be read.
    ///
    /// # Errors
    /// As for [`Db::open`]; [`Error::Config`] for no node at all, [`Error::Timeout`] when a replica
    /// is not filled in time.
    ///
    /// # Cancel safety
    /// Dropped, what was started ends.
    pub async fn app<S: Application>(
        self,
        app: impl Fn(&Db) -> S + Send + Sync + 'static,
    ) -> Result<Cluster<S>> {
        if self.nodes == 0 {
            return Err(Error::Config("a cluster has at least one node".into()));
        }
        let directory = directory()?;
        let secret = Secret::generate()?;
        let app: Make<S> = Arc::new(app);
        let mut nodes: Vec<Node<S>> = Vec::new();
        let links: Links = Arc::default();
        for number in 0..self.nodes {
            let stand = Stand::start().await?;
            let path = directory.path().join(format!("{number}.db"));
            let url = format!("http://{}", stand.address);
            let config = Config::new(path)
                .durability(Durability::Unsynced)
                .wal_limit(WAL_LIMIT_BYTES)
                .listen(SocketAddr::from(([127, 0, 0, 1], 0)));
            let mut config = (self.configure)(config).database("app").cluster("test").secret(secret.clone());
            let mut addresses = Addresses { app: url, ..config.given_addresses().clone() };
            addresses.replication.clear();
            config = config.addresses(addresses);
            let mut stream = None;
            if let Some(primary) = nodes.first() {
                let to = replication(&primary.db())?;
                let link = Link::start(to, Duration::ZERO).await.map_err(Error::io("bind", "127.0.0.1"))?;
                config = config.lease(Fixed::replica_of(format!("replite://{}", link.address)));
                let link = Arc::new(link);
                lock(&links).push(link.clone());
                stream = Some(link);
            }
            let (make, links) = (app.clone(), links.clone());
            let node = Node { config, stand, stream, links, make, life: Mutex::new(None) };
            node.open().await?;
            nodes.push(node);
        }
        let cluster = Cluster { nodes, _directory: directory };
        for node in &cluster.nodes {
            limited("a replica to be filled", node.db().ready()).await??;
        }
        Ok(cluster)
    }
}

async fn limited<F: Future>(what: &str, future: F) -> Result<F::Output> {
    let late = |_| Error::Timeout { what: what.into(), after: LIMIT };
    tokio::time::timeout(LIMIT, future).await.map_err(late)
}

/// Where the primary's own listener is.
fn replication(db: &Db) -> Result<SocketAddr> {
    let url = &db.node().addresses.replication;
    let authority = url.strip_prefix("replite://");
    let address = authority.and_then(|address| address.parse().ok());
    address.ok_or_else(|| Error::Config(format!("{url:?} is not the listener's address")))
}

type Make<S> = Arc<dyn Fn(&Db) -> S + Send + Sync>;
/// The ways of all replicas to the primary.
type Links = Arc<Mutex<Vec<Arc<Link>>>>;

impl<S: Application> Cluster<S> {
    /// A node; the first, with number 0, is the primary.
    ///
    /// # Panics
    /// When there is none of this number.
    pub fn node(&self, number: usize) -> &Node<S> {
        &self.nodes[number]
    }

    /// All nodes, the primary first.
    pub fn nodes(&self) -> &[Node<S>] {
        &self.nodes
    }

    /// Returns when every node that runs has what the primary has committed up to now.
    ///
    /// # Errors
    /// [`Error::Timeout`] after half a minute.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn caught_up(&self) -> Result<()> {
        let last = self.nodes[0].db().captured().await?;
        for node in &self.nodes {
            if let Some(db) = node.running() {
                db.wait_for_timeout(last, LIMIT).await?;
            }
        }
        Ok(())
    }

    /// Shuts every node down, the replicas first. Dropping the cluster does it in the background.
    ///
    /// # Cancel safety
    /// As for [`Db::shutdown`].
    pub async fn shutdown(&self) {
        for node in self.nodes.iter().rev() {
            node.stand.shut();
            let life = lock(&node.life).take();
            if let Some((db, _)) = life {
                db.shutdown().await;
            }
        }
    }
}

/// One node of a [`Cluster`].
///
/// ```
/// use axum::Router;
/// use replite::{Error, testing::Cluster};
///
/// async fn outage(cluster: &Cluster<Router>) -> Result<(), Error> {
///     let primary = cluster.node(0);
///     primary.kill().await;
///     assert!(cluster.node(1).db().health().can_read);
///     primary.start().await?;
///     cluster.caught_up().await
/// }
/// # let _ = outage;
/// ```
pub struct Node<S> {
    config: Config,
    stand: Stand<S>,
    /// A replica's way to its primary.
    stream: Option<Arc<Link>>,
    links: Links,
    make: Make<S>,
    life: Mutex<Option<(Db, S)>>,
}

impl<S> fmt::Debug for Node<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<S: Application> Node<S> {
    /// Its database.
    ///
    /// # Panics
    /// While the node is killed.
    pub fn db(&self) -> Db {
        self.running().expect("the node was killed")
    }

    /// Its application, for `oneshot`.
    ///
    /// # Panics
    /// While the node is killed.
    pub fn app(&self) -> S {
        lock(&self.life).as_ref().map(|(_, app)| app.clone()).expect("the node was killed")
    }

    /// Where its application is served.
    pub fn url(&self) -> String {
        format!("http://{}", self.stand.address)
    }

    /// From now on everything between this replica and the primary arrives so much later, either
    /// way.
    pub fn lag(&self, delay: Duration) {
        self.each_link(|link| link.delay(delay));
    }

    /// From now on so many bytes a second go between this replica and the primary, each way; with
    /// none, as many as come.
    pub fn throttle(&self, rate: Option<u64>) {
        self.each_link(|link| link.throttle(rate));
    }

    /// From now on nothing moves between this replica and the primary, though the connection
    /// stands; until [`Node::resume`].
    pub fn pause(&self) {
        self.each_link(|link| link.pause(true));
    }

    /// What stood still moves again.
    pub fn resume(&self) {
        self.each_link(|link| link.pause(false));
    }

    /// Breaks this replica's connection to the primary, and each new one, until [`Node::mend`].
    pub fn cut(&self) {
        self.each_link(|link| {
            link.let_in(false);
            link.cut();
        });
    }

    /// Lets the replica connect again.
    pub fn mend(&self) {
        self.each_link(|link| link.let_in(true));
    }

    /// The node is gone at once: its connections break, and it answers no one. Its files stay.
    /// (Locks, threads and files of this process are given back in order. To see what a kill leaves
    /// on the disk takes a process of its own.)
    ///
    /// # Cancel safety
    /// As for [`Db::shutdown`].
    pub async fn kill(&self) {
        self.stand.shut();
        // Before it can say goodbye.
        match &self.stream {
            Some(link) => link.cut(),
            None => lock(&self.links).iter().for_each(|link| link.cut()),
        }
        let life = lock(&self.life).take();
        if let Some((db, _)) = life {
            db.shutdown().await;
        }
    }

    /// Starts a killed node again, with what its files have; nothing happens to one that runs.
    ///
    /// # Errors
    /// As for [`Db::open`].
    ///
    /// # Cancel safety
    /// As for [`Db::open`].
    pub async fn start(&self) -> Result<()> {
        if self.running().is_some() { Ok(()) } else { self.open().await }
    }

    async fn open(&self) -> Result<()> {
        let db = Db::open(self.config.clone()).await?;
        if self.stream.is_none() {
            let to = replication(&db)?;
            lock(&self.links).iter().for_each(|link| link.lead_to(to));
        }
        let app = (self.make)(&db);
        self.stand.open(app.clone());
        *lock(&self.life) = Some((db, app));
        Ok(())
    }
}

impl<S> Node<S> {
    fn running(&self) -> Option<Db> {
        lock(&self.life).as_ref().map(|(db, _)| db.clone())
    }

    fn each_link(&self, act: impl FnOnce(&Link)) {
        if let Some(link) = &self.stream {
            act(link);
        }
    }
}
