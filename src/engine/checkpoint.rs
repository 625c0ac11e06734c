//! Copies frames into the database file, and begins the WAL anew.

pub(in crate::engine) mod backfill;
pub(in crate::engine) mod bound;
pub(in crate::engine) mod generation;
pub(in crate::engine) mod pacer;
pub(in crate::engine) mod restart;
pub(in crate::engine) mod thread;
