//! What the parts of the replay layer share: its options, and what all its services hold in common.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Response, Uri};
use http_body_util::Full;

use crate::context::NodeContext;
use crate::proxy::app::AppDoor;
use crate::proxy::body::MadeBody;
use crate::proxy::budget::Budget;
use crate::proxy::dial::Dialer;
use crate::proxy::failure::{Failure, Reason};
use crate::proxy::primary_body::LastingResponses;
use crate::proxy::proxies::Proxies;
use crate::proxy::route::{Route, is_below};
use crate::proxy::shares::Shares;
use crate::report::Condition;
use crate::token::Tokens;

/// For how long a request is held where who is primary is fixed.
const HOLD_TIMEOUT: Duration = Duration::from_secs(5);
/// And with a lease: for so much longer than that counts. Others take it over then, which takes
/// them a moment.
pub(super) const HOLD_BEYOND_LEASE: Duration = Duration::from_secs(3);

/// Which responses carry a token.
///
/// ```
/// use replite::{Db, ReplayLayer, SessionTokens};
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer().session(SessionTokens::Monotonic)
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum SessionTokens {
    /// Those of requests that committed, or waited for a transaction: clients read their own
    /// writes.
    ///
    /// The session knows only of commits through [`Db`](crate::Db). So a response of the primary
    /// also names what any other connection has committed by the time that its head came out of
    /// the handler: an actor's, a pool's, another program's. It does so, whatever its status, where
    /// the request was not safe, was sent on by another node, or has
    /// [`Route::Primary`](crate::Route::Primary). Where no other connection wrote, that costs a
    /// look at SQLite's shared memory. Else the response waits until the commit is on the disk and
    /// counted, for at most five seconds. After that, and where the lease or replication ended
    /// meanwhile, it names only what the session knows.
    ///
    /// For a GET that writes in such a way on the primary itself, give it that route, or call
    /// [`Session::observe`](crate::Session::observe) with the `Db`. What is committed after the
    /// head, as by a body that streams, no token of that response names.
    #[default]
    Writes,
    /// Those of reads, too, when what they read is newer than the request's token: clients never go
    /// back in time. A response whose handler may have read a commit that is not on the primary's
    /// disk yet waits for that, for at most five seconds; after that, and where replication has
    /// stopped, its token names what came before. A primary whose lease has ended names what was
    /// read, too. If no other node ever has that, the client is told that it was lost
    /// ([`Session::lost_token`](crate::Session::lost_token)).
    Monotonic,
}

/// What becomes of upgrade requests, such as WebSockets, whose [`Route`] is `LocalThenReplay`. With
/// `Local` the node that got them serves them, whatever is said here. With `Primary` they are
/// carried to the primary, or refused.
///
/// ```
/// use replite::{Db, ReplayLayer, Upgrades};
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer().upgrades(Upgrades::Primary)
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Upgrades {
    /// The node that got them serves them, once it has the transaction of the request's token.
    #[default]
    Local,
    /// The primary serves them: replicas carry the bytes both ways.
    Primary,
    /// Replicas answer 503.
    Refuse,
}

/// How a request gets from a replica to the primary.
///
/// ```
/// use replite::{Db, Forwarding, ReplayLayer};
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer().forwarding(Forwarding::Redirect)
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Forwarding {
    /// This node forwards it to the primary's application address, and streams the response back.
    #[default]
    Proxy,
    /// The layer redirects the client (307) to the primary's public address
    /// ([`Addresses::public`](crate::Addresses::public)), where it sends the request again. Clients
    /// must follow such redirects, with their cookies if they rely on the token's one.
    ///
    /// The layer forwards what can't be redirected, such as a WebSocket, and everything while the
    /// primary advertises no public address.
    Redirect,
    /// The layer tells Fly.io's proxy in front to replay the request on the primary's machine
    /// (`fly-replay: instance=..`, status 409). The primary names it by its label `machine`, mostly
    /// `FLY_MACHINE_ID`. Bodies above 1 MB or of unknown length, which that proxy does not replay,
    /// the layer forwards, and everything while there is no such label.
    FlyReplay,
}

/// The `SameSite` attribute of the token's cookie.
///
/// ```
/// use replite::{Db, ReplayLayer, SameSite};
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer().cookie_same_site(SameSite::Strict)
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum SameSite {
    /// Sent with navigation from other sites.
    #[default]
    Lax,
    /// Sent with requests from the same site only.
    Strict,
    /// Sent always; browsers require `Secure` with it.
    None,
}

