//! What the primary says of its lease clock, until this node has on its disk what it says it of.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::context::{ClockPair, NodeContext};
use crate::lock::lock;
use crate::report::Condition;
use crate::threads::blocking;
use crate::txid::{EpochHistory, Place, Position};

/// Pairs of which this node does not have everything yet. One comes each second: this is more than
/// an hour.
const PAIRS_MAX: usize = 4096;
/// Pause between two writes.
const KEEP_PAUSE: Duration = Duration::from_secs(1);

/// The clocks that were heard on one stream.
#[derive(Clone, Debug, Default)]
pub(super) struct Clocks(Arc<Mutex<Heartbeats>>);

#[derive(Debug, Default)]
struct Heartbeats {
    /// The history that the primary told last. Before that nothing counts.
    told: Option<EpochHistory>,
    /// What is not covered yet, oldest first.
    pairs: VecDeque<ClockPair>,
}

impl Clocks {
    /// The primary told its history. What this node kept of another one is forgotten.
    pub(super) fn told(&self, history: &EpochHistory, node: &NodeContext) {
        let on_it = |pair: ClockPair| history.place(pair.position.txid()) == Place::OnHistory;
        if node.lease.synced.get().is_some_and(|pair| !on_it(pair)) {
            node.lease.synced.set(None);
        }
        self.lock().told = Some(history.clone());
    }

    /// The primary had this position when the clock of its epoch was so far, or later.
    pub(super) fn heard(&self, clock: Option<u64>, position: Position) {
        let mut beats = self.lock();
        let Some(epoch) = beats.told.as_ref().map(EpochHistory::epoch) else { return };
        // What is left out makes the state seem older, never newer.
        if let Some(clock) = clock
            && beats.pairs.len() < PAIRS_MAX
        {
            beats.pairs.push_back(ClockPair { epoch, clock: Duration::from_micros(clock), position });
        }
    }

