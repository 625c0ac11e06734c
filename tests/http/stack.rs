//! The layer among those of tower-http, in the order of docs/stack.md, on a primary and a replica.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::sse;
use axum::routing::{get, post};
use http::Request;
use http_body_util::BodyExt;
use replite::{Db, Error};
use tokio::sync::watch;
use tower::{Layer, ServiceBuilder};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::cors::CorsLayer;
use tower_http::decompression::RequestDecompressionLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::normalize_path::{NormalizePath, NormalizePathLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::sensitive_headers::SetSensitiveRequestHeadersLayer;
use tower_http::timeout::TimeoutLayer;
use tower_http::trace::TraceLayer;

use crate::http_support::*;
use crate::support::*;

// The same as in docs/stack.md.
fn app(db: &Db, routes: Router, limit: Duration) -> NormalizePath<Router> {
    let token = HeaderName::from_static("replite-token");
    let outcome = HeaderName::from_static("replite-outcome");
    let layers = ServiceBuilder::new() // from the outermost to the innermost
        .layer(SetSensitiveRequestHeadersLayer::new([COOKIE, AUTHORIZATION, token.clone()]))
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .layer(TraceLayer::new_for_http())
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(
            CorsLayer::new()
                .allow_origin([HeaderValue::from_static("https://shop.example")])
                .allow_methods([Method::GET, Method::POST])
                .allow_headers([CONTENT_TYPE, token.clone()])
                .expose_headers([token, outcome]),
        )
        .layer(RequestBodyLimitLayer::new(1 << 20))
        .layer(db.replay_layer())
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, limit))
        .layer(CompressionLayer::new())
        .layer(RequestDecompressionLayer::new())
        .layer(RequestBodyLimitLayer::new(1 << 20))
        .layer(CatchPanicLayer::new());
    let router = routes.layer(layers).nest_service("/_replite", db.service());
    NormalizePathLayer::trim_trailing_slash().layer(router)
}

/// What the handlers work with.
#[derive(Clone)]
struct App {
    db: Db,
    /// Each new number is an event.
    events: watch::Sender<u64>,
}

/// `POST /notes` adds, `GET /notes?text` answers at length, and there is one route for each way to
/// go wrong.
fn routes(app: App) -> Router {
    async fn write(db: &Db, text: String) -> Result<i64, Error> {
        let write = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES (?1)", [text])?)
        };
        Ok(db.write(write).await?.value as i64)
    }
    async fn add(State(app): State<App>, headers: HeaderMap, text: String) -> (StatusCode, String) {
        let (id, role) = (headers["x-request-id"].to_str().unwrap_or_default(), app.db.role());
        match write(&app.db, text.clone()).await {
            Ok(_) => (StatusCode::CREATED, format!("{id} {role} {text}")),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }
    async fn find(State(app): State<App>, RawQuery(text): RawQuery) -> String {
        let read = |conn: &replite::rusqlite::Connection| {
            let sql = "SELECT count(*) FROM t WHERE who = ?1";
            Ok::<i64, Error>(conn.query_row(sql, [text], |row| row.get(0))?)
        };
        let found = app.db.read(read).unwrap();
        // Long enough to be worth compressing.
        format!("{} {found} {}", app.db.role(), "x".repeat(2000))
    }
    async fn late(State(app): State<App>) -> String {
        write(&app.db, "late".into()).await.unwrap();
        panic!("after the commit")
    }
    async fn events(
        State(app): State<App>,
    ) -> sse::Sse<impl futures_util::Stream<Item = Result<sse::Event, Infallible>>> {
        let stream = futures_util::stream::unfold(app.events.subscribe(), async |mut numbers| {
            numbers.changed().await.ok()?;
            let event = sse::Event::default().data(numbers.borrow_and_update().to_string());
            Some((Ok(event), numbers))
        });
        sse::Sse::new(stream)
    }
    let slow = || std::future::pending::<()>();
    Router::new()
        .route("/notes", get(find).post(add))
        .route("/late", post(late))
        .route("/slow", get(slow).post(slow))
        .route("/events", get(events).post(events))
        .with_state(app)
}

