//! A primary hands its lease over while requests come, wait, and run.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tokio::sync::Notify;
use tower::{Layer, ServiceExt, service_fn};

use crate::context::NodeContext;
use crate::fence::boot_time;
use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Route, SessionTokens};
use crate::session::{self, Session};
use crate::status::PeerInfo;

fn here() -> Router {
    Router::new().fallback(|| async { "here" })
}

async fn serve(node: &Arc<NodeContext>, app: Router) -> Server {
    Server::start(app.layer(ReplayLayer::new(node.clone()))).await
}

fn post(server: &Server, data: impl Into<Bytes>) -> Request<TestBody> {
    Request::post(server.url()).body(full(data)).unwrap()
}

/// A primary with a lease.
fn leader() -> Arc<NodeContext> {
    let node = elector(1);
    lead(&node, 1);
    node
}

/// The node that gets the lease, with an app that says what it got.
async fn next() -> (Server, Arc<NodeContext>) {
    let node = elector(3);
    lead(&node, 2);
    (serve(&node, Router::new().fallback(mirror)).await, node)
}

/// The old primary follows the next one.
fn handed(node: &NodeContext, next: &Server) {
    follow(node, 2, Some(peer(3, &next.url())));
}

fn none_runs(node: &NodeContext) -> bool {
    node.requests_done().now_or_never().is_some()
}

/// A body in pieces, which tells how many were read.
fn counted(pieces: usize) -> (Arc<AtomicUsize>, TestBody) {
    let read = Arc::new(AtomicUsize::new(0));
    let counter = read.clone();
    let pieces = stream::iter(0..pieces).map(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok::<_, Infallible>(http_body::Frame::data(Bytes::from_static(&[b'x'; 1024])))
    });
    (read, http_body_util::StreamBody::new(pieces).boxed_unsync())
}

#[tokio::test]
async fn what_comes_meanwhile_waits_with_its_body_unread_and_reads_go_on() {
    let (next, _next_node) = next().await;
    for aborted in [true, false] {
        let node = leader();
        yields(&node);
        let app = Router::new().fallback(mirror).layer(ReplayLayer::new(node.clone()));
        // More than is kept of any.
        let (read, body) = counted(200);
        let waiting = tokio::spawn(app.clone().oneshot(Request::post("/").body(Body::new(body)).unwrap()));
        held(&node).await;
        let get = app.oneshot(Request::get("/").body(Body::empty()).unwrap());
        assert_eq!(get.now_or_never().unwrap().unwrap().status(), 200, "a read waits for nothing");
        assert!(none_runs(&node), "what waits does not run");
        assert_eq!(read.load(Ordering::Relaxed), 0);
        match aborted {
            true => lead(&node, 1),
            false => handed(&node, &next),
        }
        let answer = text(waiting.await.unwrap().unwrap()).await;
        assert_eq!((answer.matches('x').count() >= 200 * 1024, read.load(Ordering::Relaxed)), (true, 200));
        assert!(!answer.contains("replite-hop"), "{aborted}");
        assert_eq!(answer.contains("x-forwarded-host") || answer.contains("host: 127"), !aborted);
    }
}

/// A primary whose handler reads the body, waits for the word, and then does this.
struct Slow {
    node: Arc<NodeContext>,
    server: Server,
    runs: Arc<AtomicUsize>,
    begun: Arc<Notify>,
    go_on: Arc<Notify>,
}

type Does = fn(&NodeContext, &Session) -> bool;

/// It commits.
const COMMITS: Does = |_, session| {
    session.observe_txid(txid(11));
    true
};
/// The writer is closed, and refuses the write.
const REFUSED: Does = |node, _| {
    session::primary_needed(node);
    false
};

/// It knows that only the primary can do it.
const NEEDS: Does = |_, session| {
    session.need_primary();
    false
};

impl Slow {
    /// Does it with the first request; others are just answered.
    async fn start(does: Does) -> Slow {
        let listener = Unstarted::new();
        let node = elector_as(peer(1, &listener.url()));
        lead(&node, 1);
        let (begun, go_on, runs) = <(Arc<Notify>, Arc<Notify>, Arc<AtomicUsize>)>::default();
        let state = (begun.clone(), go_on.clone(), runs.clone(), node.clone());
        let app = Router::new().fallback(move |session: Extension<Session>, body: Bytes| {
            let (begun, go_on, runs, node) = state.clone();
            async move {
                if runs.fetch_add(1, Ordering::Relaxed) > 0 {
                    return (StatusCode::OK, format!("again, with {}", body.len()));
                }
                begun.notify_one();
                go_on.notified().await;
                match does(&node, &session) {
                    true => (StatusCode::OK, "done".into()),
                    false => (StatusCode::SERVICE_UNAVAILABLE, "refused".into()),
                }
            }
        });
        let layer = ReplayLayer::new(node.clone()).route_prefix("/local", Route::Local);
        Slow { server: listener.start(app.layer(layer)), node, runs, begun, go_on }
    }

