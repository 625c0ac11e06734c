//! Notes in a SQLite database, by diesel.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Router, routing::get};
use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel::r2d2::ConnectionManager;
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("examples/notes/migrations");

type Pool = diesel::r2d2::Pool<ConnectionManager<SqliteConnection>>;

diesel::table! {
    notes (id) {
        id -> Integer,
        text -> Text,
    }
}

diesel::table! {
    visits (id) {
        id -> Integer,
        count -> BigInt,
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

struct AppError(BoxError);

impl<E: Into<BoxError>> From<E> for AppError {
    fn from(error: E) -> AppError {
        AppError(error.into())
    }
}

impl IntoResponse for AppError {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.0.to_string()).into_response()
    }
}

/// Runs on a thread that may wait for the disk.
async fn with<T: Send + 'static>(
    pool: Pool,
    run: impl FnOnce(&mut SqliteConnection) -> QueryResult<T> + Send + 'static,
) -> Result<T, AppError> {
    Ok(spawn_blocking(move || Ok::<_, BoxError>(run(&mut *pool.get()?)?)).await??)
}

async fn list(State(pool): State<Pool>) -> Result<String, AppError> {
    let all = with(pool, |conn| notes::table.order(notes::id).select(notes::text).load::<String>(conn));
    Ok(all.await?.join("\n"))
}

async fn add(State(pool): State<Pool>, text: String) -> Result<(), AppError> {
    let insert = diesel::insert_into(notes::table).values(notes::text.eq(text));
    with(pool, |conn| insert.execute(conn)).await.map(drop)
}

/// A GET that writes.
async fn visit(State(pool): State<Pool>) -> Result<String, AppError> {
    let next =
        diesel::update(visits::table).set(visits::count.eq(visits::count + 1)).returning(visits::count);
    let count: i64 = with(pool, |conn| conn.immediate_transaction(|conn| next.get_result(conn))).await?;
    Ok(count.to_string())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let path = std::env::var("DATABASE").map_err(|_| "DATABASE: say the path of the database")?;
    let pool = Pool::new(ConnectionManager::new(path))?;
    pool.get()?.batch_execute("PRAGMA journal_mode = WAL")?;
    pool.get()?.run_pending_migrations(MIGRATIONS)?;

    let app = Router::new().route("/", get(list).post(add)).route("/visit", get(visit));
    let app = app.with_state(pool);

    let address = std::env::args().nth(1).ok_or("say where to listen, such as 127.0.0.1:8081")?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        terminate.recv().await;
    });
    server.await?;
    Ok(())
}
