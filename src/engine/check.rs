//! Hashes the whole database, and repairs pages.

pub(in crate::engine) mod repair;
pub(in crate::engine) mod verify;
