//! May this commit be acknowledged? This is the one place between a commit and the answer to its
//! writer.

use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::options::Durability;
use crate::error::Result;
use crate::txid::Txid;

/// Says what a commit waits for before the application hears that it succeeded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CommitGate {
    durability: Durability,
}

/// A commit that the application may not hear of yet. Of several such commits, the highest one
/// waits for all.
#[must_use = "a commit that waits is acknowledged only after `CommitGate::pass`"]
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

impl CommitGate {
    pub(crate) fn new(durability: Durability) -> CommitGate {
        CommitGate { durability }
    }

    /// Whether the commit has to wait. `None`: it may be acknowledged at once.
    pub(crate) fn hold(self, txid: Txid) -> Option<Waiting> {
        match self.durability {
            Durability::Synced => Some(Waiting { txid, until: Until::OnDisk }),
            Durability::Unsynced => None,
        }
    }

    /// Waits until the commit may be acknowledged. Blocks; callers share one fsync.
    pub(crate) fn pass(self, engine: &PrimaryEngine, waiting: Waiting) -> Result<()> {
        match waiting.until {
            Until::OnDisk => engine.group_sync.sync(waiting.txid.number()),
        }
    }

    /// Both in one: returns when the commit may be acknowledged.
    pub(crate) fn wait(self, engine: &PrimaryEngine, txid: Txid) -> Result<()> {
        self.hold(txid).map_or(Ok(()), |waiting| self.pass(engine, waiting))
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;
    use crate::engine::tests::{Home, settled, until};

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
}
