//! The state that the entries make, and its snapshots, as Raft asks for them.

use std::sync::Arc;

use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, ErrorSubject, ErrorVerb, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta,
    StorageError, StorageIOError, StoredMembership,
};
use tokio::sync::watch;

use super::worker::{Worker, failed};
use crate::members::types::{Agreed, LogEntry, Member, Ruling, TypeConfig, snapshot_of};

/// The state of a member: in memory, and on the disk as of its newest snapshot.
#[derive(Debug)]
pub(crate) struct StateMachine {
    worker: Worker,
    state: watch::Sender<Arc<Agreed>>,
}

impl StateMachine {
    pub(super) fn new(worker: Worker, state: watch::Sender<Arc<Agreed>>) -> StateMachine {
        StateMachine { worker, state }
    }

    pub(super) fn now(&self) -> Arc<Agreed> {
        self.state.borrow().clone()
    }
}

/// Makes a snapshot of the state that was there when it was asked for.
#[derive(Debug)]
pub(crate) struct SnapshotBuilder {
    worker: Worker,
    state: Arc<Agreed>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<u64>> {
        let state = self.state.clone();
        let saved = self.worker.save_snapshot(state).await;
        let saved = saved.map_err(failed(ErrorSubject::Snapshot(None), ErrorVerb::Write))?;
        Ok(snapshot_of(Agreed::clone(&saved)))
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, Member>), StorageError<u64>> {
        let state = self.now();
        Ok((state.last_applied, state.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Ruling>, StorageError<u64>>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut state = Agreed::clone(&self.now());
        let applied = entries.into_iter().map(|entry| state.apply(entry)).collect();
        self.state.send_replace(Arc::new(state));
        Ok(applied)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { worker: self.worker.clone(), state: self.now() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Agreed>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, Member>,
        snapshot: Box<Agreed>,
    ) -> Result<(), StorageError<u64>> {
        if snapshot.last_applied != meta.last_log_id || snapshot.membership != meta.last_membership {
            let why = AnyError::error("the snapshot is not what its head says");
            return Err(StorageIOError::write_snapshot(Some(meta.signature()), why).into());
        }
        let state = Arc::new(*snapshot);
        let saved = self.worker.save_snapshot(state.clone()).await;
        saved.map_err(failed(ErrorSubject::Snapshot(Some(meta.signature())), ErrorVerb::Write))?;
        self.state.send_replace(state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError<u64>> {
        let snapshot = self.worker.look(|disk| disk.snapshot.clone()).await;
        Ok(snapshot.map(|state| snapshot_of(Agreed::clone(&state))))
    }
}
