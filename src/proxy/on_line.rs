//! How much a connection of the private channel has to do.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use crate::lock::lock;

/// Requests on a connection, and when the last one left it.
pub(super) struct LineUse {
    requests: AtomicUsize,
    left: Mutex<Instant>,
    /// It takes no more.
    retired: AtomicBool,
    /// What has to last as long as the requests do.
    _keeps: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for LineUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LineUse").field("requests", &self.requests()).finish_non_exhaustive()
    }
}

/// A request on a connection, until its response's body has come to its end.
#[derive(Debug)]
pub(super) struct OnLine(Arc<LineUse>);

impl LineUse {
    pub(super) fn new(keeps: impl Any + Send + Sync) -> Arc<LineUse> {
        let (requests, left) = (AtomicUsize::new(0), Mutex::new(Instant::now()));
        Arc::new(LineUse { requests, left, retired: AtomicBool::new(false), _keeps: Box::new(keeps) })
    }

    /// No request begins on it any more. Those that did come to their end.
    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
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
        let line = LineUse::new(());
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
