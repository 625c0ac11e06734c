//! What the layer answers when it could not get a request done, and what is known of the outcome.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Response, StatusCode};

use crate::error::Error;
use crate::proxy::headers::OUTCOME;

/// After how many seconds a client is asked to try again.
pub(crate) const RETRY_AFTER_SECONDS: &str = "1";

/// What is known about a request that failed.
///
/// ```
/// use replite::{Error, Outcome};
///
/// assert_eq!(Outcome::of(&Error::ShutDown), Some(Outcome::NotExecuted));
/// // The closure may have done something before.
/// assert_eq!(Outcome::of(&Error::Reentrant), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// No handler ran with effect: sending the request again is safe.
    NotExecuted,
    /// A handler may have run, wholly or in part.
    Unknown,
}

impl Outcome {
    /// What this error tells of the request that fails because of it. Either the write which it
    /// ends was not begun, or no node knows. None where the error alone does not tell, as when
    /// SQLite refuses a statement, which may come after others.
    ///
    /// It is for responses of the application's own making; those that axum makes of an [`Error`]
    /// have it. The layer takes it back when the request has committed something before.
    pub fn of(error: &Error) -> Option<Outcome> {
        match error {
            Error::NotPrimary { .. } | Error::Busy { .. } | Error::ShutDown => Some(Outcome::NotExecuted),
            Error::OutcomeUnknown { .. } => Some(Outcome::Unknown),
            // What went before in the same handler may have had an effect elsewhere.
            Error::Config(_)
            | Error::Environment { .. }
            | Error::WeakSecret(_)
            | Error::InvalidText(_)
            | Error::Unsupported { .. }
            | Error::FileExists { .. }
            | Error::AlreadyOpen { .. }
            | Error::Reentrant
            | Error::BlockingInAsync
            | Error::HandoffFailed(_)
            | Error::NoState(_)
            | Error::PoolExhausted { .. }
            | Error::Timeout { .. }
            | Error::TooMany { .. }
            | Error::Lost { .. }
            | Error::Panicked(_)
            | Error::Migration(_)
            | Error::OnPromote(_)
            | Error::Sqlite(_)
            | Error::Peer { .. }
            | Error::Corrupt { .. }
            | Error::Newer { .. }
            | Error::Older { .. }
            | Error::Damaged { .. }
            | Error::Mismatch { .. }
            | Error::LostFull { .. }
            | Error::Io { .. }
            | Error::Stopped(_)
            | Error::Disturbed(_)
            | Error::NoRandom(_)
            | Error::ThreadPanicked { .. }
            | Error::Internal(_) => None,
        }
    }

    /// The value of the `replite-outcome` header.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::NotExecuted => "not-executed",
            Outcome::Unknown => "unknown",
        }
    }
}

/// Why the layer answered in place of the app.
///
/// ```
/// use replite::{Failure, Reason};
///
/// fn words(failure: &Failure) -> &'static str {
///     match failure.reason {
///         Reason::NoPrimary | Reason::Unreachable => "We are updating. Try again in a moment.",
///         Reason::BodyTooLarge => "The file is too large to be sent here.",
///         _ => "That did not work.",
///     }
/// }
/// # let _ = words;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Reason {
    /// No primary appeared within the hold timeout.
    NoPrimary,
    /// As many requests as may be are held already, or as many of this client.
    TooManyHeld,
    /// As many requests as may be are on their way to the primary, or as many of this client. No
    /// place became free within the hold timeout.
    TooManyForwarded,
    /// The primary could not be reached, or did not begin the request, within the hold timeout.
    Unreachable,
    /// The handler needed the primary, but the request's body was too large to be kept for it.
    BodyTooLarge,
    /// This node did not reach the transaction of the request's token within the hold timeout, and
    /// there was no primary to ask.
    NotApplied,
    /// The request came back to the node that sent it, or nodes disagree on who the primary is.
    Loop,
    /// The layers of several databases sent the request on as often as may be. It needs the
    /// primaries of all of them, and these are on different nodes.
    Apart,
    /// An upgrade request, which the configuration refuses on a replica.
    Upgrade,
    /// `CONNECT`, which is not forwarded.
    Method,
    /// The request has several `Host` headers, or one that HTTP/2 can't carry, or a target without
    /// a path. Servers could read it in two ways.
    Ambiguous,
    /// The client sent the request's body too slowly, or stopped, before the primary was asked.
    SlowBody,
    /// What the client sent is no whole body; the primary was not asked.
    BrokenBody,
    /// The client sent the request's body too slowly, or stopped. The primary has the beginning.
    SlowClient,
    /// What the client sent is no whole body. The primary has the beginning.
    BadBody,
    /// The primary did not answer in time.
    NoAnswer,
    /// The connection to the primary broke before it answered. Or another node became the primary,
    /// and the one before did not answer within a second.
    Broken,
    /// A node that another node took for the primary is not the primary.
    Misdirected,
}

