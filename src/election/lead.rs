//! A lease that this node has, or had last.

use super::observe::tenure;
use super::rules::{Rule, rule};
use super::said::Said;
use super::swap::SentSwap;
use super::{Action, Choice, Instant, Turn};
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
    /// When it stops trying to give the lease back.
    pub(super) give_up: Instant,
}

impl Lead {
    /// From a take that is done.
    pub(super) fn begin(sent: &SentSwap, ready: Option<Position>, now: Instant) -> Option<Lead> {
        let epoch = tenure(&sent.record)?.epoch;
        let until = if rule(Rule::CountFromSending) { sent.fence() } else { now + (sent.fence() - sent.at) };
        let began = tenure(&sent.record)?.began;
        Some(Lead {
            epoch,
            took: sent.at,
            until,
            retry_at: now,
            began,
            position: began.or(ready),
            renew_at: sent.at + sent.record.lease_time / 4,
            closed: false,
            given: None,
            engine: Engine::Promoting(epoch),
            served: false,
            sick_since: None,
            ending: None,
            give_up: Instant::MAX,
        })
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
