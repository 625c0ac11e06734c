//! The newest frame of each page in a stretch of the WAL, in the order of the pages. It takes
//! bounded memory however long the WAL is.

use crate::sqlite::WalIndex;

/// Pages of one pass over the index. The pass holds twice as many entries of eight bytes.
const PAGES: usize = 32 * 1024;

/// A page, and the frame with its newest image.
pub(in crate::engine) type Found = (u32, u32);

/// Passes over the page numbers of the index, each of which gives the next pages.
pub(in crate::engine) struct Newest<'a> {
    index: &'a WalIndex,
    first: u32,
    last: u32,
    /// Turns a page number into its rank, and back.
    turn: u32,
    /// The lowest rank that no pass has given yet; none at the end.
    from: Option<u32>,
    pages: usize,
    /// The rank above, the frame below, turned so that the newest comes first.
    entries: Vec<u64>,
}

impl<'a> Newest<'a> {
    /// Lowest page first, of the frames `first` to `last`. The caller has mapped the index up to
    /// there.
    pub(in crate::engine) fn ascending(index: &'a WalIndex, first: u32, last: u32) -> Newest<'a> {
        Newest { index, first, last, turn: 0, from: Some(0), pages: PAGES, entries: Vec::new() }
    }

    /// Highest page first.
    pub(in crate::engine) fn descending(index: &'a WalIndex, first: u32, last: u32) -> Newest<'a> {
        Newest { turn: u32::MAX, ..Newest::ascending(index, first, last) }
    }

    /// Puts the next pages in order into `found`. Returns false when there are none.
    pub(in crate::engine) fn next(&mut self, found: &mut Vec<Found>) -> bool {
        found.clear();
        let Some(from) = self.from else { return false };
        let (turn, pages, entries) = (self.turn, self.pages, &mut self.entries);
        entries.clear();
        let mut to = u32::MAX;
        self.index.each_page(self.first, self.last, |frame, page| {
            let rank = page ^ turn;
            if page == 0 || rank < from || rank > to {
                return;
            }
            if entries.len() == 2 * pages {
                settle(entries);
                if entries.len() >= pages {
                    entries.truncate(pages);
                    // The pages after those have their turn later.
                    to = rank_of(entries[pages - 1]);
                    if rank > to {
                        return;
                    }
                }
            }
            entries.push(u64::from(rank) << 32 | u64::from(!frame));
        });
        settle(entries);
        if entries.len() > pages {
            entries.truncate(pages);
            to = rank_of(entries[pages - 1]);
        }
        self.from = to.checked_add(1);
        found.extend(entries.iter().map(|entry| (rank_of(*entry) ^ turn, !(*entry as u32))));
        !found.is_empty()
    }
}

/// Leaves the newest entry of each page, in order.
fn settle(entries: &mut Vec<u64>) {
    entries.sort_unstable();
    entries.dedup_by_key(|entry| rank_of(*entry));
}

fn rank_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::engine::file::reader::reader;
    use crate::engine::tests::Home;

    #[test]
    fn each_page_comes_once_in_order_with_its_newest_frame_whatever_fits_into_a_pass() {
        let home = Home::new();
        let engine = home.primary("p.db");
        let mut handle = reader(&engine.base).unwrap();
        let (index, mut rng) = (&engine.base.index, StdRng::seed_from_u64(5));
        let first = engine.base.tip().frame + 1;
        // After the last commit, where no reader looks: three regions.
        let frames: Vec<Found> = (first..first + 9000)
            .map(|frame| (if rng.random_bool(0.5) { 2 } else { rng.random_range(1..700) }, frame))
            .collect();
        engine.base.map_to(&mut handle, first + 9000).unwrap();
        for (page, frame) in &frames {
            index.append(&handle, *frame, *page).unwrap();
        }
        for (from, to) in [(first, first + 8999), (first + 100, first + 4500), (first + 7, first + 7)] {
            let among = frames.iter().filter(|(_, frame)| (from..=to).contains(frame));
            let wanted: Vec<Found> = among.copied().collect::<BTreeMap<u32, u32>>().into_iter().collect();
            let mut turned = wanted.clone();
            turned.reverse();
            for pages in [1, 2, 16, 699, 5000] {
                let all = |mut newest: Newest<'_>| {
                    let (mut all, mut batch) = (Vec::new(), Vec::new());
                    newest.pages = pages;
                    while newest.next(&mut batch) {
                        assert!(batch.len() <= pages);
                        all.extend_from_slice(&batch);
                    }
                    assert!(newest.entries.capacity() <= (4 * pages).max(8), "bounded");
                    all
                };
                assert!(all(Newest::ascending(index, from, to)) == wanted, "{from}..={to} by {pages}");
                assert!(all(Newest::descending(index, from, to)) == turned, "{from}..={to} by {pages}");
            }
        }
        assert!(!Newest::ascending(index, 5, 4).next(&mut Vec::new()), "an empty stretch");
        index.clean_above(first - 1);
    }
}
