//! What all requests share: so much for all together, so much of it for one client, and a reserve
//! for those that cost little.
//!
//! A client is told by its address. One that has none counts among all only.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::lock::lock;

/// A number of places, or of bytes.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    /// For all together.
    total: usize,
    /// For one client.
    share: usize,
    used: Arc<Mutex<Used>>,
}

#[derive(Debug, Default)]
struct Used {
    total: usize,
    /// No client that has nothing is in it.
    of: HashMap<IpAddr, usize>,
}

/// How much of it may be taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Demand {
    /// Everything.
    All,
    /// Three quarters, of the total as of a client's share. The rest is there for demands on all.
    Unreserved,
}

impl Demand {
    fn most(self, of: usize) -> usize {
        match self {
            Demand::All => of,
            Demand::Unreserved => of - of / 4,
        }
    }
}

impl Shares {
    pub(super) fn new(total: usize, share: usize) -> Shares {
        Shares { total, share, used: Arc::default() }
    }

    /// A place for a request of this client.
    pub(super) fn place(&self, client: Option<IpAddr>, demand: Demand) -> Option<Taken> {
        let mut taken = self.nothing(client);
        taken.more(1, demand).then_some(taken)
    }

    /// Nothing yet, for a request of this client.
    pub(super) fn nothing(&self, client: Option<IpAddr>) -> Taken {
        Taken { of: self.clone(), client, amount: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Used> {
        lock(&self.used)
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.lock().total
    }
}

/// What a request has of it. Dropping it gives that back.
#[derive(Debug)]
pub(super) struct Taken {
    of: Shares,
    client: Option<IpAddr>,
    amount: usize,
}

impl Taken {
    /// Takes so much more, if there is as much.
    pub(super) fn more(&mut self, amount: usize, demand: Demand) -> bool {
        let mut used = self.of.lock();
        let fits = |used: usize, most| used.checked_add(amount).is_some_and(|sum| sum <= demand.most(most));
        let own = |client| used.of.get(client).copied().unwrap_or(0);
        let has_share = self.client.as_ref().is_none_or(|client| fits(own(client), self.of.share));
        if !has_share || !fits(used.total, self.of.total) {
            return false;
        }
        if amount > 0 {
            used.total += amount;
            if let Some(client) = self.client {
                *used.of.entry(client).or_default() += amount;
            }
            self.amount += amount;
        }
        true
    }

    /// Gives all of it back, and may take some again.
    pub(super) fn give_back(&mut self) {
        let amount = std::mem::take(&mut self.amount);
        if amount == 0 {
            return;
        }
        let mut used = self.of.lock();
        used.total -= amount;
        if let Some(client) = self.client
            && let Some(own) = used.of.get_mut(&client)
        {
            *own -= amount;
            if *own == 0 {
                used.of.remove(&client);
            }
        }
    }

    /// What it was taken from.
    pub(super) fn of(&self) -> &Shares {
        &self.of
    }

    pub(super) fn client(&self) -> Option<IpAddr> {
        self.client
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.amount == 0
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    #[test]
    fn who_is_refused_a_place_gives_none_back() {
        let shares = Shares::new(2, 2);
        let places: Vec<_> = (0..3).map(|_| shares.place(client(1), Demand::All)).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        assert_eq!(shares.used(), 2, "the third took none");
        drop(places);
        assert_eq!(shares.used(), 0);
        assert!(shares.place(None, Demand::All).is_some());
    }

    #[test]
    fn one_client_takes_its_share_and_leaves_the_rest_to_others() {
        let shares = Shares::new(10, 4);
        let mut places: Vec<_> = (0..9).filter_map(|_| shares.place(client(1), Demand::All)).collect();
        assert_eq!(places.len(), 4);
        places.extend((0..9).filter_map(|_| shares.place(client(2), Demand::All)));
        assert_eq!(places.len(), 8);
        places.extend((0..9).filter_map(|_| shares.place(None, Demand::All)));
        assert_eq!(places.len(), 10, "who has no address counts among all");
        assert!(shares.place(client(3), Demand::All).is_none(), "all together");
        places.remove(0);
        assert!(shares.place(client(2), Demand::All).is_none(), "its share is used up");
        assert!(shares.place(client(1), Demand::All).is_some());
    }

    #[test]
    fn a_quarter_of_the_total_and_of_each_share_is_a_reserve() {
        let shares = Shares::new(16, 8);
        let usual: Vec<_> = (0..9).filter_map(|_| shares.place(client(1), Demand::Unreserved)).collect();
        assert_eq!(usual.len(), 6);
        let first: Vec<_> = (0..9).filter_map(|_| shares.place(client(1), Demand::All)).collect();
        assert_eq!(first.len(), 2, "the reserve of the same client");
        let others: Vec<_> = (0..9).filter_map(|_| shares.place(client(2), Demand::Unreserved)).collect();
        assert_eq!(others.len(), 4, "up to three quarters of all");
        assert!(shares.place(client(3), Demand::Unreserved).is_none());
        assert!(shares.place(client(3), Demand::All).is_some());
        // Small limits leave no reserve.
        assert!(Shares::new(1, 1).place(client(1), Demand::Unreserved).is_some());
    }

    #[test]
    fn amounts_grow_and_no_client_stays_that_has_nothing() {
        let shares = Shares::new(100, 60);
        let mut bytes = shares.nothing(client(1));
        assert!(bytes.more(0, Demand::All) && shares.lock().of.is_empty());
        assert!(bytes.more(40, Demand::All) && !bytes.more(21, Demand::All) && bytes.more(20, Demand::All));
        assert!(!bytes.more(usize::MAX, Demand::All), "no sum overflows");
        assert_eq!((shares.used(), shares.lock().of.len()), (60, 1));
        bytes.give_back();
        bytes.give_back();
        assert_eq!((shares.used(), shares.lock().of.len()), (0, 0));
        assert!(bytes.more(60, Demand::All));
        drop(bytes);
        assert_eq!((shares.used(), shares.lock().of.len()), (0, 0));
    }
}
