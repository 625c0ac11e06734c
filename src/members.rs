//! The record of the lease, kept by the instances themselves: they agree on it by Raft.
//!
//! Only that record goes through it, and who the members are; no commit of the database does. What
//! Raft itself does is the crate `openraft`'s.

#[cfg(feature = "members")]
mod begin;
#[cfg(feature = "members")]
mod change;
#[cfg(feature = "members")]
mod client;
#[cfg(feature = "members")]
mod contact;
mod door;
#[cfg(feature = "members")]
mod link;
#[cfg(feature = "members")]
mod network;
#[cfg(feature = "members")]
mod node;
#[cfg(feature = "members")]
mod quiet;
#[cfg(feature = "members")]
mod serve;
#[cfg(feature = "members")]
pub(crate) mod storage;
#[cfg(feature = "members")]
pub(crate) mod types;
#[cfg(feature = "members")]
mod words;

#[cfg(feature = "members")]
pub(crate) use client::MembersFromOutside;
pub(crate) use door::MembersDoor;
#[cfg(feature = "members")]
pub(crate) use door::PLACES_MAX;
#[cfg(feature = "members")]
pub(crate) use node::{MemberNode, MembersConfig};
#[cfg(feature = "members")]
pub(crate) use serve::serve;
#[cfg(all(feature = "members", any(test, all(fuzzing, feature = "testing"))))]
pub(crate) use words::fuzz_members_words;
#[cfg(all(test, feature = "members"))]
pub(crate) use words::fuzz_members_words_seeds;
#[cfg(feature = "members")]
pub(crate) use words::{Ask, Introduction, MemberAnswer, MemberChange};
