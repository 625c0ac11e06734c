//! Requests that go to the primary: streaming, hygiene, hops.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::response::AppendHeaders;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::peer::Incarnation;
use crate::proxy::ReplayLayer;
use crate::proxy::hop::{About, HOPS_MAX, Hop};
use crate::proxy::tests::world::*;
use crate::status::{PeerInfo, Role};

async fn echo(request: Request<Body>) -> Response<Body> {
    Response::builder().header("trailer", "x-sum").body(request.into_body()).unwrap()
}

fn nothing() -> Router {
    Router::new().fallback(|| async { "here" })
}

#[tokio::test]
async fn bodies_stream_both_ways_at_once_and_keep_their_trailers() {
    let pair = Pair::new(Router::new().fallback(echo), nothing(), |l| l).await;
    let (mut sender, body) = piecewise();
    let request = pair.post("/").header("te", "trailers").header("trailer", "x-sum").body(body).unwrap();
    let sending = tokio::spawn(send(request));
    push(&mut sender, "first").await;
    let mut body = sending.await.unwrap().into_body();
    assert_eq!(next(&mut body).await.unwrap(), "first", "answered before the request's body ended");
    push(&mut sender, "second").await;
    assert_eq!(next(&mut body).await.unwrap(), "second");
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "42".parse().unwrap());
    sender.send(Frame::trailers(trailers.clone())).await.unwrap();
    drop(sender);
    let last = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(last, trailers);
}

#[tokio::test]
async fn a_large_body_goes_through_whole_and_nothing_of_it_stays_in_memory() {
    let app = Router::new().fallback(|body: Body| async move {
        let mut hasher = blake3::Hasher::new();
        let mut body = body;
        while let Some(frame) = body.frame().await {
            hasher.update(frame.unwrap().data_ref().unwrap());
        }
        hasher.finalize().to_string()
    });
    let mut kept = None;
    let pair = Pair::new(app, nothing(), |l| {
        kept = Some(l.shared.options.budget.clone());
        l
    });
    let pair = pair.await;
    let data: Vec<u8> = (0..24u32 << 18).flat_map(u32::to_le_bytes).collect();
    let sum = blake3::hash(&data).to_string();
    assert_eq!(text(send(pair.post("/").body(full(data)).unwrap()).await).await, sum);
    assert_eq!(kept.unwrap().used(), 0);
}

#[tokio::test]
async fn the_primary_sees_the_request_as_it_came_without_what_was_spoofed() {
    let pair = Pair::new(Router::new().fallback(mirror), nothing(), |l| {
        l.client_ip(|p| p.extensions.get::<ConnectInfo<SocketAddr>>().map(|c| c.0.ip()))
    });
    let pair = pair.await;
    let odd = "/a%2Fb/%e4/./x?q=%20+&&z=%00";
    let request = pair
        .post(odd)
        .header("host", "notes.example")
        .header("replite-hop", "v1.1.x.y.z")
        .header("replite-outcome", "not-executed")
        .header("replite-anything", "x")
        .header("connection", "x-kept, x-forwarded-for, keep-alive")
        .header("keep-alive", "1")
        .header("x-kept", "2")
        .header("proxy-authorization", "secret")
        .header("x-forwarded-for", "1.2.3.4")
        .body(full("hello"))
        .unwrap();
    let got = text(send(request).await).await;
    assert!(got.starts_with(&format!("POST {odd}\n")), "{got}");
    for line in [
        "host: notes.example\n",
        "x-kept: 2\n",
        "x-forwarded-for: 1.2.3.4, 127.0.0.1\n",
        "x-forwarded-host: notes.example\n",
        "content-length: 5\n",
        "\n\nhello",
    ] {
        assert!(got.contains(line), "{line:?} is missing in {got}");
    }
    for word in ["replite-", "keep-alive", "proxy-authorization"] {
        assert!(!got.contains(word), "{word:?} came through in {got}");
    }
}

