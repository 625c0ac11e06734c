//! Things that break on the way to the primary, and what the client is told.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::Request;
use http_body_util::BodyExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::proxy::tests::world::*;
use crate::proxy::{Reason, ReplayLayer, Route};
use crate::token::Token;

/// A server that reads a request's head and then does what the test says with the connection.
async fn fake<F>(mut act: impl FnMut(TcpStream) -> F + Send + 'static) -> String
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            act(stream).await;
        }
    });
    url
}

#[tokio::test]
async fn a_request_is_held_until_a_primary_appears() {
    let primary = Server::start(Router::new().fallback(mirror)).await;
    let (replica, node) = replica_of("", |l| l).await;
    let waiting = tokio::spawn(send(Request::post(replica.url()).body(full("late")).unwrap()));
    comes("a request that is held", || node.roles.receiver_count() > 0).await;
    follow(&node, 2, Some(peer(1, &primary.url())));
    assert!(text(waiting.await.unwrap()).await.ends_with("late"));
}

#[tokio::test]
async fn a_held_request_runs_here_when_this_node_becomes_the_primary() {
    let (replica, node) = replica_of("", |l| l).await;
    let waiting = tokio::spawn(send(Request::post(replica.url()).body(full("late")).unwrap()));
    comes("a request that is held", || node.roles.receiver_count() > 0).await;
    lead(&node, 1);
    assert_eq!(text(waiting.await.unwrap()).await, "here");
}

#[tokio::test]
async fn holding_is_bounded_in_time_and_number() {
    let (replica, node) = replica_of("", |l| l.hold_timeout(SHORT).held_requests(1)).await;
    is(&send(Request::post(replica.url()).body(full("x")).unwrap()).await, 503, "not-executed");
    drop(replica);
    let (replica, node2) = replica_of("", |l| l.hold_timeout(LONG).held_requests(1)).await;
    let post = || Request::post(replica.url()).body(full("x")).unwrap();
    let held = tokio::spawn(send(post()));
    comes("a request that is held", || node2.roles.receiver_count() > 0).await;
    is(&send(post()).await, 503, "not-executed");
    // A node that stops holds no request.
    node2.stop.cancel();
    is(&held.await.unwrap(), 503, "not-executed");
    drop(node);
}

/// The time for a response, and for a pause in the body, begins when the request is sent.
#[tokio::test]
async fn what_was_held_for_long_has_all_of_its_time_afterwards() {
    let primary = Server::start(Router::new().fallback(mirror)).await;
    let limit = Duration::from_secs(1);
    let times = |l: ReplayLayer| l.hold_timeout(LONG).response_timeout(limit).idle_timeout(limit);
    let (replica, node) = replica_of("", times).await;
    // Of a body that comes in after that the time begins anew by itself.
    let held = tokio::spawn(send(Request::post(format!("{}/late", replica.url())).body(full("")).unwrap()));
    comes("a request that is held", || node.roles.receiver_count() > 0).await;
    // The pause is what is tested.
    tokio::time::sleep(limit + SHORT).await;
    follow(&node, 2, Some(peer(1, &primary.url())));
    assert!(text(held.await.unwrap()).await.starts_with("POST /late"));
}

/// Who was refused gave back a place that it had not got: after a burst no request was held any
/// more.
#[tokio::test]
async fn after_a_burst_beyond_the_limit_requests_are_held_again() {
    let primary = Server::start(Router::new().fallback(mirror)).await;
    let (replica, node) = replica_of("", |l| l.hold_timeout(LONG).held_requests(3)).await;
    let url = replica.url();
    for _ in 0..2 {
        let post = || send(Request::post(&url).body(full("late")).unwrap());
        let mut burst: JoinSet<_> = (0..10).map(|_| post()).collect();
        for _ in 0..7 {
            is(&burst.join_next().await.unwrap().unwrap(), 503, "not-executed");
        }
        // The other three wait for as long as there is no primary.
        assert!(tokio::time::timeout(SHORT, burst.join_next()).await.is_err(), "they are held");
        follow(&node, 2, Some(peer(1, &primary.url())));
        while let Some(held) = burst.join_next().await {
            assert!(text(held.unwrap()).await.ends_with("late"));
        }
        follow(&node, 2, None);
    }
}

