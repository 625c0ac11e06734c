//! What others committed to the file, as a position.

use std::time::{Duration, Instant};

use crate::db::Db;
use crate::error::{Error, Result};
use crate::node::writer::not_primary;
use crate::session::{self, Written};
use crate::txid::Txid;

/// Between two looks whether the lease has ended.
const LEASE_LOOK: Duration = Duration::from_millis(50);

impl Db {
    /// The position that covers everything that any connection has committed to the file when this
    /// is called: another library's, another program's, or this handle's. [`Db::position`] may be
    /// some commits older. When there is nothing to wait for, this costs a look at SQLite's shared
    /// memory. Else it returns when the last of these commits is on the disk and captured, however
    /// long the disk takes.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// use replite::rusqlite::Connection;
    /// use replite::{Db, Error};
    ///
    /// let db = Db::temporary(|config| {
    ///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text)"))
    /// })
    /// .await?;
    /// let own = Connection::open(db.path())?;
    /// own.execute("INSERT INTO notes VALUES ('a')", [])?;
    /// let token = db.token(db.captured().await?); // for a message to another service
    /// # assert!(token.is_some());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A handler need not call it: the response's token names what others wrote
    /// ([`SessionTokens::Writes`](crate::SessionTokens::Writes)).
    ///
    /// # Errors
    /// - [`Error::NotPrimary`] on a replica, and where the lease ended meanwhile: no other node may
    ///   ever have what was committed.
    /// - [`Error::Timeout`] when capture does nothing for half a minute.
    /// - [`Error::Stopped`] after a failure of replication, [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub async fn captured(&self) -> Result<Txid> {
        let (node, begun) = (&self.inner.node, Instant::now());
        self.expect_primary()?;
        let counted = match node.counting() {
            Some(mut counting) => loop {
                match tokio::time::timeout(LEASE_LOOK, &mut counting).await {
                    Ok(counted) => break counted,
                    // Capture goes on after the lease has ended.
                    Err(_) => self.expect_primary()?,
                }
            },
            None => true,
        };
        let position = node.applied.position().filter(|_| counted);
        // Looked at last: what was counted while this node led is what it counts as the primary.
        self.expect_primary()?;
        position.map(|at| at.txid()).ok_or_else(|| Error::Timeout {
            what: "capture of what was committed, which does nothing any more".into(),
            after: begun.elapsed(),
        })
    }

    /// Fails where commits are not this node's to count.
    fn expect_primary(&self) -> Result<()> {
        let node = &self.inner.node;
        if let Some(cause) = node.failure() {
            return Err(Error::Stopped(cause));
        }
        let refused = match self.inner.slot.primary() {
            Ok(_) if !node.is_fenced() => return Ok(()),
            Ok(_) => not_primary(node).unwrap_or(Error::NotPrimary { primary: None }),
            Err(error) => error,
        };
        if matches!(refused, Error::NotPrimary { .. }) {
            session::primary_needed(node);
        }
        Err(refused)
    }
}

/// Everything that was committed to the database, by whatever connection.
impl From<&Db> for Written {
    fn from(db: &Db) -> Written {
        Written::past(db.inner.node.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};

    use axum::body::Body;
    use futures_util::FutureExt;
    use http::{Request, Response};
    use rusqlite::{Connection, Transaction};
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;
    use crate::db::Config;
    use crate::ends::comes;
    use crate::session::Session;

    /// What a handler writes: through the handle, and by a connection of its own.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Writes {
        Nothing,
        Ours,
        Foreign,
        Both,
        /// And another request writes through the handle after that.
        Between,
        /// Through the handle, on the task of the request and then on another one.
        Aside,
    }

    const INSERT: &str = "INSERT INTO t VALUES (1)";

    struct World {
        _dir: tempfile::TempDir,
        db: Db,
        created: Txid,
    }

    impl World {
        async fn new() -> World {
            let dir = tempfile::tempdir().unwrap();
            let db = Db::open(Config::new(dir.path().join("a.db"))).await.unwrap();
            let create = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute("CREATE TABLE t(a)", [])?);
            let created = db.write(create).await.unwrap().txid.unwrap();
            db.wait_for(created).await.unwrap();
            World { _dir: dir, db, created }
        }

        fn foreign(&self) {
            Connection::open(self.db.path()).unwrap().execute(INSERT, []).unwrap();
        }

