//! A database whose WAL is gone while a node was copying frames into it: whether another process
//! has copied the rest.

use std::collections::HashMap;

use crate::checksum::PageHash;
use crate::engine::file::anchor::FileState;
use crate::engine::file::witnesses::{WitnessPage, Witnesses};
use crate::engine::recover::Findings;
use crate::engine::recover::judge::Doubt;
use crate::engine::recover::position::Wal;
use crate::error::Result;
use crate::lock::lock;
use crate::log::Lookup;
use crate::page::PageNo;
use crate::report::Condition;
use crate::wire::{PageChange, RecordPart};

/// Pages of the log that the check remembers, some hundred bytes each.
const PAGES_MAX: usize = 1 << 18;

const GONE: &str =
    "its WAL is gone, whose frames were being copied into it, so that the file alone is no committed state";
const MAYBE: &str = "its WAL is gone, whose frames were being copied into it, and one page of the file is as \
    it was before that. Either that copy was never ended, and the file alone is no committed state; or \
    somebody ended it and then committed the very bytes that the page had before (emptied a table, or set a \
    value back), and the file is whole: then `Config::accept_damaged` loses nothing";
const NO_ANCHORS: &str = "its state directory lacks the anchors, and nothing there names what the file is. \
    Either somebody committed to it, and it is whole: then `Config::accept_damaged` loses nothing; or it \
    lacks what a WAL had that is gone";
const OTHER_WAL: &str = "the file is as it was left, and the WAL beside it is none of this node's. Either \
    that node's WAL was removed, and somebody has written since: then `Config::accept_damaged` takes what he \
    wrote; or a WAL was put there that goes with another file: then remove it";
const OLD_FILE: &str = "the WAL beside it was begun by others, and the file has pages that are older than \
    the log's. Either the WAL goes with another file: then put that one there; or what the log has beyond \
    the file was lost before somebody wrote to it: then `Config::accept_damaged` takes what he wrote";
const NO_LOG: &str = "the WAL beside it was begun by others, and the log that could tell whether the file \
    goes with it is gone. Either somebody has copied all of this node's WAL and written since: then \
    `Config::accept_damaged` loses nothing; or the WAL goes with another file: then put that one there";

impl Findings {
    /// Whether the file may hold pages of several states, and why. Its position is unknown, and its
    /// WAL is not this node's any more. A mixed file is no state, and no one must read it.
    pub(in crate::engine) fn damage(&mut self) -> Result<Option<Doubt>> {
        let Some(newest) = self.known.first().copied() else {
            let first_start = lock(&self.base.anchors).unwritten();
            return Ok((!first_start).then_some(Doubt::TwoReadings(NO_ANCHORS)));
        };
        if self.wal == Wal::Foreign && self.at_rest()?.is_some() {
            return Ok(Some(Doubt::TwoReadings(OTHER_WAL)));
        }
        if let FileState::Backfilling(witnesses) = newest.file {
            let older = self.older(&witnesses).unwrap_or_else(|error| {
                self.base.node.report(Condition::WalCopyUnknown { error: &error });
                witnesses.iter().map(WitnessPage::page).collect()
            });
            match older[..] {
                [] => {
                    self.base.node.report(Condition::WalCopiedByOthers { path: self.base.path() });
                }
                // SQLite counts in the first page, and never puts older bytes there.
                [page] if page != PageNo::FIRST => return Ok(Some(Doubt::TwoReadings(MAYBE))),
                _ => return Ok(Some(Doubt::Mixed(GONE))),
            }
        }
        if self.wal == Wal::Gone {
            return Ok(None);
        }
        if self.base.log.tip().is_none_or(|logged| logged.number() < self.last_known()) {
            return Ok(Some(Doubt::TwoReadings(NO_LOG)));
        }
        match self.goes_back() {
            Ok(back) => Ok(back.then_some(Doubt::TwoReadings(OLD_FILE))),
            Err(error) => {
                self.base.node.report(Condition::WalMatchUnknown { error: &error });
                Ok(Some(Doubt::TwoReadings(NO_LOG)))
            }
        }
    }

