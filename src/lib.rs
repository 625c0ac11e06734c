#![doc = include_str!("../README.md")]

/// The code of the documents compiles and runs.
#[cfg(doctest)]
mod docs {
    #[doc = include_str!("../docs/guide.md")]
    mod guide {}
    #[doc = include_str!("../docs/stack.md")]
    mod stack {}
}

mod applied;
#[cfg(feature = "axum")]
mod axum;
mod checksum;
mod context;
mod db;
#[cfg(test)]
#[path = "../tests/support/ends.rs"]
mod ends;
mod engine;
mod error;
mod files;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
#[doc(hidden)]
#[cfg_attr(test, allow(dead_code, unreachable_pub, reason = "public for the fuzz targets"))]
pub mod fuzz;
mod handshake;
mod hex;
pub mod lease;
mod lock;
mod log;
#[cfg(feature = "metrics")]
mod metrics;
mod net;
mod node;
mod page;
mod parse;
mod peer;
mod primary;
mod proxy;
mod random;
mod replica;
mod report;
mod secret;
mod server;
mod session;
mod sqlite;
mod status;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;
mod token;
mod txid;
mod wal;
mod wire;

pub use checksum::Checksum;
pub use db::{Commit, Config, ConnectionKind, Db, Events, Repair, Snapshot, WriterGuard};
pub use engine::{Durability, Lost, LostBranch, LostKind, LostRow, LostRows};
pub use error::{Blame, Cause, Error, PeerProblem, Result, Unsupported};
pub use page::{PageNo, PageSize};
pub use parse::ParseError;
pub use peer::{Incarnation, NodeId};
pub use proxy::{
    Failure, Forwarding, Outcome, PrimaryClient, Reason, ReplayLayer, ReplayRequestBody, ReplayResponseBody,
    ReplayService, ResponseFuture, Route, SameSite, SessionTokens, Upgrades,
};
pub use rusqlite;
pub use secret::Secret;
pub use server::{ReplicationBody, ReplicationService};
pub use session::Session;
pub use status::{
    Addresses, Checkpoint, Event, Health, Lag, LoggedTransaction, PeerInfo, PublicStatus, ReplicaStatus,
    Role, RoleState, Status, Verification, WalReason,
};
pub use token::Token;
pub use txid::{Epoch, Position, Txid};
