//! The two directions of one HTTP exchange as one connection.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

use crate::net::{Heard, Incoming};

/// Pieces that wait to be taken by the HTTP connection, ...
const PIECES_MAX: usize = 8;
/// ... and the most bytes of one.
const PIECE_MAX_BYTES: usize = 64 * 1024;

/// What comes in a body is read, and what is written goes into another.
pub(crate) struct Pipe {
    incoming: Incoming,
    /// What came and was not read yet.
    rest: Bytes,
    outgoing: PollSender<Bytes>,
    /// Where it is noted that something came.
    heard: Option<Arc<Heard>>,
}

/// The body that a [`Pipe`] writes.
#[derive(Debug)]
pub(crate) struct PipeBody(mpsc::Receiver<Bytes>);

impl PipeBody {
    /// A body, and where its pieces go in.
    pub(crate) fn new(pieces: usize) -> (mpsc::Sender<Bytes>, PipeBody) {
        let (sender, receiver) = mpsc::channel(pieces);
        (sender, PipeBody(receiver))
    }

    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        self.0.poll_recv(cx)
    }
}

impl Body for PipeBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.poll_next(cx).map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
    }
}

impl Pipe {
    pub(crate) fn new(incoming: Incoming, outgoing: mpsc::Sender<Bytes>) -> Pipe {
        Pipe { incoming, rest: Bytes::new(), outgoing: PollSender::new(outgoing), heard: None }
    }

    /// The same, which notes what comes.
    pub(super) fn heard_by(self, heard: &Arc<Heard>) -> Pipe {
        heard.note_inside();
        Pipe { heard: Some(heard.clone()), ..self }
    }

    /// The same, and the body that is written.
    pub(crate) fn answering(incoming: Incoming) -> (Pipe, PipeBody) {
        let (sender, body) = PipeBody::new(PIECES_MAX);
        (Pipe::new(incoming, sender), body)
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            match ready!(self.incoming.poll_next(cx)) {
                Some(bytes) => self.rest = bytes?,
                None => return Poll::Ready(Ok(())),
            }
            if let Some(heard) = &self.heard {
                heard.note_inside();
            }
        }
        let count = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    // TLS that fails has one try to write what is left, the alert last.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let gone = || io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.outgoing.poll_reserve(cx)).map_err(|_| gone())?;
        let bytes: usize = bufs.iter().map(|buf| buf.len()).sum();
        let mut piece = Vec::with_capacity(bytes.min(PIECE_MAX_BYTES));
        for buf in bufs {
            let room = PIECE_MAX_BYTES - piece.len();
            piece.extend_from_slice(&buf[..buf.len().min(room)]);
        }
        let count = piece.len();
        self.outgoing.send_item(piece.into()).map_err(|_| gone())?;
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The HTTP connection takes it as soon as it may.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outgoing.close();
        Poll::Ready(Ok(()))
    }
}
