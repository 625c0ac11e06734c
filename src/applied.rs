//! The position of a node, and the callers that wait for it to reach a transaction.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::txid::{Epoch, EpochHistory, Place, Position, Txid};

/// Callers that may wait for a transaction at one time, a database.
pub(crate) const WAITERS_MAX: usize = 65_536;
/// Epochs that are remembered as left: what the longest history has.
const LEFT_MAX: usize = EpochHistory::MAX;

/// The state that this node has, shared by those who move it and those who wait for it.
#[derive(Debug)]
pub(crate) struct Applied {
    inner: Mutex<AppliedState>,
    watch: watch::Sender<Option<Position>>,
}

/// What a waiter waits for, and how it is told.
type Waiter = (Txid, oneshot::Sender<Result<()>>);
/// How a wait ended, and whom to tell.
type Settled = (Result<()>, oneshot::Sender<Result<()>>);

#[derive(Debug)]
struct AppliedState {
    position: Option<Position>,
    history: Arc<EpochHistory>,
    /// The history that was forgotten, until another one is known.
    forgotten: Arc<EpochHistory>,
    /// This node is the primary, whose word the history is.
    leads: bool,
    /// Epochs that were in the history before it was replaced by another, newest last. Not kept
    /// over a restart: then they are unknown.
    left: VecDeque<Epoch>,
    /// By number and a serial that keeps two waiters for one number apart.
    waiters: BTreeMap<(u64, u64), Waiter>,
    serial: u64,
    closed: bool,
}

impl Applied {
    pub(crate) fn new() -> Arc<Applied> {
        Arc::new(Applied {
            inner: Mutex::new(AppliedState {
                position: None,
                history: Arc::default(),
                forgotten: Arc::default(),
                leads: false,
                left: VecDeque::new(),
                waiters: BTreeMap::new(),
                serial: 0,
                closed: false,
            }),
            watch: watch::Sender::new(None),
        })
    }

    /// The newest state that is vouched for, and that this node has.
    pub(crate) fn position(&self) -> Option<Position> {
        self.lock().position
    }

