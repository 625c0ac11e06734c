//! What runs where, and every kind of service that the layer goes around.

use std::convert::Infallible;
use std::marker::PhantomPinned;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::Router;
use axum::routing::{get, post};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

use crate::proxy::tests::world::*;
use crate::proxy::{BoxError, ReplayLayer, Route, Upgrades};
use crate::status::Role;
use crate::token::Token;

#[tokio::test]
async fn upgrades_stay_here_or_are_refused_and_connect_is_no_request_for_an_app() {
    let ask = |method: &str, server: &Server, protocol: &str| {
        let request = Request::builder().method(method).uri(server.url());
        let request = request.header("connection", "Upgrade").header("upgrade", protocol);
        request.body(full("")).unwrap()
    };
    let (server, _node) = replica_of("http://127.0.0.1:1", |l| l).await;
    assert_eq!(text(send(ask("GET", &server, "websocket")).await).await, "here");
    let (server, _node) =
        replica_of("http://127.0.0.1:1", |l| l.upgrades(Upgrades::Refuse).upgrade_protocol("mine")).await;
    is(&send(ask("GET", &server, "websocket")).await, 503, "not-executed");
    is(&send(ask("GET", &server, "mine/1")).await, 503, "not-executed");
    assert_eq!(text(send(ask("GET", &server, "anything")).await).await, "here");
    // No way for a write to be served here.
    let (server, _node) = replica_of("http://127.0.0.1:1", |l| l).await;
    is(&send(ask("POST", &server, "websocket")).await, 503, "not-executed");
    let service = ReplayLayer::new(node(1, Role::Primary)).layer(service_fn(hello));
    let request = Request::connect("example.org:443").body(Empty::<Bytes>::new()).unwrap();
    is(&service.oneshot(request).await.unwrap(), 405, "not-executed");
}

#[tokio::test]
async fn an_upgrade_goes_where_its_route_says_and_waits_for_its_token() {
    let pair = Pair::new(
        Router::new().fallback(|| async { "primary" }),
        Router::new().fallback(|| async { "here" }),
        |l| l.route_prefix("/primary", Route::Primary).wait_timeout(SHORT),
    );
    let pair = pair.await;
    let token = Token::sign(&pair.replica_node, txid(99)).to_string();
    for protocol in ["websocket", "anything", "h2c"] {
        let ask = |path: &str| pair.get(path).header("connection", "Upgrade").header("upgrade", protocol);
        assert_eq!(text(send(ask("/x").body(full("")).unwrap()).await).await, "here", "{protocol}");
        assert_eq!(text(send(ask("/primary").body(full("")).unwrap()).await).await, "primary", "{protocol}");
        let behind = ask("/x").header("replite-token", &token);
        assert_eq!(text(send(behind.body(full("")).unwrap()).await).await, "primary", "{protocol}");
    }
}

#[tokio::test]
async fn the_replication_endpoint_is_passed_through_untouched() {
    let endpoint = Router::new().fallback(mirror);
    for path in ["/_replite", "/deep/er"] {
        let node = node(2, Role::Replica);
        let app = Router::new().nest(path, endpoint.clone());
        let server = Server::start(app.layer(ReplayLayer::new(node).endpoint(path))).await;
        let request = Request::post(format!("{}{path}/v1/stream", server.url())).header("replite-proof", "p");
        let got = text(send(request.body(full("hi")).unwrap()).await).await;
        assert!(got.starts_with("POST /v1/stream\n") && got.contains("replite-proof: p\n"), "{got}");
        assert!(got.ends_with("hi"));
    }
}

#[tokio::test]
async fn no_endpoint_is_not_every_path() {
    for path in ["", "/"] {
        let (server, _node) = replica_of("http://127.0.0.1:1", |l| l.endpoint(path)).await;
        is(&send(Request::post(server.url()).body(full("")).unwrap()).await, 503, "not-executed");
    }
}

