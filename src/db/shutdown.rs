//! How a node ends: draining, shutdown, and the last handle that goes.

use std::future::Future;
use std::sync::atomic::Ordering;

use crate::db::Db;
use crate::node::database::close_behind;

impl Db {
    /// For `with_graceful_shutdown`: ends what would keep the application's server from ending, and
    /// nothing else.
    ///
    /// [`Db::health`] says so from now on, and [`Db::draining`] returns. The primary tells its
    /// replicas. They hold their requests for this node until it is back, or they have waited for
    /// too long ([`ReplayLayer::hold_timeout`](crate::ReplayLayer::hold_timeout)). When those that
    /// they had sent are answered, or after a second, the streams send what is captured and end.
    /// The node lets no replica in, and answers requests that wait here for a primary. Reads,
    /// `wait_for` and requests that were sent to the primary run on, until [`Db::shutdown`]; so do
    /// writes where the primary is fixed.
    ///
    /// Where a lease decides, the primary hands it to the replica that has the most first, as
    /// [`Db::handoff`] does, and follows that one. Where no replica takes it, the lease is given
    /// back: what was committed is sent to the replicas, and the record says which state is its
    /// last. Another node that has that state takes over at once. Writes that come later are
    /// refused here ([`Error::NotPrimary`](crate::Error::NotPrimary)), and the layer sends their
    /// requests on.
    ///
    /// The call returns when the streams have ended, within three seconds. With a lease it may take
    /// eight more, should its store not answer or a write not end, and as long as requests that run
    /// take, at most [`Config::drain_limit`](crate::Config::drain_limit).
    ///
    /// See [`Db::shutdown`] for the whole of an application's end.
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub async fn drain(&self) {
        self.inner.drain().await;
    }

    /// Returns once the node drains, or is shut down. For the application's own long responses,
    /// such as server-sent events, which have to end before its server can:
    /// `stream.take_until(db.draining())`, or a branch of a `select!`. It does not keep the
    /// database open.
    ///
    /// # Cancel safety
    /// Nothing happens but the waiting.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.inner.node.drain.clone().cancelled_owned()
    }

    /// Stops every thread and task of this database, and returns when they have ended. What was
    /// acknowledged is kept; further calls fail with [`Error::ShutDown`](crate::Error::ShutDown).
    /// Can be called more than once: each call returns when all is done.
    ///
    /// It waits up to five seconds for requests that other nodes forwarded on the private channel.
    /// For peers that do not hang up it waits up to nine, and as long as [`Db::drain`] may for a
    /// lease that is to be handed over. Without such it takes milliseconds. It also waits for the
    /// closure of a write that is running, and for the last fsyncs.
    ///
    /// This is the `main` of an application. Whatever its clients do, it ends within twenty-five
    /// seconds of the signal, or forty-five where a lease's store does not answer:
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use axum::Router;
    /// use replite::{Config, Db, Secret};
    /// use tokio::signal::unix::{SignalKind, signal};
    ///
    /// #[tokio::main]
    /// async fn main() -> Result<(), Box<dyn std::error::Error>> {
    ///     let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
    ///     let config = Config::new("data/app.db")
    ///         .advertise("http://10.0.0.1:8080")
    ///         .secret(Secret::new(std::env::var("REPLITE_SECRET")?)?);
    ///     let db = Db::open(config).await?;
    ///     let app = Router::new() // your routes; their long responses end with `db.draining()`
    ///         .layer(db.replay_layer());
    ///     db.serve_forwarded(app.clone())?;
    ///     let app = app.merge(db.probes()).nest_service("/_replite", db.service());
    ///
    ///     let mut terminate = signal(SignalKind::terminate())?;
    ///     let draining = db.clone();
    ///     let mut server = tokio::spawn(
    ///         axum::serve(listener, app)
    ///             .with_graceful_shutdown(async move {
    ///                 tokio::select! {
    ///                     _ = terminate.recv() => {}
    ///                     _ = tokio::signal::ctrl_c() => {}
    ///                 }
    ///                 draining.drain().await;
    ///             })
    ///             .into_future(),
    ///     );
    ///     tokio::select! {
    ///         served = &mut server => served??,
    ///         // A client that takes its response too slowly is cut off.
    ///         () = async {
    ///             db.draining().await;
    ///             tokio::time::sleep(Duration::from_secs(10)).await
    ///         } => server.abort(),
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
            // One that may lead gives the lease back first, while its streams stand.
            if self.inner.elector.is_none() {
                self.inner.node.drain.cancel();
            }
            close_behind(&self.inner.0, true);
        }
        self.inner.ended.cancelled().await;
    }
}