    /// How many callers wait for a transaction.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiters.len()
    }

    pub(crate) fn history(&self) -> Arc<EpochHistory> {
        self.lock().history.clone()
    }

    /// What is known here of a transaction's place.
    pub(crate) fn place(&self, txid: Txid) -> Place {
        self.lock().place(txid)
    }

    /// Wakes at each change of the position; a slow receiver sees only the last.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Position>> {
        self.watch.subscribe()
    }

    /// Moves the position on within the known history, and wakes the callers that waited for it.
    pub(crate) fn advance(&self, position: Position) {
        let mut inner = self.lock();
        inner.position = Some(position);
        let passed = inner.waiters.range(..=(position.number(), u64::MAX)).map(|(key, _)| *key).collect();
        let settled = inner.settle_all(passed);
        drop(inner);
        tell(settled);
        self.watch.send_replace(Some(position));
    }

    /// Takes over another history, and a position in it (or none). Waiters whose branch is lost
    /// learn it now.
    pub(crate) fn replace(&self, history: EpochHistory, position: Option<Position>) {
        self.take_over(history, position, false);
    }

    /// [`Applied::replace`] by the primary, which says what the history is. An epoch that it does
    /// not know is lost, unless the epoch's number is above its own.
    pub(crate) fn lead(&self, history: EpochHistory, position: Position) {
        self.take_over(history, Some(position), true);
    }

    fn take_over(&self, history: EpochHistory, position: Option<Position>, leads: bool) {
        let mut inner = self.lock();
        let before = std::mem::replace(&mut inner.history, Arc::new(history));
        let mut left: Vec<Epoch> = before.left_for(&inner.history).collect();
        if !inner.history.is_empty() {
            let forgotten = std::mem::take(&mut inner.forgotten);
            left.extend(forgotten.left_for(&inner.history));
        }
        inner.left.extend(left);
        let excess = inner.left.len().saturating_sub(LEFT_MAX);
        inner.left.drain(..excess);
        inner.leads = leads;
        inner.position = position;
        let all = inner.waiters.keys().copied().collect();
        let settled = inner.settle_all(all);
        drop(inner);
        tell(settled);
        self.watch.send_replace(position);
    }

    /// Has no state and no history, for the time being. Nothing is lost by that, and callers that
    /// wait go on waiting.
    pub(crate) fn forget(&self) {
        let mut inner = self.lock();
        let history = std::mem::take(&mut inner.history);
        if !history.is_empty() {
            inner.forgotten = history;
        }
        inner.position = None;
        drop(inner);
        self.watch.send_replace(None);
    }

    /// Ends all waits; nothing moves any more.
    pub(crate) fn close(&self) {
        let mut inner = self.lock();
        inner.closed = true;
        let waiters = std::mem::take(&mut inner.waiters);
        drop(inner);
        for (_, waiter) in waiters.into_values() {
            let _ = waiter.send(Err(Error::ShutDown));
        }
    }

    /// Returns once the transaction is in this node's state.
    ///
    /// # Cancel safety
    /// Dropping the future gives the waiter's place back at the next commit that passes it.
    pub(crate) async fn wait_for(&self, txid: Txid, limit: Duration) -> Result<()> {
        let (receiver, key) = {
            let mut inner = self.lock();
            if inner.closed {
                return Err(Error::ShutDown);
            }
            if let Some(settled) = inner.settle(txid) {
                return settled;
            }
            if inner.waiters.len() >= WAITERS_MAX {
                return Err(Error::TooMany { what: "waiters for a transaction", limit: WAITERS_MAX });
            }
            let (sender, receiver) = oneshot::channel();
            inner.serial += 1;
            let key = (txid.number(), inner.serial);
            inner.waiters.insert(key, (txid, sender));
            (receiver, key)
        };
        // Removed also when the caller gives up: callers that are gone must not fill the cap on
        // waiters.
        let _place = Leave { applied: self, key };
        match tokio::time::timeout(limit, receiver).await {
            Ok(Ok(settled)) => settled,
            Ok(Err(_)) => Err(Error::ShutDown),
            Err(_) => Err(Error::Timeout { what: format!("transaction {txid}"), after: limit }),
        }
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn waiters(&self) -> usize {
        self.lock().waiters.len()
    }

    fn lock(&self) -> MutexGuard<'_, AppliedState> {
        lock(&self.inner)
    }
}

struct Leave<'a> {
    applied: &'a Applied,
    key: (u64, u64),
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.applied.lock().waiters.remove(&self.key);
    }
}

impl AppliedState {
    fn place(&self, txid: Txid) -> Place {
        let left = || match self.leads {
            true => txid.epoch().number() <= self.history.epoch().number(),
            false => self.left.contains(&txid.epoch()),
        };
        match self.history.place(txid) {
            Place::Unknown if left() => Place::Lost,
            place => place,
        }
    }

    /// Whether a wait is over, and how.
    fn settle(&self, txid: Txid) -> Option<Result<()>> {
        match self.place(txid) {
            Place::Lost => Some(Err(Error::Lost { txid })),
            Place::OnHistory if self.position.is_some_and(|at| txid.number() <= at.number()) => Some(Ok(())),
            // An epoch that is not known yet: its number alone decides nothing.
            Place::OnHistory | Place::Unknown => None,
        }
    }

    /// Takes out those of the waiters whose wait is over.
    fn settle_all(&mut self, keys: Vec<(u64, u64)>) -> Vec<Settled> {
        let settle = |key| {
            let settled = self.settle(self.waiters.get(&key)?.0)?;
            Some((settled, self.waiters.remove(&key)?.1))
        };
        keys.into_iter().filter_map(settle).collect()
    }
}

