//! Whether what a member has is what the members agree on.
//!
//! Raft names a leader by the vote alone. That may be on the disk from before, or of one of which a
//! member that was removed hears no more. So a leader counts when its message comes in this run.
//! And the state counts once it has what was committed then: at a start it is that of a snapshot.

use std::time::Duration;

use openraft::{LogId, RaftMetrics, ServerState};
use tokio::time::Instant;

use crate::members::types::Member;

/// What is told of Raft, while it runs.
pub(super) type Metrics = RaftMetrics<u64, Member>;

/// When this node last led, or heard of a leader, in this run of Raft.
#[derive(Debug, Default)]
pub(super) struct Contact {
    last: LastContact,
    /// The state counts once it has this entry, which was committed when the leader was first heard
    /// of.
    up_to: Option<LogId<u64>>,
}

#[derive(Clone, Copy, Debug, Default)]
enum LastContact {
    #[default]
    Never,
    Now,
    Until(Instant),
}

impl Contact {
    /// Takes note of whether this node leads, and the others follow.
    pub(super) fn note(&mut self, metrics: &Metrics, lease_time: Duration) {
        // A leader that hears nothing of the others is none.
        let quiet = metrics.millis_since_quorum_ack.map(Duration::from_millis);
        // Its own first entry is applied after all that were committed before.
        let applied = metrics.last_applied.map(|id| id.leader_id.term);
        let leads = metrics.state == ServerState::Leader
            && applied == Some(metrics.current_term)
            && (quiet.is_some_and(|quiet| quiet < lease_time / 4)
                || metrics.membership_config.voter_ids().count() == 1);
        self.last = match self.last {
            _ if leads => LastContact::Now,
            LastContact::Now => LastContact::Until(Instant::now()),
            before => before,
        };
    }

    /// Takes note of a leader's message, which says that the log counts up to there.
    pub(super) fn heard_of_leader(&mut self, committed: Option<LogId<u64>>) {
        self.up_to.get_or_insert_with(|| committed.unwrap_or_default());
        self.last = LastContact::Until(Instant::now());
    }

    /// Whether a leader counted a lease time ago.
    pub(super) fn is_in(&self, lease_time: Duration) -> bool {
        match self.last {
            LastContact::Never => false,
            LastContact::Now => true,
            LastContact::Until(when) => when.elapsed() < lease_time,
        }
    }

    /// Whether a state up to this entry counts.
    pub(super) fn has_all(&self, applied: Option<LogId<u64>>) -> bool {
        applied.is_some() && applied >= self.up_to
    }
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, Vote};

    use super::*;

    const TIME: Duration = Duration::from_secs(10);

    fn id(term: u64, index: u64) -> Option<LogId<u64>> {
        Some(LogId::new(CommittedLeaderId::new(term, 9), index))
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_counts_when_it_is_heard_and_the_state_when_it_has_what_counted_then() {
        let mut contact = Contact::default();
        // As the vote on the disk has it.
        let by_vote = Metrics {
            state: ServerState::Follower,
            vote: Vote::new_committed(3, 9),
            current_leader: Some(9),
            last_applied: id(3, 256),
            ..Metrics::new_initial(7)
        };
        contact.note(&by_vote, TIME);
        assert!(!contact.is_in(TIME));
        contact.heard_of_leader(id(3, 300));
        assert!(contact.is_in(TIME) && !contact.has_all(id(3, 256)) && contact.has_all(id(3, 300)));
        contact.heard_of_leader(id(3, 400));
        assert!(contact.has_all(id(3, 300)), "it was all a moment ago");
        contact.note(&by_vote, TIME);
        assert!(contact.is_in(TIME));
        tokio::time::advance(TIME).await;
        assert!(!contact.is_in(TIME));
        // Of a cluster that has only begun.
        let mut contact = Contact::default();
        contact.heard_of_leader(None);
        assert!(!contact.has_all(None) && contact.has_all(id(1, 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_counts_itself_while_a_quorum_answers_and_its_own_entry_is_applied() {
        let leads = |quiet, applied| Metrics {
            state: ServerState::Leader,
            current_term: 4,
            current_leader: Some(7),
            millis_since_quorum_ack: quiet,
            last_applied: applied,
            ..Metrics::new_initial(7)
        };
        let mut contact = Contact::default();
        for (quiet, applied) in [(None, id(4, 9)), (Some(2500), id(4, 9)), (Some(100), id(3, 8))] {
            contact.note(&leads(quiet, applied), TIME);
            assert!(!contact.is_in(TIME), "{quiet:?} {applied:?}");
        }
        contact.note(&leads(Some(100), id(4, 9)), TIME);
        tokio::time::advance(TIME).await;
        assert!(contact.is_in(TIME));
        contact.note(&leads(Some(2500), id(4, 9)), TIME);
        assert!(contact.is_in(TIME));
        tokio::time::advance(TIME).await;
        assert!(!contact.is_in(TIME));
    }
}
