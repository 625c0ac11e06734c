//! The one connection that writes, the thread that runs async writes on it, and the one that shares their fsyncs.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::hooks::Wal;
use rusqlite::{Connection, DropBehavior, OpenFlags, Transaction, TransactionBehavior};
use tokio::sync::{mpsc as queue, oneshot};

use crate::engine::{Durability, Engine};
use crate::error::{Error, Result};
use crate::txid::Txid;

/// How long a write waits for another process that writes.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Commits that may wait for an fsync; the writer then waits, too.
const UNSYNCED_MAX: usize = 4096;

thread_local! {
    /// Whether this thread is inside a write: another one would wait for itself.
    static WRITING: Cell<bool> = const { Cell::new(false) };
}

/// What a write brought about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Commit<T> {
    /// What the closure returned.
    pub value: T,
    /// The transaction, to wait for or to hand to a client; none when nothing was written.
    pub txid: Option<Txid>,
}

impl<T> From<&Commit<T>> for Option<Txid> {
    fn from(commit: &Commit<T>) -> Option<Txid> {
        commit.txid
    }
}

/// The writer of a primary.
pub(super) struct Writer {
    shared: Arc<Shared>,
    jobs: Mutex<Option<queue::Sender<Box<dyn Job>>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    engine: Arc<Engine>,
    durability: Durability,
    connection: Mutex<Option<Connection>>,
    /// What the WAL hook said during a transaction.
    told: Arc<Told>,
    /// Commits that were handed to the sync thread and are not acknowledged yet.
    unsynced: AtomicUsize,
}

/// What the WAL hook says of commits to the main database.
#[derive(Debug, Default)]
struct Told {
    commits: AtomicU32,
    /// Where the last of them ended.
    frame: AtomicU32,
}

impl Told {
    fn forget(&self) {
        self.commits.store(0, Ordering::Relaxed);
    }

    fn commit(&self, frame: u32) {
        self.frame.store(frame, Ordering::Relaxed);
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    /// The end of the one commit; nothing when there was none, or the application committed by itself in between.
    fn one(&self) -> Option<u32> {
        (self.commits.load(Ordering::Relaxed) == 1).then(|| self.frame.load(Ordering::Relaxed))
    }
}

/// One async write.
trait Job: Send {
    fn run(self: Box<Self>, shared: &Shared, connection: &mut Connection) -> Option<Unsynced>;
    fn refuse(self: Box<Self>);
}

/// A commit that waits for its fsync.
struct Unsynced {
    txid: Txid,
    acknowledge: Box<dyn FnOnce(Result<()>) + Send>,
}

struct Write<T, E, F> {
    run: F,
    reply: oneshot::Sender<Result<Commit<T>, E>>,
}

impl<T, E, F> Job for Write<T, E, F>
where
    F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send,
    T: Send + 'static,
    E: From<Error> + Send + 'static,
{
    fn run(self: Box<Self>, shared: &Shared, connection: &mut Connection) -> Option<Unsynced> {
        let Write { run, reply } = *self;
        if reply.is_closed() {
            return None; // Its caller left before it began: it never runs.
        }
        match shared.transact(connection, run) {
            Ok(Commit { value, txid: Some(txid) }) if shared.durability == Durability::Synced => {
                let acknowledge = Box::new(move |synced: Result<()>| {
                    let result = synced.map(|()| Commit { value, txid: Some(txid) });
                    // A caller that left does not want to know.
                    let _ = reply.send(result.map_err(E::from));
                });
                Some(Unsynced { txid, acknowledge })
            }
            done => {
                let _ = reply.send(done);
                None
            }
        }
    }

    fn refuse(self: Box<Self>) {
        let _ = self.reply.send(Err(Error::ShutDown.into()));
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    pub(super) fn open(
        path: &Path,
        engine: Arc<Engine>,
        durability: Durability,
        depth: usize,
        statements: usize,
        prepare: impl FnOnce(&mut Connection) -> Result<()>,
    ) -> Result<Writer> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.set_prepared_statement_cache_capacity(statements);
        // COMMIT does not fsync; the shared fsync does, for all that wait.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        prepare(&mut connection)?;
        let told = Arc::new(Told::default());
        let hook = told.clone();
        connection.wal_hook(Some(move |wal: &mut Wal, frames: std::ffi::c_int| {
            // An attached database has frames of its own.
            if wal.name() == c"main" {
                hook.commit(frames as u32);
            }
            Ok(())
        }))?;
        let connection = Mutex::new(Some(connection));
        let shared = Arc::new(Shared { engine, durability, connection, told, unsynced: AtomicUsize::new(0) });
        let (jobs, receiver) = queue::channel(depth);
        let (to_sync, unsynced) = mpsc::sync_channel(UNSYNCED_MAX);
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(run).map_err(Error::io("spawn", name))
        };
        let (one, two) = (shared.clone(), shared.clone());
        let threads = vec![
            spawn("replite-writer", Box::new(move || run_jobs(&one, receiver, &to_sync)))?,
            spawn("replite-sync", Box::new(move || run_syncs(&two, &unsynced)))?,
        ];
        Ok(Writer { shared, jobs: Mutex::new(Some(jobs)), threads: Mutex::new(threads) })
    }

