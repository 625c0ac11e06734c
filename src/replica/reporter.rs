//! What an operator hears of the stream from the primary.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::context::NodeContext;
use crate::engine::StreamError;
use crate::error::{Error, PeerProblem};
use crate::handshake::STOPPING;
use crate::net::Endpoint;
use crate::peer::PeerKey;
use crate::report::{Condition, Part};
use crate::status::PeerInfo;
use crate::wire::{NOT_PRIMARY, Plan, SHUTTING_DOWN};

/// How long a primary that ended in good order may be away until that is worth a warning. The same
/// for one that has just got the lease, and does not lead yet.
const RESTART_LIMIT: Duration = Duration::from_secs(10);

const PRIMARY_ENDS: &str = "the primary ended in good order; trying again";
const PRIMARY_STOPS: &str = "the primary leads no more";
const PRIMARY_BEGINS: &str = "the primary does not lead yet; trying again";
const THIS_ENDS: &str = "the stream from the primary ended; so does this node";

/// What an error of a stream means: not all of them are the primary's, or the link's.
pub(super) fn what_ended(error: &StreamError) -> &'static str {
    match error {
        StreamError::Failed(Error::Peer { .. }) => "can't follow the primary; trying again",
        StreamError::HealPaused { .. } => "the next heal waits",
        _ => "what comes from the primary can't be taken in here; trying again",
    }
}

/// Says each problem once, however often it is met in a row.
pub(super) struct Reporter {
    node: Arc<NodeContext>,
    primary: Endpoint,
    said: Option<String>,
    /// What was said is no more than expected: it may have to be said as a warning yet.
    expected: bool,
    connected: bool,
    /// Until when a primary that ended in good order may be away.
    back_until: Option<Instant>,
    /// Since when this primary is followed.
    begun: Instant,
}

impl Reporter {
    pub(super) fn new(node: Arc<NodeContext>, primary: Endpoint) -> Reporter {
        let said = node.problem_of(Part::Stream);
        Reporter {
            node,
            primary,
            said,
            expected: false,
            connected: false,
            back_until: None,
            begun: Instant::now(),
        }
    }

    pub(super) fn connected(&mut self, (peer, key): (&PeerInfo, Option<PeerKey>), plan: Plan) {
        self.connected = true;
        self.node.report(Condition::Following { primary: &self.primary, peer, key, plan: &plan });
    }

    /// Something was taken in: what was wrong is over.
    pub(super) fn healthy(&mut self) {
        self.back_until = None;
        if self.said.take().is_some() {
            self.node.report(Condition::StreamWorks);
        }
    }

    /// A stream ended, or did not begin. `drained`: the primary had said that it is about to end.
    pub(super) fn ended(&mut self, error: &StreamError, drained: bool) {
        // This stream has stopped, and not replication.
        let problem = match error {
            StreamError::Failed(error) => error.cause().to_string(),
            reason => reason.to_string(),
        };
        if std::mem::take(&mut self.connected) {
            self.node.report(Condition::StreamLost { problem: &problem });
        }
        let expected = self.is_expected(error, drained);
        let still = self.said.as_ref() == Some(&problem) && (expected || !self.expected);
        let closed = matches!(error, StreamError::Failed(Error::ShutDown));
        self.report(error, &problem, expected, !still && !closed);
        if still {
            tracing::debug!(primary = %self.primary, problem, "still");
            return;
        }
        if closed {
            tracing::debug!(primary = %self.primary, "the follower is shut down");
        }
        (self.said, self.expected) = (Some(problem), expected);
    }

    fn report(&self, error: &StreamError, problem: &str, expected: bool, new: bool) {
        let (node, primary) = (&self.node, &self.primary);
        if !expected {
            node.report(Condition::NotFollowing { primary, problem, what: what_ended(error), new });
            return;
        }
        let what = match error {
            _ if node.drain.is_cancelled() => THIS_ENDS,
            StreamError::Failed(Error::Peer { problem: PeerProblem::NotPrimary, .. }) => PRIMARY_BEGINS,
            StreamError::Failed(Error::Peer { problem: PeerProblem::Goodbye(reason), .. })
                if reason == NOT_PRIMARY =>
            {
                PRIMARY_STOPS
            }
            _ => PRIMARY_ENDS,
        };
        node.report(Condition::PrimaryAway { primary, problem, what, new });
    }

