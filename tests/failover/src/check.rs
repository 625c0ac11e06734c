//! The rules of a history, and of what is there at its end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use replite::{Epoch, Txid};

use crate::clock::Micros;
use crate::foreign::COMMITTED;
use crate::history::{Acknowledged, History, Outcome, Violation, Write};
use crate::node::Kept;
use crate::world::Setting;

/// What an asynchronous primary that is cut off from none may lose: what was under way.
const UNDER_WAY: Duration = Duration::from_millis(2500);
/// Entries that a violation names.
const NAMED_MAX: usize = 5;

/// What is there when all is well again.
#[derive(Default, Debug)]
pub struct Finals {
    /// How often each row is there.
    pub rows: HashMap<(String, u64), u64>,
    /// What each node keeps.
    pub lost: Vec<(String, Kept)>,
}

/// What a round costs, when it holds.
#[derive(Clone, Copy, Default, Debug)]
pub struct Figures {
    pub acknowledged: usize,
    pub not_executed: usize,
    pub unknown: usize,
    pub unknown_done: usize,
    pub foreign: usize,
    /// Commits of another program that are neither there nor kept: no rule speaks of them.
    pub foreign_gone: usize,
    /// Acknowledged, and in a `lost/`; and of those in several.
    pub lost: usize,
    pub lost_twice: usize,
    /// Acknowledged by a node whose files were destroyed.
    pub destroyed: usize,
    pub epochs: usize,
    pub told_lost: u64,
    pub reads: usize,
    pub handoffs: u64,
    pub handed: u64,
    /// Requests that failed on a node that was not there, and on others.
    pub failed_away: usize,
    pub failed: usize,
    /// The longest request that did not fail.
    pub longest_request: Duration,
    /// The longest time between acknowledgements of two epochs.
    pub longest_gap: Duration,
}

struct Rules<'a> {
    history: &'a History,
    finals: &'a Finals,
    setting: &'a Setting,
    begin: Micros,
    violations: Vec<Violation>,
    figures: Figures,
}

/// Looks whether all rules hold.
#[must_use]
pub fn check(
    history: &History,
    finals: &Finals,
    setting: &Setting,
    begin: Micros,
) -> (Vec<Violation>, Figures) {
    let mut rules =
        Rules { history, finals, setting, begin, violations: Vec::new(), figures: Figures::default() };
    rules.epochs();
    rules.numbers();
    rules.rows();
    rules.pauses();
    rules.requests();
    (rules.violations, rules.figures)
}

/// Acknowledged writes, by epoch.
fn by_epoch(history: &History) -> BTreeMap<Epoch, Vec<(&Write, &Acknowledged)>> {
    let mut all = BTreeMap::<Epoch, Vec<(&Write, &Acknowledged)>>::new();
    for write in &history.writes {
        if let Some(acknowledged) = write.acknowledged() {
            all.entry(acknowledged.txid.epoch()).or_default().push((write, acknowledged));
        }
    }
    all
}

