//! Requests of the application on one HTTP/2 connection of the private channel.
//!
//! The head of a request and what is there of its body are handed over in one step, so that a small
//! request is one record of TLS, one write and one wake of the other side. A client library that
//! takes requests through a task of its own sends two.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection, ResponseFuture, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::rt::Executor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::net;
use crate::proxy::BoxError;
use crate::proxy::connect::Spawn;

/// What small frames of responses that are left untaken may cost beyond their bytes, in bytes. h2
/// closes a connection on which they cost more. Its own limit is 9 MB here: 35,000 events.
const SMALL_FRAMES_BYTES: usize = 64 * 1024 * 1024;

/// What an upgraded connection hands over at once, in bytes.
const PIECE_BYTES: usize = 32 * 1024;

/// A connection's end that requests go in at.
#[derive(Clone)]
pub(super) struct Exchanges {
    way: SendRequest<Bytes>,
    spawn: Spawn,
}

/// Why a request has no response.
#[derive(Debug, thiserror::Error)]
pub(super) enum ExchangeError {
    /// It was not put on the connection, which takes no more.
    #[error(transparent)]
    Closed(h2::Error),
    /// It is none that HTTP/2 can say.
    #[error(transparent)]
    Unsayable(h2::Error),
    /// It was, and the stream broke.
    #[error(transparent)]
    Broken(h2::Error),
}

/// Begins HTTP/2 on a connection. The second has to be polled, as [`Exchanges`] does nothing by
/// itself.
pub(super) async fn begin<I>(io: I, spawn: Spawn) -> Result<(Exchanges, Connection<I>), h2::Error>
where
    I: AsyncRead + AsyncWrite + Unpin,
{
    let (way, connection) = h2::client::Builder::new()
        .initial_window_size(net::FORWARD_WINDOW_BYTES)
        .initial_connection_window_size(net::FORWARDS_WINDOW_BYTES)
        .max_frame_size(net::FRAME_MAX_BYTES)
        .max_header_list_size(net::FORWARD_HEAD_MAX_BYTES)
        .max_send_buffer_size(net::FORWARD_WINDOW_BYTES as usize)
        .data_frame_budget(SMALL_FRAMES_BYTES)
        .enable_push(false)
        .handshake(io)
        .await?;
    Ok((Exchanges { way, spawn }, connection))
}

/// Pings a connection, and returns when one stays unanswered.
pub(super) async fn ping(mut pings: PingPong, interval: Duration, limit: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        match tokio::time::timeout(limit, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection says so itself.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return,
        }
    }
}

impl Exchanges {
    /// Puts the head of a request on the connection. Its body goes in at the second.
    pub(super) async fn open(
        &self,
        request: Request<()>,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), ExchangeError> {
        let mut way = self.way.clone();
        std::future::poll_fn(|cx| way.poll_ready(cx)).await.map_err(ExchangeError::Closed)?;
        way.send_request(request, ends).map_err(|error| match error.is_go_away() || error.is_io() {
            true => ExchangeError::Closed(error),
            false => ExchangeError::Unsayable(error),
        })
    }

    /// Sends a request and waits for the response's head. A body that is not there yet is sent
    /// beside it. CONNECT leaves both directions open for [`ExchangeBody::switch`].
    ///
    /// # Cancel safety
    /// Dropping the future resets the request's stream.
    pub(super) async fn send<B>(&self, request: Request<B>) -> Result<Response<ExchangeBody>, ExchangeError>
    where
        B: Body<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
    {
        let (mut parts, body) = request.into_parts();
        declare(&mut parts.headers, &parts.method, body.size_hint().exact());
        let switches = parts.method == Method::CONNECT;
        let ends = body.is_end_stream() && !switches;
        let (response, to) = self.open(Request::from_parts(parts, ()), ends).await?;
        let (mut rest, mut switch) = (None, None);
        if switches {
            switch = Some(to);
        } else if !ends {
            let mut upload = Upload { body, to, piece: None, begun: false };
            // Before anything else can run: the connection sends all of it together.
            let whole = std::future::poll_fn(|cx| Poll::Ready(upload.poll_send(cx).is_ready())).await;
            if !whole {
                let left = CancellationToken::new();
                rest = Some(left.clone().drop_guard());
                self.spawn.execute(async move {
                    let sent = std::future::poll_fn(|cx| upload.poll_send(cx));
                    left.run_until_cancelled(sent).await;
                });
            }
        }
        let response = response.await.map_err(ExchangeError::Broken)?;
        let switch = switch.filter(|_| response.status() == StatusCode::OK);
        Ok(response.map(|from| ExchangeBody { from, rest, switch, ended: false }))
    }
}

