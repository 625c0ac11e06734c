//! Writes that no session hears of: the token of last resort, and late replay by the response.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use axum::response::IntoResponse;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use tower::ServiceExt;

use crate::context::NodeContext;
use crate::error::Error;
use crate::proxy::tests::world::*;
use crate::proxy::{NeedsPrimary, ReplayLayer, Route};
use crate::session::{self, Session, Written};
use crate::status::Role;
use crate::token::Token;

/// What a handler does, by its path. `/moves` is followed by a commit of somebody; `/fails` by one
/// and an error.
fn app(node: &Arc<NodeContext>) -> Router {
    let node = node.clone();
    Router::new().fallback(move |session: Extension<Session>, request: Request<Body>| async move {
        let moves = || {
            let number = node.applied.position().unwrap().number() + 1;
            node.applied.advance(at(number));
        };
        let path = request.uri().path();
        match path {
            "/moves" | "/moves/primary" | "/fails" => moves(),
            "/told" => {
                moves();
                session.observe(Written::past(node.clone()));
            }
            "/fenced" => {
                moves();
                fence(&node);
            }
            "/demoted" => {
                moves();
                follow(&node, 1, None);
            }
            "/regained" => {
                moves();
                follow(&node, 2, None);
                lead(&node, 3);
            }
            "/unknown" => session::outcome_unknown(),
            _ => {}
        }
        if path == "/fails" { StatusCode::BAD_GATEWAY } else { StatusCode::OK }
    })
}

fn layer(node: &Arc<NodeContext>) -> ReplayLayer {
    ReplayLayer::new(node.clone())
        .route_prefix("/moves/primary", Route::Primary)
        .route_prefix("/local", Route::Local)
}

async fn ask(node: &Arc<NodeContext>, request: http::request::Builder) -> (StatusCode, Option<u64>) {
    let request = request.body(Body::empty()).unwrap();
    let response = app(node).layer(layer(node)).oneshot(request).await.unwrap();
    assert_eq!(response.headers().contains_key("set-cookie"), named(node, &response).is_some());
    (response.status(), named(node, &response))
}

/// The number of the response's token.
fn named<B>(node: &NodeContext, response: &Response<B>) -> Option<u64> {
    let text = response.headers().get("replite-token")?.to_str().unwrap();
    Some(Token::verify(node, text).unwrap().number())
}

#[tokio::test]
async fn what_may_have_written_past_its_session_names_where_the_database_ended() {
    let primary = node(1, Role::Primary);
    for (method, path, status, token) in [
        ("POST", "/", 200, Some(10)),
        ("POST", "/moves", 200, Some(11)),
        ("DELETE", "/fails", 502, Some(12)),
        ("POST", "/local", 200, Some(12)),
        ("GET", "/moves", 200, None),
        ("GET", "/moves/primary", 200, Some(14)),
        ("GET", "/told", 200, Some(15)),
        ("HEAD", "/", 200, None),
        ("POST", "/unknown", 200, None),
    ] {
        let (said, named) = ask(&primary, Request::builder().method(method).uri(path)).await;
        assert_eq!((said.as_u16(), named), (status, token), "{method} {path}");
    }
    // Its client has that already, or more.
    for (known, token) in [(15, None), (99, None), (14, Some(15))] {
        let known = Token::sign(&primary, txid(known)).to_string();
        let (_, named) = ask(&primary, Request::post("/").header("replite-token", known)).await;
        assert_eq!(named, token);
    }
    // A replica's handler writes nothing here, whatever its method.
    let replica = node(2, Role::Replica);
    assert_eq!(ask(&replica, Request::post("/local")).await.1, None);
}

#[tokio::test]
async fn without_the_lease_or_the_role_at_its_end_a_response_names_nothing() {
    for path in ["/fenced", "/demoted", "/regained"] {
        let primary = elector(1);
        lead(&primary, 1);
        assert_eq!(ask(&primary, Request::post("/moves")).await.1, Some(11));
        assert_eq!(ask(&primary, Request::post(path)).await.1, None, "{path}");
    }
}

#[tokio::test]
async fn what_another_node_sent_names_what_was_written_and_a_read_that_wrote_nothing_does_not() {
    // Not `Pair::new`: the primary's application looks at its node.
    let primary_node = node(1, Role::Primary);
    let primary = Server::start(app(&primary_node).layer(layer(&primary_node))).await;
    let replica_node = node(2, Role::Replica);
    follow(&replica_node, 1, Some(peer(1, &primary.url())));
    let needy = Router::new().fallback(|| async { Error::NotPrimary { primary: None } });
    let replica = Server::start(needy.layer(ReplayLayer::new(replica_node))).await;
    let request = |method: &str, path: &str| {
        Request::builder().method(method).uri(format!("{}{path}", replica.url())).body(full("")).unwrap()
    };
    for (method, path, status, token) in [
        ("GET", "/", 200, None),
        ("POST", "/", 200, Some(10)),
        ("GET", "/moves", 200, Some(11)),
        ("GET", "/fails", 502, Some(12)),
        ("POST", "/moves", 200, Some(13)),
    ] {
        let response = send(request(method, path)).await;
        let named = named(&primary_node, &response);
        assert_eq!((response.status().as_u16(), named), (status, token), "{method} {path}");
        assert_eq!(response.headers().get_all("set-cookie").iter().count(), usize::from(named.is_some()));
    }
}

