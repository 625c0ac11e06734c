//! What happens before a request runs: waiting for its token's transaction, holding while there is no primary.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::header::{COOKIE, HOST, TE};
use http::request::Parts;
use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Method, Response, Version};
use http_body_util::Full;
use tokio::time::Instant;

use crate::error::Error;
use crate::peer::Incarnation;
use crate::proxy::body::MadeBody;
use crate::proxy::dial::Protocol;
use crate::proxy::failure::{Failure, Reason};
use crate::proxy::forward::{Sender, forward};
use crate::proxy::headers;
use crate::proxy::hop::Came;
use crate::proxy::layer::{LayerShared, Options};
use crate::proxy::replay_body::Keep;
use crate::proxy::tunnel::Upgrade;
use crate::status::{Role, RoleState};
use crate::txid::{Epoch, Txid};

/// A request without its body, as it is sent to the primary.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) method: Method,
    /// Path and query, byte for byte.
    pub(super) target: String,
    pub(super) headers: HeaderMap,
    /// Set when the request asks for another protocol, which the primary is to speak.
    pub(super) upgrade: Option<Upgrade>,
    /// What the primary is spoken to in.
    pub(super) protocol: Protocol,
    /// Whether every server on its way reads it alike; else it is not sent on.
    pub(super) definite: bool,
    /// How often it was sent on before, by any node and layer.
    pub(super) came: u8,
}

impl Head {
    pub(super) fn of(parts: &Parts, options: &Options) -> Head {
        let mut head = Head {
            method: parts.method.clone(),
            target: target(parts, options),
            headers: parts.headers.clone(),
            upgrade: None,
            protocol: match options.http2 {
                true => Protocol::Http2,
                false if wants_trailers(parts) => Protocol::Http2IfSpoken,
                false => Protocol::Http1,
            },
            definite: is_definite(parts, options),
            came: parts.extensions.get::<Came>().map_or(0, Came::count),
        };
        headers::strip_hop_by_hop(&mut head.headers);
        // HTTP/2 has the host in the URI. A client that says both is left to the app, which sees the same on every node.
        if !head.headers.contains_key(HOST)
            && let Some(authority) = parts.uri.authority()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            head.headers.insert(HOST, host);
        }
        join_cookies(&mut head.headers);
        let client: Option<IpAddr> = options.client_ip.as_ref().and_then(|ip| ip(parts));
        let scheme: Option<&Scheme> = parts.uri.scheme();
        headers::add_forwarded(&mut head.headers, client, scheme);
        head
    }

    /// The head of a request for another protocol.
    fn of_upgrade(parts: &Parts, options: &Options, protocol: &str) -> Head {
        let mut head = Head::of(parts, options);
        head.upgrade = Upgrade::of(parts, protocol);
        if let Some(upgrade) = &head.upgrade {
            head.method = upgrade.method(&head.method);
            // An upgrade is a matter of HTTP/1.1.
            head.protocol = Protocol::Http1;
            upgrade.ask(&mut head.headers);
        }
        head
    }

    /// The head of a client's request, whether or not it asks for another protocol.
    pub(super) fn of_client(parts: &Parts, options: &Options) -> Head {
        match headers::upgrade(parts, &options.protocols) {
            Some(protocol) => Head::of_upgrade(parts, options, protocol),
            None => Head::of(parts, options),
        }
    }
}

/// gRPC, and whoever else asks for trailers in HTTP/2, gets ones that nobody announced, which HTTP/1.1 has no place for. A server that was asked in
/// HTTP/2 mostly speaks it on the primary, too.
fn wants_trailers(parts: &Parts) -> bool {
    parts.version == Version::HTTP_2 && parts.headers.contains_key(TE)
}

/// Whether a request names one resource at one host, so that every server on its way reads it alike.
fn is_definite(parts: &Parts, options: &Options) -> bool {
    parts.headers.get_all(HOST).iter().nth(1).is_none() && target(parts, options).starts_with('/')
}

/// Path and query as they came.
pub(super) fn target(parts: &Parts, options: &Options) -> String {
    let original = options.original_uri.as_ref().and_then(|uri| uri(parts));
    let uri = original.as_ref().unwrap_or(&parts.uri);
    // A URI with a host alone has no path in HTTP/2; in HTTP/1.1 that is the form of CONNECT.
    let none = if uri.scheme().is_some() { "/" } else { "" };
    uri.path_and_query().map_or(none, |target| target.as_str()).to_owned()
}

/// HTTP/2 clients may split cookies over several headers, which HTTP/1.1 has no place for.
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// What a request lacks before it can run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need {
    /// The primary.
    Primary,
    /// The transaction of its token.
    Applied(Txid),
}

/// What becomes of a request.
pub(super) enum Verdict {
    /// It can run here, with this body.
    Here(Keep),
    /// It is answered.
    MadeBody(Box<Response<MadeBody>>),
    /// It could not be done.
    Failed(Reason),
}

/// The response to a request that could not be done.
pub(super) fn failure(shared: &LayerShared, reason: Reason) -> Response<MadeBody> {
    let failure = Failure::new(reason);
    tracing::debug!(?reason, status = failure.status.as_u16(), "the replay layer answers for the app");
    shared.options.failure(failure).map(|words| MadeBody::Own(Full::new(words)))
}

