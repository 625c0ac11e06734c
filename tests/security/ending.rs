//! A relay that ends the TLS of both sides with a key of its own, and passes on what is inside.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Request, Response};
use replite::Db;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};

use crate::keys::Key;
use crate::support::*;
use crate::world::*;

/// What the relay does with a request that it reads inside of TLS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Inside {
    /// It passes the very bytes on.
    Pass,
    /// It answers by itself, as a primary would that knows all but the secret, and keeps the head of
    /// a channel at a mounted door.
    Answer,
}

/// What it saw.
#[derive(Default)]
pub(crate) struct Seen {
    /// Heads of requests, inside of TLS or before it.
    pub(crate) heads: Vec<HeaderMap>,
    /// What the primary answered.
    pub(crate) answers: Vec<u16>,
    /// Bytes of answers' bodies, inside of TLS.
    pub(crate) body: Vec<u8>,
    /// Heads that began a channel at a mounted door.
    pub(crate) tunnels: Vec<HeaderMap>,
}

pub(crate) struct Ender {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Seen>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Ender {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Ender {
    pub(crate) async fn start(door: Door, to: SocketAddr, inside: Inside) -> Ender {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, key) = (Arc::<Mutex<Seen>>::default(), Key::new());
        let sees = seen.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((from, _)) = listener.accept().await {
                let between = Between { door, to, inside, key: key.clone(), seen: sees.clone() };
                tokio::spawn(between.serve(from));
            }
        });
        Ender { address, seen, accepting }
    }
}

struct Between {
    door: Door,
    to: SocketAddr,
    inside: Inside,
    key: Key,
    seen: Arc<Mutex<Seen>>,
}

impl Between {
    async fn serve(self, from: TcpStream) -> Option<()> {
        match self.door {
            Door::Own => {
                let there = TcpStream::connect(self.to).await.ok()?;
                let (from, there) = (self.key.accept(from).await.ok()?, self.key.connect(there).await.ok()?);
                self.between(from, there).await
            }
            Door::Mounted => {
                let mut connection = h2::server::handshake(from).await.ok()?;
                let (request, mut respond) = connection.accept().await?.ok()?;
                tokio::spawn(async move { while connection.accept().await.is_some() {} });
                let (head, body) = request.into_parts();
                self.seen.lock().unwrap().tunnels.push(head.headers.clone());
                if self.inside == Inside::Answer {
                    // No node sees this head.
                    let sender = respond.send_response(forged(), false).ok()?;
                    let from = self.key.accept(piped(sender, body)).await.ok()?;
                    return self.between(from, duplex(1).0).await;
                }
                let (answer, there) = tunnel(self.to, &head.headers).await?;
                let mut response = Response::new(());
                *response.headers_mut() = answer.headers().clone();
                let sender = respond.send_response(response, false).ok()?;
                let from = piped(sender, body);
                let (from, there) = (self.key.accept(from).await.ok()?, self.key.connect(there).await.ok()?);
                self.between(from, there).await
            }
        }
    }

    /// Both sides' TLS is ended: reads the request, and passes on or answers it.
    async fn between<A, B>(self, from: A, there: B) -> Option<()>
    where
        A: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
        B: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let mut connection = h2::server::handshake(from).await.ok()?;
        let (request, mut respond) = connection.accept().await?.ok()?;
        tokio::spawn(async move { while connection.accept().await.is_some() {} });
        let (head, body) = request.into_parts();
        self.seen.lock().unwrap().heads.push(head.headers.clone());
        if self.inside == Inside::Answer {
            let sender = respond.send_response(forged(), false).ok()?;
            return self.lie(sender).await;
        }
        let (mut client, connection) = h2::client::handshake(there).await.ok()?;
        tokio::spawn(connection);
        let (answer, up) = client.send_request(Request::from_parts(head, ()), false).ok()?;
        tokio::spawn(copy(body, up, None));
        let answer = answer.await.ok()?;
        self.seen.lock().unwrap().answers.push(answer.status().as_u16());
        let (head, down) = answer.into_parts();
        let ended = down.is_end_stream();
        let sender = respond.send_response(Response::from_parts(head, ()), ended).ok()?;
        if !ended {
            copy(down, sender, Some(self.seen)).await;
        }
        Some(())
    }

    /// Says what a primary may say that has something else.
    async fn lie(&self, mut sender: SendStream<Bytes>) -> Option<()> {
        sender.send_data(Bytes::from_static(MARK), false).ok()?;
        // Until the other side hangs up.
        std::future::poll_fn(|cx| sender.poll_reset(cx)).await.ok()?;
        Some(())
    }
}

