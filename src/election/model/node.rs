//! A node: what is on its disk, what its engine does, and its clock.

use std::sync::Arc;
use std::time::Duration;

use crate::checksum::Checksum;
use crate::election::{ClockPair, Election, Facts, Settings};
use crate::lease::record::{Attempt, Holder};
use crate::peer::{Incarnation, NodeId};
use crate::status::{Addresses, PeerInfo};
use crate::txid::{Epoch, EpochHistory, EpochStart, Position, Txid};

/// Microseconds of the true time.
pub(super) type Time = u64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) epoch: Epoch,
    pub(super) value: u64,
    pub(super) after: Checksum,
}

/// What a state directory has.
#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    pub(super) entries: Vec<Entry>,
    pub(super) epochs: Arc<EpochHistory>,
    pub(super) incarnations: Vec<Incarnation>,
    pub(super) bootstrapped: bool,
    pub(super) heard: u64,
    pub(super) synced: Option<ClockPair>,
    /// The application wrote to the database before there was a cluster.
    pub(super) content: bool,
    /// What is here is no state that a primary vouches for.
    pub(super) doubtful: bool,
    /// What others replaced.
    pub(super) lost: Vec<Vec<Entry>>,
}

impl Disk {
    fn start_checksum(&self) -> Checksum {
        self.epochs.iter().next().map_or(Checksum::from_u128(self.content.into()), |start| {
            if start.first == 1 { start.before } else { Checksum::EMPTY }
        })
    }

    pub(super) fn position(&self) -> Option<Position> {
        if self.epochs.last().is_none() || self.doubtful {
            return None;
        }
        let number = self.entries.len() as u64;
        let epoch = self.epochs.epoch_of(number)?;
        let checksum = self.entries.last().map_or(self.start_checksum(), |entry| entry.after);
        Some(Position::new(Txid::new(epoch, number), checksum))
    }

    /// Begins an epoch after all that is here. One without a transaction is replaced.
    pub(super) fn open_epoch(&mut self, epoch: Epoch) {
        let first = self.entries.len() as u64 + 1;
        let before = self.entries.last().map_or(self.start_checksum(), |entry| entry.after);
        let mut epochs = EpochHistory::default();
        let used = self.epochs.iter().filter(|start| start.first < first);
        used.copied().chain([EpochStart { epoch, first, before }]).for_each(|start| epochs.push(start));
        self.epochs = Arc::new(epochs);
        self.doubtful = false;
    }

    pub(super) fn commit(&mut self, epoch: Epoch, value: u64) {
        let before = self.entries.last().map_or(self.start_checksum(), |entry| entry.after);
        let mixed = before.as_u128().rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u128::from(value);
        self.entries.push(Entry { epoch, value, after: Checksum::from_u128(mixed) });
    }

    /// Keeps only so many transactions.
    pub(super) fn go_back(&mut self, to: usize) {
        self.entries.truncate(to);
        let starts = self.epochs.iter().filter(|start| start.first <= to as u64 + 1).copied();
        let mut epochs = EpochHistory::default();
        starts.for_each(|start| epochs.push(start));
        self.epochs = Arc::new(epochs);
    }

