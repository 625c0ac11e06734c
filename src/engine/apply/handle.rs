//! A replica's database, there or yet to come, and the thread that owns it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use crate::context::{Counting, NodeContext};
use crate::engine::apply::inbox::ApplyCommand;
use crate::engine::apply::inbox::ApplyShared;
use crate::engine::apply::inbox::ReplicaStanding;
use crate::engine::apply::stream_error::StreamError;
use crate::engine::apply::thread::Apply;
use crate::engine::checkpoint::bound;
use crate::engine::figures::WalFigures;
use crate::engine::history::append_or_gap;
use crate::engine::options::EngineOptions;
use crate::engine::recover::opened::Opened;
use crate::error::{Error, Result};
use crate::files;
use crate::keys::DatabaseKeys;
use crate::lock::lock;
use crate::log::Log;
use crate::status::Checkpoint;
use crate::txid::Position;
use crate::wire::{Unit, Want};

/// Batches that may wait for the apply thread. The stream reads on only when the thread takes one.
const QUEUE_MAX: usize = 8;

/// Pause between looks at a full queue while the thread is to end.
const QUEUE_FULL_STEP: Duration = Duration::from_millis(1);

/// A replica's database and its apply thread.
#[derive(Debug)]
pub(crate) struct ReplicaEngine {
    node: Arc<NodeContext>,
    commands: mpsc::Sender<ApplyCommand>,
    pub(in crate::engine) shared: Arc<ApplyShared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl ReplicaEngine {
    /// Opens what is there and starts the apply thread. Blocks.
    pub(crate) fn open(options: EngineOptions, node: Arc<NodeContext>) -> Result<ReplicaEngine> {
        files::make_state_dir(options.paths.state_dir())?;
        let options = options.now(&node);
        ReplicaEngine::begin(node.clone(), |shared, commands| Apply::open(options, node, shared, commands))
    }

    /// Goes on from a state that this node vouches for itself. Blocks.
    pub(in crate::engine) fn follow(opened: Opened) -> Result<ReplicaEngine> {
        let node = opened.database.node.clone();
        ReplicaEngine::begin(node, |shared, commands| Apply::follow(opened, shared, commands))
    }

    fn begin(
        node: Arc<NodeContext>,
        make: impl FnOnce(Arc<ApplyShared>, mpsc::WeakSender<ApplyCommand>) -> Result<Apply>,
    ) -> Result<ReplicaEngine> {
        let (commands, receiver) = mpsc::channel(QUEUE_MAX);
        let shared = Arc::new(ApplyShared {
            term: Mutex::new(None),
            readable: watch::Sender::new(false),
            shown: watch::Sender::new(0),
            synced: watch::Sender::new(None),
            failure: Mutex::new(None),
            fallen: Mutex::new(None),
            stop: AtomicBool::new(false),
            heals: AtomicU64::new(0),
            taken: AtomicU64::new(0),
        });
        let apply = make(shared.clone(), commands.downgrade())?;
        let thread = apply.start(receiver)?;
        Ok(ReplicaEngine { node, commands, shared, thread: Mutex::new(Some(thread)) })
    }

    /// True once the database file can be opened and read.
    pub(crate) fn readable(&self) -> watch::Receiver<bool> {
        self.shared.readable.subscribe()
    }

    pub(crate) fn is_readable(&self) -> bool {
        *self.shared.readable.borrow()
    }

    /// None: the position has all that was applied until now. Otherwise this waits for that.
    pub(crate) fn counting(&self) -> Option<Counting> {
        let shown = *self.shared.shown.borrow();
        if shown.is_multiple_of(2) {
            return None;
        }
        let mut shows = self.shared.shown.subscribe();
        Some(Box::pin(async move { shows.wait_for(|times| *times > shown).await.is_ok() }))
    }

    /// Forgets what an earlier stream left unfinished, and says where the replica stands. What
    /// comes out of the channel is to be asked of the primary, for as long as the stream stands.
    pub(crate) async fn standing(&self) -> Result<(ReplicaStanding, mpsc::Receiver<Want>), StreamError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(ApplyCommand::ReplicaStanding(reply)).await.map_err(|_| self.gone())?;
        Ok(answer.await.map_err(|_| self.gone())?)
    }

