//! Dial and listen: the only place where sockets are opened.

mod accept;
mod dial;
mod heeded;
#[cfg(any(feature = "etcd", feature = "object-store"))]
mod https;
mod listen;
mod pipe;
mod places;
mod prompt;
#[cfg(not(feature = "tls"))]
#[path = "net/no_server_tls.rs"]
mod server_tls;
#[cfg(feature = "tls")]
mod server_tls;
mod url;
mod watched;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::Body;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

#[cfg(test)]
pub(crate) use dial::open_on;
pub(crate) use dial::{OpenResponse, PrivateConnection, RequestBody, Tunnel, Way, open, open_for_forwards};
#[cfg(any(feature = "etcd", feature = "object-store"))]
pub(crate) use https::{HttpsClient, HttpsError, read_body};
pub(crate) use listen::{Answering, Listener, serve_private};
pub(crate) use pipe::{Pipe, PipeBody};
pub(crate) use places::{CameFrom, DoorGuest, DoorLimits, DoorPlace, DoorPlaces, Guarded};
pub(crate) use server_tls::{Pem, ServerTls, was_refused};
pub(crate) use url::{Endpoint, Scheme};

/// HTTP/2 flow control of one stream, in bytes: what may be under way in one direction. 8 MiB keep
/// a link of 1 GB/s with 8 ms of delay busy.
pub(crate) const STREAM_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// The same for a connection.
pub(crate) const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// Largest HTTP/2 frame, in bytes. A reader sees what is in a frame when all of it has come, which
/// takes some seconds on a slow link.
pub(crate) const FRAME_MAX_BYTES: u32 = 64 * 1024;

const _: () = assert!(CONNECTION_WINDOW_BYTES >= STREAM_WINDOW_BYTES);

/// Requests of the application on one connection, at one time.
pub(crate) const FORWARDS_MAX: u32 = 64;
/// Flow control of one of them, in bytes: 2.5 MB/s on a link with 100 ms there and back.
pub(crate) const FORWARD_WINDOW_BYTES: u32 = 256 * 1024;
/// The same for their connection. All of them that stand still together leave room for another.
pub(crate) const FORWARDS_WINDOW_BYTES: u32 = (FORWARDS_MAX + 4) * FORWARD_WINDOW_BYTES;
/// The largest head of one, and of its response, in bytes. HTTP/2 counts 32 bytes more for each
/// header.
pub(crate) const FORWARD_HEAD_MAX_BYTES: u32 = 512 * 1024;

/// A connection's bytes, as they are before or after TLS.
pub(crate) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// What has come on a connection, whatever it was: a link that is slow is not silent. The node
/// sends no HTTP/2 pings to find out. Their answers would wait for all that a full link has still
/// to carry.
#[derive(Debug)]
pub(crate) struct Heard {
    since: Instant,
    /// Microseconds since then, when the last bytes came.
    last: AtomicU64,
    /// The same, since when a reader waits for more; [`NOBODY`] if none does.
    awaited: AtomicU64,
    bytes: AtomicU64,
    /// Microseconds since then, when the last bytes came of a channel that is inside of this
    /// connection; [`NOBODY`] if none is.
    inside: AtomicU64,
}

/// A connection that lives, and in which the channel inside of it has stood still for so long, is
/// silent: what is between two nodes may keep it alive by itself.
const INSIDE_SILENCE_MAX: Duration = Duration::from_secs(60);

/// While what came is still being dealt with, no more may be let come.
const NOBODY: u64 = u64::MAX;

impl Heard {
    pub(crate) fn new() -> Heard {
        let (last, awaited, bytes) = (AtomicU64::new(0), AtomicU64::new(NOBODY), AtomicU64::new(0));
        Heard { since: Instant::now(), last, awaited, bytes, inside: AtomicU64::new(NOBODY) }
    }

    pub(crate) fn note(&self, bytes: usize) {
        self.last.store(self.micros(), Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Something came of the channel inside of it.
    fn note_inside(&self) {
        self.inside.store(self.micros(), Ordering::Relaxed);
    }

    /// From now on a reader waits for more, or not.
    pub(crate) fn wait(&self, yes: bool) {
        self.awaited.store(if yes { self.micros() } else { NOBODY }, Ordering::Relaxed);
    }

    /// For how long nothing has come, although a reader waits.
    pub(crate) fn silence(&self) -> Duration {
        let (last, awaited) = (self.last.load(Ordering::Relaxed), self.awaited.load(Ordering::Relaxed));
        let since = |when: u64| Duration::from_micros(self.micros().saturating_sub(when.max(awaited)));
        let inside = since(self.inside.load(Ordering::Relaxed));
        if inside > INSIDE_SILENCE_MAX { inside } else { since(last) }
    }

    fn micros(&self) -> u64 {
        self.since.elapsed().as_micros() as u64
    }

    /// How many bytes have come.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// A body's bytes, as they arrive.
pub(crate) struct Incoming(UnsyncBoxBody<Bytes, io::Error>);

impl Incoming {
    pub(crate) fn new<B>(body: B) -> Incoming
    where
        B: Body + Send + 'static,
    {
        let body = body.map_frame(|frame| frame.map_data(|mut d| d.copy_to_bytes(d.remaining())));
        Incoming(body.map_err(|_| io::Error::other("the body broke off")).boxed_unsync())
    }

    /// The next bytes; `None` at the end of the body.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn next(&mut self) -> Option<io::Result<Bytes>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        loop {
            match ready!(Pin::new(&mut self.0).poll_frame(cx)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data()
                        && !bytes.is_empty()
                    {
                        return Poll::Ready(Some(Ok(bytes)));
                    }
                }
            }
        }
    }
}

/// Runs hyper's tasks where shutdown waits for them.
#[derive(Clone, Debug)]
pub(crate) struct Tracked(pub(crate) TaskTracker);

impl<F> hyper::rt::Executor<F> for Tracked
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

/// How many descriptors a connection to a host takes while it is made. The look-up of a name takes
/// some.
fn dial_descriptors(host: &str) -> usize {
    if host.parse::<std::net::IpAddr>().is_ok() { 1 } else { 3 }
}

/// An error with all its sources in one line: hyper's own texts alone say little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}
