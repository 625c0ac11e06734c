//! For axum: responses made of [`Error`], extractors for the request's session and token, and the
//! probes as a router.

use std::convert::Infallible;

use axum::Router;
use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use rusqlite::ErrorCode;

use crate::error::Error;
use crate::probes::Probes;
use crate::proxy::headers::OUTCOME;
use crate::proxy::{NeedsPrimary, Outcome, RETRY_AFTER_SECONDS};
use crate::session::{self, Session};
use crate::token::Token;

/// A response that says whether to try again and tells nothing of the inside. That of
/// [`Error::NotPrimary`] is marked ([`NeedsPrimary`]), whatever thread the error comes from. The
/// replay layer then sends the request to the primary instead.
///
/// ```
/// use axum::extract::State;
/// use replite::{Db, Error};
///
/// async fn add(State(db): State<Db>, text: String) -> Result<(), Error> {
///     let insert = "INSERT INTO notes VALUES (?1)";
///     db.write(move |tx| Ok::<_, Error>(tx.execute(insert, [text])?)).await?;
///     Ok(())
/// }
/// # let _ = axum::routing::post::<_, _, Db>(add);
/// ```
impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (status, words) = sort(&self);
        if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::error!(error = &self as &dyn std::error::Error, "a request failed");
        } else {
            tracing::debug!(error = &self as &dyn std::error::Error, "a request can't be served now");
        }
        let mut response = (status, words).into_response();
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
        }
        // The layer takes this back when the handler committed something before.
        if let Some(outcome) = Outcome::of(&self) {
            headers.insert(OUTCOME, HeaderValue::from_static(outcome.as_str()));
        }
        if let Some(mark) = NeedsPrimary::of(&self) {
            // The mark does not come through a middleware that makes a response of its own.
            session::this_primary_needed(mark.primary());
            response.extensions_mut().insert(mark);
        }
        response
    }
}

/// The probes' routes, for `Router::merge`: `/livez` and the others, at the root of the router.
impl<S: Clone + Send + Sync + 'static> From<Probes> for Router<S> {
    fn from(probes: Probes) -> Router<S> {
        let add = |router: Router<S>, path: &str| router.route_service(path, probes.clone());
        probes.paths().into_iter().fold(Router::new(), add)
    }
}

fn sort(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::NotPrimary { .. } => (StatusCode::SERVICE_UNAVAILABLE, "this node is not the primary\n"),
        Error::NoState(_) => (StatusCode::SERVICE_UNAVAILABLE, "this node has no state yet\n"),
        Error::PoolExhausted { .. } | Error::TooMany { .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n")
        }
        Error::Busy { .. } => (StatusCode::SERVICE_UNAVAILABLE, "another program writes to the database\n"),
        Error::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => {
            (StatusCode::SERVICE_UNAVAILABLE, "the database is in use\n")
        }
        Error::Sqlite(_) if error.no_room() => {
            (StatusCode::SERVICE_UNAVAILABLE, "there is no room at the moment\n")
        }
        Error::ShutDown => (StatusCode::SERVICE_UNAVAILABLE, "this node is shutting down\n"),
        Error::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "not done in time\n"),
        Error::OutcomeUnknown { .. } => {
            (StatusCode::INTERNAL_SERVER_ERROR, "it is not known whether this was done\n")
        }
        Error::HandoffFailed(_) => (StatusCode::SERVICE_UNAVAILABLE, "the lease was not handed over\n"),
        Error::Lost { .. } => (StatusCode::CONFLICT, "the transaction was lost with its branch\n"),
        // Another try does not help: the caller, or an operator, has to act.
        Error::Config(_)
        | Error::Environment { .. }
        | Error::WeakSecret(_)
        | Error::InvalidText(_)
        | Error::Unsupported { .. }
        | Error::FileExists { .. }
        | Error::AlreadyOpen { .. }
        | Error::Reentrant
        | Error::BlockingInAsync
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
        | Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n"),
    }
}

