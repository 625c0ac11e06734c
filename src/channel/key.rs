//! The key pair that a node has for its channels.

use std::fmt;

use crate::error::Result;

/// A private key. Empty in a build without TLS.
pub(crate) struct ChannelKey(Vec<u8>);

impl fmt::Debug for ChannelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChannelKey(..)")
    }
}

impl ChannelKey {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::NoRandom`](crate::Error::NoRandom).
    #[cfg(feature = "tls")]
    pub(crate) fn generate() -> Result<ChannelKey> {
        use ring::rand::SystemRandom;
        use ring::signature::Ed25519KeyPair;
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let made = made.map_err(|_| crate::error::Error::NoRandom("no key pair can be made".into()))?;
        Ok(ChannelKey(made.as_ref().to_vec()))
    }

    #[cfg(not(feature = "tls"))]
    pub(crate) fn generate() -> Result<ChannelKey> {
        Ok(ChannelKey(Vec::new()))
    }

    /// From its bytes.
    pub(crate) fn from_pkcs8(bytes: &[u8]) -> ChannelKey {
        ChannelKey(bytes.to_vec())
    }

    /// The private key, PKCS#8, DER.
    pub(crate) fn pkcs8(&self) -> &[u8] {
        &self.0
    }
}
