//! What is left of a log when it is opened.
use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::scan::{HEAD_BYTES, Scan, scan};
use super::segments;
use super::state::{LogState, Seg};
use crate::checksum::{Fingerprint, PageKey};
use crate::error::{Error, Result};
use crate::files;
use crate::report::Condition;
use crate::txid::Position;
use crate::wire::{Decoder, Message, SEGMENT_BYTES, SEGMENT_MAX_BYTES, Segment, Unit, VERSION};

/// A file with the name of a segment.
struct Candidate {
    path: PathBuf,
    /// `None`: its head is torn or corrupt.
    head: Option<Segment>,
    length: u64,
}

impl Candidate {
    fn end(&self, head: &Segment) -> u64 {
        head.start + self.length.saturating_sub(HEAD_BYTES)
    }
}

/// Reads a log's directory and repairs it. Nothing is changed before all of it was read.
pub(super) fn recover(dir: &Path, key: PageKey) -> Result<LogState> {
    files::make_directory(dir)?;
    let (mut candidates, of) = (list(dir)?, key.fingerprint());
    if candidates.iter().any(|c| c.head.is_some_and(|head| head.key != of)) {
        return Err(Error::Internal(format!("the log in {} is of another page key", dir.display())));
    }
    let mut drop = Vec::new();
    while let Some(torn) = candidates.pop_if(|c| c.head.is_none()) {
        Condition::SegmentHeadless { path: &torn.path, bytes: torn.length }.say();
        drop.push(torn.path);
    }
    let Some((last, head)) = candidates.pop().and_then(|c| c.head.map(|head| (c, head))) else {
        segments::remove(&drop);
        return Ok(LogState::new(of));
    };
    let found = verify(&last, head, last.length, key)?;
    let end = found.end;
    let cut = last.length > HEAD_BYTES + end - head.start;
    say_cut(&last, &found, head);
    let tip = Some(found.tip);
    let mut state = LogState { end, complete: end, tip, dir_dirty: true, ..LogState::new(of) };
    state.segments = run_before(&mut candidates, head, key)?;
    // What is left of the candidates is before a gap.
    for lost in &candidates {
        Condition::SegmentBeforeGap { path: &lost.path, bytes: lost.length }.say();
    }
    drop.splice(..0, candidates.into_iter().map(|c| c.path));
    segments::remove(&drop);
    let file = segments::open_to_write(&last.path)?;
    if cut {
        let length = HEAD_BYTES + end - head.start;
        file.set_len(length).map_err(Error::io("truncate", &last.path))?;
        file.sync_all().map_err(Error::io("fsync", &last.path))?;
    }
    if cut || !drop.is_empty() {
        files::sync_directory(dir)?;
    }
    state.file = Some(Arc::new(file));
    state.segments.push_back(Seg {
        path: last.path,
        start: head.start,
        end,
        before: head.before,
        newest: Instant::now(),
        index: Some(found.index),
    });
    Ok(state)
}

/// Takes from the end of `candidates` the segments that lead without a gap to the one with `next`
/// as its head.
fn run_before(candidates: &mut Vec<Candidate>, mut next: Segment, key: PageKey) -> Result<VecDeque<Seg>> {
    let mut run = VecDeque::new();
    while let Some(end) = next.follows
        && let Some(candidate) = candidates.last()
        && let Some(head) = candidate.head
    {
        // A file may be longer: then what was taken back from it is still there.
        if end < head.start || end > candidate.end(&head) || next.start < end {
            break;
        }
        let mut index = None;
        if run.is_empty() {
            let found = verify(candidate, head, HEAD_BYTES + end - head.start, key)?;
            if found.end != end || found.tip != next.before {
                say_cut(candidate, &found, head);
                break;
            }
            index = Some(found.index);
        }
        let Some(candidate) = candidates.pop() else { break };
        let (start, before, newest) = (head.start, head.before, Instant::now());
        run.push_front(Seg { path: candidate.path, start, end, before, newest, index });
        next = head;
    }
    Ok(run)
}

fn verify(candidate: &Candidate, head: Segment, until: u64, key: PageKey) -> Result<Scan> {
    let file = files::open(&candidate.path).map_err(Error::io("open", &candidate.path))?;
    scan(&file, &candidate.path, head, until, key)
}

