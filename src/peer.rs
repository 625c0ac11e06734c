//! Who a node is: the id that it keeps, and the one of its present run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::hex::{hex, unhex};
use crate::parse::ParseError;

/// The id of a node. The node keeps it over restarts, in its state directory; a copy of that
/// directory gets an id of its own.
///
/// The text form, which JSON has, too, is that of a UUID.
///
/// ```
/// use replite::NodeId;
///
/// let text = "0198c5a0-4f3e-7cc1-b2a4-9d6f00e1c7aa";
/// let node: NodeId = text.parse()?;
/// assert_eq!(node.to_string(), text);
/// assert!("primary".parse::<NodeId>().is_err());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(Uuid);

/// The id of one run of a node: each start makes a new one. Two that are there at the same time
/// with one [`NodeId`] are two processes.
///
/// ```
/// use replite::Incarnation;
///
/// let (before, now) = (Incarnation::from_u128(1), Incarnation::from_u128(2));
/// assert_ne!(before, now);
/// assert_eq!(now.to_string(), "00000000-0000-0000-0000-000000000002");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incarnation(Uuid);

impl NodeId {
    /// One for a node that starts for the first time: the ids of later nodes sort after it.
    pub(crate) fn random() -> NodeId {
        NodeId(Uuid::now_v7())
    }
}

impl Incarnation {
    /// One for a node that starts.
    pub(crate) fn random() -> Incarnation {
        Incarnation(Uuid::new_v4())
    }
}

macro_rules! id {
    ($type:ident, $what:literal) => {
        impl $type {
            /// No node's.
            pub(crate) const NIL: $type = $type(Uuid::nil());

            /// From its number.
            pub const fn from_u128(number: u128) -> $type {
                $type(Uuid::from_u128(number))
            }

            /// As a number.
            pub const fn as_u128(self) -> u128 {
                self.0.as_u128()
            }

            /// As files and proofs have it.
            pub(crate) fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $type {
            type Err = ParseError;

            fn from_str(text: &str) -> Result<$type, ParseError> {
                text.parse().map($type).map_err(|_| ParseError::new($what, text))
            }
        }
    };
}

id!(NodeId, "node id");
id!(Incarnation, "incarnation");

/// Names the key pair that a node has for its channels: the BLAKE3 hash of its public key
/// (SubjectPublicKeyInfo, DER). A node makes the pair at its birth and keeps it. Beside the
/// [`NodeId`], which a node only claims, this is what it can prove.
///
/// The text form, which JSON has, too, is 64 hexadecimal digits.
///
/// ```
/// use replite::PeerKey;
///
/// let text = "0f".repeat(32);
/// let key: PeerKey = text.parse()?;
/// assert_eq!(key.to_string(), text);
/// assert!("0f".parse::<PeerKey>().is_err());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey([u8; PeerKey::BYTES]);

impl PeerKey {
    pub(crate) const BYTES: usize = 32;

    /// Of a public key.
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "no node has a key then"))]
    pub(crate) fn of(public_key: &[u8]) -> PeerKey {
        PeerKey(blake3::derive_key("replite 2026 v1 peer key", public_key))
    }

    pub(crate) fn as_bytes(&self) -> &[u8; PeerKey::BYTES] {
        &self.0
    }
}

/// A key as log lines have it: its first eight digits, or `none` on a connection without TLS.
#[derive(Clone, Copy)]
pub(crate) struct ShortKey(pub(crate) Option<PeerKey>);

impl fmt::Display for ShortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(key) => f.pad(&hex(&key.0[..4])),
            None => f.pad("none"),
        }
    }
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PeerKey {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<PeerKey, ParseError> {
        unhex(text).map(PeerKey).ok_or_else(|| ParseError::new("peer key", text))
    }
}

impl Serialize for PeerKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<PeerKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json_are_those_of_the_uuid() {
        let (uuid, node) = (Uuid::from_u128(7), NodeId::from_u128(7));
        assert_eq!(node.to_string(), uuid.to_string());
        assert_eq!(format!("{node:?}"), format!("{uuid:?}"));
        assert_eq!(serde_json::to_string(&node).unwrap(), serde_json::to_string(&uuid).unwrap());
        assert_eq!(serde_json::from_str::<NodeId>(&format!("\"{uuid}\"")).unwrap(), node);
        assert_eq!(node.as_bytes(), uuid.as_bytes());
        assert_eq!(node.as_bytes(), &7_u128.to_be_bytes());
        assert_eq!(node.to_string().parse::<NodeId>().unwrap(), node);
        assert_eq!("7".parse::<NodeId>(), Err(ParseError::new("node id", "7")));
    }
}
