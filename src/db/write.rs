//! Writes: what of the database is for the primary only.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rusqlite::Transaction;

use crate::db::Db;
use crate::error::{Error, Result};
use crate::node::writer::{Commit, Failed, Writer, WriterGuard, not_primary};
use crate::session;
use crate::status::{Role, RoleState};

impl Db {
    /// Runs `f` in a transaction (`BEGIN IMMEDIATE`) on the writer's thread. The writer commits
    /// when `f` returns `Ok`, and rolls back when it returns `Err` or panics. With
    /// [`Durability::Synced`](crate::Durability::Synced) the call returns after the commit is on
    /// the disk; commits that wait at the same time share one fsync.
    ///
    /// # Errors
    /// What `f` returned, or one of our own through `E: From<Error>`. With all of these but the
    /// last, nothing was committed.
    ///
    /// - [`Error::NotPrimary`] on a replica.
    /// - [`Error::Panicked`] when `f` panics.
    /// - [`Error::Reentrant`] inside of another write.
    /// - [`Error::Busy`] when another connection writes for longer than five seconds.
    /// - [`Error::Sqlite`] when BEGIN fails for another reason, or COMMIT does.
    /// - [`Error::Stopped`] after a failure of replication.
    /// - [`Error::Timeout`] when what others committed is not captured.
    /// - [`Error::ShutDown`] after [`Db::shutdown`].
    /// - [`Error::OutcomeUnknown`], which leaves open whether the write is kept.
    ///
    /// # Cancel safety
    /// Dropped before the writer has begun with it, the closure never runs. Dropped after that, it
    /// runs and commits.
    pub async fn write<T, E, F>(&self, f: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        self.told(self.writer_side()?.write(f).await)
    }

