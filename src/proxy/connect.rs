//! Connections to other nodes: how they are opened and run, and why a request on one has no
//! response.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::net::ServerTls;
use crate::proxy::BoxError;
use crate::proxy::preface::WatchedIo;

/// How long an unused connection is kept: less than any server or proxy on the way is likely to
/// allow. A request that meets a closing connection has an unknown outcome.
pub(super) const POOL_IDLE_SECONDS: u64 = 15;

/// TCP probes an idle connection after so many seconds. The node notices a dead machine by that.
const KEEPALIVE_SECONDS: u64 = 15;

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
    /// The application there takes no requests on the private channel; this one was not sent.
    NotServed,
    /// The request's `Host` is no host, or the request can't be what it says.
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

/// The server has chosen, within TLS, not to speak HTTP/2.
#[derive(Debug, thiserror::Error)]
#[error("the server does not offer HTTP/2 within TLS")]
pub(super) struct ChoseHttp1;

/// Opens connections within a limit that covers the look-up of names and TLS, too.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    http: HttpConnector,
    pub(super) limit: Duration,
    /// For HTTP/2, of which the server has to give proof.
    http2: bool,
    tls: ServerTls,
}

impl Connector {
    pub(super) fn new(limit: Duration, tls: ServerTls) -> Connector {
        let mut http = HttpConnector::new();
        // By https it connects to port 443, and what follows is done here.
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(Duration::from_secs(KEEPALIVE_SECONDS)));
        http.set_connect_timeout(Some(limit));
        Connector { http, limit, http2: false, tls }
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
        let (limit, http2, tls) = (self.limit, self.http2, self.tls.clone());
        let host = host(&uri);
        let scheme = uri.scheme().cloned();
        let connecting = self.http.call(uri);
        let connect = async move {
            let stream = connecting.await?.into_inner();
            if scheme == Some(Scheme::HTTP) {
                return Ok(WatchedIo::new(Box::new(stream), http2));
            }
            if scheme != Some(Scheme::HTTPS) {
                return Err("neither http nor https".into());
            }
            let (stream, chose_http2) = tls.connect(stream, &host, http2).await?;
            if http2 && !chose_http2 {
                return Err(ChoseHttp1.into());
            }
            Ok(WatchedIo::new(Box::new(stream), http2))
        };
        Box::pin(async move {
            match tokio::time::timeout(limit, connect).await {
                Ok(connected) => connected.map(TokioIo::new),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
            }
        })
    }
}

/// The host's name or address alone.
fn host(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
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
