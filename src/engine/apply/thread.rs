//! The replica's owner thread: it verifies and applies what the stream brings.

mod bounded;
mod filling;
mod healing;
mod state;
mod vouched;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use tokio::sync::mpsc;

use crate::context::NodeContext;
use crate::engine::apply::inbox::{ApplyCommand, ApplyShared, ReplicaStanding};
use crate::engine::apply::stream_error::StreamError;
use crate::engine::file::epochs::write_epochs;
use crate::engine::file::term::Term;
use crate::engine::history::append_or_gap;
use crate::engine::history::record_intake::RecordIntake;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::{self, IncomingState, Under};
use crate::engine::options::EngineOptions;
use crate::engine::recover::opened::Opened;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::lock;
use crate::report::Condition;
use crate::threads;
use crate::txid::{EpochHistory, Place, Position};
use crate::wire::{Kind, Message, Unit, Want};

use bounded::{Bounded, is_long};
use healing::{HealPacer, Healing, Suspect, WANTS_MAX};
use state::State;

pub(in crate::engine) struct Apply {
    options: EngineOptions,
    node: Arc<NodeContext>,
    shared: Arc<ApplyShared>,
    commands: mpsc::WeakSender<ApplyCommand>,
    state: State,
    /// Of what is open.
    term: Option<Arc<Term>>,
    checkpointer: Option<JoinHandle<()>>,
    incoming: Option<IncomingState>,
    healing: Option<Healing>,
    pace: HealPacer,
    /// What the primary is asked for on the way back.
    wants: Option<mpsc::Sender<Want>>,
    suspect: Suspect,
    /// What is open can't be led to the primary's state, and is replaced by a snapshot; read from until then, where it is a state of the cluster.
    refill: bool,
    /// Where a stream brought garbage before.
    garbled_at: Option<Position>,
    /// Heals that were finished.
    healed: u64,
    history: EpochHistory,
    /// A history that this node's state is not in; it becomes ours with the snapshot that follows.
    next_history: Option<EpochHistory>,
    intake: RecordIntake,
    failed: bool,
    /// What is at the path could not be opened.
    reopen: bool,
    /// What was open was handed on: the node goes on with it.
    left: bool,
    bounded: Bounded,
}

impl Apply {
    pub(in crate::engine) fn open(
        options: EngineOptions,
        node: Arc<NodeContext>,
        shared: Arc<ApplyShared>,
        commands: mpsc::WeakSender<ApplyCommand>,
    ) -> Result<Apply> {
        let mut apply = Apply::new(options, node, shared, commands);
        // A fill that was begun knows how large the primary's pages are.
        let size = incoming::page_size(&apply.options.paths);
        apply.open_path(size)?;
        // Before the application's own connections are there.
        if let (State::Empty(_), Some(size)) = (&apply.state, size)
            && let Err(error) = apply.make_room(size)
        {
            apply.node.report(Condition::PageSizeNotSet { error: &error });
        }
        Ok(apply)
    }

    fn new(
        options: EngineOptions,
        node: Arc<NodeContext>,
        shared: Arc<ApplyShared>,
        commands: mpsc::WeakSender<ApplyCommand>,
    ) -> Apply {
        Apply {
            options,
            node,
            shared,
            commands,
            state: State::Closed,
            term: None,
            checkpointer: None,
            incoming: None,
            healing: None,
            pace: HealPacer::default(),
            wants: None,
            suspect: Suspect::No,
            refill: false,
            garbled_at: None,
            healed: 0,
            history: EpochHistory::default(),
            next_history: None,
            intake: RecordIntake::default(),
            failed: false,
            reopen: false,
            left: false,
            bounded: Bounded::new(),
        }
    }

    /// Goes on from a state that this node vouches for itself.
    pub(in crate::engine) fn follow(
        opened: Opened,
        shared: Arc<ApplyShared>,
        commands: mpsc::WeakSender<ApplyCommand>,
    ) -> Result<Apply> {
        let position = opened.position();
        let (options, node) = (opened.database.options.clone(), opened.database.node.clone());
        let Some((database, handle, history)) = opened.hand_on() else { return Err(Error::ShutDown) };
        // What its WAL has from now on came from a primary.
        write_epochs(&options.paths, &history, false)?;
        let mut apply = Apply::new(options, node, shared, commands);
        apply.history = history;
        apply.state = State::Known(apply.own(database, handle)?);
        apply.serve(Some(position))?;
        Ok(apply)
    }

