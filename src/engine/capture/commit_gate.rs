//! May this commit be acknowledged? This is the one place between a commit and the answer to its
//! writer.

use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::options::Durability;
use crate::error::{Blame, Cause, Error, Result};
use crate::txid::Txid;

/// Why a commit that came too late is not acknowledged.
const FENCED: &str = "this node's time as the primary was over when the write was committed, so that the \
    next primary may not have it";

/// Says what a commit waits for before the application hears that it succeeded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CommitGate {
    durability: Durability,
}

/// A commit that the application may not hear of yet. Of several such commits, the highest one
/// waits for all.
#[must_use = "a commit that waits is acknowledged only after `CommitGate::pass` and `decide`"]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Waiting {
    txid: Txid,
    until: Until,
}

/// What a commit waits for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Until {
    /// Its frames are fsynced.
    OnDisk,
}

impl Waiting {
    pub(crate) fn txid(self) -> Txid {
        self.txid
    }
}

impl CommitGate {
    pub(crate) fn new(durability: Durability) -> CommitGate {
        CommitGate { durability }
    }

    pub(crate) fn durability(self) -> Durability {
        self.durability
    }

    /// Whether the commit has to wait. `None`: [`CommitGate::decide`] can say at once.
    pub(crate) fn hold(self, txid: Txid) -> Option<Waiting> {
        match self.durability {
            Durability::Synced => Some(Waiting { txid, until: Until::OnDisk }),
            Durability::Unsynced => None,
        }
    }

    /// Waits until the commit is as durable as it is to be. Blocks; callers share one fsync.
    pub(crate) fn pass(self, engine: &PrimaryEngine, waiting: Waiting) -> Result<()> {
        match waiting.until {
            Until::OnDisk => engine.group_sync.sync(waiting.txid.number()),
        }
    }

    /// The decision to acknowledge a commit that is as durable as it is to be: it was made before
    /// this node's time as the primary was over.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`].
    pub(crate) fn decide(self, engine: &PrimaryEngine, txid: Txid) -> Result<()> {
        // After the commit and its fsync, however long they took.
        if engine.base.node.fence.is_open() {
            return Ok(());
        }
        Err(Error::OutcomeUnknown { txid: Some(txid), cause: Cause::new(FENCED, Blame::Outside) })
    }

    /// Returns when the commit is as durable as it is to be.
    pub(crate) fn settle(self, engine: &PrimaryEngine, txid: Txid) -> Result<()> {
        self.hold(txid).map_or(Ok(()), |waiting| self.pass(engine, waiting))
    }

    /// All in one: returns when the commit may be acknowledged. An error says that it was made.
    pub(crate) fn wait(self, engine: &PrimaryEngine, txid: Txid) -> Result<()> {
        self.settle(engine, txid).map_err(|error| error.of_commit(txid))?;
        self.decide(engine, txid)
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;
    use crate::engine::tests::{Home, open_plain, settled, until};
    use crate::fence::boot_time;

    #[test]
    fn a_commit_waits_for_its_fsync_unless_the_mode_says_otherwise() {
        let home = Home::new();
        let engine = home.primary("p.db");
        let writer = Connection::open(home.path("p.db")).unwrap();
        writer.execute_batch("CREATE TABLE t(a)").unwrap();
        let (synced, unsynced) = (CommitGate::new(Durability::Synced), CommitGate::new(Durability::Unsynced));
        let txid = settled(&engine).txid();
        let next = Txid::new(txid.epoch(), txid.number() + 1);
        assert_eq!(unsynced.hold(next), None);
        let (first, second) = (synced.hold(txid).unwrap(), synced.hold(next).unwrap());
        assert_eq!([second, first].into_iter().max(), Some(second), "the last one waits for both");
        synced.pass(&engine, first).unwrap();
        engine.group_sync.hold(true);
        writer.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        unsynced.wait(&engine, next).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| synced.wait(&engine, next));
            until("the wait", || engine.group_sync.wanted() >= next.number());
            assert!(!waits.is_finished());
            engine.group_sync.hold(false);
            waits.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_commit_whose_fsync_ends_after_the_fence_is_named_and_not_acknowledged() {
        let home = Home::new();
        let engine = home.primary("p.db");
        open_plain(&home.path("p.db")).execute_batch("CREATE TABLE t(a)").unwrap();
        let fence = engine.base.node.fence.clone();
        let txid = settled(&engine).txid();
        for durability in [Durability::Synced, Durability::Unsynced] {
            let gate = CommitGate::new(durability);
            fence.set(boot_time() + std::time::Duration::from_secs(3600));
            gate.wait(&engine, txid).unwrap();
            fence.close();
            let late = gate.wait(&engine, txid);
            assert!(
                matches!(&late, Err(Error::OutcomeUnknown { txid: Some(named), .. }) if *named == txid),
                "{late:?}"
            );
        }
    }
}