#[tokio::test]
async fn http_2_from_the_client_becomes_proper_http_1_for_the_primary() {
    let pair = Pair::new(Router::new().fallback(mirror), nothing(), |l| l).await;
    let client: Client<HttpConnector, TestBody> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let (mut sender, body) = piecewise();
    let request = pair.post("/x").header("cookie", "a=1").header("cookie", "b=2").body(body).unwrap();
    let sending = tokio::spawn(client.request(request));
    push(&mut sender, "of unknown length").await;
    drop(sender);
    let response = sending.await.unwrap().unwrap();
    assert_eq!(response.version(), http::Version::HTTP_2);
    let got = text(response).await;
    for line in [
        format!("host: {}\n", pair.replica.address),
        "cookie: a=1; b=2\n".into(),
        "x-forwarded-proto: http\n".into(),
        "transfer-encoding: chunked\n".into(),
        "\n\nof unknown length".into(),
    ] {
        assert!(got.contains(&line), "{line:?} is missing in {got}");
    }
}

#[tokio::test]
async fn a_length_beside_a_transfer_encoding_does_not_go_on() {
    let pair = Pair::new(Router::new().fallback(mirror), nothing(), |l| l).await;
    let mut stream = TcpStream::connect(pair.replica.address).await.unwrap();
    let request = "POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\
                   connection: close\r\n\r\n5\r\nabcde\r\n0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    // Whole, or refused by the server before it came to us.
    assert!(answer.contains("\n\nabcde") || answer.starts_with("HTTP/1.1 400"), "{answer}");
}

#[tokio::test]
async fn the_client_sees_the_primarys_response_as_it_was() {
    let app = Router::new().fallback(|| async {
        let headers = [("set-cookie", "a=1"), ("set-cookie", "b=2"), ("connection", "x-hop"), ("x-hop", "1")];
        (http::StatusCode::IM_A_TEAPOT, AppendHeaders(headers), "pot")
    });
    let pair = Pair::new(app, nothing(), |l| l).await;
    let response = send(pair.post("/").body(full("")).unwrap()).await;
    assert_eq!(response.status(), 418);
    let cookies: Vec<_> = response.headers().get_all("set-cookie").iter().collect();
    assert_eq!(cookies[..2], ["a=1", "b=2"]);
    assert!(
        cookies.len() == 3 && cookies[2].to_str().unwrap().starts_with("replite_"),
        "the primary's layer's"
    );
    assert!(!response.headers().contains_key("x-hop"));
    assert_eq!(response.headers()["content-length"], "3");
    assert_eq!(text(response).await, "pot");
}

#[tokio::test]
async fn an_early_answer_is_relayed_while_the_body_still_waits() {
    let app = Router::new().fallback(|| async { http::StatusCode::PAYLOAD_TOO_LARGE });
    let pair = Pair::new(app, nothing(), |l| l).await;
    let (_sender, body) = piecewise();
    assert_eq!(send(pair.post("/").body(body).unwrap()).await.status(), 413);
}

#[tokio::test]
async fn an_early_answer_to_a_large_body_is_not_lost() {
    let app = Router::new().fallback(|| async { http::StatusCode::PAYLOAD_TOO_LARGE });
    let pair = Pair::new(app, nothing(), |l| l).await;
    for _ in 0..20 {
        let request = pair.post("/").body(full(vec![b'x'; 1 << 20])).unwrap();
        assert_eq!(send(request).await.status(), 413);
    }
}

#[tokio::test]
async fn a_body_that_is_read_behind_the_answer_is_whole() {
    let (sender, mut lengths) = tokio::sync::mpsc::unbounded_channel();
    let app = Router::new().fallback(move |body: Body| {
        let sender = sender.clone();
        tokio::spawn(async move { sender.send(body.collect().await.map(|b| b.to_bytes().len()).ok()) });
        async { http::StatusCode::ACCEPTED }
    });
    let pair = Pair::new(app, nothing(), |l| l).await;
    for _ in 0..10 {
        let (mut sender, body) = piecewise();
        let sending = tokio::spawn(send(pair.post("/").body(body).unwrap()));
        push(&mut sender, "first ").await;
        assert_eq!(sending.await.unwrap().status(), 202);
        // A client that still sends is still heard.
        if sender.send(Frame::data(Bytes::from_static(b"second"))).await.is_ok() {
            drop(sender);
        }
        assert!(matches!(lengths.recv().await.unwrap(), Some(12) | None), "whole, or known to be broken");
    }
}

