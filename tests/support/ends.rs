//! Threads that a test starts beside itself end when it fails.

use std::sync::atomic::{AtomicBool, Ordering};

/// Sets its flag when it is dropped, also by an assertion that fails: a scope waits for its threads before it lets a panic
/// out, and threads without a scope would go on beside the tests that follow.
pub(crate) struct Ends<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
