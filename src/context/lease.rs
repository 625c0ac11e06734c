//! What a lease's driver, the streams and the doors tell each other.

use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::watch;

use crate::context::{CommandDoor, EpochsHeard, Offers, ToDisk};
use crate::error::Result;
use crate::fence::boot_time;
use crate::lock::lock;
use crate::status::WaitReason;
use crate::txid::{Epoch, Position};

/// The part of a node that has to do with a lease.
#[derive(Debug)]
pub(crate) struct LeaseContext {
    /// The configuration says who the primary is. The node keeps no epoch that it hears of, and a
    /// primary exceeds one that a replica names.
    pub(crate) fixed: bool,
    /// Since when this node has its epoch, while it leads by a lease.
    pub(crate) clock: LeaseClock,
    /// What the primary last said of its lease clock, with a position that is on this node's disk.
    pub(crate) synced: SyncedClock,
    /// The highest epoch number that was heard of.
    pub(crate) heard: EpochsHeard,
    /// What the primary says of a handoff.
    pub(crate) offers: Offers,
    /// What carries an operator's commands out.
    pub(crate) commands: CommandDoor,
    /// What the driver says of the node to a peer that asks.
    fitness: Mutex<Option<Fitness>>,
    /// How long the lease counts, by the record.
    time: Mutex<Option<Duration>>,
}

impl LeaseContext {
    /// For a node whose primary is fixed by configuration.
    pub(crate) fn fixed() -> LeaseContext {
        let synced = SyncedClock::new(None, Duration::MAX, ToDisk::nowhere());
        LeaseContext { fixed: true, ..LeaseContext::leased(synced, EpochsHeard::new(0, ToDisk::nowhere())) }
    }

    /// For a node that may lead by a lease.
    pub(crate) fn leased(synced: SyncedClock, heard: EpochsHeard) -> LeaseContext {
        LeaseContext {
            fixed: false,
            clock: LeaseClock::default(),
            synced,
            heard,
            offers: Offers::default(),
            commands: CommandDoor::default(),
            fitness: Mutex::default(),
            time: Mutex::default(),
        }
    }

    /// How long the lease counts: what the record says, or the configuration while none is known.
    pub(crate) fn set_time(&self, time: Duration) {
        *lock(&self.time) = Some(time);
    }

    /// None where the primary is fixed.
    pub(crate) fn time(&self) -> Option<Duration> {
        *lock(&self.time)
    }

    /// What the node says from now on to a peer that asks how it stands.
    pub(crate) fn set_fitness(&self, fitness: Fitness) {
        *lock(&self.fitness) = Some(fitness);
    }

    /// None while no driver has said anything.
    pub(crate) fn fitness(&self) -> Option<Fitness> {
        *lock(&self.fitness)
    }
}

/// How fit a node is to lead, as its driver sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Fitness {
    /// It would take the lease, and could.
    pub(crate) fit: bool,
    /// It has a state of the cluster.
    pub(crate) has_state: bool,
    /// Its database has something in it.
    pub(crate) has_content: bool,
    /// Why it would not take the lease. None: it would, or it has it.
    pub(crate) why_not: Option<WaitReason>,
    /// Whether the record that it saw last says that elections are paused.
    pub(crate) paused: Option<bool>,
    /// That record says that the lease was moved to another store.
    pub(crate) moved: bool,
}

/// The time since this node took the epoch that it leads.
#[derive(Debug, Default)]
pub(crate) struct LeaseClock(Mutex<Option<(Epoch, Duration)>>);

impl LeaseClock {
    /// The node took this epoch then, by [`boot_time`].
    pub(crate) fn take(&self, epoch: Epoch, at: Duration) {
        *lock(&self.0) = Some((epoch, at));
    }

    /// The node leads no more.
    pub(crate) fn clear(&self) {
        *lock(&self.0) = None;
    }

    /// The epoch, and how long the node has had it by now.
    pub(crate) fn now(&self) -> Option<(Epoch, Duration)> {
        let (epoch, at) = (*lock(&self.0))?;
        Some((epoch, boot_time().saturating_sub(at)))
    }
}

/// A position that a primary had when its lease clock was so far, or later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ClockPair {
    pub(crate) epoch: Epoch,
    pub(crate) clock: Duration,
    pub(crate) position: Position,
}

impl ClockPair {
    /// Of a later epoch, or of the same one and later.
    pub(crate) fn is_newer(&self, than: &ClockPair) -> bool {
        (self.epoch, self.clock) > (than.epoch, than.clock)
    }
}