    pub(in crate::engine) fn start(self, commands: mpsc::Receiver<ApplyCommand>) -> Result<JoinHandle<()>> {
        let work = |(apply, commands): &mut (Apply, _)| apply.run(commands);
        threads::start("replite-apply", (self, commands), work, |(mut apply, commands), ended| match ended {
            Ok(()) => apply.stop(true),
            Err(error) => apply.fall(&error, commands),
        })
    }

    fn run(&mut self, commands: &mut mpsc::Receiver<ApplyCommand>) -> Result<()> {
        while let Some(command) = commands.blocking_recv() {
            if self.shared.stop.load(Ordering::Acquire) {
                break;
            }
            self.expect_files();
            match command {
                ApplyCommand::Units(units) => self.session(|apply| apply.units(units)),
                ApplyCommand::ReplicaStanding(reply) => {
                    let _ = reply.send(self.standing());
                }
                ApplyCommand::Restart => {
                    if let Err(error) = self.maybe_restart() {
                        self.node.report(Condition::RestartMissed { error: &error });
                    }
                }
                ApplyCommand::Suspect => {
                    self.suspect(Suspect::Pages);
                    // A new stream begins with a hello that says so.
                    self.session(|_| Err(StreamError::Verified));
                }
                ApplyCommand::Stop => break,
                ApplyCommand::Leave(reply) => {
                    self.abort();
                    let opened = self.leave();
                    let ends = opened.is_ok();
                    // Where nobody takes it, it is closed.
                    let _ = reply.send(opened);
                    if ends {
                        break;
                    }
                }
            }
        }
        self.abort();
        Ok(())
    }

    /// Where the files are not those that were opened, nothing of the state here is believed: what is at the path is opened anew.
    fn expect_files(&mut self) {
        if self.reopen {
            return self.open_anew();
        }
        let Some(live) = self.state.open() else { return };
        let base = live.base.clone();
        if base.expect_files().is_ok() || !base.lost() {
            return;
        }
        let why = base.intact().err();
        self.abort();
        self.end_service();
        self.state.close();
        drop(base);
        // What was promised of that state is not.
        self.history = EpochHistory::default();
        self.node.applied.forget();
        self.suspect = Suspect::No;
        self.refill = false;
        self.failed = true;
        *lock(&self.shared.failure) = why.map(StreamError::from);
        self.open_anew();
    }

    /// Until it works: connections that somebody here or elsewhere still has to the old files may be in the way.
    fn open_anew(&mut self) {
        self.node.renew_files();
        let opened =
            files::make_state_dir(self.options.paths.state_dir()).and_then(|()| self.open_path(None));
        self.node.set_astray(false);
        self.reopen = opened.is_err();
        match opened {
            Ok(()) => self.node.report(Condition::FilesOpened),
            Err(error) => self.node.report(Condition::FilesNotOpened { error: &error }),
        }
    }

    /// Nobody reads what is open any more, and nothing is copied back.
    fn end_service(&mut self) {
        *lock(&self.shared.term) = None;
        self.shared.readable.send_replace(false);
        self.end_term();
        self.term = None;
    }

    /// The threads that copy back what is open end.
    fn end_term(&mut self) {
        if let Some(term) = &self.term {
            term.end();
        }
        if let Some(thread) = self.checkpointer.take() {
            thread.thread().unpark();
            // It has said how it ended.
            let _ = thread.join();
        }
    }

    /// The end after a panic. Whoever feeds is told first, then everything is given back.
    fn fall(&mut self, error: &Error, commands: mpsc::Receiver<ApplyCommand>) {
        *lock(&self.shared.fallen) = Some(error.cause());
        drop(commands);
        self.shared.readable.send_replace(false);
        let term = lock(&self.shared.term).clone();
        match term {
            Some(term) => term.fail(error),
            None => self.node.fail(error),
        }
        self.stop(false);
    }

    /// Gives everything back. What was open when the thread failed is left as it is, like after a kill.
    fn stop(&mut self, orderly: bool) {
        // With our connections the wal-index goes out of memory: nobody may ask for its figures any more.
        lock(&self.shared.term).take();
        self.end_term();
        if let Some(term) = self.term.take() {
            if let Some(live) = self.state.known() {
                let rested = if orderly && !term.failed() { rest(live) } else { Ok(()) };
                if let Err(error) = rested {
                    self.node.report(Condition::AnchorNotWritten { error: &error });
                }
            }
            // A panic may have taken what was open.
            self.state.close();
            term.release_locks();
        }
        if !self.left {
            self.node.applied.close();
        }
    }

