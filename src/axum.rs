//! For axum: responses made of [`Error`], and extractors for the request's session and token.

use std::convert::Infallible;

use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use axum::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, StatusCode};
use rusqlite::ErrorCode;

use crate::error::Error;
use crate::proxy::headers::OUTCOME;
use crate::proxy::{Outcome, RETRY_AFTER_SECONDS};
use crate::session::{self, Session};
use crate::token::Token;

/// A response that says whether to try again and tells nothing of the inside. [`Error::NotPrimary`] also reports to
/// the request's [`Session`] that the primary is needed, so that the replay layer sends the request there instead.
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
        if let Error::NotPrimary { primary } = &self {
            session::this_primary_needed(primary.as_deref());
        }
        // The layer takes this back when the handler committed something before.
        if let Some(outcome) = Outcome::of(&self) {
            headers.insert(OUTCOME, HeaderValue::from_static(outcome.as_str()));
        }
        response
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
        Error::OutcomeUnknown(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "it is not known whether this was done\n")
        }
        Error::Lost { .. } => (StatusCode::CONFLICT, "the transaction was lost with its branch\n"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n"),
    }
}

/// The request's session; 500 where the replay layer is not around the handler. Below the layers of several databases it is the innermost one's: the others by
/// [`Db::session`](crate::Db::session).
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

    #[test]
    fn errors_become_responses_that_leak_nothing() {
        let timeout = Error::Timeout { what: "secret.db".into(), after: Duration::from_secs(1) };
        let io = Error::io("open", "/secret.db")(std::io::Error::other("x"));
        let sqlite = |code| rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        let second = Duration::from_secs(1);
        for (error, status, not_executed) in [
            (Error::NotPrimary { primary: None }, 503, true),
            (Error::of_begin(sqlite(rusqlite::ffi::SQLITE_BUSY_RECOVERY), second), 503, true),
            (Error::ShutDown, 503, true),
            // An operator has to act: another try does not help.
            (Error::Stopped("/secret.db".into()), 500, false),
            // Statements before may have done something elsewhere.
            (Error::Sqlite(sqlite(rusqlite::ffi::SQLITE_BUSY)), 503, false),
            (Error::Sqlite(sqlite(rusqlite::ffi::SQLITE_FULL)), 503, false),
            (Error::NoState("x".into()), 503, false),
            (Error::PoolExhausted { limit: 1, waited: second }, 503, false),
            (Error::TooMany { what: "x", limit: 1 }, 503, false),
            (timeout, 504, false),
            (io, 500, false),
            (Error::OutcomeUnknown("secret.db".into()), 500, false),
            (Error::of_begin(sqlite(rusqlite::ffi::SQLITE_IOERR), second), 500, false),
            (Error::Sqlite(rusqlite::Error::InvalidQuery), 500, false),
        ] {
            let name = error.to_string();
            let expected = match error {
                Error::OutcomeUnknown(_) => Some("unknown"),
                _ => not_executed.then_some("not-executed"),
            };
            let response = error.into_response();
            let headers = response.headers();
            assert_eq!(response.status().as_u16(), status, "{name}");
            assert_eq!(headers.contains_key(RETRY_AFTER), status == 503, "{name}");
            let outcome = headers.get(OUTCOME).map(|outcome| outcome.to_str().unwrap());
            assert_eq!(outcome, expected, "{name}");
        }
    }
}
