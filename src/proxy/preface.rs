//! HTTP/2 by prior knowledge, to a server that may not speak it: nothing of a request goes out before the server has shown that it does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};

use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The client's preface begins with these bytes, and goes on with a SETTINGS frame (RFC 9113, 3.4).
const MAGIC_BYTES: usize = 24;
/// A frame's head: three bytes of length, one of type, ...
const FRAME_HEAD_BYTES: usize = 9;
const LENGTH_BYTES: usize = 3;
/// The type of the first frame of either side.
const SETTINGS: u8 = 4;

/// Whether a connection's server has shown that it speaks HTTP/2. Before that no request is on it.
#[derive(Clone, Debug)]
pub(super) struct Proof(Arc<AtomicBool>);

impl Proof {
    pub(super) fn is_missing(&self) -> bool {
        !self.0.load(Ordering::Acquire)
    }
}

/// A connection that fails when the server's first frame is not that of HTTP/2, and lets only the client's preface out before.
pub(super) struct Proven {
    stream: TcpStream,
    proof: Proof,
    /// None once the server has shown that it speaks HTTP/2, and where nobody asks.
    doubt: Option<Doubt>,
}

#[derive(Default)]
struct Doubt {
    /// How much went out, and the length of the SETTINGS frame as far as it did.
    written: usize,
    length: [u8; LENGTH_BYTES],
    /// How much came in, and the head of the first frame.
    read: usize,
    head: [u8; LENGTH_BYTES + 1],
    /// Who wants to write more.
    writer: Option<Waker>,
}

impl Proven {
    /// A connection; in doubt, if it is for HTTP/2.
    pub(super) fn new(stream: TcpStream, http2: bool) -> Proven {
        Proven { stream, proof: Proof(Arc::new(AtomicBool::new(!http2))), doubt: http2.then(Doubt::default) }
    }

    pub(super) fn proof(&self) -> Proof {
        self.proof.clone()
    }
}

/// For the pool of connections in HTTP/1.1.
impl Connection for Proven {
    fn connected(&self) -> Connected {
        self.stream.connected()
    }
}

/// What is said of a server that answered anything else, or closed.
fn no_http2() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the server does not speak HTTP/2")
}

impl Doubt {
    /// How much of the bytes may go out.
    fn allowed(&self, bytes: &[u8]) -> usize {
        let length = self.length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        // The length has to be known first.
        let end = match self.written < MAGIC_BYTES + LENGTH_BYTES {
            true => MAGIC_BYTES + LENGTH_BYTES,
            false => MAGIC_BYTES + FRAME_HEAD_BYTES + length,
        };
        bytes.len().min(end - self.written)
    }

    fn wrote(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(at) = self.written.checked_sub(MAGIC_BYTES).filter(|at| *at < LENGTH_BYTES) {
                self.length[at] = *byte;
            }
            self.written += 1;
        }
    }

    /// Whether what came is HTTP/2, if that is known by now.
    fn came(&mut self, bytes: &[u8]) -> Option<bool> {
        for byte in bytes {
            let Some(slot) = self.head.get_mut(self.read) else { break };
            *slot = *byte;
            self.read += 1;
        }
        (self.read == self.head.len() || bytes.is_empty()).then_some(self.head[LENGTH_BYTES] == SETTINGS)
    }
}

impl AsyncRead for Proven {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut this.stream).poll_read(cx, buffer));
        let Some(doubt) = &mut this.doubt else { return Poll::Ready(read) };
        // One that does not understand may just close, or reset what it has not read.
        match read.map_or(Some(false), |()| doubt.came(&buffer.filled()[before..])) {
            None => Poll::Ready(Ok(())),
            Some(true) => {
                this.proof.0.store(true, Ordering::Release);
                if let Some(writer) = this.doubt.take().and_then(|doubt| doubt.writer) {
                    writer.wake();
                }
                Poll::Ready(Ok(()))
            }
            Some(false) => Poll::Ready(Err(no_http2())),
        }
    }
}

impl AsyncWrite for Proven {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let Some(doubt) = &mut this.doubt else { return Pin::new(&mut this.stream).poll_write(cx, bytes) };
        let allowed = doubt.allowed(bytes);
        if allowed == 0 && !bytes.is_empty() {
            doubt.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &bytes[..allowed]));
        Poll::Ready(match written {
            Ok(written) => {
                doubt.wrote(&bytes[..written]);
                Ok(written)
            }
            Err(_) => Err(no_http2()),
        })
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.doubt.is_none() {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        }
        let first = pieces.iter().find(|piece| !piece.is_empty());
        self.poll_write(cx, first.map_or(&[], |piece| piece))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
