//! The log and the vote, as Raft asks for them.

use std::fmt::Debug;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{ErrorSubject, ErrorVerb, LogId, LogState, OptionalSend, RaftLogReader, StorageError, Vote};

use super::log::{Entries, StoredEntry};
use super::worker::{Worker, failed};
use crate::lock::lock;
use crate::members::types::{LogEntry, TypeConfig};

/// Bytes of JSON that the entries of one message have at most, if it is more than one.
const BATCH_BYTES: usize = 64 * 1024;

/// The log and the vote of a member.
#[derive(Debug)]
pub(crate) struct LogStore {
    worker: Worker,
}

impl LogStore {
    pub(super) fn new(worker: Worker) -> LogStore {
        LogStore { worker }
    }
}

/// Reads entries, which are all in memory.
#[derive(Clone, Debug)]
pub(crate) struct LogReader {
    entries: Arc<Mutex<Entries>>,
}

impl LogReader {
    fn range(&self, range: impl RangeBounds<u64>, bytes: usize) -> Vec<LogEntry> {
        use std::ops::Bound::*;
        // The map panics where a range ends before it begins.
        let start = match range.start_bound() {
            Included(&start) => Included(start),
            Excluded(&start) => Excluded(start),
            Unbounded => Unbounded,
        };
        let mut room = bytes;
        let entries = lock(&self.entries);
        let from = entries.range((start, Unbounded)).take_while(|(index, _)| range.contains(*index));
        from.enumerate()
            .take_while(|(at, (_, StoredEntry { bytes, .. }))| {
                let fits = *bytes <= room || *at == 0;
                room = room.saturating_sub(*bytes);
                fits
            })
            .map(|(_, (_, kept))| kept.entry.clone())
            .collect()
    }
}

impl RaftLogReader<TypeConfig> for LogReader {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<LogEntry>, StorageError<u64>> {
        Ok(self.range(range, usize::MAX))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<LogEntry>, StorageError<u64>> {
        Ok(self.range(start..end, BATCH_BYTES))
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<LogEntry>, StorageError<u64>> {
        self.get_log_reader().await.try_get_log_entries(range).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        Ok(self.worker.look(|disk| disk.log_state()).await)
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader { entries: self.worker.entries.clone() }
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let vote = *vote;
        let saved = self.worker.call(move |disk| disk.save_vote(vote)).await;
        saved.map_err(failed(ErrorSubject::Vote, ErrorVerb::Write))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        Ok(self.worker.look(|disk| disk.vote).await)
    }

    async fn append<I>(
        &mut self,
        entries: I,
        flushed: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = LogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<LogEntry> = entries.into_iter().collect();
        let appended = self.worker.call(move |disk| disk.append(entries)).await;
        // Where it failed, the error below says so.
        appended.map_err(failed(ErrorSubject::Logs, ErrorVerb::Write))?;
        flushed.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, since: LogId<u64>) -> Result<(), StorageError<u64>> {
        let truncated = self.worker.call(move |disk| disk.truncate(since)).await;
        truncated.map_err(failed(ErrorSubject::Log(since), ErrorVerb::Delete))
    }

    async fn purge(&mut self, upto: LogId<u64>) -> Result<(), StorageError<u64>> {
        if !self.worker.look(|disk| disk.may_purge(upto)).await {
            self.worker.is_covered(upto).await;
        }
        let purged = self.worker.call(move |disk| disk.purge(upto)).await;
        purged.map_err(failed(ErrorSubject::Log(upto), ErrorVerb::Delete))
    }
}
