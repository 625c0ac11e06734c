//! Applications that write past `Db`, or by a thread that knows of no request: an actor with a
//! connection of its own, one that has the `Db`, and a connection beside it. Clients read their own
//! writes on another node all the same, and a read that turns out to write goes to the primary.

use std::error::Error as StdError;
use std::future::IntoFuture;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::Request;
use replite::rusqlite::{self, Connection, ErrorCode};
use replite::{Config, Db, Error, NeedsPrimary, Role, lease};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::http_support::{Answer, Http};
use crate::support::*;

const INSERT: &str = "INSERT INTO t(who) VALUES ('request')";

/// The application's own error. It knows nothing of sessions.
struct AppError(Box<dyn StdError + Send + Sync>);

impl<E: StdError + Send + Sync + 'static> From<E> for AppError {
    fn from(error: E) -> AppError {
        AppError(Box::new(error))
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        let locked = self.0.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
        if locked == Some(ErrorCode::DatabaseBusy) {
            return (StatusCode::SERVICE_UNAVAILABLE, [("x-locked", "1")], "locked").into_response();
        }
        let mut response = (StatusCode::INTERNAL_SERVER_ERROR, "sorry").into_response();
        if let Some(mark) = NeedsPrimary::of(&*self.0) {
            response.extensions_mut().insert(mark);
        }
        response
    }
}

/// A thread that does one write after the other, and answers each.
struct Actor<E>(mpsc::Sender<oneshot::Sender<Result<usize, E>>>);

impl<E: Send + 'static> Actor<E> {
    fn start(mut write: impl FnMut() -> Result<usize, E> + Send + 'static) -> Actor<E> {
        let (sender, asked) = mpsc::channel::<oneshot::Sender<Result<usize, E>>>();
        std::thread::spawn(move || {
            for answer in asked {
                let _ = answer.send(write());
            }
        });
        Actor(sender)
    }

    async fn write(&self) -> Result<(), AppError>
    where
        AppError: From<E>,
    {
        let (answer, written) = oneshot::channel();
        self.0.send(answer).unwrap();
        written.await??;
        Ok(())
    }
}

struct App {
    db: Db,
    /// Owns a connection.
    plain: Actor<rusqlite::Error>,
    /// Owns the handle of the database.
    ours: Actor<Error>,
    /// A connection beside that.
    beside: Mutex<Connection>,
}

/// One of the application's own. On a replica it says at once that others have the lock.
fn own(db: &Db) -> Connection {
    let connection = plain(db.path());
    if db.role() != Role::Primary {
        connection.busy_timeout(Duration::ZERO).unwrap();
    }
    connection
}

fn app(db: &Db) -> Router {
    type Result<T> = std::result::Result<T, AppError>;
    type Shared = State<Arc<App>>;
    async fn count(State(app): Shared) -> Result<String> {
        Ok(count_of(&app.db)?.to_string())
    }
    async fn plain(State(app): Shared) -> Result<()> {
        app.plain.write().await
    }
    async fn ours(State(app): Shared) -> Result<()> {
        app.ours.write().await
    }
    async fn beside(State(app): Shared) -> Result<()> {
        app.beside.lock().unwrap().execute(INSERT, [])?;
        Ok(())
    }
    async fn both(State(app): Shared) -> Result<()> {
        app.db.write(|tx| Ok::<_, Error>(tx.execute(INSERT, [])?)).await?;
        app.plain.write().await
    }
    /// It is told that this failed, and it did not.
    async fn fails(State(app): Shared) -> Result<StatusCode> {
        app.plain.write().await?;
        Ok(StatusCode::BAD_GATEWAY)
    }
    let (mut owned, handle) = (own(db), db.clone());
    let write = move || handle.write_blocking(|tx| Ok::<_, Error>(tx.execute(INSERT, [])?)).map(|c| c.value);
    let state = App {
        db: db.clone(),
        plain: Actor::start(move || {
            owned.transaction().and_then(|tx| {
                tx.execute(INSERT, [])?;
                tx.commit().map(|()| 1)
            })
        }),
        ours: Actor::start(write),
        beside: Mutex::new(own(db)),
    };
    Router::new()
        .route("/", get(count))
        .route("/plain", get(plain).post(plain))
        .route("/ours", get(ours).post(ours))
        .route("/beside", post(beside))
        .route("/both", post(both))
        .route("/fails", post(fails))
        .with_state(Arc::new(state))
        .layer(db.replay_layer().replay_when(|response| response.headers.contains_key("x-locked")))
}

