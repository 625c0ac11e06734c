//! The replay layer: a tower middleware that lets every node take every request.
//!
//! Requests that may change something go to the primary; all others run here, and again on the primary when their
//! handler turned out to need it. Responses that committed carry a token, and a request with a token is answered
//! from a state that has that transaction.
//!
//! The way of a request: `service` plans it, `future` drives the plan, `prepare` waits and holds, `forward` sends
//! to the primary over `dial`, and `reply` sets tokens on what a local handler answered. `http2` is its connection in HTTP/2,
//! and `preface` looks whether the server speaks that. `tunnel` and `detour` are other ways to the primary, `client` is for callers that are no request's handler.

mod body;
mod client;
mod dial;
mod failure;
mod forward;
mod future;
pub(crate) mod headers;
mod hop;
mod http2;
mod layer;
mod preface;
mod prepare;
mod redirect;
mod replay_body;
mod reply;
mod route;
mod service;
#[cfg(test)]
mod tests;
mod tunnel;

pub use body::{ReplayRequestBody, ReplayResponseBody};
pub use client::PrimaryClient;
#[cfg(feature = "axum")]
pub(crate) use failure::RETRY_AFTER_SECONDS;
pub use failure::{Failure, Outcome, Reason};
pub use future::ResponseFuture;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use headers::fuzz_headers;
pub use layer::{Forwarding, ReplayLayer, SameSite, SessionTokens, Upgrades};
pub use route::Route;
pub use service::ReplayService;

/// What bodies may fail with.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
