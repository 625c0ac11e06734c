//! The node that has the lease: it renews, stops in time, takes it anew, and gives it back.

use std::time::Duration;

use super::lead::{Ending, Engine, Lead};
use super::observe::{InStore, age, tenure};
use super::race::Race;
use super::rules::{Rule, rule};
use super::swap::{Aim, SentSwap, fence_after};
use super::{Action, Choice, Election, Facts, Instant, MOST_WAKE, Note, Stage, Turn};
use crate::lease::Version;
use crate::lease::record::{LeaseState, Tenure};
use crate::txid::{Epoch, Position, Txid};

/// What the next record would replace.
enum Base {
    /// Not known yet.
    Wait,
    Lost,
    Over {
        version: Option<Version>,
        anew: bool,
    },
}

impl Election {
    /// Until when this node may acknowledge.
    pub(super) fn fence_time(&self, lead: &Lead) -> Instant {
        self.swaps.earliest_fence(lead.until)
    }

    /// Ends the epoch when its time is over.
    pub(super) fn close_in_time(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &self.stage else { return };
        let over = turn.now >= self.fence_time(lead);
        if let Stage::Leads(lead) = &mut self.stage
            && over
        {
            lead.close(&mut self.told, turn);
        }
    }

    /// What a node does that has the lease, or had it last.
    pub(super) fn lead(&mut self, turn: &mut Turn<'_>) {
        self.check_health(turn);
        let heard = self.heard;
        let Stage::Leads(lead) = &mut self.stage else { return };
        if heard > lead.epoch.number() && rule(Rule::HeardEnds) {
            lead.close(&mut self.told, turn);
        }
        self.check_handoff(turn);
        let Stage::Leads(lead) = &mut self.stage else { return };
        if let Engine::Serving(epoch) = lead.engine
            && epoch != lead.epoch
            && lead.ending.is_none()
        {
            lead.engine = Engine::Renewing(lead.epoch);
            turn.push(Action::Renew { epoch: lead.epoch });
        }
        self.write(turn);
        self.give_lease(turn);
        if let Stage::Leads(lead) = &self.stage
            && lead.serves()
        {
            // What an operator asked for is so.
            self.unchecked = None;
        }
    }

    /// A primary that can't commit for a lease time gives the lease to one that can.
    fn check_health(&mut self, turn: &mut Turn<'_>) {
        let lease_time = self.sight.lease_time;
        let Stage::Leads(lead) = &mut self.stage else { return };
        let serves = matches!(lead.engine, Engine::Serving(_) | Engine::Renewing(_));
        if turn.facts.healthy || !serves {
            lead.sick_since = None;
            return;
        }
        let since = *lead.sick_since.get_or_insert(turn.now);
        if turn.now >= since + lease_time {
            self.setback.failed(turn.now);
            self.step_down(Ending::Release, turn);
        }
    }

    /// Stops leading.
    pub(super) fn step_down(&mut self, ending: Ending, turn: &mut Turn<'_>) {
        let give_up = turn.now + self.sight.lease_time;
        let Stage::Leads(lead) = &mut self.stage else { return };
        if ending == Ending::Lost && matches!(lead.engine, Engine::Ended(_)) {
            return self.gave_back(turn);
        }
        lead.close(&mut self.told, turn);
        // What was sent may still be done, and is then told.
        let may_be_handed = ending == Ending::Release && lead.is_swapping();
        if !may_be_handed {
            self.end_handoff(turn);
        }
        let Stage::Leads(lead) = &mut self.stage else { return };
        if lead.ending.is_none() {
            lead.engine = Engine::Demoting;
            lead.give_up = give_up;
            turn.push(Action::Demote);
        }
        if lead.ending != Some(Ending::Lost) {
            lead.ending = Some(ending);
        }
    }

    /// Renews, takes anew, or gives back: what is due, over what is there.
    fn write(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &self.stage else { return };
        if lead.is_lost() || self.swaps.in_flight() {
            return;
        }
        if lead.ending.is_some() && turn.now >= lead.give_up {
            return self.step_down(Ending::Lost, turn);
        }
        let (version, anew) = match self.base(lead) {
            Base::Wait => return,
            Base::Lost => return self.step_down(Ending::Lost, turn),
            Base::Over { version, anew } => (version, anew),
        };
        if lead.is_swapping() && lead.ending.is_none() && self.leaving.is_some() {
            return self.step_down(Ending::Release, turn);
        }
        if self.hand_over(&version, anew, turn) {
            return;
        }
        let Stage::Leads(lead) = &self.stage else { return };
        if turn.now < lead.retry_at {
            return;
        }
        let (ended, ends) = (matches!(lead.engine, Engine::Ended(_)), lead.ending.is_some());
        let due = turn.now >= lead.renew_at || !self.swaps.is_settled();
        if ended {
            self.release(version, turn);
        } else if !ends && (lead.closed || anew) {
            if anew {
                let what = if version.is_some() { "an older record is there" } else { "the record is gone" };
                self.note(Note::StoreWentBack(format!("{what}, and is written anew")), turn);
            }
            self.take_anew(version, turn);
        } else if due && !anew {
            self.renew(version, turn);
        }
    }

