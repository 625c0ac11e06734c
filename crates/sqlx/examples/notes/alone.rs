//! Notes in a SQLite database, by sqlx.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool};
use tokio::signal::unix::{SignalKind, signal};

struct AppError(sqlx::Error);

impl From<sqlx::Error> for AppError {
    fn from(error: sqlx::Error) -> AppError {
        AppError(error)
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.0.to_string()).into_response()
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
    let path = std::env::var("DATABASE").map_err(|_| "DATABASE: say the path of the database")?;
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(true);
    let pool = SqlitePool::connect_with(options.journal_mode(SqliteJournalMode::Wal)).await?;
    sqlx::migrate!("examples/notes/migrations").run(&pool).await?;

    let app = Router::new().route("/", get(list).post(add)).route("/visit", get(visit));
    let app = app.with_state(pool.clone());

    let address = std::env::args().nth(1).ok_or("say where to listen, such as 127.0.0.1:8081")?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        terminate.recv().await;
    });
    server.await?;
    pool.close().await;
    Ok(())
}