    /// Whether this is what the end of a primary in good order looks like, or its beginning, or the
    /// end of this node.
    fn is_expected(&mut self, error: &StreamError, drained: bool) -> bool {
        let StreamError::Failed(Error::Peer { problem, .. }) = error else { return false };
        let ends = match problem {
            PeerProblem::Goodbye(reason) => reason == SHUTTING_DOWN || reason == NOT_PRIMARY,
            PeerProblem::Refused(word) => word == STOPPING,
            _ => false,
        };
        if drained || ends {
            self.back_until = Some(Instant::now() + RESTART_LIMIT);
        }
        let now = Instant::now();
        let back_soon = self.back_until.is_some_and(|until| now < until);
        match problem {
            PeerProblem::Connection(_) | PeerProblem::Goodbye(_) | PeerProblem::Refused(_) => {
                back_soon || self.node.drain.is_cancelled()
            }
            // The record of a lease names a primary before it leads. A fixed one is none at all.
            PeerProblem::NotPrimary => {
                !self.node.lease.fixed && (back_soon || now < self.begun + RESTART_LIMIT)
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::fake::{SECRET, leased, node};
    use crate::report::noted;
    use crate::status::Role;

    fn failed(problem: PeerProblem) -> StreamError {
        Error::peer("the primary", problem).into()
    }

    fn goodbye(reason: &str) -> StreamError {
        failed(PeerProblem::Goodbye(reason.into()))
    }

    fn refused() -> StreamError {
        failed(PeerProblem::Connection("refused".into()))
    }

    fn reporter() -> Reporter {
        Reporter::new(node(2, &SECRET, Role::Replica), Endpoint::parse("http://primary:1").unwrap())
    }

    /// The levels of the lines that it logs.
    fn levels(reporter: &mut Reporter, error: StreamError, drained: bool) -> Vec<String> {
        let lines = noted(false, || reporter.ended(&error, drained));
        let told = lines.into_iter().filter(|line| line.contains("condition="));
        told.map(|line| line.split(' ').next().unwrap().to_string()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_orderly_restart_is_no_warning_until_it_takes_too_long() {
        let mut told = reporter();
        assert_eq!(levels(&mut told, goodbye(SHUTTING_DOWN), false), ["INFO"]);
        assert_eq!(levels(&mut told, refused(), false), ["INFO"]);
        assert!(told.node.problem_of(Part::Stream).is_some(), "it is no less a problem of its health");
        tokio::time::advance(RESTART_LIMIT / 2).await;
        assert!(levels(&mut told, refused(), false).is_empty(), "said already");
        tokio::time::advance(RESTART_LIMIT / 2).await;
        assert_eq!(levels(&mut told, refused(), false), ["WARN"], "the very same problem");
        assert!(levels(&mut told, refused(), false).is_empty());
        told.healthy();
        assert_eq!(levels(&mut told, refused(), false), ["WARN"], "it said nothing before it went");
        told.healthy();
        assert_eq!(levels(&mut told, refused(), true), ["INFO"], "it drained before");
        assert_eq!(levels(&mut told, failed(PeerProblem::Secret), false), ["WARN"], "no matter when");
    }

    #[tokio::test(start_paused = true)]
    async fn a_primary_that_has_just_got_the_lease_may_take_a_moment() {
        let mut told = reporter();
        assert_eq!(levels(&mut told, failed(PeerProblem::NotPrimary), false), ["WARN"], "a fixed one");
        let with_lease = leased(2, &SECRET, Role::Replica);
        let mut told = Reporter::new(with_lease, Endpoint::parse("http://primary:1").unwrap());
        assert_eq!(levels(&mut told, failed(PeerProblem::NotPrimary), false), ["INFO"]);
        tokio::time::advance(RESTART_LIMIT).await;
        assert_eq!(levels(&mut told, failed(PeerProblem::NotPrimary), false), ["WARN"]);
        assert_eq!(levels(&mut told, goodbye(NOT_PRIMARY), false), ["INFO"]);
        assert_eq!(levels(&mut told, failed(PeerProblem::NotPrimary), false), ["INFO"]);
    }

    #[tokio::test]
    async fn other_last_words_are_warnings_and_what_a_node_that_drains_meets_is_none() {
        let mut told = reporter();
        assert_eq!(levels(&mut told, goodbye("too many replicas"), false), ["WARN"]);
        told.node.drain.cancel();
        assert_eq!(levels(&mut told, refused(), false), ["INFO"]);
        assert_eq!(levels(&mut told, failed(PeerProblem::NotHttp2), false), ["WARN"]);
    }
}
