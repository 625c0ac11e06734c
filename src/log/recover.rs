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
use crate::error::{Error, Result};
use crate::files;
use crate::report::Condition;
use crate::wire::{Decoder, Message, SEGMENT_BYTES, Segment, Unit, VERSION};

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
pub(super) fn recover(dir: &Path) -> Result<LogState> {
    files::make_directory(dir)?;
    let mut candidates = list(dir)?;
    let mut drop = Vec::new();
    while let Some(torn) = candidates.pop_if(|c| c.head.is_none()) {
        Condition::SegmentHeadless { path: &torn.path, bytes: torn.length }.say();
        drop.push(torn.path);
    }
    let Some((last, head)) = candidates.pop().and_then(|c| c.head.map(|head| (c, head))) else {
        segments::remove(&drop);
        return Ok(LogState::default());
    };
    let found = verify(&last, head, last.length)?;
    let end = found.end;
    let cut = last.length > HEAD_BYTES + end - head.start;
    say_cut(&last, &found, head);
    let tip = Some(found.tip);
    let mut state = LogState { end, complete: end, tip, dir_dirty: true, ..LogState::default() };
    state.segments = run_before(&mut candidates, head)?;
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
fn run_before(candidates: &mut Vec<Candidate>, mut next: Segment) -> Result<VecDeque<Seg>> {
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
            let found = verify(candidate, head, HEAD_BYTES + end - head.start)?;
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

fn verify(candidate: &Candidate, head: Segment, until: u64) -> Result<Scan> {
    let file = files::open(&candidate.path).map_err(Error::io("open", &candidate.path))?;
    scan(&file, &candidate.path, head, until)
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
    let mut raw = [0; SEGMENT_BYTES];
    let whole = files::read_at(&file, &mut raw, 0).map_err(Error::io("read", &path))? == SEGMENT_BYTES;
    if whole && let Some(found) = Unit::newer_segment(&raw) {
        return Err(Error::Newer { path, found: found.into(), supported: VERSION.into() });
    }
    let head =
        read_head(raw).filter(|head| whole && head.start == start && head.follows.is_none_or(|f| f <= start));
    Ok(Candidate { path, head, length: meta.len() })
}

fn read_head(raw: [u8; SEGMENT_BYTES]) -> Option<Segment> {
    let mut decoder = Decoder::default();
    decoder.push(Bytes::copy_from_slice(&raw));
    match decoder.next().ok()??.decode() {
        Ok(Message::Segment(head)) => Some(head),
        _ => None,
    }
}
