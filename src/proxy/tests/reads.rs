//! Requests that run on the node that got them: tokens, waits, late replay.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::checksum::Checksum;
use crate::context::{LeaseContext, NodeContext};
use crate::keys::DatabaseKeys;
use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Route, SameSite, SessionTokens};
use crate::secret::{Keyring, Secret};
use crate::session::{self, Session};
use crate::status::Role;
use crate::token::Token;
use crate::txid::{Epoch, EpochHistory, EpochStart, Txid};

/// An app that answers with the number of the transaction that it sees.
fn sees(node: &Arc<NodeContext>) -> Router {
    let node = node.clone();
    Router::new().fallback(move || async move { node.applied.position().unwrap().number().to_string() })
}

fn primary_app() -> Router {
    Router::new().fallback(|| async { "primary" })
}

async fn reader(options: impl FnOnce(ReplayLayer) -> ReplayLayer) -> (Server, Server, Arc<NodeContext>) {
    let primary = Server::start(primary_app().layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    let replica = node(2, Role::Replica);
    follow(&replica, 1, Some(peer(1, &primary.url())));
    let server = Server::start(sees(&replica).layer(options(ReplayLayer::new(replica.clone())))).await;
    (server, primary, replica)
}

fn get(server: &Server, token: &str) -> Request<TestBody> {
    Request::get(server.url()).header("replite-token", token).body(full("")).unwrap()
}

#[tokio::test]
async fn a_read_waits_for_the_transaction_of_its_token() {
    let (server, _primary, node) = reader(|l| l.wait_timeout(LONG)).await;
    let token = Token::sign(&node, txid(12));
    let cookie = format!("other=1; replite_{}={token}", node.database_tag());
    let by_cookie = Request::get(server.url()).header("cookie", cookie).body(full("")).unwrap();
    let waiting = [tokio::spawn(send(by_cookie)), tokio::spawn(send(get(&server, token.as_str())))];
    assert_eq!(text(send(get(&server, "")).await).await, "10", "without a token nothing is waited for");
    assert_eq!(text(send(get(&server, Token::sign(&node, txid(10)).as_str())).await).await, "10");
    node.applied.advance(at(11));
    node.applied.advance(at(12));
    for read in waiting {
        assert_eq!(text(read.await.unwrap()).await, "12");
    }
}

#[tokio::test]
async fn tokens_that_are_forged_garbled_or_lost_are_as_good_as_none() {
    let (server, _primary, replica) = reader(|l| l.wait_timeout(LONG)).await;
    let token = Token::sign(&replica, txid(99)).to_string();
    let forged = token.replace("0063.", "0064.");
    assert_ne!(forged, token);
    let lost = Token::sign(&replica, Txid::new(Epoch::new(1, 77), 99)).to_string();
    leave(&replica, Epoch::new(1, 77));
    let long = "v1.".repeat(2000);
    for token in ["v1", "\u{7f}".trim(), &forged, &token[..90], &lost, &long] {
        if http::HeaderValue::from_str(token).is_ok() {
            assert_eq!(text(send(get(&server, token)).await).await, "10", "{token:.100}");
        }
    }
}

/// The node had this epoch, and follows another branch since.
fn leave(node: &NodeContext, epoch: Epoch) {
    let history = (*node.applied.history()).clone();
    let mut other = EpochHistory::default();
    other.push(EpochStart { epoch, first: 1, before: Checksum::EMPTY });
    node.applied.replace(other, None);
    node.applied.replace(history, Some(at(10)));
}

/// A primary that began again at a low epoch gives tokens that a replica has not heard of.
#[tokio::test]
async fn a_token_of_an_epoch_that_is_not_known_here_is_never_taken_for_lost() {
    let (server, _primary, node) = reader(|l| {
        l.wait_timeout(SHORT).session(SessionTokens::Monotonic).route_prefix("/local", Route::Local)
    })
    .await;
    let new = Token::sign(&node, Txid::new(Epoch::new(1, 77), 3)).to_string();
    assert_eq!(text(send(get(&server, &new)).await).await, "primary");
    follow(&node, 1, None);
    is(&send(get(&server, &new)).await, 503, "not-executed");
    // Its client keeps it, also when it was answered without it.
    let local = |token: &str| {
        let request = Request::get(format!("{}/local", server.url())).header("replite-token", token);
        send(request.body(full("")).unwrap())
    };
    assert_eq!(token_of(&node, &local(&new).await), None);
    assert_eq!(token_of(&node, &local("").await), Some(10));
    // It counts beside one of an epoch that is known, although that has the higher number.
    let cookie = format!("replite_{}={}", node.database_tag(), Token::sign(&node, txid(10)));
    let both = Request::get(server.url()).header("replite-token", &new).header("cookie", cookie);
    is(&send(both.body(full("")).unwrap()).await, 503, "not-executed");
}

#[tokio::test]
async fn a_read_that_waited_too_long_goes_to_the_primary_or_says_so() {
    let (server, _primary, node) =
        reader(|l| l.wait_timeout(SHORT).hold_timeout(SHORT).held_requests(8)).await;
    let far = Token::sign(&node, Txid::new(Epoch::new(u64::MAX, 1), u64::MAX));
    assert_eq!(text(send(get(&server, far.as_str())).await).await, "primary");
    follow(&node, 1, None);
    is(&send(get(&server, far.as_str())).await, 503, "not-executed");
    assert_eq!(text(send(get(&server, "")).await).await, "10");
}

#[tokio::test]
async fn without_a_primary_a_read_waits_for_its_transaction_as_long_as_a_request_is_held() {
    let (server, primary, node) = reader(|l| l.wait_timeout(SHORT).hold_timeout(LONG).held_requests(8)).await;
    follow(&node, 1, None);
    let token = Token::sign(&node, txid(11));
    let read = || tokio::spawn(send(get(&server, token.as_str())));
    let held =
        async |node: &NodeContext| comes("a request that is held", || node.roles.receiver_count() > 0).await;
    let waiting = read();
    held(&node).await;
    follow(&node, 1, Some(peer(1, &primary.url())));
    assert_eq!(text(waiting.await.unwrap()).await, "primary");
    follow(&node, 1, None);
    let waiting = read();
    held(&node).await;
    node.applied.advance(at(11));
    assert_eq!(text(waiting.await.unwrap()).await, "11");
}

/// A primary whose app commits the transaction that the path names.
async fn writer(options: impl FnOnce(ReplayLayer) -> ReplayLayer) -> (Server, Arc<NodeContext>) {
    let node = node(1, Role::Primary);
    let app = Router::new().fallback(|request: Request<Body>| async move {
        let path = request.uri().path()[1..].to_owned();
        if let Ok(number) = path.parse() {
            Session::current().unwrap().observe_txid(txid(number));
        }
        let control = request.headers().get("x-control").cloned();
        axum::response::AppendHeaders(control.map(|c| ("cache-control", c)))
    });
    (Server::start(app.layer(options(ReplayLayer::new(node.clone())))).await, node)
}

fn post(server: &Server, path: &str) -> http::request::Builder {
    Request::post(format!("{}{path}", server.url()))
}

fn token_of<B>(node: &NodeContext, response: &http::Response<B>) -> Option<u64> {
    let text = response.headers().get("replite-token")?.to_str().unwrap();
    Some(Token::verify(node, text).unwrap().number())
}

#[tokio::test]
async fn a_commit_gives_its_client_a_token_as_header_and_cookie() {
    let (server, node) = writer(|l| l).await;
    let response = send(post(&server, "/12").body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(12));
    let token = response.headers()["replite-token"].to_str().unwrap();
    let name = format!("replite_{}", node.database_tag());
    let cookie = format!("{name}={token}; Max-Age=300; Path=/; HttpOnly; SameSite=Lax");
    assert_eq!(response.headers()["set-cookie"], cookie.as_str());
    assert_eq!(response.headers()["cache-control"], "private");

    let https = post(&server, "/13").header("x-forwarded-proto", "https");
    let response = send(https.body(full("")).unwrap()).await;
    assert!(response.headers()["set-cookie"].to_str().unwrap().ends_with("; Secure"));
    let shared = post(&server, "/13").header("x-control", "public");
    let response = send(shared.body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(13));
    assert!(!response.headers().contains_key("set-cookie"));
    let read = Request::get(format!("{}/none", server.url()));
    let response = send(read.body(full("")).unwrap()).await;
    assert!(!response.headers().contains_key("replite-token"));
    assert!(!response.headers().contains_key("set-cookie"));
}

#[tokio::test]
async fn the_token_of_a_response_is_the_newer_of_request_and_commit() {
    let (server, node) =
        writer(|l| l.cookie_path("/app").cookie_same_site(SameSite::Strict).cookie_secure(true)).await;
    let with = |token: Txid| post(&server, "/12").header("replite-token", Token::sign(&node, token).as_str());
    let response = send(with(txid(20)).body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(20));
    let cookie = response.headers()["set-cookie"].to_str().unwrap();
    assert!(cookie.ends_with("; Path=/app; HttpOnly; SameSite=Strict; Secure"), "{cookie}");
    // A branch that this history does not have is not handed on, however high its number is.
    let response = send(with(Txid::new(Epoch::new(9, 9), 20)).body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(12));
}

#[tokio::test]
async fn what_a_handler_waited_for_is_handed_on_to_its_client() {
    let node = node(2, Role::Replica);
    let waits = node.clone();
    let app = Router::new().fallback(|| async move { session::waited(&waits, txid(9)) });
    let server = Server::start(app.layer(ReplayLayer::new(node.clone()))).await;
    let request = || Request::get(server.url());
    let response = send(request().body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(9));
    let newer = Token::sign(&node, txid(10)).to_string();
    let response = send(request().header("replite-token", newer).body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), None, "its client knew a newer one");
}

