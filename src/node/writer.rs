//! The one connection that writes, the thread that runs async writes on it, and the one that shares
//! their fsyncs.

mod connect;
mod guard;
mod jobs;
mod queue;
mod reentrancy;
mod returned;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, mpsc};
use std::thread::JoinHandle;
use std::time::Instant;

use rusqlite::{Connection, DropBehavior, ErrorCode, InterruptHandle, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

use crate::context::NodeContext;
use crate::engine::{CommitGate, Durability, PrimaryEngine};
use crate::error::{Blame, Cause, Error, Result};
use crate::lock::lock;
use crate::session::Written;
use crate::sqlite::{CommitHook, last_code};
use crate::status::Role;
use crate::threads::{self, message};
use crate::txid::Txid;

pub use guard::WriterGuard;

use guard::ConnectionSettings;
use jobs::{Job, JobQueue, Jobs, Syncs, WriteJob, refuse_aside, run_jobs, run_syncs, survive};
use queue::Queue;
use reentrancy::{Inside, may_block};
use returned::{Borrows, Returned, Unanswered};

/// Commits that may wait for their acknowledgement; the writer then waits, too.
const WAITING_MAX: usize = 4096;

/// Which connection a function of [`Config::on_connect`](crate::Config::on_connect) is given.
///
/// ```
/// use replite::{Config, ConnectionKind};
///
/// let config = Config::new("app.db").on_connect(|conn, kind| match kind {
///     ConnectionKind::Writer => conn.pragma_update(None, "foreign_keys", true),
///     _ => Ok(()),
/// });
/// # drop(config);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ConnectionKind {
    /// The one that writes.
    Writer,
    /// One of those that read.
    Reader,
}

pub(crate) type OnConnect = Arc<dyn Fn(&Connection, ConnectionKind) -> rusqlite::Result<()> + Send + Sync>;
pub(crate) type Migrate = Arc<dyn Fn(&mut Connection) -> Result<()> + Send + Sync>;

/// What the writer's connection is made with.
pub(crate) struct WriterSetup {
    pub(crate) path: PathBuf,
    pub(crate) gate: CommitGate,
    /// Writes that may wait.
    pub(crate) queue: usize,
    pub(crate) statement_cache: usize,
    pub(crate) trust_schema: bool,
    pub(crate) on_connect: Option<OnConnect>,
    pub(crate) migrate: Option<Migrate>,
}

/// What a write brought about.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::{Db, Error};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let commit = db
///     .write(|tx| {
///         tx.execute("INSERT INTO notes VALUES ('a')", [])?;
///         Ok::<_, Error>(tx.last_insert_rowid())
///     })
///     .await?;
/// assert_eq!(commit.value, 1);
/// // Any node can wait for it.
/// db.wait_for(commit.txid.expect("it wrote something")).await?;
/// // A write that changes nothing has no transaction.
/// let none = db.write(|tx| Ok::<_, Error>(tx.execute("DELETE FROM notes WHERE 0", [])?)).await?;
/// assert_eq!(none.txid, None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Commit<T> {
    /// What the closure returned.
    pub value: T,
    /// The transaction, to wait for or to hand to a client. None when nothing was written, or
    /// nothing else than was there.
    ///
    /// It is never that of another writer, with one exception: the closure committed by itself and
    /// ended with a transaction that wrote nothing. Then it may be a later one.
    pub txid: Option<Txid>,
}

impl<T> From<&Commit<T>> for Written {
    fn from(commit: &Commit<T>) -> Written {
        Written::commit(commit.txid)
    }
}

