//! A body of which nothing comes for too long.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::proxy::BoxError;

/// A body that fails when nothing comes for too long.
pub(super) struct IdleTimeoutBody<B> {
    body: B,
    /// None: any pause is fine, as in an event stream.
    idle: Option<Duration>,
    /// Set while the body has nothing to give.
    since: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl<B> IdleTimeoutBody<B> {
    pub(super) fn new(body: B, idle: Option<Duration>) -> IdleTimeoutBody<B> {
        IdleTimeoutBody { body, idle, since: None, sleep: None }
    }

    pub(super) fn inner(&mut self) -> &mut B {
        &mut self.body
    }
}

impl<B> Body for IdleTimeoutBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.since = None;
            return Poll::Ready(frame.map(|f| f.map_err(Into::into)));
        }
        let Some(idle) = this.idle else { return Poll::Pending };
        let due = *this.since.get_or_insert_with(Instant::now) + idle;
        let sleep = this.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due)));
        if sleep.deadline() != due {
            sleep.as_mut().reset(due);
        }
        ready!(sleep.as_mut().poll(cx));
        Poll::Ready(Some(Err(format!("nothing came for {idle:?}").into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
