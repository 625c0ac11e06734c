//! How much a connection of the private channel has to do.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::lock::lock;

/// Requests on a connection, and when the last one left it.
#[derive(Debug)]
pub(super) struct LineUse {
    requests: AtomicUsize,
    left: Mutex<Instant>,
}

/// A request on a connection, until its response's body has come to its end.
#[derive(Debug)]
pub(super) struct OnLine(Arc<LineUse>);

impl LineUse {
    pub(super) fn new() -> Arc<LineUse> {
        Arc::new(LineUse { requests: AtomicUsize::new(0), left: Mutex::new(Instant::now()) })
    }

    pub(super) fn requests(&self) -> usize {
        self.requests.load(Ordering::Relaxed)
    }

    /// Whether there was nothing on it for so long.
    pub(super) fn is_idle(&self, limit: Duration) -> bool {
        self.requests() == 0 && lock(&self.left).elapsed() >= limit
    }

    /// One more.
    pub(super) fn enter(self: &Arc<LineUse>) -> OnLine {
        self.requests.fetch_add(1, Ordering::Relaxed);
        OnLine(self.clone())
    }
}

impl Drop for OnLine {
    fn drop(&mut self) {
        *lock(&self.0.left) = Instant::now();
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_its_last_request_left_long_ago() {
        const LIMIT: Duration = Duration::from_secs(15);
        let line = LineUse::new();
        let [first, second] = [line.enter(), line.enter()];
        drop(first);
        tokio::time::advance(2 * LIMIT).await;
        assert!(!line.is_idle(LIMIT), "one is on it");
        drop(second);
        assert!(!line.is_idle(LIMIT) && line.requests() == 0);
        tokio::time::advance(LIMIT).await;
        assert!(line.is_idle(LIMIT));
    }
}
