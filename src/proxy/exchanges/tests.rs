use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use h2::server::SendResponse;
use http_body_util::channel::{Channel, Sender};
use http_body_util::{BodyExt, Full};
use tokio::io::DuplexStream;

use super::*;
use crate::proxy::BoxError;

const LONG: Duration = Duration::from_secs(20);

/// One end of a connection, which counts how often it is written to.
struct Counted(DuplexStream, Arc<AtomicUsize>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, to)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

type Served = tokio::sync::mpsc::Receiver<(Request<RecvStream>, SendResponse<Bytes>)>;

/// Both ends of a connection, and how often the first wrote.
async fn connected() -> (Exchanges, Served, Arc<AtomicUsize>) {
    let (here, there) = tokio::io::duplex(1 << 20);
    let (sender, served) = tokio::sync::mpsc::channel(4);
    tokio::spawn(async move {
        let mut server = h2::server::handshake(there).await.unwrap();
        while let Some(Ok(request)) = server.accept().await {
            sender.send(request).await.unwrap();
        }
    });
    let writes = Arc::new(AtomicUsize::new(0));
    let io = Counted(here, writes.clone());
    let (way, connection) = begin(io, Spawn::new(CancellationToken::new())).await.unwrap();
    tokio::spawn(connection);
    (way, served, writes)
}

fn post<B>(body: B) -> Request<B> {
    Request::post("http://app/").body(body).unwrap()
}

fn whole(text: &'static str) -> impl Body<Data = Bytes, Error = BoxError> + Unpin {
    Full::from(text).map_err(|never| match never {})
}

fn piecewise() -> (Sender<Bytes, BoxError>, Channel<Bytes, BoxError>) {
    Channel::new(1)
}

#[tokio::test]
async fn a_small_request_is_one_write() {
    let (way, mut served, writes) = connected().await;
    let serves = async {
        for _ in 0..2 {
            let (request, mut respond) = served.recv().await.unwrap();
            let length = request.headers()["content-length"].clone();
            let body = request.into_body();
            let before = writes.load(Ordering::Relaxed);
            let mut body = ExchangeBody::new(body);
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "a note");
            assert_eq!(length, "6");
            assert_eq!(writes.load(Ordering::Relaxed), before, "the body came with the head");
            respond.send_response(Response::new(()), true).unwrap();
        }
    };
    let sends = async {
        // The first one meets the settings of the other side.
        way.send(post(whole("a note"))).await.unwrap();
        let before = writes.load(Ordering::Relaxed);
        way.send(post(whole("a note"))).await.unwrap();
        writes.load(Ordering::Relaxed) - before
    };
    let (wrote, ()) = tokio::time::timeout(LONG, async { tokio::join!(sends, serves) }).await.unwrap();
    assert_eq!(wrote, 1);
}

#[tokio::test]
async fn a_request_that_is_given_up_is_reset_however_much_of_it_was_sent() {
    let (way, mut served, _) = connected().await;
    for answered in [false, true] {
        let (mut sender, body) = piecewise();
        sender.send_data("begun".into()).await.unwrap();
        let sent = tokio::spawn({
            let way = way.clone();
            async move { way.send(post(body)).await }
        });
        let (request, mut respond) = served.recv().await.unwrap();
        let mut body = request.into_body();
        assert_eq!(body.data().await.unwrap().unwrap(), "begun");
        let mut response = None;
        if answered {
            response = Some(respond.send_response(Response::new(()), false).unwrap());
            drop(sent.await.unwrap().unwrap());
        } else {
            sent.abort();
        }
        let error = tokio::time::timeout(LONG, body.data()).await.unwrap().unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::CANCEL), "answered: {answered}");
        drop(response);
        // What is sent into the void comes back in the end.
        let gone = async { while sender.send_data("more".into()).await.is_ok() {} };
        tokio::time::timeout(LONG, gone).await.expect("the body is let go");
    }
}

