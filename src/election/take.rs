//! A candidate's way to the lease: whether it is time, who comes first, and the swap.

use std::time::Duration;

use super::candidate::{ASKED, Here, RANK, RANK_JITTER, is_ahead};
use super::lead::Lead;
use super::observe::{InStore, peer, tenure};
use super::race::{FIRST_PAUSE, First, Outlook, Race, Stride, Why};
use super::rules::{Rule, rule};
use super::swap::{Aim, SentSwap};
use super::{Action, Choice, Election, Facts, Instant, PeerAnswer, Stage, Turn};
use crate::lease::record::{KnownNode, LeaseState, Record, Tenure};
use crate::status::{PeerInfo, WaitReason};
use crate::txid::Position;

/// How many nodes a record names at most.
const NODES_MOST: usize = 32;

/// How long peers have to answer how they stand.
pub(super) const ASK_LIMIT: Duration = Duration::from_millis(300);
/// The same at a first start.
const ASK_FIRST_LIMIT: Duration = Duration::from_secs(2);

impl Election {
    /// The state that counts: what was prepared does not move any more.
    pub(super) fn position(&self, facts: &Facts) -> Option<Position> {
        match &self.stage {
            Stage::Follows(Race { ready: Some(ready), .. }) => *ready,
            _ => facts.position,
        }
    }

    /// What a node does that does not lead.
    pub(super) fn follow(&mut self, turn: &mut Turn<'_>) {
        if self.swaps.in_flight() {
            return;
        }
        if self.take_offered(turn) {
            return self.lead(turn);
        }
        if let Some(limit) = self.leaving {
            if !self.swaps.may_take() && !self.may_be_handed() || turn.now >= limit {
                self.leave(turn);
            }
            return;
        }
        if self.join(turn) {
            return;
        }
        let verdict = self.verdict(turn);
        let Stage::Follows(race) = &mut self.stage else { return };
        race.verdict = verdict;
        if self.swaps.refutes(&self.sight, turn.now) {
            // There is a newer record. It may name a primary.
            race.ready = None;
        }
        match verdict {
            Some(Outlook::Go(why)) => self.go(why, turn),
            // What is not settled yet stays prepared: it may turn out to be this node's.
            Some(Outlook::Wait(WaitReason::Unsettled)) => {}
            // A read that is late ends nothing. What it shows does, if it is something else.
            Some(Outlook::Wait(WaitReason::StoreUnavailable)) if self.sight.is_late(turn.now) => {}
            _ => {
                race.phase = Stride::Rest;
                if !self.swaps.may_take() {
                    race.ready = None;
                }
            }
        }
    }

    /// Whether this node may take the lease now. None: it has not read the register yet.
    fn verdict(&self, turn: &Turn<'_>) -> Option<Outlook> {
        let Some(seen) = &self.sight.seen else {
            return self.sight.fails.then_some(Outlook::Wait(WaitReason::StoreUnavailable));
        };
        if self.swaps.needs_read(&self.sight) || self.swaps.refutes(&self.sight, turn.now) {
            return Some(Outlook::Wait(WaitReason::Unsettled));
        }
        if !self.sight.is_fresh(turn.now) {
            return Some(Outlook::Wait(WaitReason::StoreUnavailable));
        }
        if self.unchecked.is_some() {
            return Some(self.unchecked_verdict(&seen.what, turn));
        }
        Some(match &seen.what {
            InStore::Empty => Outlook::Wait(self.first_wait(None)),
            InStore::NotOurs(_) => Outlook::Wait(WaitReason::RecordNotOurs),
            InStore::Record(record, _) => match &record.state {
                LeaseState::Gathering => self.first_verdict(record, turn),
                LeaseState::Held(_) | LeaseState::Released(_) => self.next_verdict(record, turn),
            },
        })
    }

    /// What an operator asked for waits for the end of a lease as all do.
    fn unchecked_verdict(&self, what: &InStore, turn: &Turn<'_>) -> Outlook {
        let released = what
            .record()
            .is_some_and(|record| matches!(record.state, LeaseState::Released(_)) && self.is_newest(record));
        let lease_time = self.sight.lease_time.max(self.settings.lease_time);
        if released || self.sight.unchanged_for(turn.now) >= lease_time {
            Outlook::Go(Why::Unchecked)
        } else {
            Outlook::Wait(WaitReason::Held)
        }
    }

