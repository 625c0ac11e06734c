//! The node's own listener for replication.

use std::error::Error as StdError;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Service, ServiceExt};

use crate::channel::{Binding, Channel, key_of};
use crate::context::Seldom;
use crate::descriptors::refill;
use crate::error::{Error, Result};
use crate::net::accept::accept;
use crate::net::places::{CameFrom, DoorLimits, DoorPlace, DoorPlaces, Guarded, TLS_HANDSHAKE};
use crate::net::{
    FORWARD_HEAD_MAX_BYTES, FORWARD_WINDOW_BYTES, FORWARDS_MAX, FORWARDS_WINDOW_BYTES, FRAME_MAX_BYTES,
    Tracked,
};
use crate::report::Condition;
use crate::threads::{aside, caught_task};

/// Connections at one time.
const LIMITS: DoorLimits =
    DoorLimits { unproved: 256, of_source: 64, proved: 256, followers: 128, forwards: 512 };
/// The same with those that were cut and have not ended yet; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = LIMITS.unproved + LIMITS.proved + LIMITS.forwards + 64;
/// Longest wait for the first byte: who dials speaks at once.
const SPEAK_LIMIT: Duration = Duration::from_secs(2);
/// A connection on which nothing is being answered for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may take to end by itself when the node stops.
const GRACE: Duration = Duration::from_secs(1);
/// And when what is served on it ends it: what is under way may come to its end.
const END_LIMIT: Duration = Duration::from_secs(9);
/// Pause after the system refused to accept, for instance for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Streams of one connection; a replica uses one.
const STREAMS_MAX: u32 = 16;
/// Largest head of a request, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;
/// Flow control of a stream, in bytes: what may have come of a request's body and not been read.
/// Little comes to a node that is dialled, but for the pages that it asks for.
const RECEIVED_STREAM_BYTES: u32 = 1024 * 1024;
/// The same for a connection.
const RECEIVED_CONNECTION_BYTES: u32 = 2 * RECEIVED_STREAM_BYTES;
/// Streams that a peer took back before they were looked at. With one more the connection ends.
const TAKEN_BACK_MAX: usize = 20;
/// Streams that this side broke off for what came on them. With one more the connection ends.
const BROKEN_OFF_MAX: usize = 64;

/// Both of a connection on which an application's requests come.
const FORWARDS_TAKEN_BACK_MAX: usize = 1024;

/// How long a listener waits for an address that is in use. The process before this one may be
/// about to end. And a process that another thread starts has all sockets of this one until it runs
/// its own program, also one that was closed meanwhile.
const IN_USE_MAX: Duration = Duration::from_secs(1);
/// How long it waits until it tries again.
const IN_USE_PAUSE: Duration = Duration::from_millis(20);

/// A bound socket that is not served yet.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
    /// Strangers have all places.
    crowded: Seldom,
}

impl Listener {
    /// Binds. An address that is in use is waited for, up to [`IN_USE_MAX`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) async fn bind(address: SocketAddr) -> Result<Listener> {
        let (named, begun) = (format!("tcp {address}"), Instant::now());
        let bound = loop {
            match TcpListener::bind(address).await {
                Err(error) if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < IN_USE_MAX => {
                    tokio::time::sleep(IN_USE_PAUSE).await;
                }
                bound => break bound,
            }
        };
        let socket = bound.map_err(Error::io("bind", &named))?;
        let address = socket.local_addr().map_err(Error::io("bind", &named))?;
        Ok(Listener { socket, address, crowded: Seldom::default() })
    }

    /// The address, with the port that the system chose.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts and serves until `stop`; the connections' tasks are the tracker's. `service` makes
    /// what is served on a connection: inside a private channel, or without one.
    pub(crate) async fn serve<M, S, B>(
        self,
        channel: Channel,
        service: M,
        tracker: TaskTracker,
        stop: CancellationToken,
    ) where
        M: Fn(Option<Binding>) -> S + Clone + Send + Sync + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let (places, room) = (DoorPlaces::new(LIMITS), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
        loop {
            let accepting = self.accept_all((&channel, &service), &tracker, &stop, (&places, &room));
            match caught_task("the listener", accepting).await {
                Ok(()) => return,
                Err(error) => aside(|| Condition::ListenerPanicked { error: &error }.say()),
            }
        }
    }

    async fn accept_all<M, S, B>(
        &self,
        (channel, service): (&Channel, &M),
        tracker: &TaskTracker,
        stop: &CancellationToken,
        (places, room): (&Arc<DoorPlaces>, &Arc<Semaphore>),
    ) where
        M: Fn(Option<Binding>) -> S + Clone + Send + Sync + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        loop {
            let accepted = async {
                let place = room.clone().acquire_owned().await;
                // A stranger's may be the descriptor that is missing.
                (accept(&self.socket, || places.give_way()).await, place)
            };
            let (accepted, held) = tokio::select! {
                accepted = accepted => accepted,
                () = stop.cancelled() => return,
            };
            match accepted {
                Ok((io, from)) => {
                    let Some(place) = self.place(places, from) else { continue };
                    let (channel, service) = (channel.clone(), service.clone());
                    let connection = serve_one((io, place), channel, service, tracker.clone(), stop.clone());
                    tracker.spawn(async move {
                        connection.await;
                        refill();
                        drop(held);
                    });
                }
                Err(error) => {
                    // A stranger's may be the descriptor that is missing.
                    places.give_way();
                    // The error stays for a while; a loop without a pause would take a whole core.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    Condition::NotAccepted { address: self.address, error: &error }.say();
                }
            }
        }
    }
}

