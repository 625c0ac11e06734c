//! What the log's mutex guards: segments, the end, pins.
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::BytesMut;

use super::scan::{HEAD_BYTES, Index};
use super::{LogOptions, segments};
use crate::checksum::Fingerprint;
use crate::descriptors::NodeFile;
use crate::error::{Error, Result};
use crate::files;
use crate::txid::Position;
use crate::wire::{self, Message, Segment};

/// Rotated segments that may stay without an fsync; `recover` verifies as many before the last one.
const ROTATED_UNSYNCED_MAX: usize = 1;

/// One segment's file.
#[derive(Debug)]
pub(super) struct Seg {
    pub(super) path: PathBuf,
    pub(super) start: u64,
    pub(super) end: u64,
    /// The position before its first record.
    pub(super) before: Position,
    /// When its newest record was appended, or the log was opened if that was later. No record goes
    /// because the clock of the system jumps.
    pub(super) newest: Instant,
    /// `None` until somebody searches in it: a segment of an earlier opening.
    pub(super) index: Option<Index>,
}

impl Seg {
    pub(super) fn file_bytes(&self) -> u64 {
        HEAD_BYTES + self.end - self.start
    }

    fn cut(&mut self, lsn: u64) {
        self.end = self.end.min(lsn);
        if let Some(index) = &mut self.index {
            index.cut(lsn);
        }
    }
}

/// Cuts a segment's file where the segment ends. Should this fail, the next segment's head still
/// says where.
fn truncate(segment: &Seg) -> Result<(Arc<NodeFile>, PathBuf)> {
    let file = segments::open_to_write(&segment.path)?;
    file.set_len(segment.file_bytes()).map_err(Error::io("truncate", &segment.path))?;
    Ok((Arc::new(file), segment.path.clone()))
}

#[derive(Debug, Default)]
pub(super) struct LogState {
    /// What pages in its records are hashed with.
    pub(super) key: Fingerprint,
    /// Oldest first. Empty only when the log is.
    pub(super) segments: VecDeque<Seg>,
    /// The last segment's file; `None`: the next append begins a new one. `Some` within a record.
    pub(super) file: Option<Arc<NodeFile>>,
    pub(super) end: u64,
    /// How often all records were dropped.
    pub(super) renewals: u64,
    /// The end at which the last segment's file was fsynced, if it was.
    pub(super) synced: Option<u64>,
    /// The address after the last complete record.
    pub(super) complete: u64,
    pub(super) tip: Option<Position>,
    /// An fsync failed. No later one tells what of the records is on the disk. Before the log has
    /// forgotten them, it appends nothing and says of nothing that it is synced.
    pub(super) doubtful: bool,
    /// The last segment's file has bytes beyond `end` that could not be cut off.
    pub(super) sealed: bool,
    /// By id, the address from which on a reader needs the log.
    pub(super) pins: BTreeMap<u64, u64>,
    pub(super) next_pin: u64,
    /// Segments before the last one that were not fsynced yet.
    pub(super) rotated: Vec<(Arc<NodeFile>, PathBuf)>,
    /// Files of segments that were dropped and are still to be removed.
    pub(super) garbage: Garbage,
    /// Bytes of those that are being removed without the log's lock.
    pub(super) going: u64,
    /// Files were created or removed since the directory was fsynced.
    pub(super) dir_dirty: bool,
}

/// Files that no reader needs, and that still take room on the disk.
#[derive(Default, Debug)]
pub(super) struct Garbage {
    pub(super) paths: Vec<PathBuf>,
    pub(super) bytes: u64,
}

impl Garbage {
    fn add(&mut self, dropped: Seg) {
        self.bytes += dropped.file_bytes();
        self.paths.push(dropped.path);
    }
}

impl LogState {
    /// An empty log.
    pub(super) fn new(key: Fingerprint) -> LogState {
        LogState { key, ..LogState::default() }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(Seg::file_bytes).sum()
    }

