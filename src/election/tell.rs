//! What others are to see of the node, said when it changes; and what was decided lately.

use super::candidate::RANK;
use super::lead::Engine;
use super::observe::{peer, tenure};
use super::race::{Outlook, Stride, Why};
use super::{Action, Choice, Election, Instant, MOST_WAKE, Note, Shown, Stage, Turn};
use crate::lease::record::LeaseState;
use crate::status::WaitReason;

impl Election {
    /// Tells an operator, once.
    pub(super) fn note(&mut self, note: Note, turn: &mut Turn<'_>) {
        if self.told.note.as_ref() != Some(&note) {
            self.told.note = Some(note.clone());
            self.told.decided(turn.now, Choice::Notes(note.clone()), Vec::new());
            turn.push(Action::Note(note));
        }
    }

    /// Tells what has changed.
    pub(super) fn tell(&mut self, turn: &mut Turn<'_>) {
        match &self.stage {
            Stage::Follows(race) if race.holds_still() => self.told.follows_none(),
            Stage::Leads(_) => self.told.follows_none(),
            Stage::Follows(_) => self.tell_follow(turn),
        }
        let Some(shown) = self.shown(turn) else { return };
        if self.told.shown.as_ref() != Some(&shown) {
            self.told.shown = Some(shown.clone());
            let answers = match &self.stage {
                Stage::Follows(race) => race.answers.clone(),
                Stage::Leads(_) => Vec::new(),
            };
            self.told.decided(turn.now, Choice::Shows(shown.clone()), answers);
            turn.push(Action::Show(shown));
        }
    }

    /// Which node to follow. Where the record can't be read, the stream that there is goes on.
    pub(super) fn tell_follow(&mut self, turn: &mut Turn<'_>) {
        let standing = self.sight.seen.as_ref().filter(|seen| !seen.older || self.sight.went_back(turn.now));
        let record = standing.and_then(|seen| seen.what.record());
        let of_record = record.map(|record| match &record.state {
            LeaseState::Held(tenure) if !self.is_me(tenure.holder.node) => Some(peer(&tenure.holder)),
            _ => None,
        });
        let target = match (of_record, &self.told.followed) {
            (Some(target), _) => target,
            (None, Some(_)) => return,
            // The stream was ended for a take that came to nothing.
            (None, None) => self
                .sight
                .newest
                .as_ref()
                .map(|newest| &newest.holder)
                .and_then(|holder| (!self.is_me(holder.node)).then(|| peer(holder))),
        };
        if self.told.followed.as_ref() != Some(&target) {
            let node = target.as_ref().map(|peer| peer.node);
            self.told.followed = Some(target.clone());
            self.told.decided(turn.now, Choice::Follows(node), Vec::new());
            turn.push(Action::Follow(target));
        }
    }

    fn shown(&self, turn: &Turn<'_>) -> Option<Shown> {
        let race = match &self.stage {
            Stage::Leads(lead) => {
                return Some(match lead.engine {
                    _ if lead.closed || lead.ending.is_some() => Shown::Fencing,
                    Engine::Promoting(_) => Shown::Promoting,
                    Engine::Serving(epoch) if epoch == lead.epoch => Shown::Primary,
                    _ => Shown::Fencing,
                });
            }
            Stage::Follows(race) => race,
        };
        if self.leaving.is_some() {
            return Some(Shown::Waiting(WaitReason::Draining));
        }
        let wait = match (race.verdict?, race.phase) {
            (Outlook::Go(Why::First), Stride::Rest | Stride::Asking(_)) => {
                self.first_wait(self.sight.record())
            }
            (Outlook::Go(_), Stride::Ranks { until, first: Some(node), .. })
                if until > turn.now + RANK / 4 =>
            {
                WaitReason::BetterCandidate { node }
            }
            (Outlook::Go(_), _) => return Some(Shown::Electing),
            (Outlook::Wait(reason), _) => reason,
        };
        // A holder that renews is there, whatever keeps this node from taking its place.
        let held = self.sight.record().is_some_and(|record| matches!(record.state, LeaseState::Held(_)));
        let other =
            self.sight.record().and_then(tenure).is_some_and(|tenure| !self.is_me(tenure.holder.node));
        let lately = self.sight.unchanged_for(turn.now) < self.sight.lease_time / 2;
        let read_lately =
            self.sight.seen.as_ref().is_some_and(|seen| turn.now < seen.begun + self.sight.lease_time / 2);
        if held && other && lately && read_lately && wait != WaitReason::Unsettled {
            return Some(Shown::Replica);
        }
        Some(Shown::Waiting(wait))
    }

    /// When something is due next.
    pub(super) fn wake(&self, turn: &Turn<'_>) -> Instant {
        let mut wake = turn.now + MOST_WAKE;
        if self.sight.reading.is_none() && self.wants_read() {
            wake = wake.min(self.sight.next_read);
        }
        let later = |at: Instant| if at > turn.now { at } else { turn.now + MOST_WAKE };
        match &self.stage {
            Stage::Leads(lead) => wake.min(self.wake_of_lead(lead, turn)),
            Stage::Follows(race) => {
                if let Some(seen) = &self.sight.seen {
                    wake = wake.min(later(seen.since + self.sight.lease_time));
                    wake = wake.min(later(seen.since + self.sight.lease_time / 2));
                }
                if let Stride::Ranks { until, .. } = race.phase {
                    wake = wake.min(later(until));
                }
                let limit = self.leaving.map_or(turn.now + MOST_WAKE, later);
                wake.min(later(race.not_before)).min(later(self.setback.until)).min(limit)
            }
        }
    }
}
