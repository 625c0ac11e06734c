//! The layer on a follower, which can prove no hop and read no token.

use axum::Router;

use crate::proxy::ReplayLayer;
use crate::proxy::tests::world::*;
use crate::status::Role;
use crate::token::Token;

/// A primary whose app says what it got, and a follower of it whose app says `here`.
async fn pair() -> (Server, std::sync::Arc<crate::context::NodeContext>, Server) {
    let primary_node = node(1, Role::Primary);
    let layer = ReplayLayer::new(primary_node.clone());
    let primary = Server::start(Router::new().fallback(mirror).layer(layer)).await;
    let node = follower(2);
    follow(&node, 1, Some(peer(1, &primary.url())));
    let app = Router::new().fallback(|| async { "here" }).layer(ReplayLayer::new(node));
    (primary, primary_node, Server::start(app).await)
}

#[tokio::test]
async fn what_it_sends_on_counts_as_a_clients_and_is_done() {
    let (_primary, _, follower) = pair().await;
    let post = http::Request::post(format!("{}/a", follower.url())).body(full("text")).unwrap();
    let answer = text(send(post).await).await;
    assert!(answer.starts_with("POST /a\n") && answer.ends_with("\n\ntext"), "{answer}");
    assert!(!answer.contains("replite-hop"), "the app sees none: {answer}");
    let get = http::Request::get(format!("{}/a", follower.url())).body(full("")).unwrap();
    let answer = send(get).await;
    assert!(!answer.headers().contains_key("replite-token"));
    assert_eq!(text(answer).await, "here", "reads without a token run here");
}

#[tokio::test]
async fn a_read_with_a_token_goes_where_it_can_be_read() {
    let (_primary, node, follower) = pair().await;
    let token = Token::sign(&node, txid(10)).to_string();
    let get = |name: &str, value: &str| {
        let get = http::Request::get(format!("{}/a", follower.url())).header(name, value);
        send(get.body(full("")).unwrap())
    };
    let cookie = format!("replite_{}={token}", node.database_tag());
    for (name, value) in [("replite-token", token.as_str()), ("cookie", &cookie)] {
        let answer = text(get(name, value).await).await;
        assert!(answer.starts_with("GET /a\n"), "{name}: {answer}");
        assert!(answer.contains(&token), "the primary has it: {answer}");
    }
    let of_another = token.replace(&node.database_tag(), "00000000");
    for nothing in [of_another.as_str(), "v1.made.up", ""] {
        assert_eq!(text(get("replite-token", nothing).await).await, "here", "{nothing}");
    }
}
