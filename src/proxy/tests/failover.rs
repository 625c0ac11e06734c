//! Who is the primary changes while requests come, wait, and run.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::Instant;
use tower::{Layer, ServiceExt, service_fn};

use crate::context::NodeContext;
use crate::fence::boot_time;
use crate::peer::Incarnation;
use crate::proxy::hop::About;
use crate::proxy::tests::world::*;
use crate::proxy::{Outcome, Reason, ReplayLayer, SessionTokens};
use crate::session::{self, Session};
use crate::status::{PeerInfo, Role};

fn here() -> Router {
    Router::new().fallback(|| async { "here" })
}

async fn serve(node: &Arc<NodeContext>, app: Router) -> Server {
    Server::start(app.layer(ReplayLayer::new(node.clone()))).await
}

fn post(server: &Server, data: impl Into<Bytes>) -> Request<TestBody> {
    Request::post(server.url()).body(full(data)).unwrap()
}

/// A replica that goes by a lease and follows this one.
fn follower(id: u128, number: u64, primary: PeerInfo) -> Arc<NodeContext> {
    let node = elector(id);
    follow(&node, number, Some(primary));
    node
}

/// An address at which nothing listens.
async fn gone() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[tokio::test]
async fn a_node_of_any_role_but_the_primarys_holds_writes_and_answers_reads() {
    for role in [Role::Starting, Role::Electing, Role::Waiting, Role::Promoting, Role::Fencing] {
        let node = elector(2);
        stand(&node, role);
        let server = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(&server, "late")));
        held(&node).await;
        let read = send(Request::get(server.url()).body(full("")).unwrap()).await;
        assert_eq!(text(read).await, "here", "{role}");
        assert!(!waiting.is_finished(), "{role}");
        lead(&node, 2);
        assert_eq!(text(waiting.await.unwrap()).await, "here", "{role}");
    }
}

/// No change of the role says that a lease was renewed late.
#[tokio::test]
async fn a_primary_whose_lease_has_ended_holds_writes_until_it_is_renewed() {
    let node = elector(1);
    lead(&node, 1);
    node.fence.set(boot_time());
    let server = Server::start(here().layer(ReplayLayer::new(node.clone()).hold_timeout(LONG * 2))).await;
    let waiting = tokio::spawn(send(post(&server, "late")));
    held(&node).await;
    assert_eq!(text(send(Request::get(server.url()).body(full("")).unwrap()).await).await, "here");
    assert!(!waiting.is_finished());
    node.fence.set(boot_time() + LONG);
    assert_eq!(text(waiting.await.unwrap()).await, "here");
}

#[tokio::test(start_paused = true)]
async fn a_request_is_held_for_longer_than_the_lease_counts_unless_the_layer_says_otherwise() {
    let held_for = async |layer: ReplayLayer| {
        let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(full("here"))));
        let began = Instant::now();
        let request = Request::post("/").body(Empty::<Bytes>::new()).unwrap();
        is(&layer.layer(app).oneshot(request).await.unwrap(), 503, "not-executed");
        began.elapsed().as_secs()
    };
    assert_eq!(held_for(ReplayLayer::new(node(2, Role::Replica))).await, 5);
    let node = elector(2);
    let layer = ReplayLayer::new(node.clone());
    assert_eq!(held_for(layer.clone()).await, 5);
    // That of the record, whenever it is read.
    node.lease.set_time(Duration::from_secs(15));
    assert_eq!(held_for(layer.clone()).await, 18);
    assert_eq!(held_for(layer.hold_timeout(Duration::from_secs(1))).await, 1);
}

/// The record names the next primary before that serves.
#[tokio::test]
async fn a_node_that_is_about_to_lead_is_asked_again_until_it_does() {
    let next = elector(3);
    stand(&next, Role::Promoting);
    let server = serve(&next, Router::new().fallback(mirror)).await;
    let node = follower(2, 2, peer(3, &server.url()));
    let replica = serve(&node, here()).await;
    let data = "x".repeat(50_000);
    let waiting = tokio::spawn(send(post(&replica, data.clone())));
    held(&node).await;
    // This node hears nothing more of it.
    lead(&next, 2);
    assert!(text(waiting.await.unwrap()).await.ends_with(&data), "with its whole body");
}

#[tokio::test]
async fn what_was_not_sent_to_a_primary_that_is_gone_goes_to_the_next() {
    let next = elector(3);
    lead(&next, 2);
    let server = serve(&next, Router::new().fallback(mirror)).await;
    let node = follower(2, 1, peer(1, &gone().await));
    let replica = serve(&node, here()).await;
    let waiting = tokio::spawn(send(post(&replica, "kept")));
    held(&node).await;
    follow(&node, 2, Some(peer(3, &server.url())));
    assert!(text(waiting.await.unwrap()).await.ends_with("\n\nkept"));
}

