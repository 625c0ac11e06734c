//! The store of a lease, with what runs on the election's runtime for it.

use std::sync::Arc;

use crate::lease::{Store, Stored};
#[cfg(feature = "members")]
use crate::members::MemberNode;

/// A store that was given, or the one that this node keeps with others.
#[derive(Clone)]
pub(crate) struct LeaseStore {
    pub(super) store: Arc<dyn Store>,
    #[cfg(feature = "members")]
    member: Option<Arc<MemberNode>>,
}

impl LeaseStore {
    pub(crate) fn given(store: Arc<dyn Store>) -> LeaseStore {
        LeaseStore {
            store,
            #[cfg(feature = "members")]
            member: None,
        }
    }

    #[cfg(feature = "members")]
    pub(crate) fn members(member: Arc<MemberNode>) -> LeaseStore {
        LeaseStore { store: member.clone(), member: Some(member) }
    }
}

#[cfg(feature = "members")]
impl LeaseStore {
    pub(crate) fn has_members(&self) -> bool {
        self.member.is_some()
    }

    /// The newest record that this node had before this start, where it keeps it with others.
    pub(super) fn on_disk(&self) -> Option<Stored> {
        self.member.as_ref()?.on_disk()
    }

    /// On the runtime on which this is called.
    pub(super) fn start(&self) {
        if let Some(member) = &self.member {
            member.start();
        }
    }

    /// Returns when what was started has ended; the node stops already.
    pub(super) async fn end(&self) {
        if let Some(member) = &self.member {
            member.end().await;
        }
    }

    /// How many nodes start the cluster, where the members say it.
    pub(super) fn starters(&self) -> Option<usize> {
        self.member.as_ref()?.starters()
    }
}

#[cfg(not(feature = "members"))]
impl LeaseStore {
    pub(crate) fn has_members(&self) -> bool {
        false
    }

    pub(super) fn on_disk(&self) -> Option<Stored> {
        None
    }

    pub(super) fn start(&self) {}

    pub(super) async fn end(&self) {}

    pub(super) fn starters(&self) -> Option<usize> {
        None
    }
}
