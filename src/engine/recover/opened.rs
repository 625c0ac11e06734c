//! An open database between two roles.

use std::sync::Arc;

use crate::engine::file::database::OpenDatabase;
use crate::error::{Error, Result};
use crate::sqlite::Handle;
use crate::txid::{EpochHistory, Position};

/// An open database without a role. Its position is known, no connection writes to it, and no
/// thread is at work on it. This value holds CKPT and WRITE. Readers go on meanwhile, and keep
/// their snapshots.
///
/// Dropping it closes the database: the next start finds what is there.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(in crate::engine) database: Arc<OpenDatabase>,
    /// None once it is handed on.
    handle: Option<Handle>,
    pub(in crate::engine) history: EpochHistory,
}

impl Opened {
    pub(in crate::engine) fn new(
        database: Arc<OpenDatabase>,
        handle: Handle,
        history: EpochHistory,
    ) -> Opened {
        Opened { database, handle: Some(handle), history }
    }

    pub(crate) fn position(&self) -> Position {
        self.database.tip().position
    }

    /// The parts, for what is to be done between two roles.
    pub(in crate::engine) fn parts(&mut self) -> Result<(&OpenDatabase, &mut Handle, &mut EpochHistory)> {
        let handle = self.handle.as_mut().ok_or(Error::ShutDown)?;
        Ok((&self.database, handle, &mut self.history))
    }

    /// Hands on the parts, of which the next role takes care.
    pub(in crate::engine) fn hand_on(mut self) -> Option<(Arc<OpenDatabase>, Handle, EpochHistory)> {
        let handle = self.handle.take()?;
        Some((self.database.clone(), handle, std::mem::take(&mut self.history)))
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            // The connection first: other connections may be the last from then on.
            drop(handle);
            self.database.release_locks();
        }
    }
}
