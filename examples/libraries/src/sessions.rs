//! The code of the page about other libraries.

use axum::Router;
use replite::rusqlite::{Connection, OpenFlags};
use replite::{Config, Db, Role};
use tower_sessions::SessionManagerLayer;
use tower_sessions_rusqlite_store::{RusqliteStore, tokio_rusqlite};

pub fn config(config: Config) -> Config {
    config.migrate(|conn| {
        conn.execute_batch(
            "CREATE TABLE IF NOT EXISTS tower_sessions \
             (id TEXT PRIMARY KEY NOT NULL, data BLOB NOT NULL, expiry_date INTEGER NOT NULL)",
        )
    })
}

/// Sessions of a node that can be read: after `db.ready().await`.
pub fn sessions(db: &Db) -> replite::rusqlite::Result<RusqliteStore> {
    // Without the flag that makes a file.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(db.path(), flags)?;
    connection.pragma_update(None, "wal_autocheckpoint", 0)?; // the node checkpoints
    connection.pragma_update(None, "query_only", db.role() != Role::Primary)?;
    let connection = tokio_rusqlite::Connection::from(connection);
    let (mut roles, followed) = (db.roles(), connection.clone());
    tokio::spawn(async move {
        loop {
            let refuses = roles.borrow_and_update().role != Role::Primary;
            let told = followed.call(move |conn| conn.pragma_update(None, "query_only", refuses));
            if told.await.is_err() || roles.changed().await.is_err() {
                break;
            }
        }
    });
    Ok(RusqliteStore::new(connection))
}

pub fn with_sessions(app: Router, store: RusqliteStore, db: &Db) -> Router {
    let replay = db.replay_layer().replay_when(|response| response.status == 500);
    app.layer(SessionManagerLayer::new(store)).layer(replay)
}
