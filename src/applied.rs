//! The position of a node, and those who wait for it to reach a transaction.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::error::{Error, Result};
use crate::txid::{EpochHistory, Place, Position, Txid};

/// Callers that may wait for a transaction at one time, a database.
pub(crate) const WAITERS_MAX: usize = 65_536;

/// The state that this node has, shared by those who move it and those who wait for it.
#[derive(Debug)]
pub(crate) struct Applied {
    inner: Mutex<Inner>,
    watch: watch::Sender<Option<Position>>,
}

/// What a waiter waits for, and how it is told.
type Waiter = (Txid, oneshot::Sender<Result<()>>);

#[derive(Debug)]
struct Inner {
    position: Option<Position>,
    history: Arc<EpochHistory>,
    /// By number and a serial that keeps two waiters for one number apart.
    waiters: BTreeMap<(u64, u64), Waiter>,
    serial: u64,
    closed: bool,
}

impl Applied {
    pub(crate) fn new() -> Arc<Applied> {
        Arc::new(Applied {
            inner: Mutex::new(Inner {
                position: None,
                history: Arc::default(),
                waiters: BTreeMap::new(),
                serial: 0,
                closed: false,
            }),
            watch: watch::Sender::new(None),
        })
    }

    pub(crate) fn position(&self) -> Option<Position> {
        self.lock().position
    }

    pub(crate) fn history(&self) -> Arc<EpochHistory> {
        self.lock().history.clone()
    }

    /// Wakes at each change of the position; a slow receiver sees only the last.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<Position>> {
        self.watch.subscribe()
    }

    /// Moves the position on within the history that is known; wakes who waited for it.
    pub(crate) fn advance(&self, position: Position) {
        let mut inner = self.lock();
        inner.position = Some(position);
        let history = inner.history.clone();
        let mut done = Vec::new();
        let mut ahead = Vec::new();
        while let Some(first) = inner.waiters.first_entry() {
            if first.key().0 > position.number() {
                break;
            }
            let (key, (txid, waiter)) = first.remove_entry();
            match settle(&history, position, txid) {
                Some(settled) => done.push((settled, waiter)),
                // An epoch that is not known yet: its number alone decides nothing.
                None => ahead.push((key, (txid, waiter))),
            }
        }
        inner.waiters.extend(ahead);
        drop(inner);
        for (settled, waiter) in done {
            // A waiter that left is no concern of ours.
            let _ = waiter.send(settled);
        }
        self.watch.send_replace(Some(position));
    }

    /// Takes over another history, and a position in it (or none); waiters whose branch is lost learn it now.
    pub(crate) fn replace(&self, history: EpochHistory, position: Option<Position>) {
        let mut inner = self.lock();
        inner.history = Arc::new(history);
        inner.position = position;
        let history = inner.history.clone();
        let mut kept = BTreeMap::new();
        let mut lost = Vec::new();
        for (key, (txid, waiter)) in std::mem::take(&mut inner.waiters) {
            if history.place(txid) == Place::Lost {
                lost.push((txid, waiter));
            } else {
                kept.insert(key, (txid, waiter));
            }
        }
        inner.waiters = kept;
        drop(inner);
        for (txid, waiter) in lost {
            let _ = waiter.send(Err(Error::Lost { txid }));
        }
        match position {
            Some(position) => self.advance(position),
            None => {
                self.watch.send_replace(None);
            }
        }
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
            if let Some(position) = inner.position
                && let Some(settled) = settle(&inner.history, position, txid)
            {
                return settled;
            }
            // Without a history nothing can be said to be lost.
            if inner.waiters.len() >= WAITERS_MAX {
                return Err(Error::TooMany { what: "waiters for a transaction", limit: WAITERS_MAX });
            }
            let (sender, receiver) = oneshot::channel();
            inner.serial += 1;
            let key = (txid.number(), inner.serial);
            inner.waiters.insert(key, (txid, sender));
            (receiver, key)
        };
        // Removed also when the caller gives up, so that a cap on waiters can't be filled by the dead.
        let _place = Leave { applied: self, key };
        match tokio::time::timeout(limit, receiver).await {
            Ok(Ok(settled)) => settled,
            Ok(Err(_)) => Err(Error::ShutDown),
            Err(_) => Err(Error::Timeout { what: format!("transaction {txid}"), after: limit }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
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

/// Whether a wait is over, and how.
fn settle(history: &EpochHistory, position: Position, txid: Txid) -> Option<Result<()>> {
    match history.place(txid) {
        Place::Lost => Some(Err(Error::Lost { txid })),
        Place::OnHistory if txid.number() <= position.number() => Some(Ok(())),
        Place::OnHistory | Place::Ahead => None,
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