#[tokio::test]
async fn no_early_100_continue_while_there_is_no_primary() {
    let (replica, _node) = replica_of("", |l| l.hold_timeout(SHORT).held_requests(8)).await;
    let mut stream = TcpStream::connect(replica.address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\
                connection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
}

#[tokio::test]
async fn a_client_that_expects_100_continue_gets_it_when_the_primary_wants_the_body() {
    let pair = Pair::new(Router::new().fallback(mirror), Router::new(), |l| l).await;
    let mut stream = TcpStream::connect(pair.replica.address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\
                connection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = [0; 25];
    stream.read_exact(&mut told).await.unwrap();
    assert_eq!(&told, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"hello").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\n\nhello"), "{answer}");
}

#[tokio::test]
async fn a_primary_that_is_not_there_executed_nothing() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for url in [format!("http://{gone}"), "https://127.0.0.1:1".into(), "not a url".into()] {
        let (replica, _node) = replica_of(&url, |l| l.hold_timeout(SHORT).held_requests(8)).await;
        is(&send(Request::post(replica.url()).body(full("x")).unwrap()).await, 503, "not-executed");
    }
}

#[tokio::test]
async fn a_primary_that_does_not_listen_yet_is_waited_for() {
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for http2 in [false, true] {
        let (replica, node) = replica_of(&format!("http://{address}"), |l| l.http2(http2)).await;
        let waiting = tokio::spawn(send(Request::post(replica.url()).body(full("late")).unwrap()));
        comes("a request that is held", || node.roles.receiver_count() > 0).await;
        let listener = TcpListener::bind(address).await.unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let app = Router::new().fallback(mirror);
        let server = axum::serve(listener, app).with_graceful_shutdown(async { drop(ended.await) });
        let server = tokio::spawn(server.into_future());
        assert!(text(waiting.await.unwrap()).await.ends_with("late"));
        node.stop.cancel();
        drop(end);
        server.await.unwrap().unwrap();
    }
}

/// A server that says this to its first request in HTTP/2, and then closes the connection; and that
/// is another one from then on.
async fn says_once(word: &'static [u8]) -> (String, mpsc::UnboundedReceiver<String>) {
    let (seen, requests) = mpsc::unbounded_channel();
    let app = Router::new().fallback(move |body: String| async move {
        seen.send(body.clone()).unwrap();
        body
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).await.unwrap();
        // Its head and its body.
        let mut whole = false;
        while !whole {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            stream.read_exact(&mut payload).await.unwrap();
            // DATA with END_STREAM.
            whole = head[3] == 0 && head[4] & 1 == 1;
        }
        stream.write_all(word).await.unwrap();
        // Not dropped: what is unread would turn the end into a reset.
        stream.shutdown().await.unwrap();
        axum::serve(listener, app).await.unwrap();
    });
    (url, requests)
}

#[tokio::test]
async fn what_a_primary_has_not_begun_by_its_word_is_sent_again_whole() {
    let go_away: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // And that the connection takes no others.
    let refused: &[u8] =
        &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
    for word in [go_away, refused] {
        let (url, mut requests) = says_once(word).await;
        let (replica, _node) = replica_of(&url, |l| l.http2(true)).await;
        let response = send(Request::post(replica.url()).body(full("once")).unwrap()).await;
        assert_eq!((response.status().as_u16(), text(response).await.as_str()), (200, "once"), "{word:?}");
        assert_eq!(requests.recv().await.unwrap(), "once");
        assert!(requests.try_recv().is_err());
    }
    // An internal error of the stream says nothing of what came before it, nor does the end of the
    // connection.
    let failed: &[u8] = &[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 2];
    for word in [failed, &[]] {
        let (url, mut requests) = says_once(word).await;
        let (replica, _node) = replica_of(&url, |l| l.http2(true)).await;
        let response = send(Request::post(replica.url()).body(full("once")).unwrap()).await;
        is(&response, 504, "unknown");
        assert!(requests.try_recv().is_err());
    }
}

