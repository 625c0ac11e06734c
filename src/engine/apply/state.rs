//! What is at the database's path, and how it becomes this replica's state.

use std::time::Instant;

use rusqlite::Connection;

use super::Apply;
use crate::engine::append::Appender;
use crate::engine::base::lock;
use crate::engine::checkpointer::{Checkpointer, Replica};
use crate::engine::follower::Command;
use crate::engine::open::{self, Opened};
use crate::engine::reader;
use crate::error::{Error, Result, Unsupported};
use crate::node::Part;
use crate::sqlite::Handle;
use crate::txid::Place;

/// What is at the database's path. What is open has CKPT and WRITE held.
pub(super) enum State {
    /// Nothing, or what can't be filled page by page.
    Closed,
    /// A database that is no state of the cluster. Nobody reads it through this node; its pages are compared with the primary's.
    Unknown(Appender),
    /// A state of the cluster.
    Known(Appender),
}

impl State {
    /// The state of the cluster.
    pub(super) fn known(&mut self) -> Option<&mut Appender> {
        match self {
            State::Known(live) => Some(live),
            _ => None,
        }
    }

    /// The database that a heal can lead to the primary's state, whatever it is now.
    pub(super) fn content(&mut self) -> Option<&mut Appender> {
        match self {
            State::Known(live) | State::Unknown(live) => Some(live),
            State::Closed => None,
        }
    }

    /// Closes what is open, and only then gives back what was held.
    pub(super) fn close(&mut self) {
        if let State::Known(live) | State::Unknown(live) = std::mem::replace(self, State::Closed) {
            let base = live.base.clone();
            drop(live);
            base.release_locks();
        }
    }
}

impl Apply {
    pub(super) fn open_existing(&mut self) -> Result<()> {
        let mut opened = open::open(self.options.clone(), self.node.clone(), false);
        if matches!(opened, Err(Error::Unsupported { reason: Unsupported::NotWal(_), .. })) {
            self.turn_to_wal()?;
            opened = open::open(self.options.clone(), self.node.clone(), false);
        }
        match opened {
            Ok(opened) if opened.exact && opened.base.tip().position.epoch().number() > 0 => {
                self.go_live(opened, true)
            }
            Ok(mut opened) => match opened.damage() {
                // Not made live: a new anchor would forget what is known of the damage.
                Some(why) => {
                    self.say_damaged(why);
                    Ok(())
                }
                None => self.go_live(opened, false),
            },
            Err(Error::Damaged { what, .. }) => {
                self.say_damaged(&what);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Of a database in rollback mode.
    fn turn_to_wal(&self) -> Result<()> {
        let handle = Handle::open(&self.options.path, false)?;
        let turn = |connection: &Connection| {
            connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0))
        };
        turn(handle.connection())?;
        Ok(())
    }

    fn say_damaged(&self, why: &str) {
        self.say_unread(&format!("it is damaged: {why}; it is kept aside when a snapshot replaces it"));
    }

    fn say_unread(&self, why: &str) {
        let text = format!("the database here is not read from: {why}");
        tracing::warn!(path = %self.options.path.display(), text);
        self.node.set_problem(Part::State, Some(text));
    }

    /// Begins to own what was opened. What is no state of the cluster gets no name, and is not read from.
    pub(super) fn go_live(&mut self, mut opened: Opened, known: bool) -> Result<()> {
        opened.begin_if_empty()?;
        // Where the epochs were lost, or are older than the log, its records lead nowhere; the primary sends them again.
        let named = |opened: &Opened| {
            let logged = opened.base.log.tip();
            logged.is_none_or(|logged| opened.history.place(logged.txid()) == Place::OnHistory)
        };
        let mut opened = if known && named(&opened) { opened.redo()? } else { opened };
        opened.anchor()?;
        self.history = opened.history;
        let base = opened.base;
        let position = base.tip().position;
        let live = Appender::new(base.clone(), opened.handle)?;
        if !known {
            self.state = State::Unknown(live);
            self.say_unread(
                "it is no state of the cluster; what differs from the primary's is kept when it is replaced",
            );
            return Ok(());
        }
        if base.log.tip() != Some(position) {
            tracing::warn!(%position, logged = ?base.log.tip(), "the last commits here came from no primary that is known");
            let text =
                "the last commits here came from no primary that is known; the primary decides on them";
            self.node.set_problem(Part::State, Some(text.into()));
        }
        self.state = State::Known(live);
        self.serve()
    }

    /// What is open is a state of the cluster, from now on if it was not before: it is read from, and its WAL copied back.
    pub(super) fn serve(&mut self) -> Result<()> {
        let live = match std::mem::replace(&mut self.state, State::Closed) {
            State::Known(live) | State::Unknown(live) => live,
            State::Closed => return Ok(()),
        };
        let base = live.base.clone();
        self.state = State::Known(live);
        let position = base.tip().position;
        self.node.applied.replace(self.history.clone(), Some(position));
        if self.checkpointer.is_some() {
            return Ok(());
        }
        let commands = self.commands.clone();
        let ready = move || {
            if let Some(commands) = commands.upgrade() {
                // When the queue is full, the thread looks by itself after the next batch.
                let _ = commands.try_send(Command::Restart);
            }
        };
        let replica = Replica { synced: self.shared.synced.clone(), ready: Box::new(ready) };
        let checkpointer = Checkpointer {
            base: base.clone(),
            handle: reader(&base)?,
            replica: Some(replica),
            log_synced: Instant::now(),
            applied_synced: Instant::now(),
        };
        self.checkpointer = Some(checkpointer.spawn()?);
        *lock(&self.shared.base) = Some(base);
        self.shared.readable.send_replace(true);
        tracing::info!(%position, "the replica's state is open");
        Ok(())
    }
}
