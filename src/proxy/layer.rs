//! The layer, and how it is made to measure.

mod late;

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{Response, Uri};
use tower::Layer;

use crate::context::NodeContext;
use crate::net::ServerTls;
use crate::proxy::app::AppDoor;
use crate::proxy::budget::Budget;
use crate::proxy::client::PrimaryClient;
use crate::proxy::dial::Dialer;
use crate::proxy::failure::Failure;
use crate::proxy::primary_body::LastingResponses;
use crate::proxy::proxies::Proxies;
use crate::proxy::route::Route;
use crate::proxy::service::ReplayService;
use crate::proxy::shared::{
    Cookie, Forwarding, Hook, LayerShared, Options, SameSite, SessionTokens, Upgrades,
};
use crate::proxy::shares::Shares;
use crate::token::Tokens;

/// Bytes of a request's body that are kept for the primary.
const BUFFER_REQUEST_BYTES: usize = 64 * 1024;
/// The same of all requests of the process together.
const BUFFER_PROCESS_BYTES: usize = 16 * 1024 * 1024;
/// Requests that may wait for a primary at one time.
const HELD_MAX: usize = 1024;
/// Requests that may be on their way to the primary at one time. Each has a socket there, or a
/// stream. A process that may have 1,024 descriptors has as many left for its clients.
const FORWARDS_MAX: usize = 512;
/// And how many of these, and of those that wait, may be one client's. A browser has six
/// connections to a host, and an office with one address some dozens.
const CLIENT_MAX: usize = 128;
/// Responses that have come from the primary, and not to their end: long streams, WebSockets, and
/// what clients take slowly. With those on their way the private channel has room for them.
const LASTING_MAX: usize = 3072;
/// Of these, of one client.
const LASTING_CLIENT_MAX: usize = 1024;
/// Bytes a second that a client has to send of its request's body. The slowest mobile networks
/// carry ten times that. It costs an attacker little, too: shares keep its requests few, and this
/// has their places come back.
const LEAST_RATE: u32 = 1024;
/// The longest pause between two pieces of a body.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Prefixes that can be given a route; each request is compared with all of them.
const PREFIXES_MAX: usize = 64;

/// A [`tower::Layer`] that lets every node take every request. Those that may change something go
/// to the primary, and clients read their own writes on every node.
///
/// It goes around everything that belongs to running a handler, and below what each node does for
/// each request (trace, request id, CORS, limits). [Where the layer goes](crate::guide::stack) has
/// an order that is tested. With the feature `axum` it goes wherever axum takes a layer. An
/// application with [two databases](crate::guide#two-databases-in-one-app) has two layers.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use std::time::Duration;
///
/// use axum::{Router, routing::get};
/// use replite::{Db, Route};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let layer = db
///     .replay_layer()
///     .route_prefix("/healthz", Route::Local)
///     .hold_timeout(Duration::from_secs(8)); // while the primary restarts
/// let app: Router = Router::new().route("/", get(|| async { "hello" })).layer(layer);
/// # drop(app);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a layer does its work around a service"]
pub struct ReplayLayer {
    pub(super) shared: Arc<LayerShared>,
}

type Look<O> = fn(&Parts) -> Option<O>;

#[cfg(feature = "axum")]
const ORIGINAL_URI: Option<Look<Uri>> =
    Some(|parts| parts.extensions.get::<axum::extract::OriginalUri>().map(|uri| uri.0.clone()));
#[cfg(feature = "axum")]
const MATCHED_PATH: Option<Look<String>> =
    Some(|parts| parts.extensions.get::<axum::extract::MatchedPath>().map(|path| path.as_str().to_owned()));
#[cfg(not(feature = "axum"))]
const ORIGINAL_URI: Option<Look<Uri>> = None;
#[cfg(not(feature = "axum"))]
const MATCHED_PATH: Option<Look<String>> = None;

