//! One connection to a peer and one full-duplex exchange on it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Body;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::channel::{Binding, Channel, TlsStream, Traffic, key_of};
use crate::descriptors::{self, Refills};
use crate::error::{PeerProblem, shown};
use crate::lock::lock;
use crate::net::heeded::Heeded;
use crate::net::pipe::{Pipe, PipeBody};
use crate::net::prompt::Prompt;
use crate::net::watched::WatchedStream;
use crate::net::{
    ByteStream, CONNECTION_WINDOW_BYTES, Endpoint, FRAME_MAX_BYTES, Heard, Incoming, STREAM_WINDOW_BYTES,
    Tracked, chain, dial_descriptors,
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
/// What HTTP/2 begins with: a preface, and settings, here none.
const HTTP2_BEGINS: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// What HTTP/1 answers with.
const HTTP1_BEGINS: &[u8] = b"HTTP/1.";
/// The type of the frame that HTTP/2 answers with: settings.
const SETTINGS: u8 = 4;
/// Largest head of a response, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;

/// How a peer is spoken to.
#[derive(Debug)]
pub(crate) enum Way {
    /// HTTP/2 without TLS.
    Clear,
    /// TLS from the first byte, and HTTP/2 inside.
    Direct,
    /// The same inside the body of one HTTP/2 request.
    Tunnel(Tunnel),
}

/// The request that a channel is inside of.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// What follows the endpoint's path.
    pub(crate) path: &'static str,
    pub(crate) headers: HeaderMap,
    /// The content type of a response that has the channel in its body.
    pub(crate) content_type: &'static str,
}

/// A response whose request's body is still open. Dropping it closes the connection.
pub(crate) struct OpenResponse {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Incoming,
    pub(crate) request: RequestBody,
    /// What comes on the connection.
    pub(crate) heard: Arc<Heard>,
    /// Keeps the connection open.
    pub(crate) guard: DropGuard,
}

/// Where the body of a request goes in. Dropping it ends the body.
pub(crate) struct RequestBody(tokio::sync::mpsc::Sender<Bytes>);

/// The peer takes nothing of the body any more.
#[derive(Debug)]
pub(crate) struct HungUp;

impl RequestBody {
    /// Queues bytes; waits while the queue is full.
    ///
    /// # Cancel safety
    /// A dropped future has queued nothing.
    pub(crate) async fn send_data(&mut self, bytes: Bytes) -> Result<(), HungUp> {
        self.0.send(bytes).await.map_err(|_| HungUp)
    }
}

/// What the head of a request says on a connection that has this binding.
pub(crate) type KnockHead<'a> = &'a mut (dyn FnMut(Binding) -> Result<HeaderMap, PeerProblem> + Send);

/// Dials the peer and sends a POST whose body stays open. Returns with the head of the response:
/// of the request that the channel is inside of, where that was refused. With `local` no other
/// machine is dialled.
///
/// # Errors
/// What is wrong with the peer.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(crate) async fn open(
    channel: &Channel,
    (way, local): (Way, bool),
    to: &Endpoint,
    path: &str,
    head: KnockHead<'_>,
    tracker: &TaskTracker,
) -> Result<OpenResponse, PeerProblem> {
    let io = connect(to).await?;
    if local {
        expect_loopback(&io)?;
    }
    let probed = !matches!(way, Way::Direct);
    let dial = Dial { channel, to, tracker, heard: Arc::new(Heard::new()) };
    let heard = dial.heard.clone();
    match dial.open_on(Prompt::new(io), way, path, head).await {
        // A server without HTTP/2 mostly hangs up on our preface without a word. So does a link
        // that breaks. A second question tells which it was.
        Err(PeerProblem::Connection(_)) if probed && heard.bytes() == 0 && lacks_http2(to).await => {
            Err(PeerProblem::NotHttp2)
        }
        opened => opened,
    }
}

/// A private connection on which nothing was said yet.
pub(crate) struct PrivateConnection {
    pub(crate) io: Box<dyn ByteStream>,
    /// What is proved on it is bound to this.
    pub(crate) binding: Binding,
}

