//! The apply thread's part in heals: when one begins, what is kept, and how its pages become one
//! transaction.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::engine::apply::stream_error::StreamError;
use crate::engine::apply::thread::connection::{Connection, Healing, Receiving};
use crate::engine::apply::thread::stage::{Remedy, Suspect};
use crate::engine::apply::thread::{Apply, no_state};
use crate::engine::file::doubt;
use crate::engine::file::epochs::write_epochs;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::heal::Heal;
use crate::engine::incoming::{self, IncomingState, Ready};
use crate::engine::lost::{self, Replaced, StateBefore};
use crate::engine::recover::mend;
use crate::error::{Error, PeerProblem, Result};
use crate::log::Lookup;
use crate::page::PageSize;
use crate::report::Condition;
use crate::txid::{EpochHistory, Place, Position};
use crate::wire::{HealBegin, Sent};

/// Pause after a heal that followed another one closely, doubled each time.
const HEAL_PAUSE: Duration = Duration::from_secs(1);
const HEAL_PAUSE_MAX: Duration = Duration::from_secs(60);

impl Apply {
    /// States of our log among which the primary may find the fork.
    pub(super) fn marks(&mut self) -> Vec<Position> {
        let Some(live) = self.state.known() else { return Vec::new() };
        // Commits that are not in the log touched pages that it does not know.
        if live.base.log.tip() != Some(live.position()) {
            return Vec::new();
        }
        live.base.log.marks().unwrap_or_else(|error| {
            self.node.report(Condition::ForkNotSearched { error: &error });
            Vec::new()
        })
    }

    /// What a failure of a stream says of our pages, or of the primary's log.
    pub(super) fn judge(&mut self, connection: &Connection, error: &StreamError) {
        let StreamError::Failed(error) = error else { return };
        let Some(live) = self.state.below() else {
            // The stream went on with pages of an earlier snapshot, which the thread did not verify
            // again. It does not go on with them once more.
            if leads_elsewhere(error)
                && let Err(error) = incoming::discard(&self.options.paths)
            {
                self.node.report(Condition::SnapshotNotForgotten { error: &error });
            }
            return;
        };
        let position = live.base.tip().position;
        let compared = connection.receiving.compares();
        match error {
            // Pages that the thread verified when they came led elsewhere from ours.
            error if leads_elsewhere(error) && !compared => self.suspect(Suspect::Pages),
            // Once may be the network, or a record that the primary just took back. Our own log may
            // not be readable either.
            Error::Peer { problem: PeerProblem::Garbled(_), .. } | Error::Corrupt { .. } if !compared => {
                let at = Some(position);
                if std::mem::replace(&mut self.garbled_at, at) == at && self.suspect == Suspect::No {
                    self.suspect(Suspect::Stream);
                }
            }
            _ => {}
        }
    }

    pub(super) fn suspect(&mut self, what: Suspect) {
        let text = match what {
            Suspect::No => return,
            Suspect::Stream => "the primary's log can't be read on from here: all pages are compared",
            Suspect::Pages => {
                "pages here are not what the position says: all are compared with the primary's"
            }
        };
        self.node.report(Condition::StateSuspect { path: self.options.paths.database(), text });
        if what == Suspect::Pages && doubt::text(&self.options.paths).is_none() {
            doubt::begin(&self.options.paths, text);
        }
        self.suspect = what;
    }

