//! The request-scoped session: what a request's handler did to the database.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::token::{Token, Tokens};
use crate::txid::Txid;

tokio::task_local! {
    static CURRENT: Session;
}

/// What one request did to the database. The replay layer puts it into the request's extensions and around the
/// task that runs the handler; writes and waits report into it by themselves there. Work that the handler spawned onto other
/// tasks reports through a clone: with [`Session::scope`], or by [`Session::observe`].
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    tokens: Arc<Tokens>,
    request: Option<Token>,
    done: Mutex<Done>,
}

#[derive(Clone, Copy, Default)]
struct Done {
    committed: Option<Txid>,
    /// What was waited for, and is seen here.
    seen: Option<Txid>,
    primary_needed: bool,
    /// Whether a write is kept is not known.
    unknown: bool,
}

impl Session {
    pub(crate) fn new(tokens: Arc<Tokens>, request: Option<Token>) -> Session {
        Session(Arc::new(Inner { tokens, request, done: Mutex::default() }))
    }

    /// The session of the request that this task works for, if there is one.
    pub fn current() -> Option<Session> {
        CURRENT.try_with(Session::clone).ok()
    }

    /// Reports a commit; of several, the highest counts.
    pub fn observe(&self, txid: impl Into<Option<Txid>>) {
        if let Some(txid) = txid.into() {
            let mut done = self.lock();
            done.committed = done.committed.max(Some(txid));
        }
    }

    /// Reports that only the primary can do what the request asks for. On a replica the layer then sends the
    /// request to the primary in place of the handler's response, if nothing was committed.
    pub fn need_primary(&self) {
        self.lock().primary_needed = true;
    }

    /// The highest transaction that the request committed.
    pub fn committed(&self) -> Option<Txid> {
        self.lock().committed
    }

    /// The highest transaction that the request committed or waited for: what its client has seen.
    pub(crate) fn seen(&self) -> Option<Txid> {
        let done = self.lock();
        done.committed.max(done.seen)
    }

    /// Whether it was reported that the primary is needed.
    pub fn primary_needed(&self) -> bool {
        self.lock().primary_needed
    }

    /// Whether there was a write of which it is not known whether it is kept.
    pub(crate) fn outcome_unknown(&self) -> bool {
        self.lock().unknown
    }

    /// The token that came with the request, if it was valid.
    pub fn request_token(&self) -> Option<&Token> {
        self.0.request.as_ref()
    }

    /// A token for the highest transaction that the request committed, or waited for. The layer sets it on the response by itself;
    /// this is for clients that want it in the body.
    pub fn token(&self) -> Option<Token> {
        self.seen().map(|txid| self.0.tokens.sign(txid))
    }

    /// Runs a future, such as one that is about to be spawned, as part of this session.
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

    fn lock(&self) -> MutexGuard<'_, Done> {
        self.0.done.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = *self.lock();
        f.debug_struct("Session")
            .field("committed", &done.committed)
            .field("primary_needed", &done.primary_needed)
            .finish_non_exhaustive()
    }
}

/// Reported by `Db::write` and friends, on the caller's task.
pub(crate) fn committed(txid: Txid) {
    // Outside of a request nobody wants to know.
    let _ = CURRENT.try_with(|session| session.observe(txid));
}

/// Reported by `Db::write` and friends, on the caller's task: [`Error::OutcomeUnknown`](crate::Error::OutcomeUnknown).
pub(crate) fn outcome_unknown() {
    let _ = CURRENT.try_with(|session| session.lock().unknown = true);
}

/// Reported by `Db::wait_for`, on the caller's task.
pub(crate) fn waited(txid: Txid) {
    let _ = CURRENT.try_with(|session| {
        let mut done = session.lock();
        done.seen = done.seen.max(Some(txid));
    });
}

/// Reported by whatever found that only the primary could have done it.
pub(crate) fn primary_needed() {
    let _ = CURRENT.try_with(Session::need_primary);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Node;
    use crate::secret::Keyring;
    use crate::status::{Addresses, PeerInfo, Role};
    use crate::txid::Epoch;
    use uuid::Uuid;

    #[tokio::test]
    async fn reports_reach_the_session_of_the_task_and_of_spawned_work_that_was_scoped() {
        let me = PeerInfo { node: Uuid::nil(), incarnation: Uuid::nil(), addresses: Addresses::default() };
        let node = Node::new(me, "c".into(), "d".into(), Keyring::new(&[]).unwrap(), Role::Primary);
        let session = Session::new(Arc::new(Tokens::new(node.clone())), None);
        fn txid(n: u64) -> Txid {
            Txid::new(Epoch::new(1, 1), n)
        }
        committed(txid(9));
        primary_needed();
        session
            .clone()
            .scope(async {
                committed(txid(2));
                let inner = Session::current().unwrap();
                tokio::spawn(inner.scope(async { committed(txid(3)) })).await.unwrap();
                committed(txid(1));
            })
            .await;
        assert_eq!(session.committed(), Some(txid(3)));
        assert!(!session.primary_needed());
        session.observe(None);
        assert_eq!(Token::verify(&node, session.token().unwrap().as_str()), Some(txid(3)));
        session.clone().enter(primary_needed);
        assert!(session.primary_needed());
        assert!(Session::current().is_none());
    }
}
