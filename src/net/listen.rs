//! The node's own listener for replication.

use std::error::Error as StdError;
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
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Service, ServiceExt};

use crate::channel::{Binding, Channel, key_of};
use crate::descriptors::refill;
use crate::error::{Error, Result};
use crate::net::accept::accept;
use crate::net::{CONNECTION_WINDOW_BYTES, FRAME_MAX_BYTES, STREAM_WINDOW_BYTES, Tracked};
use crate::report::Condition;
use crate::threads::{aside, caught_task};

/// Connections at one time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 256;
/// A connection on which nothing is being answered for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may take to end by itself when the node stops.
const GRACE: Duration = Duration::from_secs(1);
/// Pause after the system refused to accept, for instance for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Streams of one connection; a replica uses one.
const STREAMS_MAX: u32 = 16;
/// What the first record of TLS begins with.
const TLS_HANDSHAKE: u8 = 22;
/// Largest head of a request, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;

/// A bound socket that is not served yet.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) async fn bind(address: SocketAddr) -> Result<Listener> {
        let named = format!("tcp {address}");
        let socket = TcpListener::bind(address).await.map_err(Error::io("bind", &named))?;
        let address = socket.local_addr().map_err(Error::io("bind", &named))?;
        Ok(Listener { socket, address })
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
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepting = self.accept_all((&channel, &service), &tracker, &stop, &room);
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
        room: &Arc<Semaphore>,
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
                (accept(&self.socket).await, place)
            };
            let (accepted, place) = tokio::select! {
                accepted = accepted => accepted,
                () = stop.cancelled() => return,
            };
            match accepted {
                Ok((io, _)) => {
                    let (channel, service) = (channel.clone(), service.clone());
                    let connection = serve_one(io, channel, service, tracker.clone(), stop.clone());
                    tracker.spawn(async move {
                        connection.await;
                        refill();
                        drop(place);
                    });
                }
                Err(error) => {
                    // The error stays for a while; a loop without a pause would take a whole core.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    Condition::NotAccepted { address: self.address, error: &error }.say();
                }
            }
        }
    }
}

/// Serves a connection that was accepted: TLS, or HTTP at once.
async fn serve_one<M, S, B>(
    io: TcpStream,
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
    let mut first = [0];
    let peeked = tokio::select! {
        peeked = tokio::time::timeout(IDLE_TIMEOUT, io.peek(&mut first)) => peeked,
        () = stop.cancelled() => return,
    };
    match peeked {
        Ok(Ok(1)) if first == [TLS_HANDSHAKE] => serve_private(io, channel, service, tracker, stop).await,
        Ok(Ok(1)) => serve_http(io, service(None), tracker, stop).await,
        _ => {}
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
            tokio::select! {
                () = serve_http(io, service(Some(binding)), tracker, stop) => {}
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
async fn serve_http<I, S, B>(io: I, service: S, tracker: TaskTracker, stop: CancellationToken)
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    let answering = Arc::new(AtomicUsize::new(0));
    let counter = answering.clone();
    let service = service.map_request(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Answering::new(counter.clone()));
        request
    });
    let builder = builder(tracker);
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
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    // A connection that does not end in time is cut off: shutdown must not depend on peers.
    let _ = tokio::time::timeout(GRACE, connection).await;
}

fn builder(tracker: TaskTracker) -> auto::Builder<Tracked> {
    let mut builder = auto::Builder::new(Tracked(tracker));
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).keep_alive(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_MAX_BYTES)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_MAX_BYTES);
    builder
}

/// A request that is being answered, for as long as what works on that keeps this. An answer that
/// is only still to be sent counts for nothing: a peer could leave it untaken for ever.
#[derive(Clone)]
pub(crate) struct Answering(#[expect(dead_code, reason = "it is there to be dropped")] Arc<Counted>);

struct Counted(Arc<AtomicUsize>);

impl Answering {
    fn new(counter: Arc<AtomicUsize>) -> Answering {
        counter.fetch_add(1, Ordering::Relaxed);
        Answering(Arc::new(Counted(counter)))
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
        tracker.spawn(serve_http(theirs, service, tracker.clone(), stop.clone()));
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
