// Of several definitions of a link the first counts: here those for the documentation.
#![doc = "[docs/guide.md]: crate::guide"]
#![doc = "[docs/stack.md]: crate::guide::stack"]
#![doc = "[docs/trouble.md]: crate::guide::trouble"]
#![doc = "[docs/failover.md]: crate::guide::failover"]
#![doc = "[docs/deploy.md]: crate::guide::deploy"]
#![doc = "[docs/libraries.md]: crate::guide::libraries"]
#![doc = "[docs/leases.md]: crate::guide::leases"]
#![doc = "[docs/operator.md]: crate::guide::operator"]
#![doc = "[docs/trust.md]: crate::guide::trust"]
#![doc = "[docs/design.md]: https://docs.rs/crate/replite/latest/source/docs/design.md"]
#![doc = "[ARCHITECTURE.md]: https://docs.rs/crate/replite/latest/source/ARCHITECTURE.md"]
#![doc = "[SECURITY.md]: https://docs.rs/crate/replite/latest/source/SECURITY.md"]
#![doc = "[CHANGELOG.md]: https://docs.rs/crate/replite/latest/source/CHANGELOG.md"]
#![doc = "[benches/README.md]: https://docs.rs/crate/replite/latest/source/benches/README.md"]
#![doc = ""]
#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[doc = "[stack.md]: crate::guide::stack"]
#[doc = "[trouble.md]: crate::guide::trouble"]
#[doc = "[failover.md]: crate::guide::failover"]
#[doc = "[operator.md]: crate::guide::operator"]
#[doc = "[deploy.md]: crate::guide::deploy"]
#[doc = "[leases.md]: crate::guide::leases"]
#[doc = "[failover.md]: crate::guide::failover"]
#[doc = "[trust.md]: crate::guide::trust"]
#[doc = "[migrations.md]: crate::guide::migrations"]
#[doc = "[libraries.md]: crate::guide::libraries"]
#[doc = "[bad pages]: crate::guide::trouble#bad-pages-of-a-primary"]
#[doc = "[beside us]: crate#what-else-may-use-sqlite-beside-us"]
#[doc = "[README]: crate#prove-it-for-your-routes"]
#[doc = ""]
#[doc = include_str!("../docs/guide.md")]
pub mod guide {
    #[doc = "[Who is the client?]: crate::guide#who-is-the-client"]
    #[doc = ""]
    #[doc = include_str!("../docs/stack.md")]
    pub mod stack {}

    #[doc = "[leases.md]: crate::guide::leases"]
    #[doc = "[Secrets and addresses]: crate::guide#secrets-and-addresses"]
    #[doc = ""]
    #[doc = include_str!("../docs/trouble.md")]
    pub mod trouble {}

    #[doc = "[Lost branches]: crate::guide#lost-branches"]
    #[doc = "[Behind a proxy]: crate::guide#behind-a-proxy"]
    #[doc = "[leases.md]: crate::guide::leases"]
    #[doc = ""]
    #[doc = include_str!("../docs/failover.md")]
    pub mod failover {}

    #[doc = "[leases.md]: crate::guide::leases"]
    #[doc = "[operator.md]: crate::guide::operator"]
    #[doc = "[Probes]: crate::guide#probes-and-shutdown"]
    #[doc = "[the guide]: crate::guide#behind-a-proxy"]
    #[doc = ""]
    #[doc = include_str!("../docs/deploy.md")]
    pub mod deploy {}

    #[doc = "[deploy.md]: crate::guide::deploy"]
    #[doc = "[failover.md]: crate::guide::failover"]
    #[doc = "[operator.md]: crate::guide::operator"]
    #[doc = ""]
    // Its code needs the stores.
    #[cfg(any(not(doctest), feature = "members"))]
    #[doc = include_str!("../docs/leases.md")]
    pub mod leases {}

    #[doc = "[Lost branches]: crate::guide#lost-branches"]
    #[doc = "[leases.md]: crate::guide::leases"]
    #[doc = ""]
    #[doc = include_str!("../docs/operator.md")]
    pub mod operator {}

    #[doc = "[SECURITY.md]: https://docs.rs/crate/replite/latest/source/SECURITY.md"]
    #[doc = "[who]: crate::guide#who-is-the-client"]
    #[doc = "[Secrets and addresses]: crate::guide#secrets-and-addresses"]
    #[doc = "[channel in the design]: https://docs.rs/crate/replite/latest/source/docs/design.md"]
    #[doc = ""]
    #[doc = include_str!("../docs/trust.md")]
    pub mod trust {}

    // The code of both needs crates that the package in `examples/libraries` has, which runs it.
    #[cfg(not(doctest))]
    #[doc = include_str!("../docs/migrations.md")]
    pub mod migrations {}

    #[doc = "[migrations.md]: crate::guide::migrations"]
    #[doc = "[Writes by other means than `Db`]: crate::guide#writes-by-other-means-than-db"]
    #[doc = ""]
    #[cfg(not(doctest))]
    #[doc = include_str!("../docs/libraries.md")]
    pub mod libraries {}
}

mod applied;
#[cfg(feature = "axum")]
mod axum;
mod channel;
mod checksum;
mod command;
mod context;
mod db;
mod descriptors;
mod election;
#[cfg(test)]
#[path = "../tests/support/ends.rs"]
mod ends;
mod engine;
mod error;
mod fence;
mod files;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
#[doc(hidden)]
#[cfg_attr(test, allow(dead_code, unreachable_pub, reason = "public for the fuzz targets"))]
pub mod fuzz;
mod handshake;
mod hex;
mod keys;
pub mod lease;
mod lock;
mod log;
mod members;
mod metrics;
mod net;
mod node;
pub mod operator;
mod page;
mod parse;
mod peer;
mod primary;
mod probes;
mod proxy;
mod random;
mod replica;
mod report;
mod secret;
mod server;
mod session;
mod sqlite;
mod standing;
mod status;
#[cfg(feature = "testing")]
pub mod testing;
mod threads;
mod token;
mod txid;
mod wal;
mod wire;

pub use channel::{Certificates, Plaintext};
pub use checksum::Checksum;
#[cfg(feature = "members")]
pub use db::Witness;
pub use db::{Commit, Config, ConnectionKind, Db, Events, Repair, Snapshot, WriterGuard};
pub use engine::{Durability, Lost, LostBranch, LostKind, LostRow, LostRows};
pub use error::{Blame, Cause, Error, PeerProblem, Result, Unsupported};
pub use page::{PageNo, PageSize};
pub use parse::ParseError;
pub use peer::{Incarnation, NodeId, PeerKey};
pub use probes::{ProbeBody, ProbeFuture, Probes};
pub use proxy::{
    Failure, Forwarded, ForwardedApp, ForwardedBody, Forwarding, NeedsPrimary, Networks, Outcome,
    PrimaryClient, Proxies, Reason, ReplayLayer, ReplayRequestBody, ReplayResponseBody, ReplayService,
    ResponseFuture, Route, SameSite, SessionTokens, Upgrades,
};
pub use rusqlite;
pub use secret::Secret;
pub use server::{ReplicationBody, ReplicationService};
pub use session::{Session, Written};
pub use status::{
    Addresses, Checkpoint, Decision, Event, Health, Lag, LoggedTransaction, PeerInfo, PeerStanding,
    PublicStatus, ReplicaStatus, Role, RoleState, Status, Verification, WaitReason, WalReason,
};
pub use token::Token;
pub use txid::{Epoch, Position, Txid};
