//! Verification: hashes all pages of one state beside readers and writers, and compares the sum
//! with the position.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;
use std::sync::TryLockError;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::checksum::{Checksum, PageHash};
use crate::engine::apply::handle::ReplicaEngine;
use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::doubt;
use crate::engine::file::hash::Whole;
use crate::engine::file::reader::reader;
use crate::engine::file::term::Term;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::log::Lookup;
use crate::page::PageNo;
use crate::report::Condition;
use crate::sqlite::{Handle, Lock, Slot};
use crate::status::Verification;
use crate::threads::caught;
use crate::txid::Position;
use crate::wire::{PageChange, RecordPart};

/// Longest wait for one of SQLite's four read marks.
const MARK_WAIT: Duration = Duration::from_secs(10);
/// Pause between two tries of them.
const MARK_STEP: Duration = Duration::from_millis(1);
/// A limited verification sleeps in steps of at most this, so that it sees the node's end.
const SLEEP_STEP: Duration = Duration::from_millis(10);
/// Databases of fewer runs than this are hashed by one thread.
const TWO_THREADS_RUNS: u32 = 256;
/// Bytes of the log that are read at a time.
const LOG_BYTES: usize = 1 << 20;
/// Pages whose hashes a verification remembers from the log, at most, of some 32 bytes each. Bad
/// ones among the others stay unnamed.
const KNOWN_MAX: usize = 1 << 20;
/// The most pages that a verification names.
const BAD_MAX: usize = Verification::BAD_PAGES_MAX;

impl PrimaryEngine {
    /// Hashes the whole database at its last transaction. Blocks for as long as that takes.
    pub(crate) fn verify(&self, bytes_per_second: Option<NonZeroU64>) -> Result<Verification> {
        self.base.check()?;
        verify(&self.base, reader(&self.base)?, bytes_per_second)
    }

    /// The right hashes of the pages that a verification has named, by the log. Blocks.
    pub(crate) fn right_hashes(&self, verification: &Verification) -> Result<BTreeMap<PageNo, PageHash>> {
        let known = logged(&self.base, verification.position)?;
        let named = |number: &PageNo| Some((*number, *known.get(number)?));
        Ok(verification.bad_pages.iter().filter_map(named).collect())
    }
}

impl ReplicaEngine {
    /// Hashes the whole database at the last transaction that this replica applied. Blocks for as
    /// long as that takes.
    pub(crate) fn verify(&self, bytes_per_second: Option<NonZeroU64>) -> Result<Verification> {
        let (base, handle) = {
            // The apply thread takes the base out before it closes its connections. Until then the
            // wal-index is mapped, and our connection keeps it so.
            let shared = lock(&self.shared.term);
            let base =
                shared.clone().ok_or_else(|| Error::NoState("the replica is not filled yet".into()))?;
            let handle = reader(&base)?;
            (base, handle)
        };
        base.check()?;
        verify(&base, handle, bytes_per_second)
    }
}

fn verify(base: &Term, mut handle: Handle, limit: Option<NonZeroU64>) -> Result<Verification> {
    let begun = Instant::now();
    let tip = pin(base, &mut handle)?;
    let found = hash(base, &mut handle, &tip, limit)?;
    let mut verification = Verification {
        position: tip.position,
        found,
        pages: tip.pages,
        bytes: u64::from(tip.pages) * u64::from(base.page_size.get()),
        bad_pages: Vec::new(),
        all_named: true,
        finished: SystemTime::UNIX_EPOCH,
        elapsed: Duration::ZERO,
    };
    if verification.holds() {
        doubt::end(&base.options.paths);
    } else {
        let named = name_bad_pages(base, &mut handle, &tip, found);
        (verification.bad_pages, verification.all_named) = match named {
            Err(error) if matches!(error, Error::ShutDown) || error.is_fatal() => return Err(error),
            Err(error) => {
                base.node.report(Condition::BadPagesUnnamed { error: &error });
                (Vec::new(), false)
            }
            Ok(named) => named,
        };
        doubt::begin(&base.options.paths, &verification.problem());
    }
    (verification.finished, verification.elapsed) = (SystemTime::now(), begun.elapsed());
    Ok(verification)
}

/// Fails when the node ends, whatever ends it.
fn stopped(base: &Term) -> Result<()> {
    if base.stopping() || base.node.stop.is_cancelled() { Err(Error::ShutDown) } else { Ok(()) }
}

/// Holds the state at the tip still, for as long as the handle lives. No thread copies a frame
/// after it into the file, and none begins the WAL anew. It holds a read mark as a reader does, but
/// at the tip, whose position is known. It never takes READ0, which would keep all frames out of
/// the file.
fn pin(base: &Term, handle: &mut Handle) -> Result<Tip> {
    let mut end = Instant::now() + MARK_WAIT;
    while Instant::now() < end {
        stopped(base)?;
        match base.backfill.try_lock() {
            // The loop waits in steps for a copy that is under way, because the node may end
            // meanwhile.
            Err(TryLockError::WouldBlock) => end = Instant::now() + MARK_WAIT,
            // Between the look at the tip and the lock no thread copies frames after it, nor begins
            // the WAL anew.
            _nobody_copies => {
                let tip = base.tip();
                if pin_at(base, handle, tip.frame)? {
                    return Ok(tip);
                }
            }
        }
        std::thread::sleep(MARK_STEP);
    }
    let what = "a read mark: readers hold all of them at newer states".into();
    Err(Error::Timeout { what, after: MARK_WAIT })
}