#[tokio::test]
async fn the_app_can_make_the_failure_responses_its_own() {
    let (replica, _node) = replica_of("http://127.0.0.1:1", |l| {
        l.hold_timeout(SHORT).held_requests(8).on_failure(|failure| {
            assert_eq!(failure.reason, Reason::Unreachable);
            let mut response = http::Response::new(Bytes::from_static(b"sorry"));
            *response.status_mut() = failure.status;
            response
        })
    })
    .await;
    let response = send(Request::post(replica.url()).body(full("x")).unwrap()).await;
    is(&response, 503, "not-executed");
    assert_eq!(text(response).await, "sorry");
}

#[tokio::test]
async fn a_primary_that_dies_with_the_request_leaves_the_outcome_unknown() {
    let (sender, mut seen) = mpsc::unbounded_channel();
    let url = fake(move |stream| {
        sender.send(()).unwrap();
        async move { drop(stream) }
    })
    .await;
    let (replica, _node) = replica_of(&url, |l| l.route(|_| Route::Primary)).await;
    is(&send(Request::post(replica.url()).body(full("x")).unwrap()).await, 504, "unknown");
    seen.recv().await.unwrap();
    assert!(seen.try_recv().is_err(), "a write is sent once");
    // Whatever its method: a link in a mail is a GET, too.
    is(&send(Request::get(replica.url()).body(full("")).unwrap()).await, 504, "unknown");
    seen.recv().await.unwrap();
    assert!(seen.try_recv().is_err(), "what has to run on the primary is sent once");

    // A read that only looks for a node which is far enough.
    let (replica, node) = replica_of(&url, |l| l.wait_timeout(SHORT)).await;
    let token = Token::sign(&node, txid(99));
    let read = Request::get(replica.url()).header("replite-token", token.as_str());
    is(&send(read.body(full("")).unwrap()).await, 504, "unknown");
    seen.recv().await.unwrap();
    seen.try_recv().expect("a read is tried twice");
    assert!(seen.try_recv().is_err());
}

/// It took the request, and is gone when a read is tried again: no one can say that it did not
/// run.
#[tokio::test]
async fn what_may_have_run_is_not_called_not_executed_when_the_next_try_finds_nobody() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        let _ = stream.read(&mut [0; 64]).await;
    });
    let (replica, node) =
        replica_of(&url, |l| l.wait_timeout(SHORT).hold_timeout(SHORT).held_requests(8)).await;
    let token = Token::sign(&node, txid(99));
    let read = Request::get(replica.url()).header("replite-token", token.as_str());
    is(&send(read.body(full("")).unwrap()).await, 504, "unknown");
}

