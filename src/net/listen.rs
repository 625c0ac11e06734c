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
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::{Service, ServiceExt};

use crate::error::{Error, Result};
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
/// Largest head of a request, in bytes.
const HEAD_MAX_BYTES: u32 = 16 * 1024;

/// A bound socket that is not served yet.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Binds. Without a secret only a loopback address is accepted.
    ///
    /// # Errors
    /// [`Error::Config`] for an address that others could reach when there is no secret;
    /// [`Error::Io`].
    pub(crate) async fn bind(address: SocketAddr, has_secret: bool) -> Result<Listener> {
        if !has_secret && !address.ip().to_canonical().is_loopback() {
            return Err(Error::Config(format!(
                "listening on {address} needs a secret: without one only a loopback address is accepted"
            )));
        }
        let named = format!("tcp {address}");
        let socket = TcpListener::bind(address).await.map_err(Error::io("bind", &named))?;
        let address = socket.local_addr().map_err(Error::io("bind", &named))?;
        Ok(Listener { socket, address })
    }

    /// The address, with the port that the system chose.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts and serves until `stop`; the connections' tasks are the tracker's.
    pub(crate) async fn serve<S, B>(self, service: S, tracker: TaskTracker, stop: CancellationToken)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepting = self.accept_all(&service, &tracker, &stop, &room);
            match caught_task("the listener", accepting).await {
                Ok(()) => return,
                Err(error) => aside(|| Condition::ListenerPanicked { error: &error }.say()),
            }
        }
    }

    async fn accept_all<S, B>(
        &self,
        service: &S,
        tracker: &TaskTracker,
        stop: &CancellationToken,
        room: &Arc<Semaphore>,
    ) where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<Box<dyn StdError + Send + Sync>>,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn StdError + Send + Sync>>,
    {
        loop {
            let accepted = async {
                let place = room.clone().acquire_owned().await;
                (self.socket.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                accepted = accepted => accepted,
                () = stop.cancelled() => return,
            };
            match accepted {
                Ok((io, _)) => {
                    let connection = serve_one(io, service.clone(), tracker.clone(), stop.clone());
                    tracker.spawn(async move {
                        connection.await;
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

async fn serve_one<S, B>(io: TcpStream, service: S, tracker: TaskTracker, stop: CancellationToken)
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn StdError + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    // A socket that was closed already says so again when it is read.
    let _ = io.set_nodelay(true);
    let answering = Arc::new(AtomicUsize::new(0));
    let counter = answering.clone();
    let service = service.map_response(move |response: Response<B>| {
        let answer = Answering::new(counter.clone());
        response.map(|body| {
            body.map_frame(move |frame| {
                let _lives_as_long_as_the_body = &answer;
                frame
            })
        })
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

/// Counts the answers that are under way on a connection.
struct Answering(Arc<AtomicUsize>);

impl Answering {
    fn new(counter: Arc<AtomicUsize>) -> Answering {
        counter.fetch_add(1, Ordering::Relaxed);
        Answering(counter)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_secret_only_loopback_is_bound() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "[::ffff:192.0.2.1]:0"] {
            let error = Listener::bind(address.parse().unwrap(), false).await.unwrap_err();
            assert!(matches!(error, Error::Config(_)), "{address}: {error}");
        }
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), false).await.unwrap();
        assert_ne!(listener.address().port(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_connects_and_asks_nothing_is_hung_up_on() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), true).await.unwrap();
        let address = listener.address();
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = tower::service_fn(|_| async {
            Ok::<_, std::convert::Infallible>(Response::new(http_body_util::Empty::<Bytes>::new()))
        });
        tracker.spawn(listener.serve(service, tracker.clone(), stop.clone()));
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
}
