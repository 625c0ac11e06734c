//! Verifications of the whole database, one at a time.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::node::slot::{EngineSlot, Running};
use crate::random;
use crate::report::Condition;
use crate::status::Verification;
use crate::threads::{self, caught_task};

/// Periods differ by up to so many parts of a hundred. Otherwise nodes that were started together
/// would read their disks together for ever.
const JITTER_PERCENT: u64 = 10;

/// Runs a database's verifications, one at a time, each on a thread of its own.
pub(crate) struct Verifier {
    node: Arc<NodeContext>,
    slot: Arc<EngineSlot>,
    bytes_per_second: Option<NonZeroU64>,
    state: Mutex<VerifierState>,
}

#[derive(Default)]
struct VerifierState {
    /// Gets the result of the one that runs; it ends without one when that fails.
    running: Option<watch::Receiver<Option<Verification>>>,
    thread: Option<JoinHandle<()>>,
    last: Option<Verification>,
    closed: bool,
}

impl Verifier {
    pub(crate) fn new(
        node: Arc<NodeContext>,
        slot: Arc<EngineSlot>,
        bytes_per_second: Option<NonZeroU64>,
    ) -> Arc<Verifier> {
        Arc::new(Verifier { node, slot, bytes_per_second, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, VerifierState> {
        lock(&self.state)
    }

    /// What the last verification found.
    pub(crate) fn last(&self) -> Option<Verification> {
        self.lock().last.clone()
    }

    pub(crate) async fn verify(self: &Arc<Verifier>) -> Result<Verification> {
        loop {
            let mut shared = match self.begin()? {
                Started::Ours(answer) => {
                    let ended = answer.await;
                    return ended.unwrap_or_else(|_| Err(Error::Panicked("in a verification".into())));
                }
                Started::Theirs(shared) => shared,
            };
            // The one that runs may fail. The caller that began it is told that.
            if let Ok(verification) = shared.wait_for(Option::is_some).await
                && let Some(verification) = verification.clone()
            {
                return Ok(verification);
            }
        }
    }

    fn begin(self: &Arc<Verifier>) -> Result<Started> {
        let mut state = self.lock();
        if state.closed || self.node.stop.is_cancelled() {
            return Err(Error::ShutDown);
        }
        if let Some(running) = &state.running {
            return Ok(Started::Theirs(running.clone()));
        }
        if let Some(ended) = state.thread.take() {
            // It has said its result, which was the last that it did.
            let _ = ended.join();
        }
        let (tell, running) = watch::channel(None);
        let (reply, answer) = oneshot::channel();
        let work = |(this, found): &mut (Arc<Verifier>, Option<Verification>)| {
            *found = Some(this.run()?);
            Ok(())
        };
        let end = move |(this, found): (Arc<Verifier>, Option<Verification>), ended: Result<()>| {
            this.lock().running = None;
            let result = match ended {
                Ok(()) => found.ok_or(Error::ShutDown),
                Err(error) => {
                    this.failed(&error);
                    Err(error)
                }
            };
            if let Ok(verification) = &result {
                tell.send_replace(Some(verification.clone()));
            }
            // The caller that asked may have gone.
            let _ = reply.send(result);
        };
        state.thread = Some(threads::start("replite-verify", (self.clone(), None), work, end)?);
        state.running = Some(running);
        Ok(Started::Ours(answer))
    }

    /// Blocks for as long as it takes.
    fn run(&self) -> Result<Verification> {
        let verification = match self.slot.get()? {
            Running::Primary(engine) => engine.verify(self.bytes_per_second),
            Running::Replica(engine) => engine.verify(self.bytes_per_second),
        }?;
        self.report(&verification);
        Ok(verification)
    }

    /// It came to no end, be it by a panic. Nothing depends on it: the node goes on.
    fn failed(&self, error: &Error) {
        if matches!(error, Error::ShutDown | Error::NoState(_)) {
            return;
        }
        self.node.report_aside(Condition::NotVerified { error });
    }

    fn report(&self, verification: &Verification) {
        self.lock().last = Some(verification.clone());
        if verification.holds() {
            self.node.report(Condition::Verified { verification });
            return;
        }
        self.node.report(Condition::VerificationFailed { verification });
        self.suspect();
    }

    /// What follows when the pages are not those of the position, after the node reported it. Runs
    /// on the verification's thread.
    fn suspect(&self) {
        match self.slot.get() {
            // Its pages are the only ones that it knows of: an operator decides.
            Ok(Running::Primary(_)) | Err(_) => {}
            // Its primary has the right pages.
            Ok(Running::Replica(engine)) => engine.suspect(),
        }
    }

    /// Verifies from time to time, until the node stops.
    pub(crate) async fn repeat(self: Arc<Verifier>, period: Duration) {
        let stop = self.node.stop.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered(period, random_percent())) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                // What comes of it is in events, log and status.
                _ = caught_task("a verification", self.verify()) => {}
            }
        }
    }

    /// Waits for the verification that runs, which ends at once when the node has been told to
    /// stop. No other begins any more. Blocks.
    pub(crate) fn close(&self) {
        let thread = {
            let mut state = self.lock();
            state.closed = true;
            state.thread.take()
        };
        if let Some(thread) = thread {
            // It has said how it ended.
            let _ = thread.join();
        }
    }
}

/// A verification that was begun by this call or another.
enum Started {
    Ours(oneshot::Receiver<Result<Verification>>),
    Theirs(watch::Receiver<Option<Verification>>),
}

fn jittered(period: Duration, percent: u64) -> Duration {
    let share = (100 - JITTER_PERCENT + percent % (2 * JITTER_PERCENT + 1)) as u32;
    period.saturating_mul(share) / 100
}

fn random_percent() -> u64 {
    // Without random numbers there is no jitter.
    random::array().map_or(JITTER_PERCENT, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_differ_by_a_tenth_at_most() {
        let period = Duration::from_secs(100);
        let all: Vec<Duration> = (0..1000).map(|percent| jittered(period, percent)).collect();
        assert_eq!(all.iter().min(), Some(&Duration::from_secs(90)));
        assert_eq!(all.iter().max(), Some(&Duration::from_secs(110)));
        assert_eq!(jittered(period, JITTER_PERCENT), period);
    }
}
