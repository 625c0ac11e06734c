//! How a node speaks with others, as the configuration says it.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::channel::{Certificates, Plaintext, no_feature};
use crate::db::config::Config;
use crate::error::{Error, Result};
use crate::lease::LeaseKind;
use crate::net::{Endpoint, Scheme};
use crate::peer::PeerKey;
use crate::secret::Secret;

/// What a node without a secret is told.
const NO_SECRET: &str = "nodes that reach each other need a secret in common: `Config::secret`, or on one \
    machine `Config::secret_file`; only `Config::plaintext(Plaintext::Loopback)` does without one";

/// What a node is told that has the secret of followers only, and is to lead.
const FOLLOWER_LEADS: &str = "a node that has a `follower_secret` only never leads: give it a `secret`, or \
    a primary by `lease`";

impl Config {
    /// The cluster's secret, the same on all nodes: [`Secret::new`] says how to make one. Who has
    /// it is a member of the cluster, and reads and writes everything.
    ///
    /// Nodes that prove it to each other need nothing else to replicate in private. Each has a key
    /// pair of its own, which it makes at its first start, and they speak TLS 1.3. Requests that
    /// the layer forwards do not go there: they are as private as the application's address. The
    /// page [Trust](crate::guide::trust) has all of it.
    pub fn secret(self, secret: Secret) -> Config {
        self.secrets([secret])
    }

    /// Several secrets that are valid at once, the newest first; see
    /// [`Db::rotate_secrets`](crate::Db::rotate_secrets).
    pub fn secrets(mut self, secrets: impl IntoIterator<Item = Secret>) -> Config {
        self.secrets = secrets.into_iter().collect();
        self
    }

    /// Reads the cluster's secret from a file, and makes one there when the file is missing: see
    /// [`Secret::from_file`]. For nodes of one machine that share a directory, and for nodes to
    /// which something else brings the file. It is read when the database is opened, and not again:
    /// [`Db::rotate_secrets`](crate::Db::rotate_secrets) leaves it as it is. The directory that it
    /// is in has to be there, unless that is the database's.
    pub fn secret_file(mut self, path: impl Into<PathBuf>) -> Config {
        self.secret_file = Some(path.into());
        self
    }

    /// The secret of followers. A follower is a replica that is served, and that is all. It never
    /// leads, and nothing that it says changes anything on a member: no page, no epoch, no lease,
    /// no command. It makes no tokens ([`Db::token`](crate::Db::token)), and no member takes its
    /// word that a request comes from a node. It reads all of the database.
    ///
    /// On a member this stands beside [`Config::secret`], and lets followers in. On a follower it
    /// is the only secret: the node has the rights of that. It follows a fixed primary, or with a
    /// store the one that holds the lease; give it read access to the store, and no more.
    ///
    /// A follower can't tell a member from another follower that poses as one: both prove this
    /// secret. So followers believe each other what they show, and no member believes them. Where
    /// they must not, give each its own secret of several ([`Config::follower_secrets`]).
    ///
    /// ```
    /// use replite::{Config, Secret, lease};
    ///
    /// # fn main() -> Result<(), replite::Error> {
    /// let (secret, followers) = (Secret::generate()?, Secret::generate()?);
    /// let primary = Config::new("a.db")
    ///     .listen("10.0.0.1:7001".parse().unwrap())
    ///     .secret(secret)
    ///     .follower_secret(followers.clone());
    /// let follower = Config::new("b.db")
    ///     .lease(lease::Fixed::replica_of("replite://10.0.0.1:7001"))
    ///     .follower_secret(followers);
    /// # drop((primary, follower));
    /// # Ok(())
    /// # }
    /// ```
    pub fn follower_secret(self, secret: Secret) -> Config {
        self.follower_secrets([secret])
    }

    /// Several secrets of followers that are valid at once, the newest first, eight at most; see
    /// [`Config::follower_secret`] and
    /// [`Db::rotate_follower_secrets`](crate::Db::rotate_follower_secrets). A member answers each
    /// follower by the secret that it proved.
    pub fn follower_secrets(mut self, secrets: impl IntoIterator<Item = Secret>) -> Config {
        self.follower_secrets = secrets.into_iter().collect();
        self
    }

    /// Keys of nodes that this one has nothing to do with, 1,024 at most; see
    /// [`Db::shut_out`](crate::Db::shut_out).
    pub fn shut_out(mut self, keys: impl IntoIterator<Item = PeerKey>) -> Config {
        self.shut_out = keys.into_iter().collect();
        self
    }

