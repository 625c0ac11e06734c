//! Requests to another node's application on the private channel: HTTP/2 on a few connections.
//!
//! Each connection begins with one exchange that proves the secret to both sides. After it every
//! exchange is a request for the application. Which requests were begun, a node that goes away says
//! by GOAWAY, as in `http2`.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::client::Connection;
use h2::{PingPong, SendStream};
use http::{Method, Request, Response, Uri};
use hyper::rt::Executor;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::context::NodeContext;
use crate::error::PeerProblem;
use crate::handshake::{self, Asker, FORWARD_PATH, FORWARDS_NOT_SERVED, FORWARDS_SERVED, Knock};
use crate::lock::lock;
use crate::net::{self, Endpoint, PrivateConnection};
use crate::peer::{Incarnation, NodeId, PeerKey};
use crate::proxy::body::Outgoing;
use crate::proxy::connect::{POOL_IDLE_SECONDS, SendError, Spawn};
use crate::proxy::exchanges::{self, ExchangeBody, ExchangeError, Exchanges};
use crate::proxy::http2::{PING_INTERVAL, PING_TIMEOUT, name, was_not_looked_at};
use crate::proxy::on_line::{LineUse, OnLine};
use crate::proxy::preface::{Spoken, WatchedIo};
use crate::proxy::switched;
use crate::replica::foreign;
use crate::secret::Proved;

/// Connections to one node. With what may be on each, that is 4,096 WebSockets.
const LINES_MAX: usize = 64;
/// Up to so many there is one more when so many requests are on each, ...
const SPREAD_LINES: usize = 8;
const SPREAD: usize = 16;
/// ... and after that when each is full. The other side allows as many requests on one.
const REQUESTS_MAX: usize = net::FORWARDS_MAX as usize;
/// How long a connection is tried, with TLS and the proofs. Those that wait for it may have less
/// time: then the next ones find it.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// The ways to the node that was asked last: those of all that forward requests in this process.
#[derive(Clone)]
pub(super) struct ChannelLines {
    asker: Arc<Asker>,
    spawn: Spawn,
    stop: CancellationToken,
    tracker: TaskTracker,
    open: Arc<Mutex<OpenLines>>,
    /// How the last try to connect ended.
    dialled: Arc<watch::Sender<DialEnd>>,
}

/// A run of a node, and where its replication endpoint is.
#[derive(Clone, Default, Debug)]
pub(super) struct LineTarget {
    pub(super) url: String,
    /// None where another node named the address.
    pub(super) run: Option<(NodeId, Incarnation)>,
}

impl LineTarget {
    /// Whether it is this one, as far as that is known: another run may be at another machine.
    fn is(&self, other: &LineTarget) -> bool {
        let runs = self.run.zip(other.run);
        self.url == other.url && runs.is_none_or(|(run, other)| run == other)
    }
}

#[derive(Default)]
struct OpenLines {
    to: LineTarget,
    lines: Vec<Arc<Line>>,
    dialling: bool,
}

#[derive(Clone, Default)]
struct DialEnd {
    to: LineTarget,
    failed: Option<DialFailure>,
}

#[derive(Clone, Debug)]
enum DialFailure {
    /// The application there takes no such requests.
    NotServed,
    Unreachable(Arc<str>),
}

impl From<DialFailure> for SendError {
    fn from(failure: DialFailure) -> SendError {
        match failure {
            DialFailure::NotServed => SendError::NotServed,
            DialFailure::Unreachable(why) => SendError::Unreachable(why.as_ref().into()),
        }
    }
}

/// A connection.
struct Line {
    way: Exchanges,
    shown: Spoken,
    used: Arc<LineUse>,
    ended: CancellationToken,
}

impl Line {
    fn is_usable(&self) -> bool {
        !self.ended.is_cancelled()
            && !self.used.is_retired()
            && !self.used.is_idle(Duration::from_secs(POOL_IDLE_SECONDS))
    }
}

impl ChannelLines {
    pub(super) fn new(node: &NodeContext) -> ChannelLines {
        let (asker, stop) = (Arc::new(Asker::of(node)), node.stop.clone());
        let (spawn, tracker) = (Spawn::new(stop.clone()), TaskTracker::new());
        ChannelLines { asker, spawn, stop, tracker, open: Arc::default(), dialled: Arc::default() }
    }