fn pin_at(base: &OpenDatabase, handle: &mut Handle, frame: u32) -> Result<bool> {
    for mark in 1..5 {
        let slot = Slot::read(mark);
        if handle.try_lock(slot, Lock::Exclusive)? {
            base.index.set_read_mark(mark, frame);
            handle.unlock(slot, Lock::Exclusive)?;
            if share(base, handle, mark, frame)? {
                return Ok(true);
            }
        }
    }
    // All are in use. One that stands at an older frame protects what comes after it as well.
    for mark in 1..5 {
        if share(base, handle, mark, frame)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Shares a mark if it protects the frame. No reader moves a shared mark.
fn share(base: &OpenDatabase, handle: &mut Handle, mark: usize, frame: u32) -> Result<bool> {
    let slot = Slot::read(mark);
    if !handle.try_lock(slot, Lock::Shared)? {
        return Ok(false);
    }
    // A reader may have moved the mark in between.
    if base.index.read_mark(mark) <= frame && !base.doubts(slot) {
        return Ok(true);
    }
    handle.unlock(slot, Lock::Shared)?;
    Ok(false)
}

/// The sum over all pages at the tip, which the caller has pinned. Sums commute, so two threads may
/// share the runs.
fn hash(base: &Term, handle: &mut Handle, tip: &Tip, limit: Option<NonZeroU64>) -> Result<Checksum> {
    let whole = Whole::new(base, tip.frame, tip.pages);
    let (next, begun) = (AtomicU32::new(0), Instant::now());
    let work = |handle: &mut Handle| {
        let (mut sum, mut buffer) = (Checksum::EMPTY, Vec::new());
        loop {
            let run = next.fetch_add(1, Ordering::Relaxed);
            if run >= whole.runs() {
                return Ok(sum);
            }
            let added = pause(base, whole.pages_before(run), begun, limit)
                .and_then(|()| whole.add_run(handle, run, &mut buffer, sum));
            // The other thread need not go on either.
            sum = added.inspect_err(|_| next.store(whole.runs(), Ordering::Relaxed))?;
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    if limit.is_some() || cores < 2 || whole.runs() < TWO_THREADS_RUNS {
        return work(handle);
    }
    let mut second = reader(base)?;
    std::thread::scope(|scope| {
        let helper = std::thread::Builder::new().name("replite-verify-2".into());
        let other = helper
            .spawn_scoped(scope, || caught("replite-verify-2", || work(&mut second)).flatten())
            .map_err(Error::io("spawn", "replite-verify-2"))?;
        let ours = work(handle);
        let theirs = other.join().unwrap_or(Err(Error::ShutDown));
        Ok(ours?.plus(theirs?))
    })
}

/// Sleeps for as long as the limit asks for after this many pages.
fn pause(base: &Term, pages: u32, begun: Instant, limit: Option<NonZeroU64>) -> Result<()> {
    let due = limit.map_or(Duration::ZERO, |limit| {
        let bytes = u128::from(pages) * u128::from(base.page_size.get());
        Duration::from_millis((bytes * 1000 / u128::from(limit.get())) as u64)
    });
    loop {
        stopped(base)?;
        let left = due.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(SLEEP_STEP));
    }
}

/// Names the pages that are not what the newest record with them says, and says whether they are
/// the whole difference.
fn name_bad_pages(
    base: &Term,
    handle: &mut Handle,
    tip: &Tip,
    found: Checksum,
) -> Result<(Vec<PageNo>, bool)> {
    let mut known: Vec<(PageNo, PageHash)> = logged(base, tip.position)?.into_iter().collect();
    known.sort_unstable_by_key(|(number, _)| *number);
    let (mut bad, mut mended) = (Vec::new(), found);
    let mut page = vec![0; base.page_size.bytes()];
    for (number, right) in known {
        stopped(base)?;
        base.read_page(handle, number, tip.frame, &mut page)?;
        let wrong = base.page_key.hash(number, &page);
        if wrong != right {
            mended = mended.without(wrong).with(right);
            if bad.len() == BAD_MAX {
                return Ok((bad, false));
            }
            bad.push(number);
        }
    }
    Ok((bad, mended == tip.position.checksum()))
}

/// The hash of each page that the retained log has an image of, as of a state. None when the log
/// does not reach to that state.
fn logged(base: &Term, at: Position) -> Result<HashMap<PageNo, PageHash>> {
    let log = &base.log;
    let (mut known, mut size) = (HashMap::new(), u32::MAX);
    let Some(start) = log.start() else { return Ok(known) };
    let Lookup::At { mut lsn, .. } = log.find(start.number())? else { return Ok(known) };
    let pin = log.pin(lsn);
    let mut decoder = log.decoder();
    let corrupt = |lsn, e: crate::wire::WireError| log.corrupt(lsn, e.to_string());
    loop {
        stopped(base)?;
        let bytes = log.read_disk(lsn, LOG_BYTES)?;
        if bytes.is_empty() {
            return Ok(HashMap::new());
        }
        lsn += bytes.len() as u64;
        decoder.push(bytes);
        while let Some(unit) = decoder.next().map_err(|e| corrupt(lsn, e))? {
            // The hash of the unit was verified: a damaged log names no page.
            for part in unit.decode().map_err(|e| corrupt(lsn, e))?.parts() {
                match part {
                    RecordPart::Change(PageChange { number, hash, .. }) => {
                        if known.len() < KNOWN_MAX || known.contains_key(&number) {
                            known.insert(number, hash);
                        }
                    }
                    RecordPart::End(end) => {
                        if end.pages < size {
                            known.retain(|number, _| number.get() <= end.pages);
                        }
                        size = end.pages;
                        if end.after == at {
                            return Ok(known);
                        }
                        if end.after.number() >= at.number() {
                            return Ok(HashMap::new());
                        }
                    }
                    RecordPart::Begin(_) => {}
                }
            }
        }
        if decoder.buffered() == 0 {
            pin.advance(lsn);
            lsn = log.step_over(lsn);
        }
    }
}