    /// Appends, in a new segment where one is due. Says whether one was begun.
    pub(super) fn append(
        &mut self,
        dir: &Path,
        options: &LogOptions,
        units: &[u8],
        after: Option<Position>,
    ) -> Result<bool> {
        if self.tip.is_none() {
            return Err(Error::Internal("an append to a log that has no position".to_owned()));
        }
        self.expect_sound(dir)?;
        if self.bytes() + HEAD_BYTES + units.len() as u64 > options.quota_bytes {
            let source = io::Error::new(io::ErrorKind::QuotaExceeded, "the log's own quota");
            return Err(Error::Io { op: "append to the log in", path: dir.to_path_buf(), source });
        }
        let full = self.segments.back().is_none_or(|s| s.end - s.start >= options.segment_bytes.max(1));
        let begun = self.complete == self.end && (full || self.file.is_none());
        if begun {
            self.begin_segment(dir)?;
        }
        let (Some(segment), Some(file)) = (self.segments.back_mut(), &self.file) else {
            return Err(Error::Internal("a log without a segment to append to".to_owned()));
        };
        let offset = HEAD_BYTES + segment.end - segment.start;
        self.sealed = self.sealed && file.set_len(offset).is_err();
        if self.sealed {
            let source = io::Error::other("an earlier write failed and could not be taken back");
            return Err(Error::Io { op: "append to", path: segment.path.clone(), source });
        }
        if let Err(source) = files::write_all_at(file, units, offset) {
            // What was written of it must not stand after the end: a later, shorter append would
            // leave its rest.
            self.sealed = file.set_len(offset).is_err();
            return Err(Error::Io { op: "append to", path: segment.path.clone(), source });
        }
        if self.complete == self.end
            && let (Some(index), Some(tip)) = (&mut segment.index, self.tip)
        {
            index.note(tip.number(), self.end);
        }
        segment.newest = Instant::now();
        segment.end += units.len() as u64;
        self.end = segment.end;
        if after.is_some() {
            (self.complete, self.tip) = (self.end, after);
        }
        Ok(begun)
    }

    /// Forgets the oldest segments, also those that readers need, until so many bytes more stay
    /// within the quota. Says whether files must be gone before that.
    pub(super) fn make_room(&mut self, options: &LogOptions, more: u64) -> bool {
        let mut bytes = self.bytes() + HEAD_BYTES + more;
        while bytes > options.quota_bytes && self.segments.len() > 1 {
            bytes -= self.drop_oldest();
        }
        let unneeded = self.garbage.bytes + self.going;
        unneeded > 0 && bytes + unneeded > options.quota_bytes
    }

    /// Forgets the oldest segment. Returns the bytes of its file.
    pub(super) fn drop_oldest(&mut self) -> u64 {
        let Some(oldest) = self.segments.pop_front() else { return 0 };
        let bytes = oldest.file_bytes();
        self.garbage.add(oldest);
        self.dir_dirty = true;
        bytes
    }

    /// Begins the segment that the next record goes to. On an error nothing has changed.
    pub(super) fn begin_segment(&mut self, dir: &Path) -> Result<()> {
        let Some(before) = self.tip else { return Ok(()) };
        // The one before is fsynced by now as a rule: `sync` had a whole segment's time for it.
        while self.rotated.len() >= ROTATED_UNSYNCED_MAX {
            let (file, path) = &self.rotated[0];
            let synced = file.sync_data().map_err(Error::io("fsync", path));
            self.noted(synced)?;
            self.rotated.remove(0);
        }
        let start = self.end;
        let path = segments::path(dir, start);
        let file = files::create(&path)?;
        let mut head = BytesMut::new();
        let (follows, key) = (self.segments.back().map(|s| s.end), self.key);
        wire::encode(&Message::Segment(Segment { start, before, follows, key }), &mut head);
        if let Err(source) = files::write_all_at(&file, &head, 0) {
            segments::remove(std::slice::from_ref(&path));
            return Err(Error::Io { op: "write", path, source });
        }
        if let (Some(file), Some(last)) = (self.file.take(), self.segments.back()) {
            self.rotated.push((file, last.path.clone()));
        }
        self.file = Some(Arc::new(file));
        self.synced = None;
        let (newest, index) = (Instant::now(), Some(Index::default()));
        self.segments.push_back(Seg { path, start, end: start, before, newest, index });
        self.dir_dirty = true;
        Ok(())
    }

