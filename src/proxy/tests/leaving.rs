//! A node that drains: what it still does for requests, and what it tells their clients.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::ws::WebSocketUpgrade;
use axum::response::sse::{Event, Sse};
use axum::routing::any;
use futures_util::{FutureExt, SinkExt, StreamExt, stream};
use http::{Request, Response, Version};
use http_body_util::Empty;
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use tower::{Layer, ServiceExt, service_fn};

use crate::context::NodeContext;
use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Upgrades};
use crate::status::Role;

fn here() -> Router {
    Router::new().fallback(|| async { "here" })
}

async fn says_close(request: Request<TestBody>) -> bool {
    let response = send(request).await;
    let says = response.headers().get("connection").is_some_and(|value| value == "close");
    assert_eq!(response.status(), 200);
    says
}

#[tokio::test]
async fn in_http_1_a_node_that_drains_ends_each_connection_after_its_answer() {
    let pair = Pair::new(here(), here(), |l| l).await;
    let get = |server: &Server| Request::get(server.url()).body(full("")).unwrap();
    let post = |server: &Server| Request::post(server.url()).body(full("x")).unwrap();
    for server in [&pair.primary, &pair.replica] {
        assert!(!says_close(get(server)).await && !says_close(post(server)).await);
    }
    // What runs before the lease is handed over is the flag alone.
    pair.primary_node.begin_draining(false);
    assert!(says_close(get(&pair.primary)).await && says_close(post(&pair.primary)).await);
    assert!(!says_close(post(&pair.replica)).await, "it is no matter of the client's connection");
    pair.replica_node.begin_draining(false);
    assert!(says_close(get(&pair.replica)).await && says_close(post(&pair.replica)).await);
    // Its own words, too.
    follow(&pair.replica_node, 1, None);
    pair.replica_node.drain.cancel();
    let response = send(post(&pair.replica)).await;
    is(&response, 503, "not-executed");
    assert_eq!(response.headers()["connection"], "close");
    // HTTP/2 has no such header.
    for (version, says) in [(Version::HTTP_10, true), (Version::HTTP_2, false)] {
        let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(full("here"))));
        let request = Request::get("/").version(version).body(Empty::<bytes::Bytes>::new()).unwrap();
        let layer = ReplayLayer::new(pair.primary_node.clone());
        let response = layer.layer(app).oneshot(request).await.unwrap();
        assert_eq!(response.headers().contains_key("connection"), says, "{version:?}");
    }
}

/// An app with a socket that sends texts back, and events that come from a channel.
fn long(name: &'static str) -> (Router, broadcast::Sender<&'static str>) {
    let (sender, _) = broadcast::channel(4);
    let events = sender.clone();
    let sse = any(move || {
        let receiver = events.subscribe();
        async move {
            Sse::new(stream::unfold(receiver, |mut receiver| async move {
                let event = Event::default().data(receiver.recv().await.ok()?);
                Some((Ok::<_, Infallible>(event), receiver))
            }))
        }
    });
    let socket = any(move |upgrade: WebSocketUpgrade| async move {
        upgrade.on_upgrade(move |mut socket| async move {
            while let Some(Ok(message)) = socket.recv().await {
                let Ok(text) = message.into_text() else { continue };
                if socket.send(format!("{name}:{text}").into()).await.is_err() {
                    break;
                }
            }
        })
    });
    (Router::new().route("/events", sse).route("/ws", socket), sender)
}

#[tokio::test]
async fn a_handoff_ends_neither_event_streams_nor_sockets_and_new_sockets_go_to_the_next_primary() {
    let ((old_app, events), (next_app, _)) = (long("old"), long("next"));
    let (old, next, third) = (elector(1), elector(3), elector(2));
    lead(&old, 1);
    let layer = |node: &Arc<NodeContext>| ReplayLayer::new(node.clone()).upgrades(Upgrades::Primary);
    let old_server = Server::start(old_app.layer(layer(&old))).await;
    let next_server = Server::start(next_app.layer(layer(&next))).await;
    let third_server = Server::start(here().layer(layer(&third))).await;
    follow(&third, 1, Some(peer(1, &old_server.url())));
    // Read where they arrive, and forwarded.
    let url = |server: &Server| format!("{}/events", server.url());
    let mut streams = vec![
        send(Request::get(url(&old_server)).body(full("")).unwrap()).await,
        send(Request::post(url(&old_server)).body(full("")).unwrap()).await,
        send(Request::post(url(&third_server)).body(full("")).unwrap()).await,
    ];
    let mut sockets = Vec::new();
    for server in [&old_server, &third_server] {
        sockets.push(connect_async(format!("ws://{}/ws", server.address)).await.unwrap().0);
    }
    assert!(old.requests_done().now_or_never().is_some(), "a handoff does not wait for them");
    for stage in 0..3 {
        match stage {
            0 => {}
            1 => {
                yields(&old);
                follow(&third, 1, None);
            }
            _ => {
                lead(&next, 2);
                follow(&old, 2, Some(peer(3, &next_server.url())));
                follow(&third, 2, Some(peer(3, &next_server.url())));
            }
        }
        events.send("on").unwrap();
        for response in &mut streams {
            assert_eq!(super::world::next(response.body_mut()).await.unwrap(), "data: on\n\n", "{stage}");
        }
        for socket in &mut sockets {
            socket.send(Message::text("a")).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap(), "old:a", "{stage}");
        }
    }
    for server in [&old_server, &third_server, &next_server] {
        // On nodes that drain, too.
        old.begin_draining(false);
        let (mut socket, response) = connect_async(format!("ws://{}/ws", server.address)).await.unwrap();
        assert_eq!(response.headers()["connection"], "upgrade");
        socket.send(Message::text("b")).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap(), "next:b");
    }
}

