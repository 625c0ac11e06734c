//! The whole database is hashed; a page is repaired.

pub(in crate::engine) mod repair;
pub(in crate::engine) mod verify;
