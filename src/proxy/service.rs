//! The service: begins each request's way, as it is planned.

use std::fmt;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Body;
use tower::Service;

use crate::probes;
use crate::proxy::BoxError;
use crate::proxy::body::ReplayRequestBody;
use crate::proxy::future::{LocalRun, ResponseFuture, Resume};
use crate::proxy::head::Head;
use crate::proxy::headers;
use crate::proxy::origin;
use crate::proxy::plan::{Need, RequestPlan, plan};
use crate::proxy::replay_body::Keep;
use crate::proxy::reply::MayWrite;
use crate::proxy::shared::LayerShared;
use crate::session::Session;

/// The middleware that [`ReplayLayer`](crate::ReplayLayer) makes of a service.
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// use bytes::Bytes;
/// use http::{Request, Response};
/// use http_body_util::Full;
/// use tower::{ServiceBuilder, service_fn};
///
/// let app = |_: Request<_>| async {
///     Ok::<_, std::convert::Infallible>(Response::new(axum::body::Body::from("hello")))
/// };
/// let service = ServiceBuilder::new().layer(db.replay_layer()).service(service_fn(app));
/// # let request = Request::new(Full::new(Bytes::new()));
/// # let _ = tower::ServiceExt::oneshot(service, request);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ReplayService<S> {
    pub(super) inner: S,
    pub(super) shared: Arc<LayerShared>,
}

impl<S: fmt::Debug> fmt::Debug for ReplayService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayService").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// With the feature `axum` the wrapped service gets axum's `Body`, as axum's own middlewares want
/// it, and so does the caller, as `axum::serve` wants it.
#[cfg(feature = "axum")]
impl<S, B, RB> Service<Request<B>> for ReplayService<S>
where
    S: Service<Request<axum::body::Body>, Response = Response<RB>> + Clone,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    RB: Body<Data = Bytes> + Send + 'static,
    RB::Error: Into<BoxError>,
{
    type Response = Response<axum::body::Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S, axum::body::Body>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S, axum::body::Body> {
        let kept = |keep| ReplayRequestBody::<B>::kept(keep).into_axum();
        self.start(request, ReplayRequestBody::into_axum, kept)
    }
}

/// The wrapped service gets the body that came in, in one of the layer's own, and so does the
/// caller the response's. With the feature `axum` these are axum's.
#[cfg(not(feature = "axum"))]
impl<S, B, RB> Service<Request<B>> for ReplayService<S>
where
    S: Service<Request<ReplayRequestBody<B>>, Response = Response<RB>> + Clone,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<super::ReplayResponseBody<RB>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, ReplayRequestBody<B>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture<S, ReplayRequestBody<B>> {
        self.start(request, |body| body, ReplayRequestBody::kept)
    }
}

impl<S> ReplayService<S> {
    /// Begins with a request; the functions make the body that the wrapped service takes.
    fn start<B, H>(
        &mut self,
        request: Request<B>,
        hand: fn(ReplayRequestBody<B>) -> H,
        kept: fn(Keep) -> H,
    ) -> ResponseFuture<S, H>
    where
        S: Service<Request<H>> + Clone,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        // The one that was polled ready is used; the clone takes its place.
        let clone = self.inner.clone();
        let mut service = mem::replace(&mut self.inner, clone);
        let shared = &self.shared;
        let probe = shared.node.is_probed() && probes::is_probe(request.method(), request.uri().path());
        if probe || shared.options.is_endpoint(request.uri().path()) {
            let future = service.call(request.map(|body| hand(ReplayRequestBody::plain(body))));
            return ResponseFuture::untouched(shared.clone(), future);
        }
        let (mut parts, body) = request.into_parts();
        let http1 = parts.version < Version::HTTP_2;
        let keeps =
            body.size_hint().upper().is_some_and(|bytes| bytes <= shared.options.budget.request as u64);
        let (plan, token) = plan(shared, &mut parts, keeps);
        // The layer of another database may be around this one.
        let outer = parts.extensions.get::<Session>().cloned();
        let session = Session::new(shared.tokens.clone(), token, outer);
        let secure = headers::is_https(&parts.headers, origin::scheme(&parts));
        let future = match plan {
            RequestPlan::Answered(answer) => ResponseFuture::done(shared.clone(), *answer),
            RequestPlan::Local { replay, writes, running } => {
                let head = replay.then(|| Arc::new(Head::of_client(&parts, &shared.options)));
                let (keep, body) = if let Some(head) = &head
                    && !body.is_end_stream()
                {
                    let keep = Keep::new(body, &shared.options.budget, head.client.share);
                    (Some(keep.clone()), kept(keep))
                } else {
                    (None, hand(ReplayRequestBody::plain(body)))
                };
                let replay = head.map(|head| (head, keep));
                let (led, epoch) = (shared.node.leads(), shared.node.roles.borrow().epoch);
                let writes = if writes && led { MayWrite::Yes } else { MayWrite::No };
                let run = LocalRun { session, secure, replay, led, epoch, writes, hop: None, running };
                ResponseFuture::local(shared.clone(), service, parts, body, run)
            }
            RequestPlan::Hop(hop, running) => {
                let body = match body.is_end_stream() {
                    true => ReplayRequestBody::plain(body),
                    false => ReplayRequestBody::to_its_end(Keep::new(body, &shared.options.budget, None)),
                };
                let (hop, running, led) = (Some(hop), Some(running), true);
                let writes = MayWrite::sent_here(shared, &parts.method);
                let epoch = shared.node.roles.borrow().epoch;
                let run = LocalRun { session, secure, replay: None, led, epoch, writes, hop, running };
                ResponseFuture::local(shared.clone(), service, parts, hand(body), run)
            }
            RequestPlan::Prepare(need) => {
                let head = Arc::new(Head::of_client(&parts, &shared.options));
                let may_replay = matches!(need, Need::Applied(_)) || !shared.node.lease.fixed;
                let replay = may_replay.then(|| head.clone());
                let body = Keep::new(body, &shared.options.budget, head.client.share);
                let writes = matches!(need, Need::Primary);
                let resume = Resume { service, body: kept, parts, session, secure, writes, replay };
                ResponseFuture::prepare(shared.clone(), need, head, body, resume)
            }
        };
        if http1 { future.on_http1() } else { future }
    }
}
