//! The future of a request: drives its plan, without a box where the request simply runs here.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::header::CONNECTION;
use http::request::Parts;
use http::{HeaderValue, Request, Response, StatusCode};
#[cfg(feature = "axum")]
use http_body::Body;
use http_body_util::Empty;
use pin_project_lite::pin_project;
use tokio::task::futures::TaskLocalFuture;
use tower::Service;

use crate::context::{Counting, RunningRequest};
#[cfg(feature = "axum")]
use crate::proxy::BoxError;
use crate::proxy::body::MadeBody;
use crate::proxy::failure::Reason;
use crate::proxy::forward::{Sender, Verdict};
use crate::proxy::head::Head;
use crate::proxy::needs::heed;
use crate::proxy::plan::{Need, misdirected};
use crate::proxy::replay_body::Keep;
use crate::proxy::reply::{MayWrite, TokenReach, complete, counting};
use crate::proxy::shared::{LayerShared, failure};
use crate::proxy::wait::prepare;
use crate::session::Session;
use crate::txid::Epoch;

pin_project! {
    /// The future of [`ReplayService`](crate::ReplayService).
    ///
    /// Dropping it before it is done drops the handler's future, or closes the connection to the
    /// primary.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        shared: Arc<LayerShared>,
        // The request came in HTTP/1, and the response says when the connection is to be closed.
        http1: bool,
        #[pin]
        state: FutureState<S, B>,
    }
}

const POLLED_AGAIN: &str = "a future must not be polled after it is done";

type Preparing = Pin<Box<dyn Future<Output = Verdict> + Send>>;

pin_project! {
    #[project = StateProj]
    enum FutureState<S, B>
    where
        S: Service<Request<B>>,
    {
        Untouched { #[pin] future: S::Future },
        Local { #[pin] future: TaskLocalFuture<Session, S::Future>, run: LocalRun },
        Counting { counting: Counting, answered: Option<Answered<S::Response>> },
        Prepare { preparing: Preparing, resume: Option<Resume<S, B>> },
        Done { answer: Option<Response<MadeBody>> },
    }
}

/// A request whose handler runs here.
pub(super) struct LocalRun {
    pub(super) session: Session,
    pub(super) secure: bool,
    /// What is needed to send it to the primary after all; no body when it has none.
    pub(super) replay: Option<(Arc<Head>, Option<Keep>)>,
    /// This node was the primary when it began.
    pub(super) led: bool,
    /// The epoch of then.
    pub(super) epoch: Epoch,
    pub(super) writes: MayWrite,
    /// The hop that it came by from another node.
    pub(super) hop: Option<String>,
    /// Counts it where it runs here because this node is the primary, until its token is there.
    pub(super) running: Option<RunningRequest>,
}

/// A handler's response, which waits for its token.
struct Answered<R> {
    response: R,
    session: Session,
    secure: bool,
    reach: TokenReach,
    /// The epoch in which the handler began.
    epoch: Epoch,
    /// Until the token is there, the lease goes to no other node.
    _running: Option<RunningRequest>,
}

/// A request that may run here later.
pub(super) struct Resume<S, B> {
    pub(super) service: S,
    /// Makes the body that the service takes of the one that was kept.
    pub(super) body: fn(Keep) -> B,
    pub(super) parts: Parts,
    pub(super) session: Session,
    pub(super) secure: bool,
    /// It is one for the primary.
    pub(super) writes: bool,
    pub(super) replay: Option<Arc<Head>>,
}

impl<S, B> ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    pub(super) fn untouched(shared: Arc<LayerShared>, future: S::Future) -> Self {
        ResponseFuture { shared, http1: false, state: FutureState::Untouched { future } }
    }

    pub(super) fn done(shared: Arc<LayerShared>, answer: Response<MadeBody>) -> Self {
        ResponseFuture { shared, http1: false, state: FutureState::Done { answer: Some(answer) } }
    }

    pub(super) fn local(shared: Arc<LayerShared>, service: S, parts: Parts, body: B, run: LocalRun) -> Self {
        ResponseFuture { shared, http1: false, state: FutureState::local(service, parts, body, run) }
    }

    pub(super) fn prepare(
        shared: Arc<LayerShared>,
        need: Need,
        head: Arc<Head>,
        body: Keep,
        resume: Resume<S, B>,
    ) -> Self {
        let preparing = Box::pin(prepare(shared.clone(), need, head, body, Sender::Client));
        let state = FutureState::Prepare { preparing, resume: Some(resume) };
        ResponseFuture { shared, http1: false, state }
    }

    /// Where the node drains, the response says that the connection ends.
    pub(super) fn on_http1(self) -> Self {
        ResponseFuture { http1: true, ..self }
    }
}

impl<S, B> FutureState<S, B>
where
    S: Service<Request<B>>,
{
    fn local(mut service: S, mut parts: Parts, body: B, run: LocalRun) -> Self {
        parts.extensions.insert(run.session.clone());
        if let Some(running) = &run.running {
            run.session.set_counted(running.counted());
        }
        let request = Request::from_parts(parts, body);
        // Some services work in `call` already.
        let future = run.session.clone().enter(|| service.call(request));
        FutureState::Local { future: run.session.clone().around(future), run }
    }
}

#[cfg(feature = "axum")]
impl<S, B, RB> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<RB>>,
    RB: Body<Data = Bytes> + Send + 'static,
    RB::Error: Into<BoxError>,
{
    type Output = Result<Response<axum::body::Body>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // A body of axum's own goes through as it is.
        self.poll_with(cx, axum::body::Body::new, axum::body::Body::new)
    }
}

