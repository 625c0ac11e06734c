//! A request body that can be taken back: what was read of it is kept, within limits, and the rest
//! is still there.
//!
//! Nothing is ever read ahead: a body moves only when the handler or the connection to the primary
//! asks for more.

use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::time::{Duration, Instant};

use crate::lock::lock;
use crate::proxy::BoxError;

/// How much, and for how long, is read of a body that its handler has left.
const DRAIN_MAX_BYTES: usize = 16 * 1024 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// How much may be kept of bodies.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    /// Bytes of one request.
    pub(super) request: usize,
    /// Bytes of all requests together.
    pub(super) process: usize,
    used: Arc<AtomicUsize>,
}

impl Budget {
    pub(super) fn new(request: usize, process: usize) -> Budget {
        Budget { request, process, used: Arc::default() }
    }

    fn take(&self, bytes: usize) -> bool {
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|sum| *sum <= self.process)
        });
        taken.is_ok()
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }
}

/// A handle to a body that another task reads, and that can be taken back from it.
#[derive(Clone)]
pub(super) struct Keep(Arc<Mutex<ReplayState>>);

struct ReplayState {
    /// None once it was taken back.
    source: Option<UnsyncBoxBody<Bytes, BoxError>>,
    /// The source has given its last frame.
    ended: bool,
    /// What was read so far, while `keeping`.
    kept: Kept,
    keeping: bool,
    /// `kept` goes out first.
    resend: bool,
    /// The trailers, too, were read before, and go out last.
    resend_trailers: bool,
    /// The source has nothing to give since its last frame: the layer waits for the client.
    starving: bool,
    /// The source failed: what the client sent is no body, or it left.
    failed: bool,
    last_progress: Instant,
    /// Who reads; woken when the body is taken from them.
    reader: Option<Waker>,
}

struct Kept {
    data: BytesMut,
    trailers: Option<HeaderMap>,
    budget: Budget,
    charged: usize,
}

impl Kept {
    fn add(&mut self, data: &Bytes) -> bool {
        let fits = data.len() <= self.budget.request.saturating_sub(self.data.len());
        if !fits || !self.budget.take(data.len()) {
            return false;
        }
        self.charged += data.len();
        // Copied: a frame of one byte may hold on to a whole read buffer.
        self.data.extend_from_slice(data);
        true
    }

    fn clear(&mut self) {
        self.data = BytesMut::new();
        self.trailers = None;
        self.budget.used.fetch_sub(std::mem::take(&mut self.charged), Ordering::Relaxed);
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Keep {
    pub(super) fn new<B>(body: B, budget: &Budget) -> Keep
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let ended = body.is_end_stream();
        let kept = Kept { data: BytesMut::new(), trailers: None, budget: budget.clone(), charged: 0 };
        Keep(Arc::new(Mutex::new(ReplayState {
            source: Some(body.map_err(Into::into).boxed_unsync()),
            ended,
            kept,
            keeping: true,
            resend: false,
            resend_trailers: false,
            starving: false,
            failed: false,
            last_progress: Instant::now(),
            reader: None,
        })))
    }

    /// Takes the whole body back from its reader, which gets an error. None when more of it was
    /// read than is kept, or when it was taken back before.
    pub(super) fn recall(&self) -> Option<Keep> {
        let mut state = self.lock();
        if !state.keeping {
            return None;
        }
        let source = state.source.take()?;
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        let empty =
            Kept { data: BytesMut::new(), trailers: None, budget: state.kept.budget.clone(), charged: 0 };
        let kept = std::mem::replace(&mut state.kept, empty);
        Some(Keep(Arc::new(Mutex::new(ReplayState {
            source: Some(source),
            ended: state.ended,
            keeping: true,
            resend: !kept.data.is_empty(),
            resend_trailers: kept.trailers.is_some(),
            kept,
            starving: false,
            failed: false,
            last_progress: Instant::now(),
            reader: None,
        }))))
    }

    /// Keeps nothing any more: the body can't be needed again.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.keeping = false;
        if !state.resend && !state.resend_trailers {
            state.kept.clear();
        }
    }

    /// When patience ends: `idle` after the last progress while the body still comes, `answer`
    /// after its end.
    pub(super) fn deadline(&self, idle: Duration, answer: Duration) -> Instant {
        let state = self.lock();
        state.last_progress + if state.at_end() { answer } else { idle }
    }

    /// Whether its reader asked for more of the body and the client has not sent it.
    pub(super) fn starving(&self) -> bool {
        let state = self.lock();
        state.starving && !state.at_end()
    }

    /// Whether the body can't be had, because of what the client sent.
    pub(super) fn failed(&self) -> bool {
        self.lock().failed
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.lock().at_end()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let state = self.lock();
        let Some(source) = &state.source else { return SizeHint::default() };
        let mut hint = if state.ended { SizeHint::with_exact(0) } else { source.size_hint() };
        if state.resend {
            let kept = state.kept.data.len() as u64;
            let (lower, upper) = (hint.lower(), hint.upper());
            hint = SizeHint::new();
            if let Some(upper) = upper {
                hint.set_upper(upper.saturating_add(kept));
            }
            hint.set_lower(lower.saturating_add(kept));
        }
        hint
    }

