//! What a peer has against this node's certificate comes after the handshake, with the first bytes
//! that are read. HTTP/2 would make little of it.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::channel::Channel;
use crate::error::PeerProblem;
use crate::lock::lock;

/// A connection in TLS that keeps what its errors say of the peer.
pub(super) struct Heeded<I> {
    pub(super) io: I,
    pub(super) channel: Channel,
    pub(super) problem: Arc<Mutex<Option<PeerProblem>>>,
}

impl<I: AsyncRead + Unpin> Heeded<I> {
    fn note(&self, error: &io::Error) {
        if let Some(problem) = self.channel.problem(error) {
            *lock(&self.problem) = Some(problem);
        }
    }

    /// A peer that closes the connection said why before that.
    fn note_last_words(&mut self, cx: &mut Context<'_>) {
        let mut bytes = [0; 1];
        if let Poll::Ready(Err(error)) = Pin::new(&mut self.io).poll_read(cx, &mut ReadBuf::new(&mut bytes)) {
            self.note(&error);
        }
    }

    fn written<T>(&mut self, cx: &mut Context<'_>, written: io::Result<T>) -> Poll<io::Result<T>> {
        if written.is_err() {
            self.note_last_words(cx);
        }
        Poll::Ready(written)
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Heeded<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        if let Err(error) = &read {
            self.note(error);
        }
        Poll::Ready(read)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Heeded<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        self.written(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.io).poll_flush(cx));
        self.written(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        self.written(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
