//! What every part of a running node shares: identity, keys, role, position, events, shutdown.

mod role;
mod seldom;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::applied::Applied;
use crate::error::{Cause, Error};
use crate::lock::lock;
use crate::peer::NodeId;
use crate::secret::Keyring;
use crate::status::{Event, Lag, PeerInfo, Role};
use crate::threads::aside;

pub(crate) use role::{RoleChange, RoleValue};
pub(crate) use seldom::Seldom;

/// Events that a slow receiver may be behind before it misses some.
const EVENTS_BEHIND_MAX: usize = 256;
/// What the problem begins with while replication has failed.
const STOPPED: &str = "replication stopped: ";
/// How long no read may have failed before one that works says that they work again.
const READS_QUIET: Duration = Duration::from_secs(1);

/// A part of a node that can have a problem.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Part {
    /// Replication of the database as a whole: it has stopped.
    Engine,
    /// All of the database is being hashed, to find its position.
    Hashing,
    /// The state that a replica has.
    State,
    /// The pages of the database, as the last verification found them.
    Pages,
    /// The stream from the primary.
    Stream,
    /// How far a replica is behind, and at what pace it comes nearer.
    Behind,
    /// Peers that have another secret.
    Strangers,
    Log,
    Checkpoint,
    /// The WAL is much longer than its limit.
    Wal,
    /// Reads of the application.
    Reads,
    /// The disk.
    Room,
}

impl Part {
    /// What is wrong with it, where nobody is to learn more.
    fn in_public(self) -> &'static str {
        match self {
            Part::Engine => "replication stopped",
            Part::Hashing => "the database is being checked",
            Part::State => "the database is being led to the primary's state",
            Part::Pages => "a verification found bad pages",
            Part::Stream => "the primary can't be followed",
            Part::Behind => "this instance is behind the primary",
            Part::Strangers => "a peer was refused",
            Part::Log => "the log can't be written",
            Part::Checkpoint => "the write-ahead log can't be copied back",
            Part::Wal => "the write-ahead log grows",
            Part::Reads => "the database can't be read",
            Part::Room => "the disk is full",
        }
    }
}

struct CloseIdle(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for CloseIdle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloseIdle").finish_non_exhaustive()
    }
}

/// A running node, as its parts see it.
#[derive(Debug)]
pub(crate) struct NodeContext {
    /// The stable id and the addresses of this node.
    pub(crate) me: PeerInfo,
    pub(crate) cluster: String,
    /// The database's name in the cluster.
    pub(crate) database: String,
    pub(crate) keys: Keyring,
    pub(crate) applied: Arc<Applied>,
    /// The role; doors look here to decide whether to forward.
    pub(crate) roles: RoleValue,
    /// On a replica, how far behind.
    pub(crate) lag: Mutex<Option<Lag>>,
    /// Problems that last, each under the part of the node that has it, so that none hides another.
    problems: Mutex<BTreeMap<Part, String>>,
    /// Why replication has stopped for good.
    failure: Mutex<Option<Cause>>,
    /// The database's files are not those that were opened: nothing is read from them.
    astray: AtomicBool,
    /// Counts how often the files were opened.
    files: Arc<AtomicU64>,
    /// Closes what is idle of connections to files that are not there any more.
    close_idle: OnceLock<CloseIdle>,
    /// When a read failed, in milliseconds since `begun`, and one; zero: none has, or one has worked since.
    read_failed: AtomicU64,
    begun: Instant,
    /// Knocks with another secret.
    strangers: Seldom,
    pub(crate) events: broadcast::Sender<Event>,
    /// Cancelled when the node stops: every task ends.
    pub(crate) stop: CancellationToken,
    /// Cancelled before that, when the application's server is to end: long streams end and nothing new is begun, but what
    /// runs already runs on.
    pub(crate) drain: CancellationToken,
    /// Requests that are on their way to another node's application, and have no answer yet.
    forwards: watch::Sender<usize>,
}

/// A request on its way; counted until this is dropped.
pub(crate) struct Forward<'a>(&'a watch::Sender<usize>);

