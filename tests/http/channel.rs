//! Forwarded requests on the private channel: the primary's application has no address at all that
//! others could reach.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::{Message, WebSocketUpgrade};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{any, get, post};
use bytes::Bytes;
use futures_util::SinkExt;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use replite::{Config, Db, Error, Route, Secret, lease};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite;

use crate::http_support::{Answer, Http};
use crate::support::*;

/// Where replication is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Door {
    Own,
    Mounted,
}

const DOORS: [Door; 2] = [Door::Own, Door::Mounted];

/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9";

/// Whether a node is given its application.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Given {
    Yes,
    /// And forwards in clear text where it has to.
    InClear,
    Not,
}

struct Node {
    db: Db,
    /// Of the server that clients reach.
    address: SocketAddr,
    replication: String,
}

impl Node {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }
}

fn app(db: &Db) -> Router {
    app_of(db, false)
}

fn app_of(db: &Db, in_clear: bool) -> Router {
    async fn add(State(db): State<Db>, text: String) -> Result<StatusCode, Error> {
        db.write(move |tx| Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES (?1)", [text])?)).await?;
        Ok(StatusCode::CREATED)
    }
    async fn count(State(db): State<Db>) -> Result<String, Error> {
        let count: i64 =
            db.read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))?;
        Ok(count.to_string())
    }
    async fn mirror(request: Request) -> String {
        let (parts, body) = request.into_parts();
        let mut text = format!("{} {}\n", parts.method, parts.uri);
        for (name, value) in &parts.headers {
            text.push_str(&format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
        }
        text.push('\n');
        text + &String::from_utf8_lossy(&body.collect().await.unwrap().to_bytes())
    }
    async fn length(request: Request) -> String {
        let (mut body, mut length) = (request.into_body(), 0);
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().map_or(0, |data| data.len());
        }
        length.to_string()
    }
    async fn trailers(request: Request) -> Response {
        let body = request.into_body().collect().await.unwrap();
        let mut sent = body.trailers().cloned().unwrap_or_default();
        sent.insert("x-status", "0".parse().unwrap());
        let frames = [Frame::data(body.to_bytes()), Frame::trailers(sent)];
        let frames = futures_util::stream::iter(frames.map(Ok::<_, std::convert::Infallible>));
        Response::new(Body::new(StreamBody::new(frames)))
    }
    async fn chat(upgrade: WebSocketUpgrade) -> Response {
        upgrade.protocols(["b"]).on_upgrade(|mut socket| async move {
            while let Some(Ok(message)) = socket.recv().await {
                if let Message::Text(text) = message {
                    let _ = socket.send(Message::text(format!("primary: {text}"))).await;
                }
            }
        })
    }
    async fn long_head() -> Response {
        let mut response = Response::new(Body::from("x".repeat(1000)));
        for n in 0..40 {
            let name = format!("x-long-{n}").parse::<axum::http::HeaderName>().unwrap();
            response.headers_mut().insert(name, "y".repeat(1000).parse().unwrap());
        }
        response
    }
    Router::new()
        .route("/", get(count).post(add))
        .route("/long-head", post(long_head))
        .route("/mirror/{*rest}", any(mirror))
        .route("/length", post(length))
        .route("/trailers", post(trailers))
        .route("/chat", any(chat))
        .route("/no-chat", any(|| async { StatusCode::NO_CONTENT }))
        .with_state(db.clone())
        .layer(
            db.replay_layer()
                .forward_in_clear(in_clear)
                .route_prefix("/chat", Route::Primary)
                .route_prefix("/no-chat", Route::Primary),
        )
}

/// A node with a server for its clients. What other nodes forward reaches it by the channel or not
/// at all: it says that its application is elsewhere.
async fn node(path: &Path, door: Door, given: Given, primary: Option<&Node>) -> Node {
    node_at(NOWHERE, path, door, given, primary).await
}

