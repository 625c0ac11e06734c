//! A replica's part in a heal: finding the pages to ask for.
//!
//! There are two ways to find them. Either the replica's log says what it did since a state that is
//! the primary's. Or the primary sends sums over all of its pages, and the replica looks page by
//! page at the spans whose sums differ.
//!
//! Both lead to one set of pages. The replica asks for them with their hashes, so only those that
//! differ travel.

use crate::checksum::Checksum;
use crate::engine::history::intake_error::IntakeError;
use crate::engine::incoming::overlay::{Overlay, PageStore};
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
    /// The first page that the heal has not asked for yet. None: it has asked for all.
    next: Option<PageNo>,
    /// Pages that sums came for.
    summed: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Sums come.
    Summing,
    /// Pages come that the heal asked for.
    Wanting,
    /// The heal told the primary that it wants nothing more.
    Told,
}

impl Heal {
    /// All pages are to be compared.
    pub(crate) fn compare(begin: HealBegin) -> Heal {
        let phase = Phase::Summing;
        Heal { begin, phase, wanted: PageSet::default(), next: Some(PageNo::FIRST), summed: 0 }
    }

    /// Only pages that were touched since the fork can differ.
    pub(crate) fn since(begin: HealBegin, touched: &Touched) -> Heal {
        let mut wanted = touched.pages.clone();
        // The branch no longer has what it dropped. Where the primary did not drop it, too, no
        // record brings it.
        let size = touched.size.unwrap_or(begin.pages).min(begin.pages);
        let dropped = touched.least.saturating_add(1)..=size;
        dropped.filter_map(PageNo::new).for_each(|page| wanted.insert(page));
        // The primary can't send what it does not have. What it did not have at the fork comes with
        // its records.
        wanted.cut_above(size);
        Heal { begin, phase: Phase::Wanting, wanted, next: Some(PageNo::FIRST), summed: 0 }
    }

    /// Sums of the primary's pages.
    pub(crate) fn sums(
        &mut self,
        overlay: &mut Overlay,
        store: &mut dyn PageStore,
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

    /// Everything that the heal asked for has come. Returns what to ask for next.
    pub(crate) fn sent(
        &mut self,
        overlay: &mut Overlay,
        store: &mut dyn PageStore,
        sent: Sent,
    ) -> Result<Option<Want>, IntakeError> {
        match self.phase {
            Phase::Summing => {
                // The primary does not have a page that no sum came for.
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
    pub(crate) fn want(&mut self, overlay: &Overlay, store: &mut dyn PageStore) -> Result<Want> {
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