/// The head of an answer, all of whose fields are right but the proof.
fn forged() -> Response<()> {
    let mut response = Response::new(());
    let fields = [
        ("replite-version", "3".to_string()),
        ("replite-node", "01890000-0000-7000-8000-000000000001".into()),
        ("replite-incarnation", "01890000-0000-4000-8000-000000000002".into()),
        ("replite-nonce", "5a".repeat(32)),
        ("replite-proof", "5b".repeat(32)),
        ("content-type", "application/vnd.replite.stream".into()),
    ];
    for (name, value) in fields {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    response
}

/// Begins a channel at a mounted endpoint by a head that somebody else made.
pub(crate) async fn tunnel(to: SocketAddr, headers: &HeaderMap) -> Option<(Response<()>, DuplexStream)> {
    let io = TcpStream::connect(to).await.ok()?;
    let (mut client, connection) = h2::client::handshake(io).await.ok()?;
    tokio::spawn(connection);
    let mut request = Request::post(format!("http://{to}/_replite/v1/tunnel")).body(()).unwrap();
    *request.headers_mut() = headers.clone();
    let (answer, up) = client.send_request(request, false).ok()?;
    let (head, down) = answer.await.ok()?.into_parts();
    Some((Response::from_parts(head, ()), piped(up, down)))
}

/// Two bodies as one connection.
fn piped(mut sender: SendStream<Bytes>, mut receiver: RecvStream) -> DuplexStream {
    let (ours, theirs) = duplex(64 * 1024);
    let (mut read, mut write) = tokio::io::split(theirs);
    tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            if sender.send_data(Bytes::copy_from_slice(&buffer[..count]), false).is_err() {
                return;
            }
        }
        let _ = sender.send_data(Bytes::new(), true);
    });
    tokio::spawn(async move {
        while let Some(Ok(bytes)) = receiver.data().await {
            let _ = receiver.flow_control().release_capacity(bytes.len());
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    });
    ours
}

async fn copy(mut from: RecvStream, mut to: SendStream<Bytes>, seen: Option<Arc<Mutex<Seen>>>) {
    while let Some(Ok(bytes)) = from.data().await {
        let _ = from.flow_control().release_capacity(bytes.len());
        if let Some(seen) = &seen {
            seen.lock().unwrap().body.extend(&bytes);
        }
        if to.send_data(bytes, false).is_err() {
            return;
        }
    }
    let _ = to.send_data(Bytes::new(), true);
}

async fn ends_tls(inside: Inside, word: &str) {
    let world = World::new().await;
    for door in DOORS {
        let ender = Ender::start(door, world.at(door), inside).await;
        // It was level once, by a line without the relay in it.
        let relay = world.relay(door).await;
        let filled = world.replica(&format!("filled-{door:?}.db"), door, &relay).await;
        world.level(&filled).await;
        relay.let_in(false);
        relay.cut();
        let had = world.write(5).await;
        relay.lead_to(ender.address);
        relay.let_in(true);
        let empty =
            Db::open(replica(&world.dir.path().join(format!("empty-{door:?}.db")), &door.url(relay.address)));
        let empty = empty.await.unwrap();
        for replica in [&filled, &empty] {
            says_with(replica, word, "that the peer is not proved").await;
            assert!(replica.position().is_none_or(|position| position.number() < had.number()));
        }
        if inside == Inside::Pass {
            says_with(&world.primary, "another secret", "that somebody knocks").await;
        }
        // Several times, so that no other try does better.
        comes("more tries", || ender.seen.lock().unwrap().heads.len() >= 8).await;
        {
            let seen = ender.seen.lock().unwrap();
            assert!(seen.heads.iter().all(|head| head.contains_key("replite-proof")), "knocks were seen");
            assert!(seen.answers.iter().all(|status| *status == 404), "{:?}", seen.answers);
            assert_eq!(seen.answers.is_empty(), inside == Inside::Answer);
            assert!(seen.body.is_empty(), "the primary said something");
        }
        assert!(world.primary.status().replicas.is_empty());
        // The honest line is as good as ever.
        relay.lead_to(world.at(door));
        relay.cut();
        for replica in [&filled, &empty] {
            world.level(replica).await;
        }
        assert_nothing_seen(&relay);
        for replica in [&filled, &empty] {
            replica.shutdown().await;
            assert_prefix(world.primary.path(), replica.path());
        }
    }
    world.end(Vec::new(), &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_with_a_key_of_its_own_sees_a_knock_and_gets_nothing_for_it() {
    ends_tls(Inside::Pass, "secret").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_answers_by_itself_is_not_believed() {
    ends_tls(Inside::Answer, "did not prove the cluster's secret").await;
}
