//! Requests to the primary by callers that are no request's handler.

use axum::Router;
use axum::body::Body;
use http::Request;
use tower::ServiceExt;

use crate::proxy::tests::world::*;
use crate::proxy::{Outcome, PrimaryClient, Reason, ReplayLayer};
use crate::session::Session;
use crate::status::{Addresses, PeerInfo, Role};
use crate::token::Tokens;

/// An app that commits and says what it got.
fn committing() -> Router {
    Router::new().fallback(|request: Request<Body>| async move {
        Session::current().unwrap().observe_txid(txid(12));
        mirror(request).await
    })
}

fn post(path: &str) -> Request<TestBody> {
    Request::post(path).header("x-a", "1").header("replite-hop", "forged").body(full("job")).unwrap()
}

#[tokio::test]
async fn a_job_on_a_replica_reaches_the_primary_and_its_session_hears_of_the_commit() {
    let pair = Pair::new(committing(), Router::new().fallback(|| async { "here" }), |l| l).await;
    let client = ReplayLayer::new(pair.replica_node.clone()).primary_client();
    let session = Session::new(Tokens::new(pair.replica_node.clone()).into(), None, None);
    let call = client.clone().oneshot(post("/jobs?x=1"));
    let response = session.clone().scope(call).await.unwrap();
    assert_eq!(session.committed(), Some(txid(12)));
    let got = text(response).await;
    assert!(got.starts_with("POST /jobs?x=1\n") && got.ends_with("\n\njob"), "{got}");
    assert!(got.contains(&format!("host: {}\n", pair.primary.address)), "{got}");
    assert!(got.contains("x-a: 1\n") && !got.contains("forged"), "{got}");
    // A host in the URI is for the app only; where the primary is, is known here.
    let elsewhere = client.oneshot(post("http://notes.example/jobs")).await.unwrap();
    assert!(text(elsewhere).await.contains("host: notes.example\n"));
}

#[tokio::test]
async fn on_the_primary_its_own_app_is_called() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let addresses = Addresses { app: format!("http://{address}"), ..Addresses::default() };
    let me = PeerInfo { addresses, ..peer(1, "") };
    let node = node_of(me, Role::Primary);
    let layer = ReplayLayer::new(node.clone());
    let app = committing().layer(layer.clone());
    tokio::spawn(async move {
        axum::serve(tokio::net::TcpListener::from_std(listener).unwrap(), app).await.unwrap();
    });
    let response = layer.primary_client().oneshot(post("/jobs")).await.unwrap();
    assert!(text(response).await.starts_with("POST /jobs\n"));
    // One that has no address can't be called, and says so.
    let failure = ReplayLayer::new(super::world::node(1, Role::Primary)).primary_client();
    let failure = failure.oneshot(post("/jobs")).await.unwrap_err();
    assert_eq!((failure.reason, failure.outcome), (Reason::Unreachable, Outcome::NotExecuted));
}

#[tokio::test]
async fn a_failure_is_an_error_that_says_what_is_known() {
    let node = node(2, Role::Replica);
    let client = |layer: ReplayLayer| layer.primary_client();
    let held = client(ReplayLayer::new(node.clone()).hold_timeout(SHORT).held_requests(1));
    let failure = held.oneshot(post("/")).await.unwrap_err();
    assert_eq!((failure.reason, failure.outcome), (Reason::NoPrimary, Outcome::NotExecuted));
    assert_eq!(failure.to_string(), "there is no primary at the moment");
    follow(&node, 1, Some(peer(1, "http://127.0.0.1:1")));
    let failure = client(ReplayLayer::new(node).hold_timeout(SHORT).held_requests(1))
        .oneshot(post("/"))
        .await
        .unwrap_err();
    assert_eq!((failure.reason, failure.outcome), (Reason::Unreachable, Outcome::NotExecuted));
}

/// It can be kept in an application's state.
const _: () = {
    const fn shareable<T: Send + Sync + Clone + 'static>() {}
    shareable::<PrimaryClient>();
};
