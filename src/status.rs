//! Plain data that says how a node stands: roles, peers, health, events.

mod election;
mod events;
mod role;
mod time;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::checksum::Checksum;
use crate::page::PageNo;
use crate::peer::{Incarnation, NodeId, PeerKey};
use crate::txid::{Epoch, Position};

pub use election::{Decision, PeerStanding, WaitReason};
pub use events::{Checkpoint, Event, WalReason};
pub use role::{Role, RoleState};
pub(crate) use time::{as_unix_millis, from_unix_millis, unix_millis, whole_millis};

/// Where other nodes and clients reach a node; for [`Config::addresses`](crate::Config::addresses).
///
/// ```
/// use replite::{Addresses, Config};
///
/// let addresses = Addresses::new("http://10.0.0.1:8081")
///     .public("https://one.example.org")
///     .label("region", "ams");
/// assert_eq!(addresses.labels["region"], "ams");
/// let config = Config::new("app.db").addresses(addresses);
/// # drop(config);
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Addresses {
    /// The URL of the replication endpoint: `replite://10.0.0.1:7000` for a listener of its own,
    /// `http://10.0.0.1:8081/_replite` for one that is mounted in the application.
    pub replication: String,
    /// The URL of the application, to which requests are forwarded, such as `http://10.0.0.1:8080`
    /// or `https://one.example:8443`. On the way there they are in the clear with `http://`,
    /// whatever replication speaks. With `https://` (feature `tls`) the certificate there has to
    /// name the host; see [`Config::app_roots`](crate::Config::app_roots).
    pub app: String,
    /// The URL under which clients reach this very node, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<String>,
    /// A small bounded map, such as a machine id or a region. [`Db::open`](crate::Db::open) refuses
    /// control characters, here as in addresses, because other nodes show them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Addresses {
    /// Those of a node whose application other nodes reach at this URL. The node then advertises
    /// its replication endpoint there, too, unless [`Config::listen`](crate::Config::listen) or
    /// [`Addresses::replication`] says otherwise.
    pub fn new(app: impl Into<String>) -> Addresses {
        Addresses { app: app.into(), ..Addresses::default() }
    }

    /// The URL of the replication endpoint.
    #[must_use]
    pub fn replication(mut self, url: impl Into<String>) -> Addresses {
        self.replication = url.into();
        self
    }

    /// The URL under which clients reach this very node.
    #[must_use]
    pub fn public(mut self, url: impl Into<String>) -> Addresses {
        self.public = Some(url.into());
        self
    }

    /// One more label. The last value of a name counts.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Addresses {
        self.labels.insert(name.into(), value.into());
        self
    }

    /// Whether all of it can stand in a line of text as it is.
    pub(crate) fn are_plain(&self) -> bool {
        let labels = self.labels.iter().flat_map(|(key, value)| [key, value]);
        let all = [&self.replication, &self.app].into_iter().chain(&self.public).chain(labels);
        all.flat_map(|text| text.chars()).all(is_plain)
    }
}

/// Whether a character can be shown in a line as it is. A control character can't, nor one that is
/// not seen but turns others around or ends the line.
pub(crate) fn is_plain(c: char) -> bool {
    let unseen = matches!(
        c,
        '\u{61c}'
            | '\u{200b}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
    );
    !c.is_control() && !unseen
}

/// What is known of another node.
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
/// let me = db.node();
/// assert_eq!(me.node, db.node_id());
/// assert!(me.addresses.labels.is_empty());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PeerInfo {
    /// Its stable id.
    pub node: NodeId,
    /// A random id, new at each of its starts.
    pub incarnation: Incarnation,
    /// Where it can be reached.
    pub addresses: Addresses,
}