#[tokio::test]
async fn what_was_on_its_way_to_a_primary_that_died_is_unknown_and_not_sent_to_the_next() {
    let next = elector(3);
    lead(&next, 2);
    let (app, runs) = counting();
    let server = serve(&next, app).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let node = follower(2, 1, peer(1, &format!("http://{}", listener.local_addr().unwrap())));
    let replica = serve(&node, here()).await;
    let waiting = tokio::spawn(send(post(&replica, "once")));
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_ne!(stream.read(&mut [0; 1024]).await.unwrap(), 0);
    follow(&node, 2, Some(peer(3, &server.url())));
    drop((stream, listener));
    is(&waiting.await.unwrap(), 504, "unknown");
    assert_eq!(runs.load(Ordering::Relaxed), 0);
}

/// It is stopped, or has no power: its connections stay, and it says nothing more on them.
struct Silent {
    listener: TcpListener,
    node: Arc<NodeContext>,
    layer: ReplayLayer,
}

impl Silent {
    async fn start() -> Silent {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let node = follower(2, 1, peer(1, &format!("http://{}", listener.local_addr().unwrap())));
        let layer = ReplayLayer::new(node.clone()).response_timeout(LONG * 9);
        Silent { listener, node, layer }
    }

    /// Returns when it has a request. No time passes from then on but what is waited for.
    async fn asked(&self) -> TcpStream {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        assert_ne!(stream.read(&mut [0; 1024]).await.unwrap(), 0);
        tokio::time::pause();
        stream
    }
}

#[tokio::test]
async fn a_primary_that_is_silent_when_another_leads_has_a_second_and_then_the_outcome_is_unknown() {
    let next = elector(3);
    lead(&next, 2);
    let (app, runs) = counting();
    let server = serve(&next, app).await;
    let other_run = |url: &str| PeerInfo { incarnation: Incarnation::from_u128(9), ..peer(1, url) };
    for change in 0..3 {
        let silent = Silent::start().await;
        let url = format!("http://{}", silent.listener.local_addr().unwrap());
        let app = service_fn(async |_: Request<Body>| Ok::<_, Infallible>(Response::new(full("here"))));
        let request = Request::post("/").body(full("once")).unwrap();
        let waiting = tokio::spawn(silent.layer.layer(app).oneshot(request));
        let _open = silent.asked().await;
        let began = Instant::now();
        // It leads on, in whatever epoch; or no one is known to.
        follow(&silent.node, 2, Some(peer(1, &url)));
        tokio::time::sleep(LONG).await;
        follow(&silent.node, 3, None);
        tokio::time::sleep(LONG).await;
        assert!(!waiting.is_finished(), "{change}");
        match change {
            0 => follow(&silent.node, 4, Some(peer(3, &server.url()))),
            1 => follow(&silent.node, 4, Some(other_run(&url))),
            _ => lead(&silent.node, 4),
        }
        is(&waiting.await.unwrap().unwrap(), 504, "unknown");
        assert_eq!(began.elapsed().as_secs(), 2 * LONG.as_secs() + 1, "{change}");
        assert_eq!(runs.load(Ordering::Relaxed), 0, "{change}");
        tokio::time::resume();
    }
}

#[tokio::test]
async fn a_silent_primary_may_still_answer_and_what_only_reads_is_asked_of_the_next() {
    let next = elector(3);
    lead(&next, 2);
    let (app, runs) = counting();
    let server = serve(&next, app).await;
    for answers in [true, false] {
        let silent = Silent::start().await;
        let request = Request::get("/").body(full("")).unwrap();
        let waiting = tokio::spawn(silent.layer.primary_client().oneshot(request));
        let mut stream = silent.asked().await;
        follow(&silent.node, 2, Some(peer(3, &server.url())));
        if answers {
            tokio::time::sleep(SHORT).await;
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        } else {
            tokio::time::sleep(LONG).await;
        }
        tokio::time::resume();
        let status = waiting.await.unwrap().unwrap().status().as_u16();
        assert_eq!((status, runs.load(Ordering::Relaxed)), if answers { (204, 0) } else { (200, 1) });
    }
}

