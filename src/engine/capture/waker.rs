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
}

impl Waker {
    pub(in crate::engine) fn wake(&self) {
        if self.asleep.swap(false, Ordering::AcqRel)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    pub(in crate::engine) fn sleep(&self, limit: Duration, again: impl Fn() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        // A writer that committed before the store did not wake us.
        if !again() {
            std::thread::park_timeout(limit);
        }
        self.asleep.store(false, Ordering::Release);
    }
}
