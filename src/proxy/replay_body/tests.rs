//! Bodies that are read in part or whole, and taken back.

use super::*;
use crate::proxy::body::ReplayRequestBody;
use http::HeaderMap;
use http_body_util::Full;
use std::convert::Infallible;

fn budget() -> Budget {
    Budget::new(8, 12, Duration::from_secs(60))
}

fn frames(data: &[&'static str]) -> impl Body<Data = Bytes, Error = Infallible> + Send + use<> {
    let (mut sender, body) = http_body_util::channel::Channel::<Bytes, Infallible>::new(16);
    for part in data {
        sender.try_send(Frame::data(Bytes::from_static(part.as_bytes()))).unwrap();
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "1".parse().unwrap());
    sender.try_send(Frame::trailers(trailers)).unwrap();
    body
}

type Reader = ReplayRequestBody<Full<Bytes>>;

async fn all(keep: &Keep) -> (String, bool) {
    let read = Reader::kept(keep.clone()).collect().await.unwrap();
    let trailers = read.trailers().is_some();
    (String::from_utf8(read.to_bytes().to_vec()).unwrap(), trailers)
}

#[tokio::test]
async fn a_body_that_was_read_in_part_or_whole_comes_back_whole() {
    let budget = budget();
    let keep = Keep::new(frames(&["ab", "cd", "ef"]), &budget, None);
    let mut reader = Reader::kept(keep.clone());
    assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
    assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "cd");
    let again = keep.recall().unwrap();
    assert!(reader.frame().await.unwrap().is_err(), "who read before gets an error, not an end");
    assert!(keep.recall().is_none(), "only once");
    assert_eq!(all(&again).await, ("abcdef".into(), true));
    assert_eq!(budget.used(), 6);
    let third = again.recall().unwrap();
    assert_eq!((third.size_hint().lower(), third.size_hint().upper()), (6, None));
    assert_eq!(all(&third).await, ("abcdef".into(), true));
    drop((keep, again, third, reader));
    assert_eq!(budget.used(), 0, "what was kept is given back");
}

#[tokio::test]
async fn beyond_a_limit_nothing_is_kept() {
    let budget = budget();
    let large = Keep::new(frames(&["12345678", "9"]), &budget, None);
    assert!(large.clone().recall().is_some(), "an unread body needs no room, whatever its length");
    let large = Keep::new(frames(&["12345678", "9"]), &budget, None);
    assert_eq!(all(&large).await.0, "123456789");
    assert!(large.recall().is_none());
    assert_eq!(budget.used(), 0);
    let (first, second) =
        (Keep::new(frames(&["12345678"]), &budget, None), Keep::new(frames(&["12345"]), &budget, None));
    all(&first).await;
    all(&second).await;
    assert!(second.recall().is_none(), "the process's limit");
    assert!(first.recall().is_some());
}

#[tokio::test]
async fn a_released_body_still_streams() {
    let budget = budget();
    let keep = Keep::new(frames(&["ab", "cd"]), &budget, None);
    Reader::kept(keep.clone()).frame().await;
    let again = keep.recall().unwrap();
    again.release();
    assert!(again.recall().is_none());
    assert_eq!(all(&again).await, ("abcd".into(), true));
    assert_eq!(budget.used(), 0);
}

async fn take_in(keep: &Keep) {
    std::future::poll_fn(|cx| keep.poll_take_in(8, cx)).await.unwrap();
}

#[tokio::test]
async fn a_body_that_was_taken_in_goes_out_whole_and_comes_back() {
    let budget = budget();
    let keep = Keep::new(frames(&["ab", "cd"]), &budget, None);
    assert!(!keep.is_whole());
    take_in(&keep).await;
    assert!(keep.is_whole() && !keep.is_end_stream());
    assert_eq!((budget.used(), keep.size_hint().lower(), keep.size_hint().upper()), (4, 4, None));
    let again = keep.recall().unwrap();
    assert_eq!(all(&again).await, ("abcd".into(), true));
    assert_eq!(all(&again.recall().unwrap()).await, ("abcd".into(), true));
    drop((keep, again));
    assert_eq!(budget.used(), 0);
    let declared = Keep::new(Full::new(Bytes::from_static(b"abc")), &budget, None);
    take_in(&declared).await;
    assert_eq!(declared.size_hint().exact(), Some(3));
    assert_eq!(all(&declared).await, ("abc".into(), false));
    let empty = Keep::new(Full::<Bytes>::default(), &budget, None);
    take_in(&empty).await;
    assert!(empty.is_whole() && empty.is_end_stream());
}

#[tokio::test]
async fn what_is_too_large_is_taken_in_up_to_the_first_frame_beyond() {
    let budget = budget();
    let keep = Keep::new(frames(&["abcde", "fghi", "jk"]), &budget, None);
    take_in(&keep).await;
    take_in(&keep).await;
    assert!(!keep.is_whole());
    assert_eq!((budget.used(), keep.size_hint().lower()), (5, 9));
    // Nothing of it went out: another try has all of it.
    let again = keep.recall().unwrap();
    assert_eq!(all(&again).await, ("abcdefghijk".into(), true));
    assert!(again.recall().is_none());
    assert_eq!(budget.used(), 0);
}

#[tokio::test]
async fn of_what_may_be_large_only_a_part_is_taken_in() {
    let budget = budget();
    let keep = Keep::new(frames(&["ab", "cd", "efghijkl"]), &budget, None);
    std::future::poll_fn(|cx| keep.poll_take_in(3, cx)).await.unwrap();
    assert_eq!((budget.used(), keep.is_whole()), (4, false));
    keep.rests();
    assert_eq!(all(&keep).await, ("abcdefghijkl".into(), true));
    assert!(keep.recall().is_some(), "there was as much room as without that");
}

#[tokio::test(start_paused = true)]
async fn of_a_client_that_falls_silent_nothing_is_kept() {
    let budget = budget();
    let (mut sender, body) = http_body_util::channel::Channel::<Bytes, Infallible>::new(4);
    sender.try_send(Frame::data(Bytes::from_static(b"ab"))).unwrap();
    let keep = Keep::new(body, &budget, None);
    let mut reader = Reader::kept(keep.clone());
    reader.frame().await;
    let silent = Duration::from_secs(59);
    assert!(tokio::time::timeout(silent, reader.frame()).await.is_err());
    assert_eq!(budget.used(), 2);
    assert!(tokio::time::timeout(silent, reader.frame()).await.is_err(), "its handler waits on");
    assert_eq!(budget.used(), 0);
    sender.try_send(Frame::data(Bytes::from_static(b"cd"))).unwrap();
    assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "cd");
    assert!(keep.recall().is_none() && !keep.slow());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_too_slow_is_an_error_until_its_body_is_released() {
    let budget = budget();
    let silent = || {
        let (sender, body) = http_body_util::channel::Channel::<Bytes, Infallible>::new(4);
        let keep = Keep::new(body, &budget, None);
        keep.hurry(1024);
        (sender, keep)
    };
    let (_sender, keep) = silent();
    assert!(std::future::poll_fn(|cx| keep.poll_take_in(8, cx)).await.is_err());
    assert!(keep.slow() && !keep.failed());
    assert!(Reader::kept(keep.clone()).frame().await.unwrap().is_err());
    let (_sender, keep) = silent();
    keep.release();
    let mut reader = Reader::kept(keep.clone());
    assert!(tokio::time::timeout(Duration::from_secs(600), reader.frame()).await.is_err());
    assert!(!keep.slow());
}