fn request() -> Request<TestBody> {
    Request::post("/").body(full("kept")).unwrap()
}

/// A request that waits at a node which has no primary.
async fn waits(node: &Arc<NodeContext>) -> tokio::task::JoinHandle<Response<Body>> {
    let layer = ReplayLayer::new(node.clone()).hold_timeout(LONG);
    let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(Body::from("here"))));
    let waiting = tokio::spawn(async move { layer.layer(app).oneshot(request()).await.unwrap() });
    held(node).await;
    waiting
}

#[tokio::test]
async fn what_a_node_that_drains_holds_goes_to_the_node_that_its_lease_went_to() {
    let next = elector(3);
    stand(&next, Role::Promoting);
    let asked = Arc::new(AtomicUsize::new(0));
    let asks = asked.clone();
    let told = axum::middleware::from_fn(move |request: Request<Body>, next: axum::middleware::Next| {
        asks.fetch_add(1, Ordering::Relaxed);
        next.run(request)
    });
    let app = Router::new().fallback(mirror).layer(ReplayLayer::new(next.clone())).layer(told);
    let server = Server::start(app).await;
    let node = elector(1);
    lead(&node, 1);
    node.begin_draining(false);
    yields(&node);
    let waiting = waits(&node).await;
    // The stream to the next primary does not stand yet.
    follow(&node, 1, None);
    node.drain.cancel();
    let late = tokio::spawn(ReplayLayer::new(node.clone()).layer(not_here()).oneshot(request()));
    comes("both wait", || node.roles.receiver_count() == 2).await;
    // It does, and the other one has not begun to lead.
    follow(&node, 2, Some(peer(3, &server.url())));
    comes("more than a try of each", || asked.load(Ordering::Relaxed) > 2).await;
    lead(&next, 2);
    let answer = waiting.await.unwrap();
    assert!(text(answer).await.ends_with("kept"));
    assert!(text(late.await.unwrap().unwrap()).await.ends_with("kept"));
    // And what comes later goes there at once.
    let layer = ReplayLayer::new(node.clone()).layer(not_here());
    assert!(text(layer.oneshot(request()).await.unwrap()).await.ends_with("kept"));
}

fn not_here() -> Router {
    Router::new().fallback(|| async { (http::StatusCode::IM_A_TEAPOT, "it ran here") })
}

#[tokio::test(start_paused = true)]
async fn what_a_node_that_drains_holds_is_answered_within_moments_or_at_once_without_a_prospect() {
    enum Case {
        Lease,
        Alone,
        Fixed,
        Stops,
    }
    for (case, seconds) in [(Case::Lease, 3), (Case::Alone, 0), (Case::Fixed, 0), (Case::Stops, 1)] {
        let node = if let Case::Fixed = case { node(2, Role::Replica) } else { elector(2) };
        let waiting = waits(&node).await;
        let began = Instant::now();
        if let Case::Alone = case {
            node.begin_draining(true);
        }
        node.drain.cancel();
        if let Case::Stops = case {
            tokio::time::sleep(Duration::from_secs(1)).await;
            node.stop.cancel();
        }
        is(&waiting.await.unwrap(), 503, "not-executed");
        assert_eq!(began.elapsed().as_secs(), seconds);
        // One that comes while it drains.
        let began = Instant::now();
        let layer = ReplayLayer::new(node.clone()).hold_timeout(LONG).layer(here());
        is(&layer.oneshot(request()).await.unwrap(), 503, "not-executed");
        assert_eq!(began.elapsed().as_secs(), if let Case::Lease = case { 3 } else { 0 });
    }
}