/// One node, serving.
struct Node {
    db: Db,
    url: String,
    events: watch::Sender<u64>,
}

impl Node {
    async fn start(dir: &tempfile::TempDir, follows: Option<&Node>) -> Node {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let config = match follows {
            None => replite::Config::new(dir.path().join("p.db")).migrate(|conn| conn.execute_batch(SCHEMA)),
            Some(node) => replica(&dir.path().join("r.db"), &node.url),
        };
        let db = Db::open(config.database("app").secret(secret()).advertise(&url)).await.unwrap();
        let events = watch::Sender::new(0);
        let routes = routes(App { db: db.clone(), events: events.clone() });
        let app = app(&db, routes, Duration::from_millis(1500));
        let app = axum::ServiceExt::<axum::extract::Request>::into_make_service(app);
        tokio::spawn(axum::serve(listener, app).into_future());
        within("ready", db.ready()).await.unwrap();
        Node { db, url, events }
    }

    fn request(&self, method: &str, path: &str) -> http::request::Builder {
        let url = format!("{}{path}", self.url);
        Request::builder().method(method).uri(url).header("x-request-id", "mine")
    }
}

async fn pair() -> (tempfile::TempDir, Node, Node) {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::start(&dir, None).await;
    let replica = Node::start(&dir, Some(&primary)).await;
    (dir, primary, replica)
}

