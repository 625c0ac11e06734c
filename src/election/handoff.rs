//! The holder's way to hand the lease to a replica that lives: it looks for the best one, withholds
//! commits while that takes in the last of them, and writes it into the register.
//!
//! Until the swap is sent all of this can be taken back in the same epoch. After that nothing is
//! committed here before it is known whose the lease is.

use std::time::Duration;

use super::candidate::{ASKED, comes_first};
use super::lead::{Ending, Handoff, HandoffStep, Lead};
use super::observe::{InStore, tenure};
use super::rules::{Rule, rule};
use super::swap::{Aim, SentSwap};
use super::take::ASK_LIMIT;
use super::{Accepted, Action, Choice, Election, NotHanded, PeerAnswer, Stage, Turn};
use crate::lease::Version;
use crate::lease::record::{Attempt, Holder, LeaseState, Tenure};
use crate::peer::NodeId;
use crate::status::PeerInfo;

/// How long it looks for a replica that is fit. One that has just connected is not for a moment.
const PATIENCE: Duration = Duration::from_millis(500);
/// Between two questions to them.
const ASK_PAUSE: Duration = Duration::from_millis(50);

impl Election {
    /// An operator asks for a handoff.
    pub(super) fn asked_to_hand(&mut self, to: Option<NodeId>, turn: &mut Turn<'_>) {
        let refused = match &self.stage {
            Stage::Leads(Lead { handoff: Some(handoff), .. }) if !handoff.is_to_none() => {
                if to.is_none_or(|node| handoff.is_to(node)) {
                    return;
                }
                NotHanded::UnderWay
            }
            Stage::Leads(lead) if lead.serves() && self.leaving.is_none() => {
                return match to.filter(|node| self.is_me(*node)) {
                    Some(node) => turn.push(Action::HandoffEnded(Ok(node))),
                    None => self.seek_target(to, turn),
                };
            }
            _ => NotHanded::NotPrimary,
        };
        turn.push(Action::HandoffRefused(refused));
    }

    /// The node ends: it hands the lease over, if it can.
    pub(super) fn hand_or_release(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &self.stage else { return };
        match &lead.handoff {
            Some(_) => {}
            None if lead.serves() => self.seek_target(None, turn),
            None => self.step_down(Ending::Release, turn),
        }
    }

    /// Asks the connected replicas, the best known first.
    fn seek_target(&mut self, wanted: Option<NodeId>, turn: &mut Turn<'_>) {
        let connected = turn.facts.replicas.iter().filter(|peer| !self.is_me(peer.node));
        let asked = connected.filter(|peer| wanted.is_none_or(|node| peer.node == node));
        let peers: Vec<PeerInfo> = asked.take(ASKED).cloned().collect();
        let (round, give_up) = (self.round + 1, turn.now + ASK_LIMIT + self.sight.lease_time / 4);
        let Stage::Leads(lead) = &mut self.stage else { return };
        let patience = match lead.handoff.as_deref() {
            Some(Handoff { step: HandoffStep::Choosing { patience, .. }, .. }) => *patience,
            _ => turn.now + PATIENCE,
        };
        let step = HandoffStep::Choosing { round, give_up, again: None, patience };
        lead.handoff = Some(Box::new(Handoff { wanted, step }));
        if peers.is_empty() {
            let why = wanted.map_or(NotHanded::NoTarget, NotHanded::NotConnected);
            return self.not_handed(why, turn);
        }
        self.round = round;
        self.told.decided(turn.now, Choice::SeeksTarget, Vec::new());
        turn.push(Action::AskPeers { round, peers, limit: ASK_LIMIT });
    }

    /// The replicas have answered, or those that did.
    pub(super) fn targets_answered(&mut self, of: u64, answers: Vec<PeerAnswer>, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        let Some(Handoff { wanted, step: HandoffStep::Choosing { round, .. } }) = lead.handoff.as_deref()
        else {
            return;
        };
        if *round != of || lead.closed {
            return;
        }
        let wanted = *wanted;
        let best = answers
            .iter()
            .filter(|answer| answer.fit || !rule(Rule::FitTarget))
            .filter(|answer| wanted.is_none_or(|node| answer.peer.node == node))
            .min_by(|a, b| comes_first((a.position, a.peer.node), (b.position, b.peer.node)));
        // Only the process that answered is a target, and only over the stream that it has.
        let to = best.and_then(|best| {
            let is_it =
                |peer: &&PeerInfo| (peer.node, peer.incarnation) == (best.peer.node, best.peer.incarnation);
            turn.facts.replicas.iter().find(is_it).cloned()
        });
        let Some(to) = to else {
            if let Stage::Leads(Lead { handoff: Some(handoff), .. }) = &mut self.stage
                && let HandoffStep::Choosing { again, patience, .. } = &mut handoff.step
                && turn.now + ASK_PAUSE < *patience
            {
                *again = Some(turn.now + ASK_PAUSE);
                return;
            }
            let why = wanted.map_or(NotHanded::NoTarget, NotHanded::NotFit);
            return self.not_handed(why, turn);
        };
        let (attempt, give_up) = (turn.attempt_of_offer(), turn.now + self.settings.withhold_limit);
        self.told.decided(turn.now, Choice::Offers(to.node), answers);
        let Stage::Leads(lead) = &mut self.stage else { return };
        let step = HandoffStep::Withholding { to: Some(to.clone()), attempt, give_up };
        lead.handoff = Some(Box::new(Handoff { wanted, step }));
        turn.push(Action::Withhold { to: Some(to), attempt });
    }