/// A request that could not be done. The layer makes a response of it;
/// [`PrimaryClient`](crate::PrimaryClient) returns it as its error.
///
/// ```
/// use replite::{Db, Failure, ReplayLayer};
///
/// fn json(failure: &Failure) -> http::Response<bytes::Bytes> {
///     let mut response = http::Response::new(format!("{{\"error\":\"{failure}\"}}").into());
///     *response.status_mut() = failure.status;
///     response
/// }
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer().on_failure(json) // the layer adds `replite-outcome` and `Retry-After`
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}", self.words())]
#[non_exhaustive]
pub struct Failure {
    /// Why.
    pub reason: Reason,
    /// What is known of the outcome.
    pub outcome: Outcome,
    /// The status that the response has.
    pub status: StatusCode,
}

impl Failure {
    pub(super) fn new(reason: Reason) -> Failure {
        let (status, outcome) = match reason {
            Reason::NoPrimary
            | Reason::TooManyHeld
            | Reason::TooManyForwarded
            | Reason::Unreachable
            | Reason::BodyTooLarge
            | Reason::NotApplied
            | Reason::Upgrade => (StatusCode::SERVICE_UNAVAILABLE, Outcome::NotExecuted),
            Reason::Loop | Reason::Apart => (StatusCode::LOOP_DETECTED, Outcome::NotExecuted),
            Reason::Method => (StatusCode::METHOD_NOT_ALLOWED, Outcome::NotExecuted),
            Reason::Misdirected => (StatusCode::MISDIRECTED_REQUEST, Outcome::NotExecuted),
            Reason::SlowBody => (StatusCode::REQUEST_TIMEOUT, Outcome::NotExecuted),
            Reason::BrokenBody => (StatusCode::BAD_REQUEST, Outcome::NotExecuted),
            // The primary's handler saw the beginning of the body and may have acted on it.
            Reason::SlowClient => (StatusCode::REQUEST_TIMEOUT, Outcome::Unknown),
            Reason::BadBody => (StatusCode::BAD_REQUEST, Outcome::Unknown),
            Reason::Ambiguous => (StatusCode::BAD_REQUEST, Outcome::NotExecuted),
            Reason::NoAnswer | Reason::Broken => (StatusCode::GATEWAY_TIMEOUT, Outcome::Unknown),
        };
        Failure { reason, outcome, status }
    }

    fn words(&self) -> &'static str {
        match self.reason {
            Reason::NoPrimary => "there is no primary at the moment",
            Reason::TooManyHeld => "too many requests wait for a primary",
            Reason::TooManyForwarded => "too many requests are on their way to the primary",
            Reason::Unreachable => "the primary can't be reached",
            Reason::BodyTooLarge => "the request needs the primary, but its body was too large to be kept",
            Reason::NotApplied => "this node is behind, and there is no primary to ask",
            Reason::Loop => "the request came back, or the nodes disagree on the primary",
            Reason::Apart => {
                "the request needs the primaries of several databases, which are on different nodes"
            }
            Reason::Upgrade => "upgrades are served by the primary only",
            Reason::Method => "the method can't be served",
            Reason::SlowBody | Reason::SlowClient => "the request's body came too slowly",
            Reason::BrokenBody | Reason::BadBody => "the request's body is not whole",
            Reason::Ambiguous => "the request's target or host is ambiguous",
            Reason::NoAnswer => "the primary did not answer in time",
            Reason::Broken => "the connection to the primary broke",
            Reason::Misdirected => "this node is not the primary",
        }
    }

    /// The response that is sent when the configuration has no other.
    pub fn response(&self) -> Response<Bytes> {
        let mut response = Response::new(Bytes::from(format!("{}\n", self.words())));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        self.complete(response)
    }

    /// Sets what makes the outcome readable for clients, also on a response of the app's own
    /// making.
    pub(super) fn complete(&self, mut response: Response<Bytes>) -> Response<Bytes> {
        let headers = response.headers_mut();
        headers.insert(OUTCOME, HeaderValue::from_static(self.outcome.as_str()));
        if self.status == StatusCode::SERVICE_UNAVAILABLE && !headers.contains_key(RETRY_AFTER) {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
        }
        response
    }
}
