//! Who leads, as the configuration says it.

use std::time::Duration;

use crate::db::config::Config;
use crate::lease::Lease;

/// See [`Config::failover_loss`].
pub(super) const FAILOVER_LOSS: Duration = Duration::from_secs(10);
/// See [`Config::drain_limit`].
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// The longest that can be set.
const DRAIN_LIMIT_MAX: Duration = Duration::from_secs(3600);

impl Config {
    /// Who is the primary. This node, if not set: [`Fixed::primary`](crate::lease::Fixed::primary).
    ///
    /// With a [`Store`](crate::lease::Store), such as
    /// [`lease::Directory`](crate::lease::Directory), all nodes have the same configuration, and
    /// the one that holds the lease is the primary. When it ends or can't be reached, another one
    /// takes over.
    ///
    /// ```
    /// use replite::{Config, lease};
    ///
    /// let fixed = Config::new("app.db").lease(lease::Fixed::replica_of("http://10.0.0.1:8080"));
    /// let elected = Config::new("app.db").lease(lease::Directory::new("lease")).bootstrap(3);
    /// # drop((fixed, elected));
    /// ```
    pub fn lease(mut self, lease: impl Into<Lease>) -> Config {
        self.lease = lease.into();
        self
    }

    /// How long the lease counts when its holder does not renew it, from one second to a minute. It
    /// is what a crash of the primary costs, about. The store's
    /// [`lease_time`](crate::lease::Store::lease_time) if not set.
    ///
    /// The holder renews it four times in that time. It stops acknowledging commits at four fifths
    /// of it. A node that takes the lease over keeps the time that the record has; the holder
    /// brings in its own with its next renewal.
    pub fn lease_time(mut self, time: Duration) -> Config {
        self.lease_time = Some(time);
        self
    }

    /// How much a node may lack of what the last primary had, in time, and still take the lease by
    /// itself. Ten seconds if not set. What is lost at the most, when a primary is gone for ever,
    /// is this and the lease time. What such a primary had and no other node has is kept in its
    /// [`Db::lost`](crate::Db::lost) when it returns.
    ///
    /// A node that lacks more waits, and says so ([`WaitReason::Behind`](crate::WaitReason)), until
    /// a better one comes or an operator decides: [`Db::promote_unchecked`](crate::Db).
    pub fn failover_loss(mut self, limit: Duration) -> Config {
        self.failover_loss = limit;
        self
    }

    /// How long a primary that hands its lease over waits for the requests that run on it before it
    /// refuses their writes: three seconds if not set, an hour at most. See
    /// [`Db::handoff`](crate::Db::handoff). Meanwhile all nodes hold new requests that write, so
    /// the layer's [`hold_timeout`](crate::ReplayLayer::hold_timeout) should be longer.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// let config = replite::Config::new("app.db").drain_limit(Duration::from_secs(2));
    /// # drop(config);
    /// ```
    pub fn drain_limit(mut self, limit: Duration) -> Config {
        self.drain_limit = limit.min(DRAIN_LIMIT_MAX);
        self
    }

    /// Whether this node may take the lease. Yes if not set. One that may not stays a
    /// replica.
    pub fn candidate(mut self, candidate: bool) -> Config {
        self.candidate = candidate;
        self
    }

    /// How many nodes start the cluster, the same number on all. When the store has no record, and
    /// so many nodes are there, of which none has been part of a cluster, one of them becomes the
    /// primary. That is the one whose database has content, else the one with the lowest id.
    ///
    /// After that it has no effect, and may stay. A record that is gone later is no first start:
    /// nodes that have been part of a cluster wait then, and say so.
    pub fn bootstrap(mut self, nodes: usize) -> Config {
        self.bootstrap = Some(nodes);
        self
    }
}