/// What all services of one layer share.
#[derive(Clone)]
pub(super) struct LayerShared {
    pub(super) node: Arc<NodeContext>,
    pub(super) tokens: Arc<Tokens>,
    pub(super) dialer: Dialer,
    /// Places of requests that wait for a primary.
    pub(super) held: Shares,
    /// Places of requests that are on their way to the primary.
    pub(super) forwards: Shares,
    /// Places of responses that came, and have not come to their end.
    pub(super) lasting: Shares,
    /// Those responses.
    pub(super) responses: LastingResponses,
    pub(super) app: AppDoor,
    /// What is said of the layer when it is used first was said.
    pub(super) said: Arc<AtomicBool>,
    pub(super) options: Options,
}

pub(super) type Hook<I, O> = Arc<dyn for<'a> Fn(&'a I) -> O + Send + Sync>;

#[derive(Clone)]
pub(super) struct Options {
    pub(super) route: Option<Hook<Parts, Route>>,
    pub(super) prefixes: Vec<(String, Route)>,
    pub(super) patterns: Vec<(String, Route)>,
    pub(super) matched_path: Option<Hook<Parts, Option<String>>>,
    pub(super) endpoint: String,
    pub(super) upgrades: Upgrades,
    /// Names of protocols that requests are upgraded to.
    pub(super) protocols: Vec<String>,
    pub(super) forwarding: Forwarding,
    /// Whether an application's address will do where the private channel is not served.
    pub(super) clear: bool,
    pub(super) http2: bool,
    pub(super) budget: Budget,
    /// None: as long as an election may take, or else a restart.
    pub(super) hold_timeout: Option<Duration>,
    pub(super) held_max: usize,
    pub(super) forwards_max: usize,
    /// Of each of the two, for one client.
    pub(super) client_max: usize,
    /// Bytes a second that a client has to send of a body.
    pub(super) least_rate: u32,
    pub(super) wait_timeout: Duration,
    pub(super) response_timeout: Duration,
    pub(super) idle_timeout: Duration,
    pub(super) session: SessionTokens,
    pub(super) cookie: Cookie,
    pub(super) failure: Option<Hook<Failure, Response<Bytes>>>,
    pub(super) replay_when: Option<Hook<http::response::Parts, bool>>,
    pub(super) original_uri: Option<Hook<Parts, Option<Uri>>>,
    pub(super) client_ip: Option<Hook<Parts, Option<IpAddr>>>,
    pub(super) proxies: Proxies,
}

#[derive(Clone)]
pub(super) struct Cookie {
    /// None: tokens travel in the header only.
    pub(super) name: Option<String>,
    pub(super) path: String,
    pub(super) max_age: Duration,
    pub(super) same_site: SameSite,
    /// None: when the client speaks https.
    pub(super) secure: Option<bool>,
}

impl Options {
    pub(super) fn route(&self, parts: &Parts) -> Route {
        let path = parts.uri.path();
        if let Some((_, route)) = self.prefixes.iter().find(|(prefix, _)| is_below(path, prefix)) {
            return *route;
        }
        if !self.patterns.is_empty()
            && let Some(matched) = self.matched_path.as_ref().and_then(|path| path(parts))
            && let Some((_, route)) = self.patterns.iter().find(|(pattern, _)| *pattern == matched)
        {
            return *route;
        }
        self.route.as_ref().map_or_else(|| Route::by_method(parts), |route| route(parts))
    }

    pub(super) fn is_endpoint(&self, path: &str) -> bool {
        // An empty prefix would let everything through.
        !self.endpoint.is_empty() && is_below(path, &self.endpoint)
    }

    pub(super) fn failure(&self, failure: Failure) -> Response<Bytes> {
        match &self.failure {
            Some(own) => failure.complete(own(&failure)),
            None => failure.response(),
        }
    }
}

impl LayerShared {
    /// Whether requests go to other nodes on the private channel. Followers have none for that:
    /// what they forward counts as a client's.
    pub(super) fn forwards_on_channel(&self) -> bool {
        self.app.is_given() && self.node.channel.has_tls() && !self.node.keys.is_follower()
    }

    /// Says once whose word counts for who a client is.
    pub(super) fn say(&self) {
        if !self.said.swap(true, Ordering::Relaxed) {
            let (database, proxies) = (self.node.database.as_str(), &self.options.proxies);
            self.node.report(Condition::ClientHeaders { database, what: &proxies.words() });
        }
    }

    /// For how long a request is held.
    pub(super) fn hold_timeout(&self) -> Duration {
        let usual = || self.node.lease.time().map_or(HOLD_TIMEOUT, |time| time + HOLD_BEYOND_LEASE);
        self.options.hold_timeout.unwrap_or_else(usual)
    }
}

/// The response to a request that could not be done.
pub(super) fn failure(shared: &LayerShared, reason: Reason) -> Response<MadeBody> {
    let failure = Failure::new(reason);
    tracing::debug!(?reason, status = failure.status.as_u16(), "the replay layer answers for the app");
    shared.options.failure(failure).map(|words| MadeBody::Own(Full::new(words)))
}
