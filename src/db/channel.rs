//! Who may be part of the cluster, changed while everything runs.

use crate::db::Db;
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::peer::PeerKey;
use crate::secret::Secret;

impl Db {
    /// Replaces the cluster's secrets while everything runs, the newest first. A node proves with
    /// the first and accepts all: give every node `[old, new]`, then every node `[new, old]`, then
    /// `[new]`. Where the old one got out, give every node `[new]` at once: the page
    /// [Trust](crate::guide::trust#when-a-secret-got-out) says what else to do. A stream that was
    /// opened with a secret that is not among them ends at once. Secrets of followers stay as they
    /// are.
    ///
    /// # Errors
    /// [`Error::Config`] when there are too many, or one is of followers, too; when the node had no
    /// secret and is to have one, or the reverse; and on a follower.
    pub fn rotate_secrets(&self, secrets: &[Secret]) -> Result<()> {
        self.inner.node.keys.rotate(secrets)
    }

    /// The same for the secrets of followers ([`Config::follower_secret`]). On a member they may be
    /// none: then it lets no follower in. Streams of followers that were opened with another secret
    /// end at once, and no others. A member answers by the secret that a follower proved: give all
    /// members `[new, old]`, then each follower `[new]`, then all members `[new]`.
    ///
    /// [`Config::follower_secret`]: crate::Config::follower_secret
    ///
    /// ```
    /// # fn example(member: replite::Db) -> Result<(), replite::Error> {
    /// member.rotate_follower_secrets(&[])?; // no followers any more
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] when there are too many, or one is of members, too; for none on a
    /// follower; and on a node without a secret.
    pub fn rotate_follower_secrets(&self, secrets: &[Secret]) -> Result<()> {
        self.inner.node.keys.rotate_followers(secrets)
    }

    /// Shuts nodes out by their keys ([`Status::key`](crate::Status::key)), these and no others
    /// from now on. What stands with them is cut at once, both ways: their streams, and this node's
    /// own stream when the primary is one of them. A connection of theirs is dropped as soon as TLS
    /// has shown the key.
    ///
    /// Each node has its own list, and forgets it when it ends: see
    /// [`Config::shut_out`](crate::Config::shut_out). A key is what a node keeps, and no more. Who
    /// has the secret can make another key, and dial with that. So this is for the time until the
    /// secret is replaced ([`Db::rotate_secrets`]), or for a node that is only in the way. Without
    /// TLS ([`Config::plaintext`](crate::Config::plaintext)) there are no keys, and nothing is shut
    /// out.
    ///
    /// ```
    /// # fn example(db: replite::Db) -> Result<(), replite::Error> {
    /// let stolen = "5f0c2a11".repeat(8).parse().expect("64 digits"); // by another node's status
    /// db.shut_out([stolen])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for more than 1,024 keys, or for this node's own. All is as before then.
    pub fn shut_out(&self, keys: impl IntoIterator<Item = PeerKey>) -> Result<()> {
        self.inner.node.channel.set_shut_out(keys)
    }
}
