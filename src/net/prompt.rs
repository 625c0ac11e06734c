//! A connection that acknowledges at once what has come.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A server that does not set TCP_NODELAY, such as one that an application runs, holds each small
/// piece back until the one before is acknowledged. The kernel may wait with that for 40 ms.
pub(super) struct Prompt {
    io: TcpStream,
    /// A node's own listener sets it, and needs no word of each piece.
    at_once: bool,
}

impl Prompt {
    pub(super) fn new(io: TcpStream) -> Prompt {
        Prompt { io, at_once: true }
    }

    /// One to a node's own listener, that acknowledges by what it answers.
    pub(super) fn unhurried(io: TcpStream) -> Prompt {
        Prompt { io, at_once: false }
    }
}

impl AsyncRead for Prompt {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        #[cfg(target_os = "linux")]
        if self.at_once && read.is_ready() && buf.filled().len() > before {
            // It holds until the kernel thinks otherwise, so it is said each time. Without it, it
            // is only slow.
            let _ = rustix::net::sockopt::set_tcp_quickack(&self.io, true);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = before;
        read
    }
}

impl AsyncWrite for Prompt {
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
