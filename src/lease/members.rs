//! The instances themselves.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::lease::{Lease, LeaseKind};
use crate::net::Endpoint;

/// See [`Members`].
pub(crate) const LEASE_TIME_OF_MEMBERS: Duration = Duration::from_secs(3);
/// The least lease time: Raft's timers are parts of it.
pub(crate) const LEASE_TIME_MIN_OF_MEMBERS: Duration = Duration::from_secs(2);
/// So many may keep a record.
const LISTED_MAX: usize = 9;

/// The instances keep the lease's record among themselves: nothing else has to run.
///
/// They agree on it by Raft (the crate `openraft`). Only the record goes through that, four times
/// in a lease time: no commit of the database does.
///
/// ```
/// use replite::{Config, lease};
///
/// let members = ["replite://10.0.0.1:7000", "replite://10.0.0.2:7000", "replite://10.0.0.3:7000"];
/// let config = Config::new("data/app.db")
///     .listen(([10, 0, 0, 1], 7000).into())
///     .lease(lease::Members::new(members));
/// # drop(config);
/// ```
///
/// The URLs are those of the members' replication endpoints, as
/// [`Addresses::replication`](crate::Addresses::replication) has them, the same on all nodes. A
/// node whose own is among them is a member. All others are replicas that read the record, and may
/// lead; they have no vote. Three members survive the loss of one, five of two. Two survive
/// nothing: a [`Witness`](crate::Witness) makes them three.
///
/// The list is how members begin, and find each other. They begin when every one of them answers,
/// names the same list, and has no state of a cluster; at most one may have a database with
/// content, which becomes the first primary. So [`Config::bootstrap`](crate::Config::bootstrap) is
/// not needed. From then on the members know by themselves who they are:
/// [`Db::add_member`](crate::Db::add_member) and [`Db::remove_member`](crate::Db::remove_member)
/// change it.
///
/// The lease time is 3 s if [`Config::lease_time`](crate::Config::lease_time) does not say it, and
/// 2 s at least. It has to be twenty times the round trip between members: 2 s are enough for one
/// of 100 ms, 3 s for 150 ms, and 6 s for 300 ms. Where a round trip takes a fifteenth of it or
/// more, the members agree on nothing, and there is no primary.
///
/// What members agreed on is in `members/` in the state directory of each. It is never restored
/// from a backup: a member that forgot what it promised could promise twice. One whose directory is
/// gone comes back by itself, as a new member in the place of the old one, as long as most of the
/// others are there.
#[derive(Clone, Debug)]
pub struct Members {
    urls: Vec<String>,
}

impl Members {
    /// The members' replication endpoints.
    pub fn new<U: Into<String>>(urls: impl IntoIterator<Item = U>) -> Members {
        Members { urls: urls.into_iter().map(Into::into).collect() }
    }

    /// The URLs in their normal form, sorted.
    ///
    /// # Errors
    /// [`Error::Config`]: one is no URL of a replication endpoint, or named twice, or there are too
    /// many or none.
    pub(crate) fn list(&self) -> Result<Vec<String>> {
        let urls = self.urls.iter().map(|url| Endpoint::parse(url).map(|to| to.to_string()));
        let mut urls = urls.collect::<Result<Vec<String>>>()?;
        urls.sort_unstable();
        if let Some(twice) = urls.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Config(format!("lease::Members names {} twice", twice[0])));
        }
        if !(1..=LISTED_MAX).contains(&urls.len()) {
            let found = urls.len();
            return Err(Error::Config(format!(
                "lease::Members: {found} members; 1 to {LISTED_MAX} are possible"
            )));
        }
        Ok(urls)
    }
}

impl From<Members> for Lease {
    fn from(members: Members) -> Lease {
        Lease(LeaseKind::Members(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_the_same_whatever_its_order_and_spelling() {
        let list = |urls: &[&str]| Members::new(urls.iter().copied()).list();
        let one = list(&["replite://b:2", "http://a:80/_replite/"]).unwrap();
        assert_eq!(one, list(&["http://a", "replite://b:2/"]).unwrap());
        for bad in [&[][..], &["ftp://a"], &["replite://a:1", "replite://a:1/"], &["http://a"; 10]] {
            assert!(matches!(list(bad), Err(Error::Config(_))), "{bad:?}");
        }
    }
}
