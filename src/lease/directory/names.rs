//! Names of files: a record's is its number, that of a record on its way in has more after it.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use crate::descriptors::list;
use crate::hex::unhex;

const PREFIX: &str = "lease-";
const NEW: &str = ".new";
/// Digits of a number.
const DIGITS: usize = 20;

/// The most names of old files that a listing keeps: the lowest ones.
const OLD_MAX: usize = 1024;

/// The file of a record.
pub(super) fn record(number: u64) -> String {
    format!("{PREFIX}{number:0DIGITS$}")
}

/// The file of a record that is not there yet.
pub(super) fn new_record(number: u64, id: u128) -> String {
    format!("{}.{id:032x}{NEW}", record(number))
}

/// What one of our names says; none for another name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Name {
    Record(u64),
    New(u64, u128),
}

impl Name {
    pub(super) fn parse(name: &str) -> Option<Name> {
        let (digits, rest) = name.strip_prefix(PREFIX)?.split_at_checked(DIGITS)?;
        if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
            return None;
        }
        let number = digits.parse().ok()?;
        if rest.is_empty() {
            return Some(Name::Record(number));
        }
        let id = unhex(rest.strip_prefix('.')?.strip_suffix(NEW)?)?;
        Some(Name::New(number, u128::from_be_bytes(id)))
    }

    pub(super) fn text(self) -> String {
        match self {
            Name::Record(number) => record(number),
            Name::New(number, id) => new_record(number, id),
        }
    }
}

/// What is in a directory at one time.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// The highest number that a record has.
    pub(super) highest: Option<u64>,
    /// Those that may be removed, records first, the lowest numbers first.
    pub(super) old: BTreeSet<Name>,
}

impl Listing {
    /// Lists a directory. Old are records up to the number `records_to`, and those on their way in
    /// up to `new_to`.
    pub(super) fn of(directory: &Path, records_to: u64, new_to: u64) -> io::Result<Listing> {
        let mut listing = Listing::default();
        for entry in list(directory)? {
            let Some(name) = entry?.file_name().to_str().and_then(Name::parse) else { continue };
            let old = match name {
                Name::Record(number) => {
                    listing.highest = listing.highest.max(Some(number));
                    number <= records_to
                }
                Name::New(number, _) => number <= new_to,
            };
            if old {
                listing.old.insert(name);
            }
            if listing.old.len() > OLD_MAX {
                listing.old.pop_last();
            }
        }
        Ok(listing)
    }
}