#[cfg(not(feature = "axum"))]
impl<S, B, RB> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<RB>>,
{
    type Output = Result<Response<crate::proxy::ReplayResponseBody<RB>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        use crate::proxy::ReplayResponseBody;

        self.poll_with(cx, ReplayResponseBody::local, ReplayResponseBody::answer)
    }
}

impl<S, B, RB> ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<RB>>,
{
    /// Polls; the functions make the response's body of the wrapped service's, and of the layer's
    /// own.
    fn poll_with<O>(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        local: fn(RB) -> O,
        own: fn(MadeBody) -> O,
    ) -> Poll<Result<Response<O>, S::Error>> {
        let mut response = ready!(self.as_mut().poll_answer(cx, local, own))?;
        let this = self.project();
        if *this.http1 && this.shared.node.is_draining() {
            close_after(&mut response);
        }
        Poll::Ready(Ok(response))
    }

    fn poll_answer<O>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        local: fn(RB) -> O,
        own: fn(MadeBody) -> O,
    ) -> Poll<Result<Response<O>, S::Error>> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProj::Untouched { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(response.map(local)));
                }
                StateProj::Local { future, run } => {
                    let response = ready!(future.poll(cx));
                    let running = run.running.take();
                    let response = heed(this.shared, &run.session, run.led, response?);
                    match replay(this.shared, run) {
                        Some(next) => next,
                        None => {
                            let answered = Answered::new(this.shared, run, running, response);
                            match counting(this.shared, answered.reach) {
                                None => {
                                    let response = answered.complete(this.shared);
                                    return Poll::Ready(Ok(response.map(local)));
                                }
                                Some(counting) => {
                                    FutureState::Counting { counting, answered: Some(answered) }
                                }
                            }
                        }
                    }
                }
                StateProj::Counting { counting, answered } => {
                    let counted = ready!(counting.as_mut().poll(cx));
                    let mut answered = answered.take().expect(POLLED_AGAIN);
                    // For a read what is counted is better than nothing.
                    if !counted && answered.reach != TokenReach::Read {
                        answered.reach = TokenReach::Told;
                    }
                    return Poll::Ready(Ok(answered.complete(this.shared).map(local)));
                }
                StateProj::Prepare { preparing, resume } => {
                    let verdict = ready!(preparing.as_mut().poll(cx));
                    prepared(this.shared, verdict, resume.take())
                }
                StateProj::Done { answer } => {
                    let answer = answer.take().expect(POLLED_AGAIN);
                    return Poll::Ready(Ok(answer.map(own)));
                }
            };
            this.state.set(next);
        }
    }
}

