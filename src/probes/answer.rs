//! Responses of the probes.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderValue, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;

/// The body of an answer of [`Probes`](crate::Probes): a short text.
#[derive(Debug)]
pub struct ProbeBody(Full<Bytes>);

impl Body for ProbeBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

/// What a text is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum AnswerKind {
    Json,
    Text,
    #[cfg(feature = "prometheus")]
    Metrics,
}

impl AnswerKind {
    fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            AnswerKind::Json => "application/json",
            AnswerKind::Text => "text/plain; charset=utf-8",
            #[cfg(feature = "prometheus")]
            AnswerKind::Metrics => super::text::CONTENT_TYPE,
        })
    }
}

/// A response that no cache keeps. One to `HEAD` has the length of the body, and none.
pub(super) fn answer(
    status: StatusCode,
    kind: AnswerKind,
    text: impl Into<Bytes>,
    is_head: bool,
) -> Response<ProbeBody> {
    let text = text.into();
    let length = text.len();
    let mut response = Response::new(ProbeBody(Full::new(if is_head { Bytes::new() } else { text })));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, kind.content_type());
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// The answer to any other method.
pub(super) fn not_allowed() -> Response<ProbeBody> {
    let words = "GET or HEAD, and nothing else\n";
    let mut response = answer(StatusCode::METHOD_NOT_ALLOWED, AnswerKind::Text, words, false);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}
