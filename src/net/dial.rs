//! One connection to a peer and one full-duplex exchange on it.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::channel::{Channel, Sender};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use super::{
    CONNECTION_WINDOW_BYTES, Endpoint, FRAME_MAX_BYTES, Incoming, PING_INTERVAL, PING_TIMEOUT,
    STREAM_WINDOW_BYTES, Tracked, chain,
};
use crate::error::PeerProblem;

/// Longest wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the head of the peer's response.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the answer to the question whether a peer speaks HTTP/1 only.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pieces of the request's body that wait to be sent: a hello and a few acknowledgements.
const REQUEST_PIECES_MAX: usize = 8;
/// First bytes of a peer that are kept to tell HTTP/1 from HTTP/2.
const FIRST_BYTES: usize = 16;
/// Largest head of a response, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;

/// A response whose request's body is still open. Dropping it closes the connection.
pub(crate) struct Opened {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) request: Sender<Bytes, Infallible>,
    /// Keeps the connection open.
    pub(crate) guard: DropGuard,
}

/// Dials the peer and sends a POST whose body stays open; returns with the head of the response.
///
/// # Errors
/// What is wrong with the peer.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(crate) async fn open(
    to: &Endpoint,
    path: &str,
    headers: HeaderMap,
    tracker: &TaskTracker,
) -> Result<Opened, PeerProblem> {
    let io = connect(to).await?;
    let opened = open_on(io, to, path, headers, tracker).await;
    match opened {
        // A server without HTTP/2 mostly hangs up on our preface without a word: ask in its own language.
        Err(PeerProblem::Connection(_)) if speaks_http1(to).await => Err(PeerProblem::NotHttp2),
        opened => opened,
    }
}

async fn connect(to: &Endpoint) -> Result<TcpStream, PeerProblem> {
    let connect = TcpStream::connect((to.host.as_str(), to.port));
    let io = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return Err(PeerProblem::Connection(error.to_string())),
        Err(_) => return Err(PeerProblem::Connection(format!("no connection within {CONNECT_TIMEOUT:?}"))),
    };
    // Without it a one-page commit waits for the acknowledgement of the one before.
    io.set_nodelay(true).map_err(|e| PeerProblem::Connection(e.to_string()))?;
    Ok(io)
}

/// The same on a connection that stands already.
pub(crate) async fn open_on<I>(
    io: I,
    to: &Endpoint,
    path: &str,
    headers: HeaderMap,
    tracker: &TaskTracker,
) -> Result<Opened, PeerProblem>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let cut = CancellationToken::new();
    let guard = cut.clone().drop_guard();
    let first = Arc::new(Mutex::new(Vec::new()));
    let io = Watched { io, first: first.clone(), cut: Box::pin(cut.cancelled_owned()) };
    let exchange = exchange(io, to, path, headers, tracker);
    let result = match tokio::time::timeout(HEAD_TIMEOUT, exchange).await {
        Ok(result) => result,
        Err(_) => Err(PeerProblem::Connection(format!("no answer within {HEAD_TIMEOUT:?}"))),
    };
    match result {
        Ok((response, request)) => {
            let (head, body) = response.into_parts();
            let body = Incoming::new(body);
            Ok(Opened { status: head.status, headers: head.headers, body, request, guard })
        }
        Err(_) if first.lock().unwrap_or_else(|e| e.into_inner()).starts_with(b"HTTP/") => {
            Err(PeerProblem::NotHttp2)
        }
        Err(problem) => Err(problem),
    }
}

type Exchanged = (http::Response<hyper::body::Incoming>, Sender<Bytes, Infallible>);

async fn exchange<I>(
    io: I,
    to: &Endpoint,
    path: &str,
    headers: HeaderMap,
    tracker: &TaskTracker,
) -> Result<Exchanged, PeerProblem>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let broken = |e: hyper::Error| PeerProblem::Connection(chain(&e));
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(Tracked(tracker.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_MAX_BYTES)
        .max_header_list_size(HEAD_MAX_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(io))
        .await
        .map_err(broken)?;
    tracker.spawn(async move {
        // Its end is seen by whoever reads the body.
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a peer ended");
        }
    });
    let (body_sender, body) = Channel::<Bytes, Infallible>::new(REQUEST_PIECES_MAX);
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = format!("http://{}{}{path}", to.authority(), to.path)
        .parse()
        .map_err(|e| PeerProblem::Connection(format!("bad URL: {e}")))?;
    *request.headers_mut() = headers;
    let response = sender.send_request(request).await.map_err(broken)?;
    Ok((response, body_sender))
}

/// Whether a peer that hung up on HTTP/2 answers HTTP/1.
async fn speaks_http1(to: &Endpoint) -> bool {
    let probe = async {
        let mut io = connect(to).await.ok()?;
        let request = format!("HEAD / HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", to.authority());
        io.write_all(request.as_bytes()).await.ok()?;
        let mut first = [0; 7];
        io.read_exact(&mut first).await.ok()?;
        Some(first == *b"HTTP/1.")
    };
    matches!(tokio::time::timeout(PROBE_TIMEOUT, probe).await, Ok(Some(true)))
}

/// A connection that remembers its first bytes and can be cut from outside: hyper's own tasks end with it.
struct Watched<I> {
    io: I,
    first: Arc<Mutex<Vec<u8>>>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<I: AsyncRead + Unpin> AsyncRead for Watched<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        if read.is_ready() {
            let mut first = self.first.lock().unwrap_or_else(|e| e.into_inner());
            let missing = FIRST_BYTES.saturating_sub(first.len());
            first.extend(buf.filled()[before..].iter().take(missing));
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Watched<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