    /// Makes the head of a new segment durable.
    pub(super) fn sync_head(&mut self, dir: &Path) -> Result<()> {
        let head = match (&self.file, self.segments.back()) {
            (Some(file), Some(last)) => file.sync_data().map_err(Error::io("fsync", &last.path)),
            _ => Ok(()),
        };
        self.noted(head.and_then(|()| files::sync_directory(dir)))
    }

    /// The result of an fsync. One that failed is not forgotten; one that could not be tried is
    /// tried again.
    pub(super) fn noted(&mut self, synced: Result<()>) -> Result<()> {
        self.doubtful |= matches!(synced, Err(Error::Io { op: "fsync", .. }));
        synced
    }

    /// Fails when an fsync has.
    pub(super) fn expect_sound(&self, dir: &Path) -> Result<()> {
        if !self.doubtful {
            return Ok(());
        }
        let source = io::Error::other("an fsync failed, and what it left on the disk is not known");
        Err(Error::Io { op: "go on with the log in", path: dir.to_path_buf(), source })
    }

    /// Takes back what is at and after `lsn`, a record boundary at which the position was `tip`.
    /// The log goes on in a new segment beyond its old end. Returns the files to remove, whatever
    /// else failed.
    pub(super) fn take_back(&mut self, dir: &Path, lsn: u64, tip: Position) -> (Vec<PathBuf>, Result<()>) {
        let kept = self.segments.partition_point(|s| s.start < lsn);
        // Newest first: a crash leaves no gap.
        let mut gone: Vec<_> = self.segments.drain(kept..).map(|s| s.path).collect();
        gone.reverse();
        self.rotated.retain(|(_, path)| !gone.contains(path));
        self.dir_dirty |= !gone.is_empty();
        self.file = None;
        self.end += 1;
        (self.complete, self.tip) = (self.end, Some(tip));
        let sealed = std::mem::take(&mut self.sealed);
        let done = match self.segments.back_mut() {
            Some(last) if last.end > lsn || sealed => {
                last.cut(lsn);
                truncate(last).map(|cut| self.rotated.push(cut))
            }
            Some(_) => Ok(()),
            // Without any head the position would be forgotten with the files that go now.
            None => self.begin_segment(dir),
        };
        (gone, done)
    }

    /// Forgets all records. Returns the files to remove.
    pub(super) fn forget(&mut self, tip: Option<Position>) -> Vec<PathBuf> {
        let gone: Vec<_> = self.segments.drain(..).map(|s| s.path).collect();
        self.end += u64::from(!gone.is_empty() || self.end > 0);
        self.renewals += 1;
        (self.complete, self.tip) = (self.end, tip);
        self.file = None;
        self.sealed = false;
        self.doubtful = false;
        self.rotated.clear();
        self.dir_dirty = true;
        gone
    }

    /// All files that hold bytes which may not be on the disk, oldest first.
    pub(super) fn unsynced(&self) -> Vec<(Arc<NodeFile>, PathBuf)> {
        let current = self.file.iter().filter(|_| self.synced != Some(self.end));
        let current = current.zip(self.segments.back()).map(|(f, s)| (f.clone(), s.path.clone()));
        self.rotated.iter().cloned().chain(current).collect()
    }

    /// Forgets the oldest segments that are no longer to be kept; never the last one.
    pub(super) fn retain(&mut self, options: &LogOptions, now: Instant) {
        if self.segments.len() < 2 {
            return;
        }
        let mut bytes = self.bytes();
        let pinned = self.pins.values().min().copied();
        while self.segments.len() > 1 {
            let oldest = &self.segments[0];
            let old = now.saturating_duration_since(oldest.newest) > options.keep_age;
            let needed = pinned.is_some_and(|lsn| lsn < oldest.end) && bytes <= options.quota_bytes;
            if needed || !(old || bytes > options.keep_bytes) {
                break;
            }
            bytes -= self.drop_oldest();
        }
    }
}