    /// Lets this node speak with others without TLS. It is the only way to have none, and the node
    /// says so at each start.
    ///
    /// Such a node dials `http://` addresses in the clear, and answers peers that do. Where its
    /// peer speaks TLS only, so does it, and it answers both. So a cluster goes over to TLS, or
    /// back, one node after the other: those with it, and those without, understand each other as
    /// long as all are built with the feature `tls`.
    ///
    /// ```
    /// use replite::{Config, Plaintext, lease};
    ///
    /// // Two processes of one machine, which need no secret.
    /// let primary = Config::new("a.db")
    ///     .plaintext(Plaintext::Loopback)
    ///     .listen("127.0.0.1:7001".parse().unwrap());
    /// let replica = Config::new("b.db")
    ///     .plaintext(Plaintext::Loopback)
    ///     .lease(lease::Fixed::replica_of("http://127.0.0.1:7001"));
    /// # drop((primary, replica));
    /// ```
    pub fn plaintext(mut self, allowed: Plaintext) -> Config {
        self.plaintext = Some(allowed);
        self
    }

    /// Mutual TLS with certificates of a PKI of one's own, in place of keys that any peer takes.
    /// All nodes of a cluster have it, or none. The secret is proved besides, for that very
    /// connection.
    ///
    /// A peer's certificate has to come from one of the roots, to be valid now, and for one of the
    /// names. A node dials and is dialled with the same one. So where it says what it is for
    /// (extended key usage), it has to be both: servers and clients. The address that was dialled
    /// does not matter. No revocation list is asked.
    ///
    /// The files are read when the database is opened, and again when they change, which is looked
    /// at every two seconds. New connections have the new certificates then, and those that stand
    /// stay. What can't be used then is told ([`Status::problem`](crate::Status::problem)), and
    /// what was there before stays in use. So the certificates of a cluster are renewed, and its
    /// roots replaced, while it runs: first give all nodes both roots, then each its new
    /// certificate, then take the old root out. A certificate of another key gives the node
    /// another [`PeerKey`](crate::PeerKey).
    ///
    /// ```
    /// use replite::{Certificates, Config, Secret};
    ///
    /// # fn main() -> Result<(), replite::Error> {
    /// let config = Config::new("app.db")
    ///     .secret(Secret::generate()?)
    ///     .listen("0.0.0.0:7000".parse().unwrap())
    ///     .tls(
    ///         Certificates::new("tls/node.pem", "tls/node.key", "tls/ca.pem")
    ///             .names(["node-1.db.internal", "node-2.db.internal"]),
    ///     );
    /// # drop(config);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Opening the database fails with [`Error::Io`] for a file that can't be read, and with
    /// [`Error::Config`] for one that can't be used: it has no certificate or no key, the key is of
    /// another certificate, others can read it. So it does without a name, and in a build without
    /// the feature `tls`. A certificate that has expired is told, and is no error.
    pub fn tls(mut self, certificates: Certificates) -> Config {
        self.certificates = Some(certificates);
        self
    }

    /// Serves the replication endpoint on a listener of its own; best on an address that the public
    /// can't reach. A stranger there reads nothing, and can keep replicas out by holding all
    /// connections. Other nodes reach it at `replite://host:port`, which is what this node
    /// advertises if [`Config::addresses`] says nothing else. Where it listens on all addresses
    /// (`0.0.0.0:7000`, `[::]:7000`), the host is that of [`Config::advertise`].
    ///
    /// An address that is in use is waited for, a second long: the process before this one may be
    /// about to end. Its files may be in use for longer.
    pub fn listen(mut self, address: SocketAddr) -> Config {
        self.listen = Some(address);
        self
    }

    /// Whether the streams to replicas are compressed (zstd): commits always, pages and a backlog
    /// where the link is slower than they come. Yes if not set. It is for this node to say while it
    /// is the primary. Compressed lengths tell somebody on the path more of what was written than
    /// plain ones do: see [the guide on trust](crate::guide::trust).
    pub fn compression(mut self, compress: bool) -> Config {
        self.compression = compress;
        self
    }

