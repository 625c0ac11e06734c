//! A connection as it is watched from below HTTP and TLS.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::descriptors::Refills;
use crate::lock::lock;
use crate::net::Heard;

/// First bytes of a peer that are kept to tell what it speaks.
const FIRST_BYTES: usize = 16;

/// A connection that remembers its first bytes, notes when some come, and can be cut from outside:
/// hyper's own tasks end with it.
pub(super) struct WatchedStream<I> {
    pub(super) io: I,
    pub(super) first: Arc<Mutex<Vec<u8>>>,
    pub(super) heard: Arc<Heard>,
    pub(super) cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// After the connection itself.
    pub(super) _refills: Refills,
}

impl<I: AsyncRead + Unpin> AsyncRead for WatchedStream<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        let came = buf.filled().len() - before;
        if read.is_ready() && came > 0 {
            self.heard.note(came);
            let mut first = lock(&self.first);
            let missing = FIRST_BYTES.saturating_sub(first.len());
            first.extend(buf.filled()[before..].iter().take(missing));
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for WatchedStream<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