/// The writer of a database, which writes while the node is the primary.
pub(crate) struct Writer {
    shared: Arc<WriterShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct WriterShared {
    node: Arc<NodeContext>,
    setup: WriterSetup,
    gate: CommitGate,
    queue: Mutex<Option<Arc<JobQueue>>>,
    connection: Mutex<Option<OpenWriter>>,
    /// The connection's. What runs on it is interrupted when its commit would come too late.
    interrupt: Mutex<Option<InterruptHandle>>,
    /// The node is not to write for now.
    refuses: AtomicBool,
    /// Commits that were handed to the sync thread and are not acknowledged yet.
    waiting: AtomicUsize,
    /// When the connection comes back, and when all commits are answered.
    returned: Arc<Returned>,
}

/// The connection of one term, and the engine that its commits go to.
struct OpenWriter {
    connection: Connection,
    /// Counts the connection's commits.
    commits: CommitHook,
    /// How the connection has to be when its borrower gives it back.
    settings: ConnectionSettings,
    engine: Arc<PrimaryEngine>,
}

/// Why a write failed.
pub(crate) enum Failed<E> {
    /// The application's closure said so.
    App(E),
    Ours(Error),
}

impl<E> From<Error> for Failed<E> {
    fn from(error: Error) -> Failed<E> {
        Failed::Ours(error)
    }
}

impl<E: From<Error>> Failed<E> {
    /// The application's error, on the application's own thread, which its conversion may panic on.
    pub(crate) fn into_one(self) -> E {
        match self {
            Failed::App(error) => error,
            Failed::Ours(error) => error.into(),
        }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    /// A writer that is not open yet.
    pub(crate) fn new(node: Arc<NodeContext>, setup: WriterSetup) -> Writer {
        let gate = setup.gate;
        let (queue, connection, interrupt, refuses, waiting) = Default::default();
        let returned = Arc::<Returned>::default();
        let shared =
            WriterShared { node, setup, gate, queue, connection, interrupt, refuses, waiting, returned };
        Writer { shared: Arc::new(shared), threads: Mutex::default() }
    }

    /// Opens the connection, runs the application's migrations on it, and starts the threads.
    /// Blocks.
    pub(crate) fn open(&self, engine: &Arc<PrimaryEngine>) -> Result<()> {
        let shared = &self.shared;
        let mut open = shared.connect(engine)?;
        *lock(&shared.interrupt) = Some(open.connection.get_interrupt_handle());
        let migrated = shared.migrate(&mut open);
        *lock(&shared.connection) = Some(open);
        migrated.and_then(|()| self.start(engine)).inspect_err(|_| shared.close())?;
        shared.refuses.store(false, Ordering::Release);
        Ok(())
    }

    /// Starts the threads.
    fn start(&self, engine: &Arc<PrimaryEngine>) -> Result<()> {
        let shared = &self.shared;
        let queue = Arc::new(Queue::new(shared.setup.queue));
        let (to_sync, waiting) = mpsc::sync_channel(WAITING_MAX);
        let one = Jobs { shared: shared.clone(), engine: engine.clone(), queue: queue.clone(), to_sync };
        let two = Syncs { shared: shared.clone(), engine: engine.clone(), waiting };
        let mut threads = lock(&self.threads);
        threads.push(threads::start("replite-writer", one, run_jobs, |jobs, ended| {
            jobs.shared.end(&jobs.engine, ended, &jobs.queue);
        })?);
        let of_jobs = queue.clone();
        let second = threads::start("replite-sync", two, run_syncs, move |syncs, ended| {
            syncs.shared.end(&syncs.engine, ended, &of_jobs);
        });
        // The first one would keep the engine, and its locks, for ever.
        threads.push(second.inspect_err(|_| shared.refuse_all(queue.close()))?);
        *lock(&shared.queue) = Some(queue);
        Ok(())
    }

    pub(crate) fn durability(&self) -> Durability {
        self.shared.gate.durability()
    }

    /// Whether it has a connection that writes.
    pub(crate) fn is_open(&self) -> bool {
        lock(&self.shared.queue).is_some() && !self.shared.refuses.load(Ordering::Acquire)
    }

    /// Writes that wait for the thread.
    pub(crate) fn queued(&self) -> usize {
        lock(&self.shared.queue).as_ref().map_or(0, |queue| queue.len())
    }

    /// Refuses what is queued and what comes, until it accepts again. What runs goes on. Waits for
    /// nothing: on this thread no code of the application runs.
    pub(crate) fn refuse(&self) {
        self.shared.refuses.store(true, Ordering::Release);
        let jobs = lock(&self.shared.queue).clone().map_or_else(Vec::new, |queue| queue.refuse());
        if !jobs.is_empty() {
            refuse_aside(&self.shared, jobs, &self.threads);
        }
    }

    /// Takes writes again.
    pub(crate) fn accept(&self) {
        if let Some(queue) = &*lock(&self.shared.queue) {
            queue.accept();
            self.shared.refuses.store(false, Ordering::Release);
        }
    }

    /// Ends the statement that runs on the connection, if one does.
    pub(crate) fn interrupt(&self) {
        if let Some(interrupt) = &*lock(&self.shared.interrupt) {
            interrupt.interrupt();
        }
    }

    /// Runs a closure in a transaction, on the writer's thread.
    pub(crate) async fn write<T, E, F>(&self, run: F) -> Result<Commit<T>, Failed<E>>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: Send + 'static,
    {
        if Inside::is(self.shared.address()) {
            return Err(Error::Reentrant.into());
        }
        let (reply, answer) = oneshot::channel();
        let job = Box::new(WriteJob { run, reply });
        let room = lock(&self.shared.queue).as_ref().map(|queue| queue.room.clone());
        let room = room.ok_or_else(|| self.shared.refusal())?;
        let room = room.acquire_owned().await.map_err(|_| self.shared.refusal())?;
        let queued = lock(&self.shared.queue).as_ref().is_some_and(|queue| queue.push(job));
        if !queued {
            return Err(self.shared.refusal().into());
        }
        // Given back when the job is taken out.
        room.forget();
        // What is queued is refused by name.
        let panicked = || {
            let panic = "a panic outside of the closure, while it ran or after that";
            Error::OutcomeUnknown { txid: None, cause: Cause::new(panic, Blame::Caller) }
        };
        answer.await.unwrap_or_else(|_| Err(panicked().into()))
    }

    /// The same on the caller's thread.
    pub(crate) fn write_blocking<T, E, F>(&self, run: F) -> Result<Commit<T>, Failed<E>>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E>,
    {
        may_block()?;
        let (inside, mut connection) = self.shared.enter()?;
        let Some(open) = connection.as_mut() else { return Err(self.shared.refusal().into()) };
        // Held until the commit is acknowledged, even if the database is closed meanwhile.
        let engine = open.engine.clone();
        let commit = self.shared.transact(open, run)?;
        let _unanswered = Unanswered::new(&self.shared.returned);
        // The next caller commits while this one waits for the disk: both share an fsync.
        drop((connection, inside));
        if let Some(txid) = commit.txid {
            self.shared.gate.wait(&engine, txid)?;
        }
        Ok(commit)
    }

    pub(crate) fn guard(&self) -> Result<WriterGuard<'_>> {
        may_block()?;
        let (inside, connection) = self.shared.enter()?;
        if connection.is_none() {
            return Err(self.shared.refusal());
        }
        WriterGuard::new(connection, &self.shared, inside)
    }

