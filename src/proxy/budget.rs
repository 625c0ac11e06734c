//! How much is kept of bodies, and what is kept of one.

use std::net::IpAddr;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

use crate::proxy::shares::{Demand, Shares, Taken};

/// Bodies up to this size may use the reserve: most forms and calls fit.
const SMALL_BYTES: usize = 4 * 1024;

/// How much may be kept of bodies.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    /// Bytes of one request.
    pub(super) request: usize,
    /// For how long something is kept for a client that falls silent within its body.
    pub(super) idle: Duration,
    /// Bytes of all requests together, and of one client.
    shares: Shares,
}

impl Budget {
    /// A client has an eighth of the process's bytes, but no less than two of its requests need.
    pub(super) fn new(request: usize, process: usize, idle: Duration) -> Budget {
        let share = (process / 8).max(request.saturating_mul(2)).min(process);
        Budget { request, idle, shares: Shares::new(process, share) }
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> usize {
        self.shares.used()
    }
}

/// What is kept of one body.
pub(super) struct Kept {
    pub(super) data: BytesMut,
    pub(super) trailers: Option<HeaderMap>,
    most: usize,
    /// As far as is known, the whole body may use the reserve.
    small: bool,
    taken: Taken,
}

impl Kept {
    /// Nothing yet of this client's body, whose length is no more than the hint where there is one.
    pub(super) fn new(budget: &Budget, client: Option<IpAddr>, hint: Option<u64>) -> Kept {
        let small = hint.is_none_or(|bytes| bytes <= SMALL_BYTES as u64);
        let taken = budget.shares.nothing(client);
        Kept { data: BytesMut::new(), trailers: None, most: budget.request, small, taken }
    }

    /// All of it; nothing is left here.
    pub(super) fn take(&mut self) -> Kept {
        let taken = self.taken.of().nothing(self.taken.client());
        let nothing = Kept { data: BytesMut::new(), trailers: None, taken, ..*self };
        std::mem::replace(self, nothing)
    }

    /// Adds this, if it may be kept.
    pub(super) fn add(&mut self, data: &Bytes) -> bool {
        if data.len() > self.most.saturating_sub(self.data.len()) {
            return false;
        }
        let small = self.small && self.data.len() + data.len() <= SMALL_BYTES;
        if !self.taken.more(data.len(), if small { Demand::All } else { Demand::Unreserved }) {
            return false;
        }
        // Copied: a frame of one byte may hold on to a whole read buffer.
        self.data.extend_from_slice(data);
        true
    }

    /// What is kept by now does not count for what may be kept of the body.
    pub(super) fn count_anew(&mut self) {
        self.most = self.most.saturating_add(self.data.len());
    }

    pub(super) fn clear(&mut self) {
        self.data = BytesMut::new();
        self.trailers = None;
        self.taken.give_back();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.taken.is_nothing()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1024;

    fn client(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn budget() -> Budget {
        Budget::new(64 * KIB, 1024 * KIB, Duration::from_secs(60))
    }

    /// A body of which so much is kept in pieces of 1 KiB.
    fn kept(budget: &Budget, last: u8, length: Option<usize>, bytes: usize) -> (Kept, bool) {
        let mut kept = Kept::new(budget, client(last), length.map(|bytes| bytes as u64));
        let piece = Bytes::from_static(&[b'x'; KIB]);
        let all = (0..bytes / KIB).all(|_| kept.add(&piece));
        (kept, all)
    }

    #[test]
    fn one_client_fills_its_share_and_no_more() {
        let budget = budget();
        let bodies: Vec<_> = (0..16).map(|_| kept(&budget, 1, Some(64 * KIB), 64 * KIB)).collect();
        assert_eq!(budget.used(), 96 * KIB, "three quarters of an eighth");
        assert!(bodies[0].1 && !bodies[15].1);
        assert!(kept(&budget, 2, Some(64 * KIB), 64 * KIB).1);
        assert!(kept(&budget, 1, Some(4 * KIB), 4 * KIB).1, "a small one of the same client");
        drop(bodies);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn large_bodies_of_many_clients_leave_a_reserve_for_small_ones() {
        let budget = budget();
        let bodies: Vec<_> = (0..64).map(|last| kept(&budget, last, Some(64 * KIB), 64 * KIB)).collect();
        assert_eq!(budget.used(), 768 * KIB);
        assert!(!kept(&budget, 99, Some(8 * KIB), 8 * KIB).1);
        assert!(kept(&budget, 99, Some(4 * KIB), 4 * KIB).1);
        assert!(kept(&budget, 99, None, 4 * KIB).1, "of no declared length, and small so far");
        assert!(!kept(&budget, 99, None, 5 * KIB).1);
        // The beginning of what is known to be large is not small.
        assert!(!kept(&budget, 99, Some(64 * KIB), KIB).1);
        drop(bodies);
    }

    #[test]
    fn two_whole_bodies_of_one_client_fit_whatever_the_process_has() {
        let budget = Budget::new(64 * KIB, 192 * KIB, Duration::from_secs(60));
        assert!(kept(&budget, 1, Some(64 * KIB), 64 * KIB).1);
        let mut first = Kept::new(&budget, client(1), None);
        assert!(first.add(&Bytes::from_static(b"abc")));
        let second = first.take();
        assert!(first.is_empty() && first.data.is_empty() && !second.is_empty());
        drop(first);
        assert_eq!(budget.used(), 3);
        drop(second);
        assert_eq!(budget.used(), 0);
    }
}