/// Brings a request to where it can run.
pub(super) async fn prepare(shared: Arc<LayerShared>, need: Need, head: Arc<Head>, body: Keep) -> Verdict {
    let held_until = Instant::now() + shared.options.hold_timeout;
    if let Need::Applied(txid) = need {
        if applied(&shared, txid, shared.options.wait_timeout).await {
            return Verdict::Here(body);
        }
        // While there is nobody to ask, it waits on for whichever comes first: a primary that goes down in good order has sent all that it
        // acknowledged, but for what took it too long.
        let left = held_until.saturating_duration_since(Instant::now());
        let found = tokio::select! {
            biased;
            found = find(&shared, held_until, None) => found.is_ok(),
            true = applied(&shared, txid, left) => return Verdict::Here(body),
        };
        if !found {
            return Verdict::Failed(Reason::NotApplied);
        }
        tracing::debug!(%txid, "a read asks the primary, because this node is behind");
    }
    forward(&shared, &head, body, Sender::Client, matches!(need, Need::Applied(_))).await
}

/// Whether a token's transaction is here within the limit, or will never be.
async fn applied(shared: &LayerShared, txid: Txid, limit: Duration) -> bool {
    match shared.node.applied.wait_for(txid, limit).await {
        Ok(()) => true,
        Err(Error::Lost { .. }) => {
            tracing::debug!(%txid, "a token's transaction was lost with its branch; it counts as absent");
            true
        }
        Err(_) => false,
    }
}

/// Where the primary is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum RequestTarget {
    /// This node.
    Here,
    /// Another node's app.
    There {
        url: String,
        /// The newest epoch known when that was learnt.
        epoch: Epoch,
        /// The process that is the primary; none where the address is what another node said. One that starts again is another one.
        incarnation: Option<Incarnation>,
    },
}

/// Waits until there is a primary, at most until the instant. A target to avoid counts as none: it has said that it is not the
/// primary.
pub(super) async fn find(
    shared: &LayerShared,
    until: Instant,
    avoid: Option<&RequestTarget>,
) -> Result<(), Reason> {
    if look(shared, avoid).is_some() {
        return Ok(());
    }
    let _held = Held::enter(&shared.held, shared.options.held_max).ok_or(Reason::TooManyHeld)?;
    let mut roles = shared.node.roles.subscribe();
    let mut found = false;
    let seen = roles.wait_for(|state| {
        found = look_in(state, shared, avoid).is_some();
        found || state.role == Role::Stopped
    });
    tokio::select! {
        _ = tokio::time::timeout_at(until, seen) => {}
        // What is held was not sent to anybody, so that its client can safely try another node.
        () = shared.node.drain.cancelled() => {}
    }
    if found { Ok(()) } else { Err(Reason::NoPrimary) }
}

/// Waits before the primary is tried again, which could not be reached: less when something else is heard of it.
pub(super) async fn wait(shared: &LayerShared, until: Instant, pause: Duration) -> Result<(), Reason> {
    let _held = Held::enter(&shared.held, shared.options.held_max).ok_or(Reason::TooManyHeld)?;
    let mut roles = shared.node.roles.subscribe();
    tokio::select! {
        () = tokio::time::sleep_until(until.min(Instant::now() + pause)) => {}
        // The sender is the node's own.
        _ = roles.changed() => {}
        () = shared.node.drain.cancelled() => return Err(Reason::Unreachable),
    }
    if Instant::now() < until { Ok(()) } else { Err(Reason::Unreachable) }
}

/// The primary, as far as it is known.
pub(super) fn look(shared: &LayerShared, avoid: Option<&RequestTarget>) -> Option<RequestTarget> {
    look_in(&shared.node.roles.borrow(), shared, avoid)
}

fn look_in(state: &RoleState, shared: &LayerShared, avoid: Option<&RequestTarget>) -> Option<RequestTarget> {
    if state.role == Role::Primary {
        return Some(RequestTarget::Here);
    }
    let primary = state.primary.as_ref().filter(|p| p.node != shared.node.me.node)?;
    let (url, incarnation) = (primary.addresses.app.clone(), Some(primary.incarnation));
    let there = RequestTarget::There { url, epoch: state.epoch, incarnation };
    (avoid != Some(&there)).then_some(there)
}

/// A place among the requests that are held.
struct Held<'a>(&'a AtomicUsize);

impl<'a> Held<'a> {
    fn enter(held: &'a AtomicUsize, max: usize) -> Option<Held<'a>> {
        let entered = held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < max).then_some(n + 1));
        // Made only now: one that is dropped gives a place back.
        entered.is_ok().then(|| Held(held))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_a_place_gives_none_back() {
        let held = AtomicUsize::new(0);
        let places: Vec<_> = (0..3).map(|_| Held::enter(&held, 2)).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        assert_eq!(held.load(Ordering::Relaxed), 2, "the third took none");
        drop(places);
        assert_eq!(held.load(Ordering::Relaxed), 0);
        assert!(Held::enter(&held, 2).is_some());
    }
}
