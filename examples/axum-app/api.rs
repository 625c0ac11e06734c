//! Routes and handlers.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures_util::stream::{Stream, unfold};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use replite::{Db, Error, Role, Session};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::changes::{self, Change};
use crate::guard::{Names, guard};
use crate::{page, store};

/// The longest note, in bytes.
const TEXT_MAX_BYTES: usize = 10_000;
/// Notes that one request lists if it asks for no number, and the most it gets.
const LIMIT_DEFAULT: u32 = 50;
const LIMIT_MAX: u32 = 500;
/// How long another instance may take to say how it is.
const PEER_LIMIT: Duration = Duration::from_millis(500);
/// The longest answer of another instance that is read, in bytes.
const PEER_MAX_BYTES: usize = 64 * 1024;

struct App {
    db: Db,
    url: String,
    peers: Vec<String>,
    changes: watch::Receiver<VecDeque<Change>>,
    /// Cancelled when the process is asked to end.
    end: CancellationToken,
}

type Shared = State<Arc<App>>;

pub(crate) fn router(
    db: &Db,
    url: String,
    peers: Vec<String>,
    names: Names,
    end: CancellationToken,
) -> Router {
    let app = Arc::new(App { db: db.clone(), url, peers, changes: changes::watch(db), end });
    Router::new()
        .route("/", get(index))
        .route("/page.css", get(async || asset("text/css", include_str!("page.css"))))
        .route("/page.js", get(async || asset("text/javascript", include_str!("page.js"))))
        .route("/api/notes", get(list).post(add))
        .route("/api/notes/{id}", put(change).delete(remove))
        .route("/api/events", get(events))
        .route("/api/node", get(node))
        .route("/api/nodes", get(nodes))
        .route("/api/handoff", post(hand_over))
        .fallback(async || Failure::Refused(StatusCode::NOT_FOUND, "no such page".into()))
        .method_not_allowed_fallback(async || {
            Failure::Refused(StatusCode::METHOD_NOT_ALLOWED, "not with this method".into())
        })
        .layer(DefaultBodyLimit::max(TEXT_MAX_BYTES * 8))
        .with_state(app)
        .layer(db.replay_layer())
        // `/livez`, `/readyz`, `/healthz` and `/metrics`: about this instance, whatever its role.
        .merge(db.probes())
        .layer(from_fn_with_state(Arc::new(names), guard))
        .nest_service("/_replite", db.service())
}

/// What a handler fails with.
pub(crate) enum Failure {
    Db(Error),
    /// The request can't be served as it is.
    Refused(StatusCode, String),
}

impl Failure {
    fn no_such_note() -> Failure {
        Failure::Refused(StatusCode::NOT_FOUND, "no such note".into())
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Failure {
        Failure::Refused(rejection.status(), rejection.body_text())
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Failure {
        Failure::Refused(rejection.status(), rejection.body_text())
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Failure {
        Failure::Refused(rejection.status(), rejection.body_text())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Db(error)
    }
}

impl From<replite::rusqlite::Error> for Failure {
    fn from(error: replite::rusqlite::Error) -> Failure {
        Failure::Db(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            Failure::Refused(status, text) => (status, Json(json!({ "error": text }))).into_response(),
            Failure::Db(error) => {
                tracing::error!(%error, "a request failed");
                // Status and headers say whether to try again, and whether that is safe. The words
                // are ours, for the error's own may have addresses and paths.
                let (mut head, _) = error.into_response().into_parts();
                for about_the_words in [header::CONTENT_TYPE, header::CONTENT_LENGTH] {
                    head.headers.remove(about_the_words);
                }
                let text = match head.status {
                    StatusCode::SERVICE_UNAVAILABLE => "not at the moment; try again",
                    _ => "internal error",
                };
                (head.status, head.headers, Json(json!({ "error": text }))).into_response()
            }
        }
    }
}

#[derive(Deserialize)]
struct Search {
    #[serde(default)]
    q: String,
    limit: Option<u32>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
}

impl Text {
    /// The text of a request's body, if it can be a note.
    fn of(body: Result<Json<Text>, JsonRejection>) -> Result<String, Failure> {
        let Json(Text { text }) = body?;
        if text.trim().is_empty() || text.len() > TEXT_MAX_BYTES {
            let why = format!("a note has 1 to {TEXT_MAX_BYTES} bytes");
            return Err(Failure::Refused(StatusCode::BAD_REQUEST, why));
        }
        Ok(text)
    }
}

async fn index(
    State(app): Shared,
    search: Result<Query<Search>, QueryRejection>,
) -> Result<impl IntoResponse, Failure> {
    let Query(search) = search?;
    let notes = app.db.read(|conn| store::list(conn, &search.q, LIMIT_DEFAULT).map_err(Failure::from));
    let notes = match notes {
        // The page shows what the instance waits for, and the feed tells when there is more.
        Err(Failure::Db(Error::NoState(_))) => Vec::new(),
        notes => notes?,
    };
    let html = page::render(&app.url, app.db.role(), &search.q, &notes);
    Ok(([(header::CACHE_CONTROL, "no-store")], Html(html)))
}

/// A file of the page. The next version of it is asked for at once.
fn asset(kind: &'static str, text: &'static str) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text)
}

async fn list(
    State(app): Shared,
    search: Result<Query<Search>, QueryRejection>,
) -> Result<impl IntoResponse, Failure> {
    let Query(search) = search?;
    let limit = search.limit.unwrap_or(LIMIT_DEFAULT).min(LIMIT_MAX);
    Ok(Json(app.db.read_async(move |conn| store::list(conn, &search.q, limit).map_err(Failure::from)).await?))
}

async fn add(
    State(app): Shared,
    session: axum::Extension<Session>,
    body: Result<Json<Text>, JsonRejection>,
) -> Result<impl IntoResponse, Failure> {
    let text = Text::of(body)?;
    let (node, written) = (app.url.clone(), text.clone());
    let commit = app.db.write(move |tx| store::add(tx, &written, &node).map_err(Failure::from)).await?;
    let note = json!({
        "id": commit.value,
        "text": text,
        "node": app.url,
        "txid": commit.txid,
        "token": session.token(),
    });
    Ok((StatusCode::CREATED, Json(note)))
}

async fn change(
    State(app): Shared,
    id: Result<Path<i64>, PathRejection>,
    body: Result<Json<Text>, JsonRejection>,
) -> Result<impl IntoResponse, Failure> {
    let Path(id) = id?;
    let text = Text::of(body)?;
    let written = text.clone();
    let commit = app.db.write(move |tx| store::change(tx, id, &written).map_err(Failure::from)).await?;
    if !commit.value {
        return Err(Failure::no_such_note());
    }
    Ok(Json(json!({ "id": id, "text": text, "txid": commit.txid })))
}

async fn remove(State(app): Shared, id: Result<Path<i64>, PathRejection>) -> Result<StatusCode, Failure> {
    let Path(id) = id?;
    let commit = app.db.write(move |tx| store::remove(tx, id).map_err(Failure::from)).await?;
    if commit.value { Ok(StatusCode::NO_CONTENT) } else { Err(Failure::no_such_note()) }
}

/// A live feed of this instance's position and role: one event of each at once, and one after each
/// change. The position changes by what any connection or process writes, anywhere.
async fn events(State(app): Shared) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let (mut positions, mut changes) = (app.db.watch(), app.changes.clone());
    positions.mark_changed();
    changes.mark_changed();
    let feed = unfold((app, positions, changes), async |(app, mut positions, mut changes)| {
        let event = tokio::select! {
            () = app.end.cancelled() => return None,
            changed = changes.changed() => {
                changed.ok()?;
                let role = changes.borrow_and_update().back().map(|change| change.role);
                Event::default().event("role").data(json!(role).to_string())
            }
            changed = positions.changed() => {
                changed.ok()?;
                let number = positions.borrow_and_update().map(|position| position.number());
                Event::default().event("position").data(json!(number).to_string())
            }
        };
        Some((Ok(event), (app, positions, changes)))
    });
    Sse::new(feed).keep_alive(KeepAlive::default())
}

