//! Requests that run here because this node is the primary.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

#[derive(Clone, Debug, Default)]
pub(super) struct Requests(Arc<Count>);

#[derive(Debug, Default)]
struct Count {
    number: AtomicUsize,
    /// None runs any more.
    none: Notify,
}

impl Requests {
    pub(super) fn begin(&self) -> RunningRequest {
        self.0.number.fetch_add(1, Ordering::SeqCst);
        RunningRequest(CountOnce { count: self.0.clone(), ended: Arc::default() })
    }

    pub(super) fn number(&self) -> usize {
        self.0.number.load(Ordering::Relaxed)
    }

    pub(super) async fn done(&self) {
        loop {
            let mut none = pin!(self.0.none.notified());
            // Before the look: a request that ends after it is heard.
            none.as_mut().enable();
            if self.0.number.load(Ordering::SeqCst) == 0 {
                return;
            }
            none.await;
        }
    }
}

/// A request that runs here; counted until this is dropped.
#[derive(Debug)]
pub(crate) struct RunningRequest(CountOnce);

impl RunningRequest {
    /// What ends the count before that.
    pub(crate) fn counted(&self) -> CountOnce {
        self.0.clone()
    }
}

impl Drop for RunningRequest {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Requests that wait for a primary.
#[derive(Debug, Default)]
pub(super) struct HeldCount(Arc<AtomicUsize>);

impl HeldCount {
    pub(super) fn begin(&self) -> HeldRequest {
        self.0.fetch_add(1, Ordering::Relaxed);
        HeldRequest(self.0.clone())
    }

    pub(super) fn number(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A request that waits for a primary; counted until this is dropped.
#[derive(Debug)]
pub(crate) struct HeldRequest(Arc<AtomicUsize>);

impl Drop for HeldRequest {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a request counts, until one of the clones ends it.
#[derive(Clone, Debug)]
pub(crate) struct CountOnce {
    count: Arc<Count>,
    ended: Arc<AtomicBool>,
}

impl CountOnce {
    pub(crate) fn end(&self) {
        if !self.ended.swap(true, Ordering::SeqCst) && self.count.number.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.count.none.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::context::{NodeContext, RoleChange};
    use crate::primary::fake::{SECRET, node};
    use crate::status::Role;
    use crate::txid::Epoch;

    /// Threads that begin requests, each of which looks whether the node has handed its lease over
    /// while it runs.
    fn begin(node: &Arc<NodeContext>, handed: &AtomicBool, until: Instant) -> usize {
        let mut began = 0;
        while Instant::now() < until {
            let Some(running) = node.request() else {
                std::thread::yield_now();
                continue;
            };
            for _ in 0..20 {
                assert!(!handed.load(Ordering::SeqCst), "a request runs that was not waited for");
                std::hint::spin_loop();
            }
            drop(running);
            began += 1;
        }
        began
    }

    #[test]
    fn once_a_node_that_yields_has_waited_none_runs_and_none_begins() {
        let node = node(1, &SECRET, Role::Replica);
        let (me, epoch) = (node.me.clone(), Epoch::new(1, 1));
        let leads = || node.change_role(RoleChange::Leads { me: me.clone(), epoch });
        leads();
        let handed = AtomicBool::new(false);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let until = Instant::now() + Duration::from_secs(1);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|_| scope.spawn(|| begin(&node, &handed, until))).collect();
            let mut handoffs = 0;
            while Instant::now() < until {
                node.change_role(RoleChange::Yields);
                runtime.block_on(node.requests_done());
                handed.store(true, Ordering::SeqCst);
                std::thread::yield_now();
                handed.store(false, Ordering::SeqCst);
                leads();
                std::thread::yield_now();
                handoffs += 1;
            }
            let began: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
            assert!(handoffs > 20 && began > 100, "{handoffs} handoffs, {began} requests");
        });
    }
}