    /// [`Writer::close`], unless another thread has the connection.
    pub(crate) fn try_close(&self) -> bool {
        match self.shared.connection.try_lock() {
            Ok(mut open) => self.shared.end_connection(open.take()),
            Err(TryLockError::Poisoned(mut open)) => self.shared.end_connection(open.get_mut().take()),
            Err(TryLockError::WouldBlock) => return false,
        }
        self.close();
        true
    }

    /// Ends the threads. What is queued is refused, what has begun ends. Blocks.
    pub(crate) fn close(&self) {
        let queue = lock(&self.shared.queue).take();
        if let Some(queue) = queue {
            self.shared.refuse_all(queue.close());
        }
        let threads = std::mem::take(&mut *lock(&self.threads));
        let here = std::thread::current().id();
        if threads.iter().any(|thread| thread.thread().id() == here) {
            // The last handle went inside of a write, or with its result: the threads end by
            // themselves after it.
            return;
        }
        self.shared.close();
        for thread in threads {
            // It has said how it ended.
            let _ = thread.join();
        }
    }
}

impl WriterShared {
    /// What tells this writer from those of other databases.
    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Waits for the connection.
    fn enter(&self) -> Result<(Borrows<'_>, MutexGuard<'_, Option<OpenWriter>>)> {
        let inside = Inside::enter(self.address())?;
        Ok((self.returned.borrows(inside), lock(&self.connection)))
    }

