//! The head of a request that asks for a channel inside of its body.
//!
//! It keeps strangers away from TLS at an endpoint that is mounted in a public server, and is no
//! more than that: who recorded one can begin TLS, and has to prove the secret there.

use std::collections::{HashSet, VecDeque};
use std::sync::Mutex;

use http::HeaderMap;

use crate::error::Result;
use crate::handshake::{Asker, H_NODE, H_NONCE, H_PROOF, H_VERSION, Nonce, Stranger, VERSION};
use crate::handshake::{field, nonce, text};
use crate::hex::{hex, unhex};
use crate::lock::lock;
use crate::peer::NodeId;
use crate::secret::{Keyring, Purpose};

/// What follows the replication endpoint's path in the URL of a channel.
pub(crate) const TUNNEL_PATH: &str = "/v1/tunnel";

/// Who asks for a channel, as that one says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct TunnelKnock {
    pub(crate) version: u32,
    node: NodeId,
    nonce: Nonce,
}

impl TunnelKnock {
    /// The headers of a fresh one.
    pub(crate) fn headers(asker: &Asker) -> Result<HeaderMap> {
        let knock = TunnelKnock { version: VERSION, node: asker.node, nonce: nonce()? };
        let proof = asker.keys.prove(Purpose::Tunnel, &knock.parts(&knock.version.to_le_bytes()));
        let mut headers = HeaderMap::new();
        headers.insert(H_VERSION, knock.version.into());
        headers.insert(H_NODE, text(&knock.node.to_string())?);
        headers.insert(H_NONCE, text(&hex(&knock.nonce))?);
        headers.insert(H_PROOF, text(&hex(&proof))?);
        Ok(headers)
    }

    pub(crate) fn read(headers: &HeaderMap, keys: &Keyring) -> Result<TunnelKnock, Stranger> {
        let fields = || {
            let knock = TunnelKnock {
                version: field(headers, &H_VERSION)?.parse().ok()?,
                node: field(headers, &H_NODE)?.parse().ok()?,
                nonce: unhex(field(headers, &H_NONCE)?)?,
            };
            Some((knock, unhex::<32>(field(headers, &H_PROOF)?)?))
        };
        let (knock, proof) = fields().ok_or(Stranger::Passer)?;
        let proved = keys.verify(Purpose::Tunnel, &knock.parts(&knock.version.to_le_bytes()), &proof);
        if proved { Ok(knock) } else { Err(Stranger::OtherSecret(knock.node)) }
    }

    /// The node that it names.
    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn nonce(&self) -> &Nonce {
        &self.nonce
    }

    fn parts<'a>(&'a self, version: &'a [u8]) -> [&'a [u8]; 3] {
        [&self.nonce, self.node.as_bytes(), version]
    }
}

/// The heads that were used last at a node, by their nonces. A recorded one is worth nothing there
/// before so many others were used after it.
#[derive(Default, Debug)]
pub(crate) struct UsedHeads(Mutex<(HashSet<Nonce>, VecDeque<Nonce>)>);

/// The most that are remembered: 64 bytes each.
const USED_MAX: usize = 4096;

impl UsedHeads {
    /// Whether it is used for the first time.
    pub(crate) fn first(&self, nonce: &Nonce) -> Result<(), Stranger> {
        let (used, order) = &mut *lock(&self.0);
        if !used.insert(*nonce) {
            return Err(Stranger::Passer);
        }
        order.push_back(*nonce);
        if order.len() > USED_MAX
            && let Some(oldest) = order.pop_front()
        {
            used.remove(&oldest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_head_is_none_until_many_others_came() {
        let used = UsedHeads::default();
        let head = |number: usize| {
            let mut nonce = [0; 32];
            nonce[..8].copy_from_slice(&number.to_le_bytes());
            nonce
        };
        for number in 0..USED_MAX {
            used.first(&head(number)).unwrap();
        }
        for number in 0..USED_MAX {
            assert_eq!(used.first(&head(number)), Err(Stranger::Passer), "{number}");
        }
        used.first(&head(USED_MAX)).unwrap();
        used.first(&head(0)).unwrap();
        let (used, order) = &*lock(&used.0);
        assert_eq!((used.len(), order.len()), (USED_MAX, USED_MAX));
    }
}
