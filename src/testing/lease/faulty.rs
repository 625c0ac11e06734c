//! A store between a node and its own, with faults that a seed makes.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::Dice;
use crate::lease::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::lock::lock;

/// The most records that are kept, for reads of old ones and for [`Faulty::go_back`].
const SEEN_MAX: usize = 64;

/// A store with faults, over any other. Clones share them: for faults of one node alone, give each
/// node one of its own over the same register. The seed makes the same faults again, where the
/// calls come in the same order.
///
/// A chance is from 0 for never to 1 for always. All are 0 at first. Each method says whether the
/// fault is within the contract of [`Store`]. A node lives with the others, too.
///
/// ```
/// use std::time::Duration;
///
/// use replite::lease::{Store, SwapError};
/// use replite::testing::lease::{Faulty, Memory};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let register = Memory::new();
/// let store = Faulty::new(register.clone(), 7);
/// let first = store.swap(None, b"first").await?;
///
/// // It is done, and the answer is lost.
/// store.lose_answers(1.0);
/// let answer = store.swap(Some(&first), b"second").await;
/// assert!(matches!(answer, Err(SwapError::Unknown(_))));
/// assert_eq!(register.stored().unwrap().record, b"second");
///
/// // A backup is restored.
/// store.calm();
/// store.go_back(1).await?;
/// assert_eq!(store.read().await?.unwrap().record, b"first");
///
/// // And then it can't be reached.
/// store.away(true);
/// assert!(store.read().await.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Faulty {
    store: Arc<dyn Store>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dice: Dice,
    mishaps: Mutex<Mishaps>,
    stalled: watch::Sender<bool>,
    /// The records that came by, the newest last.
    seen: Mutex<VecDeque<Stored>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Mishaps {
    away: bool,
    lose_requests: f64,
    lose_answers: f64,
    hang: f64,
    repeat: f64,
    late: f64,
    late_by: Duration,
    old: f64,
}

impl Faulty {
    /// A store without faults yet, over this one.
    pub fn new(store: impl Store, seed: u64) -> Faulty {
        Faulty::over(Arc::new(store), seed)
    }

    /// The same over a store that is shared.
    pub fn over(store: Arc<dyn Store>, seed: u64) -> Faulty {
        let shared = Shared {
            dice: Dice::new(seed),
            mishaps: Mutex::default(),
            stalled: watch::Sender::new(false),
            seen: Mutex::default(),
        };
        Faulty { store, shared: Arc::new(shared) }
    }

    /// Whether the store can't be reached: calls fail at once. Within the contract.
    pub fn away(&self, away: bool) {
        self.set(|mishaps| mishaps.away = away);
    }

    /// Whether calls wait, until they are let go on. Those that are dropped meanwhile do nothing.
    /// Within the contract.
    pub fn stall(&self, stalled: bool) {
        self.shared.stalled.send_replace(stalled);
    }

    /// So many swaps never reach the store, and are answered with [`SwapError::Unknown`]. Within
    /// the contract.
    pub fn lose_requests(&self, chance: f64) {
        self.set(|mishaps| mishaps.lose_requests = chance);
    }

    /// So many swaps are answered with [`SwapError::Unknown`], whatever came of them. Within the
    /// contract.
    pub fn lose_answers(&self, chance: f64) {
        self.set(|mishaps| mishaps.lose_answers = chance);
    }

    /// So many calls do what they are to do and never return. Within the contract.
    pub fn hang(&self, chance: f64) {
        self.set(|mishaps| mishaps.hang = chance);
    }

    /// So many swaps reach the store only after a time of up to `by`, also when their futures are
    /// dropped before. Within the contract.
    pub fn delay(&self, chance: f64, by: Duration) {
        self.set(|mishaps| (mishaps.late, mishaps.late_by) = (chance, by));
    }

    /// So many reads give a record that came by before. Within the contract.
    pub fn read_old(&self, chance: f64) {
        self.set(|mishaps| mishaps.old = chance);
    }

    /// So many swaps are sent twice, and the second answer is passed on: [`SwapError::Conflict`]
    /// for one that was done. Libraries that repeat requests by themselves do that. It breaks rule
    /// 4 of the contract.
    pub fn repeat(&self, chance: f64) {
        self.set(|mishaps| mishaps.repeat = chance);
    }

    /// No more faults, but for those that are under way.
    pub fn calm(&self) {
        self.set(|mishaps| *mishaps = Mishaps::default());
        self.stall(false);
    }

