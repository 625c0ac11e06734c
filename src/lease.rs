//! Who is the primary: fixed by configuration, or the holder of a lease.
//!
//! A lease is a [record](Store) in a store that all nodes reach. One node holds it, renews it, and
//! is the primary. The store is a register with compare-and-swap and nothing else: [`Store`].

use std::sync::Arc;
use std::time::Duration;

mod directory;
#[cfg(feature = "etcd")]
mod etcd;
mod fixed;
#[cfg(feature = "members")]
mod members;
#[cfg(feature = "object-store")]
mod object_store;
pub(crate) mod record;
mod store;
mod text;

pub use directory::Directory;
#[cfg(feature = "etcd")]
pub use etcd::Etcd;
pub use fixed::Fixed;
#[cfg(feature = "members")]
pub use members::Members;
#[cfg(feature = "members")]
pub(crate) use members::{LEASE_TIME_MIN_OF_MEMBERS, LEASE_TIME_OF_MEMBERS};
#[cfg(feature = "object-store")]
pub use object_store::ObjectStore;
pub use store::{ReadError, Store, StoreFuture, Stored, SwapError, Version};

/// How the primary is found; for [`Config::lease`](crate::Config::lease), which takes [`Fixed`] and
/// every [`Store`]. A text says it as well: it has [`FromStr`](#impl-FromStr-for-Lease).
#[derive(Clone, Debug)]
pub struct Lease(pub(crate) LeaseKind);

/// The ways.
#[derive(Clone, Debug)]
pub(crate) enum LeaseKind {
    /// The configuration says it.
    Fixed(Fixed),
    /// The holder of a lease, whose record is there.
    Store(Arc<dyn Store>),
    /// The holder of a lease, whose record these nodes keep.
    #[cfg(feature = "members")]
    Members(Members),
}

impl Lease {
    /// How long it counts without a renewal, where
    /// [`Config::lease_time`](crate::Config::lease_time) does not say it. None where the
    /// configuration says who leads.
    pub fn lease_time(&self) -> Option<Duration> {
        match &self.0 {
            LeaseKind::Fixed(_) => None,
            LeaseKind::Store(store) => Some(store.lease_time()),
            #[cfg(feature = "members")]
            LeaseKind::Members(_) => Some(LEASE_TIME_OF_MEMBERS),
        }
    }
}

impl From<Fixed> for Lease {
    fn from(fixed: Fixed) -> Lease {
        Lease(LeaseKind::Fixed(fixed))
    }
}

impl<S: Store> From<S> for Lease {
    fn from(store: S) -> Lease {
        Lease(LeaseKind::Store(Arc::new(store)))
    }
}

impl From<Arc<dyn Store>> for Lease {
    fn from(store: Arc<dyn Store>) -> Lease {
        Lease(LeaseKind::Store(store))
    }
}
