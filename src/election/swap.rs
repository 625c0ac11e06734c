//! What this node wrote into the register, or may have.

use std::collections::VecDeque;
use std::time::Duration;

use super::observe::{InStore, Sight, age, tenure};
use super::race::Stride;
use super::rules::{Rule, rule};
use super::{Action, Election, FENCE_PERCENT, Instant, Stage, Swapped, Turn};
use crate::lease::Version;
use crate::lease::record::{Attempt, LeaseState, Record};

/// How many attempts a node knows again. One that it forgot is another's to it, which costs the
/// lease and nothing else.
const REMEMBERED: usize = 4096;
/// How many swaps may be unsettled. All of them are over one version, or nearly.
const UNSETTLED_MOST: usize = 64;

/// What a swap is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aim {
    Gather,
    Take {
        unchecked: bool,
    },
    Renew,
    Release,
    /// Names another node, by the attempt that it was offered.
    Handoff {
        attempt: Attempt,
    },
}

/// A swap that was sent.
#[derive(Clone, Debug)]
pub(super) struct SentSwap {
    pub(super) record: Box<Record>,
    pub(super) at: Instant,
    pub(super) purpose: Aim,
    expected: Option<Version>,
    /// How old the record is that it would replace; none where there was none.
    over: Option<(u64, Duration)>,
}

impl SentSwap {
    /// Until when the holder may acknowledge when this is done.
    pub(super) fn fence(&self) -> Instant {
        self.at + fence_after(self.record.lease_time)
    }
}

/// How long after the sending of a record its holder may acknowledge.
pub(super) fn fence_after(lease_time: Duration) -> Duration {
    let percent = if rule(Rule::FenceBefore) { FENCE_PERCENT } else { 100 };
    lease_time * percent / 100
}

/// The last record of ours that is known to have been there.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) record: Box<Record>,
    pub(super) version: Version,
}

#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Swaps {
    /// Its answer has not come.
    flight: Option<SentSwap>,
    /// A read showed it before its answer came.
    flight_seen: Option<(Box<Record>, Version)>,
    /// Those that may be done, or may be at any later time.
    unsettled: Vec<SentSwap>,
    pub(super) own: Option<Own>,
    /// When the last answer came that settled nothing.
    doubt_since: Instant,
    /// That answer was a conflict: there is another record than the one that this node knows.
    pub(super) conflict: bool,
    sent: VecDeque<Attempt>,
}

impl Swaps {
    pub(super) fn in_flight(&self) -> bool {
        self.flight.is_some()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.unsettled.is_empty()
    }

    /// A take may be done, or may be at any later time.
    pub(super) fn may_take(&self) -> bool {
        self.flight.iter().chain(&self.unsettled).any(|sent| matches!(sent.purpose, Aim::Take { .. }))
    }

    /// Nothing was read since an answer that settled nothing.
    pub(super) fn needs_read(&self, sight: &Sight) -> bool {
        let unread = sight.seen.as_ref().is_none_or(|seen| seen.begun < self.doubt_since);
        self.flight.is_none() && !self.unsettled.is_empty() && unread
    }

    /// A read shows the very record that a swap did not find any more: the read was late. After a
    /// lease time the node tries again, all the same.
    pub(super) fn refutes(&self, sight: &Sight, now: Instant) -> bool {
        let version = sight.seen.as_ref().and_then(|seen| seen.what.version());
        let same = self.unsettled.last().is_some_and(|sent| sent.expected.as_ref() == version);
        self.conflict && same && now < self.doubt_since + sight.lease_time
    }

    /// Until when the holder may acknowledge, whichever of its swaps are done: a record with a
    /// shorter lease time may be one of them.
    pub(super) fn earliest_fence(&self, done: Instant) -> Instant {
        let open = self.unsettled.iter().filter(|_| rule(Rule::UnknownStays));
        open.chain(&self.flight).map(SentSwap::fence).fold(done, Instant::min)
    }

