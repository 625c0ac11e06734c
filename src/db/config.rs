//! What a node is told before it opens its database.

mod app;
mod channel;
mod check;
mod env;
mod lease;
mod path;
mod peers;

pub(super) use check::{ConfiguredStore, Start};

use std::any::Any;
use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::Connection;

use crate::channel::{Certificates, Plaintext};
use crate::db::Db;
use crate::engine::{CommitGate, Durability};
use crate::error::{Error, Result};
use crate::lease::{Fixed, Lease};
use crate::node::writer::{ConnectionKind, Migrate, OnConnect, WriterSetup};
use crate::peer::PeerKey;
use crate::secret::Secret;
use crate::status::Addresses;

/// A replica pauses for five seconds between two tries to connect, and a try may take three.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the application may take for what it does at a change of its node's role.
const HOOK_LIMIT: Duration = Duration::from_secs(60);

/// What the application does at a change of its node's role.
pub(super) type RoleHook = Arc<dyn Fn(Db) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> + Send + Sync>;

/// How a node is set up; given to [`Db::open`](crate::Db::open), which checks it.
///
/// ```no_run
/// use replite::{Config, Secret, lease};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = Config::new("data/app.db")
///     .advertise("http://10.0.0.2:8080")
///     .lease(lease::Fixed::replica_of("http://10.0.0.1:8080"))
///     .secret(Secret::new(std::env::var("REPLITE_SECRET")?)?); // from `openssl rand -base64 32`
/// # let _ = config;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a configuration does nothing before it is given to `Db::open`"]
pub struct Config {
    pub(super) path: PathBuf,
    pub(super) cluster: String,
    pub(super) database: Option<String>,
    pub(super) addresses: Addresses,
    pub(super) app_roots: Option<PathBuf>,
    pub(super) lease: Lease,
    pub(super) lease_time: Option<Duration>,
    pub(super) failover_loss: Duration,
    pub(super) drain_limit: Duration,
    pub(super) candidate: bool,
    pub(super) bootstrap: Option<usize>,
    pub(super) secrets: Vec<Secret>,
    pub(super) secret_file: Option<PathBuf>,
    pub(super) follower_secrets: Vec<Secret>,
    pub(super) shut_out: Vec<PeerKey>,
    pub(super) plaintext: Option<Plaintext>,
    pub(super) certificates: Option<Certificates>,
    pub(super) listen: Option<SocketAddr>,
    pub(super) durability: Durability,
    pub(super) wal_limit_bytes: u64,
    pub(super) log_bytes: u64,
    pub(super) log_quota: Option<u64>,
    pub(super) lost_bytes: u64,
    pub(super) log_age: Duration,
    pub(super) on_connect: Option<OnConnect>,
    pub(super) migrate: Option<Migrate>,
    pub(super) on_promote: Option<RoleHook>,
    pub(super) on_demote: Option<RoleHook>,
    pub(super) hook_limit: Duration,
    pub(super) read_connections: usize,
    pub(super) read_timeout: Duration,
    pub(super) wait_timeout: Duration,
    pub(super) write_queue: usize,
    pub(super) statement_cache: usize,
    pub(super) trust_schema: bool,
    pub(super) compression: bool,
    pub(super) allow_network_filesystem: bool,
    pub(super) grace: Duration,
    pub(super) verify_every: Option<Duration>,
    pub(super) verify_limit: Option<NonZeroU64>,
    pub(super) accept_damaged: bool,
    pub(super) database_mode: Option<u32>,
    pub(super) recovery_timeout: Duration,
    /// Dropped after the database was closed.
    pub(super) keep: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("path", &self.path)
            .field("cluster", &self.cluster)
            .field("database", &self.database)
            .field("addresses", &self.addresses)
            .field("lease", &self.lease)
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

impl Config {
    /// A primary of its own, for the database file at `path`, which it creates when there is none.
    /// So it does with the directories above, which are for their owner alone then.
    ///
    /// A URL as other programs have it is understood where it says a file and no more:
    /// `sqlite://data/app.db`, `file:data/app.db`, also with `?mode=rwc`. As `sqlx` has it,
    /// `sqlite:///data/app.db` begins at the root. [`Db::open`](crate::Db::open) refuses other
    /// URLs, and `:memory:`, which has no file to replicate.
    pub fn new(path: impl Into<PathBuf>) -> Config {
        Config {
            path: path.into(),
            cluster: "default".into(),
            database: None,
            addresses: Addresses::default(),
            app_roots: None,
            lease: Fixed::primary().into(),
            lease_time: None,
            failover_loss: lease::FAILOVER_LOSS,
            drain_limit: lease::DRAIN_LIMIT,
            candidate: true,
            bootstrap: None,
            secrets: Vec::new(),
            secret_file: None,
            follower_secrets: Vec::new(),
            shut_out: Vec::new(),
            plaintext: None,
            certificates: None,
            listen: None,
            durability: Durability::default(),
            wal_limit_bytes: 4 << 20,
            log_bytes: 1 << 30,
            log_quota: None,
            lost_bytes: 16 << 30,
            log_age: Duration::from_secs(24 * 3600),
            on_connect: None,
            migrate: None,
            on_promote: None,
            on_demote: None,
            hook_limit: HOOK_LIMIT,
            read_connections: 16,
            read_timeout: Duration::from_secs(5),
            wait_timeout: Duration::from_secs(5),
            write_queue: 1024,
            statement_cache: 64,
            trust_schema: false,
            compression: true,
            allow_network_filesystem: false,
            grace: Duration::from_secs(60),
            verify_every: None,
            verify_limit: None,
            accept_damaged: false,
            database_mode: None,
            recovery_timeout: RECOVERY_TIMEOUT,
            keep: None,
        }
    }

