//! Writes that wait for the writer's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use tokio::sync::Semaphore;

use crate::lock::lock;

/// Writes that wait for the thread.
pub(super) struct Queue<J> {
    state: Mutex<QueueState<J>>,
    changed: Condvar,
    /// Bounds them. A place is given back when a write is taken out.
    pub(super) room: Arc<Semaphore>,
}

struct QueueState<J> {
    jobs: VecDeque<J>,
    takes: Takes,
}

/// What a queue does with what comes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    All,
    /// The node is not to write for now.
    None,
    /// The thread ends.
    Closed,
}

impl<J> Queue<J> {
    pub(super) fn new(most: usize) -> Queue<J> {
        let state = QueueState { jobs: VecDeque::new(), takes: Takes::All };
        Queue { state: Mutex::new(state), changed: Condvar::new(), room: Arc::new(Semaphore::new(most)) }
    }

    /// Whether the job was taken. A job that was not is dropped, and runs nowhere.
    pub(super) fn push(&self, job: J) -> bool {
        let mut state = lock(&self.state);
        if state.takes != Takes::All {
            return false;
        }
        state.jobs.push_back(job);
        drop(state);
        self.changed.notify_one();
        true
    }

    /// The next one; none when the queue is closed. Blocks.
    pub(super) fn next(&self) -> Option<J> {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                self.room.add_permits(1);
                return Some(job);
            }
            if state.takes == Takes::Closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.state).jobs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.state).jobs.is_empty()
    }

    /// Takes no more, until it accepts again. Returns what waited: it is to be refused at once,
    /// also while another write runs.
    #[must_use = "what waited has callers"]
    pub(super) fn refuse(&self) -> Vec<J> {
        self.end(Takes::None)
    }

    /// Takes what comes, unless it is closed.
    pub(super) fn accept(&self) {
        let mut state = lock(&self.state);
        if state.takes == Takes::None {
            state.takes = Takes::All;
        }
    }

    /// Takes no more, and ends the thread. Who waits for a place is refused. Returns what waited.
    #[must_use = "what waited has callers"]
    pub(super) fn close(&self) -> Vec<J> {
        self.room.close();
        let jobs = self.end(Takes::Closed);
        self.changed.notify_all();
        jobs
    }

    fn end(&self, takes: Takes) -> Vec<J> {
        let mut state = lock(&self.state);
        if state.takes != Takes::Closed {
            state.takes = takes;
        }
        let jobs = Vec::from(std::mem::take(&mut state.jobs));
        drop(state);
        self.room.add_permits(jobs.len());
        jobs
    }
}
