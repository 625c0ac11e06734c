//! Notes in a SQLite database, by sqlx.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router, routing::get};
use replite::{Config, Db, NeedsPrimary};
use sqlx::sqlite::SqlitePool;
use tokio::signal::unix::{SignalKind, signal};

struct AppError(sqlx::Error);

impl From<sqlx::Error> for AppError {
    fn from(error: sqlx::Error) -> AppError {
        AppError(error)
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        let needs = replite_sqlx::needs_primary(&self.0).then(|| Extension(NeedsPrimary::new()));
        (StatusCode::INTERNAL_SERVER_ERROR, needs, self.0.to_string()).into_response()
    }
}

async fn list(State(pool): State<SqlitePool>) -> Result<String, AppError> {
    let notes: Vec<String> =
        sqlx::query_scalar("SELECT text FROM notes ORDER BY id").fetch_all(&pool).await?;
    Ok(notes.join("\n"))
}

async fn add(State(pool): State<SqlitePool>, text: String) -> Result<(), AppError> {
    sqlx::query("INSERT INTO notes(text) VALUES (?)").bind(text).execute(&pool).await?;
    Ok(())
}

/// A GET that writes.
async fn visit(State(pool): State<SqlitePool>) -> Result<String, AppError> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let sql = "UPDATE visits SET count = count + 1 RETURNING count";
    let count: i64 = sqlx::query_scalar(sql).fetch_one(&mut *tx).await?;
    tx.commit().await?;
    Ok(count.to_string())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let migrations = replite_sqlx::migrations(sqlx::migrate!("examples/notes/migrations"));
    let db = Db::open(Config::from_env("REPLITE_")?.migrate(migrations)).await?;
    let pool = replite_sqlx::pool(&db).await?;

    let app = Router::new().route("/", get(list).post(add)).route("/visit", get(visit));
    let app = app.with_state(pool.clone()).layer(db.replay_layer());
    db.serve_forwarded(app.clone())?;

    let address = std::env::args().nth(1).ok_or("say where to listen, such as 127.0.0.1:8081")?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let ends = db.clone();
    let mut terminate = signal(SignalKind::terminate())?;
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        terminate.recv().await;
        ends.drain().await;
    });
    server.await?;
    db.shutdown().await;
    pool.close().await;
    Ok(())
}