    /// There was a holder: whether this node is the next.
    fn next_verdict(&self, record: &Record, turn: &Turn<'_>) -> Outlook {
        if let Some(reason) = self.unfit(turn.facts, turn.now) {
            return Outlook::Wait(reason);
        }
        let here = Here { position: self.position(turn.facts), facts: turn.facts };
        let Some(tenure) = self.last_tenure(record) else { return Outlook::Wait(WaitReason::NoRecord) };
        let newest = self.is_newest(record);
        let held = matches!(record.state, LeaseState::Held(_));
        let lacks = self.lacks(tenure, &here);
        if held && newest && self.swaps.is_last(record) && lacks.is_none() {
            return Outlook::Go(Why::Own);
        }
        let Stage::Follows(race) = &self.stage else { return Outlook::Wait(WaitReason::Held) };
        if !race.late && self.held_it_last(record, &here) {
            return Outlook::Go(Why::Restart);
        }
        if record.paused && rule(Rule::Pause) {
            return Outlook::Wait(WaitReason::Paused);
        }
        if let Some(reason) = lacks {
            return Outlook::Wait(reason);
        }
        let at_once = !held && (here.has_all(tenure) || !rule(Rule::FinalOnly)) && newest;
        let percent = if rule(Rule::WholeWait) { 100 } else { 50 };
        if at_once || self.sight.unchanged_for(turn.now) >= record.lease_time * percent / 100 {
            Outlook::Go(Why::Election)
        } else {
            Outlook::Wait(WaitReason::Held)
        }
    }

    /// The next step.
    fn go(&mut self, why: Why, turn: &mut Turn<'_>) {
        let Stage::Follows(race) = &mut self.stage else { return };
        let on_the_way = match race.phase {
            Stride::Rest | Stride::Taking => Some(why),
            Stride::Asking(of)
            | Stride::Preparing(of)
            | Stride::Prepared(of)
            | Stride::Ranks { why: of, .. } => Some(of),
        };
        if on_the_way != Some(why) {
            race.phase = Stride::Rest;
            race.ready = None;
        }
        match race.phase {
            Stride::Rest if turn.now < race.not_before => {}
            Stride::Rest if race.ready.is_some() => self.take(why, turn),
            Stride::Rest => self.ask(why, turn),
            Stride::Ranks { until, .. } if turn.now >= until => self.prepare(why, turn),
            Stride::Prepared(_) => self.take(why, turn),
            Stride::Asking(_) | Stride::Ranks { .. } | Stride::Preparing(_) | Stride::Taking => {}
        }
    }

    fn ask(&mut self, why: Why, turn: &mut Turn<'_>) {
        let peers = match why {
            Why::Own => Vec::new(),
            // Some of the entries may be of nodes that are gone.
            Why::First => self.known_peers(usize::MAX),
            _ => self.known_peers(ASKED),
        };
        let Stage::Follows(race) = &mut self.stage else { return };
        race.answers.clear();
        if peers.is_empty() {
            return self.ranked(why, turn);
        }
        race.phase = Stride::Asking(why);
        self.round += 1;
        // At a first start all have to answer, and all are busy with their start.
        let limit = if why == Why::First { ASK_FIRST_LIMIT } else { ASK_LIMIT };
        race.give_up = turn.now + limit + self.sight.lease_time;
        turn.push(Action::AskPeers { round: self.round, peers, limit });
    }

    /// In the order of the record: the best known first.
    pub(super) fn known_peers(&self, most: usize) -> Vec<PeerInfo> {
        self.sight.nodes.iter().filter(|peer| !self.is_me(peer.node)).take(most).cloned().collect()
    }

    /// The peers have answered, or those that did.
    pub(super) fn peers_answered(&mut self, round: u64, answers: Vec<PeerAnswer>, turn: &mut Turn<'_>) {
        for answer in &answers {
            self.hear(answer.epoch, turn);
        }
        let Stage::Follows(race) = &mut self.stage else {
            return self.targets_answered(round, answers, turn);
        };
        let Stride::Asking(why) = race.phase else { return };
        if round != self.round {
            return;
        }
        race.answers = answers;
        self.ranked(why, turn);
    }

    /// Waits for those that come first, or goes.
    fn ranked(&mut self, why: Why, turn: &mut Turn<'_>) {
        let position = self.position(turn.facts);
        let Stage::Follows(race) = &mut self.stage else { return };
        match why {
            Why::Restart
                if race.answers.iter().any(|peer| is_ahead(peer, position)) && rule(Rule::NotBehind) =>
            {
                race.late = true;
                race.phase = Stride::Rest;
            }
            Why::Election if rule(Rule::BetterFirst) => {
                let answers = std::mem::take(&mut race.answers);
                let (count, first) = self.better(&answers, position);
                let Stage::Follows(race) = &mut self.stage else { return };
                race.answers = answers;
                if count == 0 {
                    return self.prepare(why, turn);
                }
                let until = turn.now + RANK * count + turn.jitter(RANK_JITTER);
                race.phase = Stride::Ranks { until, first, why };
            }
            Why::First => match self.chosen(turn) {
                First::Me => self.prepare(why, turn),
                First::Other => self.rest_for(FIRST_PAUSE, turn),
            },
            _ => self.prepare(why, turn),
        }
    }

