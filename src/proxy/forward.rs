//! Sending a request to the primary, wherever that turns out to be.

use std::ops::ControlFlow;

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::proxy::BoxError;
use crate::proxy::body::{Answer, Patient};
use crate::proxy::dial::SendError;
use crate::proxy::failure::Reason;
use crate::proxy::headers::{HOP, PRIMARY, strip_answer};
use crate::proxy::hop::{About, HOPS_MAX, Hint, Hop};
use crate::proxy::keep::Keep;
use crate::proxy::layer::Shared;
use crate::proxy::prepare::{Head, Target, Verdict, find};
use crate::proxy::route::is_safe;
use crate::txid::Epoch;

/// Tries on a further connection after one that closed before the request was put on it.
const STALE_MAX: u8 = 3;

/// Sends the request to the primary, holding it while there is none.
pub(super) async fn forward(shared: &Shared, head: &Head, body: Keep) -> Verdict {
    let until = Instant::now() + shared.options.hold;
    let again = u8::from(is_safe(&head.method));
    let mut trip = Trip { shared, head, body, hops: 1, stale: STALE_MAX, again, next: None, avoid: None };
    loop {
        let target = match trip.next.take() {
            Some(target) => target,
            None => match find(shared, until, trip.avoid.as_ref()).await {
                Ok(target) => target,
                Err(reason) => return Verdict::failure(shared, reason),
            },
        };
        let Target::There(epoch, url) = target else { return Verdict::Here(trip.body) };
        if let ControlFlow::Break(verdict) = trip.visit(epoch, url).await {
            return verdict;
        }
    }
}

/// A request on its way, and what may still be tried.
struct Trip<'a> {
    shared: &'a Shared,
    head: &'a Head,
    body: Keep,
    /// The node that is asked now is the first, second, ...
    hops: u8,
    stale: u8,
    /// How often the request may be sent again though it may have run: for safe methods only.
    again: u8,
    /// Where to go next, if that is known already.
    next: Option<Target>,
    /// Who said that it is not the primary, without knowing better.
    avoid: Option<Target>,
}

type Step = ControlFlow<Verdict>;

impl Trip<'_> {
    async fn visit(&mut self, epoch: Epoch, url: String) -> Step {
        let shared = self.shared;
        let about = About {
            keys: &shared.node.keys,
            tag: shared.tokens.tag(),
            method: &self.head.method,
            target: &self.head.target,
        };
        let hop = Hop { count: self.hops, from: shared.node.me.node, epoch }.text(about);
        let request = match request(self.head, &url, &hop) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!(%error, %url, "the primary's app address is of no use");
                return self.fail(Reason::Unreachable);
            }
        };
        let (idle, answer) = (shared.options.idle, shared.options.answer);
        match shared.dialer.send(request, &self.body, idle, answer).await {
            Ok(response) => match hinted(&response, shared, &hop) {
                Some(hint) => self.misdirected(Target::There(epoch, url), epoch, hint),
                None => {
                    self.body.release();
                    ControlFlow::Break(Verdict::Answer(Box::new(relay(shared, response))))
                }
            },
            Err(error) => self.failed(&url, epoch, error),
        }
    }

    /// The node that was asked is not the primary, and has not read the body.
    fn misdirected(&mut self, asked: Target, epoch: Epoch, hint: Hint) -> Step {
        if self.hops == HOPS_MAX {
            return self.fail(Reason::Loop);
        }
        if hint.url.is_empty() {
            // It knows no better: held until this node does.
            self.avoid = Some(asked);
        } else if hint.epoch.number() > epoch.number() {
            self.next = Some(Target::There(hint.epoch, hint.url));
        } else {
            tracing::warn!(?asked, ?hint, "nodes disagree on who the primary is");
            return self.fail(Reason::Loop);
        }
        self.hops += 1;
        self.recall(Reason::BodyTooLarge)
    }

    fn failed(&mut self, url: &str, epoch: Epoch, error: SendError) -> Step {
        let there = || Some(Target::There(epoch, url.to_owned()));
        match error {
            SendError::NotSent(error) if self.stale > 0 => {
                tracing::debug!(%error, %url, "a pooled connection was closed; another is tried");
                self.stale -= 1;
                self.next = there();
                self.recall(Reason::Unreachable)
            }
            SendError::NotSent(error) | SendError::Unreachable(error) => {
                tracing::warn!(error = &*error as &dyn std::error::Error, %url, "the primary can't be reached");
                self.fail(Reason::Unreachable)
            }
            SendError::SlowClient => self.fail(Reason::SlowClient),
            SendError::BadBody(error) => {
                // Not louder: any client can do this.
                tracing::debug!(error = &*error as &dyn std::error::Error, %url, "a request's body broke");
                self.fail(Reason::BadBody)
            }
            SendError::NoAnswer => {
                tracing::warn!(%url, "the primary did not answer in time");
                self.fail(Reason::NoAnswer)
            }
            SendError::Broken(error) => {
                tracing::warn!(error = &*error as &dyn std::error::Error, %url, "the connection to the primary broke");
                if self.again == 0 {
                    return self.fail(Reason::Broken);
                }
                self.again -= 1;
                self.next = there();
                self.recall(Reason::Broken)
            }
        }
    }

    /// Takes the body back for another try.
    fn recall(&mut self, or: Reason) -> Step {
        match self.body.recall() {
            Some(body) => {
                self.body = body;
                ControlFlow::Continue(())
            }
            None => self.fail(or),
        }
    }

    fn fail(&self, reason: Reason) -> Step {
        ControlFlow::Break(Verdict::failure(self.shared, reason))
    }
}

