//! A request body that can be taken back: what was read of it is kept, within limits, and the rest
//! is still there.
//!
//! It moves only when the handler or the connection to the primary asks for more, or when it is
//! taken in before there is a connection: as far as it can be kept, and one frame beyond that.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use tokio::time::{Duration, Instant};

use crate::lock::lock;
use crate::proxy::BoxError;
use crate::proxy::budget::{Budget, Kept};
use crate::proxy::tempo::Tempo;

/// How much, and for how long, is read of a body that its handler has left.
const DRAIN_MAX_BYTES: usize = 16 * 1024 * 1024;
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// A handle to a body that another task reads, and that can be taken back from it.
#[derive(Clone)]
pub(super) struct Keep(Arc<Mutex<ReplayState>>);

struct ReplayState {
    /// None once it was taken back.
    source: Option<UnsyncBoxBody<Bytes, BoxError>>,
    /// The length that the client has declared.
    declared: Option<u64>,
    /// The source has given its last frame.
    ended: bool,
    /// What was read so far, while `keeping`.
    kept: Kept,
    keeping: bool,
    /// `kept` goes out first.
    resend: bool,
    /// The frame after it, which was read and is not kept.
    ahead: Option<Bytes>,
    /// The trailers, too, were read before, and go out last.
    resend_trailers: bool,
    /// How long the client is waited for.
    tempo: Tempo,
    /// It was waited for long enough.
    slow: bool,
    /// The source failed: what the client sent is no body, or it left.
    failed: bool,
    last_progress: Instant,
    /// Who reads; woken when the body is taken from them.
    reader: Option<Waker>,
}

