//! Places for channels that are inside of requests, and heads that were used.

use std::sync::Arc;

use crate::handshake::{Refusal, UsedHeads};
use crate::net::{CameFrom, DoorLimits, DoorPlace, DoorPlaces};
use crate::peer::NodeId;

/// Room for all the replicas and for peers that ask. Who recorded heads of one node takes a few of
/// the places that are there before a proof.
const LIMITS: DoorLimits =
    DoorLimits { unproved: 32, of_source: 8, proved: 256, followers: 128, forwards: 512 };

/// All places at one door, and the heads that were used there.
#[derive(Debug)]
pub(super) struct Tunnels {
    places: Arc<DoorPlaces>,
    used: UsedHeads,
    knocks: UsedHeads,
}

impl Tunnels {
    pub(super) fn new() -> Arc<Tunnels> {
        let (used, knocks) = (UsedHeads::default(), UsedHeads::default());
        Arc::new(Tunnels { places: DoorPlaces::new(LIMITS), used, knocks })
    }

    /// Heads of tunnels that were used.
    pub(super) fn used(&self) -> &UsedHeads {
        &self.used
    }

    /// Knocks that were used in the clear, where nothing binds them to a connection.
    pub(super) fn knocks(&self) -> &UsedHeads {
        &self.knocks
    }

    /// A place for a channel that begins. Another one goes where there is none.
    pub(super) fn begin(&self, node: NodeId) -> Result<DoorPlace, Refusal> {
        let (place, _) = self.places.enter(CameFrom::Node(node)).ok_or(Refusal::Busy)?;
        Ok(place)
    }
}
