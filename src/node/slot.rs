//! Which engine a database has: that of a primary or that of a replica, one after the other.

use std::sync::{Arc, PoisonError, RwLock, Weak};

use crate::context::{Counting, Counts, NodeContext};
use crate::engine::{PrimaryEngine, ReplicaEngine, Uncounted, WalFigures};
use crate::error::{Error, Result};
use crate::log::Log;
use crate::node::writer::not_primary;
use crate::txid::Txid;

/// The engine of a role.
#[derive(Clone, Debug)]
pub(crate) enum Running {
    Primary(Arc<PrimaryEngine>),
    Replica(Arc<ReplicaEngine>),
}

impl Running {
    /// Fails when the files are not those that were opened.
    pub(crate) fn expect_files(&self) -> Result<()> {
        match self {
            Running::Primary(engine) => engine.expect_files(),
            Running::Replica(engine) => engine.expect_files(),
        }
    }

    pub(crate) fn wal(&self) -> WalFigures {
        match self {
            Running::Primary(engine) => engine.wal(),
            Running::Replica(engine) => engine.wal(),
        }
    }

    /// The log, once there is a state.
    pub(crate) fn log(&self) -> Option<Arc<Log>> {
        match self {
            Running::Primary(engine) => Some(engine.log().clone()),
            Running::Replica(engine) => engine.log(),
        }
    }

    /// Ends its threads. Blocks.
    pub(crate) fn close(&self) {
        match self {
            Running::Primary(engine) => engine.close(),
            Running::Replica(engine) => engine.close(),
        }
    }
}

/// See [`Counting`]. It takes as long as a write would wait for capture.
async fn counted(mut uncounted: Uncounted) -> bool {
    loop {
        match uncounted.look() {
            Ok(counted) => return counted,
            Err(left) => {
                // A look says what the end of the watched is.
                let _ = tokio::time::timeout(left, uncounted.moved.changed()).await;
            }
        }
    }
}

/// The engine that runs, until the database is closed: a handle that outlives its database keeps no
/// file of it open.
#[derive(Debug)]
pub(crate) struct EngineSlot {
    node: Arc<NodeContext>,
    running: RwLock<Option<Running>>,
}

impl EngineSlot {
    pub(crate) fn new(node: Arc<NodeContext>, running: Running) -> Arc<EngineSlot> {
        let slot = Arc::new(EngineSlot { node, running: RwLock::new(Some(running)) });
        slot.node.count_by(Arc::downgrade(&slot));
        slot
    }

    pub(crate) fn get(&self) -> Result<Running> {
        let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
        running.clone().ok_or(Error::ShutDown)
    }

    /// Whether there is something to read. Each read asks.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub(crate) fn is_readable(&self) -> Result<bool> {
        match &*self.running.read().unwrap_or_else(PoisonError::into_inner) {
            Some(Running::Primary(_)) => Ok(true),
            Some(Running::Replica(engine)) => Ok(engine.is_readable()),
            None => Err(Error::ShutDown),
        }
    }

    fn counting(&self) -> Option<Counting> {
        match &*self.running.read().unwrap_or_else(PoisonError::into_inner) {
            Some(Running::Primary(engine)) => Some(Box::pin(counted(engine.uncounted()?))),
            Some(Running::Replica(engine)) => engine.counting(),
            // It may be about to take in the last of what was committed.
            None => Some(Box::pin(std::future::ready(false))),
        }
    }

    fn last_of_ours(&self) -> Option<Txid> {
        match &*self.running.read().unwrap_or_else(PoisonError::into_inner) {
            Some(Running::Primary(engine)) => engine.last_of_ours(),
            Some(Running::Replica(_)) | None => None,
        }
    }

    /// Whether it is a replica's, be it that replication has stopped.
    pub(crate) fn is_replica(&self) -> bool {
        let running = self.running.read().unwrap_or_else(PoisonError::into_inner);
        matches!(&*running, Some(Running::Replica(_)))
    }

    /// The primary's.
    ///
    /// # Errors
    /// [`Error::NotPrimary`], [`Error::ShutDown`].
    pub(crate) fn primary(&self) -> Result<Arc<PrimaryEngine>> {
        match self.get()? {
            Running::Primary(engine) => Ok(engine),
            Running::Replica(_) => {
                Err(not_primary(&self.node).unwrap_or(Error::NotPrimary { primary: None }))
            }
        }
    }

    /// Runs this one from now on. Once the database is closed this gives `next` back: it came too
    /// late and is to be closed.
    pub(crate) fn set(&self, next: Running) -> Option<Running> {
        match &mut *self.write() {
            Some(running) => {
                *running = next;
                None
            }
            None => Some(next),
        }
    }

    pub(crate) fn take(&self) -> Option<Running> {
        self.write().take()
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Option<Running>> {
        self.running.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts for Weak<EngineSlot> {
    fn counting(&self) -> Option<Counting> {
        self.upgrade()?.counting()
    }

    fn last_of_ours(&self) -> Option<Txid> {
        self.upgrade()?.last_of_ours()
    }
}
