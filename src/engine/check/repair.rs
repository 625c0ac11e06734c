//! Writes pages of the database file anew whose bytes are not what the position says.

use crate::checksum::PageHash;
use crate::engine::capture::handle::PrimaryEngine;
use crate::engine::checkpoint::backfill::DRAIN_MAX;
use crate::engine::checkpoint::backfill::{mark_again, take_file};
use crate::engine::file::anchor::{Anchor, FileState};
use crate::engine::file::database::OpenDatabase;
use crate::engine::file::witnesses::{WitnessPage, Witnesses};
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::sqlite::{Handle, Lock, Slot};
use crate::threads::caught;

/// A page of the file, its wrong bytes by their hash, and the right ones.
#[derive(Clone, Debug)]
pub(crate) struct RightPage {
    pub(crate) number: PageNo,
    pub(crate) wrong: PageHash,
    pub(crate) right: bytes::Bytes,
}

impl PrimaryEngine {
    /// Writes pages whose right images were proved into the file. The position is right and stays:
    /// this is no transaction. A page that was changed meanwhile, or that the WAL has, is left
    /// alone. Returns which pages it wrote. Blocks.
    pub(crate) fn repair(&self, pages: &[RightPage]) -> Result<Vec<PageNo>> {
        let base = &self.base;
        base.check()?;
        let mut handle = lock(&self.second);
        // No thread copies frames, and no reader reads from the file alone, while this writes
        // pages.
        let _nobody_copies = lock(&base.backfill);
        // Once capture has stopped, CKPT is no longer ours.
        base.check()?;
        base.expect_as_left()?;
        if !take_file(base, &mut handle)? {
            return Err(Error::Timeout { what: "readers of the file".into(), after: DRAIN_MAX });
        }
        let newest = lock(&base.anchors).newest_first().first().copied();
        let write = || base.writing(|| write_pages(base, &mut handle, newest, pages));
        let written = caught("a repair", write).flatten();
        handle.unlock(Slot::READ0, Lock::Exclusive)?;
        let written = written?;
        // The file is what it was. Only its modification time is another one.
        if let Some(anchor) = newest {
            let file = match anchor.file {
                FileState::AtRest { position, .. } => base.at_rest(position)?,
                // The mark may be another one now.
                FileState::Backfilling(missing) => {
                    let mark = match base.file_state() {
                        FileState::Backfilling(now) => now.mark,
                        FileState::AtRest { .. } => missing.mark,
                    };
                    FileState::Backfilling(missing.marked(mark))
                }
            };
            lock(&base.anchors).write(Anchor { file, ahead: false, ..anchor }, true)?;
        }
        Ok(written)
    }
}

/// Writes the pages into the file, durably, each where it has the bad bytes. The caller holds READ0
/// and the right to copy.
fn write_pages(
    base: &OpenDatabase,
    handle: &mut Handle,
    newest: Option<Anchor>,
    pages: &[RightPage],
) -> Result<Vec<PageNo>> {
    // Should the node die in here, the file's new modification time says nothing. The file is then
    // the state that it was, with some of its bad pages. The last of these are the witnesses.
    let bad =
        pages.iter().rev().map(|page| WitnessPage::new(page.number, page.wrong)).take(Witnesses::MAX / 2);
    let bad: Witnesses = match newest {
        Some(Anchor { file: FileState::Backfilling(missing), .. }) => bad.chain(missing.iter()).collect(),
        _ => bad.collect(),
    };
    let length = handle.size()?;
    let file = FileState::Backfilling(bad.marked(mark_again(base, handle)?));
    if let Some(anchor) = newest {
        lock(&base.anchors).write(Anchor { file, ahead: false, ..anchor }, true)?;
    }
    let mut written = Vec::new();
    for RightPage { number, wrong, right } in pages {
        let frame = base.settled_header()?.max_frame;
        // Another connection may have committed more than capture has taken.
        base.map_to(handle, frame)?;
        if base.index.lookup(number.get(), 1, frame).is_some() {
            continue;
        }
        let mut there = vec![0; base.page_size.bytes()];
        handle.read(&mut there, number.offset(base.page_size))?;
        if base.page_key.hash(*number, &there) == *wrong {
            handle.write(right, number.offset(base.page_size))?;
            written.push(*number);
        }
    }
    if matches!(newest, Some(Anchor { file: FileState::AtRest { .. }, .. })) {
        // The file's time tells its state again.
        handle.truncate(length)?;
    }
    handle.sync()?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::{Home, open_plain, settled, until};

    #[test]
    fn a_repair_looks_for_its_pages_in_all_that_was_committed() {
        let home = Home::new();
        let foreign = open_plain(&home.path("p.db"));
        foreign.execute_batch("PRAGMA page_size = 512; CREATE TABLE t(a); INSERT INTO t VALUES (1)").unwrap();
        let engine = home.primary("p.db");
        settled(&engine);
        // Capture waits for the disk, and takes nothing more.
        engine.group_sync.hold(true);
        foreign.execute_batch("INSERT INTO t VALUES (2)").unwrap();
        let taken = engine.base.header().unwrap().max_frame;
        until("the fsync", || engine.base.progress.is_on_disk());
        // More than one region of the wal-index.
        foreign.execute_batch("INSERT INTO t VALUES (zeroblob(3000000))").unwrap();
        assert!(engine.base.header().unwrap().max_frame > taken + 5000);
        let page = RightPage {
            number: PageNo::FIRST,
            wrong: engine.base.page_key.hash(PageNo::FIRST, &[0; 512]),
            right: vec![0; 512].into(),
        };
        let repaired = engine.repair(&[page]);
        let free = lock(&engine.second).try_lock(Slot::READ0, Lock::Exclusive);
        engine.group_sync.hold(false);
        assert_eq!(repaired.unwrap(), [], "the WAL has it");
        assert!(free.unwrap(), "the lock is given back");
        lock(&engine.second).unlock(Slot::READ0, Lock::Exclusive).unwrap();
        settled(&engine);
    }
}