    /// Sends a request to the application of a node. It waits for a connection until the limit.
    ///
    /// # Cancel safety
    /// Dropping the future resets the request's stream.
    pub(super) async fn request(
        &self,
        to: &LineTarget,
        limit: Duration,
        mut request: Request<Outgoing>,
    ) -> Result<(Response<ExchangeBody>, OnLine), SendError> {
        name(&mut request)?;
        let switches = request.headers().contains_key(http::header::UPGRADE);
        if switches {
            switched::ask(&mut request)?;
        }
        let (line, on_line) = match tokio::time::timeout(limit, self.line(to)).await {
            Ok(line) => line?,
            Err(_) => return Err(SendError::Unreachable("no connection in time".into())),
        };
        match line.way.send(request).await {
            Ok(mut response) => {
                if switches {
                    switched::answered(&mut response);
                }
                Ok((response, on_line))
            }
            Err(ExchangeError::Closed(error)) => {
                line.used.retire();
                Err(SendError::NotBegun(error.into()))
            }
            Err(ExchangeError::Unsayable(error)) => {
                tracing::debug!(%error, "a request can't be said in HTTP/2");
                Err(SendError::BadHost)
            }
            Err(ExchangeError::Broken(error)) if was_not_looked_at(&error, &line.shown) => {
                Err(SendError::NotBegun(error.into()))
            }
            Err(ExchangeError::Broken(error)) => Err(SendError::Broken(error.into())),
        }
    }

    /// A place on a connection, which is opened if need be.
    ///
    /// # Cancel safety
    /// A connection that is being opened is there for others.
    async fn line(&self, to: &LineTarget) -> Result<(Arc<Line>, OnLine), SendError> {
        let mut dialled = self.dialled.subscribe();
        loop {
            match self.place(to) {
                LinePlace::On { line, on_line, crowded } => {
                    if crowded {
                        self.begin_dial(to);
                    }
                    return Ok((line, on_line));
                }
                LinePlace::Full => return Err(SendError::Unreachable("all connections are full".into())),
                LinePlace::None => self.begin_dial(to),
            }
            // The sender is here.
            let _ = dialled.changed().await;
            let end = dialled.borrow_and_update().clone();
            if let Some(failed) = end.failed.filter(|_| end.to.is(to)) {
                return Err(failed.into());
            }
        }
    }

    /// The place with the fewest requests beside it, and whether there should be a further
    /// connection.
    fn place(&self, to: &LineTarget) -> LinePlace {
        let mut open = lock(&self.open);
        if !open.to.is(to) {
            // What is on the others comes to its end.
            *open = OpenLines::default();
        }
        if open.to.run.is_none() {
            open.to = to.clone();
        }
        open.lines.retain(|line| line.is_usable());
        let least = open.lines.iter().min_by_key(|line| line.used.requests());
        let Some(line) = least.cloned() else { return LinePlace::None };
        let requests = line.used.requests();
        if requests >= REQUESTS_MAX {
            return if open.lines.len() < LINES_MAX { LinePlace::None } else { LinePlace::Full };
        }
        let crowded = requests + 1 >= SPREAD && open.lines.len() < SPREAD_LINES;
        // Under the lock.
        LinePlace::On { on_line: line.used.enter(), line, crowded }
    }

    /// Opens one more connection, if none is being opened.
    fn begin_dial(&self, to: &LineTarget) {
        {
            let mut open = lock(&self.open);
            if !open.to.is(to) || std::mem::replace(&mut open.dialling, true) {
                return;
            }
        }
        let given_up = Err(DialFailure::Unreachable("no connection in time".into()));
        let mut dial = OpenDial { lines: self.clone(), to: to.clone(), outcome: Some(given_up) };
        self.spawn.execute(async move { dial.run().await });
    }

    fn end_dial(&self, to: &LineTarget, dialled: Result<Line, DialFailure>) -> Option<DialFailure> {
        let mut open = lock(&self.open);
        let wanted = open.to.is(to);
        if wanted {
            open.dialling = false;
        }
        match dialled {
            Ok(line) if wanted => open.lines.push(Arc::new(line)),
            Ok(_) => {}
            Err(failed) => return Some(failed),
        }
        None
    }

    /// Opens a connection, on which both sides have proved the secret.
    async fn dial(&self, to: &str) -> Result<Line, DialFailure> {
        let why = |error: &dyn fmt::Display| DialFailure::Unreachable(format!("{to}: {error}").into());
        let endpoint = Endpoint::parse(to).map_err(|error| why(&error))?;
        let opened = self.asker.open_for_forwards(&endpoint, &self.tracker, &self.stop).await;
        let (knock, PrivateConnection { io, binding }) = opened.map_err(|problem| why(&problem))?;
        let io = WatchedIo::new(io, true);
        let shown = io.shown();
        let began = exchanges::begin(io, self.spawn.clone()).await;
        let (way, mut connection) = began.map_err(|error| why(&error))?;
        let pings = connection.ping_pong();
        let (cut, ended) = (CancellationToken::new(), CancellationToken::new());
        self.spawn.execute(self.keep((connection, pings), cut.clone(), ended.clone().drop_guard()));
        let proved = self.prove(&way, &endpoint, &knock).await.map_err(|problem| why(&problem))?;
        let Some((exchange, proved)) = proved else { return Err(DialFailure::NotServed) };
        let used = LineUse::new(exchange);
        self.watch(&used, (proved, binding.server()), cut, ended.clone());
        Ok(Line { way, shown, used, ended })
    }

