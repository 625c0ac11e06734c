//! A primary's files that, read as they are, are no committed state, and a state that the primary
//! can prove in them.
//!
//! There are two ways. Either the file alone is such a state, and the primary can do without the
//! WAL. Or the log's pages over what is there are the state that the log ends with, which its
//! checksum proves. In both ways the primary first keeps in `lost` what it gives up.

use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::engine::checkpoint::generation::{begin_generation, begin_unproved};
use crate::engine::checkpoint::restart::{lock_marks, unlock_marks};
use crate::engine::file::database::Tip;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::{self, IncomingState, Ready};
use crate::engine::lost::{self, Replaced};
use crate::engine::recover::Findings;
use crate::engine::recover::position::Wal;
use crate::error::{Error, Result};
use crate::files::{self, reserve, sync_directory};
use crate::page::PageNo;
use crate::report::Condition;
use crate::status::unix_millis;
use crate::txid::{Place, Position};
use crate::wal::frame_offset;
use crate::wire::{HealBegin, RecordPart, SnapEnd};

/// Longest wait for readers of a WAL that is to go.
const READERS_WAIT: Duration = Duration::from_secs(5);
/// Pages that one step hashes.
const SPAN_PAGES: u32 = 64;
/// Where the first page says how many there are.
const SIZE_AT: usize = 28;

impl Findings {
    /// The state that the file alone is, if it is as it was left, or if its hash has a name.
    pub(in crate::engine) fn file_alone(&mut self) -> Result<Option<Tip>> {
        let size = self.base.page_size;
        let mut page = vec![0; size.bytes()];
        self.handle.read(&mut page, 0)?;
        let pages =
            u32::from_be_bytes([page[SIZE_AT], page[SIZE_AT + 1], page[SIZE_AT + 2], page[SIZE_AT + 3]]);
        if pages == 0 || u64::from(pages) * u64::from(size.get()) > self.handle.size()? {
            return Ok(None);
        }
        let left = self.at_rest()?;
        let sum = self.base.hash_all(&mut self.handle, 0, pages)?;
        let position = match left {
            Some(position) => Some(position).filter(|position| position.checksum() == sum),
            None => self.named(sum),
        };
        Ok(position.map(|position| Tip { position, pages, ..self.base.tip() }))
    }

    /// Goes on without the WAL from the state that the file alone is.
    pub(in crate::engine) fn drop_wal(&mut self, why: &str, tip: Tip) -> Result<()> {
        let (path, position) = (self.base.path(), tip.position);
        self.base.node.report(Condition::WalDropped { path, position, why });
        if !lock_marks(&self.base, &mut self.handle, READERS_WAIT, || false)? {
            return Err(Error::Timeout { what: "readers of a damaged WAL".into(), after: READERS_WAIT });
        }
        let begun = self.set_wal_aside().and_then(|()| begin_generation(&self.base, &mut self.handle, &tip));
        unlock_marks(&mut self.handle)?;
        begun?;
        self.exact = self.history.place(tip.position.txid()) == Place::OnHistory;
        (self.wal, self.anchor) = (Wal::Gone, None);
        Ok(())
    }

    /// Puts the changes of the whole log over what SQLite reads. If that makes exactly the state
    /// which the log ends with, it takes the place of what is there.
    pub(in crate::engine) fn mend(self, why: &str) -> Result<Findings> {
        let log = self.base.log.clone();
        let (Some(from), Some(to)) = (log.start(), log.tip()) else { return Ok(self) };
        if from == to || self.history.place(to.txid()) != Place::OnHistory || !self.leads_to_all(to)? {
            return Ok(self);
        }
        self.base.node.report(Condition::MendStarted { path: self.base.path(), why });
        let paths = self.base.options.paths.clone();
        let mut live = WalAppender::new(self.base.clone(), self.handle)?;
        let ready = match over_all(&mut live, from, to) {
            Ok(ready) => Some(ready),
            Err(error) if matches!(error, Error::ShutDown) || error.is_fatal() => return Err(error),
            Err(error) => {
                live.base.node.report(Condition::MendFailed { error: &error });
                None
            }
        };
        let Some(ready) = ready else {
            incoming::discard(&paths)?;
            return Ok(Findings { handle: live.handle, ..self });
        };
        // All that may find no room, before this changes anything.
        keep(&mut live, &ready)?;
        let opened = Findings { handle: live.handle, ..self };
        opened.set_wal_aside()?;
        let (base, tip) = (opened.base.clone(), opened.base.tip());
        if tip.frame > 0 {
            base.wal.cut_behind(tip.frame, tip.salts, base.page_size)?;
        } else {
            reserve::with(paths.state_dir(), || base.wal.extend(frame_offset(2, base.page_size)))?;
        }
        let mut live = WalAppender::new(base.clone(), opened.handle)?;
        if tip.frame == 0 {
            // There is no generation to append to. The anchor does not say that the file is at
            // rest: it is not.
            let begun = begin_unproved(&base, &mut live.handle, &tip)?;
            live.resume(begun);
        }
        replace(&mut live, &ready)?;
        incoming::discard(&paths)?;
        live.base.node.report(Condition::Mended { position: to, pages: ready.have.len() });
        Ok(Findings { handle: live.handle, exact: true, ..opened })
    }

