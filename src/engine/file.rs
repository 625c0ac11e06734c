//! An open database without opinion.

pub(in crate::engine) mod anchor;
pub(in crate::engine) mod database;
pub(in crate::engine) mod doubt;
pub(in crate::engine) mod epochs;
pub(in crate::engine) mod hash;
pub(in crate::engine) mod hash_cache;
pub(in crate::engine) mod modified;
pub(in crate::engine) mod newest;
pub(in crate::engine) mod pages;
pub(in crate::engine) mod progress;
pub(in crate::engine) mod reader;
pub(in crate::engine) mod term;
pub(in crate::engine) mod tip;
pub(in crate::engine) mod unsynced_marker;
pub(in crate::engine) mod wal_bound;
pub(in crate::engine) mod wal_file;
pub(in crate::engine) mod watch;
pub(in crate::engine) mod witness_search;
pub(in crate::engine) mod witnesses;
