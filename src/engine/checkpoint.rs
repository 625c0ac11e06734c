//! Frames are copied into the database file, and the WAL is begun anew.

pub(in crate::engine) mod backfill;
pub(in crate::engine) mod bound;
pub(in crate::engine) mod generation;
pub(in crate::engine) mod pacer;
pub(in crate::engine) mod restart;
pub(in crate::engine) mod thread;
