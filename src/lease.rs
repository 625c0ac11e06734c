//! Who is the primary: fixed by configuration, or the holder of a lease.
//!
//! A lease is a [record](Store) in a store that all nodes reach. One node holds it, renews it, and
//! is the primary. The store is a register with compare-and-swap and nothing else: [`Store`].

use std::sync::Arc;

mod directory;
mod fixed;
pub(crate) mod record;
mod store;

pub use directory::Directory;
pub use fixed::Fixed;
pub use store::{ReadError, Store, StoreFuture, Stored, SwapError, Version};

/// How the primary is found; for [`Config::lease`](crate::Config::lease), which takes [`Fixed`] and
/// every [`Store`].
#[derive(Clone, Debug)]
pub struct Lease(pub(crate) LeaseKind);

/// The two ways.
#[derive(Clone, Debug)]
pub(crate) enum LeaseKind {
    /// The configuration says it.
    Fixed(Fixed),
    /// The holder of a lease, whose record is there.
    Store(Arc<dyn Store>),
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
