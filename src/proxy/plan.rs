//! The plan of a request: what its head, the routes and this node's role make of it.

use http::header::HOST;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Response};
use http_body_util::Full;

use crate::context::RunningRequest;
use crate::proxy::app::CameByChannel;
use crate::proxy::body::MadeBody;
use crate::proxy::failure::{Failure, Reason};
use crate::proxy::forwarded::{self, Forwarded};
use crate::proxy::head::target;
use crate::proxy::headers::{self, HOP, PRIMARY};
use crate::proxy::hop::{About, Came, HOPS_MAX, Hint, Hop};
use crate::proxy::locate::other_primary;
use crate::proxy::origin;
use crate::proxy::route::{Route, is_safe};
use crate::proxy::shared::{LayerShared, Options, Upgrades, failure};
use crate::status::Addresses;
use crate::token::Token;
use crate::txid::{Place, Txid};

/// The way of a request.
pub(super) enum RequestPlan {
    /// It is answered at once.
    Answered(Box<Response<MadeBody>>),
    /// It runs here; whether it may have to be replayed, and whether it is of the kind that writes,
    /// by whatever connection, where this node is the primary. Counted where it runs here because
    /// this node is the primary.
    Local { replay: bool, writes: bool, running: Option<RunningRequest> },
    /// It runs here, for another node, which sent this hop.
    Hop(String, RunningRequest),
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
    /// A node that can read its token: this one is a follower.
    TokenRead,
}

/// Looks at a request's head, and takes out of it what only nodes may say to each other. `keeps`:
/// who sends the request on can keep all of its body.
pub(super) fn plan(shared: &LayerShared, parts: &mut Parts, keeps: bool) -> (RequestPlan, Option<Token>) {
    let options = &shared.options;
    take_hop(parts, options);
    if may_be_hop(shared, parts)
        && let Some(Came { value, told, .. }) = parts.extensions.get::<Came>().cloned()
        && let Some((hop, text)) = verified(shared, parts, &value)
    {
        forwarded::arrive(parts, Forwarded::of(&hop));
        parts.headers.extend(told);
        if hop.from == shared.node.me.node || hop.count > HOPS_MAX {
            return (answer(shared, Reason::Loop), None);
        }
        // A request that comes from a later epoch is not for the primary of this one. Only a node
        // that leads hears of it: one that is about to lead in that epoch has taken it itself.
        let running = shared.node.request().filter(|_| !shared.node.hear_aside(hop.epoch.number()));
        let plan = match running {
            Some(running) => RequestPlan::Hop(text.to_owned(), running),
            // It came while the lease is being handed over, and the sender may not have the
            // beginning of the body any more: it waits here, and goes on from here.
            None if !keeps && shared.node.leads() => RequestPlan::Prepare(Need::Primary),
            None => return (RequestPlan::Answered(Box::new(misdirected(shared, text))), None),
        };
        // The app sees the same on every node, however it was asked.
        if !parts.headers.contains_key(HOST)
            && let Some(host) =
                parts.uri.authority().and_then(|host| HeaderValue::from_str(host.as_str()).ok())
        {
            parts.headers.insert(HOST, host);
        }
        return (plan, request_token(shared, parts));
    }
    origin::clean(parts, options);
    let upgrade = headers::upgrade(parts, &options.protocols).is_some();
    if parts.method == Method::CONNECT && !upgrade {
        return (answer(shared, Reason::Method), None);
    }
    let token = request_token(shared, parts);
    // With the token of a later epoch another node leads already, or this one's history was
    // restored. The election finds out which; the request waits.
    let leads = shared.node.leads()
        && !token.as_ref().is_some_and(|token| shared.node.hear_aside(token.txid().epoch().number()));
    let route = options.route(parts);
    let writes = leads && (route == Route::Primary || !is_safe(&parts.method) && !upgrade);
    let here = |replay| RequestPlan::Local { replay, writes, running: None };
    if leads && shared.node.lease.fixed {
        return (here(false), token);
    }
    let plan = match route {
        Route::Local => here(false),
        Route::LocalThenReplay if upgrade && options.upgrades == Upgrades::Primary => {
            primary(shared, upgrade, leads)
        }
        Route::Primary => primary(shared, upgrade, leads),
        // What only reads runs on a primary that hands its lease over, too. A handler that writes
        // there too late is replayed.
        Route::LocalThenReplay if leads => here(true),
        Route::LocalThenReplay if upgrade && options.upgrades == Upgrades::Refuse => {
            answer(shared, Reason::Upgrade)
        }
        Route::LocalThenReplay => match &token {
            Some(token) => RequestPlan::Prepare(Need::Applied(token.txid())),
            None if tokens(shared, parts).any(|text| shared.tokens.is_unread(text)) => {
                RequestPlan::Prepare(Need::TokenRead)
            }
            None => here(true),
        },
    };
    (plan, token)
}