    /// Closes the connection.
    fn close(&self) {
        let open = lock(&self.connection).take();
        self.end_connection(open);
    }

    fn end_connection(&self, open: Option<OpenWriter>) {
        // Before the connection that it is of.
        *lock(&self.interrupt) = None;
        if let Some(OpenWriter { connection, commits, .. }) = open {
            commits.take_off(&connection);
        }
    }

    /// Why there are no writes.
    fn refusal(&self) -> Error {
        if let Some(why) = self.node.failure() {
            return Error::Stopped(why);
        }
        let ends = self.node.stop.is_cancelled() && self.node.fence.is_open();
        // Of a node that goes on, the role has changed, or is about to.
        let late = if ends { Error::ShutDown } else { Error::NotPrimary { primary: None } };
        not_primary(&self.node).unwrap_or(late)
    }

    /// Fails when nothing is to be written any more, because this node's time as the primary is
    /// over.
    fn expect_open(&self) -> Result<()> {
        match self.refuses.load(Ordering::Acquire) || !self.node.fence.is_open() {
            true => Err(self.refusal()),
            false => Ok(()),
        }
    }

    /// What a failure means that left nothing committed: where the fence is the cause, that another
    /// node has to do it.
    fn late(&self, error: Error) -> Error {
        match self.node.fence.is_open() {
            true => error,
            false => Error::NotPrimary { primary: None },
        }
    }

    /// The end of a thread. Without it nothing is written any more.
    fn end(&self, engine: &PrimaryEngine, ended: Result<()>, queue: &JobQueue) {
        let Err(error) = ended else { return };
        engine.fail(&error);
        self.refuse_all(queue.close());
    }

    fn refuse_all(&self, jobs: Vec<Box<dyn Job>>) {
        for job in jobs {
            survive(|| job.refuse(self.refusal()));
        }
    }

    /// Every error but [`Error::OutcomeUnknown`] says that nothing was committed.
    fn transact<T, E, F>(&self, open: &mut OpenWriter, run: F) -> Result<Commit<T>, Failed<E>>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E>,
    {
        let sqlite = Error::Sqlite;
        let OpenWriter { connection, commits, settings, engine } = open;
        self.expect_open()?;
        engine.pace();
        // That may have taken a while.
        self.expect_open()?;
        engine.ready()?;
        commits.again(connection);
        commits.reset();
        let asked = Instant::now();
        let begin = || Transaction::new_unchecked(connection, TransactionBehavior::Immediate);
        let mut transaction = match begin() {
            // An application may set something that prevents all writes. Its next writes are done
            // all the same.
            Err(_) if settings.mend(connection).map_err(sqlite)? => begin(),
            begun => begun,
        }
        .map_err(|error| self.late(Error::of_begin(error, asked.elapsed())))?;
        transaction.set_drop_behavior(DropBehavior::Rollback);
        let begun = engine.begun()?;
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut transaction)));
        let value = match result {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => {
                match last_code(&transaction) & 0xff {
                    rusqlite::ffi::SQLITE_FULL => engine.no_room(),
                    // We did, and nothing of it is kept.
                    rusqlite::ffi::SQLITE_INTERRUPT if commits.count() == 0 && !self.node.fence.is_open() => {
                        return Err(self.refusal().into());
                    }
                    _ => {}
                }
                return Err(Failed::App(error));
            }
            Err(panic) => return Err(Error::Panicked(message(&*panic)).into()),
        };
        let begun = engine.ending(begun)?;
        // It may have committed by itself, and taken our hook away.
        let earlier = !commits.again(&transaction) || commits.count() > 0;
        commits.reset();
        transaction.commit().map_err(|error| {
            if error.sqlite_error_code() == Some(ErrorCode::DiskFull) {
                engine.no_room();
            }
            match engine.may_have_committed(begun) {
                true => sqlite(error).of_a_commit(),
                false if earlier => sqlite(error),
                false => self.late(sqlite(error)),
            }
        })?;
        let txid = engine.committed(begun, commits.last(), earlier)?;
        // Nothing was written, and what it has read may be old.
        if txid.is_none() && !earlier && !self.node.fence.is_open() {
            return Err(self.refusal().into());
        }
        Ok(Commit { value, txid })
    }
}

