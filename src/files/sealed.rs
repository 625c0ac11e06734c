//! Small files that say what they are and carry a hash of all that they hold.
//!
//! Bytes: a magic of 8, the version as `u32`, the fields, then the first 16 bytes of BLAKE3 over
//! all that stands before them. Numbers are little-endian. Such a file is replaced by rename.

use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{self, replace_file, replace_file_when};
use crate::wal::le_u32;

/// Bytes before the fields: magic and version.
pub(crate) const HEAD_BYTES: usize = 8 + 4;
/// Bytes of the hash after the fields.
pub(crate) const CHECK_BYTES: usize = 16;

/// A kind of sealed file.
#[derive(Debug)]
pub(crate) struct Sealed {
    pub(crate) magic: [u8; 8],
    /// The oldest version that is read.
    pub(crate) oldest: u32,
    /// The newest version that is read, and the one that is written.
    pub(crate) version: u32,
    /// The most bytes that are read of such a file.
    pub(crate) max_bytes: u64,
    /// What to do about one that is corrupt: see [`Error::Corrupt`].
    pub(crate) cure: &'static str,
}

/// Why bytes are no such file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unsealed {
    Damaged(&'static str),
    /// A later version wrote them.
    Newer(u32),
    /// An earlier version wrote them, which is not read any more.
    Older(u32),
}

impl Sealed {
    /// The bytes of a whole file.
    pub(crate) fn seal(&self, fields: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + fields.len() + CHECK_BYTES);
        bytes.extend_from_slice(&self.magic);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(fields);
        bytes.extend_from_slice(&check_of(&bytes));
        bytes
    }

    /// The fields of a whole file.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], Unsealed> {
        let short = Unsealed::Damaged("too short");
        let (sealed, check) = bytes.split_last_chunk::<CHECK_BYTES>().ok_or(short)?;
        let (head, fields) = sealed.split_at_checked(HEAD_BYTES).ok_or(short)?;
        if check_of(sealed) != *check || head[..8] != self.magic {
            return Err(Unsealed::Damaged("its checksum does not match"));
        }
        match le_u32(&head[8..]) {
            newer if newer > self.version => Err(Unsealed::Newer(newer)),
            older if older < self.oldest => Err(Unsealed::Older(older)),
            _ => Ok(fields),
        }
    }

    /// The fields of a whole file that was read from `path`.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Newer`], [`Error::Older`].
    pub(crate) fn decode<'a>(&self, path: &Path, bytes: &'a [u8]) -> Result<&'a [u8]> {
        if bytes.len() as u64 > self.max_bytes {
            return Err(self.corrupt(path, "too long"));
        }
        self.open(bytes).map_err(|why| self.refused(path, why))
    }

    /// The error for bytes at `path` that are no such file.
    pub(crate) fn refused(&self, path: &Path, why: Unsealed) -> Error {
        let path = path.to_path_buf();
        match why {
            Unsealed::Damaged(what) => self.corrupt(&path, what),
            Unsealed::Newer(found) => Error::Newer { path, found, supported: self.version },
            Unsealed::Older(found) => Error::Older { path, found, supported: self.oldest },
        }
    }

    /// Reads a file's fields; `None` when it is not there.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Newer`], [`Error::Older`], [`Error::Io`].
    pub(crate) fn read(&self, path: &Path) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        match files::open(path) {
            // One byte more than it may have is enough to see that it is none of ours.
            Ok(file) => file.take(self.max_bytes + 1).read_to_end(&mut bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("open", path)(error)),
        }
        .map_err(Error::io("read", path))?;
        self.decode(path, &bytes).map(|fields| Some(fields.to_vec()))
    }

    /// Replaces a file, durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn replace(&self, path: &Path, fields: &[u8]) -> Result<()> {
        replace_file(path, &self.seal(fields))
    }

    /// The same, but nothing is replaced before `ready` says so. It may be asked twice.
    ///
    /// # Errors
    /// [`Error::Io`], and what `ready` says.
    pub(crate) fn replace_when(
        &self,
        path: &Path,
        fields: &[u8],
        ready: impl Fn() -> Result<()>,
    ) -> Result<()> {
        replace_file_when(path, &self.seal(fields), ready)
    }

    /// The error for such a file whose fields make no sense.
    pub(crate) fn corrupt(&self, path: &Path, what: &str) -> Error {
        Error::Corrupt { path: path.to_path_buf(), offset: 0, what: what.into(), cure: self.cure }
    }
}

/// The hash that stands after these bytes.
pub(crate) fn check_of(bytes: &[u8]) -> [u8; CHECK_BYTES] {
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&blake3::hash(bytes).as_bytes()[..CHECK_BYTES]);
    check
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const KIND: Sealed =
        Sealed { magic: *b"reptests", oldest: 1, version: 2, max_bytes: 40, cure: "is of a test" };

    #[test]
    fn every_flipped_or_missing_byte_is_seen() {
        let whole = KIND.seal(b"fields");
        assert_eq!(KIND.open(&whole), Ok(&b"fields"[..]));
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            assert!(matches!(KIND.open(&flipped), Err(Unsealed::Damaged(_))), "byte {at}");
            assert!(matches!(KIND.open(&whole[..at]), Err(Unsealed::Damaged(_))), "cut at {at}");
        }
        let other = Sealed { magic: *b"repother", ..KIND };
        assert!(matches!(other.open(&whole), Err(Unsealed::Damaged(_))));
    }

    #[test]
    fn an_older_version_is_read_and_a_newer_one_is_named() {
        let of = |version| Sealed { version, ..KIND }.seal(b"");
        assert!(KIND.open(&of(1)).is_ok());
        assert_eq!(KIND.open(&of(3)), Err(Unsealed::Newer(3)));
        let since = Sealed { oldest: 2, ..KIND };
        assert_eq!(since.open(&of(1)), Err(Unsealed::Older(1)));
        assert!(since.open(&of(2)).is_ok());
    }

    #[test]
    fn a_file_is_read_as_far_as_one_may_be_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        assert!(KIND.read(&path).unwrap().is_none());
        for length in [0, 12] {
            fs::write(&path, KIND.seal(&vec![7; length])).unwrap();
            assert_eq!(KIND.read(&path).unwrap().unwrap(), vec![7; length]);
        }
        fs::write(&path, KIND.seal(&[7; 13])).unwrap();
        let why = KIND.read(&path).unwrap_err().to_string();
        assert!(why.contains("too long") && why.contains("is of a test"), "{why}");
        KIND.replace(&path, b"new").unwrap();
        assert_eq!(KIND.read(&path).unwrap().unwrap(), b"new");
    }
}
