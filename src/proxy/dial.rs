//! One request to one node, and what is known when it fails.

use std::error::Error as _;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::proxy::BoxError;
use crate::proxy::body::{IdleTimeoutBody, ReplayRequestBody};
use crate::proxy::http2::Http2;
use crate::proxy::preface::WatchedIo;
use crate::proxy::replay_body::Keep;

/// How long an unused connection is kept: less than any server or proxy on the way is likely to allow, because a
/// request that meets a closing connection has an unknown outcome.
pub(super) const POOL_IDLE_SECONDS: u64 = 15;
/// Unused connections that are kept to one node.
const POOL_IDLE_MAX: usize = 64;
/// TCP probes an idle connection after so many seconds, so that a dead machine is noticed.
const KEEPALIVE_SECONDS: u64 = 15;

/// A body on its way to the primary.
pub(super) type Outgoing = IdleTimeoutBody<ReplayRequestBody<http_body_util::Empty<bytes::Bytes>>>;

/// What a node is spoken to in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protocol {
    Http1,
    Http2,
    /// HTTP/2, and HTTP/1.1 to a node that does not speak it.
    Http2IfSpoken,
}

/// Why there is no response.
#[derive(Debug)]
pub(super) enum SendError {
    /// There was no connection, and it is no use to try another.
    Unreachable(BoxError),
    /// The connection closed before the request was put on it, or the node said that it has not begun it.
    NotBegun(BoxError),
    /// The server shows no HTTP/2; the request was not put on the connection.
    NoHttp2(BoxError),
    /// The request's `Host` is no host.
    BadHost,
    /// The client stopped sending.
    SlowClient,
    /// What the client sent is no body, or it left within it.
    BadBody(BoxError),
    /// Nothing came back in time.
    NoAnswer,
    /// The connection broke; the request may have been carried out.
    Broken(BoxError),
}

/// The connections to other nodes.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    http1: Client<Connector, Outgoing>,
    http2: Http2,
}

impl Dialer {
    pub(super) fn new(connect: Duration, stop: CancellationToken) -> Dialer {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.set_keepalive(Some(Duration::from_secs(KEEPALIVE_SECONDS)));
        http.set_connect_timeout(Some(connect));
        let connector = Connector { http, limit: connect, http2: false };
        let spawn = Spawn { stop };
        let http1 = Client::builder(spawn.clone())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(POOL_IDLE_SECONDS))
            .pool_max_idle_per_host(POOL_IDLE_MAX)
            // What may be sent again is decided by `forward`, which knows the method.
            .retry_canceled_requests(false)
            .set_host(false)
            .build(connector.clone());
        Dialer { http1, http2: Http2::new(Connector { http2: true, ..connector }, spawn) }
    }

    /// Sends a request and waits for the response's head. The body is not touched before a connection stands.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection that the request is on.
    pub(super) async fn send(
        &self,
        head: Request<()>,
        http2: bool,
        body: &Keep,
        idle: Duration,
        answer: Duration,
    ) -> Result<Response<Incoming>, SendError> {
        let outgoing = IdleTimeoutBody::new(ReplayRequestBody::kept(body.clone()), Some(idle));
        let request = head.map(|()| outgoing);
        let response = async {
            if http2 {
                self.http2.request(request).await
            } else {
                self.http1.request(request).await.map_err(sort)
            }
        };
        tokio::pin!(response);
        loop {
            // The deadline comes nearer when the body ends, but never nearer than `answer` from then.
            let due = body.deadline(idle, answer).min(Instant::now() + answer);
            tokio::select! {
                biased;
                got = &mut response => return got.map_err(|e| blame(e, body, idle)),
                () = tokio::time::sleep_until(due) => {}
            }
            if body.deadline(idle, answer) <= Instant::now() {
                return Err(if body.starving() { SendError::SlowClient } else { SendError::NoAnswer });
            }
        }
    }
}

fn sort(error: hyper_util::client::legacy::Error) -> SendError {
    if error.is_connect() {
        return SendError::Unreachable(error.into());
    }
    let source = error.source().and_then(|s| s.downcast_ref::<hyper::Error>());
    // So hyper calls a request that it hands back unwritten.
    if source.is_some_and(hyper::Error::is_canceled) {
        return SendError::NotBegun(error.into());
    }
    SendError::Broken(error.into())
}

/// A connection may have broken because of what the client sent, or did not send.
fn blame(error: SendError, body: &Keep, idle: Duration) -> SendError {
    let SendError::Broken(error) = error else { return error };
    if body.starving() && body.deadline(idle, idle) <= Instant::now() {
        return SendError::SlowClient;
    }
    if body.failed() {
        return SendError::BadBody(error);
    }
    SendError::Broken(error)
}

/// Opens TCP connections within a limit that covers the look-up of names, too.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    http: HttpConnector,
    pub(super) limit: Duration,
    /// For HTTP/2, of which the server has to give proof.
    http2: bool,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<WatchedIo>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (limit, http2) = (self.limit, self.http2);
        let connecting = self.http.call(uri);
        Box::pin(async move {
            match tokio::time::timeout(limit, connecting).await {
                Ok(connected) => Ok(TokioIo::new(WatchedIo::new(connected?.into_inner(), http2))),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            }
        })
    }
}

/// Runs the connections' tasks until the node stops, so that none outlives it.
#[derive(Clone, Debug)]
pub(super) struct Spawn {
    stop: CancellationToken,
}

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let stop = self.stop.clone();
        TokioExecutor::new().execute(async move {
            stop.run_until_cancelled_owned(future).await;
        });
    }
}
