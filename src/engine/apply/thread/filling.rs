//! How a snapshot becomes this node's state, in the file that is at the path. It is never another
//! file under the same name, for others may have this one open.

use std::sync::Arc;

use bytes::BytesMut;

use crate::engine::apply::stream_error::StreamError;
use crate::engine::apply::thread::Apply;
use crate::engine::apply::thread::stage::{Remedy, Served, State, Suspect};
use crate::engine::checkpoint::backfill::backfill_some;
use crate::engine::file::anchor::FileState;
use crate::engine::file::doubt;
use crate::engine::file::epochs::write_epochs;
use crate::engine::file::witnesses::WitnessPage;
use crate::engine::history::wal_appender::WalAppender;
use crate::engine::incoming::{EmptyFile, Ready};
use crate::engine::lost;
use crate::error::{Error, Result};
use crate::files;
use crate::page::{PageNo, PageSize};
use crate::report::Condition;
use crate::sqlite::Alone;
use crate::txid::EpochHistory;

/// Bytes that are copied at a time. SQLite's handle takes less than 128 KiB.
const COPY_BYTES: usize = 64 * 1024;

/// What was open before the thread made room.
#[derive(Clone, Copy)]
enum OpenBefore {
    Closed,
    Unopened,
    Empty,
    Content(Remedy),
}

impl Apply {
    /// Pages go into the file after its end, where no reader sees them, if they are not there
    /// already. Then one commit of the first page makes all of them the database.
    pub(super) fn fill(&mut self, ready: &Ready, history: EpochHistory) -> Result<(), StreamError> {
        let place = ready.pages.database();
        if place.is_none() {
            self.make_room(ready.page_size)?;
        }
        let live = self.state.empty(ready.page_size).ok_or(StreamError::WrittenMeanwhile)?;
        match place {
            None => copy(live, ready)?,
            Some(database) if Arc::ptr_eq(database, &live.base) => expect_pages(live, ready)?,
            Some(_) => return Err(StreamError::WrittenMeanwhile),
        }
        write_epochs(self.options.keyed(), &history, false)?;
        live.base.log.reset(ready.position)?;
        if let Err(error) = commit(live, ready) {
            live.abort();
            return Err(error.into());
        }
        self.history = history;
        doubt::end(&self.options.paths);
        self.suspect = Suspect::No;
        self.node.report(Condition::PagesReplaced);
        self.serve(Some(ready.position))?;
        // The file alone is then the state, as if it had always been. Should somebody delete the
        // WAL, nothing is lost.
        if let State::Known(Served { term, live, .. }) = &mut self.state
            && let Err(error) = backfill_some(term, &mut live.handle, true)
        {
            self.node.report(Condition::SnapshotNotCopied { error: &error });
        }
        Ok(())
    }

    /// An empty database that is open, and whose file pages of this size can go into at once.
    pub(super) fn place(&mut self, size: PageSize) -> EmptyFile {
        let base = &self.state.empty(size)?.base;
        base.file().is_some().then(|| base.clone())
    }

    /// Sees to it that an empty database with pages of this size is open.
    pub(super) fn make_room(&mut self, size: PageSize) -> Result<(), StreamError> {
        if self.state.empty(size).is_some() {
            return Ok(());
        }
        let before = match self.state {
            State::Closed | State::Left => OpenBefore::Closed,
            State::Unopened => OpenBefore::Unopened,
            State::Empty(_) => OpenBefore::Empty,
            State::Known(Served { remedy, .. }) | State::Unknown(_, remedy) => OpenBefore::Content(remedy),
        };
        if self.state.content().is_some() {
            self.node.renew_files();
            self.end_service();
            self.node.applied.forget();
        }
        self.state.close();
        let cleared = self.clear(!matches!(before, OpenBefore::Empty));
        match (&cleared, before) {
            (Ok(()), OpenBefore::Unopened) => {
                self.open_path(Some(size))?;
                self.node.report(Condition::FilesOpened);
            }
            (Ok(()), _) | (Err(_), OpenBefore::Empty) => self.open_path(Some(size))?,
            // This node reads from it again.
            (Err(_), OpenBefore::Content(remedy)) => {
                self.open_path(None)?;
                self.state.set_remedy(remedy);
            }
            (Err(_), OpenBefore::Closed | OpenBefore::Unopened) => {}
        }
        cleared
    }

    /// Empties the file, after it has kept what is in it. It does not while somebody else has the
    /// file open: to SQLite that would be damage.
    fn clear(&self, keep: bool) -> Result<(), StreamError> {
        let path = self.options.paths.database();
        let Some(alone) = Alone::with(path)? else {
            let end = StreamError::OpenElsewhere;
            self.node.report(Condition::SnapshotBlocked { text: &end.to_string() });
            return Err(end);
        };
        let Some(file) = alone.file() else { return Ok(()) };
        if keep {
            let kept = lost::keep_file(&self.options, file)?;
            self.node.report(Condition::DatabaseKept { kept: &kept });
        }
        for beside in self.options.paths.beside() {
            files::remove(&beside)?;
        }
        files::sync_name(path)?;
        Ok(file.set_len(0).and_then(|()| file.sync_all()).map_err(Error::io("truncate", path))?)
    }
}