/// An error of an application's own.
#[derive(Debug, thiserror::Error)]
#[error("the actor failed")]
struct Wrapped(#[source] Error);

/// How a handler says that it needs the primary. None of these is on the request's task.
type Says = fn() -> Response<Body>;

/// An error of ours, which another task made a response of.
const OURS: Says = || Error::NotPrimary { primary: None }.into_response();
/// One of the application's own, which has ours as its source.
const WRAPPED: Says = || {
    let error = Wrapped(Error::NotPrimary { primary: None });
    let mut response = Response::new(Body::from("app"));
    *response.status_mut() = StatusCode::IM_A_TEAPOT;
    response.extensions_mut().insert(NeedsPrimary::of(&error).unwrap());
    response
};
/// By no error at all.
const MARKED: Says = || {
    let mut response = Response::new(Body::from("app"));
    response.extensions_mut().insert(NeedsPrimary::new());
    response
};
/// What another library says, which the layer is told to look for.
const FOREIGN: Says = || (StatusCode::SERVICE_UNAVAILABLE, [("x-read-only", "1")], "app").into_response();

/// An application whose handlers' work is done on another task.
fn elsewhere(runs: &Arc<AtomicUsize>, commits: bool, says: Says) -> Router {
    let runs = runs.clone();
    Router::new().fallback(move |session: Extension<Session>| async move {
        runs.fetch_add(1, Ordering::Relaxed);
        if commits {
            session.observe_txid(txid(11));
        }
        let says = tokio::spawn(async move {
            assert!(Session::current().is_none());
            says()
        });
        says.await.unwrap()
    })
}

fn watches(layer: ReplayLayer) -> ReplayLayer {
    layer.replay_when(|parts| {
        parts.status == StatusCode::SERVICE_UNAVAILABLE && parts.headers.contains_key("x-read-only")
    })
}

async fn replayed(pair: &Pair) -> Response<Incoming> {
    let data = "x".repeat(200);
    send(pair.get("/a?b").body(full(data)).unwrap()).await
}

#[tokio::test]
async fn a_response_that_says_so_is_replayed_whatever_task_found_out() {
    for says in [OURS, WRAPPED, MARKED, FOREIGN] {
        let runs = Arc::default();
        let pair = Pair::new(Router::new().fallback(mirror), elsewhere(&runs, false, says), watches).await;
        let answer = text(replayed(&pair).await).await;
        assert!(answer.starts_with("GET /a?b\n") && answer.matches('x').count() >= 200, "{answer:.200}");
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        // Not where something was committed ...
        let runs = Arc::default();
        let pair = Pair::new(Router::new().fallback(mirror), elsewhere(&runs, true, says), watches).await;
        let response = replayed(&pair).await;
        assert_eq!(response.status(), says().status());
        // ... nor on the primary, nor where the request is to run on the node that got it.
        for (node, path) in [(node(1, Role::Primary), "/a"), (pair.replica_node.clone(), "/local")] {
            let app = elsewhere(&Arc::default(), false, says).layer(watches(layer(&node)));
            let response = app.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(response.status(), says().status());
        }
    }
}

#[tokio::test]
async fn other_responses_are_not_replayed() {
    let says: Says = || {
        let other = Wrapped(Error::ShutDown);
        assert_eq!(NeedsPrimary::of(&other), None);
        // What a migration says of some other database.
        let inner = Error::Migration(Box::new(Error::NotPrimary { primary: None }));
        assert_eq!(NeedsPrimary::of(&inner), None);
        (StatusCode::SERVICE_UNAVAILABLE, "app").into_response()
    };
    let runs = Arc::default();
    let pair = Pair::new(Router::new().fallback(mirror), elsewhere(&runs, false, says), watches).await;
    let response = replayed(&pair).await;
    assert_eq!(response.status(), 503);
    assert_eq!(text(response).await, "app");
}

#[tokio::test]
async fn a_mark_means_the_database_whose_primary_it_names() {
    for (named, at) in [("a", "a"), ("b", "b")] {
        let names = |name| Router::new().fallback(move || async move { name });
        let (a, b) = (node_in("a", 1, Role::Primary), node_in("b", 2, Role::Primary));
        let at_a = Server::start(names("a").layer(ReplayLayer::new(a.clone()))).await;
        let at_b = Server::start(names("b").layer(ReplayLayer::new(b.clone()))).await;
        let (of_a, of_b) = (node_in("a", 3, Role::Replica), node_in("b", 4, Role::Replica));
        follow(&of_a, 1, Some(peer(1, &at_a.url())));
        follow(&of_b, 1, Some(peer(2, &at_b.url())));
        let primary = if named == "a" { a.me.clone() } else { b.me.clone() };
        let app = Router::new().fallback(move || {
            let error = Error::NotPrimary { primary: Some(Box::new(primary.clone())) };
            async move { tokio::spawn(async move { error.into_response() }).await.unwrap() }
        });
        let app = app.layer(ReplayLayer::new(of_b)).layer(ReplayLayer::new(of_a));
        let response = app.oneshot(Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
        assert_eq!(text(response).await, at);
    }
}

#[tokio::test]
async fn what_wrote_past_its_session_runs_nowhere_else() {
    let runs: Arc<AtomicUsize> = Arc::default();
    let node = node(2, Role::Replica);
    let (past, counted) = (node.clone(), runs.clone());
    let app = Router::new().fallback(move |session: Extension<Session>| async move {
        counted.fetch_add(1, Ordering::Relaxed);
        session.observe(Written::past(past.clone()));
        MARKED()
    });
    follow(&node, 1, Some(peer(1, "http://127.0.0.1:9")));
    let app = app.layer(ReplayLayer::new(node));
    let response = app.oneshot(Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!((text(response).await, runs.load(Ordering::Relaxed)), ("app".into(), 1));
}
