//! The first record of a cluster. A missing record is no first start by itself: the nodes enter
//! themselves, and one takes the lease when all are there and no node has a state of the cluster.

use super::observe::InStore;
use super::race::{First, Outlook, Why};
use super::rules::{Rule, rule};
use super::swap::Aim;
use super::{Action, Election, Note, Stage, Turn};
use crate::lease::record::{KnownNode, LeaseState, Record};
use crate::peer::NodeId;
use crate::status::{Addresses, PeerInfo, WaitReason};

/// How many nodes may enter themselves: all of them are asked.
pub(crate) const ENTRIES_MOST: usize = 32;

impl Election {
    fn entry(&self, turn: &Turn<'_>) -> KnownNode {
        let me = &self.settings.me;
        let peer = PeerInfo { node: me.node, incarnation: me.incarnation, addresses: me.addresses.clone() };
        KnownNode { peer, has_state: turn.facts.has_state, has_content: turn.facts.has_content }
    }

    /// Whether this node has entered itself as it is now. Labels may have had no room.
    fn is_entered(&self, record: &Record, turn: &Turn<'_>) -> bool {
        let bare = |mut entry: KnownNode| {
            let Addresses { labels, .. } = &mut entry.peer.addresses;
            labels.clear();
            entry
        };
        let mine = record.nodes.iter().find(|known| self.is_me(known.peer.node));
        mine.is_some_and(|mine| bare(mine.clone()) == bare(self.entry(turn)))
    }

    /// All entries, with this node's own as it is now. The newest is the first: where there is no
    /// room for all, the oldest is left out.
    pub(super) fn gathering(&self, before: Option<&Record>, turn: &Turn<'_>) -> Vec<KnownNode> {
        let mut nodes = before.map_or_else(Vec::new, |record| record.nodes.clone());
        match nodes.iter_mut().find(|known| self.is_me(known.peer.node)) {
            Some(mine) => *mine = self.entry(turn),
            None => nodes.insert(0, self.entry(turn)),
        }
        nodes.truncate(ENTRIES_MOST);
        nodes
    }

    /// Whether this node may make the first record, as far as it alone can know.
    fn may_begin(&self, turn: &Turn<'_>) -> bool {
        let marked = self.settings.bootstrapped && !self.marked_now;
        let begun = marked || self.sight.any_record || turn.facts.has_state;
        self.settings.bootstrap.is_some() && !(begun && rule(Rule::NoRecordIsUnknown))
    }

    /// Enters itself into the record, where that is needed. Returns whether it does.
    pub(super) fn join(&mut self, turn: &mut Turn<'_>) -> bool {
        // A node that has seen a lease takes part in no first start.
        let first = self.settings.bootstrap.is_some() && self.sight.newest.is_none();
        if !first || !self.sight.is_fresh(turn.now) || self.unchecked.is_some() {
            return false;
        }
        let Some(seen) = &self.sight.seen else { return false };
        let enters = match &seen.what {
            InStore::Empty => self.may_begin(turn),
            InStore::NotOurs(_) => false,
            InStore::Record(record, _) => {
                let gathers = record.state == LeaseState::Gathering;
                let known = record.nodes.iter().any(|known| self.is_me(known.peer.node));
                // Where nothing comes of so many, some of them are gone for good.
                let stands = self.sight.unchanged_for(turn.now) >= self.sight.lease_time * 2;
                let room = known || record.nodes.len() < ENTRIES_MOST || stands;
                gathers && room && !self.is_entered(record, turn)
            }
        };
        let expected = seen.what.version().cloned();
        let Stage::Follows(race) = &self.stage else { return false };
        if !enters || turn.now < race.not_before || self.swaps.needs_read(&self.sight) {
            return false;
        }
        if !self.settings.bootstrapped && !turn.facts.has_state {
            self.settings.bootstrapped = true;
            self.marked_now = true;
            turn.push(Action::MarkBootstrapped);
        }
        self.swap(expected, LeaseState::Gathering, Aim::Gather, turn);
        true
    }

    /// What a node waits for where no node has led yet, or none is known to.
    pub(super) fn first_wait(&self, record: Option<&Record>) -> WaitReason {
        let several = |record: &Record| record.nodes.iter().filter(|known| known.has_content).count() > 1;
        match (self.settings.bootstrap, record) {
            (Some(_), Some(record)) if several(record) => WaitReason::SeveralDatabases,
            (Some(wanted), Some(record)) => WaitReason::Gathering { present: record.nodes.len(), wanted },
            _ => WaitReason::NoRecord,
        }
    }

    /// Whether it is time to ask all, and to take the first lease.
    pub(super) fn first_verdict(&self, record: &Record, turn: &Turn<'_>) -> Outlook {
        if self.sight.newest.is_some() {
            return Outlook::Wait(WaitReason::NoRecord);
        }
        let wait = self.first_wait(Some(record));
        let Some(wanted) = self.settings.bootstrap else { return Outlook::Wait(wait) };
        let all = record.nodes.len() >= wanted && self.is_entered(record, turn);
        if turn.facts.has_state || !all || record.paused {
            return Outlook::Wait(wait);
        }
        match self.unfit(turn.facts, turn.now) {
            Some(reason) => Outlook::Wait(reason),
            None => Outlook::Go(Why::First),
        }
    }

    /// Who takes the first lease, by what the peers have answered.
    pub(super) fn chosen(&mut self, turn: &mut Turn<'_>) -> First {
        let (Some(record), Some(wanted)) = (self.sight.record().cloned(), self.settings.bootstrap) else {
            return First::Other;
        };
        let Stage::Follows(race) = &self.stage else { return First::Other };
        let entered = |node: NodeId| record.nodes.iter().any(|known| known.peer.node == node);
        let answers: Vec<_> =
            race.answers.iter().filter(|answer| entered(answer.peer.node)).cloned().collect();
        let of_answers = answers.iter().find(|answer| answer.has_state).map(|answer| answer.peer.node);
        let of_entries = record.nodes.iter().find(|known| known.has_state).map(|known| known.peer.node);
        if let Some(node) = of_answers.or(of_entries) {
            // It may also be the one that has just taken the first lease.
            if self.sight.unchanged_for(turn.now) >= self.sight.lease_time / 2 {
                self.note(Note::NoFirstStart(node), turn);
            }
            return First::Other;
        }
        let me = self.settings.me.node;
        let mut with_content: Vec<NodeId> =
            record.nodes.iter().filter(|known| known.has_content).map(|known| known.peer.node).collect();
        with_content
            .extend(answers.iter().filter(|answer| answer.has_content).map(|answer| answer.peer.node));
        with_content.sort_unstable();
        with_content.dedup();
        if answers.len() + 1 < wanted {
            return First::Other;
        }
        if with_content.len() > 1 {
            self.note(Note::SeveralWithContent(with_content), turn);
            return First::Other;
        }
        let fit = answers.iter().filter(|answer| answer.fit).map(|answer| answer.peer.node);
        let lowest = fit.chain([me]).min();
        let first = with_content.first().copied().filter(|_| rule(Rule::ContentFirst)).or(lowest);
        if first == Some(me) { First::Me } else { First::Other }
    }
}
