//! One statement, or some, with the errors of `rusqlite`: what most of an application needs.

use rusqlite::{Connection, Params, Row, Transaction};

use crate::db::Db;
use crate::error::{Error, Result};
use crate::node::writer::Commit;

impl Db {
    /// Runs one statement that writes, in a transaction of its own, and gives how many rows it
    /// changed. It is a [`Db::write`] in all else: it is on the disk when the call returns, and
    /// only the primary does it.
    ///
    /// Several parameters are a tuple: `(1, text)`. They are moved to the writer's thread, so what
    /// they borrow is to live for ever; rusqlite's macro `params!` borrows all of them. Statements
    /// that return rows, such as `INSERT .. RETURNING`, are for [`Db::transaction`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let schema = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)";
    /// # let migrate = move |conn: &mut rusqlite::Connection| conn.execute_batch(schema);
    /// # let db = replite::Db::temporary(move |config| config.migrate(migrate)).await?;
    /// let commit = db.execute("INSERT INTO notes VALUES (?1, ?2)", (1, "hello")).await?;
    /// assert_eq!(commit.value, 1);
    ///
    /// let text: String = db.query_row("SELECT text FROM notes", [], |row| row.get(0))?;
    /// assert_eq!(text, "hello");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::write`]: with all but [`Error::OutcomeUnknown`] nothing was committed.
    /// [`Error::Sqlite`] says what SQLite has against the statement, and also when there are
    /// several in the text, or one that returns rows.
    ///
    /// # Cancel safety
    /// As for [`Db::write`].
    pub async fn execute(
        &self,
        sql: impl Into<String>,
        params: impl Params + Send + 'static,
    ) -> Result<Commit<usize>> {
        let sql = sql.into();
        self.transaction(move |tx| tx.prepare_cached(&sql)?.execute(params)).await
    }

    /// [`Db::write`] with a closure that has the errors of `rusqlite` and no other: nothing is to
    /// be said of its type, also where it ends with `Ok(..)`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let schema = "CREATE TABLE accounts (id INTEGER PRIMARY KEY, cents INTEGER)";
    /// # let migrate = move |conn: &mut rusqlite::Connection| conn.execute_batch(schema);
    /// # let db = replite::Db::temporary(move |config| config.migrate(migrate)).await?;
    /// let commit = db
    ///     .transaction(|tx| {
    ///         tx.execute("INSERT INTO accounts VALUES (1, 500), (2, 0)", [])?;
    ///         tx.execute("UPDATE accounts SET cents = cents - 100 WHERE id = 1", [])?;
    ///         tx.execute("UPDATE accounts SET cents = cents + 100 WHERE id = 2", [])?;
    ///         Ok(tx.last_insert_rowid())
    ///     })
    ///     .await?;
    /// assert_eq!(commit.value, 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::write`]; what `f` returned is [`Error::Sqlite`].
    ///
    /// # Cancel safety
    /// As for [`Db::write`].
    pub async fn transaction<T, F>(&self, f: F) -> Result<Commit<T>>
    where
        F: FnOnce(&mut Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
        T: Send + 'static,
    {
        self.write(move |tx| f(tx).map_err(Error::from)).await
    }

    /// One row of this node's state, read on the caller's thread like a [`Db::read`], which it is
    /// in all else.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let schema = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)";
    /// # let migrate = move |conn: &mut rusqlite::Connection| conn.execute_batch(schema);
    /// # let db = replite::Db::temporary(move |config| config.migrate(migrate)).await?;
    /// let notes: i64 = db.query_row("SELECT count(*) FROM notes", [], |row| row.get(0))?;
    /// assert_eq!(notes, 0);
    ///
    /// // One that may not be there.
    /// let of_id = "SELECT text FROM notes WHERE id = ?1";
    /// let text: Option<String> = db.query(of_id, [7], |row| row.get(0))?.pop();
    /// assert_eq!(text, None);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::read`]. [`Error::Sqlite`] says what SQLite has against the statement, or that
    /// there is no row ([`QueryReturnedNoRows`](rusqlite::Error::QueryReturnedNoRows)).
    pub fn query_row<T>(
        &self,
        sql: &str,
        params: impl Params,
        row: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        self.read(|conn: &Connection| Ok(conn.prepare_cached(sql)?.query_row(params, row)?))
    }

    /// All rows of a query over this node's state, read on the caller's thread like a
    /// [`Db::read`], which it is in all else. They are all in memory then: give the query a
    /// `LIMIT`, or read by [`Db::read_async`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), replite::Error> {
    /// # let schema = "CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT)";
    /// # let migrate = move |conn: &mut rusqlite::Connection| conn.execute_batch(schema);
    /// # let db = replite::Db::temporary(move |config| config.migrate(migrate)).await?;
    /// db.execute("INSERT INTO notes VALUES (1, 'a'), (2, 'b')", []).await?;
    /// let all = "SELECT id, text FROM notes ORDER BY id";
    /// let notes: Vec<(i64, String)> =
    ///     db.query(all, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
    /// assert_eq!(notes, [(1, "a".into()), (2, "b".into())]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As for [`Db::read`], and [`Error::Sqlite`] with what SQLite has against the statement.
    pub fn query<T>(
        &self,
        sql: &str,
        params: impl Params,
        row: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        self.read(|conn: &Connection| {
            let mut statement = conn.prepare_cached(sql)?;
            let rows = statement.query_map(params, row)?;
            Ok(rows.collect::<rusqlite::Result<Vec<T>>>()?)
        })
    }
}