    /// Commits are withheld, and the target has all; or it came to nothing.
    pub(super) fn withheld(&mut self, of: Attempt, outcome: Result<Accepted, String>, turn: &mut Turn<'_>) {
        // As long as the swap before this one may take.
        let give_up = turn.now + self.sight.lease_time / 4;
        let Stage::Leads(Lead { handoff: Some(handoff), .. }) = &mut self.stage else { return };
        let HandoffStep::Withholding { to, attempt, .. } = &handoff.step else { return };
        if *attempt != of {
            return;
        }
        let Some(to) = to.clone() else { return self.withheld_to_end(turn) };
        match outcome {
            Ok(accepted) => handoff.step = HandoffStep::Ready { to, attempt: of, accepted, give_up },
            Err(why) => self.not_handed(NotHanded::Aborted { to: to.node, why }, turn),
        }
    }

    /// Gives up what can be given up and has no use any more.
    pub(super) fn check_handoff(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(Lead { handoff: Some(handoff), closed, .. }) = &self.stage else { return };
        let over = handoff.give_up().is_some_and(|give_up| turn.now >= give_up);
        let why = match &handoff.step {
            HandoffStep::Swapping { .. } => return,
            HandoffStep::Withholding { to: None, .. } if *closed => return self.withheld_to_end(turn),
            _ if *closed => NotHanded::Ended,
            HandoffStep::Choosing { again: Some(_), .. } if over => {
                return self.seek_target(handoff.wanted, turn);
            }
            HandoffStep::Choosing { .. } if over => {
                handoff.wanted.map_or(NotHanded::NoTarget, NotHanded::NotFit)
            }
            HandoffStep::Withholding { to: None, .. } if over => return self.withheld_to_end(turn),
            HandoffStep::Withholding { to: Some(to), .. } if over => {
                NotHanded::Aborted { to: to.node, why: "it took too long".into() }
            }
            HandoffStep::Ready { to, .. } if over => {
                NotHanded::Aborted { to: to.node, why: "the store does not answer".into() }
            }
            _ => return,
        };
        self.not_handed(why, turn);
    }

    /// Writes the target into the register, if it is time to. Returns whether nothing else is to be
    /// written now.
    pub(super) fn hand_over(&mut self, version: &Option<Version>, anew: bool, turn: &mut Turn<'_>) -> bool {
        let Stage::Leads(lead) = &self.stage else { return false };
        let Some(Handoff { wanted, step: HandoffStep::Ready { to, attempt, accepted, .. } }) =
            lead.handoff.as_deref()
        else {
            return false;
        };
        if !anew && !self.swaps.is_settled() {
            // It is settled by a renewal.
            return false;
        }
        let (to, attempt, accepted, wanted) = (to.clone(), *attempt, accepted.clone(), *wanted);
        if anew {
            let why = "an older record is in the register, or none".into();
            self.not_handed(NotHanded::Aborted { to: to.node, why }, turn);
            return false;
        }
        if turn.facts.position != Some(accepted.position) && rule(Rule::FinalState) {
            let why = "more was committed meanwhile".into();
            self.not_handed(NotHanded::Aborted { to: to.node, why }, turn);
            return true;
        }
        let Some(epoch) = self.next_epoch(turn) else { return false };
        let Stage::Leads(lead) = &mut self.stage else { return false };
        if rule(Rule::HandoffCloses) {
            // Before it is sent: nothing is acknowledged here any more, whatever comes of it.
            lead.close(&mut self.told, turn);
        }
        lead.handoff =
            Some(Box::new(Handoff { wanted, step: HandoffStep::Swapping { to: to.clone(), epoch } }));
        // What this node takes after that is newer.
        self.heard = self.heard.max(epoch.number());
        self.told.decided(turn.now, Choice::HandsOver(to.node, epoch), Vec::new());
        let PeerInfo { node, incarnation, addresses } = to;
        let tenure = Tenure {
            holder: Holder { node, incarnation, boot: accepted.boot, addresses },
            epoch,
            began: Some(accepted.position),
            lease_clock: Duration::ZERO,
            position: Some(accepted.position),
        };
        self.swap(version.clone(), LeaseState::Held(tenure), Aim::Handoff { attempt }, turn);
        true
    }

