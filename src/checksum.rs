//! Page hashes and the database checksum that is their sum.

use std::fmt;
use std::str::FromStr;

use subtle::ConstantTimeEq;

use crate::hex::unhex;
use crate::page::{PageNo, PageSize};
use crate::parse::ParseError;

/// Bytes of a database's page key. The page number fills the 32 of a key of BLAKE3.
pub(crate) const PAGE_KEY_BYTES: usize = 28;
/// Bytes of what tells page keys apart.
pub(crate) const FINGERPRINT_BYTES: usize = 16;

/// The key of all page hashes of a database: random bytes that its nodes have, and no one else. So
/// who can only choose what is in pages can't make two that have one hash.
#[derive(Clone, Copy)]
pub(crate) struct PageKey([u8; PAGE_KEY_BYTES]);

impl PageKey {
    /// The key of pages in `lost`, which are to be read whatever the database's key is by then. It
    /// is published: their hashes guard against accidents.
    pub(crate) const KEPT: PageKey = PageKey(*b"replite page hash, version 1");

    pub(crate) const fn from_bytes(bytes: [u8; PAGE_KEY_BYTES]) -> PageKey {
        PageKey(bytes)
    }

    pub(crate) const fn to_bytes(self) -> [u8; PAGE_KEY_BYTES] {
        self.0
    }

    /// What files say of the key that their content was hashed with. Nothing of the key follows
    /// from it.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        let derived = blake3::derive_key("replite 2026 v1 page key fingerprint", &self.0);
        let mut bytes = [0; FINGERPRINT_BYTES];
        bytes.copy_from_slice(&derived[..FINGERPRINT_BYTES]);
        Fingerprint(bytes)
    }

    /// Hashes a page at its number.
    pub(crate) fn hash(&self, number: PageNo, page: &[u8]) -> PageHash {
        self.keyed(number.get().to_le_bytes(), page)
    }

    /// Hashes a page that stands after its number, `number u32 LE || page`, whatever is in the
    /// place of both.
    pub(crate) fn hash_of_numbered(&self, number_and_page: &[u8]) -> PageHash {
        match number_and_page.split_first_chunk() {
            Some((number, page)) => self.keyed(*number, page),
            None => self.keyed([0; 4], number_and_page),
        }
    }

    /// The checksum of a database's bytes, such as a file without a WAL has them. The lock page
    /// counts for nothing, and neither does a rest that is no whole page.
    pub(crate) fn sum(&self, bytes: &[u8], page_size: PageSize) -> Checksum {
        let pages = bytes.chunks_exact(page_size.bytes()).zip(1..);
        let pages = pages.filter_map(|(page, number)| Some((PageNo::new(number)?, page)));
        let pages = pages.filter(|(number, _)| !number.is_lock_page(page_size));
        pages.fold(Checksum::EMPTY, |sum, (number, page)| sum.with(self.hash(number, page)))
    }

    fn keyed(&self, number: [u8; 4], page: &[u8]) -> PageHash {
        // In the key the number costs nothing: before the page it would make four chunks five.
        let mut key = [0; 32];
        key[..PAGE_KEY_BYTES].copy_from_slice(&self.0);
        key[PAGE_KEY_BYTES..].copy_from_slice(&number);
        PageHash::cut(&blake3::keyed_hash(&key, page))
    }
}

/// In constant time: a peer may have chosen one of the two.
impl PartialEq for PageKey {
    fn eq(&self, other: &PageKey) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for PageKey {}

impl fmt::Debug for PageKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageKey(..)")
    }
}

/// Which page key a file's content was hashed with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Fingerprint(pub(crate) [u8; FINGERPRINT_BYTES]);

/// The sum modulo 2^128 of the hashes of a database's pages.
///
/// A page's hash is the first 16 bytes, little endian, of BLAKE3 over the page's bytes. The key
/// consists of 28 random bytes of the database and the page number (`u32`, little endian). From the
/// old and the new image of each changed page a sum can be kept up to date. Equal changes on two
/// pages do not cancel, as they do in an exclusive-or of linear checksums.
///
/// It guards against accidents, and shows every divergence of two nodes. That holds also where
/// somebody chooses what is in pages, such as with the rows that he writes, as long as he does not
/// have the key. All nodes of a database have it. What comes from other nodes is guarded by the
/// channel, and not by this. Checksums of different databases can't be compared: see
/// [`Db::checksum_of`](crate::Db::checksum_of).
///
/// ```
/// use replite::Checksum;
///
/// let checksum = Checksum::from_u128(5);
/// assert_eq!(checksum.to_string().parse::<Checksum>()?, checksum);
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Checksum(u128);

