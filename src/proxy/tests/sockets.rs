//! Real WebSockets through the layer.

use axum::Router;
use axum::extract::ws::{Message as Sent, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::any;
use futures_util::{SinkExt, StreamExt};
use http_body_util::Empty;
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::protocol::Role as End;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, connect_async};

use crate::proxy::tests::world::*;
use crate::proxy::{Forwarding, Upgrades};

/// An app that sends each text back with its name before it, and tells when a socket ended.
fn echo(name: &'static str) -> (Router, mpsc::UnboundedReceiver<()>) {
    let (ended, receiver) = mpsc::unbounded_channel();
    let handler = any(move |upgrade: WebSocketUpgrade| {
        let ended = ended.clone();
        let response: Response = upgrade.on_upgrade(move |mut socket| async move {
            while let Some(Ok(message)) = socket.recv().await {
                let Sent::Text(text) = message else { continue };
                if socket.send(Sent::Text(format!("{name}:{text}").into())).await.is_err() {
                    break;
                }
            }
            let _ = ended.send(());
        });
        async move { response }
    });
    (Router::new().route("/ws", handler).fallback(|| async { "no socket" }), receiver)
}

async fn pair(upgrades: Upgrades) -> (Pair, mpsc::UnboundedReceiver<()>) {
    let (primary, ended) = echo("primary");
    let pair = Pair::new(primary, echo("here").0, |l| l.upgrades(upgrades).forwarding(Forwarding::Redirect));
    (pair.await, ended)
}

fn url(server: &Server) -> String {
    format!("ws://{}/ws", server.address)
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LONG, future).await.expect("in time")
}

async fn says<S>(socket: &mut WebSocketStream<S>, text: &str) -> String
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    within(socket.send(Message::text(text))).await.unwrap();
    within(socket.next()).await.unwrap().unwrap().into_text().unwrap().to_string()
}

#[tokio::test]
async fn sockets_are_served_here_or_by_the_primary() {
    let (pair, _) = pair(Upgrades::Local).await;
    let (mut socket, _) = connect_async(url(&pair.replica)).await.unwrap();
    assert_eq!(says(&mut socket, "a").await, "here:a");

    let (pair, mut ended) = self::pair(Upgrades::Primary).await;
    let (mut socket, response) = connect_async(url(&pair.replica)).await.unwrap();
    assert_eq!(response.status(), 101);
    assert!(!response.headers().contains_key("replite-primary"));
    for text in ["a", "b", &"long ".repeat(50_000)] {
        assert_eq!(says(&mut socket, text).await, format!("primary:{text}"));
    }
    // A client that leaves is seen at the other end.
    drop(socket);
    within(ended.recv()).await.unwrap();
    // What the primary's app refuses is refused with its words.
    let Err(Error::Http(refused)) = connect_async(format!("ws://{}/none", pair.replica.address)).await else {
        panic!("not refused");
    };
    assert_eq!(refused.status(), 200);
}

#[tokio::test]
async fn a_socket_over_http_2_becomes_one_over_http_1() {
    let (pair, mut ended) = pair(Upgrades::Primary).await;
    let io = TcpStream::connect(pair.replica.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io)).await.unwrap();
    tokio::spawn(connection);
    let mut request = http::Request::connect(format!("http://{}/ws", pair.replica.address))
        .header("sec-websocket-version", "13")
        .body(Empty::<bytes::Bytes>::new())
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    let response = within(sender.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let upgraded = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    let mut socket = WebSocketStream::from_raw_socket(upgraded, End::Client, None).await;
    assert_eq!(says(&mut socket, "a").await, "primary:a");
    drop(socket);
    within(ended.recv()).await.unwrap();
}

#[tokio::test]
async fn a_socket_waits_for_a_primary_and_may_find_it_here() {
    let (pair, _) = pair(Upgrades::Primary).await;
    follow(&pair.replica_node, 2, None);
    let address = url(&pair.replica);
    let waiting = tokio::spawn(async move { connect_async(address).await.unwrap().0 });
    comes("a request that is held", || pair.replica_node.roles.receiver_count() > 0).await;
    lead(&pair.replica_node, 2);
    let mut socket = within(waiting).await.unwrap();
    assert_eq!(says(&mut socket, "a").await, "here:a");
}

#[tokio::test]
async fn a_node_that_stops_ends_the_sockets_that_it_carries() {
    let (pair, mut ended) = pair(Upgrades::Primary).await;
    let (mut socket, _) = connect_async(url(&pair.replica)).await.unwrap();
    assert_eq!(says(&mut socket, "a").await, "primary:a");
    pair.replica_node.stop.cancel();
    assert!(!matches!(within(socket.next()).await, Some(Ok(_))));
    within(ended.recv()).await.unwrap();
}