    /// The primary leads our state back to its own.
    pub(super) fn heal(&mut self, connection: &mut Connection, begin: HealBegin) -> Result<(), StreamError> {
        if self.state.below().is_none() {
            return self.go_on_filling(connection, begin);
        }
        self.pace.allow()?;
        let ours = self.state.content().ok_or_else(no_state)?.base.page_size;
        if ours != begin.page_size {
            return Err(self.other_page_size(ours, begin.page_size));
        }
        let live = self.state.content().ok_or_else(no_state)?;
        let why = match (begin.diverged, begin.compare) {
            (true, _) => "this node's state is not in the primary's history",
            (false, _) => "the primary's log does not reach back to this node's state",
        };
        let tip = live.base.tip();
        let HealBegin { from, compare, .. } = begin;
        self.node.report(Condition::HealStarted { position: tip.position, from, compare, why });
        let mut incoming =
            IncomingState::over(&self.options.paths, self.options.page_key(), begin, tip.pages, None)?;
        let healing = if begin.compare {
            Healing { heal: Heal::compare(begin), fork: None, records_from: None, behind: false }
        } else {
            let touched = live.base.log.touched(begin.from)?;
            let touched =
                touched.ok_or_else(|| StreamError::garbled("a fork that this log does not have"))?;
            let mut heal = Heal::since(begin, &touched);
            let want = incoming.with(Some(live), |overlay, store| {
                overlay.trust(tip.position.checksum());
                overlay.drop_above(touched.least, store)?;
                heal.want(overlay, store)
            })?;
            connection.ask(want)?;
            Healing { heal, fork: Some(begin.from), records_from: Some(touched.lsn), behind: true }
        };
        connection.receiving = Receiving::Heal(incoming, healing);
        Ok(())
    }

    /// Compares what came of a snapshot, for the primary's log does not reach back to its begin any
    /// more.
    fn go_on_filling(&mut self, connection: &mut Connection, begin: HealBegin) -> Result<(), StreamError> {
        if !begin.compare {
            return Err(no_state());
        }
        self.node.report(Condition::SnapshotResumed { from: begin.from });
        let place = self.place(begin.page_size);
        let incoming = IncomingState::over(&self.options.paths, self.options.page_key(), begin, 0, place)?;
        let heal = Heal::compare(begin);
        let healing = Healing { heal, fork: None, records_from: None, behind: false };
        connection.receiving = Receiving::Heal(incoming, healing);
        Ok(())
    }

    /// No transaction changes the size of pages: the next stream brings a snapshot. The primary's
    /// history has no state from before its pages had that size. Therefore what is here is kept.
    fn other_page_size(&mut self, ours: PageSize, theirs: PageSize) -> StreamError {
        self.state.set_remedy(Remedy::Snapshot);
        let end = StreamError::OtherPageSize { ours, theirs };
        self.node.report(Condition::PageSizeDiffers { text: &end.to_string() });
        end
    }

    pub(super) fn sent(&mut self, connection: &mut Connection, sent: Sent) -> Result<(), StreamError> {
        let (incoming, healing) = connection.healing()?;
        let below = self.state.below();
        let next = incoming.with(below, |overlay, store| healing.heal.sent(overlay, store, sent))?;
        next.map_or(Ok(()), |want| connection.ask(want))
    }

    /// A record of the primary's led to this state. When we had that record, too, the fork is not
    /// before it.
    pub(super) fn common(&mut self, connection: &mut Connection, after: Position) -> Result<()> {
        let Receiving::Heal(_, healing) = &mut connection.receiving else { return Ok(()) };
        let Some(live) = self.state.known() else { return Ok(()) };
        if healing.behind {
            let ours = live.base.log.find(after.number())?;
            healing.behind = matches!(ours, Lookup::At { before, .. } if before == after);
            if let (true, Lookup::At { lsn, .. }) = (healing.behind, ours) {
                (healing.fork, healing.records_from) = (Some(after), Some(lsn));
            }
        }
        Ok(())
    }

    pub(super) fn adopt_heal(
        &mut self,
        healing: &Healing,
        ready: &Ready,
        history: EpochHistory,
    ) -> Result<(), StreamError> {
        let live = self.state.content().ok_or_else(no_state)?;
        let damaged = self.suspect == Suspect::Pages;
        let leading = LeadingBack { healing, ready, ours: &self.history, theirs: &history, damaged };
        let kept = match leading.replace(live) {
            Ok(kept) => kept,
            Err(error) => {
                live.abort();
                return Err(error.into());
            }
        };
        self.history = history;
        self.serve(Some(ready.position))?;
        let kept = kept.map(|kept| self.tell_rows(kept, ready));
        doubt::end(&self.options.paths);
        self.suspect = Suspect::No;
        self.garbled_at = None;
        self.pace.done();
        self.shared.heals.fetch_add(1, Ordering::Relaxed);
        let (position, pages) = (ready.position, ready.have.len() as u64);
        self.node.report(Condition::Healed { position, pages, lost: kept.as_deref() });
        Ok(())
    }