    /// What this node speaks with others in, or would.
    pub(super) fn check_channel(&self) -> Result<()> {
        if !self.secrets.is_empty() && self.secret_file.is_some() {
            return Err(Error::Config("`secret` and `secret_file` are both set: one of them".into()));
        }
        let is_follower = self.is_follower();
        let primary = match &self.lease.0 {
            LeaseKind::Fixed(fixed) => fixed.primary_url().map(Endpoint::parse).transpose()?,
            _ => None,
        };
        if is_follower && matches!(&self.lease.0, LeaseKind::Fixed(_)) && primary.is_none() {
            return Err(Error::Config(FOLLOWER_LEADS.into()));
        }
        let elects = !matches!(self.lease.0, LeaseKind::Fixed(_));
        let is_told = !self.addresses.app.is_empty() || !self.addresses.replication.is_empty();
        let has_peers = self.listen.is_some() || primary.is_some() || elects || is_told;
        if has_peers && !self.has_secret() && self.plaintext != Some(Plaintext::Loopback) {
            return Err(Error::Config(NO_SECRET.into()));
        }
        if has_peers && self.plaintext.is_none() && cfg!(not(feature = "tls")) {
            return Err(no_feature());
        }
        if primary.is_some_and(|primary| primary.scheme == Scheme::Replite) && cfg!(not(feature = "tls")) {
            return Err(no_feature());
        }
        if let Some(certificates) = &self.certificates {
            certificates.check()?;
            if cfg!(not(feature = "tls")) {
                return Err(no_feature());
            }
        }
        match (self.plaintext, self.listen) {
            (Some(Plaintext::Loopback), Some(address)) if !address.ip().to_canonical().is_loopback() => {
                Err(Error::Config(format!(
                    "`Plaintext::Loopback` needs a listener on a loopback address, not on {address}"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Whether it has something to prove to others.
    pub(super) fn has_secret(&self) -> bool {
        !self.secrets.is_empty() || self.secret_file.is_some() || !self.follower_secrets.is_empty()
    }

    /// Whether it has no other secret than one of followers.
    pub(in crate::db) fn is_follower(&self) -> bool {
        self.secrets.is_empty() && self.secret_file.is_none() && !self.follower_secrets.is_empty()
    }

    /// The secrets of members. Blocks.
    pub(in crate::db) fn all_secrets(&self) -> Result<Vec<Secret>> {
        match &self.secret_file {
            Some(path) => Ok(vec![Secret::from_file(path)?]),
            None => Ok(self.secrets.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Fixed;

    fn refused(config: Config) -> String {
        match config.check() {
            Err(Error::Config(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn config() -> Config {
        Config::new("a.db")
    }

    fn secret() -> Secret {
        Secret::fixed([7; 32])
    }

    #[test]
    fn a_node_with_peers_has_a_secret_or_says_that_it_wants_none() {
        let (loopback, any) = ("127.0.0.1:1".parse().unwrap(), "0.0.0.0:1".parse().unwrap());
        assert!(config().check().is_ok(), "alone");
        for with_peers in [config().listen(loopback), config().lease(Fixed::replica_of("http://x:1"))] {
            assert!(refused(with_peers.clone()).contains("secret_file"));
            assert!(refused(with_peers.clone().plaintext(Plaintext::AnyNetwork)).contains("need a secret"));
            assert!(with_peers.clone().plaintext(Plaintext::Loopback).check().is_ok());
            assert_eq!(with_peers.clone().secret(secret()).check().is_ok(), cfg!(feature = "tls"));
            assert!(with_peers.secret(secret()).plaintext(Plaintext::AnyNetwork).check().is_ok());
        }
        let said = refused(config().listen(any).secret(secret()).plaintext(Plaintext::Loopback));
        assert!(said.contains("loopback address"), "{said}");
        let told = config().listen(any).advertise("http://10.0.0.1:8080").secret(secret());
        assert!(told.plaintext(Plaintext::AnyNetwork).check().is_ok());
        assert!(refused(config().secret(secret()).secret_file("secret")).contains("one of them"));
    }

    #[test]
    fn a_follower_has_a_primary_and_a_member_may_have_both_secrets() {
        let follower = config().follower_secret(secret());
        assert!(follower.is_follower() && refused(follower.clone()).contains("never leads"));
        let follower = follower.lease(Fixed::replica_of("http://x:1"));
        assert_eq!(follower.check().is_ok(), cfg!(feature = "tls"));
        let member = config().secret(Secret::fixed([8; 32])).follower_secret(secret());
        assert!(!member.is_follower() && member.check().is_ok());
        assert!(!config().secret_file("secret").follower_secret(secret()).is_follower());
    }
}