fn counting() -> (Router, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let app = Router::new().fallback(move || async move {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    (app, runs)
}

/// A primary whose handler reads the body and then waits for the word. Its lease ends meanwhile,
/// and `does` is what its write comes to.
struct Fenced {
    node: Arc<NodeContext>,
    server: Server,
    begun: Arc<Notify>,
    go_on: Arc<Notify>,
}

impl Fenced {
    async fn start(does: impl Fn(&Session) + Clone + Send + Sync + 'static) -> Fenced {
        let node = elector(1);
        lead(&node, 1);
        let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (begins, goes_on) = (begun.clone(), go_on.clone());
        let app = Router::new().fallback(move |session: Extension<Session>, _read: Bytes| {
            let (begins, goes_on, does) = (begins.clone(), goes_on.clone(), does.clone());
            async move {
                begins.notify_one();
                goes_on.notified().await;
                does(&session);
                (StatusCode::INTERNAL_SERVER_ERROR, [("replite-outcome", "not-executed")], "refused")
            }
        });
        let layer = ReplayLayer::new(node.clone()).session(SessionTokens::Monotonic);
        let server = Server::start(app.layer(layer)).await;
        Fenced { node, server, begun, go_on }
    }

    fn peer(&self) -> PeerInfo {
        peer(1, &self.server.url())
    }

    /// Its lease ends while the request runs, and another node leads.
    async fn ends(&self, next: Option<&Server>) {
        self.begun.notified().await;
        fence(&self.node);
        if let Some(next) = next {
            follow(&self.node, 2, Some(peer(3, &next.url())));
        }
        self.go_on.notify_one();
    }
}

/// A write that came to the queue of a primary whose lease then ended: it was not begun.
#[tokio::test]
async fn a_write_that_was_refused_when_the_lease_ended_is_done_by_the_next_primary() {
    let next = elector(3);
    lead(&next, 2);
    let server = serve(&next, Router::new().fallback(mirror)).await;
    // From its own client, and from that of another node, which knows of the next primary or not.
    for (through, node_knows) in [(false, false), (true, true), (true, false)] {
        let old = Fenced::start(Session::need_primary).await;
        let node = follower(2, 1, old.peer());
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, "once")));
        old.begun.notified().await;
        old.begun.notify_one();
        if node_knows {
            follow(&node, 2, Some(peer(3, &server.url())));
        }
        old.ends((!node_knows).then_some(&server)).await;
        let answer = text(waiting.await.unwrap()).await;
        assert!(answer.starts_with("POST / ") || answer.starts_with("POST /\n"), "{answer}");
        assert!(answer.ends_with("\n\nonce"), "{answer}");
    }
}

#[tokio::test]
async fn what_a_fenced_primary_committed_is_unknown_has_no_token_and_runs_on_no_other_node() {
    let next = elector(3);
    lead(&next, 2);
    let (app, runs) = counting();
    let server = serve(&next, app).await;
    for through in [false, true] {
        // Its write was committed, and no one can vouch for it; a later one was refused.
        let old = Fenced::start(|session| {
            session::outcome_unknown();
            session.need_primary();
        })
        .await;
        let node = follower(2, 1, old.peer());
        let replica = serve(&node, here()).await;
        let waiting = tokio::spawn(send(post(if through { &replica } else { &old.server }, "once")));
        old.begun.notified().await;
        old.begun.notify_one();
        old.node.applied.advance(at(11));
        old.ends(Some(&server)).await;
        let response = waiting.await.unwrap();
        is(&response, 500, "unknown");
        assert!(!response.headers().contains_key("replite-token"), "{:?}", response.headers());
        assert_eq!(runs.load(Ordering::Relaxed), 0);
    }
}

/// One that goes on leading has all that its handlers may ask for.
#[tokio::test]
async fn a_primary_whose_handler_asks_for_the_primary_answers_itself() {
    let node = elector(1);
    lead(&node, 1);
    let app = Router::new().fallback(|session: Extension<Session>| async move {
        session.need_primary();
        "here"
    });
    let server = serve(&node, app).await;
    let response = send(post(&server, "x")).await;
    assert_eq!((response.status(), text(response).await.as_str()), (StatusCode::OK, "here"));
}

#[tokio::test]
async fn an_address_that_another_node_gave_counts_until_this_one_knows_a_later_primary() {
    let old = follower(1, 2, peer(3, &gone().await));
    let first = serve(&old, here()).await;
    let node = follower(2, 1, peer(1, &first.url()));
    let replica = serve(&node, here()).await;
    let waiting = tokio::spawn(send(post(&replica, "late")));
    held(&node).await;
    let last = elector(4);
    lead(&last, 3);
    let server = serve(&last, Router::new().fallback(mirror)).await;
    follow(&node, 3, Some(peer(4, &server.url())));
    assert!(text(waiting.await.unwrap()).await.ends_with("late"));
}

