//! The replay layer: a tower middleware that lets every node take every request.
//!
//! Requests that may change something go to the primary. All others run here, and again on the
//! primary when their handler turned out to need it. Responses that committed carry a token. A node
//! answers a request with a token from a state that has that transaction.
//!
//! The way of a request, a module a step:
//!
//! 1. `service` begins it, and `plan` decides by its head, its `route` and this node's role.
//! 2. `future` drives the plan. It calls the handler here, or goes on with 3.
//! 3. `wait` waits for the transaction of the request's token, and for the primary when that does
//!    not come.
//! 4. `forward` sends the `head` and the kept body (`replay_body`) to the primary, as an
//!    `exchange`. `locate` knows where that is, and holds the request while there is none. `intake`
//!    takes small bodies in first.
//! 5. `redirect` sends the client there in place of this node, where the layer is set up for that.
//! 6. `dial` has the connections. Those of the private channel are in `channel`, `exchanges` puts
//!    requests on one, and `on_line` counts them. Others go to the application's address: `connect`
//!    opens them, with TLS where the URL says so, and `http2` is the one in HTTP/2. `preface`
//!    watches servers of HTTP/2. What comes back is a `primary_body`, which breaks off where the
//!    client takes nothing of it, or (`idle`) the primary sends nothing. `tunnel` carries the bytes
//!    after an upgrade, which `switched` says in HTTP/2.
//! 7. `reply` sets tokens on what a local handler answered. `failure` is the answer to a request
//!    that could not be done.
//!
//! On the primary `app` takes what came on the private channel, and calls the application.
//!
//! `layer` has the settings and `shared` what comes of them. `headers`, `hop` and `body` are about
//! bytes. `client` sends requests for callers that are no request's handler. `shares` counts what
//! is limited for all and for each client, `budget` what is kept of bodies, and `tempo` says how
//! long a client is waited for.
//!
//! Who the client is: `origin` finds it, `proxies` says whose word counts for that, and `forwarded`
//! is what a handler is told on another node.

mod app;
mod body;
mod budget;
mod channel;
mod client;
mod connect;
mod dial;
mod exchange;
mod exchanges;
mod failure;
mod forward;
pub(crate) mod forwarded;
mod future;
mod head;
pub(crate) mod headers;
mod hop;
mod http2;
mod idle;
mod intake;
mod layer;
mod locate;
mod needs;
mod on_line;
mod origin;
mod plan;
mod preface;
mod primary_body;
mod proxies;
mod redirect;
mod replay_body;
mod reply;
mod route;
mod service;
mod shared;
mod shares;
mod switched;
mod tempo;
#[cfg(test)]
mod tests;
mod tunnel;
mod wait;

pub(crate) use app::{AppAnswer, AppDoor};
pub use app::{ForwardedApp, ForwardedBody};
pub(crate) use body::AppBody;
pub use body::{ReplayRequestBody, ReplayResponseBody};
pub use client::PrimaryClient;
#[cfg(feature = "axum")]
pub(crate) use failure::RETRY_AFTER_SECONDS;
pub use failure::{Failure, Outcome, Reason};
pub use forwarded::Forwarded;
pub use future::ResponseFuture;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use headers::fuzz_headers;
pub use layer::ReplayLayer;
pub use needs::NeedsPrimary;
pub use proxies::{Networks, Proxies};
pub use route::Route;
pub use service::ReplayService;
pub use shared::{Forwarding, SameSite, SessionTokens, Upgrades};

/// What bodies may fail with.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
