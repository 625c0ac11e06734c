//! How a node leaves: its server ends though clients and replicas would stay, and what runs is not
//! cut off.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::support::*;
use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use replite::{Config, Db, Error, Role, lease};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

/// What the documentation of `drain` and `shutdown` promises, together.
const BOUND: Duration = Duration::from_secs(3 + 9);

/// A node with its server, as an application runs it.
struct Instance {
    db: Db,
    address: SocketAddr,
    signal: oneshot::Sender<()>,
    server: JoinHandle<std::io::Result<()>>,
    /// A slow POST has begun, and may end.
    slow: Arc<(Notify, Notify)>,
}

/// A response that takes no notice of anything.
struct Endless;

impl http_body::Body for Endless {
    type Data = bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Self::Error>>> {
        cx.waker().wake_by_ref();
        Poll::Ready(Some(Ok(Frame::data("for ever ".into()))))
    }
}

fn app(db: &Db, slow: &Arc<(Notify, Notify)>) -> Router {
    let (writer, slow, events) = (db.clone(), slow.clone(), db.clone());
    let post_slowly = move || async move {
        slow.0.notify_one();
        slow.1.notified().await;
        insert(&writer, "slow", 1).await.number().to_string()
    };
    let sse = move || async move {
        let (mut sender, body) = Channel::<bytes::Bytes, std::convert::Infallible>::new(1);
        tokio::spawn(async move {
            let _ = sender.send_data("data: hello\n\n".into()).await;
            events.draining().await;
        });
        ([("content-type", "text/event-stream")], Body::new(body))
    };
    Router::new()
        .route("/slow", post(post_slowly))
        .route("/events", get(sse))
        .route("/endless", get(|| async { Body::new(Endless) }))
        .route("/", get(|| async { "here" }))
        .layer(db.replay_layer())
        .nest_service("/_replite", db.service())
}

impl Instance {
    async fn start(path: &Path, primary: Option<&Instance>) -> Instance {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config =
            Config::new(path).database("app").secret(secret()).advertise(format!("http://{address}"));
        let config = match primary {
            None => config.migrate(|conn| conn.execute_batch(SCHEMA)),
            Some(primary) => config.lease(lease::Fixed::replica_of(format!("http://{}", primary.address))),
        };
        let db = Db::open(config).await.unwrap();
        let slow = Arc::<(Notify, Notify)>::default();
        let (signal, asked) = oneshot::channel();
        let draining = db.clone();
        let server = axum::serve(listener, app(&db, &slow)).with_graceful_shutdown(async move {
            let _ = asked.await;
            draining.drain().await;
        });
        let server = tokio::spawn(server.into_future());
        Instance { db, address, signal, server, slow }
    }

    /// What follows on a SIGTERM.
    async fn end(self) {
        let _ = self.signal.send(());
        self.server.await.unwrap().unwrap();
        self.db.shutdown().await;
    }
}

/// A connection on which one request was answered, and its first bytes.
async fn ask(address: SocketAddr, path: &str, until: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut got = Vec::new();
    while !String::from_utf8_lossy(&got).contains(until) {
        let mut buffer = [0; 1024];
        let n = within("an answer", stream.read(&mut buffer)).await.unwrap();
        assert_ne!(n, 0, "{}", String::from_utf8_lossy(&got));
        got.extend_from_slice(&buffer[..n]);
    }
    stream
}

