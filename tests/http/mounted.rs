//! The layer in each place where an axum application can put one: on a replica in a process of its
//! own, in front of a primary that speaks HTTP/1.1 only.

use std::path::Path;
use std::time::Duration;

use crate::http_support::Http;
use crate::support::*;
use axum::error_handling::HandleErrorLayer;
use axum::extract::{FromRequestParts, OriginalUri, Request, State};
use axum::handler::Handler;
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::middleware::{Next, from_extractor, from_fn, from_fn_with_state, map_request, map_response};
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};
use axum::{Extension, Router};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use replite::{Db, Error, Role, Route};
use tower::{Layer, ServiceBuilder};
use tower_http::compression::CompressionLayer;
use tower_http::trace::TraceLayer;

async fn passes(request: Request, next: Next) -> Response {
    next.run(request).await
}

async fn passes_with(State(_): State<Db>, request: Request, next: Next) -> Response {
    next.run(request).await
}

struct Nothing;

impl<S: Sync> FromRequestParts<S> for Nothing {
    type Rejection = StatusCode;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Nothing, StatusCode> {
        Ok(Nothing)
    }
}

/// Says where it ran, and what it was asked. A GET with a query writes as well.
async fn answer(
    State(db): State<Db>,
    OriginalUri(uri): OriginalUri,
    method: axum::http::Method,
    body: String,
) -> Result<String, Error> {
    if method == axum::http::Method::POST || uri.query().is_some() {
        db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES ('x')", [])?)).await?;
    }
    let role = if db.role() == Role::Primary { "primary" } else { "replica" };
    let rows: i64 = db.read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))?;
    Ok(format!("{role} {rows} {method} {uri} {body}"))
}

fn both() -> MethodRouter<Db> {
    get(answer).post(answer)
}

fn at(path: &str) -> Router<Db> {
    Router::new().route(path, both())
}

fn all(db: &Db) -> Router {
    let layer = || db.replay_layer();
    async fn gone(_: tower::BoxError) -> StatusCode {
        StatusCode::GATEWAY_TIMEOUT
    }
    let fallible = || ServiceBuilder::new().layer(HandleErrorLayer::new(gone)).map_err(tower::BoxError::from);
    let stated = || from_fn_with_state(db.clone(), passes_with);
    let places: [Router<Db>; 18] = [
        at("/layer").layer(layer()),
        at("/route_layer").route_layer(layer()),
        at("/above").layer(ServiceBuilder::new().layer(layer()).layer(from_fn(passes))),
        at("/below").layer(ServiceBuilder::new().layer(from_fn(passes)).layer(layer())),
        at("/between").layer(ServiceBuilder::new().layer(from_fn(passes)).layer(layer()).layer(stated())),
        at("/one_by_one").layer(from_fn(passes)).layer(layer()).layer(from_fn(passes)),
        Router::new().nest("/nest", at("/x").layer(layer())),
        Router::new().nest("/nests/{id}", Router::new().nest("/deep", at("/x").route_layer(layer()))),
        Router::new().nest("/around", at("/x")).layer(layer()),
        Router::new().merge(at("/merged").layer(layer())).merge(at("/merged/other").layer(layer())),
        Router::new().route("/method", both().layer(layer())),
        Router::new().route("/method_route", both().route_layer(layer())),
        Router::new().route("/handler", get(answer.layer(layer())).post(answer.layer(layer()))),
        Router::new().route_service("/service", layer().layer(both().with_state(db.clone()))),
        Router::new().nest_service("/nested_service", layer().layer(at("/x").with_state(db.clone()))),
        at("/mapped").layer(
            ServiceBuilder::new()
                .layer(map_request(async |request: Request| request))
                .layer(layer())
                .layer(map_request(async |request: Request| request))
                .layer(map_response(async |response: Response| response))
                .layer(from_extractor::<Nothing>())
                .layer(Extension(1)),
        ),
        at("/fallible").layer(ServiceBuilder::new().layer(fallible()).layer(layer()).layer(fallible())),
        at("/http").layer(
            ServiceBuilder::new()
                .layer(TraceLayer::new_for_http())
                .layer(layer())
                .layer(CompressionLayer::new())
                .layer(TraceLayer::new_for_http()),
        ),
    ];
    let routed = Router::new()
        .route("/primary", get(answer))
        .route("/waits", get(answer))
        .layer(layer().route_prefix("/primary", Route::Primary).wait_timeout(Duration::from_millis(100)));
    let matched = Router::new()
        .route("/matched/{id}/callback", get(answer).post(post(answer)))
        .layer(layer().route_matched("/matched/{id}/callback", Route::Primary));
    let fallback = Router::new().fallback(answer).layer(layer());
    let every = places.into_iter().fold(Router::new(), Router::merge);
    every.merge(routed).merge(matched).nest("/fallback", fallback).with_state(db.clone())
}

#[test]
#[ignore = "runs as the child of another test"]
fn node_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let path = Path::new(&variable("DB")).to_owned();
        let of = variable("PRIMARY");
        let config = if of.is_empty() { primary(&path, 0) } else { replica(&path, &of) };
        let db = Db::open(config.advertise(&url)).await.unwrap();
        db.ready().await.unwrap();
        if of.is_empty() {
            // As axum without its feature `http2`.
            let app = all(&db);
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let http1 = hyper::server::conn::http1::Builder::new();
                    let service = TowerToHyperService::new(app.clone());
                    tokio::spawn(http1.serve_connection(TokioIo::new(stream), service));
                }
            });
        } else {
            let app = all(&db);
            tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        }
        // Around a whole router.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let around = listener.local_addr().unwrap();
        let app = db.replay_layer().layer(at("/layer").with_state(db.clone()));
        let app = axum::ServiceExt::<Request>::into_make_service(app);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        speak(&format!("ready {url} http://{around} {}", db.node().addresses.replication));
        std::mem::forget(db);
    });
    // Until the parent ends.
    hear();
}

