//! Tokens of a branch that was left, and sessions over a change of the primary.

use std::sync::Arc;

use axum::Router;
use axum::extract::Extension;
use http::{Request, Response};

use crate::checksum::Checksum;
use crate::context::NodeContext;
use crate::fence::boot_time;
use crate::proxy::tests::world::*;
use crate::proxy::{ReplayLayer, Route, SessionTokens};
use crate::session::{self, Session};
use crate::status::Role;
use crate::token::Token;
use crate::txid::{EpochHistory, EpochStart, Txid};

/// An app that says what its state is, and whether it was told of a loss. With a path it commits
/// that number of the newest epoch.
fn app(node: &Arc<NodeContext>) -> Router {
    let node = node.clone();
    Router::new().fallback(move |session: Extension<Session>, request: http::Uri| async move {
        if let Ok(number) = request.path()[1..].parse() {
            session.observe_txid(Txid::new(node.applied.history().epoch(), number));
        }
        let lost = if session.lost_token().is_some() { " lost" } else { "" };
        format!("{}{lost}", node.applied.position().unwrap().number())
    })
}

/// A node that goes by a lease, with its app.
async fn served(node: &Arc<NodeContext>, options: impl FnOnce(ReplayLayer) -> ReplayLayer) -> Server {
    Server::start(app(node).layer(options(ReplayLayer::new(node.clone())))).await
}

/// What a client carries from one response to the next: the cookie, like a browser.
#[derive(Default)]
struct Client(Option<String>);

impl Client {
    async fn ask(&mut self, method: &str, url: &str) -> Response<hyper::body::Incoming> {
        let mut request = Request::builder().method(method).uri(url);
        if let Some(cookie) = &self.0 {
            request = request.header("cookie", cookie);
        }
        let response = send(request.body(full("")).unwrap()).await;
        if let Some(set) = response.headers().get("set-cookie") {
            self.0 = set.to_str().unwrap().split(';').next().map(str::to_owned);
        }
        response
    }
}

fn token_of(node: &NodeContext, response: &Response<hyper::body::Incoming>) -> Option<Txid> {
    Token::verify(node, response.headers().get("replite-token")?.to_str().unwrap())
}

/// A primary that had up to 12, and a replica that had up to 10 and leads since.
async fn failed_over(tokens: SessionTokens) -> (Client, Arc<NodeContext>, Server) {
    let old = elector(1);
    old.applied.advance(at(12));
    lead(&old, 1);
    let first = served(&old, |l| l.session(tokens)).await;
    let mut client = Client::default();
    client.ask("POST", &format!("{}/12", first.url())).await;
    let next = elector(3);
    lead(&next, 2);
    let second = served(&next, |l| l.session(tokens)).await;
    (client, next, second)
}

#[tokio::test]
async fn a_client_whose_write_was_lost_is_told_so_and_goes_on() {
    for tokens in [SessionTokens::Writes, SessionTokens::Monotonic] {
        let (mut client, next, server) = failed_over(tokens).await;
        let carried = client.0.clone().unwrap();
        let response = client.ask("GET", &server.url()).await;
        assert_eq!(carried.split_once('=').unwrap().1, response.headers()["replite-lost"]);
        let read = (tokens == SessionTokens::Monotonic).then(|| txid(10));
        assert_eq!(token_of(&next, &response), read, "of what was read, not of what was lost");
        assert_eq!(text(response).await, "10 lost");
        next.applied
            .advance(crate::txid::Position::new(Txid::new(epoch(2), 11), crate::checksum::Checksum::EMPTY));
        let response = client.ask("POST", &format!("{}/11", server.url())).await;
        assert_eq!(
            token_of(&next, &response),
            Some(Txid::new(epoch(2), 11)),
            "though the lost number is higher"
        );
        let response = client.ask("GET", &server.url()).await;
        assert!(!response.headers().contains_key("replite-lost"), "its token is a new one");
        assert_eq!(text(response).await, "11");
    }
}

/// What a replica answers, and what it gets from the primary, says the same.
#[tokio::test]
async fn the_word_that_a_token_is_lost_comes_through_every_node() {
    let (mut client, next, primary) = failed_over(SessionTokens::Writes).await;
    let replica = elector(4);
    follow(&replica, 2, Some(peer(3, &primary.url())));
    let server = served(&replica, |l| l.wait_timeout(SHORT).route_prefix("/local", Route::Local)).await;
    let carried = client.0.clone();
    let response = client.ask("POST", &server.url()).await;
    assert!(response.headers().contains_key("replite-lost"));
    assert_eq!(text(response).await, "10 lost", "the primary's");
    assert_ne!(client.0, carried, "it was told, and has a new token");
    client.0 = carried;
    // It does not know yet what the primary's history is.
    let response = client.ask("GET", &format!("{}/local", server.url())).await;
    assert!(!response.headers().contains_key("replite-lost"));
    replica.applied.replace((*next.applied.history()).clone(), Some(at(10)));
    for path in ["/x", "/local"] {
        let response = client.ask("GET", &format!("{}{path}", server.url())).await;
        assert_eq!(response.headers().get_all("replite-lost").iter().count(), 1, "{path}");
        assert_eq!(text(response).await, "10 lost");
    }
    // No client can pretend that to an app below the layer.
    let spoofed = Request::get(server.url()).header("replite-lost", "x").body(full("")).unwrap();
    assert_eq!(text(send(spoofed).await).await, "10");
}

