//! A pool in the process of its node.

use std::fs;
use std::path::Path;

use replite::{Config, Db, Durability, Error, lease};
use replite_sqlx::{connect_options, needs_primary};
use sqlx::ConnectOptions;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqlitePool, SqlitePoolOptions};

fn config(path: &Path) -> Config {
    Config::new(path.join("app.db")).migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t (a)"))
}

async fn insert(pool: &SqlitePool) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO t VALUES (1)").execute(pool).await.map(drop)
}

async fn pragma(pool: &SqlitePool, name: &'static str) -> i64 {
    sqlx::query_scalar(name).fetch_one(pool).await.unwrap()
}

#[derive(thiserror::Error, Debug)]
#[error(transparent)]
struct Transparent(sqlx::Error);

fn secret() -> replite::Secret {
    replite::Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap()
}

#[tokio::test]
async fn a_pool_of_a_replica_refuses_writes_at_once_and_takes_them_once_it_is_the_primary() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let pool = replite_sqlx::pool(&db).await.unwrap();
    insert(&pool).await.unwrap();

    db.demote("http://127.0.0.1:1").await.unwrap();
    let refused = insert(&pool).await.unwrap_err();
    assert!(needs_primary(&refused), "{refused}");
    let begun = pool.begin_with("BEGIN IMMEDIATE").await.unwrap_err();
    assert!(needs_primary(&begun), "{begun}");
    assert!(needs_primary(&Error::NotPrimary { primary: None }));
    // In errors of an application's own.
    assert!(needs_primary(&Transparent(insert(&pool).await.unwrap_err())));
    assert!(needs_primary(&std::io::Error::other(insert(&pool).await.unwrap_err())));
    assert!(!needs_primary(&Transparent(sqlx::Error::RowNotFound)));
    let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM t").fetch_one(&pool).await.unwrap();
    assert_eq!(rows, 1);

    db.promote().await.unwrap();
    insert(&pool).await.unwrap();
    db.shutdown().await;
    assert!(needs_primary(&insert(&pool).await.unwrap_err()), "a pool outlives its node, and writes");
}

#[tokio::test]
async fn errors_that_no_other_node_would_spare_are_not_taken_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let connect = connect_options(&db).busy_timeout(std::time::Duration::ZERO);
    let pool = replite_sqlx::pool_with(&db, SqlitePoolOptions::new(), connect).await.unwrap();
    let tx = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    let busy = insert(&pool).await.unwrap_err();
    assert!(busy.to_string().contains("locked") && !needs_primary(&busy), "{busy}");
    tx.rollback().await.unwrap();
    let missing = sqlx::query("INSERT INTO missing VALUES (1)").execute(&pool).await.unwrap_err();
    assert!(!needs_primary(&missing), "{missing}");
}

#[cfg(feature = "sea-orm")]
#[tokio::test]
async fn sea_orm_s_errors_are_known() {
    use sea_orm::{ConnectionTrait, SqlxSqliteConnector, TransactionTrait};

    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let orm = SqlxSqliteConnector::from_sqlx_sqlite_pool(replite_sqlx::pool(&db).await.unwrap());
    orm.execute_unprepared("INSERT INTO t VALUES (1)").await.unwrap();
    db.demote("http://127.0.0.1:1").await.unwrap();
    let refused = orm.execute_unprepared("INSERT INTO t VALUES (1)").await.unwrap_err();
    assert!(needs_primary(&refused), "{refused}");
    let inside = orm.transaction(|tx| Box::pin(async move { tx.execute_unprepared("DELETE FROM t").await }));
    let refused = inside.await.unwrap_err();
    assert!(needs_primary(&refused), "{refused}");
    let missing = orm.execute_unprepared("SELECT * FROM missing").await.unwrap_err();
    assert!(!needs_primary(&missing), "{missing}");
}

