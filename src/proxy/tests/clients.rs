//! Who the client is: what handlers are told here and on the primary, whatever the client says.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::extract::connect_info::MockConnectInfo;
use http::Request;
use http::request::Parts;
use http::uri::Scheme;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tower::{Layer, ServiceExt};

use crate::context::NodeContext;
use crate::peer::NodeId;
use crate::proxy::forwarded::{Forwarded, arrive};
use crate::proxy::head::Head;
use crate::proxy::hop::{About, ClientScheme, Hop};
use crate::proxy::tests::world::*;
use crate::proxy::{Proxies, ReplayLayer};
use crate::report::noted;
use crate::session::Session;
use crate::status::Role;

/// What a handler knows of its client: the address, the node that took the request, headers. A POST
/// commits.
async fn who(request: Request<Body>) -> String {
    if request.method() == http::Method::POST {
        Session::current().unwrap().observe_txid(txid(12));
    }
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|info| info.0);
    let forwarded = request.extensions().get::<Forwarded>();
    let client = forwarded.and_then(Forwarded::client);
    assert!(forwarded.is_none() || client == peer, "{client:?} {peer:?}");
    let node = forwarded.map(|forwarded| forwarded.node().as_u128());
    let scheme = forwarded.and_then(Forwarded::scheme);
    format!("peer {peer:?} node {node:?} scheme {scheme:?}\n{}", mirror(request).await)
}

fn app() -> Router {
    Router::new().fallback(who)
}

/// A request on a connection of its own, of this source: its line, and headers after a `|` each.
/// Returns the source and the answer.
async fn from(source: [u8; 4], to: SocketAddr, head: &str) -> (SocketAddr, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    let mut stream = socket.connect(to).await.unwrap();
    let source = stream.local_addr().unwrap();
    // The version stands before the headers.
    let (line, headers) = head.split_once(" | ").unwrap_or((head, "x-none: 1"));
    let headers = headers.replace(" | ", "\r\n");
    let request =
        format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n{headers}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    (source, answer)
}

const CLIENT: [u8; 4] = [127, 0, 0, 2];

#[tokio::test]
async fn a_handler_on_the_primary_sees_the_client_that_the_replica_saw() {
    let pair = Pair::new(app(), app(), |l| l).await;
    let (client, got) = from(CLIENT, pair.replica.address, "POST /").await;
    assert!(got.contains(&format!("peer Some({client}) node Some(2) scheme None\n")), "{got}");
    let (client, got) = from(CLIENT, pair.primary.address, "POST /").await;
    assert!(got.contains(&format!("peer Some({client}) node None")), "{got}");
    let (client, got) = from(CLIENT, pair.replica.address, "GET /").await;
    assert!(got.contains(&format!("peer Some({client}) node None")), "it ran here: {got}");
    // HTTP/2 says which scheme it is.
    let h2: Client<HttpConnector, TestBody> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let got = text(h2.request(pair.post("/").body(full("")).unwrap()).await.unwrap()).await;
    assert!(got.contains(" node Some(2) scheme Some(\"http\")\n"), "{got}");
}

#[tokio::test]
async fn a_client_that_is_not_known_is_no_other() {
    // The one of the hook, which may know the IP address only, and goes before the connection's.
    let pair = Pair::new(app(), app(), |l| l.client_ip(|_| Some([203, 0, 113, 9].into()))).await;
    let (_, got) = from(CLIENT, pair.replica.address, "POST /").await;
    assert!(got.contains("peer Some(203.0.113.9:0) node Some(2)"), "{got}");
    assert!(got.contains("x-forwarded-for: 203.0.113.9\n"), "{got}");
    let pair = Pair::new(app(), app(), |l| l.client_ip(|_| None)).await;
    let (_, got) = from(CLIENT, pair.replica.address, "POST /").await;
    assert!(got.contains("peer None node Some(2)"), "{got}");
}

/// A hop that proves nothing may be a follower's, or that of a node with another secret: the peer
/// is a node then, which an application may trust.
#[tokio::test]
async fn what_only_seems_to_come_from_a_node_has_no_client() {
    let pair = Pair::new(app(), app(), |l| l).await;
    let made_up = "POST / | replite-hop: v1.1.x.y.z";
    for server in [&pair.primary, &pair.replica] {
        let (_, got) = from(CLIENT, server.address, made_up).await;
        assert!(got.contains("peer None"), "{got}");
    }
    let (_, got) = from(CLIENT, pair.primary.address, made_up).await;
    assert!(got.contains("peer None node None"), "{got}");

    let follower = follower(9);
    follow(&follower, 1, Some(peer(1, &pair.primary.url())));
    let server = Server::start(app().layer(ReplayLayer::new(follower))).await;
    let (_, got) = from(CLIENT, server.address, "POST /").await;
    assert!(got.contains("peer None node None"), "{got}");
    // The owner of the application may say that there is a proxy.
    let layer = ReplayLayer::new(node(1, Role::Primary));
    let proxies = Proxies::at(["127.0.0.0/8"]).unwrap();
    let server = Server::start(app().layer(layer.proxies(proxies))).await;
    let (client, got) = from(CLIENT, server.address, made_up).await;
    assert!(got.contains(&format!("peer Some({client}) node None")), "{got}");
}

