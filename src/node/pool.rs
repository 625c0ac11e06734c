//! The connections that read.

use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::{Connection, OpenFlags};

use crate::descriptors::{self, ReserveHold, Share};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::sqlite::{StandingMark, connect_whole};

type Prepare = Box<dyn Fn(&Connection) -> rusqlite::Result<()> + Send + Sync>;
pub(crate) type Expect = Box<dyn Fn() -> Result<()> + Send + Sync>;

/// Connections that go further down the reserve of descriptors: with these all readers are served.
const FIRST: usize = 2;
/// A caller that waits for a connection to come back looks so often whether another one can be
/// opened by now: there may have been no descriptor for it.
const LOOK: Duration = Duration::from_millis(100);

/// A bounded set of read-only connections.
pub(crate) struct Pool {
    path: PathBuf,
    most: usize,
    patience: Duration,
    statements: usize,
    /// Whether what is at the path is what the node has open.
    expect: Expect,
    /// Counts how often the node opened it.
    files: Arc<AtomicU64>,
    prepare: Prepare,
    state: Mutex<PoolState>,
    returned: Condvar,
    read_mark: Arc<StandingMark>,
}

#[derive(Default)]
struct PoolState {
    idle: Vec<Reader>,
    open: usize,
    waiting: usize,
    closed: bool,
    /// Descriptors for the connections that are still to be opened, until the pool is closed.
    reserve: Option<ReserveHold>,
}

struct Reader {
    connection: Connection,
    /// Set when a statement was prepared that may have changed how the connection behaves.
    changed: Arc<AtomicBool>,
    /// Which opening of the files it is of.
    files: u64,
}

impl Reader {
    /// Rolls back, and says whether the next one may have it.
    fn come_back(&self) -> bool {
        let connection = &self.connection;
        let clean = !std::thread::panicking() || connection.is_autocommit();
        let rolled_back = connection.is_autocommit() || connection.execute_batch("ROLLBACK").is_ok();
        // A statement that was forgotten half way would have the next reader see the old state.
        clean && rolled_back && !self.changed.load(Ordering::Relaxed) && !connection.is_busy()
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("path", &self.path).field("most", &self.most).finish_non_exhaustive()
    }
}

impl Pool {
    pub(crate) fn new(
        path: PathBuf,
        most: usize,
        patience: Duration,
        statements: usize,
        expect: Expect,
        files: Arc<AtomicU64>,
        prepare: Prepare,
    ) -> Pool {
        let state = PoolState { reserve: Some(ReserveHold::begin()), ..PoolState::default() };
        let (state, returned) = (Mutex::new(state), Condvar::new());
        let read_mark = Arc::default();
        Pool { path, most, patience, statements, expect, files, prepare, state, returned, read_mark }
    }

    /// Has the node share the mark that its readers have chosen.
    pub(crate) fn sharing(self, read_mark: Arc<StandingMark>) -> Pool {
        Pool { read_mark, ..self }
    }

