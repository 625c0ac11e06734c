//! What the connections of a node let SQL do, and its schema.

use std::path::Path;

use replite::rusqlite::functions::FunctionFlags;
use replite::rusqlite::{Connection, Error as SqliteError};
use replite::{Config, Db, Error};

/// A search index that triggers keep, as many applications have it.
const SEARCH: &str = "
    CREATE TABLE IF NOT EXISTS notes(id INTEGER PRIMARY KEY, text, tags);
    CREATE VIRTUAL TABLE IF NOT EXISTS search USING fts5(text, content = notes, content_rowid = id);
    CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON notes BEGIN
        INSERT INTO search(rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON notes BEGIN
        INSERT INTO search(search, rowid, text) VALUES ('delete', old.id, old.text);
    END;
    CREATE VIEW IF NOT EXISTS found AS
        SELECT notes.*, json_extract(tags, '$[0]') AS tag, search.text AS words
        FROM search JOIN notes ON notes.id = search.rowid;
    CREATE VIEW IF NOT EXISTS matched AS SELECT rowid FROM search WHERE search MATCH 'replica';
    PRAGMA user_version = 3";

fn functions(connection: &Connection) -> Result<(), SqliteError> {
    let pure = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_DETERMINISTIC;
    connection.create_scalar_function("plain", 1, pure, |c| c.get::<i64>(0))?;
    connection
        .create_scalar_function("harmless", 1, pure | FunctionFlags::SQLITE_INNOCUOUS, |c| c.get::<i64>(0))
}

fn config(path: &Path) -> Config {
    Config::new(path)
        .on_connect(|connection, _| functions(connection))
        .migrate(|connection| connection.execute_batch(SEARCH))
}

async fn run(db: &Db, sql: &'static str) -> Result<(), Error> {
    db.write(move |tx| Ok(tx.execute_batch(sql)?)).await.map(drop)
}

fn ask(db: &Db, sql: &str) -> Result<i64, Error> {
    db.read(|connection| Ok(connection.query_row(sql, [], |row| row.get(0))?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sql_changes_no_schema_behind_sqlites_back_and_the_schema_calls_nothing_that_is_not_innocuous() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.db");
    for trust in [false, true] {
        let db = Db::open(config(&path).trust_schema(trust)).await.unwrap();
        run(
            &db,
            "DELETE FROM notes; INSERT INTO notes(text, tags) VALUES ('a replica', '[7]'), ('else', '[]')",
        )
        .await
        .unwrap();
        // Search indexes, their triggers and views work either way.
        assert_eq!(ask(&db, "SELECT tag FROM found WHERE words LIKE 'a %'").unwrap(), 7);
        let search =
            "SELECT count(*) FROM search JOIN notes ON notes.id = search.rowid WHERE search MATCH 'replica'";
        assert_eq!(ask(&db, search).unwrap(), 1);
        // But a view that searches.
        let matched = ask(&db, "SELECT count(*) FROM matched");
        assert_eq!(matched.is_ok(), trust, "{matched:?}");
        run(&db, "INSERT INTO search(search) VALUES ('integrity-check'); INSERT INTO search(search) VALUES ('optimize')").await.unwrap();
        // The application may call its functions as before.
        assert_eq!(ask(&db, "SELECT plain(4)").unwrap(), 4);
        run(&db, "DROP VIEW IF EXISTS one; CREATE VIEW one AS SELECT harmless(1)").await.unwrap();
        run(&db, "DROP VIEW IF EXISTS two; CREATE VIEW two AS SELECT plain(2)").await.unwrap();
        assert_eq!(ask(&db, "SELECT * FROM one").unwrap(), 1);
        let two = ask(&db, "SELECT * FROM two");
        assert_eq!(two.is_ok(), trust, "{two:?}");
        assert!(trust || two.unwrap_err().to_string().contains("unsafe use of plain()"));
        let shadow = run(&db, "UPDATE search_data SET block = block").await;
        assert_eq!(shadow.is_ok(), trust, "{shadow:?}");
        // Whatever becomes of the row, it is not to stay.
        let schema = db.write(|tx| -> Result<(), Error> {
            tx.execute_batch(
                "PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = sql WHERE name = 'one'",
            )?;
            Err(Error::Config("rolled back".into()))
        });
        let schema = schema.await.unwrap_err();
        assert_eq!(matches!(schema, Error::Config(_)), trust, "{schema:?}");
        let blocking = db.clone();
        let vacuum = move || {
            blocking.writer()?.execute_batch("VACUUM; PRAGMA user_version = 4; REINDEX").map_err(Error::from)
        };
        tokio::task::spawn_blocking(vacuum).await.unwrap().unwrap();
        assert!(db.verify().await.unwrap().holds());
        db.shutdown().await;
    }
}