/// Others read in the record who the next primary is, before it leads.
#[tokio::test]
async fn a_node_that_is_told_that_it_is_the_primary_itself_waits_until_it_is() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let mine = format!("http://{}", listener.local_addr().unwrap());
    let old = follower(1, 2, peer(2, &mine));
    let asked = Arc::new(Notify::new());
    let asks = asked.clone();
    let told = axum::middleware::from_fn(move |request: Request<Body>, next: axum::middleware::Next| {
        asks.notify_one();
        next.run(request)
    });
    let first = Server::start(here().layer(ReplayLayer::new(old)).layer(told)).await;
    let me = elector_as(peer(2, &mine));
    follow(&me, 1, Some(peer(1, &first.url())));
    let app = here().layer(ReplayLayer::new(me.clone()));
    tokio::spawn(async move {
        axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), app).await.unwrap();
    });
    let waiting = tokio::spawn(send(Request::post(&mine).body(full("late")).unwrap()));
    asked.notified().await;
    stand(&me, Role::Promoting);
    held(&me).await;
    lead(&me, 2);
    assert_eq!(text(waiting.await.unwrap()).await, "here");
}

#[tokio::test]
async fn nodes_that_disagree_on_the_primary_are_given_time_to_hear() {
    let last = elector(4);
    lead(&last, 3);
    let server = serve(&last, Router::new().fallback(mirror)).await;
    let asked = follower(1, 1, peer(3, "http://127.0.0.1:1"));
    let first = serve(&asked, here()).await;
    // It has read in the record that this one leads, which has not read it yet.
    let node = follower(2, 2, peer(1, &first.url()));
    let replica = serve(&node, here()).await;
    let waiting = tokio::spawn(send(post(&replica, "late")));
    held(&node).await;
    follow(&asked, 3, Some(peer(4, &server.url())));
    assert!(text(waiting.await.unwrap()).await.ends_with("late"));
}

#[tokio::test]
async fn a_request_of_a_later_epoch_stops_an_old_primary_and_one_of_an_older_runs_on_a_new() {
    let old = elector(1);
    lead(&old, 3);
    let server = serve(&old, here()).await;
    let tag = ReplayLayer::new(old.clone()).shared.tokens.tag().to_owned();
    let about = About { keys: &old.keys, tag: &tag, method: &Method::POST, target: "/" };
    let hop = |number| {
        let hop = hop_of(77, number);
        send(Request::post(server.url()).header("replite-hop", hop.text(about)).body(full("x")).unwrap())
    };
    assert_eq!(text(hop(2).await).await, "here");
    assert_eq!(text(hop(3).await).await, "here");
    assert_eq!(hop(4).await.status(), 421);
    assert!(!old.leads(), "it acknowledges nothing more");
    assert_eq!(hop(3).await.status(), 421);
    // Where the primary is fixed, it exceeds the epochs of others when they knock.
    let fixed = node(1, Role::Primary);
    let server = serve(&fixed, here()).await;
    let about = About { keys: &fixed.keys, ..about };
    let text_of = hop_of(77, 9).text(about);
    let request = Request::post(server.url()).header("replite-hop", text_of).body(full("x")).unwrap();
    assert_eq!(text(send(request).await).await, "here");
}

#[tokio::test]
async fn a_caller_waits_for_the_next_primary_and_never_asks_a_node_that_does_not_lead() {
    let node = elector(2);
    let next = elector(3);
    lead(&next, 2);
    let server = serve(&next, Router::new().fallback(mirror)).await;
    for role in [Role::Electing, Role::Promoting, Role::Fencing] {
        stand(&node, role);
        let client = ReplayLayer::new(node.clone()).primary_client();
        let call = client.oneshot(Request::post("/job").body(full("kept")).unwrap());
        let waiting = tokio::spawn(call);
        held(&node).await;
        follow(&node, 2, Some(peer(3, &server.url())));
        assert!(text(waiting.await.unwrap().unwrap()).await.ends_with("kept"), "{role}");
    }
    stand(&node, Role::Electing);
    let client = ReplayLayer::new(node).hold_timeout(SHORT).primary_client();
    let failure = client.oneshot(Request::post("/job").body(full("kept")).unwrap()).await.unwrap_err();
    assert_eq!((failure.reason, failure.outcome), (Reason::NoPrimary, Outcome::NotExecuted));
}