/// Dials the peer for a connection that an application's requests go over. The tasks of what it is
/// inside of are the tracker's, and end with it.
///
/// # Errors
/// What is wrong with the peer. Inside of it the head of a response that refused the tunnel.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(crate) async fn open_for_forwards(
    channel: &Channel,
    (way, local): (Way, bool),
    to: &Endpoint,
    (tracker, stop): (&TaskTracker, &CancellationToken),
) -> Result<Result<PrivateConnection, (StatusCode, HeaderMap)>, PeerProblem> {
    let io = connect(to).await?;
    if local {
        expect_loopback(&io)?;
    }
    let heard = Arc::new(Heard::new());
    let dial = Dial { channel, to, tracker, heard: heard.clone() };
    let cut = Box::pin(stop.clone().cancelled_owned());
    let io = if matches!(way, Way::Direct) { Prompt::unhurried(io) } else { Prompt::new(io) };
    let io = WatchedStream { io, first: Arc::default(), heard, cut, _refills: Refills };
    match way {
        Way::Clear => Err(PeerProblem::NotPrivate),
        Way::Direct => {
            let (io, binding, _) = dial.secured(io, Traffic::Forwards).await?;
            Ok(Ok(PrivateConnection { io: Box::new(io), binding }))
        }
        Way::Tunnel(tunnel) => match dial.begin_tunnel(io, tunnel).await? {
            Ok(pipe) => {
                let (io, binding, _) = dial.secured(pipe, Traffic::Forwards).await?;
                Ok(Ok(PrivateConnection { io: Box::new(io), binding }))
            }
            Err((response, _)) => {
                let (head, _) = response.into_parts();
                Ok(Err((head.status, head.headers)))
            }
        },
    }
}

async fn connect(to: &Endpoint) -> Result<TcpStream, PeerProblem> {
    let connect = || TcpStream::connect((to.host.as_str(), to.port));
    let connect = descriptors::connect(dial_descriptors(&to.host), connect);
    let io = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return Err(PeerProblem::Connection(error.to_string())),
        Err(_) => return Err(PeerProblem::Connection(format!("no connection within {CONNECT_TIMEOUT:?}"))),
    };
    // Without it a one-page commit waits for the acknowledgement of the one before.
    io.set_nodelay(true).map_err(|e| PeerProblem::Connection(e.to_string()))?;
    Ok(io)
}

fn expect_loopback(io: &TcpStream) -> Result<(), PeerProblem> {
    match io.peer_addr() {
        Ok(address) if address.ip().to_canonical().is_loopback() => Ok(()),
        Ok(address) => Err(PeerProblem::Connection(format!(
            "{} is not on this machine, and without a secret, or without TLS by \
             `Plaintext::Loopback`, no other is spoken to",
            address.ip()
        ))),
        Err(error) => Err(PeerProblem::Connection(error.to_string())),
    }
}

/// The same in the clear, on a connection that stands already.
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
    let channel = Channel::open();
    let dial = Dial { channel: &channel, to, tracker, heard: Arc::new(Heard::new()) };
    dial.open_on(io, Way::Clear, path, &mut |_| Ok(headers.clone())).await
}

/// What is the same for all layers of one connection.
struct Dial<'a> {
    channel: &'a Channel,
    to: &'a Endpoint,
    tracker: &'a TaskTracker,
    heard: Arc<Heard>,
}