    /// Takes the keys of the primary. All that is fed after this goes by them. With another page
    /// key the state that is here has no name any more.
    pub(crate) async fn take_keys(&self, keys: DatabaseKeys) -> Result<(), StreamError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(ApplyCommand::Keys(keys, reply)).await.map_err(|_| self.gone())?;
        Ok(answer.await.map_err(|_| self.gone())??)
    }

    /// Hands over data units in order, and waits while the bounded queue is full.
    ///
    /// # Errors
    /// An error of the apply thread comes back from this or a later call, also from one without
    /// units. The caller must then end the stream.
    pub(crate) async fn feed(&self, units: Vec<Unit>) -> Result<(), StreamError> {
        if let Some(error) = lock(&self.shared.failure).take() {
            return Err(error);
        }
        if units.is_empty() {
            return Ok(());
        }
        Ok(self.commands.send(ApplyCommand::Units(units)).await.map_err(|_| self.gone())?)
    }

    /// Why the thread is not there any more.
    fn gone(&self) -> Error {
        lock(&self.shared.fallen).clone().map_or(Error::ShutDown, Error::Stopped)
    }

    /// Has the apply thread compare all pages with the primary's, and heal them: they are not what
    /// the position says. Blocks.
    pub(crate) fn suspect(&self) {
        // A thread that has ended has nothing to heal any more.
        let _ = self.commands.blocking_send(ApplyCommand::Suspect);
    }

    /// Reads pages that the primary asks for, and encodes those that it does not have so. Blocks;
    /// see [`ApplyShared::answer`].
    pub(crate) fn answers(&self) -> impl FnOnce(Want) -> Result<Bytes> + Send + 'static {
        let shared = self.shared.clone();
        move |want| shared.answer(&want)
    }

    /// Grows when the apply thread has taken in something of what it was fed, as far as it went.
    pub(crate) fn taken(&self) -> u64 {
        self.shared.taken.load(Ordering::Relaxed)
    }

    /// The newest position that is fsynced.
    pub(crate) fn synced(&self) -> watch::Receiver<Option<Position>> {
        self.shared.synced.subscribe()
    }

    /// Has everything up to the position fsynced at once, and says so. Blocks.
    ///
    /// # Errors
    /// [`Error::NoState`] without a state, and what the disk refuses.
    pub(crate) fn sync(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let (shared, node) = (self.shared.clone(), self.node.clone());
        move || {
            let position = node.applied.position();
            let term = lock(&shared.term).clone();
            let term = term.ok_or_else(|| Error::NoState("the replica is not filled yet".into()))?;
            // The log first, as at all times.
            append_or_gap::sync(&term)?;
            term.sync_wal()?;
            let now = lock(&shared.term);
            // What was put in its place is not synced.
            if now.as_ref().is_some_and(|now| Arc::ptr_eq(now, &term)) && node.applied.position() == position
            {
                shared.synced.send_replace(position);
            }
            Ok(())
        }
    }

    /// Heals that were finished since the node started.
    pub(crate) fn heals(&self) -> u64 {
        self.shared.heals.load(Ordering::Relaxed)
    }

    /// Fails when the files at the paths are not those that are open, or when somebody else wrote
    /// to the database.
    pub(crate) fn expect_files(&self) -> Result<()> {
        let base = lock(&self.shared.term).clone();
        // Replication goes on: the apply thread opens what is at the path now.
        let disturbed = |error: Error| Error::Disturbed(error.cause().to_string());
        base.map_or(Ok(()), |base| base.expect_files().map_err(disturbed))
    }

    /// Copies back all that is applied, and begins the WAL anew. Blocks for at most so long.
    pub(crate) fn checkpoint(&self, limit: Duration) -> Result<Checkpoint> {
        let base = lock(&self.shared.term).clone();
        let base = base.ok_or_else(|| Error::NoState("the replica is not filled yet".into()))?;
        // Each time that the checkpointer looks itself, it has the apply thread look, too.
        bound::checkpoint(&base, limit, || {})
    }

    pub(crate) fn wal(&self) -> WalFigures {
        lock(&self.shared.term).as_ref().map_or(WalFigures::default(), |b| b.figures())
    }

    /// The replica's log, once it has a state.
    pub(crate) fn log(&self) -> Option<Arc<Log>> {
        lock(&self.shared.term).as_ref().map(|b| b.log.clone())
    }

    /// Ends the replica's role. The thread applies nothing any more, all that it applied is on the
    /// disk, and the threads have ended. Blocks.
    ///
    /// # Errors
    /// [`Error::NoState`] where no primary vouches for what is here: this is still a replica then.
    /// After any other error it has stopped for good.
    pub(crate) fn stop(&self) -> Result<Opened> {
        let (reply, opened) = std::sync::mpsc::sync_channel(1);
        self.commands.blocking_send(ApplyCommand::Leave(reply)).map_err(|_| self.gone())?;
        let opened = opened.recv().map_err(|_| self.gone())??;
        self.close();
        Ok(opened)
    }

    /// The state that is here and that a primary vouches for, when all that came until now is taken
    /// in. What has begun to come and is not whole is forgotten. Blocks.
    pub(crate) fn vouched(&self) -> Result<Option<Position>> {
        let (reply, vouched) = std::sync::mpsc::sync_channel(1);
        self.commands.blocking_send(ApplyCommand::Vouched(reply)).map_err(|_| self.gone())?;
        vouched.recv().map_err(|_| self.gone())
    }

    /// Ends the replica's role whatever is here, and closes the files. Who waits for a transaction
    /// goes on waiting: the node is about to open them in another way. Blocks.
    pub(crate) fn abandon(&self) -> Result<()> {
        let (reply, closed) = std::sync::mpsc::sync_channel(1);
        self.commands.blocking_send(ApplyCommand::Abandon(reply)).map_err(|_| self.gone())?;
        closed.recv().map_err(|_| self.gone())?;
        self.close();
        Ok(())
    }

    /// Stops and joins the threads. Blocks.
    pub(crate) fn close(&self) {
        let Some(thread) = lock(&self.thread).take() else { return };
        self.shared.stop.store(true, Ordering::Release);
        // In a full queue the thread sees the flag. In an empty one only a command wakes it.
        while let Err(mpsc::error::TrySendError::Full(_)) = self.commands.try_send(ApplyCommand::Stop) {
            std::thread::sleep(QUEUE_FULL_STEP);
        }
        // It has said how it ended.
        let _ = thread.join();
    }
}

impl Drop for ReplicaEngine {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use crate::engine::tests::{Home, catch_up, open_plain, until};

    #[test]
    fn what_a_replica_shows_is_waited_for_until_the_position_has_it() {
        let home = Home::new();
        let plain = open_plain(&home.path("p.db"));
        plain.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, k, v)").unwrap();
        let engine = home.primary("p.db");
        let follower = home.follower("r.db");
        catch_up(&engine, &follower);
        let shown = *follower.shared.shown.borrow();
        plain.execute_batch("INSERT INTO t(k) VALUES (1)").unwrap();
        catch_up(&engine, &follower);
        assert!(*follower.shared.shown.borrow() > shown, "it says what it shows");
        until("the position", || follower.counting().is_none());
        let showing = follower.shared.show();
        let counting = follower.counting().unwrap();
        drop(showing);
        // The next one may have begun.
        let _next = follower.shared.show();
        assert!(tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(counting));
    }
}
