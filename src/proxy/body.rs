//! The bodies of the layer: requests on their way to the handler, responses on their way to the
//! client.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{Empty, Full};
use pin_project_lite::pin_project;

use crate::proxy::BoxError;
use crate::proxy::idle::IdleTimeoutBody;
use crate::proxy::primary_body::LastingBody;
use crate::proxy::replay_body::{DrainOnDrop, Keep};

pin_project! {
    /// A request's body as the wrapped service gets it: the one that came in. The layer may be able
    /// to take it back for the primary. With the feature `axum` it is inside of an axum `Body`.
    pub struct ReplayRequestBody<B> {
        #[pin]
        kind: RequestKind<B>,
    }
}

pin_project! {
    #[project = RequestProj]
    enum RequestKind<B> {
        Plain { #[pin] body: B },
        Kept { keep: Keep },
        DrainOnDrop { body: DrainOnDrop },
    }
}

impl<B> ReplayRequestBody<B> {
    /// The body as it came.
    pub(super) fn plain(body: B) -> Self {
        ReplayRequestBody { kind: RequestKind::Plain { body } }
    }

    /// A body that is read to its end, also when the handler leaves a rest.
    pub(super) fn to_its_end(keep: Keep) -> Self {
        keep.release();
        ReplayRequestBody { kind: RequestKind::DrainOnDrop { body: DrainOnDrop(keep) } }
    }

    /// A body that can be taken back.
    pub(super) fn kept(keep: Keep) -> Self {
        ReplayRequestBody { kind: RequestKind::Kept { keep } }
    }

    /// The same for axum's services. Its own body goes through as it is.
    #[cfg(feature = "axum")]
    pub(super) fn into_axum(self) -> axum::body::Body
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        match self.kind {
            RequestKind::Plain { body } => axum::body::Body::new(body),
            kind => axum::body::Body::new(ReplayRequestBody { kind }),
        }
    }
}

impl<B> Body for ReplayRequestBody<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().kind.project() {
            RequestProj::Plain { body } => body.poll_frame(cx).map_err(Into::into),
            RequestProj::Kept { keep } => keep.poll_frame(cx),
            RequestProj::DrainOnDrop { body } => body.0.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            RequestKind::Plain { body } => body.is_end_stream(),
            RequestKind::Kept { keep } => keep.is_end_stream(),
            RequestKind::DrainOnDrop { body } => body.0.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            RequestKind::Plain { body } => body.size_hint(),
            RequestKind::Kept { keep } => keep.size_hint(),
            RequestKind::DrainOnDrop { body } => body.0.size_hint(),
        }
    }
}

impl<B> std::fmt::Debug for ReplayRequestBody<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplayRequestBody(..)")
    }
}

pin_project! {
    /// A response's body: the wrapped service's own, the primary's, or a few words of the layer.
    /// With the feature `axum` the layer's responses have an axum `Body`.
    pub struct ReplayResponseBody<RB> {
        #[pin]
        kind: ResponseKind<RB>,
    }
}

pin_project! {
    #[project = ResponseProj]
    enum ResponseKind<RB> {
        Local { #[pin] body: RB },
        MadeBody { #[pin] answer: MadeBody },
    }
}

impl<RB> ReplayResponseBody<RB> {
    #[cfg(not(feature = "axum"))]
    pub(super) fn local(body: RB) -> Self {
        ReplayResponseBody { kind: ResponseKind::Local { body } }
    }

    pub(super) fn answer(answer: MadeBody) -> Self {
        ReplayResponseBody { kind: ResponseKind::MadeBody { answer } }
    }
}

/// An empty body, which layers above make for answers of their own, such as to a CORS preflight.
impl<RB> Default for ReplayResponseBody<RB> {
    fn default() -> Self {
        ReplayResponseBody::answer(MadeBody::Own(Full::default()))
    }
}

impl<RB> Body for ReplayResponseBody<RB>
where
    RB: Body<Data = Bytes>,
    RB::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().kind.project() {
            ResponseProj::Local { body } => body.poll_frame(cx).map_err(Into::into),
            ResponseProj::MadeBody { answer } => answer.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            ResponseKind::Local { body } => body.is_end_stream(),
            ResponseKind::MadeBody { answer } => answer.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            ResponseKind::Local { body } => body.size_hint(),
            ResponseKind::MadeBody { answer } => answer.size_hint(),
        }
    }
}

impl<RB> std::fmt::Debug for ReplayResponseBody<RB> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ReplayResponseBody(..)")
    }
}

/// A body on its way to the primary.
pub(super) type Outgoing = IdleTimeoutBody<ReplayRequestBody<Empty<Bytes>>>;

/// An application's response on its way to the node that forwarded the request.
pub(crate) type AppBody = UnsyncBoxBody<Bytes, BoxError>;

/// The body of a response that the wrapped service did not make.
pub(super) enum MadeBody {
    /// The primary's.
    Primary(LastingBody),
    /// This node's own application's.
    App(AppBody),
    /// The layer's own.
    Own(Full<Bytes>),
}

impl Body for MadeBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            MadeBody::Primary(body) => Pin::new(body).poll_frame(cx),
            MadeBody::App(body) => Pin::new(body).poll_frame(cx),
            MadeBody::Own(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            MadeBody::Primary(body) => body.is_end_stream(),
            MadeBody::App(body) => body.is_end_stream(),
            MadeBody::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            MadeBody::Primary(body) => body.size_hint(),
            MadeBody::App(body) => body.size_hint(),
            MadeBody::Own(body) => body.size_hint(),
        }
    }
}
