//! Certificates of a PKI of one's own: what the configuration says of them, and their bytes.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Certificates for the channel between nodes, from a PKI of one's own: see
/// [`Config::tls`](crate::Config::tls). All files are PEM, of 1 MiB each at most.
///
/// ```
/// use replite::Certificates;
///
/// let certificates = Certificates::new("tls/node.pem", "tls/node.key", "tls/ca.pem")
///     .names(["node-1.db.internal", "node-2.db.internal"]);
/// # drop(certificates);
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
#[must_use = "certificates do nothing before they are given to `Config::tls`"]
pub struct Certificates {
    chain: PathBuf,
    key: PathBuf,
    roots: PathBuf,
    names: Vec<String>,
}

impl Certificates {
    /// From three files.
    ///
    /// - `chain`: this node's certificate, and after it those between it and a root.
    /// - `key`: its private key (PKCS#8, PKCS#1 or SEC1), which no other user may read. A file that
    ///   belongs to root may be readable for its group.
    /// - `roots`: the certificates of the authorities that a peer's certificate may come from.
    ///
    /// [`Certificates::names`] has to say which names are let in.
    pub fn new(
        chain: impl Into<PathBuf>,
        key: impl Into<PathBuf>,
        roots: impl Into<PathBuf>,
    ) -> Certificates {
        Certificates { chain: chain.into(), key: key.into(), roots: roots.into(), names: Vec::new() }
    }

    /// Allows peers whose certificate is valid for one of these DNS names or IP addresses, as its
    /// subject alternative names say. There has to be one at least. Another call adds more.
    ///
    /// A name of the list is a whole one. A certificate for `*.db.internal` is valid for each
    /// `node-1.db.internal` of the list.
    pub fn names<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Certificates {
        self.names.extend(names.into_iter().map(Into::into));
        self
    }

    /// The names that are let in.
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "no peer has a name then"))]
    pub(crate) fn allowed(&self) -> &[String] {
        &self.names
    }

    /// Where the certificate is, the key, and the roots.
    pub(crate) fn paths(&self) -> [&Path; 3] {
        [&self.chain, &self.key, &self.roots]
    }

    /// # Errors
    /// [`Error::Config`] where no name is allowed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.names.is_empty() {
            return Err(Error::Config(
                "`Config::tls` lets no peer in: give the names of the nodes by `Certificates::names`".into(),
            ));
        }
        Ok(())
    }
}

/// What is in the three files.
pub(crate) struct CertificateBytes {
    pub(crate) chain: Vec<u8>,
    pub(crate) key: Vec<u8>,
    pub(crate) roots: Vec<u8>,
}

impl CertificateBytes {
    /// Tells what is in the files from what else was in them.
    pub(crate) fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.chain, &self.key, &self.roots] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        hasher.finalize()
    }
}

impl fmt::Debug for CertificateBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CertificateBytes(..)")
    }
}
