//! The replicas that are connected.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::peer::{Incarnation, NodeId};
use crate::status::{PeerInfo, ReplicaStatus};
use crate::wire::Ack;

/// A replica that acknowledged within this time is alive: another process with its id is a mistake.
/// After it, the other process is taken for the same node, started again after its host had
/// vanished.
const ALIVE: Duration = Duration::from_secs(3);

/// Another live process uses the node id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Conflict;

#[derive(Debug, Default, Clone)]
pub(crate) struct Registry {
    slots: Arc<Mutex<ReplicaSlots>>,
}

#[derive(Debug, Default)]
struct ReplicaSlots {
    by_node: HashMap<NodeId, SlotEntry>,
    serial: u64,
}

#[derive(Debug)]
struct SlotEntry {
    serial: u64,
    status: ReplicaStatus,
    heard: Instant,
    replaced: CancellationToken,
}

/// A replica's place; it is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct ReplicaSlot {
    registry: Registry,
    node: NodeId,
    serial: u64,
    replaced: CancellationToken,
}

impl Registry {
    /// Whether another live process is connected under this node id.
    pub(crate) fn conflict(&self, node: NodeId, incarnation: Incarnation) -> Option<Conflict> {
        conflict(&self.lock(), node, incarnation)
    }

    /// Takes a slot. Of two streams of one process the newest wins: the older one is a connection
    /// that broke without our knowing. Of two processes with one id the one that is there and alive
    /// wins.
    pub(crate) fn join(&self, peer: &PeerInfo) -> Result<ReplicaSlot, Conflict> {
        let mut slots = self.lock();
        if let Some(conflict) = conflict(&slots, peer.node, peer.incarnation) {
            return Err(conflict);
        }
        slots.serial += 1;
        let serial = slots.serial;
        let replaced = CancellationToken::new();
        let since = SystemTime::now();
        let status = ReplicaStatus { peer: peer.clone(), applied: None, synced: None, since };
        let entry = SlotEntry { serial, status, heard: Instant::now(), replaced: replaced.clone() };
        if let Some(older) = slots.by_node.insert(peer.node, entry) {
            older.replaced.cancel();
        }
        drop(slots);
        Ok(ReplicaSlot { registry: self.clone(), node: peer.node, serial, replaced })
    }

    pub(crate) fn list(&self) -> Vec<ReplicaStatus> {
        let mut list: Vec<_> = self.lock().by_node.values().map(|e| e.status.clone()).collect();
        list.sort_by_key(|status| status.peer.node);
        list
    }

    fn lock(&self) -> MutexGuard<'_, ReplicaSlots> {
        lock(&self.slots)
    }
}

fn conflict(slots: &ReplicaSlots, node: NodeId, incarnation: Incarnation) -> Option<Conflict> {
    let entry = slots.by_node.get(&node)?;
    let other = entry.status.peer.incarnation != incarnation;
    (other && entry.heard.elapsed() < ALIVE).then_some(Conflict)
}

impl ReplicaSlot {
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    /// Notes an acknowledgement.
    pub(crate) fn heard(&self, ack: Ack) {
        let mut slots = self.registry.lock();
        if let Some(entry) = slots.by_node.get_mut(&self.node)
            && entry.serial == self.serial
        {
            entry.status.applied = ack.applied;
            entry.status.synced = ack.synced;
            entry.heard = Instant::now();
        }
    }

    /// Something came from the replica, though no acknowledgement.
    pub(crate) fn alive(&self) {
        let mut slots = self.registry.lock();
        if let Some(entry) = slots.by_node.get_mut(&self.node)
            && entry.serial == self.serial
        {
            entry.heard = Instant::now();
        }
    }

    /// Returns when a newer stream of the same node took the slot.
    pub(crate) async fn replaced(&self) {
        self.replaced.cancelled().await;
    }
}

impl Drop for ReplicaSlot {
    fn drop(&mut self) {
        let mut slots = self.registry.lock();
        if slots.by_node.get(&self.node).is_some_and(|e| e.serial == self.serial) {
            slots.by_node.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Addresses;

    fn peer(node: u128, incarnation: u128) -> PeerInfo {
        PeerInfo {
            node: NodeId::from_u128(node),
            incarnation: Incarnation::from_u128(incarnation),
            addresses: Addresses::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_stream_of_a_process_and_the_older_of_two_live_processes_win() {
        let registry = Registry::default();
        let first = registry.join(&peer(1, 1)).unwrap();
        let second = registry.join(&peer(1, 1)).unwrap();
        first.replaced().await;
        drop(first);
        assert_eq!(registry.list().len(), 1, "the older seat does not take the newer one away");
        assert_eq!(registry.join(&peer(1, 2)).unwrap_err(), Conflict);
        tokio::time::advance(ALIVE - Duration::from_millis(1)).await;
        second.heard(Ack { applied: None, synced: None, clock: 0 });
        tokio::time::advance(ALIVE - Duration::from_millis(1)).await;
        assert_eq!(registry.conflict(NodeId::from_u128(1), Incarnation::from_u128(2)), Some(Conflict));
        tokio::time::advance(Duration::from_millis(1)).await;
        let third = registry.join(&peer(1, 2)).unwrap();
        second.replaced().await;
        drop((second, third));
        assert!(registry.list().is_empty());
    }
}
