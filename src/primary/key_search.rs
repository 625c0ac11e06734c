//! A node that is to be the primary, and whose keys are gone, asks the replicas that connect for
//! them. All nodes of a database have the same.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::checksum::Fingerprint;
use crate::keys::DatabaseKeys;
use crate::peer::NodeId;
use crate::wire::{Hello, PeerKeys};

/// What is looked for, and what was found.
#[derive(Debug)]
pub(crate) struct KeySearch {
    /// Which page key the files here go with. Another one would be of no use.
    key: Fingerprint,
    found: watch::Sender<Option<(DatabaseKeys, NodeId)>>,
}

impl KeySearch {
    pub(crate) fn new(key: Fingerprint) -> Arc<KeySearch> {
        Arc::new(KeySearch { key, found: watch::Sender::new(None) })
    }

    /// The keys, and the replica that had them; none when no replica says them in this time.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub(crate) async fn finish(&self, limit: Duration) -> Option<(DatabaseKeys, NodeId)> {
        let mut found = self.found.subscribe();
        let found = tokio::time::timeout(limit, found.wait_for(Option::is_some)).await;
        // The sender is ours.
        found.ok()?.ok().and_then(|found| *found)
    }

    /// A replica says its keys.
    pub(super) fn offer(&self, hello: &Hello) {
        let PeerKeys { page, token: Some(token) } = hello.keys else { return };
        if page.fingerprint() != self.key {
            return;
        }
        let keys = DatabaseKeys { page, token };
        self.found.send_if_modified(|found| {
            let first = found.is_none();
            found.get_or_insert((keys, hello.peer.node));
            first
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Incarnation;
    use crate::status::{Addresses, PeerInfo};
    use crate::txid::EpochHistory;

    fn hello(id: u128, keys: PeerKeys) -> Hello {
        let (node, incarnation) = (NodeId::from_u128(id), Incarnation::NIL);
        Hello {
            proof: [0; 32],
            keys,
            peer: PeerInfo { node, incarnation, addresses: Addresses::default() },
            position: None,
            history: EpochHistory::default(),
            resume: None,
            suspect: false,
            marks: Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_replica_with_the_key_of_the_files_gives_its_keys_and_no_other() {
        let ours = DatabaseKeys::fixed(7);
        let search = KeySearch::new(ours.page.fingerprint());
        search.offer(&hello(1, PeerKeys::of(DatabaseKeys::fixed(8), true)));
        assert_eq!(search.finish(Duration::from_secs(10)).await, None);
        // A node that makes no tokens has no key for them.
        search.offer(&hello(2, PeerKeys { page: ours.page, token: None }));
        search.offer(&hello(3, PeerKeys::of(ours, true)));
        assert_eq!(search.finish(Duration::MAX).await, Some((ours, NodeId::from_u128(3))));
    }
}
