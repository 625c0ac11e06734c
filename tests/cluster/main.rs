//! A primary and its replicas: the stream, and how a replica gets its state.

#[path = "../../src/channel/tests/ca.rs"]
#[allow(dead_code, reason = "each test binary uses its part of it")]
mod ca;
mod certificates;
mod claimed;
mod filling;
#[path = "../support/fork.rs"]
mod fork;
mod handoff;
mod lease;
mod nodes;
mod operator;
mod packages;
mod peers;
mod roles;
mod slow;
#[path = "../support/lib.rs"]
mod support;
mod vouched;
