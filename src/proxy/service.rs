//! The service: looks at each request's head and plans its way.

use std::convert::Infallible;
use std::fmt;
use std::mem;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::HOST;
use http::request::Parts;
use http::{HeaderValue, Method, Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower::Service;

use crate::proxy::BoxError;
use crate::proxy::body::{MadeBody, ReplayRequestBody};
use crate::proxy::failure::{Failure, Reason};
use crate::proxy::future::{LocalRun, ResponseFuture, Resume};
use crate::proxy::headers::{self, HOP, PRIMARY};
use crate::proxy::hop::{About, Came, HOPS_MAX, Hint, Hop};
use crate::proxy::layer::{LayerShared, Upgrades};
use crate::proxy::prepare::{Head, Need, failure, target};
use crate::proxy::replay_body::Keep;
use crate::proxy::route::Route;
use crate::session::Session;
use crate::status::Role;
use crate::token::Token;
use crate::txid::Place;

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

/// The way of a request.
enum RequestPlan {
    /// It is answered at once.
    MadeBody(Box<Response<MadeBody>>),
    /// It runs here; whether it may have to be replayed.
    Local { replay: bool },
    /// It runs here, for another node.
    Hop,
    /// Something is needed first.
    Prepare(Need),
}

/// With the feature `axum` the wrapped service gets axum's `Body`, as axum's own middlewares want it, and so does the caller, as `axum::serve` wants it.
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

/// The wrapped service gets the body that came in, in one of the layer's own, and so does the caller the response's. With the feature `axum` these are axum's.
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
        if shared.options.is_endpoint(request.uri().path()) {
            let future = service.call(request.map(|body| hand(ReplayRequestBody::plain(body))));
            return ResponseFuture::untouched(shared.clone(), future);
        }
        let (mut parts, body) = request.into_parts();
        let (plan, token) = plan(shared, &mut parts);
        // The layer of another database may be around this one.
        let outer = parts.extensions.get::<Session>().cloned();
        let session = Session::new(shared.tokens.clone(), token, outer);
        let secure = headers::is_https(&parts);
        match plan {
            RequestPlan::MadeBody(answer) => ResponseFuture::done(shared.clone(), *answer),
            RequestPlan::Local { replay } => {
                let head = replay.then(|| Arc::new(Head::of_client(&parts, &shared.options)));
                let (keep, body) = if replay && !body.is_end_stream() {
                    let keep = Keep::new(body, &shared.options.budget);
                    (Some(keep.clone()), kept(keep))
                } else {
                    (None, hand(ReplayRequestBody::plain(body)))
                };
                let run = LocalRun { session, secure, replay: head.map(|head| (head, keep)) };
                ResponseFuture::local(shared.clone(), service, parts, body, run)
            }
            RequestPlan::Hop => {
                let body = if body.is_end_stream() {
                    ReplayRequestBody::plain(body)
                } else {
                    ReplayRequestBody::to_its_end(Keep::new(body, &shared.options.budget))
                };
                let run = LocalRun { session, secure, replay: None };
                ResponseFuture::local(shared.clone(), service, parts, hand(body), run)
            }
            RequestPlan::Prepare(need) => {
                let head = Arc::new(Head::of_client(&parts, &shared.options));
                let replay = matches!(need, Need::Applied(_)).then(|| head.clone());
                let body = Keep::new(body, &shared.options.budget);
                let resume = Resume { service, body: kept, parts, session, secure, replay };
                ResponseFuture::prepare(shared.clone(), need, head, body, resume)
            }
        }
    }
}

