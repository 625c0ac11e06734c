// A server for an application, with the limits that `axum::serve` lacks. It needs nothing else of
// this example: copy it. `axum::serve` waits for ever for a client that connects and says nothing,
// or half of a request's head.

use std::convert::Infallible;
use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{ConnectInfo, Request};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// Connections at one time; more wait in the kernel's queue. Keep it well below `ulimit -n`: the
/// database needs descriptors, too.
const CONNECTIONS_MAX: usize = 512;
/// A client that connects has this long for its first request's head.
const FIRST_LIMIT: Duration = Duration::from_secs(5);
/// After an answer it has this long for the next one's.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// What is still to be sent on a connection that was idle has this long.
const LAST_LIMIT: Duration = Duration::from_secs(30);
/// Largest head of a request, in bytes.
const HEAD_MAX_BYTES: usize = 32 * 1024;
/// Pause after the system refused to accept, for instance for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `end` returns. From then on it takes no more connections, and returns when all that
/// were there have ended. That may take for ever: whoever waits has a limit.
#[allow(unreachable_pub, reason = "where it is copied to, it may be a library's")]
pub async fn serve(listener: TcpListener, app: Router, end: impl Future<Output = ()>) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_LIMIT).max_buf_size(HEAD_MAX_BYTES);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEAD_MAX_BYTES as u32);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (stop, connections) = (CancellationToken::new(), TaskTracker::new());
    let mut end = pin!(end);
    loop {
        let accepted = async {
            let place = room.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            accepted = accepted => accepted,
            () = &mut end => break,
        };
        match accepted {
            Ok((io, client)) => {
                let connection = serve_one(io, client, app.clone(), builder.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            // The client's, which has gone already.
            Err(error)
                if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset) => {}
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
    drop(listener);
    stop.cancel();
    connections.close();
    connections.wait().await;
}

async fn serve_one(
    io: TcpStream,
    client: SocketAddr,
    app: Router,
    builder: Builder<TokioExecutor>,
    stop: CancellationToken,
) {
    // A socket that was closed already says so again when it is read.
    let _ = io.set_nodelay(true);
    let activity = Arc::new(Activity::new());
    let begins = activity.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(client));
        let (answer, answering) = (app.clone().oneshot(request), Answering::begin(&begins));
        async move {
            let Ok(response) = answer.await;
            Ok::<_, Infallible>(response.map(|body| Answer { body, _answering: answering }))
        }
    });
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), service));
    tokio::select! {
        // What went wrong is the client's to know.
        _ = connection.as_mut() => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
        () = activity.idle() => {
            connection.as_mut().graceful_shutdown();
            // Nothing is still to be sent to a client that never asked.
            let last = if activity.doing().asked { LAST_LIMIT } else { Duration::ZERO };
            let _ = timeout(last, connection).await;
        }
    }
}

/// What a connection does.
struct Activity(Mutex<Doing>);

struct Doing {
    /// Requests that are being answered, until the last byte of the answer is handed on.
    answering: usize,
    asked: bool,
    /// When nothing is: until when the next one has to come.
    until: Instant,
}

impl Activity {
    fn new() -> Activity {
        Activity(Mutex::new(Doing { answering: 0, asked: false, until: Instant::now() + FIRST_LIMIT }))
    }

    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when no request has come for too long.
    async fn idle(&self) {
        loop {
            let until = {
                let doing = self.doing();
                if doing.answering > 0 { Instant::now() + IDLE_LIMIT } else { doing.until }
            };
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}

/// A request that is being answered, until this is dropped.
struct Answering(Arc<Activity>);

impl Answering {
    fn begin(activity: &Arc<Activity>) -> Answering {
        let mut doing = activity.doing();
        (doing.answering, doing.asked) = (doing.answering + 1, true);
        drop(doing);
        Answering(activity.clone())
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut doing = self.0.doing();
        doing.answering -= 1;
        doing.until = Instant::now() + IDLE_LIMIT;
    }
}

/// The body of an answer, which is over when hyper drops it.
struct Answer {
    body: Body,
    _answering: Answering,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