/// The same, which says that its application is there.
async fn node_at(at: &str, path: &Path, door: Door, given: Given, primary: Option<&Node>) -> Node {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let replication = match door {
        Door::Own => format!("replite://127.0.0.1:{}", own_port()),
        Door::Mounted => format!("http://{address}"),
    };
    let addresses = replite::Addresses::new(at).replication(&replication);
    let mut config = Config::new(path).database("app").secret(secret()).addresses(addresses);
    if door == Door::Own {
        config = config.listen(replication.strip_prefix("replite://").unwrap().parse().unwrap());
    }
    config = match primary {
        None => config.migrate(|conn| conn.execute_batch(SCHEMA)),
        Some(primary) => config.lease(lease::Fixed::replica_of(&primary.replication)),
    };
    let db = Db::open(config).await.unwrap();
    let app = app_of(&db, given == Given::InClear);
    if given != Given::Not {
        db.serve_forwarded(app.clone()).unwrap();
    }
    let app = app.nest_service("/_replite", db.service());
    tokio::spawn(axum::serve(listener, app).into_future());
    within("ready", db.ready()).await.unwrap();
    Node { db, address, replication }
}

async fn pair(dir: &Path, door: Door) -> (Node, Node) {
    let primary = node(&dir.join("p.db"), door, Given::Yes, None).await;
    let replica = node(&dir.join("r.db"), door, Given::Yes, Some(&primary)).await;
    (primary, replica)
}

async fn end(nodes: [Node; 2]) {
    for node in nodes.into_iter().rev() {
        within("an end", node.db.shutdown()).await;
    }
}

fn post_to(url: String, body: impl Into<Bytes>) -> http::Request<Bytes> {
    http::Request::post(url).body(body.into()).unwrap()
}

