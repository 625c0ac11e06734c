//! The request-scoped session: what a request's handler did to a database.

mod written;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::context::{CountOnce, NodeContext};
use crate::lock::lock;
use crate::peer::NodeId;
use crate::token::{Token, Tokens};
use crate::txid::{Place, Txid};

pub use written::Written;
use written::WrittenBy;

tokio::task_local! {
    /// The innermost layer's session. Those of the layers around it hang on it.
    static CURRENT: Session;
}

/// What one request did to one database. The database's replay layer puts it into the request's
/// extensions and around the task that runs the handler. There, writes and waits report into it by
/// themselves. Work that the handler spawned onto other tasks reports through a clone: with
/// [`Session::scope`], or by [`Session::observe`].
///
/// Below the layers of several databases a request has a session of each. A commit counts in the
/// session of its own database, which [`Db::session`](crate::Db::session) gives. The session in the
/// extensions, and [`Session::current`], is the innermost layer's. As the task's, it stands for all
/// of them.
///
/// ```
/// use replite::{Db, Error, Session};
///
/// /// The answer has the token, for a client that has neither cookies nor a look at headers.
/// async fn add(session: Session, db: Db) -> Result<String, Error> {
///     db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO notes VALUES ('a')", [])?)).await?;
///     Ok(session.token().map_or(String::new(), |token| token.to_string()))
/// }
/// # let _ = add;
/// ```
#[derive(Clone)]
pub struct Session(Arc<SessionState>);

struct SessionState {
    tokens: Arc<Tokens>,
    request: Option<Token>,
    done: Mutex<Done>,
    /// The session of the layer around this one's.
    outer: Option<Session>,
    fate: Arc<Fate>,
    /// What it counts among the requests that a handoff waits for.
    counted: OnceLock<CountOnce>,
}

/// What holds for the request as a whole, whatever its databases.
#[derive(Default)]
struct Fate {
    /// Something was committed, to whatever database, or may have been done elsewhere.
    committed: AtomicBool,
    /// Of a write it is not known whether it is kept.
    unknown: AtomicBool,
    /// It was sent to another node.
    sent: AtomicBool,
}

#[derive(Clone, Copy, Default)]
struct Done {
    committed: Option<Txid>,
    /// What was waited for, and is seen here.
    seen: Option<Txid>,
    primary_needed: bool,
    /// A write was refused because this node was not the primary.
    refused: bool,
    /// The database was written to by a connection that reports nothing here.
    past: bool,
}

impl Session {
    pub(crate) fn new(tokens: Arc<Tokens>, request: Option<Token>, outer: Option<Session>) -> Session {
        let fate = outer.as_ref().map_or_else(Arc::default, |outer| outer.0.fate.clone());
        let (done, counted) = (Mutex::default(), OnceLock::new());
        Session(Arc::new(SessionState { tokens, request, done, outer, fate, counted }))
    }

    /// The request is counted until its handler is done, or hands the lease over itself.
    pub(crate) fn set_counted(&self, counted: CountOnce) {
        let _ = self.0.counted.set(counted);
    }

    /// The session of the request that this task works for, if there is one.
    pub fn current() -> Option<Session> {
        CURRENT.try_with(Session::clone).ok()
    }

    /// The session of the request that this task works for with a database.
    pub(crate) fn current_of(node: &NodeContext) -> Option<Session> {
        Session::current()?.of(node).cloned()
    }

    /// Reports a write, when it is committed; of several, the highest counts. Where the request has
    /// sessions of several databases, the write counts in that of its own.
    ///
    /// - `observe(&commit)` is for what [`Db::write`](crate::Db::write) gave on another task.
    /// - `observe(&db)` is for what another connection wrote. The response's token names all that
    ///   was committed when its head came out of the handler. Most such responses do so without
    ///   this call ([`SessionTokens::Writes`](crate::SessionTokens::Writes)).
    ///
    /// After either, the request runs on no other node.
    pub fn observe(&self, write: impl Into<Written>) {
        match write.into().by {
            WrittenBy::Commit(txid) => self.observe_txid(txid),
            WrittenBy::Others(node) => {
                self.0.fate.committed.store(true, Ordering::Relaxed);
                if let Some(session) = self.of(&node) {
                    session.lock().past = true;
                }
            }
        }
    }