const PLACES: [&str; 21] = [
    "/layer",
    "/route_layer",
    "/above",
    "/below",
    "/between",
    "/one_by_one",
    "/nest/x",
    "/nests/7/deep/x",
    "/around/x",
    "/merged",
    "/merged/other",
    "/method",
    "/method_route",
    "/handler",
    "/service",
    "/nested_service/x",
    "/mapped",
    "/fallible",
    "/http",
    "/fallback/any/thing",
    "/matched/7/callback",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layer_works_wherever_axum_takes_one() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let urls_of =
        |node: &Process| node.expect("ready").split(' ').skip(1).map(str::to_string).collect::<Vec<_>>();
    let primary = Process::start(node_process, &[("DB", p.to_str().unwrap()), ("PRIMARY", "")]);
    let [on_primary, _, streams] = urls_of(&primary).try_into().unwrap();
    let wire = Wire::start(address(&streams), Duration::ZERO).await;
    let of = format!("http://{}", wire.address);
    let replica = Process::start(node_process, &[("DB", r.to_str().unwrap()), ("PRIMARY", &of)]);
    let [url, around, _] = urls_of(&replica).try_into().unwrap();

    let http = Http::new();
    let http2: Client<HttpConnector, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let mut rows = 0;
    for place in PLACES {
        let request = |method: &str, query: &str| {
            http::Request::builder().method(method).uri(format!("{url}{place}{query}"))
        };
        let ask = |request: http::request::Builder, body: &'static str| {
            let answer = http.send(request.body(body).unwrap());
            async move { within(place, answer).await.unwrap() }
        };
        rows += 1;
        let posted = ask(request("POST", "?a=%20b"), "hello").await;
        assert_eq!(posted.text(), format!("primary {rows} POST {place}?a=%20b hello"), "{posted:?}");
        let token = posted.header("replite-token").to_string();
        // Reads run here, and see it; those that write run on the primary after all.
        let here = if place.starts_with("/matched") { "primary" } else { "replica" };
        let read = ask(request("GET", "").header("replite-token", &token), "").await;
        assert_eq!(read.text(), format!("{here} {rows} GET {place} "), "{read:?}");
        rows += 1;
        let wrote = ask(request("GET", "?write"), "late").await;
        assert_eq!(wrote.text(), format!("primary {rows} GET {place}?write late"), "{wrote:?}");
        // As Firefox asks, always.
        rows += 1;
        let trailing = request("POST", "").header("te", "trailers").body(Full::from("trailing")).unwrap();
        let trailing = within(place, http2.request(trailing)).await.unwrap();
        assert_eq!(trailing.status(), 200, "{place}");
        let body = within(place, trailing.into_body().collect()).await.unwrap().to_bytes();
        assert_eq!(body, format!("primary {rows} POST {place} trailing"));
    }
    rows += 1;
    let posted = http::Request::post(format!("{around}/layer")).body("around").unwrap();
    let posted = within("around", http.send(posted)).await.unwrap();
    assert_eq!(posted.text(), format!("primary {rows} POST /layer around"), "{posted:?}");
    let read =
        http::Request::get(format!("{around}/layer")).header("replite-token", posted.header("replite-token"));
    let read = within("around", http.send(read.body("").unwrap())).await.unwrap();
    assert_eq!(read.text(), format!("replica {rows} GET /layer "), "{read:?}");

    // An upgrade to nothing that is known is a request like all others, and goes where its route
    // says.
    for protocol in ["anything", "h2c", "websocket"] {
        let ask = |base: &str, path: &str, token: &str| {
            let request = http::Request::get(format!("{base}{path}")).header("connection", "upgrade");
            let request = request.header("upgrade", protocol).header("replite-token", token);
            http.send(request.body("").unwrap())
        };
        let answer = within(protocol, ask(&url, "/primary", "")).await.unwrap();
        assert_eq!(answer.text(), format!("primary {rows} GET /primary "), "{protocol}");
        let answer = within(protocol, ask(&url, "/waits", "")).await.unwrap();
        assert_eq!(answer.text(), format!("replica {rows} GET /waits "), "{protocol}");
    }
    // It waits for its token, too.
    wire.let_in(false);
    wire.cut();
    let posted = http::Request::post(format!("{on_primary}/layer")).body("").unwrap();
    let token = within("a write", http.send(posted)).await.unwrap().header("replite-token").to_string();
    for protocol in ["anything", "h2c", "websocket"] {
        let request = http::Request::get(format!("{url}/waits")).header("connection", "upgrade");
        let request = request.header("upgrade", protocol).header("replite-token", &token);
        let answer = within(protocol, http.send(request.body("").unwrap())).await.unwrap();
        // By the primary, or by nobody, as long as this node has not heard of it again.
        let stale = answer.status == 200 && answer.text().starts_with("replica");
        assert!(!stale, "{protocol}: {answer:?}");
    }
    drop((primary, replica));
}
