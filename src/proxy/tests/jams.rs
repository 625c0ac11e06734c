//! Clients that take all there is of something, and others that are served all the same.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::channel::Sender;
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Route};
use crate::session::Session;
use crate::status::Role;

/// Where those are that jam, and where another client is.
const JAMS: [u8; 4] = [127, 0, 0, 1];
const OTHER: [u8; 4] = [127, 0, 0, 2];

/// How many requests a client has on one connection in HTTP/2, which spares descriptors.
const STREAMS: usize = 150;

/// The address by which a client is counted: as it says, or else that of its socket.
fn counted(layer: ReplayLayer) -> ReplayLayer {
    layer.client_ip(|parts| {
        let said = parts.headers.get("x-client").map(|ip| ip.to_str().unwrap().parse().unwrap());
        said.or_else(|| parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|c| c.0.ip()))
    })
}

fn client(from: [u8; 4], http2: bool) -> Client<HttpConnector, TestBody> {
    let mut connector = HttpConnector::new();
    connector.set_local_address(Some(IpAddr::from(from)));
    Client::builder(TokioExecutor::new()).http2_only(http2).build(connector)
}

/// Serves a node's app; the layer shows how much of everything is taken.
async fn replica(primary: &str, app: Router, layer: impl FnOnce(ReplayLayer) -> ReplayLayer) -> Jammed {
    let node = node(2, Role::Replica);
    follow(&node, 1, (!primary.is_empty()).then(|| peer(1, primary)));
    let layer = layer(counted(ReplayLayer::new(node.clone())));
    Jammed { server: Server::start(app.layer(layer.clone())).await, layer, node }
}

struct Jammed {
    server: Server,
    layer: ReplayLayer,
    node: Arc<crate::context::NodeContext>,
}

/// Requests that hang, with their bodies.
#[derive(Default)]
struct Jam {
    senders: Vec<Sender<Bytes, std::convert::Infallible>>,
    requests: JoinSet<Response<Incoming>>,
    refused: usize,
}

impl Jammed {
    fn forwards(&self) -> usize {
        self.layer.shared.forwards.used()
    }

    fn held(&self) -> usize {
        self.layer.shared.held.used()
    }

    fn kept(&self) -> usize {
        self.layer.shared.options.budget.used()
    }

    /// Every request of the jam has a place, waits for one, or was refused.
    async fn settled(&self, jam: &mut Jam) {
        let requests = jam.senders.len();
        comes("a place, or an answer, for each", || {
            while let Some(refused) = jam.requests.try_join_next() {
                is(&refused.unwrap(), 503, "not-executed");
                jam.refused += 1;
            }
            self.forwards() + self.held() + jam.refused == requests
        })
        .await;
    }

    /// So many requests whose bodies have begun, of a declared length or of none.
    async fn jam(&self, requests: usize, declared: Option<usize>, begun: usize) -> Jam {
        self.jam_by(requests, declared, begun, |_, request| request).await
    }

    async fn jam_by(
        &self,
        requests: usize,
        declared: Option<usize>,
        begun: usize,
        change: fn(usize, http::request::Builder) -> http::request::Builder,
    ) -> Jam {
        let mut jam = Jam::default();
        let mut client = client(JAMS, true);
        for number in 0..requests {
            if number % STREAMS == 0 {
                client = self::client(JAMS, true);
            }
            let (mut sender, body) = piecewise();
            let mut request = change(number, Request::post(self.server.url()));
            if let Some(bytes) = declared {
                request = request.header("content-length", bytes);
            }
            let (client, request) = (client.clone(), request.body(body).unwrap());
            jam.requests.spawn(async move { client.request(request).await.unwrap() });
            sender.send(Frame::data(vec![b'x'; begun].into())).await.unwrap();
            jam.senders.push(sender);
        }
        jam
    }

    /// A small request of an honest client is answered within a second. It may try three times:
    /// the machine has other things to do, and the jam lasts.
    async fn serves(&self, from: [u8; 4], declares: bool) -> Response<Incoming> {
        for _ in 0..3 {
            let client = client(from, !declares);
            let body = match declares {
                true => full("y".repeat(1000)),
                false => {
                    let (mut sender, body) = piecewise();
                    push(&mut sender, "of unknown length").await;
                    body
                }
            };
            let request = client.request(Request::post(self.server.url()).body(body).unwrap());
            if let Ok(response) = tokio::time::timeout(Duration::from_secs(1), request).await {
                return response.unwrap();
            }
        }
        panic!("no answer in a second to {from:?}, declared: {declares}");
    }

    async fn serves_all(&self) {
        for from in [OTHER, JAMS] {
            for declares in [true, false] {
                let response = self.serves(from, declares).await;
                assert_eq!(response.status(), 200, "{from:?}, declared: {declares}");
                assert!(text(response).await.starts_with("primary"));
            }
        }
    }
}