    /// Over which version the next record goes.
    fn base(&self, lead: &Lead) -> Base {
        let own = self.swaps.own.as_ref().map(|own| own.version.clone());
        let mine = self.swaps.own.as_ref().and_then(|own| tenure(&own.record));
        let other = self.sight.record().filter(|record| !self.swaps.is_ours(record));
        if other.is_some_and(|record| age(tenure(record)) > age(mine)) {
            return Base::Lost;
        }
        if self.swaps.is_settled() {
            return Base::Over { version: own, anew: false };
        }
        if self.swaps.needs_read(&self.sight) {
            return Base::Wait;
        }
        match self.sight.seen.as_ref().map(|seen| &seen.what) {
            Some(InStore::Record(record, version)) if self.swaps.is_last(record) => {
                Base::Over { version: Some(version.clone()), anew: false }
            }
            Some(InStore::Record(record, version)) => {
                let earlier = age(tenure(record)).0 < age(mine).0 || self.swaps.is_ours(record);
                match (earlier, self.swaps.conflict) {
                    (false, _) => Base::Lost,
                    // A read that was late.
                    (true, false) => Base::Over { version: own, anew: false },
                    // The register went back: in its time the living holder writes it anew.
                    (true, true) if !lead.closed => Base::Over { version: Some(version.clone()), anew: true },
                    (true, true) => Base::Lost,
                }
            }
            Some(InStore::Empty) if !lead.closed => Base::Over { version: None, anew: true },
            Some(InStore::NotOurs(_)) if !lead.closed => Base::Wait,
            _ => Base::Lost,
        }
    }

    /// The record of this epoch, as it is now.
    fn tenure(&self, lead: &Lead, turn: &Turn<'_>) -> Tenure {
        let ended = match lead.engine {
            Engine::Ended(position) => Some(position),
            _ => None,
        };
        // What a promotion writes before it is done was promised to no client.
        let clock = if lead.served { turn.now.saturating_sub(lead.took) } else { Duration::ZERO };
        let served = turn.facts.position.filter(|_| lead.served);
        Tenure {
            holder: self.settings.me.clone(),
            epoch: lead.epoch,
            began: lead.began,
            lease_clock: clock,
            position: ended.or(served).or(lead.position).filter(|_| lead.began.is_some()),
        }
    }

    fn renew(&mut self, version: Option<Version>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        if lead.served {
            lead.began = where_it_began(lead.epoch, turn.facts, lead.began);
        }
        let Stage::Leads(lead) = &self.stage else { return };
        let tenure = self.tenure(lead, turn);
        self.swap(version, LeaseState::Held(tenure), Aim::Renew, turn);
    }

    fn release(&mut self, version: Option<Version>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &self.stage else { return };
        let tenure = self.tenure(lead, turn);
        self.told.decided(turn.now, Choice::Releases(lead.epoch), Vec::new());
        self.swap(version, LeaseState::Released(tenure), Aim::Release, turn);
    }

    /// The same node goes on with a new epoch.
    fn take_anew(&mut self, version: Option<Version>, turn: &mut Turn<'_>) {
        let Some(epoch) = self.next_epoch(turn) else { return };
        let Stage::Leads(lead) = &self.stage else { return };
        let position = turn.facts.position.filter(|_| lead.served).or(lead.position);
        let began = position.filter(|_| lead.began.is_some());
        let holder = self.settings.me.clone();
        let tenure = Tenure { holder, epoch, began, lease_clock: Duration::ZERO, position: began };
        self.told.decided(turn.now, Choice::Takes(epoch), Vec::new());
        self.swap(version, LeaseState::Held(tenure), Aim::Renew, turn);
    }

    /// A record of this holder is known to be there.
    pub(super) fn renewal_done(&mut self, sent: &SentSwap, turn: &mut Turn<'_>) {
        let lease_time = sent.record.lease_time;
        let Some(tenure) = tenure(&sent.record).cloned() else { return };
        self.heard = self.heard.max(tenure.epoch.number());
        let Stage::Leads(lead) = &mut self.stage else { return };
        let from = if rule(Rule::CountFromSending) { sent.at } else { turn.now };
        lead.renew_at = sent.at + lease_time / 4;
        lead.position = tenure.position;
        lead.until = from + fence_after(lease_time);
        if tenure.epoch != lead.epoch {
            lead.close(&mut self.told, turn);
            self.handoff_failed(turn);
            let Stage::Leads(lead) = &mut self.stage else { return };
            lead.epoch = tenure.epoch;
            lead.began = tenure.began;
            lead.took = sent.at;
            lead.closed = lead.ending.is_some();
            lead.served = false;
            self.told.decided(turn.now, Choice::Took(tenure.epoch), Vec::new());
        } else if !rule(Rule::EndedStays) {
            lead.closed = lead.ending.is_some();
        }
        self.close_in_time(turn);
    }