    /// Whether pages of the file, which no WAL is over, are as earlier records of the log have
    /// them, and not as the newest. No process begins a WAL anew before all of it is in the file.
    /// Ordinary SQL may put a single page back; page 1 never.
    fn goes_back(&mut self) -> Result<bool> {
        let (base, tip) = (self.base.clone(), self.base.tip());
        let log = &base.log;
        let Some(Lookup::At { lsn, .. }) = log.start().map(|start| log.find(start.number())).transpose()?
        else {
            return Ok(false);
        };
        let changes = |visit: &mut dyn FnMut(PageNo, PageHash)| {
            log.records(lsn, log.complete(), |_, message| {
                for part in message.parts() {
                    if let RecordPart::Change(PageChange { number, hash, .. }) = part {
                        visit(number, hash);
                    }
                }
                Ok(())
            })
        };
        let mut newest = HashMap::new();
        changes(&mut |number, hash| {
            if newest.len() < PAGES_MAX || newest.contains_key(&number) {
                newest.insert(number, hash);
            }
        })?;
        // Those of which the file has another image than the newest.
        let (mut page, mut others) = (vec![0; base.page_size.bytes()], HashMap::new());
        for (number, newest) in newest {
            if number.get() > tip.pages || base.index.lookup(number.get(), 1, tip.frame).is_some() {
                continue;
            }
            self.handle.read(&mut page, number.offset(base.page_size))?;
            let hash = base.page_key.hash(number, &page);
            if hash != newest {
                others.insert(number, hash);
            }
        }
        let mut back = 0;
        changes(&mut |number, hash| {
            if others.get(&number) == Some(&hash) {
                others.remove(&number);
                back += if number == PageNo::FIRST { 2 } else { 1 };
            }
        })?;
        Ok(back > 1)
    }

