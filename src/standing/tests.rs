//! Questions and answers, most of them wrong.

use std::convert::Infallible;

use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::UnsyncBoxBody;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tower::ServiceExt;

use crate::channel::Binding;
use crate::context::LeaseContext;
use crate::handshake::Refusal;
use crate::keys::DatabaseKeys;
use crate::net::Listener;
use crate::peer::{Incarnation, NodeId};
use crate::primary::ReplicaServer;
use crate::primary::fake::{Fake, SECRET, at, history, keys, leased, node};
use crate::server::{Mount, ReplicationService};
use crate::standing::*;
use crate::status::Addresses;
use crate::txid::EpochHistory;
use crate::wire::Goodbye;

/// A node with a listener.
struct Asked {
    node: Arc<NodeContext>,
    replica_server: Arc<ReplicaServer>,
    tracker: TaskTracker,
    /// How others know it.
    peer: PeerInfo,
}

impl Asked {
    async fn serve(node: Arc<NodeContext>) -> Asked {
        let replica_server = ReplicaServer::new(node.clone());
        let tracker = TaskTracker::new();
        let service =
            ReplicationService::new(node.clone(), replica_server.clone(), tracker.clone(), Mount::Own);
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let peer = of_peer(node.me.node, listener.address());
        let channel = node.channel.clone();
        tracker.spawn(listener.serve(
            channel,
            move |inside| service.on(inside),
            tracker.clone(),
            node.stop.clone(),
        ));
        Asked { node, replica_server, tracker, peer }
    }

    async fn asked_by(&self, asks: &NodeContext) -> Result<PeerAnswer> {
        ask(asks, &self.peer, &self.tracker).await
    }

    async fn end(self) {
        self.node.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(Duration::from_secs(20), self.tracker.wait()).await.expect("a task stays");
    }
}

fn of_peer(node: NodeId, address: std::net::SocketAddr) -> PeerInfo {
    let addresses = Addresses { replication: format!("http://{address}"), ..Addresses::default() };
    PeerInfo { node, incarnation: Incarnation::NIL, addresses }
}

#[track_caller]
fn problem<T>(asked: Result<T>) -> PeerProblem {
    match asked {
        Err(Error::Peer { problem, .. }) => problem,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was believed"),
    }
}

#[tokio::test]
async fn every_node_answers_how_it_stands_at_that_moment() {
    let asks = leased(9, &SECRET, Role::Replica);
    let asked = Asked::serve(leased(2, &SECRET, Role::Replica)).await;
    let empty = asked.asked_by(&asks).await.unwrap();
    let nothing = PeerAnswer {
        peer: asked.node.me.clone(),
        position: None,
        epoch: 0,
        fit: false,
        has_state: false,
        has_content: false,
    };
    assert_eq!(empty, nothing, "no state, and no driver yet");

    let fitness = Fitness { fit: true, has_state: true, has_content: true, ..Fitness::default() };
    asked.node.lease.set_fitness(fitness);
    asked.node.applied.replace(history(&[(1, 1), (3, 2)]), Some(at(3, 7)));
    let whole = PeerAnswer {
        position: Some(at(3, 7)),
        epoch: 3,
        fit: true,
        has_state: true,
        has_content: true,
        ..nothing
    };
    assert_eq!(asked.asked_by(&asks).await.unwrap(), whole);
    asked.node.applied.advance(at(3, 8));
    asked.node.lease.heard.note(6).unwrap();
    let later = PeerAnswer { position: Some(at(3, 8)), epoch: 6, ..whole };
    assert_eq!(asked.asked_by(&asks).await.unwrap(), later, "read anew for each question");
    // A primary answers, too, and no stream has a place less.
    asked.replica_server.set(Some(Fake::new(leased(3, &SECRET, Role::Primary), 1)));
    assert_eq!(asked.asked_by(&asks).await.unwrap(), later);
    assert!(asked.replica_server.replicas().is_empty());
    asked.node.drain.cancel();
    assert_eq!(asked.asked_by(&asks).await.unwrap(), PeerAnswer { fit: false, ..later });
    asked.end().await;

    // A node without a lease says what it has, and never that it is fit.
    let fixed = Asked::serve(node(4, &SECRET, Role::Primary)).await;
    fixed.node.applied.replace(history(&[(2, 1)]), Some(at(2, 5)));
    let answer = fixed.asked_by(&asks).await.unwrap();
    assert_eq!((answer.position, answer.epoch, answer.fit), (Some(at(2, 5)), 2, false));
    assert!(answer.has_state && answer.has_content);
    fixed.end().await;
}

