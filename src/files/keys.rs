//! `database-keys`: what the pages and the tokens of the database are keyed with.
//!
//! A sealed file, `repdbkey`, of version 1. Its fields: page key 28, token key 32. Its mode is 0600
//! whatever the database's is: who may read the database need not be able to make tokens.

use std::path::Path;

use crate::checksum::{PAGE_KEY_BYTES, PageKey};
use crate::error::{Error, Result};
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::files::sealed::{CHECK_BYTES, HEAD_BYTES, Sealed};
use crate::files::{self, PRIVATE, Paths, set_mode};
use crate::keys::{DatabaseKeys, TOKEN_KEY_BYTES, TokenKey};

const KEYS: Sealed = Sealed {
    magic: *b"repdbkey",
    oldest: 1,
    version: 1,
    max_bytes: (HEAD_BYTES + FIELDS_BYTES + CHECK_BYTES) as u64,
    cure: "has the keys of this database, which all of its nodes have: move it away, and a node takes them \
        from the primary that it follows, and a primary that is fixed by configuration takes them from a \
        replica that connects in time",
};
const FIELDS_BYTES: usize = PAGE_KEY_BYTES + TOKEN_KEY_BYTES;

/// Reads the keys; `None` when there are none.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Newer`], [`Error::Io`].
pub(crate) fn read(paths: &Paths) -> Result<Option<DatabaseKeys>> {
    let path = paths.database_keys();
    let Some(fields) = KEYS.read(&path)? else { return Ok(None) };
    // Somebody may have copied it with other rights.
    let file = files::open(&path).map_err(Error::io("open", &path))?;
    set_mode(&file, &path, PRIVATE)?;
    decode(&path, &fields).map(Some)
}

/// Replaces the keys, durably. Nothing may be hashed with them before.
///
/// # Errors
/// [`Error::Io`]: the keys before stand.
pub(crate) fn write(paths: &Paths, keys: &DatabaseKeys) -> Result<()> {
    let path = paths.database_keys();
    KEYS.replace(&path, &encode(keys))
}

fn encode(keys: &DatabaseKeys) -> Vec<u8> {
    [&keys.page.to_bytes()[..], &keys.token.to_bytes()].concat()
}

fn decode(path: &Path, fields: &[u8]) -> Result<DatabaseKeys> {
    let keys = || {
        let (page, token) = fields.split_first_chunk()?;
        let token = TokenKey::from_bytes(token.try_into().ok()?);
        Some(DatabaseKeys { page: PageKey::from_bytes(*page), token })
    };
    keys().ok_or_else(|| KEYS.corrupt(path, "it does not have two keys"))
}

/// Reads bytes as such a file, as they are and before a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_keys(data: &[u8]) {
    let path = Path::new("database-keys");
    let sealed = [data, &check_of(data)].concat();
    for bytes in [data, &sealed] {
        if let Ok(fields) = KEYS.decode(path, bytes)
            && let Ok(keys) = decode(path, fields)
        {
            assert_eq!(encode(&keys), fields);
        }
    }
}

#[cfg(test)]
pub(crate) fn fuzz_keys_seed() -> Vec<u8> {
    let whole = KEYS.seal(&encode(&DatabaseKeys::fixed(7)));
    whole[..whole.len() - CHECK_BYTES].to_vec()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn keys_come_back_for_their_owner_alone_and_every_flipped_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        assert_eq!(read(&paths).unwrap(), None);
        fs::write(paths.database(), "").unwrap();
        #[cfg(unix)]
        fs::set_permissions(paths.database(), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        for keys in [DatabaseKeys::fixed(3), DatabaseKeys::random().unwrap()] {
            write(&paths, &keys).unwrap();
            assert_eq!(read(&paths).unwrap(), Some(keys));
        }
        let path = paths.database_keys();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(), 0o600);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            read(&paths).unwrap();
            assert_eq!(mode(), 0o600, "as somebody copied it");
        }
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(read(&paths), Err(Error::Corrupt { .. })), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read(&paths).is_err(), "cut at {at}");
        }
    }
}
