//! Nodes that keep their lease's record among themselves.

mod begin;
mod changes;
mod disks;
mod kills;
mod links;
mod node;
#[path = "../support/lib.rs"]
mod support;
mod witness;
mod world;