#[tokio::test]
async fn the_mounted_endpoint_answers_too() {
    let asked = leased(2, &SECRET, Role::Replica);
    let tracker = TaskTracker::new();
    let replica_server = ReplicaServer::new(asked.clone());
    let service = ReplicationService::new(asked.clone(), replica_server, tracker.clone(), Mount::Mounted);
    let app = axum::Router::new().nest_service("/_replite", service);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peer = of_peer(asked.me.node, listener.local_addr().unwrap());
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    let asks = leased(9, &SECRET, Role::Replica);
    assert_eq!(ask(&asks, &peer, &tracker).await.unwrap().peer, asked.me);
    server.abort();
}

#[tokio::test]
async fn others_than_those_that_were_expected_are_told_apart() {
    let asked = Asked::serve(leased(2, &SECRET, Role::Replica)).await;
    let asks = leased(9, &SECRET, Role::Replica);
    let other = PeerInfo { node: NodeId::from_u128(3), ..asked.peer.clone() };
    let found = problem(ask(&asks, &other, &asked.tracker).await);
    assert!(matches!(found, PeerProblem::AnotherNode(found) if found == asked.peer.node), "{found}");
    // A copied state directory: the one that asks has the id of the one that is asked.
    let twin = leased(2, &SECRET, Role::Replica);
    assert!(matches!(problem(asked.asked_by(&twin).await), PeerProblem::DuplicateNode(_)));
    let stranger = leased(9, &[7; 32], Role::Replica);
    assert!(matches!(problem(asked.asked_by(&stranger).await), PeerProblem::NotFound));
    let named = |cluster: &str, database: &str| {
        let lease = LeaseContext::fixed();
        let (cluster, database) = (cluster.to_string(), database.to_string());
        NodeContext::new(
            asks.me.clone(),
            cluster,
            database,
            (keys(&SECRET), crate::channel::Channel::open()),
            Role::Replica,
            lease,
            DatabaseKeys::fixed(7),
        )
    };
    let found = problem(asked.asked_by(&named("other", "app")).await);
    assert!(matches!(&found, PeerProblem::Cluster(name) if name == "test"), "{found}");
    let found = problem(asked.asked_by(&named("test", "other")).await);
    assert!(matches!(&found, PeerProblem::Database(name) if name == "other"), "{found}");
    let nowhere = PeerInfo { addresses: Addresses::default(), ..asked.peer.clone() };
    assert!(ask(&asks, &nowhere, &asked.tracker).await.is_err(), "it has no address");
    asked.end().await;
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// A peer that proves itself in the head, and whose body is made by a function of what it was
/// asked.
async fn answering<F>(respond: F) -> PeerInfo
where
    F: Fn(Knock, Answer, Sender<Bytes, std::io::Error>) + Clone + Send + 'static,
{
    let peer = node(2, &SECRET, Role::Replica).me.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let known = of_peer(peer.node, listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            let (respond, peer) = (respond.clone(), peer.clone());
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let knock = Knock::read(request.headers(), &keys(&SECRET), Binding::NONE).unwrap().0;
                let answer = Answer { node: peer.node, incarnation: peer.incarnation, nonce: [8; 32] };
                let (sender, body) = Channel::new(16);
                let mut response: Response<Body> = Response::new(body.boxed_unsync());
                *response.headers_mut() = answer.headers(&knock, &keys(&SECRET)).unwrap();
                respond(knock, answer, sender);
                // Held until the test is over: the peer must see no end that we did not mean.
                tokio::spawn(async move {
                    let _ = request.into_body().collect().await;
                });
                async { Ok::<_, Infallible>(response) }
            });
            let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(async move { builder.serve_connection(TokioIo::new(io), service).await });
        }
    });
    known
}

fn standing(knock: &Knock, answer: &Answer) -> Standing {
    let mut standing = of(&node(2, &SECRET, Role::Replica));
    handshake::seal_standing(&mut standing, knock, &answer.nonce, &keys(&SECRET));
    standing
}

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    wire::encode(message, &mut bytes);
    bytes.to_vec()
}

/// How a node fares with such an answer.
async fn asked(make: impl Fn(&Knock, &Answer) -> Vec<u8> + Clone + Send + 'static) -> Result<PeerAnswer> {
    let peer = answering(move |knock, answer, mut sender| {
        let bytes = make(&knock, &answer);
        sender.try_send(Frame::data(bytes.into())).unwrap();
    })
    .await;
    ask(&leased(9, &SECRET, Role::Replica), &peer, &TaskTracker::new()).await
}

