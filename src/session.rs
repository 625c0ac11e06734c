//! The request-scoped session: what a request's handler did to the database.
use crate::txid::Txid;

/// Reported by `Db::write` and friends, on the caller's task.
pub(crate) fn committed(_txid: Txid) {}

/// Reported by whatever found that only the primary could have done it.
pub(crate) fn primary_needed() {}
