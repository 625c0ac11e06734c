//! Strangers come in crowds: they hold connections, send what never ends, and say knocks again that
//! they recorded. An honest replica is served meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use replite::{Db, Plaintext};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;

use crate::keys::Key;
use crate::relay::Relay;
use crate::support::*;
use crate::world::*;

/// What HTTP/2 begins with, and settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// From this address of the machine.
async fn connect(from: &str, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(format!("{from}:0").parse().unwrap())?;
    socket.connect(to).await
}

/// Connections that say as little as they can: most stay until they are cut, and some come again at
/// once.
struct Crowd {
    _tasks: JoinSet<()>,
    came: Arc<AtomicUsize>,
}

impl Crowd {
    async fn gather(from: &[&str], to: SocketAddr, first: &[u8], come_again: usize) -> Crowd {
        const STAY: usize = 1700;
        let first: Arc<[u8]> = first.into();
        let (mut tasks, came) = (JoinSet::new(), Arc::<AtomicUsize>::default());
        for number in 0..STAY + come_again {
            let (from, first, came) = (from[number % from.len()].to_owned(), first.clone(), came.clone());
            tasks.spawn(async move {
                loop {
                    let Ok(mut io) = connect(&from, to).await else { continue };
                    let _ = io.write_all(&first).await;
                    came.fetch_add(1, Ordering::Relaxed);
                    let _ = io.read_to_end(&mut Vec::new()).await;
                    if number < STAY {
                        return;
                    }
                }
            });
        }
        comes("the crowd", || came.load(Ordering::Relaxed) >= STAY + come_again).await;
        Crowd { _tasks: tasks, came }
    }

    /// It goes on.
    async fn comes_still(&self) {
        let before = self.came.load(Ordering::Relaxed);
        comes("some more of the crowd", || self.came.load(Ordering::Relaxed) > before).await;
    }
}

/// A replica whose connection was cut has all again. Where the crowd has sources of its own, the
/// replica's first try has a place, but for a rare one on a machine that has other work.
async fn is_served(world: &World, replica: &Db, relay: &Relay, apart: bool, what: &str) {
    let mut tries = Vec::new();
    for _ in 0..3 {
        let came = relay.came();
        relay.cut();
        comes("another connection", || relay.came() > came).await;
        world.level(replica).await;
        tries.push(relay.came() - came);
    }
    let first = tries.iter().filter(|tries| **tries == 1).count();
    assert!(!apart || first >= 2, "{what}: an honest replica tried {tries:?} times");
}