    /// The cluster's name: a node refuses the nodes of another cluster. `default` if not set.
    pub fn cluster(mut self, name: impl Into<String>) -> Config {
        self.cluster = name.into();
        self
    }

    /// The database's name in the cluster, which tells it from others there: two nodes replicate
    /// when both have the same. If not set, it is the file's name without its extension: `app` for
    /// `data/app.db`.
    pub fn database(mut self, name: impl Into<String>) -> Config {
        self.database = Some(name.into());
        self
    }

    /// When a commit is acknowledged.
    pub fn durability(mut self, durability: Durability) -> Config {
        self.durability = durability;
        self
    }

    /// The WAL's length in bytes at which the node begins it anew. 4 MiB if not set, as SQLite's
    /// own. Beyond twice that the node holds writers back until the WAL is copied back. It stays
    /// within eight times the limit, with two exceptions: a transaction that is larger, and a
    /// reader that stays inside of one for seconds. See
    /// [`Event::WalGrows`](crate::Event::WalGrows).
    pub fn wal_limit(mut self, bytes: u64) -> Config {
        self.wal_limit_bytes = bytes;
        self
    }

    /// The permissions of a database file that is made here, such as `0o640`, whatever the
    /// process's mask. If not set, a replica's file is for its owner alone (`0o600`), or has the
    /// permissions of the file that it replaces. A primary's file is then as SQLite makes it. A
    /// file that is there is left as it is.
    ///
    /// What lies beside the database follows the database's own permissions. The directory
    /// `<database>-replite` is always for its owner alone, and so is a directory of the database
    /// that had to be made: make it yourself where others are to read. Unix only.
    pub fn database_mode(mut self, mode: u32) -> Config {
        self.database_mode = Some(mode);
        self
    }

    /// How much of the past the node keeps for replicas that were away: up to so many bytes, and
    /// for so long. 1 GiB and a day if not set. The age counts from the node's start at the
    /// earliest. A replica that was away for longer compares its pages with the primary's.
    pub fn log_retention(mut self, bytes: u64, age: Duration) -> Config {
        (self.log_bytes, self.log_age) = (bytes, age);
        self
    }

    /// The most that the log takes up on the disk. That is what [`Config::log_retention`] keeps,
    /// what connected replicas still need beyond it, and the transaction that is under way. Four
    /// times the retained bytes if not set, at least 4 MiB. A transaction that is larger is
    /// committed all the same: the log then begins anew after it, and replicas compare their pages
    /// with the primary's.
    pub fn log_quota(mut self, bytes: u64) -> Config {
        self.log_quota = Some(bytes);
        self
    }

    /// How many bytes of lost branches the node keeps; see [`Db::lost`](crate::Db::lost). 16 GiB if
    /// not set. It never deletes one: a heal that would need more waits, and says so in
    /// [`Status::problem`](crate::Status::problem).
    pub fn lost_quota(mut self, bytes: u64) -> Config {
        self.lost_bytes = bytes;
        self
    }

    /// Runs on every connection before it is used: functions, collations, extensions, pragmas.
    pub fn on_connect(
        mut self,
        run: impl Fn(&Connection, ConnectionKind) -> rusqlite::Result<()> + Send + Sync + 'static,
    ) -> Config {
        self.on_connect = Some(Arc::new(run));
        self
    }

