//! One statement, or some, without a word about types; and the paths that a database may have.

use std::path::PathBuf;

use crate::support::*;
use replite::rusqlite::Error as SqlError;
use replite::{Config, Db, Error, Unsupported};

async fn open(dir: &tempfile::TempDir) -> Db {
    let schema = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)";
    Db::open(Config::new(dir.path().join("app.db")).migrate(move |c| c.execute_batch(schema))).await.unwrap()
}

fn notes(db: &Db) -> Vec<(i64, String)> {
    db.query("SELECT id, text FROM notes ORDER BY id", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
}

#[tokio::test]
async fn one_statement_writes_and_says_how_many_rows_it_changed() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let text = String::from("moved");
    let first = db.execute("INSERT INTO notes VALUES (1, 'a'), (2, 'b')", []).await.unwrap();
    assert_eq!(first.value, 2);
    let second = db.execute("INSERT INTO notes VALUES (?1, ?2)", (3, text)).await.unwrap();
    assert!(second.txid.unwrap() > first.txid.unwrap());
    let sql = format!("UPDATE notes SET text = ?1 WHERE id {} 2", ">=");
    assert_eq!(db.execute(&sql, ["c"]).await.unwrap().value, 2);
    let nothing = db.execute("DELETE FROM notes WHERE id = ?1", [9]).await.unwrap();
    assert_eq!((nothing.value, nothing.txid), (0, None));
    assert_eq!(notes(&db), [(1, "a".into()), (2, "c".into()), (3, "c".into())]);
    // What is in the text is one statement, and all of its parameters are given.
    for (sql, what) in [
        ("DELETE FROM notes; DELETE FROM notes", "Multiple"),
        ("INSERT INTO notes VALUES (7, 'x') RETURNING id", "returned results"),
        ("DELETE FROM notes WHERE id = ?1", "parameters"),
        ("DELETE FROM nowhere", "no such table"),
    ] {
        let error = db.execute(sql, []).await.unwrap_err();
        assert!(matches!(&error, Error::Sqlite(_)), "{sql}: {error:?}");
        assert!(error.to_string().contains(what), "{sql}: {error}");
    }
    assert_eq!(notes(&db).len(), 3);
    db.shutdown().await;
}

#[tokio::test]
async fn several_statements_have_the_errors_of_rusqlite_and_nothing_of_a_failed_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    let commit = db
        .transaction(|tx| {
            tx.execute("INSERT INTO notes VALUES (5, 'a')", [])?;
            Ok(tx.last_insert_rowid())
        })
        .await
        .unwrap();
    assert_eq!(commit.value, 5);
    let failed = db.transaction(|tx| {
        tx.execute("DELETE FROM notes", [])?;
        tx.execute("INSERT INTO nowhere VALUES (1)", [])
    });
    assert!(matches!(failed.await, Err(Error::Sqlite(_))));
    let refused = db.transaction(|_| Err::<(), _>(SqlError::QueryReturnedNoRows));
    assert!(matches!(refused.await, Err(Error::Sqlite(SqlError::QueryReturnedNoRows))));
    assert_eq!(notes(&db), [(5, "a".into())]);
    db.shutdown().await;
}

#[tokio::test]
async fn queries_read_here_and_never_write() {
    let dir = tempfile::tempdir().unwrap();
    let db = open(&dir).await;
    db.execute("INSERT INTO notes VALUES (1, 'a')", []).await.unwrap();
    let text: String = db.query_row("SELECT text FROM notes WHERE id = ?1", [1], |row| row.get(0)).unwrap();
    assert_eq!(text, "a");
    let missing = db.query_row("SELECT text FROM notes WHERE id = 2", [], |row| row.get::<_, String>(0));
    assert!(matches!(missing, Err(Error::Sqlite(SqlError::QueryReturnedNoRows))), "{missing:?}");
    let borrowed = String::from("a");
    let found: Vec<i64> =
        db.query("SELECT id FROM notes WHERE text = ?1", [&borrowed], |row| row.get(0)).unwrap();
    assert_eq!(found, [1]);
    let wrote = db.query("DELETE FROM notes RETURNING id", [], |row| row.get::<_, i64>(0));
    assert!(matches!(wrote, Err(Error::Sqlite(_))), "{wrote:?}");
    assert_eq!(notes(&db).len(), 1);
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_reads_and_says_where_writes_go() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let r = Db::open(replica(&dir.path().join("r.db"), &p.node().addresses.replication)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    let commit = p.execute("CREATE TABLE more (a)", []).await.unwrap();
    r.wait_for_timeout(commit.txid.unwrap(), LIMIT).await.unwrap();
    let rows: i64 = r.query_row("SELECT count(*) FROM more", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
    let refused = r.execute("INSERT INTO more VALUES (1)", []).await;
    assert!(matches!(refused, Err(Error::NotPrimary { .. })), "{refused:?}");
    r.shutdown().await;
    p.shutdown().await;
}

#[tokio::test]
async fn a_database_is_at_the_path_that_its_url_says_in_directories_that_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    for (url, file) in [
        (format!("sqlite://{at}/var/one/app.db?mode=rwc"), "var/one/app.db"),
        (format!("file:{at}/var/two/app.db"), "var/two/app.db"),
        (format!("{at}/three/app.db"), "three/app.db"),
    ] {
        let db =
            Db::open(Config::new(&url).secret_file(dir.path().join(file).with_file_name("secret"))).await;
        let db = db.unwrap_or_else(|error| panic!("{url}: {error}"));
        let expected = dir.path().canonicalize().unwrap().join(file);
        assert_eq!(db.path(), expected);
        assert!(expected.is_file() && expected.with_file_name("secret").is_file());
        db.shutdown().await;
    }
    let before = std::fs::read_dir(dir.path()).unwrap().count();
    let refused = Db::open(Config::new(PathBuf::from(format!("sqlite://{at}/four/app.db?mode=ro")))).await;
    assert!(matches!(refused, Err(Error::Unsupported { reason: Unsupported::Url(_), .. })), "{refused:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before, "nothing was made");
}