impl ReplayLayer {
    pub(crate) fn new(node: Arc<NodeContext>) -> ReplayLayer {
        let tokens = Arc::new(Tokens::new(node.clone()));
        let cookie = Cookie {
            name: Some(format!("replite_{}", tokens.tag())),
            path: "/".into(),
            max_age: Duration::from_secs(300),
            same_site: SameSite::Lax,
            secure: None,
        };
        let options = Options {
            route: None,
            prefixes: Vec::new(),
            patterns: Vec::new(),
            matched_path: MATCHED_PATH.map(|path| Arc::new(path) as Hook<_, _>),
            endpoint: "/_replite".into(),
            upgrades: Upgrades::Local,
            protocols: vec!["websocket".into()],
            forwarding: Forwarding::Proxy,
            clear: false,
            http2: false,
            budget: Budget::new(BUFFER_REQUEST_BYTES, BUFFER_PROCESS_BYTES, IDLE_TIMEOUT),
            hold_timeout: None,
            held_max: HELD_MAX,
            forwards_max: FORWARDS_MAX,
            client_max: CLIENT_MAX,
            least_rate: LEAST_RATE,
            wait_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(30),
            idle_timeout: IDLE_TIMEOUT,
            session: SessionTokens::Writes,
            cookie,
            failure: None,
            replay_when: None,
            original_uri: ORIGINAL_URI.map(|uri| Arc::new(uri) as Hook<_, _>),
            client_ip: None,
            proxies: Proxies::Unknown,
        };
        let (stop, tls) = (node.stop.clone(), ServerTls::default());
        let dialer = Dialer::new(Duration::from_secs(1), stop.clone(), tls);
        let responses = LastingResponses::new(IDLE_TIMEOUT, stop);
        let (held, forwards) = (Shares::new(HELD_MAX, CLIENT_MAX), Shares::new(FORWARDS_MAX, CLIENT_MAX));
        let (said, app) = (Arc::default(), AppDoor::default());
        let lasting = Shares::new(LASTING_MAX, LASTING_CLIENT_MAX);
        let shared =
            LayerShared { node, tokens, dialer, held, forwards, lasting, responses, said, app, options };
        ReplayLayer { shared: Arc::new(shared) }
    }

    /// Where requests run, in place of [`Route::by_method`]. It is asked for each request but those
    /// of the replication endpoint and those that [`ReplayLayer::route_prefix`] or
    /// [`ReplayLayer::route_matched`] decide on.
    pub fn route(self, route: impl Fn(&Parts) -> Route + Send + Sync + 'static) -> Self {
        self.with(|o| o.route = Some(Arc::new(route)))
    }

    /// Where requests to this path and below run, whatever their method. Of several prefixes that
    /// fit, the first given counts. Below axum's `nest` the path is what it leaves of it.
    ///
    /// # Panics
    /// When more than 64 prefixes are given.
    pub fn route_prefix(self, prefix: impl Into<String>, route: Route) -> Self {
        assert!(self.shared.options.prefixes.len() < PREFIXES_MAX, "more than {PREFIXES_MAX} prefixes");
        self.with(|o| o.prefixes.push((prefix.into(), route)))
    }

    /// Where requests to this route of the application's router run, whatever their method. The
    /// route is as it was given to the router, such as `/oauth/{provider}/callback`. It needs
    /// [`ReplayLayer::matched_path`], or the feature `axum`.
    ///
    /// # Panics
    /// When more than 64 routes are given.
    pub fn route_matched(self, pattern: impl Into<String>, route: Route) -> Self {
        assert!(self.shared.options.patterns.len() < PREFIXES_MAX, "more than {PREFIXES_MAX} routes");
        self.with(|o| o.patterns.push((pattern.into(), route)))
    }

    /// The router's route that a request matched, for [`ReplayLayer::route_matched`]. With the
    /// feature `axum` it is known by itself where the layer was added by `Router::layer` or
    /// `route_layer`.
    pub fn matched_path(self, path: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        self.with(|o| o.matched_path = Some(Arc::new(path)))
    }

    /// Where the replication endpoint is mounted, if not at `/_replite`. The layer lets it through
    /// untouched. An empty path says that it is not mounted below this layer.
    pub fn endpoint(self, path: impl Into<String>) -> Self {
        self.with(|o| o.endpoint = path.into().trim_end_matches('/').to_owned())
    }

    /// A protocol that requests may be upgraded to, beside `websocket`. The `Upgrade` header of any
    /// other counts for nothing here: the request is one like all others.
    ///
    /// # Panics
    /// When more than 64 protocols are given.
    pub fn upgrade_protocol(self, name: impl Into<String>) -> Self {
        assert!(self.shared.options.protocols.len() <= PREFIXES_MAX, "more than {PREFIXES_MAX} protocols");
        self.with(|o| o.protocols.push(name.into()))
    }