#[tokio::test]
async fn what_two_servers_could_read_in_two_ways_is_not_forwarded() {
    let pair = Pair::new(Router::new().fallback(mirror), nothing(), |l| l).await;
    for request in [
        "POST / HTTP/1.1\r\nhost: a\r\nhost: b\r\n",
        "POST evil:80 HTTP/1.1\r\nhost: a\r\n",
        "POST * HTTP/1.1\r\nhost: a\r\n",
    ] {
        let mut stream = TcpStream::connect(pair.replica.address).await.unwrap();
        let text = format!("{request}connection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer.split(' ').nth(1), Some("400"), "{request:?}: {answer}");
    }
}

#[tokio::test]
async fn a_node_that_is_not_the_primary_points_to_it_before_it_reads_the_body() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let app = Router::new().fallback(move |body: String| async move {
        counted.fetch_add(1, Ordering::Relaxed);
        body
    });
    // The third node is the primary since epoch 2; the first still asks the second.
    let third = Server::start(app.layer(ReplayLayer::new(node(3, Role::Primary)))).await;
    let second_node = node(1, Role::Replica);
    follow(&second_node, 2, Some(peer(3, &third.url())));
    let second = Server::start(nothing().layer(ReplayLayer::new(second_node.clone()))).await;
    let (first, first_node) = replica_of(&second.url(), |l| l.hold_timeout(SHORT).held_requests(8)).await;

    let post = |data: Vec<u8>| Request::post(first.url()).body(full(data)).unwrap();
    let response = send(post(vec![b'x'; 50_000])).await;
    assert_eq!(response.status(), 200);
    assert_eq!(text(response).await.len(), 50_000, "the body went along to the second try");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    assert!(!send(post(b"y".to_vec())).await.headers().contains_key("replite-primary"));

    // They disagree without one of them knowing better: no request goes in circles.
    follow(&second_node, 1, Some(peer(3, &third.url())));
    is(&send(post(b"y".to_vec())).await, 508, "not-executed");
    // It knows of none: held, then given up.
    follow(&second_node, 2, None);
    is(&send(post(b"y".to_vec())).await, 503, "not-executed");
    // ... or the one that asked learns it meanwhile.
    let waiting = tokio::spawn(send(post(b"z".to_vec())));
    first_node.roles.subscribe().borrow_and_update();
    follow(&first_node, 3, Some(peer(3, &third.url())));
    assert_eq!(text(waiting.await.unwrap()).await, "z");
    // A primary that has stopped, and started again where it was.
    let (again, again_node) = replica_of(&second.url(), |l| l).await;
    let waiting = tokio::spawn(send(Request::post(again.url()).body(full(b"again".to_vec())).unwrap()));
    comes("a request that is held", || again_node.roles.receiver_count() > 0).await;
    lead(&second_node, 1);
    let process = PeerInfo { incarnation: Incarnation::from_u128(1), ..peer(1, &second.url()) };
    follow(&again_node, 1, Some(process));
    assert_eq!(waiting.await.unwrap().status(), 200);
}

#[tokio::test]
async fn an_endless_chase_ends() {
    // Each node knows of a newer primary at the other.
    let (a_node, b_node) = (node(11, Role::Replica), node(12, Role::Replica));
    let a = Server::start(nothing().layer(ReplayLayer::new(a_node.clone()))).await;
    let b = Server::start(nothing().layer(ReplayLayer::new(b_node.clone()))).await;
    follow(&a_node, 5, Some(peer(12, &b.url())));
    follow(&b_node, 6, Some(peer(11, &a.url())));
    let (first, _) = replica_of(&a.url(), |l| l).await;
    is(&send(Request::post(first.url()).body(full("x")).unwrap()).await, 508, "not-executed");
}

#[tokio::test]
async fn a_request_that_comes_back_to_its_node_ends_there() {
    let (server, node) = replica_of("", |l| l).await;
    follow(&node, 1, Some(peer(9, &server.url())));
    is(&send(Request::post(server.url()).body(full("x")).unwrap()).await, 508, "not-executed");
}