    /// A connection for the caller alone, until the lease is dropped. A nested call gets another
    /// one. The caller waits for as long as is configured, or as it has patience. So it does where
    /// there is no descriptor for another connection while some are in use.
    pub(crate) fn lease(&self, patience: Option<Duration>) -> Result<PooledConnection<'_>> {
        let patience = patience.unwrap_or(self.patience);
        let mut state = self.lock();
        let mut end = None;
        loop {
            if state.closed {
                return Err(Error::ShutDown);
            }
            if let Some(reader) = state.idle.pop() {
                return Ok(PooledConnection { pool: self, reader: Some(reader) });
            }
            let mut want = None;
            if state.open < self.most {
                state.open += 1;
                let first = state.open <= FIRST;
                drop(state);
                let place = ConnectionPermit(self);
                let error = match self.open(if first { Share::FirstReader } else { Share::Reader }) {
                    Err(error) if descriptors::used_up() => error,
                    opened => {
                        let reader = Some(opened?);
                        std::mem::forget(place);
                        return Ok(PooledConnection { pool: self, reader });
                    }
                };
                // No other waiter is woken for the place: it would find no descriptor either, and
                // wake the next one.
                std::mem::forget(place);
                state = self.lock();
                state.open -= 1;
                match (state.idle.is_empty(), state.open) {
                    (false, _) => continue,
                    // None will come back.
                    (true, 0) => return Err(error),
                    (true, _) => want = Some(error),
                }
            }
            let end = *end.get_or_insert_with(|| Instant::now() + patience);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(want.unwrap_or(Error::PoolExhausted { limit: self.most, waited: patience }));
            }
            state.waiting += 1;
            state =
                self.returned.wait_timeout(state, left.min(LOOK)).unwrap_or_else(PoisonError::into_inner).0;
            state.waiting -= 1;
        }
    }

    /// How many connections there are, and how many of them are in use.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let state = self.lock();
        (state.open, state.open.saturating_sub(state.idle.len()))
    }

    fn open(&self, share: Share) -> Result<Reader> {
        let files = self.files.load(Ordering::Acquire);
        (self.expect)()?;
        #[allow(unused_mut, reason = "rusqlite before 0.41 sets an authorizer through a shared reference")]
        let mut connection = connect_whole(&self.path, OpenFlags::SQLITE_OPEN_READ_ONLY, share)?;
        connection.set_prepared_statement_cache_capacity(self.statements);
        (self.prepare)(&connection)?;
        let changed = Arc::new(AtomicBool::new(false));
        let flag = changed.clone();
        connection.authorizer(Some(move |context: AuthContext<'_>| {
            if changes_connection(&context) {
                flag.store(true, Ordering::Relaxed);
            }
            Authorization::Allow
        }))?;
        Ok(Reader { connection, changed, files })
    }

    /// A connection is no more; a caller that waits may open one.
    fn gone(&self) {
        self.lock().open -= 1;
        self.returned.notify_one();
    }

    /// Closes the idle connections to files that the node does not have open any more. Those in use
    /// close when they come back.
    pub(crate) fn renew(&self) {
        let mut state = self.lock();
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len();
        drop(state);
        drop(idle);
        self.returned.notify_all();
    }

    /// Closes the idle connections; those in use close when they come back.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.reserve = None;
        let idle = std::mem::take(&mut state.idle);
        state.open -= idle.len();
        drop(state);
        drop(idle);
        self.returned.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        lock(&self.state)
    }
}

/// Pragmas with an argument that only tell something.
const TELLING: [&str; 9] = [
    "table_info",
    "table_xinfo",
    "table_list",
    "index_info",
    "index_xinfo",
    "index_list",
    "foreign_key_list",
    "foreign_key_check",
    "integrity_check",
];

/// Whether a statement leaves something on the connection that the next reader would find there.
fn changes_connection(context: &AuthContext<'_>) -> bool {
    let temporary = context.database_name == Some("temp");
    match context.action {
        AuthAction::Pragma { pragma_name, pragma_value: Some(_) } => {
            !TELLING.iter().any(|t| pragma_name.eq_ignore_ascii_case(t))
        }
        AuthAction::Attach { .. } | AuthAction::Detach { .. } => true,
        AuthAction::CreateTempTable { .. }
        | AuthAction::CreateTempView { .. }
        | AuthAction::CreateTempIndex { .. }
        | AuthAction::CreateTempTrigger { .. } => true,
        // Virtual tables, for instance.
        AuthAction::Insert { .. } | AuthAction::Update { .. } => temporary,
        _ => false,
    }
}

/// A place among the connections that may be open. It is free again when this is dropped, also by a
/// panic while a connection is opened.
struct ConnectionPermit<'a>(&'a Pool);

impl Drop for ConnectionPermit<'_> {
    fn drop(&mut self) {
        self.0.gone();
    }
}

/// A connection on loan.
pub(crate) struct PooledConnection<'a> {
    pool: &'a Pool,
    /// There until dropped.
    reader: Option<Reader>,
}