impl Drop for Forward<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|number| *number -= 1);
    }
}

impl NodeContext {
    pub(crate) fn new(
        me: PeerInfo,
        cluster: String,
        database: String,
        keys: Keyring,
        role: Role,
    ) -> Arc<NodeContext> {
        let stop = CancellationToken::new();
        Arc::new(NodeContext {
            me,
            cluster,
            database,
            keys,
            applied: Applied::new(),
            roles: RoleValue::new(role),
            lag: Mutex::new(None),
            problems: Mutex::default(),
            failure: Mutex::default(),
            astray: AtomicBool::new(false),
            files: Arc::default(),
            close_idle: OnceLock::new(),
            read_failed: AtomicU64::new(0),
            begun: Instant::now(),
            strangers: Seldom::default(),
            events: broadcast::Sender::new(EVENTS_BEHIND_MAX),
            drain: stop.child_token(),
            forwards: watch::Sender::new(0),
            stop,
        })
    }

    /// Says an event to whoever listens.
    pub(crate) fn tell(&self, event: Event) {
        // Before the application's recorder is called, which may panic.
        let _ = self.events.send(event.clone());
        #[cfg(feature = "metrics")]
        crate::metrics::count(&self.database, &event);
    }

    /// Replication of the database has stopped for good: first that is so, and only then is the application told, whose code may be what failed.
    pub(crate) fn fail(&self, error: &Error) {
        let cause = error.cause();
        *lock(&self.failure) = Some(cause.clone());
        let why = cause.to_string();
        self.set_problem(Part::Engine, Some(format!("{STOPPED}{why}")));
        let changed = self.roles.change(RoleChange::Stopped);
        self.applied.close();
        aside(|| tracing::error!(database = self.database, error = why, "replication stopped"));
        aside(|| self.tell(Event::Stopped(why.clone())));
        if let Some(state) = changed {
            aside(|| self.tell(Event::Role(state)));
        }
    }

    /// Returns when replication has failed, or the node is closed.
    pub(crate) async fn stopped(&self) {
        // The sender is ours.
        let _ = self.roles.subscribe().wait_for(|state| state.role == Role::Stopped).await;
    }

    /// Changes the role, or what is known of the primary; silent when nothing changed.
    pub(crate) fn change_role(&self, change: RoleChange) {
        if let Some(state) = self.roles.change(change) {
            self.tell(Event::Role(state));
        }
    }

