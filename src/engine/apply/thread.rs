//! The replica's owner thread: it verifies and applies what the stream brings.

mod bounded;
mod connection;
mod filling;
mod healing;
mod keys;
mod stage;
mod state;
mod vouched;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use tokio::sync::mpsc;

use crate::context::NodeContext;
use crate::engine::apply::inbox::{ApplyCommand, ApplyShared, ReplicaStanding};
use crate::engine::apply::stream_error::StreamError;
use crate::engine::file::database::OpenDatabase;
use crate::engine::history::append_or_gap;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming;
use crate::engine::options::EngineOptions;
use crate::engine::recover::opened::Opened;
use crate::error::{Error, Result};
use crate::files;
use crate::lock::lock;
use crate::report::Condition;
use crate::threads;
use crate::txid::{EpochHistory, Position};
use crate::wire::Want;

use bounded::Bounded;
use connection::Connection;
use healing::HealPacer;
use stage::{Remedy, Served, State, Suspect};

pub(in crate::engine) struct Apply {
    options: EngineOptions,
    node: Arc<NodeContext>,
    shared: Arc<ApplyShared>,
    commands: mpsc::WeakSender<ApplyCommand>,
    state: State,
    /// None after a failure, until the next stream begins.
    connection: Option<Connection>,
    history: EpochHistory,
    suspect: Suspect,
    /// Where a stream brought garbage before.
    garbled_at: Option<Position>,
    /// The keys of another primary were just taken.
    rekeyed: bool,
    pace: HealPacer,
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
        let size = incoming::page_size(&apply.options.paths, apply.options.page_key());
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
            connection: None,
            history: EpochHistory::default(),
            suspect: Suspect::No,
            garbled_at: None,
            rekeyed: false,
            pace: HealPacer::default(),
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
        let mut apply = Apply::new(options, node, shared, commands);
        apply.history = history;
        let own = apply.own(database.clone(), handle);
        let live = own.inspect_err(|_| database.release_locks())?;
        apply.state = State::Known(Served::new(live, Remedy::Heal));
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
        loop {
            // A reader may have come since the last commit.
            self.options.read_mark.join();
            let Some(command) = commands.blocking_recv() else { break };
            if self.shared.stop.load(Ordering::Acquire) {
                break;
            }
            self.expect_files();
            match command {
                ApplyCommand::Units(units) => {
                    self.session(|apply, connection| apply.units(connection, &units));
                }
                ApplyCommand::ReplicaStanding(reply) => {
                    let _ = reply.send(self.standing());
                }
                ApplyCommand::Keys(keys, reply) => {
                    let _ = reply.send(self.take_keys(keys));
                }
                ApplyCommand::Restart => {
                    if let Err(error) = self.maybe_restart() {
                        self.node.report(Condition::RestartMissed { error: &error });
                    }
                }
                ApplyCommand::Suspect => {
                    self.suspect(Suspect::Pages);
                    // A new stream begins with a hello that says so.
                    self.session(|_, _| Err(StreamError::Verified));
                }
                ApplyCommand::Stop => break,
                ApplyCommand::Leave(reply) => {
                    self.abort();
                    let opened = self.leave();
                    let ends = opened.is_ok();
                    // Where no caller takes it, dropping it closes it.
                    let _ = reply.send(opened);
                    if ends {
                        break;
                    }
                }
                ApplyCommand::Vouched(reply) => {
                    self.abort();
                    let _ = reply.send(self.vouched().ok());
                }
                ApplyCommand::Abandon(reply) => {
                    self.disconnect();
                    self.give_back(true);
                    // The node opens in another way what was here, and goes on.
                    self.state = State::Left;
                    let _ = reply.send(());
                    break;
                }
            }
        }
        self.disconnect();
        Ok(())
    }

    /// Where the files are not those that it opened, the thread believes nothing of the state here.
    /// It opens anew what is at the path.
    fn expect_files(&mut self) {
        if let State::Unopened = self.state {
            return self.open_anew();
        }
        let Some(live) = self.state.open() else { return };
        let base = live.base.clone();
        if base.expect_files().is_ok() || !base.lost() {
            return;
        }
        let why = base.intact().err();
        self.disconnect();
        self.end_service();
        self.state.close();
        drop(base);
        // What this node promised of that state is not.
        self.history = EpochHistory::default();
        self.node.applied.forget();
        self.suspect = Suspect::No;
        *lock(&self.shared.failure) = why.map(StreamError::from);
        self.open_anew();
    }

    /// Each command tries this until it works. Connections to the old files, of this process or
    /// another, may be in the way.
    fn open_anew(&mut self) {
        self.node.renew_files();
        let opened =
            files::make_state_dir(self.options.paths.state_dir()).and_then(|()| self.open_path(None));
        self.node.set_astray(false);
        if opened.is_err() && self.state.open().is_none() {
            self.state = State::Unopened;
        }
        match opened {
            Ok(()) => self.node.report(Condition::FilesOpened),
            Err(error) => self.node.report(Condition::FilesNotOpened { error: &error }),
        }
    }

    /// From here on no reader reads what is open, and no thread copies back.
    fn end_service(&mut self) {
        *lock(&self.shared.term) = None;
        self.shared.readable.send_replace(false);
        if let State::Known(served) = &mut self.state {
            served.end();
        }
    }

    /// The end after a panic. The stream that feeds learns of it first, then the thread gives
    /// everything back.
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

    /// Gives everything back. What was open when the thread failed stays as it is, like after a
    /// kill.
    fn stop(&mut self, orderly: bool) {
        self.give_back(orderly);
        if !matches!(self.state, State::Left) {
            self.node.applied.close();
        }
    }

    fn give_back(&mut self, orderly: bool) {
        // With our connections the wal-index goes out of memory: no thread may ask for its figures
        // after this.
        *lock(&self.shared.term) = None;
        if let State::Known(served) = &mut self.state {
            served.end();
            if orderly
                && !served.term.failed()
                && let Err(error) = rest(&mut served.live)
            {
                self.node.report(Condition::AnchorNotWritten { error: &error });
            }
        }
        self.state.close();
    }

    /// The state that is here, where a primary vouches for it and nothing of it is in doubt.
    fn vouched(&mut self) -> Result<Position> {
        let none = || Error::NoState("no primary vouches for what is here".into());
        let vouched = self.node.applied.position();
        let State::Known(served) = &mut self.state else { return Err(none()) };
        let here = served.live.position();
        if Some(here) != vouched {
            return Err(none());
        }
        if served.remedy == Remedy::Snapshot || self.suspect != Suspect::No {
            return Err(Error::NoState("the pages here are to be compared with the primary's".into()));
        }
        Ok(here)
    }

    /// Ends the replica's role, where the node has a state that a primary vouched for. All of it is
    /// on the disk then, and the threads have ended.
    fn leave(&mut self) -> Result<Opened> {
        self.vouched()?;
        let none = || Error::NoState("there is no state here".into());
        let State::Known(served) = &mut self.state else { return Err(none()) };
        served.term.check()?;
        served.end();
        settle(&served.live.base).inspect_err(|error| served.term.fail(error))?;
        let State::Known(served) = std::mem::replace(&mut self.state, State::Left) else {
            return Err(none());
        };
        let WalAppender { base, handle, .. } = served.live;
        *lock(&self.shared.term) = None;
        Ok(Opened::new(base, handle, std::mem::take(&mut self.history)))
    }

    /// Runs a step of a stream. A failure ends that stream, and the stream that feeds learns of it.
    fn session(&mut self, step: impl FnOnce(&mut Apply, &mut Connection) -> Result<(), StreamError>) {
        let Some(mut connection) = self.connection.take() else { return };
        let done = step(self, &mut connection);
        if let Err(error) = &done {
            if let StreamError::Failed(error) = error
                && error.no_room()
            {
                self.node.no_room(error);
            }
            self.judge(&connection, error);
        }
        self.connection = Some(connection);
        if let Err(error) = done {
            self.disconnect();
            *lock(&self.shared.failure) = Some(error);
        }
    }

    /// Ends the stream, if there is one.
    fn disconnect(&mut self) {
        self.abort();
        self.connection = None;
    }

    /// Forgets what no reader has seen of the stream, and what an earlier run left unfinished.
    fn abort(&mut self) {
        let (mut intake, mut receiving) = match &mut self.connection {
            Some(connection) => connection.take_unfinished(),
            None => Default::default(),
        };
        intake.abort(self.state.known());
        // What came of a snapshot stays: the next stream goes on from there.
        if let Some(incoming) = receiving.incoming()
            && let Err(error) = incoming.keep()
        {
            self.node.report(Condition::SnapshotNotKept { error: &error });
        }
    }

    fn standing(&mut self) -> (ReplicaStanding, mpsc::Receiver<Want>) {
        self.disconnect();
        *lock(&self.shared.failure) = None;
        let (connection, receiver) = Connection::open();
        self.connection = Some(connection);
        // A database that a snapshot fills anew is nothing to go on from.
        let position = self.state.below().map(|live| live.position());
        let (paths, key) = (self.options.paths.clone(), self.options.page_key());
        // What came into the file of an empty database is there as long as that is open.
        let mut is_there = |size| !incoming::in_place(&paths) || self.place(size).is_some();
        let begun = incoming::progress(&paths, key).filter(|begun| is_there(begun.page_size));
        // Pages that an earlier comparison brought.
        let held = incoming::held_size(&paths, key).filter(|size| is_there(*size));
        let standing = ReplicaStanding {
            position,
            history: Arc::new(self.history.clone()),
            resume: begun.map(|p| (p.first, p.next)),
            suspect: match position {
                Some(_) => self.suspect != Suspect::No,
                None => held.is_some(),
            },
            marks: if position.is_some() { self.marks() } else { Vec::new() },
        };
        (standing, receiver)
    }
}

impl Drop for Apply {
    fn drop(&mut self) {
        // Also where no thread was started. After an orderly end there is nothing left to give
        // back.
        self.stop(false);
    }
}

/// Has all that was applied on the disk. The role that follows writes an anchor of its own.
fn settle(base: &OpenDatabase) -> Result<()> {
    append_or_gap::sync(base)?;
    base.sync_own_wal()?;
    base.expect_as_left()
}

/// Leaves everything such that the next start needs no replay.
fn rest(live: &mut WalAppender) -> Result<()> {
    let base = &live.base;
    settle(base)?;
    let file = base.left_behind(&mut live.handle)?;
    base.write_anchor(&base.tip(), file, true)
}

fn no_state() -> StreamError {
    StreamError::garbled("a transaction before the snapshot that it needs")
}
