//! Long bodies, event streams and HTTP/2 between the nodes.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::response::sse::{Event, Sse};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response, Version};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::channel::Channel;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::proxy::ReplayLayer;
use crate::proxy::tests::world::*;
use crate::status::Role;

fn nothing() -> Router {
    Router::new().fallback(|| async { "here" })
}

/// Tells when it is dropped.
struct Gone(mpsc::UnboundedSender<()>);

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

#[tokio::test]
async fn events_come_one_by_one_and_end_at_the_primary_when_the_client_leaves() {
    let (events, receiver) = mpsc::channel::<&'static str>(4);
    let (gone, mut left) = mpsc::unbounded_channel();
    let receiver = Arc::new(Mutex::new(Some((receiver, Gone(gone)))));
    let app = Router::new().fallback(move || {
        let state = receiver.lock().unwrap().take().unwrap();
        async move {
            Sse::new(stream::unfold(state, |(mut receiver, gone)| async move {
                let event = Event::default().data(receiver.recv().await?);
                Some((Ok::<_, Infallible>(event), (receiver, gone)))
            }))
        }
    });
    // Events may pause for longer than anything else.
    let pair = Pair::new(app, nothing(), |l| l.idle_timeout(SHORT)).await;
    let mut response = send(pair.post("/events").body(full("")).unwrap()).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    for event in ["one", "two", "three"] {
        events.send(event).await.unwrap();
        assert_eq!(next(response.body_mut()).await.unwrap(), format!("data: {event}\n\n"));
    }
    drop(response);
    // The primary learns it with its next event, or at once.
    comes("the client's leaving", || {
        let _ = events.try_send("into the void");
        left.try_recv().is_ok()
    })
    .await;
}

/// A response without an end, and word of its own.
fn endless() -> (Router, mpsc::UnboundedReceiver<()>) {
    let (gone, left) = mpsc::unbounded_channel();
    let piece = Bytes::from(vec![b'x'; 16 * 1024]);
    let app = Router::new().fallback(move || {
        let (piece, gone) = (piece.clone(), Gone(gone.clone()));
        async move {
            Body::from_stream(stream::repeat(piece).map(move |piece| {
                let _ = &gone;
                Ok::<_, Infallible>(piece)
            }))
        }
    });
    (app, left)
}

#[tokio::test]
async fn a_response_that_its_client_leaves_untaken_is_broken_off() {
    let (app, mut left) = endless();
    let pair = Pair::new(app, nothing(), |l| l.idle_timeout(2 * SHORT)).await;
    let mut response = send(pair.post("/").body(full("")).unwrap()).await;
    next(response.body_mut()).await.unwrap();
    comes("the end at the primary", || left.try_recv().is_ok()).await;
    // What was on its way comes, and then no clean end.
    let rest = tokio::time::timeout(LONG, async {
        while let Some(frame) = response.body_mut().frame().await {
            frame?;
        }
        Ok::<_, hyper::Error>(())
    });
    assert!(rest.await.unwrap().is_err());
}

#[tokio::test]
async fn a_slow_client_has_its_response_for_as_long_as_it_takes_of_it() {
    let idle = 2 * SHORT;
    let limit = 5 * idle;
    let (app, mut left) = endless();
    let pair = Pair::new(app, nothing(), |l| l.idle_timeout(idle)).await;
    let mut response = send(pair.post("/").body(full("")).unwrap()).await;
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < 4 * limit {
        // As much in each tenth of the limit as all that is between the two may hold.
        for _ in 0..128 {
            next(response.body_mut()).await.unwrap();
        }
        tokio::time::sleep(limit / 10).await;
        assert!(left.try_recv().is_err(), "broken off after {:?}", begin.elapsed());
    }
    drop(response);
    comes("the end at the primary", || left.try_recv().is_ok()).await;
}

#[tokio::test]
async fn a_long_download_is_paced_by_the_client_and_whole_at_its_end() {
    const PIECES: u32 = 4096;
    let piece = Bytes::from(vec![b'x'; 16 * 1024]);
    let made = Arc::new(AtomicU32::new(0));
    let counted = made.clone();
    let app = Router::new().fallback(move || {
        let (piece, counted) = (piece.clone(), counted.clone());
        async move {
            Body::from_stream(stream::iter(0..PIECES).map(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok::<_, Infallible>(piece.clone())
            }))
        }
    });
    let pair = Pair::new(app, nothing(), |l| l).await;
    let mut response = send(pair.post("/").body(full("")).unwrap()).await;
    let first = next(response.body_mut()).await.unwrap();
    let mut length = first.len();
    // No client reads: what was made stays far from the whole 64 MiB.
    let mut before = 0;
    loop {
        tokio::time::sleep(SHORT).await;
        let now = made.load(Ordering::Relaxed);
        if now == before {
            break;
        }
        before = now;
    }
    assert!(before < PIECES / 2, "{before} of {PIECES} pieces are under way");
    while let Some(data) = next(response.body_mut()).await {
        length += data.len();
    }
    assert_eq!(length, PIECES as usize * 16 * 1024);
}

