//! Requests to the servers that keep a lease's record. A failure says whether the request was sent.

use std::error::Error as StdError;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Scheme;
use http::{Request, Response, Uri};
use http_body::Body;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::either::Either;
use tower::Service;

use crate::descriptors;
use crate::error::shown;
use crate::net::server_tls::{ServerTls, TlsStream, was_refused};
use crate::net::{chain, dial_descriptors};

/// Unused connections that are kept to one server: a node makes one call at a time.
const POOL_IDLE_MAX: usize = 2;
/// How long an unused connection is kept: less than any server or proxy on the way is likely to
/// allow. A request that meets a closing connection has an unknown outcome.
const POOL_IDLE: Duration = Duration::from_secs(10);
/// TCP probes a silent connection after so long, so often, and this many times.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
/// The head of a response, and the piece of its body that is read at once, have at most so many
/// bytes.
const BUFFER_MAX_BYTES: usize = 64 * 1024;
/// Bytes of an error that are shown.
const SHOWN_MAX_BYTES: usize = 512;

/// Sends requests to `http://` and `https://` URLs by HTTP/1.1. It follows no redirect, and takes
/// no proxy from the environment. Clones share the connections.
///
/// The connections are served by the runtime that the first request of each was sent on, and end
/// with it.
#[derive(Clone, Debug)]
pub(crate) struct HttpsClient(Client<HttpsConnector, Full<Bytes>>);

/// Why there is no response.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum HttpsError {
    /// The server has not begun the request, and never will.
    #[error("{0}")]
    NotSent(String),
    /// The server may have carried it out, or may do so yet.
    #[error("{0}")]
    MaybeSent(String),
}

impl HttpsClient {
    /// `connect` limits what comes before a request: the look-up of the name, TCP and TLS. There is
    /// no other limit: callers have theirs.
    pub(crate) fn new(tls: ServerTls, connect: Duration) -> HttpsClient {
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(POOL_IDLE)
            .pool_max_idle_per_host(POOL_IDLE_MAX)
            // Only what hyper hands back is sent again: it has not written a byte of that.
            .retry_canceled_requests(true)
            .http1_max_buf_size(BUFFER_MAX_BYTES)
            .build(HttpsConnector::new(tls, connect));
        HttpsClient(client)
    }

    /// Sends a request with an absolute URL, and waits for the response's head.
    ///
    /// # Errors
    /// Whether the request was sent, and what went wrong, with the server's address.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection that the request is on. It may have been sent.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, HttpsError> {
        let server = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        self.0.request(request).await.map_err(|error| {
            let source = error.source().and_then(|source| source.downcast_ref::<hyper::Error>());
            let not_sent = error.is_connect()
                || was_refused(&error)
                // So hyper calls a request that it hands back unwritten.
                || source.is_some_and(hyper::Error::is_canceled);
            let why = error.source().map_or_else(|| error.to_string(), chain);
            let why = format!("{server}: {}", shown(&why, SHOWN_MAX_BYTES));
            if not_sent { HttpsError::NotSent(why) } else { HttpsError::MaybeSent(why) }
        })
    }
}

/// A body of at most so many bytes.
///
/// # Errors
/// It is longer, or broke off.
pub(crate) async fn read_body<B>(body: B, most: usize) -> Result<Bytes, String>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    match Limited::new(body, most).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(format!("the answer is longer than {most} bytes"))
        }
        Err(error) => Err(format!("the answer broke off: {}", shown(&chain(&*error), SHOWN_MAX_BYTES))),
    }
}

/// Opens connections within a limit that covers the look-up of names and TLS, too.
#[derive(Clone, Debug)]
struct HttpsConnector {
    http: HttpConnector,
    tls: ServerTls,
    limit: Duration,
}

impl HttpsConnector {
    fn new(tls: ServerTls, limit: Duration) -> HttpsConnector {
        let mut http = HttpConnector::new();
        // By https it connects to port 443, and what follows is done here.
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(KEEPALIVE));
        http.set_keepalive_interval(Some(KEEPALIVE));
        http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
        // Shared by the addresses of one name.
        http.set_connect_timeout(Some(limit));
        HttpsConnector { http, tls, limit }
    }
}

type ConnectError = Box<dyn StdError + Send + Sync>;

impl Service<Uri> for HttpsConnector {
    type Response = TokioIo<ServerIo>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (limit, tls) = (self.limit, self.tls.clone());
        let host = uri.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned();
        let scheme = uri.scheme().cloned();
        let mut http = self.http.clone();
        let connecting = descriptors::connect(dial_descriptors(&host), move || http.call(uri.clone()));
        let connect = async move {
            let stream = connecting.await?.into_inner();
            if scheme == Some(Scheme::HTTP) {
                return Ok(Either::Left(stream));
            }
            if scheme != Some(Scheme::HTTPS) {
                return Err("neither http nor https".into());
            }
            let (stream, _) = tls.connect(stream, &host, false).await?;
            Ok(Either::Right(stream))
        };
        Box::pin(async move {
            match tokio::time::timeout(limit, connect).await {
                Ok(connected) => connected.map(|stream| TokioIo::new(ServerIo(stream))),
                Err(_) => Err(format!("no connection within {limit:?}").into()),
            }
        })
    }
}

/// A connection to a server.
struct ServerIo(Either<TcpStream, TlsStream>);

impl Connection for ServerIo {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for ServerIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for ServerIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
