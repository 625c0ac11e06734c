//! What an orchestrator, a balancer and Prometheus ask a node: a service of four routes.

mod answer;
#[cfg(feature = "prometheus")]
mod text;

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Method, Request, Response, StatusCode};
use tokio::sync::Semaphore;
use tower::Service;

#[cfg(feature = "prometheus")]
use crate::metrics::NodeFigures;
use crate::status::{Health, Status};
use crate::threads::blocking;
pub use answer::ProbeBody;
use answer::{AnswerKind, answer, not_allowed};
#[cfg(feature = "prometheus")]
use text::Scrapes;

const LIVEZ: &str = "/livez";
const READYZ: &str = "/readyz";
const HEALTHZ: &str = "/healthz";
#[cfg(feature = "prometheus")]
const METRICS: &str = "/metrics";

/// How many of them look at the node at one time. Others wait.
const LOOKS_MAX: usize = 4;

/// Whether a request asks what the probes answer, where they are at the root.
pub(crate) fn is_probe(method: &Method, path: &str) -> bool {
    #[cfg(feature = "prometheus")]
    let scrape = path == METRICS;
    #[cfg(not(feature = "prometheus"))]
    let scrape = false;
    matches!(*method, Method::GET | Method::HEAD) && (scrape || [LIVEZ, READYZ, HEALTHZ].contains(&path))
}

/// A database that probes ask about.
pub(crate) trait Probed: fmt::Debug + Send + Sync {
    /// Its name in the cluster.
    fn database(&self) -> &str;
    /// As [`Health::live`](crate::Health::live).
    fn is_live(&self) -> bool;
    /// None: it is closed. Blocks.
    fn health(&self) -> Option<(Health, Status)>;
    /// None: it is closed. Blocks.
    #[cfg(feature = "prometheus")]
    fn figures(&self) -> Option<NodeFigures>;
}

/// A tower service that answers what an orchestrator, a balancer and Prometheus ask a node; made by
/// [`Db::probes`](crate::Db::probes).
///
/// - `/livez`: 200 while the process is to go on. With 503 replication has stopped for good, or the
///   database is closed: end the process and start it again.
/// - `/readyz`: 200 while reads are answered from a recent state. With 503 they are not, or the
///   node drains: send it no requests.
/// - `/healthz`: 200 while reads and writes can be done. With 503 one of them can't, and the answer
///   says what is wrong.
/// - `/metrics`: counters and gauges in Prometheus's text format (feature `prometheus`).
///
/// An election, or a primary that is away, changes `/livez` not at all, and `/readyz` not before
/// [`Config::grace`](crate::Config::grace): a balancer that drops every replica then would make the
/// outage itself. `/healthz` is for people and alarms; give it to no balancer.
///
/// It answers `GET` and `HEAD`, and 405 to other methods; other paths get 404. No answer may be
/// stored by caches. The answers are short JSON objects. They have what everybody may know
/// ([`Status::public`](crate::Status::public)), unless [`Probes::detailed`] says otherwise. Numbers
/// of `/metrics` have the label `database`, and no addresses, paths or ids.
///
/// **Where it goes.** Beside the replay layer, not below it, as
/// [`Db::service`](crate::Db::service) does: what is asked is this node, without any token. The
/// layer leaves these four paths alone in any case once there is a `Probes`. Below axum's `nest`
/// that holds for the path without the prefix. Where the service is nested below the layer itself,
/// at a prefix of its own, say [`Route::Local`](crate::Route::Local) for that prefix.
///
/// With the feature `axum` it becomes a `Router` of these routes: `router.merge(db.probes())`. It
/// can also be nested (`nest_service("/internal", db.probes())`) or be all that a listener serves
/// (`fallback_service`). Without axum it is a service like any other, such as for hyper:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use bytes::Bytes;
/// use http::Request;
/// use http_body_util::{BodyExt, Empty};
/// use replite::Db;
/// use tower::ServiceExt;
///
/// let db = Db::temporary(|config| config).await?;
/// let probes = db.probes(); // for hyper: `TowerToHyperService::new(db.probes())`
/// let request = Request::get("/readyz").body(Empty::<Bytes>::new())?;
/// let response = probes.oneshot(request).await?;
/// assert_eq!(response.status(), 200);
/// assert_eq!(response.into_body().collect().await?.to_bytes(), r#"{"can_read":true}"#);
/// # Ok(())
/// # }
/// ```
///
/// It keeps no database open. Of one that is closed it says 503.
#[derive(Clone)]
pub struct Probes {
    databases: Vec<Arc<dyn Probed>>,
    detailed: bool,
    looks: Arc<Semaphore>,
    #[cfg(feature = "prometheus")]
    scrapes: Option<Scrapes>,
}

