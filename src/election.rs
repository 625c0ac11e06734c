//! Who is the primary, decided by a lease: a state, what happens, and what is to be done. No clock,
//! no input or output. `src/node/` has what drives it.
//!
//! Each decision has three steps. What happened is taken in. Then the node acts on what it knows
//! now, whatever it was that happened. At the end it tells what changed. What it knows is in
//! `observe` (the register) and `swap` (what this node wrote there, or may have). `take` is the way
//! of a candidate to the lease, by the rules of `candidate`; `holder` is what follows. `handoff` is
//! a holder's way to give it to a replica, and `offer` that of the replica. `bootstrap` makes the
//! first record.

mod bootstrap;
mod candidate;
mod events;
mod handoff;
mod holder;
mod lead;
#[cfg(test)]
mod model;
mod observe;
mod offer;
mod race;
mod rules;
mod said;
mod swap;
mod take;
mod tell;
mod words;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use bootstrap::ENTRIES_MOST;
pub(crate) use events::{
    Accepted, Action, Choice, Command, Decided, Input, NotHanded, Note, OwnAnswer, PeerAnswer, Shown,
    Swapped, Unread,
};

use crate::context::ClockPair;
use crate::lease::record::{Attempt, Holder};
use crate::peer::{Incarnation, NodeId};
use crate::status::PeerInfo;
use crate::txid::{Epoch, EpochHistory, NUMBER_MAX, Position};
use candidate::Setback;
use lead::Lead;
use observe::Sight;
use offer::Offer;
use race::Race;
use said::Said;
use swap::Swaps;

/// An instant of this machine's `CLOCK_BOOTTIME`, which goes on while the machine sleeps.
pub(crate) type Instant = Duration;

/// What does not change while the node runs.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) me: Holder,
    pub(crate) cluster: String,
    pub(crate) database: String,
    /// What this node writes into a record that it makes as the holder, or where there is none. All
    /// others, and the holder itself, go by the record.
    pub(crate) lease_time: Duration,
    /// How much of what the holder had a node may lack and still take over, on the lease clock.
    pub(crate) failover_loss: Duration,
    /// Whether this node may lead at all.
    pub(crate) candidate: bool,
    /// How many nodes make the first record together. None: no node makes it.
    pub(crate) bootstrap: Option<usize>,
    /// This node took part in making a first record once: a missing one is no first start.
    pub(crate) bootstrapped: bool,
    /// Earlier runs of this node that are known to have written to this state directory, and this
    /// one: none other's record is this node's.
    pub(crate) incarnations: Vec<Incarnation>,
    /// A lock shows that no other process has had this state directory since the node was opened,
    /// and it was opened as the last holder's.
    pub(crate) alone: bool,
    /// How long [`Action::Withhold`] may take: the driver's limits, and some more.
    pub(crate) withhold_limit: Duration,
}

/// How the node stands, read anew for each decision.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// The state that it has and that a primary vouches for. While it leads: what is captured.
    pub(crate) position: Option<Position>,
    pub(crate) history: Arc<EpochHistory>,
    /// What the last primary said of its time, with a position that is on this node's disk.
    pub(crate) synced: Option<ClockPair>,
    /// The engine and the disk work; a primary commits. A replica is healthy without a primary,
    /// too.
    pub(crate) healthy: bool,
    pub(crate) draining: bool,
    pub(crate) has_state: bool,
    pub(crate) has_content: bool,
    /// On a primary: the replicas that are connected, the best known first.
    pub(crate) replicas: Vec<PeerInfo>,
    /// The highest epoch number that this node has heard of, durably.
    pub(crate) heard: u64,
    /// Fresh from the system's randomness for this very decision: a copied machine must not draw
    /// the same numbers as the one that it was copied from.
    pub(crate) random: [u64; 6],
}

/// The share of the lease time in which a holder acknowledges, in percent. It gives room for clocks
/// that do not run alike: a ninth faster or slower than the true time, each.
const FENCE_PERCENT: u32 = 80;
/// How much higher than all known numbers of epochs one may be that a peer claims. No cluster gets
/// there by itself, and so no claim uses up the numbers.
const CLAIM_STEP: u64 = 1 << 32;
/// The least time until the node looks again.
const LEAST_WAKE: Duration = Duration::from_millis(1);
/// The most time until it does.
const MOST_WAKE: Duration = Duration::from_secs(60);

/// Whose lease it is, and what this node does about it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Election {
    settings: Settings,
    sight: Sight,
    swaps: Swaps,
    stage: Stage,
    setback: Setback,
    /// An operator has asked for [`Command::PromoteUnchecked`], and the record has changed so often
    /// since then.
    unchecked: Option<u32>,
    /// [`Command::Leave`] has come; until when it waits for the store.
    leaving: Option<Instant>,
    left: bool,
    /// The highest number of an epoch that this node has heard of.
    heard: u64,
    told: Said,
    /// What the primary offered, and this node accepted.
    offer: Option<Offer>,
    /// The newest question to the peers.
    round: u64,
    /// How many [`Action::Prepare`] have no answer yet.
    preparing: u32,
    /// This run of the node took part in making the first record.
    marked_now: bool,
}

#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
enum Stage {
    /// It does not lead, and may be on its way there.
    Follows(Race),
    /// It has the lease, or had it last.
    Leads(Lead),
}

/// One decision that is being made.
#[derive(Debug)]
struct Turn<'a> {
    facts: &'a Facts,
    now: Instant,
    actions: Vec<Action>,
}