    /// Whether this node sent the record, now or before: a fact of the attempt, not of the names in
    /// the record. A copied machine has the same names.
    pub(super) fn is_ours(&self, record: &Record) -> bool {
        self.sent.contains(&record.attempt)
    }

    /// Whether it is the last record of this node that is known to have been there.
    pub(super) fn is_last(&self, record: &Record) -> bool {
        self.own.as_ref().is_some_and(|own| own.record.attempt == record.attempt)
    }

    /// Takes in what a read showed. Returns a swap that is done by it.
    pub(super) fn settle(&mut self, what: &InStore) -> Option<SentSwap> {
        if !rule(Rule::UnknownStays) {
            self.unsettled.retain(|sent| sent.expected.as_ref() != what.version());
        }
        let InStore::Record(record, version) = what else { return None };
        if self.flight.as_ref().is_some_and(|sent| sent.record.attempt == record.attempt) {
            self.flight_seen = Some((record.clone(), version.clone()));
            return None;
        }
        if let Some(own) = self.own.as_mut().filter(|own| own.record.attempt == record.attempt) {
            // An operator's change of the record leaves the attempt as it is.
            *own = Own { record: record.clone(), version: version.clone() };
        }
        let at = self.unsettled.iter().position(|sent| sent.record.attempt == record.attempt)?;
        let sent = self.unsettled.swap_remove(at);
        self.done(&sent, record.clone(), version.clone());
        Some(sent)
    }

    /// This one is done: none of those before it can be any more. What is there now may have been
    /// changed by an operator since then.
    fn done(&mut self, sent: &SentSwap, record: Box<Record>, version: Version) {
        self.unsettled.clear();
        self.conflict = false;
        let own = Own { record, version };
        self.own = Some(own).filter(|_| !matches!(sent.purpose, Aim::Handoff { .. }));
    }

    /// The last holder's swap made this record this node's.
    pub(super) fn adopt(&mut self, record: Box<Record>, version: Version) {
        self.unsettled.clear();
        self.conflict = false;
        self.remember(record.attempt);
        self.own = Some(Own { record, version });
    }

    fn remember(&mut self, attempt: Attempt) {
        if self.sent.len() == REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back(attempt);
    }

    /// What no rule allows.
    pub(super) fn forget_unsettled(&mut self) {
        self.unsettled.clear();
    }

    /// Those over a record that is certainly gone can't be done any more.
    pub(super) fn others_wrote(&mut self, record: Option<&Record>) {
        let Some(record) = record else { return };
        let now = age(tenure(record));
        self.unsettled.retain(|sent| sent.over.is_none_or(|over| over >= now));
    }
}

impl Election {
    /// Sends a record in the place of this version.
    pub(super) fn swap(
        &mut self,
        expected: Option<Version>,
        state: LeaseState,
        purpose: Aim,
        turn: &mut Turn<'_>,
    ) {
        let there = self.sight.record().filter(|_| expected.is_some());
        let own = self.swaps.own.as_ref().filter(|own| Some(&own.version) == expected.as_ref());
        let replaced = own.map(|own| &*own.record).or(there);
        let lease_time = match purpose {
            Aim::Gather => replaced.map_or(self.settings.lease_time, |record| record.lease_time),
            _ => self.settings.lease_time,
        };
        let attempt = match purpose {
            Aim::Handoff { attempt } => attempt,
            _ => turn.attempt(),
        };
        let record = Box::new(Record {
            cluster: self.settings.cluster.clone(),
            database: self.settings.database.clone(),
            attempt,
            lease_time,
            paused: replaced.or(self.sight.record()).is_some_and(|record| record.paused),
            nodes: self.nodes(replaced, purpose, turn),
            state,
        });
        let over = replaced.map(|record| age(tenure(record)));
        let sent =
            SentSwap { record: record.clone(), at: turn.now, purpose, expected: expected.clone(), over };
        if !matches!(purpose, Aim::Handoff { .. }) {
            self.swaps.remember(attempt);
        }
        self.swaps.flight = Some(sent);
        self.swaps.flight_seen = None;
        // From now on the shorter of two times counts.
        self.give_lease(turn);
        turn.push(Action::Swap { expected, record });
    }

