//! Pages that tell whether another process copied all of the WAL back. They also let a node
//! recognize a file that it was copying frames into.

use crate::checksum::PageHash;
use crate::page::PageNo;
use crate::wal::le_u32;

/// A page that the WAL has and that the file has an older image of, by that image's hash. While the
/// file has it still, no process has copied all of the WAL back. SQLite gives up no WAL before
/// that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WitnessPage {
    page: PageNo,
    older: [u8; 8],
}

impl WitnessPage {
    /// Of one in an anchor.
    pub(in crate::engine) const BYTES: usize = 12;

    pub(crate) fn new(page: PageNo, older: PageHash) -> WitnessPage {
        let hash = older.to_bytes();
        let mut older = [0; 8];
        older.copy_from_slice(&hash[..8]);
        WitnessPage { page, older }
    }

    /// The page's number, little-endian, and the first eight bytes of the hash.
    pub(in crate::engine) fn to_bytes(self) -> [u8; WitnessPage::BYTES] {
        let mut bytes = [0; WitnessPage::BYTES];
        bytes[..4].copy_from_slice(&self.page.get().to_le_bytes());
        bytes[4..].copy_from_slice(&self.older);
        bytes
    }

    pub(crate) fn page(self) -> PageNo {
        self.page
    }
}

/// What a node writes after the end of a file that it copies frames into. Putting another file in
/// its place, or cutting it, takes the mark away. To SQLite it is nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct CopyTag {
    pub(crate) offset: u64,
    pub(crate) nonce: [u8; CopyTag::BYTES],
}

impl CopyTag {
    pub(crate) const BYTES: usize = 16;
}

/// Some pages of those that a copy changes, as many as an anchor has room for. And the mark by
/// which a node recognizes the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Witnesses {
    pages: [Option<WitnessPage>; Witnesses::MAX],
    pub(crate) mark: Option<CopyTag>,
}

impl Witnesses {
    pub(crate) const MAX: usize = 8;

    pub(crate) fn iter(&self) -> impl Iterator<Item = WitnessPage> + '_ {
        self.pages.iter().flatten().copied()
    }

    pub(crate) fn marked(self, mark: Option<CopyTag>) -> Witnesses {
        Witnesses { mark, ..self }
    }

    pub(in crate::engine) fn decode(bytes: &[u8]) -> Witnesses {
        bytes
            .chunks_exact(WitnessPage::BYTES)
            .filter_map(|b| {
                let mut older = [0; 8];
                older.copy_from_slice(&b[4..]);
                Some(WitnessPage { page: PageNo::new(le_u32(b))?, older })
            })
            .collect()
    }
}

/// The first ones, as many as there is room for.
impl FromIterator<WitnessPage> for Witnesses {
    fn from_iter<I: IntoIterator<Item = WitnessPage>>(all: I) -> Witnesses {
        let mut witnesses = Witnesses::default();
        for (place, witness) in witnesses.pages.iter_mut().zip(all) {
            *place = Some(witness);
        }
        witnesses
    }
}