        /// A request whose handler does this, and then sets the flag.
        async fn post(&self, writes: Writes, done: Arc<AtomicBool>) -> Response<Body> {
            let db = self.db.clone();
            let app = service_fn(move |_: Request<_>| {
                let (db, done) = (db.clone(), done.clone());
                async move {
                    if matches!(writes, Writes::Ours | Writes::Both | Writes::Between | Writes::Aside) {
                        db.write(|tx| Ok::<_, Error>(tx.execute(INSERT, [])?)).await.unwrap();
                    }
                    if matches!(writes, Writes::Foreign | Writes::Both | Writes::Between) {
                        let path = db.path().to_owned();
                        let write = move || Connection::open(path).unwrap().execute(INSERT, []).unwrap();
                        tokio::task::spawn_blocking(write).await.unwrap();
                    }
                    if matches!(writes, Writes::Between | Writes::Aside) {
                        let insert = |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute(INSERT, [])?);
                        tokio::spawn(async move { db.write(insert).await }).await.unwrap().unwrap();
                    }
                    done.store(true, Ordering::Release);
                    Ok::<_, Infallible>(Response::new(Body::empty()))
                }
            });
            let request = Request::post("/").body(Body::empty()).unwrap();
            self.db.replay_layer().layer(app).oneshot(request).await.unwrap()
        }

        /// How many transactions after the first one the response's token names.
        fn named(&self, response: &Response<Body>) -> Option<u64> {
            let text = response.headers().get("replite-token")?.to_str().unwrap();
            Some(self.db.verify_token(text).unwrap().number() - self.created.number())
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_others_committed_is_waited_for_and_what_is_counted_is_not() {
        let world = World::new().await;
        let db = &world.db;
        let engine = db.inner.slot.primary().unwrap();
        assert_eq!(db.captured().await.unwrap(), world.created);
        engine.hold_syncs(true);
        assert_eq!(db.captured().now_or_never().unwrap().unwrap(), world.created);
        world.foreign();
        assert!(db.captured().now_or_never().is_none(), "it is not on the disk");
        engine.hold_syncs(false);
        let captured = db.captured().await.unwrap();
        assert_eq!(captured.number(), world.created.number() + 1);
        // No other node may ever have what comes after a lease.
        engine.hold_syncs(true);
        world.foreign();
        let waiting = tokio::spawn({
            let db = db.clone();
            async move { db.captured().await }
        });
        db.inner.node.fence.close();
        let ended = waiting.await.unwrap();
        assert!(matches!(ended, Err(Error::NotPrimary { .. })), "{ended:?}");
        engine.hold_syncs(false);
        db.shutdown().await;
        assert!(matches!(db.captured().await, Err(Error::ShutDown)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_failure_of_replication_ends_the_wait_and_the_response_names_nothing() {
        let world = Arc::new(World::new().await);
        let engine = world.db.inner.slot.primary().unwrap();
        engine.hold_syncs(true);
        let done = Arc::default();
        let waiting = tokio::spawn({
            let (world, done) = (world.clone(), Arc::clone(&done));
            async move { world.post(Writes::Foreign, done).await }
        });
        comes("the write", || done.load(Ordering::Acquire)).await;
        engine.fail(&Error::Disturbed("by intent".into()));
        assert_eq!(world.named(&waiting.await.unwrap()), None);
        assert!(matches!(world.db.captured().await, Err(Error::Stopped(_))));
        engine.hold_syncs(false);
        world.db.shutdown().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    #[expect(clippy::await_holding_lock, reason = "the thread that needs it is to wait")]
    async fn a_response_names_what_its_handler_wrote_by_whatever_connection() {
        let world = Arc::new(World::new().await);
        let engine = world.db.inner.slot.primary().unwrap();
        let mut number = 0;
        for (writes, count) in [
            (Writes::Nothing, 0),
            (Writes::Ours, 1),
            (Writes::Foreign, 1),
            (Writes::Both, 2),
            (Writes::Between, 3),
            (Writes::Aside, 2),
        ] {
            for _ in 0..3 {
                number += count;
                let response = world.post(writes, Arc::default()).await;
                assert_eq!(world.named(&response), Some(number), "{writes:?}");
            }
        }
        world.db.captured().await.unwrap();
        // What a handler wrote by the handle alone waits for no capture ...
        let held = engine.hold_log();
        for _ in 0..3 {
            number += 1;
            assert_eq!(world.named(&world.post(Writes::Ours, Arc::default()).await), Some(number));
        }
        // ... and neither does it where others wrote before; but what they wrote after it does.
        drop(held);
        world.foreign();
        number += 1;
        world.db.captured().await.unwrap();
        let held = engine.hold_log();
        number += 1;
        assert_eq!(world.named(&world.post(Writes::Ours, Arc::default()).await), Some(number));
        let done = Arc::default();
        let waiting = tokio::spawn({
            let (world, done) = (world.clone(), Arc::clone(&done));
            async move { world.post(Writes::Both, done).await }
        });
        comes("the write", || done.load(Ordering::Acquire)).await;
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "its token names what is not captured");
        drop(held);
        assert_eq!(world.named(&waiting.await.unwrap()), Some(number + 2));
        world.db.shutdown().await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_task_without_a_session_tells_the_handle_of_what_it_wrote() {
        let world = World::new().await;
        let (db, foreign) = (world.db.clone(), Connection::open(world.db.path()).unwrap());
        let foreign = Arc::new(Mutex::new(foreign));
        let app = service_fn(move |request: Request<axum::body::Body>| {
            let session = request.extensions().get::<Session>().unwrap().clone();
            foreign.lock().unwrap().execute(INSERT, []).unwrap();
            if request.uri().path() == "/told" {
                session.observe(&db);
            }
            async { Ok::<_, Infallible>(Response::new(Body::empty())) }
        });
        for (path, named) in [("/", None), ("/told", Some(2))] {
            let app = world.db.replay_layer().layer(app.clone());
            let response = app.oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(world.named(&response), named);
        }
        world.db.shutdown().await;
    }
}