impl Listener {
    /// A place for a connection that was accepted.
    fn place(&self, places: &Arc<DoorPlaces>, from: SocketAddr) -> Option<DoorPlace> {
        let (place, gone) = places.enter(CameFrom::of(from.ip()))?;
        if let Some(gone) = gone
            && let Some(times) = self.crowded.happened()
        {
            let address = self.address;
            aside(|| Condition::ListenerCrowded { address, from: &gone, times }.say());
        }
        Some(place)
    }
}

/// Serves a connection that was accepted, until it has to go.
async fn serve_one<M, S, B>(
    (io, place): (TcpStream, DoorPlace),
    channel: Channel,
    service: M,
    tracker: TaskTracker,
    stop: CancellationToken,
) where
    M: Fn(Option<Binding>) -> S,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    // A socket that was closed already says so again when it is read.
    let _ = io.set_nodelay(true);
    let of = place.clone();
    let service = move |inside| {
        let place = of.clone();
        service(inside).map_request(move |mut request: Request<Incoming>| {
            place.spoke();
            request.extensions_mut().insert(place.clone());
            request
        })
    };
    tokio::select! {
        () = serve_by_first(io, &place, channel, service, tracker, stop) => {}
        () = place.lost() => tracing::debug!("a connection on which nothing was proved is cut"),
    }
}

/// Serves a connection by its first byte: TLS, or HTTP at once.
async fn serve_by_first<M, S, B>(
    io: TcpStream,
    place: &DoorPlace,
    channel: Channel,
    service: M,
    tracker: TaskTracker,
    stop: CancellationToken,
) where
    M: Fn(Option<Binding>) -> S,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let mut first = [0];
    let peeked = tokio::select! {
        peeked = tokio::time::timeout(SPEAK_LIMIT, io.peek(&mut first)) => peeked,
        () = stop.cancelled() => return,
    };
    if !matches!(peeked, Ok(Ok(1))) {
        return;
    }
    let io = Guarded::new(io, place);
    if first == [TLS_HANDSHAKE] {
        serve_private(io, channel, service, tracker, stop).await;
    } else {
        serve_http(io, service(None), builder(tracker, false), stop).await;
    }
}

/// Serves a connection on which a peer begins TLS.
pub(crate) async fn serve_private<I, M, S, B>(
    io: I,
    channel: Channel,
    service: M,
    tracker: TaskTracker,
    stop: CancellationToken,
) where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    M: Fn(Option<Binding>) -> S,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(IDLE_TIMEOUT, channel.accept(io)) => accepted,
        () = stop.cancelled() => return,
    };
    match accepted {
        Ok(Ok((io, binding))) => {
            let builder = builder(tracker, binding.is_for_forwards());
            tokio::select! {
                () = serve_http(io, service(Some(binding)), builder, stop) => {}
                () = channel.shut_out(binding.client()) => {
                    tracing::debug!("the other side's key was shut out: its connection is cut");
                }
            }
        }
        Ok(Err(error)) => match key_of(&error) {
            Some(key) if channel.is_news(key) => aside(|| Condition::PeerShutOut { key }.say()),
            _ => {
                tracing::debug!(%error, "a peer's TLS failed");
                // Strangers can do that as often as they like.
                if let Some(problem) = channel.problem(&error)
                    && let Some(times) = channel.refused()
                {
                    aside(|| Condition::CertificateRefused { problem: &problem, times }.say());
                }
            }
        },
        Err(_) => tracing::debug!("a peer's TLS took too long"),
    }
}

/// Serves HTTP on a connection.
async fn serve_http<I, S, B>(io: I, service: S, builder: auto::Builder<Tracked>, stop: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let answering = Arc::new(AtomicUsize::new(0));
    let (counter, end) = (answering.clone(), stop.child_token());
    let ends = end.clone();
    let service = service.map_request(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Answering::new(counter.clone(), ends.clone()));
        request
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(service)));
    let idle = async {
        loop {
            tokio::time::sleep(IDLE_TIMEOUT).await;
            if answering.load(Ordering::Relaxed) == 0 {
                break;
            }
        }
    };
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a peer's connection ended");
            }
            return;
        }
        () = idle => return,
        () = end.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    // A connection that does not end in time is cut off: shutdown must not depend on peers.
    let late = async {
        let _ = tokio::time::timeout(END_LIMIT, stop.cancelled()).await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        // How it ends is no matter any more.
        _ = connection => {}
        () = late => {}
    }
}