impl<B> Answered<Response<B>> {
    fn new(
        shared: &LayerShared,
        run: &LocalRun,
        running: Option<RunningRequest>,
        response: Response<B>,
    ) -> Answered<Response<B>> {
        // What a spawned task still reads of the body is not kept for it.
        if let Some((_, Some(keep))) = &run.replay {
            keep.release();
        }
        let (session, secure) = (run.session.clone(), run.secure);
        let reach = TokenReach::of(shared, &session, run.writes);
        Answered { response, session, secure, reach, epoch: run.epoch, _running: running }
    }

    fn complete(mut self, shared: &LayerShared) -> Response<B> {
        // Another node may have led meanwhile, without what this handler wrote.
        if self.reach != TokenReach::Read && self.epoch != shared.node.roles.borrow().epoch {
            self.reach = TokenReach::Told;
        }
        let (status, headers) = (self.response.status(), self.response.headers_mut());
        complete(shared, &self.session, self.secure, self.reach, status, headers);
        self.response
    }
}

/// What follows on the way to the primary.
fn prepared<S, B>(shared: &LayerShared, verdict: Verdict, resume: Option<Resume<S, B>>) -> FutureState<S, B>
where
    S: Service<Request<B>>,
{
    if !matches!(verdict, Verdict::Here(..))
        && let Some(resume) = &resume
    {
        resume.session.set_sent();
    }
    let answer = match (verdict, resume) {
        (Verdict::Here(body, running), Some(resume)) => return resume.run(shared, body, running),
        (Verdict::Answered(answer), _) => *answer,
        (Verdict::Failed(reason), _) => failure(shared, reason),
        // The handler ran here already: then this node calls its own application.
        (Verdict::Here(..), None) => failure(shared, Reason::NoPrimary),
    };
    FutureState::Done { answer: Some(answer) }
}

/// Tells the client, or the proxy in front, to open its next connection elsewhere. So none sends a
/// request on a connection that is just being closed.
fn close_after<B>(response: &mut Response<B>) {
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// The way to the primary for a request whose handler needed it: on a replica, or on a primary
/// whose lease ended, or went to another node, meanwhile. None when something was committed here,
/// or may have been, and when another database's layer has sent the request somewhere.
fn replay<S, B>(shared: &Arc<LayerShared>, run: &mut LocalRun) -> Option<FutureState<S, B>>
where
    S: Service<Request<B>>,
{
    let session = &run.session;
    if !session.primary_needed()
        || session.committed_anywhere()
        || session.outcome_unknown()
        || session.sent()
    {
        return None;
    }
    // What a primary's handler says it needs is what it has, unless the lease ends. Where a write
    // was refused, it may be the primary again by now.
    if run.led && !session.refused() && shared.node.takes_requests() {
        return None;
    }
    if let Some(hop) = run.hop.take() {
        // The node that sent it has kept the body.
        return Some(FutureState::Done { answer: Some(misdirected(shared, &hop)) });
    }
    let (head, keep) = run.replay.take()?;
    let body = match keep {
        None => Keep::new(Empty::<Bytes>::new(), &shared.options.budget, None),
        Some(keep) => match keep.recall() {
            Some(body) => body,
            None => return Some(FutureState::Done { answer: Some(failure(shared, Reason::BodyTooLarge)) }),
        },
    };
    session.set_sent();
    let preparing = Box::pin(prepare(shared.clone(), Need::Primary, head, body, Sender::Again));
    Some(FutureState::Prepare { preparing, resume: None })
}

impl<S, B> Resume<S, B> {
    fn run(self, shared: &LayerShared, body: Keep, running: Option<RunningRequest>) -> FutureState<S, B>
    where
        S: Service<Request<B>>,
    {
        let replay = self.replay.map(|head| (head, Some(body.clone())));
        let Resume { service, parts, session, secure, .. } = self;
        let led = shared.node.leads();
        let writes = if self.writes && led { MayWrite::Yes } else { MayWrite::No };
        let epoch = shared.node.roles.borrow().epoch;
        let run = LocalRun { session, secure, replay, led, epoch, writes, hop: None, running };
        FutureState::local(service, parts, (self.body)(body), run)
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResponseFuture(..)")
    }
}