#[tokio::test]
async fn a_primary_that_never_answers_leaves_the_outcome_unknown() {
    let url = fake(|mut stream| async move {
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let (replica, _node) = replica_of(&url, |l| l.response_timeout(SHORT)).await;
    is(&send(Request::post(replica.url()).body(full("x")).unwrap()).await, 504, "unknown");
}

#[tokio::test]
async fn a_primary_that_dies_in_the_response_breaks_the_clients_connection() {
    for head in ["content-length: 9\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
        let url = fake(move |mut stream| async move {
            let text = format!("HTTP/1.1 200 OK\r\n{head}");
            stream.write_all(text.as_bytes()).await.unwrap();
        })
        .await;
        let (replica, _node) = replica_of(&url, |l| l).await;
        let response = send(Request::post(replica.url()).body(full("")).unwrap()).await;
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.expect_err("never a clean end");
    }
}

#[tokio::test]
async fn a_response_that_stalls_is_cut_but_an_event_stream_may_pause() {
    for (kind, cut) in [("text/plain", true), ("text/event-stream; charset=utf-8", false)] {
        let url = fake(move |mut stream| async move {
            let text = format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: 6\r\n\r\nabc");
            stream.write_all(text.as_bytes()).await.unwrap();
            // The pause is what is tested.
            tokio::time::sleep(SHORT * 3).await;
            let _ = stream.write_all(b"def").await;
        })
        .await;
        let (replica, _node) = replica_of(&url, |l| l.idle_timeout(SHORT)).await;
        let response = send(Request::post(replica.url()).body(full("")).unwrap()).await;
        assert_eq!(response.into_body().collect().await.is_err(), cut, "{kind}");
    }
}

/// An app that tells how its request's body ended.
fn watcher() -> (Router, mpsc::UnboundedReceiver<Result<usize, ()>>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let app = Router::new().fallback(move |body: Body| {
        let sender = sender.clone();
        // Its own task: hyper drops a handler when its connection goes.
        let read = tokio::spawn(async move {
            let mut body = body;
            let mut length = 0;
            loop {
                match body.frame().await {
                    Some(Ok(frame)) => length += frame.data_ref().map_or(0, Bytes::len),
                    Some(Err(_)) => return sender.send(Err(())).unwrap(),
                    None => return sender.send(Ok(length)).unwrap(),
                }
                sender.send(Ok(length)).unwrap();
            }
        });
        async move { read.await.unwrap() }
    });
    (app, receiver)
}

#[tokio::test]
async fn a_client_that_leaves_resets_the_way_to_the_primary() {
    let (app, mut ended) = watcher();
    let pair = Pair::new(app, Router::new(), |l| l).await;
    let (mut sender, body) = piecewise();
    let sending = tokio::spawn(send(pair.post("/").body(body).unwrap()));
    push(&mut sender, "begun").await;
    assert_eq!(ended.recv().await, Some(Ok(5)));
    sending.abort();
    assert_eq!(tokio::time::timeout(LONG, ended.recv()).await.unwrap(), Some(Err(())));
}

#[tokio::test]
async fn a_client_that_hangs_is_told_so_and_frees_the_connection() {
    let (app, mut ended) = watcher();
    let pair = Pair::new(app, Router::new(), |l| l.idle_timeout(SHORT)).await;
    let (mut sender, body) = piecewise();
    let sending = tokio::spawn(send(pair.post("/").body(body).unwrap()));
    push(&mut sender, "begun").await;
    assert_eq!(ended.recv().await, Some(Ok(5)));
    let response = sending.await.unwrap();
    assert_eq!(response.status(), 408);
    assert_eq!(response.headers()["replite-outcome"], "unknown");
    assert_eq!(tokio::time::timeout(LONG, ended.recv()).await.unwrap(), Some(Err(())));
}

#[tokio::test]
async fn huge_headers_are_refused_and_service_goes_on() {
    let pair = Pair::new(Router::new().fallback(mirror), Router::new(), |l| l).await;
    let mut stream = TcpStream::connect(pair.replica.address).await.unwrap();
    let mut head = b"POST / HTTP/1.1\r\nhost: x\r\nx-huge: ".to_vec();
    head.resize(600 * 1024, b'x');
    // The server may close before it has read all of it.
    let _ = stream.write_all(&head).await;
    let mut answer = [0; 12];
    if stream.read_exact(&mut answer).await.is_ok() {
        assert_eq!(&answer, b"HTTP/1.1 431");
    }
    let many = (0..90).fold(pair.post("/"), |r, i| r.header(format!("x-{i}"), "y".repeat(1000)));
    assert_eq!(send(many.body(full("")).unwrap()).await.status(), 200);
}

#[tokio::test]
async fn an_address_that_swallows_connections_is_given_up_in_time() {
    // A listener whose queue is full answers no further SYN.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut filling = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(address)).await
    {
        filling.push(stream);
    }
    let (replica, _node) = replica_of(&format!("http://{address}"), |l| {
        l.connect_timeout(SHORT).hold_timeout(SHORT).held_requests(8)
    })
    .await;
    is(&send(Request::post(replica.url()).body(full("x")).unwrap()).await, 503, "not-executed");
}
