//! A node at work: its databases, their roles, and what the process has for it.

pub(crate) mod certificates;
pub(crate) mod database;
pub(crate) mod disk_use;
pub(crate) mod elector;
pub(crate) mod host;
pub(crate) mod open_files;
pub(crate) mod pool;
pub(crate) mod slot;
pub(crate) mod supervisor;
pub(crate) mod tenancy;
pub(crate) mod verifier;
pub(crate) mod writer;