    /// Notes which rows the lost branch had. The pages are kept already.
    fn tell_rows(&mut self, (path, before): (PathBuf, Option<StateBefore>), ready: &Ready) -> PathBuf {
        if let (Some(live), Some(before)) = (self.state.known(), before)
            && let Err(error) = lost::tell(&path, before, live, ready)
        {
            self.node.report(Condition::BranchUntold { error: &error, branch: &path });
        }
        path
    }
}

/// A heal whose pages are all here, on its way into a database.
struct LeadingBack<'a> {
    healing: &'a Healing,
    ready: &'a Ready,
    ours: &'a EpochHistory,
    theirs: &'a EpochHistory,
    /// The pages here may not be what the position says.
    damaged: bool,
}

impl LeadingBack<'_> {
    /// Keeps what is off the history. Then the pages that differ become one transaction, which
    /// readers see as a whole.
    fn replace(&self, live: &mut WalAppender) -> Result<Option<(PathBuf, Option<StateBefore>)>> {
        let vouched = live.base.log.tip() == Some(live.base.tip().position);
        let mut kept = None;
        if self.healing.heal.begin.diverged || !vouched || self.damaged {
            kept = Some(self.keep(live)?);
        }
        write_epochs(live.base.options.keyed(), self.theirs, false)?;
        live.base.log.reset(self.ready.position)?;
        mend::replace(live, self.ready)?;
        Ok(kept)
    }

    fn keep(&self, live: &mut WalAppender) -> Result<(PathBuf, Option<StateBefore>)> {
        let base = live.base.clone();
        let records_from = self.healing.records_from.or_else(|| self.records_since_common(live));
        let replaced = Replaced {
            ready: self.ready,
            fork: self.healing.fork,
            records_from,
            quota_bytes: base.options.lost_bytes,
            damaged: self.damaged,
        };
        let branch = lost::keep(&base.options.paths, live, &replaced)?;
        base.node.report(Condition::BranchKept { kept: branch.path(), tip: branch.tip });
        // Pages that are damaged may say nothing of rows.
        Ok((branch.path().to_owned(), StateBefore::hold(live).ok()))
    }

    /// Where the log's records begin that may be off the history.
    fn records_since_common(&self, live: &WalAppender) -> Option<u64> {
        let log = &live.base.log;
        // A transaction's name is given once: the primary has this one, and all before it.
        if log.tip().is_none_or(|logged| self.theirs.place(logged.txid()) == Place::OnHistory) {
            return None;
        }
        let from = self.ours.common(self.theirs).max(log.start()?.number());
        match log.find(from) {
            Ok(Lookup::At { lsn, .. }) => Some(lsn),
            _ => None,
        }
    }
}

/// How often heals may follow each other.
#[derive(Debug, Default)]
pub(super) struct HealPacer {
    last: Option<Instant>,
    pause: Duration,
}

impl HealPacer {
    fn allow(&self) -> Result<(), StreamError> {
        match self.last {
            Some(last) if last.elapsed() < self.pause => Err(StreamError::HealPaused { pause: self.pause }),
            _ => Ok(()),
        }
    }

    fn done(&mut self) {
        let often = self.last.is_some_and(|last| last.elapsed() < HEAL_PAUSE_MAX * 2);
        self.pause = if often { (self.pause * 2).clamp(HEAL_PAUSE, HEAL_PAUSE_MAX) } else { Duration::ZERO };
        self.last = Some(Instant::now());
    }
}

/// Whether what came, or what is in the log here, leads elsewhere over the pages here than it
/// states.
fn leads_elsewhere(error: &Error) -> bool {
    matches!(error, Error::Mismatch { .. } | Error::Peer { problem: PeerProblem::Mismatch { .. }, .. })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_between_heals_is_told_as_one() {
        let pace = HealPacer { last: Some(Instant::now()), pause: Duration::from_secs(8) };
        let said = pace.allow().unwrap_err().to_string();
        assert!(
            said.contains("the next heal begins 8s after the last") && said.contains("look for"),
            "{said}"
        );
        assert!(!said.contains("timed out"));
    }
}