async fn post_slow(address: SocketAddr) -> (u16, String) {
    let client: hyper_util::client::legacy::Client<_, String> =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    let request = http::Request::post(format!("http://{address}/slow")).body(String::new()).unwrap();
    let (head, body) = client.request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (head.status.as_u16(), String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_with_replicas_event_streams_and_idle_clients_ends_within_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let p = Instance::start(&dir.path().join("p.db"), None).await;
    let a = Instance::start(&dir.path().join("a.db"), Some(&p)).await;
    let b = Instance::start(&dir.path().join("b.db"), Some(&p)).await;
    for replica in [&a, &b] {
        within("ready", replica.db.ready()).await.unwrap();
    }
    let _events = ask(p.address, "/events", "hello").await;
    let _idle = ask(p.address, "/", "here").await;
    let last = insert(&p.db, "last", 1).await;
    let began = Instant::now();
    p.end().await;
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    // Their streams were ended after they had sent everything.
    for replica in [a, b] {
        replica.db.wait_for(last).await.unwrap();
        assert!(replica.db.health().can_read, "{:?}", replica.db.health());
        assert_eq!(replica.db.role(), Role::Replica);
        let began = Instant::now();
        replica.end().await;
        assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_hangs_up_does_not_keep_the_database_open() {
    let dir = tempfile::tempdir().unwrap();
    let p = Instance::start(&dir.path().join("p.db"), None).await;
    let r = Instance::start(&dir.path().join("r.db"), Some(&p)).await;
    within("ready", r.db.ready()).await.unwrap();
    let _client = ask(p.address, "/endless", "for ever").await;
    let Instance { db, signal, mut server, .. } = p;
    let began = Instant::now();
    signal.send(()).unwrap();
    let limit = async {
        db.draining().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    // As in the documented `main`, but for its patience.
    tokio::select! {
        served = &mut server => panic!("it has a client: {served:?}"),
        () = limit => server.abort(),
    }
    db.shutdown().await;
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
    assert!(Db::open(Config::new(db.path()).database("app")).await.is_ok(), "nothing of it is left");
    within("the end", r.end()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_draining_replica_has_sent_on_is_answered_and_its_own_waits_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let p = Instance::start(&dir.path().join("p.db"), None).await;
    let r = Instance::start(&dir.path().join("r.db"), Some(&p)).await;
    within("ready", r.db.ready()).await.unwrap();
    let first = insert(&p.db, "first", 1).await;
    r.db.wait_for(first).await.unwrap();
    let next = first.number() + 1;
    let slow = tokio::spawn(post_slow(r.address));
    p.slow.0.notified().await;
    let waiting = {
        let (db, txid) = (r.db.clone(), replite::Txid::new(first.epoch(), next));
        tokio::spawn(async move { db.wait_for_timeout(txid, LIMIT).await })
    };
    let ended = tokio::spawn(r.db.draining());
    let Instance { db, signal, server, .. } = r;
    signal.send(()).unwrap();
    within("draining", ended).await.unwrap();
    assert!(!db.health().can_read && db.health().live, "a balancer sends nothing new");
    assert_eq!(count(&db), 1, "reads go on");
    assert!(!server.is_finished(), "the request holds it");
    p.slow.1.notify_one();
    let (status, number) = within("the slow request", slow).await.unwrap();
    assert_eq!((status, number), (200, next.to_string()));
    within("wait_for", waiting).await.unwrap().unwrap();
    within("the server", server).await.unwrap().unwrap();
    within("shutdown", db.shutdown()).await;
    assert!(matches!(db.wait_for(first).await, Err(Error::ShutDown)));
    p.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_runs_on_a_draining_primary_commits_and_nobody_is_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let p = Instance::start(&dir.path().join("p.db"), None).await;
    p.db.drain().await;
    insert(&p.db, "late", 1).await;
    assert_eq!(count(&p.db), 1);
    let r = Instance::start(&dir.path().join("r.db"), Some(&p)).await;
    let refused = || r.db.status().problem.is_some_and(|problem| problem.contains("stopping"));
    let mut events = r.db.events();
    within("the refusal", async {
        while !refused() {
            let _ = tokio::time::timeout(Duration::from_millis(10), events.next()).await;
        }
    })
    .await;
    assert!(p.db.status().replicas.is_empty());
    within("the ends", async {
        r.end().await;
        p.end().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_is_held_is_answered_when_its_node_drains() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::new(dir.path().join("r.db")).database("app").secret(secret());
    // Nobody is there.
    let lost = format!("http://127.0.0.1:{}", own_port());
    let db = Db::open(config.lease(lease::Fixed::replica_of(lost))).await.unwrap();
    let layer = db.replay_layer().hold_timeout(LIMIT).held_requests(10);
    let app: Router = Router::new().route("/", post(|| async { "here" })).layer(layer);
    let request = http::Request::post("/").body(Body::empty()).unwrap();
    let mut held = tokio::spawn(tower::ServiceExt::oneshot(app, request));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut held).await.is_err(), "it waits");
    db.drain().await;
    let response = within("an answer", held).await.unwrap().unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["replite-outcome"], "not-executed");
    db.shutdown().await;
}