    fn peer(&self) -> PeerInfo {
        peer(1, &self.server.url())
    }
}

#[tokio::test]
async fn what_runs_on_the_primary_runs_on_and_is_waited_for() {
    for through in [false, true] {
        let old = Slow::start(COMMITS).await;
        let node = elector(2);
        follow(&node, 1, Some(old.peer()));
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, "once")));
        old.begun.notified().await;
        yields(&old.node);
        assert!(!none_runs(&old.node), "{through}");
        let done = tokio::spawn({
            let node = old.node.clone();
            async move { node.requests_done().await }
        });
        old.go_on.notify_one();
        let response = waiting.await.unwrap();
        assert!(response.headers().contains_key("replite-token"), "{:?}", response.headers());
        assert_eq!(text(response).await, "done");
        done.await.unwrap();
        assert!(none_runs(&node), "a node that forwards runs nothing");
    }
}

#[tokio::test]
async fn a_request_counts_until_its_handler_is_done_or_its_client_has_left_and_reads_never_do() {
    // What its client leaves.
    let old = Slow::start(COMMITS).await;
    let leaving = tokio::spawn(send(post(&old.server, "x")));
    old.begun.notified().await;
    assert!(!none_runs(&old.node));
    leaving.abort();
    tokio::time::timeout(LONG, old.node.requests_done()).await.unwrap();
    // What does not need the primary.
    for request in [Request::get("/"), Request::post("/local/x")] {
        let old = Slow::start(COMMITS).await;
        let (method, uri) = (request.method_ref().unwrap().clone(), request.uri_ref().unwrap().to_string());
        let request = Request::builder().method(method).uri(format!("{}{uri}", old.server.url()));
        let waiting = tokio::spawn(send(request.body(full("")).unwrap()));
        old.begun.notified().await;
        assert!(none_runs(&old.node), "{uri}");
        old.go_on.notify_one();
        assert_eq!(text(waiting.await.unwrap()).await, "done");
    }
    // A response that is sent for longer than its handler runs.
    let node = leader();
    let (mut sender, body) = piecewise();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let app = service_fn(move |_: Request<Body>| {
        let body = body.lock().unwrap().take().unwrap();
        async { Ok::<_, Infallible>(Response::new(Body::new(body))) }
    });
    let request = Request::post("/").body(full("")).unwrap();
    let mut response = ReplayLayer::new(node.clone()).layer(app).oneshot(request).await.unwrap();
    assert!(none_runs(&node));
    yields(&node);
    push(&mut sender, "more").await;
    let piece = crate::proxy::tests::world::next(response.body_mut()).await;
    assert_eq!(piece.unwrap(), "more");
}

#[tokio::test]
async fn a_write_that_the_closed_writer_refused_is_done_by_the_next_primary() {
    let (next, _next_node) = next().await;
    // From its own client, and from that of another node; also when the handler says so itself.
    for (through, does) in [(false, REFUSED), (true, REFUSED), (false, NEEDS), (true, NEEDS)] {
        let old = Slow::start(does).await;
        let node = elector(2);
        follow(&node, 1, Some(old.peer()));
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, "once")));
        old.begun.notified().await;
        yields(&old.node);
        old.go_on.notify_one();
        held(if through { &node } else { &old.node }).await;
        // A handoff does not wait for what waits for it.
        tokio::time::timeout(LONG, old.node.requests_done()).await.unwrap();
        handed(&old.node, &next);
        let answer = text(waiting.await.unwrap()).await;
        assert!(answer.starts_with("POST /") && answer.ends_with("\n\nonce"), "{answer}");
        assert_eq!(old.runs.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test]
async fn a_refused_write_with_more_of_a_body_than_is_kept_is_said_not_to_have_run() {
    for through in [false, true] {
        let old = Slow::start(REFUSED).await;
        let node = elector(2);
        follow(&node, 1, Some(old.peer()));
        let replica = serve(&node, here()).await;
        let data = vec![b'x'; 200_000];
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, data)));
        old.begun.notified().await;
        yields(&old.node);
        old.go_on.notify_one();
        is(&waiting.await.unwrap(), 503, "not-executed");
    }
}

#[tokio::test]
async fn a_refused_write_runs_here_again_when_the_handoff_was_aborted() {
    for (through, at_once) in [(false, false), (false, true), (true, false), (true, true)] {
        let old = Slow::start(if at_once { REFUSED_AND_BACK } else { REFUSED }).await;
        let node = elector(2);
        follow(&node, 1, Some(old.peer()));
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, "once")));
        old.begun.notified().await;
        yields(&old.node);
        old.go_on.notify_one();
        if !at_once {
            held(if through { &node } else { &old.node }).await;
            lead(&old.node, 1);
        }
        assert_eq!(text(waiting.await.unwrap()).await, "again, with 4", "{through} {at_once}");
        assert_eq!(old.runs.load(Ordering::Relaxed), 2);
    }
}

/// The handoff is aborted before the handler answers.
const REFUSED_AND_BACK: Does = |node, _| {
    session::primary_needed(node);
    lead(node, 1);
    false
};