    /// Notes the newest clock of which everything is on the disk, again and again.
    pub(super) async fn follow(
        &self,
        node: &NodeContext,
        mut synced: watch::Receiver<Option<Position>>,
    ) -> Infallible {
        loop {
            let position = *synced.borrow_and_update();
            self.settle(node, position);
            if synced.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// All up to this position is on the disk.
    pub(super) fn settle(&self, node: &NodeContext, synced: Option<Position>) {
        let mut beats = self.lock();
        let Some(synced) = synced else { return };
        // What is here may still be of another history, from which it is being led away.
        if beats.told.as_ref().is_none_or(|told| told.place(synced.txid()) != Place::OnHistory) {
            return;
        }
        let has = |pair: &ClockPair| {
            let (theirs, ours) = (pair.position.number(), synced.number());
            theirs < ours || pair.position == synced
        };
        let mut newest = None;
        while beats.pairs.front().is_some_and(has) {
            newest = beats.pairs.pop_front();
        }
        drop(beats);
        if let Some(newest) = newest
            && node.lease.synced.get().is_none_or(|known| newest.is_newer(&known))
        {
            node.lease.synced.set(Some(newest));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Heartbeats> {
        lock(&self.0)
    }
}

/// Keeps the newest pair on the disk, at most once a second, until the primary is not followed any
/// more.
pub(super) async fn keep(node: Arc<NodeContext>, ends: CancellationToken) {
    if node.lease.fixed {
        return;
    }
    let mut pairs = node.lease.synced.watch();
    // One may have come before.
    pairs.mark_changed();
    let mut told = false;
    loop {
        tokio::select! {
            changed = pairs.changed() => if changed.is_err() { return },
            () = ends.cancelled() => return,
        }
        let of = node.clone();
        let kept = blocking(move || of.lease.synced.keep()).await;
        match &kept {
            Err(error) if !told => node.report_aside(Condition::LeaseClockNotKept { error }),
            _ => {}
        }
        told = kept.is_err();
        tokio::select! {
            () = tokio::time::sleep(KEEP_PAUSE) => {}
            () = ends.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::{EpochsHeard, LeaseContext, SyncedClock, ToDisk};
    use crate::primary::fake::{SECRET, at, history, leased};
    use crate::status::Role;
    use crate::txid::Epoch;

    fn pair(epoch: u64, clock: u64, position: Position) -> ClockPair {
        ClockPair { epoch: Epoch::new(epoch, epoch), clock: Duration::from_micros(clock), position }
    }

    #[test]
    fn a_clock_counts_when_all_that_was_there_by_it_is_on_the_disk() {
        let node = leased(2, &SECRET, Role::Replica);
        let known = || node.lease.synced.get();
        let clocks = Clocks::default();
        clocks.heard(Some(1), at(1, 1));
        clocks.settle(&node, Some(at(1, 1)));
        assert_eq!(known(), None, "it is not known of which epoch this clock is");
        clocks.told(&history(&[(1, 1)]), &node);
        clocks.heard(None, at(1, 1));
        clocks.settle(&node, Some(at(1, 9)));
        assert_eq!(known(), None, "the primary leads by no lease");
        for second in 1..=5 {
            clocks.heard(Some(second), at(1, second * 10));
        }
        clocks.settle(&node, None);
        clocks.settle(&node, Some(at(1, 9)));
        assert_eq!(known(), None);
        clocks.settle(&node, Some(at(1, 39)));
        assert_eq!(known(), Some(pair(1, 3, at(1, 30))));
        clocks.settle(&node, Some(at(1, 40)));
        assert_eq!(known(), Some(pair(1, 4, at(1, 40))), "the very state");
        clocks.settle(&node, Some(Position::new(at(1, 50).txid(), at(1, 1).checksum())));
        assert_eq!(known(), Some(pair(1, 4, at(1, 40))), "the same name, and another state");
        // It stands still.
        clocks.settle(&node, Some(at(1, 50)));
        clocks.heard(Some(6), at(1, 50));
        clocks.settle(&node, Some(at(1, 50)));
        assert_eq!(known(), Some(pair(1, 6, at(1, 50))));
    }

    #[test]
    fn a_state_of_another_history_covers_nothing() {
        let node = leased(2, &SECRET, Role::Replica);
        let clocks = Clocks::default();
        // This node has transactions that the primary of epoch 3 does not have.
        node.lease.synced.set(Some(pair(1, 99, at(1, 70))));
        clocks.told(&history(&[(1, 1), (3, 51)]), &node);
        assert_eq!(node.lease.synced.get(), None, "they are not in the history any more");
        clocks.heard(Some(5), at(3, 55));
        clocks.settle(&node, Some(at(1, 70)));
        assert_eq!(node.lease.synced.get(), None);
        clocks.settle(&node, Some(at(3, 55)));
        assert_eq!(node.lease.synced.get(), Some(pair(3, 5, at(3, 55))));
        // A renewed epoch of the same history begins at 0.
        clocks.told(&history(&[(1, 1), (3, 51), (4, 60)]), &node);
        assert_eq!(node.lease.synced.get(), Some(pair(3, 5, at(3, 55))));
        clocks.heard(Some(1), at(3, 55));
        clocks.settle(&node, Some(at(3, 55)));
        assert_eq!(node.lease.synced.get(), Some(pair(4, 1, at(3, 55))));
    }

    #[test]
    fn a_replica_that_stays_away_from_what_it_hears_costs_no_more_memory() {
        let node = leased(2, &SECRET, Role::Replica);
        let clocks = Clocks::default();
        clocks.told(&history(&[(1, 1)]), &node);
        for second in 0..PAIRS_MAX as u64 + 9 {
            clocks.heard(Some(second), at(1, second + 1));
        }
        assert_eq!(clocks.lock().pairs.len(), PAIRS_MAX);
        clocks.settle(&node, Some(at(1, PAIRS_MAX as u64 + 9)));
        let last = PAIRS_MAX as u64;
        assert_eq!(node.lease.synced.get(), Some(pair(1, last - 1, at(1, last))));
    }

    #[tokio::test(start_paused = true)]
    async fn the_pair_is_kept_once_a_second_and_a_failure_is_tried_again() {
        let (writes, mut written) = tokio::sync::mpsc::unbounded_channel();
        let failing = Mutex::new(2);
        let keep_pair = ToDisk::new(move |pair| {
            let mut left = lock(&failing);
            if *left > 0 {
                *left -= 1;
                return Err(crate::error::Error::io("write", "lease-clock")(std::io::Error::other("full")));
            }
            let _ = writes.send(pair);
            Ok(())
        });
        let synced = SyncedClock::new(None, Duration::from_secs(40), keep_pair);
        let lease = LeaseContext::leased(synced, EpochsHeard::new(0, ToDisk::nowhere()));
        let node = crate::primary::fake::with_lease(2, &SECRET, Role::Replica, lease);
        let ends = CancellationToken::new();
        let keeping = tokio::spawn(keep(node.clone(), ends.clone()));
        let mut kept = Vec::new();
        for second in 1..=30 {
            node.lease.synced.set(Some(pair(1, second * 1_000_000, at(1, 7 + second / 25))));
            tokio::time::sleep(Duration::from_millis(1100)).await;
            while let Ok(pair) = written.try_recv() {
                kept.push(pair.unwrap().clock.as_secs());
            }
        }
        // Twice in vain, then as soon as it goes, each 10 s, and when the position moved.
        assert_eq!(kept, [3, 13, 23, 25]);
        ends.cancel();
        keeping.await.unwrap();
    }
}
