//! Nodes with an application, in processes of their own; and one that is restarted in good order,
//! again and again, under clients of its replica.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::routing::{get, post};
use http::Request;
use replite::{Config, Db, Error, Route, lease};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::http_support::{Answer, Http};
use crate::support::*;

/// Clients of the replica at one time.
const CLIENTS: usize = 8;
/// Requests of all of them between two restarts.
const BETWEEN: usize = 200;
/// How late an application listens that has a listener of its own for the streams.
const LATE: Duration = Duration::from_millis(300);

/// On what requests go to the primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ForwardWay {
    Http1,
    Http2,
    Channel,
}

impl ForwardWay {
    /// What tells a node's process.
    pub(crate) fn variables(self) -> &'static [(&'static str, &'static str)] {
        match self {
            ForwardWay::Http1 => &[],
            ForwardWay::Http2 => &[("HTTP2", "yes")],
            ForwardWay::Channel => &[("CHANNEL", "yes")],
        }
    }
}

/// How requests go to the primary.
#[derive(Clone, Copy)]
pub(crate) struct Setting {
    pub(crate) way: ForwardWay,
    /// The streams have a port of their own, and stand before the application listens.
    pub(crate) own_listener: bool,
}

/// `POST /` adds the body as a note, `GET /?text` counts the notes with this text: here, on the
/// primary below `/primary`, and below `/late` in a transaction, so that a replica finds out in the
/// handler that it can't. `POST /host` says which host was named.
fn routes(db: &Db) -> Router {
    const COUNT: &str = "SELECT count(*) FROM notes WHERE text = ?1";
    async fn add(State(db): State<Db>, text: String) -> Result<StatusCode, Error> {
        db.write(move |tx| Ok::<_, Error>(tx.execute("INSERT INTO notes(text) VALUES (?1)", [text])?))
            .await?;
        Ok(StatusCode::CREATED)
    }
    async fn count(State(db): State<Db>, uri: Uri) -> Result<String, Error> {
        let text = uri.query().unwrap_or_default();
        let number: i64 = db.read(|conn| Ok::<_, Error>(conn.query_row(COUNT, [text], |row| row.get(0))?))?;
        Ok(number.to_string())
    }
    async fn count_late(State(db): State<Db>, uri: Uri) -> Result<String, Error> {
        let text = uri.query().unwrap_or_default().to_string();
        let number = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<i64, Error>(tx.query_row(COUNT, [text], |row| row.get(0))?)
        };
        Ok(db.write(number).await?.value.to_string())
    }
    async fn host(headers: HeaderMap) -> String {
        let header = |name| headers.get(name).map_or("", |value| value.to_str().unwrap());
        format!("{} {}", header("host"), header("x-forwarded-host"))
    }
    Router::new()
        .route("/", get(count).post(add))
        .route("/primary", get(count))
        .route("/late", get(count_late))
        .route("/host", post(host))
        .with_state(db.clone())
}

/// A node as the documentation's `main` runs it, until SIGTERM.
pub(crate) fn run_node() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let port: u16 = variable("PORT").parse().unwrap();
        let streams: Option<u16> = variable("STREAMS").parse().ok();
        let bind = || TcpListener::bind(("127.0.0.1", port));
        let listener = if streams.is_none() { Some(bind().await.unwrap()) } else { None };
        let mut config = Config::new(variable("DB"))
            .database("app")
            .secret(secret())
            .advertise(std::env::var("ADVERTISE").unwrap_or(format!("http://127.0.0.1:{port}")))
            .migrate(|conn| {
                conn.execute_batch(
                    "CREATE TABLE IF NOT EXISTS notes(text); CREATE INDEX IF NOT EXISTS i ON notes(text)",
                )
            });
        if let Some(streams) = streams {
            config = config.listen(SocketAddr::from(([127, 0, 0, 1], streams)));
        }
        if let Ok(roots) = std::env::var("ROOTS") {
            config = config.app_roots(roots);
        }
        let (follows, leases) = (variable("FOLLOWS"), std::env::var("LEASES"));
        let primary = follows.is_empty() && leases.is_err();
        if let Ok(leases) = leases {
            config = config.lease(lease::Directory::new(leases)).bootstrap(3);
        } else if !primary {
            config = config.lease(lease::Fixed::replica_of(follows));
        }
        let db = Db::open(config).await.unwrap();
        let layer = db.replay_layer().http2(std::env::var_os("HTTP2").is_some()).route_prefix("/primary", Route::Primary);
        let layered = std::env::var("LAYER").as_deref() != Ok("no");
        let app = if layered { routes(&db).layer(layer) } else { routes(&db) };
        if std::env::var_os("CHANNEL").is_some() {
            db.serve_forwarded(app.clone()).unwrap();
        }
        let app = app.nest_service("/_replite", db.service());
        let listener = match listener {
            Some(listener) => listener,
            None => {
                tokio::time::sleep(if primary { LATE } else { Duration::ZERO }).await;
                bind().await.unwrap()
            }
        };
        let mut asked = signal(SignalKind::terminate()).unwrap();
        let linger = std::env::var("LINGER_MS").map_or(0, |text| text.parse().unwrap());
        let draining = db.clone();
        let mut server = tokio::spawn(
            axum::serve(listener, app)
                .with_graceful_shutdown(async move {
                    asked.recv().await;
                    draining.drain().await;
                    tokio::time::sleep(Duration::from_millis(linger)).await;
                })
                .into_future(),
        );
        db.ready().await.unwrap();
        speak("ready");
        // Whoever started it may be gone.
        std::thread::spawn(hear);
        tokio::select! {
            served = &mut server => served.unwrap().unwrap(),
            () = async { db.draining().await; tokio::time::sleep(Duration::from_secs(10)).await } => server.abort(),
        }
        db.shutdown().await;
        std::process::exit(0);
    });
}