    fn rest_for(&mut self, time: Duration, turn: &Turn<'_>) {
        let Stage::Follows(race) = &mut self.stage else { return };
        race.phase = Stride::Rest;
        race.not_before = turn.now + time;
    }

    fn prepare(&mut self, why: Why, turn: &mut Turn<'_>) {
        let Stage::Follows(race) = &mut self.stage else { return };
        race.phase = Stride::Preparing(why);
        self.preparing += 1;
        turn.push(Action::Prepare);
    }

    /// The stream is ended. Of several questions only the last one's answer counts.
    pub(super) fn prepared(&mut self, position: Option<Position>) {
        self.preparing = self.preparing.saturating_sub(1);
        if let Stage::Follows(race) = &mut self.stage
            && let Stride::Preparing(why) = race.phase
            && self.preparing == 0
        {
            race.phase = Stride::Prepared(why);
            race.ready = Some(position);
        }
    }

    /// Asks for the lease over the version that was watched.
    fn take(&mut self, why: Why, turn: &mut Turn<'_>) {
        let (Some(epoch), Some(seen)) = (self.next_epoch(turn), &self.sight.seen) else { return };
        let expected = seen.what.version().cloned();
        let Stage::Follows(race) = &mut self.stage else { return };
        let began = race.ready.flatten().filter(|_| why != Why::First);
        race.phase = Stride::Taking;
        let answers = race.answers.clone();
        let tenure = Tenure {
            holder: self.settings.me.clone(),
            epoch,
            began,
            lease_clock: Duration::ZERO,
            position: began,
        };
        let unchecked = began.is_none() || why == Why::Unchecked;
        self.told.decided(turn.now, Choice::Takes(epoch), answers);
        self.swap(expected, LeaseState::Held(tenure), Aim::Take { unchecked }, turn);
    }

    /// The lease is this node's, from before it asked for it.
    pub(super) fn took_it(&mut self, unchecked: bool, sent: &SentSwap, turn: &mut Turn<'_>) {
        let Stage::Follows(race) = &self.stage else { return };
        let Some(ready) = race.ready else { return };
        let Some(mut lead) = Lead::begin(sent, ready, turn.now) else { return };
        let epoch = lead.epoch;
        self.heard = self.heard.max(epoch.number());
        self.unchecked = None;
        self.told.decided(turn.now, Choice::Took(epoch), Vec::new());
        if self.leaving.is_some() {
            // A state that is not known is no final one: the lease runs out.
            let Some(ready) = ready else { return self.gave_back(turn) };
            lead.end_unused(ready, turn.now + self.sight.lease_time);
            self.stage = Stage::Leads(lead);
            return;
        }
        if turn.now >= lead.until {
            // Known too late: this record of its own is the next one's base.
            return;
        }
        self.stage = Stage::Leads(lead);
        turn.push(Action::Promote { epoch, unchecked });
        self.give_lease(turn);
    }

    /// When a retry may be sent.
    pub(super) fn ask_again_from(&mut self, at: Instant) {
        match &mut self.stage {
            Stage::Follows(race) => race.not_before = at,
            Stage::Leads(lead) => lead.retry_at = at,
        }
    }

    /// The nodes that a record names, the best known first.
    pub(super) fn nodes(&self, before: Option<&Record>, purpose: Aim, turn: &Turn<'_>) -> Vec<KnownNode> {
        if purpose == Aim::Gather {
            return self.gathering(before, turn);
        }
        let connected = turn.facts.replicas.iter().cloned();
        let known = before.into_iter().flat_map(|record| &record.nodes).map(|known| known.peer.clone());
        let holder = before.and_then(tenure).map(|tenure| peer(&tenure.holder));
        // The one that is to lead has to know this one.
        let hands = matches!(purpose, Aim::Handoff { .. });
        let me = hands.then(|| peer(&self.settings.me));
        let mut nodes: Vec<KnownNode> = Vec::new();
        for peer in me.into_iter().chain(connected).chain(known).chain(holder) {
            let is_there = nodes.iter().any(|known| known.peer.node == peer.node);
            let other = hands || !self.is_me(peer.node);
            if !is_there && other && nodes.len() < NODES_MOST {
                nodes.push(KnownNode { peer, has_state: true, has_content: true });
            }
        }
        nodes
    }
}
