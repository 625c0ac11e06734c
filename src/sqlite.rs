//! SQLite as the outside world: dedicated connections, their files, and the shared wal-index.
//!
//! All unsafe code of the crate is in the two modules below.

pub(crate) mod ffi;
mod locks;
pub(crate) mod shm;

pub(crate) use ffi::{CommitCount, Handle, Lock, Slot, hook_commits, last_code, unreadable};
pub(crate) use locks::{Alone, FileLocks, close_unlocked, park};
pub(crate) use shm::WalIndex;

/// The oldest SQLite without the WAL-reset race.
pub(crate) const OLDEST: (i32, &str) = (3_051_003, "3.51.3");