    /// What becomes of upgrade requests.
    pub fn upgrades(self, upgrades: Upgrades) -> Self {
        self.with(|o| o.upgrades = upgrades)
    }

    /// How requests get to the primary.
    pub fn forwarding(self, forwarding: Forwarding) -> Self {
        self.with(|o| o.forwarding = forwarding)
    }

    /// Whether requests go to the primary's application address where that node has not been given
    /// its application's service ([`Db::serve_forwarded`](crate::Db::serve_forwarded)), and this
    /// one has. If not set, they wait until it has, or fail with 503: what an instance may say on
    /// the private channel it does not say in the clear. Over an `https://` address they go in any
    /// case. It is for the deploy that brings `serve_forwarded`. Set, this node also believes what
    /// other nodes say of the client of a request that they send to its own address.
    pub fn forward_in_clear(self, yes: bool) -> Self {
        self.with(|o| o.clear = yes)
    }

    /// Whether the primary's application is spoken to in HTTP/2 (without TLS, by prior knowledge),
    /// and not in HTTP/1.1. Requests that came in HTTP/2 and ask for trailers (`te`), such as
    /// gRPC's, always are. The client's host is the request's authority then. On the private
    /// channel it is always HTTP/2.
    pub fn http2(self, yes: bool) -> Self {
        self.with(|o| o.http2 = yes)
    }

    /// A client for the primary with this layer's limits; see
    /// [`Db::primary_client`](crate::Db::primary_client).
    pub fn primary_client(&self) -> PrimaryClient {
        PrimaryClient::new(self.shared.clone())
    }

    /// How many bytes of bodies the layer keeps while it may still have to send them to the
    /// primary. The limits are for one request (64 KiB) and for all together (16 MiB). One client
    /// has an eighth of that, or twice what one request may have if that is more. A quarter of all,
    /// and of each share, is for bodies up to 4 KiB.
    ///
    /// A request with a larger body that turns out to need the primary is answered with 503, and so
    /// is one for whose body there was no room. Of a client that falls silent within its body for
    /// the idle limit nothing is kept.
    ///
    /// A body that may be kept is taken in before the primary is asked.
    pub fn buffer_limits(self, request: usize, process: usize) -> Self {
        self.with(|o| o.budget = Budget::new(request, process, o.idle_timeout))
    }

    /// For how long a request waits while there is no primary, or no way to it. If not set, that is
    /// 5 s where the primary is fixed, and 3 s more than the lease time where it is elected. The
    /// layer sends again only what no primary has begun. The client, and each proxy on the way, has
    /// to wait for longer than that.
    pub fn hold_timeout(self, limit: Duration) -> Self {
        self.with(|o| o.hold_timeout = Some(limit))
    }

    /// How many requests may wait in this way at one time (1024), of one client as many as
    /// [`ReplayLayer::client_requests`] says. The layer answers 503 to more.
    pub fn held_requests(self, most: usize) -> Self {
        self.with_places(|o| o.held_max = most)
    }

    /// How many requests may be on their way to the primary at one time (512), of one client as
    /// many as [`ReplayLayer::client_requests`] says. Those beyond wait for a place like requests
    /// for which there is no primary, and are answered with 503 after that.
    ///
    /// A place is taken until the response begins; 3,072 responses may last from then on, 1,024 of
    /// one client. A quarter of all, and of each share, is for requests whose body has come in
    /// whole: clients that send slowly can't take those.
    ///
    /// ```
    /// use replite::{Db, ReplayLayer};
    ///
    /// fn layer(db: &Db) -> ReplayLayer {
    ///     // All clients come by one proxy, which gives no address of theirs.
    ///     db.replay_layer().forwarded_requests(1024).client_requests(1024)
    /// }
    /// # let _ = layer;
    /// ```
    pub fn forwarded_requests(self, most: usize) -> Self {
        self.with_places(|o| o.forwards_max = most)
    }

