//! Keys that this node has nothing to do with.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::peer::PeerKey;

/// The most keys that are shut out at one time.
pub(crate) const SHUT_OUT_MAX: usize = 1024;

/// Shared: a change is seen everywhere at once.
#[derive(Clone, Debug)]
pub(super) struct ShutOut {
    keys: Arc<watch::Sender<BTreeSet<PeerKey>>>,
    /// Those that were met, and told.
    told: Arc<Mutex<BTreeSet<PeerKey>>>,
}

impl Default for ShutOut {
    fn default() -> ShutOut {
        ShutOut { keys: Arc::new(watch::Sender::new(BTreeSet::new())), told: Arc::default() }
    }
}

impl ShutOut {
    pub(super) fn replace(
        &self,
        keys: impl IntoIterator<Item = PeerKey>,
        own: Option<PeerKey>,
    ) -> Result<()> {
        let mut set = BTreeSet::new();
        for key in keys {
            if own == Some(key) {
                return Err(Error::Config("a node can't shut itself out".into()));
            }
            set.insert(key);
            if set.len() > SHUT_OUT_MAX {
                return Err(Error::Config(format!("at most {SHUT_OUT_MAX} keys can be shut out")));
            }
        }
        lock(&self.told).retain(|key| set.contains(key));
        self.keys.send_replace(set);
        Ok(())
    }

    pub(super) fn has(&self, key: PeerKey) -> bool {
        self.keys.borrow().contains(&key)
    }

    /// Returns when the key is among them.
    pub(super) async fn until(&self, key: PeerKey) {
        // The sender is ours.
        let _ = self.keys.subscribe().wait_for(|keys| keys.contains(&key)).await;
    }

    /// Whether it is among them, and was not told.
    pub(super) fn is_news(&self, key: PeerKey) -> bool {
        self.has(key) && lock(&self.told).insert(key)
    }
}

/// The other side's key is shut out.
#[derive(Debug)]
struct KeyIsShutOut(PeerKey);

impl fmt::Display for KeyIsShutOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its key {} is shut out here", self.0)
    }
}

impl std::error::Error for KeyIsShutOut {}

pub(super) fn error(key: PeerKey) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, KeyIsShutOut(key))
}

/// The key of the other side, if that is why a channel came to nothing.
pub(crate) fn key_of(error: &io::Error) -> Option<PeerKey> {
    error.get_ref()?.downcast_ref::<KeyIsShutOut>().map(|shut_out| shut_out.0)
}