    /// The pages of which the file itself still has the image that the WAL would have replaced,
    /// whatever a newer WAL says.
    fn older(&mut self, witnesses: &Witnesses) -> Result<Vec<PageNo>> {
        let mut page = vec![0; self.base.page_size.bytes()];
        let size = self.handle.size()?;
        let mut older = Vec::new();
        for witness in witnesses.iter() {
            let end = witness.page().offset(self.base.page_size) + u64::from(self.base.page_size.get());
            // The database has become smaller since. Where it never grew, its first page tells.
            if end > size || witness.page().get() > self.base.tip().pages {
                continue;
            }
            self.handle.read(&mut page, witness.page().offset(self.base.page_size))?;
            if WitnessPage::new(witness.page(), self.base.page_key.hash(witness.page(), &page)) == witness {
                older.push(witness.page());
            }
        }
        Ok(older)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::engine::capture::handle::PrimaryEngine;
    use crate::engine::checkpoint::backfill::copy;
    use crate::engine::recover::judge::integrity;
    use crate::engine::tests::{Home, node, settled};
    use crate::txid::Position;

    use super::*;
    use crate::error::Error;
    use rusqlite::Connection;

    fn run(home: &Home, sql: &str) {
        Connection::open(home.path("p.db")).unwrap().execute_batch(sql).unwrap();
    }

    fn ask(home: &Home, sql: &str) -> i64 {
        Connection::open(home.path("p.db")).unwrap().query_row(sql, [], |r| r.get(0)).unwrap()
    }

    fn open(home: &Home) -> Result<PrimaryEngine> {
        let mut options = home.options("p.db");
        // Nothing is copied unless we do it.
        options.wal_limit_bytes = 64 << 20;
        PrimaryEngine::open(options, node())
    }

    const UPDATE: &str = "UPDATE t SET a = 'behind'";
    const GROW: &str = "INSERT INTO t SELECT 'behind', randomblob(3000) FROM t";

    /// A database of 200 rows that is opened, and changed by a connection that leaves the WAL where
    /// it is when it closes.
    fn changed(home: &Home, sql: &str) -> (PrimaryEngine, Connection) {
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
        engine.base.end();
        let ended = copy(&engine.base, &mut lock(&engine.second), &engine.base.tip(), 0);
        assert!(matches!(ended, Err(Error::ShutDown)), "{ended:?}");
        drop(copying);
        engine.close();
        engine.base.tip().position
    }

    #[test]
    fn a_wal_that_is_deleted_when_a_part_of_it_was_copied_leaves_damage() {
        let update = "UPDATE t SET b = randomblob(3000) WHERE rowid > 180";
        for (sql, after, in_log) in [
            (UPDATE, "SELECT 1", true),
            // What was written last is written over, and more comes after it.
            (UPDATE, update, true),
            // A page that the log does not have.
            (UPDATE, "INSERT INTO t SELECT 'foreign', randomblob(3000) FROM t LIMIT 50", false),
            // The first page says that there are more pages than there are.
            (GROW, "SELECT 1", true),
        ] {
            let home = Home::new();
            let before = half_copied(&home, sql);
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
            // Without its log nothing can be said of it.
            let log = home.path("p.db-replite").join("log");
            fs::rename(&log, home.path("log")).unwrap();
            let refused = open(&home).map(|_| ());
            let told = matches!(&refused, Err(Error::Damaged { what, .. })
                if what.contains("WAL is gone") && what.contains("of transactions 1 to 1"));
            assert!(told, "{sql}; {after}: {refused:?}");
            fs::remove_dir_all(&log).unwrap();
            fs::rename(home.path("log"), &log).unwrap();
            if !in_log {
                let refused = open(&home).map(|_| ());
                assert!(matches!(refused, Err(Error::Damaged { .. })), "{refused:?}");
                continue;
            }
            let engine = open(&home).unwrap_or_else(|error| panic!("{sql}; {after}: {error}"));
            assert_eq!(settled(&engine), before, "{sql}; {after}");
            let rows = if sql == UPDATE { 200 } else { 400 };
            assert_eq!(ask(&home, "SELECT count(*) FROM t"), rows, "{sql}; {after}");
            assert_eq!(ask(&home, "SELECT count(*) FROM t WHERE a = 'behind'"), 200, "{sql}; {after}");
            assert_eq!(integrity(&Connection::open(home.path("p.db")).unwrap()).unwrap(), None);
            // What it replaced is kept.
            let kept = crate::engine::Lost::list(&home.options("p.db").paths).unwrap();
            let branch = kept.iter().find_map(|kept| kept.branch());
            let told = branch.is_some_and(|branch| branch.damaged && (branch.pages > 0 || sql == GROW));
            assert!(told, "{sql}; {after}: {kept:?}");
        }
    }

    /// A table that is emptied may get a page back that it had before: what an administrator does
    /// on a full disk.
    #[test]
    fn one_page_that_is_as_before_has_two_readings_and_both_are_named() {
        let home = Home::new();
        let (engine, stay) = changed(&home, UPDATE);
        let tip = engine.base.tip();
        let witnesses = engine.base.witnesses(&mut lock(&engine.second), 0, &tip).unwrap();
        let one = witnesses.iter().find(|witness| witness.page() != PageNo::FIRST).into_iter().collect();
        // It was copied by somebody else but for one page, or that page came back.
        let older = {
            let mut page = vec![0; 4096];
            let number = Witnesses::iter(&one).next().unwrap().page();
            lock(&engine.second).read(&mut page, number.offset(engine.base.page_size)).unwrap();
            (number, page)
        };
        engine.base.write_anchor(&tip, FileState::Backfilling(one), true).unwrap();
        settled(&engine);
        drop(stay);
        // Whatever it says when it ends.
        let anchors = fs::read(home.path("p.db-replite").join("anchors")).unwrap();
        engine.close();
        drop(engine);
        run(&home, "INSERT INTO t VALUES ('foreign', 1)");
        assert!(!home.path("p.db-wal").exists());
        fs::write(home.path("p.db-replite").join("anchors"), anchors).unwrap();
        let file = fs::File::options().write(true).open(home.path("p.db")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &older.1, u64::from(older.0.get() - 1) * 4096)
            .unwrap();
        drop(file);
        let refused = open(&home).map(|_| ());
        let told = matches!(&refused, Err(Error::Damaged { what, .. })
            if what.contains("Either") && what.contains("accept_damaged"));
        assert!(told, "{refused:?}");
        let mut options = home.options("p.db");
        options.accept_damaged = true;
        settled(&PrimaryEngine::open(options, node()).unwrap());
        assert_eq!(ask(&home, "SELECT count(*) FROM t WHERE a = 'behind'"), 199);
    }

    #[test]
    fn no_witness_is_a_page_that_an_emptied_table_gets_back() {
        let home = Home::new();
        run(
            &home,
            "PRAGMA journal_mode = WAL; CREATE TABLE t(a, b); CREATE TABLE u(a); INSERT INTO u VALUES (1)",
        );
        let engine = open(&home).unwrap();
        let stay = Connection::open(home.path("p.db")).unwrap();
        stay.execute_batch("INSERT INTO t VALUES (1, 2); INSERT INTO u VALUES (2)").unwrap();
        settled(&engine);
        let tip = engine.base.tip();
        let witnesses = engine.base.witnesses(&mut lock(&engine.second), 0, &tip).unwrap();
        let root = |table: &str| {
            let sql = format!("SELECT rootpage FROM sqlite_schema WHERE name = '{table}'");
            PageNo::new(ask(&home, &sql) as u32).unwrap()
        };
        let pages: Vec<PageNo> = witnesses.iter().map(WitnessPage::page).collect();
        assert_eq!(pages.last(), Some(&root("t")), "where there are others, it is the last to be asked");
        assert!(pages.contains(&root("u")));
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
