//! A pool in the process of its node.

use std::fs;
use std::path::Path;
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::Error as DieselError;
use diesel::sql_query;
use diesel::sql_types::Integer;
use diesel_migrations::FileBasedMigrations;
use diesel_migrations::MigrationHarness;
use replite::{Config, Db, Durability, Error, lease};
use replite_diesel::{Pool, needs_primary};

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = Integer)]
    number: i32,
}

#[derive(QueryableByName)]
struct Checkpoints {
    #[diesel(sql_type = Integer)]
    wal_autocheckpoint: i32,
}

fn config(path: &Path) -> Config {
    Config::new(path.join("app.db")).migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t (a)"))
}

fn insert(pool: &Pool) -> QueryResult<()> {
    sql_query("INSERT INTO t VALUES (1)").execute(&mut *pool.get().unwrap()).map(drop)
}

fn number(pool: &Pool, query: &str) -> i32 {
    sql_query(query).get_result::<Number>(&mut *pool.get().unwrap()).unwrap().number
}

fn secret() -> replite::Secret {
    replite::Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap()
}

#[tokio::test]
async fn a_pool_of_a_replica_refuses_writes_at_once_and_takes_them_once_it_is_the_primary() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let pool = replite_diesel::pool(&db).await.unwrap();
    insert(&pool).unwrap();

    db.demote("http://127.0.0.1:1").await.unwrap();
    let refused = insert(&pool).unwrap_err();
    assert!(needs_primary(&refused), "{refused}");
    let write = |conn: &mut SqliteConnection| sql_query("INSERT INTO t VALUES (1)").execute(conn);
    let begun = pool.get().unwrap().immediate_transaction(write).unwrap_err();
    assert!(needs_primary(&begun), "{begun}");
    let later = pool.get().unwrap().transaction(|conn| sql_query("DELETE FROM t").execute(conn)).unwrap_err();
    assert!(needs_primary(&later), "{later}");
    assert!(needs_primary(&Error::NotPrimary { primary: None }));
    assert!(!needs_primary(&DieselError::NotFound));
    assert_eq!(number(&pool, "SELECT count(*) AS number FROM t"), 1);

    db.promote().await.unwrap();
    insert(&pool).unwrap();
    db.shutdown().await;
    assert!(needs_primary(&insert(&pool).unwrap_err()), "a pool outlives its node, and writes");
}

#[tokio::test]
async fn errors_that_no_other_node_would_spare_are_not_taken_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let pool = replite_diesel::pool(&db).await.unwrap();
    let missing = sql_query("INSERT INTO missing VALUES (1)").execute(&mut *pool.get().unwrap()).unwrap_err();
    assert!(!needs_primary(&missing), "{missing}");
    let busy = pool.get().unwrap().immediate_transaction(|_| {
        let other = &mut *pool.get().unwrap();
        sql_query("PRAGMA busy_timeout = 0").execute(other)?;
        sql_query("INSERT INTO t VALUES (1)").execute(other)
    });
    let busy = busy.unwrap_err();
    assert!(busy.to_string().contains("locked") && !needs_primary(&busy), "{busy}");
}

#[tokio::test]
async fn connections_are_as_the_durability_needs_them_and_leave_checkpoints_to_the_node() {
    for (durability, synchronous) in [(Durability::Synced, 2), (Durability::Unsynced, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(config(dir.path()).durability(durability)).await.unwrap();
        let pool = replite_diesel::pool(&db).await.unwrap();
        let of = |name: &str| number(&pool, &format!("SELECT {name} AS number FROM pragma_{name}"));
        assert_eq!(of("synchronous"), synchronous);
        let timeout = "SELECT timeout AS number FROM pragma_busy_timeout";
        assert_eq!(number(&pool, timeout), 5000);
        let sql = sql_query("PRAGMA wal_autocheckpoint");
        let limit: Checkpoints = sql.get_result(&mut *pool.get().unwrap()).unwrap();
        assert_eq!(limit.wal_autocheckpoint, 0);
    }
}

#[tokio::test]
async fn a_pool_of_a_node_without_a_state_waits() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = lease::Fixed::replica_of("replite://127.0.0.1:1");
    let db = Db::open(config(dir.path()).lease(nobody).secret(secret())).await.unwrap();
    let mut waits = Box::pin(replite_diesel::pool(&db));
    let looked = tokio::time::timeout(Duration::from_millis(300), &mut waits).await;
    assert!(looked.is_err(), "there is nothing to read");
    db.shutdown().await;
    let error = waits.await.unwrap_err();
    assert!(matches!(error, replite_diesel::Error::Database(Error::ShutDown)), "{error:?}");
}