#[tokio::test]
async fn above_the_cap_on_waiters_the_primary_is_asked() {
    let (server, _primary, node) = reader(|l| l.wait_timeout(LONG)).await;
    let mut waiters = Vec::new();
    for _ in 0..crate::applied::WAITERS_MAX {
        let applied = node.applied.clone();
        let mut waiter = Box::pin(async move { applied.wait_for(txid(99), LONG).await });
        std::future::poll_fn(|cx| {
            assert!(waiter.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        waiters.push(waiter);
    }
    let ahead = Token::sign(&node, txid(12));
    assert_eq!(text(send(get(&server, ahead.as_str())).await).await, "primary");
    drop(waiters);
    let waiting = tokio::spawn(send(get(&server, ahead.as_str())));
    node.applied.advance(at(12));
    assert_eq!(text(waiting.await.unwrap()).await, "12");
}

#[tokio::test]
async fn two_applications_on_one_host_do_not_disturb_each_other() {
    let other = |database: &str, secret: u8| {
        let keys = Keyring::new(&[Secret::fixed([secret; 32])]).unwrap();
        let node = NodeContext::new(
            peer(7, ""),
            "c".into(),
            database.into(),
            (keys, crate::channel::Channel::open()),
            Role::Primary,
            LeaseContext::fixed(),
            DatabaseKeys::fixed(secret),
        );
        let token = Token::sign(&node, txid(99));
        format!("replite_{}={token}", node.database_tag())
    };
    let (server, _primary, node) = reader(|l| l.wait_timeout(LONG)).await;
    // One with other names has a cookie of its own; one with the same names, but another secret,
    // has one that counts for nothing.
    for cookie in [other("shop", 7), other("app", 8), format!("{}; {}", other("shop", 8), other("app", 8))] {
        let request = Request::get(server.url()).header("cookie", cookie).body(full("")).unwrap();
        assert_eq!(text(send(request).await).await, "10");
    }
    let mine =
        format!("{}; replite_{}={}", other("shop", 7), node.database_tag(), Token::sign(&node, txid(12)));
    let waiting = send(Request::get(server.url()).header("cookie", mine).body(full("")).unwrap());
    let waiting = tokio::spawn(waiting);
    node.applied.advance(at(12));
    assert_eq!(text(waiting.await.unwrap()).await, "12");
    // Those with the same names and the same secrets can be told apart by name.
    let (server, node) = writer(|l| l.cookie_name("notes-2")).await;
    let response = send(post(&server, "/12").body(full("")).unwrap()).await;
    assert!(response.headers()["set-cookie"].to_str().unwrap().starts_with("notes-2=v1."));
    assert_eq!(token_of(&node, &response), Some(12));
}

#[tokio::test]
async fn of_several_cookies_of_its_name_the_newest_that_verifies_counts() {
    let (server, _primary, node) = reader(|l| l.wait_timeout(SHORT)).await;
    let name = format!("replite_{}", node.database_tag());
    let token = |number| format!("{name}={}", Token::sign(&node, txid(number)));
    let (old, new) = (token(3), token(12));
    for cookies in [
        vec![format!("{old}; {new}")],
        vec![format!("{new}; {old}")],
        vec![format!("{name}=v1.x; {new}")],
        vec![format!("{name}=; {name}; a=b; {new}")],
        vec![old.clone(), new.clone()],
    ] {
        let mut request = Request::get(server.url());
        for cookie in &cookies {
            request = request.header("cookie", cookie);
        }
        // It is waited for in vain.
        assert_eq!(text(send(request.body(full("")).unwrap()).await).await, "primary", "{cookies:?}");
    }
    let old = Request::get(server.url()).header("cookie", old).body(full("")).unwrap();
    assert_eq!(text(send(old).await).await, "10");
}

#[tokio::test]
async fn tokens_outlive_the_secrets_and_go_with_the_keys_of_the_database() {
    let (server, _primary, node) = reader(|l| l.wait_timeout(SHORT)).await;
    let old = Token::sign(&node, txid(12)).to_string();
    let secret = |byte| Secret::fixed([byte; 32]);
    node.keys.rotate(&[secret(9)]).unwrap();
    assert_eq!(Token::sign(&node, txid(12)).to_string(), old);
    assert_eq!(text(send(get(&server, &old)).await).await, "primary", "it was waited for, in vain");
    // This node follows a primary with another database.
    node.database_keys.set(DatabaseKeys::fixed(9));
    assert_eq!(text(send(get(&server, &old)).await).await, "10", "it counts as absent");
}

#[tokio::test]
async fn the_primarys_token_reaches_the_client_of_a_replica() {
    let (server, node) = writer(|l| l).await;
    let (replica, _node) = replica_of(&server.url(), |l| l).await;
    let response = send(post(&replica, "/15").body(full("")).unwrap()).await;
    assert_eq!(token_of(&node, &response), Some(15));
    assert_eq!(response.headers().get_all("set-cookie").iter().count(), 1);
}

#[tokio::test]
async fn a_monotonic_session_never_goes_back_in_time() {
    let (server, _primary, node) = reader(|l| l.session(SessionTokens::Monotonic).no_cookie()).await;
    let response = send(get(&server, "")).await;
    assert_eq!(token_of(&node, &response), Some(10));
    assert!(!response.headers().contains_key("set-cookie"));
    let token = Token::sign(&node, txid(10)).to_string();
    assert_eq!(token_of(&node, &send(get(&server, &token)).await), None, "it did not grow");
}

/// A replica whose app reads `read` bytes of the body, may commit, and then finds that it needs the
/// primary.
async fn needy(read: usize, commits: bool) -> (Pair, Arc<AtomicUsize>) {
    needy_and(read, move |session| {
        if commits {
            session.observe_txid(txid(11));
        }
    })
    .await
}

/// The same, and what else it does to the database.
async fn needy_and(
    read: usize,
    does: impl Fn(&Session) + Clone + Send + Sync + 'static,
) -> (Pair, Arc<AtomicUsize>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let app = Router::new().fallback(move |session: Extension<Session>, body: Body| async move {
        counted.fetch_add(1, Ordering::Relaxed);
        let mut body = body;
        let mut length = 0;
        while length < read
            && let Some(frame) = body.frame().await
        {
            length += frame.unwrap().into_data().unwrap().len();
        }
        does(&session);
        session.need_primary();
        (StatusCode::SERVICE_UNAVAILABLE, [("replite-outcome", "not-executed")], "app")
    });
    let pair =
        Pair::new(Router::new().fallback(mirror), app, |l| l.route_prefix("/", Route::LocalThenReplay)).await;
    (pair, runs)
}

#[tokio::test]
async fn a_read_that_needed_the_primary_runs_there_after_all() {
    let (pair, runs) = needy(10_000, false).await;
    let response = send(pair.get("/a?b").body(full("")).unwrap()).await;
    assert!(text(response).await.starts_with("GET /a?b\n"));
    let data = "x".repeat(30_000);
    let response = send(pair.post("/a").body(full(data.clone())).unwrap()).await;
    assert!(text(response).await.ends_with(&format!("\n\n{data}")), "what the handler read is sent, too");
    // With a token the way is another, the end the same.
    let token = Token::sign(&pair.primary_node, txid(10)).to_string();
    let request = pair.post("/a").header("replite-token", token).body(full("hello")).unwrap();
    assert!(text(send(request).await).await.ends_with("\n\nhello"));
    assert_eq!(runs.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn what_could_be_read_in_two_ways_is_not_replayed_either() {
    let (pair, runs) = needy(10_000, false).await;
    let mut stream = TcpStream::connect(pair.replica.address).await.unwrap();
    stream.write_all(b"GET /a HTTP/1.1\r\nhost: a\r\nhost: b\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("replite-outcome: not-executed"), "{answer}");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_body_over_the_limit_is_not_replayed_unless_nobody_read_it() {
    let data = "x".repeat(300_000);
    let (pair, _) = needy(200_000, false).await;
    is(&send(pair.post("/a").body(full(data.clone())).unwrap()).await, 503, "not-executed");
    let (pair, _) = needy(0, false).await;
    assert!(text(send(pair.post("/a").body(full(data.clone())).unwrap()).await).await.ends_with(&data));
}

#[tokio::test]
async fn what_committed_here_is_never_replayed_and_never_called_not_executed() {
    let (pair, runs) = needy(0, true).await;
    let response = send(pair.get("/a").body(full("")).unwrap()).await;
    assert_eq!(response.headers()["replite-outcome"], "unknown");
    assert_eq!(token_of(&pair.primary_node, &response), Some(11));
    assert_eq!(text(response).await, "app");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn what_may_have_been_committed_here_is_neither_replayed_nor_called_not_executed() {
    let (pair, runs) = needy_and(0, |_| session::outcome_unknown()).await;
    let response = send(pair.get("/a").body(full("")).unwrap()).await;
    assert_eq!(response.headers()["replite-outcome"], "unknown");
    assert_eq!(text(response).await, "app");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
    // An app that says nothing of the outcome says nothing wrong; but its client is told.
    let app = Router::new().fallback(|request: Request<Body>| async move {
        session::outcome_unknown();
        if request.uri().path() == "/handled" { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR }
    });
    let server = Server::start(app.layer(ReplayLayer::new(node(1, Role::Primary)))).await;
    is(&send(get(&server, "")).await, 500, "unknown");
    let handled = Request::get(format!("{}/handled", server.url())).body(full("")).unwrap();
    assert!(!send(handled).await.headers().contains_key("replite-outcome"));
}