/// How a node stands, for people and dashboards.
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
/// let status = db.status();
/// assert_eq!(status.problem, None);
/// println!("{} at {:?}, {} replicas", status.role, status.position, status.replicas.len());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// The node's stable id.
    pub node: NodeId,
    /// A random id, new at each start.
    pub incarnation: Incarnation,
    /// The key that the node proves to others to be the same one; none in a build without TLS. See
    /// [`Db::shut_out`](crate::Db::shut_out).
    pub key: Option<PeerKey>,
    /// The database's name in the cluster.
    pub database: String,
    /// What the node does.
    pub role: Role,
    /// The newest epoch that it knows.
    pub epoch: Epoch,
    /// The state that it has, if it has one that is vouched for; see
    /// [`Db::position`](crate::Db::position).
    pub position: Option<Position>,
    /// The primary, if known.
    pub primary: Option<PeerInfo>,
    /// The key of the primary that this replica follows, which that one has proved. None on a
    /// connection without TLS, and while the primary is not known. On the primary its own.
    pub primary_key: Option<PeerKey>,
    /// On a replica: how late it is. `None` on a primary, and on a node that has not followed one.
    pub lag: Option<Lag>,
    /// On a primary: the replicas that are connected.
    pub replicas: Vec<ReplicaStatus>,
    /// The WAL's length in frames, and how many of them are copied back into the database file.
    pub wal_frames: u32,
    /// See `wal_frames`.
    pub backfilled_frames: u32,
    /// The state before the oldest transaction in the retained log. A replica whose state is older
    /// has to compare its pages with the primary's.
    pub log_start: Option<Position>,
    /// The retained log's size in bytes.
    pub log_bytes: u64,
    /// How often the locks of this process's connections on the files were lost and taken again;
    /// see [`Event::LocksLost`].
    pub locks_lost: u64,
    /// How often this node's state was led back to the primary's since it started; see
    /// [`Event::Healed`].
    pub heals: u64,
    /// Transactions that a power cut had taken from this primary, and that replicas gave back when
    /// it was opened; see [`Durability::Unsynced`](crate::Durability::Unsynced).
    pub recovered: u64,
    /// What the last verification found, if there was one since the node started; see
    /// [`Db::verify`](crate::Db::verify).
    pub verification: Option<Verification>,
    /// While the node waits: for what; see [`RoleState::waits_for`].
    pub waits_for: Option<WaitReason>,
    /// Where a lease decides who is the primary: what this node decided last, oldest first.
    pub decisions: Vec<Decision>,
    /// What is wrong, while it lasts, in words for operators: they may have paths, addresses and
    /// what other nodes said. See [`Status::public`].
    pub problem: Option<String>,
    /// The part of `problem` that anybody may know.
    #[serde(skip)]
    pub(crate) public_problems: Vec<&'static str>,
}

impl Status {
    /// What of it may be shown to everybody, such as on a page without a login: no paths,
    /// addresses, ids, or texts of others.
    pub fn public(&self) -> PublicStatus {
        PublicStatus {
            role: self.role,
            position: self.position,
            lag: self.lag,
            replicas: self.replicas.len(),
            problems: self.public_problems.clone(),
        }
    }
}

/// What of a [`Status`] may be shown to everybody; made by [`Status::public`].
///
/// ```
/// use axum::{Json, extract::State};
/// use replite::{Db, PublicStatus};
///
/// async fn page(State(db): State<Db>) -> Json<PublicStatus> {
///     Json(db.status().public())
/// }
/// # let _ = page;
/// ```
#[derive(Clone, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct PublicStatus {
    /// What the node does.
    pub role: Role,
    /// The state that it has.
    pub position: Option<Position>,
    /// On a replica: how late it is.
    pub lag: Option<Lag>,
    /// On a primary: how many replicas are connected.
    pub replicas: usize,
    /// What is wrong with the node, a few words each, always the same ones.
    pub problems: Vec<&'static str>,
}

