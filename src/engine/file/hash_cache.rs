//! Hashes of pages that changed lately.

use crate::checksum::PageHash;
use crate::page::PageNo;

/// Page hashes that were computed lately. They save reading and hashing a hot page's old image
/// again. The cache is direct-mapped and bounded; an entry is the hash of the page as of the last
/// commit.
#[derive(Debug)]
pub(in crate::engine) struct HashCache {
    entries: Vec<Option<(u32, PageHash)>>,
}

impl HashCache {
    /// Entries, each of 32 bytes: half a mebibyte a database.
    const ENTRIES: usize = 16_384;

    pub(in crate::engine) fn new() -> HashCache {
        HashCache { entries: vec![None; Self::ENTRIES] }
    }

    pub(in crate::engine) fn get(&self, page: PageNo) -> Option<PageHash> {
        match self.entries[page.get() as usize % Self::ENTRIES] {
            Some((number, hash)) if number == page.get() => Some(hash),
            _ => None,
        }
    }

    pub(in crate::engine) fn set(&mut self, page: PageNo, hash: PageHash) {
        self.entries[page.get() as usize % Self::ENTRIES] = Some((page.get(), hash));
    }

    pub(in crate::engine) fn clear(&mut self) {
        self.entries.fill(None);
    }
}