    /// Sends nothing more on a connection whose secret is dropped. What stands with a key that is
    /// shut out ends at once.
    fn watch(
        &self,
        used: &Arc<LineUse>,
        (proved, key): (Proved, Option<PeerKey>),
        cut: CancellationToken,
        ended: CancellationToken,
    ) {
        let (used, asker) = (Arc::downgrade(used), self.asker.clone());
        self.spawn.execute(async move {
            let shut_out = tokio::select! {
                () = asker.keys.dropped(proved) => false,
                () = asker.channel.shut_out(key) => true,
                () = ended.cancelled() => return,
            };
            if let Some(used) = used.upgrade() {
                used.retire();
            }
            if shut_out {
                cut.cancel();
            }
        });
    }

    /// Runs a connection, and lets go of those that are not used.
    fn keep(
        &self,
        (connection, pings): (Connection<WatchedIo>, Option<PingPong>),
        cut: CancellationToken,
        ended: DropGuard,
    ) -> impl Future<Output = ()> + Send + use<> {
        let open = Arc::downgrade(&self.open);
        async move {
            let _ended = ended;
            let mut connection = std::pin::pin!(connection);
            let mut silent = std::pin::pin!(async {
                match pings {
                    Some(pings) => exchanges::ping(pings, PING_INTERVAL, PING_TIMEOUT).await,
                    None => std::future::pending().await,
                }
            });
            loop {
                tokio::select! {
                    // Each request on it hears of its end.
                    _ = connection.as_mut() => return,
                    () = silent.as_mut() => return,
                    () = cut.cancelled() => return,
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
        way: &Exchanges,
        to: &Endpoint,
        knock: &Knock,
    ) -> Result<Option<(ProvedExchange, Proved)>, PeerProblem> {
        let broken = |error: &dyn fmt::Display| PeerProblem::Connection(error.to_string());
        let keys = &self.asker.keys;
        let mut request = Request::new(());
        *request.method_mut() = Method::POST;
        let uri = format!("http://{}{FORWARD_PATH}", to.authority());
        *request.uri_mut() = uri.parse::<Uri>().map_err(|error| broken(&error))?;
        *request.headers_mut() = knock.headers(keys).map_err(|error| broken(&error))?;
        let opened = way.open(request, false).await;
        let (response, mut prover) = opened.map_err(|error| broken(&error))?;
        let (head, body) = response.await.map_err(|error| broken(&error))?.into_parts();
        let mut body = net::Incoming::new(ExchangeBody::new(body));
        let (answer, proved) = match handshake::read_head((head.status, &head.headers), knock, keys) {
            Ok(answer) => answer,
            Err(Some(problem)) => return Err(problem),
            Err(None) => return Err(foreign(head.status, &head.headers, &mut body).await),
        };
        let proof = Bytes::copy_from_slice(&handshake::prove_forwards(knock, &answer.nonce, keys));
        prover.send_data(proof, false).map_err(|_| broken(&"it hung up before the proof"))?;
        let said = body.next().await.and_then(Result::ok).and_then(|bytes| bytes.first().copied());
        match said {
            Some(FORWARDS_SERVED) => {
                Ok(Some((ProvedExchange { _prover: prover, _body: Mutex::new(body) }, proved)))
            }
            Some(FORWARDS_NOT_SERVED) => Ok(None),
            _ => Err(PeerProblem::Connection("it broke off before it said whether it serves".into())),
        }
    }
}

/// A try to open a connection. Those that wait for it hear of its end, however it ends.
struct OpenDial {
    lines: ChannelLines,
    to: LineTarget,
    outcome: Option<Result<Line, DialFailure>>,
}

impl OpenDial {
    async fn run(&mut self) {
        let dialled = tokio::time::timeout(DIAL_LIMIT, self.lines.dial(&self.to.url)).await;
        if let Ok(dialled) = dialled {
            self.outcome = Some(dialled);
        }
    }
}

impl Drop for OpenDial {
    fn drop(&mut self) {
        let Some(outcome) = self.outcome.take() else { return };
        let failed = self.lines.end_dial(&self.to, outcome);
        self.lines.dialled.send_replace(DialEnd { to: self.to.clone(), failed });
    }
}

enum LinePlace {
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
    _prover: SendStream<Bytes>,
    /// In a mutex, as it is shared.
    _body: Mutex<net::Incoming>,
}

impl fmt::Debug for ChannelLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelLines").finish_non_exhaustive()
    }
}
