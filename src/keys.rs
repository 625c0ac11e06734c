//! The keys of a database: what its pages are hashed with, and what its tokens are proved with.
//!
//! All nodes of a database have the same. They are drawn at its birth, and have nothing to do with
//! the cluster's secret: a rotation of that leaves them as they are.

use std::fmt;
use std::sync::Mutex;

use subtle::ConstantTimeEq;

use crate::checksum::{PAGE_KEY_BYTES, PageKey};
use crate::error::Error;
use crate::lock::lock;
use crate::random;
use crate::secret::SHORT_PROOF_BYTES;

/// Bytes of the key of tokens.
pub(crate) const TOKEN_KEY_BYTES: usize = 32;

/// The keys of a database.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DatabaseKeys {
    /// What pages are hashed with.
    pub(crate) page: PageKey,
    /// What tokens are proved with.
    pub(crate) token: TokenKey,
}

impl DatabaseKeys {
    /// New random keys.
    ///
    /// # Errors
    /// [`Error::NoRandom`].
    pub(crate) fn random() -> Result<DatabaseKeys, Error> {
        let page = PageKey::from_bytes(random::array::<PAGE_KEY_BYTES>()?);
        Ok(DatabaseKeys { page, token: TokenKey(random::array()?) })
    }

    /// Those of the test's database.
    #[cfg(any(test, all(fuzzing, feature = "testing")))]
    pub(crate) const fn fixed(byte: u8) -> DatabaseKeys {
        let page = PageKey::from_bytes([byte; PAGE_KEY_BYTES]);
        DatabaseKeys { page, token: TokenKey([byte; TOKEN_KEY_BYTES]) }
    }
}

/// The key of a database's tokens. Who has it can make some, and nothing else.
#[derive(Clone, Copy)]
pub(crate) struct TokenKey([u8; TOKEN_KEY_BYTES]);

impl TokenKey {
    pub(crate) const fn from_bytes(bytes: [u8; TOKEN_KEY_BYTES]) -> TokenKey {
        TokenKey(bytes)
    }

    pub(crate) const fn to_bytes(self) -> [u8; TOKEN_KEY_BYTES] {
        self.0
    }

    /// A proof over the parts.
    pub(crate) fn prove(&self, parts: &[&[u8]]) -> [u8; SHORT_PROOF_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut short = [0; SHORT_PROOF_BYTES];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..SHORT_PROOF_BYTES]);
        short
    }

    /// Whether a proof over the parts was made with this key.
    pub(crate) fn verify(&self, parts: &[&[u8]], proof: &[u8; SHORT_PROOF_BYTES]) -> bool {
        self.prove(parts).ct_eq(proof).into()
    }
}

impl PartialEq for TokenKey {
    fn eq(&self, other: &TokenKey) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for TokenKey {}

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(..)")
    }
}

/// The keys that a node has by now. A replica takes those of the primary that it follows.
#[derive(Debug)]
pub(crate) struct KeysInUse(Mutex<DatabaseKeys>);

impl KeysInUse {
    pub(crate) fn new(keys: DatabaseKeys) -> KeysInUse {
        KeysInUse(Mutex::new(keys))
    }

    pub(crate) fn get(&self) -> DatabaseKeys {
        *lock(&self.0)
    }

    /// The disk has these.
    pub(crate) fn set(&self, keys: DatabaseKeys) {
        *lock(&self.0) = keys;
    }
}
