//! Notes on each instance, of which one writes.

use axum::{Router, extract::State, routing::get};
use replite::{Config, Db, Error};
use tokio::signal::unix::{SignalKind, signal};

async fn list(State(db): State<Db>) -> Result<String, Error> {
    let notes: Vec<String> = db.query("SELECT text FROM notes", [], |row| row.get(0))?;
    Ok(notes.join("\n") + "\n")
}

async fn add(State(db): State<Db>, text: String) -> Result<(), Error> {
    db.execute("INSERT INTO notes VALUES (?1)", [text]).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let schema = "CREATE TABLE IF NOT EXISTS notes (text TEXT)";
    let config = Config::from_env("REPLITE_")?.migrate(move |conn| conn.execute_batch(schema));
    let db = Db::open(config).await?; // a plain SQLite file, on each instance

    // What writes goes to the primary, in TLS. Clients read their own writes.
    let app = Router::new().route("/", get(list).post(add)).with_state(db.clone()).layer(db.replay_layer());
    db.serve_forwarded(app.clone())?;

    let address = std::env::args().nth(1).ok_or("say where to listen, such as 127.0.0.1:8081")?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let (ends, mut terminate) = (db.clone(), signal(SignalKind::terminate())?);
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        ends.drain().await; // the primary hands over
    });
    server.await?;
    db.shutdown().await;
    Ok(())
}