#[tokio::test]
async fn connections_are_as_the_durability_needs_them_and_leave_checkpoints_to_the_node() {
    for (durability, synchronous) in [(Durability::Synced, 2), (Durability::Unsynced, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(config(dir.path()).durability(durability)).await.unwrap();
        let pool = replite_sqlx::pool(&db).await.unwrap();
        assert_eq!(pragma(&pool, "PRAGMA synchronous").await, synchronous);
        assert_eq!(pragma(&pool, "PRAGMA wal_autocheckpoint").await, 0);
    }
}

#[tokio::test]
async fn a_pool_of_a_node_without_a_state_waits() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = lease::Fixed::replica_of("replite://127.0.0.1:1");
    let db = Db::open(config(dir.path()).lease(nobody).secret(secret())).await.unwrap();
    let mut waits = Box::pin(replite_sqlx::pool(&db));
    let looked = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waits).await;
    assert!(looked.is_err(), "there is nothing to read");
    db.shutdown().await;
    let error = waits.await.unwrap_err();
    assert!(matches!(error, replite_sqlx::Error::Database(Error::ShutDown)), "{error:?}");
}

#[tokio::test]
async fn a_connection_to_a_file_that_is_gone_makes_none() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(dir.path())).await.unwrap();
    let options = connect_options(&db);
    options.connect().await.unwrap();
    db.shutdown().await;
    fs::rename(db.path(), dir.path().join("elsewhere")).unwrap();
    assert!(options.connect().await.is_err());
    assert!(!db.path().exists());
    assert!(replite_sqlx::pool(&db).await.is_err());
}

async fn migrator(dir: &Path, files: &[(&str, &str)]) -> Migrator {
    let dir = dir.join("migrations");
    fs::create_dir_all(&dir).unwrap();
    files.iter().for_each(|(name, sql)| fs::write(dir.join(name), sql).unwrap());
    Migrator::new(&*dir).await.unwrap()
}

async fn open_migrated(dir: &Path, migrator: Migrator) -> Result<Db, Error> {
    Db::open(Config::new(dir.join("app.db")).migrate(replite_sqlx::migrations(migrator))).await
}

fn versions(db: &Db) -> Vec<i64> {
    db.query("SELECT version FROM _sqlx_migrations WHERE success ORDER BY version", [], |row| row.get(0))
        .unwrap()
}

const FIRST: (&str, &str) = ("1_t.sql", "CREATE TABLE t (a); INSERT INTO t VALUES (1)");

#[tokio::test]
async fn migrations_run_once_and_go_on_where_sqlx_left_them() {
    let dir = tempfile::tempdir().unwrap();
    // An application that was there before replite.
    let alone = format!("sqlite://{}?mode=rwc", dir.path().join("app.db").display());
    let pool = SqlitePool::connect(&alone).await.unwrap();
    migrator(dir.path(), &[FIRST]).await.run(&pool).await.unwrap();
    pool.close().await;

    let db = open_migrated(dir.path(), migrator(dir.path(), &[FIRST]).await).await.unwrap();
    assert_eq!(versions(&db), [1]);
    db.shutdown().await;
    let both = migrator(dir.path(), &[FIRST, ("2_u.sql", "CREATE TABLE u (b)")]).await;
    let db = open_migrated(dir.path(), both).await.unwrap();
    assert_eq!(versions(&db), [1, 2]);
    // What was migrated had its place in history before `open` returned.
    assert_eq!(db.position().unwrap().txid(), db.captured().await.unwrap());
    let rows: i64 = db.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 1);
    db.shutdown().await;

    // The build before it can lead again. Its own migrations are where they were.
    fs::remove_file(dir.path().join("migrations/2_u.sql")).unwrap();
    let db = open_migrated(dir.path(), migrator(dir.path(), &[FIRST]).await).await.unwrap();
    assert_eq!(versions(&db), [1, 2]);
}

#[tokio::test]
async fn a_migration_that_fails_is_why_the_database_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let broken = migrator(dir.path(), &[FIRST, ("2_u.sql", "CREATE TABEL u (b)")]).await;
    let error = open_migrated(dir.path(), broken).await.unwrap_err();
    assert!(matches!(&error, Error::Migration(_)), "{error}");
    assert!(format!("{error:?}").contains("TABEL"), "{error:?}");
    let mended = migrator(dir.path(), &[FIRST, ("2_u.sql", "CREATE TABLE u (b)")]).await;
    let db = open_migrated(dir.path(), mended).await.unwrap();
    assert_eq!(versions(&db), [1, 2]);
}
