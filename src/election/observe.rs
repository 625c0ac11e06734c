//! What this node has seen of the register, and for how long.

use std::time::Duration;

use super::rules::{Rule, rule};
use super::{Election, Instant, Note, Stage, Turn, Unread};
use crate::lease::Version;
use crate::lease::record::{Holder, LeaseState, Record, Tenure};
use crate::status::PeerInfo;

/// What is in the register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum InStore {
    Empty,
    NotOurs(Version),
    Record(Box<Record>, Version),
}

impl InStore {
    pub(super) fn version(&self) -> Option<&Version> {
        match self {
            InStore::Empty => None,
            InStore::NotOurs(version) | InStore::Record(_, version) => Some(version),
        }
    }

    pub(super) fn record(&self) -> Option<&Record> {
        match self {
            InStore::Record(record, _) => Some(record),
            _ => None,
        }
    }

    fn is_same(&self, other: &InStore) -> bool {
        if rule(Rule::WholeRecord) { self == other } else { self.version() == other.version() }
    }
}

/// What was seen last, and since when it is certain that nothing else was there.
#[derive(Clone, Debug)]
pub(super) struct Sighting {
    pub(super) what: InStore,
    /// After the first read that showed it.
    pub(super) since: Instant,
    /// Before the last read that showed it.
    pub(super) begun: Instant,
    /// It is older than what was there before.
    pub(super) older: bool,
}

/// What this node knows of the register by reading it.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Sight {
    /// Since when a read is under way.
    pub(super) reading: Option<Instant>,
    pub(super) next_read: Instant,
    pub(super) seen: Option<Sighting>,
    /// The last read failed.
    pub(super) fails: bool,
    /// Of the last record that could be read.
    pub(super) lease_time: Duration,
    /// The newest tenure that was ever seen.
    pub(super) newest: Option<Tenure>,
    /// Whether there was ever a record.
    pub(super) any_record: bool,
    /// The nodes that the last record named.
    pub(super) nodes: Vec<PeerInfo>,
    /// Since when nothing but older records were seen.
    older_since: Option<Instant>,
    /// It was told that the register went back.
    told_back: bool,
}

impl Sight {
    pub(super) fn new(lease_time: Duration) -> Sight {
        Sight {
            reading: None,
            next_read: Instant::ZERO,
            seen: None,
            fails: false,
            lease_time,
            newest: None,
            any_record: false,
            nodes: Vec::new(),
            older_since: None,
            told_back: false,
        }
    }

    pub(super) fn record(&self) -> Option<&Record> {
        self.seen.as_ref()?.what.record()
    }

    /// The longest time between two reads that show the same, for nothing to have been in between.
    pub(super) fn longest_gap(&self) -> Duration {
        self.lease_time / 4
    }

    /// Whether what was seen last is certain enough to act on.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        self.seen.as_ref().is_some_and(|seen| now <= seen.begun + self.longest_gap())
    }

    /// Whether nothing fresh is known, and was a short while ago: a read takes long, or failed.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        let lately = |seen: &Sighting| now < seen.begun + self.lease_time;
        !self.is_fresh(now) && self.seen.as_ref().is_some_and(lately)
    }

    /// How long the register has certainly not changed.
    pub(super) fn unchanged_for(&self, now: Instant) -> Duration {
        self.seen.as_ref().map_or(Duration::ZERO, |seen| now.saturating_sub(seen.since))
    }

    /// Takes in what a read showed, or a swap put there. Returns whether it is something else.
    pub(super) fn see(&mut self, what: InStore, begun: Instant, now: Instant) -> bool {
        self.fails = false;
        let same = self.seen.as_ref().is_some_and(|seen| seen.what.is_same(&what));
        let gap = self.longest_gap();
        if let Some(seen) = self.seen.as_mut().filter(|_| same) {
            if rule(Rule::NoGap) && now > seen.begun + gap {
                seen.since = now;
            }
            seen.begun = seen.begun.max(begun);
            return false;
        }
        let mut older = false;
        if let Some(record) = what.record() {
            self.lease_time = record.lease_time;
            self.any_record = true;
            self.nodes = record.nodes.iter().map(|known| known.peer.clone()).collect();
            older = rule(Rule::GoneBack) && self.is_older(record);
            if older {
                self.older_since.get_or_insert(now);
            } else {
                (self.older_since, self.told_back) = (None, false);
                self.newest = tenure(record).cloned().or(self.newest.take());
            }
        }
        let since = if rule(Rule::CountFromSeeing) { now } else { begun };
        self.seen = Some(Sighting { what, since, begun, older });
        true
    }

    /// Whether a record is certainly older than one that was there.
    fn is_older(&self, record: &Record) -> bool {
        self.newest.as_ref().is_some_and(|newest| age(Some(newest)) > age(tenure(record)))
    }

    /// Older records are there, and not only in a read that was late.
    pub(super) fn went_back(&self, now: Instant) -> bool {
        self.older_since.is_some_and(|since| now >= since + self.longest_gap())
    }
}