impl Checksum {
    /// The checksum of a database without pages.
    pub const EMPTY: Checksum = Checksum(0);

    /// From its number.
    pub const fn from_u128(value: u128) -> Checksum {
        Checksum(value)
    }

    /// As a number.
    pub const fn as_u128(self) -> u128 {
        self.0
    }

    /// With one page more.
    #[must_use]
    pub(crate) fn with(self, page: PageHash) -> Checksum {
        Checksum(self.0.wrapping_add(page.0))
    }

    /// Of both of two sets of pages that have none in common.
    #[must_use]
    pub(crate) fn plus(self, other: Checksum) -> Checksum {
        Checksum(self.0.wrapping_add(other.0))
    }

    /// Of a set of pages without those of another set, which are all in it.
    #[must_use]
    pub(crate) fn minus(self, other: Checksum) -> Checksum {
        Checksum(self.0.wrapping_sub(other.0))
    }

    /// With one page less.
    #[must_use]
    pub(crate) fn without(self, page: PageHash) -> Checksum {
        Checksum(self.0.wrapping_sub(page.0))
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Checksum {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Checksum {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Checksum, ParseError> {
        let bad = || ParseError::new("checksum", text);
        unhex(text).map(|bytes| Checksum(u128::from_be_bytes(bytes))).ok_or_else(bad)
    }
}

/// The hash of one page at its number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) struct PageHash(u128);

impl PageHash {
    pub(crate) fn from_bytes(bytes: [u8; 16]) -> PageHash {
        PageHash(u128::from_le_bytes(bytes))
    }

    pub(crate) fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    fn cut(hash: &blake3::Hash) -> PageHash {
        let mut low = [0; 16];
        low.copy_from_slice(&hash.as_bytes()[..16]);
        PageHash(u128::from_le_bytes(low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: PageKey = PageKey::from_bytes([7; PAGE_KEY_BYTES]);

    /// Two pages that were found to have one sum under a published key would be of use in every
    /// database.
    #[test]
    fn the_same_pages_have_other_hashes_under_another_key() {
        let other = PageKey::from_bytes([8; PAGE_KEY_BYTES]);
        let (one, page) = (PageNo::new(1).unwrap(), [3u8; 1024]);
        assert_ne!(KEY.hash(one, &page), other.hash(one, &page));
        assert_ne!(
            KEY.sum(&page, PageSize::new(512).unwrap()),
            other.sum(&page, PageSize::new(512).unwrap())
        );
        assert_ne!((KEY, KEY.fingerprint()), (other, other.fingerprint()));
        assert!(!format!("{KEY:?}").contains('7'));
    }

    #[test]
    fn equal_changes_on_two_pages_do_not_cancel() {
        let (one, two) = (PageNo::new(1).unwrap(), PageNo::new(2).unwrap());
        let (before, mut after) = ([7u8; 512], [7u8; 512]);
        after[100] ^= 0x20;
        let sum = |a: &[u8], b: &[u8]| Checksum::EMPTY.with(KEY.hash(one, a)).with(KEY.hash(two, b));
        assert_ne!(sum(&before, &before), sum(&after, &after));
        assert_ne!(sum(&before, &after), sum(&after, &before));
    }

    #[test]
    fn both_ways_to_hash_agree_and_text_round_trips() {
        let page = [3u8; 1024];
        let mut joined = 9u32.to_le_bytes().to_vec();
        joined.extend_from_slice(&page);
        let hash = KEY.hash(PageNo::new(9).unwrap(), &page);
        assert_eq!(hash, KEY.hash_of_numbered(&joined));
        assert_eq!(hash, PageHash::from_bytes(hash.to_bytes()));
        let sum = Checksum::EMPTY.with(hash);
        assert_eq!(sum.to_string().parse::<Checksum>().unwrap(), sum);
        assert_eq!(sum.without(hash), Checksum::EMPTY);
        assert!("xyz".parse::<Checksum>().is_err());
        assert!("+0000000000000000000000000000001".parse::<Checksum>().is_err());
    }
}