/// Looks whether the file is as this node left it, and has room for as many pages as it is to have.
fn expect_pages(live: &mut WalAppender, ready: &Ready) -> Result<()> {
    live.base.expect_as_left()?;
    let (there, bytes) = (live.handle.size()?, u64::from(ready.size) * ready.page_size.bytes() as u64);
    if there == bytes {
        return Ok(());
    }
    Err(Error::Internal(format!("a snapshot of {bytes} bytes came as {there}")))
}

/// Copies all pages but the first to their places, and makes them durable. A database of one page
/// has no use for them yet, and this node holds CKPT and WRITE.
fn copy(live: &mut WalAppender, ready: &Ready) -> Result<()> {
    let size = ready.page_size.bytes();
    let bytes = u64::from(ready.size) * size as u64;
    // Pages of a larger snapshot that did not come to its end.
    if live.handle.size()? > bytes {
        live.base.writing(|| live.handle.truncate(bytes))?;
    }
    let mut run = vec![0; COPY_BYTES.max(size)];
    let mut next = 2;
    while let Some(first) = PageNo::new(next).filter(|_| next <= ready.size) {
        let count = ((ready.size - next + 1) as usize).min(run.len() / size);
        ready.read(first, &mut run[..count * size])?;
        let at = first.offset(ready.page_size);
        live.base.writing(|| live.handle.write(&run[..count * size], at))?;
        next += count as u32;
    }
    live.handle.sync()
}