fn say_cut(candidate: &Candidate, found: &Scan, head: Segment) {
    let whole = HEAD_BYTES + found.end - head.start;
    let (path, bytes) = (&candidate.path, candidate.length.saturating_sub(whole));
    match &found.problem {
        Some(problem) => {
            Condition::SegmentCorrupt { path, bytes, offset: whole, problem }.say();
        }
        None if bytes > 0 => {
            tracing::info!(path = %path.display(), bytes, "an unfinished record at the log's end is cut off");
        }
        None => {}
    }
}

/// All segments, oldest first.
fn list(dir: &Path) -> Result<Vec<Candidate>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let name = entry.file_name();
        if let Some(start) = name.to_str().and_then(segments::start_of) {
            found.push((start, entry.path()));
        }
    }
    found.sort_unstable();
    found.into_iter().map(|(start, path)| examine(path, start)).collect()
}

fn examine(path: PathBuf, start: u64) -> Result<Candidate> {
    let file = files::open(&path).map_err(Error::io("open", &path))?;
    let meta = file.metadata().map_err(Error::io("stat", &path))?;
    let mut raw = [0; SEGMENT_MAX_BYTES];
    let read = files::read_at(&file, &mut raw, 0).map_err(Error::io("read", &path))?;
    if let Some(found) = Unit::other_segment(&raw[..read]) {
        let (found, supported) = (found.into(), VERSION.into());
        return Err(match found > supported {
            true => Error::Newer { path, found, supported },
            false => Error::Older { path, found, supported },
        });
    }
    let head = raw[..read].first_chunk().and_then(read_head);
    let head = head.filter(|head| head.start == start && head.follows.is_none_or(|f| f <= start));
    Ok(Candidate { path, head, length: meta.len() })
}

/// Which page key the newest segment goes with, if its head can be read.
pub(crate) fn key_of(dir: &Path) -> Option<Fingerprint> {
    list(dir).ok()?.iter().rev().find_map(|candidate| candidate.head).map(|head| head.key)
}

/// Moves segments whose records go with another page key to a directory that `kept` makes, if there
/// is any record in them. Returns that directory, and the position before the first of them.
///
/// # Errors
/// [`Error::Newer`], [`Error::Older`]; [`Error::Io`]: what was moved by then stays there, and the
/// rest goes the next time.
pub(crate) fn move_other(
    dir: &Path,
    key: Fingerprint,
    kept: impl FnOnce() -> Result<PathBuf>,
) -> Result<Option<(PathBuf, Position)>> {
    if !dir.exists() {
        return Ok(None);
    }
    let others = list(dir)?.into_iter().filter_map(|c| c.head.filter(|head| head.key != key).map(|h| (c, h)));
    let others: Vec<_> = others.collect();
    let Some((_, oldest)) = others.first() else { return Ok(None) };
    let before = oldest.before;
    if others.iter().all(|(candidate, _)| candidate.length <= HEAD_BYTES) {
        let paths: Vec<_> = others.into_iter().map(|(candidate, _)| candidate.path).collect();
        segments::remove(&paths);
        return files::sync_directory(dir).map(|()| None);
    }
    let kept = kept()?;
    for (candidate, _) in &others {
        let Some(name) = candidate.path.file_name() else { continue };
        // What the process that wrote it had not synced may be gone by the next power cut.
        let file = files::open(&candidate.path).map_err(Error::io("open", &candidate.path))?;
        file.sync_data().map_err(Error::io("fsync", &candidate.path))?;
        fs::rename(&candidate.path, kept.join(name)).map_err(Error::io("rename", &candidate.path))?;
    }
    files::sync_directory(&kept)?;
    files::sync_directory(dir)?;
    Ok(Some((kept, before)))
}

fn read_head(raw: &[u8; SEGMENT_BYTES]) -> Option<Segment> {
    let mut decoder = Decoder::default();
    decoder.push(Bytes::copy_from_slice(raw));
    match decoder.next().ok()??.decode() {
        Ok(Message::Segment(head)) => Some(head),
        _ => None,
    }
}