impl Turn<'_> {
    fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// Fresh for each swap: there is at most one in a decision.
    fn attempt(&self) -> Attempt {
        let [high, low, ..] = self.facts.random;
        Attempt(u128::from(high) << 64 | u128::from(low))
    }

    /// The same for a swap that is sent later than this decision.
    fn attempt_of_offer(&self) -> Attempt {
        let [.., high, low] = self.facts.random;
        Attempt(u128::from(high) << 64 | u128::from(low))
    }

    fn branch(&self) -> u64 {
        self.facts.random[2]
    }

    /// From nothing up to this time.
    fn jitter(&self, most: Duration) -> Duration {
        let micros = most.as_micros() as u64;
        Duration::from_micros(self.facts.random[3] % micros.max(1))
    }
}

impl Election {
    pub(crate) fn new(settings: Settings) -> Election {
        Election {
            sight: Sight::new(settings.lease_time),
            swaps: Swaps::default(),
            stage: Stage::Follows(Race::default()),
            setback: Setback::default(),
            unchecked: None,
            leaving: None,
            left: false,
            heard: 0,
            told: Said::default(),
            offer: None,
            round: 0,
            preparing: 0,
            marked_now: false,
            settings,
        }
    }

    /// Whether this is the node's own id.
    pub(crate) fn is_me(&self, node: NodeId) -> bool {
        self.settings.me.node == node
    }

    /// Decides. `now` was read before `facts`, so that a position is never older than its clock.
    pub(crate) fn decide(&mut self, input: Input, facts: &Facts, now: Instant) -> Vec<Action> {
        let mut turn = Turn { facts, now, actions: Vec::new() };
        self.heard = self.heard.max(facts.heard).max(facts.history.epoch().number());
        // Before an answer that comes too late could make the time longer.
        self.close_in_time(&mut turn);
        self.take_in(input, &mut turn);
        self.give_up_waiting(&mut turn);
        match self.stage {
            _ if self.left => {}
            Stage::Follows(_) => self.follow(&mut turn),
            Stage::Leads(_) => self.lead(&mut turn),
        }
        self.read_in_time(&mut turn);
        if self.left {
            // Requests that wait here go to the one that has the lease.
            self.tell_follow(&mut turn);
        } else {
            self.tell(&mut turn);
        }
        let wake = self.wake(&turn).clamp(now + LEAST_WAKE, now + MOST_WAKE);
        turn.push(Action::Wake(wake));
        turn.actions
    }

    /// What this node tells a peer that asks.
    pub(crate) fn answer(&self, facts: &Facts, now: Instant) -> OwnAnswer {
        let fit =
            matches!(self.stage, Stage::Follows(_)) && self.leaving.is_none() && self.would_take(facts, now);
        OwnAnswer { epoch: self.heard.max(facts.heard).max(facts.history.epoch().number()), fit }
    }

    /// The epoch of this node while it leads or is about to, and when it took it: the zero of its
    /// lease clock.
    pub(crate) fn took(&self) -> Option<(Epoch, Instant)> {
        match &self.stage {
            Stage::Leads(lead) if lead.opened() && !lead.closed => Some((lead.epoch, lead.took)),
            _ => None,
        }
    }

    /// So many nodes make the first record together, by what the store says of it.
    pub(crate) fn set_starters(&mut self, nodes: usize) {
        self.settings.bootstrap = Some(nodes);
    }

    /// The last decisions, oldest first.
    pub(crate) fn decisions(&self) -> impl Iterator<Item = &Decided> {
        self.told.decisions.iter()
    }

    fn take_in(&mut self, input: Input, turn: &mut Turn<'_>) {
        match input {
            Input::Tick => {}
            Input::Changed => self.sight.next_read = turn.now,
            Input::Read { begun, outcome } => self.saw(begun, outcome, turn),
            Input::Swapped { attempt, outcome } => self.swapped(attempt, outcome, turn),
            Input::Peers { round, answers } => self.peers_answered(round, answers, turn),
            Input::Prepared { position } => self.prepared(position),
            Input::Promoted(outcome) => self.promoted(outcome, turn),
            Input::Renewed(outcome) => self.renewed(outcome, turn),
            Input::Demoted { position } => self.demoted(position, turn),
            Input::Withheld { attempt, outcome } => self.withheld(attempt, outcome, turn),
            Input::Offered { attempt, position } => self.offered(attempt, position, turn),
            Input::Handed { record, version } => self.told_handed(record, version),
            Input::Heard(number) => {
                self.hear(number, turn);
                self.give_again(number);
            }
            // Also while it stops leading: that is when an operator asks.
            Input::Command(Command::PromoteUnchecked) => self.unchecked = Some(0),
            Input::Command(Command::Handoff { to }) => self.asked_to_hand(to, turn),
            Input::Command(Command::Leave) => {
                if self.leaving.is_none() {
                    self.leaving = Some(turn.now + self.sight.lease_time / 2);
                    self.hand_or_release(turn);
                }
            }
        }
    }

    /// A number that a record, a peer or a request names.
    fn hear(&mut self, number: u64, turn: &mut Turn<'_>) {
        let known = self.heard;
        if number <= known || number > known.saturating_add(CLAIM_STEP).min(NUMBER_MAX) {
            return;
        }
        self.heard = number;
        if rules::rule(rules::Rule::HeardEnds)
            && let Stage::Leads(lead) = &mut self.stage
            && number > lead.epoch.number()
        {
            lead.close(&mut self.told, turn);
        }
        turn.push(Action::Hear(number));
    }

    /// An epoch above all that are known. None: there is no higher number.
    fn next_epoch(&self, turn: &Turn<'_>) -> Option<Epoch> {
        let number = self.heard.checked_add(1).filter(|number| *number <= NUMBER_MAX)?;
        Some(Epoch::new(number, turn.branch()))
    }

    /// Ends all that this node did about the lease, for good.
    fn leave(&mut self, turn: &mut Turn<'_>) {
        if !self.left {
            self.left = true;
            turn.push(Action::Left);
        }
    }
}
