//! The body of the replication endpoint's responses.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::net::PipeBody;
use crate::primary::{StreamReceiver, StreamSender, queue};
use crate::proxy::AppBody;

/// The body of a replication response: empty, or a stream that lasts as long as the replica stays.
#[derive(Debug)]
pub struct ReplicationBody(BodyContent);

#[derive(Debug)]
enum BodyContent {
    Nothing,
    Stream(StreamReceiver),
    /// One direction of a private channel.
    Channel(PipeBody),
    /// The application's.
    App(AppBody),
}

impl ReplicationBody {
    pub(super) fn empty() -> ReplicationBody {
        ReplicationBody(BodyContent::Nothing)
    }

    pub(super) fn channel(body: PipeBody) -> ReplicationBody {
        ReplicationBody(BodyContent::Channel(body))
    }

    pub(super) fn app(body: AppBody) -> ReplicationBody {
        ReplicationBody(BodyContent::App(body))
    }

    pub(super) fn stream() -> (StreamSender, ReplicationBody) {
        let (sender, receiver) = queue();
        (sender, ReplicationBody(BodyContent::Stream(receiver)))
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
            BodyContent::Nothing => Poll::Ready(None),
            BodyContent::Stream(stream) => {
                stream.poll_next(cx).map(|next| next.map(|bytes| bytes.map(Frame::data)))
            }
            BodyContent::Channel(body) => {
                body.poll_next(cx).map(|next| next.map(|bytes| Ok(Frame::data(bytes))))
            }
            BodyContent::App(body) => Pin::new(body).poll_frame(cx).map_err(io::Error::other),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            BodyContent::Nothing => true,
            BodyContent::Stream(stream) => stream.is_ended(),
            BodyContent::Channel(_) => false,
            BodyContent::App(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            BodyContent::Nothing => SizeHint::with_exact(0),
            BodyContent::App(body) => body.size_hint(),
            BodyContent::Stream(_) | BodyContent::Channel(_) => SizeHint::default(),
        }
    }
}