    /// [`Db::write`] that first waits until there is a primary, for at most `limit`: for work that
    /// is begun while the nodes elect one. When this node is the primary then, `f` runs. When
    /// another one is, the error names it; [`Db::primary_client`] reaches it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// use std::time::Duration;
    ///
    /// use replite::{Db, Error};
    ///
    /// # let db = Db::temporary(|config| config).await?;
    /// let limit = Duration::from_secs(10);
    /// let created = db.write_wait(limit, |tx| {
    ///     Ok::<_, Error>(tx.execute_batch("CREATE TABLE IF NOT EXISTS jobs (done TEXT)")?)
    /// });
    /// match created.await {
    ///     Ok(commit) => println!("{:?}", commit.txid),
    ///     Err(Error::NotPrimary { primary: Some(other) }) => println!("{} does it", other.node),
    ///     Err(Error::NotPrimary { primary: None }) => println!("there is no primary yet"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::write`]: [`Error::NotPrimary`] without a name when there was no primary in
    /// time. A primary that ends while the write waits in its queue is not waited for once more.
    ///
    /// # Cancel safety
    /// As for [`Db::write`].
    pub async fn write_wait<T, E, F>(&self, limit: Duration, f: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<Error> + Send + 'static,
    {
        let node = &self.inner.node;
        let settled = |state: &RoleState| match state.role {
            // One that hands its lease over says soon who has it, or takes writes again.
            Role::Primary => node.fence.is_open() && self.inner.writer.is_open(),
            role => role == Role::Stopped || state.primary.is_some(),
        };
        let mut roles = node.roles.subscribe();
        tokio::select! {
            // The sender is the node's.
            _ = tokio::time::timeout(limit, roles.wait_for(settled)) => {}
            () = node.stop.cancelled() => {}
        }
        drop(roles);
        self.write(f).await
    }

    /// [`Db::write`] on the caller's thread, which may block: the fastest way to write from a
    /// thread. It works inside of a write to another database. Two databases that wait for each
    /// other in this way wait for ever.
    ///
    /// # Errors
    /// As for [`Db::write`], and [`Error::BlockingInAsync`] on a thread that runs async tasks. The
    /// check does not notice it inside of `tokio::task::unconstrained`.
    pub fn write_blocking<T, E, F>(&self, f: F) -> Result<Commit<T>, E>
    where
        F: FnOnce(&mut Transaction<'_>) -> Result<T, E>,
        E: From<Error>,
    {
        self.told(self.writer_side()?.write_blocking(f))
    }

    /// The full writer connection, for what a closure can't do: `VACUUM`, pragmas, a migration
    /// tool. All other writes wait until the guard is dropped. Blocks.
    ///
    /// # Errors
    /// - [`Error::NotPrimary`] on a replica.
    /// - [`Error::BlockingInAsync`] on a thread that runs async tasks.
    /// - [`Error::Reentrant`] inside of a write.
    /// - [`Error::Stopped`] after a failure of replication.
    /// - [`Error::ShutDown`] after [`Db::shutdown`].
    pub fn writer(&self) -> Result<WriterGuard<'_>> {
        self.writer_side()?.guard()
    }

    fn writer_side(&self) -> Result<&Writer> {
        if self.inner.closed.load(Ordering::Acquire) {
            return Err(Error::ShutDown);
        }
        // A replica stays one when its replication has stopped.
        let replica = || self.inner.slot.is_replica().then_some(Error::NotPrimary { primary: None });
        // What is to be done before the node leads. A request of a client waits until it does.
        let promoting =
            || self.role() == Role::Promoting && self.inner.writer.is_open() && self.session().is_none();
        match not_primary(&self.inner.node).filter(|_| !promoting()).or_else(replica) {
            None => Ok(&self.inner.writer),
            Some(error) => {
                session::primary_needed(&self.inner.node);
                Err(error)
            }
        }
    }

    /// Tells the request's session what came of a write.
    fn told<T, E: From<Error>>(&self, written: Result<Commit<T>, Failed<E>>) -> Result<Commit<T>, E> {
        match &written {
            Ok(Commit { txid: Some(txid), .. }) => session::committed(&self.inner.node, *txid),
            Err(Failed::Ours(Error::OutcomeUnknown { .. })) => session::outcome_unknown(),
            // The role changed since the caller came.
            Err(Failed::Ours(Error::NotPrimary { .. })) => session::primary_needed(&self.inner.node),
            _ => {}
        }
        written.map_err(Failed::into_one)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicI64;

    use bytes::Bytes;
    use http_body_util::Full;
    use tower::{Layer, ServiceExt, service_fn};

    use super::*;
    use crate::db::Config;
    use crate::ends::comes;
    use crate::proxy::SessionTokens;
    use crate::session::Session;
    use crate::token::Tokens;

    const LONG: Duration = Duration::from_secs(20);
    const SHORT: Duration = Duration::from_millis(20);

    type Run = fn(&mut Transaction<'_>) -> Result<usize>;
    const CREATE: Run = |tx| Ok(tx.execute("CREATE TABLE t(a)", [])?);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_write_that_waits_for_a_primary_runs_here_or_is_told_of_another_or_gives_up() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(Config::new(dir.path().join("a.db"))).await.unwrap();
        let node = db.inner.node.clone();
        let leads = node.roles.borrow().clone();
        let stands = |role, primary| {
            node.roles.send_modify(|state| (state.role, state.primary) = (role, primary));
        };
        let begin = || {
            let db = db.clone();
            tokio::spawn(async move { db.write_wait(LONG, CREATE).await })
        };
        let waits = async || comes("a write that waits", || node.roles.receiver_count() > 0).await;
        stands(Role::Electing, None);
        let late = db.write_wait(SHORT, CREATE).await;
        assert!(matches!(late, Err(Error::NotPrimary { primary: None })), "{late:?}");
        let waiting = begin();
        waits().await;
        stands(Role::Replica, Some(node.me.clone()));
        let other = waiting.await.unwrap();
        assert!(matches!(other, Err(Error::NotPrimary { primary: Some(_) })), "{other:?}");
        stands(Role::Electing, None);
        let waiting = begin();
        waits().await;
        node.roles.send_modify(|state| state.clone_from(&leads));
        assert!(waiting.await.unwrap().unwrap().txid.is_some());
        db.shutdown().await;
        assert!(matches!(db.write_wait(LONG, CREATE).await, Err(Error::ShutDown)));
    }

    /// Reads the rows through a layer whose sessions never go back.
    async fn counted(db: &Db, seen: Arc<AtomicI64>) -> http::Response<Full<Bytes>> {
        let reader = db.clone();
        let app = service_fn(move |_: http::Request<_>| {
            let count = reader
                .read(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?));
            seen.store(count.unwrap(), Ordering::Release);
            async { Ok::<_, std::convert::Infallible>(http::Response::new(axum::body::Body::empty())) }
        });
        let layer = db.replay_layer().session(SessionTokens::Monotonic).layer(app);
        let request = http::Request::new(Full::<Bytes>::default());
        layer.oneshot(request).await.unwrap().map(|_| Full::default())
    }

    /// Readers see a commit before capture has it, which waits for the disk.
    #[tokio::test(flavor = "multi_thread")]
    async fn the_token_of_a_monotonic_read_names_all_that_the_read_saw_on_the_primary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        let db = Db::open(Config::new(&path)).await.unwrap();
        let created = db.write(CREATE).await.unwrap().txid.unwrap();
        db.wait_for(created).await.unwrap();
        let engine = db.inner.slot.primary().unwrap();
        let token = |response: &http::Response<_>| {
            let text = response.headers().get("replite-token")?.to_str().unwrap();
            Some(db.verify_token(text).unwrap().number() - created.number())
        };
        engine.hold_syncs(true);
        let foreign = rusqlite::Connection::open(&path).unwrap();
        foreign.execute_batch("INSERT INTO t VALUES (1)").unwrap();
        let waits = async || {
            let (seen, db) = (Arc::new(AtomicI64::new(-1)), db.clone());
            let waiting = tokio::spawn({
                let seen = seen.clone();
                async move { counted(&db, seen).await }
            });
            comes("the read", || seen.load(Ordering::Acquire) >= 0).await;
            (waiting, seen.load(Ordering::Acquire))
        };
        let (waiting, saw) = waits().await;
        assert_eq!(saw, 1);
        engine.hold_syncs(false);
        assert_eq!(token(&waiting.await.unwrap()), Some(1));
        // What is on the disk is waited for no more.
        engine.hold_syncs(true);
        assert_eq!(token(&counted(&db, Arc::default()).await), Some(1));
        // Capture goes on after the lease has ended.
        foreign.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        let (waiting, saw) = waits().await;
        assert_eq!(saw, 2);
        db.inner.node.fence.close();
        engine.hold_syncs(false);
        assert_eq!(token(&waiting.await.unwrap()), Some(2));
        // What never will be on the disk has no number.
        engine.hold_syncs(true);
        foreign.execute_batch("INSERT INTO t VALUES (3)").unwrap();
        let (waiting, saw) = waits().await;
        assert_eq!(saw, 3);
        engine.fail(&Error::Disturbed("by intent".into()));
        assert_eq!(token(&waiting.await.unwrap()), Some(2));
        engine.hold_syncs(false);
        db.shutdown().await;
    }

    /// The node was the primary when the write came, and is none when its turn comes.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_write_that_the_queue_refuses_says_to_the_session_that_the_primary_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(Config::new(dir.path().join("a.db"))).await.unwrap();
        let session = Session::new(Tokens::new(db.inner.node.clone()).into(), None, None);
        let refused = || Err::<Commit<()>, _>(Failed::<Error>::Ours(Error::NotPrimary { primary: None }));
        session.clone().enter(|| db.told(refused())).unwrap_err();
        assert!(session.primary_needed());
        db.shutdown().await;
    }
}
