//! Who may take the lease: what a node must have, and which of several comes first.

use std::cmp::Ordering;
use std::time::Duration;

use super::observe::{InStore, tenure};
use super::rules::{Rule, rule};
use super::{Election, Facts, Instant, PeerAnswer, Stage};
use crate::lease::record::{LeaseState, Record, Tenure};
use crate::peer::NodeId;
use crate::status::WaitReason;
use crate::txid::{Place, Position};

/// How long a better candidate has to be first.
pub(super) const RANK: Duration = Duration::from_millis(500);
/// What is added to the ranks, so that two that know the same do not go at once.
pub(super) const RANK_JITTER: Duration = Duration::from_millis(100);
/// How many nodes are asked, other than at a first start.
pub(super) const ASKED: usize = 8;

/// After a promotion that failed, for how long this node is not fit.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct Setback {
    pub(super) until: Instant,
    next: Duration,
}

impl Setback {
    const FIRST: Duration = Duration::from_secs(1);
    const MOST: Duration = Duration::from_secs(60);

    pub(super) fn failed(&mut self, now: Instant) {
        let wait = self.next.max(Setback::FIRST);
        self.until = now + wait;
        self.next = (wait * 2).min(Setback::MOST);
    }

    pub(super) fn worked(&mut self) {
        self.next = Duration::ZERO;
    }
}

/// A state that is here, and the way to it.
pub(super) struct Here<'a> {
    pub(super) position: Option<Position>,
    pub(super) facts: &'a Facts,
}

impl Here<'_> {
    /// Whether a state is this one, or one on the way to it. Never by its number alone.
    pub(super) fn has(&self, state: Position) -> bool {
        let Some(position) = self.position else { return false };
        if !rule(Rule::OwnBranch) {
            return state.number() <= position.number();
        }
        let on_the_way = self.facts.history.place(state.txid()) == Place::OnHistory;
        state == position || (state.number() < position.number() && on_the_way)
    }

    /// Whether it has all that the holder had when it wrote the record.
    pub(super) fn has_all(&self, tenure: &Tenure) -> bool {
        tenure.position.is_some_and(|position| self.has(position))
    }

    fn has_epoch(&self, tenure: &Tenure) -> bool {
        self.facts.history.iter().any(|start| start.epoch == tenure.epoch)
    }

    /// The holder's time up to which this state certainly has all. None: it is another history's.
    fn clock(&self, tenure: &Tenure) -> Option<Duration> {
        let begun = tenure.began.is_some_and(|began| self.has(began));
        if !self.has_epoch(tenure) {
            return begun.then_some(Duration::ZERO);
        }
        let pair = self.facts.synced.filter(|pair| pair.epoch == tenure.epoch && self.has(pair.position));
        Some(pair.map_or(Duration::ZERO, |pair| pair.clock))
    }
}

impl Election {
    /// Why this node must not take the lease after this tenure, whenever that is.
    pub(super) fn lacks(&self, tenure: &Tenure, here: &Here<'_>) -> Option<WaitReason> {
        if tenure.position.is_none() {
            return self.lacks_unnamed(tenure, here);
        }
        if here.position.is_none() {
            return rule(Rule::Vouched).then_some(WaitReason::NoState);
        }
        if here.has_all(tenure) {
            return None;
        }
        let clock = match here.clock(tenure) {
            Some(clock) => clock,
            None if !rule(Rule::LossBound) => return None,
            None => return Some(WaitReason::OtherBranch),
        };
        let by = tenure.lease_clock.saturating_sub(clock);
        (by > self.settings.failover_loss && rule(Rule::LossBound)).then_some(WaitReason::Behind { by })
    }

    /// The same after a holder that never said where it began. Only that node itself has what it
    /// had: it goes on with it, or begins a first epoch once more.
    fn lacks_unnamed(&self, tenure: &Tenure, here: &Here<'_>) -> Option<WaitReason> {
        let mine = self.is_me(tenure.holder.node)
            && (self.settings.incarnations.contains(&tenure.holder.incarnation)
                || self.settings.me.incarnation == tenure.holder.incarnation);
        let goes_on = here.position.is_some() && here.has_epoch(tenure);
        let begins = !here.facts.has_state && self.settings.bootstrap.is_some();
        match (mine && (goes_on || begins), here.position) {
            (true, _) => None,
            (false, None) => Some(WaitReason::NoState),
            (false, Some(_)) => Some(WaitReason::OtherBranch),
        }
    }

    /// Why this node does not take any lease at the moment.
    pub(super) fn unfit(&self, facts: &Facts, now: Instant) -> Option<WaitReason> {
        if !self.settings.candidate {
            Some(WaitReason::NotCandidate)
        } else if facts.draining || self.leaving.is_some() {
            Some(WaitReason::Draining)
        } else if !facts.healthy || now < self.setback.until {
            Some(WaitReason::Unfit)
        } else {
            None
        }
    }

