//! When the writer's connection comes back, and when all commits are answered: for a change of the
//! role, which waits for both.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::node::writer::Writer;
use crate::node::writer::reentrancy::Inside;

/// Longest wait between two looks, should a word get lost.
const LOOK: Duration = Duration::from_millis(5);

impl Writer {
    /// Waits until nothing runs on the connection; false when it takes longer. What comes later is
    /// refused, where the writer refuses. Blocks.
    pub(crate) fn await_idle(&self, limit: Duration) -> bool {
        let shared = &self.shared;
        shared.returned.wait(limit, || !matches!(shared.connection.try_lock(), Err(TryLockError::WouldBlock)))
    }

    /// Waits until all that was committed is answered; false when it takes longer. Blocks.
    pub(crate) fn await_answers(&self, limit: Duration) -> bool {
        let returned = &self.shared.returned;
        returned.wait(limit, || returned.unanswered() == 0)
    }
}

/// Tells a thread that waits that something came back.
#[derive(Debug, Default)]
pub(super) struct Returned {
    /// Commits that are made and not answered.
    unanswered: AtomicUsize,
    /// A thread waits: without one, nothing is told.
    awaited: AtomicBool,
    looks: Mutex<()>,
    changed: Condvar,
}

impl Returned {
    pub(super) fn borrows(&self, inside: Inside) -> Borrows<'_> {
        Borrows { _inside: inside, returned: self }
    }

    pub(super) fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::SeqCst)
    }

    /// Waits until it is so; false when that takes longer. One thread at a time does.
    pub(super) fn wait(&self, limit: Duration, is_so: impl Fn() -> bool) -> bool {
        let end = Instant::now() + limit;
        self.awaited.store(true, Ordering::SeqCst);
        let mut looks = lock(&self.looks);
        let so = loop {
            if is_so() {
                break true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            let waited = self.changed.wait_timeout(looks, left.min(LOOK));
            looks = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        self.awaited.store(false, Ordering::SeqCst);
        so
    }

    fn tell(&self) {
        if self.awaited.load(Ordering::SeqCst) {
            drop(lock(&self.looks));
            self.changed.notify_all();
        }
    }
}

/// A thread that uses the connection, or waits for it. Dropped after the connection is free.
#[derive(Debug)]
pub(super) struct Borrows<'a> {
    _inside: Inside,
    returned: &'a Returned,
}

impl Drop for Borrows<'_> {
    fn drop(&mut self) {
        self.returned.tell();
    }
}

/// A commit that is made and not answered. Made while the connection is not free.
pub(super) struct Unanswered(Arc<Returned>);

impl Unanswered {
    pub(super) fn new(returned: &Arc<Returned>) -> Unanswered {
        returned.unanswered.fetch_add(1, Ordering::SeqCst);
        Unanswered(returned.clone())
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::SeqCst);
        self.0.tell();
    }
}