impl Rules<'_> {
    fn says(&mut self, rule: &'static str, what: String) {
        if self.violations.iter().filter(|v| v.rule == rule).count() < NAMED_MAX {
            self.violations.push(Violation { rule, what });
        }
    }

    fn told(&self, writes: &[&Write]) -> String {
        let lines: Vec<_> = writes.iter().take(NAMED_MAX).map(|w| w.told(self.begin)).collect();
        format!("{} of them:\n    {}", writes.len(), lines.join("\n    "))
    }

    /// In one epoch one node acknowledges, and none of an older epoch does after one of a newer did.
    fn epochs(&mut self) {
        let epochs = by_epoch(self.history);
        self.figures.epochs = epochs.len();
        let mut numbers = BTreeMap::<u64, BTreeSet<(String, String, Epoch)>>::new();
        for (epoch, writes) in &epochs {
            for (_, a) in writes {
                numbers.entry(epoch.number()).or_default().insert((a.node.clone(), a.run.clone(), *epoch));
            }
        }
        for (number, runs) in numbers.into_iter().filter(|(_, runs)| runs.len() > 1) {
            self.says("1 one primary", format!("several acknowledged in epoch {number}: {runs:?}"));
        }
        let span = |writes: &[(&Write, &Acknowledged)]| {
            (writes.iter().map(|(_, a)| a.acked).min(), writes.iter().map(|(_, a)| a.acked).max())
        };
        let mut newer: Vec<(&Write, &Acknowledged)> = Vec::new();
        let mut before: Option<Micros> = None;
        for (_, writes) in epochs.iter().rev() {
            let first = newer.iter().min_by_key(|(_, a)| a.acked).copied();
            if let Some((first, at)) = first {
                let late: Vec<&Write> =
                    writes.iter().filter(|(_, a)| a.began > at.acked).map(|(w, _)| *w).collect();
                if !late.is_empty() {
                    let what = format!(
                        "writes that an older epoch acknowledged though they began after this one of a newer: {}\n    {}",
                        first.told(self.begin),
                        self.told(&late)
                    );
                    self.says("1 at one time", what);
                }
            }
            let (first, last) = span(writes);
            if let (Some(last), Some(next)) = (last, before) {
                let gap = Duration::from_micros(next.saturating_sub(last));
                self.figures.longest_gap = self.figures.longest_gap.max(gap);
            }
            before = first;
            newer.extend(writes);
        }
    }

    /// Each number is given once.
    fn numbers(&mut self) {
        let mut given = HashMap::<Txid, &Write>::new();
        let mut twice = Vec::new();
        for write in &self.history.writes {
            if let Some(acknowledged) = write.acknowledged()
                && let Some(other) = given.insert(acknowledged.txid, write)
            {
                twice.extend([other, write]);
            }
        }
        if !twice.is_empty() {
            self.says("1 numbers", format!("transactions of one number: {}", self.told(&twice)));
        }
    }

    /// What was acknowledged is there once, or kept; what is not known at most once; the rest never.
    fn rows(&mut self) {
        let history = self.history;
        let mut kept = HashMap::<(String, u64), BTreeSet<&str>>::new();
        for (node, lost) in &self.finals.lost {
            for row in &lost.rows {
                kept.entry(row.clone()).or_default().insert(node);
            }
        }
        self.figures.told_lost = history.told_lost;
        self.figures.reads = history.reads.len();
        let (mut often, mut unwanted, mut branches, mut gone) = (vec![], vec![], vec![], vec![]);
        for write in &history.writes {
            let row = write.row();
            let times = self.finals.rows.get(&row).copied().unwrap_or(0);
            if times > 1 {
                often.push(write);
            }
            let keepers = kept.get(&row).map_or(0, BTreeSet::len);
            if times > 0 && keepers > 0 {
                branches.push(write);
            }
            match &write.outcome {
                Outcome::Acknowledged(_) => {
                    self.figures.acknowledged += 1;
                    if times == 0 {
                        gone.push((write, keepers));
                    }
                }
                Outcome::NotExecuted(_) => {
                    self.figures.not_executed += 1;
                    if times + keepers as u64 > 0 {
                        unwanted.push(write);
                    }
                }
                Outcome::Unknown(_) | Outcome::Pending if write.client == "foreign" => {
                    self.figures.foreign += 1;
                    let committed = write.outcome == Outcome::Unknown(COMMITTED.into());
                    self.figures.foreign_gone += usize::from(committed && times + keepers as u64 == 0);
                }
                Outcome::Unknown(_) | Outcome::Pending => {
                    self.figures.unknown += 1;
                    self.figures.unknown_done += usize::from(times > 0);
                }
            }
        }
        for (rule, what, writes) in [
            ("2 once", "rows that are there more than once", often),
            ("2 not executed", "writes that are there though clients were told they were not done", unwanted),
            ("2 once", "rows that are there and on a lost branch", branches),
        ] {
            if !writes.is_empty() {
                self.says(rule, format!("{what}: {}", self.told(&writes)));
            }
        }
        self.gone(&gone);
        let asked: BTreeSet<_> = history.writes.iter().map(Write::row).collect();
        let made_up: Vec<_> = self.finals.rows.keys().filter(|row| !asked.contains(*row)).collect();
        if !made_up.is_empty() {
            self.says("2 once", format!("rows that no client wrote: {made_up:?}"));
        }
    }

    /// While elections are paused no other node leads.
    fn pauses(&mut self) {
        let history = self.history;
        for paused in &history.paused {
            let within = |begin, end| paused.begin <= begin && end <= paused.end;
            let other = |write: &&Write| {
                let acked = write.acknowledged();
                acked.is_some_and(|a| a.node != paused.holder && within(a.began, a.acked))
            };
            let writes: Vec<&Write> = history.writes.iter().filter(other).collect();
            if !writes.is_empty() {
                let what = format!("writes that others than {} acknowledged", paused.holder);
                self.says("8 paused", format!("{what}: {}", self.told(&writes)));
            }
            let leads = |look: &&crate::history::Look| {
                look.role == "primary" && look.node != paused.holder && within(look.begin, look.end)
            };
            if let Some(look) = history.looks.iter().find(leads) {
                let at = crate::clock::seconds(self.begin, look.begin);
                let what = format!("{} led at {at:.3} in epoch {}", look.node, look.epoch);
                self.says("8 paused", format!("{what}, and {} had the lease", paused.holder));
            }
        }
    }

    /// What clients had to bear, which no rule forbids.
    fn requests(&mut self) {
        let history = self.history;
        let figures = &mut self.figures;
        (figures.handoffs, figures.handed) = (history.handoffs, history.handed);
        let writes = history.writes.iter().filter(|write| write.client != "foreign");
        let writes = writes.map(|w| (w.acknowledged().is_some(), w.away, w.end.saturating_sub(w.begin)));
        let reads = history.reads.iter().map(|r| (r.status == Some(200), r.away, r.end - r.begin));
        for (done, away, took) in writes.chain(reads) {
            match (done, away) {
                (true, _) => {
                    figures.longest_request = figures.longest_request.max(Duration::from_micros(took))
                }
                (false, true) => figures.failed_away += 1,
                (false, false) => figures.failed += 1,
            }
        }
    }

    /// Acknowledged writes that are not there: kept somewhere, and within the bound.
    fn gone(&mut self, gone: &[(&Write, usize)]) {
        let mut ends = HashMap::<Epoch, Micros>::new();
        for (epoch, writes) in by_epoch(self.history) {
            ends.insert(epoch, writes.iter().map(|(_, a)| a.acked).max().unwrap_or(0));
        }
        // It led for longer than it acknowledged.
        for look in self.history.looks.iter().filter(|look| look.role == "primary") {
            let end = ends.entry(look.epoch).or_default();
            *end = (*end).max(look.begin);
        }
        let (mut nowhere, mut beyond, mut connected, mut orderly) = (vec![], vec![], vec![], vec![]);
        for (write, keepers) in gone {
            let Some(a) = write.acknowledged() else { continue };
            let destroyed = self.history.destroyed.iter().any(|(node, at)| *node == a.node && *at >= a.began);
            match keepers {
                0 if destroyed => self.figures.destroyed += 1,
                0 => nowhere.push(*write),
                1 => self.figures.lost += 1,
                _ => {
                    (self.figures.lost, self.figures.lost_twice) =
                        (self.figures.lost + 1, self.figures.lost_twice + 1)
                }
            }
            let end = ends.get(&a.txid.epoch()).copied().unwrap_or(a.acked);
            let before = Duration::from_micros(end.saturating_sub(a.acked));
            if before > self.setting.loss_bound() + Duration::from_millis(1500) {
                beyond.push(*write);
            }
            // Where nothing but processes that died was wrong, only what was under way is lost.
            let quiet = !self.history.lossy.iter().any(|(from, to)| *from <= end && a.began <= *to);
            if quiet && before > UNDER_WAY {
                connected.push(*write);
            }
            let ended = |o: &crate::history::OrderlyEnd| {
                o.node == a.node && o.begin <= end + 1_000_000 && end <= o.end
            };
            let well = |o: &crate::history::OrderlyEnd| {
                !self.history.troubled.iter().any(|(from, to)| *from <= o.end && o.begin <= *to + 5_000_000)
            };
            if self.history.orderly.iter().any(|o| ended(o) && well(o)) {
                orderly.push(*write);
            }
        }
        for (rule, what, writes) in [
            ("2 acknowledged", "acknowledged writes that are nowhere", nowhere),
            (
                "2 bound",
                "acknowledged writes that were lost, longer before their primary's end than may be",
                beyond,
            ),
            (
                "2 connected",
                "acknowledged writes that were lost though all replicas had seconds to get them",
                connected,
            ),
            ("3 orderly", "acknowledged writes that an orderly end lost", orderly),
        ] {
            if !writes.is_empty() {
                self.says(rule, format!("{what}: {}", self.told(&writes)));
            }
        }
    }
}
