//! A connection whose peer forwards requests of the application.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::Body;
use hyper::body::Incoming as HttpBody;
use tower::Service;

use crate::context::NodeContext;
use crate::handshake::{self, FORWARD_PATH, FORWARDS_NOT_SERVED, FORWARDS_SERVED, Knock, Nonce, Refusal};
use crate::net::{Answering, Incoming};
use crate::primary::StreamSender;
use crate::proxy::{AppAnswer, AppDoor, BoxError};
use crate::secret::{PROOF_BYTES, Proved, Rights};
use crate::server::{ReplicationBody, ReplicationService};

/// How long a peer may take for its proof.
const PROOF_TIMEOUT: Duration = Duration::from_secs(2);

/// What is served on one connection: the replication endpoint, and the application once a member
/// has proved that it forwards requests on it.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionService {
    endpoint: ReplicationService,
    forwards: Arc<Forwards>,
}

/// Whether a connection is one for the application's requests.
#[derive(Default, Debug)]
pub(super) struct Forwards(OnceLock<AppDoor>);

impl ConnectionService {
    pub(super) fn new(endpoint: ReplicationService, forwards: Arc<Forwards>) -> ConnectionService {
        ConnectionService { endpoint, forwards }
    }
}

impl Service<Request<HttpBody>> for ConnectionService {
    type Response = Response<ReplicationBody>;
    type Error = BoxError;
    type Future = ConnectionAnswer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<HttpBody>) -> ConnectionAnswer {
        match self.forwards.0.get() {
            None => {
                let response = self.endpoint.answer(request);
                ConnectionAnswer::Endpoint { response: Some(response) }
            }
            Some(app) => {
                // The exchange that the connection began with counts for all of them.
                request.extensions_mut().remove::<Answering>();
                ConnectionAnswer::App { answer: app.answer(request) }
            }
        }
    }
}

/// The answer on such a connection.
pub(crate) enum ConnectionAnswer {
    Endpoint { response: Option<Response<ReplicationBody>> },
    App { answer: AppAnswer },
}

impl Future for ConnectionAnswer {
    type Output = Result<Response<ReplicationBody>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            ConnectionAnswer::Endpoint { response } => match response.take() {
                Some(response) => Poll::Ready(Ok(response)),
                None => Poll::Pending,
            },
            ConnectionAnswer::App { answer } => answer
                .as_mut()
                .poll(cx)
                .map(|answer| answer.map(|response| response.map(ReplicationBody::app))),
        }
    }
}

impl ReplicationService {
    /// Begins with a connection on which a member forwards the application's requests.
    pub(super) fn begin_forwards<B>(
        &self,
        request: Request<B>,
        knock: Knock,
        proved: Proved,
        answering: Option<Answering>,
    ) -> Result<Response<ReplicationBody>, Refusal>
    where
        B: Body + Send + 'static,
    {
        let (Some(forwards), Some(answering)) = (self.forwards.clone(), answering) else {
            return Err(Refusal::Path);
        };
        if !request.uri().path().ends_with(FORWARD_PATH) || request.method() != Method::POST {
            return Err(Refusal::Path);
        }
        self.check(&knock, request.version())?;
        if proved.rights() == Rights::Follower {
            return Err(Refusal::Follower);
        }
        let node = self.shared.node.clone();
        if node.drain.is_cancelled() {
            return Err(Refusal::Stopping);
        }
        let (nonce, (sender, response)) = self.open(&knock, proved)?;
        let (app, upstream) = (self.app.clone(), Incoming::new(request.into_body()));
        let exchange = ForwardExchange { node, app, forwards, knock, nonce, answering };
        self.shared.tracker.spawn(exchange.run(upstream, sender));
        Ok(response)
    }
}

/// The exchange that a connection for forwarded requests begins with. It lasts as long as the
/// connection does, or as this node takes requests on it.
struct ForwardExchange {
    node: Arc<NodeContext>,
    app: AppDoor,
    forwards: Arc<Forwards>,
    knock: Knock,
    nonce: Nonce,
    /// Keeps the connection, and ends it.
    answering: Answering,
}

impl ForwardExchange {
    async fn run(self, mut upstream: Incoming, sender: StreamSender) {
        let keys = &self.node.keys;
        let proof = match tokio::time::timeout(PROOF_TIMEOUT, proof(&mut upstream)).await {
            Ok(Some(proof)) => proof,
            _ => return,
        };
        let Some(proved) = handshake::forwards_hold(&proof, &self.knock, &self.nonce, keys) else {
            tracing::debug!(node = %self.knock.node, "a peer did not prove that it forwards requests");
            return;
        };
        if !self.app.serves() {
            // To its end: one that breaks off takes the word with it.
            if sender.send(Bytes::from_static(&[FORWARDS_NOT_SERVED])).await.is_ok() {
                let _ = sender.finish().await;
            }
            return;
        }
        // Before the word, which the other side waits for.
        let _ = self.forwards.0.set(self.app.clone());
        if sender.send(Bytes::from_static(&[FORWARDS_SERVED])).await.is_err() {
            return;
        }
        tokio::select! {
            // It says no more: what comes is the end.
            _ = upstream.next() => {}
            () = keys.dropped(proved) => {}
            // An application's server, where the endpoint is mounted, waits for its connections.
            () = self.node.drain.cancelled() => {}
        }
        // What is under way on it may end.
        self.answering.end_connection();
    }
}

/// The first bytes of the body, as many as a proof has.
async fn proof(upstream: &mut Incoming) -> Option<[u8; PROOF_BYTES]> {
    let mut proof = Vec::with_capacity(PROOF_BYTES);
    while proof.len() < PROOF_BYTES {
        let bytes = upstream.next().await?.ok()?;
        if proof.len() + bytes.len() > PROOF_BYTES {
            return None;
        }
        proof.extend_from_slice(&bytes);
    }
    proof.try_into().ok()
}
