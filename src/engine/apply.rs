//! The replica's owner thread: it verifies and applies what the stream brings.

mod healing;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::engine::EngineOptions;
use crate::engine::anchor::{self, Anchor, Anchors, FileState, Witnesses, stamp};
use crate::engine::append::Appender;
use crate::engine::base::lock;
use crate::engine::capture_loop::warn_if_long;
use crate::engine::checkpoint::{DRAIN_MAX, Restart, restart};
use crate::engine::checkpointer::{Checkpointer, Replica};
use crate::engine::follower::{Command, Shared, Standing};
use crate::engine::intake::Intake;
use crate::engine::open::{self, Opened};
use crate::engine::receive::{self, Incoming, Ready};
use crate::engine::wal_file::{WalFile, sync_directory};
use crate::engine::{make_side, reader};
use crate::error::{Error, Result, Unsupported};
use crate::log::Log;
use crate::node::{Node, Part};

use crate::status::{Event, unix_millis};
use crate::txid::{EpochHistory, Place, Position};
use crate::wal::{Salts, WalSum};
use crate::wire::{Message, Unit, Want};

use healing::{Healing, Pace, Suspect, WANTS_MAX};

/// Pause after a failed restart of the WAL, doubled each time.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);

pub(super) struct Apply {
    options: EngineOptions,
    node: Arc<Node>,
    shared: Arc<Shared>,
    commands: mpsc::WeakSender<Command>,
    live: Option<Appender>,
    checkpointer: Option<JoinHandle<()>>,
    incoming: Option<Incoming>,
    healing: Option<Healing>,
    pace: Pace,
    /// What the primary is asked for on the way back.
    wants: Option<mpsc::Sender<Want>>,
    suspect: Suspect,
    /// Where a stream brought garbage before.
    garbled_at: Option<Position>,
    /// Heals that were finished.
    healed: u64,
    history: EpochHistory,
    /// A history that this node's state is not in; it becomes ours with the snapshot that follows.
    next_history: Option<EpochHistory>,
    intake: Intake,
    failed: bool,
    restart_after: Instant,
    restart_pause: Duration,
    warned_frames: u32,
}

impl Apply {
    pub(super) fn open(
        options: EngineOptions,
        node: Arc<Node>,
        shared: Arc<Shared>,
        commands: mpsc::WeakSender<Command>,
    ) -> Result<Apply> {
        let mut apply = Apply {
            options,
            node,
            shared,
            commands,
            live: None,
            checkpointer: None,
            incoming: None,
            healing: None,
            pace: Pace::default(),
            wants: None,
            suspect: Suspect::No,
            garbled_at: None,
            healed: 0,
            history: EpochHistory::default(),
            next_history: None,
            intake: Intake::default(),
            failed: false,
            restart_after: Instant::now(),
            restart_pause: RESTART_PAUSE,
            warned_frames: 0,
        };
        if apply.options.path.exists() {
            apply.open_existing()?;
        }
        Ok(apply)
    }

