//! Requests to another node's application on the private channel: HTTP/2 on a few connections.
//!
//! Each connection begins with one exchange that proves the secret to both sides. After it every
//! exchange is a request for the application. Which requests were begun, a node that goes away says
//! by GOAWAY, as in `http2`.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::rt::Executor;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::error::PeerProblem;
use crate::handshake::{self, Asker, FORWARD_PATH, FORWARDS_NOT_SERVED, FORWARDS_SERVED, Knock};
use crate::lock::lock;
use crate::net::{self, Endpoint, PrivateConnection};
use crate::proxy::BoxError;
use crate::proxy::connect::{Outgoing, POOL_IDLE_SECONDS, SendError, Spawn};
use crate::proxy::http2::{PING_INTERVAL, PING_TIMEOUT, name, was_not_begun};
use crate::proxy::on_line::{LineUse, OnLine};
use crate::proxy::preface::{Spoken, WatchedIo};
use crate::proxy::switched;
use crate::replica::foreign;

/// Connections to one node. With what may be on each, that is 1,024 WebSockets.
const LINES_MAX: usize = 16;
/// Up to so many there is one more when so many requests are on each, ...
const SPREAD_LINES: usize = 8;
const SPREAD: usize = 16;
/// ... and after that when each is full. The other side allows as many requests on one.
const REQUESTS_MAX: usize = net::FORWARDS_MAX as usize;

/// The ways to the node that was asked last.
#[derive(Clone)]
pub(super) struct ChannelLines {
    asker: Arc<Asker>,
    spawn: Spawn,
    tracker: TaskTracker,
    /// How long a connection is tried.
    limit: Duration,
    open: Arc<Mutex<OpenLines>>,
    /// Held by who dials.
    dialling: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
struct OpenLines {
    to: String,
    lines: Vec<Arc<Line>>,
}

/// A connection.
struct Line {
    way: SendRequest<ChannelBody>,
    shown: Spoken,
    used: Arc<LineUse>,
    _exchange: ProvedExchange,
}

impl Line {
    fn is_usable(&self) -> bool {
        !self.way.is_closed() && !self.used.is_idle(Duration::from_secs(POOL_IDLE_SECONDS))
    }
}

impl ChannelLines {
    pub(super) fn new(asker: Asker, spawn: Spawn, limit: Duration) -> ChannelLines {
        let (asker, tracker) = (Arc::new(asker), TaskTracker::new());
        ChannelLines { asker, spawn, tracker, limit, open: Arc::default(), dialling: Arc::default() }
    }

    /// Sends a request to the application of the node whose replication endpoint this is.
    ///
    /// # Cancel safety
    /// Dropping the future resets the request's stream.
    pub(super) async fn request(
        &self,
        to: &str,
        mut request: Request<Outgoing>,
    ) -> Result<(Response<Incoming>, OnLine), SendError> {
        name(&mut request)?;
        let switches = request.headers().contains_key(http::header::UPGRADE);
        if switches {
            switched::ask(&mut request);
        }
        // A request that waits for another's try to connect does not wait longer than that one.
        let (line, on_line) = match tokio::time::timeout(self.limit, self.line(to)).await {
            Ok(line) => line?,
            Err(_) => return Err(SendError::Unreachable("no connection in time".into())),
        };
        let sent = line.way.clone().send_request(request.map(ChannelBody::Request)).await;
        match sent {
            Ok(mut response) => {
                if switches {
                    switched::answered(&mut response);
                }
                Ok((response, on_line))
            }
            Err(error) if was_not_begun(&error, &line.shown) => Err(SendError::NotBegun(error.into())),
            Err(error) => Err(SendError::Broken(error.into())),
        }
    }

    /// A place on a connection, which is opened if need be.
    async fn line(&self, to: &str) -> Result<(Arc<Line>, OnLine), SendError> {
        loop {
            match self.place(to) {
                Place::On { line, on_line, crowded } => {
                    if crowded {
                        self.dial_beside(to);
                    }
                    return Ok((line, on_line));
                }
                Place::Full => return Err(SendError::Unreachable("all connections are full".into())),
                Place::None => {}
            }
            let _dialling = self.dialling.lock().await;
            // Another request may have opened one meanwhile.
            if let Place::On { line, on_line, .. } = self.place(to) {
                return Ok((line, on_line));
            }
            let line = self.dial(to).await?;
            self.add(to, line);
        }
    }

    /// The place with the fewest requests beside it, and whether there should be a further
    /// connection.
    fn place(&self, to: &str) -> Place {
        let mut open = lock(&self.open);
        if open.to != to {
            // What is on the others comes to its end.
            *open = OpenLines { to: to.to_owned(), lines: Vec::new() };
        }
        open.lines.retain(|line| line.is_usable());
        let least = open.lines.iter().min_by_key(|line| line.used.requests());
        let Some(line) = least.cloned() else { return Place::None };
        let requests = line.used.requests();
        if requests >= REQUESTS_MAX {
            return if open.lines.len() < LINES_MAX { Place::None } else { Place::Full };
        }
        let crowded = requests + 1 >= SPREAD && open.lines.len() < SPREAD_LINES;
        // Under the lock.
        Place::On { on_line: line.used.enter(), line, crowded }
    }

    fn add(&self, to: &str, line: Line) {
        let mut open = lock(&self.open);
        if open.to == to {
            open.lines.push(Arc::new(line));
        }
    }