    /// The record that names the target is known to be there, or to have been.
    pub(super) fn handed(&mut self, sent: &SentSwap, turn: &mut Turn<'_>) {
        let Stage::Leads(Lead { handoff: Some(handoff), .. }) = &self.stage else { return };
        let Some(to) = handoff.target().cloned() else { return };
        if let Some(InStore::Record(record, version)) = self.sight.seen.as_ref().map(|seen| &seen.what)
            && record.attempt == sent.record.attempt
        {
            turn.push(Action::Handed { to, record: record.clone(), version: version.clone() });
        }
        self.step_down(Ending::Lost, turn);
    }

    /// The swap may be done, or may be at any later time. A test takes this rule out.
    pub(super) fn handoff_unknown(&mut self, turn: &mut Turn<'_>) {
        let later = turn.now + self.sight.lease_time / 4;
        if let Stage::Leads(lead) = &mut self.stage
            && lead.is_swapping()
            && !rule(Rule::HandoffUnknown)
        {
            (lead.closed, lead.renew_at) = (false, later);
            self.swaps.forget_unsettled();
            self.give_lease(turn);
            turn.push(Action::GoOn);
            self.not_handed(NotHanded::NotPrimary, turn);
        }
    }

    /// This node keeps the lease, as far as it has it.
    pub(super) fn not_handed(&mut self, why: NotHanded, turn: &mut Turn<'_>) {
        let leaves = self.leaving.is_some();
        let Stage::Leads(lead) = &mut self.stage else { return };
        let Some(handoff) = lead.handoff.take() else { return };
        // A holder whose epoch is closed goes on with a new one, or stops leading.
        if handoff.withholds() && !lead.closed && !leaves && lead.ending.is_none() {
            turn.push(Action::GoOn);
        }
        self.told.decided(turn.now, Choice::KeepsOn(why.clone()), Vec::new());
        turn.push(Action::HandoffEnded(Err(why)));
        match leaves {
            // The node that was named before this one was to end is not the only one.
            true if !handoff.withholds() && lead.serves() && handoff.wanted.is_some() => {
                self.seek_target(None, turn);
            }
            true if !handoff.withholds() && lead.serves() => self.withhold_to_end(turn),
            true => self.step_down(Ending::Release, turn),
            false => {}
        }
    }

    /// The node ends without another one. What runs ends first: once nothing is acknowledged any
    /// more, its outcome would not be known.
    fn withhold_to_end(&mut self, turn: &mut Turn<'_>) {
        let (attempt, give_up) = (turn.attempt_of_offer(), turn.now + self.settings.withhold_limit);
        let Stage::Leads(lead) = &mut self.stage else { return };
        let step = HandoffStep::Withholding { to: None, attempt, give_up };
        lead.handoff = Some(Box::new(Handoff { wanted: None, step }));
        turn.push(Action::Withhold { to: None, attempt });
    }

    /// Nothing runs here any more, or it takes too long: the lease is given back.
    fn withheld_to_end(&mut self, turn: &mut Turn<'_>) {
        if let Stage::Leads(lead) = &mut self.stage {
            lead.handoff = None;
        }
        self.step_down(Ending::Release, turn);
    }

    /// This node took the lease anew, over its own record: the swap can't be done any more.
    pub(super) fn handoff_failed(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(Lead { handoff: Some(handoff), .. }) = &self.stage else { return };
        let why = handoff.target().map_or(NotHanded::Ended, |to| NotHanded::NotWritten(to.node));
        self.not_handed(why, turn);
    }

    /// This node stops leading, and so the handoff ends, one way or the other.
    pub(super) fn end_handoff(&mut self, turn: &mut Turn<'_>) {
        let Stage::Leads(lead) = &mut self.stage else { return };
        let Some(handoff) = lead.handoff.take().filter(|handoff| !handoff.is_to_none()) else { return };
        let there = self.sight.record().and_then(tenure).map(|tenure| tenure.epoch);
        let ended = match handoff.step {
            HandoffStep::Swapping { to, epoch } if there == Some(epoch) => Ok(to.node),
            _ => Err(NotHanded::Ended),
        };
        let what = ended.clone().map_or_else(Choice::KeepsOn, Choice::Handed);
        self.told.decided(turn.now, what, Vec::new());
        turn.push(Action::HandoffEnded(ended));
    }
}
