//! The network between the nodes: a TCP proxy before each node, and what is wrong on the way from
//! each node to each other. A connection's origin is the process whose socket it is.

mod origin;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How often a connection's origin is looked for, and the time between.
const ORIGIN_TRIES: usize = 5;
const ORIGIN_PAUSE: Duration = Duration::from_millis(2);

/// What is wrong with a way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Connections end, and new ones are refused.
    Cut,
    /// Nothing comes through, and no end notices it.
    Silent,
    /// Each piece is late.
    Late(Duration),
}

/// All ways.
#[derive(Clone, Debug)]
pub struct Wires(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// The process of each node.
    processes: Mutex<BTreeMap<usize, u32>>,
    /// By origin and target.
    troubles: Mutex<HashMap<(usize, usize), Trouble>>,
    changed: watch::Sender<u64>,
}

impl Wires {
    #[must_use]
    #[expect(clippy::new_without_default, reason = "there is nothing usual about it")]
    pub fn new() -> Wires {
        let changed = watch::Sender::new(0);
        Wires(Arc::new(Shared { processes: Mutex::default(), troubles: Mutex::default(), changed }))
    }

    /// Says which process a node is.
    pub fn process(&self, node: usize, process: Option<u32>) {
        let mut processes = lock(&self.0.processes);
        match process {
            Some(process) => processes.insert(node, process),
            None => processes.remove(&node),
        };
    }

    /// Changes the ways from some nodes to some others.
    pub fn set(&self, ways: impl IntoIterator<Item = (usize, usize)>, trouble: Option<Trouble>) {
        let mut troubles = lock(&self.0.troubles);
        for way in ways {
            match trouble {
                Some(trouble) => troubles.insert(way, trouble),
                None => troubles.remove(&way),
            };
        }
        drop(troubles);
        self.0.changed.send_modify(|number| *number += 1);
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn well(&self) -> bool {
        lock(&self.0.troubles).is_empty()
    }

    pub fn heal(&self) {
        lock(&self.0.troubles).clear();
        self.0.changed.send_modify(|number| *number += 1);
    }

    fn trouble(&self, way: (usize, usize)) -> Option<Trouble> {
        lock(&self.0.troubles).get(&way).copied()
    }

    /// Stands before a node, until the runtime ends.
    ///
    /// # Errors
    /// The system's.
    pub async fn stand_before(&self, node: usize, to: SocketAddr) -> io::Result<SocketAddr> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, wires) = (listener.local_addr()?, self.clone());
        tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                tokio::spawn(wires.clone().connection(stream, peer, node, to));
            }
        });
        Ok(address)
    }

    async fn connection(self, near: TcpStream, peer: SocketAddr, target: usize, to: SocketAddr) {
        // A process that is gone has no connections, either.
        let Some(origin) = self.origin(&near, peer).await else { return };
        let way = (origin, target);
        let mut changed = self.0.changed.subscribe();
        while let Some(trouble) = self.trouble(way) {
            match trouble {
                Trouble::Cut => return,
                Trouble::Late(_) => break,
                Trouble::Silent => drop(changed.changed().await),
            }
        }
        let Ok(far) = TcpStream::connect(to).await else { return };
        // Small pieces go at once.
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::select! {
            () = self.pump(way, near_in, far_out) => {}
            // What comes back is on the way from the target.
            () = self.pump((target, origin), far_in, near_out) => {}
            () = self.cut(way) => {}
        }
    }

    /// Returns when one of the two ways is cut.
    async fn cut(&self, (origin, target): (usize, usize)) {
        let mut changed = self.0.changed.subscribe();
        loop {
            if [(origin, target), (target, origin)].into_iter().any(|w| self.trouble(w) == Some(Trouble::Cut))
            {
                return;
            }
            // The sender lives as long as this.
            let _ = changed.changed().await;
        }
    }

    async fn pump(&self, way: (usize, usize), mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let mut changed = self.0.changed.subscribe();
        let mut piece = vec![0; 64 * 1024];
        while let Ok(bytes @ 1..) = from.read(&mut piece).await {
            changed.mark_unchanged();
            while let Some(trouble) = self.trouble(way) {
                match trouble {
                    Trouble::Late(by) => {
                        tokio::time::sleep(by).await;
                        break;
                    }
                    Trouble::Silent | Trouble::Cut => drop(changed.changed().await),
                }
            }
            if to.write_all(&piece[..bytes]).await.is_err() {
                return;
            }
        }
    }

    /// The node that has the other end of a connection.
    async fn origin(&self, near: &TcpStream, peer: SocketAddr) -> Option<usize> {
        let to = near.local_addr().ok()?;
        for _ in 0..ORIGIN_TRIES {
            if let Some(socket) = origin::descriptor(peer.port(), to.port()) {
                let processes = lock(&self.0.processes).clone();
                let found = processes.into_iter().find(|(_, process)| origin::has(*process, &socket));
                if let Some((node, _)) = found {
                    return Some(node);
                }
            }
            // The system's tables lack some entries now and then, while others come and go.
            tokio::time::sleep(ORIGIN_PAUSE).await;
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