async fn send(request: http::Request<Bytes>) -> Answer {
    within("an answer", Http::new().send(request)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_reach_the_primary_on_the_channel_alone() {
    for door in DOORS {
        let dir = tempfile::tempdir().unwrap();
        let (primary, replica) = pair(dir.path(), door).await;
        let answer = send(post_to(replica.url("/"), "a")).await;
        assert_eq!(answer.status, 201, "{door:?} {answer:?}");
        let token = answer.header("replite-token").to_owned();
        let read = http::Request::get(replica.url("/")).header("replite-token", token).body(Bytes::new());
        assert_eq!(send(read.unwrap()).await.text(), "1");
        // Path, query, headers and host as they came, and no other.
        let request = http::Request::post(replica.url("/mirror/a%2Fb//../x?q=%20+&z"))
            .header("host", "app.example:81")
            .header("cookie", "a=1; b=2")
            .body(Bytes::from_static(b"body"));
        let mirrored = send(request.unwrap()).await.text();
        assert_eq!(
            mirrored,
            "POST /mirror/a%2Fb//../x?q=%20+&z\nhost: app.example:81\ncookie: a=1; b=2\n\
             content-length: 4\n\nbody",
            "{door:?}"
        );
        // Longer than all windows.
        let long = vec![7; 40 << 20];
        let answer = send(post_to(replica.url("/length"), long)).await;
        assert_eq!((answer.status, answer.text()), (200, (40 << 20).to_string()));
        end([primary, replica]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_go_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (primary, replica) = pair(dir.path(), Door::Own).await;
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "7".parse().unwrap());
    let frames = [Frame::data(Bytes::from_static(b"data")), Frame::trailers(trailers)];
    let frames = futures_util::stream::iter(frames.map(Ok::<_, std::convert::Infallible>));
    let client: Client<HttpConnector, _> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let request = http::Request::post(replica.url("/trailers")).header("te", "trailers");
    let sent = client.request(request.body(StreamBody::new(frames)).unwrap());
    let body = within("an answer", sent).await.unwrap().into_body().collect().await.unwrap();
    let trailers = body.trailers().cloned().unwrap();
    assert_eq!((trailers["x-sum"].to_str().unwrap(), trailers["x-status"].to_str().unwrap()), ("7", "0"));
    assert_eq!(body.to_bytes(), "data");
    end([primary, replica]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_reaches_the_primary() {
    for door in DOORS {
        let dir = tempfile::tempdir().unwrap();
        let (primary, replica) = pair(dir.path(), door).await;
        let io = TcpStream::connect(replica.address).await.unwrap();
        let mut request = tungstenite::client::IntoClientRequest::into_client_request(format!(
            "ws://{}/chat",
            replica.address
        ));
        let headers = request.as_mut().unwrap().headers_mut();
        headers.insert("sec-websocket-protocol", "a, b".parse().unwrap());
        headers.insert("content-length", "0".parse().unwrap());
        let opened = tokio_tungstenite::client_async(request.unwrap(), io);
        let (mut socket, response) = within("a WebSocket", opened).await.unwrap();
        assert_eq!(response.headers()["sec-websocket-protocol"], "b");
        for word in ["one", "two"] {
            socket.send(tungstenite::Message::text(word)).await.unwrap();
            let said =
                within("an answer", futures_util::StreamExt::next(&mut socket)).await.unwrap().unwrap();
            assert_eq!(said.into_text().unwrap(), format!("primary: {word}"));
        }
        socket.close(None).await.unwrap();
        // One that does not switch says so, with its own status.
        let io = TcpStream::connect(replica.address).await.unwrap();
        let asked = tokio_tungstenite::client_async(format!("ws://{}/no-chat", replica.address), io);
        match within("an answer", asked).await.map(drop).unwrap_err() {
            tungstenite::Error::Http(response) => assert_eq!(response.status(), 204),
            other => panic!("{other}"),
        }
        end([primary, replica]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_said_in_the_clear_to_a_primary_that_serves_no_channel() {
    for given in [Given::Yes, Given::InClear, Given::Not] {
        let dir = tempfile::tempdir().unwrap();
        let clear = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = format!("http://{}", clear.local_addr().unwrap());
        let primary = node_at(&at, &dir.path().join("p.db"), Door::Own, Given::Not, None).await;
        let replica = node(&dir.path().join("r.db"), Door::Own, given, Some(&primary)).await;
        let sent = send(post_to(replica.url("/"), "secret"));
        if given == Given::Yes {
            tokio::select! {
                // After it was held.
                answer = sent => assert_eq!((answer.status, answer.header("replite-outcome")), (503, "not-executed")),
                _ = clear.accept() => panic!("it goes to the application's address"),
            }
            // Once the primary is given its application, requests get there.
            primary.db.serve_forwarded(app(&primary.db)).unwrap();
            assert_eq!(send(post_to(replica.url("/"), "secret")).await.status, 201);
        } else {
            tokio::select! {
                answer = sent => panic!("{answer:?}"),
                came = clear.accept() => drop(came.unwrap()),
            }
        }
        end([primary, replica]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_application_is_given_once() {
    let dir = tempfile::tempdir().unwrap();
    let primary = node(&dir.path().join("p.db"), Door::Own, Given::Yes, None).await;
    let twice = primary.db.serve_forwarded(app(&primary.db)).unwrap_err();
    assert!(matches!(&twice, Error::Config(why) if why.contains("before")), "{twice}");
    primary.db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_comes_as_it_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let (primary, replica) = pair(dir.path(), Door::Own).await;
    for node in [&primary, &replica] {
        let answer = send(post_to(node.url("/long-head"), "")).await;
        let long = answer.headers.iter().filter(|(name, _)| name.as_str().starts_with("x-long-"));
        assert_eq!((answer.status, long.count(), answer.header("content-length")), (200, 40, "1000"));
    }
    end([primary, replica]).await;
}

/// While the secrets are changed the two nodes have none in common for a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_waits_while_the_secrets_are_changed() {
    let dir = tempfile::tempdir().unwrap();
    let (primary, replica) = pair(dir.path(), Door::Own).await;
    assert_eq!(send(post_to(replica.url("/"), "before")).await.status, 201);
    let new = Secret::from_bytes(std::array::from_fn(|n| n as u8 ^ 0x5a)).unwrap();
    replica.db.rotate_secrets(std::slice::from_ref(&new)).unwrap();
    let waits = tokio::spawn(send(post_to(replica.url("/"), "meanwhile")));
    // The stream ends, and can't begin anew.
    comes("the end of the stream", || replica.db.status().problem.is_some()).await;
    assert!(!waits.is_finished());
    primary.db.rotate_secrets(&[new]).unwrap();
    assert_eq!(within("an answer", waits).await.unwrap().status, 201);
    let rows: i64 = primary
        .db
        .read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))
        .unwrap();
    assert_eq!(rows, 2, "each is there once");
    end([primary, replica]).await;
}

/// Its address leads nowhere, and it is not needed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_calls_its_own_application_without_the_network() {
    let dir = tempfile::tempdir().unwrap();
    let (primary, replica) = pair(dir.path(), Door::Own).await;
    for node in [&primary, &replica] {
        let request = http::Request::post("/").body(http_body_util::Full::new(Bytes::from_static(b"a job")));
        let sent = tower::ServiceExt::oneshot(node.db.primary_client(), request.unwrap());
        assert_eq!(within("an answer", sent).await.unwrap().status(), 201);
    }
    end([primary, replica]).await;
}
