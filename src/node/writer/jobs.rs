//! Async writes, the thread that runs them, and the one that lets their acknowledgements wait.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;

use rusqlite::Transaction;
use tokio::sync::oneshot;

use crate::engine::{PrimaryEngine, Waiting};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::node::writer::queue::Queue;
use crate::node::writer::returned::Unanswered;
use crate::node::writer::{Commit, Failed, OpenWriter, WAITING_MAX, WriterShared};
use crate::threads::{self, aside, message};

/// Async writes that wait.
pub(super) type JobQueue = Queue<Box<dyn Job>>;

/// One async write.
pub(super) trait Job: Send {
    fn run(self: Box<Self>, shared: &WriterShared, open: &mut OpenWriter) -> Option<Unacknowledged>;
    fn refuse(self: Box<Self>, why: Error);
}

/// A commit that may not be acknowledged yet, and how it is.
pub(super) struct Unacknowledged {
    pub(super) waiting: Waiting,
    pub(super) acknowledge: Box<dyn FnOnce(Result<()>) + Send>,
    /// Dropped when it is acknowledged.
    pub(super) unanswered: Unanswered,
}

impl Unacknowledged {
    /// `passed`: whether it is as durable as it is to be.
    fn settle(self, shared: &WriterShared, engine: &PrimaryEngine, passed: Result<()>) {
        let txid = self.waiting.txid();
        let decided =
            passed.map_err(|error| error.of_commit(txid)).and_then(|()| shared.gate.decide(engine, txid));
        survive(|| (self.acknowledge)(decided));
        drop(self.unanswered);
    }
}

pub(super) struct WriteJob<T, E, F> {
    pub(super) run: F,
    pub(super) reply: oneshot::Sender<Result<Commit<T>, Failed<E>>>,
}

impl<T, E, F> Job for WriteJob<T, E, F>
where
    F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send,
    T: Send + 'static,
    E: Send + 'static,
{
    fn run(self: Box<Self>, shared: &WriterShared, open: &mut OpenWriter) -> Option<Unacknowledged> {
        let WriteJob { run, reply } = *self;
        if reply.is_closed() {
            return None; // Its caller left before it began: it never runs.
        }
        let done = shared.transact(open, run);
        let txid = done.as_ref().ok().and_then(|commit| commit.txid);
        let Some(waiting) = txid.and_then(|txid| shared.gate.hold(txid)) else {
            let decided = txid.map_or(Ok(()), |txid| shared.gate.decide(&open.engine, txid));
            // A caller that left does not want to know.
            let _ = reply.send(decided.map_err(Failed::Ours).and(done));
            return None;
        };
        let acknowledge = Box::new(move |decided: Result<()>| {
            let _ = reply.send(decided.map_err(Failed::Ours).and(done));
        });
        Some(Unacknowledged { waiting, acknowledge, unanswered: Unanswered::new(&shared.returned) })
    }

    fn refuse(self: Box<Self>, why: Error) {
        let _ = self.reply.send(Err(Failed::Ours(why)));
    }
}

/// What the writer's thread works with.
pub(super) struct Jobs {
    pub(super) shared: Arc<WriterShared>,
    pub(super) engine: Arc<PrimaryEngine>,
    pub(super) queue: Arc<JobQueue>,
    pub(super) to_sync: mpsc::SyncSender<Unacknowledged>,
}

/// What the sync thread works with.
pub(super) struct Syncs {
    pub(super) shared: Arc<WriterShared>,
    pub(super) engine: Arc<PrimaryEngine>,
    pub(super) waiting: mpsc::Receiver<Unacknowledged>,
}

/// The writer's thread.
pub(super) fn run_jobs(Jobs { shared, engine, queue: jobs, to_sync }: &mut Jobs) -> Result<()> {
    while let Some(job) = jobs.next() {
        let Ok((inside, mut connection)) = shared.enter() else { continue };
        let commit = survive(|| match connection.as_mut() {
            Some(open) => job.run(shared, open),
            None => {
                job.refuse(shared.refusal());
                None
            }
        });
        drop((connection, inside));
        let Some(commit) = commit.flatten() else { continue };
        if jobs.is_empty() && shared.waiting.load(Ordering::Acquire) == 0 {
            // No other commit waits: an fsync here costs no wake-up of another thread.
            let passed = shared.gate.pass(engine, commit.waiting);
            commit.settle(shared, engine, passed);
        } else {
            shared.waiting.fetch_add(1, Ordering::AcqRel);
            if let Err(mpsc::SendError(commit)) = to_sync.send(commit) {
                commit.settle(shared, engine, Err(Error::ShutDown));
            }
        }
    }
    // Done already, unless this thread itself dropped the last handle.
    shared.close();
    Ok(())
}

/// The sync thread: one fsync for all commits that came during the one before.
pub(super) fn run_syncs(Syncs { shared, engine, waiting: commits }: &mut Syncs) -> Result<()> {
    let mut batch = Vec::new();
    while let Ok(first) = commits.recv() {
        batch.push(first);
        batch.extend(commits.try_iter().take(WAITING_MAX));
        let last = batch.iter().map(|commit| commit.waiting).max();
        let passed = last.map_or(Ok(()), |waiting| shared.gate.pass(engine, waiting));
        for commit in batch.drain(..) {
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
            let result = match &passed {
                Ok(()) => Ok(()),
                Err(error) => Err(Error::Stopped(error.cause())),
            };
            commit.settle(shared, engine, result);
        }
    }
    Ok(())
}

/// Refuses them on a thread of their own, which is one of `threads` from then on: their destructors
/// are the application's code.
pub(super) fn refuse_aside(
    shared: &Arc<WriterShared>,
    jobs: Vec<Box<dyn Job>>,
    threads: &Mutex<Vec<JoinHandle<()>>>,
) {
    let jobs = Arc::new(Mutex::new(jobs));
    let state = (shared.clone(), jobs.clone());
    type Refused = (Arc<WriterShared>, Arc<Mutex<Vec<Box<dyn Job>>>>);
    let refuse = |(shared, jobs): &mut Refused| {
        let jobs = std::mem::take(&mut *lock(jobs));
        shared.refuse_all(jobs);
        Ok(())
    };
    match threads::start("replite-refuse", state, refuse, |_, _| {}) {
        Ok(thread) => {
            let mut threads = lock(threads);
            threads.retain(|thread| !thread.is_finished());
            threads.push(thread);
        }
        // There is no thread to be had.
        Err(_) => shared.refuse_all(std::mem::take(&mut *lock(&jobs))),
    }
}

/// Runs code of the application on one of our threads: a destructor of a value that no caller waits
/// for any more. The thread has to outlive a panic in it.
pub(super) fn survive<T>(run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(value) => Some(value),
        Err(panic) => {
            aside(|| {
                tracing::error!(panic = message(&*panic), "the application panicked outside of its closure")
            });
            // What was thrown may have a destructor that panics, too.
            std::mem::forget(panic);
            None
        }
    }
}
