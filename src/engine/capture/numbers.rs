//! Which number a commit of our own writer has, whatever others commit before and after it. Capture
//! knows the number; this module also says how the writer waits for capture.

use crate::engine::capture::handle::{LastCommit, PrimaryEngine};
use crate::engine::file::progress::Asked;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::txid::Txid;
use crate::wal::Salts;

/// What the writer knew when its transaction held the write lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Begun {
    salts: Salts,
    frame: u32,
    /// The wal-index's count of commits.
    change: u32,
    /// The transaction that `BEGIN` began has ended since, and this is another one.
    again: bool,
}

impl PrimaryEngine {
    /// Call before BEGIN IMMEDIATE: waits until capture has what others committed. A transaction
    /// that waited for that would keep all others from writing.
    pub(crate) fn ready(&self) -> Result<()> {
        self.check()?;
        // The process that writes the header just now holds the write lock, for which BEGIN waits.
        let Some(header) = self.base.header() else { return Ok(()) };
        let here = |mark: &LastCommit| mark.salts == header.salts && mark.frame == header.max_frame;
        if lock(&self.last).as_ref().is_some_and(here) {
            return Ok(());
        }
        self.waker.wake();
        self.base.wait_tip(header.salts, header.max_frame).map(drop)
    }

    /// Call after BEGIN IMMEDIATE, when the connection holds the write lock. Waits for no one.
    pub(crate) fn begun(&self) -> Result<Begun> {
        self.check()?;
        let header = self.base.settled_header()?;
        let at = (header.salts, header.max_frame);
        let known = lock(&self.last).filter(|mark| (mark.salts, mark.frame) == at).map(|mark| mark.number);
        // Before the code below looks at the tip: from here on capture says when the tip goes
        // beyond.
        *lock(&self.base.asked) = Asked { at: Some(at), before: known, ..Asked::default() };
        let tip = self.base.tip();
        if (tip.salts, tip.frame) == at {
            lock(&self.base.asked).before = Some(tip.position.number());
        }
        Ok(Begun { salts: header.salts, frame: header.max_frame, change: header.change, again: false })
    }

    /// Call before COMMIT. Checks that the transaction read the file that this node left. An
    /// application that ended the transaction and began another has let others commit in between.
    pub(crate) fn ending(&self, begun: Begun) -> Result<Begun> {
        self.check()?;
        self.base.expect_unwritten()?;
        let header = self.base.settled_header()?;
        if (header.salts, header.max_frame, header.change) == (begun.salts, begun.frame, begun.change) {
            return Ok(begun);
        }
        Ok(Begun { again: true, ..self.begun()? })
    }

