//! The body of the replication endpoint's responses.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::primary::{StreamReceiver, StreamSender, queue};

/// The body of a replication response: empty, or a stream that lasts as long as the replica stays.
#[derive(Debug)]
pub struct ReplicationBody(Option<StreamReceiver>);

impl ReplicationBody {
    pub(super) fn empty() -> ReplicationBody {
        ReplicationBody(None)
    }

    pub(super) fn stream() -> (StreamSender, ReplicationBody) {
        let (sender, receiver) = queue();
        (sender, ReplicationBody(Some(receiver)))
    }
}

impl Body for ReplicationBody {
    type Data = Bytes;
    /// The stream was broken off: the peer gets a reset and not a clean end.
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut self.0 {
            None => Poll::Ready(None),
            Some(receiver) => receiver.poll_next(cx).map(|next| next.map(|bytes| bytes.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(StreamReceiver::is_ended)
    }

    fn size_hint(&self) -> SizeHint {
        match self.0 {
            None => SizeHint::with_exact(0),
            Some(_) => SizeHint::default(),
        }
    }
}