async fn send(request: http::request::Builder, body: impl Into<bytes::Bytes>) -> Answer {
    within("an answer", Http::new().send(request.body(body.into()).unwrap())).await.unwrap()
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn gunzip(answer: &Answer) -> String {
    let encodings: Vec<_> = answer.headers.get_all("content-encoding").iter().collect();
    assert_eq!(encodings, ["gzip"], "{answer:?}");
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(&answer.body[..]).read_to_string(&mut text).unwrap();
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_are_compressed_once_and_ids_are_the_same_on_both_nodes() {
    let (_dir, primary, replica) = pair().await;
    for (n, node) in [&primary, &replica].into_iter().enumerate() {
        // The slash at the end is taken off before the layer.
        let text = format!("note{n} {}", "y".repeat(3000));
        let post = || node.request("POST", "/notes/").header("accept-encoding", "gzip");
        let answer = send(post().header("content-encoding", "gzip"), gzip(&text)).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(gunzip(&answer), format!("mine primary {text}"));
        assert_eq!(answer.headers.get_all("x-request-id").iter().collect::<Vec<_>>(), ["mine"]);
        let token = answer.header("replite-token").to_string();
        let note = send(post(), format!("plain{n}")).await;
        assert_eq!(note.status, 201);
        let token = if n == 0 { token } else { note.header("replite-token").to_string() };
        for (role, reader) in [("primary", &primary), ("replica", &replica)] {
            let get = |method| {
                let path = format!("/notes?note{n}%20");
                reader.request(method, &path).header("replite-token", &token)
            };
            let plain = send(get("GET"), "").await;
            assert!(plain.text().starts_with(role) && plain.headers.get("content-encoding").is_none());
            let path = format!("/notes?plain{n}");
            let found =
                send(reader.request("GET", &path).header("replite-token", note.header("replite-token")), "");
            assert!(found.await.text().starts_with(&format!("{role} 1 ")));
            let packed = send(get("GET").header("accept-encoding", "gzip"), "").await;
            assert_eq!(gunzip(&packed), plain.text());
            assert!(packed.body.len() < 200 && packed.headers.get("content-length").is_none());
            let head = send(get("HEAD"), "").await;
            assert_eq!((head.status, head.body.len()), (200, 0));
            assert_eq!(head.header("content-length"), plain.header("content-length"));
        }
    }
    stop(primary, replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_too_large_is_refused_with_413_on_both_nodes() {
    let (_dir, primary, replica) = pair().await;
    for node in [&primary, &replica] {
        let large = vec![b'x'; (1 << 20) + 1];
        assert_eq!(send(node.request("POST", "/notes"), large.clone()).await.status, 413);
        // It is small until it is unpacked.
        let packed = gzip(&String::from_utf8(large).unwrap());
        let request = node.request("POST", "/notes").header("content-encoding", "gzip");
        assert_eq!(send(request, packed).await.status, 413);
    }
    stop(primary, replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_panics_after_its_commit_answers_with_its_token() {
    let (_dir, primary, replica) = pair().await;
    for node in [&primary, &replica] {
        let answer = send(node.request("POST", "/late"), "").await;
        assert_eq!(answer.status, 500);
        assert!(node.db.verify_token(answer.header("replite-token")).is_some(), "{answer:?}");
    }
    stop(primary, replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_come_one_by_one_and_the_time_limit_is_that_of_the_handler() {
    let (_dir, primary, replica) = pair().await;
    let connected = || primary.db.status().replicas.iter().map(|r| r.since).collect::<Vec<_>>();
    let since = connected();
    let mut bodies = Vec::new();
    for (method, node) in [("GET", &primary), ("GET", &replica), ("POST", &replica)] {
        let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new());
        let client: hyper_util::client::legacy::Client<_, String> = client.build_http();
        let request = node.request(method, "/events").header("accept-encoding", "gzip").body(String::new());
        let response = within("a head", client.request(request.unwrap())).await.unwrap();
        assert_eq!((response.status().as_u16(), response.headers().get("content-encoding")), (200, None));
        bodies.push((client, response.into_body()));
    }
    for n in 1..=3 {
        primary.events.send_replace(n);
        replica.events.send_replace(n);
        for (_, body) in &mut bodies {
            let frame = within("an event", body.frame()).await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), format!("data: {n}\n\n"));
        }
        if n == 1 {
            // Meanwhile the limit passes, for handlers that give no response.
            let slow = [("GET", &primary), ("GET", &replica), ("POST", &replica)]
                .map(|(method, node)| send(node.request(method, "/slow"), ""));
            let answers = futures_util::future::join_all(slow).await;
            assert!(answers.iter().all(|a| a.status == 504), "{answers:?}");
        }
    }
    drop(bodies);
    // Neither did it end the replica's own stream.
    let token = send(primary.request("POST", "/notes"), "last").await.header("replite-token").to_string();
    let answer = send(replica.request("GET", "/notes?last").header("replite-token", token), "").await;
    assert!(answer.text().starts_with("replica 1 "));
    assert_eq!((connected(), since.len()), (since, 1));
    stop(primary, replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_of_other_origins_can_read_tokens_and_refusals() {
    let (_dir, primary, replica) = pair().await;
    let origin = "https://shop.example";
    for node in [&primary, &replica] {
        let preflight = node.request("OPTIONS", "/notes").header("origin", origin);
        let answer = send(preflight.header("access-control-request-method", "POST"), "").await;
        assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, origin));
        let answer = send(node.request("POST", "/notes").header("origin", origin), "x").await;
        assert_eq!(answer.status, 201);
        for (name, value) in [
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", "replite-token,replite-outcome"),
        ] {
            assert_eq!(answer.headers.get_all(name).iter().collect::<Vec<_>>(), [value]);
        }
    }
    primary.db.shutdown().await;
    let answer = send(replica.request("POST", "/notes").header("origin", origin), "x").await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (503, origin));
    assert_eq!((answer.header("replite-outcome"), answer.header("x-request-id")), ("not-executed", "mine"));
    stop(primary, replica).await;
}

async fn stop(primary: Node, replica: Node) {
    within("shutdown", replica.db.shutdown()).await;
    within("shutdown", primary.db.shutdown()).await;
}

#[test]
fn the_order_is_the_documented_one() {
    let here = include_str!("stack.rs");
    let begin = here.find("fn app(").unwrap();
    let code = &here[begin..begin + here[begin..].find("\n}\n").unwrap()];
    assert!(include_str!("../../docs/stack.md").contains(code), "docs/stack.md has another order");
}