fn count_of(db: &Db) -> Result<i64, Error> {
    let count = "SELECT count(*) FROM t WHERE who = 'request'";
    db.read(|conn| Ok(conn.query_row(count, [], |row| row.get(0))?))
}

struct Node {
    db: Db,
    url: String,
}

/// A node with its server. Whether the others' requests come on the channel.
async fn node(path: &Path, channel: bool, primary: Option<&str>) -> Node {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut config = Config::new(path).database("app").secret(secret()).advertise(&url);
    config = config.listen(([127, 0, 0, 1], own_port()).into());
    config = match primary {
        None => config.migrate(|conn| {
            conn.execute_batch(SCHEMA)?;
            conn.execute_batch("CREATE TABLE IF NOT EXISTS noise(n)")
        }),
        Some(primary) => config.lease(lease::Fixed::replica_of(primary)),
    };
    let db = Db::open(config).await.unwrap();
    within("ready", db.ready()).await.unwrap();
    let app = app(&db);
    if channel {
        db.serve_forwarded(app.clone()).unwrap();
    }
    tokio::spawn(axum::serve(listener, app).into_future());
    Node { db, url }
}

/// A primary, and a replica that has everything later.
async fn pair(dir: &Path, channel: bool) -> (Node, Node, Wire) {
    let primary = node(&dir.join("p.db"), channel, None).await;
    let at = address(&primary.db.node().addresses.replication);
    let wire = Wire::start(at, Duration::from_millis(15)).await;
    let late = format!("http://{}", wire.address);
    let replica = node(&dir.join("r.db"), channel, Some(&late)).await;
    (primary, replica, wire)
}

async fn ask(http: &Http, method: &str, url: String, token: &str) -> Answer {
    let request = Request::builder().method(method).uri(url).header("replite-token", token);
    within("an answer", http.send(request.body("").unwrap())).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_reads_on_another_node_what_it_wrote_whoever_did_that_for_it() {
    const TIMES: usize = 12;
    let (dir, http) = (tempfile::tempdir().unwrap(), Http::new());
    let (primary, replica, _wire) = pair(dir.path(), true).await;
    // Somebody else writes all the while: what is captured is never the end for long.
    let ended = AtomicBool::new(false);
    let (mut written, mut stale) = (0, 0);
    std::thread::scope(|scope| {
        let ends = Ends(&ended);
        scope.spawn(|| {
            let noise = plain(primary.db.path());
            while !ended.load(Ordering::Relaxed) {
                noise.execute("INSERT INTO noise VALUES (randomblob(3000))", []).unwrap();
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        let asks = async {
            let paths = [("/plain", 200), ("/ours", 200), ("/beside", 200), ("/both", 200), ("/fails", 502)];
            for ((path, status), at) in paths.iter().flat_map(|path| [(path, &primary), (path, &replica)]) {
                for n in 0..TIMES {
                    let answer = ask(&http, "POST", format!("{}{path}", at.url), "").await;
                    assert_eq!(answer.status, *status, "{path} {n}: {answer:?}");
                    written += if *path == "/both" { 2 } else { 1 };
                    let read = || format!("{}/", replica.url);
                    stale += usize::from(ask(&http, "GET", read(), "").await.text() != written.to_string());
                    let read = ask(&http, "GET", read(), answer.header("replite-token")).await;
                    assert_eq!(read.text(), written.to_string(), "{path} {n}: {answer:?}");
                }
            }
        };
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(asks));
        drop(ends);
    });
    assert!(stale > 0, "no read without a token was stale: this tests nothing");
    for node in [replica, primary] {
        within("an end", node.db.shutdown()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_that_writes_by_another_thread_runs_on_the_primary_once() {
    for channel in [false, true] {
        let (dir, http) = (tempfile::tempdir().unwrap(), Http::new());
        let (primary, replica, _wire) = pair(dir.path(), channel).await;
        let mut written = 0;
        for path in ["/plain", "/ours"] {
            for _ in 0..5 {
                let answer = ask(&http, "GET", format!("{}{path}", replica.url), "").await;
                assert_eq!(answer.status, 200, "{path}: {answer:?}");
                written += 1;
                assert_eq!(count_of(&primary.db).unwrap(), written, "{path}");
                let read = ask(&http, "GET", replica.url.clone(), answer.header("replite-token")).await;
                assert_eq!(read.text(), written.to_string(), "{path}: {answer:?}");
            }
        }
        for node in [replica, primary] {
            within("an end", node.db.shutdown()).await;
        }
    }
}
