//! What a server's bytes say of HTTP/2: whether it speaks it, and which request it began last.
//!
//! A node speaks HTTP/2 by prior knowledge to a server that may not speak it. No request goes out
//! before the server has shown that it does: its first frame is one of settings (RFC 9113, 3.4).
//!
//! A server that goes away first says so with the highest of all numbers, which says nothing of any
//! request (6.8). Only a later, lower one tells which it has not begun.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, ready};

use hyper_util::client::legacy::connect::{Connected, Connection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;

use crate::net::ByteStream;

/// A frame's head: three bytes of length, one of type, one of flags, four of the stream's number.
const HEAD_BYTES: usize = 9;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
/// The highest number of a stream.
const STREAM_MAX: u32 = (1 << 31) - 1;

/// What a connection's server has shown.
#[derive(Clone, Debug)]
pub(super) struct Spoken {
    /// Whether it speaks HTTP/2, once that is known.
    speaks: watch::Receiver<Option<bool>>,
    /// The last stream of its last word that it goes away.
    last: Arc<AtomicU32>,
}

impl Spoken {
    /// Waits until it is known whether the server speaks HTTP/2. None when the connection broke
    /// before.
    pub(super) async fn speaks(&mut self) -> Option<bool> {
        self.speaks.wait_for(Option::is_some).await.ok().and_then(|speaks| *speaks)
    }

    /// Whether it went away with a word on which requests it has not begun.
    pub(super) fn said_last(&self) -> bool {
        self.last.load(Ordering::Acquire) < STREAM_MAX
    }
}

/// A connection whose server's frames are looked at, if it is for HTTP/2.
pub(super) struct WatchedIo {
    stream: Box<dyn ByteStream>,
    shown: Spoken,
    frames: Option<Frames>,
}

impl WatchedIo {
    pub(super) fn new(stream: Box<dyn ByteStream>, http2: bool) -> WatchedIo {
        let (speaks, known) = watch::channel(None);
        let shown = Spoken { speaks: known, last: Arc::new(AtomicU32::new(STREAM_MAX)) };
        let frames =
            http2.then(|| Frames { speaks, last: shown.last.clone(), head: [0; _], read: 0, left: 0 });
        WatchedIo { stream, shown, frames }
    }

    pub(super) fn shown(&self) -> Spoken {
        self.shown.clone()
    }
}

/// The server's frames, as far as they have come.
struct Frames {
    speaks: watch::Sender<Option<bool>>,
    last: Arc<AtomicU32>,
    /// The head of the frame, and the first bytes of a payload that is looked at.
    head: [u8; HEAD_BYTES + 4],
    read: usize,
    /// What else of it is to come.
    left: usize,
}

impl Frames {
    /// Looks at what came.
    ///
    /// # Errors
    /// When it is not HTTP/2.
    fn came(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() && self.speaks.borrow().is_none() {
            return Err(self.no_http2());
        }
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                (self.left, bytes) = (self.left - skipped, &bytes[skipped..]);
                continue;
            }
            self.head[self.read] = bytes[0];
            (self.read, bytes) = (self.read + 1, &bytes[1..]);
            if self.read == 4 && self.speaks.borrow().is_none() {
                if self.head[3] != SETTINGS {
                    return Err(self.no_http2());
                }
                self.speaks.send_replace(Some(true));
            }
            let length =
                usize::from(self.head[0]) << 16 | usize::from(self.head[1]) << 8 | usize::from(self.head[2]);
            let looked_at = if self.head[3] == GOAWAY { length.min(4) } else { 0 };
            if self.read < HEAD_BYTES + looked_at || self.read < HEAD_BYTES {
                continue;
            }
            if looked_at == 4 {
                let [.., a, b, c, d] = self.head;
                self.last.store(u32::from_be_bytes([a, b, c, d]) & STREAM_MAX, Ordering::Release);
            }
            (self.read, self.left) = (0, length - looked_at);
        }
        Ok(())
    }

    fn no_http2(&self) -> io::Error {
        self.speaks.send_replace(Some(false));
        io::Error::new(io::ErrorKind::InvalidData, "the server does not speak HTTP/2")
    }
}

impl AsyncRead for WatchedIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        Poll::Ready(match &mut this.frames {
            Some(frames) => frames.came(&buffer.filled()[before..]),
            None => Ok(()),
        })
    }
}

impl AsyncWrite for WatchedIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
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

/// For the pool of connections in HTTP/1.1.
impl Connection for WatchedIo {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> (Frames, Spoken) {
        let (speaks, known) = watch::channel(None);
        let shown = Spoken { speaks: known, last: Arc::new(AtomicU32::new(STREAM_MAX)) };
        (Frames { speaks, last: shown.last.clone(), head: [0; _], read: 0, left: 0 }, shown)
    }

    #[test]
    fn the_last_stream_of_a_server_that_goes_away_is_known_however_its_bytes_come() {
        let mut bytes = vec![0, 0, 6, SETTINGS, 0, 0, 0, 0, 0, 0, 4, 0, 0, GOAWAY, GOAWAY];
        bytes.extend([0, 0, 5, 0, 0, 0, 0, 0, 1, 0, 0, 8, GOAWAY, 0]);
        let first = bytes.len();
        bytes.extend([0, 0, 10, GOAWAY, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0, b'n', b'o']);
        let vague = bytes.len();
        bytes.extend([0, 0, 8, GOAWAY, 0, 0, 0, 0, 0, 0x80, 0, 1, 5, 0, 0, 0, 0]);
        for size in 1..=bytes.len() {
            let (mut frames, shown) = frames();
            let mut came = 0;
            for piece in bytes.chunks(size) {
                frames.came(piece).unwrap();
                came += piece.len();
                assert_eq!(*shown.speaks.borrow(), (came >= 4).then_some(true));
                assert!(came > vague || !shown.said_last(), "{first} {vague} {came}");
            }
            assert!(shown.said_last());
            assert_eq!(shown.last.load(Ordering::Relaxed), 0x105);
            frames.came(b"").unwrap();
        }
    }

    #[test]
    fn what_else_comes_first_or_nothing_is_no_http_2() {
        for words in [&b"HTTP/1.1 400 Bad Request"[..], b"", b"\0\0\0\x07\0"] {
            let (mut frames, shown) = frames();
            frames.came(words).unwrap_err();
            assert_eq!(*shown.speaks.borrow(), Some(false));
        }
    }
}
