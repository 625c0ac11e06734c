//! HTTP/2 by prior knowledge, to a server that may not speak it: nothing of a request goes out before the server has shown that it does.

use std::error::Error as StdError;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

use http::uri::Authority;
use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// What the connection's error says, by which it is known: the libraries above hand on only an error's words.
const NO_HTTP2: &str = "the server does not speak HTTP/2";
/// The client's preface begins with these bytes, and goes on with a SETTINGS frame (RFC 9113, 3.4).
const MAGIC_BYTES: usize = 24;
/// A frame's head: three bytes of length, one of type, ...
const FRAME_HEAD_BYTES: usize = 9;
const LENGTH_BYTES: usize = 3;
/// The type of the first frame of either side.
const SETTINGS: u8 = 4;

/// Whether a request failed because the server does not speak HTTP/2. Then it was not sent.
pub(super) fn says_no_http2(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.to_string() == NO_HTTP2 {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Which server was asked last in HTTP/2 and did not show that it speaks it. A request that was to go on such a connection, and did not, fails without a cause of its own.
#[derive(Clone, Debug, Default)]
pub(super) struct Mute(Arc<Mutex<Option<Authority>>>);

impl Mute {
    pub(super) fn is(&self, server: Option<&Authority>) -> bool {
        server.is_some() && self.lock().as_ref() == server
    }

    fn tell(&self, server: Option<&Authority>, mute: bool) {
        let mut last = self.lock();
        if mute {
            *last = server.cloned();
        } else if last.as_ref() == server {
            *last = None;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Authority>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A connection that fails when the server's first frame is not that of HTTP/2, and lets only the client's preface out before.
pub(super) struct Proven {
    stream: TcpStream,
    /// None once the server has shown that it speaks HTTP/2, and where nobody asks.
    doubt: Option<Doubt>,
}

struct Doubt {
    server: Option<Authority>,
    mute: Mute,
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
    /// A connection whose server is believed.
    pub(super) fn known(stream: TcpStream) -> Proven {
        Proven { stream, doubt: None }
    }

    /// A connection for HTTP/2.
    pub(super) fn doubted(stream: TcpStream, server: Option<Authority>, mute: Mute) -> Proven {
        let doubt = Doubt {
            server,
            mute,
            written: 0,
            length: [0; LENGTH_BYTES],
            read: 0,
            head: [0; LENGTH_BYTES + 1],
            writer: None,
        };
        Proven { stream, doubt: Some(doubt) }
    }
}

impl Doubt {
    fn no_http2(&self) -> io::Error {
        self.mute.tell(self.server.as_ref(), true);
        io::Error::new(io::ErrorKind::InvalidData, NO_HTTP2)
    }

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
                doubt.mute.tell(doubt.server.as_ref(), false);
                if let Some(writer) = this.doubt.take().and_then(|doubt| doubt.writer) {
                    writer.wake();
                }
                Poll::Ready(Ok(()))
            }
            Some(false) => Poll::Ready(Err(doubt.no_http2())),
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
            Err(_) => Err(doubt.no_http2()),
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

impl Connection for Proven {
    fn connected(&self) -> Connected {
        self.stream.connected()
    }
}