async fn node(State(app): Shared) -> impl IntoResponse {
    ([(header::CACHE_CONTROL, "no-store")], Json(describe(&app)))
}

/// What everybody may see. The texts of problems, and inner addresses, are for operators: in the
/// log.
fn describe(app: &App) -> Value {
    let status = app.db.status().public();
    let roles = app.db.roles().borrow().clone();
    json!({
        "id": app.db.node_id(),
        "url": app.url,
        "role": status.role,
        "epoch": roles.epoch.number(),
        "waits_for": roles.waits_for.map(|reason| reason.to_string()),
        "changes": &*app.changes.borrow(),
        "txid": status.position.map(|p| p.number()),
        "checksum": status.position.map(|p| p.checksum().to_string()),
        "lag_ms": lag_ms(&status),
        "lag_known": status.lag.is_none_or(|lag| lag.transactions.is_some()),
        "problems": status.problems,
    })
}

/// How old the state here is: the primary's is not, and what is unknown is null.
fn lag_ms(status: &replite::PublicStatus) -> Option<u64> {
    match status.role {
        Role::Primary => Some(0),
        _ => status.lag.and_then(|lag| lag.age).map(|age| age.as_millis() as u64),
    }
}

/// All instances as this one sees them, for the page: no cross-origin requests are needed.
async fn nodes(State(app): Shared) -> impl IntoResponse {
    let mut tasks = Vec::new();
    for peer in &app.peers {
        let (peer, app) = (peer.clone(), app.clone());
        tasks.push(tokio::spawn(async move {
            if peer == app.url {
                return describe(&app);
            }
            get_json(&format!("{peer}/api/node"))
                .await
                .unwrap_or_else(|_| json!({ "url": peer, "role": "away" }))
        }));
    }
    let mut all = Vec::new();
    for task in tasks {
        all.extend(task.await.ok());
    }
    ([(header::CACHE_CONTROL, "no-store")], Json(all))
}

/// Has the primary hand its lease to the instance that has the most. Whichever instance is asked, the
/// layer brings the request to the primary. Where not everybody may do that, it needs a login.
async fn hand_over(State(app): Shared) -> Result<impl IntoResponse, Failure> {
    let primary = app.db.handoff(None).await?;
    Ok(Json(json!({ "primary": primary.addresses.app })))
}

/// Asks another instance.
pub(crate) async fn get_json(url: &str) -> Result<Value, crate::Error> {
    let client: Client<_, Empty<axum::body::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    tokio::time::timeout(PEER_LIMIT, async {
        let response = client.get(url.parse()?).await?;
        if !response.status().is_success() {
            return Err(format!("{url} answers {}", response.status()).into());
        }
        let body = Limited::new(response.into_body(), PEER_MAX_BYTES).collect().await?.to_bytes();
        Ok(serde_json::from_slice(&body)?)
    })
    .await?
}
