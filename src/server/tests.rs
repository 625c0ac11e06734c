//! The door itself: who is let in, and what the others see.

use std::pin::Pin;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt;
use tower::ServiceExt;

use crate::channel::Binding;
use crate::peer::{Incarnation, NodeId};
use crate::primary::fake::{Fake, SECRET, keys, node};
use crate::server::*;
use crate::status::Role;

/// A body that must not be touched.
struct Untouched;

impl Body for Untouched {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        panic!("the body was read")
    }
}

/// A fresh one.
fn knock() -> Knock {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let mut nonce = [3; 32];
    nonce[..8].copy_from_slice(&LAST.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    Knock {
        version: 3,
        cluster: "test".into(),
        database: "app".into(),
        node: NodeId::from_u128(2),
        incarnation: Incarnation::from_u128(1002),
        nonce,
        binding: Binding::NONE,
    }
}

fn service(secret: &[u8], mount: Mount) -> (ReplicationService, Arc<ReplicaServer>, Arc<NodeContext>) {
    let node = node(1, secret, Role::Primary);
    let replica_server = ReplicaServer::new(node.clone());
    replica_server.set(Some(Fake::new(node.clone(), 1)));
    (
        ReplicationService::new(node.clone(), replica_server.clone(), TaskTracker::new(), mount),
        replica_server,
        node,
    )
}

fn request<B>(headers: HeaderMap, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = "/_replite/v1/stream".parse().unwrap();
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    request
}

async fn assert_bare_404(service: &ReplicationService, request: Request<Untouched>) {
    let response = service.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    assert!(response.headers().is_empty());
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
}

async fn refused(service: &ReplicationService, request: Request<Untouched>) -> (u16, String) {
    let response = service.clone().oneshot(request).await.unwrap();
    let word = response.headers()["replite-refused"].to_str().unwrap().to_owned();
    (response.status().as_u16(), word)
}

#[tokio::test]
async fn strangers_get_a_bare_404_for_every_path_and_method() {
    let (service, ..) = service(&SECRET, Mount::Mounted);
    let wrong = knock().headers(&keys(&[2; 32])).unwrap();
    for headers in [HeaderMap::new(), wrong] {
        for path in
            ["/", "/v1/stream", "/_replite/v1/standing", "/_replite/v1/stream", "/v2/stream", "/a?b=c"]
        {
            for method in [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS, Method::CONNECT] {
                let mut request = request(headers.clone(), Untouched);
                *request.uri_mut() = path.parse().unwrap();
                *request.method_mut() = method;
                assert_bare_404(&service, request).await;
            }
        }
    }
}

#[tokio::test]
async fn who_proved_the_secret_learns_why_he_is_refused() {
    let (service, replica_server, node) = service(&SECRET, Mount::Mounted);
    let ask = |knock: Knock| request(knock.headers(&keys(&SECRET)).unwrap(), Untouched);
    let is = |status, word: &str| (status, word.to_owned());
    assert_eq!(refused(&service, ask(Knock { version: 4, ..knock() })).await, is(409, "version=3"));
    let other = Knock { cluster: "other".into(), ..knock() };
    assert_eq!(refused(&service, ask(other)).await, is(409, "cluster=test"));
    let other = Knock { database: "other".into(), ..knock() };
    assert_eq!(refused(&service, ask(other)).await, is(404, "database"));
    let mut http1 = ask(knock());
    *http1.version_mut() = Version::HTTP_11;
    assert_eq!(refused(&service, http1).await, is(426, "http2"));
    let mut get = ask(knock());
    *get.method_mut() = Method::GET;
    assert_eq!(refused(&service, get).await, is(404, "path"));
    let copied = Knock { node: node.me.node, ..knock() };
    assert_eq!(refused(&service, ask(copied)).await, is(409, "duplicate-node"));
    replica_server.set(None);
    assert_eq!(refused(&service, ask(knock())).await, is(421, "not-primary"));
    node.drain.cancel();
    assert_eq!(refused(&service, ask(knock())).await, is(503, "stopping"));
}

#[tokio::test]
async fn without_a_secret_only_the_own_listener_answers() {
    let ask = |headers| request(headers, Untouched);
    let (mounted, ..) = service(&[], Mount::Mounted);
    assert_bare_404(&mounted, ask(knock().headers(&keys(&[])).unwrap())).await;
    let (own, ..) = service(&[], Mount::Own);
    let (knock, body) = (knock(), http_body_util::Empty::<Bytes>::new());
    let answered = own.oneshot(request(knock.headers(&keys(&[])).unwrap(), body)).await.unwrap();
    assert_eq!(answered.status(), StatusCode::OK);
    let answer = Answer::read(answered.headers(), &knock, &keys(&[])).unwrap().unwrap().0;
    assert_eq!(answer.node, NodeId::from_u128(1));
    assert_eq!(answered.headers()["cache-control"], "no-store, no-transform");
    assert_eq!(answered.headers()["content-type"], handshake::CONTENT_TYPE);
}

/// In the clear a knock says nothing of the connection that it was made for.
#[tokio::test]
async fn a_knock_that_was_recorded_in_the_clear_is_none() {
    let (service, ..) = service(&SECRET, Mount::Own);
    let recorded = knock().headers(&keys(&SECRET)).unwrap();
    let first = request(recorded.clone(), http_body_util::Empty::<Bytes>::new());
    assert_eq!(service.clone().oneshot(first).await.unwrap().status(), StatusCode::OK);
    for path in ["/v1/stream", "/v1/standing", "/v1/command", "/v1/members"] {
        let mut again = request(recorded.clone(), Untouched);
        *again.uri_mut() = path.parse().unwrap();
        assert_bare_404(&service, again).await;
    }
    let fresh = request(knock().headers(&keys(&SECRET)).unwrap(), http_body_util::Empty::<Bytes>::new());
    assert_eq!(service.oneshot(fresh).await.unwrap().status(), StatusCode::OK);
}

/// A node that has the secret, and says more than a hello has: what came so far is let go at once.
#[tokio::test]
async fn a_hello_of_an_absurd_size_is_hung_up_on_before_it_has_come() {
    let (service, replica_server, node) = service(&SECRET, Mount::Own);
    let tracker = TaskTracker::new();
    let listener = net::Listener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let to = net::Endpoint::parse(&format!("http://{}", listener.address())).unwrap();
    let (channel, stop) = (node.channel.clone(), node.stop.clone());
    tracker.spawn(listener.serve(channel, move |inside| service.on(inside), tracker.clone(), stop));
    let asker = handshake::Asker {
        node: NodeId::from_u128(2),
        incarnation: Incarnation::from_u128(2),
        ..handshake::Asker::of(&node)
    };
    let header = |kind: u8, bytes: usize| {
        let raw = [&(bytes as u32).to_le_bytes()[..], &[kind, 0, crate::wire::VERSION as u8, 0], &[0; 16]];
        Bytes::from(raw.concat())
    };
    let longer = crate::wire::HELLO_MAX_BYTES + 1;
    for absurd in [header(4, longer), header(4, u32::MAX as usize), header(10, longer), header(16, 1 << 20)] {
        let began = std::time::Instant::now();
        let (_, mut opened) = asker.knock(&to, handshake::STREAM_PATH, &tracker).await.unwrap();
        assert_eq!(opened.status, StatusCode::OK);
        opened.request.send_data(absurd).await.unwrap();
        let said = opened.body.next().await;
        assert!(matches!(said, Some(Err(_))), "{said:?}");
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "it waited for the rest");
    }
    assert!(replica_server.replicas().is_empty());
    node.stop.cancel();
    tracker.close();
    tracker.wait().await;
}

