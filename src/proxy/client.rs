//! Requests to the primary by callers that are no request's handler.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Empty;
use tower::Service;

use crate::proxy::BoxError;
use crate::proxy::body::ReplayResponseBody;
use crate::proxy::failure::{Failure, Outcome};
use crate::proxy::forward::{Sender, Verdict, forward};
use crate::proxy::head::Head;
use crate::proxy::headers::{strip_reserved, tokens};
use crate::proxy::replay_body::Keep;
use crate::proxy::route::is_safe;
use crate::proxy::shared::LayerShared;
use crate::session;

/// A tower service that sends requests to the primary's application, wherever that is. It is for
/// jobs, WebSocket handlers and everything else on a replica that has to write.
/// [`Db::primary_client`](crate::Db::primary_client) makes it.
///
/// Of a request's URI path and query count. It goes the same way as a client's request that the
/// replay layer forwards. The client holds it for some seconds while there is no primary, sends it
/// once unless its method is safe, and streams both bodies. On the primary itself the request goes
/// to this node's own application address.
///
/// It has no client. With the feature `axum` a request with `ConnectInfo<SocketAddr>` in its
/// extensions is sent on as one of that client, from any other node than the primary.
///
/// When the primary's answer carries a token, the client tells the [`Session`](crate::Session) of
/// the calling task. The response that is being made there carries the token on. Other callers read
/// it by [`Db::verify_token`](crate::Db::verify_token). On a follower
/// ([`Config::follower_secret`](crate::Config::follower_secret)), which can't read tokens, the
/// handler passes the answer's header `replite-token` on itself.
///
/// ```
/// use bytes::Bytes;
/// use http_body_util::Full;
/// use replite::{Db, Outcome};
/// use tower::ServiceExt;
///
/// async fn report(db: &Db, text: &str) -> Result<(), http::Error> {
///     let body = Full::new(Bytes::copy_from_slice(text.as_bytes()));
///     let request = http::Request::post("/api/reports").body(body)?;
///     match db.primary_client().oneshot(request).await {
///         Ok(response) => println!("{}", response.status()),
///         Err(failure) if failure.outcome == Outcome::NotExecuted => println!("later: {failure}"),
///         Err(failure) => println!("it may have arrived: {failure}"),
///     }
///     Ok(())
/// }
/// # let _ = report;
/// ```
#[derive(Clone)]
pub struct PrimaryClient {
    shared: Arc<LayerShared>,
}

impl PrimaryClient {
    pub(super) fn new(shared: Arc<LayerShared>) -> PrimaryClient {
        PrimaryClient { shared }
    }
}

impl<B> Service<Request<B>> for PrimaryClient
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<ReplayResponseBody<Empty<Bytes>>>;
    /// What is known of a request that could not be done: whether it may have been carried out.
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Failure>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let shared = self.shared.clone();
        let (mut parts, body) = request.into_parts();
        strip_reserved(&mut parts.headers);
        let head = Head::of(&parts, &shared.options);
        let body = Keep::new(body, &shared.options.budget, head.client.share);
        Box::pin(async move {
            let effects = !is_safe(&head.method);
            let answer = match forward(&shared, &head, body, Sender::Caller, true).await {
                Verdict::Answered(answer) => *answer,
                Verdict::Failed(reason) => {
                    let failure = Failure::new(reason);
                    if effects && failure.outcome == Outcome::Unknown {
                        session::had_effects();
                    }
                    return Err(failure);
                }
                Verdict::Here(..) => unreachable!("only a client's request runs where it is"),
            };
            if effects {
                session::had_effects();
            }
            // There may be some of other databases beside it.
            if let Some(token) = tokens(answer.headers()).find_map(|text| shared.tokens.verify(text)) {
                session::committed(&shared.node, token.txid());
            }
            Ok(answer.map(ReplayResponseBody::answer))
        })
    }
}

impl fmt::Debug for PrimaryClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrimaryClient").field("database", &self.shared.node.database).finish_non_exhaustive()
    }
}
