//! What an application has of one database: opening, writing, reading, waiting, closing.

mod closing;
mod contract;
mod db;
mod defence;
mod deployment;
#[path = "../support/fork.rs"]
mod fork;
mod history;
mod lease;
mod metrics;
mod operator;
mod panics;
mod places;
mod probes;
mod ryw;
mod shared_cache;
mod sql;
#[path = "../support/lib.rs"]
mod support;
mod testing;
mod writer;