#[tokio::test]
async fn a_monotonic_session_reads_nothing_older_on_a_node_that_has_not_heard_of_the_next_epoch() {
    let (_, next, primary) = failed_over(SessionTokens::Monotonic).await;
    next.applied
        .advance(crate::txid::Position::new(Txid::new(epoch(2), 11), crate::checksum::Checksum::EMPTY));
    let mut client = Client::default();
    assert_eq!(text(client.ask("GET", &primary.url()).await).await, "11");
    // It follows the old primary, and has higher numbers of its epoch.
    let behind = elector(4);
    behind.applied.advance(at(30));
    stand(&behind, Role::Electing);
    let server = served(&behind, |l| l.session(SessionTokens::Monotonic).wait_timeout(SHORT)).await;
    let url = server.url();
    let waiting = tokio::spawn(async move { client.ask("GET", &url).await });
    held(&behind).await;
    follow(&behind, 2, Some(peer(3, &primary.url())));
    assert_eq!(text(waiting.await.unwrap()).await, "11");
}

/// A token of a later epoch comes to a primary that has not noticed that it is none any more.
#[tokio::test]
async fn a_primary_that_is_shown_a_later_epoch_serves_nothing_before_it_knows_what_that_is() {
    let node = elector(1);
    lead(&node, 3);
    let server = served(&node, |l| l.wait_timeout(LONG)).await;
    let later = Token::sign(&node, Txid::new(epoch(4), 11)).to_string();
    let ask = |method: &str| {
        let request = Request::builder().method(method).uri(server.url()).header("replite-token", &later);
        tokio::spawn(send(request.body(full("")).unwrap()))
    };
    let (read, write) = (ask("GET"), ask("POST"));
    comes("it stops", || !node.leads()).await;
    held(&node).await;
    assert!(!read.is_finished() && !write.is_finished());
    comes("it is on the disk", || node.lease.heard.number() == 4).await;
    // The record was still its own: it leads on in a later epoch, of which that token is none.
    lead(&node, 5);
    comes("the answers", || {
        // What notes the epoch closes the fence once more after that.
        node.fence.set(boot_time() + LONG);
        read.is_finished() && write.is_finished()
    })
    .await;
    for response in [read, write] {
        let response = response.await.unwrap();
        assert!(response.headers().contains_key("replite-lost"));
        assert_eq!(text(response).await, "10 lost");
    }
}

#[tokio::test]
async fn a_node_whose_lease_has_ended_reads_on_and_its_tokens_wait_elsewhere_or_are_lost() {
    let next = elector(3);
    lead(&next, 2);
    let next = served(&next, |l| l).await;
    for tokens in [SessionTokens::Writes, SessionTokens::Monotonic] {
        let node = elector(1);
        lead(&node, 1);
        let waits = node.clone();
        let app = Router::new().fallback(move || async move {
            if tokens == SessionTokens::Writes {
                session::waited(&waits, waits.applied.position().unwrap().txid());
            }
            waits.applied.position().unwrap().number().to_string()
        });
        let server = Server::start(app.layer(ReplayLayer::new(node.clone()).session(tokens))).await;
        let mut client = Client::default();
        let read = client.ask("GET", &server.url()).await;
        assert_eq!(token_of(&node, &read), Some(txid(10)));
        let ends: [fn(&NodeContext); 2] = [|node| node.fence.set(boot_time()), fence];
        for (number, end) in (11..).zip(ends) {
            end(&node);
            node.applied.advance(at(number));
            let read = client.ask("GET", &server.url()).await;
            assert_eq!(token_of(&node, &read), Some(txid(number)));
            assert_eq!(text(read).await, number.to_string());
        }
        // A node that has not heard of the next primary has nothing older for it.
        let behind = elector(4);
        let other = served(&behind, |l| l.wait_timeout(SHORT)).await;
        let (url, cookie) = (other.url(), client.0.clone());
        let waiting = tokio::spawn(async move { Client(cookie).ask("GET", &url).await });
        held(&behind).await;
        follow(&behind, 2, Some(peer(3, &next.url())));
        for told in [waiting.await.unwrap(), client.ask("GET", &next.url()).await] {
            assert!(told.headers().contains_key("replite-lost"));
            assert_eq!(text(told).await, "10 lost");
        }
    }
}

/// What the branch had before the transaction that is lost may be the client's own.
#[tokio::test]
async fn a_lost_token_waits_for_what_its_branch_had_in_common_with_the_history() {
    let node = elector(4);
    let mut history = EpochHistory::default();
    for (n, first) in [(1, 1), (2, 11)] {
        history.push(EpochStart { epoch: epoch(n), first, before: Checksum::EMPTY });
    }
    node.applied.replace(history, Some(at(8)));
    follow(&node, 2, None);
    let server = served(&node, |l| l.wait_timeout(LONG)).await;
    let lost = Token::sign(&node, txid(12)).to_string();
    let request = Request::get(server.url()).header("replite-token", lost).body(full("")).unwrap();
    let waiting = tokio::spawn(send(request));
    let waits = || node.applied.waiters() > 0;
    comes("the wait", waits).await;
    node.applied.advance(at(9));
    node.applied.advance(at(10));
    let told = waiting.await.unwrap();
    assert!(told.headers().contains_key("replite-lost"));
    assert_eq!(text(told).await, "10 lost");
}
