//! A set of page numbers that costs a bit a page where they are dense, and little where they are
//! not.

use std::collections::BTreeMap;

use crate::page::PageNo;

/// Pages that one block of the set stands for.
const BLOCK_PAGES: u32 = 4096;
const WORDS: usize = BLOCK_PAGES as usize / 64;

/// Page numbers, each at most once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct PageSet {
    /// By page number divided by [`BLOCK_PAGES`]; no block is empty.
    blocks: BTreeMap<u32, Box<[u64; WORDS]>>,
}

impl PageSet {
    pub(crate) fn insert(&mut self, page: PageNo) {
        let (block, word, bit) = place(page);
        self.blocks.entry(block).or_insert_with(|| Box::new([0; WORDS]))[word] |= bit;
    }

    pub(crate) fn remove(&mut self, page: PageNo) {
        let (block, word, bit) = place(page);
        if let Some(words) = self.blocks.get_mut(&block) {
            words[word] &= !bit;
            if words.iter().all(|&bits| bits == 0) {
                self.blocks.remove(&block);
            }
        }
    }

    pub(crate) fn contains(&self, page: PageNo) -> bool {
        let (block, word, bit) = place(page);
        self.blocks.get(&block).is_some_and(|words| words[word] & bit != 0)
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.values().flat_map(|words| words.iter()).map(|word| word.count_ones() as usize).sum()
    }

    /// The pages in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = PageNo> {
        self.from(PageNo::FIRST)
    }

    /// The pages from one on, in order.
    pub(crate) fn from(&self, first: PageNo) -> impl Iterator<Item = PageNo> {
        let bits = |word: u64| (0..64).filter(move |bit| word >> bit & 1 == 1);
        let blocks = self.blocks.range(first.get() / BLOCK_PAGES..);
        let numbers = blocks.flat_map(move |(&block, words)| {
            let base = block * BLOCK_PAGES;
            words
                .iter()
                .zip(0u32..)
                .flat_map(move |(&word, at)| bits(word).map(move |bit| base + at * 64 + bit))
        });
        numbers.filter_map(PageNo::new).filter(move |page| *page >= first)
    }

    /// Forgets the pages above a number.
    pub(crate) fn cut_above(&mut self, last: u32) {
        let Some(first) = last.checked_add(1).and_then(PageNo::new) else { return };
        let (block, word, bit) = place(first);
        self.blocks.retain(|&at, words| {
            if at >= block {
                let skip = if at > block { 0 } else { word };
                for (w, bits) in words.iter_mut().enumerate().skip(skip) {
                    // Of the word that the first page is in, the bits below it stay.
                    *bits &= if at == block && w == word { bit - 1 } else { 0 };
                }
            }
            words.iter().any(|&bits| bits != 0)
        });
    }
}

fn place(page: PageNo) -> (u32, usize, u64) {
    let within = page.get() % BLOCK_PAGES;
    (page.get() / BLOCK_PAGES, (within / 64) as usize, 1 << (within % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(numbers in prop::collection::vec(1u32..20_000, 0..300), cut in 0u32..20_000) {
            let mut model: BTreeSet<u32> = numbers.iter().copied().collect();
            let mut set = PageSet::default();
            numbers.iter().for_each(|&n| set.insert(PageNo::new(n).unwrap()));
            for &n in numbers.iter().step_by(3) {
                set.remove(PageNo::new(n).unwrap());
                model.remove(&n);
            }
            for _ in 0..2 {
                prop_assert_eq!(set.len(), model.len());
                prop_assert!(set.iter().map(PageNo::get).eq(model.iter().copied()));
                let from = PageNo::new(cut / 2 + 1).unwrap();
                prop_assert!(set.from(from).map(PageNo::get).eq(model.range(from.get()..).copied()));
                let same = |n| set.contains(PageNo::new(n).unwrap()) == model.contains(&n);
                prop_assert!((1..20_000).all(same));
                set.cut_above(cut);
                model.retain(|&n| n <= cut);
            }
        }
    }

    #[test]
    fn the_highest_page_costs_one_block() {
        let mut set = PageSet::default();
        set.insert(PageNo::new(u32::MAX).unwrap());
        assert_eq!(set.blocks.len(), 1);
        assert_eq!(set.iter().next(), PageNo::new(u32::MAX));
        set.cut_above(u32::MAX);
        assert_eq!(set.len(), 1);
        set.cut_above(u32::MAX - 1);
        assert_eq!(set.len(), 0);
    }
}