    /// Says until when commits may be acknowledged, where that has changed.
    pub(super) fn give_lease(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &self.stage else { return };
        let until = self.fence_time(lead);
        let Stage::Leads(lead) = &mut self.stage else { return };
        let may = lead.opened() && !lead.closed && lead.ending.is_none() && turn.now < until;
        if may && lead.given != Some(until) {
            lead.given = Some(until);
            turn.push(Action::Lease { epoch: lead.epoch, until });
        }
    }

    /// Who hears of an epoch closes the fence. For one that is not above this node's that may have
    /// been after the lease was given: it is given once more.
    pub(super) fn give_again(&mut self, heard: u64) {
        if let Stage::Leads(lead) = &mut self.stage
            && heard <= lead.epoch.number()
        {
            lead.given = None;
        }
    }

    pub(super) fn promoted(&mut self, outcome: Result<(), String>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        let Engine::Promoting(epoch) = lead.engine else { return };
        self.opened(epoch, outcome, turn);
    }

    pub(super) fn renewed(&mut self, outcome: Result<(), String>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        let Engine::Renewing(epoch) = lead.engine else { return };
        self.opened(epoch, outcome, turn);
    }

    /// When this holder has to do something next.
    pub(super) fn wake_of_lead(&self, lead: &Lead, turn: &Turn<'_>) -> Instant {
        let later = |at: Instant| if at > turn.now { at } else { turn.now + MOST_WAKE };
        let mut wake = turn.now + MOST_WAKE;
        if !lead.closed {
            wake = wake.min(self.fence_time(lead));
        }
        if let Some(since) = lead.sick_since {
            wake = wake.min(later(since + self.sight.lease_time));
        }
        if lead.ending.is_some() {
            wake = wake.min(later(lead.give_up));
        }
        if let Some(give_up) = lead.handoff.as_ref().and_then(|handoff| handoff.give_up()) {
            wake = wake.min(later(give_up));
        }
        let writes = !self.swaps.in_flight() && !lead.is_lost() && !self.swaps.needs_read(&self.sight);
        let at_once = lead.closed || !self.swaps.is_settled();
        match (writes, at_once) {
            (true, true) => wake.min(later(lead.retry_at)),
            (true, false) => wake.min(later(lead.renew_at.max(lead.retry_at))),
            (false, _) => wake,
        }
    }

    /// The engine has opened an epoch, or could not.
    fn opened(&mut self, epoch: Epoch, outcome: Result<(), String>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        if outcome.is_err() {
            self.setback.failed(turn.now);
            return self.step_down(Ending::Release, turn);
        }
        self.setback.worked();
        lead.engine = Engine::Serving(epoch);
        lead.served = lead.epoch == epoch;
        if lead.began.is_none() {
            // The others can't tell yet what they lack.
            lead.renew_at = turn.now;
        }
    }

    /// The engine serves no more.
    pub(super) fn demoted(&mut self, position: Option<Position>, turn: &mut Turn<'_>) {
        let give_up = turn.now + self.sight.lease_time;
        let Stage::Leads(lead) = &mut self.stage else { return };
        if lead.engine != Engine::Demoting {
            return;
        }
        match (lead.ending, position) {
            (Some(Ending::Release), Some(position)) => {
                lead.engine = Engine::Ended(position);
                lead.began = lead.began.or(Some(position));
                lead.give_up = give_up;
            }
            // A state that is not known is no final one: the lease runs out.
            _ => self.gave_back(turn),
        }
    }

    /// This node has no lease any more, and none to give back.
    pub(super) fn gave_back(&mut self, turn: &mut Turn<'_>) {
        self.end_handoff(turn);
        self.stage = Stage::Follows(Race::default());
        self.told.follows_none();
        if self.leaving.is_some() {
            self.leave(turn);
        }
    }
}

/// The state that an epoch goes on from, as the history has it.
fn where_it_began(epoch: Epoch, facts: &Facts, known: Option<Position>) -> Option<Position> {
    let start = facts.history.iter().find(|start| start.epoch == epoch);
    let Some(start) = start else { return known };
    let number = start.first.saturating_sub(1);
    if known.is_some_and(|known| known.number() == number && known.checksum() == start.before) {
        return known;
    }
    let of = facts.history.epoch_of(number).unwrap_or(epoch);
    Some(Position::new(Txid::new(of, number), start.before))
}