    /// Ends the replica's role, where the node has a state that a primary vouched for: all of it is on the disk, and the threads have ended.
    fn leave(&mut self) -> Result<Opened> {
        let none = || Error::NoState("no primary vouches for what is here".into());
        let vouched = self.node.applied.position();
        let term = self.term.clone().ok_or_else(none)?;
        self.state.known().filter(|live| Some(live.position()) == vouched).ok_or_else(none)?;
        if self.refill || self.suspect != Suspect::No {
            return Err(Error::NoState("the pages here are to be compared with the primary's".into()));
        }
        term.check()?;
        self.end_term();
        let rested = self.state.known().map_or_else(|| Err(none()), rest);
        rested.inspect_err(|error| term.fail(error))?;
        let Some(WalAppender { base, handle, .. }) = self.state.take() else { return Err(none()) };
        (self.term, self.left) = (None, true);
        lock(&self.shared.term).take();
        Ok(Opened::new(base, handle, std::mem::take(&mut self.history)))
    }

    /// Runs a step of a stream; a failure ends that stream and is told to whoever feeds it.
    fn session(&mut self, step: impl FnOnce(&mut Apply) -> Result<(), StreamError>) {
        if self.failed {
            return;
        }
        if let Err(error) = step(self) {
            self.failed = true;
            if let StreamError::Failed(error) = &error
                && error.no_room()
            {
                self.node.no_room(error);
            }
            self.judge(&error);
            self.abort();
            *lock(&self.shared.failure) = Some(error);
        }
    }

    fn abort(&mut self) {
        self.intake.abort(self.state.known());
        // What came of a snapshot stays, so that the next stream goes on from there.
        if let Some(mut incoming) = self.incoming.take()
            && let Err(error) = incoming.keep()
        {
            self.node.report(Condition::SnapshotNotKept { error: &error });
        }
        self.healing = None;
    }

    fn standing(&mut self) -> (ReplicaStanding, mpsc::Receiver<Want>) {
        self.abort();
        self.failed = false;
        *lock(&self.shared.failure) = None;
        self.next_history = None;
        let (wants, receiver) = mpsc::channel(WANTS_MAX);
        self.wants = Some(wants);
        // What is to be filled anew is nothing to go on from.
        let position = self.state.content().filter(|_| !self.refill).map(|live| live.position());
        let paths = &self.options.paths;
        let standing = ReplicaStanding {
            position,
            history: Arc::new(self.history.clone()),
            resume: incoming::progress(paths).map(|p| (p.first, p.next)),
            suspect: match position {
                Some(_) => self.suspect != Suspect::No,
                // Pages that an earlier comparison brought.
                None => incoming::held_size(paths).is_some(),
            },
            marks: if position.is_some() { self.marks() } else { Vec::new() },
        };
        (standing, receiver)
    }