    /// Takes up to so many transactions of a primary, and gives up what is not in its history.
    /// Returns whether all of them are here.
    pub(super) fn follow(&mut self, primary: &Disk, most: usize) -> bool {
        let pairs = self.entries.iter().zip(&primary.entries);
        let common = pairs.take_while(|(mine, theirs)| mine == theirs).count();
        if common < self.entries.len() {
            self.lost.push(self.entries.split_off(common));
        }
        let end = primary.entries.len().min(common.saturating_add(most));
        self.entries.extend_from_slice(&primary.entries[common..end]);
        self.doubtful = false;
        if end == primary.entries.len() {
            self.epochs = primary.epochs.clone();
            return true;
        }
        let starts = primary.epochs.iter().filter(|start| start.first <= end as u64 + 1).copied();
        let mut epochs = EpochHistory::default();
        starts.for_each(|start| epochs.push(start));
        self.epochs = Arc::new(epochs);
        false
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Engine {
    /// It follows this node, or none.
    Follows(Option<NodeId>),
    Prepared,
    Promoting(Epoch),
    Primary(Epoch),
    Demoting(Epoch),
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) settings: Settings,
    pub(super) disk: Disk,
    /// None while no process runs.
    pub(super) election: Option<Election>,
    /// The count of its processes: what was asked by an earlier one is answered to none.
    pub(super) run: u32,
    pub(super) stopped_until: Option<Time>,
    pub(super) engine: Engine,
    /// Until when it may acknowledge, by its own clock.
    pub(super) gate: Duration,
    pub(super) wakes: u64,
    pub(super) replica_pass: u64,
    /// How fast its clock runs, in millionths of the true time.
    pub(super) rate: u64,
    pub(super) offset: Duration,
    pub(super) healthy: bool,
    pub(super) draining: bool,
    pub(super) reaches_store: bool,
    /// Promotions fail.
    pub(super) fails: bool,
    pub(super) promotes_in: Time,
    /// Transactions that a replica gets at once.
    pub(super) batch: usize,
    pub(super) left: bool,
    /// Its process does not end at once when it has left.
    pub(super) lingers: bool,
    /// For this offer it withholds commits, or is about to; the offer has no answer yet.
    pub(super) withholding: Option<Attempt>,
    /// Nothing is committed here.
    pub(super) held: bool,
    /// How long it takes until running requests are done, and the writer is closed.
    pub(super) withholds_in: Time,
    pub(super) withhold_fails: bool,
    /// How many offers it has accepted.
    pub(super) accepts: u32,
    pub(super) gives: Vec<Epoch>,
}

impl Node {
    pub(super) fn new(id: u128, lease_time: Duration) -> Node {
        let me = Holder {
            node: NodeId::from_u128(id + 1),
            incarnation: Incarnation::NIL,
            boot: format!("boot of {id}"),
            addresses: Addresses::default(),
        };
        let settings = Settings {
            me,
            cluster: "c".into(),
            database: "d".into(),
            lease_time,
            failover_loss: Duration::from_secs(2),
            candidate: true,
            bootstrap: None,
            bootstrapped: false,
            incarnations: Vec::new(),
            alone: true,
            withhold_limit: Duration::from_secs(3),
        };
        Node {
            settings,
            disk: Disk::default(),
            election: None,
            run: 0,
            stopped_until: None,
            engine: Engine::Follows(None),
            gate: Duration::ZERO,
            wakes: 0,
            replica_pass: 0,
            rate: 1_000_000,
            offset: Duration::from_secs(1000 + id as u64),
            healthy: true,
            draining: false,
            reaches_store: true,
            fails: false,
            promotes_in: 20_000,
            batch: usize::MAX,
            left: false,
            lingers: false,
            withholding: None,
            held: false,
            withholds_in: 3000,
            withhold_fails: false,
            accepts: 0,
            gives: Vec::new(),
        }
    }

    pub(super) fn id(&self) -> NodeId {
        self.settings.me.node
    }

    pub(super) fn peer(&self) -> PeerInfo {
        let me = &self.settings.me;
        PeerInfo { node: me.node, incarnation: me.incarnation, addresses: me.addresses.clone() }
    }

    pub(super) fn clock(&self, now: Time) -> Duration {
        self.offset + Duration::from_micros((u128::from(now) * u128::from(self.rate) / 1_000_000) as u64)
    }

    /// The true time at which its clock shows this.
    pub(super) fn true_time(&self, at: Duration) -> Time {
        let passed = at.saturating_sub(self.offset).as_micros();
        (passed * 1_000_000).div_ceil(u128::from(self.rate)) as Time
    }

    /// Whether a commit could be acknowledged now.
    pub(super) fn is_open(&self, now: Time) -> bool {
        let leads = matches!(self.engine, Engine::Promoting(_) | Engine::Primary(_) | Engine::Demoting(_));
        self.election.is_some() && leads && self.clock(now) < self.gate
    }

    pub(super) fn facts(&self, random: [u64; 6]) -> Facts {
        Facts {
            position: self.disk.position(),
            history: self.disk.epochs.clone(),
            synced: self.disk.synced,
            healthy: self.healthy,
            draining: self.draining,
            has_state: self.disk.epochs.last().is_some(),
            has_content: self.disk.content || !self.disk.entries.is_empty(),
            replicas: Vec::new(),
            heard: self.disk.heard,
            random,
        }
    }
}