    /// Restores a backup: writes the record anew that was the register's so many swaps before the
    /// newest one that came by here. Where fewer came by, that is the oldest of them.
    ///
    /// # Errors
    /// As for [`Store::swap`]; nothing happens to a register that no record came from.
    ///
    /// # Cancel safety
    /// As for [`Store::swap`].
    pub async fn go_back(&self, swaps: usize) -> Result<(), SwapError> {
        let old = {
            let seen = lock(&self.shared.seen);
            seen.len().checked_sub(1).map(|newest| seen[newest.saturating_sub(swaps)].record.clone())
        };
        let Some(old) = old else { return Ok(()) };
        loop {
            let read = self.store.read().await.map_err(|error| SwapError::Unavailable(error.to_string()))?;
            match self.store.swap(read.as_ref().map(|stored| &stored.version), &old).await {
                Err(SwapError::Conflict) => {}
                swapped => return swapped.map(|version| self.remember(Stored::new(old, version))),
            }
        }
    }

    fn set(&self, change: impl FnOnce(&mut Mishaps)) {
        change(&mut lock(&self.shared.mishaps));
    }

    /// What befalls this call.
    fn mishaps(&self) -> Mishaps {
        *lock(&self.shared.mishaps)
    }

    fn happens(&self, chance: f64) -> bool {
        // No number is used up for what never happens.
        chance > 0.0 && self.shared.dice.fraction() < chance
    }

    fn remember(&self, stored: Stored) {
        let mut seen = lock(&self.shared.seen);
        if seen.iter().any(|known| known.version == stored.version) {
            return;
        }
        if seen.len() == SEEN_MAX {
            seen.pop_front();
        }
        seen.push_back(stored);
    }

    fn an_old_one(&self) -> Option<Stored> {
        let seen = lock(&self.shared.seen);
        let at = self.shared.dice.below(seen.len() as u64) as usize;
        seen.get(at).cloned()
    }

    async fn not_stalled(&self) {
        // The sender is ours.
        let _ = self.shared.stalled.subscribe().wait_for(|stalled| !stalled).await;
    }

    async fn sent(&self, expected: Option<Version>, record: Vec<u8>) -> Result<Version, SwapError> {
        let swapped = self.store.swap(expected.as_ref(), &record).await;
        if let Ok(version) = &swapped {
            self.remember(Stored::new(record, version.clone()));
        }
        swapped
    }

    async fn sent_late(&self, expected: Option<Version>, record: Vec<u8>) -> Result<Version, SwapError> {
        let by = self.mishaps().late_by.mul_f64(self.shared.dice.fraction());
        let later = self.clone();
        let task = tokio::spawn(async move {
            tokio::time::sleep(by).await;
            later.sent(expected, record).await
        });
        // The runtime may end before.
        task.await.unwrap_or_else(|error| Err(SwapError::Unknown(error.to_string())))
    }
}

impl Store for Faulty {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(async {
            self.not_stalled().await;
            let mishaps = self.mishaps();
            if mishaps.away {
                return Err(ReadError::new("the store is away"));
            }
            let mut read = self.store.read().await?;
            if let Some(stored) = &read {
                self.remember(stored.clone());
            }
            if self.happens(mishaps.old) {
                read = self.an_old_one().or(read);
            }
            if self.happens(mishaps.hang) {
                return std::future::pending().await;
            }
            Ok(read)
        })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(async move {
            self.not_stalled().await;
            let mishaps = self.mishaps();
            if mishaps.away {
                return Err(SwapError::Unavailable("the store is away".into()));
            }
            if self.happens(mishaps.lose_requests) {
                return Err(SwapError::Unknown("the request is lost".into()));
            }
            let (expected, record) = (expected.cloned(), record.to_vec());
            let late = self.happens(mishaps.late);
            let mut swapped = if late {
                self.sent_late(expected.clone(), record.clone()).await
            } else {
                self.sent(expected.clone(), record.clone()).await
            };
            if self.happens(mishaps.repeat) {
                swapped = self.sent(expected, record).await;
            }
            if self.happens(mishaps.lose_answers) {
                return Err(SwapError::Unknown("the answer is lost".into()));
            }
            if self.happens(mishaps.hang) {
                return std::future::pending().await;
            }
            swapped
        })
    }

    fn changed(&self) -> StoreFuture<'_, ()> {
        Box::pin(async {
            self.not_stalled().await;
            self.store.changed().await;
        })
    }

    fn lease_time(&self) -> Duration {
        self.store.lease_time()
    }
}
