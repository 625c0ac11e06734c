//! How the node stands, for the election and for those who ask.

use std::cmp::Reverse;
use std::sync::Arc;

use crate::context::{Fitness, NodeContext};
use crate::election::{Election, Facts};
use crate::error::Result;
use crate::fence::boot_time;
use crate::node::slot::{EngineSlot, Running};
use crate::primary::ReplicaServer;
use crate::random;
use crate::report::Part;
use crate::status::{PeerInfo, ReplicaStatus};
use crate::txid::Position;

/// Where the facts come from.
pub(crate) struct FactsSource {
    node: Arc<NodeContext>,
    slot: Arc<EngineSlot>,
    replica_server: Arc<ReplicaServer>,
    has_content: bool,
}

impl FactsSource {
    pub(super) fn new(
        node: Arc<NodeContext>,
        slot: Arc<EngineSlot>,
        replica_server: Arc<ReplicaServer>,
        has_content: bool,
    ) -> FactsSource {
        FactsSource { node, slot, replica_server, has_content }
    }

    /// As they are at the moment.
    ///
    /// # Errors
    /// [`Error::NoRandom`](crate::Error::NoRandom).
    pub(super) fn now(&self) -> Result<Facts> {
        let node = &self.node;
        let (history, position) = (node.applied.history(), node.applied.position());
        let leads = matches!(self.slot.get(), Ok(Running::Primary(_)));
        let has_state = history.last().is_some();
        // What stops a replica's heal or its copies stops no commit.
        let unable = [Part::Engine, Part::Room].iter().any(|part| node.has_problem(*part));
        let mut random = [0; 6];
        for number in &mut random {
            *number = u64::from_le_bytes(random::array()?);
        }
        Ok(Facts {
            position,
            has_state,
            has_content: has_state || self.has_content,
            history,
            synced: node.lease.synced.get(),
            healthy: node.failure().is_none() && !unable && (leads || !node.astray()),
            draining: node.drain.is_cancelled(),
            replicas: best_known(self.replica_server.replicas()),
            heard: node.lease.heard.number(),
            random,
        })
    }

    /// What peers are told that ask.
    pub(super) fn tell(&self, election: &Election, facts: &Facts) {
        self.node.lease.set_fitness(Fitness {
            fit: election.answer(facts, boot_time()).fit,
            has_state: facts.has_state,
            has_content: facts.has_content,
            why_not: election.why_not(facts, boot_time()),
            paused: election.paused(),
            moved: election.moved(),
        });
    }
}

/// The replicas that may lead, those first that have the most: a record may not have room for all,
/// and not all of it are asked.
fn best_known(mut replicas: Vec<ReplicaStatus>) -> Vec<PeerInfo> {
    replicas.retain(|replica| !replica.follower);
    let number = |position: Option<Position>| position.map(|position| position.number());
    replicas.sort_by_key(|replica| Reverse((number(replica.synced), number(replica.applied))));
    replicas.into_iter().map(|replica| replica.peer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum::Checksum;
    use crate::peer::{Incarnation, NodeId};
    use crate::status::Addresses;
    use crate::txid::{Epoch, Txid};

    #[test]
    fn the_replicas_that_have_the_most_come_first_and_followers_not_at_all() {
        let position = |number| Position::new(Txid::new(Epoch::new(1, 1), number), Checksum::EMPTY);
        let replica = |node, synced: Option<u64>, applied: Option<u64>| ReplicaStatus {
            peer: PeerInfo {
                node: NodeId::from_u128(node),
                incarnation: Incarnation::NIL,
                addresses: Addresses::default(),
            },
            key: None,
            follower: node == 5,
            applied: applied.map(position),
            synced: synced.map(position),
            since: std::time::SystemTime::UNIX_EPOCH,
        };
        let replicas = vec![
            replica(1, None, None),
            replica(2, Some(5), Some(7)),
            replica(3, Some(5), Some(8)),
            replica(4, Some(6), Some(6)),
            replica(5, Some(9), Some(9)),
        ];
        let nodes: Vec<NodeId> = best_known(replicas).iter().map(|peer| peer.node).collect();
        assert_eq!(nodes, [4, 3, 2, 1].map(NodeId::from_u128));
    }
}