    /// The queue of async writes, while there is one.
    fn queue(&self) -> Result<queue::Sender<Box<dyn Job>>> {
        lock(&self.jobs).clone().ok_or(Error::ShutDown)
    }

    /// Runs a closure in a transaction, on the writer's thread.
    pub(super) async fn write<T, E, F>(&self, run: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        if WRITING.get() {
            return Err(Error::Reentrant.into());
        }
        let (reply, answer) = oneshot::channel();
        let job = Box::new(Write { run, reply });
        self.queue()?.send(job).await.map_err(|_| Error::ShutDown)?;
        answer.await.unwrap_or_else(|_| Err(Error::ShutDown.into()))
    }

    /// The same on the caller's thread.
    pub(super) fn write_blocking<T, E, F>(&self, run: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        may_block()?;
        let mut connection = self.shared.lock()?;
        let Some(connection) = connection.as_mut() else { return Err(Error::ShutDown.into()) };
        let commit = self.shared.transact(connection, run)?;
        if let (Some(txid), Durability::Synced) = (commit.txid, self.shared.durability) {
            self.shared.engine.sync(txid)?;
        }
        Ok(commit)
    }

    pub(super) fn guard(&self) -> Result<WriterGuard<'_>> {
        may_block()?;
        let connection = self.shared.lock()?;
        if connection.is_none() {
            return Err(Error::ShutDown);
        }
        WRITING.set(true);
        let mut guard = WriterGuard { connection, shared: &self.shared, before: 0, here: PhantomData };
        guard.before = self.shared.engine.captured()?.number();
        Ok(guard)
    }

    /// Ends the threads: what is queued is refused, what has begun ends. Blocks.
    pub(super) fn close(&self) {
        drop(lock(&self.jobs).take());
        let threads = std::mem::take(&mut *lock(&self.threads));
        let here = std::thread::current().id();
        if threads.iter().any(|thread| thread.thread().id() == here) {
            // The last handle went inside of a write, or with its result: the threads end by themselves behind it.
            return;
        }
        drop(lock(&self.shared.connection).take());
        for thread in threads {
            // A panic of the thread was reported by its own means.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> Result<MutexGuard<'_, Option<Connection>>> {
        if WRITING.get() {
            return Err(Error::Reentrant);
        }
        Ok(lock(&self.connection))
    }

    fn transact<T, E, F>(&self, connection: &mut Connection, run: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        let sqlite = |e: rusqlite::Error| E::from(Error::Sqlite(e));
        self.told.forget();
        let mut transaction =
            Transaction::new_unchecked(connection, TransactionBehavior::Immediate).map_err(sqlite)?;
        transaction.set_drop_behavior(DropBehavior::Rollback);
        let begun = self.engine.begun()?;
        WRITING.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| run(&mut transaction)));
        WRITING.set(false);
        let value = match result {
            Ok(result) => result?,
            Err(panic) => return Err(Error::Panicked(message(&*panic)).into()),
        };
        transaction.commit().map_err(sqlite)?;
        let txid = self.engine.committed(begun, self.told.one())?;
        Ok(Commit { value, txid })
    }
}