/// The tenure that a record tells of.
pub(super) fn tenure(record: &Record) -> Option<&Tenure> {
    match &record.state {
        LeaseState::Gathering => None,
        LeaseState::Held(tenure) | LeaseState::Released(tenure) => Some(tenure),
    }
}

/// Grows with each record of one lease.
pub(super) fn age(tenure: Option<&Tenure>) -> (u64, Duration) {
    tenure.map_or((0, Duration::ZERO), |tenure| (tenure.epoch.number(), tenure.lease_clock))
}

pub(super) fn peer(holder: &Holder) -> PeerInfo {
    PeerInfo { node: holder.node, incarnation: holder.incarnation, addresses: holder.addresses.clone() }
}

impl Election {
    /// A read has ended.
    pub(super) fn saw(
        &mut self,
        begun: Instant,
        outcome: Result<Option<(Record, Version)>, Unread>,
        turn: &mut Turn<'_>,
    ) {
        self.sight.reading = None;
        let what = match outcome {
            Ok(None) => InStore::Empty,
            Ok(Some((record, version))) if self.is_of_this_database(&record) => {
                InStore::Record(Box::new(record), version)
            }
            Ok(Some((_, version))) | Err(Unread::NotOurs { version, .. }) => InStore::NotOurs(version),
            Err(Unread::Unavailable(_)) => {
                self.sight.fails = true;
                self.sight.next_read = turn.now + self.sight.lease_time / 8;
                return;
            }
        };
        if let Some(tenure) = what.record().and_then(tenure) {
            self.hear(tenure.epoch.number(), turn);
        }
        let came_true = self.swaps.settle(&what);
        let before = self.sight.record().and_then(tenure).cloned();
        let changed = self.sight.see(what, begun, turn.now);
        self.sight.next_read = (begun + self.sight.lease_time / 8).max(turn.now);
        if changed {
            self.register_changed(before.as_ref(), turn);
        }
        if self.sight.went_back(turn.now) && !self.sight.told_back {
            self.sight.told_back = true;
            let what = "an older record than the last one is there".to_string();
            self.note(Note::StoreWentBack(what), turn);
        }
        if let Some(sent) = came_true {
            self.swap_done(sent, turn);
        }
    }

    pub(super) fn is_of_this_database(&self, record: &Record) -> bool {
        record.cluster == self.settings.cluster && record.database == self.settings.database
    }

    /// Another record is there than before.
    fn register_changed(&mut self, before: Option<&Tenure>, turn: &mut Turn<'_>) {
        if self.sight.record().is_some_and(|record| self.swaps.is_ours(record)) {
            return;
        }
        if let Stage::Follows(race) = &mut self.stage {
            race.stop();
        }
        self.swaps.others_wrote(self.sight.record());
        let Some(now) = self.sight.record().and_then(tenure) else { return };
        let renewed = before.is_some_and(|before| {
            before.holder.incarnation == now.holder.incarnation && age(Some(before)) < age(Some(now))
        });
        let (holder, incarnation) = (now.holder.node, now.holder.incarnation);
        if renewed && self.is_me(holder) {
            self.note(Note::SameNode { incarnation }, turn);
        }
        if let Some(changes) = self.unchecked.as_mut().filter(|_| renewed) {
            *changes += 1;
            if *changes > 1 {
                self.unchecked = None;
                self.note(Note::NotTaken { holder }, turn);
            }
        }
    }

    /// Reads when it is time to.
    pub(super) fn read_in_time(&mut self, turn: &mut Turn<'_>) {
        if self.sight.reading.is_none() && self.wants_read() && turn.now >= self.sight.next_read {
            self.sight.reading = Some(turn.now);
            turn.push(super::Action::Read);
        }
    }

    /// Whether the next thing to happen is a read.
    pub(super) fn wants_read(&self) -> bool {
        match &self.stage {
            Stage::Follows(_) => true,
            Stage::Leads(lead) => {
                let garbled =
                    matches!(self.sight.seen.as_ref().map(|seen| &seen.what), Some(InStore::NotOurs(_)));
                let open = !self.swaps.in_flight() && !self.swaps.is_settled();
                !lead.is_lost() && open && (garbled || self.swaps.needs_read(&self.sight))
            }
        }
    }
}