/// The newest pair of which this node has everything on its disk.
///
/// The pair itself is kept there, too, and may be a little old. What it is for allows that: a node
/// that lags the last holder by less than a limit may lead. While the position moves, the kept
/// pair is a second old. While it stands still, the kept pair grows old by a quarter of the limit.
#[derive(Debug)]
pub(crate) struct SyncedClock {
    pair: watch::Sender<Option<ClockPair>>,
    /// How old the pair on the disk may be while the position stands still, on the lease clock.
    idle: Duration,
    /// What is on the disk.
    kept: Mutex<Option<ClockPair>>,
    keep: ToDisk<Option<ClockPair>>,
}

impl SyncedClock {
    /// `pair` is on the disk already. A node takes over when it lags by no more than
    /// `failover_loss`. `keep` replaces the pair on the disk.
    pub(crate) fn new(
        pair: Option<ClockPair>,
        failover_loss: Duration,
        keep: ToDisk<Option<ClockPair>>,
    ) -> SyncedClock {
        let (sender, kept) = (watch::Sender::new(pair), Mutex::new(pair));
        SyncedClock { pair: sender, idle: failover_loss / 4, kept, keep }
    }

    pub(crate) fn get(&self) -> Option<ClockPair> {
        *self.pair.borrow()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<ClockPair>> {
        self.pair.subscribe()
    }

    /// Everything of this pair is on the disk. None: what was is not in the history any more.
    pub(crate) fn set(&self, pair: Option<ClockPair>) {
        self.pair.send_if_modified(|now| std::mem::replace(now, pair) != pair);
    }

    /// Keeps the newest pair on the disk, if what is there is too old. Blocks.
    pub(crate) fn keep(&self) -> Result<()> {
        let mut kept = lock(&self.kept);
        let pair = self.get();
        if !self.is_due(*kept, pair) {
            return Ok(());
        }
        self.keep.keep(pair)?;
        *kept = pair;
        Ok(())
    }

    fn is_due(&self, kept: Option<ClockPair>, pair: Option<ClockPair>) -> bool {
        match (kept, pair) {
            (Some(kept), Some(pair)) if (kept.epoch, kept.position) == (pair.epoch, pair.position) => {
                pair.clock.saturating_sub(kept.clock) >= self.idle
            }
            (kept, pair) => kept != pair,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::error::Error;
    use crate::primary::fake::at;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn pair(clock: u64, number: u64) -> ClockPair {
        ClockPair { epoch: Epoch::new(1, 1), clock: s(clock), position: at(1, number) }
    }

    #[test]
    fn the_lease_clock_counts_from_when_the_epoch_was_taken() {
        let clock = LeaseClock::default();
        assert_eq!(clock.now(), None, "it leads by no lease");
        clock.take(Epoch::new(4, 4), boot_time().saturating_sub(s(5)));
        let (epoch, time) = clock.now().unwrap();
        assert_eq!(epoch, Epoch::new(4, 4));
        assert!(time >= s(5) && time < s(5 + 60), "{time:?}");
        clock.take(Epoch::new(5, 5), boot_time() + s(1000));
        assert_eq!(clock.now(), Some((Epoch::new(5, 5), Duration::ZERO)), "no time before that");
        clock.clear();
        assert_eq!(clock.now(), None);
    }

    #[test]
    fn a_pair_is_written_when_the_position_moved_and_else_each_quarter_of_the_limit() {
        let disk = Arc::new(Mutex::new(Vec::new()));
        let written = disk.clone();
        let keep = ToDisk::new(move |pair| {
            lock(&written).push(pair);
            Ok(())
        });
        let synced = SyncedClock::new(None, s(10), keep);
        for clock in 1..=20 {
            synced.set(Some(pair(clock, 7)));
            synced.keep().unwrap();
        }
        // 2.5 s each, of whole seconds.
        let idle: Vec<_> = [1, 4, 7, 10, 13, 16, 19].map(|clock| Some(pair(clock, 7))).into();
        assert_eq!(*lock(&disk), idle);
        synced.set(Some(pair(20, 8)));
        synced.keep().unwrap();
        synced.keep().unwrap();
        assert_eq!(lock(&disk)[7..], [Some(pair(20, 8))], "once");
        synced.set(None);
        synced.keep().unwrap();
        assert_eq!(lock(&disk)[8..], [None], "what is not in the history is not kept");
    }

    #[test]
    fn what_could_not_be_kept_is_tried_again() {
        let fails = Arc::new(Mutex::new(true));
        let failing = fails.clone();
        let keep = ToDisk::new(move |_| if *lock(&failing) { Err(Error::ShutDown) } else { Ok(()) });
        let synced = SyncedClock::new(None, s(10), keep);
        synced.set(Some(pair(1, 1)));
        assert!(synced.keep().is_err());
        *lock(&fails) = false;
        synced.keep().unwrap();
        assert_eq!(*lock(&synced.kept), Some(pair(1, 1)));
    }
}
