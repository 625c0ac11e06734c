//! Ways to the primary that do not go through this node: a redirect, or an order to the proxy in
//! front.

use http::header::{CACHE_CONTROL, LOCATION};
use http::{HeaderName, HeaderValue, Response, StatusCode};
use http_body_util::Full;

use crate::proxy::body::MadeBody;
use crate::proxy::failure::Outcome;
use crate::proxy::head::Head;
use crate::proxy::headers::OUTCOME;
use crate::proxy::locate::other_primary;
use crate::proxy::replay_body::Keep;
use crate::proxy::shared::{Forwarding, LayerShared};
use crate::status::PeerInfo;

/// The label that names a node's machine.
const MACHINE: &str = "machine";
/// The largest body that Fly's proxy replays, in bytes: 1 MB, says its documentation.
const FLY_BODY_MAX_BYTES: u64 = 1_000_000;
const FLY_REPLAY: HeaderName = HeaderName::from_static("fly-replay");
/// Fly's proxy sets it on what it replays.
const FLY_REPLAY_SRC: HeaderName = HeaderName::from_static("fly-replay-src");

/// The response that sends the request past this node, if it can go that way; else it is forwarded.
pub(super) fn redirect(shared: &LayerShared, head: &Head, body: &Keep) -> Option<Response<MadeBody>> {
    let primary = || other_primary(&shared.node.roles.borrow(), shared).cloned();
    let mut response = match shared.options.forwarding {
        Forwarding::Proxy => return None,
        // A browser's WebSocket does not follow a redirect.
        Forwarding::Redirect if head.upgrade.is_some() => return None,
        Forwarding::Redirect => to_public_address(&primary()?, head)?,
        Forwarding::FlyReplay => fly_replay(&primary()?, head, body)?,
    };
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Some(response)
}

fn to_public_address(primary: &PeerInfo, head: &Head) -> Option<Response<MadeBody>> {
    let base = primary.addresses.public.as_ref()?.trim_end_matches('/');
    let location = HeaderValue::try_from(format!("{base}{}", head.target)).ok()?;
    let mut response = empty(StatusCode::TEMPORARY_REDIRECT);
    response.headers_mut().insert(LOCATION, location);
    Some(response)
}

fn fly_replay(primary: &PeerInfo, head: &Head, body: &Keep) -> Option<Response<MadeBody>> {
    // Here again: the proxy and this node disagree on where the primary is, and must not go in
    // circles.
    if head.headers.contains_key(FLY_REPLAY_SRC) {
        return None;
    }
    body.size_hint().upper().filter(|bytes| *bytes <= FLY_BODY_MAX_BYTES)?;
    let machine = primary.addresses.labels.get(MACHINE)?;
    // Anything else would be read as a further field of the header.
    if machine.is_empty() || !machine.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return None;
    }
    let value = HeaderValue::try_from(format!("instance={machine}")).ok()?;
    // Only a client sees it whose requests do not come through that proxy.
    let mut response = empty(StatusCode::CONFLICT);
    response.headers_mut().insert(FLY_REPLAY, value);
    response.headers_mut().insert(OUTCOME, HeaderValue::from_static(Outcome::NotExecuted.as_str()));
    Some(response)
}

fn empty(status: StatusCode) -> Response<MadeBody> {
    let mut response = Response::new(MadeBody::Own(Full::default()));
    *response.status_mut() = status;
    response
}
