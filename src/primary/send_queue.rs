//! The way out of a stream: a queue with a bound in bytes, whose clean end is said and never
//! implied. After a welcome that says so, what goes in is packed: small pieces are compressed, and
//! large ones where the connection takes them more slowly than they come.

use std::io;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::lock::lock;
use crate::primary::broken;
use crate::wire::Packer;

/// Bytes of a stream that wait to be taken by the connection: what a slow replica may cost in
/// memory.
const WAITING_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Pieces up to this are compressed, however fast the connection is: commits are so small. What is
/// larger is compressed when half of what may wait does.
const SMALL_MAX_BYTES: usize = 16 * 1024;
/// Pieces that wait; many small ones have a cost of their own.
const WAITING_MAX_PIECES: usize = 64;

/// The other end takes nothing any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Closed;

/// Where a stream's bytes go in.
#[derive(Debug)]
pub(crate) struct StreamSender {
    pieces: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    packer: Mutex<Option<Packer>>,
}

/// Where the connection takes them out.
#[derive(Debug)]
pub(crate) struct StreamReceiver {
    pieces: mpsc::Receiver<Queued>,
    room: Arc<Semaphore>,
    ended: bool,
}

#[derive(Debug)]
enum Queued {
    Data(Bytes, OwnedSemaphorePermit),
    End,
}

/// Both ends of a new queue.
pub(crate) fn queue() -> (StreamSender, StreamReceiver) {
    let (sender, receiver) = mpsc::channel(WAITING_MAX_PIECES);
    let room = Arc::new(Semaphore::new(WAITING_MAX_BYTES));
    (
        StreamSender { pieces: sender, room: room.clone(), packer: Mutex::default() },
        StreamReceiver { pieces: receiver, room, ended: false },
    )
}

impl StreamSender {
    /// Queues bytes; waits while the queue is full.
    ///
    /// # Cancel safety
    /// A dropped future has queued nothing.
    pub(crate) async fn send(&self, bytes: Bytes) -> Result<(), Closed> {
        let packs = lock(&self.packer).is_some();
        let most = if packs { Packer::most(bytes.len()) } else { bytes.len() };
        let cost = most.min(WAITING_MAX_BYTES) as u32;
        let late = self.room.available_permits() < WAITING_MAX_BYTES / 2;
        let mut room = self.room.clone().acquire_many_owned(cost).await.map_err(|_| Closed)?;
        let place = self.pieces.reserve().await.map_err(|_| Closed)?;
        // Nothing waits from here on: what was packed is what the next piece goes on from.
        let bytes = match &mut *lock(&self.packer) {
            Some(packer) => {
                packer.pack(&bytes, late || bytes.len() <= SMALL_MAX_BYTES).map_err(|_| Closed)?
            }
            None => bytes,
        };
        drop(room.split((cost as usize).saturating_sub(bytes.len())));
        place.send(Queued::Data(bytes, room));
        Ok(())
    }

    /// What is sent from now on is packed.
    pub(crate) fn pack(&self) -> Result<(), Closed> {
        *lock(&self.packer) = Some(Packer::new().map_err(|_| Closed)?);
        Ok(())
    }

    /// Ends the stream cleanly. A sender that is only dropped breaks it off.
    pub(crate) async fn finish(self) -> Result<(), Closed> {
        self.pieces.send(Queued::End).await.map_err(|_| Closed)
    }
}

impl StreamReceiver {
    /// The next bytes; `None` after a clean end, an error when the stream was broken off.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.pieces.poll_recv(cx).map(|piece| match piece {
            Some(Queued::Data(bytes, _room)) => Some(Ok(bytes)),
            Some(Queued::End) => {
                self.ended = true;
                None
            }
            None => {
                self.ended = true;
                Some(Err(broken()))
            }
        })
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended
    }
}

impl Drop for StreamReceiver {
    fn drop(&mut self) {
        // Else a sender that waits for room would wait for ever.
        self.room.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn next(receiver: &mut StreamReceiver) -> Option<io::Result<Bytes>> {
        std::future::poll_fn(|cx| receiver.poll_next(cx)).await
    }

    #[tokio::test]
    async fn a_clean_end_is_told_from_a_break() {
        let (sender, mut receiver) = queue();
        sender.send(Bytes::from_static(b"a")).await.unwrap();
        sender.finish().await.unwrap();
        assert_eq!(next(&mut receiver).await.unwrap().unwrap(), "a");
        assert!(next(&mut receiver).await.is_none() && receiver.is_ended());
        let (sender, mut receiver) = queue();
        drop(sender);
        assert!(next(&mut receiver).await.unwrap().is_err());
        assert!(next(&mut receiver).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_in_the_queue_are_bounded_and_a_closed_queue_wakes_its_sender() {
        let (sender, mut receiver) = queue();
        let piece = Bytes::from(vec![0; WAITING_MAX_BYTES / 2]);
        sender.send(piece.clone()).await.unwrap();
        sender.send(piece.clone()).await.unwrap();
        let full = tokio::time::timeout(std::time::Duration::from_secs(1), sender.send(piece.clone())).await;
        assert!(full.is_err(), "the third piece waits");
        assert!(next(&mut receiver).await.unwrap().is_ok());
        sender.send(piece.clone()).await.unwrap();
        let waiting = tokio::spawn(async move { sender.send(piece).await });
        tokio::task::yield_now().await;
        drop(receiver);
        assert_eq!(waiting.await.unwrap(), Err(Closed));
    }
}