fn tell(settled: Vec<Settled>) {
    for (settled, waiter) in settled {
        // A waiter that left is no concern of ours.
        let _ = waiter.send(settled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{Epoch, EpochStart};

    fn history(epochs: &[(u64, u64)]) -> EpochHistory {
        let mut h = EpochHistory::default();
        for &(number, first) in epochs {
            h.push(EpochStart { epoch: Epoch::new(number, number), first, before: Checksum::EMPTY });
        }
        h
    }

    fn txid(epoch: u64, number: u64) -> Txid {
        Txid::new(Epoch::new(epoch, epoch), number)
    }

    fn at(epoch: u64, number: u64) -> Position {
        Position::new(txid(epoch, number), Checksum::EMPTY)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_waiter_is_woken_by_its_transaction_and_by_no_other() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1)]), Some(at(1, 3)));
        applied.wait_for(txid(1, 3), LONG).await.unwrap();
        let waiting = {
            let a = applied.clone();
            tokio::spawn(async move { a.wait_for(txid(1, 5), LONG).await })
        };
        while applied.lock().waiters.is_empty() {
            tokio::task::yield_now().await;
        }
        applied.advance(at(1, 4));
        assert_eq!(applied.lock().waiters.len(), 1);
        applied.advance(at(1, 6));
        waiting.await.unwrap().unwrap();
        let late = applied.wait_for(txid(1, 7), Duration::from_millis(1)).await;
        assert!(matches!(late, Err(Error::Timeout { .. })));
        assert!(applied.lock().waiters.is_empty(), "who gives up leaves no place behind");
    }

    #[tokio::test]
    async fn a_wait_on_a_lost_branch_ends_when_the_new_epoch_is_known() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1)]), Some(at(1, 3)));
        let waiting = {
            let a = applied.clone();
            tokio::spawn(async move { a.wait_for(txid(1, 5), LONG).await })
        };
        let ahead = {
            let a = applied.clone();
            tokio::spawn(async move { a.wait_for(txid(2, 4), LONG).await })
        };
        while applied.lock().waiters.len() < 2 {
            tokio::task::yield_now().await;
        }
        applied.replace(history(&[(1, 1), (2, 4)]), Some(at(1, 3)));
        assert!(matches!(waiting.await.unwrap(), Err(Error::Lost { .. })));
        applied.advance(at(2, 4));
        ahead.await.unwrap().unwrap();
    }

    /// Waits that are under way, in the order of the ids.
    async fn waiting(applied: &Arc<Applied>, ids: &[Txid]) -> Vec<tokio::task::JoinHandle<Result<()>>> {
        let wait = |&id: &Txid| {
            let applied = applied.clone();
            tokio::spawn(async move { applied.wait_for(id, LONG).await })
        };
        let tasks = ids.iter().map(wait).collect();
        while applied.lock().waiters.len() < ids.len() {
            tokio::task::yield_now().await;
        }
        tasks
    }

    fn branch(number: u64, branch: u64, at: u64) -> Txid {
        Txid::new(Epoch::new(number, branch), at)
    }

    /// A primary whose state directory is gone begins again at epoch 1, on another branch. What is
    /// not known is not lost, however low its number.
    #[tokio::test]
    async fn an_epoch_that_was_not_heard_of_is_waited_for_whatever_its_number() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1), (3, 2)]), Some(at(3, 9)));
        let ids = [branch(1, 11, 4), branch(1, 11, 7), branch(2, 22, 8), branch(1, 12, 1)];
        let waits = waiting(&applied, &ids).await;
        applied.advance(at(3, 12));
        assert_eq!(applied.lock().waiters.len(), ids.len(), "their numbers alone decide nothing");
        // Epoch 1 of that primary became known, with its end; our branch of it was left.
        let mut new = EpochHistory::default();
        new.push(EpochStart { epoch: Epoch::new(1, 11), first: 1, before: Checksum::EMPTY });
        new.push(EpochStart { epoch: Epoch::new(4, 44), first: 6, before: Checksum::EMPTY });
        applied.replace(new, Some(Position::new(branch(1, 11, 5), Checksum::EMPTY)));
        let [done, past, other, third] = waits.try_into().unwrap();
        done.await.unwrap().unwrap();
        assert!(matches!(past.await.unwrap(), Err(Error::Lost { .. })), "epoch 4 began before it");
        assert_eq!(applied.lock().waiters.len(), 2, "still nobody knows of these");
        for id in [txid(1, 1), txid(3, 9)] {
            assert_eq!(applied.place(id), Place::Lost, "{id} was left");
        }
        // Left is not for ever.
        applied.replace(history(&[(1, 1), (3, 2), (5, 6)]), Some(at(3, 5)));
        applied.wait_for(txid(3, 5), LONG).await.unwrap();
        assert_eq!(applied.place(branch(1, 11, 4)), Place::Lost);
        drop((other, third));
    }

    #[tokio::test]
    async fn the_primary_knows_which_epochs_are_none_of_its_history() {
        let applied = Applied::new();
        let before = waiting(&applied, &[branch(2, 22, 1)]).await;
        applied.lead(history(&[(1, 1), (3, 2)]), at(3, 9));
        for wait in before {
            assert!(matches!(wait.await.unwrap(), Err(Error::Lost { .. })));
        }
        assert_eq!(applied.place(branch(3, 33, 100)), Place::Lost);
        assert_eq!(applied.place(branch(4, 44, 1)), Place::Unknown, "a newer primary may have opened it");
        applied.lead(history(&[(1, 1), (3, 2), (5, 10)]), at(3, 9));
        assert_eq!(applied.place(branch(4, 44, 1)), Place::Lost);
    }

    #[tokio::test]
    async fn without_a_position_nothing_is_reached_and_what_is_lost_is_said() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1), (2, 4)]), None);
        assert!(matches!(applied.wait_for(txid(1, 4), LONG).await, Err(Error::Lost { .. })));
        let waits = waiting(&applied, &[txid(1, 3), txid(2, 4)]).await;
        applied.advance(at(2, 4));
        for wait in waits {
            wait.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn what_is_forgotten_is_not_lost() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1)]), Some(at(1, 3)));
        applied.forget();
        assert_eq!(applied.position(), None);
        let waiting = applied.wait_for(at(1, 3).txid(), Duration::from_millis(1)).await;
        assert!(matches!(waiting, Err(Error::Timeout { .. })), "{waiting:?}");
        applied.replace(history(&[(1, 1)]), Some(at(1, 3)));
        applied.wait_for(at(1, 3).txid(), Duration::from_millis(1)).await.unwrap();
        // Only when the next history is known can it be said what that one lacks.
        applied.forget();
        applied.replace(history(&[]), None);
        let waiting = applied.wait_for(txid(1, 9), Duration::from_millis(1)).await;
        assert!(matches!(waiting, Err(Error::Timeout { .. })), "{waiting:?}");
        applied.replace(history(&[(3, 1)]), Some(at(3, 1)));
        assert!(matches!(applied.wait_for(txid(1, 9), LONG).await, Err(Error::Lost { .. })));
    }

    #[test]
    fn what_was_left_is_remembered_up_to_a_limit() {
        let applied = Applied::new();
        let last = LEFT_MAX as u64 + 1;
        for number in 1..=last {
            applied.replace(history(&[(number, 1)]), None);
        }
        applied.replace(history(&[(last + 1, 1)]), None);
        assert_eq!(applied.lock().left.len(), LEFT_MAX);
        assert_eq!((applied.place(txid(1, 1)), applied.place(txid(2, 1))), (Place::Unknown, Place::Lost));
    }

    #[tokio::test]
    async fn a_number_reached_in_an_older_epoch_does_not_answer_a_newer_one() {
        let applied = Applied::new();
        applied.replace(history(&[(1, 1)]), Some(at(1, 3)));
        let ahead = {
            let a = applied.clone();
            tokio::spawn(async move { a.wait_for(txid(2, 4), LONG).await })
        };
        while applied.lock().waiters.is_empty() {
            tokio::task::yield_now().await;
        }
        applied.advance(at(1, 9));
        assert_eq!(applied.lock().waiters.len(), 1);
        applied.close();
        assert!(matches!(ahead.await.unwrap(), Err(Error::ShutDown)));
    }
}
