//! What every part of a running node shares: identity, keys, role, position, events, shutdown.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::applied::Applied;
use crate::error::Error;
use crate::secret::Keyring;
use crate::status::{Event, Lag, PeerInfo, Role, RoleState};
use crate::threads::aside;
use crate::txid::Epoch;

/// Events that a slow receiver may be behind before it misses some.
const EVENTS_BEHIND_MAX: usize = 256;
/// What the problem begins with while replication has failed.
const STOPPED: &str = "replication stopped: ";

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
    Log,
    Checkpoint,
}

/// A running node, as its parts see it.
#[derive(Debug)]
pub(crate) struct Node {
    /// The stable id and the addresses of this node.
    pub(crate) me: PeerInfo,
    pub(crate) cluster: String,
    /// The database's name in the cluster.
    pub(crate) database: String,
    pub(crate) keys: Keyring,
    pub(crate) applied: Arc<Applied>,
    /// The role; doors look here to decide whether to forward.
    pub(crate) roles: watch::Sender<RoleState>,
    /// On a replica, how far behind.
    pub(crate) lag: Mutex<Option<Lag>>,
    /// Problems that last, each under the part of the node that has it, so that none hides another.
    problems: Mutex<BTreeMap<Part, String>>,
    pub(crate) events: broadcast::Sender<Event>,
    /// Cancelled when the node stops: every task ends.
    pub(crate) stop: CancellationToken,
    /// Cancelled before that, when the application's server is to end: long streams end and nothing new is begun, but what
    /// runs already runs on.
    pub(crate) drain: CancellationToken,
}

impl Node {
    pub(crate) fn new(
        me: PeerInfo,
        cluster: String,
        database: String,
        keys: Keyring,
        role: Role,
    ) -> Arc<Node> {
        let state = RoleState { role, epoch: Epoch::new(0, 0), primary: None };
        let stop = CancellationToken::new();
        Arc::new(Node {
            me,
            cluster,
            database,
            keys,
            applied: Applied::new(),
            roles: watch::Sender::new(state),
            lag: Mutex::new(None),
            problems: Mutex::default(),
            events: broadcast::Sender::new(EVENTS_BEHIND_MAX),
            drain: stop.child_token(),
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
        let why = error.cause();
        self.set_problem(Part::Engine, Some(format!("{STOPPED}{why}")));
        let failed = |state: &mut RoleState| (state.role, state.primary) = (Role::Stopped, None);
        self.roles.send_modify(failed);
        self.applied.close();
        let state = self.roles.borrow().clone();
        aside(|| tracing::error!(database = self.database, error = why, "replication stopped"));
        aside(|| self.tell(Event::Stopped(why.clone())));
        aside(|| self.tell(Event::Role(state)));
    }

    /// Returns when replication has failed, or the node is closed.
    pub(crate) async fn stopped(&self) {
        // The sender is ours.
        let _ = self.roles.subscribe().wait_for(|state| state.role == Role::Stopped).await;
    }

    /// Changes what is known of role and primary; silent when nothing changed.
    pub(crate) fn set_role(&self, state: RoleState) {
        let changed = self.roles.send_if_modified(|now| {
            // What has stopped stays so.
            let changed = *now != state && now.role != Role::Stopped;
            if changed {
                now.clone_from(&state);
            }
            changed
        });
        if changed {
            self.tell(Event::Role(state));
        }
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
        let mut problems = self.problems.lock().unwrap_or_else(|e| e.into_inner());
        match problem {
            Some(problem) => problems.insert(part, problem),
            None => problems.remove(&part),
        };
    }

    /// All problems that last.
    pub(crate) fn problem(&self) -> Option<String> {
        let problems = self.problems.lock().unwrap_or_else(|e| e.into_inner());
        let all: Vec<&str> = problems.values().map(String::as_str).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Why replication has failed, if it has.
    pub(crate) fn failure(&self) -> Option<String> {
        self.problem_of(Part::Engine)?.strip_prefix(STOPPED).map(str::to_string)
    }

    /// What is wrong with one part.
    pub(crate) fn problem_of(&self, part: Part) -> Option<String> {
        self.problems.lock().unwrap_or_else(|e| e.into_inner()).get(&part).cloned()
    }

    pub(crate) fn set_lag(&self, lag: Option<Lag>) {
        *self.lag.lock().unwrap_or_else(|e| e.into_inner()) = lag;
    }
}