/// The request as the primary gets it.
fn request(head: &Head, app: &str, hop: &str) -> Result<Request<()>, BoxError> {
    let mut request = Request::new(());
    *request.method_mut() = head.method.clone();
    *request.uri_mut() = join(app, &head.target)?;
    *request.version_mut() = Version::HTTP_11;
    let mut headers: HeaderMap = head.headers.clone();
    headers.insert(HOP, HeaderValue::from_str(hop)?);
    *request.headers_mut() = headers;
    Ok(request)
}

/// The app's URL with the request's path and query behind it, byte for byte.
fn join(app: &str, target: &str) -> Result<Uri, BoxError> {
    let base: Uri = app.parse()?;
    let mut parts = base.into_parts();
    let prefix = parts.path_and_query.as_ref().map_or("", |p| p.path()).trim_end_matches('/');
    parts.path_and_query = Some(format!("{prefix}{target}").parse()?);
    Ok(Uri::from_parts(parts)?)
}

/// What a node that is not the primary says about it.
fn hinted(response: &Response<Incoming>, shared: &Shared, hop: &str) -> Option<Hint> {
    if response.status() != StatusCode::MISDIRECTED_REQUEST {
        return None;
    }
    Hint::verify(response.headers().get(PRIMARY)?, &shared.node.keys, hop)
}

/// The primary's response as the client gets it.
fn relay(shared: &Shared, response: Response<Incoming>) -> Response<Answer> {
    let (mut parts, body) = response.into_parts();
    strip_answer(&mut parts.headers);
    // What the client library notes about the connection is not for the app's other layers.
    parts.extensions = http::Extensions::new();
    let events =
        parts.headers.get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"text/event-stream"));
    let idle = (!events).then_some(shared.options.idle);
    Response::from_parts(parts, Answer::Primary(Patient::new(body, idle)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_joined_byte_for_byte() {
        let joined = |app, target| join(app, target).map(|u| u.to_string()).ok();
        let odd = "/a%2Fb/%e4//../x?q=%20+&z";
        assert_eq!(joined("http://h:1", odd), Some(format!("http://h:1{odd}")));
        assert_eq!(joined("http://h:1/", "/a"), Some("http://h:1/a".into()));
        assert_eq!(joined("http://[::1]:1/app/", "/a"), Some("http://[::1]:1/app/a".into()));
        assert!(joined("", "/a").is_none_or(|u| u == "/a"));
        assert_eq!(joined("http://", "/a"), None);
    }
}