    /// How many requests of one client may be on their way to the primary, and how many may wait
    /// for one (128 each). A client is told by its address; [`ReplayLayer::proxies`] says how far
    /// proxies are believed, and an IPv6 network of 64 bits is one client. One whose address is not
    /// known counts among all only.
    ///
    /// ```
    /// use replite::{Db, ReplayLayer};
    ///
    /// fn layer(db: &Db) -> ReplayLayer {
    ///     db.replay_layer().client_requests(16)
    /// }
    /// # let _ = layer;
    /// ```
    pub fn client_requests(self, most: usize) -> Self {
        self.with_places(|o| o.client_max = most)
    }

    /// How many bytes a second a client has to send of a request's body that goes to the primary
    /// (1024), in the time in which the layer waits for it and until the response's head is there.
    /// It has ten seconds to begin with, and as many more as it has sent seconds' worth of, up to
    /// [`ReplayLayer::idle_timeout`]. Who is slower is answered with 408. With 0 that idle limit is
    /// all.
    ///
    /// ```
    /// use replite::{Db, ReplayLayer};
    ///
    /// fn layer(db: &Db) -> ReplayLayer {
    ///     db.replay_layer().least_rate(0) // sensors, which send a line a minute
    /// }
    /// # let _ = layer;
    /// ```
    pub fn least_rate(self, bytes_per_second: u32) -> Self {
        self.with(|o| o.least_rate = bytes_per_second)
    }

    /// For how long a read waits for the transaction of its token (2 s) before the layer asks the
    /// primary. While there is none, the read waits on like a request that is held.
    pub fn wait_timeout(self, limit: Duration) -> Self {
        self.with(|o| o.wait_timeout = limit)
    }

    /// For how long a request waits for a connection to the primary (1 s) before it is held, or
    /// fails. On the private channel the connection is tried for longer than that, with TLS and its
    /// proofs, and the next try finds it.
    pub fn connect_timeout(mut self, limit: Duration) -> Self {
        let shared = Arc::make_mut(&mut self.shared);
        shared.dialer = Dialer::new(limit, shared.node.stop.clone(), shared.dialer.tls.clone());
        self
    }

    /// Whose certificates the applications of other nodes may have.
    pub(crate) fn with_tls(mut self, tls: ServerTls) -> Self {
        let shared = Arc::make_mut(&mut self.shared);
        shared.dialer = Dialer::new(shared.dialer.connect, shared.node.stop.clone(), tls);
        self
    }

    /// Where the application's service is, once it was given.
    pub(crate) fn with_app(mut self, app: AppDoor) -> Self {
        Arc::make_mut(&mut self.shared).app = app;
        self
    }

    /// For how long the primary may take for a response's head once it has the whole request (30
    /// s).
    pub fn response_timeout(self, limit: Duration) -> Self {
        self.with(|o| o.response_timeout = limit)
    }

    /// The longest pause between two pieces of a forwarded body, either way (60 s). Event streams
    /// may pause for as long as they like. For requests see [`ReplayLayer::least_rate`], too.
    ///
    /// A response of which the client takes nothing for five times as long, event streams too, is
    /// broken off: what has come of it, and its place, are for others.
    pub fn idle_timeout(mut self, limit: Duration) -> Self {
        let stop = self.shared.node.stop.clone();
        Arc::make_mut(&mut self.shared).responses = LastingResponses::new(limit, stop);
        self.with(|o| (o.idle_timeout, o.budget.idle) = (limit, limit))
    }

    /// Which responses carry a token.
    pub fn session(self, tokens: SessionTokens) -> Self {
        self.with(|o| o.session = tokens)
    }

    /// Sets no cookie: tokens travel in the `replite-token` header only.
    pub fn no_cookie(self) -> Self {
        self.with(|o| o.cookie.name = None)
    }

    /// The cookie's name, in place of `replite_` and the first digits of a hash over the cluster's
    /// and the database's names. Browsers send a host's cookies to all of its ports. Two
    /// applications there whose clusters and databases have the same names need different cookie
    /// names.
    ///
    /// # Panics
    /// When the name has other than letters, digits, `-` and `_`.
    pub fn cookie_name(self, name: impl Into<String>) -> Self {
        let name = name.into();
        let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        assert!(fits, "not a cookie name: {name:?}");
        self.with(|o| o.cookie.name = Some(name))
    }