/// Says how long a body is, where that is known and was not said.
fn declare(headers: &mut HeaderMap, method: &Method, length: Option<u64>) {
    let usual = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
    if let Some(length) = length.filter(|length| *length > 0 || usual)
        && *method != Method::CONNECT
    {
        headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
}

/// A request's body on its way.
struct Upload<B> {
    body: B,
    to: SendStream<Bytes>,
    /// What waits for room, and whether it is the last.
    piece: Option<(Bytes, bool)>,
    /// Some of it was sent.
    begun: bool,
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Upload<B> {
    /// Ready when no more of it is to be sent, for whatever reason. The response says which.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.to.poll_reset(cx).is_ready() {
                return Poll::Ready(());
            }
            if let Some((piece, last)) = self.piece.take() {
                // A stream has no room before its head is on the connection. What is handed over
                // until then goes with it, as far as there is room by then.
                if self.begun && !piece.is_empty() && self.to.capacity() == 0 {
                    let room = self.to.poll_capacity(cx);
                    self.piece = Some((piece, last));
                    match ready!(room) {
                        Some(Ok(_)) => continue,
                        Some(Err(_)) | None => return Poll::Ready(()),
                    }
                }
                self.begun = true;
                if self.to.send_data(piece, last).is_err() || last {
                    return Poll::Ready(());
                }
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    // A server closes a connection on which a hundred of these came (h2).
                    Ok(piece) if piece.is_empty() && !self.body.is_end_stream() => {}
                    Ok(piece) => {
                        // Not for all of it: what is asked for is taken from the others.
                        self.to.reserve_capacity(usize::from(!piece.is_empty()));
                        self.piece = Some((piece, self.body.is_end_stream()));
                    }
                    Err(frame) => {
                        let Ok(trailers) = frame.into_trailers() else { continue };
                        self.to.reserve_capacity(0);
                        if self.to.send_trailers(trailers).is_err() {
                            self.to.send_reset(Reason::INTERNAL_ERROR);
                        }
                        return Poll::Ready(());
                    }
                },
                None => {
                    let _ = self.to.send_data(Bytes::new(), true);
                    return Poll::Ready(());
                }
                Some(Err(_)) => {
                    self.to.send_reset(Reason::INTERNAL_ERROR);
                    return Poll::Ready(());
                }
            }
        }
    }
}

/// A response's body as it comes. Dropping it before its end resets the stream.
pub(super) struct ExchangeBody {
    from: RecvStream,
    /// The request's body, of which a rest is being sent.
    rest: Option<DropGuard>,
    /// Where the other direction of an upgraded connection goes in.
    switch: Option<SendStream<Bytes>>,
    ended: bool,
}

impl ExchangeBody {
    /// One whose request's body is sent by who asks.
    pub(super) fn new(from: RecvStream) -> ExchangeBody {
        ExchangeBody { from, rest: None, switch: None, ended: false }
    }

    /// Both directions of a connection that was upgraded.
    pub(super) fn switch(mut self) -> Option<SwitchedStream> {
        let to = self.switch.take()?;
        Some(SwitchedStream { body: self, to, came: Bytes::new() })
    }

    /// Whether something has come that was not taken.
    pub(super) fn is_waiting(&mut self) -> bool {
        self.from.flow_control().used_capacity() > 0
    }

    /// The server may take its time for what it was sent.
    fn end(&mut self) {
        self.ended = true;
        if let Some(rest) = self.rest.take() {
            rest.disarm();
        }
    }
}

/// A server may let go of a body with the last bytes of it.
impl Drop for ExchangeBody {
    fn drop(&mut self) {
        if self.from.is_end_stream() {
            self.end();
        }
    }
}

/// The next bytes of a stream; their room is given back.
fn poll_bytes(from: &mut RecvStream, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
    let came = match ready!(from.poll_data(cx)) {
        Some(Ok(bytes)) => {
            // It fails only on a stream that has gone.
            let _ = from.flow_control().release_capacity(bytes.len());
            Some(Ok(bytes))
        }
        // A server may say so of a request that it has answered, and not read (RFC 9113, 8.1).
        Some(Err(error)) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => None,
        came => came,
    };
    Poll::Ready(came)
}

impl Body for ExchangeBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let came = match ready!(poll_bytes(&mut self.from, cx)) {
            Some(came) => Some(came.map(Frame::data)),
            None => match ready!(self.from.poll_trailers(cx)) {
                Ok(Some(trailers)) => Some(Ok(Frame::trailers(trailers))),
                Ok(None) => None,
                Err(error) if error.is_reset() && error.reason() == Some(Reason::NO_ERROR) => None,
                Err(error) => Some(Err(error)),
            },
        };
        match &came {
            Some(Ok(frame)) if frame.is_data() => {}
            // Its stream is gone, and so is the request's body.
            Some(Err(_)) => self.ended = true,
            Some(Ok(_)) | None => self.end(),
        }
        Poll::Ready(came)
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.from.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_end_stream() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}

/// Both directions of an upgraded connection.
pub(super) struct SwitchedStream {
    body: ExchangeBody,
    to: SendStream<Bytes>,
    came: Bytes,
}

impl AsyncRead for SwitchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.came.is_empty() {
            match ready!(poll_bytes(&mut self.body.from, cx)) {
                Some(came) => self.came = came.map_err(io::Error::other)?,
                None => return Poll::Ready(Ok(())),
            }
        }
        let most = self.came.len().min(buffer.remaining());
        buffer.put_slice(&self.came.split_to(most));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SwitchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wanted = bytes.len().min(PIECE_BYTES);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        self.to.reserve_capacity(wanted);
        while self.to.capacity() == 0 {
            match ready!(self.to.poll_capacity(cx)) {
                Some(room) => room.map_err(io::Error::other)?,
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            };
        }
        let most = wanted.min(self.to.capacity());
        let piece = Bytes::copy_from_slice(&bytes[..most]);
        self.to.send_data(piece, false).map_err(io::Error::other)?;
        Poll::Ready(Ok(most))
    }

    /// The connection's task sends what it has.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.to.send_data(Bytes::new(), true).map_err(io::Error::other))
    }
}

#[cfg(test)]
mod tests;
