//! A database whose position is unknown: whether it may become history.

use rusqlite::Connection;

use crate::checksum::PageHash;
use crate::engine::anchor::{FileState, Witness, Witnesses};
use crate::engine::base::lock;
use crate::engine::open::Opened;
use crate::error::{Error, Result};

/// Why a database is damaged whose newest anchor says that the file alone is no state, and whose WAL is not there any more.
const WAL_GONE: &str =
    "its WAL is gone, whose frames were being copied into it, so that the file alone is no committed state";
/// What an operator can do about that.
const CURE: &str = "restore it from a copy that a replica makes (`Db::snapshot_to`) or from a backup, with its directory of side \
    files moved away; or open it with `Config::accept_damaged`, which may lose commits and mix states, and replaces what the replicas have";

impl Opened {
    /// Whether the file, whose position is unknown, may hold pages of several states, and why: then it is none, and must not be read.
    /// Asked before an anchor is written.
    pub(super) fn damage(&mut self) -> Option<&'static str> {
        let tip = self.base.tip();
        let newest = lock(&self.base.anchors).newest_first().first().copied()?;
        let FileState::Backfilling(witnesses) = newest.file else { return None };
        if newest.salts == tip.salts && newest.frame <= tip.frame {
            return None;
        }
        let lacking = self.lacks_any(&witnesses).unwrap_or_else(|error| {
            tracing::warn!(%error, "the file can't tell whether the WAL was copied back in full");
            true
        });
        if lacking {
            return Some(WAL_GONE);
        }
        tracing::warn!(path = %self.base.path().display(), "the WAL that was being copied back is gone, and nothing of it is known to be missing: somebody else has copied it on");
        None
    }

    /// Whether the file itself, whatever a newer WAL says, still has an image that the WAL would have replaced.
    fn lacks_any(&mut self, witnesses: &Witnesses) -> Result<bool> {
        let mut page = vec![0; self.base.page_size.bytes()];
        let size = self.handle.size()?;
        for witness in witnesses.iter() {
            let end = witness.page().offset(self.base.page_size) + u64::from(self.base.page_size.get());
            // The database has become smaller since; where it never grew, its first page tells.
            if end > size || witness.page().get() > self.base.tip().pages {
                continue;
            }
            self.handle.read(&mut page, witness.page().offset(self.base.page_size))?;
            if Witness::new(witness.page(), PageHash::of(witness.page(), &page)) == witness {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Lets a state that somebody else made become history of a primary, if SQLite finds it whole.
    pub(super) fn admit(&mut self) -> Result<()> {
        let why = self.damage();
        let path = self.base.path();
        let damaged = |what| Error::Damaged { path: path.clone(), what };
        if let Some(why) = why {
            if !self.base.options.accept_damaged {
                return Err(damaged(format!("{why}; {CURE}")));
            }
            tracing::error!(path = %path.display(), why, "the configuration accepts this state; commits may be lost");
        }
        tracing::info!(path = %path.display(), "the position is unknown; `PRAGMA integrity_check` runs before the state becomes history");
        match integrity(self.handle.connection()) {
            Ok(None) => Ok(()),
            Ok(Some(what)) => Err(damaged(format!(
                "its position is unknown, and `PRAGMA integrity_check` says: {what}; restore it from a replica or a backup"
            ))),
            Err(error) => {
                // The schema may need functions, collations or modules that only the application's connections have.
                tracing::warn!(%error, "the state becomes history without `PRAGMA integrity_check`, which could not run");
                Ok(())
            }
        }
    }
}

/// What SQLite finds wrong with the database.
fn integrity(connection: &Connection) -> Result<Option<String>, rusqlite::Error> {
    // Rows that break a CHECK are the application's affair, and its functions are not there.
    connection.pragma_update(None, "ignore_check_constraints", true)?;
    let found = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get::<_, String>(0));
    connection.pragma_update(None, "ignore_check_constraints", false)?;
    match found {
        Ok(text) if text == "ok" => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(error) if corrupt(&error) => Ok(Some(error.to_string())),
        Err(error) => Err(error),
    }
}

fn corrupt(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::Ordering;

    use crate::engine::Engine;
    use crate::engine::checkpoint::copy;
    use crate::engine::tests::{Home, node, settled};
    use crate::txid::Position;

    use super::*;

    fn run(home: &Home, sql: &str) {
        Connection::open(home.path("p.db")).unwrap().execute_batch(sql).unwrap();
    }

    fn ask(home: &Home, sql: &str) -> i64 {
        Connection::open(home.path("p.db")).unwrap().query_row(sql, [], |r| r.get(0)).unwrap()
    }

    fn open(home: &Home) -> Result<Engine> {
        let mut options = home.options("p.db");
        // Nothing is copied unless we do it.
        options.wal_limit_bytes = 64 << 20;
        Engine::open(options, node())
    }

    const UPDATE: &str = "UPDATE t SET a = 'behind'";
    const GROW: &str = "INSERT INTO t SELECT 'behind', randomblob(3000) FROM t";

    /// A database of 200 rows that is opened, and changed by a connection that leaves the WAL where it is when it closes.
    fn changed(home: &Home, sql: &str) -> (Engine, Connection) {
        run(
            home,
            "PRAGMA journal_mode = WAL; CREATE TABLE t(a, b);
             WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n LIMIT 200)
             INSERT INTO t SELECT 'before', randomblob(3000) FROM n",
        );
        let engine = open(home).unwrap();
        let stay = Connection::open(home.path("p.db")).unwrap();
        stay.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).unwrap();
        stay.execute_batch(sql).unwrap();
        settled(&engine);
        (engine, stay)
    }

    /// A node that is closed, orderly, when a part of its last transaction is copied into the file.
    fn half_copied(home: &Home, sql: &str) -> Position {
        let (engine, _stay) = changed(home, sql);
        let copying = lock(&engine.base.backfill);
        engine.base.stop.store(true, Ordering::Release);
        let ended = copy(&engine.base, &mut lock(&engine.second), &engine.base.tip(), 0);
        assert!(matches!(ended, Err(Error::ShutDown)), "{ended:?}");
        drop(copying);
        engine.close();
        engine.base.tip().position
    }

    #[test]
    fn a_wal_that_is_deleted_when_a_part_of_it_was_copied_leaves_damage() {
        let update = "UPDATE t SET b = randomblob(3000) WHERE rowid > 180";
        for (sql, after) in [
            (UPDATE, "SELECT 1"),
            // What was written last is written over, and more comes behind it.
            (UPDATE, update),
            (UPDATE, "INSERT INTO t SELECT 'foreign', randomblob(3000) FROM t LIMIT 50"),
            // The first page says that there are more pages than there are.
            (GROW, "SELECT 1"),
        ] {
            let home = Home::new();
            half_copied(&home, sql);
            for end in ["p.db-wal", "p.db-shm"] {
                fs::remove_file(home.path(end)).unwrap();
            }
            let connection = Connection::open(home.path("p.db")).unwrap();
            if sql == UPDATE {
                // SQLite sees nothing of it.
                assert_eq!(integrity(&connection).unwrap(), None);
                let mixed = "SELECT count(DISTINCT a) FROM t";
                assert_eq!(connection.query_row(mixed, [], |r| r.get::<_, i64>(0)).unwrap(), 2);
                connection.execute_batch(after).unwrap();
            }
            drop(connection);
            let refused = open(&home).map(|_| ());
            let why = if sql == UPDATE { "WAL is gone" } else { "malformed" };
            let told = matches!(&refused, Err(Error::Damaged { what, .. }) if what.contains(why));
            assert!(told, "{sql}; {after}: {refused:?}");
        }
    }

    #[test]
    fn a_wal_that_somebody_else_copied_on_and_deleted_leaves_none() {
        for (sql, after, rows, changed) in [
            (UPDATE, "SELECT count(*) FROM t", 200, false),
            (UPDATE, "INSERT INTO t VALUES ('foreign', 1)", 201, true),
            (UPDATE, "UPDATE t SET b = randomblob(3000)", 200, true),
            (UPDATE, "DELETE FROM t WHERE rowid > 20; VACUUM", 20, true),
            (GROW, "SELECT count(*) FROM t", 400, false),
            (GROW, "INSERT INTO t VALUES ('foreign', 1)", 401, true),
            (GROW, "DELETE FROM t WHERE rowid > 20; VACUUM", 20, true),
        ] {
            let home = Home::new();
            let before = half_copied(&home, sql);
            // The last to close.
            run(&home, after);
            assert!(!home.path("p.db-wal").exists(), "{sql}; {after}");
            let engine = open(&home).unwrap_or_else(|error| panic!("{sql}; {after}: {error}"));
            let position = settled(&engine);
            assert_eq!(position.number(), before.number() + u64::from(changed), "{sql}; {after}");
            assert_eq!(position.checksum() != before.checksum(), changed, "{sql}; {after}");
            assert_eq!(ask(&home, "SELECT count(*) FROM t"), rows, "{sql}; {after}");
        }
    }

    #[test]
    fn a_commit_that_puts_the_images_of_the_file_back_is_missing_nowhere() {
        let home = Home::new();
        let (engine, stay) = changed(&home, UPDATE);
        // A copy that came to nothing.
        let tip = engine.base.tip();
        let file = FileState::Backfilling(engine.base.witnesses(&mut lock(&engine.second), 0, &tip).unwrap());
        engine.base.write_anchor(&tip, file, true).unwrap();
        stay.execute_batch("UPDATE t SET a = 'before'").unwrap();
        settled(&engine);
        engine.close();
        drop((engine, stay));
        run(&home, "INSERT INTO t VALUES ('foreign', 1)");
        assert!(!home.path("p.db-wal").exists());
        settled(&open(&home).unwrap());
    }
}
