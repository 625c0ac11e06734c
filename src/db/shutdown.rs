//! How a node ends: draining, shutdown, and the last handle that goes.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::context::RoleChange;
use crate::db::{Db, DbInner};
use crate::lock::lock;
use crate::report::Condition;
use crate::threads;

/// How long the end of the streams is waited for: they have a second for what is captured, and one for their last word.
const STREAMS_LIMIT: Duration = Duration::from_secs(3);
/// How long a shutdown waits for connections and tasks before it goes on without them.
const TASKS_LIMIT: Duration = Duration::from_secs(5);

impl Db {
    /// For `with_graceful_shutdown`: ends what would keep the application's server from ending, and nothing else.
    ///
    /// [`Db::health`] says so from now on, and [`Db::draining`] returns. Replicas are told: they hold their requests for this node, until it is
    /// back or they have waited for too long ([`ReplayLayer::hold_timeout`](crate::ReplayLayer::hold_timeout)). When those that they had sent are answered, or after a
    /// second, replicas get what is captured and their streams end; none are let in. Requests that wait here for a primary are answered. Reads, writes, `wait_for` and
    /// requests that were sent to the primary run on, until [`Db::shutdown`]. Returns when the streams have ended, within three seconds.
    ///
    /// See [`Db::shutdown`] for the whole of an application's end.
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn drain(&self) {
        self.inner.drain().await;
    }

    /// Returns once the node drains, or is shut down. For the application's own long responses, such as server-sent events,
    /// which have to end before its server can: `stream.take_until(db.draining())`, or a branch of a `select!`. It does not keep the
    /// database open.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.inner.node.drain.clone().cancelled_owned()
    }

    /// Stops every thread and task of this database, and returns when they have ended. What was acknowledged is kept; further calls
    /// fail with [`Error::ShutDown`](crate::Error::ShutDown). Can be called more than once: each call returns when all is done.
    ///
    /// It takes up to nine seconds for peers that do not hang up, and as long as the closure of a write that is running and the last
    /// fsyncs take; without such peers it takes milliseconds. This is the `main` of an application. Whatever its clients do, it ends
    /// within twenty seconds of the signal:
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use axum::Router;
    /// use replite::{Config, Db, Secret};
    ///
    /// #[tokio::main]
    /// async fn main() -> Result<(), Box<dyn std::error::Error>> {
    ///     let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    ///     let config = Config::new("data/app.db")
    ///         .advertise("http://10.0.0.1:8080")
    ///         .secret(Secret::new(std::env::var("REPLITE_SECRET")?)?);
    ///     let db = Db::open(config).await?;
    ///     let app = Router::new() // your routes; their long responses end with `db.draining()`
    ///         .layer(db.replay_layer())
    ///         .nest_service("/_replite", db.service());
    ///
    ///     let draining = db.clone();
    ///     let mut server = tokio::spawn(
    ///         axum::serve(listener, app)
    ///             .with_graceful_shutdown(async move {
    ///                 let _ = tokio::signal::ctrl_c().await; // and SIGTERM
    ///                 draining.drain().await;
    ///             })
    ///             .into_future(),
    ///     );
    ///     tokio::select! {
    ///         served = &mut server => served??,
    ///         // A client that takes its response too slowly is cut off.
    ///         () = async { db.draining().await; tokio::time::sleep(Duration::from_secs(10)).await } => server.abort(),
    ///     }
    ///     db.shutdown().await;
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Cancel safety
    /// Dropped after it was polled, it still goes on to its end.
    pub async fn shutdown(&self) {
        if !self.inner.ending.swap(true, Ordering::AcqRel) {
            self.inner.node.drain.cancel();
            close_behind(&self.inner.0, true);
        }
        self.inner.ended.cancelled().await;
    }
}

/// What the clones of a handle share: with the last of them the database is closed.
pub(super) struct LastHandle(pub(super) Arc<DbInner>);

impl Deref for LastHandle {
    type Target = DbInner;

    fn deref(&self) -> &DbInner {
        &self.0
    }
}

impl fmt::Debug for LastHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        if self.ending.swap(true, Ordering::AcqRel) {
            return;
        }
        // At once, so that what is dropped with a runtime's tasks, such as the listener, is free soon.
        self.node.stop.cancel();
        if may_wait_here() {
            self.announce();
            self.close();
        } else {
            close_behind(&self.0, false);
        }
    }
}

/// Whether the last fsyncs may hold up this thread: not one that drives async tasks, nor one of our own, which would wait for itself.
fn may_wait_here() -> bool {
    let ours = std::thread::current().name().is_some_and(|name| name.starts_with("replite-"));
    !ours && tokio::runtime::Handle::try_current().is_err()
}

/// Closes on a thread of its own, so that neither a dropped future nor a runtime that ends leaves it half done.
fn close_behind(inner: &Arc<DbInner>, gently: bool) {
    inner.announce();
    let work = move |inner: &mut Arc<DbInner>| {
        if gently {
            inner.end_tasks();
        }
        Ok(())
    };
    let started = threads::start("replite-close", inner.clone(), work, |inner, ended| {
        inner.close();
        if let Err(error) = ended {
            inner.node.report(Condition::CloseNotAwaited { error: &error });
        }
    });
    if let Err(error) = started {
        inner.close();
        inner.node.report(Condition::CloseThreadMissing { error: &error });
    }
}

impl DbInner {
    async fn drain(&self) {
        self.node.drain.cancel();
        if tokio::time::timeout(STREAMS_LIMIT, self.source.deserted()).await.is_err() {
            self.node.report(Condition::StreamsLate);
        }
    }

    /// Ends streams and tasks with a limit. Blocks.
    fn end_tasks(&self) {
        // A runtime of its own: the one that the tasks run in may have ended.
        let clock = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
            Ok(clock) => clock,
            Err(error) => return self.node.report(Condition::CloseClockMissing { error: &error }),
        };
        clock.block_on(async {
            self.drain().await;
            self.node.stop.cancel();
            self.tracker.close();
            if tokio::time::timeout(TASKS_LIMIT, self.tracker.wait()).await.is_err() {
                self.node.report(Condition::TasksLate);
            }
        });
    }

    /// Whoever opens the file anew waits for us from now on.
    fn announce(&self) {
        if let Some(claim) = &*lock(&self.claim) {
            claim.closing();
        }
    }

    /// Ends everything that is ours. Blocks for as long as the last fsyncs take.
    fn close(&self) {
        // Also when something of the application's panics, the file is given back, and then that is said.
        let _said_at_the_end = self.ended.clone().drop_guard();
        let _claim = lock(&self.claim).take();
        self.closed.store(true, Ordering::Release);
        self.node.stop.cancel();
        self.tracker.close();
        self.source.set(None);
        self.pool.close();
        // It reads through connections of its own, which have to be closed before the others.
        self.verifier.close();
        self.writer.close();
        if let Some(running) = self.slot.take() {
            running.close();
        }
        crate::sqlite::close_unlocked();
        self.node.applied.close();
        threads::aside(|| self.node.change_role(RoleChange::Stopped));
    }
}
