//! A relay on the path: it passes bytes on, and remembers, changes, cuts or holds them.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::world::MARK;

/// Bytes of each direction that are remembered.
const REMEMBERED_BYTES: usize = 4 << 20;
const PIECE_BYTES: usize = 16 * 1024;

/// Which way bytes go: up is from the side that dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Up,
    Down,
}

/// What is done to each connection at so many bytes of one direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fault {
    pub(crate) way: Way,
    pub(crate) at: usize,
    pub(crate) deed: Deed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Deed {
    /// One bit of the byte there is another one.
    Flip(u8),
    /// The attacker's words are put in the place of as many bytes.
    Overwrite,
    /// The attacker's words are put between.
    Insert,
    /// So many bytes are left out.
    Drop(usize),
    /// The connection ends here, for both sides.
    Finish,
    /// The same with a reset.
    Reset,
}

/// How bytes pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Flow {
    Free,
    /// They stand still.
    Stopped,
    /// One byte a second.
    Trickle,
}

/// What passed on a connection, as it came.
#[derive(Clone, Default)]
pub(crate) struct Passed {
    pub(crate) up: Vec<u8>,
    pub(crate) down: Vec<u8>,
}

impl Passed {
    pub(crate) fn way(&self, way: Way) -> &[u8] {
        match way {
            Way::Up => &self.up,
            Way::Down => &self.down,
        }
    }
}

#[derive(Clone)]
struct Orders {
    to: SocketAddr,
    fault: Option<Fault>,
    up: Flow,
    down: Flow,
    let_in: bool,
    cuts: u64,
}

struct Shared {
    orders: watch::Sender<Orders>,
    passed: Mutex<Vec<Arc<Mutex<Passed>>>>,
    /// The connections to which a fault was done, by number.
    faulted: Mutex<Vec<usize>>,
}

/// A relay before one address. Its own stays the same for its life.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Relay {
    pub(crate) async fn start(to: SocketAddr) -> Relay {
        Relay::at("127.0.0.1:0".parse().unwrap(), to).await
    }

    pub(crate) async fn at(address: SocketAddr, to: SocketAddr) -> Relay {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let orders = Orders { to, fault: None, up: Flow::Free, down: Flow::Free, let_in: true, cuts: 0 };
        let shared = Shared {
            orders: watch::Sender::new(orders),
            passed: Mutex::default(),
            faulted: Mutex::default(),
        };
        let shared = Arc::new(shared);
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Relay { address, shared, accepting }
    }

    /// What is done to each connection from now on, also to those that stand.
    pub(crate) fn fault(&self, fault: Option<Fault>) {
        self.shared.orders.send_modify(|orders| orders.fault = fault);
    }

    /// How often that was done.
    pub(crate) fn done(&self) -> usize {
        self.shared.faulted.lock().unwrap().len()
    }

    /// Whether the newest connection is one to which a fault was done.
    pub(crate) fn newest_is_faulted(&self) -> bool {
        let last = self.shared.faulted.lock().unwrap().last().copied();
        last.is_some_and(|last| last + 1 == self.came())
    }

    /// What passed on the connection to which the last fault was done.
    pub(crate) fn last_faulted(&self) -> Passed {
        let last = *self.shared.faulted.lock().unwrap().last().unwrap();
        self.shared.passed.lock().unwrap()[last].lock().unwrap().clone()
    }

    pub(crate) fn flow(&self, up: Flow, down: Flow) {
        self.shared.orders.send_modify(|orders| (orders.up, orders.down) = (up, down));
    }

    /// Where new connections go.
    pub(crate) fn lead_to(&self, to: SocketAddr) {
        self.shared.orders.send_modify(|orders| orders.to = to);
    }

    pub(crate) fn let_in(&self, yes: bool) {
        self.shared.orders.send_modify(|orders| orders.let_in = yes);
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.shared.orders.send_modify(|orders| orders.cuts += 1);
    }

    /// All that passed, by connection.
    pub(crate) fn passed(&self) -> Vec<Passed> {
        let all = self.shared.passed.lock().unwrap();
        all.iter().map(|passed| passed.lock().unwrap().clone()).collect()
    }

    /// How many connections came.
    pub(crate) fn came(&self) -> usize {
        self.shared.passed.lock().unwrap().len()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // The connections end with their watch.
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((from, _)) = listener.accept().await {
        if shared.orders.borrow().let_in {
            tokio::spawn(carry_both(from, shared.clone()));
        }
    }
}

