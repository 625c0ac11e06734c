//! A replica's part in a heal: finding the pages to ask for.
//!
//! Either its log says what it did since a state that is the primary's, or the primary sends sums over all of its pages, and the spans whose
//! sums differ are looked at page by page. Both lead to one set of pages, which are asked for with their hashes, so that only those
//! that differ travel.

use crate::checksum::Checksum;
use crate::engine::history::intake_error::IntakeError;
use crate::engine::incoming::overlay::{Overlay, Store};
use crate::error::Result;
use crate::log::Touched;
use crate::page::{PageNo, PageSet};
use crate::wire::{HealBegin, SPAN_MAX_PAGES, Sent, WANT_MAX_PAGES, Want, WantRun};

/// A heal that is under way.
#[derive(Debug)]
pub(crate) struct Heal {
    pub(crate) begin: HealBegin,
    phase: Phase,
    /// The pages to ask for.
    wanted: PageSet,
    /// The first that was not asked for yet; none: all were.
    next: Option<PageNo>,
    /// Pages that sums came for.
    summed: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Sums come.
    Summing,
    /// Pages come that were asked for.
    Wanting,
    /// The primary was told that nothing more is wanted.
    Told,
}

impl Heal {
    /// All pages are to be compared.
    pub(crate) fn compare(begin: HealBegin) -> Heal {
        let phase = Phase::Summing;
        Heal { begin, phase, wanted: PageSet::default(), next: Some(PageNo::FIRST), summed: 0 }
    }

    /// Only what was touched since the fork can differ.
    pub(crate) fn since(begin: HealBegin, touched: &Touched) -> Heal {
        let mut wanted = touched.pages.clone();
        // What the branch dropped it has not any more; where the primary did not drop it, too, no record brings it.
        let size = touched.size.unwrap_or(begin.pages).min(begin.pages);
        let dropped = touched.least.saturating_add(1)..=size;
        dropped.filter_map(PageNo::new).for_each(|page| wanted.insert(page));
        // What the primary does not have can't be had; what it had not at the fork comes with its records.
        wanted.cut_above(size);
        Heal { begin, phase: Phase::Wanting, wanted, next: Some(PageNo::FIRST), summed: 0 }
    }

    /// Sums of the primary's pages.
    pub(crate) fn sums(
        &mut self,
        overlay: &mut Overlay,
        store: &mut dyn Store,
        (first, span, sums): (PageNo, u32, &[[u8; 16]]),
    ) -> Result<(), IntakeError> {
        let next = u64::from(first.get()) + u64::from(span) * sums.len() as u64;
        if self.phase != Phase::Summing || first.get() != self.summed + 1 || next > u64::from(u32::MAX) {
            return Err(IntakeError::garbled("sums out of place"));
        }
        for sum in sums {
            let Some(first) = PageNo::new(self.summed + 1) else { break };
            let ours = overlay.count_in(first, span, store)?;
            self.summed += span;
            if ours != Checksum::from_u128(u128::from_le_bytes(*sum)) {
                (first.get()..=self.summed).filter_map(PageNo::new).for_each(|page| self.wanted.insert(page));
            }
        }
        Ok(())
    }

    /// Everything that was asked for has come: what to ask for next.
    pub(crate) fn sent(
        &mut self,
        overlay: &mut Overlay,
        store: &mut dyn Store,
        sent: Sent,
    ) -> Result<Option<Want>, IntakeError> {
        match self.phase {
            Phase::Summing => {
                // What no sum came for is nowhere on the primary.
                overlay.forget_above(self.summed, store)?;
                overlay.drop_above(sent.pages, store)?;
                self.wanted.cut_above(sent.pages);
                self.phase = Phase::Wanting;
            }
            Phase::Wanting => {}
            Phase::Told => return Err(IntakeError::garbled("more than was asked for")),
        }
        Ok(Some(self.want(overlay, store)?))
    }

    /// The next pages to ask for; none when the primary has sent all.
    pub(crate) fn want(&mut self, overlay: &Overlay, store: &mut dyn Store) -> Result<Want> {
        let mut runs: Vec<(PageNo, u32)> = Vec::new();
        let pages = self.next.into_iter().flat_map(|next| self.wanted.from(next)).take(WANT_MAX_PAGES);
        let mut last = None;
        for page in pages {
            last = Some(page);
            match runs.last_mut() {
                Some((first, count)) if first.get() + *count == page.get() && *count < SPAN_MAX_PAGES => {
                    *count += 1;
                }
                _ => runs.push((page, 1)),
            }
        }
        self.next = last.and_then(|last| last.get().checked_add(1)).and_then(PageNo::new);
        if runs.is_empty() {
            self.phase = Phase::Told;
        }
        let runs = runs.into_iter().map(|(first, count)| {
            let hashes = overlay.hashes(first, count, store)?;
            let hashes = hashes.into_iter().map(|hash| hash.map_or([0; 16], |hash| hash.to_bytes()));
            Ok(WantRun { first, hashes: hashes.collect() })
        });
        Ok(Want { runs: runs.collect::<Result<_>>()? })
    }
}
