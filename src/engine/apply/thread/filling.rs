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
use crate::engine::incoming::{Place, Ready};
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
            Some(database) if Arc::ptr_eq(database, &live.base) => live.base.expect_as_left()?,
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
    pub(super) fn place(&mut self, size: PageSize) -> Place {
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