    fn open_existing(&mut self) -> Result<()> {
        match open::open(self.options.clone(), self.node.clone(), false) {
            Ok(opened) if opened.exact => self.go_live(opened),
            Ok(mut opened) => {
                // Not a state of the cluster: never read from, and put aside when a snapshot takes its place.
                let damage = opened.damage();
                drop(opened);
                self.say_unknown(
                    &damage.map_or("it is no state of the cluster".into(), |why| {
                        format!("it is damaged: {why}")
                    }),
                );
                Ok(())
            }
            Err(Error::Damaged { what, .. }) => {
                self.say_unknown(&format!("it is damaged: {what}"));
                Ok(())
            }
            Err(Error::Unsupported { reason: Unsupported::NotWal(_), .. }) => {
                self.say_unknown("it is no state of the cluster");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn say_unknown(&self, why: &str) {
        let text = format!(
            "the database here is not read from: {why}; it is kept aside when a snapshot replaces it"
        );
        tracing::warn!(path = %self.options.path.display(), text);
        self.node.set_problem(Part::State, Some(text));
    }

    fn go_live(&mut self, mut opened: Opened) -> Result<()> {
        opened.begin_if_empty()?;
        let mut opened = opened.redo()?;
        opened.anchor()?;
        let base = opened.base.clone();
        self.history = opened.history;
        let position = base.tip().position;
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
        if base.log.tip() != Some(position) {
            tracing::warn!(%position, logged = ?base.log.tip(), "the last commits here came from no primary that is known");
            let text =
                "the last commits here came from no primary that is known; the primary decides on them";
            self.node.set_problem(Part::State, Some(text.into()));
        }
        self.live = Some(Appender::new(base.clone(), opened.handle)?);
        self.checkpointer = Some(checkpointer.spawn()?);
        *lock(&self.shared.base) = Some(base);
        self.node.applied.replace(self.history.clone(), Some(position));
        self.shared.readable.send_replace(true);
        tracing::info!(%position, "the replica's state is open");
        Ok(())
    }

    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            if self.shared.stop.load(Ordering::Acquire) {
                break;
            }
            match command {
                Command::Units(units) => self.session(|apply| apply.units(units)),
                Command::Standing(reply) => {
                    let _ = reply.send(self.standing());
                }
                Command::Restart => {
                    if let Err(error) = self.maybe_restart() {
                        tracing::warn!(%error, "the WAL could not be restarted");
                    }
                }
                Command::Suspect => {
                    self.suspect(Suspect::Pages);
                    // A new stream begins with a hello that says so.
                    let stop = Error::Stopped("a verification failed; the pages are compared".into());
                    self.session(|_| Err(stop));
                }
                Command::Stop => break,
            }
        }
        self.stop();
    }

    fn stop(&mut self) {
        self.abort();
        // With our connections the wal-index goes out of memory: nobody may ask for its figures any more.
        *lock(&self.shared.base) = None;
        if let Some(mut live) = self.live.take() {
            live.base.stop.store(true, Ordering::Release);
            if let Some(thread) = self.checkpointer.take() {
                thread.thread().unpark();
                let _ = thread.join();
            }
            let rest = rest(&mut live);
            if let Err(error) = rest {
                tracing::warn!(%error, "the last anchor was not written; the next start reads the WAL instead");
            }
            let base = live.base.clone();
            drop(live);
            base.release_locks();
        }
        self.node.applied.close();
    }

    /// Runs a step of a stream; a failure ends that stream and is told to whoever feeds it.
    fn session(&mut self, step: impl FnOnce(&mut Apply) -> Result<()>) {
        if self.failed {
            return;
        }
        if let Err(error) = step(self) {
            self.failed = true;
            if error.no_room() {
                self.node.no_room(&error);
            }
            self.judge(&error);
            self.abort();
            *lock(&self.shared.failure) = Some(error);
        }
    }

    fn abort(&mut self) {
        self.intake.abort(self.live.as_mut());
        self.incoming = None;
        self.healing = None;
    }

    fn standing(&mut self) -> (Standing, mpsc::Receiver<Want>) {
        self.abort();
        self.failed = false;
        *lock(&self.shared.failure) = None;
        self.next_history = None;
        let (wants, receiver) = mpsc::channel(WANTS_MAX);
        self.wants = Some(wants);
        let standing = Standing {
            position: self.live.as_ref().map(Appender::position),
            history: Arc::new(self.history.clone()),
            resume: receive::progress(&self.options.side).map(|p| (p.first, p.next)),
            suspect: self.suspect != Suspect::No,
            marks: self.marks(),
        };
        (standing, receiver)
    }

    fn units(&mut self, units: Vec<Unit>) -> Result<()> {
        if let Some(live) = &self.live {
            live.base.check()?;
        }
        for unit in &units {
            let message = unit.decode().map_err(|e| Error::garbled("the primary", e.to_string()))?;
            match message {
                Message::Epochs(history) => self.epochs(history)?,
                Message::SnapBegin(begin) => {
                    self.node.tell(Event::SnapshotStarted("this node has no state of the cluster".into()));
                    tracing::info!(first = %begin.first, from = %begin.from, "a snapshot begins");
                    if self.live.is_some() {
                        return Err(Error::garbled("the primary", "a snapshot over a live database"));
                    }
                    self.incoming = Some(Incoming::begin(&self.options.side, begin)?);
                }
                Message::HealBegin(begin) => self.heal(begin)?,
                Message::Sums { first, span, sums } => {
                    let (healing, incoming, live) = self.healing()?;
                    incoming.with(live, |overlay, store| {
                        healing.heal.sums(overlay, store, (first, span, sums))
                    })?;
                }
                Message::Sent(sent) => self.sent(sent)?,
                Message::SnapPiece { first, pages, .. } => match (&mut self.healing, &mut self.live) {
                    (Some(_), Some(live)) => {
                        let incoming = self.incoming.as_mut().ok_or_else(no_snapshot)?;
                        incoming.patch(first, pages, live)?;
                    }
                    _ => self.incoming()?.piece(first, pages)?,
                },
                Message::SnapEnd(end) => {
                    let incoming = self.incoming.as_mut().ok_or_else(no_snapshot)?;
                    if incoming.end(end, self.live.as_mut())? {
                        self.adopt()?;
                    }
                }
                Message::TxnBegin(_) | Message::Page { .. } | Message::TxnEnd(_)
                    if self.incoming.is_none() =>
                {
                    let live = self.live.as_mut().ok_or_else(no_state)?;
                    self.intake.unit(live, unit, &message, &self.history)?;
                }
                Message::TxnBegin(begin) => self.incoming()?.txn_begin(begin)?,
                Message::Page { number, hash, page } => {
                    let incoming = self.incoming.as_mut().ok_or_else(no_snapshot)?;
                    incoming.page(number, hash, page, self.live.as_mut())?;
                }
                Message::TxnEnd(end) => {
                    let incoming = self.incoming.as_mut().ok_or_else(no_snapshot)?;
                    let exact = incoming.txn_end(end, self.live.as_mut())?;
                    self.common(end.after)?;
                    if exact {
                        self.adopt()?;
                    }
                }
                _ => return Err(Error::garbled("the primary", "a unit that does not belong into a stream")),
            }
        }
        self.publish()
    }

    fn incoming(&mut self) -> Result<&mut Incoming> {
        self.incoming.as_mut().ok_or_else(no_snapshot)
    }

    /// The log gets the records first, then readers see them.
    fn publish(&mut self) -> Result<()> {
        let Some(live) = &mut self.live else { return Ok(()) };
        self.intake.publish(live)?;
        let position = live.base.tip().position;
        if self.node.applied.position() != Some(position) {
            self.node.applied.advance(position);
        }
        self.maybe_restart()
    }

    fn epochs(&mut self, history: EpochHistory) -> Result<()> {
        let ours = match &self.live {
            Some(live) => history.place(live.position().txid()) == Place::OnHistory,
            None => false,
        };
        if !ours {
            self.next_history = Some(history);
        } else if history != self.history {
            anchor::write_epochs(&self.options.side, &history, false)?;
            self.history = history.clone();
            self.node.applied.replace(history, self.live.as_ref().map(|l| l.base.tip().position));
        }
        Ok(())
    }

    /// What came is exact: it becomes this node's state.
    fn adopt(&mut self) -> Result<()> {
        let Some(incoming) = self.incoming.take() else { return Ok(()) };
        let ready = incoming.finish()?;
        let position = ready.position;
        let history = self.next_history.take().unwrap_or_else(|| self.history.clone());
        if history.place(position.txid()) != Place::OnHistory {
            return Err(Error::garbled("the primary", "a snapshot that is not in its own history"));
        }
        match self.healing.take() {
            Some(healing) => self.adopt_heal(&healing, &ready, history)?,
            None => {
                self.move_in(ready, history)?;
                self.node.set_problem(Part::State, None);
                tracing::info!(%position, "the snapshot is taken over");
                self.node.tell(Event::SnapshotFinished(position));
            }
        }
        receive::discard(&self.options.side)?;
        Ok(())
    }

    /// Where nothing is open: the file takes the database's place.
    fn move_in(&mut self, ready: Ready, history: EpochHistory) -> Result<()> {
        let Ready { directory, file: received, position, pages, .. } = ready;
        // Before SQLite opens it: closing a descriptor of ours later would drop SQLite's lock on the file, and the
        // next process to close the database would take itself for the last and delete the WAL.
        drop(received);
        let (path, side) = (&self.options.path, &self.options.side);
        make_side(&self.options)?;
        self.put_aside()?;
        anchor::write_epochs(side, &history, false)?;
        Log::open(&side.join("log"), self.options.log)?.reset(position)?;
        let from = directory.join("pages");
        let file = match stamp(&from, None)? {
            Some(modified) => FileState::AtRest { position, modified },
            None => FileState::Backfilling(Witnesses::default()),
        };
        let mut anchors = Anchors::open(side)?;
        let anchor = Anchor {
            generation: anchors.generation(),
            salts: Salts::default(),
            frame: 0,
            sum: WalSum::default(),
            position,
            pages,
            file,
        };
        // Before the rename: a file at the database's place always has its anchor.
        anchors.write(anchor, true)?;
        drop(anchors);
        fs::rename(&from, path).map_err(Error::io("rename", path))?;
        sync_parent(path)?;
        let opened = open::open(self.options.clone(), self.node.clone(), false)?;
        if !opened.exact || opened.base.tip().position != position {
            return Err(Error::Mismatch {
                expected: position.to_string(),
                found: opened.base.tip().position.to_string(),
            });
        }
        self.go_live(opened)
    }

    /// Keeps a database that is no state of the cluster.
    fn put_aside(&self) -> Result<()> {
        let path = &self.options.path;
        if !path.exists() {
            return Ok(());
        }
        let kept = self.options.side.join("lost").join(format!("database-{}", unix_millis()));
        fs::create_dir_all(&kept).map_err(Error::io("create", &kept))?;
        // The WAL first: a database without its WAL would look whole.
        let wal = WalFile::path_of(path);
        for from in [&wal, path] {
            if let (true, Some(name)) = (from.exists(), from.file_name()) {
                fs::rename(from, kept.join(name)).map_err(Error::io("rename", from))?;
            }
        }
        let mut shm = path.as_os_str().to_owned();
        shm.push("-shm");
        match fs::remove_file(&shm) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", &shm)(e)),
            _ => {}
        }
        sync_directory(&kept)?;
        sync_parent(path)?;
        tracing::warn!(kept = %kept.display(), "the database that was here is put aside");
        self.node.tell(Event::Kept(kept));
        Ok(())
    }