#[tokio::test]
async fn the_rest_of_a_body_goes_on_after_the_response_has_come_to_its_end() {
    const REST: usize = 3 * net::FORWARD_WINDOW_BYTES as usize;
    let (way, mut served, _) = connected().await;
    let (mut sender, body) = piecewise();
    // A server lets go of a body that has ended, and does not ask for its end.
    let sends = tokio::spawn(async move { way.send(post(body)).await.unwrap().into_body().is_end_stream() });
    let (request, mut respond) = served.recv().await.unwrap();
    respond.send_response(Response::new(()), true).unwrap();
    assert!(sends.await.unwrap());
    let sends = tokio::spawn(async move {
        for piece in [Bytes::new(), vec![b'x'; REST].into(), Bytes::new(), "end".into()] {
            sender.send_data(piece).await.unwrap();
        }
    });
    let (mut body, mut length) = (ExchangeBody::new(request.into_body()), 0);
    let reads = async {
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().unwrap().len();
        }
    };
    tokio::time::timeout(LONG, reads).await.unwrap();
    assert_eq!(length, REST + 3);
    sends.await.unwrap();
}

/// h2 closes a connection on which a hundred frames without bytes came.
#[tokio::test]
async fn pieces_without_bytes_are_not_sent() {
    let (way, mut served, _) = connected().await;
    let (mut sender, body) = piecewise();
    let sends = tokio::spawn(async move { way.send(post(body)).await.unwrap() });
    let pieces = tokio::spawn(async move {
        for _ in 0..300 {
            sender.send_data(Bytes::new()).await.unwrap();
        }
        sender.send_data("end".into()).await.unwrap();
    });
    let (request, mut respond) = served.recv().await.unwrap();
    let read = ExchangeBody::new(request.into_body()).collect();
    assert_eq!(tokio::time::timeout(LONG, read).await.unwrap().unwrap().to_bytes(), "end");
    pieces.await.unwrap();
    respond.send_response(Response::new(()), true).unwrap();
    sends.await.unwrap();
}

#[tokio::test]
async fn a_response_that_breaks_off_has_no_clean_end() {
    let (way, mut served, _) = connected().await;
    for (reason, whole_before) in
        [(Reason::CANCEL, false), (Reason::INTERNAL_ERROR, false), (Reason::NO_ERROR, true)]
    {
        let (_sender, body) = piecewise();
        let sends = tokio::spawn({
            let way = way.clone();
            async move {
                match way.send(post(body)).await {
                    Ok(response) => response.collect().await.map_err(ExchangeError::Broken),
                    Err(error) => Err(error),
                }
            }
        });
        let (_request, mut respond) = served.recv().await.unwrap();
        let mut response = respond.send_response(Response::new(()), false).unwrap();
        response.send_data("some".into(), whole_before).unwrap();
        response.send_reset(reason);
        let came = tokio::time::timeout(LONG, sends).await.unwrap().unwrap();
        // A reset may overtake what was sent before it.
        if let Ok(came) = came {
            assert!(whole_before, "{reason:?} was a clean end");
            assert!(came.to_bytes().len() <= 4);
        }
    }
}

#[tokio::test]
async fn what_has_come_and_was_not_taken_is_known() {
    let (way, mut served, _) = connected().await;
    let sends = tokio::spawn(async move { way.send(post(whole("a note"))).await.unwrap() });
    let (_request, mut respond) = served.recv().await.unwrap();
    let mut response = respond.send_response(Response::new(()), false).unwrap();
    let mut body = sends.await.unwrap().into_body();
    let mut nothing = Context::from_waker(Waker::noop());
    assert!(Pin::new(&mut body).poll_frame(&mut nothing).is_pending());
    assert!(!body.is_waiting());
    response.send_data("one".into(), false).unwrap();
    let waits = async {
        while !body.is_waiting() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, waits).await.unwrap();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "one");
    assert!(!body.is_waiting());
}
