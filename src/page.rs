//! Page numbers and page sizes, checked where they enter.

mod set;

use std::fmt;

use crate::parse::ParseError;

pub(crate) use set::PageSet;

/// The byte at which SQLite places its locks; the page that holds it never carries data.
const PENDING_BYTE: u64 = 0x4000_0000;

/// The number of a page in a database file, from 1.
///
/// ```
/// use replite::PageNo;
///
/// assert_eq!(PageNo::new(1), Some(PageNo::FIRST));
/// assert_eq!(PageNo::new(0), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct PageNo(u32);

impl PageNo {
    /// The first page of every database, which holds its header.
    pub const FIRST: PageNo = PageNo(1);

    /// A page number, or nothing for zero, which SQLite never uses.
    pub const fn new(number: u32) -> Option<PageNo> {
        if number == 0 { None } else { Some(PageNo(number)) }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Whether this is the page that SQLite reserves for its locks.
    pub fn is_lock_page(self, size: PageSize) -> bool {
        u64::from(self.0) == PENDING_BYTE / u64::from(size.get()) + 1
    }

    /// Where the page begins in the database file, in bytes.
    pub fn offset(self, size: PageSize) -> u64 {
        (u64::from(self.0) - 1) * u64::from(size.get())
    }
}

impl fmt::Debug for PageNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

impl fmt::Display for PageNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The size of a database's pages: a power of two from 512 to 65,536 bytes.
///
/// ```
/// use replite::{PageNo, PageSize};
///
/// let size = PageSize::new(4096)?;
/// assert_eq!(PageNo::FIRST.offset(size), 0);
/// assert!(PageSize::new(1000).is_err());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageSize(u32);

impl PageSize {
    /// The smallest page that SQLite has, in bytes.
    pub const MIN_BYTES: u32 = 512;
    /// The largest page that SQLite has, in bytes.
    pub const MAX_BYTES: u32 = 65_536;

    /// A page size in bytes.
    ///
    /// # Errors
    /// [`ParseError`] when `bytes` is not a power of two from 512 to 65,536.
    pub fn new(bytes: u32) -> Result<PageSize, ParseError> {
        if bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes) {
            Ok(PageSize(bytes))
        } else {
            Err(ParseError::new("page size", &bytes.to_string()))
        }
    }

    /// The size in bytes.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The size in bytes, for indexing.
    pub const fn bytes(self) -> usize {
        self.0 as usize
    }

    /// The power of two that it is.
    pub(crate) const fn power(self) -> u8 {
        self.0.trailing_zeros() as u8
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_outside_sqlites_range_are_refused() {
        for bad in [0, 1, 256, 513, 1000, 65_537, 131_072] {
            assert!(PageSize::new(bad).is_err(), "{bad}");
        }
        for shift in 9..=16 {
            assert_eq!(PageSize::new(1 << shift).unwrap().get(), 1 << shift);
        }
    }

    #[test]
    fn the_lock_page_is_where_sqlite_keeps_its_locks() {
        let size = PageSize::new(4096).unwrap();
        assert!(PageNo(262_145).is_lock_page(size));
        assert!(!PageNo(262_144).is_lock_page(size));
        assert_eq!(PageNo(262_145).offset(size), PENDING_BYTE);
    }
}