    /// Reports a commit by its number, which its epoch says the database of.
    pub(crate) fn observe_txid(&self, txid: impl Into<Option<Txid>>) {
        if let Some(txid) = txid.into() {
            let knows = |session: &&Session| session.node().applied.place(txid) != Place::Unknown;
            self.all().find(knows).unwrap_or(self).committed_here(txid);
        }
    }

    fn committed_here(&self, txid: Txid) {
        self.0.fate.committed.store(true, Ordering::Relaxed);
        let mut done = self.lock();
        done.committed = done.committed.max(Some(txid));
    }

    /// Reports that only the primary can do what the request asks for. On a replica the layer then
    /// sends the request to the primary in place of the handler's response, if nothing was
    /// committed.
    pub fn need_primary(&self) {
        self.lock().primary_needed = true;
    }

    /// The highest transaction that the request committed.
    pub fn committed(&self) -> Option<Txid> {
        self.lock().committed
    }

    /// Whether the request committed anything, to whatever database. Then it must not run again,
    /// and its outcome is not that of a request that did nothing.
    pub(crate) fn committed_anywhere(&self) -> bool {
        self.0.fate.committed.load(Ordering::Relaxed)
    }

    /// Whether a layer sent the request to another node, where it may have run.
    pub(crate) fn sent(&self) -> bool {
        self.0.fate.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn set_sent(&self) {
        self.0.fate.sent.store(true, Ordering::Relaxed);
    }

    /// The highest transaction that the request committed or waited for: what its client has seen.
    /// Beside a write that can't be vouched for, only the former.
    pub(crate) fn seen(&self) -> Option<Txid> {
        let done = self.lock();
        done.committed.max(done.seen.filter(|_| !self.outcome_unknown()))
    }

    /// Whether it was reported that the primary is needed.
    pub fn primary_needed(&self) -> bool {
        self.lock().primary_needed
    }

    /// Whether it was told of a write by other means than this database's `Db`.
    pub(crate) fn wrote_past(&self) -> bool {
        self.lock().past
    }

    /// Whether it was a refused write that needs the primary.
    pub(crate) fn refused(&self) -> bool {
        self.lock().refused
    }

    fn write_refused(&self) {
        let mut done = self.lock();
        (done.primary_needed, done.refused) = (true, true);
    }

    /// The request's response says that this was the primary that was needed. The write may have
    /// been tried where no session was around, such as on a thread of its own.
    ///
    /// Returns false where no node of its sessions is a replica.
    pub(crate) fn answered_needy(&self, primary: Option<NodeId>) -> bool {
        if self.all().any(Session::primary_needed) {
            return true;
        }
        let replicas = || self.all().filter(|s| !s.node().takes_requests());
        let named = |s: &&Session| {
            let roles = s.node().roles.borrow();
            primary.is_some_and(|primary| roles.primary.as_ref().is_some_and(|p| p.node == primary))
        };
        let needy = replicas().find(named).or_else(|| replicas().next());
        needy.inspect(|session| session.write_refused()).is_some()
    }

    /// Whether there was a write of which it is not known whether it is kept.
    pub(crate) fn outcome_unknown(&self) -> bool {
        self.0.fate.unknown.load(Ordering::Relaxed)
    }

    /// The token that came with the request, if it was valid.
    pub fn request_token(&self) -> Option<&Token> {
        self.0.request.as_ref()
    }

    /// The token that came with the request, if its transaction was lost: it was committed on a
    /// branch that this history has left. The layer waited for what the branch had before that,
    /// took the token for absent, and says so to the client by the header `replite-lost`. An
    /// application can tell its user that the last change is gone. With
    /// [`SessionTokens::Monotonic`](crate::SessionTokens::Monotonic) it may be one that the user
    /// only saw.
    ///
    /// ```
    /// use replite::Session;
    ///
    /// async fn page(session: Session) -> &'static str {
    ///     match session.lost_token() {
    ///         Some(_) => "Your last change was lost. Please make it again.",
    ///         None => "Welcome back.",
    ///     }
    /// }
    /// # let _ = page;
    /// ```
    pub fn lost_token(&self) -> Option<&Token> {
        self.request_token().filter(|token| self.node().applied.place(token.txid()) == Place::Lost)
    }

    /// A token for the highest transaction that the request committed, or waited for. The layer
    /// sets it on the response by itself; this is for clients that want it in the body. It knows
    /// nothing of what other connections wrote: [`Db::captured`](crate::Db::captured) does. None
    /// on a follower ([`Config::follower_secret`](crate::Config::follower_secret)).
    pub fn token(&self) -> Option<Token> {
        self.seen().and_then(|txid| self.0.tokens.sign(txid))
    }

    /// Runs a future, such as one that is about to be spawned, as part of this session, and of
    /// those of the request's other databases.
    ///
    /// # Cancel safety
    /// As safe as the future itself.
    pub async fn scope<F: Future>(self, future: F) -> F::Output {
        CURRENT.scope(self, future).await
    }

    /// The named form of [`Session::scope`].
    pub(crate) fn around<F: Future>(self, future: F) -> tokio::task::futures::TaskLocalFuture<Session, F> {
        CURRENT.scope(self, future)
    }

    /// Runs a function as part of this session.
    pub(crate) fn enter<R>(self, run: impl FnOnce() -> R) -> R {
        CURRENT.sync_scope(self, run)
    }

    /// This session and those around it.
    fn all(&self) -> impl Iterator<Item = &Session> {
        std::iter::successors(Some(self), |session| session.0.outer.as_ref())
    }

    fn of(&self, node: &NodeContext) -> Option<&Session> {
        self.all().find(|session| std::ptr::eq(session.node(), node))
    }

    fn node(&self) -> &NodeContext {
        self.0.tokens.node()
    }

    fn lock(&self) -> MutexGuard<'_, Done> {
        lock(&self.0.done)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = *self.lock();
        f.debug_struct("Session")
            .field("database", &self.node().database)
            .field("committed", &done.committed)
            .field("primary_needed", &done.primary_needed)
            .finish_non_exhaustive()
    }
}