    /// What it tells the others: it would take the lease, were it the best.
    pub(super) fn would_take(&self, facts: &Facts, now: Instant) -> bool {
        self.would_not_take(facts, now).is_none()
    }

    /// Why it would not.
    pub(super) fn would_not_take(&self, facts: &Facts, now: Instant) -> Option<WaitReason> {
        let Some(seen) = self.sight.seen.as_ref().filter(|_| self.sight.is_fresh(now)) else {
            return Some(WaitReason::StoreUnavailable);
        };
        let lacks = match &seen.what {
            InStore::Empty => None,
            InStore::NotOurs(_) => Some(WaitReason::RecordNotOurs),
            InStore::Record(record, _) => {
                let here = Here { position: self.position(facts), facts };
                self.last_tenure(record).and_then(|tenure| self.lacks(tenure, &here))
            }
        };
        self.unfit(facts, now).or(lacks)
    }

    /// Why this node would not take the lease. None: it would, or it has it.
    pub(crate) fn why_not(&self, facts: &Facts, now: Instant) -> Option<WaitReason> {
        match &self.stage {
            Stage::Leads(_) => None,
            Stage::Follows(_) => self.would_not_take(facts, now),
        }
    }

    /// Whether elections are paused, by the record that was seen last.
    pub(crate) fn paused(&self) -> Option<bool> {
        self.sight.record().map(|record| record.paused)
    }

    /// Whether an operator moved the lease to another store: the record is held by no node.
    pub(crate) fn moved(&self) -> bool {
        let holder = self.sight.record().and_then(tenure).map(|tenure| tenure.holder.node);
        holder == Some(NodeId::NIL)
    }

    /// The newest tenure that this node knows of: a register that went back hides it.
    pub(super) fn last_tenure<'a>(&'a self, record: &'a Record) -> Option<&'a Tenure> {
        let older = self.sight.seen.as_ref().is_some_and(|seen| seen.older);
        if older { self.sight.newest.as_ref() } else { tenure(record) }
    }

    /// Whether no newer record is known to have been there. Where one may have been, its holder may
    /// still acknowledge: all wait for the whole lease time.
    pub(super) fn is_newest(&self, record: &Record) -> bool {
        let older = self.sight.seen.as_ref().is_some_and(|seen| seen.older);
        let heard = tenure(record).is_some_and(|tenure| self.heard > tenure.epoch.number());
        !(older || heard && rule(Rule::GoneBack))
    }

    /// Whether this node held the lease last and its files are those, so that it need not wait. The
    /// peers are asked after that.
    pub(super) fn held_it_last(&self, record: &Record, here: &Here<'_>) -> bool {
        let LeaseState::Held(tenure) = &record.state else { return false };
        let (me, holder) = (&self.settings.me, &tenure.holder);
        let is = |of: Rule, fact: bool| fact || !rule(of);
        let newest = here.facts.history.epoch() == tenure.epoch && self.heard <= tenure.epoch.number();
        let known = self.settings.incarnations.contains(&holder.incarnation);
        let has_all = here.position.is_some() && (tenure.position.is_none() || here.has_all(tenure));
        holder.node == me.node
            && holder.incarnation != me.incarnation
            && is(Rule::SameBoot, holder.boot == me.boot && !me.boot.is_empty())
            && is(Rule::KnownRun, known)
            && is(Rule::NewestEpoch, newest)
            && is(Rule::Alone, self.settings.alone)
            && is(Rule::NotBehind, has_all)
            && !self.sight.seen.as_ref().is_some_and(|seen| seen.older)
    }

    /// How many of those that answered come before this node, and the best of them.
    pub(super) fn better(&self, answers: &[PeerAnswer], position: Option<Position>) -> (u32, Option<NodeId>) {
        let me = self.settings.me.node;
        let fit = answers.iter().filter(|answer| answer.fit && answer.peer.node != me);
        let mut better: Vec<&PeerAnswer> = fit
            .filter(|answer| {
                comes_first((answer.position, answer.peer.node), (position, me)) == Ordering::Less
            })
            .collect();
        better.sort_by(|a, b| comes_first((a.position, a.peer.node), (b.position, b.peer.node)));
        (better.len() as u32, better.first().map(|answer| answer.peer.node))
    }
}

/// How far a state is, as far as two nodes can tell that do not know each other's history. A wrong
/// guess costs a rank.
fn advance(position: Option<Position>) -> Option<(u64, u64)> {
    position.map(|position| (position.epoch().number(), position.number()))
}

/// Orders candidates, the first one first.
pub(super) fn comes_first(a: (Option<Position>, NodeId), b: (Option<Position>, NodeId)) -> Ordering {
    advance(b.0).cmp(&advance(a.0)).then(a.1.cmp(&b.1))
}

/// Whether a peer has more than this state.
pub(super) fn is_ahead(peer: &PeerAnswer, position: Option<Position>) -> bool {
    advance(peer.position) > advance(position)
}