#[test]
fn the_service_is_what_routers_ask_for() {
    fn mountable<S>(_: &S)
    where
        S: Service<Request<axum::body::Body>, Error = Infallible> + Clone + Send + Sync + 'static,
        S::Response: axum::response::IntoResponse,
        S::Future: Send + 'static,
    {
    }
    let (service, ..) = service(&SECRET, Mount::Mounted);
    mountable(&service);
    let _: axum::Router = axum::Router::new().nest_service("/_replite", service);
}

/// A replica with another secret saw a bare 404, and no one was told on the primary; who knocks
/// often does not fill its logs.
#[tokio::test]
async fn a_knock_with_another_secret_is_told_to_the_operator_now_and_then() {
    let (service, _, node) = service(&SECRET, Mount::Mounted);
    let mut events = node.events();
    assert_bare_404(&service, request(HeaderMap::new(), Untouched)).await;
    assert_eq!(node.problem(), None, "who only passes by is nobody's problem");
    for id in 0..1000 {
        let knock = Knock { node: NodeId::from_u128(id), ..knock() };
        assert_bare_404(&service, request(knock.headers(&keys(&[2; 32])).unwrap(), Untouched)).await;
    }
    let problem = node.problem().unwrap();
    assert!(problem.contains(&NodeId::NIL.to_string()) && problem.contains("another secret"), "{problem}");
    let told = events.try_recv().unwrap();
    assert!(matches!(told, crate::status::Event::OtherSecret { times: 1, .. }), "{told:?}");
    assert!(events.try_recv().is_err(), "one of a thousand is told");
}

/// A primary by a lease that was told of a later one, and does not know yet who leads.
#[tokio::test]
async fn a_primary_that_has_heard_of_a_later_epoch_lets_no_replica_in() {
    let node = crate::primary::fake::leased(1, &SECRET, Role::Primary);
    let replica_server = ReplicaServer::new(node.clone());
    replica_server.set(Some(Fake::new(node.clone(), 1)));
    let epoch = crate::Epoch::new(1, 1);
    node.change_role(crate::context::RoleChange::Leads { me: node.me.clone(), epoch });
    let service = ReplicationService::new(node.clone(), replica_server, TaskTracker::new(), Mount::Mounted);
    let ask = || request(knock().headers(&keys(&SECRET)).unwrap(), http_body_util::Empty::<Bytes>::new());
    node.lease.heard.note(1).unwrap();
    let response = service.clone().oneshot(ask()).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "its own epoch");
    node.lease.heard.note(2).unwrap();
    let response = service.clone().oneshot(ask()).await.unwrap();
    assert_eq!(response.status(), StatusCode::MISDIRECTED_REQUEST);
    assert!(!response.headers().contains_key("replite-primary"), "it does not name itself");
    // It says how it stands all the same.
    let mut asks = ask();
    *asks.uri_mut() = "/_replite/v1/standing".parse().unwrap();
    assert_eq!(service.oneshot(asks).await.unwrap().status(), StatusCode::OK);
}