/// Answers as a gRPC server does: data, then trailers; it says which HTTP it was asked in.
async fn grpc_like(request: Request<Body>) -> Response<Body> {
    let version = request.version();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let (mut sender, answer) = Channel::<Bytes, Infallible>::new(4);
    tokio::spawn(async move {
        let text = format!("{version:?} {}", String::from_utf8_lossy(&body));
        let _ = sender.send(Frame::data(text.into())).await;
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        let _ = sender.send(Frame::trailers(trailers)).await;
    });
    let response = Response::builder()
        .header("content-type", "application/grpc")
        .header("trailer", "grpc-status")
        .body(Body::new(answer));
    response.unwrap()
}

#[tokio::test]
async fn each_side_speaks_http_1_or_2_and_grpc_has_its_trailers() {
    for (to_primary, content_type, front, back) in [
        (false, "text/plain", Version::HTTP_11, Version::HTTP_11),
        (false, "text/plain", Version::HTTP_2, Version::HTTP_2),
        (true, "text/plain", Version::HTTP_11, Version::HTTP_2),
        (true, "text/plain", Version::HTTP_2, Version::HTTP_2),
        (false, "application/grpc+proto", Version::HTTP_2, Version::HTTP_2),
    ] {
        let pair = Pair::new(Router::new().fallback(grpc_like), nothing(), |l| l.http2(to_primary)).await;
        let client: Client<HttpConnector, TestBody> =
            Client::builder(TokioExecutor::new()).http2_only(front == Version::HTTP_2).build_http();
        for _ in 0..3 {
            let request =
                pair.post("/svc/Method").header("te", "trailers").header("content-type", content_type);
            let response = client.request(request.body(full("hi")).unwrap()).await.unwrap();
            assert_eq!((response.status().as_u16(), response.version()), (200, front));
            let answer = response.into_body().collect().await.unwrap();
            let case = (to_primary, content_type, front);
            if front == Version::HTTP_2 {
                assert_eq!(answer.trailers().unwrap()["grpc-status"], "0", "{case:?}");
            }
            assert_eq!(answer.to_bytes(), format!("{back:?} hi"), "{case:?}");
        }
    }
}

/// A server that answers the preface of HTTP/2 with these words and closes.
async fn refusing(words: &'static [u8]) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut preface = [0; 24];
            let _ = stream.read_exact(&mut preface).await;
            let _ = stream.write_all(words).await;
        }
    });
    url
}

#[tokio::test]
async fn nothing_is_sent_to_a_primary_that_does_not_show_that_it_speaks_http_2() {
    for words in [&b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n"[..], b"", b"H", b"\0\0\0\x07\0"] {
        let layer = |l: ReplayLayer| l.http2(true).hold_timeout(SHORT).held_requests(8);
        let (replica, _node) = replica_of(&refusing(words).await, layer).await;
        for _ in 0..20 {
            let response = send(Request::post(replica.url()).body(full("x")).unwrap()).await;
            is(&response, 503, "not-executed");
        }
    }
}

#[tokio::test]
async fn who_asks_for_trailers_is_forwarded_in_http_1_to_a_primary_that_has_no_http_2() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let app = Router::new().fallback(grpc_like).layer(ReplayLayer::new(node(1, Role::Primary)));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(app.clone());
            let http1 = hyper::server::conn::http1::Builder::new();
            tokio::spawn(http1.serve_connection(TokioIo::new(stream), service));
        }
    });
    let (replica, _node) = replica_of(&url, |l| l).await;
    let client: Client<HttpConnector, TestBody> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    for _ in 0..20 {
        let request = Request::post(replica.url()).header("te", "trailers");
        let response = client.request(request.body(full("x".repeat(50_000))).unwrap()).await.unwrap();
        assert_eq!(response.status(), 200);
        let answer = text(response).await;
        assert!(answer.starts_with("HTTP/1.1 xx") && answer.len() > 50_000, "{answer:.100}");
    }
}