/// The request's session; 500 where the replay layer is not around the handler. Below the layers of
/// several databases it is the innermost one's: the others by [`Db::session`](crate::Db::session).
///
/// ```
/// use replite::Session;
///
/// async fn handler(session: Session) -> String {
///     format!("{:?}", session.committed())
/// }
/// # let _ = axum::routing::get::<_, _, ()>(handler);
/// ```
impl<S: Sync> FromRequestParts<S> for Session {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Session, Self::Rejection> {
        let missing = (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n");
        parts.extensions.get::<Session>().cloned().ok_or_else(|| {
            tracing::error!("a handler asks for the session, but the replay layer is not around it");
            missing
        })
    }
}

/// The token that came with the request, as `Option<Token>`; none when it was absent or not valid.
///
/// ```
/// use replite::Token;
///
/// async fn handler(token: Option<Token>) -> String {
///     token.map_or("no token".into(), |token| token.txid().to_string())
/// }
/// # let _ = axum::routing::get::<_, _, ()>(handler);
/// ```
impl<S: Sync> OptionalFromRequestParts<S> for Token {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Token>, Infallible> {
        Ok(parts.extensions.get::<Session>().and_then(|session| session.request_token().cloned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use rusqlite::ffi;

    use crate::checksum::Checksum;
    use crate::error::{Blame, Cause, PeerProblem, Unsupported};
    use crate::txid::{Epoch, Txid};

    const NOT_BEGUN: Option<&str> = Some("not-executed");
    const SECOND: Duration = Duration::from_secs(1);

    /// An error, who must act, the status of its answer, and what that says of the outcome.
    type Case = (Error, Blame, u16, Option<&'static str>);

    /// The patterns are all variants, or the match that is made of them does not compile.
    macro_rules! cases {
        ($($pattern:pat => $error:expr, $blame:ident, $status:literal, $outcome:expr;)*) => {{
            #[allow(unreachable_patterns, reason = "some variants have several cases")]
            fn has_a_case(error: &Error) -> bool {
                match error {
                    $($pattern => true,)*
                }
            }
            let cases: Vec<Case> = vec![$(($error, Blame::$blame, $status, $outcome),)*];
            assert!(cases.iter().all(|(error, ..)| has_a_case(error)));
            $(assert!(cases.iter().any(|(error, ..)| matches!(error, $pattern)));)*
            cases
        }};
    }

    fn sqlite(code: i32) -> rusqlite::Error {
        rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)
    }

    /// With a word in each that no one outside may see.
    fn cases() -> Vec<Case> {
        let path = || "/secret.db".into();
        let text = || "secret.db".to_string();
        let txid = Txid::new(Epoch::new(1, 1), 1);
        let cause = |blame| Cause::new("secret.db", blame);
        let peer = || Error::peer("secret.db", PeerProblem::NotFound);
        let io = || Error::io("open", "/secret.db")(std::io::Error::other("x"));
        let parse = || "secret.db".parse::<Checksum>().unwrap_err();
        cases! {
            Error::Config(_) => Error::Config(text()), Caller, 500, None;
            Error::Environment { .. } =>
                Error::Environment { variable: text(), problem: text() }, Caller, 500, None;
            Error::WeakSecret(_) => Error::WeakSecret("x"), Caller, 500, None;
            Error::InvalidText(_) => Error::from(parse()), Caller, 500, None;
            Error::Unsupported { .. } =>
                Error::Unsupported { path: path(), reason: Unsupported::NotAFile }, Caller, 500, None;
            Error::FileExists { .. } => Error::FileExists { path: path() }, Caller, 500, None;
            Error::AlreadyOpen { .. } => Error::AlreadyOpen { path: path(), holder: "x" }, Caller, 500, None;
            Error::Reentrant => Error::Reentrant, Caller, 500, None;
            Error::BlockingInAsync => Error::BlockingInAsync, Caller, 500, None;
            Error::NotPrimary { .. } => Error::NotPrimary { primary: None }, Caller, 503, NOT_BEGUN;
            Error::HandoffFailed(_) => Error::HandoffFailed(text()), Caller, 503, None;
            Error::ShutDown => Error::ShutDown, Caller, 503, NOT_BEGUN;
            Error::NoState(_) => Error::NoState(text()), Caller, 503, None;
            Error::Busy { .. } =>
                Error::of_begin(sqlite(ffi::SQLITE_BUSY_RECOVERY), SECOND), Caller, 503, NOT_BEGUN;
            Error::PoolExhausted { .. } =>
                Error::PoolExhausted { limit: 1, waited: SECOND }, Caller, 503, None;
            Error::Timeout { .. } => Error::Timeout { what: text(), after: SECOND }, Caller, 504, None;
            Error::TooMany { .. } => Error::TooMany { what: "x", limit: 1 }, Caller, 503, None;
            Error::Lost { .. } => Error::Lost { txid }, Caller, 409, None;
            Error::Panicked(_) => Error::Panicked(text()), Caller, 500, None;
            Error::Migration(_) => Error::Migration(text().into()), Caller, 500, None;
            Error::OnPromote(_) => Error::OnPromote(text().into()), Caller, 500, None;
            // Statements before may have done something elsewhere.
            Error::Sqlite(_) => Error::Sqlite(sqlite(ffi::SQLITE_BUSY)), Caller, 503, None;
            Error::Sqlite(_) => Error::Sqlite(sqlite(ffi::SQLITE_FULL)), Caller, 503, None;
            Error::Sqlite(_) => Error::of_begin(sqlite(ffi::SQLITE_IOERR), SECOND), Caller, 500, None;
            Error::Sqlite(_) => Error::Sqlite(rusqlite::Error::InvalidQuery), Caller, 500, None;
            Error::Peer { .. } => peer(), Peer, 500, None;
            Error::Corrupt { .. } =>
                Error::Corrupt { path: path(), offset: 0, what: text(), cure: "x" }, Disk, 500, None;
            Error::Newer { .. } => Error::Newer { path: path(), found: 2, supported: 1 }, Disk, 500, None;
            Error::Older { .. } => Error::Older { path: path(), found: 1, supported: 2 }, Disk, 500, None;
            Error::Damaged { .. } => Error::Damaged { path: path(), what: text() }, Disk, 500, None;
            Error::Mismatch { .. } => Error::Mismatch { expected: text(), found: text() }, Disk, 500, None;
            Error::LostFull { .. } =>
                Error::LostFull { path: path(), used: 1, needed: 1, quota: 1 }, Outside, 500, None;
            Error::Io { .. } => io(), Outside, 500, None;
            Error::OutcomeUnknown { .. } =>
                Error::OutcomeUnknown { txid: None, cause: cause(Blame::Caller) },
                Caller, 500, Some("unknown");
            Error::OutcomeUnknown { .. } => peer().of_a_commit(), Peer, 500, Some("unknown");
            // An operator has to act: another try does not help.
            Error::Stopped(_) => Error::Stopped(cause(Blame::Replite)), Replite, 500, None;
            Error::Stopped(_) => Error::Stopped(io().cause()), Outside, 500, None;
            Error::Disturbed(_) => Error::Disturbed(text()), Outside, 500, None;
            Error::NoRandom(_) => Error::NoRandom(text()), Outside, 500, None;
            Error::ThreadPanicked { .. } =>
                Error::ThreadPanicked { place: text(), message: text() }, Replite, 500, None;
            Error::Internal(_) => Error::Internal(text()), Replite, 500, None;
        }
    }

    #[tokio::test]
    async fn errors_blame_who_must_act_and_become_responses_that_leak_nothing() {
        for (error, blame, status, expected) in cases() {
            let name = error.to_string();
            assert_eq!(error.blame(), blame, "{name}");
            let response = error.into_response();
            let headers = response.headers();
            assert_eq!(response.status().as_u16(), status, "{name}");
            assert_eq!(headers.contains_key(RETRY_AFTER), status == 503, "{name}");
            let outcome = headers.get(OUTCOME).map(|outcome| outcome.to_str().unwrap());
            assert_eq!(outcome, expected, "{name}");
            let body = axum::body::to_bytes(response.into_body(), 1024).await.unwrap();
            assert!(!String::from_utf8_lossy(&body).contains("secret"), "{name}");
        }
    }
}