/// Takes out of the headers what only nodes may say. A hop stays, in the extensions.
fn take_hop(parts: &mut Parts, options: &Options) {
    // Few of a client's requests have it; then it was made up, or it is a node's.
    if let Some(value) = parts.headers.remove(HOP) {
        let came = Came { value, peer: origin::connected(parts, options), told: HeaderMap::new() };
        parts.extensions.insert(came);
    }
    headers::strip_reserved(&mut parts.headers);
}

/// The plan for what has to run on the primary.
fn primary(shared: &LayerShared, upgrade: bool, leads: bool) -> RequestPlan {
    match shared.node.request().filter(|_| leads) {
        // When the lease ends before the handler's first write, the next primary has the request.
        Some(running) => RequestPlan::Local { replay: true, writes: true, running: Some(running) },
        None if upgrade && shared.options.upgrades == Upgrades::Refuse => answer(shared, Reason::Upgrade),
        None => RequestPlan::Prepare(Need::Primary),
    }
}

fn answer(shared: &LayerShared, reason: Reason) -> RequestPlan {
    RequestPlan::Answered(Box::new(failure(shared, reason)))
}

/// Whether a hop of the request can be a node's. Where nodes speak on the private channel, nothing
/// that came another way is.
fn may_be_hop(shared: &LayerShared, parts: &Parts) -> bool {
    !shared.app.is_given() || shared.options.clear || parts.extensions.get::<CameByChannel>().is_some()
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
        let primary = other_primary(&state, shared).map(|primary| primary.addresses.clone());
        let Addresses { app: url, replication, .. } = primary.unwrap_or_default();
        Hint { epoch: state.epoch, url, replication }
    };
    // Not through the app's own failure responses: this one is for a node.
    let mut response =
        Failure::new(Reason::Misdirected).response().map(|words| MadeBody::Own(Full::new(words)));
    if let Some(value) = hint.value(&shared.node.keys, hop) {
        response.headers_mut().insert(PRIMARY, value);
    }
    response
}

/// What may be tokens in the request's headers and cookies.
fn tokens<'a>(shared: &'a LayerShared, parts: &'a Parts) -> impl Iterator<Item = &'a str> {
    let name = shared.options.cookie.name.as_ref();
    let cookies = name.into_iter().flat_map(|name| headers::cookies(&parts.headers, name));
    headers::tokens(&parts.headers).chain(cookies)
}

/// The newest valid token of the request's headers and cookies. Numbers of two branches say nothing
/// of what is newer: one that is lost comes last, and one that is not known here first.
fn request_token(shared: &LayerShared, parts: &Parts) -> Option<Token> {
    let valid = tokens(shared, parts).filter_map(|text| shared.tokens.verify(text));
    let rank = |token: &Token| {
        let place = shared.node.applied.place(token.txid());
        (place != Place::Lost, place == Place::Unknown, token.txid())
    };
    valid.max_by_key(rank)
}