fn plan(shared: &LayerShared, parts: &mut Parts) -> (RequestPlan, Option<Token>) {
    // Few of a client's requests have it; then it was made up, or it is a node's.
    if let Some(value) = parts.headers.remove(HOP) {
        parts.extensions.insert(Came(value));
    }
    headers::strip_reserved(&mut parts.headers);
    let options = &shared.options;
    let primary = shared.node.roles.borrow().role == Role::Primary;
    if let Some(Came(value)) = parts.extensions.get::<Came>()
        && let Some((hop, text)) = verified(shared, parts, value)
    {
        if hop.from == shared.node.me.node || hop.count > HOPS_MAX {
            return (answer(shared, Reason::Loop), None);
        }
        if !primary {
            return (misdirected(shared, text), None);
        }
        // The app sees the same on every node, however it was asked.
        if !parts.headers.contains_key(HOST)
            && let Some(host) =
                parts.uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok())
        {
            parts.headers.insert(HOST, host);
        }
        return (RequestPlan::Hop, request_token(shared, parts));
    }
    let upgrade = headers::upgrade(parts, &options.protocols).is_some();
    if parts.method == Method::CONNECT && !upgrade {
        return (answer(shared, Reason::Method), None);
    }
    let token = request_token(shared, parts);
    if primary {
        return (RequestPlan::Local { replay: false }, token);
    }
    let plan = match options.route(parts) {
        Route::Local => RequestPlan::Local { replay: false },
        _ if upgrade && options.upgrades == Upgrades::Refuse => answer(shared, Reason::Upgrade),
        Route::Primary => RequestPlan::Prepare(Need::Primary),
        Route::LocalThenReplay if upgrade && options.upgrades == Upgrades::Primary => {
            RequestPlan::Prepare(Need::Primary)
        }
        Route::LocalThenReplay => match &token {
            Some(token) => RequestPlan::Prepare(Need::Applied(token.txid())),
            None => RequestPlan::Local { replay: true },
        },
    };
    (plan, token)
}

fn answer(shared: &LayerShared, reason: Reason) -> RequestPlan {
    RequestPlan::MadeBody(Box::new(failure(shared, reason)))
}

/// A hop whose proof holds; any other counts as a request from outside.
fn verified<'a>(shared: &LayerShared, parts: &Parts, value: &'a http::HeaderValue) -> Option<(Hop, &'a str)> {
    let target = target(parts, &shared.options);
    let about =
        About { keys: &shared.node.keys, tag: shared.tokens.tag(), method: &parts.method, target: &target };
    let hop = Hop::verify(value, about);
    if hop.is_none() {
        tracing::debug!("a hop proof does not hold; the request counts as one from outside");
    }
    hop.zip(value.to_str().ok())
}

/// Tells another node who the primary is, before a byte of the body is read.
fn misdirected(shared: &LayerShared, hop: &str) -> RequestPlan {
    let hint = {
        let state = shared.node.roles.borrow();
        let url = state.primary.as_ref().filter(|p| p.node != shared.node.me.node);
        Hint { epoch: state.epoch, url: url.map_or_else(String::new, |p| p.addresses.app.clone()) }
    };
    // Not through the app's own failure responses: this one is for a node.
    let mut response =
        Failure::new(Reason::Misdirected).response().map(|words| MadeBody::Own(Full::new(words)));
    if let Some(value) = hint.value(&shared.node.keys, hop) {
        response.headers_mut().insert(PRIMARY, value);
    }
    RequestPlan::MadeBody(Box::new(response))
}

/// The newest valid token of the request's headers and cookies. Numbers of two branches say nothing of what is newer: one that is lost comes last, and one
/// that is not known here first.
fn request_token(shared: &LayerShared, parts: &Parts) -> Option<Token> {
    let name = shared.options.cookie.name.as_ref();
    let cookies = name.into_iter().flat_map(|name| headers::cookies(&parts.headers, name));
    let valid = headers::tokens(&parts.headers).chain(cookies).filter_map(|text| shared.tokens.verify(text));
    let rank = |token: &Token| {
        let place = shared.node.applied.place(token.txid());
        (place != Place::Lost, place == Place::Unknown, token.txid())
    };
    valid.max_by_key(rank)
}

/// Keeps the promise that the layer works where axum's `Router::layer` does.
const _: () = {
    const fn shareable<T: Send + Sync + Clone + 'static>() {}
    shareable::<super::ReplayLayer>();
    shareable::<ReplayService<Infallible>>();
};
