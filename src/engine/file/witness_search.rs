//! Finds the pages that are to be witnesses.

use crate::engine::file::anchor::FileState;
use crate::engine::file::database::{OpenDatabase, Tip};
use crate::engine::file::newest::{Found, Newest};
use crate::engine::file::witnesses::{WitnessPage, Witnesses};
use crate::error::Result;
use crate::page::PageNo;
use crate::report::Condition;
use crate::sqlite::Handle;

impl OpenDatabase {
    /// Pages after frame `copied` whose images at `tip` the file does not have yet. The first page
    /// comes first: a database does not grow without it, and a copy takes it last. Then come the
    /// highest ones, which a copy takes just before it, and some between.
    ///
    /// Where there are others, none is a page whose bytes come back by themselves when a table is
    /// emptied.
    pub(in crate::engine) fn witnesses(
        &self,
        handle: &mut Handle,
        copied: u32,
        tip: &Tip,
    ) -> Result<Witnesses> {
        const LAST: usize = Witnesses::MAX / 2;
        let (mut found, mut empty) = (Vec::<WitnessPage>::new(), Vec::new());
        let (mut image, mut there) = (vec![0; self.page_size.bytes()], vec![0; self.page_size.bytes()]);
        let mut newest = Newest::descending(&self.index, copied + 1, tip.frame);
        let first = self.index.lookup(PageNo::FIRST.get(), copied + 1, tip.frame);
        let mut pages: Vec<Found> = first.map(|frame| (PageNo::FIRST.get(), frame)).into_iter().collect();
        loop {
            // Beyond the last ones, the loop looks at a page when it has not found one of each step
            // yet.
            let (step, mut wanted) = ((pages.len() / (Witnesses::MAX - LAST)).max(1), 0);
            for (at, (page, frame)) in pages.iter().copied().enumerate() {
                if found.len() == Witnesses::MAX {
                    break;
                }
                let Some(page) = PageNo::new(page).filter(|page| at >= wanted && page.get() <= tip.pages)
                else {
                    continue;
                };
                if found.iter().any(|witness| witness.page() == page) {
                    continue;
                }
                self.read_frame(frame, &mut image)?;
                if let Err(error) = handle.read(&mut there, page.offset(self.page_size)) {
                    // The copy is about to overwrite it.
                    self.node.report(Condition::WitnessUnreadable { error: &error, page });
                    continue;
                }
                if image == there {
                    continue;
                }
                let witness = WitnessPage::new(page, self.page_key.hash(page, &there));
                if page != PageNo::FIRST && is_empty_leaf(&there) {
                    if empty.len() < Witnesses::MAX && !empty.contains(&witness) {
                        empty.push(witness);
                    }
                    continue;
                }
                found.push(witness);
                if found.len() >= LAST {
                    wanted = at + step;
                }
            }
            if found.len() == Witnesses::MAX || !newest.next(&mut pages) {
                return Ok(found.into_iter().chain(empty).collect());
            }
        }
    }

    /// What the last anchor says of the file. No thread copies any more.
    pub(in crate::engine) fn left_behind(&self, handle: &mut Handle) -> Result<FileState> {
        match self.file_state() {
            state @ FileState::AtRest { .. } => Ok(state),
            FileState::Backfilling(before) => {
                let witnesses = self.witnesses(handle, 0, &self.tip())?;
                Ok(FileState::Backfilling(witnesses.marked(before.mark)))
            }
        }
    }
}

/// Whether a page is a leaf of a table or an index, and has no row.
fn is_empty_leaf(page: &[u8]) -> bool {
    matches!(page, [10 | 13, _, _, 0, 0, ..])
}
