//! The calls to the disk, in their order and off the runtime's thread.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use openraft::{AnyError, ErrorSubject, ErrorVerb, LogId, StorageError, StorageIOError};
use tokio::sync::watch;
use tokio::time::timeout;

use super::disk::{Disk, covers};
use super::log::Entries;
use crate::error::{Error, Result};
use crate::members::types::Agreed;

/// Longest wait of a purge for the snapshot that has what is to be purged.
const SNAPSHOT_LIMIT: Duration =
    if cfg!(test) { Duration::from_millis(200) } else { Duration::from_secs(30) };

/// The disk, shared by the log and the state machine.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    /// It is given in the order in which it was asked for.
    disk: Arc<tokio::sync::Mutex<Disk>>,
    pub(super) entries: Arc<Mutex<Entries>>,
    /// The last entry that the snapshot on the disk has.
    covered: watch::Sender<Option<LogId<u64>>>,
}

impl Worker {
    pub(super) fn new(disk: Disk) -> Worker {
        let entries = disk.entries.clone();
        let covered = watch::Sender::new(disk.covered());
        Worker { disk: Arc::new(tokio::sync::Mutex::new(disk)), entries, covered }
    }

    /// Replaces the snapshot, unless the one that is there covers as much. Returns the one that is
    /// there then.
    pub(super) async fn save_snapshot(&self, state: Arc<Agreed>) -> Result<Arc<Agreed>> {
        let saved = self.call(move |disk| disk.save_snapshot(state)).await?;
        self.covered.send_replace(saved.last_applied);
        Ok(saved)
    }

    /// Waits, for a limited time, for a snapshot that has this entry: where one comes from the
    /// leader, Raft asks for the purge of what is in it when the other task has not yet saved it.
    pub(super) async fn is_covered(&self, id: LogId<u64>) {
        let mut covered = self.covered.subscribe();
        // Where none comes, the purge says so.
        let _ = timeout(SNAPSHOT_LIMIT, covered.wait_for(|covered| covers(*covered, id))).await;
    }

    /// Makes a call that blocks, after all that were begun before it. It goes on to its end, and
    /// the next one waits for that, when this future is dropped.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Disk) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let mut disk = self.disk.clone().lock_owned().await;
        let done = tokio::task::spawn_blocking(move || disk.call(call)).await;
        done.unwrap_or_else(|error| {
            Err(Error::ThreadPanicked { place: "the members' storage".into(), message: error.to_string() })
        })
    }

    /// Looks at what is in memory of it, after all that was begun before.
    pub(super) async fn look<T>(&self, look: impl FnOnce(&Disk) -> T) -> T {
        look(&*self.disk.lock().await)
    }
}

/// What Raft is told of a failure. It ends then, and answers all that waits with it.
pub(super) fn failed(subject: ErrorSubject<u64>, verb: ErrorVerb) -> impl FnOnce(Error) -> StorageError<u64> {
    move |error| StorageIOError::new(subject, verb, AnyError::new(&error)).into()
}
