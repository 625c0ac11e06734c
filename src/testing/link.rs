//! A TCP connection with faults: a proxy on loopback that delays, slows down, holds and cuts.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Pieces of data that are under way in one direction of one connection.
const PIECES_MAX: usize = 256;
/// Bytes of a piece.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces a second of a connection that is slowed down.
const TICKS_PER_S: u64 = 20;

#[derive(Clone, Debug)]
struct Faults {
    to: SocketAddr,
    delay: Duration,
    /// Bytes a second, in each direction of each connection; none: as many as come.
    rate: Option<u64>,
    /// Bytes stay where they are.
    paused: bool,
    /// No connection is let in.
    closed: bool,
    /// Grows when all connections are cut.
    cuts: u64,
}

/// A proxy in front of one address. Its own stays the same for its life.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) address: SocketAddr,
    faults: watch::Sender<Faults>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Link {
    pub(crate) async fn start(to: SocketAddr, delay: Duration) -> io::Result<Link> {
        let listener = TcpListener::bind((to.ip(), 0)).await?;
        let address = listener.local_addr()?;
        let faults =
            watch::Sender::new(Faults { to, delay, rate: None, paused: false, closed: false, cuts: 0 });
        let accepting = tokio::spawn(accept(listener, faults.subscribe()));
        Ok(Link { address, faults, accepting })
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.faults.send_modify(|f| f.cuts += 1);
    }

    /// Whether new connections are let in.
    pub(crate) fn let_in(&self, yes: bool) {
        self.faults.send_modify(|f| f.closed = !yes);
    }

    /// How much later each piece of data arrives, either way; for what comes from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        self.faults.send_modify(|f| f.delay = delay);
    }

    /// How many bytes a second come through, either way; none: all.
    pub(crate) fn throttle(&self, rate: Option<u64>) {
        self.faults.send_modify(|f| f.rate = rate);
    }

    /// Whether the bytes stand still, either way.
    pub(crate) fn pause(&self, yes: bool) {
        self.faults.send_modify(|f| f.paused = yes);
    }

    /// Where new connections go.
    pub(crate) fn lead_to(&self, to: SocketAddr) {
        self.faults.send_modify(|f| f.to = to);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The connections end with their watch.
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, faults: watch::Receiver<Faults>) {
    loop {
        let Ok((from, _)) = listener.accept().await else {
            // For want of descriptors, most likely: others may give theirs back.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let now = faults.borrow().clone();
        if !now.closed {
            tokio::spawn(connection(from, now, faults.clone()));
        }
    }
}

async fn connection(from: TcpStream, now: Faults, mut faults: watch::Receiver<Faults>) {
    let Ok(there) = TcpStream::connect(now.to).await else { return };
    // Where it fails the connection is gone, and reading says so.
    let _ = (from.set_nodelay(true), there.set_nodelay(true));
    let (a, b) = (from.into_split(), there.into_split());
    let (one, other) = (faults.clone(), faults.clone());
    tokio::select! {
        _ = carry(a.0, b.1, one) => {}
        _ = carry(b.0, a.1, other) => {}
        _ = faults.wait_for(|f| f.cuts != now.cuts) => {}
    }
}

/// Copies bytes, each piece the delay after it came; pieces overtake none and the delays do not add
/// up.
async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut faults: watch::Receiver<Faults>,
) -> io::Result<()> {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let delays = faults.clone();
    let read = async move {
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let rate = delays.borrow().rate;
            let most = rate.map_or(PIECE_BYTES, |rate| (rate / TICKS_PER_S) as usize).clamp(1, PIECE_BYTES);
            let n = from.read(&mut buffer[..most]).await?;
            if let Some(rate) = rate {
                tokio::time::sleep(Duration::from_secs(n as u64) / rate.clamp(1, u32::MAX.into()) as u32)
                    .await;
            }
            let due = Instant::now() + delays.borrow().delay;
            if n == 0 || sender.send((due, buffer[..n].to_vec())).await.is_err() {
                return Ok::<_, io::Error>(());
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            if faults.wait_for(|f| !f.paused).await.is_err() {
                break;
            }
            to.write_all(&piece).await?;
        }
        Ok::<_, io::Error>(())
    };
    tokio::try_join!(read, write).map(drop)
}