    /// Runs schema migrations on the primary's writer connection, each time that this node becomes
    /// the primary: before [`Db::open`](crate::Db::open) returns, or before the node says that it
    /// leads. A migration tool may do them; `open` passes its error
    /// on as [`Error::Migration`]. What `run` committed is on the disk and named by
    /// [`Db::position`](crate::Db::position) when `open` returns. A transaction that it leaves open
    /// is an error. Replicas get the schema from their primary and run nothing; see
    /// [`Db::wait_until`](crate::Db::wait_until).
    ///
    /// ```
    /// # use replite::Config;
    /// let config = Config::new("app.db").migrate(|conn| {
    ///     let version: u32 = conn.pragma_query_value(None, "user_version", |row| row.get(0))?;
    ///     if version < 1 {
    ///         let tx = conn.transaction()?;
    ///         tx.execute_batch("CREATE TABLE notes (text TEXT); PRAGMA user_version = 1")?;
    ///         tx.commit()?;
    ///     }
    ///     // Or the error of `rusqlite_migration`, `refinery`, `anyhow`.
    ///     Ok::<_, replite::Error>(())
    /// });
    /// # let _ = config;
    /// ```
    pub fn migrate<F, E>(mut self, run: F) -> Config
    where
        F: Fn(&mut Connection) -> Result<(), E> + Send + Sync + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.migrate = Some(Arc::new(move |conn| run(conn).map_err(|e| Error::Migration(e.into()))));
        self
    }