#[tokio::test]
async fn prefixes_and_the_predicate_decide_in_this_order() {
    let pair = Pair::new(
        Router::new().fallback(|| async { "primary" }),
        Router::new().fallback(|| async { "here" }),
        |l| {
            l.route(
                |parts| if parts.uri.path() == "/login" { Route::Primary } else { Route::by_method(parts) },
            )
            .route_prefix("/metrics", Route::Local)
            .route_prefix("/callback", Route::Primary)
        },
    );
    let pair = pair.await;
    for (request, answer) in [
        (pair.get("/x"), "here"),
        (pair.post("/x"), "primary"),
        (pair.get("/login"), "primary"),
        (pair.post("/metrics/push"), "here"),
        (pair.get("/callback/a"), "primary"),
        (pair.get("/callbacks"), "here"),
    ] {
        assert_eq!(text(send(request.body(full("")).unwrap()).await).await, answer);
    }
    // The primary runs everything itself.
    let request = Request::post(pair.primary.url()).body(full("")).unwrap();
    assert_eq!(text(send(request).await).await, "primary");
}

#[tokio::test]
async fn a_route_of_the_router_decides_whatever_its_parameters_are() {
    let primary = Server::start(
        Router::new().fallback(|| async { "primary" }).layer(ReplayLayer::new(node(1, Role::Primary))),
    );
    let primary = primary.await;
    let replica = node(2, Role::Replica);
    follow(&replica, 1, Some(peer(1, &primary.url())));
    let layer = ReplayLayer::new(replica)
        .route_matched("/oauth/{provider}/callback", Route::Primary)
        .route_matched("/hooks/{*rest}", Route::Local);
    let app = Router::new()
        .route("/oauth/{provider}/callback", get(|| async { "here" }))
        .route("/oauth/{provider}", get(|| async { "here" }))
        .route("/hooks/{*rest}", post(|| async { "here" }))
        .layer(layer);
    let server = Server::start(app).await;
    let url = server.url();
    for (request, answer) in [
        (Request::get(format!("{url}/oauth/x/callback?code=1")), "primary"),
        (Request::get(format!("{url}/oauth/x")), "here"),
        (Request::post(format!("{url}/hooks/a/b")), "here"),
    ] {
        assert_eq!(text(send(request.body(full("")).unwrap()).await).await, answer);
    }
}

/// An app whose error is its own.
async fn hello<B>(_: Request<B>) -> Result<Response<Full<Bytes>>, std::fmt::Error> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

/// A body that must not move, as some hand-written streams are.
struct Fixed(PhantomPinned);

impl Body for Fixed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }
}

#[tokio::test]
async fn the_layer_goes_around_any_tower_service() {
    let layer = ReplayLayer::new(node(1, Role::Primary));
    // Any body, also one that can't move or is boxed as tonic's.
    let service = ServiceBuilder::new().layer(layer.clone()).service(service_fn(hello));
    let response: Result<Response<axum::body::Body>, std::fmt::Error> =
        service.oneshot(Request::new(Fixed(PhantomPinned))).await;
    assert_eq!(text(response.unwrap()).await, "hello");
    let boxed: UnsyncBoxBody<Bytes, BoxError> = Empty::new().map_err(|e| match e {}).boxed_unsync();
    let response = layer.layer(service_fn(hello)).oneshot(Request::new(boxed)).await.unwrap();
    assert_eq!(text(response).await, "hello");
    // Router::layer, route_layer, and twice over each other.
    let app = Router::new()
        .route("/a", get(|| async { "a" }))
        .route("/b", post(|| async { "b" }).layer(layer.clone()))
        .route_layer(layer.clone())
        .layer(ServiceBuilder::new().layer(layer.clone()));
    let request = Request::get("/a").body(axum::body::Body::empty()).unwrap();
    assert_eq!(text(app.oneshot(request).await.unwrap()).await, "a");
}

#[tokio::test]
async fn the_layer_works_on_plain_hyper() {
    let service = ReplayLayer::new(node(1, Role::Primary)).layer(service_fn(hello));
    let (client, server) = tokio::io::duplex(4096);
    let serving = tokio::spawn(async move {
        let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(server), TowerToHyperService::new(service)).await;
    });
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    let response = sender.send_request(Request::post("/").body(full("x")).unwrap()).await.unwrap();
    assert_eq!(text(response).await, "hello");
    serving.abort();
}
