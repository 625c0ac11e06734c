//! Connections to other nodes: how they are opened and run, and why a request on one has no
//! response.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::proxy::BoxError;
use crate::proxy::body::{IdleTimeoutBody, ReplayRequestBody};
use crate::proxy::preface::WatchedIo;

/// How long an unused connection is kept: less than any server or proxy on the way is likely to
/// allow. A request that meets a closing connection has an unknown outcome.
pub(super) const POOL_IDLE_SECONDS: u64 = 15;

/// TCP probes an idle connection after so many seconds. The node notices a dead machine by that.
const KEEPALIVE_SECONDS: u64 = 15;

/// A body on its way to the primary.
pub(super) type Outgoing = IdleTimeoutBody<ReplayRequestBody<http_body_util::Empty<bytes::Bytes>>>;

/// Why there is no response.
#[derive(Debug)]
pub(super) enum SendError {
    /// There was no connection, and it is no use to try another.
    Unreachable(BoxError),
    /// The connection closed before the request was put on it, or the node said that it has not
    /// begun it.
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
    /// Another node is the primary since, and nothing came back.
    Superseded,
    /// The connection broke; the request may have been carried out.
    Broken(BoxError),
}

/// Opens TCP connections within a limit that covers the look-up of names, too.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    http: HttpConnector,
    pub(super) limit: Duration,
    /// For HTTP/2, of which the server has to give proof.
    http2: bool,
}

impl Connector {
    pub(super) fn new(limit: Duration) -> Connector {
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.set_keepalive(Some(Duration::from_secs(KEEPALIVE_SECONDS)));
        http.set_connect_timeout(Some(limit));
        Connector { http, limit, http2: false }
    }

    pub(super) fn for_http2(self) -> Connector {
        Connector { http2: true, ..self }
    }
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

/// Runs the connections' tasks until the node stops: none outlives it.
#[derive(Clone, Debug)]
pub(super) struct Spawn {
    stop: CancellationToken,
}

impl Spawn {
    pub(super) fn new(stop: CancellationToken) -> Spawn {
        Spawn { stop }
    }
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
