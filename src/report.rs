//! What a node has to say of itself, said in one place.
//!
//! A [`Condition`] is something that an operator may want to know: the disk is full, a heal has
//! ended. `NodeContext::report` does with it what its row in the table says. The row may have a
//! problem that begins or ends, an event, a log line and counters.
//!
//! The rule: each change of a problem and each event is a condition. So is each log line at `warn`
//! or `error` about the state of a node or its database. Lines at `info`, `debug` and `trace` about
//! a local detail are plain calls of `tracing` where they happen. So are those about one request of
//! a client, or about a mistake of the application.
//!
//! A problem lasts until another condition ends it; only replication that has stopped stays so.
//! Modules that know no node, such as the log's files, write the condition's log line by
//! [`Condition::say`].
//!
//! The subscriber and the recorder are the application's code and may panic. They come last: by
//! then the problem has changed and the event is sent. No lock is held while they run.

mod conditions;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::broadcast;

#[cfg(feature = "prometheus")]
use crate::metrics::CounterStore;
use crate::status::Event;
use crate::threads::aside;

pub(crate) use conditions::Condition;
#[cfg(test)]
pub(crate) use tests::noted;

/// Events that a slow receiver may be late by before it misses some.
const EVENTS_LATE_MAX: usize = 256;
/// What the problem begins with while replication has failed.
pub(crate) const STOPPED: &str = "replication stopped: ";

/// A part of a node that can have a problem.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Part {
    /// Replication of the database as a whole: it has stopped.
    Engine,
    /// All of the database is being hashed, to find its position.
    Hashing,
    /// The state that a replica has.
    State,
    /// The pages of the database, as the last verification found them.
    Pages,
    /// The stream from the primary.
    Stream,
    /// How far a replica is late, and at what pace it catches up.
    Behind,
    /// The lease's store, or the record in it.
    Lease,
    /// Peers that have another secret.
    Strangers,
    /// Our own log of transactions.
    Log,
    /// Copying the WAL back into the database file.
    Checkpoint,
    /// The WAL is much longer than its limit.
    Wal,
    /// Reads of the application.
    Reads,
    /// The disk.
    Room,
    /// A change of the role.
    Role,
    /// The certificates of the channel.
    Certificates,
    /// What this node keeps of the lease's record with others.
    Members,
}

impl Part {
    /// What is wrong with it, for those who may learn no more.
    fn in_public(self) -> &'static str {
        match self {
            Part::Engine => "replication stopped",
            Part::Hashing => "the database is being checked",
            Part::State => "the database is being led to the primary's state",
            Part::Pages => "a verification found bad pages",
            Part::Stream => "the primary can't be followed",
            Part::Behind => "this instance is behind the primary, or may be",
            Part::Lease => "the lease can't be read",
            Part::Strangers => "a peer was refused",
            Part::Log => "the log can't be written",
            Part::Checkpoint => "the write-ahead log can't be copied back",
            Part::Wal => "the write-ahead log grows",
            Part::Reads => "the database can't be read",
            Part::Room => "the disk is full",
            Part::Role => "a change of the role is held up",
            Part::Certificates => "the certificates need to be looked at",
            Part::Members => "this instance takes no part in keeping the lease",
        }
    }
}

/// Where a node's conditions go: its problems that last, and its events.
#[derive(Debug)]
pub(crate) struct Reports {
    /// Each under the part of the node that has it, so that none hides another.
    problems: Mutex<BTreeMap<Part, String>>,
    events: broadcast::Sender<Event>,
    #[cfg(feature = "prometheus")]
    counters: CounterStore,
}

impl Reports {
    pub(crate) fn new() -> Reports {
        Reports {
            problems: Mutex::default(),
            events: broadcast::Sender::new(EVENTS_LATE_MAX),
            #[cfg(feature = "prometheus")]
            counters: CounterStore::default(),
        }
    }

    /// Does what the condition's row says. A panic of the application's code is the caller's.
    pub(crate) fn report(&self, database: &str, condition: Condition<'_>) {
        if self.note(condition) {
            condition.log();
            self.count(database, condition);
        }
    }

    /// The same where what comes next matters more than a panic of the application's code.
    pub(crate) fn report_aside(&self, database: &str, condition: Condition<'_>) {
        if self.note(condition) {
            aside(|| condition.log());
            aside(|| self.count(database, condition));
        }
    }

    /// Adds to the condition's counters: our own first, for a recorder is the application's code.
    #[cfg_attr(not(feature = "metrics"), allow(unused_variables, reason = "a recorder needs its name"))]
    fn count(&self, database: &str, condition: Condition<'_>) {
        #[cfg(any(feature = "metrics", feature = "prometheus"))]
        condition.count(|counter, labels, by| {
            #[cfg(feature = "prometheus")]
            self.counters.add(counter, labels, by);
            #[cfg(feature = "metrics")]
            crate::metrics::add(database, counter, labels, by);
        });
    }

    /// What was counted since the node was opened.
    #[cfg(feature = "prometheus")]
    pub(crate) fn counters(&self) -> &CounterStore {
        &self.counters
    }

    /// What runs no code of the application. Returns whether the rest is to be done.
    fn note(&self, condition: Condition<'_>) -> bool {
        self.change_problems(condition);
        if condition.is_told()
            && let Some(event) = condition.event()
        {
            self.send(event);
        }
        condition.is_told()
    }

    /// Begins and ends the condition's problems, and tells nothing.
    pub(crate) fn change_problems(&self, condition: Condition<'_>) {
        let mut problems = self.lock();
        for part in condition.ends() {
            problems.remove(part);
        }
        if let Some((part, text)) = condition.begins() {
            problems.insert(part, text);
        }
    }

    /// Sends an event to all who listen, if there are any.
    pub(crate) fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// What is wrong with one part.
    pub(crate) fn problem_of(&self, part: Part) -> Option<String> {
        self.lock().get(&part).cloned()
    }

    pub(crate) fn has_problem(&self, part: Part) -> bool {
        self.lock().contains_key(&part)
    }

    /// All that is wrong, in words for operators.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.lock().values().cloned().collect()
    }

    /// The same without anything that only operators should know.
    pub(crate) fn public_problems(&self) -> Vec<&'static str> {
        self.lock().keys().map(|part| part.in_public()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Part, String>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Condition<'_> {
    /// Writes the log line alone, where no node is known.
    pub(crate) fn say(self) {
        debug_assert!(self.begins().is_none() && self.ends().is_empty() && self.event().is_none());
        self.log();
    }
}
