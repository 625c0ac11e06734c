//! Where the doors of a node find the member that it is.

#[cfg(feature = "members")]
use std::sync::{Arc, OnceLock};

#[cfg(feature = "members")]
use tokio::sync::Semaphore;

#[cfg(feature = "members")]
use crate::members::MemberNode;

/// Connections at one time on which a member is asked: those of other members, of replicas that
/// read the record, and of operators.
#[cfg(feature = "members")]
pub(crate) const PLACES_MAX: usize = 64;
/// Those of them that guests can keep: peers that bring none of Raft's messages. So members always
/// find one.
#[cfg(feature = "members")]
const GUESTS_MAX: usize = PLACES_MAX - 16;

/// Bytes of long questions that are worked on at one time, of all connections: what members can
/// take of the memory.
#[cfg(feature = "members")]
pub(super) const LONG_MAX_BYTES: usize = 16 * 1024 * 1024;

/// Empty until the node is opened as one that keeps the record; without the feature it stays so.
#[derive(Clone, Debug, Default)]
pub(crate) struct MembersDoor {
    #[cfg(feature = "members")]
    member: Arc<OnceLock<OpenDoor>>,
}

#[cfg(feature = "members")]
#[derive(Debug)]
struct OpenDoor {
    member: Arc<MemberNode>,
    places: Arc<Semaphore>,
    shared: SharedRoom,
}

/// What all connections share.
#[cfg(feature = "members")]
#[derive(Clone, Debug)]
pub(crate) struct SharedRoom {
    /// Places that guests keep.
    pub(super) guests: Arc<Semaphore>,
    /// Bytes of long questions.
    pub(super) long: Arc<Semaphore>,
}

#[cfg(feature = "members")]
impl MembersDoor {
    /// Others may ask from now on.
    pub(crate) fn open(&self, member: Arc<MemberNode>) {
        let [places, guests, long] =
            [PLACES_MAX, GUESTS_MAX, LONG_MAX_BYTES].map(|most| Arc::new(Semaphore::new(most)));
        let _ = self.member.set(OpenDoor { member, places, shared: SharedRoom { guests, long } });
    }

    pub(crate) fn get(&self) -> Option<&Arc<MemberNode>> {
        self.member.get().map(|door| &door.member)
    }

    /// Places for those who ask, each for as long as its connection lives.
    pub(crate) fn places(&self) -> Option<&Arc<Semaphore>> {
        self.member.get().map(|door| &door.places)
    }

    /// What their connections share.
    pub(crate) fn shared(&self) -> Option<&SharedRoom> {
        self.member.get().map(|door| &door.shared)
    }
}