/// An app that reads the whole body, and counts what it has begun with.
fn reads(begun: &Arc<AtomicUsize>) -> Router {
    let begun = begun.clone();
    Router::new().fallback(move |body: Body| {
        begun.fetch_add(1, Ordering::Relaxed);
        async move {
            let read = axum::body::to_bytes(body, usize::MAX).await;
            format!("primary {}", read.map_or(0, |bytes| bytes.len()))
        }
    })
}

/// A primary whose server takes so many connections at one time.
async fn few_connections(connections: usize, app: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let places = Arc::new(Semaphore::new(connections));
    tokio::spawn(async move {
        loop {
            let place = places.clone().acquire_owned().await;
            let (stream, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(app.clone());
            let served = hyper::server::conn::http1::Builder::new();
            tokio::spawn(async move {
                let _ = served.serve_connection(TokioIo::new(stream), service).await;
                drop(place);
            });
        }
    });
    url
}

/// A primary whose server takes 300 connections, and a replica that has none to it yet.
async fn with_few_connections(begun: &Arc<AtomicUsize>) -> Jammed {
    let app = reads(begun).layer(ReplayLayer::new(node(1, Role::Primary)));
    replica(&few_connections(300, app).await, Router::new(), |l| l).await
}

#[tokio::test]
async fn slow_bodies_that_can_be_kept_cost_the_primary_nothing() {
    let begun = Arc::new(AtomicUsize::new(0));
    let jammed = with_few_connections(&begun).await;
    let jam = jammed.jam(450, Some(1000), 10).await;
    comes("all of it", || jammed.kept() == 450 * 10).await;
    assert_eq!((begun.load(Ordering::Relaxed), jammed.forwards()), (0, 0));
    jammed.serves_all().await;
    assert_eq!(jammed.kept(), 450 * 10, "it lasted");
    drop(jam);
    comes("an end", || jammed.kept() + jammed.forwards() == 0).await;
}

#[tokio::test]
async fn slow_bodies_leave_the_primary_to_others() {
    let begun = Arc::new(AtomicUsize::new(0));
    for (declared, bytes) in [(Some(1 << 20), 10), (None, 10), (None, 100_000)] {
        let jammed = with_few_connections(&begun).await;
        let mut jam = jammed.jam(450, declared, bytes).await;
        jammed.settled(&mut jam).await;
        jammed.serves_all().await;
        assert_eq!(jammed.forwards(), 96, "it lasted: {declared:?} {bytes}");
        drop(jam);
        comes("an end", || jammed.kept() + jammed.forwards() + jammed.held() == 0).await;
    }
}

#[tokio::test]
async fn slow_streams_leave_the_connection_to_others() {
    let begun = Arc::new(AtomicUsize::new(0));
    let primary = Server::start(reads(&begun).layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let jammed = replica(&primary.url(), Router::new(), |l| l.http2(true)).await;
    for declared in [Some(1 << 20), None] {
        let mut jam = jammed.jam(270, declared, 10).await;
        jammed.settled(&mut jam).await;
        jammed.serves_all().await;
        assert_eq!(jammed.forwards(), 96, "it lasted");
        drop(jam);
        comes("an end", || jammed.forwards() + jammed.held() == 0).await;
    }
}

#[tokio::test]
async fn silent_clients_leave_room_for_the_bodies_of_others() {
    let begun = Arc::new(AtomicUsize::new(0));
    let primary = Server::start(reads(&begun).layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let read = Arc::new(AtomicUsize::new(0));
    let counted = read.clone();
    let app = Router::new().fallback(move |session: Session, mut body: Body| async move {
        while let Some(Ok(frame)) = body.frame().await {
            counted.fetch_add(frame.data_ref().map_or(0, Bytes::len), Ordering::Relaxed);
        }
        session.need_primary();
    });
    let jammed = replica(&primary.url(), app, |l| l.route_prefix("/", Route::LocalThenReplay)).await;
    let most = jammed.layer.shared.options.budget.request;
    // One client, and as many as there are requests.
    let said: fn(usize, http::request::Builder) -> http::request::Builder =
        |number, request| request.header("x-client", IpAddr::from([10, 0, 1, number as u8]).to_string());
    for (change, kept) in [(None, 1536 * 1024), (Some(said), 12 * 1024 * 1024)] {
        let jam = jammed.jam_by(256, Some(most), most - 1, change.unwrap_or(|_, request| request)).await;
        comes("all of it", || read.load(Ordering::Relaxed) == 256 * (most - 1)).await;
        jammed.serves_all().await;
        assert!((kept - most..=kept).contains(&jammed.kept()), "it lasted");
        drop(jam);
        comes("an end", || jammed.kept() == 0).await;
        read.store(0, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn of_silent_clients_nothing_is_kept_after_the_idle_limit() {
    let app = Router::new().fallback(|body: Bytes| async move { format!("here {}", body.len()) });
    let options = |l: ReplayLayer| l.route_prefix("/", Route::LocalThenReplay).idle_timeout(SHORT);
    let jammed = replica("", app, options).await;
    let mut jam = jammed.jam(1, Some(1001), 1000).await;
    comes("what is kept of it", || jammed.kept() == 1000).await;
    comes("an end of that", || jammed.kept() == 0).await;
    push(&mut jam.senders[0], "x").await;
    drop(jam.senders);
    assert_eq!(text(jam.requests.join_next().await.unwrap().unwrap()).await, "here 1001");
}

#[tokio::test]
async fn held_requests_of_one_client_leave_places_to_others() {
    let begun = Arc::new(AtomicUsize::new(0));
    let primary = Server::start(reads(&begun).layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let app = Router::new().fallback(|| async { "here" });
    let jammed = replica("", app, |l| l.hold_timeout(LONG)).await;
    let mut jam = jammed.jam(1100, Some(5), 5).await;
    jammed.settled(&mut jam).await;
    // While there is no primary, another client waits, and the same one is told at once.
    let post = Request::post(jammed.server.url()).body(full("late")).unwrap();
    let waiting = tokio::spawn(client(OTHER, false).request(post));
    comes("a place for another client", || waiting.is_finished() || jammed.held() == 129).await;
    assert!(!waiting.is_finished(), "it has a place");
    is(&jammed.serves(JAMS, true).await, 503, "not-executed");
    let get = Request::get(jammed.server.url()).body(full("")).unwrap();
    assert_eq!(text(client(JAMS, false).request(get).await.unwrap()).await, "here");
    assert_eq!((jammed.held(), jammed.kept()), (129, 0), "with their bodies unread");
    follow(&jammed.node, 2, Some(peer(1, &primary.url())));
    let late = tokio::time::timeout(Duration::from_secs(1), waiting).await.expect("within a second");
    assert_eq!(text(late.unwrap().unwrap()).await, "primary 4");
    jammed.serves_all().await;
}

#[tokio::test]
async fn a_small_body_that_stops_is_answered_before_the_primary_is_asked() {
    let begun = Arc::new(AtomicUsize::new(0));
    let primary = Server::start(reads(&begun).layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    for http2 in [false, true] {
        let jammed = replica(&primary.url(), Router::new(), |l| l.idle_timeout(SHORT).http2(http2)).await;
        let mut small = jammed.jam(1, Some(1000), 10).await;
        is(&small.requests.join_next().await.unwrap().unwrap(), 408, "not-executed");
        assert_eq!(begun.load(Ordering::Relaxed), 0);
        // Of a large one it has the beginning.
        let mut large = jammed.jam(1, Some(100_000), 10).await;
        is(&large.requests.join_next().await.unwrap().unwrap(), 408, "unknown");
        assert_eq!(begun.swap(0, Ordering::Relaxed), 1);
        comes("an end", || jammed.forwards() + jammed.kept() == 0).await;
    }
}

#[tokio::test]
async fn who_finds_no_place_waits_for_one() {
    let go_on = Arc::new(Notify::new());
    let waits = go_on.clone();
    let app = Router::new().fallback(|| async move {
        waits.notified().await;
        "primary"
    });
    let primary = Server::start(app.layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let options = |l: ReplayLayer| l.forwarded_requests(1).hold_timeout(LONG);
    let jammed = replica(&primary.url(), Router::new(), options).await;
    let post = || client(JAMS, false).request(Request::post(jammed.server.url()).body(full("x")).unwrap());
    let first = tokio::spawn(post());
    comes("the first", || jammed.forwards() == 1).await;
    let second = tokio::spawn(post());
    comes("one that waits", || jammed.held() == 1).await;
    go_on.notify_one();
    let first = first.await.unwrap().unwrap();
    assert_eq!(text(first).await, "primary", "its place is free at the response's end");
    comes("the second has the place", || jammed.held() == 0).await;
    go_on.notify_one();
    assert_eq!(text(second.await.unwrap().unwrap()).await, "primary");
    comes("an end", || jammed.forwards() == 0).await;

    let options = |l: ReplayLayer| l.client_requests(1).hold_timeout(SHORT);
    let jammed = replica(&primary.url(), Router::new(), options).await;
    let post =
        |from| client(from, false).request(Request::post(jammed.server.url()).body(full("x")).unwrap());
    let first = tokio::spawn(post(JAMS));
    comes("the first", || jammed.forwards() == 1).await;
    is(&post(JAMS).await.unwrap(), 503, "not-executed");
    let other = tokio::spawn(post(OTHER));
    comes("another client", || jammed.forwards() == 2).await;
    go_on.notify_one();
    go_on.notify_one();
    for each in [first, other] {
        assert_eq!(each.await.unwrap().unwrap().status(), 200);
    }
}

#[tokio::test]
async fn an_event_stream_has_a_place_until_it_begins() {
    let app = Router::new().fallback(|| async {
        let events = Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>());
        Response::builder().header("content-type", "text/event-stream").body(events).unwrap()
    });
    let primary = Server::start(app.layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let jammed = replica(&primary.url(), Router::new(), |l| l).await;
    let request = Request::post(jammed.server.url()).body(full("x")).unwrap();
    let response = client(JAMS, false).request(request).await.unwrap();
    assert_eq!((response.status().as_u16(), jammed.forwards()), (200, 0));
}
