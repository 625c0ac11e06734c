//! The apply thread's part in heals: when one begins, what is kept, and how its pages become one transaction.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::apply::stream_error::StreamError;
use crate::engine::apply::thread::state::State;
use crate::engine::apply::thread::{Apply, no_state};
use crate::engine::file::doubt;
use crate::engine::file::epochs::write_epochs;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::heal::Heal;
use crate::engine::incoming::{self, IncomingState, Ready, Under};
use crate::engine::lost::{self, Replaced, StateBefore};
use crate::engine::recover::mend;
use crate::error::{Error, PeerProblem, Result};
use crate::log::Lookup;
use crate::page::PageSize;
use crate::report::Condition;
use crate::txid::{EpochHistory, Place, Position};
use crate::wire::{HealBegin, Sent, Want};

/// Pause after a heal that followed another one closely, doubled each time.
const HEAL_PAUSE: Duration = Duration::from_secs(1);
const HEAL_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Questions of a heal that may be on their way: one.
pub(super) const WANTS_MAX: usize = 1;

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
    pub(super) fn judge(&mut self, error: &StreamError) {
        let StreamError::Failed(error) = error else { return };
        let Some(live) = self.below() else {
            // Pages of a snapshot that is gone on with, which were not looked at again: not once more.
            if leads_elsewhere(error)
                && let Err(error) = incoming::discard(&self.options.paths)
            {
                self.node.report(Condition::SnapshotNotForgotten { error: &error });
            }
            return;
        };
        let position = live.base.tip().position;
        let compared = self.healing.as_ref().is_some_and(|healing| healing.heal.begin.compare);
        match error {
            // Pages that were verified when they came led elsewhere from ours.
            error if leads_elsewhere(error) && !compared => self.suspect(Suspect::Pages),
            // Once may be the network, or a record that was just taken back. Our own log may not be readable either.
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

    /// What is under way, and what lies under the pages that come.
    pub(super) fn healing(&mut self) -> Result<(&mut Healing, &mut IncomingState, Under<'_>), StreamError> {
        let under = self.state.content().filter(|_| !self.refill);
        match (&mut self.healing, &mut self.incoming) {
            (Some(healing), Some(incoming)) => Ok((healing, incoming, under)),
            _ => Err(StreamError::garbled("a part of no heal")),
        }
    }

    /// The primary leads our state back to its own.
    pub(super) fn heal(&mut self, begin: HealBegin) -> Result<(), StreamError> {
        if self.below().is_none() {
            return self.go_on_filling(begin);
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
        let mut incoming = IncomingState::over(&self.options.paths, begin, tip.pages)?;
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
            ask(&self.wants, want)?;
            Healing { heal, fork: Some(begin.from), records_from: Some(touched.lsn), behind: true }
        };
        self.incoming = Some(incoming);
        self.healing = Some(healing);
        Ok(())
    }

    /// What came of a snapshot is compared, for the primary's log does not reach back to its begin any more.
    fn go_on_filling(&mut self, begin: HealBegin) -> Result<(), StreamError> {
        if !begin.compare {
            return Err(no_state());
        }
        self.node.report(Condition::SnapshotResumed { from: begin.from });
        self.incoming = Some(IncomingState::over(&self.options.paths, begin, 0)?);
        let heal = Heal::compare(begin);
        self.healing = Some(Healing { heal, fork: None, records_from: None, behind: false });
        Ok(())
    }

    /// No transaction changes the size of pages: the next stream brings a snapshot. The primary's history has no state from before its pages had
    /// that size, so that what is here is kept.
    fn other_page_size(&mut self, ours: PageSize, theirs: PageSize) -> StreamError {
        self.refill = true;
        let end = StreamError::OtherPageSize { ours, theirs };
        self.node.report(Condition::PageSizeDiffers { text: &end.to_string() });
        end
    }

    pub(super) fn sent(&mut self, sent: Sent) -> Result<(), StreamError> {
        let (healing, incoming, live) = self.healing()?;
        let next = incoming.with(live, |overlay, store| healing.heal.sent(overlay, store, sent))?;
        match next {
            Some(want) => ask(&self.wants, want),
            None => Ok(()),
        }
    }

    /// A record of the primary's led to this state: the fork is not before it when we had it, too.
    pub(super) fn common(&mut self, after: Position) -> Result<()> {
        let (Some(healing), Some(live)) = (&mut self.healing, self.state.known()) else { return Ok(()) };
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
        let mut state = std::mem::replace(&mut self.state, State::Closed);
        let live = state.content().ok_or_else(no_state)?;
        let result = self.heal_live(live, healing, ready, &history);
        if result.is_err() {
            live.abort();
        }
        self.state = state;
        let kept = result?;
        self.history = history;
        self.serve(Some(ready.position))?;
        let kept = kept.map(|kept| self.tell_rows(kept, ready));
        doubt::end(&self.options.paths);
        self.suspect = Suspect::No;
        self.garbled_at = None;
        self.pace.done();
        self.healed += 1;
        self.shared.heals.store(self.healed, Ordering::Relaxed);
        let (position, pages) = (ready.position, ready.have.len() as u64);
        self.node.report(Condition::Healed { position, pages, lost: kept.as_deref() });
        Ok(())
    }

    /// Keeps what is off the history; then the pages that differ become one transaction, which readers see as a whole.
    fn heal_live(
        &self,
        live: &mut WalAppender,
        healing: &Healing,
        ready: &Ready,
        history: &EpochHistory,
    ) -> Result<Option<(PathBuf, Option<StateBefore>)>> {
        let vouched = live.base.log.tip() == Some(live.base.tip().position);
        let mut kept = None;
        let damaged = self.suspect == Suspect::Pages;
        if healing.heal.begin.diverged || !vouched || damaged {
            let records_from = healing.records_from.or_else(|| self.records_since_common(live, history));
            let (fork, quota_bytes) = (healing.fork, self.options.lost_bytes);
            let branch = lost::keep(
                &self.options.paths,
                live,
                &Replaced { ready, fork, records_from, quota_bytes, damaged },
            )?;
            self.node.report(Condition::BranchKept { kept: branch.path(), tip: branch.tip });
            // Pages that are damaged may say nothing of rows.
            kept = Some((branch.path().to_owned(), StateBefore::hold(live).ok()));
        }
        write_epochs(&self.options.paths, history, false)?;
        live.base.log.reset(ready.position)?;
        mend::replace(live, ready)?;
        Ok(kept)
    }

    /// Notes which rows the lost branch had; the pages are kept already.
    fn tell_rows(&mut self, (path, before): (PathBuf, Option<StateBefore>), ready: &Ready) -> PathBuf {
        if let (Some(live), Some(before)) = (self.state.known(), before)
            && let Err(error) = lost::tell(&path, before, live, ready)
        {
            self.node.report(Condition::BranchUntold { error: &error, branch: &path });
        }
        path
    }

    /// Where the log's records begin that may be off the history.
    fn records_since_common(&self, live: &WalAppender, theirs: &EpochHistory) -> Option<u64> {
        let log = &live.base.log;
        // A transaction's name is given once: the primary has this one, and all before it.
        if log.tip().is_none_or(|logged| theirs.place(logged.txid()) == Place::OnHistory) {
            return None;
        }
        let from = self.history.common(theirs).max(log.start()?.number());
        match log.find(from) {
            Ok(Lookup::At { lsn, .. }) => Some(lsn),
            _ => None,
        }
    }
}

/// Why all pages are to be compared, although the position is in the primary's history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Suspect {
    No,
    /// What comes from the primary's log makes no sense.
    Stream,
    /// The pages here may not be what the position says.
    Pages,
}

/// A heal and what is known of the branch that it ends.
pub(super) struct Healing {
    pub(super) heal: Heal,
    /// The last state that is known to be in both histories.
    fork: Option<Position>,
    /// Where our records after it begin in the log.
    records_from: Option<u64>,
    /// The primary's records may still be such as we had.
    behind: bool,
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

/// Whether what came, or what is in the log here, leads elsewhere over the pages here than it states.
fn leads_elsewhere(error: &Error) -> bool {
    matches!(error, Error::Mismatch { .. } | Error::Peer { problem: PeerProblem::Mismatch { .. }, .. })
}

fn ask(wants: &Option<mpsc::Sender<Want>>, want: Want) -> Result<(), StreamError> {
    let gone = || StreamError::Gone;
    // One is under way at a time, so that there is always room while the stream stands.
    wants.as_ref().ok_or_else(gone)?.try_send(want).map_err(|_| gone())
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
