//! The highest epoch number that a node has heard of, and what it makes of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::context::{NodeContext, ToDisk};
use crate::error::Result;
use crate::lock::lock;
use crate::report::Condition;
use crate::status::Role;
use crate::txid::{Epoch, NUMBER_MAX};

/// How far above our newest epoch one that a peer names may be for this node to go above it, or to
/// believe that it exists. Primaries count in ones: no two nodes of a cluster get so far apart. A
/// peer that lies brings the numbers forward by no more. To get to [`RAISED_MAX`] takes 2^30 lies,
/// each with an fsync.
pub(crate) const RAISE_STEP_MAX: u64 = 1 << 32;

/// Highest epoch number that is gone above because a peer names it. Higher ones come from starts
/// and elections of primaries only, for which as many numbers are left.
pub(crate) const RAISED_MAX: u64 = NUMBER_MAX >> 1;

const _: () = assert!(RAISED_MAX + RAISE_STEP_MAX < NUMBER_MAX);

/// Whether an epoch of this number, which a peer names, may have come from ours.
pub(crate) fn is_near(theirs: u64, ours: u64) -> bool {
    theirs.saturating_sub(ours) <= RAISE_STEP_MAX && theirs <= RAISED_MAX
}

/// The highest epoch number that this node has heard of. It is on the disk before anyone sees it
/// here.
#[derive(Debug)]
pub(crate) struct EpochsHeard {
    number: watch::Sender<u64>,
    /// Held while a number is put on the disk.
    turn: Mutex<()>,
    /// The highest that is on its way there.
    coming: AtomicU64,
    keep: ToDisk<u64>,
}

impl EpochsHeard {
    /// `number` is on the disk already; `keep` replaces it there.
    pub(crate) fn new(number: u64, keep: ToDisk<u64>) -> EpochsHeard {
        let (turn, coming) = (Mutex::default(), AtomicU64::new(number));
        EpochsHeard { number: watch::Sender::new(number), turn, coming, keep }
    }

    pub(crate) fn number(&self) -> u64 {
        *self.number.borrow()
    }

    /// For who is to act when a higher one was heard.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.number.subscribe()
    }

    /// Notes a number, and returns when it is on the disk: whether it is a new one. Blocks.
    pub(crate) fn note(&self, number: u64) -> Result<bool> {
        let _turn = lock(&self.turn);
        if number <= self.number() {
            return Ok(false);
        }
        self.keep.keep(number)?;
        self.number.send_replace(number);
        Ok(true)
    }
}

impl NodeContext {
    /// The highest epoch number that this node knows.
    pub(crate) fn highest_epoch(&self) -> u64 {
        self.applied.history().epoch().number().max(self.lease.heard.number())
    }

    /// Whether a later epoch than that of this node's history was heard of. A primary by a lease
    /// lets no replica in then, takes no word of one, and runs no request of another node.
    pub(crate) fn is_superseded(&self) -> bool {
        !self.lease.fixed && self.lease.heard.number() > self.applied.history().epoch().number()
    }

    /// Acknowledges until this instant in this epoch, unless a later one was heard of.
    pub(crate) fn acknowledge_until(&self, epoch: Epoch, until: Duration) {
        self.fence.set(until);
        // In this order: who hears closes the fence after the number can be seen.
        if self.lease.heard.number() > epoch.number() {
            self.fence.close();
        }
    }

    /// A primary that this node follows has an epoch of this number. Returns when that is on the
    /// disk. Blocks.
    pub(crate) fn hear(&self, number: u64) -> Result<()> {
        if self.lease.fixed || number <= self.lease.heard.number() {
            return Ok(());
        }
        self.lease.heard.note(number).map(drop)
    }

    /// A peer names an epoch that is later than this node's. A node that leads by a lease
    /// acknowledges nothing more from now on. Returns when the number is on the disk. Blocks.
    pub(crate) fn hear_later(&self, number: u64) -> Result<()> {
        // To acknowledge nothing is right in any case, also before the number is on the disk.
        self.fence.close();
        let noted = self.lease.heard.note(number);
        // The fence may have been set between the two.
        self.fence.close();
        if noted? && self.roles.borrow().role == Role::Primary {
            self.report_aside(Condition::LaterEpochHeard { number });
        }
        Ok(())
    }

    /// The same of an epoch that came with a request, without a wait. Returns whether this node is
    /// superseded by it, or was before.
    pub(crate) fn hear_aside(self: &Arc<NodeContext>, number: u64) -> bool {
        let ours = self.applied.history().epoch().number();
        if self.lease.fixed {
            return false;
        }
        if number <= ours || !is_near(number, ours) {
            return self.is_superseded();
        }
        if self.lease.heard.coming.fetch_max(number, Ordering::AcqRel) < number {
            self.fence.close();
            let node = self.clone();
            let note = move || {
                if let Err(error) = node.hear_later(number) {
                    // It is heard once more with the next request.
                    node.lease.heard.coming.store(node.lease.heard.number(), Ordering::Release);
                    node.report_aside(Condition::EpochNotKept { error: &error });
                }
            };
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn_blocking(note)),
                Err(_) => note(),
            }
        }
        true
    }
}
