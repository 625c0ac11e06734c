//! SQLite replicas inside the application.
#![allow(dead_code, unused_imports, missing_docs, unreachable_pub)]

mod applied;
#[cfg(feature = "axum")]
mod axum;
mod checksum;
mod engine;
mod error;
mod log;
mod node;
mod page;
mod proxy;
mod secret;
mod session;
mod status;
mod token;
mod txid;
mod wire;

pub use checksum::Checksum;
pub use engine::Durability;
pub use error::{Blame, Error, PeerProblem, Result, Unsupported};
pub use page::{PageNo, PageSize};
pub use proxy::{
    Failure, Outcome, Reason, ReplayLayer, ReplayRequestBody, ReplayResponseBody, ReplayService,
    ResponseFuture, Route, SameSite, SessionTokens, Upgrades,
};
pub use secret::Secret;
pub use session::Session;
pub use status::{Addresses, Event, Health, Lag, PeerInfo, ReplicaStatus, Role, RoleState, Status};
pub use token::Token;
pub use txid::{Epoch, Position, Txid};