/// Why a node that is not the primary does not write.
pub(crate) fn not_primary(node: &NodeContext) -> Option<Error> {
    let state = node.roles.borrow();
    let primary = || state.primary.clone().map(Box::new);
    match state.role {
        Role::Primary | Role::Stopped => None,
        _ => Some(Error::NotPrimary { primary: primary() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Plaintext;
    use crate::db::{Config, Db};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_replica_that_has_stopped_sends_its_writes_to_the_primary_like_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = crate::lease::Fixed::replica_of("http://127.0.0.1:9");
        let db = Db::open(Config::new(dir.path().join("a.db")).plaintext(Plaintext::Loopback).lease(nowhere))
            .await
            .unwrap();
        let run = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute("CREATE TABLE t(a)", [])?);
        let refused = |error: Error| matches!(error, Error::NotPrimary { .. });
        assert!(refused(db.write(run).await.unwrap_err()), "it follows");
        db.inner.node.fail(&Error::Disturbed("by intent".into()));
        assert_eq!(db.role(), Role::Stopped);
        assert!(refused(db.write(run).await.unwrap_err()), "it has stopped");
        let blocking = db.clone();
        let guard = tokio::task::spawn_blocking(move || blocking.writer().map(drop)).await.unwrap();
        assert!(refused(guard.unwrap_err()), "it has stopped");
        db.shutdown().await;
        assert!(matches!(db.write(run).await, Err(Error::ShutDown)));
    }

    #[tokio::test(flavor = "multi_thread")]
    #[expect(clippy::await_holding_lock, reason = "the thread that needs it is to wait")]
    async fn after_the_end_of_a_thread_what_is_queued_and_what_comes_later_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(Config::new(dir.path().join("a.db"))).await.unwrap();
        let (writer, engine) = (&db.inner.writer, db.inner.slot.primary().unwrap());
        let run = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute("CREATE TABLE t(a)", [])?);
        let queue = lock(&writer.shared.queue).clone().unwrap();
        // Its thread waits in vain: what is queued stays so.
        let connection = lock(&writer.shared.connection);
        let (first, _first) = oneshot::channel();
        assert!(queue.push(Box::new(WriteJob { run, reply: first })));
        crate::ends::comes("the thread has it", || queue.is_empty()).await;
        let (reply, answer) = oneshot::channel();
        assert!(queue.push(Box::new(WriteJob { run, reply })));
        writer.shared.end(&engine, Err(Error::Disturbed("by intent".into())), &queue);
        drop(connection);
        let stopped = |error: Error| matches!(error, Error::Stopped(why) if why.text() == "by intent");
        assert!(stopped(answer.await.unwrap().map_err(Failed::into_one).unwrap_err()), "queued");
        assert!(stopped(db.write(run).await.unwrap_err()), "later");
        let blocking = db.clone();
        let refused = tokio::task::spawn_blocking(move || blocking.write_blocking(run)).await.unwrap();
        assert!(stopped(refused.unwrap_err()), "on a thread");
        assert!(!db.health().live && db.role() == crate::Role::Stopped);
        db.shutdown().await;
    }
}