    /// Keeps the WAL's bytes, whatever they are.
    pub(in crate::engine) fn set_wal_aside(&self) -> Result<()> {
        if self.base.wal.bytes()? == 0 {
            return Ok(());
        }
        let paths = &self.base.options.paths;
        let (wal, lost) = (paths.wal(), paths.lost());
        if let Some(kept) = lost::same_file(&lost, "wal-", &wal)? {
            // An earlier start came no further.
            self.base.node.report(Condition::WalAlreadyKept { kept: &kept });
            return Ok(());
        }
        let kept = lost.join(format!("wal-{}", unix_millis()));
        files::make_directory(&kept)?;
        let to = kept.join(wal.file_name().unwrap_or_default());
        files::copy(&wal, &to)?;
        sync_directory(&kept)?;
        sync_directory(&lost)?;
        sync_directory(paths.state_dir())?;
        self.base.node.report(Condition::WalKept { kept: &kept });
        Ok(())
    }
}

/// The state that all of the log makes of what is there.
fn over_all(live: &mut WalAppender, from: Position, to: Position) -> Result<Ready> {
    let base = live.base.clone();
    let (log, paths) = (&base.log, &base.options.paths);
    let before = to.number().saturating_sub(1);
    let pages = log.list(before, 1)?.first().map_or(0, |last| last.pages);
    let Some(lsn) = (match log.find(from.number())? {
        crate::log::Lookup::At { lsn, .. } => Some(lsn),
        _ => None,
    }) else {
        return Err(Error::NoState("the log begins with no record".into()));
    };
    incoming::discard(paths)?;
    let begin = HealBegin { from, page_size: base.page_size, pages, compare: true, diverged: true };
    let there = base.tip().pages;
    let mut incoming = IncomingState::over(paths, base.page_key, begin, there, None)?;
    incoming.with(Some(live), |overlay, store| {
        let mut next = 1;
        while let Some(first) = PageNo::new(next).filter(|_| next <= there) {
            overlay.count_in(first, SPAN_PAGES.min(there - next + 1), store)?;
            next += SPAN_PAGES;
        }
        Ok::<_, Error>(())
    })?;
    incoming.end(SnapEnd { exact_at: to, pages }, Some(live)).map_err(|error| error.of_log(log, lsn))?;
    let mut at = lsn;
    log.records(lsn, log.complete(), |unit, message| {
        for part in message.parts() {
            let taken = match part {
                RecordPart::Begin(begin) => incoming.txn_begin(begin),
                RecordPart::Change(change) => incoming.change(&change, Some(live)),
                RecordPart::End(end) => incoming.txn_end(end, Some(live)).map(drop),
            };
            taken.map_err(|error| error.of_log(log, at))?;
        }
        at += unit.raw.len() as u64;
        Ok(())
    })?;
    incoming.finish()
}

/// Keeps what the node is about to replace.
fn keep(live: &mut WalAppender, ready: &Ready) -> Result<()> {
    let base = live.base.clone();
    let quota_bytes = base.options.lost_bytes;
    let replaced = Replaced { ready, fork: None, records_from: None, quota_bytes, damaged: true };
    let kept = lost::keep(&base.options.paths, live, &replaced)?;
    base.node.report(Condition::PagesKept { kept: kept.path() });
    Ok(())
}

/// Puts a state that was proved in the place of what is there, in one transaction in the WAL. That
/// transaction is on the disk on return.
pub(in crate::engine) fn replace(live: &mut WalAppender, ready: &Ready) -> Result<()> {
    let base = live.base.clone();
    let mut differing = Differing::new(ready);
    live.replace(&mut |live| differing.next(live), ready.position, ready.size, &mut |tip| {
        base.sync_wal()?;
        base.announce(tip, base.file_state())
    })?;
    base.sync_wal()
}

/// The pages that a heal brought and that are not the same here, one after the other.
struct Differing<'a> {
    ready: &'a Ready,
    next: Option<PageNo>,
    ours: Vec<u8>,
}

impl<'a> Differing<'a> {
    fn new(ready: &'a Ready) -> Differing<'a> {
        Differing { ready, next: Some(PageNo::FIRST), ours: vec![0; ready.page_size.bytes()] }
    }

    fn next(&mut self, live: &mut WalAppender) -> Result<Option<(PageNo, Bytes)>> {
        while let Some(number) = self.next.and_then(|next| self.ready.have.from(next).next()) {
            self.next = number.get().checked_add(1).and_then(PageNo::new);
            let mut theirs = BytesMut::zeroed(self.ours.len());
            self.ready.read(number, &mut theirs)?;
            let beyond = number.get() > live.base.tip().pages;
            if !beyond {
                live.read_current(number, &mut self.ours)?;
            }
            if beyond || self.ours[..] != theirs[..] {
                return Ok(Some((number, theirs.freeze())));
            }
        }
        Ok(None)
    }
}
