//! The replicas that are connected.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::peer::{Incarnation, NodeId, PeerKey, ShortKey};
use crate::secret::Rights;
use crate::status::{PeerInfo, ReplicaStatus};
use crate::wire::Ack;

/// A replica that acknowledged within this time is alive: another process with its id is a mistake.
/// After it, the other process is taken for the same node, started again after its host had
/// vanished.
const ALIVE: Duration = Duration::from_secs(3);

/// What a peer has proved of itself, beside that it may be here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Credentials {
    /// None on a connection without TLS.
    pub(crate) key: Option<PeerKey>,
    pub(crate) rights: Rights,
}

impl Credentials {
    pub(crate) fn is_follower(self) -> bool {
        self.rights == Rights::Follower
    }
}

/// Another live process uses the node id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Conflict {
    /// Its key.
    pub(crate) key: Option<PeerKey>,
}

impl Conflict {
    /// What that means of a peer with this key.
    pub(crate) fn words(self, key: Option<PeerKey>) -> String {
        let (there, came) = (ShortKey(self.key), ShortKey(key));
        match (self.key, key) {
            (Some(_), Some(_)) if self.key == key => format!(
                "another live process has this node id and this key, {came}: a state directory is used \
                twice, such as by a clone of its machine"
            ),
            (Some(_), Some(_)) => format!(
                "another live process, of key {there}, has this node id, which comes with key {came} now: \
                the id was copied, or is made up"
            ),
            _ => format!("another live process has this node id (key {there}, and {came} of this one)"),
        }
    }
}

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
    by: Credentials,
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
    pub(crate) fn conflict(&self, of: (NodeId, Incarnation), by: Credentials) -> Option<Conflict> {
        conflict(&self.lock(), of, by)
    }

    /// Takes a slot. Of two streams of one process the newest wins: the older one is a connection
    /// that broke without our knowing. Of two processes with one id the one that is there and alive
    /// wins; but a member always wins over a follower, which can claim any id.
    pub(crate) fn join(&self, peer: &PeerInfo, by: Credentials) -> Result<ReplicaSlot, Conflict> {
        let mut slots = self.lock();
        if let Some(conflict) = conflict(&slots, (peer.node, peer.incarnation), by) {
            return Err(conflict);
        }
        slots.serial += 1;
        let serial = slots.serial;
        let replaced = CancellationToken::new();
        let since = SystemTime::now();
        let status = ReplicaStatus {
            peer: peer.clone(),
            key: by.key,
            follower: by.is_follower(),
            applied: None,
            synced: None,
            since,
        };
        let entry = SlotEntry { serial, status, by, heard: Instant::now(), replaced: replaced.clone() };
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

fn conflict(
    slots: &ReplicaSlots,
    (node, incarnation): (NodeId, Incarnation),
    by: Credentials,
) -> Option<Conflict> {
    let entry = slots.by_node.get(&node)?;
    let there = entry.by;
    let stays = match (there.rights, by.rights) {
        (Rights::Member, Rights::Follower) => true,
        (Rights::Follower, Rights::Member) => false,
        _ => {
            let other = entry.status.peer.incarnation != incarnation || there.key != by.key;
            other && entry.heard.elapsed() < ALIVE
        }
    };
    stays.then_some(Conflict { key: there.key })
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

    fn by(byte: &str, rights: Rights) -> Credentials {
        Credentials { key: Some(byte.repeat(32).parse().unwrap()), rights }
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_takes_no_members_place_and_a_key_takes_none_of_another() {
        let registry = Registry::default();
        let (key, other) = (by("01", Rights::Member), by("02", Rights::Member));
        let member = registry.join(&peer(1, 1), key).unwrap();
        let conflict = registry.join(&peer(1, 1), other).unwrap_err();
        assert_eq!(conflict.key, key.key, "of the same run, as it says");
        let words = conflict.words(other.key);
        assert!(words.contains("of key 01010101") && words.contains("key 02020202"), "{words}");
        assert!(words.contains("made up"), "{words}");
        let words = registry.conflict(peer_id(1, 2), key).unwrap().words(key.key);
        assert!(words.contains("used twice"), "{words}");
        tokio::time::advance(ALIVE).await;
        assert!(registry.join(&peer(1, 1), by("01", Rights::Follower)).is_err(), "also after its time");
        registry.join(&peer(2, 1), by("03", Rights::Follower)).map(drop).unwrap();
        let claims = registry.join(&peer(2, 1), by("03", Rights::Follower)).unwrap();
        let owner = registry.join(&peer(2, 7), other).unwrap();
        claims.replaced().await;
        let list = registry.list();
        assert_eq!(
            list.iter().map(|r| (r.key, r.follower)).collect::<Vec<_>>(),
            [(key.key, false), (other.key, false)]
        );
        drop((member, owner));
    }

    fn peer_id(node: u128, incarnation: u128) -> (NodeId, Incarnation) {
        (NodeId::from_u128(node), Incarnation::from_u128(incarnation))
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_stream_of_a_process_and_the_older_of_two_live_processes_win() {
        let registry = Registry::default();
        let by = Credentials { key: None, rights: Rights::Member };
        let first = registry.join(&peer(1, 1), by).unwrap();
        let second = registry.join(&peer(1, 1), by).unwrap();
        first.replaced().await;
        drop(first);
        assert_eq!(registry.list().len(), 1, "the older seat does not take the newer one away");
        assert_eq!(registry.join(&peer(1, 2), by).unwrap_err(), Conflict { key: None });
        tokio::time::advance(ALIVE - Duration::from_millis(1)).await;
        second.heard(Ack { applied: None, synced: None, clock: 0 });
        tokio::time::advance(ALIVE - Duration::from_millis(1)).await;
        assert_eq!(registry.conflict(peer_id(1, 2), by), Some(Conflict { key: None }));
        tokio::time::advance(Duration::from_millis(1)).await;
        let third = registry.join(&peer(1, 2), by).unwrap();
        second.replaced().await;
        drop((second, third));
        assert!(registry.list().is_empty());
    }
}
