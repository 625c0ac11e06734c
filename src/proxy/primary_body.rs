//! A response's body as it comes from the primary, and how long its client may leave it untaken.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Response;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::proxy::BoxError;
use crate::proxy::exchanges::{ExchangeBody, SwitchedStream};
use crate::proxy::idle::IdleTimeoutBody;
use crate::proxy::on_line::OnLine;
use crate::proxy::shares::Taken;

/// The body of a response, on whichever way it comes.
pub(super) enum PrimaryBody {
    /// In the clear, or by https.
    Network(Incoming),
    /// On the private channel.
    Channel(ExchangeBody),
    /// The connection has switched to another protocol.
    Switched,
}

/// The other end of an upgraded connection.
pub(super) enum PrimaryEnd {
    Network(OnUpgrade),
    Channel(SwitchedStream),
}

impl PrimaryBody {
    /// The connection of a response that has switched; none where it was switched before.
    pub(super) fn switch(response: &mut Response<PrimaryBody>) -> Option<PrimaryEnd> {
        match std::mem::replace(response.body_mut(), PrimaryBody::Switched) {
            PrimaryBody::Network(_) => Some(PrimaryEnd::Network(hyper::upgrade::on(response))),
            PrimaryBody::Channel(body) => body.switch().map(PrimaryEnd::Channel),
            PrimaryBody::Switched => None,
        }
    }

    /// Whether it is known that something has come that was not taken.
    fn is_waiting(&mut self) -> bool {
        match self {
            PrimaryBody::Channel(body) => body.is_waiting(),
            PrimaryBody::Network(_) | PrimaryBody::Switched => false,
        }
    }
}

impl Body for PrimaryBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            PrimaryBody::Network(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            PrimaryBody::Channel(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            PrimaryBody::Switched => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            PrimaryBody::Network(body) => body.is_end_stream(),
            PrimaryBody::Channel(body) => body.is_end_stream(),
            PrimaryBody::Switched => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            PrimaryBody::Network(body) => body.size_hint(),
            PrimaryBody::Channel(body) => body.size_hint(),
            PrimaryBody::Switched => SizeHint::with_exact(0),
        }
    }
}

/// Between two looks at responses there is a fourth of the limit, and so much more.
const LOOK_PAUSE: Duration = Duration::from_millis(1);

/// The limit is so many times that of a pause. A server asks for more only after a third of what
/// the kernel holds for the client was taken, which may be more than a megabyte: a client that
/// takes 5 KB/s is served.
const UNTAKEN_TIMES: u32 = 5;

/// What a response has until its end: a place among those that last, and one on a connection of the
/// private channel.
pub(super) type UntilTheEnd = (Taken, Option<OnLine>);

/// The responses that came, and have not come to their end. One of which the client takes nothing
/// for too long is broken off, so that its place and its bytes are for others.
#[derive(Clone)]
pub(super) struct LastingResponses(Arc<Lasting>);

struct Lasting {
    limit: Duration,
    stop: CancellationToken,
    listed: Mutex<ResponseList>,
}

#[derive(Default)]
struct ResponseList {
    next: u64,
    responses: HashMap<u64, Arc<Mutex<LastingResponse>>>,
    /// Somebody looks at them from time to time.
    watched: bool,
}

struct LastingResponse {
    /// None: broken off.
    body: Option<(IdleTimeoutBody<PrimaryBody>, Option<UntilTheEnd>)>,
    /// Since when something of it is there that its client's server has not asked for. None: it
    /// asked, and there was nothing.
    untaken: Option<Instant>,
}

impl LastingResponse {
    /// Whether it was left for so long by now.
    fn is_left(&mut self, limit: Duration, now: Instant) -> bool {
        let Some((body, _)) = &mut self.body else { return false };
        if self.untaken.is_none() && body.inner().is_waiting() {
            self.untaken = Some(now);
        }
        self.untaken.is_some_and(|since| now.duration_since(since) >= limit)
    }
}

/// A response's body. It is listed as long as it lasts.
pub(super) struct LastingBody {
    number: u64,
    response: Arc<Mutex<LastingResponse>>,
    of: LastingResponses,
}

impl LastingResponses {
    /// `idle`: the longest pause of a response.
    pub(super) fn new(idle: Duration, stop: CancellationToken) -> LastingResponses {
        let limit = idle.saturating_mul(UNTAKEN_TIMES);
        LastingResponses(Arc::new(Lasting { limit, stop, listed: Mutex::default() }))
    }

    pub(super) fn body(&self, body: IdleTimeoutBody<PrimaryBody>, until: Option<UntilTheEnd>) -> LastingBody {
        let response = LastingResponse { body: Some((body, until)), untaken: Some(Instant::now()) };
        let response = Arc::new(Mutex::new(response));
        let (number, watched) = {
            let mut listed = lock(&self.0.listed);
            let number = listed.next;
            listed.next += 1;
            listed.responses.insert(number, response.clone());
            (number, std::mem::replace(&mut listed.watched, true))
        };
        if !watched {
            self.watch();
        }
        LastingBody { number, response, of: self.clone() }
    }

    /// Looks at all of them again and again, until there is none.
    fn watch(&self) {
        let (lasting, stop) = (self.0.clone(), self.0.stop.clone());
        let mut watch = ResponseWatch { lasting: self.0.clone(), is_done: false };
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(lasting.limit / 4 + LOOK_PAUSE).await;
                let all: Vec<_> = {
                    let mut listed = lock(&lasting.listed);
                    if listed.responses.is_empty() {
                        listed.watched = false;
                        watch.done();
                        return;
                    }
                    listed.responses.values().cloned().collect()
                };
                for response in all {
                    let mut response = lock(&response);
                    if response.is_left(lasting.limit, Instant::now()) {
                        let left = response.body.take();
                        drop(response);
                        tracing::debug!(limit = ?lasting.limit, "a client leaves a response untaken");
                        drop(left);
                    }
                }
            }
        }));
    }
}

/// Who looks at them. Its runtime may end before others do: then another one looks.
struct ResponseWatch {
    lasting: Arc<Lasting>,
    /// There was none any more, and another one may look by now.
    is_done: bool,
}

impl ResponseWatch {
    fn done(&mut self) {
        self.is_done = true;
    }
}

impl Drop for ResponseWatch {
    fn drop(&mut self) {
        if !self.is_done {
            lock(&self.lasting.listed).watched = false;
        }
    }
}

impl Drop for LastingBody {
    fn drop(&mut self) {
        lock(&self.of.0.listed).responses.remove(&self.number);
    }
}

impl Body for LastingBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut response = lock(&self.response);
        let Some((body, _)) = &mut response.body else {
            let limit = self.of.0.limit;
            return Poll::Ready(Some(Err(format!("nothing of it was taken for {limit:?}").into())));
        };
        let polled = Pin::new(body).poll_frame(cx);
        response.untaken = polled.is_ready().then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.response).body.as_ref().is_some_and(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.response).body.as_ref().map(|(body, _)| body.size_hint()).unwrap_or_default()
    }
}

impl fmt::Debug for LastingResponses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LastingResponses").field("limit", &self.0.limit).finish_non_exhaustive()
    }
}
