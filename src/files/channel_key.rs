//! The key pair that a node has for its channels, in the state directory.
//!
//! `channel-key` is a sealed file, `repchkey`, of version 1, for its owner alone. Its fields: the
//! id of the node that the key is of, 16, and the private key (Ed25519, PKCS#8, DER).

use std::path::Path;

use crate::channel::ChannelKey;
use crate::error::{Error, Result};
#[cfg(test)]
use crate::files::sealed::CHECK_BYTES;
use crate::files::sealed::Sealed;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::files::{self, PRIVATE, Paths, set_mode};
use crate::peer::NodeId;

const SEALED: Sealed = Sealed {
    magic: *b"repchkey",
    oldest: 1,
    version: 1,
    max_bytes: 1024,
    cure: "is the key that the node shows to others, and no more than that: remove it, and the node makes \
           itself a new one",
};

impl ChannelKey {
    /// The key of this node, from the state directory. At the node's first start it is made, and
    /// when the directory is a copy of another node's, which keeps its own.
    ///
    /// # Errors
    /// [`Error::Corrupt`](crate::Error::Corrupt), [`Error::Newer`](crate::Error::Newer),
    /// [`Error::Io`](crate::Error::Io), [`Error::NoRandom`](crate::Error::NoRandom).
    pub(crate) fn of_node(paths: &Paths, node: NodeId) -> Result<ChannelKey> {
        if cfg!(not(feature = "tls")) {
            return ChannelKey::generate();
        }
        let path = paths.channel_key();
        if let Some(fields) = SEALED.read(&path)? {
            let (id, key) = decode(&path, &fields)?;
            if id == node.as_bytes() {
                // Somebody may have copied it with other rights.
                let file = files::open(&path).map_err(Error::io("open", &path))?;
                set_mode(&file, &path, PRIVATE)?;
                return Ok(ChannelKey::from_pkcs8(key));
            }
        }
        let key = ChannelKey::generate()?;
        SEALED.replace(&path, &[node.as_bytes().as_slice(), key.pkcs8()].concat())?;
        Ok(key)
    }
}

/// The node that a key is of, and the key.
fn decode<'a>(path: &Path, fields: &'a [u8]) -> Result<(&'a [u8; 16], &'a [u8])> {
    let parts = fields.split_first_chunk().filter(|(_, key)| !key.is_empty());
    parts.ok_or_else(|| SEALED.corrupt(path, "too short"))
}

/// Reads bytes as such a file, as they are and before a hash that fits, and uses the key.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_channel_key(data: &[u8]) {
    let path = Path::new("channel-key");
    let sealed = [data, &check_of(data)].concat();
    for bytes in [data, &sealed] {
        if let Ok(fields) = SEALED.decode(path, bytes)
            && let Ok((_, key)) = decode(path, fields)
        {
            let _ = crate::channel::Channel::new(&ChannelKey::from_pkcs8(key), None);
        }
    }
}

#[cfg(test)]
pub(crate) fn fuzz_channel_key_seed() -> Result<Vec<u8>> {
    let key = ChannelKey::generate()?;
    let whole = SEALED.seal(&[NodeId::from_u128(5).as_bytes().as_slice(), key.pkcs8()].concat());
    Ok(whole[..whole.len() - CHECK_BYTES].to_vec())
}