    /// Runs each time that this node becomes the primary, after [`Config::migrate`] and before the
    /// node says that it leads: jobs can start here that run on the primary only. On a node that
    /// is the primary from its start, [`Db::open`](crate::Db::open) waits for it.
    ///
    /// [`Db::role`](crate::Db::role) is [`Role::Promoting`](crate::Role::Promoting) meanwhile. The
    /// application's own connections write, and so does the handle that `run` is given, as any
    /// other; but no request that came through the replay layer does, and those that are held for
    /// want of a primary wait. Replicas follow from there on.
    ///
    /// When it fails, panics or takes longer than [`Config::role_timeout`], the node does not
    /// become the primary. It is a replica again, and tells
    /// [`Event::PromotionFailed`](crate::Event::PromotionFailed). What was committed by then stays
    /// in its history. At the node's start `open` fails with
    /// [`Error::OnPromote`](crate::Error::OnPromote).
    ///
    /// The handle is for the call. A task that keeps a clone of it keeps the database open, like
    /// any handle.
    ///
    /// ```
    /// # use replite::{Config, Db, Error};
    /// let config = Config::new("app.db")
    ///     .on_promote(|db: Db| async move {
    ///         db.write(|tx| Ok::<_, Error>(tx.execute("DELETE FROM leases", [])?)).await?;
    ///         Ok::<_, Error>(())
    ///     })
    ///     .on_demote(|_| async { Ok::<_, Error>(()) });
    /// # let _ = config;
    /// ```
    pub fn on_promote<F, R, E>(mut self, run: F) -> Config
    where
        F: Fn(Db) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.on_promote = Some(role_hook(run));
        self
    }

    /// Runs each time that this node stops being the primary and goes on as a replica, also when
    /// what [`Config::on_promote`] began came to nothing. It runs when the node takes no writes any
    /// more, and beside what the node does then: the node does not wait for it, and an error is
    /// only told. The next [`Config::on_promote`] begins after it has ended, or its time
    /// ([`Config::role_timeout`]) is over. It does not run when the database is closed, nor when
    /// replication stops.
    pub fn on_demote<F, R, E>(mut self, run: F) -> Config
    where
        F: Fn(Db) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        self.on_demote = Some(role_hook(run));
        self
    }

    /// How long [`Config::on_promote`] and [`Config::on_demote`] may take, each. A minute if not
    /// set.
    pub fn role_timeout(mut self, limit: Duration) -> Config {
        self.hook_limit = limit;
        self
    }

    /// The most connections that read at one time. 16 if not set.
    pub fn read_connections(mut self, most: usize) -> Config {
        self.read_connections = most;
        self
    }

    /// How long a read waits for a free connection. 5 seconds if not set.
    pub fn read_timeout(mut self, limit: Duration) -> Config {
        self.read_timeout = limit;
        self
    }

    /// How long [`Db::wait_for`](crate::Db::wait_for) waits. 5 seconds if not set.
    pub fn wait_timeout(mut self, limit: Duration) -> Config {
        self.wait_timeout = limit;
        self
    }

    /// How many writes may wait for the writer; further callers wait to be queued. 1024 if not set.
    pub fn write_queue(mut self, most: usize) -> Config {
        self.write_queue = most;
        self
    }

    /// Prepared statements that each connection keeps. 64 if not set.
    pub fn statement_cache(mut self, most: usize) -> Config {
        self.statement_cache = most;
        self
    }

    /// Opens the application's connections with SQLite's own defaults in place of the safe ones. If
    /// not set,
    /// [`SQLITE_DBCONFIG_DEFENSIVE`](https://www.sqlite.org/c3ref/c_dbconfig_defensive.html) is on
    /// and [`trusted_schema`](https://www.sqlite.org/pragma.html#pragma_trusted_schema) off, as
    /// SQLite advises. Neither SQL that somebody slipped in, nor a database file that came from
    /// elsewhere, can do more than change rows then. What an application may miss then:
    ///
    /// - `PRAGMA writable_schema`, `PRAGMA schema_version = N` and `PRAGMA journal_mode = OFF` do
    ///   nothing. SQL can't write to `sqlite_dbpage`, nor directly to the tables in which FTS5 and
    ///   other virtual tables keep what is theirs.
    /// - Functions of the application, and of extensions, fail in views, triggers, CHECK, DEFAULT,
    ///   generated columns and indexes, unless they are registered as innocuous
    ///   (`FunctionFlags::SQLITE_INNOCUOUS`). So do virtual tables in views and triggers. FTS5 and
    ///   R-Tree, which are marked so, work there, but for FTS5's `MATCH` and its functions, such as
    ///   `bm25`.
    ///
    /// Statements of the application's own may use all of them either way. `Config::on_connect` can
    /// set one of the two for one of the connections.
    pub fn trust_schema(mut self, trust: bool) -> Config {
        self.trust_schema = trust;
        self
    }

    /// Opens a database on a network or user-space file system all the same. Only for file systems
    /// whose POSIX locks and shared memory are known to work between all processes that use the
    /// file.
    pub fn allow_network_filesystem(mut self, allow: bool) -> Config {
        self.allow_network_filesystem = allow;
        self
    }

    /// How long a replica stays fit to read, in [`Db::health`](crate::Db::health), after it lost
    /// its primary. A minute if not set.
    pub fn grace(mut self, grace: Duration) -> Config {
        self.grace = grace;
        self
    }

    /// Runs [`Db::verify`](crate::Db::verify) in the background, again and again, the first time
    /// after one period. A pause is up to a tenth longer or shorter, because nodes should not all
    /// read their disks at once. [`Event::VerificationFailed`](crate::Event::VerificationFailed),
    /// [`Status::verification`](crate::Status::verification) and the log tell what it finds. Off if
    /// not set.
    pub fn verify_every(mut self, period: Duration) -> Config {
        self.verify_every = Some(period);
        self
    }

    /// The most bytes that a verification reads in a second. As many as two cores can hash if not
    /// set. The slower it is, the more the WAL grows: the node does not begin it anew while a
    /// verification runs.
    pub fn verify_limit(mut self, bytes_per_second: NonZeroU64) -> Config {
        self.verify_limit = Some(bytes_per_second);
        self
    }

    /// How long a primary asks its replicas, when it opens, for commits that a power cut took from
    /// it; see [`Durability::Unsynced`]. 10 seconds if not set: a replica tries to connect again
    /// within eight. While the primary knows that a replica has more, it waits up to 20 seconds
    /// longer. For a replica that is giving what it has, it waits up to a minute. With zero it asks
    /// no replica. It asks as long for the keys of its database, should they be gone.
    pub fn recovery_timeout(mut self, limit: Duration) -> Config {
        self.recovery_timeout = limit;
        self
    }

    /// Opens all the same a primary's database that [`Db::open`](crate::Db::open) refuses with
    /// [`Error::Damaged`]. What SQLite reads in its files as they are becomes a new branch of
    /// history, if `PRAGMA integrity_check` finds no fault in it. The branch replaces what the
    /// replicas have, which they keep ([`Db::lost`](crate::Db::lost)). A state that can be proved
    /// goes on without the transactions that no file has any more.
    ///
    /// What is opened may mix states and lack commits: better restore it from a replica. Where the
    /// error names two readings, it is the one in which SQLite's is right. Take this out of the
    /// configuration again when it has done its work.
    ///
    /// The page [When something is wrong](crate::guide::trouble) has every text of that error, and
    /// what to do.
    pub fn accept_damaged(mut self, accept: bool) -> Config {
        self.accept_damaged = accept;
        self
    }

    /// Keeps something until the database was closed.
    #[cfg(feature = "testing")]
    pub(crate) fn keep(mut self, keep: Arc<dyn Any + Send + Sync>) -> Config {
        self.keep = Some(keep);
        self
    }

    #[cfg(feature = "testing")]
    pub(crate) fn given_addresses(&self) -> &Addresses {
        &self.addresses
    }

    pub(super) fn writer_setup(&self, path: &Path) -> WriterSetup {
        WriterSetup {
            path: path.to_path_buf(),
            gate: CommitGate::new(self.durability),
            queue: self.write_queue,
            statement_cache: self.statement_cache,
            trust_schema: self.trust_schema,
            on_connect: self.on_connect.clone(),
            migrate: self.migrate.clone(),
        }
    }
}

fn role_hook<F, R, E>(run: F) -> RoleHook
where
    F: Fn(Db) -> R + Send + Sync + 'static,
    R: Future<Output = Result<(), E>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    Arc::new(move |db| {
        let done = run(db);
        Box::pin(async { done.await.map_err(|error| Error::OnPromote(error.into())) })
    })
}