/// The writer's thread.
fn run_jobs(shared: &Shared, mut jobs: queue::Receiver<Box<dyn Job>>, to_sync: &mpsc::SyncSender<Unsynced>) {
    while let Some(job) = jobs.blocking_recv() {
        let mut connection = lock(&shared.connection);
        let Some(open) = connection.as_mut() else {
            job.refuse();
            continue;
        };
        let unsynced = job.run(shared, open);
        drop(connection);
        let Some(unsynced) = unsynced else { continue };
        if jobs.is_empty() && shared.unsynced.load(Ordering::Acquire) == 0 {
            // Nobody else waits: an fsync here costs no wake-up of another thread.
            (unsynced.acknowledge)(shared.engine.sync(unsynced.txid));
        } else {
            shared.unsynced.fetch_add(1, Ordering::AcqRel);
            if let Err(mpsc::SendError(unsynced)) = to_sync.send(unsynced) {
                (unsynced.acknowledge)(Err(Error::ShutDown));
            }
        }
    }
    // Taken already, unless this thread itself dropped the last handle.
    drop(lock(&shared.connection).take());
}

/// The sync thread: one fsync for all commits that came during the one before.
fn run_syncs(shared: &Shared, unsynced: &mpsc::Receiver<Unsynced>) {
    let mut batch = Vec::new();
    while let Ok(first) = unsynced.recv() {
        batch.push(first);
        batch.extend(unsynced.try_iter().take(UNSYNCED_MAX));
        let last = batch.iter().map(|u| u.txid).max();
        let synced = last.map_or(Ok(()), |txid| shared.engine.sync(txid));
        for unsynced in batch.drain(..) {
            shared.unsynced.fetch_sub(1, Ordering::AcqRel);
            let result = match &synced {
                Ok(()) => Ok(()),
                Err(error) => Err(Error::Stopped(error.to_string())),
            };
            (unsynced.acknowledge)(result);
        }
    }
}

/// The full writer connection, for whoever holds this guard; all other writes wait.
///
/// Transactions are the holder's own business; one that is open when the guard is dropped is rolled back. Commits
/// are captured and shipped like all others. [`WriterGuard::flush`] makes them durable and tells the last one.
pub struct WriterGuard<'a> {
    connection: MutexGuard<'a, Option<Connection>>,
    shared: &'a Shared,
    /// The last transaction before the guard.
    before: u64,
    /// The guard belongs to the thread that took it.
    here: PhantomData<*const ()>,
}

impl fmt::Debug for WriterGuard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriterGuard").finish_non_exhaustive()
    }
}

impl WriterGuard<'_> {
    /// Waits until everything that was committed is durable; says the last transaction since the guard was taken
    /// or last flushed.
    ///
    /// # Errors
    /// [`Error::Stopped`] when replication has stopped, [`Error::ShutDown`] after a shutdown.
    pub fn flush(&mut self) -> Result<Option<Txid>> {
        let last = self.shared.engine.captured()?;
        if self.shared.durability == Durability::Synced {
            self.shared.engine.sync(last)?;
        }
        let new = last.number() > self.before;
        self.before = last.number();
        Ok(new.then_some(last))
    }
}

impl Deref for WriterGuard<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match &*self.connection {
            Some(connection) => connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl DerefMut for WriterGuard<'_> {
    fn deref_mut(&mut self) -> &mut Connection {
        match &mut *self.connection {
            Some(connection) => connection,
            None => unreachable!("a guard is made for an open connection, and keeps it so"),
        }
    }
}

impl Drop for WriterGuard<'_> {
    fn drop(&mut self) {
        WRITING.set(false);
        if !self.is_autocommit() {
            let _ = self.execute_batch("ROLLBACK");
        }
    }
}

/// Fails on a thread that runs async tasks.
fn may_block() -> Result<()> {
    match tokio::runtime::Handle::try_current() {
        Ok(handle) if in_block_on(&handle) => Err(Error::BlockingInAsync),
        _ => Ok(()),
    }
}

/// Whether this thread runs async tasks at the moment. Tokio tells it only by refusing to enter a runtime from inside
/// of one; `spawn_blocking` threads may.
fn in_block_on(handle: &tokio::runtime::Handle) -> bool {
    catch_unwind(AssertUnwindSafe(|| handle.block_on(std::future::ready(())))).is_err()
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
