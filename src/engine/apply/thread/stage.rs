//! What a replica has at the database's path: the stages from nothing to a state that is served.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::engine::file::term::Term;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::Under;
use crate::page::PageSize;

/// What is at the database's path. What is open has CKPT and WRITE held.
pub(super) enum State {
    /// Nothing that could be filled as it is.
    Closed,
    /// Something that could not be opened. The thread tries that again with each command.
    Unopened,
    /// A database without content, for a snapshot. Other processes that have it open see the
    /// snapshot come, and the file stays the same.
    Empty(WalAppender),
    /// A database that is no state of the cluster. No reader reads it through this node. Its pages
    /// are compared with the primary's.
    Unknown(WalAppender, Remedy),
    /// A state of the cluster.
    Known(Served),
    /// Nothing any more. The thread handed on what was open, and the node goes on with it.
    Left,
}

/// What leads a database to the primary's state when it can't go on with the primary's log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Remedy {
    /// Pages of the primary, over those that are here.
    Heal,
    /// No heal can: a snapshot replaces it. Until then this node reads from a state of the cluster.
    Snapshot,
}

/// A state of the cluster, which this node reads from, and this node's time on it.
pub(super) struct Served {
    pub(super) term: Arc<Term>,
    pub(super) live: WalAppender,
    pub(super) remedy: Remedy,
    /// None before the first service. Where the thread can't be started, the node has failed.
    pub(super) checkpointer: Option<JoinHandle<()>>,
}

impl Served {
    pub(super) fn new(live: WalAppender, remedy: Remedy) -> Served {
        Served { term: Term::new(live.base.clone()), live, remedy, checkpointer: None }
    }

    /// Ends the thread that copies back. The database stays open.
    pub(super) fn end(&mut self) {
        self.term.end();
        if let Some(thread) = self.checkpointer.take() {
            thread.thread().unpark();
            // It has said how it ended.
            let _ = thread.join();
        }
    }
}

impl State {
    /// The state of the cluster.
    pub(super) fn known(&mut self) -> Option<&mut WalAppender> {
        match self {
            State::Known(served) => Some(&mut served.live),
            _ => None,
        }
    }

    /// A database with content, whatever that is.
    pub(super) fn content(&mut self) -> Option<&mut WalAppender> {
        match self {
            State::Known(Served { live, .. }) | State::Unknown(live, _) => Some(live),
            State::Closed | State::Unopened | State::Left | State::Empty(_) => None,
        }
    }

    /// The database that a heal leads to the primary's state, under the pages that come. None: a
    /// snapshot fills it anew.
    pub(super) fn below(&mut self) -> Under<'_> {
        match self {
            State::Known(Served { live, remedy: Remedy::Heal, .. }) | State::Unknown(live, Remedy::Heal) => {
                Some(live)
            }
            _ => None,
        }
    }

    /// Sets what leads a database with content to the primary's state.
    pub(super) fn set_remedy(&mut self, to: Remedy) {
        if let State::Known(Served { remedy, .. }) | State::Unknown(_, remedy) = self {
            *remedy = to;
        }
    }

    /// Whatever is open.
    pub(super) fn open(&mut self) -> Option<&mut WalAppender> {
        match self {
            State::Known(Served { live, .. }) | State::Unknown(live, _) | State::Empty(live) => Some(live),
            State::Closed | State::Unopened | State::Left => None,
        }
    }

    /// A database that a snapshot of this page size can fill. One that was filled, whose commit the
    /// disk failed, is none: others see it.
    pub(super) fn empty(&mut self, size: PageSize) -> Option<&mut WalAppender> {
        match self {
            State::Empty(live) if live.base.page_size == size && live.base.tip().pages <= 1 => Some(live),
            _ => None,
        }
    }

    /// What is open is a state of the cluster from now on, if it was not before.
    pub(super) fn become_known(&mut self) {
        *self = match std::mem::replace(self, State::Closed) {
            State::Empty(live) => State::Known(Served::new(live, Remedy::Heal)),
            State::Unknown(live, remedy) => State::Known(Served::new(live, remedy)),
            other => other,
        };
    }

    /// Closes what is open, and only then gives back the locks that it held.
    pub(super) fn close(&mut self) {
        let Some(base) = self.open().map(|live| live.base.clone()) else { return };
        *self = State::Closed;
        base.release_locks();
    }
}

/// Why all pages are to be compared, although the position is in the primary's history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Suspect {
    No,
    /// What comes from the primary's log makes no sense.
    Stream,
    /// The pages here may not be what the position says.
    Pages,
}