/// The request that this task works for asks for a handoff, which waits for all others.
pub(crate) fn hands_over(node: &NodeContext) {
    if let Some(counted) = Session::current_of(node).and_then(|session| session.0.counted.get().cloned()) {
        counted.end();
    }
}

/// Reported by `Db::write` and friends, on the caller's task.
pub(crate) fn committed(node: &NodeContext, txid: Txid) {
    // Outside of a request there is no session to tell.
    let _ = CURRENT.try_with(|session| match session.of(node) {
        Some(session) => session.committed_here(txid),
        // No layer of this database is around; the request must not run twice all the same.
        None => session.0.fate.committed.store(true, Ordering::Relaxed),
    });
}

/// Reported by `Db::write` and friends, on the caller's task:
/// [`Error::OutcomeUnknown`](crate::Error::OutcomeUnknown).
pub(crate) fn outcome_unknown() {
    let _ = CURRENT.try_with(|session| session.0.fate.unknown.store(true, Ordering::Relaxed));
}

/// Reported by whatever has, or may have, done something elsewhere that must not be done again.
pub(crate) fn had_effects() {
    let _ = CURRENT.try_with(|session| session.0.fate.committed.store(true, Ordering::Relaxed));
}

/// Reported by `Db::wait_for`, on the caller's task.
pub(crate) fn waited(node: &NodeContext, txid: Txid) {
    let _ = CURRENT.try_with(|session| {
        let Some(session) = session.of(node) else { return };
        let mut done = session.lock();
        done.seen = done.seen.max(Some(txid));
    });
}

/// Reported by `Db::write` on a replica.
pub(crate) fn primary_needed(node: &NodeContext) {
    let _ = CURRENT.try_with(|session| {
        if let Some(session) = session.of(node) {
            session.write_refused();
        }
    });
}

