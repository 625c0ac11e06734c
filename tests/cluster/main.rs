//! A primary and its replicas: the stream, and how a replica gets its state.

mod claimed;
mod filling;
#[path = "../support/fork.rs"]
mod fork;
mod nodes;
mod packages;
mod peers;
mod slow;
#[path = "../support/lib.rs"]
mod support;
mod vouched;