    /// The cookie's `Path` (`/`).
    ///
    /// # Panics
    /// When the path has bytes that a cookie can't have.
    pub fn cookie_path(self, path: impl Into<String>) -> Self {
        let path = path.into();
        let fits = path.starts_with('/') && path.bytes().all(|b| (0x21..0x7f).contains(&b) && b != b';');
        assert!(fits, "not a cookie path: {path:?}");
        self.with(|o| o.cookie.path = path)
    }

    /// The cookie's `Max-Age` (300 s): longer than any replica should be late.
    pub fn cookie_max_age(self, max_age: Duration) -> Self {
        self.with(|o| o.cookie.max_age = max_age)
    }

    /// The cookie's `SameSite` (`Lax`).
    pub fn cookie_same_site(self, same_site: SameSite) -> Self {
        self.with(|o| o.cookie.same_site = same_site)
    }

    /// Whether the cookie has `Secure`. If not set, it has when the client speaks https, by the
    /// request's scheme or `X-Forwarded-Proto`.
    pub fn cookie_secure(self, secure: bool) -> Self {
        self.with(|o| o.cookie.secure = Some(secure))
    }

    /// The app's own responses in place of those of the layer, which adds `replite-outcome` and
    /// `Retry-After`.
    pub fn on_failure(self, response: impl Fn(&Failure) -> Response<Bytes> + Send + Sync + 'static) -> Self {
        self.with(|o| o.failure = Some(Arc::new(response)))
    }

    /// The URI as it came, where it was changed before the layer, as below axum's `nest`. With the
    /// feature `axum` the layer knows that one by itself.
    pub fn original_uri(self, uri: impl Fn(&Parts) -> Option<Uri> + Send + Sync + 'static) -> Self {
        self.with(|o| o.original_uri = Some(Arc::new(uri)))
    }

    /// The IP address of the peer that a request came from, where the server tells it in a way of
    /// its own. With the feature `axum` the layer takes it from `ConnectInfo<SocketAddr>` by
    /// itself, which `Router::into_make_service_with_connect_info` sets.
    ///
    /// It is that of the connection, and not what a header says: on the primary it stands in
    /// [`Forwarded`](crate::Forwarded), and in place of the node's own. Where it is set here, it is
    /// also appended to the `X-Forwarded-For` of requests that go by the applications' addresses.
    pub fn client_ip(self, ip: impl Fn(&Parts) -> Option<IpAddr> + Send + Sync + 'static) -> Self {
        self.with(|o| o.client_ip = Some(Arc::new(ip)))
    }

    /// Changes how many places there are.
    fn with_places(self, change: impl FnOnce(&mut Options)) -> Self {
        let mut layer = self.with(change);
        let shared = Arc::make_mut(&mut layer.shared);
        let options = &shared.options;
        shared.held = Shares::new(options.held_max, options.client_max);
        shared.forwards = Shares::new(options.forwards_max, options.client_max);
        layer
    }

    /// Which proxies there are before this application. It decides whose `X-Forwarded-*`,
    /// `X-Real-IP` and `Forwarded` count: from all others these headers are taken out before a
    /// handler sees the request, here or on the primary. If not set, they stay as they came
    /// ([`Proxies::Unknown`]). The node logs at start what is set (`client_headers`).
    pub fn proxies(self, proxies: Proxies) -> Self {
        let mut layer = self.with(|o| o.proxies = proxies);
        Arc::make_mut(&mut layer.shared).said = Arc::default();
        layer
    }

    fn with<R>(mut self, change: impl FnOnce(&mut Options) -> R) -> Self {
        change(&mut Arc::make_mut(&mut self.shared).options);
        self
    }
}

impl<S> Layer<S> for ReplayLayer {
    type Service = ReplayService<S>;

    fn layer(&self, inner: S) -> ReplayService<S> {
        self.shared.say();
        ReplayService { inner, shared: self.shared.clone() }
    }
}

impl fmt::Debug for ReplayLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayLayer").field("database", &self.shared.node.database).finish_non_exhaustive()
    }
}

/// Keeps the promise that the layer works where axum's `Router::layer` does.
const _: () = {
    const fn shareable<T: Send + Sync + Clone + 'static>() {}
    shareable::<ReplayLayer>();
    shareable::<ReplayService<Infallible>>();
};