#[tokio::test]
async fn a_connection_to_a_file_that_is_gone_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd 50%?#.db");
    let db = Db::open(Config::new(&path).database("odd")).await.unwrap();
    let manager = replite_diesel::Manager::new(&db).await.unwrap();
    diesel::r2d2::ManageConnection::connect(&manager).unwrap();
    db.shutdown().await;
    fs::rename(&path, dir.path().join("elsewhere")).unwrap();
    assert!(diesel::r2d2::ManageConnection::connect(&manager).is_err());
    assert!(!path.exists());
}

fn source(dir: &Path, all: &[(&str, &str)]) -> FileBasedMigrations {
    let dir = dir.join("migrations");
    for (name, up) in all {
        fs::create_dir_all(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("up.sql"), up).unwrap();
        fs::write(dir.join(name).join("down.sql"), "SELECT 1").unwrap();
    }
    FileBasedMigrations::from_path(dir).unwrap()
}

async fn open_migrated(dir: &Path, source: FileBasedMigrations) -> Result<Db, Error> {
    Db::open(Config::new(dir.join("app.db")).migrate(replite_diesel::migrations(source))).await
}

fn versions(db: &Db) -> Vec<String> {
    let sql = "SELECT version FROM __diesel_schema_migrations ORDER BY version";
    db.query(sql, [], |row| row.get(0)).unwrap()
}

const FIRST: (&str, &str) = ("1_t", "CREATE TABLE t (a); INSERT INTO t VALUES (1);");

#[tokio::test]
async fn migrations_run_once_and_go_on_where_diesel_left_them() {
    let dir = tempfile::tempdir().unwrap();
    // An application that was there before replite.
    let mut alone = SqliteConnection::establish(dir.path().join("app.db").to_str().unwrap()).unwrap();
    alone.run_pending_migrations(source(dir.path(), &[FIRST])).unwrap();
    drop(alone);

    let db = open_migrated(dir.path(), source(dir.path(), &[FIRST])).await.unwrap();
    assert_eq!(versions(&db), ["1"]);
    db.shutdown().await;
    let both = source(dir.path(), &[FIRST, ("2_u", "CREATE TABLE u (b);")]);
    let db = open_migrated(dir.path(), both).await.unwrap();
    assert_eq!(versions(&db), ["1", "2"]);
    // What was migrated had its place in history before `open` returned.
    assert_eq!(db.position().unwrap().txid(), db.captured().await.unwrap());
    let rows: i64 = db.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 1);
    db.shutdown().await;

    // The build before it can lead again.
    fs::remove_dir_all(dir.path().join("migrations/2_u")).unwrap();
    let db = open_migrated(dir.path(), source(dir.path(), &[FIRST])).await.unwrap();
    assert_eq!(versions(&db), ["1", "2"]);
}

#[tokio::test]
async fn a_migration_that_fails_is_why_the_database_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let broken = source(dir.path(), &[FIRST, ("2_u", "CREATE TABEL u (b);")]);
    let error = open_migrated(dir.path(), broken).await.unwrap_err();
    assert!(matches!(&error, Error::Migration(_)), "{error}");
    assert!(format!("{error:?}").contains("TABEL"), "{error:?}");
    let mended = source(dir.path(), &[FIRST, ("2_u", "CREATE TABLE u (b);")]);
    let db = open_migrated(dir.path(), mended).await.unwrap();
    assert_eq!(versions(&db), ["1", "2"]);
}