impl Probes {
    pub(crate) fn new(database: Arc<dyn Probed>) -> Probes {
        Probes {
            databases: vec![database],
            detailed: false,
            looks: Arc::new(Semaphore::new(LOOKS_MAX)),
            #[cfg(feature = "prometheus")]
            scrapes: Some(Scrapes::default()),
        }
    }

    /// The same for several databases in one process. Each answer is 200 only where it would be for
    /// all of them. There is `/metrics` where both have it. Whether `/healthz` is detailed is said
    /// for all of them by [`Probes::detailed`] of the first.
    ///
    /// ```
    /// use replite::{Db, Probes};
    ///
    /// fn probes(notes: &Db, orders: &Db) -> Probes {
    ///     notes.probes().and(orders.probes())
    /// }
    /// # let _ = probes;
    /// ```
    #[must_use]
    pub fn and(mut self, others: Probes) -> Probes {
        for other in others.databases {
            if self.databases.iter().any(|one| one.database() == other.database()) {
                tracing::warn!(
                    database = other.database(),
                    "two databases of this name are probed, which no metric tells apart; give one another \
                     by `Config::database`"
                );
            }
            self.databases.push(other);
        }
        // What was told of fewer databases is not told of all.
        #[cfg(feature = "prometheus")]
        {
            self.scrapes = self.scrapes.and(others.scrapes).map(|_| Scrapes::default());
        }
        self
    }

    /// Whether `/healthz` tells all that operators may know: [`Health`] and
    /// [`Status`](crate::Status), with ids, addresses, paths, and words of other nodes. For a
    /// listener that no stranger can reach.
    ///
    /// ```no_run
    /// # async fn example(db: replite::Db) -> std::io::Result<()> {
    /// // The application's own port has `db.probes()`, and this one everything.
    /// let operators = axum::Router::new().fallback_service(db.probes().detailed(true));
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:9090").await?;
    /// axum::serve(listener, operators).await
    /// # }
    /// ```
    #[must_use]
    pub fn detailed(mut self, yes: bool) -> Probes {
        self.detailed = yes;
        self
    }

    /// Whether it answers `/metrics` (yes if not set). Where not everybody may see how much there
    /// is in a database, and how much happens in it, leave it to a listener of its own.
    ///
    /// ```
    /// use replite::{Db, Probes};
    ///
    /// fn for_everybody(db: &Db) -> Probes {
    ///     db.probes().metrics(false)
    /// }
    /// # let _ = for_everybody;
    /// ```
    #[cfg(feature = "prometheus")]
    #[cfg_attr(docsrs, doc(cfg(feature = "prometheus")))]
    #[must_use]
    pub fn metrics(mut self, yes: bool) -> Probes {
        self.scrapes = yes.then(Scrapes::default);
        self
    }

