//! What the drivers of two nodes do for a handoff, and the messages between them.

use super::node::{Engine, Time};
use super::world::{Event, MS, SECOND, World};
use crate::election::{Accepted, Action, Input};
use crate::lease::Version;
use crate::lease::record::{Attempt, LeaseState, Record};
use crate::peer::NodeId;
use crate::status::PeerInfo;
use crate::txid::{Epoch, Position};

/// How long the target has to answer an offer.
const OFFER_LIMIT: Time = SECOND;

/// What one node says to another on the stream.
#[derive(Clone, Debug)]
pub(super) enum Message {
    Offer {
        from: usize,
        attempt: Attempt,
        position: Position,
    },
    Answer {
        attempt: Attempt,
        boot: Result<String, String>,
    },
    Handed {
        record: Box<Record>,
        version: Version,
    },
    /// There is another primary.
    Changed,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug)]
pub(super) enum Post {
    Lost,
    Late(Time),
    Twice(Time),
}

impl World {
    pub(super) fn perform_handoff(&mut self, at: usize, action: Action) {
        match action {
            Action::Withhold { to, attempt } => {
                let node = &mut self.nodes[at];
                assert!(matches!(node.engine, Engine::Primary(_)) && !node.held, "it withholds already");
                node.withholding = Some(attempt);
                let after = node.withholds_in;
                self.push(self.now + after, at, Event::Hold { to, attempt });
            }
            Action::GoOn => {
                let node = &mut self.nodes[at];
                assert!(matches!(node.engine, Engine::Primary(_)) && !node.gate.is_zero(), "it can't go on");
                (node.withholding, node.held) = (None, false);
            }
            Action::Handed { to, record, version } => {
                self.send(at, to.node, Message::Handed { record, version });
                for other in 0..self.nodes.len() {
                    let follows = self.nodes[other].engine == Engine::Follows(Some(self.nodes[at].id()));
                    if follows && self.nodes[other].id() != to.node {
                        self.send(at, self.nodes[other].id(), Message::Changed);
                    }
                }
            }
            Action::HandoffEnded(outcome) => self.ended.push(outcome),
            Action::HandoffRefused(why) => self.refused.push(why),
            Action::Accept { attempt, boot } => {
                self.nodes[at].accepts += 1;
                self.answer_offer(at, attempt, Ok(boot));
            }
            Action::Decline { attempt, why } => self.answer_offer(at, attempt, Err(why)),
            _ => unreachable!("it is no part of a handoff"),
        }
    }

    /// Ends what was withheld.
    pub(super) fn let_go(&mut self, at: usize) {
        (self.nodes[at].withholding, self.nodes[at].held) = (None, false);
    }

    fn answer_offer(&mut self, at: usize, attempt: Attempt, boot: Result<String, String>) {
        if let Engine::Follows(Some(primary)) = self.nodes[at].engine {
            self.send(at, primary, Message::Answer { attempt, boot });
        }
    }

    pub(super) fn send(&mut self, from: usize, to: NodeId, message: Message) {
        let Some(to) = self.index(to).filter(|to| self.connected(from, *to)) else { return };
        let by_chance = self.chaos.messages > 0 && self.rng.percent(self.chaos.messages);
        let fate = self.posts.pop_front().unwrap_or_else(|| {
            by_chance.then(|| match self.rng.below(3) {
                0 => Post::Lost,
                1 => Post::Late(self.rng.below(4000) * MS),
                _ => Post::Twice(self.rng.below(4000) * MS),
            })
        });
        let (once, again) = match fate {
            None => (Some(MS / 2), None),
            Some(Post::Lost) => (None, None),
            Some(Post::Late(late)) => (Some(late), None),
            Some(Post::Twice(late)) => (Some(MS / 2), Some(late)),
        };
        for after in [once, again].into_iter().flatten() {
            self.push(self.now + after, to, Event::Message(message.clone()));
        }
    }

    pub(super) fn receive(&mut self, at: usize, message: Message) {
        match message {
            Message::Offer { from, attempt, position } => self.consider(at, from, attempt, position),
            Message::Answer { attempt, boot } => {
                let node = &mut self.nodes[at];
                if node.withholding != Some(attempt) {
                    return;
                }
                node.withholding = None;
                let accepted = |boot| node.disk.position().map(|position| Accepted { position, boot });
                let outcome = boot.and_then(|boot| accepted(boot).ok_or_else(|| "no state".into()));
                self.decide(at, Input::Withheld { attempt, outcome });
            }
            Message::Handed { record, version } => self.decide(at, Input::Handed { record, version }),
            Message::Changed => self.decide(at, Input::Changed),
        }
    }

    /// The writer is closed, and all is captured.
    pub(super) fn hold(&mut self, at: usize, to: Option<&PeerInfo>, attempt: Attempt) {
        if self.nodes[at].withholding != Some(attempt) {
            return;
        }
        if self.nodes[at].withhold_fails || self.rng.percent(self.chaos.fails) {
            return self.withhold_failed(at, attempt, "WRITE is not to be had");
        }
        self.nodes[at].held = true;
        let Some(position) = self.nodes[at].disk.position() else { return };
        let Some(to) = to else {
            self.nodes[at].withholding = None;
            let outcome = Ok(Accepted { position, boot: String::new() });
            return self.decide(at, Input::Withheld { attempt, outcome });
        };
        self.push(self.now + OFFER_LIMIT, at, Event::OfferLimit { attempt });
        self.send(at, to.node, Message::Offer { from: at, attempt, position });
    }

    pub(super) fn withhold_failed(&mut self, at: usize, attempt: Attempt, why: &str) {
        if self.nodes[at].withholding.take_if(|of| *of == attempt).is_some() {
            self.decide(at, Input::Withheld { attempt, outcome: Err(why.into()) });
        }
    }

    /// The target takes in all up to the offer before it decides.
    fn consider(&mut self, at: usize, from: usize, attempt: Attempt, position: Position) {
        if self.nodes[at].engine != Engine::Follows(Some(self.nodes[from].id())) {
            return;
        }
        if self.nodes[from].withholding == Some(attempt) {
            self.take_from(at, from);
        }
        if self.nodes[at].disk.position() == Some(position) || self.hasty {
            return self.decide(at, Input::Offered { attempt, position });
        }
        if self.nodes[from].withholding == Some(attempt) {
            let offer = Message::Offer { from, attempt, position };
            self.push(self.now + 50 * MS, at, Event::Message(offer));
        }
    }

    /// A swap that names another node is sent.
    pub(super) fn check_handoff(&mut self, at: usize, record: &Record) {
        let LeaseState::Held(tenure) = &record.state else { return };
        let Engine::Primary(from) = self.nodes[at].engine else { return };
        if tenure.holder.node == self.nodes[at].id() {
            return;
        }
        self.goes_on_from.insert(tenure.epoch, from);
        if self.nodes[at].is_open(self.now) || !self.nodes[at].held {
            self.wrong(format!("node {at} hands the lease over, and may still commit"));
        }
    }

    /// A node leads by a handoff: it has all that was acknowledged in the epoch before.
    pub(super) fn check_has_all(&mut self, at: usize, epoch: Epoch) {
        let Some(before) = self.goes_on_from.get(&epoch).copied() else { return };
        let lacks = self.acked.iter().rev().filter(|acked| acked.epoch == before);
        let lacks = lacks.filter(|acked| !self.has(at, acked.value)).count();
        if lacks > 0 {
            self.wrong(format!("node {at} was handed the lease, and lacks {lacks} of {before}"));
        }
    }
}
