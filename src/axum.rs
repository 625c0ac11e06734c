//! For axum: responses made of [`Error`], and extractors for the request's session and token.

use std::convert::Infallible;

use axum_core::extract::{FromRequestParts, OptionalFromRequestParts};
use axum_core::response::{IntoResponse, Response};
use http::header::{CACHE_CONTROL, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderValue, StatusCode};

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
        if matches!(self, Error::NotPrimary { .. }) {
            session::primary_needed();
            // The layer takes this back when the handler committed something before.
            headers.insert(OUTCOME, HeaderValue::from_static(Outcome::NotExecuted.as_str()));
        }
        if matches!(self, Error::OutcomeUnknown(_)) {
            headers.insert(OUTCOME, HeaderValue::from_static(Outcome::Unknown.as_str()));
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
        Error::ShutDown => (StatusCode::SERVICE_UNAVAILABLE, "this node is shutting down\n"),
        Error::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "not done in time\n"),
        Error::OutcomeUnknown(_) => {
            (StatusCode::INTERNAL_SERVER_ERROR, "it is not known whether this was done\n")
        }
        Error::Lost { .. } => (StatusCode::CONFLICT, "the transaction was lost with its branch\n"),
        _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal error\n"),
    }
}

/// The request's session; 500 where the replay layer is not around the handler.
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
        for (error, status, retry) in [
            (Error::NotPrimary { primary: None }, 503, true),
            (Error::NoState("x".into()), 503, true),
            (Error::TooMany { what: "x", limit: 1 }, 503, true),
            (timeout, 504, false),
            (io, 500, false),
            (Error::OutcomeUnknown("secret.db".into()), 500, false),
            (Error::Sqlite(rusqlite::Error::InvalidQuery), 500, false),
        ] {
            let outcome = match error {
                Error::NotPrimary { .. } => Some("not-executed"),
                Error::OutcomeUnknown(_) => Some("unknown"),
                _ => None,
            };
            let response = error.into_response();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers().contains_key(RETRY_AFTER), retry);
            assert_eq!(response.headers().get(OUTCOME).map(|value| value.to_str().unwrap()), outcome);
        }
    }
}
