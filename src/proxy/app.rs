//! The application's own service, for the requests that other nodes forward on the private channel.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::HOST;
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use tokio::sync::watch;

use crate::context::NodeContext;
use crate::lock::lock;
use crate::proxy::BoxError;
use crate::proxy::body::{AppBody, Outgoing};
use crate::proxy::channel::ChannelLines;
use crate::proxy::forwarded::{self, Forwarded};
use crate::proxy::headers::{HOP, strip_hop_by_hop, strip_listed};
use crate::proxy::hop::{About, Hop};
use crate::proxy::switched;
use crate::token::Tokens;

/// The body of a request that another node forwarded on the private channel, or that this node
/// itself has for its own application.
///
/// It ends with an error where that node, or its client, broke off.
pub struct ForwardedBody(BodySource);

enum BodySource {
    Channel(Incoming),
    Here(Outgoing),
}

impl Body for ForwardedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            BodySource::Channel(body) => Pin::new(body).poll_frame(cx).map_err(Into::into),
            BodySource::Here(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            BodySource::Channel(body) => body.is_end_stream(),
            BodySource::Here(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            BodySource::Channel(body) => body.size_hint(),
            BodySource::Here(body) => body.size_hint(),
        }
    }
}

impl fmt::Debug for ForwardedBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ForwardedBody(..)")
    }
}

/// What an application answers, or why it does not.
pub(crate) type AppAnswer = Pin<Box<dyn Future<Output = Result<Response<AppBody>, BoxError>> + Send>>;

/// A tower service that answers the requests which other nodes forward, for
/// [`Db::serve_forwarded`](crate::Db::serve_forwarded). axum's `Router` is one, and so is every
/// other service that takes a [`ForwardedBody`] and can be cloned.
pub trait ForwardedApp: service::Call {}

impl<A: service::Call> ForwardedApp for A {}

mod service {
    use bytes::Bytes;
    use http::{Request, Response};
    use http_body::Body;
    use http_body_util::BodyExt;
    use tower::{Service, ServiceExt};

    use super::{AppAnswer, BoxError, ForwardedBody};

    /// Keeps the trait to services, and out of documentation what is done with them.
    pub trait Call: Send + 'static {
        /// What answers one request, once that is there.
        fn one(&self) -> One;
    }

    /// See [`Call::one`].
    pub struct One(pub(super) Box<dyn FnOnce(Request<ForwardedBody>) -> AppAnswer + Send>);

    impl<S, B> Call for S
    where
        S: Service<Request<ForwardedBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        fn one(&self) -> One {
            let service = self.clone();
            One(Box::new(move |request| {
                Box::pin(async move {
                    let response = service.oneshot(request).await.map_err(Into::into)?;
                    Ok(response.map(|body| body.map_err(Into::into).boxed_unsync()))
                })
            }))
        }
    }
}

/// Where the application's service is, once it was given.
#[derive(Clone, Default)]
pub(crate) struct AppDoor(Arc<Given>);

#[derive(Default)]
struct Given {
    /// Stays so when the node has stopped and let go of the service.
    given: AtomicBool,
    app: Mutex<Option<Arc<GivenApp>>>,
    lines: OnceLock<ChannelLines>,
    /// Requests that came on the channel and are not answered to the end.
    running: watch::Sender<usize>,
}

struct GivenApp {
    service: Mutex<Box<dyn service::Call>>,
    node: Arc<NodeContext>,
    tokens: Tokens,
}

/// A request came on the private channel, and its hop is proved.
#[derive(Clone, Copy, Debug)]
pub(super) struct CameByChannel;

impl AppDoor {
    /// Takes the service; false where there is one already.
    pub(crate) fn give(&self, node: &Arc<NodeContext>, app: impl ForwardedApp) -> bool {
        if self.0.given.swap(true, Ordering::AcqRel) {
            return false;
        }
        let _ = self.0.lines.set(ChannelLines::new(node));
        let (service, tokens) = (Mutex::new(Box::new(app) as _), Tokens::new(node.clone()));
        *lock(&self.0.app) = Some(Arc::new(GivenApp { service, node: node.clone(), tokens }));
        true
    }

    /// Whether it was given at all.
    pub(crate) fn is_given(&self) -> bool {
        self.0.given.load(Ordering::Acquire)
    }

    /// Whether it takes requests.
    pub(crate) fn serves(&self) -> bool {
        lock(&self.0.app).is_some()
    }

    /// The ways to other nodes' applications; none where this one's was not given.
    pub(super) fn lines(&self) -> Option<&ChannelLines> {
        self.0.lines.get()
    }