#[tokio::test]
async fn another_nodes_request_that_comes_meanwhile_is_sent_back_and_goes_to_the_next() {
    let (next, _next_node) = next().await;
    for (small, aborted) in [(true, false), (false, false), (false, true)] {
        let (old, asked) = (leader(), Arc::new(Notify::new()));
        yields(&old);
        let asks = asked.clone();
        let told = axum::middleware::from_fn(move |request: Request<Body>, next: axum::middleware::Next| {
            asks.notify_one();
            next.run(request)
        });
        let app = Router::new().fallback(mirror);
        let server = Server::start(app.layer(ReplayLayer::new(old.clone())).layer(told)).await;
        // It has not heard of the handoff yet.
        let node = elector(2);
        follow(&node, 1, Some(peer(1, &server.url())));
        let replica = serve(&node, here()).await;
        // Of a large body the beginning is gone already: that waits at the old primary.
        let data = "z".repeat(if small { 50_000 } else { 500_000 });
        let waiting = tokio::spawn(send(post(&replica, data.clone())));
        asked.notified().await;
        held(if small { &node } else { &old }).await;
        assert!(none_runs(&old));
        // Then it does.
        match (small, aborted) {
            (true, _) => {
                follow(&node, 1, None);
                handed(&node, &next);
            }
            (false, true) => lead(&old, 1),
            (false, false) => handed(&old, &next),
        }
        let answer = text(waiting.await.unwrap()).await;
        assert!(answer.ends_with(&format!("\n\n{data}")), "{answer:.300}");
    }
}

/// Its body comes slowly, and its handler reads it while the node yields.
#[tokio::test]
async fn a_large_body_that_is_under_way_comes_to_its_end() {
    let old = elector(1);
    lead(&old, 1);
    let server = serve(&old, Router::new().fallback(mirror)).await;
    let node = elector(2);
    follow(&node, 1, Some(peer(1, &server.url())));
    let replica = serve(&node, here()).await;
    for to in [&server, &replica] {
        lead(&old, 1);
        let (mut sender, body) = piecewise();
        let waiting = tokio::spawn(send(Request::post(to.url()).body(body).unwrap()));
        let piece = &*"y".repeat(1000).leak();
        push(&mut sender, piece).await;
        comes("a handler that runs", || !none_runs(&old)).await;
        yields(&old);
        for _ in 0..100 {
            push(&mut sender, piece).await;
        }
        assert!(!none_runs(&old));
        drop(sender);
        let answer = text(waiting.await.unwrap()).await;
        assert!(answer.matches('y').count() >= 101 * 1000, "{answer:.300}");
        assert!(none_runs(&old));
    }
}

/// Its handler is not done within the limit for that, and has committed.
#[tokio::test]
async fn what_runs_for_longer_than_a_handoff_waits_is_answered_by_the_old_primary() {
    let (next, _next_node) = next().await;
    for says in [true, false] {
        let old = Slow::start(COMMITS).await;
        let node = elector(2);
        follow(&node, 1, Some(old.peer()));
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(&replica, "once")));
        old.begun.notified().await;
        tokio::time::pause();
        yields(&old.node);
        if says {
            node.set_handed((old.node.me.node, old.node.me.incarnation));
        }
        handed(&node, &next);
        handed(&old.node, &next);
        tokio::time::sleep(LONG / 2).await;
        tokio::time::resume();
        old.go_on.notify_one();
        let response = waiting.await.unwrap();
        match says {
            true => assert_eq!(text(response).await, "done"),
            false => is(&response, 504, "unknown"),
        }
    }
}

struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A primary whose lease has ended looks again and again, as no change of its role may come.
#[tokio::test(start_paused = true)]
async fn while_a_node_yields_what_waits_does_not_look_again_and_again() {
    let looks = async |node: &Arc<NodeContext>| {
        let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(full("here"))));
        let request = Request::post("/").body(full("x")).unwrap();
        let mut waiting = pin!(ReplayLayer::new(node.clone()).layer(app).oneshot(request));
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        for _ in 0..10 {
            assert!(waiting.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let looks = woken.0.load(Ordering::Relaxed);
        lead(node, 1);
        assert!(matches!(waiting.poll(&mut Context::from_waker(&waker)), Poll::Ready(Ok(_))));
        looks
    };
    let node = leader();
    yields(&node);
    assert_eq!(looks(&node).await, 0);
    node.fence.set(boot_time());
    assert!(looks(&node).await > 5);
}

#[tokio::test]
async fn a_read_on_a_node_that_yields_has_its_token() {
    let node = leader();
    yields(&node);
    let layer = ReplayLayer::new(node.clone()).session(SessionTokens::Monotonic);
    let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(full("here"))));
    let response = layer.layer(app).oneshot(Request::get("/").body(full("")).unwrap()).await.unwrap();
    assert!(response.headers().contains_key("replite-token"), "it leads, and its state is the cluster's");
}