    /// Call after COMMIT. `frame` is the one that the commit ended with, as the WAL hook has it;
    /// none when SQLite did not call the hook. `earlier` says that the connection may have
    /// committed something before that, since the first BEGIN. Returns `None` when the commit wrote
    /// nothing.
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`].
    pub(crate) fn committed(&self, begun: Begun, frame: Option<u32>, earlier: bool) -> Result<Option<Txid>> {
        self.number(begun, frame, earlier).map_err(Error::of_a_commit)
    }

    fn number(&self, begun: Begun, frame: Option<u32>, earlier: bool) -> Result<Option<Txid>> {
        // No one can tell whether capture still looks at this commit.
        self.base.sound()?;
        let Some(frame) = frame.filter(|frame| *frame > begun.frame) else {
            if !(earlier && begun.again) {
                return Ok(None);
            }
            // What the application committed in between is before this.
            self.waker.wake();
            return self.before(begun).map(|number| self.txid(number));
        };
        let header = self.base.header();
        let next = header.is_some_and(|h| {
            (h.salts, h.max_frame, h.change) == (begun.salts, frame, begun.change.wrapping_add(1))
        });
        // Capture decides on what can't be read any more.
        let counts = next && self.counts(begun, frame).unwrap_or(false);
        let (before, after) = {
            let asked = lock(&self.base.asked);
            (asked.before, asked.after)
        };
        if let (true, Some(before), None) = (counts, before, after) {
            // No thread restarts the WAL before capture has said something, so what was read is of
            // this commit.
            return Ok(self.note(begun, frame, before + 1));
        }
        self.waker.wake();
        let (before, after) = self.base.wait_captured(|_| {
            let asked = lock(&self.base.asked);
            asked.before.zip(asked.after).filter(|_| asked.taken >= frame)
        })?;
        if !(after.end..=after.repeated).contains(&frame) {
            return Err(Error::Disturbed(format!(
                "somebody else's commit ends at frame {} of the WAL, where ours should be, up to frame \
                 {frame}",
                after.end
            )));
        }
        let txid = self.note(begun, frame, after.number);
        Ok(txid.filter(|_| after.number > before))
    }

    /// Remembers where our last commit ended, so that the next one need not wait for capture.
    fn note(&self, begun: Begun, frame: u32, number: u64) -> Option<Txid> {
        *lock(&self.last) = Some(LastCommit { salts: begun.salts, frame, number });
        self.waker.wake();
        self.brake.passed(frame);
        self.txid(number)
    }

    pub(in crate::engine) fn txid(&self, number: u64) -> Option<Txid> {
        let epoch = self.base.node.applied.history().epoch_of(number);
        epoch.map(|epoch| Txid::new(epoch, number))
    }

    /// Whether a commit is certainly one that counts. If not, capture decides.
    fn counts(&self, begun: Begun, frame: u32) -> Result<bool> {
        let index = &self.base.index;
        let page = index.page_of(frame);
        if page == 0 || frame > 1 && page == index.page_of(frame - 1) {
            // The commit may only repeat the frame before it.
            return match frame == begun.frame + 1 && page > 1 {
                true => self.base.is_same_image(begun.frame, frame).map(|same| !same),
                false => Ok(false),
            };
        }
        Ok(page > 1 || frame > begun.frame + 1)
    }

    /// The number of what was committed before the transaction began.
    fn before(&self, begun: Begun) -> Result<u64> {
        self.base.wait_captured(|tip| {
            let there = tip.salts != begun.salts || tip.frame >= begun.frame;
            lock(&self.base.asked).before.or_else(|| there.then(|| tip.position.number()))
        })
    }

    /// Call after a COMMIT that failed: whether it may have committed something all the same. Of
    /// several databases one may have been committed when the next one failed.
    pub(crate) fn may_have_committed(&self, begun: Begun) -> bool {
        let committed = || {
            let header = self.base.settled_header()?;
            if (header.salts, header.max_frame) == (begun.salts, begun.frame) {
                return Ok(false);
            }
            self.waker.wake();
            let before = self.before(begun)?;
            let tip = self.base.wait_tip(header.salts, header.max_frame)?;
            Ok::<_, Error>(tip.position.number() > before)
        };
        committed().unwrap_or(true)
    }

    /// The last transaction that is committed, captured to its end. Blocks for as long as capture
    /// takes.
    pub(crate) fn captured(&self) -> Result<Txid> {
        self.base.check()?;
        let header = self.base.settled_header()?;
        self.waker.wake();
        Ok(self.base.wait_tip(header.salts, header.max_frame)?.position.txid())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use crate::engine::file::database::Tip;
    use crate::fence::Fence;
    use rusqlite::Connection;

    use super::*;
    use crate::engine::checkpoint::backfill::backfill_some;
    use crate::engine::file::database::index_header;
    use crate::engine::tests::{Home, assert_exact, node, open_plain, settled, until};
    use crate::page::PageNo;
    use crate::sqlite::{CommitHook, Lock, Slot};
    use crate::wal::{frame_offset, push_frame};

    /// A connection as our writer's.
    struct Ours {
        connection: Connection,
        hook: CommitHook,
    }

    impl Ours {
        fn open(home: &Home) -> Ours {
            let connection = open_plain(&home.path("p.db"));
            let hook = CommitHook::put_on(&connection, Arc::new(Fence::unlimited()));
            Ours { connection, hook }
        }

        fn begin(&mut self, engine: &PrimaryEngine) -> Result<Begun> {
            self.hook.reset();
            self.connection.execute_batch("BEGIN IMMEDIATE")?;
            engine.begun()
        }

        fn write(&mut self, engine: &PrimaryEngine, sql: &str) -> Result<Option<Txid>> {
            engine.ready()?;
            let begun = self.begin(engine)?;
            self.connection.execute_batch(sql)?;
            let begun = engine.ending(begun)?;
            self.connection.execute_batch("COMMIT")?;
            engine.committed(begun, self.hook.last(), false)
        }
    }

    fn engine(home: &Home) -> PrimaryEngine {
        open_plain(&home.path("p.db")).execute_batch("CREATE TABLE t(a)").unwrap();
        let engine = home.primary("p.db");
        settled(&engine);
        engine
    }

    /// Lets the disk go on also when an assertion fails.
    struct Held<'a>(&'a PrimaryEngine);

    impl<'a> Held<'a> {
        /// Capture waits with a foreign commit for its fsync.
        fn with_a_commit(engine: &'a PrimaryEngine, home: &Home) -> Held<'a> {
            engine.group_sync.hold(true);
            let held = Held(engine);
            open_plain(&home.path("p.db")).execute_batch("INSERT INTO t VALUES (1)").unwrap();
            until("the fsync", || engine.base.progress.is_on_disk());
            held
        }
    }

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            self.0.group_sync.hold(false);
        }
    }

    #[test]
    fn a_transaction_waits_for_no_capture_and_gets_its_number_afterwards() {
        let home = Home::new();
        let engine = engine(&home);
        let before = engine.base.tip().position.number();
        let mut ours = Ours::open(&home);
        let held = Held::with_a_commit(&engine, &home);
        let begun = ours.begin(&engine).unwrap();
        ours.connection.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        let begun = engine.ending(begun).unwrap();
        ours.connection.execute_batch("COMMIT").unwrap();
        // Others write all the while.
        open_plain(&home.path("p.db")).execute_batch("INSERT INTO t VALUES (3)").unwrap();
        let txid = std::thread::scope(|scope| {
            let committed = scope.spawn(|| engine.committed(begun, ours.hook.last(), false));
            drop(held);
            committed.join().unwrap().unwrap().unwrap()
        });
        assert_eq!(txid.number(), before + 2, "neither the one before nor the one behind");
        assert_eq!(settled(&engine).number(), before + 3);
    }

    #[test]
    fn a_commit_has_its_own_number_whoever_commits_behind_it() {
        let home = Home::new();
        let engine = engine(&home);
        let foreign = open_plain(&home.path("p.db"));
        let mut ours = Ours::open(&home);
        for (sql, written) in
            [("INSERT INTO t VALUES (1)", true), ("", false), ("CREATE VIEW v AS SELECT 1", true)]
        {
            for captured in [false, true] {
                let before = settled(&engine).number();
                let begun = ours.begin(&engine).unwrap();
                ours.connection.execute_batch(sql).unwrap();
                ours.connection.execute_batch("COMMIT; DROP VIEW IF EXISTS no").unwrap();
                let frame = ours.hook.last();
                foreign.execute_batch("DROP VIEW IF EXISTS v; INSERT INTO t VALUES (2)").unwrap();
                if captured {
                    settled(&engine);
                }
                let txid = engine.committed(begun, frame, false).unwrap();
                assert_eq!(txid.map(|txid| txid.number()), written.then_some(before + 1), "{sql} {captured}");
            }
        }
    }

    #[test]
    fn what_was_committed_when_replication_stopped_is_not_called_refused() {
        let home = Home::new();
        let engine = engine(&home);
        let mut ours = Ours::open(&home);
        let held = Held::with_a_commit(&engine, &home);
        let begun = ours.begin(&engine).unwrap();
        ours.connection.execute_batch("INSERT INTO t VALUES (2); COMMIT").unwrap();
        engine.fail(&Error::Disturbed("by intent".into()));
        let committed = engine.committed(begun, ours.hook.last(), false);
        assert!(
            matches!(&committed, Err(Error::OutcomeUnknown { cause, .. }) if cause.text() == "by intent"),
            "{committed:?}"
        );
        assert!(engine.may_have_committed(begun));
        // From here on everything is refused before it is committed.
        for refused in [engine.ready(), engine.begun().map(drop), engine.ending(begun).map(drop)] {
            assert!(matches!(&refused, Err(Error::Stopped(why)) if why.text() == "by intent"), "{refused:?}");
        }
        drop(held);
    }

    #[test]
    fn a_header_that_somebody_is_in_the_middle_of_writing_is_waited_for() {
        let home = Home::new();
        let engine = engine(&home);
        let foreign = open_plain(&home.path("p.db"));
        for copy in [0, 1] {
            foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
            let last = std::thread::scope(|scope| {
                engine.base.index.tear(copy);
                let waiting = scope.spawn(|| engine.captured());
                std::thread::park_timeout(Duration::from_millis(20));
                engine.base.index.tear(copy);
                waiting.join().unwrap()
            });
            assert_eq!(last.unwrap(), engine.base.tip().position.txid());
            foreign.execute_batch("ROLLBACK").unwrap();
        }
        // It stays so while the write lock is held: that is no end of replication.
        foreign.execute_batch("BEGIN IMMEDIATE").unwrap();
        engine.base.index.tear(0);
        assert!(matches!(engine.captured(), Err(Error::Timeout { .. })));
        engine.base.index.tear(0);
        foreign.execute_batch("ROLLBACK").unwrap();
        engine.captured().unwrap();
    }

    #[test]
    fn who_takes_the_write_lock_mends_what_a_dead_writer_left_at_once() {
        let home = Home::new();
        let engine = engine(&home);
        for copy in [0, 1] {
            let epoch = engine.base.node.applied.history().epoch().number();
            engine.base.index.tear(copy);
            engine.raise_epoch(epoch).unwrap();
            engine.check().unwrap();
            open_plain(&home.path("p.db")).execute_batch("INSERT INTO t VALUES (1)").unwrap();
            settled(&engine);
        }
    }

    #[test]
    fn a_commit_that_repeats_its_last_frame_is_one_transaction_live_and_after_a_restart() {
        let home = Home::new();
        let engine = engine(&home);
        let uri = format!("file:{}?psow=0", home.path("p.db").display());
        let padded = || {
            let connection = Connection::open(&uri).unwrap();
            connection.execute_batch("PRAGMA synchronous = FULL").unwrap();
            connection
        };
        let foreign = padded();
        let before = settled(&engine).number();
        let mut frames = engine.base.tip().frame;
        for n in 1..=5 {
            foreign.execute_batch("INSERT INTO t VALUES (1)").unwrap();
            assert_eq!(settled(&engine).number(), before + n);
            let now = engine.base.tip().frame;
            assert_eq!(now, frames + 2, "this disk repeats none: the test tests nothing");
            frames = now;
        }
        let connection = padded();
        let hook = CommitHook::put_on(&connection, Arc::new(Fence::unlimited()));
        let mut ours = Ours { connection, hook };
        for n in 6..=10 {
            let sql =
                if n % 2 == 0 { "INSERT INTO t VALUES (1)" } else { "INSERT INTO t VALUES (zeroblob(9000))" };
            assert_eq!(ours.write(&engine, sql).unwrap().unwrap().number(), before + n);
        }
        // So is one that changes nothing, from either connection.
        let same = "UPDATE t SET a = a WHERE rowid = (SELECT max(rowid) FROM t)";
        ours.write(&engine, same).unwrap();
        let before = settled(&engine);
        assert_eq!(ours.write(&engine, same).unwrap(), None);
        assert_eq!(Ours::open(&home).write(&engine, same).unwrap(), None);
        assert_eq!(settled(&engine), before);
        drop((foreign, ours, engine));
        let engine = PrimaryEngine::open(home.options("p.db"), node()).unwrap();
        assert_eq!(engine.base.tip().position.checksum(), before.checksum());
        assert_eq!(engine.base.tip().position.number(), before.number());
    }

    /// Commits a database that is longer, without a frame for any of its new pages.
    fn grow(engine: &PrimaryEngine, pages: u32) {
        let (base, mut handle) = (&engine.base, lock(&engine.second));
        until("the write lock", || handle.try_lock(Slot::WRITE, Lock::Exclusive).unwrap());
        let (tip, header, mut page) = (base.tip(), base.header().unwrap(), vec![0; base.page_size.bytes()]);
        base.read_page(&mut handle, PageNo::FIRST, tip.frame, &mut page).unwrap();
        let (frame, mut bytes) = (tip.frame + 1, Vec::new());
        let sum = push_frame(&mut bytes, PageNo::FIRST, pages, tip.salts, &page, tip.sum, header.big_endian);
        base.wal.write(&bytes, frame_offset(frame, base.page_size)).unwrap();
        base.map_to(&mut handle, frame).unwrap();
        base.index.append(&handle, frame, 1).unwrap();
        let end = Tip { frame, sum, pages, ..tip };
        base.index.publish(&index_header(base, &end, header.change.wrapping_add(1), header.big_endian));
        handle.unlock(Slot::WRITE, Lock::Exclusive).unwrap();
    }

    /// Pages that were in the WAL while the database was long, and are part of it again without
    /// having been written.
    #[test]
    fn a_page_that_nobody_wrote_is_the_same_before_and_after_its_wal_is_copied_back() {
        for backfilled in [true, false] {
            let home = Home::new();
            let foreign = open_plain(&home.path("p.db"));
            foreign
                .execute_batch("PRAGMA page_size = 1024; PRAGMA auto_vacuum = INCREMENTAL; CREATE TABLE t(a)")
                .unwrap();
            let options = crate::engine::EngineOptions { wal_limit_bytes: 512 << 10, ..home.options("p.db") };
            let engine = PrimaryEngine::open(options, node()).unwrap();
            settled(&engine);
            // Written while they were part of the database, which they are not when this is
            // committed.
            foreign
                .execute_batch(
                    "PRAGMA cache_size = 10; BEGIN; INSERT INTO t VALUES (randomblob(200000)); DELETE FROM t",
                )
                .unwrap();
            {
                // One row for each page.
                let mut vacuum = foreign.prepare("PRAGMA incremental_vacuum").unwrap();
                let mut rows = vacuum.query([]).unwrap();
                while rows.next().unwrap().is_some() {}
            }
            foreign.execute_batch("COMMIT").unwrap();
            settled(&engine);
            let short = engine.base.tip();
            let page = short.pages + 140;
            let dead = engine.base.index.lookup(page, 1, short.frame);
            assert!(dead.is_some(), "nothing was written: the test tests nothing");
            if backfilled {
                backfill_some(&engine.base, &mut lock(&engine.second), false).unwrap();
                assert!(engine.base.index.backfilled() + 1 >= short.frame);
            }
            grow(&engine, short.pages + 150);
            settled(&engine);
            let tip = engine.base.tip();
            assert_eq!((tip.pages, engine.base.index.lookup(page, 1, tip.frame)), (short.pages + 150, dead));
            assert_exact(&engine);
            until("a new WAL", || {
                foreign.execute_batch("INSERT INTO t VALUES (zeroblob(20000)); DELETE FROM t").unwrap();
                engine.base.tip().salts != tip.salts
            });
            assert_exact(&engine);
        }
    }
}
