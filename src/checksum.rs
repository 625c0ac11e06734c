//! Page hashes and the database checksum that is their sum.

use std::fmt;
use std::str::FromStr;

use crate::hex::unhex;
use crate::page::{PageNo, PageSize};
use crate::parse::ParseError;

/// What the key of every page hash begins with; the page number ends it. It is published: the hash
/// guards against accidents and divergence, not against somebody who can write the file.
const PAGE_KEY: [u8; 28] = *b"replite page hash, version 1";

/// The sum modulo 2^128 of the hashes of a database's pages.
///
/// A page's hash is the first 16 bytes, little endian, of BLAKE3 over the page's bytes. The key
/// consists of `replite page hash, version 1` and the page number (`u32`, little endian). From the
/// old and the new image of each changed page a sum can be kept up to date. Equal changes on two
/// pages do not cancel, as they do in an exclusive-or of linear checksums.
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

    /// Of a database's bytes, such as a file without a WAL has them. The lock page counts for
    /// nothing, and neither does a rest that is no whole page.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use replite::{Checksum, PageSize};
    ///
    /// let bytes = vec![0; 8192];
    /// let checksum = Checksum::of_bytes(&bytes, PageSize::new(4096)?);
    /// assert_ne!(checksum, Checksum::EMPTY);
    /// # Ok(())
    /// # }
    /// ```
    pub fn of_bytes(bytes: &[u8], page_size: PageSize) -> Checksum {
        let pages = bytes.chunks_exact(page_size.bytes()).zip(1..);
        let pages = pages.filter_map(|(page, number)| Some((PageNo::new(number)?, page)));
        let pages = pages.filter(|(number, _)| !number.is_lock_page(page_size));
        pages.fold(Checksum::EMPTY, |sum, (number, page)| sum.with(PageHash::of(number, page)))
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
    /// Hashes a page at its number.
    pub(crate) fn of(number: PageNo, page: &[u8]) -> PageHash {
        PageHash::keyed(number.get().to_le_bytes(), page)
    }

    /// Hashes a page that stands after its number, `number u32 LE || page`, whatever is in the
    /// place of both.
    pub(crate) fn of_numbered(number_and_page: &[u8]) -> PageHash {
        match number_and_page.split_first_chunk() {
            Some((number, page)) => PageHash::keyed(*number, page),
            None => PageHash::keyed([0; 4], number_and_page),
        }
    }

    fn keyed(number: [u8; 4], page: &[u8]) -> PageHash {
        // In the key the number costs nothing: before the page it would make four chunks five.
        let mut key = [0; 32];
        key[..28].copy_from_slice(&PAGE_KEY);
        key[28..].copy_from_slice(&number);
        PageHash::cut(&blake3::keyed_hash(&key, page))
    }

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

    #[test]
    fn equal_changes_on_two_pages_do_not_cancel() {
        let (one, two) = (PageNo::new(1).unwrap(), PageNo::new(2).unwrap());
        let (before, mut after) = ([7u8; 512], [7u8; 512]);
        after[100] ^= 0x20;
        let sum = |a: &[u8], b: &[u8]| Checksum::EMPTY.with(PageHash::of(one, a)).with(PageHash::of(two, b));
        assert_ne!(sum(&before, &before), sum(&after, &after));
        assert_ne!(sum(&before, &after), sum(&after, &before));
    }

    #[test]
    fn both_ways_to_hash_agree_and_text_round_trips() {
        let page = [3u8; 1024];
        let mut joined = 9u32.to_le_bytes().to_vec();
        joined.extend_from_slice(&page);
        let hash = PageHash::of(PageNo::new(9).unwrap(), &page);
        assert_eq!(hash, PageHash::of_numbered(&joined));
        assert_eq!(hash, PageHash::from_bytes(hash.to_bytes()));
        let sum = Checksum::EMPTY.with(hash);
        assert_eq!(sum.to_string().parse::<Checksum>().unwrap(), sum);
        assert_eq!(sum.without(hash), Checksum::EMPTY);
        assert!("xyz".parse::<Checksum>().is_err());
        assert!("+0000000000000000000000000000001".parse::<Checksum>().is_err());
    }
}