#[tokio::test]
async fn an_answer_that_is_forged_or_of_another_exchange_is_not_believed() {
    let whole = asked(|knock, answer| encoded(&Message::Standing(standing(knock, answer)))).await.unwrap();
    assert_eq!(whole.peer.node, NodeId::from_u128(2));
    let secret = |asked| matches!(problem(asked), PeerProblem::Secret);
    // Recorded: to another knock of this node, and to this knock with another nonce.
    assert!(secret(
        asked(|knock, answer| {
            let before = Knock { nonce: [0; 32], ..knock.clone() };
            encoded(&Message::Standing(standing(&before, answer)))
        })
        .await
    ));
    assert!(secret(
        asked(|knock, answer| {
            let before = Answer { nonce: [0; 32], ..answer.clone() };
            encoded(&Message::Standing(standing(knock, &before)))
        })
        .await
    ));
    // Changed on the way, with a hash that holds.
    let changes: [fn(&mut Standing); 7] = [
        |s| s.position = Some(at(1, 99)),
        |s| s.epoch += 1,
        |s| s.fit = true,
        |s| s.has_state = true,
        |s| s.has_content = true,
        |s| s.peer.addresses.app = "http://10.0.0.66".into(),
        |s| s.proof = [0; 32],
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let changed = move |knock: &Knock, answer: &Answer| {
            let mut standing = standing(knock, answer);
            change(&mut standing);
            encoded(&Message::Standing(standing))
        };
        assert!(secret(asked(changed).await), "change {at}");
    }
    // Proved, and of another node than the head.
    assert!(secret(
        asked(|knock, answer| {
            let mut standing = of(&node(3, &SECRET, Role::Replica));
            handshake::seal_standing(&mut standing, knock, &answer.nonce, &keys(&SECRET));
            encoded(&Message::Standing(standing))
        })
        .await
    ));
    // With a proof for something else.
    assert!(secret(
        asked(|knock, answer| {
            let mut standing = standing(knock, answer);
            standing.proof = handshake::question(knock, &answer.nonce, &keys(&SECRET));
            encoded(&Message::Standing(standing))
        })
        .await
    ));
}

#[tokio::test]
async fn an_answer_that_is_cut_too_long_or_something_else_is_typed() {
    let garbled = |asked, word: &str| {
        let problem = problem(asked);
        assert!(matches!(&problem, PeerProblem::Garbled(why) if why.contains(word)), "{word}: {problem}");
    };
    let whole = |knock: &Knock, answer: &Answer| encoded(&Message::Standing(standing(knock, answer)));
    for cut in [0, 1, HEADER_BYTES, HEADER_BYTES + 40] {
        garbled(asked(move |k, a| whole(k, a)[..cut].to_vec()).await, "cut short");
    }
    garbled(asked(move |k, a| [whole(k, a), vec![0]].concat()).await, "something else");
    garbled(asked(move |k, a| [whole(k, a), whole(k, a)].concat()).await, "something else");
    garbled(asked(|_, _| vec![7; STANDING_MAX_BYTES + 1]).await, "too long");
    garbled(asked(|_, _| vec![0xff; STANDING_MAX_BYTES]).await, "version");
    let bye = encoded(&Message::Goodbye(Goodbye { reason: "no".into() }));
    garbled(asked(move |_, _| bye.clone()).await, "something else");
    garbled(
        asked(move |k, a| {
            let mut flipped = whole(k, a);
            flipped[HEADER_BYTES + 35] ^= 1;
            flipped
        })
        .await,
        "hash",
    );
    // Broken off.
    let peer = answering(move |knock, answer, mut sender| {
        let bytes = whole(&knock, &answer);
        sender.try_send(Frame::data(Bytes::from(bytes))).unwrap();
        sender.abort(std::io::ErrorKind::ConnectionReset.into());
    })
    .await;
    let found = problem(ask(&leased(9, &SECRET, Role::Replica), &peer, &TaskTracker::new()).await);
    assert!(matches!(found, PeerProblem::Connection(_)), "{found}");
}