    /// Opens one more connection, if none is being opened.
    fn dial_beside(&self, to: &str) {
        let Ok(dialling) = self.dialling.clone().try_lock_owned() else { return };
        let (lines, to) = (self.clone(), to.to_owned());
        self.spawn.execute(async move {
            match tokio::time::timeout(lines.limit, lines.dial(&to)).await {
                Ok(Ok(line)) => lines.add(&to, line),
                failed => {
                    let failed = failed.map(|failed| failed.map(drop));
                    tracing::debug!(?failed, "no further connection to the primary");
                }
            }
            drop(dialling);
        });
    }

    /// Opens a connection, on which both sides have proved the secret.
    async fn dial(&self, to: &str) -> Result<Line, SendError> {
        let unreachable = |problem: PeerProblem| SendError::Unreachable(format!("{to}: {problem}").into());
        let endpoint = Endpoint::parse(to).map_err(|error| SendError::Unreachable(error.into()))?;
        let opened = self.asker.open_for_forwards(&endpoint, &self.tracker).await;
        let (knock, PrivateConnection { io, .. }) = opened.map_err(unreachable)?;
        let io = WatchedIo::new(io, true);
        let shown = io.shown();
        let mut builder = Builder::new(self.spawn.clone());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(net::FORWARD_WINDOW_BYTES)
            .initial_connection_window_size(net::FORWARDS_WINDOW_BYTES)
            .max_frame_size(net::FRAME_MAX_BYTES)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        let broken = |error: hyper::Error| SendError::Unreachable(error.into());
        let (mut way, connection) = builder.handshake(TokioIo::new(io)).await.map_err(broken)?;
        self.spawn.execute(self.keep(connection));
        let exchange = self.prove(&mut way, &endpoint, &knock).await.map_err(unreachable)?;
        let Some(exchange) = exchange else { return Err(SendError::NotServed) };
        Ok(Line { way, shown, used: LineUse::new(), _exchange: exchange })
    }

    /// Runs a connection, and lets go of those that are not used.
    fn keep<C>(&self, connection: C) -> impl Future<Output = ()> + Send + use<C>
    where
        C: Future<Output: Send> + Send,
    {
        let open = Arc::downgrade(&self.open);
        async move {
            let mut connection = std::pin::pin!(connection);
            loop {
                tokio::select! {
                    // Each request on it hears of its end.
                    _ = connection.as_mut() => return,
                    () = tokio::time::sleep(Duration::from_secs(POOL_IDLE_SECONDS)) => {}
                }
                if let Some(open) = open.upgrade() {
                    lock(&open).lines.retain(|line| line.is_usable());
                }
            }
        }
    }

    /// Proves the secret, and has the other side prove it. Returns the exchange, which stays open
    /// as long as the connection; none where the application there takes no such requests.
    async fn prove(
        &self,
        way: &mut SendRequest<ChannelBody>,
        to: &Endpoint,
        knock: &Knock,
    ) -> Result<Option<ProvedExchange>, PeerProblem> {
        let broken = |error: &dyn fmt::Display| PeerProblem::Connection(error.to_string());
        let keys = &self.asker.keys;
        let (prover, body) = ChannelBody::proof();
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        let uri = format!("http://{}{FORWARD_PATH}", to.authority());
        *request.uri_mut() = uri.parse::<Uri>().map_err(|error| broken(&error))?;
        *request.headers_mut() = knock.headers(keys).map_err(|error| broken(&error))?;
        let (head, body) = way.send_request(request).await.map_err(|error| broken(&error))?.into_parts();
        let mut body = net::Incoming::new(body);
        let (answer, _) = match handshake::read_head((head.status, &head.headers), knock, keys) {
            Ok(answer) => answer,
            Err(Some(problem)) => return Err(problem),
            Err(None) => return Err(foreign(head.status, &head.headers, &mut body).await),
        };
        let proof = Bytes::copy_from_slice(&handshake::prove_forwards(knock, &answer.nonce, keys));
        prover.send(proof).await.map_err(|_| broken(&"it hung up before the proof"))?;
        let said = body.next().await.and_then(Result::ok).and_then(|bytes| bytes.first().copied());
        match said {
            Some(FORWARDS_SERVED) => Ok(Some(ProvedExchange { _prover: prover, _body: Mutex::new(body) })),
            Some(FORWARDS_NOT_SERVED) => Ok(None),
            _ => Err(PeerProblem::Connection("it broke off before it said whether it serves".into())),
        }
    }
}

enum Place {
    On {
        line: Arc<Line>,
        on_line: OnLine,
        /// There should be one more connection.
        crowded: bool,
    },
    /// Another connection is needed.
    None,
    /// There are as many as may be.
    Full,
}

/// The two bodies of the exchange that a connection begins with.
struct ProvedExchange {
    _prover: mpsc::Sender<Bytes>,
    /// In a mutex, as it is shared.
    _body: Mutex<net::Incoming>,
}

impl fmt::Debug for ChannelLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelLines").finish_non_exhaustive()
    }
}

/// What goes out on such a connection.
pub(super) enum ChannelBody {
    Proof(mpsc::Receiver<Bytes>),
    Request(Outgoing),
}

impl ChannelBody {
    fn proof() -> (mpsc::Sender<Bytes>, ChannelBody) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, ChannelBody::Proof(receiver))
    }
}

impl Body for ChannelBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            ChannelBody::Proof(receiver) => {
                receiver.poll_recv(cx).map(|next| next.map(|b| Ok(Frame::data(b))))
            }
            ChannelBody::Request(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ChannelBody::Proof(_) => false,
            ChannelBody::Request(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ChannelBody::Proof(_) => SizeHint::default(),
            ChannelBody::Request(body) => body.size_hint(),
        }
    }
}