/// By how its memory grows a node shows what strangers cost.
fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_follows_beside_a_crowd_of_strangers() {
    if !alone(a_replica_follows_beside_a_crowd_of_strangers) {
        return;
    }
    let world = World::new().await;
    let relay = world.relay(Door::Own).await;
    let replica = world.replica("r.db", Door::Own, &relay).await;
    world.level(&replica).await;
    let many: Vec<_> = (2..40).map(|n| format!("127.0.0.{n}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    // A replica dials from 127.0.0.1.
    let crowds = [("its own source", vec!["127.0.0.1"]), ("another", vec!["127.0.0.2"]), ("many", many)];
    let hello = first_record(&relay.passed()[0].up);
    for (name, from) in &crowds {
        for first in [b"", &[22][..], PREFACE, &hello] {
            let what = format!("from {name}, {} bytes", first.len());
            // More than have a place: each that comes has another one cut, which comes again. Those
            // that give the node work leave one of their own source less time than this machine may
            // need, where the crowd is in the same process.
            let apart = !from.contains(&"127.0.0.1");
            let come_again = if apart || first.len() <= 1 { 400 } else { 32 };
            let crowd = Crowd::gather(from, world.at(Door::Own), first, come_again).await;
            is_served(&world, &replica, &relay, apart, &what).await;
            crowd.comes_still().await;
            // One that was not there before comes in, too.
            let new = world.replica(&format!("{what}.db"), Door::Own, &relay).await;
            within("a state", new.ready()).await.unwrap();
            new.shutdown().await;
        }
    }
    world.end(vec![replica], &[&relay]).await;
}

/// The first record of TLS on a connection.
fn first_record(passed: &[u8]) -> Vec<u8> {
    let length = u16::from_be_bytes([passed[3], passed[4]]);
    passed[..5 + usize::from(length)].to_vec()
}

/// One frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// What never ends, of each kind; how it begins, and what is said over and over.
fn floods() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    const END_HEADERS: u8 = 4;
    // POST / by the static table.
    let post = [0x83, 0x86, 0x84];
    let preface = PREFACE.to_vec();
    let with = |more: Vec<u8>| [PREFACE.to_vec(), more].concat();
    // A header without an index, whose name and value have 127 bytes and more.
    let long = [&[0x10, 1, b'x', 0x7f, 0x81, 0x7f][..], &[b'y'; 16_000]].concat();
    vec![
        ("settings", preface.clone(), frame(4, 0, 0, &[]).repeat(1000)),
        ("pings", preface.clone(), frame(6, 0, 0, &[7; 8]).repeat(1000)),
        ("window updates", preface.clone(), frame(8, 0, 0, &[0, 0, 0, 1]).repeat(1000)),
        ("priorities", preface.clone(), frame(2, 0, 1, &[0, 0, 0, 3, 0]).repeat(1000)),
        ("unknown frames", preface.clone(), frame(99, 0, 0, &[1; 1000]).repeat(100)),
        ("continuations", with(frame(1, 0, 1, &post)), frame(9, 0, 1, &[])),
        ("long continuations", with(frame(1, 0, 1, &post)), frame(9, 0, 1, &long)),
        ("a body", with(frame(1, END_HEADERS, 1, &post)), frame(0, 0, 1, &[1; 16_000])),
        ("empty data", with(frame(1, END_HEADERS, 1, &post)), frame(0, 0, 1, &[])),
        ("a head of HTTP/1", b"GET / HTTP/1.1\r\nx: ".to_vec(), vec![b'y'; 16_000]),
        ("heads of HTTP/1", b"GET / HTTP/1.1\r\n".to_vec(), b"x: y\r\n".repeat(1000)),
        (
            "a body of HTTP/1",
            b"POST / HTTP/1.1\r\ncontent-length: 99999999\r\n\r\n".to_vec(),
            vec![0; 16_000],
        ),
    ]
}

/// Says it over and over, until the other side takes no more; how many bytes it took.
async fn flood(io: impl AsyncRead + AsyncWrite, begins: &[u8], again: &[u8]) -> usize {
    const ENOUGH: usize = 64 << 20;
    let (mut reads, mut writes) = tokio::io::split(io);
    let mut said = 0;
    let mut answers = vec![0; 64 * 1024];
    let mut next = begins;
    while said < ENOUGH {
        tokio::select! {
            written = writes.write(next) => match written {
                Ok(count) => {
                    said += count;
                    next = if count < next.len() { &next[count..] } else { again };
                }
                Err(_) => break,
            },
            read = reads.read(&mut answers) => if !read.is_ok_and(|count| count > 0) { break },
        }
    }
    said
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_send_without_an_end_is_hung_up_on_and_not_kept() {
    if !alone(what_strangers_send_without_an_end_is_hung_up_on_and_not_kept) {
        return;
    }
    /// What the two kernels keep between the sides.
    const ON_THE_WAY: usize = 16 << 20;
    const AT_ONE_TIME: usize = 40;
    let world = World::new().await;
    let relay = world.relay(Door::Own).await;
    let replica = world.replica("r.db", Door::Own, &relay).await;
    world.level(&replica).await;
    for (what, begins, again) in floods() {
        for private in [false, true] {
            let before = resident_kib();
            let mut flooding = JoinSet::new();
            for _ in 0..AT_ONE_TIME {
                let (begins, again, to) = (begins.clone(), again.clone(), world.at(Door::Own));
                flooding.spawn(async move {
                    let Ok(io) = connect("127.0.0.2", to).await else { return 0 };
                    if !private {
                        return flood(io, &begins, &again).await;
                    }
                    match Key::new().connect(io).await {
                        Ok(io) => flood(io, &begins, &again).await,
                        Err(_) => 0,
                    }
                });
            }
            is_served(&world, &replica, &relay, true, what).await;
            while let Some(said) = within(what, flooding.join_next()).await {
                let said = said.unwrap();
                assert!(said < ON_THE_WAY, "{what}: {said} bytes were taken");
            }
            let grown = resident_kib().saturating_sub(before);
            assert!(grown < 64 * 1024, "{what}: memory grew by {grown} KiB");
        }
    }
    world.end(vec![replica], &[&relay]).await;
}

/// The recorded bytes of a connection in the clear up to the end of its first head.
fn up_to_head(recorded: &[u8]) -> Vec<u8> {
    const PREFACE_BYTES: usize = 24;
    let mut at = PREFACE_BYTES;
    loop {
        let [a, b, c, kind, ..] = recorded[at..] else { panic!("no head was recorded") };
        at += 9 + u32::from_be_bytes([0, a, b, c]) as usize;
        if kind == 1 {
            return recorded[..at].to_vec();
        }
    }
}

/// How a head begins that says 404 by the static table.
const NOT_FOUND: u8 = 0x80 | 13;

/// The first byte of the first head that comes on a connection.
async fn head_begins(io: &mut TcpStream) -> u8 {
    loop {
        let mut header = [0; 9];
        io.read_exact(&mut header).await.unwrap();
        let [a, b, c, kind, ..] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        io.read_exact(&mut payload).await.unwrap();
        if kind == 1 {
            return payload[0];
        }
    }
}

/// In the clear all that comes before the hello can be said again, and then a peer waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn knocks_in_the_clear_that_are_said_again_take_no_replicas_place() {
    let world = World::with(|config| config.plaintext(Plaintext::AnyNetwork)).await;
    for at in DOORS {
        // By the same kind of URL at both.
        let relay = world.relay(at).await;
        let config = world.config(&format!("{at:?}.db"), Door::Mounted, &relay);
        let replica = Db::open(config.plaintext(Plaintext::AnyNetwork)).await.unwrap();
        world.level(&replica).await;
        let knock = up_to_head(&relay.passed()[0].up);
        let mut held = Vec::new();
        for _ in 0..1000 {
            let mut io = connect("127.0.0.2", world.at(at)).await.unwrap();
            // The oldest ones are cut.
            let _ = io.write_all(&knock).await;
            held.push(io);
        }
        is_served(&world, &replica, &relay, true, "beside knocks that are said again").await;
        assert_eq!(world.primary.status().replicas.len(), 1);
        // They are answered as any stranger is.
        let mut last = held.pop().unwrap();
        assert_eq!(within("an answer", head_begins(&mut last)).await, NOT_FOUND);
        drop(held);
        replica.shutdown().await;
    }
    world.primary.shutdown().await;
}
