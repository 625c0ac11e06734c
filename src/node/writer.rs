//! The one connection that writes, the thread that runs async writes on it, and the one that shares
//! their fsyncs.

mod guard;
mod jobs;
mod reentrancy;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Connection, DropBehavior, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::{Semaphore, mpsc as queue, oneshot};

use crate::context::NodeContext;
use crate::engine::{CommitGate, PrimaryEngine};
use crate::error::{Blame, Cause, Error, Result};
use crate::lock::lock;
use crate::sqlite::{self, CommitHook, defend, last_code};
use crate::status::Role;
use crate::threads::{self, message};
use crate::txid::Txid;

pub use guard::WriterGuard;

use guard::Settings;
use jobs::{Job, Jobs, Syncs, WriteJob, run_jobs, run_syncs, survive};
use reentrancy::{Inside, may_block};

/// Between two tries to get the connection that is to be closed.
const CLOSE_STEP: Duration = Duration::from_millis(1);
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

impl<T> From<&Commit<T>> for Option<Txid> {
    fn from(commit: &Commit<T>) -> Option<Txid> {
        commit.txid
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
    /// The way into the queue. No future keeps a copy: one that is no longer polled would keep the
    /// thread.
    queue: Mutex<Option<Queue>>,
    connection: Mutex<Option<OpenWriter>>,
    /// Commits that were handed to the sync thread and are not acknowledged yet.
    waiting: AtomicUsize,
}

/// Writes that wait for the thread.
struct Queue {
    jobs: queue::UnboundedSender<Box<dyn Job>>,
    /// Bounds them.
    room: Arc<Semaphore>,
}

/// The connection of one term, and the engine that its commits go to.
struct OpenWriter {
    connection: Connection,
    /// Counts the connection's commits.
    commits: CommitHook,
    /// How the connection has to be when its borrower gives it back.
    settings: Settings,
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
        let (queue, connection, waiting) = Default::default();
        let shared = WriterShared { node, setup, gate, queue, connection, waiting };
        Writer { shared: Arc::new(shared), threads: Mutex::default() }
    }

    /// Opens the connection, runs the application's migrations on it, and starts the threads.
    /// Blocks.
    pub(crate) fn open(&self, engine: &Arc<PrimaryEngine>) -> Result<()> {
        self.start(engine, self.shared.setup.migrate.as_ref())
    }

    /// [`Writer::open`] in a term whose migrations have run.
    pub(crate) fn reopen(&self, engine: &Arc<PrimaryEngine>) -> Result<()> {
        self.start(engine, None)
    }