impl Keep {
    /// The body of a request of this client.
    pub(super) fn new<B>(body: B, budget: &Budget, client: Option<IpAddr>) -> Keep
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (ended, hint) = (body.is_end_stream(), body.size_hint());
        Keep(Arc::new(Mutex::new(ReplayState {
            source: Some(body.map_err(Into::into).boxed_unsync()),
            declared: hint.exact(),
            ended,
            kept: Kept::new(budget, client, hint.upper()),
            keeping: true,
            resend: false,
            ahead: None,
            resend_trailers: false,
            tempo: Tempo::new(budget.idle),
            slow: false,
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
        let kept = state.kept.take();
        Some(Keep(Arc::new(Mutex::new(ReplayState {
            source: Some(source),
            declared: state.declared,
            ended: state.ended,
            keeping: true,
            resend: !kept.data.is_empty(),
            ahead: state.ahead.take(),
            resend_trailers: kept.trailers.is_some(),
            kept,
            tempo: state.tempo.again(),
            slow: false,
            failed: false,
            last_progress: Instant::now(),
            reader: None,
        }))))
    }

    /// Keeps nothing any more: the body can't be needed again. The client may take its time.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.keeping = false;
        state.tempo.at_leisure();
        if !state.resend && !state.resend_trailers {
            state.kept.clear();
        }
    }

    /// From now on the client has to send so many bytes a second where it is waited for.
    pub(super) fn hurry(&self, rate: u32) {
        self.lock().tempo.hurry(rate);
    }

    /// The client may take its time.
    pub(super) fn at_leisure(&self) {
        self.lock().tempo.at_leisure();
    }

    /// It is about to be sent, and may have waited before.
    pub(super) fn begins(&self) {
        self.lock().last_progress = Instant::now();
    }

    /// No more of it is taken in, and its client is not waited for until it is sent. From then on
    /// as much of it is kept as of one of which nothing was taken in.
    pub(super) fn rests(&self) {
        let mut state = self.lock();
        state.tempo.came(0);
        state.kept.count_anew();
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
        state.tempo.waits() && !state.at_end()
    }

    /// Whether the client was too slow.
    pub(super) fn slow(&self) -> bool {
        self.lock().slow
    }

    /// Whether the body can't be had, because of what the client sent.
    pub(super) fn failed(&self) -> bool {
        self.lock().failed
    }

    /// The length that the client has declared.
    pub(super) fn declared(&self) -> Option<u64> {
        self.lock().declared
    }

    /// Whether the client has sent all of it.
    pub(super) fn is_whole(&self) -> bool {
        let state = self.lock();
        state.source_ended() && state.ahead.is_none()
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.lock().at_end()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        let state = self.lock();
        let Some(source) = &state.source else { return SizeHint::default() };
        let rest = if state.ended { SizeHint::with_exact(0) } else { source.size_hint() };
        let kept = if state.resend { state.kept.data.len() } else { 0 };
        let before = (kept + state.ahead.as_ref().map_or(0, Bytes::len)) as u64;
        let mut hint = SizeHint::new();
        // A length that the client has not declared is not made up: there may be trailers.
        if let (Some(upper), true) = (rest.upper(), before == 0 || state.declared.is_some()) {
            hint.set_upper(upper.saturating_add(before));
        }
        hint.set_lower(rest.lower().saturating_add(before));
        hint
    }

    pub(super) fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut state = self.lock();
        if state.source.is_none() {
            return Poll::Ready(Some(Err(
                "the request's body was taken back to be sent to the primary".into()
            )));
        }
        if std::mem::take(&mut state.resend) {
            let data = Bytes::copy_from_slice(&state.kept.data);
            state.last_progress = Instant::now();
            if !state.keeping && !state.resend_trailers {
                state.kept.clear();
            }
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if let Some(data) = state.ahead.take() {
            state.forget();
            state.last_progress = Instant::now();
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if state.ended {
            let due = std::mem::take(&mut state.resend_trailers);
            return Poll::Ready(state.kept.trailers.clone().filter(|_| due).map(|t| Ok(Frame::trailers(t))));
        }
        let frame = ready!(state.poll_source(cx));
        if let Some(Ok(frame)) = &frame {
            state.keep(frame);
        }
        Poll::Ready(frame)
    }

    /// Reads the body without giving it out: until its end, until it can't be kept, or until more
    /// than so many bytes are.
    pub(super) fn poll_take_in(&self, most: usize, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        let mut state = self.lock();
        while state.source.is_some() && state.keeping && !state.ended && state.ahead.is_none() {
            if state.kept.data.len() > most {
                break;
            }
            match ready!(state.poll_source(cx)) {
                Some(frame) => state.take_in(frame?),
                None => break,
            }
        }
        Poll::Ready(Ok(()))
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
    fn source_ended(&self) -> bool {
        self.ended || self.source.as_ref().is_some_and(|s| s.is_end_stream())
    }

    fn at_end(&self) -> bool {
        self.source_ended() && !self.resend && self.ahead.is_none() && !self.resend_trailers
    }

    /// The source's next frame. A client that is too slow is an error on the way to the primary. Of
    /// one that a handler waits for nothing is kept any more.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(source) = self.source.as_mut().filter(|_| !self.slow) else {
            return Poll::Ready(Some(Err("the client sent its body too slowly".into())));
        };
        let polled = Pin::new(source).poll_frame(cx);
        match &polled {
            Poll::Pending => {
                if !self.reader.as_ref().is_some_and(|r| r.will_wake(cx.waker())) {
                    self.reader = Some(cx.waker().clone());
                }
                if self.poll_patience(cx) {
                    return self.poll_source(cx);
                }
                return polled;
            }
            Poll::Ready(frame) => {
                let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
                self.tempo.came(data.map_or(0, Bytes::len));
            }
        }
        match &polled {
            Poll::Ready(Some(Err(_))) => {
                self.failed = true;
                self.forget();
            }
            Poll::Ready(None) => self.ended = true,
            _ => {}
        }
        self.last_progress = Instant::now();
        polled
    }

    /// Nothing came. Whether that makes the client one that is too slow.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> bool {
        let matters = self.tempo.is_hurried() || self.keeping && !self.kept.is_empty();
        // A handler may run in another runtime, or in none.
        let has_clock = tokio::runtime::Handle::try_current().is_ok();
        if !matters || !has_clock || self.tempo.poll_wait(cx).is_pending() {
            return false;
        }
        self.slow = self.tempo.is_hurried();
        self.forget();
        self.slow
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

    /// Keeps a frame that goes out later.
    fn take_in(&mut self, frame: Frame<Bytes>) {
        match frame.into_data() {
            Ok(data) if self.kept.add(&data) => self.resend = !self.kept.data.is_empty(),
            Ok(data) => self.ahead = Some(data),
            Err(frame) => {
                self.keep(&frame);
                self.resend_trailers = self.kept.trailers.is_some();
            }
        }
    }

    fn forget(&mut self) {
        self.keeping = false;
        self.kept.clear();
    }
}

#[cfg(test)]
mod tests;