#[tokio::test]
async fn a_proved_hop_from_another_node_gets_421_and_a_forged_one_is_a_clients() {
    let pair = Pair::new(Router::new().fallback(mirror), nothing(), |l| l).await;
    let method = http::Method::POST;
    let layer = ReplayLayer::new(pair.replica_node.clone());
    let tag = layer.shared.tokens.tag().to_owned();
    let about = About { keys: &pair.replica_node.keys, tag: &tag, method: &method, target: "/x?y" };
    let hop = hop_of(77, 1);
    let (_sender, never_sent) = piecewise();
    let request = pair.post("/x?y").header("replite-hop", hop.text(about)).body(never_sent).unwrap();
    let response = send(request).await;
    assert_eq!(response.status(), 421);
    assert!(response.headers().contains_key("replite-primary"));
    let too_far = Hop { count: HOPS_MAX + 1, ..hop }.text(about);
    let request = pair.post("/x?y").header("replite-hop", too_far).body(full("")).unwrap();
    is(&send(request).await, 508, "not-executed");
    // For another target the proof says nothing: forwarded like any client's.
    let request = pair.post("/x?z").header("replite-hop", hop.text(about)).body(full("")).unwrap();
    assert!(text(send(request).await).await.starts_with("POST /x?z\n"));
}

/// An old primary ran a request that came from a node which knew that another one leads.
#[tokio::test]
async fn a_request_from_a_later_epoch_is_not_run_by_a_primary_whose_lease_is_over() {
    let fixed = node(1, Role::Primary);
    let by_lease = leased(peer(3, ""), Role::Primary);
    let method = http::Method::POST;
    for (primary, status) in [(fixed.clone(), 200), (by_lease.clone(), 421)] {
        let layer = ReplayLayer::new(primary.clone());
        let tag = layer.shared.tokens.tag().to_owned();
        let server = Server::start(Router::new().fallback(mirror).layer(layer)).await;
        let about = About { keys: &primary.keys, tag: &tag, method: &method, target: "/x" };
        let from = |number| {
            let hop = hop_of(77, number).text(about);
            let request = Request::post(format!("{}/x", server.url())).header("replite-hop", hop);
            send(request.body(full("x")).unwrap())
        };
        assert_eq!(from(1).await.status(), 200, "its own epoch");
        assert_eq!(from(1 << 40).await.status(), 200, "no epoch is so far");
        assert_eq!(from(3).await.status(), status);
        assert_eq!(primary.fence.is_open(), status == 200);
        assert_eq!(from(1).await.status(), status, "and nothing more of other nodes");
    }
    comes("it is on the disk", || by_lease.lease.heard.number() == 3).await;
    assert_eq!(fixed.lease.heard.number(), 0);
}

/// What a node that was asked knows of a later epoch, the one that asked knows from then on.
#[tokio::test]
async fn a_hint_of_a_later_epoch_is_heard() {
    let primary = node(1, Role::Primary);
    let primary = Server::start(Router::new().fallback(mirror).layer(ReplayLayer::new(primary))).await;
    let between = node(3, Role::Replica);
    follow(&between, 5, Some(peer(1, &primary.url())));
    let server = Server::start(nothing().layer(ReplayLayer::new(between))).await;
    let replica = leased(peer(2, ""), Role::Replica);
    follow(&replica, 1, Some(peer(3, &server.url())));
    let layer = ReplayLayer::new(replica.clone());
    let asked = Server::start(nothing().layer(layer)).await;
    let response = send(Request::post(format!("{}/x", asked.url())).body(full("x")).unwrap()).await;
    assert!(text(response).await.starts_with("POST /x\n"));
    comes("it is heard", || replica.lease.heard.number() == 5).await;
}

#[tokio::test]
async fn below_a_nested_router_the_original_uri_goes_on() {
    let primary_node = node(1, Role::Primary);
    let primary = Server::start(Router::new().fallback(mirror).layer(ReplayLayer::new(primary_node))).await;
    let replica = node(2, Role::Replica);
    follow(&replica, 1, Some(peer(1, &primary.url())));
    let inner = Router::new().fallback(|| async { "here" }).layer(ReplayLayer::new(replica));
    let server = Server::start(Router::new().nest("/api", inner)).await;
    let request = Request::post(format!("{}/api/notes?x=1", server.url())).body(full("")).unwrap();
    assert!(text(send(request).await).await.starts_with("POST /api/notes?x=1\n"));
}

#[tokio::test]
async fn a_connection_that_the_primary_closed_while_idle_costs_no_write() {
    let pair = Pair::new(Router::new().fallback(|| async { [("connection", "close")] }), nothing(), |l| l);
    let pair = pair.await;
    for _ in 0..50 {
        let response = send(pair.post("/").body(full(Bytes::from_static(b"x"))).unwrap()).await;
        assert_eq!(response.status(), 200);
    }
}
