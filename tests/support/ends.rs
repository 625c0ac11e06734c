//! A test that fails ends: its threads with it, and its waits after a while.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Sets its flag when it is dropped, also by an assertion that fails: a scope waits for its threads
/// before it lets a panic out, and threads without a scope would go on beside the tests that
/// follow.
pub(crate) struct Ends<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits on a runtime for a condition that nothing announces; by the clock on the wall, for a
/// test's own may stand still.
pub(crate) async fn comes(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        tokio::task::yield_now().await;
    }
}
