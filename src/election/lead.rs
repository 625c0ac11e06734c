//! A lease that this node has, or had last.

use std::time::Duration;

use super::observe::tenure;
use super::rules::{Rule, rule};
use super::said::Said;
use super::swap::{SentSwap, fence_after};
use super::{Accepted, Action, Choice, Instant, Turn};
use crate::lease::record::Attempt;
use crate::peer::NodeId;
use crate::status::PeerInfo;
use crate::txid::{Epoch, Position};

/// What the engine does, or was told to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Engine {
    Promoting(Epoch),
    Serving(Epoch),
    Renewing(Epoch),
    Demoting,
    /// It serves no more. What it had is in the record that gives the lease back.
    Ended(Position),
}

/// Why a node stops leading.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Ending {
    /// Another has the lease, or may have.
    Lost,
    /// It gives the lease back.
    Release,
}

/// A handoff that is under way.
#[derive(Clone, Debug)]
pub(super) struct Handoff {
    /// The node that was named; none: the best one.
    pub(super) wanted: Option<NodeId>,
    pub(super) step: HandoffStep,
}

#[derive(Clone, Debug)]
pub(super) enum HandoffStep {
    /// The replicas are asked how they stand. When none of them is fit, they are asked once more at
    /// an instant, until the patience ends.
    Choosing { round: u64, give_up: Instant, again: Option<Instant>, patience: Instant },
    /// The driver withholds commits, and offers the lease. None: to no node, for it gives the lease
    /// back.
    Withholding { to: Option<PeerInfo>, attempt: Attempt, give_up: Instant },
    /// The target has all. The swap is sent when the one before it is settled.
    Ready { to: PeerInfo, attempt: Attempt, accepted: Accepted, give_up: Instant },
    /// The swap was sent, and this epoch is closed.
    Swapping { to: PeerInfo, epoch: Epoch },
}

impl Handoff {
    pub(super) fn target(&self) -> Option<&PeerInfo> {
        match &self.step {
            HandoffStep::Choosing { .. } => None,
            HandoffStep::Withholding { to, .. } => to.as_ref(),
            HandoffStep::Ready { to, .. } | HandoffStep::Swapping { to, .. } => Some(to),
        }
    }

    /// It goes to no node: this one ends.
    pub(super) fn is_to_none(&self) -> bool {
        matches!(&self.step, HandoffStep::Withholding { to: None, .. })
    }

    pub(super) fn is_to(&self, node: NodeId) -> bool {
        self.wanted == Some(node) || self.target().is_some_and(|to| to.node == node)
    }

    /// Commits are withheld, or about to be, and may go on in the same epoch.
    pub(super) fn withholds(&self) -> bool {
        matches!(self.step, HandoffStep::Withholding { .. } | HandoffStep::Ready { .. })
    }

    /// When it is given up, as long as it can be.
    pub(super) fn give_up(&self) -> Option<Instant> {
        match &self.step {
            HandoffStep::Choosing { give_up, again, .. } => Some(again.unwrap_or(*give_up)),
            HandoffStep::Withholding { give_up, .. } | HandoffStep::Ready { give_up, .. } => Some(*give_up),
            HandoffStep::Swapping { .. } => None,
        }
    }
}

/// A lease that this node has, or had last.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Lead {
    pub(super) epoch: Epoch,
    /// Before the record with this epoch was sent.
    pub(super) took: Instant,
    /// Until when it may acknowledge, by the last record that is known to be done.
    pub(super) until: Instant,
    pub(super) retry_at: Instant,
    pub(super) began: Option<Position>,
    pub(super) position: Option<Position>,
    pub(super) renew_at: Instant,
    /// This epoch acknowledges nothing any more, whatever comes.
    pub(super) closed: bool,
    pub(super) given: Option<Instant>,
    pub(super) engine: Engine,
    /// It has served in this epoch: before that no client has an answer from it.
    pub(super) served: bool,
    pub(super) sick_since: Option<Instant>,
    pub(super) ending: Option<Ending>,
    /// It hands the lease to another node.
    pub(super) handoff: Option<Box<Handoff>>,
    /// When it stops trying to give the lease back.
    pub(super) give_up: Instant,
}

impl Lead {
    /// From a take that is done.
    pub(super) fn begin(sent: &SentSwap, ready: Option<Position>, now: Instant) -> Option<Lead> {
        let epoch = tenure(&sent.record)?.epoch;
        let until = if rule(Rule::CountFromSending) { sent.fence() } else { now + (sent.fence() - sent.at) };
        let began = tenure(&sent.record)?.began;
        let lead = Lead::from(epoch, sent.at, sent.record.lease_time, now);
        Some(Lead { until, began, position: began.or(ready), ..lead })
    }

    /// From a record that the last holder wrote. The time counts from before this node accepted.
    pub(super) fn handed(
        epoch: Epoch,
        position: Position,
        at: Instant,
        lease_time: Duration,
        now: Instant,
    ) -> Lead {
        let lead = Lead::from(epoch, at, lease_time, now);
        Lead { began: Some(position), position: Some(position), ..lead }
    }

    fn from(epoch: Epoch, at: Instant, lease_time: Duration, now: Instant) -> Lead {
        Lead {
            epoch,
            took: at,
            until: at + fence_after(lease_time),
            retry_at: now,
            began: None,
            position: None,
            renew_at: at + lease_time / 4,
            closed: false,
            given: None,
            engine: Engine::Promoting(epoch),
            served: false,
            sick_since: None,
            ending: None,
            handoff: None,
            give_up: Instant::MAX,
        }
    }

    /// The node ends before it ever led.
    pub(super) fn end_unused(&mut self, position: Position, give_up: Instant) {
        self.closed = true;
        self.ending = Some(Ending::Release);
        self.give_up = give_up;
        self.engine = Engine::Ended(position);
    }

    pub(super) fn is_lost(&self) -> bool {
        self.ending == Some(Ending::Lost)
    }

    /// Whether the engine has the epoch of the record, or is about to.
    pub(super) fn opened(&self) -> bool {
        matches!(self.engine, Engine::Promoting(of) | Engine::Serving(of) if of == self.epoch)
    }

    /// It leads, and may acknowledge.
    pub(super) fn serves(&self) -> bool {
        self.engine == Engine::Serving(self.epoch) && !self.closed && self.ending.is_none()
    }

    /// The register may name another node by this one's own doing.
    pub(super) fn is_swapping(&self) -> bool {
        self.handoff.as_ref().is_some_and(|handoff| matches!(handoff.step, HandoffStep::Swapping { .. }))
    }

    /// Nothing more is acknowledged in this epoch.
    pub(super) fn close(&mut self, told: &mut Said, turn: &mut Turn<'_>) {
        if !self.closed {
            self.closed = true;
            self.given = None;
            turn.push(Action::Fence);
            told.decided(turn.now, Choice::Fences(self.epoch), Vec::new());
        }
    }
}