impl Dial<'_> {
    async fn open_on<I>(
        &self,
        io: I,
        way: Way,
        path: &str,
        head: KnockHead<'_>,
    ) -> Result<OpenResponse, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let cut = CancellationToken::new();
        let guard = cut.clone().drop_guard();
        let first = Arc::new(Mutex::new(Vec::new()));
        let (heard, cut) = (self.heard.clone(), Box::pin(cut.cancelled_owned()));
        let io = WatchedStream { io, first: first.clone(), heard, cut, _refills: Refills };
        let direct = matches!(way, Way::Direct);
        let exchanged = async {
            match way {
                Way::Clear => {
                    let path = format!("{}{path}", self.to.path);
                    self.exchange(io, &path, head(Binding::NONE)?).await
                }
                Way::Direct => self.private(io, path, head).await,
                Way::Tunnel(tunnel) => self.tunnelled(io, tunnel, path, head).await,
            }
        };
        let exchanged = match tokio::time::timeout(HEAD_TIMEOUT, exchanged).await {
            Ok(exchanged) => exchanged,
            Err(_) => Err(PeerProblem::Connection(format!("no answer within {HEAD_TIMEOUT:?}"))),
        };
        let (response, request) = match exchanged {
            Ok(exchanged) => exchanged,
            Err(PeerProblem::Connection(_)) if direct && is_http(&lock(&first)) => {
                return Err(PeerProblem::NotPrivate);
            }
            Err(_) if !direct && lock(&first).starts_with(b"HTTP/") => return Err(PeerProblem::NotHttp2),
            Err(problem) => return Err(problem),
        };
        let (head, body) = response.into_parts();
        let (body, heard) = (Incoming::new(body), self.heard.clone());
        Ok(OpenResponse { status: head.status, headers: head.headers, body, request, heard, guard })
    }

    /// TLS, and the exchange inside.
    async fn private<I>(&self, io: I, path: &str, head: KnockHead<'_>) -> Result<Exchanged, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (io, binding, problem) = self.secured(io, Traffic::Exchanges).await?;
        match self.exchange(io, path, head(binding)?).await {
            Err(PeerProblem::Connection(why)) => {
                Err(lock(&problem).take().unwrap_or(PeerProblem::Connection(why)))
            }
            exchanged => exchanged,
        }
    }

    /// TLS.
    async fn secured<I>(&self, io: I, traffic: Traffic) -> Result<Secured<I>, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let broken = |error: std::io::Error| match key_of(&error) {
            Some(key) => PeerProblem::ShutOut(key),
            None => PeerProblem::Connection(format!("TLS: {}", shown(&chain(&error), SHOWN_MAX_BYTES))),
        };
        let connected = self.channel.connect(io, traffic).await;
        let (io, binding) =
            connected.map_err(|error| self.channel.problem(&error).unwrap_or_else(|| broken(error)))?;
        let problem = Arc::new(Mutex::new(None));
        let io = Heeded { io, channel: self.channel.clone(), problem: problem.clone() };
        Ok((io, binding, problem))
    }

    /// An exchange, and the channel in its body.
    async fn tunnelled<I>(
        &self,
        io: I,
        tunnel: Tunnel,
        path: &str,
        head: KnockHead<'_>,
    ) -> Result<Exchanged, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        match self.begin_tunnel(io, tunnel).await? {
            Ok(pipe) => self.private(pipe, path, head).await,
            Err(refused) => Ok(refused),
        }
    }

    /// The bodies of an exchange as a connection; the exchange itself where it was refused.
    async fn begin_tunnel<I>(&self, io: I, tunnel: Tunnel) -> Result<Result<Pipe, Exchanged>, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Tunnel { path: outer, headers, content_type } = tunnel;
        let outer = format!("{}{outer}", self.to.path);
        let (response, request) = self.exchange(io, &outer, headers).await?;
        let named = response.headers().get(http::header::CONTENT_TYPE).map(|named| named.as_bytes());
        if response.status() != StatusCode::OK || named != Some(content_type.as_bytes()) {
            return Ok(Err((response, request)));
        }
        Ok(Ok(Pipe::new(Incoming::new(response.into_body()), request.0).heard_by(&self.heard)))
    }

    async fn exchange<I>(&self, io: I, path: &str, headers: HeaderMap) -> Result<Exchanged, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, body) = PipeBody::new(REQUEST_PIECES_MAX);
        let response = self.request(io, path, headers, body).await?;
        Ok((response, RequestBody(sender)))
    }

    async fn request<I, B>(
        &self,
        io: I,
        path: &str,
        headers: HeaderMap,
        body: B,
    ) -> Result<http::Response<hyper::body::Incoming>, PeerProblem>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        B: Body<Data = Bytes, Error = std::convert::Infallible> + Send + Unpin + 'static,
    {
        // A peer may give reasons of its own.
        let broken = |e: hyper::Error| PeerProblem::Connection(shown(&chain(&e), SHOWN_MAX_BYTES));
        let (mut sender, connection) =
            hyper::client::conn::http2::Builder::new(Tracked(self.tracker.clone()))
                .timer(TokioTimer::new())
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_MAX_BYTES)
                .max_header_list_size(HEAD_MAX_BYTES)
                .handshake(TokioIo::new(io))
                .await
                .map_err(broken)?;
        self.tracker.spawn(async move {
            // The reader of the body sees its end.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a peer ended");
            }
        });
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = format!("http://{}{path}", self.to.authority())
            .parse()
            .map_err(|e| PeerProblem::Connection(format!("bad URL: {e}")))?;
        *request.headers_mut() = headers;
        sender.send_request(request).await.map_err(broken)
    }
}

/// A connection in TLS, what its proofs are bound to, and what its errors will say of the peer.
type Secured<I> = (Heeded<TlsStream<I>>, Binding, Arc<Mutex<Option<PeerProblem>>>);

type Exchanged = (http::Response<hyper::body::Incoming>, RequestBody);

/// Whether a server that was spoken to in TLS answered in HTTP, as its first bytes say.
fn is_http(first: &[u8]) -> bool {
    first.starts_with(HTTP1_BEGINS) || first.get(3) == Some(&SETTINGS) && first.starts_with(&[0, 0])
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
