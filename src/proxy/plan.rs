//! The plan of a request: what its head, the routes and this node's role make of it.

use http::header::HOST;
use http::request::Parts;
use http::{HeaderValue, Method, Response};
use http_body_util::Full;

use crate::proxy::body::MadeBody;
use crate::proxy::failure::{Failure, Reason};
use crate::proxy::head::target;
use crate::proxy::headers::{self, HOP, PRIMARY};
use crate::proxy::hop::{About, Came, HOPS_MAX, Hint, Hop};
use crate::proxy::locate::other_primary;
use crate::proxy::route::Route;
use crate::proxy::shared::{LayerShared, Upgrades, failure};
use crate::token::Token;
use crate::txid::{Place, Txid};

/// The way of a request.
pub(super) enum RequestPlan {
    /// It is answered at once.
    Answered(Box<Response<MadeBody>>),
    /// It runs here; whether it may have to be replayed.
    Local { replay: bool },
    /// It runs here, for another node, which sent this hop.
    Hop(String),
    /// Something is needed first.
    Prepare(Need),
}

/// What a request lacks before it can run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need {
    /// The primary.
    Primary,
    /// The transaction of its token.
    Applied(Txid),
}

/// Looks at a request's head, and takes out of it what only nodes may say to each other.
pub(super) fn plan(shared: &LayerShared, parts: &mut Parts) -> (RequestPlan, Option<Token>) {
    // Few of a client's requests have it; then it was made up, or it is a node's.
    if let Some(value) = parts.headers.remove(HOP) {
        parts.extensions.insert(Came(value));
    }
    headers::strip_reserved(&mut parts.headers);
    let options = &shared.options;
    let leads = shared.node.leads();
    if let Some(Came(value)) = parts.extensions.get::<Came>()
        && let Some((hop, text)) = verified(shared, parts, value)
    {
        if hop.from == shared.node.me.node || hop.count > HOPS_MAX {
            return (answer(shared, Reason::Loop), None);
        }
        // A request that comes from a later epoch is not for the primary of this one. Only a node
        // that leads hears of it: one that is about to lead in that epoch has taken it itself.
        if !leads || shared.node.hear_aside(hop.epoch.number()) {
            return (RequestPlan::Answered(Box::new(misdirected(shared, text))), None);
        }
        let text = text.to_owned();
        // The app sees the same on every node, however it was asked.
        if !parts.headers.contains_key(HOST)
            && let Some(host) =
                parts.uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok())
        {
            parts.headers.insert(HOST, host);
        }
        return (RequestPlan::Hop(text), request_token(shared, parts));
    }
    let upgrade = headers::upgrade(parts, &options.protocols).is_some();
    if parts.method == Method::CONNECT && !upgrade {
        return (answer(shared, Reason::Method), None);
    }
    let token = request_token(shared, parts);
    // With the token of a later epoch another node leads already, or this one's history was
    // restored. The election finds out which; the request waits.
    let leads =
        leads && !token.as_ref().is_some_and(|token| shared.node.hear_aside(token.txid().epoch().number()));
    if leads && shared.node.lease.fixed {
        return (RequestPlan::Local { replay: false }, token);
    }
    let plan = match options.route(parts) {
        Route::Local => RequestPlan::Local { replay: false },
        // When the lease ends before the handler's first write, the next primary has the request.
        _ if leads => RequestPlan::Local { replay: true },
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
    RequestPlan::Answered(Box::new(failure(shared, reason)))
}

/// A hop whose proof holds; any other counts as a request from outside.
fn verified<'a>(shared: &LayerShared, parts: &Parts, value: &'a HeaderValue) -> Option<(Hop, &'a str)> {
    let target = target(parts, &shared.options);
    let about =
        About { keys: &shared.node.keys, tag: shared.tokens.tag(), method: &parts.method, target: &target };
    let hop = Hop::verify(value, about);
    if hop.is_none() {
        tracing::debug!("a hop proof does not hold; the request counts as one from outside");
    }
    hop.zip(value.to_str().ok())
}

/// Tells another node who the primary is.
pub(super) fn misdirected(shared: &LayerShared, hop: &str) -> Response<MadeBody> {
    let hint = {
        let state = shared.node.roles.borrow();
        let url = other_primary(&state, shared);
        Hint { epoch: state.epoch, url: url.map_or_else(String::new, |p| p.addresses.app.clone()) }
    };
    // Not through the app's own failure responses: this one is for a node.
    let mut response =
        Failure::new(Reason::Misdirected).response().map(|words| MadeBody::Own(Full::new(words)));
    if let Some(value) = hint.value(&shared.node.keys, hop) {
        response.headers_mut().insert(PRIMARY, value);
    }
    response
}

/// The newest valid token of the request's headers and cookies. Numbers of two branches say nothing
/// of what is newer: one that is lost comes last, and one that is not known here first.
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