    /// Counts a request from now on, before anybody looks up where to send it: so no request that is not counted goes to a primary
    /// that is not the primary any more.
    pub(crate) fn forward(&self) -> Forward<'_> {
        self.forwards.send_modify(|number| *number += 1);
        Forward(&self.forwards)
    }

    /// Returns when all requests that were on their way are answered.
    pub(crate) async fn forwards_answered(&self) {
        // The sender is ours.
        let _ = self.forwards.subscribe().wait_for(|number| *number == 0).await;
    }

    /// The first eight hex digits that tell this database's tokens and cookies from those of others.
    pub(crate) fn database_tag(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("replite 2026 v1 database tag");
        for part in [&self.cluster, &self.database] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex()[..8].to_string()
    }

    /// Says what is wrong with a part of the node, or that nothing is any more.
    pub(crate) fn set_problem(&self, part: Part, problem: Option<String>) {
        let mut problems = lock(&self.problems);
        match problem {
            Some(problem) => problems.insert(part, problem),
            None => problems.remove(&part),
        };
    }

    /// Whether a part has a problem.
    pub(crate) fn has_problem(&self, part: Part) -> bool {
        lock(&self.problems).contains_key(&part)
    }

    /// Says whether the database's files are others than those that were opened.
    pub(crate) fn set_astray(&self, astray: bool) {
        self.astray.store(astray, Ordering::Relaxed);
    }

    /// The files are opened anew: connections to what was there before are of no use.
    pub(crate) fn renew_files(&self) {
        self.files.fetch_add(1, Ordering::Release);
        if let Some(CloseIdle(close)) = self.close_idle.get() {
            close();
        }
    }

    /// What closes them.
    pub(crate) fn when_renewed(&self, close: impl Fn() + Send + Sync + 'static) {
        let _ = self.close_idle.set(CloseIdle(Box::new(close)));
    }

    /// How often they were.
    pub(crate) fn files(&self) -> Arc<AtomicU64> {
        self.files.clone()
    }

    pub(crate) fn astray(&self) -> bool {
        self.astray.load(Ordering::Relaxed)
    }

    /// Something of ours found no room on the disk.
    pub(crate) fn no_room(&self, what: impl std::fmt::Display) {
        if !self.has_problem(Part::Room) {
            tracing::error!(database = self.database, %what, "the disk is full");
        }
        self.set_problem(
            Part::Room,
            Some(format!("the disk is full; reads go on, and writes when there is room: {what}")),
        );
    }

    /// A read failed, and not for its own sake.
    pub(crate) fn read_failed(&self, why: &str) {
        let now = self.begun.elapsed().as_millis() as u64 + 1;
        if self.read_failed.swap(now, Ordering::Relaxed) == 0 {
            tracing::error!(database = self.database, why, "the database can't be read");
            self.set_problem(Part::Reads, Some(format!("the database can't be read: {why}")));
        }
    }

    /// A read worked. Where some do and some don't, it is too early to say that all is well.
    pub(crate) fn read_worked(&self) {
        if self.reads_may_work() {
            self.read_failed.store(0, Ordering::Relaxed);
            self.set_problem(Part::Reads, None);
        }
    }

    /// Whether reads failed, and none has for a while.
    pub(crate) fn reads_may_work(&self) -> bool {
        let failed = self.read_failed.load(Ordering::Relaxed);
        failed != 0 && self.begun.elapsed() >= Duration::from_millis(failed) + READS_QUIET
    }

    /// Somebody knocked with another secret, who says to be this node. As often as strangers like, so it is told now and then.
    pub(crate) fn other_secret(&self, node: NodeId) {
        let Some(times) = self.strangers.happened() else { return };
        let problem = format!(
            "somebody who says to be node {node} knocks with another secret and is let in nowhere: if it is one of yours, give it the cluster's secret"
        );
        self.set_problem(Part::Strangers, Some(problem));
        tracing::warn!(database = self.database, %node, times, "refused: a peer has another secret than this node");
        self.tell(Event::OtherSecret { node, times });
    }

    /// All problems that last.
    pub(crate) fn problem(&self) -> Option<String> {
        let all = self.all_problems(|_, text| text.to_string());
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The same without anything that only operators should know.
    pub(crate) fn public_problems(&self) -> Vec<&'static str> {
        self.all_problems(|part, _| part.in_public())
    }

    fn all_problems<T>(&self, say: impl Fn(Part, &str) -> T) -> Vec<T> {
        let mut problems = lock(&self.problems);
        if !self.strangers.lasts() {
            problems.remove(&Part::Strangers);
        }
        problems.iter().map(|(part, text)| say(*part, text)).collect()
    }

    /// Why replication has failed, if it has.
    pub(crate) fn failure(&self) -> Option<Cause> {
        lock(&self.failure).clone()
    }

    /// What is wrong with one part.
    pub(crate) fn problem_of(&self, part: Part) -> Option<String> {
        lock(&self.problems).get(&part).cloned()
    }

    pub(crate) fn set_lag(&self, lag: Option<Lag>) {
        *lock(&self.lag) = lag;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::fake::{SECRET, node};

    #[test]
    fn what_is_public_of_problems_says_what_is_and_nothing_more() {
        let node = node(1, &SECRET, Role::Replica);
        assert_eq!((node.problem(), node.public_problems()), (None, vec![]));
        node.set_problem(Part::Log, Some("write /home/me/app.db-replite/log/1.log: no space".into()));
        node.set_problem(Part::Stream, Some("peer http://10.0.0.7:7000/_replite: it is away".into()));
        assert!(node.problem().unwrap().contains("/home/me"));
        let public = node.public_problems();
        assert_eq!(public, ["the primary can't be followed", "the log can't be written"]);
    }
}