    /// The driver bounds all that it does. What has no answer for a lease time never gets one.
    pub(super) fn give_up_waiting(&mut self, turn: &mut Turn<'_>) {
        let since = turn.now.saturating_sub(self.sight.lease_time);
        self.sight.reading.take_if(|begun| *begun < since);
        if let Some(sent) = self.swaps.flight.as_ref().filter(|sent| sent.at < since) {
            let attempt = sent.record.attempt;
            self.swapped(attempt, Swapped::Unknown("no answer".into()), turn);
        }
        if let Stage::Follows(race) = &self.stage
            && matches!(race.phase, Stride::Asking(_))
            && turn.now > race.give_up
        {
            self.peers_answered(self.round, Vec::new(), turn);
        }
    }

    /// The answer to a swap.
    pub(super) fn swapped(&mut self, attempt: Attempt, outcome: Swapped, turn: &mut Turn<'_>) {
        let Some(sent) = self.swaps.flight.take_if(|sent| sent.record.attempt == attempt) else { return };
        let seen = self.swaps.flight_seen.take();
        let (record, outcome) = match (seen, outcome) {
            (Some((record, version)), _) => (record, Swapped::Done(version)),
            (None, Swapped::Unknown(why)) if !rule(Rule::KnownTake) => {
                (sent.record.clone(), Swapped::Done(Version::new(why)))
            }
            (None, outcome) => (sent.record.clone(), outcome),
        };
        let retry = turn.now + self.sight.lease_time / 16;
        self.ask_again_from(retry);
        match outcome {
            Swapped::Done(version) => {
                let what = InStore::Record(record.clone(), version.clone());
                self.swaps.done(&sent, record, version);
                // The register has not stood still meanwhile, and is as new as it can be.
                self.sight.see(what, turn.now, turn.now);
                self.swap_done(sent, turn);
            }
            Swapped::Unavailable(_) => self.taking_failed(),
            Swapped::Conflict if !rule(Rule::ConflictIsUnknown) => {
                self.swaps.sent.retain(|other| *other != attempt);
                self.taking_failed();
                self.sight.next_read = turn.now;
            }
            Swapped::Conflict | Swapped::Unknown(_) => {
                self.swaps.conflict |= outcome == Swapped::Conflict;
                self.swaps.doubt_since = turn.now;
                if self.swaps.unsettled.len() == UNSETTLED_MOST {
                    self.swaps.unsettled.remove(0);
                }
                self.swaps.unsettled.push(sent);
                self.sight.next_read = turn.now;
                self.taking_failed();
                self.handoff_unknown(turn);
            }
        }
    }

    /// A take is not known to be done: the way to it begins anew, and stays prepared.
    fn taking_failed(&mut self) {
        if let Stage::Follows(race) = &mut self.stage
            && race.phase == Stride::Taking
        {
            race.phase = Stride::Rest;
        }
    }

    /// A swap of ours is known to be done.
    pub(super) fn swap_done(&mut self, sent: SentSwap, turn: &mut Turn<'_>) {
        match (&sent.purpose, &mut self.stage) {
            (Aim::Take { unchecked }, Stage::Follows(_)) => self.took_it(*unchecked, &sent, turn),
            (Aim::Renew, Stage::Leads(_)) => self.renewal_done(&sent, turn),
            (Aim::Release, Stage::Leads(_)) => self.gave_back(turn),
            (Aim::Handoff { .. }, Stage::Leads(_)) => self.handed(&sent, turn),
            _ => {}
        }
    }
}