impl PooledConnection<'_> {
    /// The connection is not for the next one.
    pub(crate) fn spoil(&self) {
        if let Some(reader) = &self.reader {
            reader.changed.store(true, Ordering::Relaxed);
        }
    }
}

impl Deref for PooledConnection<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        match &self.reader {
            Some(reader) => &reader.connection,
            None => unreachable!("the reader is taken only when the lease is dropped"),
        }
    }
}

impl Drop for PooledConnection<'_> {
    fn drop(&mut self) {
        let Some(reader) = self.reader.take() else { return };
        if !reader.come_back() || reader.files != self.pool.files.load(Ordering::Acquire) {
            let place = ConnectionPermit(self.pool);
            drop(reader);
            descriptors::refill();
            return drop(place);
        }
        self.pool.read_mark.join();
        let mut state = self.pool.lock();
        if state.closed {
            state.open -= 1;
            return;
        }
        state.idle.push(reader);
        let waiting = state.waiting > 0;
        drop(state);
        if waiting {
            self.pool.returned.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(dir: &tempfile::TempDir, most: usize, patience: Duration) -> Pool {
        let path = dir.path().join("a.db");
        Connection::open(&path)
            .unwrap()
            .execute_batch("CREATE TABLE IF NOT EXISTS t(a); INSERT INTO t VALUES (1)")
            .unwrap();
        Pool::new(path, most, patience, 16, Box::new(|| Ok(())), Arc::default(), Box::new(|_| Ok(())))
    }

    /// Idle and open.
    fn counts(pool: &Pool) -> (usize, usize) {
        let state = pool.lock();
        (state.idle.len(), state.open)
    }

    fn identity(lease: &PooledConnection<'_>) -> usize {
        std::ptr::from_ref::<Connection>(lease) as usize
            + lease.reader.as_ref().map_or(0, |r| Arc::as_ptr(&r.changed) as usize)
    }

    #[test]
    fn a_nested_read_has_its_own_connection_and_exhaustion_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 2, Duration::from_millis(20));
        let (one, two) = (pool.lease(None).unwrap(), pool.lease(None).unwrap());
        assert_ne!(identity(&one), identity(&two));
        assert!(matches!(pool.lease(None), Err(Error::PoolExhausted { limit: 2, .. })));
        drop(one);
        pool.lease(None).unwrap();
    }

    #[test]
    fn a_waiter_gets_the_connection_that_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 1, Duration::from_secs(60));
        let lease = pool.lease(None).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.lease(None).map(drop));
            while pool.lock().waiting == 0 && !waiter.is_finished() {
                std::thread::yield_now();
            }
            drop(lease);
            waiter.join().unwrap().unwrap();
        });
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn without_a_descriptor_a_connection_that_comes_back_is_waited_for() {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
        let name = "node::pool::tests::without_a_descriptor_a_connection_that_comes_back_is_waited_for";
        if !crate::ends::alone(name) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 4, Duration::from_secs(60));
        let lease = pool.lease(None).unwrap();
        let usual = getrlimit(Resource::Nofile);
        // Below it is not even one of the reserve.
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..usual }).unwrap();
        let begin = Instant::now();
        assert!(matches!(pool.lease(Some(Duration::from_millis(1))), Err(Error::Sqlite(_))));
        assert!(begin.elapsed() < Duration::from_secs(30), "its own patience");
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.lease(None).map(drop));
            while pool.lock().waiting == 0 && !waiter.is_finished() {
                std::thread::yield_now();
            }
            drop(lease);
            waiter.join().unwrap().unwrap();
        });
        assert_eq!(counts(&pool), (1, 1));
        // Where none is open, none can come back.
        pool.renew();
        assert!(matches!(pool.lease(None), Err(Error::Sqlite(_))));
        setrlimit(Resource::Nofile, usual).unwrap();
        pool.lease(None).unwrap();
    }

    #[test]
    fn a_connection_comes_back_rolled_back_and_a_changed_one_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 1, Duration::from_secs(1));
        let lease = pool.lease(None).unwrap();
        lease.execute_batch("BEGIN; SELECT * FROM t").unwrap();
        drop(lease);
        assert!(pool.lease(None).unwrap().is_autocommit());
        pool.lease(None).unwrap().query_row("PRAGMA table_info(t)", [], |_| Ok(())).unwrap();
        assert_eq!(pool.lock().idle.len(), 1, "a pragma that only tells something");
        pool.lease(None).unwrap().execute_batch("PRAGMA case_sensitive_like = 1").unwrap();
        assert_eq!(pool.lock().idle.len(), 0);
        assert_eq!(pool.lock().open, 0);
        let like: bool =
            pool.lease(None).unwrap().query_row("SELECT 'a' LIKE 'A'", [], |r| r.get(0)).unwrap();
        assert!(like, "a fresh connection");
    }

    #[test]
    fn what_a_reader_leaves_behind_is_not_there_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 1, Duration::from_secs(1));
        let other = dir.path().join("b.db");
        Connection::open(&other).unwrap().execute_batch("CREATE TABLE u(a)").unwrap();
        let attach = format!("ATTACH '{}' AS b", other.display());
        for sql in [
            "CREATE TEMP TABLE mine(a); INSERT INTO mine VALUES (1)",
            "CREATE TEMP VIEW mine AS SELECT * FROM t",
            "CREATE TABLE temp.mine AS SELECT * FROM t",
            "CREATE VIRTUAL TABLE temp.mine USING fts5(a)",
            "BEGIN; CREATE TEMP TABLE mine(a)",
            "PRAGMA case_sensitive_like = 1",
            "PRAGMA query_only(1)",
            &attach,
        ] {
            let lease = pool.lease(None).unwrap();
            // It works, and goes with the connection.
            lease.execute_batch(sql).unwrap_or_else(|e| panic!("{sql}: {e}"));
            drop(lease);
            assert_eq!(counts(&pool), (0, 0), "{sql}");
            pool.lease(None).unwrap().query_row("SELECT * FROM t", [], |_| Ok(())).unwrap();
            assert_eq!(pool.lock().idle.len(), 1, "a plain read leaves nothing");
        }
    }

    #[test]
    fn a_connection_with_a_forgotten_statement_is_not_handed_on() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 1, Duration::from_secs(1));
        let lease = pool.lease(None).unwrap();
        let mut statement = lease.prepare("SELECT a FROM t").unwrap();
        let mut rows = statement.query([]).unwrap();
        assert!(rows.next().unwrap().is_some());
        std::mem::forget(rows);
        std::mem::forget(statement);
        drop(lease);
        assert_eq!(counts(&pool), (0, 0));
    }

    #[test]
    fn an_error_or_a_panic_while_a_connection_is_prepared_keeps_no_place() {
        let dir = tempfile::tempdir().unwrap();
        let plain = pool(&dir, 1, Duration::from_secs(1));
        let round = std::sync::atomic::AtomicUsize::new(0);
        let prepare = move |_: &Connection| match round.fetch_add(1, Ordering::Relaxed) {
            0 => panic!("on share"),
            1 => Err(rusqlite::Error::InvalidQuery),
            _ => Ok(()),
        };
        let pool = Pool { prepare: Box::new(prepare), ..plain };
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.lease(None).map(drop)));
        assert!(panicked.is_err());
        assert!(matches!(pool.lease(None), Err(Error::Sqlite(_))));
        assert_eq!(pool.lock().open, 0);
        pool.lease(None).unwrap();
    }

    #[test]
    fn readers_cannot_write_and_a_closed_pool_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let pool = pool(&dir, 1, Duration::from_secs(1));
        assert!(pool.lease(None).unwrap().execute_batch("INSERT INTO t VALUES (2)").is_err());
        let lease = pool.lease(None).unwrap();
        pool.close();
        drop(lease);
        assert_eq!(pool.lock().open, 0);
        assert!(matches!(pool.lease(None), Err(Error::ShutDown)));
    }
}