    fn maybe_restart(&mut self) -> Result<()> {
        let Some(live) = &mut self.live else { return Ok(()) };
        if live.base.check().is_err()
            || live.base.wal_bytes() <= self.options.wal_limit_bytes
            || Instant::now() < self.restart_after
            || live.in_transaction()
        {
            return Ok(());
        }
        match restart(&live.base.clone(), &mut live.handle, DRAIN_MAX)? {
            Restart::Done(tip) => {
                live.resume(tip);
                self.restart_pause = RESTART_PAUSE;
                self.warned_frames = 0;
            }
            Restart::NotYet => {}
            Restart::Readers => {
                self.restart_after = Instant::now() + self.restart_pause;
                self.restart_pause = (self.restart_pause * 2).min(RESTART_PAUSE_MAX);
                warn_if_long(&live.base, &mut self.warned_frames);
            }
        }
        Ok(())
    }
}

impl Drop for Apply {
    fn drop(&mut self) {
        // As in `stop`, which a panic skips.
        *lock(&self.shared.base) = None;
    }
}

/// Leaves everything so that the next start needs no replay.
fn rest(live: &mut Appender) -> Result<()> {
    let base = &live.base;
    base.log.sync()?;
    base.sync_wal()?;
    base.expect_as_left()?;
    let file = base.left_behind(&mut live.handle)?;
    base.write_anchor(&base.tip(), file, true)
}

fn no_snapshot() -> Error {
    Error::garbled("the primary", "a piece of no snapshot")
}

fn no_state() -> Error {
    Error::garbled("the primary", "a transaction before the snapshot that it needs")
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_directory(parent),
        _ => sync_directory(Path::new(".")),
    }
}
