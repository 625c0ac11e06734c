//! Wakes the capture thread.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;
use std::time::Duration;

/// Wakes the capture thread; free when it is awake.
#[derive(Debug, Default)]
pub(in crate::engine) struct Waker {
    pub(in crate::engine) thread: OnceLock<Thread>,
    asleep: AtomicBool,
    /// There is a request.
    asked: AtomicBool,
    /// Microseconds of the sleep that it is in.
    #[cfg(test)]
    limit: std::sync::atomic::AtomicU64,
}

impl Waker {
    pub(in crate::engine) fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Wakes it for a request, also where it is about to sleep.
    pub(in crate::engine) fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(in crate::engine) fn sleep(&self, limit: Duration, again: impl Fn() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        // A writer that committed before the store did not wake us, nor did a request.
        if !self.asked.swap(false, Ordering::SeqCst) && !again() {
            #[cfg(test)]
            self.limit.store(limit.as_micros() as u64, Ordering::SeqCst);
            std::thread::park_timeout(limit);
            #[cfg(test)]
            self.limit.store(0, Ordering::SeqCst);
        }
        self.asleep.store(false, Ordering::Release);
    }

    /// For how long it sleeps.
    #[cfg(test)]
    pub(in crate::engine) fn sleeps(&self) -> Duration {
        Duration::from_micros(self.limit.load(Ordering::SeqCst))
    }
}
