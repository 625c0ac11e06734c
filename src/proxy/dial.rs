//! One request to one node, and what is known when it fails.

use std::error::Error as _;
use std::time::Duration;

use http::{Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioTimer;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::net::{ServerTls, was_refused};
use crate::proxy::body::{Outgoing, ReplayRequestBody};
use crate::proxy::channel::{ChannelLines, LineTarget};
use crate::proxy::connect::{Connector, POOL_IDLE_SECONDS, SendError, Spawn};
use crate::proxy::http2::Http2;
use crate::proxy::idle::IdleTimeoutBody;
use crate::proxy::on_line::OnLine;
use crate::proxy::primary_body::PrimaryBody;
use crate::proxy::replay_body::Keep;

/// Unused connections that are kept to one node.
const POOL_IDLE_MAX: usize = 64;

/// What a node is spoken to in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Protocol {
    Http1,
    Http2,
    /// HTTP/2, and HTTP/1.1 to a node that does not speak it.
    Http2IfSpoken,
}

/// The way on which a request goes to a node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Passage<'a> {
    Http1,
    Http2,
    /// The private channel.
    Channel(&'a ChannelLines, &'a LineTarget),
}

/// The connections to other nodes.
#[derive(Clone, Debug)]
pub(super) struct Dialer {
    http1: Client<Connector, Outgoing>,
    http2: Http2,
    /// After this a request is on a connection, or has failed for want of one.
    pub(super) connect: Duration,
    pub(super) tls: ServerTls,
}

impl Dialer {
    pub(super) fn new(connect: Duration, stop: CancellationToken, tls: ServerTls) -> Dialer {
        let connector = Connector::new(connect, tls.clone());
        let spawn = Spawn::new(stop);
        let http1 = Client::builder(spawn.clone())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(POOL_IDLE_SECONDS))
            .pool_max_idle_per_host(POOL_IDLE_MAX)
            // What may be sent again is decided by `forward`, which knows the method.
            .retry_canceled_requests(false)
            .set_host(false)
            .build(connector.clone());
        Dialer { http1, http2: Http2::new(connector.for_http2(), spawn), connect, tls }
    }

    /// Sends a request and waits for the response's head. What was not taken in of the
    /// body is not touched before a connection stands.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection that the request is on.
    pub(super) async fn send(
        &self,
        head: Request<()>,
        passage: Passage<'_>,
        body: &Keep,
        idle: Duration,
        answer: Duration,
    ) -> Result<(Response<PrimaryBody>, Option<OnLine>), SendError> {
        let outgoing = IdleTimeoutBody::new(ReplayRequestBody::kept(body.clone()), Some(idle));
        let request = head.map(|()| outgoing);
        body.begins();
        let response = async {
            match passage {
                Passage::Http1 => {
                    let sent = self.http1.request(request).await;
                    sent.map(|r| (r.map(PrimaryBody::Network), None)).map_err(sort)
                }
                Passage::Http2 => {
                    let sent = self.http2.request(request).await;
                    sent.map(|r| (r.map(PrimaryBody::Network), None))
                }
                Passage::Channel(lines, to) => {
                    let sent = lines.request(to, self.connect, request).await;
                    sent.map(|(r, on_line)| (r.map(PrimaryBody::Channel), Some(on_line)))
                }
            }
        };
        tokio::pin!(response);
        loop {
            // The deadline comes nearer when the body ends, but never nearer than `answer` from
            // then.
            let due = body.deadline(idle, answer).min(Instant::now() + answer);
            tokio::select! {
                biased;
                got = &mut response => return got.map_err(|e| blame(e, body, idle)),
                () = tokio::time::sleep_until(due) => {}
            }
            if body.deadline(idle, answer) <= Instant::now() {
                return Err(if body.starving() { SendError::SlowClient } else { SendError::NoAnswer });
            }
        }
    }
}

fn sort(error: hyper_util::client::legacy::Error) -> SendError {
    if error.is_connect() || was_refused(&error) {
        return SendError::Unreachable(error.into());
    }
    let source = error.source().and_then(|s| s.downcast_ref::<hyper::Error>());
    // So hyper calls a request that it hands back unwritten.
    if source.is_some_and(hyper::Error::is_canceled) {
        return SendError::NotBegun(error.into());
    }
    SendError::Broken(error.into())
}

/// A connection may have broken because of what the client sent, or did not send.
fn blame(error: SendError, body: &Keep, idle: Duration) -> SendError {
    let SendError::Broken(error) = error else { return error };
    if body.slow() || body.starving() && body.deadline(idle, idle) <= Instant::now() {
        return SendError::SlowClient;
    }
    if body.failed() {
        return SendError::BadBody(error);
    }
    SendError::Broken(error)
}