const TOLD: &str = " | x-forwarded-for: 10.0.0.1 | X-Forwarded-Proto: https | x-forwarded-other: a \
    | x-real-ip: 10.0.0.1 | forwarded: for=10.0.0.1 | x-mine: 1 | connection: x-real-ip, x-mine";

fn told(answer: &str) -> usize {
    let words = ["x-forwarded-for: 10.0.0.1\n", "x-forwarded-proto: https\n", "x-forwarded-other: a\n"];
    let words = words.into_iter().chain(["x-real-ip: 10.0.0.1\n", "forwarded: for=10.0.0.1\n"]);
    assert!(answer.contains("x-mine: 1\n"), "{answer}");
    words.filter(|word| answer.contains(&format!("\n{word}"))).count()
}

#[tokio::test]
async fn who_may_name_the_client_in_headers_is_as_it_was_said() {
    let proxy = [127, 0, 0, 3];
    let one = Proxies::at(["127.0.0.3"]).unwrap();
    for (proxies, of_proxy, of_other) in [(Proxies::Unknown, 5, 5), (Proxies::None, 0, 0), (one, 5, 0)] {
        let primary_node = node(1, Role::Primary);
        let layer = ReplayLayer::new(primary_node.clone()).proxies(proxies.clone());
        let primary = Server::start(app().layer(layer)).await;
        let replica = node(2, Role::Replica);
        follow(&replica, 1, Some(peer(1, &primary.url())));
        let layer = ReplayLayer::new(replica).proxies(proxies.clone());
        let replica = Server::start(app().layer(layer)).await;
        for (source, kept) in [(proxy, of_proxy), (CLIENT, of_other)] {
            for (server, method) in [(&primary, "POST"), (&replica, "GET"), (&replica, "POST")] {
                let (_, got) = from(source, server.address, &format!("{method} /{TOLD}")).await;
                assert_eq!(told(&got), kept, "{proxies:?} {source:?} {method}: {got}");
                if method == "POST" {
                    assert_eq!(got.contains("; Secure\r\n"), kept > 0, "so does the cookie: {got}");
                }
            }
        }
    }
}

#[tokio::test]
async fn what_a_proxy_said_reaches_the_layer_of_an_inner_database() {
    let proxies = || Proxies::at(["127.0.0.3"]).unwrap();
    let (outer, inner) = (node_in("other", 1, Role::Primary), node(1, Role::Primary));
    let around = ReplayLayer::new(outer).proxies(proxies());
    let layer = ReplayLayer::new(inner.clone()).proxies(proxies());
    let server = Server::start(app().layer(layer.clone()).layer(around)).await;
    let tag = layer.shared.tokens.tag();
    let about = About { keys: &inner.keys, tag, method: &http::Method::POST, target: "/" };
    let client = "198.51.100.7:4711".parse().ok();
    let hop = Hop { client, ..hop_of(77, 1) }.text(about);
    let (_, got) = from(CLIENT, server.address, &format!("POST /{TOLD} | replite-hop: {hop}")).await;
    assert!(got.contains("peer Some(198.51.100.7:4711) node Some(77)"), "{got}");
    assert_eq!(told(&got), 5, "{got}");
    let forged = hop.replacen("v1.1", "v1.2", 1);
    let (_, got) = from(CLIENT, server.address, &format!("POST /{TOLD} | replite-hop: {forged}")).await;
    assert!(got.contains("peer None node None"), "{got}");
    assert_eq!(told(&got), 0, "{got}");
}

/// The head that a layer of the node makes of a request that came in with these extensions.
fn head_of(node: &Arc<NodeContext>, proxies: Proxies, parts: &Parts) -> Head {
    let layer = ReplayLayer::new(node.clone()).proxies(proxies);
    Head::of_client(parts, &layer.shared.options)
}

fn parts_of(peer: &str, list: &'static str) -> Parts {
    let mut request = Request::get("/").body(()).unwrap();
    request.extensions_mut().insert(ConnectInfo(peer.parse::<SocketAddr>().unwrap()));
    request.headers_mut().insert("x-forwarded-for", http::HeaderValue::from_static(list));
    request.into_parts().0
}