    pub(super) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(source) = state.source.as_mut() else {
            return Poll::Ready(Some(Err(
                "the request's body was taken back to be sent to the primary".into()
            )));
        };
        if std::mem::take(&mut state.resend) {
            let data = Bytes::copy_from_slice(&state.kept.data);
            state.last_progress = Instant::now();
            if !state.keeping && !state.resend_trailers {
                state.kept.clear();
            }
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if state.ended {
            let due = std::mem::take(&mut state.resend_trailers);
            return Poll::Ready(state.kept.trailers.clone().filter(|_| due).map(|t| Ok(Frame::trailers(t))));
        }
        let polled = Pin::new(source).poll_frame(cx);
        state.starving = polled.is_pending();
        match &polled {
            Poll::Pending => {
                if !state.reader.as_ref().is_some_and(|r| r.will_wake(cx.waker())) {
                    state.reader = Some(cx.waker().clone());
                }
                return polled;
            }
            Poll::Ready(Some(Ok(frame))) => state.keep(frame),
            Poll::Ready(Some(Err(_))) => {
                state.failed = true;
                state.forget();
            }
            Poll::Ready(None) => state.ended = true,
        }
        state.last_progress = Instant::now();
        polled
    }

    fn lock(&self) -> MutexGuard<'_, ReplayState> {
        lock(&self.0)
    }
}

/// A body whose rest, when its reader leaves one, is read, too, for a while and in the background.
/// A server that closes a connection with bytes unread resets it, and the node at the other end
/// might never see the answer.
pub(super) struct DrainOnDrop(pub(super) Keep);

impl Drop for DrainOnDrop {
    fn drop(&mut self) {
        let keep = self.0.clone();
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if keep.is_end_stream() || keep.failed() {
            return;
        }
        let rest = async move {
            let mut bytes = 0;
            while bytes < DRAIN_MAX_BYTES
                && let Some(Ok(frame)) = std::future::poll_fn(|cx| keep.poll_frame(cx)).await
            {
                bytes += frame.data_ref().map_or(0, Bytes::len);
            }
        };
        runtime.spawn(async move { tokio::time::timeout(DRAIN_LIMIT, rest).await });
    }
}

impl ReplayState {
    fn at_end(&self) -> bool {
        let source_ended = self.ended || self.source.as_ref().is_some_and(|s| s.is_end_stream());
        source_ended && !self.resend && !self.resend_trailers
    }

    fn keep(&mut self, frame: &Frame<Bytes>) {
        if let Some(trailers) = frame.trailers_ref() {
            self.ended = true;
            if self.keeping {
                self.kept.trailers = Some(trailers.clone());
            }
        } else if let Some(data) = frame.data_ref()
            && self.keeping
            && !self.kept.add(data)
        {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.keeping = false;
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::body::ReplayRequestBody;
    use http_body_util::Full;
    use std::convert::Infallible;

    fn budget() -> Budget {
        Budget::new(8, 12)
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
        let keep = Keep::new(frames(&["ab", "cd", "ef"]), &budget);
        let mut reader = Reader::kept(keep.clone());
        assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert_eq!(reader.frame().await.unwrap().unwrap().into_data().unwrap(), "cd");
        let again = keep.recall().unwrap();
        assert!(reader.frame().await.unwrap().is_err(), "who read before gets an error, not an end");
        assert!(keep.recall().is_none(), "only once");
        assert_eq!(all(&again).await, ("abcdef".into(), true));
        assert_eq!(budget.used(), 6);
        let third = again.recall().unwrap();
        assert_eq!(third.size_hint().exact(), Some(6));
        assert_eq!(all(&third).await, ("abcdef".into(), true));
        drop((keep, again, third, reader));
        assert_eq!(budget.used(), 0, "what was kept is given back");
    }

    #[tokio::test]
    async fn beyond_a_limit_nothing_is_kept() {
        let budget = budget();
        let large = Keep::new(frames(&["12345678", "9"]), &budget);
        assert!(large.clone().recall().is_some(), "an unread body needs no room, whatever its length");
        let large = Keep::new(frames(&["12345678", "9"]), &budget);
        assert_eq!(all(&large).await.0, "123456789");
        assert!(large.recall().is_none());
        assert_eq!(budget.used(), 0);
        let (first, second) =
            (Keep::new(frames(&["12345678"]), &budget), Keep::new(frames(&["12345"]), &budget));
        all(&first).await;
        all(&second).await;
        assert!(second.recall().is_none(), "the process's limit");
        assert!(first.recall().is_some());
    }

    #[tokio::test]
    async fn a_released_body_still_streams() {
        let budget = budget();
        let keep = Keep::new(frames(&["ab", "cd"]), &budget);
        Reader::kept(keep.clone()).frame().await;
        let again = keep.recall().unwrap();
        again.release();
        assert!(again.recall().is_none());
        assert_eq!(all(&again).await, ("abcd".into(), true));
        assert_eq!(budget.used(), 0);
    }
}
