//! A replica's way to a lease that the primary hands to it: it accepts the offer, and leads as soon
//! as it knows that the register names it.

use super::lead::Lead;
use super::observe::{InStore, age, tenure};
use super::race::Stride;
use super::rules::{Rule, rule};
use super::swap::fence_after;
use super::{Action, CLAIM_STEP, Choice, Election, Instant, Stage, Turn};
use crate::lease::Version;
use crate::lease::record::{Attempt, LeaseState, Record, Tenure};
use crate::txid::Position;

/// An offer that this node has accepted.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Offer {
    attempt: Attempt,
    position: Position,
    /// Before it said that it accepts: its time counts from there.
    at: Instant,
    /// What the last holder said to be in the register.
    told: Option<(Box<Record>, Version)>,
}

impl Election {
    /// The primary offers its lease. All up to this position is on the disk here.
    pub(super) fn offered(&mut self, attempt: Attempt, position: Position, turn: &mut Turn<'_>) {
        if let Some(why) = self.declines(position, turn) {
            self.told.decided(turn.now, Choice::Declines(why.clone()), Vec::new());
            return turn.push(Action::Decline { attempt, why });
        }
        // Of an earlier one nothing can come any more.
        self.offer = Some(Offer { attempt, position, at: turn.now, told: None });
        self.told.decided(turn.now, Choice::Accepts, Vec::new());
        turn.push(Action::Accept { attempt, boot: self.settings.me.boot.clone() });
    }

    /// Why this node does not accept.
    fn declines(&self, position: Position, turn: &Turn<'_>) -> Option<String> {
        let Stage::Follows(race) = &self.stage else { return Some("it leads".into()) };
        let on_its_way = race.phase != Stride::Rest || race.ready.is_some() || self.unchecked.is_some();
        if on_its_way || self.swaps.in_flight() || !self.swaps.is_settled() {
            return Some("it is about to take the lease by itself".into());
        }
        if let Some(reason) = self.unfit(turn.facts, turn.now).filter(|_| rule(Rule::FitTarget)) {
            return Some(reason.to_string());
        }
        if !self.sight.is_fresh(turn.now) {
            return Some("it has not read the lease's record lately".into());
        }
        if turn.facts.position != Some(position) && rule(Rule::ExactState) {
            return Some("it has another state".into());
        }
        let of_record = self.sight.record().and_then(tenure).map_or(0, |tenure| tenure.epoch.number());
        if self.heard > of_record.max(turn.facts.history.epoch().number()) {
            return Some("it has heard of a later epoch".into());
        }
        None
    }

    /// The last holder says that the register names this node.
    pub(super) fn told_handed(&mut self, record: Box<Record>, version: Version) {
        let ours = self.is_of_this_database(&record);
        if let Some(offer) = self.offer.as_mut().filter(|offer| ours && offer.attempt == record.attempt) {
            offer.told = Some((record, version));
        }
    }

    /// An accepted offer of which something may still come.
    pub(super) fn may_be_handed(&self) -> bool {
        self.offer.is_some()
    }

    /// Leads, if the register names this node by an offer that it has accepted. Returns whether.
    pub(super) fn take_offered(&mut self, turn: &mut Turn<'_>) -> bool {
        self.accept_any(turn);
        let Some(offer) = &self.offer else { return false };
        let Some((record, version)) = self.record_of(offer) else {
            let over = turn.now >= offer.at + self.sight.lease_time;
            self.offer.take_if(|_| over);
            return false;
        };
        let Some(offer) = self.offer.take() else { return false };
        let Some(tenure) = self.names_me(&record, &offer) else { return false };
        let from = if rule(Rule::CountFromAccept) { offer.at } else { turn.now };
        let same = self.position(turn.facts) == Some(offer.position) || !rule(Rule::ExactState);
        // Known too late, it is nothing: this node waits like all.
        if turn.now >= from + fence_after(record.lease_time) || !same {
            return false;
        }
        let mut lead = Lead::handed(tenure.epoch, offer.position, from, record.lease_time, turn.now);
        let higher = self.heard > tenure.epoch.number();
        self.heard = self.heard.max(tenure.epoch.number());
        self.unchecked = None;
        self.told.decided(turn.now, Choice::Took(tenure.epoch), Vec::new());
        self.swaps.adopt(record.clone(), version.clone());
        self.sight.see(InStore::Record(record, version), offer.at, turn.now);
        if self.leaving.is_some() {
            lead.end_unused(offer.position, turn.now + self.sight.lease_time);
            self.stage = Stage::Leads(lead);
            return true;
        }
        if higher {
            // Its promotion comes to nothing, and the lease is given back.
            lead.close(&mut self.told, turn);
        }
        self.stage = Stage::Leads(lead);
        turn.push(Action::Promote { epoch: tenure.epoch, unchecked: false });
        self.give_lease(turn);
        true
    }

    /// The record of this offer, as it was read or else told. One that was told is of no use where
    /// a later one was read.
    fn record_of(&self, offer: &Offer) -> Option<(Box<Record>, Version)> {
        let seen = self.sight.seen.as_ref().map(|seen| &seen.what);
        if let Some(InStore::Record(record, version)) = seen
            && record.attempt == offer.attempt
        {
            return Some((record.clone(), version.clone()));
        }
        let newest = age(self.sight.newest.as_ref());
        offer.told.clone().filter(|(record, _)| age(tenure(record)) > newest)
    }

    /// What the record says of this node's lease, if it is that which was accepted.
    fn names_me(&self, record: &Record, offer: &Offer) -> Option<Tenure> {
        let LeaseState::Held(tenure) = &record.state else { return None };
        let (me, number) = (&self.settings.me, tenure.epoch.number());
        let named = (tenure.holder.node, tenure.holder.incarnation) == (me.node, me.incarnation);
        let later =
            offer.position.epoch().number() < number && number <= self.heard.saturating_add(CLAIM_STEP);
        let exact = tenure.position == Some(offer.position) || !rule(Rule::ExactState);
        (named && later && exact).then(|| tenure.clone())
    }

    /// Any record that names this process, without the rule.
    fn accept_any(&mut self, turn: &Turn<'_>) {
        if rule(Rule::AcceptedOnly) || self.offer.is_some() {
            return;
        }
        let Some(record) = self.sight.record().filter(|record| !self.swaps.is_ours(record)) else { return };
        let position = tenure(record).and_then(|tenure| tenure.position);
        self.offer =
            position.map(|position| Offer { attempt: record.attempt, position, at: turn.now, told: None });
    }
}