#[test]
fn a_request_that_goes_on_from_node_to_node_keeps_its_client() {
    let node = node(2, Role::Replica);
    let mut parts = parts_of("10.0.0.2:80", "192.0.2.1, 198.51.100.7");
    let client = "198.51.100.7:4711".parse().ok();
    let hop = Hop { client, scheme: Some(ClientScheme::Https), ..hop_of(77, 1) };
    arrive(&mut parts, Forwarded::of(&hop));
    let forwarded = *parts.extensions.get::<Forwarded>().unwrap();
    assert_eq!((forwarded.scheme(), forwarded.node()), (Some(Scheme::HTTPS), NodeId::from_u128(77)));
    let head = head_of(&node, Proxies::None, &parts);
    assert_eq!((head.client.address, head.taken_by), (client, Some(NodeId::from_u128(77))));
    assert_eq!(head.client.share, Some([198, 51, 100, 7].into()));
    assert_eq!(head.scheme, Some(ClientScheme::Https));
    let further = Hop { from: NodeId::from_u128(2), taken_by: head.taken_by, ..hop };
    assert_eq!(Forwarded::of(&further), forwarded);
}

#[test]
fn a_hop_that_was_made_up_changes_no_share() {
    let node = node(2, Role::Replica);
    for (proxies, share) in [
        (Proxies::Unknown, [198, 51, 100, 7]),
        (Proxies::None, [203, 0, 113, 9]),
        (Proxies::at(["10.0.0.1"]).unwrap(), [203, 0, 113, 9]),
    ] {
        for hop in [None, Some("v1.1.x.y.z")] {
            let layer = ReplayLayer::new(node.clone()).proxies(proxies.clone());
            let mut parts = parts_of("203.0.113.9:80", "192.0.2.1, 198.51.100.7");
            if let Some(hop) = hop {
                parts.headers.insert("replite-hop", http::HeaderValue::from_static(hop));
            }
            drop(crate::proxy::plan::plan(&layer.shared, &mut parts, true));
            let head = head_of(&node, proxies.clone(), &parts);
            assert_eq!(head.client.share, Some(share.into()), "{proxies:?} {hop:?}");
            assert_eq!(head.client.address.is_some(), hop.is_none());
        }
    }
}

#[test]
fn over_the_channel_nothing_is_appended() {
    let node = node(2, Role::Replica);
    let layer = ReplayLayer::new(node).client_ip(|_| Some([203, 0, 113, 9].into()));
    let parts = parts_of("203.0.113.9:80", "192.0.2.1");
    let head = Head::of_client(&parts, &layer.shared.options);
    assert_eq!(head.headers(false), parts.headers);
    assert_eq!(head.headers(true)["x-forwarded-for"], "192.0.2.1, 203.0.113.9");
}

#[tokio::test]
async fn a_test_of_an_application_may_make_up_its_client() {
    let primary = Server::start(app().layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let replica = node(2, Role::Replica);
    follow(&replica, 1, Some(peer(1, &primary.url())));
    let client = SocketAddr::from(([203, 0, 113, 9], 7));
    let app = app().layer(ReplayLayer::new(replica)).layer(MockConnectInfo(client));
    let post = Request::post("/").body(Body::empty()).unwrap();
    let got = text(app.oneshot(post).await.unwrap()).await;
    assert!(got.starts_with("peer Some(203.0.113.9:7) node Some(2)"), "{got}");
}

#[test]
fn each_layer_says_once_who_may_name_the_client() {
    let said = |proxies: Option<Proxies>| {
        noted(false, || {
            let layer = ReplayLayer::new(node(1, Role::Primary));
            let layer = proxies.map_or(layer.clone(), |proxies| layer.proxies(proxies));
            let service = || tower::service_fn(|_: Request<Body>| std::future::ready(Ok::<_, ()>(())));
            for layer in [&layer, &layer.clone()] {
                drop((layer.layer(service()), layer.layer(service())));
            }
        })
    };
    let at = Proxies::at(["10.0.0.0/8", "2001:db8::1"]).unwrap();
    for (proxies, words) in [
        (None, "stay as they came"),
        (Some(Proxies::None), "there is no proxy"),
        (Some(at), "but those of 10.0.0.0/8, 2001:db8::1"),
    ] {
        let lines = said(proxies);
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert!(line.starts_with("INFO ") && line.contains(words), "{line}");
        assert!(line.contains("condition=\"client_headers\";"), "{line}");
    }
}
