//! One file: a line of the store's own, and the record.
//!
//! ```text
//! replite-lease 1 00000000000000000042 <id, 32 hex digits> <the id before it> \n
//! <the record>
//! ```
//!
//! The id is random. No two files have one, also where a directory was emptied and begins with the
//! first number again. The first of a directory has no file before it: 32 zeros.

use std::fs;
use std::io;
use std::path::Path;

use super::names;
use crate::files;
use crate::hex::{hex, unhex};
use crate::lease::record::RECORD_MAX_BYTES;
use crate::lease::store::Version;

const MAGIC: &str = "replite-lease 1";
/// Bytes of the first line: three spaces, and its end.
const LINE_BYTES: usize = MAGIC.len() + 20 + 2 * 32 + 4;

/// A file of the register.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    pub(super) number: u64,
    pub(super) id: u128,
    /// The id of the file that this one took the place of.
    pub(super) after: u128,
    pub(super) record: Vec<u8>,
    pub(super) version: Version,
}

/// Why there is no entry.
#[derive(Debug)]
pub(super) enum NoEntry {
    /// There is no such file, or not any more.
    Gone,
    /// What has the name is none of ours, or can't be read.
    Bad(String),
}

impl Entry {
    pub(super) fn new(number: u64, id: u128, after: u128, record: &[u8]) -> Entry {
        // What is in the file counts, whatever its name: somebody may have edited it.
        let hash = hex(&blake3::hash(record).as_bytes()[..16]);
        let version = Version::new(format!("{number}-{id:032x}-{hash}"));
        Entry { number, id, after, record: record.to_vec(), version }
    }

    /// The bytes of its file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let Entry { number, id, after, record, .. } = self;
        let mut bytes = format!("{MAGIC} {number:020} {id:032x} {after:032x}\n").into_bytes();
        bytes.extend_from_slice(record);
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Entry> {
        let (line, record) = bytes.split_at_checked(LINE_BYTES)?;
        let line = std::str::from_utf8(line).ok()?.strip_prefix(MAGIC)?.strip_prefix(' ')?;
        let fields: [&str; 3] = line.strip_suffix('\n')?.split(' ').collect::<Vec<_>>().try_into().ok()?;
        let id = |text| unhex(text).map(u128::from_be_bytes);
        Some(Entry::new(fields[0].parse().ok()?, id(fields[1])?, id(fields[2])?, record))
    }

    /// Reads the file of this number.
    pub(super) fn read(directory: &Path, number: u64) -> Result<Entry, NoEntry> {
        let path = directory.join(names::record(number));
        let bad = |what: String| NoEntry::Bad(format!("{}: {what}", path.display()));
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => NoEntry::Gone,
            _ => bad(error.to_string()),
        };
        let meta = fs::symlink_metadata(&path).map_err(failed)?;
        // To open a pipe would wait for a writer. A link is not followed: the next line says it.
        if !meta.is_file() && !meta.is_symlink() {
            return Err(bad("it is no file: remove it".into()));
        }
        let most = LINE_BYTES + RECORD_MAX_BYTES;
        let bytes = files::read(&path, most as u64 + 1).map_err(failed)?;
        if bytes.len() > most {
            return Err(bad("it is longer than any record: remove it".into()));
        }
        let entry = Entry::decode(&bytes).filter(|entry| entry.number == number);
        entry.ok_or_else(|| bad("replite did not write this record under this name: remove it".into()))
    }
}