/// One that stands still costs no more than the limit, and takes no other's answer away.
#[tokio::test]
async fn a_slow_peer_is_not_waited_for() {
    let kept = Arc::new(std::sync::Mutex::new(Vec::new()));
    let senders = kept.clone();
    let slow = answering(move |_, _, sender| senders.lock().unwrap().push(sender)).await;
    let quick = Asked::serve(leased(3, &SECRET, Role::Replica)).await;
    let asks = leased(9, &SECRET, Role::Replica);
    let peers = [slow.clone(), quick.peer.clone()];
    let limit = Duration::from_secs(20);
    let tracker = TaskTracker::new();
    let (answers, asked) = tokio::join!(ask_all(&asks, &peers, limit, &tracker), ask(&asks, &slow, &tracker));
    assert_eq!(answers.iter().map(|answer| answer.peer.node).collect::<Vec<_>>(), [quick.peer.node]);
    assert_eq!(kept.lock().unwrap().len(), 2, "the slow one was asked");
    let found = problem(asked);
    assert!(matches!(&found, PeerProblem::Connection(why) if why.contains("no answer within")), "{found}");
    let none = ask_all(&asks, &[slow], Duration::ZERO, &tracker).await;
    assert!(none.is_empty());
    quick.end().await;
    // What was given up leaves nothing.
    tracker.close();
    tokio::time::timeout(limit, tracker.wait()).await.expect("a task stays");
}

/// A service, and a request whose body is the caller's.
fn request(knock: &Knock) -> (Sender<Bytes, std::io::Error>, Request<Channel<Bytes, std::io::Error>>) {
    let (sender, body) = Channel::new(4);
    let mut request = Request::new(body);
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = "/_replite/v1/standing".parse().unwrap();
    *request.version_mut() = http::Version::HTTP_2;
    *request.headers_mut() = knock.headers(&keys(&SECRET)).unwrap();
    (sender, request)
}

fn service() -> (ReplicationService, TaskTracker) {
    let node = leased(1, &SECRET, Role::Replica);
    node.applied.replace(EpochHistory::default(), None);
    let tracker = TaskTracker::new();
    let replica_server = ReplicaServer::new(node.clone());
    (ReplicationService::new(node, replica_server, tracker.clone(), Mount::Own), tracker)
}

fn nonce_of(headers: &HeaderMap, knock: &Knock) -> Nonce {
    Answer::read(headers, knock, &keys(&SECRET)).unwrap().unwrap().0.nonce
}

#[tokio::test(start_paused = true)]
async fn who_recorded_a_knock_learns_nothing() {
    let (service, _) = service();
    type Body = fn(&Knock, &Nonce) -> Vec<u8>;
    let bodies: [(&str, Body); 5] = [
        ("nothing", |_, _| Vec::new()),
        ("a recorded question", |knock, _| proof_of(knock, &[0; 32])),
        ("half a question", |knock, nonce| proof_of(knock, nonce)[..16].to_vec()),
        ("more than a question", |knock, nonce| [proof_of(knock, nonce), vec![0]].concat()),
        ("too much", |_, _| vec![0; 1 << 20]),
    ];
    for (what, body) in bodies {
        let knock = knock_of();
        let (mut sender, request) = request(&knock);
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let nonce = nonce_of(response.headers(), &knock);
        sender.send_data(body(&knock, &nonce).into()).await.unwrap();
        drop(sender);
        assert!(response.into_body().collect().await.is_err(), "{what}: it breaks off");
    }
    // One that never asks is not waited for.
    let (_sender, request) = request(&knock_of());
    let response = service.clone().oneshot(request).await.unwrap();
    assert!(response.into_body().collect().await.is_err());
}

/// A fresh one: in the clear each holds once.
fn knock_of() -> Knock {
    Knock::by(&Asker::of(&node(2, &SECRET, Role::Replica)), Binding::NONE).unwrap()
}

fn proof_of(knock: &Knock, nonce: &Nonce) -> Vec<u8> {
    handshake::question(knock, nonce, &keys(&SECRET)).to_vec()
}

#[tokio::test(start_paused = true)]
async fn places_for_questions_are_bounded_and_free_again() {
    let (service, tracker) = service();
    let mut waiting = Vec::new();
    for _ in 0..ASKING_MAX {
        let (sender, request) = request(&knock_of());
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        waiting.push((sender, response));
    }
    let refused = |response: &Response<_>| {
        response.status() == Refusal::Busy.status() && response.headers()["replite-refused"] == "busy"
    };
    let busy = service.clone().oneshot(request(&knock_of()).1).await.unwrap();
    assert!(refused(&busy));
    drop((waiting, busy));
    tracker.close();
    tracker.wait().await;
    let knock = knock_of();
    let (mut sender, request) = request(&knock);
    let response = service.oneshot(request).await.unwrap();
    let nonce = nonce_of(response.headers(), &knock);
    sender.send_data(proof_of(&knock, &nonce).into()).await.unwrap();
    drop(sender);
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let mut decoder = Decoder::default();
    decoder.push(bytes);
    assert_eq!(decoder.next().unwrap().unwrap().kind, Kind::Standing);
}
