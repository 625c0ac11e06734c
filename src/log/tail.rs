//! The newest bytes of the log, in memory.
use std::collections::VecDeque;

use bytes::Bytes;

/// What was appended last, as it was appended; shared by all streams without a copy.
#[derive(Debug)]
pub(super) struct Tail {
    /// With the address of the first byte of each; no holes between them.
    chunks: VecDeque<(u64, Bytes)>,
    bytes: usize,
    limit: usize,
}

impl Tail {
    pub(super) fn new(limit: usize) -> Tail {
        Tail { chunks: VecDeque::new(), bytes: 0, limit }
    }

    pub(super) fn clear(&mut self) {
        self.chunks.clear();
        self.bytes = 0;
    }

    pub(super) fn push(&mut self, lsn: u64, bytes: Bytes) {
        self.bytes += bytes.len();
        self.chunks.push_back((lsn, bytes));
        while self.bytes > self.limit {
            let Some((_, oldest)) = self.chunks.pop_front() else { break };
            self.bytes -= oldest.len();
        }
    }

    /// At most `max` bytes at `lsn`, out of one chunk.
    pub(super) fn read(&self, lsn: u64, max: usize) -> Option<Bytes> {
        let after = self.chunks.partition_point(|&(start, _)| start <= lsn);
        let (start, chunk) = self.chunks.get(after.checked_sub(1)?)?;
        let from = usize::try_from(lsn - start).ok().filter(|&from| from < chunk.len())?;
        Some(chunk.slice(from..from.saturating_add(max).min(chunk.len())))
    }
}