/// How late a replica is, compared with its primary. What is not known is `None`, and in JSON it is
/// left out: it is never 0. (`None < Some(1)` holds in Rust: look for `Some` first.)
///
/// ```
/// use std::time::Duration;
///
/// use replite::{Db, Role};
///
/// fn is_fresh(db: &Db) -> bool {
///     let status = db.status();
///     let age = status.lag.and_then(|lag| lag.age);
///     // The primary has no lag.
///     status.role == Role::Primary || age.is_some_and(|age| age < Duration::from_secs(5))
/// }
/// # let _ = is_fresh;
/// ```
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[non_exhaustive]
pub struct Lag {
    /// Transactions that the primary has and this node does not, by what the primary said in the
    /// last five seconds. `None` while there is no such word, also when other data comes: then the
    /// primary may have any number of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transactions: Option<u64>,
    /// The age of the state here, at most. So long ago, or later, the primary had nothing that this
    /// node does not have. The primary says where it stands once a second: this goes up to about a
    /// second on a replica that has everything, and grows while no word comes. `None` until this
    /// node had all that a primary had since it follows one. JSON has it in milliseconds, as
    /// `millis`.
    #[serde(
        rename = "millis",
        serialize_with = "time::some_millis",
        skip_serializing_if = "Option::is_none"
    )]
    pub age: Option<Duration>,
    /// Whether the stream stands, and something came on it in the last few seconds. That may be
    /// old: a link that lets little through, or not all, is connected.
    pub connected: bool,
    /// What `age` is, or, where that is not known, for how long this node follows.
    #[serde(skip)]
    pub(crate) stale: Duration,
}

/// What came of hashing all pages of the database at one state; see
/// [`Db::verify`](crate::Db::verify).
///
/// ```
/// use replite::Verification;
///
/// fn tell(found: &Verification) -> String {
///     if found.holds() {
///         return format!("{} pages are right; that took {:?}", found.pages, found.elapsed);
///     }
///     let all = if found.all_named { "all of them" } else { "not all of them" };
///     format!("bad pages: {:?}, {all}", found.bad_pages)
/// }
/// # let _ = tell;
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Verification {
    /// The state that was verified, with the checksum that its pages must have.
    pub position: Position,
    /// The checksum that they have.
    pub found: Checksum,
    /// How many pages there are.
    pub pages: u32,
    /// And how many bytes.
    pub bytes: u64,
    /// Pages that are not what the newest transaction in the retained log that changed them made of
    /// them: at most [`Verification::BAD_PAGES_MAX`], in order. Of a page that no transaction in
    /// the log has changed, nothing is known here.
    pub bad_pages: Vec<PageNo>,
    /// Whether `bad_pages` are the whole difference: with the right images of these pages the
    /// checksum would be the expected one.
    pub all_named: bool,
    /// When it ended. JSON has it in milliseconds since 1970, as `finished_ms`.
    #[serde(rename = "finished_ms", with = "as_unix_millis")]
    pub finished: SystemTime,
    /// How long it took. JSON has it in milliseconds, as `elapsed_ms`.
    #[serde(rename = "elapsed_ms", serialize_with = "time::millis")]
    pub elapsed: Duration,
}

impl Verification {
    /// The most pages that `bad_pages` names.
    pub const BAD_PAGES_MAX: usize = 1024;

    /// The checksum that the pages must have.
    pub fn expected(&self) -> Checksum {
        self.position.checksum()
    }

    /// Whether the pages are those of the position.
    pub fn holds(&self) -> bool {
        self.found == self.expected()
    }

    /// What is wrong, for people: the first few of the bad pages.
    pub(crate) fn problem(&self) -> String {
        const SHOWN: usize = 16;
        let bad = &self.bad_pages;
        let of = format!("the pages are not those of position {}", self.position);
        if bad.is_empty() {
            return format!("{of}: the log does not tell which of them are bad");
        }
        let shown: Vec<String> = bad.iter().take(SHOWN).map(ToString::to_string).collect();
        let more = if bad.len() > SHOWN { format!(" and {} more", bad.len() - SHOWN) } else { String::new() };
        let others = if self.all_named { "" } else { ", and others that the log does not tell of" };
        format!("{of}: bad are {}{more}{others}", shown.join(", "))
    }
}