/// Reported by code that has only the error, on the caller's task: see
/// [`Session::answered_needy`].
#[cfg(feature = "axum")]
pub(crate) fn this_primary_needed(primary: Option<NodeId>) {
    let _ = CURRENT.try_with(|session| session.answered_needy(primary));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::context::LeaseContext;
    use crate::keys::DatabaseKeys;
    use crate::peer::{Incarnation, NodeId};
    use crate::secret::Keyring;
    use crate::status::{Addresses, PeerInfo, Role};
    use crate::txid::{Epoch, EpochHistory, EpochStart};

    fn node(database: &str, role: Role) -> Arc<NodeContext> {
        let me = PeerInfo {
            node: NodeId::random(),
            incarnation: Incarnation::NIL,
            addresses: Addresses::default(),
        };
        NodeContext::new(
            me,
            "c".into(),
            database.into(),
            (Keyring::new(&[]).unwrap(), crate::channel::Channel::open()),
            role,
            LeaseContext::fixed(),
            DatabaseKeys::fixed(7),
        )
    }

    fn txid(epoch: u64, n: u64) -> Txid {
        Txid::new(Epoch::new(1, epoch), n)
    }

    #[tokio::test]
    async fn reports_reach_the_session_of_the_task_and_of_spawned_work_that_was_scoped() {
        let node = node("d", Role::Primary);
        let session = Session::new(Arc::new(Tokens::new(node.clone())), None, None);
        committed(&node, txid(1, 9));
        primary_needed(&node);
        session
            .clone()
            .scope(async {
                committed(&node, txid(1, 2));
                let (inner, node) = (Session::current().unwrap(), node.clone());
                tokio::spawn(inner.scope(async move { committed(&node, txid(1, 3)) })).await.unwrap();
            })
            .await;
        session.clone().enter(|| committed(&node, txid(1, 1)));
        assert_eq!(session.committed(), Some(txid(1, 3)));
        assert!(!session.primary_needed());
        session.observe(Written::commit(None));
        assert_eq!(Token::verify(&node, session.token().unwrap().as_str()), Some(txid(1, 3)));
        session.clone().enter(|| primary_needed(&node));
        assert!(session.primary_needed());
        assert!(Session::current().is_none());
    }

    #[test]
    fn each_database_has_a_session_of_its_own() {
        let (a, b, none) = (node("a", Role::Primary), node("b", Role::Replica), node("none", Role::Primary));
        for (node, epoch) in [(&a, 1), (&b, 2)] {
            let mut history = EpochHistory::default();
            history.push(EpochStart { epoch: Epoch::new(1, epoch), first: 1, before: Checksum::EMPTY });
            node.applied.replace(history, None);
        }
        let sessions = || {
            let outer = Session::new(Arc::new(Tokens::new(a.clone())), None, None);
            (outer.clone(), Session::new(Arc::new(Tokens::new(b.clone())), None, Some(outer)))
        };
        let (outer, inner) = sessions();
        inner.clone().enter(|| {
            waited(&a, txid(1, 3));
            assert!(!outer.committed_anywhere());
            committed(&a, txid(1, 5));
            committed(&b, txid(2, 7));
            assert_eq!(Session::current_of(&a).unwrap().committed(), Some(txid(1, 5)));
            assert!(Session::current_of(&none).is_none());
        });
        assert_eq!((outer.committed(), inner.committed()), (Some(txid(1, 5)), Some(txid(2, 7))));
        // By the epoch, also through the wrong one; and what is not known goes where it was put.
        inner.observe(Written::commit(Some(txid(1, 9))));
        outer.observe_txid(txid(1, 8));
        inner.observe_txid(txid(3, 1));
        assert_eq!((outer.committed(), inner.committed()), (Some(txid(1, 9)), Some(txid(3, 1))));
        // A database without a layer.
        let (outer, inner) = sessions();
        inner.clone().enter(|| committed(&none, txid(4, 1)));
        assert_eq!((outer.committed(), inner.committed()), (None, None));
        assert!(outer.committed_anywhere() && inner.committed_anywhere());

        let (outer, inner) = sessions();
        inner.clone().enter(|| primary_needed(&b));
        assert_eq!((outer.primary_needed(), inner.primary_needed()), (false, true));
        // By the error alone: where this is not the primary, and if there are several, whose
        // primary it names.
        let other = node("x", Role::Replica);
        let of =
            |node: &Arc<NodeContext>, outer| Session::new(Arc::new(Tokens::new(node.clone())), None, outer);
        a.roles.send_modify(|state| state.role = Role::Replica);
        for (node, named) in [(&a, &other), (&b, &none)] {
            node.roles.send_modify(|state| state.primary = Some(named.me.clone()));
        }
        for (named, expected) in
            [(Some(other.me.node), (true, false)), (Some(none.me.node), (false, true)), (None, (false, true))]
        {
            let (outer, inner) = sessions();
            inner.clone().enter(|| this_primary_needed(named));
            assert_eq!((outer.primary_needed(), inner.primary_needed()), expected);
        }
        a.roles.send_modify(|state| state.role = Role::Primary);
        let outer = of(&b, None);
        let inner = of(&a, Some(outer.clone()));
        inner.clone().enter(|| this_primary_needed(None));
        assert_eq!((outer.primary_needed(), inner.primary_needed()), (true, false));
    }
}