    /// Lets go of the service, in which the application may have the database's handle, and takes
    /// no other.
    pub(crate) fn close(&self) {
        self.0.given.store(true, Ordering::Release);
        let app = lock(&self.0.app).take();
        // Code of the application may run, out of the lock.
        drop(app);
    }

    /// Returns when all that came is answered to the end.
    pub(crate) async fn done(&self) {
        // The sender is here.
        let _ = self.0.running.subscribe().wait_for(|running| *running == 0).await;
    }

    /// Has the application answer a request that a member sent on the channel.
    pub(crate) fn answer(&self, request: Request<Incoming>) -> AppAnswer {
        let app = lock(&self.0.app).clone();
        let Some(app) = app else { return not_begun() };
        let (mut parts, body) = request.into_parts();
        let switches = switched::asked(&mut parts);
        if !app.arrived(&mut parts) {
            // Where the secrets are being changed, the other side tries again with the next one.
            tracing::debug!("a request on the channel is no hop");
            return not_begun();
        }
        let running = RunningHere::enter(self);
        let answer = app.call(Request::from_parts(parts, ForwardedBody(BodySource::Channel(body))));
        Box::pin(async move {
            // As text: a reason of HTTP/2 in it would be taken for this connection's.
            let mut response = answer.await.map_err(|error| BoxError::from(error.to_string()))?;
            strip_listed(response.headers_mut());
            strip_hop_by_hop(response.headers_mut());
            if switches {
                switched::answer(&mut response);
            }
            Ok(response.map(|body| UnsyncBoxBody::new(CountedBody { body, _running: running })))
        })
    }

    /// Has this node's own application answer a request of a client that this node knows; none
    /// where it was not given.
    pub(super) fn answer_here(&self, request: Request<Outgoing>, forwarded: Forwarded) -> Option<AppAnswer> {
        let app = lock(&self.0.app).clone()?;
        let (mut parts, body) = request.into_parts();
        let target = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        parts.uri = Uri::from(target);
        forwarded::arrive(&mut parts, forwarded);
        Some(app.call(Request::from_parts(parts, ForwardedBody(BodySource::Here(body)))))
    }
}

impl GivenApp {
    fn call(&self, request: Request<ForwardedBody>) -> AppAnswer {
        let one = lock(&self.service).one();
        (one.0)(request)
    }

    /// Makes the head of a request what it is at the node that took it. False where its hop is not
    /// proved.
    fn arrived(&self, parts: &mut Parts) -> bool {
        let target = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        let about = About {
            keys: &self.node.keys,
            tag: self.tokens.tag(),
            method: &parts.method,
            target: target.as_str(),
        };
        let hop = parts.headers.get(HOP).and_then(|value| Hop::verify(value, about));
        let Some(hop) = hop else { return false };
        let authority = std::mem::take(&mut parts.uri).into_parts().authority;
        if let Some(host) = authority.and_then(|host| HeaderValue::from_str(host.as_str()).ok()) {
            parts.headers.insert(HOST, host);
        }
        parts.uri = Uri::from(target);
        // Before all of the application's layers, of which some may ask who the client is.
        forwarded::arrive(parts, Forwarded::of(&hop));
        parts.extensions.insert(CameByChannel);
        true
    }
}

/// Tells the other side, in HTTP/2, that the request was not begun.
fn not_begun() -> AppAnswer {
    Box::pin(std::future::ready(Err(h2::Error::from(h2::Reason::REFUSED_STREAM).into())))
}

/// A response's body, while which its request counts.
struct CountedBody {
    body: AppBody,
    _running: RunningHere,
}

impl Body for CountedBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
            // HTTP/2 closes a connection on which a hundred frames without bytes came.
            let is_empty =
                frame.as_ref().and_then(|f| f.as_ref().ok()?.data_ref()).is_some_and(Bytes::is_empty);
            if !is_empty || self.body.is_end_stream() {
                return Poll::Ready(frame);
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl fmt::Debug for AppDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AppDoor").field("given", &self.is_given()).finish_non_exhaustive()
    }
}

/// A request that runs; counted until this is dropped.
struct RunningHere(AppDoor);

impl RunningHere {
    fn enter(door: &AppDoor) -> RunningHere {
        door.0.running.send_modify(|running| *running += 1);
        RunningHere(door.clone())
    }
}

impl Drop for RunningHere {
    fn drop(&mut self) {
        self.0.0.running.send_modify(|running| *running -= 1);
    }
}