/// A transaction in the retained log.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::{Db, Error};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let commit = db
///     .write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO notes VALUES ('a')", [])?))
///     .await?;
/// db.wait_for(commit.txid.expect("it wrote something")).await?; // for capture
/// let log = db.transactions(None, 1000).await?;
/// assert_eq!(log.last().map(|last| last.position.txid()), commit.txid);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct LoggedTransaction {
    /// The state that it led to; its [`Txid`](crate::Txid) names the transaction.
    pub position: Position,
    /// When the primary captured it, by its clock. JSON has it in microseconds since 1970.
    #[serde(serialize_with = "time::unix_micros")]
    pub time: SystemTime,
    /// How many pages it changed.
    pub changed_pages: u32,
    /// The database's size in pages after it.
    pub pages: u32,
    /// Its bytes in the log.
    pub log_bytes: u64,
}

/// A replica as its primary sees it.
///
/// ```
/// use replite::Db;
///
/// fn slowest(db: &Db) -> Option<u64> {
///     let replicas = db.status().replicas;
///     replicas.iter().filter_map(|replica| replica.applied).map(|at| at.number()).min()
/// }
/// # let _ = slowest;
/// ```
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ReplicaStatus {
    /// Who it is, as it says.
    pub peer: PeerInfo,
    /// Its key, which it has proved; none on a connection without TLS.
    pub key: Option<PeerKey>,
    /// It is a follower, which never leads; see
    /// [`Config::follower_secret`](crate::Config::follower_secret).
    pub follower: bool,
    /// The last position that it acknowledged as applied.
    pub applied: Option<Position>,
    /// The last position that it acknowledged as fsynced.
    pub synced: Option<Position>,
    /// Since when it is connected. JSON has it in milliseconds since 1970, as `since_ms`.
    #[serde(rename = "since_ms", with = "as_unix_millis")]
    pub since: SystemTime,
}

/// Whether a node can do its work.
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
/// let health = db.health();
/// assert!(health.live && health.can_read, "{:?}", health.reasons);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// The node's threads run: it was not shut down, and replication has not failed. Where it has,
    /// only opening it anew helps.
    pub live: bool,
    /// Reads are answered from a state that is recent enough.
    pub can_read: bool,
    /// Writes can be carried out here or by the primary.
    pub can_write: bool,
    /// Why not, in words for operators, like those of [`Status::problem`]: not for a page that
    /// everybody sees.
    pub reasons: Vec<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::{json, to_value};

    use super::*;
    use crate::txid::Txid;

    /// Dashboards read these names and numbers.
    #[test]
    fn times_are_whole_numbers_in_json() {
        let stale = Duration::from_micros(7400900);
        let lag = Lag { transactions: Some(3), age: Some(stale), connected: true, stale };
        let told = json!({ "transactions": 3, "millis": 7400, "connected": true });
        assert_eq!(to_value(lag).unwrap(), told);
        // A script takes null for 0 where it compares.
        let unknown = Lag { transactions: None, age: None, ..lag };
        assert_eq!(to_value(unknown).unwrap(), json!({ "connected": true }));
        let verification = Verification {
            position: Position::new(Txid::new(Epoch::new(1, 2), 3), Checksum::EMPTY),
            found: Checksum::EMPTY,
            pages: 1,
            bytes: 4096,
            bad_pages: Vec::new(),
            all_named: true,
            finished: from_unix_millis(1_700_000_000_123),
            elapsed: Duration::from_millis(45),
        };
        let told = to_value(verification).unwrap();
        assert_eq!((&told["finished_ms"], &told["elapsed_ms"]), (&json!(1_700_000_000_123_u64), &json!(45)));
        let transaction = LoggedTransaction {
            position: Position::new(Txid::new(Epoch::new(1, 2), 3), Checksum::EMPTY),
            time: from_unix_millis(1_700_000_000_123),
            changed_pages: 1,
            pages: 1,
            log_bytes: 1,
        };
        assert_eq!(to_value(transaction).unwrap()["time"], json!(1_700_000_000_123_000_u64));
    }
}
