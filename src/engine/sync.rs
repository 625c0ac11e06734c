//! One fsync of the WAL for all commits that wait for one.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::engine::base::{Base, lock};
use crate::error::{Error, Result};

/// Which commits are on the disk, and who is bringing more of them there.
#[derive(Debug)]
pub(super) struct Syncer {
    base: Arc<Base>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Every transaction up to this number is on the disk.
    synced: u64,
    /// The highest number that anybody waits for. Each of them was in the WAL before it was asked for.
    wanted: u64,
    /// Somebody is in fsync.
    leading: bool,
    /// An fsync failed. What it left on the disk is not known and no later one can tell, so no commit
    /// is acknowledged any more.
    failed: Option<String>,
}

impl Syncer {
    /// Everything up to `synced` is on the disk already.
    pub(super) fn new(base: Arc<Base>, synced: u64) -> Syncer {
        let state = State { synced, wanted: synced, leading: false, failed: None };
        Syncer { base, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Blocks until the transaction, which is in the WAL, is on the disk. The first to come fsyncs for all
    /// who have come by then; the others wait.
    pub(super) fn sync(&self, number: u64) -> Result<()> {
        let mut state = lock(&self.state);
        state.wanted = state.wanted.max(number);
        loop {
            if state.synced >= number {
                return Ok(());
            }
            if let Some(why) = &state.failed {
                return Err(Error::Stopped(why.clone()));
            }
            if state.leading {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.leading = true;
            let target = state.wanted;
            drop(state);
            let result = self.base.sync_wal();
            state = lock(&self.state);
            state.leading = false;
            match result {
                Ok(()) => state.synced = state.synced.max(target),
                Err(error) => {
                    state.failed = Some(error.to_string());
                    self.base.fail(&error);
                }
            }
            self.changed.notify_all();
        }
    }

    /// Notes that everything up to `number` came to the disk by other means.
    pub(super) fn synced(&self, number: u64) {
        let mut state = lock(&self.state);
        state.synced = state.synced.max(number);
        self.changed.notify_all();
    }
}
