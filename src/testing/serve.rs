//! The application of a node in a test cluster, on a port that it keeps while the node is away.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::error::{Error, Result};
use crate::lock::lock;
use crate::proxy::BoxError;

/// A service, and what ends its connections.
type Life<S> = Option<(S, CancellationToken)>;

/// A port, and whatever is served there at the moment.
#[derive(Debug)]
pub(super) struct Stand<S> {
    pub(super) address: SocketAddr,
    life: Arc<Mutex<Life<S>>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl<S: Application> Stand<S> {
    pub(super) async fn start() -> Result<Stand<S>> {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(Error::io("bind", "127.0.0.1"))?;
        let address = listener.local_addr().map_err(Error::io("bind", "127.0.0.1"))?;
        let life: Arc<Mutex<Life<S>>> = Arc::default();
        let serving = life.clone();
        let accepting = tokio::spawn(async move {
            loop {
                let Ok((io, _)) = listener.accept().await else {
                    // For want of descriptors, most likely: others may give theirs back.
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    continue;
                };
                let now = lock(&serving).clone();
                // A node that is away refuses everybody.
                if let Some((service, stop)) = now {
                    tokio::spawn(stop.run_until_cancelled_owned(service.serve(io)));
                }
            }
        });
        Ok(Stand { address, life, accepting })
    }

    pub(super) fn open(&self, service: S) {
        let life = Some((service, CancellationToken::new()));
        *lock(&self.life) = life;
    }
}

impl<S> Stand<S> {
    /// Cuts every connection and lets no new one in.
    pub(super) fn shut(&self) {
        let life = lock(&self.life).take();
        if let Some((_, stop)) = life {
            stop.cancel();
        }
    }
}

impl<S> Drop for Stand<S> {
    fn drop(&mut self) {
        self.accepting.abort();
        self.shut();
    }
}

/// What can be served by a node of a [`Cluster`](crate::testing::Cluster): any tower service of
/// HTTP requests that can be cloned, such as axum's `Router`.
///
/// ```
/// # async fn example() -> Result<(), replite::Error> {
/// use std::convert::Infallible;
///
/// use axum::body::Body;
/// use http::{Request, Response};
/// use replite::testing::Cluster;
///
/// // Any service will do; most are an axum `Router`.
/// let hello = |_: Request<hyper::body::Incoming>| async {
///     Ok::<_, Infallible>(Response::new(Body::from("hello")))
/// };
/// let cluster = Cluster::start(2).app(move |_| tower::service_fn(hello)).await?;
/// # drop(cluster);
/// # Ok(())
/// # }
/// ```
pub trait Application: Clone + Send + Sync + 'static {
    /// Serves one connection to its end.
    #[doc(hidden)]
    fn serve(self, io: TcpStream) -> impl Future<Output = ()> + Send;
}

impl<S, B> Application for S
where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    async fn serve(self, io: TcpStream) {
        // Where it fails the connection is gone, and serving it says so.
        let _ = io.set_nodelay(true);
        let builder = Builder::new(TokioExecutor::new());
        let service = TowerToHyperService::new(self);
        let connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(io), service));
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection of a test cluster ended");
        }
    }
}