    fn start(&self, engine: &Arc<PrimaryEngine>, migrate: Option<&Migrate>) -> Result<()> {
        let shared = &self.shared;
        let open = connect(&shared.setup, engine, migrate)?;
        // What the migrations committed has its place in history, and stays, before any caller
        // hears that we are open.
        shared.gate.wait(engine, engine.captured()?)?;
        let (jobs, receiver) = queue::unbounded_channel();
        let room = Arc::new(Semaphore::new(shared.setup.queue));
        let (to_sync, waiting) = mpsc::sync_channel(WAITING_MAX);
        let one =
            Jobs { shared: shared.clone(), engine: engine.clone(), room: room.clone(), receiver, to_sync };
        let two = Syncs { shared: shared.clone(), engine: engine.clone(), waiting };
        let mut threads = lock(&self.threads);
        threads.push(threads::start("replite-writer", one, run_jobs, |jobs, ended| {
            jobs.shared.end(&jobs.engine, ended, Some(jobs.receiver));
        })?);
        threads.push(threads::start("replite-sync", two, run_syncs, |syncs, ended| {
            syncs.shared.end(&syncs.engine, ended, None);
        })?);
        // Not before: should the second thread not start, the first one ends with the only sender.
        // Otherwise it would keep the engine, and its locks, for ever.
        *lock(&shared.connection) = Some(open);
        *lock(&shared.queue) = Some(Queue { jobs, room });
        Ok(())
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
        let queued = lock(&self.shared.queue).as_ref().is_some_and(|queue| queue.jobs.send(job).is_ok());
        if !queued {
            return Err(self.shared.refusal().into());
        }
        // Given back when the job is taken out.
        room.forget();
        // What is queued is refused by name.
        let panicked = || {
            Error::OutcomeUnknown(Cause::new(
                "a panic outside of the closure, while it ran or after that",
                Blame::Caller,
            ))
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
        // The next caller commits while this one waits for the disk: both share an fsync.
        drop((connection, inside));
        if let Some(txid) = commit.txid {
            self.shared.gate.wait(&engine, txid).map_err(Error::of_a_commit)?;
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

    /// [`Writer::close`], unless another thread has the connection for longer than this: then it
    /// stays open.
    ///
    /// # Errors
    /// [`Error::Timeout`].
    pub(crate) fn close_within(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        loop {
            match self.shared.connection.try_lock() {
                Ok(mut open) => {
                    self.shared.end_connection(open.take());
                    break;
                }
                Err(TryLockError::Poisoned(mut open)) => {
                    self.shared.end_connection(open.get_mut().take());
                    break;
                }
                Err(TryLockError::WouldBlock) if Instant::now() < end => std::thread::sleep(CLOSE_STEP),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Timeout { what: "the writer connection".into(), after: limit });
                }
            }
        }
        self.close();
        Ok(())
    }

    /// Ends the threads. What is queued is refused, what has begun ends. Blocks.
    pub(crate) fn close(&self) {
        // The thread ends with the only sender. Callers that wait for room are refused.
        if let Some(queue) = lock(&self.shared.queue).take() {
            queue.room.close();
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

/// Opens the connection as the application and we want it, and has the database migrated.
fn connect(
    setup: &WriterSetup,
    engine: &Arc<PrimaryEngine>,
    migrate: Option<&Migrate>,
) -> Result<OpenWriter> {
    let mut connection = sqlite::connect(&setup.path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    defend(&connection, !setup.trust_schema)?;
    connection.set_prepared_statement_cache_capacity(setup.statement_cache);
    // COMMIT does not fsync; the shared fsync does, for all that wait.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    // Before the application may set an authorizer of its own.
    guard::refuse_exclusive(&mut connection)?;
    if let Some(run) = &setup.on_connect {
        run(&connection, ConnectionKind::Writer)?;
    }
    let settings = Settings::of(&connection)?;
    if let Some(run) = migrate {
        let migrated = catch_unwind(AssertUnwindSafe(|| run(&mut connection)));
        migrated.unwrap_or_else(|panic| Err(Error::Panicked(message(&*panic))))?;
        if !connection.is_autocommit() {
            return Err(Error::Config("the migration left a transaction open; it is rolled back".into()));
        }
    }
    settings.restore(&connection)?;
    let commits = CommitHook::put_on(&connection);
    Ok(OpenWriter { connection, commits, settings, engine: engine.clone() })
}

impl WriterShared {
    /// What tells this writer from those of other databases.
    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// Waits for the connection.
    fn enter(&self) -> Result<(Inside, MutexGuard<'_, Option<OpenWriter>>)> {
        let inside = Inside::enter(self.address())?;
        Ok((inside, lock(&self.connection)))
    }

    /// Closes the connection.
    fn close(&self) {
        let open = lock(&self.connection).take();
        self.end_connection(open);
    }

    fn end_connection(&self, open: Option<OpenWriter>) {
        if let Some(OpenWriter { connection, commits, .. }) = open {
            commits.take_off(&connection);
        }
    }

    /// Why there are no writes.
    fn refusal(&self) -> Error {
        if let Some(why) = self.node.failure() {
            return Error::Stopped(why);
        }
        not_primary(&self.node).unwrap_or(Error::ShutDown)
    }

    /// The end of a thread. Without it nothing is written any more.
    fn end(
        &self,
        engine: &PrimaryEngine,
        ended: Result<()>,
        jobs: Option<queue::UnboundedReceiver<Box<dyn Job>>>,
    ) {
        let Err(error) = ended else { return };
        engine.fail(&error);
        if let Some(queue) = &*lock(&self.queue) {
            queue.room.close();
        }
        let Some(mut jobs) = jobs else { return };
        jobs.close();
        while let Ok(job) = jobs.try_recv() {
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
        engine.pace();
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
        .map_err(|error| Error::of_begin(error, asked.elapsed()))?;
        transaction.set_drop_behavior(DropBehavior::Rollback);
        let begun = engine.begun()?;
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut transaction)));
        let value = match result {
            Ok(Ok(value)) => value,
            Ok(Err(error)) => {
                if last_code(&transaction) & 0xff == rusqlite::ffi::SQLITE_FULL {
                    engine.no_room();
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
                false => sqlite(error),
            }
        })?;
        let txid = engine.committed(begun, commits.last(), earlier)?;
        Ok(Commit { value, txid })
    }
}

/// Why a node that follows another does not write.
pub(crate) fn not_primary(node: &NodeContext) -> Option<Error> {
    let state = node.roles.borrow();
    let primary = || state.primary.clone().map(Box::new);
    (state.role == Role::Replica).then(|| Error::NotPrimary { primary: primary() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::{Config, Db};

    #[tokio::test(flavor = "multi_thread")]
    async fn a_replica_that_has_stopped_sends_its_writes_to_the_primary_like_any_other() {
        let dir = tempfile::tempdir().unwrap();
        let nowhere = crate::lease::Fixed::replica_of("http://127.0.0.1:9");
        let db = Db::open(Config::new(dir.path().join("a.db")).lease(nowhere)).await.unwrap();
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
    async fn after_the_end_of_a_thread_what_is_queued_and_what_comes_later_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(Config::new(dir.path().join("a.db"))).await.unwrap();
        let (writer, engine) = (&db.inner.writer, db.inner.slot.primary().unwrap());
        let run = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute("CREATE TABLE t(a)", [])?);
        let (jobs, receiver) = queue::unbounded_channel();
        let (reply, answer) = oneshot::channel();
        jobs.send(Box::new(WriteJob { run, reply }) as Box<dyn Job>).unwrap_or_else(|_| panic!("it is open"));
        writer.shared.end(&engine, Err(Error::Disturbed("by intent".into())), Some(receiver));
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
