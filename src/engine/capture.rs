//! A primary's database: its threads, and what its writer learns from them.

pub(in crate::engine) mod brake;
pub(in crate::engine) mod commit_gate;
pub(in crate::engine) mod counting;
pub(in crate::engine) mod group_sync;
pub(in crate::engine) mod handle;
pub(in crate::engine) mod numbers;
pub(in crate::engine) mod startup;
pub(in crate::engine) mod thread;
pub(in crate::engine) mod waker;