async fn carry_both(from: TcpStream, shared: Arc<Shared>) {
    let mut orders = shared.orders.subscribe();
    let now = orders.borrow_and_update().clone();
    let passed = Arc::<Mutex<Passed>>::default();
    let number = {
        let mut all = shared.passed.lock().unwrap();
        all.push(passed.clone());
        all.len() - 1
    };
    let Ok(there) = TcpStream::connect(now.to).await else { return };
    let _ = (from.set_nodelay(true), there.set_nodelay(true));
    let (from, there) = (from.into_split(), there.into_split());
    let up = Carrier { way: Way::Up, shared: shared.clone(), passed: passed.clone(), number, count: 0 };
    let down = Carrier { way: Way::Down, shared: shared.clone(), passed, number, count: 0 };
    let (up, down) = (up.carry(from.0, there.1), down.carry(there.0, from.1));
    let both = async { tokio::join!(up, down) };
    tokio::select! {
        _ = both => {}
        _ = orders.wait_for(|orders| orders.cuts != now.cuts) => {}
    }
}

struct Carrier {
    way: Way,
    shared: Arc<Shared>,
    passed: Arc<Mutex<Passed>>,
    number: usize,
    count: usize,
}

impl Carrier {
    /// Carries until the end of the direction.
    async fn carry(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
        let _ = self.carry_all(&mut from, &mut to).await;
        // One side's end is the other's.
        let _ = to.shutdown().await;
    }

    async fn carry_all(&mut self, from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf) -> io::Result<()> {
        let mut orders = self.shared.orders.subscribe();
        let mut buffer = vec![0; PIECE_BYTES];
        loop {
            let most = if self.flow(&orders.borrow()) == Flow::Trickle { 1 } else { PIECE_BYTES };
            let read = from.read(&mut buffer[..most]).await?;
            if read == 0 {
                return Ok(());
            }
            self.remember(&buffer[..read]);
            let way = self.way;
            let flow = |orders: &Orders| if way == Way::Up { orders.up } else { orders.down };
            if self.flow(&orders.borrow()) == Flow::Trickle {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            let _ = orders.wait_for(|orders| flow(orders) != Flow::Stopped).await;
            let fault = orders
                .borrow()
                .fault
                .filter(|fault| fault.way == way && (self.count..self.count + read).contains(&fault.at));
            let begins = self.count;
            self.count += read;
            let Some(fault) = fault else {
                let mut rest = &buffer[..read];
                while rest.len() > 1 && self.flow(&orders.borrow()) == Flow::Trickle {
                    to.write_all(&rest[..1]).await?;
                    rest = &rest[1..];
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                to.write_all(rest).await?;
                continue;
            };
            self.shared.faulted.lock().unwrap().push(self.number);
            let (before, rest) = buffer[..read].split_at(fault.at - begins);
            to.write_all(before).await?;
            match fault.deed {
                Deed::Flip(bit) => {
                    to.write_all(&[rest[0] ^ bit]).await?;
                    to.write_all(&rest[1..]).await?;
                }
                Deed::Overwrite => {
                    let over = rest.len().min(MARK.len());
                    to.write_all(&MARK[..over]).await?;
                    to.write_all(&rest[over..]).await?;
                }
                Deed::Insert => {
                    to.write_all(MARK).await?;
                    to.write_all(rest).await?;
                }
                Deed::Drop(bytes) => to.write_all(&rest[bytes.min(rest.len())..]).await?,
                Deed::Finish => return Err(io::ErrorKind::Other.into()),
                Deed::Reset => {
                    for io in [from.as_ref(), to.as_ref()] {
                        rustix::net::sockopt::set_socket_linger(io, Some(Duration::ZERO))?;
                    }
                    self.shared.orders.send_modify(|orders| orders.cuts += 1);
                    return std::future::pending().await;
                }
            }
        }
    }

    fn flow(&self, orders: &Orders) -> Flow {
        if self.way == Way::Up { orders.up } else { orders.down }
    }

    fn remember(&self, bytes: &[u8]) {
        let mut passed = self.passed.lock().unwrap();
        let all = if self.way == Way::Up { &mut passed.up } else { &mut passed.down };
        let room = REMEMBERED_BYTES.saturating_sub(all.len());
        all.extend(&bytes[..bytes.len().min(room)]);
    }
}
