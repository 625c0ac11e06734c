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

use crate::error::{PeerProblem, shown};
use crate::lock::lock;
use crate::net::prompt::Prompt;
use crate::net::{
    CONNECTION_WINDOW_BYTES, Endpoint, FRAME_MAX_BYTES, Heard, Incoming, STREAM_WINDOW_BYTES, Tracked, chain,
};

/// Longest wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for the head of the peer's response.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the answer to the question whether a peer speaks HTTP/1 only.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pieces of the request's body that wait to be sent: a hello and a few acknowledgements.
const REQUEST_PIECES_MAX: usize = 8;
/// Bytes of a connection's error that are shown.
const SHOWN_MAX_BYTES: usize = 512;
/// First bytes of a peer that are kept to tell HTTP/1 from HTTP/2.
const FIRST_BYTES: usize = 16;
/// What HTTP/2 begins with: a preface, and settings, here none.
const HTTP2_BEGINS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// What HTTP/1 answers with.
const HTTP1_BEGINS: &[u8] = b"HTTP/1.";
/// The type of the frame that HTTP/2 answers with: settings.
const SETTINGS: u8 = 4;
/// Largest head of a response, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;

/// A response whose request's body is still open. Dropping it closes the connection.
pub(crate) struct OpenResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) request: Sender<Bytes, Infallible>,
    /// What comes on the connection.
    pub(crate) heard: Arc<Heard>,
    /// Keeps the connection open.
    pub(crate) guard: DropGuard,
}

/// Dials the peer and sends a POST whose body stays open. Returns with the head of the response.
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
) -> Result<OpenResponse, PeerProblem> {
    let io = connect(to).await?;
    let heard = Arc::new(Heard::new());
    let opened = exchange_on(Prompt(io), to, path, headers, tracker, &heard).await;
    match opened {
        // A server without HTTP/2 mostly hangs up on our preface without a word. So does a link
        // that breaks. A second question tells which it was.
        Err(PeerProblem::Connection(_)) if heard.bytes() == 0 && lacks_http2(to).await => {
            Err(PeerProblem::NotHttp2)
        }
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
#[cfg(test)]
pub(crate) async fn open_on<I>(
    io: I,
    to: &Endpoint,
    path: &str,
    headers: HeaderMap,
    tracker: &TaskTracker,
) -> Result<OpenResponse, PeerProblem>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    exchange_on(io, to, path, headers, tracker, &Arc::new(Heard::new())).await
}

async fn exchange_on<I>(
    io: I,
    to: &Endpoint,
    path: &str,
    headers: HeaderMap,
    tracker: &TaskTracker,
    heard: &Arc<Heard>,
) -> Result<OpenResponse, PeerProblem>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let cut = CancellationToken::new();
    let guard = cut.clone().drop_guard();
    let first = Arc::new(Mutex::new(Vec::new()));
    let io = WatchedStream {
        io,
        first: first.clone(),
        heard: heard.clone(),
        cut: Box::pin(cut.cancelled_owned()),
    };
    let exchange = exchange(io, to, path, headers, tracker);
    let result = match tokio::time::timeout(HEAD_TIMEOUT, exchange).await {
        Ok(result) => result,
        Err(_) => Err(PeerProblem::Connection(format!("no answer within {HEAD_TIMEOUT:?}"))),
    };
    match result {
        Ok((response, request)) => {
            let (head, body) = response.into_parts();
            let body = Incoming::new(body);
            let heard = heard.clone();
            Ok(OpenResponse { status: head.status, headers: head.headers, body, request, heard, guard })
        }
        Err(_) if lock(&first).starts_with(b"HTTP/") => Err(PeerProblem::NotHttp2),
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
    // A peer may give reasons of its own.
    let broken = |e: hyper::Error| PeerProblem::Connection(shown(&chain(&e), SHOWN_MAX_BYTES));
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(Tracked(tracker.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_MAX_BYTES)
        .max_header_list_size(HEAD_MAX_BYTES)
        .handshake(TokioIo::new(io))
        .await
        .map_err(broken)?;
    tracker.spawn(async move {
        // The reader of the body sees its end.
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

/// Whether a peer that hung up on HTTP/2 does so again, and answers HTTP/1.
async fn lacks_http2(to: &Endpoint) -> bool {
    match answer_to(to, HTTP2_BEGINS).await {
        Some(first) if first[3] == SETTINGS => return false,
        Some(first) if first.starts_with(HTTP1_BEGINS) => return true,
        _ => {}
    }
    let request = format!("HEAD / HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", to.authority());
    answer_to(to, request.as_bytes()).await.is_some_and(|first| first.starts_with(HTTP1_BEGINS))
}

/// The first bytes of what a peer answers: as many as a frame's header has.
async fn answer_to(to: &Endpoint, request: &[u8]) -> Option<[u8; 9]> {
    let probe = async {
        let mut io = connect(to).await.ok()?;
        io.write_all(request).await.ok()?;
        let mut first = [0; 9];
        io.read_exact(&mut first).await.ok()?;
        Some(first)
    };
    tokio::time::timeout(PROBE_TIMEOUT, probe).await.ok()?
}

/// A connection that remembers its first bytes, notes when some come, and can be cut from outside:
/// hyper's own tasks end with it.
struct WatchedStream<I> {
    io: I,
    first: Arc<Mutex<Vec<u8>>>,
    heard: Arc<Heard>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<I: AsyncRead + Unpin> AsyncRead for WatchedStream<I> {
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
        let came = buf.filled().len() - before;
        if read.is_ready() && came > 0 {
            self.heard.note(came);
            let mut first = lock(&self.first);
            let missing = FIRST_BYTES.saturating_sub(first.len());
            first.extend(buf.filled()[before..].iter().take(missing));
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for WatchedStream<I> {
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