pub(crate) fn database(dir: &Path, port: u16) -> PathBuf {
    dir.join(format!("{port}.db"))
}

/// Starts a node in a process of its own.
pub(crate) fn node(
    dir: &Path,
    port: u16,
    streams: Option<u16>,
    follows: &str,
    more: &[(&str, &str)],
) -> Process {
    let (db, port) = (database(dir, port), port.to_string());
    let streams = streams.map_or(String::new(), |port| port.to_string());
    let mut variables =
        vec![("DB", db.to_str().unwrap()), ("PORT", &port), ("STREAMS", &streams), ("FOLLOWS", follows)];
    variables.extend(more);
    Process::start(crate::node_process, &variables)
}

/// What the clients saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) requests: usize,
    pub(crate) failed: Vec<String>,
    pub(crate) longest: Duration,
    acknowledged: Vec<String>,
}

struct Client {
    http: Http,
    url: String,
    name: usize,
    token: String,
    seen: Arc<Mutex<Seen>>,
    requests: Arc<AtomicUsize>,
}

impl Client {
    /// Sends a request; a failure is noted.
    async fn send(&mut self, method: &str, path: &str, body: &str) -> Option<Answer> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.url));
        if !self.token.is_empty() {
            request = request.header("replite-token", &self.token);
        }
        let begin = Instant::now();
        let got = self.http.send(request.body(body.to_string()).unwrap()).await;
        let took = begin.elapsed();
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap();
        seen.requests += 1;
        seen.longest = seen.longest.max(took);
        match got {
            Ok(answer) if answer.status < 300 => {
                if !answer.header("replite-token").is_empty() {
                    self.token = answer.header("replite-token").to_string();
                }
                Some(answer)
            }
            Ok(answer) => {
                let outcome = answer.header("replite-outcome").to_string();
                seen.failed.push(format!(
                    "{method} {path}: {} {outcome} after {took:?}: {}",
                    answer.status,
                    answer.text()
                ));
                None
            }
            Err(error) => {
                seen.failed.push(format!("{method} {path} after {took:?}: {error}"));
                None
            }
        }
    }

    /// Writes, and looks for it in each way.
    async fn run(mut self, end: Arc<AtomicBool>) {
        for n in 0.. {
            if end.load(Ordering::Relaxed) {
                return;
            }
            let text = format!("{}-{n}", self.name);
            if self.send("POST", "/", &text).await.is_none() {
                continue;
            }
            self.seen.lock().unwrap().acknowledged.push(text.clone());
            for path in ["/", "/primary", "/late"] {
                let path = format!("{path}?{text}");
                if let Some(answer) = self.send("GET", &path, "").await
                    && answer.text() != "1"
                {
                    self.seen.lock().unwrap().failed.push(format!("GET {path}: {}", answer.text()));
                }
            }
        }
    }
}

/// Restarts the primary so many times. What was acknowledged is there once, whatever failed, and
/// nothing is there twice.
pub(crate) async fn restarts(setting: Setting, rounds: usize) -> Seen {
    let dir = tempfile::tempdir().unwrap();
    let (port, streams) = (own_port(), setting.own_listener.then(own_port));
    let variables = setting.way.variables();
    let primary = || node(dir.path(), port, streams, "", variables);
    let mut running = primary();
    tokio::task::block_in_place(|| running.expect("ready"));
    let follows = format!("http://127.0.0.1:{}", streams.unwrap_or(port));
    let own = own_port();
    let replica = node(dir.path(), own, None, &follows, variables);
    tokio::task::block_in_place(|| replica.expect("ready"));

    let (seen, requests, end) =
        (Arc::<Mutex<Seen>>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
    let mut clients = tokio::task::JoinSet::new();
    for name in 0..CLIENTS {
        let client = Client {
            http: Http::new(),
            url: format!("http://127.0.0.1:{own}"),
            name,
            token: String::new(),
            seen: seen.clone(),
            requests: requests.clone(),
        };
        clients.spawn(client.run(end.clone()));
    }
    for _ in 0..rounds {
        more(&requests).await;
        running = tokio::task::block_in_place(|| {
            running.end();
            let next = primary();
            next.expect("ready");
            next
        });
    }
    more(&requests).await;
    end.store(true, Ordering::Relaxed);
    within("the clients' end", async { while clients.join_next().await.is_some() {} }).await;
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    let notes: BTreeMap<String, i64> = {
        let conn = plain(&database(dir.path(), port));
        let mut all = conn.prepare("SELECT text, count(*) FROM notes GROUP BY text").unwrap();
        all.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect()
    };
    let twice: Vec<_> = notes.iter().filter(|(_, times)| **times != 1).collect();
    assert!(twice.is_empty(), "more than once: {twice:?}");
    let gone: Vec<_> = seen.acknowledged.iter().filter(|text| !notes.contains_key(*text)).collect();
    assert!(gone.is_empty(), "acknowledged and gone: {gone:?}");
    tokio::task::block_in_place(|| {
        running.end();
        replica.end();
    });
    seen
}

/// Waits until so many more requests were made.
async fn more(requests: &AtomicUsize) {
    let from = requests.load(Ordering::Relaxed);
    within("more requests", async {
        while requests.load(Ordering::Relaxed) < from + BETWEEN {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
