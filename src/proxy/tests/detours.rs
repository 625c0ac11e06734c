//! Clients that are sent to the primary by themselves.

use axum::Router;
use http::{Request, Response};
use hyper::body::Incoming;

use crate::proxy::Forwarding;
use crate::proxy::tests::world::*;
use crate::status::PeerInfo;

fn advertised(url: &str) -> PeerInfo {
    let mut primary = peer(1, url);
    primary.addresses.public = Some("https://eu.notes.example/".into());
    primary.addresses.labels.insert("machine".into(), "00bb33ff".into());
    primary
}

async fn pair(forwarding: Forwarding) -> Pair {
    let pair =
        Pair::new(Router::new().fallback(mirror), Router::new().fallback(|| async { "here" }), move |l| {
            l.forwarding(forwarding)
        });
    let pair = pair.await;
    follow(&pair.replica_node, 1, Some(advertised(&pair.primary.url())));
    pair
}

async fn post(
    pair: &Pair,
    change: impl FnOnce(http::request::Builder) -> Request<TestBody>,
) -> Response<Incoming> {
    send(change(pair.post("/a%2Fb?c=d"))).await
}

#[tokio::test]
async fn a_redirect_names_the_primarys_public_address() {
    let pair = pair(Forwarding::Redirect).await;
    let response = post(&pair, |r| r.body(full("x")).unwrap()).await;
    assert_eq!(response.status(), 307);
    assert_eq!(response.headers()["location"], "https://eu.notes.example/a%2Fb?c=d");
    assert_eq!(response.headers()["cache-control"], "no-store");
    assert_eq!(text(send(pair.get("/").body(full("")).unwrap()).await).await, "here");
    // Without a public address there is nowhere to send a client to.
    follow(&pair.replica_node, 1, Some(peer(1, &pair.primary.url())));
    let response = post(&pair, |r| r.body(full("x")).unwrap()).await;
    assert!(text(response).await.starts_with("POST /a%2Fb?c=d\n"));
}

#[tokio::test]
async fn flys_proxy_is_told_the_machine_once_and_only_for_what_it_replays() {
    let pair = pair(Forwarding::FlyReplay).await;
    let response = post(&pair, |r| r.body(full("x")).unwrap()).await;
    assert_eq!(response.status(), 409);
    assert_eq!(response.headers()["fly-replay"], "instance=00bb33ff");
    assert_eq!(response.headers()["replite-outcome"], "not-executed");
    let replayed = post(&pair, |r| r.header("fly-replay-src", "instance=x").body(full("x")).unwrap()).await;
    assert_eq!(replayed.status(), 200, "not in circles");
    assert_eq!(post(&pair, |r| r.body(full(vec![0; 1_000_001])).unwrap()).await.status(), 200);
    let (sender, unknown) = piecewise();
    drop(sender);
    assert_eq!(post(&pair, |r| r.body(unknown).unwrap()).await.status(), 200);
    for machine in ["", "a;state=x", "a,b"] {
        let mut primary = advertised(&pair.primary.url());
        primary.addresses.labels.insert("machine".into(), machine.into());
        follow(&pair.replica_node, 1, Some(primary));
        assert_eq!(post(&pair, |r| r.body(full("x")).unwrap()).await.status(), 200, "{machine:?}");
    }
}

#[tokio::test]
async fn without_a_primary_a_request_is_held_and_then_sent_on() {
    let pair = pair(Forwarding::Redirect).await;
    follow(&pair.replica_node, 2, None);
    let request = pair.post("/x").body(full("x")).unwrap();
    let waiting = tokio::spawn(send(request));
    comes("a request that is held", || pair.replica_node.roles.receiver_count() > 0).await;
    follow(&pair.replica_node, 3, Some(advertised(&pair.primary.url())));
    assert_eq!(waiting.await.unwrap().status(), 307);
}