    fn units(&mut self, units: Vec<Unit>) -> Result<(), StreamError> {
        if let (Some(term), Some(_)) = (&self.term, self.state.known()) {
            term.check()?;
        }
        for unit in &units {
            let message = unit.decode().map_err(|e| StreamError::garbled(e.to_string()))?;
            match message {
                Message::Welcome(welcome) => self.welcome(welcome.plan)?,
                Message::Epochs(history) => self.epochs(history)?,
                Message::SnapBegin(begin) => {
                    let (first, from) = (begin.first, begin.from);
                    self.node.report(Condition::SnapshotStarted { first, from });
                    if self.below().is_some() {
                        return Err(StreamError::garbled("a snapshot over a live database"));
                    }
                    self.incoming = Some(IncomingState::begin(&self.options.paths, begin)?);
                }
                Message::HealBegin(begin) => self.heal(begin)?,
                Message::Sums { first, span, sums } => {
                    let (healing, incoming, live) = self.healing()?;
                    incoming.with(live, |overlay, store| {
                        healing.heal.sums(overlay, store, (first, span, sums))
                    })?;
                }
                Message::Sent(sent) => self.sent(sent)?,
                Message::SnapPiece { first, pages, .. } => match &self.healing {
                    Some(_) => {
                        let (_, incoming, under) = self.healing()?;
                        incoming.patch(first, pages, under)?;
                    }
                    None => self.incoming()?.0.piece(first, pages)?,
                },
                Message::SnapEnd(end) => {
                    let (incoming, under) = self.incoming()?;
                    if incoming.end(end, under)? {
                        self.adopt()?;
                    }
                }
                Message::TxnBegin(_) | Message::Page { .. } | Message::TxnEnd(_)
                    if self.incoming.is_none() =>
                {
                    let live = self.state.known().ok_or_else(no_state)?;
                    self.intake.unit(live, unit, &message, &self.history)?;
                    // Else the WAL is not begun anew before a batch happens to end with a transaction.
                    if matches!(message, Message::TxnEnd(_)) && is_long(live) {
                        self.publish()?;
                    }
                }
                Message::TxnBegin(begin) => self.incoming()?.0.txn_begin(begin)?,
                Message::Page { number, hash, page } => {
                    let (incoming, under) = self.incoming()?;
                    incoming.page(number, hash, page, under)?;
                }
                Message::TxnEnd(end) => {
                    let (incoming, under) = self.incoming()?;
                    let exact = incoming.txn_end(end, under)?;
                    self.common(end.after)?;
                    if exact {
                        self.adopt()?;
                    }
                }
                _ => return Err(StreamError::garbled("a unit that does not belong into a stream")),
            }
        }
        self.publish()?;
        let data = |unit: &Unit| !matches!(unit.kind, Kind::Welcome | Kind::Epochs);
        if units.iter().any(data) {
            self.shared.taken.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What comes, and what lies under it.
    fn incoming(&mut self) -> Result<(&mut IncomingState, Under<'_>), StreamError> {
        let under = self.state.content().filter(|_| !self.refill);
        Ok((self.incoming.as_mut().ok_or_else(no_snapshot)?, under))
    }

    /// The database that what comes leads to the primary's state. None: that is filled anew.
    fn below(&mut self) -> Under<'_> {
        self.state.content().filter(|_| !self.refill)
    }

    /// The log gets the records first, then readers see them.
    fn publish(&mut self) -> Result<()> {
        let Some(live) = self.state.known() else { return Ok(()) };
        let before = live.base.tip().position;
        self.intake.publish(live)?;
        let position = live.base.tip().position;
        // Else nobody may vouch for what is here.
        if position != before {
            self.node.applied.advance(position);
        }
        self.maybe_restart()
    }

    fn epochs(&mut self, history: EpochHistory) -> Result<()> {
        let ours = |live: &mut WalAppender| history.place(live.position().txid()) == Place::OnHistory;
        if !self.state.known().is_some_and(ours) {
            self.next_history = Some(history);
        } else if history != self.history {
            write_epochs(&self.options.paths, &history, false)?;
            self.history = history.clone();
            self.node.applied.replace(history, self.node.applied.position());
        }
        Ok(())
    }

    /// What came is exact: it becomes this node's state.
    fn adopt(&mut self) -> Result<(), StreamError> {
        let Some(incoming) = self.incoming.take() else { return Ok(()) };
        let ready = incoming.finish()?;
        let position = ready.position;
        let history = self.next_history.take().unwrap_or_else(|| self.history.clone());
        if history.place(position.txid()) != Place::OnHistory {
            return Err(StreamError::garbled("a snapshot that is not in its own history"));
        }
        match self.healing.take().filter(|_| self.below().is_some()) {
            Some(healing) => self.adopt_heal(&healing, &ready, history)?,
            None => {
                self.fill(&ready, history)?;
                self.node.report(Condition::SnapshotFinished { position });
            }
        }
        incoming::discard(&self.options.paths)?;
        Ok(())
    }
}

impl Drop for Apply {
    fn drop(&mut self) {
        // Also where no thread was started. After an orderly end there is nothing left to give back.
        self.stop(false);
    }
}

/// Leaves everything so that the next start needs no replay.
fn rest(live: &mut WalAppender) -> Result<()> {
    let base = &live.base;
    append_or_gap::sync(base)?;
    base.sync_wal()?;
    base.expect_as_left()?;
    let file = base.left_behind(&mut live.handle)?;
    base.write_anchor(&base.tip(), file, true)
}

fn no_snapshot() -> StreamError {
    StreamError::garbled("a piece of no snapshot")
}

fn no_state() -> StreamError {
    StreamError::garbled("a transaction before the snapshot that it needs")
}
