//! Whether etcd went back: its revision never does, unless a backup was restored.

use std::sync::Mutex;

use super::messages::EtcdHeader;
use crate::lock::lock;

/// What was seen of a cluster, by one handle. Each call asks the majority. So it is shown no
/// revision below one that was shown before the call began.
#[derive(Default)]
pub(super) struct Lives(Mutex<SeenRevision>);

#[derive(Clone, Copy, Default)]
pub(super) struct SeenRevision {
    cluster: u64,
    /// The highest; 0 where none was seen.
    pub(super) revision: u64,
    /// How often it went back.
    life: u32,
}

impl Lives {
    /// To be asked for before a call.
    pub(super) fn now(&self) -> SeenRevision {
        *lock(&self.0)
    }

    /// Notes an answer. Returns which life it is of.
    pub(super) fn note(&self, before: SeenRevision, header: &EtcdHeader) -> u32 {
        let mut seen = lock(&self.0);
        let (cluster, revision) = (header.cluster_id, header.revision);
        let went_back = cluster == before.cluster && revision < before.revision;
        if seen.life != before.life {
            // Another call has seen it. This one came after that, or before.
            return if went_back { seen.life } else { before.life };
        }
        if went_back {
            *seen = SeenRevision { cluster, revision, life: seen.life.wrapping_add(1) };
        } else if cluster != seen.cluster {
            *seen = SeenRevision { cluster, revision, life: seen.life };
        } else {
            seen.revision = seen.revision.max(revision);
        }
        seen.life
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(cluster_id: u64, revision: u64) -> EtcdHeader {
        EtcdHeader { cluster_id, revision }
    }

    #[test]
    fn a_revision_that_goes_back_begins_another_life() {
        let lives = Lives::default();
        let note = |cluster, revision| lives.note(lives.now(), &header(cluster, revision));
        assert_eq!([note(1, 5), note(1, 5), note(1, 9)], [0, 0, 0]);
        // It is told by its id.
        assert_eq!([note(2, 3), note(2, 4)], [0, 0]);
        assert_eq!([note(2, 3), note(2, 3), note(2, 4), note(2, 1)], [1, 1, 1, 2]);
    }

    #[test]
    fn answers_that_come_in_another_order_are_no_way_back() {
        let lives = Lives::default();
        lives.note(lives.now(), &header(1, 5));
        let (one, other) = (lives.now(), lives.now());
        assert_eq!([lives.note(one, &header(1, 9)), lives.note(other, &header(1, 6))], [0, 0]);
        // Two calls see it go back once, and a late answer is of the life before.
        let (one, other, late) = (lives.now(), lives.now(), lives.now());
        assert_eq!([lives.note(one, &header(1, 2)), lives.note(other, &header(1, 2))], [1, 1]);
        assert_eq!(lives.note(late, &header(1, 10)), 0);
        assert_eq!(lives.note(lives.now(), &header(1, 3)), 1);
    }
}