/// HTTP for exchanges between nodes, or for an application's requests.
fn builder(tracker: TaskTracker, forwards: bool) -> auto::Builder<Tracked> {
    let (stream_window, connection_window, streams) = match forwards {
        false => (RECEIVED_STREAM_BYTES, RECEIVED_CONNECTION_BYTES, STREAMS_MAX),
        // One more for the exchange that the connection begins with.
        true => (FORWARD_WINDOW_BYTES, FORWARDS_WINDOW_BYTES, FORWARDS_MAX + 1),
    };
    // A member takes back what its clients do, as often as they like.
    let (taken_back, broken_off) = if forwards {
        (FORWARDS_TAKEN_BACK_MAX, FORWARDS_TAKEN_BACK_MAX)
    } else {
        (TAKEN_BACK_MAX, BROKEN_OFF_MAX)
    };
    let mut builder = auto::Builder::new(Tracked(tracker));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT)
        .keep_alive(false)
        .max_buf_size(HEAD_MAX_BYTES as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(FRAME_MAX_BYTES)
        .max_concurrent_streams(streams)
        .max_header_list_size(if forwards { FORWARD_HEAD_MAX_BYTES } else { HEAD_MAX_BYTES })
        .max_pending_accept_reset_streams(taken_back)
        .max_local_error_reset_streams(broken_off);
    if forwards {
        // For what is upgraded, such as WebSockets.
        builder.http2().enable_connect_protocol();
    }
    builder
}

/// A request that is being answered, for as long as what works on that keeps this. An answer that
/// is only still to be sent counts for nothing: a peer could leave it untaken for ever.
#[derive(Clone)]
pub(crate) struct Answering {
    _counted: Arc<Counted>,
    end: CancellationToken,
}

struct Counted(Arc<AtomicUsize>);

impl Answering {
    fn new(counter: Arc<AtomicUsize>, end: CancellationToken) -> Answering {
        counter.fetch_add(1, Ordering::Relaxed);
        Answering { _counted: Arc::new(Counted(counter)), end }
    }

    /// Ends its connection. What is under way on it has a moment.
    pub(crate) fn end_connection(&self) {
        self.end.cancel();
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_in_use_is_waited_for_and_not_for_ever() {
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut waits = pin!(Listener::bind(held.local_addr().unwrap()));
        assert!(tokio::time::timeout(2 * IN_USE_PAUSE, &mut waits).await.is_err());
        drop(held);
        waits.await.unwrap();
        tokio::time::pause();
        let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let error = Listener::bind(address).await.unwrap_err();
        assert!(
            error.to_string().starts_with(&format!("bind tcp {address}: Address already in use")),
            "{error}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_connects_and_asks_nothing_is_hung_up_on() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.address();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = |_| {
            tower::service_fn(|_| async {
                Ok::<_, std::convert::Infallible>(Response::new(http_body_util::Empty::<Bytes>::new()))
            })
        };
        tracker.spawn(listener.serve(Channel::open(), service, tracker.clone(), stop.clone()));
        for bytes in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nhost:"] {
            let mut io = TcpStream::connect(address).await.unwrap();
            io.write_all(bytes).await.unwrap();
            // Ends at all, by an end or a reset: the clock runs ahead while nothing happens.
            let _ = io.read_to_end(&mut Vec::new()).await;
        }
        stop.cancel();
        tracker.close();
        tracker.wait().await;
    }

    /// A peer that takes nothing of an answer holds its connection for as long as it is worked on.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_taken_keeps_no_connection_once_it_is_made() {
        const WORK: Duration = Duration::from_secs(100);
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = tower::service_fn(|request: Request<Incoming>| async move {
            let answering = request.extensions().get::<Answering>().cloned().unwrap();
            tokio::spawn(async move {
                tokio::time::sleep(WORK).await;
                drop(answering);
            });
            let body = http_body_util::Full::new(Bytes::from_static(&[0; 1000]));
            Ok::<_, std::convert::Infallible>(Response::new(body))
        });
        let builder = builder(tracker.clone(), false);
        tracker.spawn(serve_http(theirs, service, builder, stop.clone()));
        let mut builder = h2::client::Builder::new();
        let (mut client, connection) =
            builder.initial_window_size(0).handshake::<_, Bytes>(ours).await.unwrap();
        let began = tokio::time::Instant::now();
        let held = tokio::spawn(connection);
        let request = Request::post("http://node/").body(()).unwrap();
        let (response, _) = client.send_request(request, true).unwrap();
        let response = response.await.unwrap();
        let _ = tokio::time::timeout(2 * WORK, held).await.expect("it ends").unwrap();
        assert!(began.elapsed() >= WORK && began.elapsed() < WORK + 3 * IDLE_TIMEOUT);
        drop(response);
        stop.cancel();
        tracker.close();
        tracker.wait().await;
    }
}