    /// The paths that it answers, from its own root.
    #[cfg(feature = "axum")]
    pub(crate) fn paths(&self) -> Vec<&'static str> {
        #[cfg_attr(not(feature = "prometheus"), allow(unused_mut))]
        let mut paths = vec![LIVEZ, READYZ, HEALTHZ];
        #[cfg(feature = "prometheus")]
        paths.extend(self.scrapes.is_some().then_some(METRICS));
        paths
    }

    fn start(&self, method: &Method, path: &str) -> ProbeFuture {
        let is_head = method == Method::HEAD;
        let make: fn(&Probes) -> (bool, serde_json::Value) = match path {
            LIVEZ => Probes::livez,
            READYZ => Probes::readyz,
            HEALTHZ => Probes::healthz,
            #[cfg(feature = "prometheus")]
            METRICS if self.scrapes.is_some() => return self.start_scrape(method, is_head),
            _ => {
                return ProbeFuture::now(answer(
                    StatusCode::NOT_FOUND,
                    AnswerKind::Text,
                    "not found\n",
                    is_head,
                ));
            }
        };
        if !is_head && method != Method::GET {
            return ProbeFuture::now(not_allowed());
        }
        if path == LIVEZ {
            return ProbeFuture::now(told(make(self), is_head));
        }
        let probes = self.clone();
        ProbeFuture(ProbeAnswer::Later(Box::pin(async move {
            let place = probes.looks.clone().acquire_owned().await;
            // The place is the look's, also when its request was dropped.
            let looked = blocking(move || {
                let _place = place;
                Ok(make(&probes))
            });
            match looked.await {
                Ok(found) => told(found, is_head),
                Err(error) => {
                    tracing::warn!(%error, "a probe can't be answered");
                    answer(StatusCode::INTERNAL_SERVER_ERROR, AnswerKind::Text, "not known\n", is_head)
                }
            }
        })))
    }

    #[cfg(feature = "prometheus")]
    fn start_scrape(&self, method: &Method, is_head: bool) -> ProbeFuture {
        let Some(scrapes) = self.scrapes.clone().filter(|_| is_head || method == Method::GET) else {
            return ProbeFuture::now(not_allowed());
        };
        let databases = self.databases.clone();
        ProbeFuture(ProbeAnswer::Later(Box::pin(async move {
            match scrapes.text(databases).await {
                Ok(text) => answer(StatusCode::OK, AnswerKind::Metrics, text, is_head),
                Err(error) => {
                    tracing::warn!(%error, "the metrics can't be told");
                    answer(StatusCode::INTERNAL_SERVER_ERROR, AnswerKind::Text, "not known\n", is_head)
                }
            }
        })))
    }

    fn livez(&self) -> (bool, serde_json::Value) {
        let live = self.databases.iter().all(|database| database.is_live());
        (live, serde_json::json!({ "live": live }))
    }

    fn readyz(&self) -> (bool, serde_json::Value) {
        let reads = |database: &Arc<dyn Probed>| database.health().is_some_and(|(health, _)| health.can_read);
        let can_read = self.databases.iter().all(reads);
        (can_read, serde_json::json!({ "can_read": can_read }))
    }

    fn healthz(&self) -> (bool, serde_json::Value) {
        let (mut can_read, mut can_write) = (true, true);
        let tell = |database: &Arc<dyn Probed>| {
            let name = database.database();
            let Some((health, status)) = database.health() else {
                (can_read, can_write) = (false, false);
                return serde_json::json!({ "database": name, "can_read": false, "can_write": false });
            };
            can_read &= health.can_read;
            can_write &= health.can_write;
            if self.detailed {
                return serde_json::json!({ "database": name, "health": health, "status": status });
            }
            let (reads, writes, status) = (health.can_read, health.can_write, status.public());
            serde_json::json!({ "database": name, "can_read": reads, "can_write": writes, "status": status })
        };
        let databases: Vec<_> = self.databases.iter().map(tell).collect();
        let words =
            serde_json::json!({ "can_read": can_read, "can_write": can_write, "databases": databases });
        (can_read && can_write, words)
    }
}

/// What was found, as an answer.
fn told((well, words): (bool, serde_json::Value), is_head: bool) -> Response<ProbeBody> {
    let status = if well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(status, AnswerKind::Json, words.to_string(), is_head)
}

impl fmt::Debug for Probes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.databases.iter().map(|database| database.database()).collect();
        f.debug_struct("Probes").field("databases", &names).finish_non_exhaustive()
    }
}

impl<B> Service<Request<B>> for Probes {
    type Response = Response<ProbeBody>;
    type Error = Infallible;
    type Future = ProbeFuture;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ProbeFuture {
        self.start(request.method(), request.uri().path())
    }
}

/// The answer of [`Probes`], once it is there. `/livez` answers at once. All others look at the
/// node on a thread where that may wait for the disk.
#[derive(Debug)]
pub struct ProbeFuture(ProbeAnswer);

enum ProbeAnswer {
    Now(Option<Response<ProbeBody>>),
    Later(Pin<Box<dyn Future<Output = Response<ProbeBody>> + Send>>),
}

impl fmt::Debug for ProbeAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProbeAnswer")
    }
}

impl ProbeFuture {
    fn now(response: Response<ProbeBody>) -> ProbeFuture {
        ProbeFuture(ProbeAnswer::Now(Some(response)))
    }
}

impl Future for ProbeFuture {
    type Output = Result<Response<ProbeBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            ProbeAnswer::Now(response) => match response.take() {
                Some(response) => Poll::Ready(Ok(response)),
                None => panic!("a probe's future was polled after it was ready"),
            },
            ProbeAnswer::Later(response) => response.as_mut().poll(cx).map(Ok),
        }
    }
}