/// Makes the pages the database, by a commit of the first one. It is durable on return.
fn commit(live: &mut WalAppender, ready: &Ready) -> Result<()> {
    let base = live.base.clone();
    let (mut first, mut there) =
        (BytesMut::zeroed(ready.page_size.bytes()), vec![0; ready.page_size.bytes()]);
    ready.read(PageNo::FIRST, &mut first)?;
    live.handle.read(&mut there, 0)?;
    // While the file has the first page of an empty database, it is no state without its WAL.
    let witness = (there[..] != first[..])
        .then(|| WitnessPage::new(PageNo::FIRST, base.page_key.hash(PageNo::FIRST, &there)));
    let file = FileState::Backfilling(witness.into_iter().collect());
    let mut page = Some((PageNo::FIRST, first.freeze()));
    live.replace(&mut |_| Ok(page.take()), ready.position, ready.size, &mut |tip| {
        base.sync_wal()?;
        base.announce(tip, file)
    })?;
    base.sync_wal()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::fs;

    use super::*;
    use crate::engine::tests::{
        Home, KEY, applied, assert_same, compare, open_plain, send, settled, standing, until,
    };
    use crate::engine::{PrimaryEngine, ReplicaEngine};
    use crate::txid::Position;
    use crate::wire::{self, Message, PageRun, SnapBegin, SnapEnd};

    /// A primary with some hundred pages.
    fn primary(home: &Home) -> (PrimaryEngine, Position) {
        let engine = home.primary("p.db");
        let writer = open_plain(&home.path("p.db"));
        let rows = "CREATE TABLE t(id INTEGER PRIMARY KEY, v);
            WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 300)
            INSERT INTO t SELECT n, randomblob(3000) FROM s";
        writer.execute_batch(rows).unwrap();
        let position = settled(&engine);
        (engine, position)
    }

    /// Sends pages from one on, up to one or to the end.
    fn send_some(engine: &PrimaryEngine, follower: &ReplicaEngine, from: u32, to: Option<u32>) {
        let (tip, size) = (engine.base.tip(), engine.page_size());
        let (mut out, from) = (BytesMut::new(), PageNo::new(from).unwrap());
        wire::encode(&Message::Epochs((*engine.base.node.applied.history()).clone()), &mut out);
        let begin = SnapBegin { first: tip.position, from, page_size: size, pages: tip.pages };
        wire::encode(&Message::SnapBegin(begin), &mut out);
        let mut next = from.get();
        let last = to.unwrap_or(tip.pages);
        while next <= last {
            let (first, most) = (PageNo::new(next).unwrap(), (last - next + 1) as usize * size.bytes());
            let piece = engine.read_piece(first, most.min(64 * 1024)).unwrap();
            let run = PageRun::hashed(first, &piece.data, size, &KEY);
            wire::encode_run(&run, piece.position, &mut out);
            next += run.count();
        }
        if to.is_none() {
            let end = SnapEnd { exact_at: tip.position, pages: tip.pages };
            wire::encode(&Message::SnapEnd(end), &mut out);
        }
        send(follower, out).unwrap();
    }

    /// A replica that has stopped within a snapshot, before this page.
    const NEXT: u32 = 100;

    fn stopped(home: &Home, engine: &PrimaryEngine) {
        let replica = home.follower("r.db");
        assert_eq!(standing(&replica).0.resume, None);
        send_some(engine, &replica, 1, Some(NEXT - 1));
        until("the pages", || fs::metadata(home.path("r.db")).unwrap().len() == u64::from(NEXT - 1) * 4096);
        let there = open_plain(&home.path("r.db"));
        let look = |sql: &str| there.query_row(sql, [], |row| row.get::<_, String>(0)).unwrap();
        assert_eq!(look("PRAGMA integrity_check"), "ok", "it is an empty database for everybody");
        assert_eq!(
            look("SELECT count(*) || ' ' || (SELECT * FROM pragma_page_count) FROM sqlite_schema"),
            "0 1"
        );
        assert_eq!(applied(&replica), None);
    }

    #[test]
    fn a_snapshot_is_in_the_file_as_it_comes_and_goes_on_there_after_a_restart() {
        let home = Home::new();
        let (engine, position) = primary(&home);
        stopped(&home, &engine);
        let replica = home.follower("r.db");
        let begun = Some((position, PageNo::new(NEXT).unwrap()));
        assert_eq!(standing(&replica).0.resume, begun);
        send_some(&engine, &replica, NEXT, None);
        until("the state", || applied(&replica) == Some(position));
        assert_same(&home.path("p.db"), &home.path("r.db"));
        assert!(!home.options("r.db").paths.incoming().exists());
    }

    #[test]
    fn what_came_into_the_file_is_compared_when_it_can_t_go_on() {
        let home = Home::new();
        let (engine, position) = primary(&home);
        stopped(&home, &engine);
        open_plain(&home.path("p.db"))
            .execute_batch("UPDATE t SET v = randomblob(3000) WHERE id < 20")
            .unwrap();
        assert_ne!(settled(&engine), position);
        let replica = home.follower("r.db");
        let (_, mut wants) = standing(&replica);
        let mut out = BytesMut::new();
        wire::encode(&Message::Epochs((*engine.base.node.applied.history()).clone()), &mut out);
        send(&replica, out).unwrap();
        let had = compare(&engine, &replica, &mut wants, &mut || ()).unwrap();
        assert_eq!(had as u32, NEXT - 1);
        until("the state", || applied(&replica) == Some(settled(&engine)));
        assert_same(&home.path("p.db"), &home.path("r.db"));
    }

    #[test]
    fn a_snapshot_whose_pages_somebody_changed_ends_and_begins_anew() {
        let home = Home::new();
        let (engine, position) = primary(&home);
        stopped(&home, &engine);
        let file = fs::File::options().write(true).open(home.path("r.db")).unwrap();
        crate::files::write_all_at(&file, b"changed", 50 * 4096).unwrap();
        let replica = home.follower("r.db");
        assert!(standing(&replica).0.resume.is_some(), "nothing tells before all pages are there");
        send_some(&engine, &replica, NEXT, None);
        assert_eq!((standing(&replica).0.resume, applied(&replica)), (None, None));
        send_some(&engine, &replica, 1, None);
        until("the state", || applied(&replica) == Some(position));
        assert_same(&home.path("p.db"), &home.path("r.db"));
    }

    #[test]
    fn sqlite_that_cut_the_file_and_a_file_that_nothing_goes_on_in_leave_one_page() {
        let home = Home::new();
        let (engine, position) = primary(&home);
        for by_sqlite in [true, false] {
            stopped(&home, &engine);
            if by_sqlite {
                let sql = "SELECT count(*) FROM sqlite_schema";
                open_plain(&home.path("r.db")).query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
            } else {
                fs::remove_dir_all(home.options("r.db").paths.incoming()).unwrap();
            }
            let replica = home.follower("r.db");
            assert_eq!(standing(&replica).0.resume, None);
            assert!(fs::metadata(home.path("r.db")).unwrap().len() < 2 * 4096);
            drop(replica);
        }
        let replica = home.follower("r.db");
        standing(&replica);
        send_some(&engine, &replica, 1, None);
        until("the state", || applied(&replica) == Some(position));
    }

    #[test]
    fn a_snapshot_begins_anew_when_its_file_is_not_the_one_that_it_came_into() {
        for what in ["cut", "replaced", "gone"] {
            let home = Home::new();
            let (engine, position) = primary(&home);
            stopped(&home, &engine);
            let file = home.path("r.db");
            let beside = ["r.db-wal", "r.db-shm"].map(|name| home.path(name));
            if what == "cut" {
                fs::File::options().write(true).open(&file).unwrap().set_len(50 * 4096).unwrap();
            } else {
                beside.iter().chain([&file]).for_each(|path| fs::remove_file(path).unwrap_or_default());
            }
            if what == "replaced" {
                let long = "CREATE TABLE mine(a); INSERT INTO mine VALUES (zeroblob(4000000))";
                open_plain(&file).execute_batch(long).unwrap();
            }
            let replica = home.follower("r.db");
            assert_eq!(standing(&replica).0.resume, None, "{what}");
            if what != "replaced" {
                send_some(&engine, &replica, 1, None);
                until("the state", || applied(&replica) == Some(position));
                assert_same(&home.path("p.db"), &file);
            }
        }
    }
}
