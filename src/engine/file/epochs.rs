//! The epoch history of a database, kept beside it. It is replaced by rename.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{self, replace_file};
use crate::txid::EpochHistory;
use crate::wal::le_u32;

const MAGIC: [u8; 8] = *b"repepoch";
const VERSION: u32 = 1;
/// Largest epochs file that is read: a full history and its frame.
const MAX_BYTES: u64 = (EpochHistory::MAX * EpochHistory::ENTRY_BYTES + 64) as u64;

/// The epochs of a database's history, and whether this node opened the newest one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Epochs {
    pub(crate) history: EpochHistory,
    pub(crate) own: bool,
}

/// Reads the epoch history; empty when there is none.
pub(crate) fn read_epochs(side: &Path) -> Result<Epochs> {
    let path = side.join("epochs");
    let mut bytes = Vec::new();
    match files::open(&path) {
        Ok(file) => file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", &path))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Epochs::default()),
        Err(e) => return Err(Error::io("open", &path)(e)),
    };
    let cure = "says which transactions are of which epoch; it is put aside as `epochs.corrupt`, and made good from the log at the next start";
    let corrupt = |what: &str| Error::Corrupt { path: path.clone(), offset: 0, what: what.into(), cure };
    let (body, check) = bytes.split_last_chunk::<16>().ok_or_else(|| corrupt("too short"))?;
    if blake3::hash(body).as_bytes()[..16] != *check || body.len() < 12 || body[..8] != MAGIC {
        return Err(corrupt("its checksum does not match"));
    }
    let version = le_u32(&body[8..12]);
    if version > VERSION {
        return Err(Error::Newer { path, found: version, supported: VERSION });
    }
    let own = match body.get(12..16).map(le_u32) {
        Some(own @ 0..2) => own == 1,
        _ => return Err(corrupt("too short")),
    };
    Ok(Epochs { history: EpochHistory::decode(&body[16..]).map_err(corrupt)?, own })
}

/// Replaces the epoch history, durably. `own`: this node opened the newest epoch.
pub(crate) fn write_epochs(side: &Path, history: &EpochHistory, own: bool) -> Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&u32::from(own).to_le_bytes());
    bytes.extend_from_slice(&history.encode());
    let check = blake3::hash(&bytes);
    bytes.extend_from_slice(&check.as_bytes()[..16]);
    replace_file(side, "epochs", &bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{Epoch, EpochStart};

    #[test]
    fn a_newer_epoch_history_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&(VERSION + 1).to_le_bytes());
        bytes.extend_from_slice(b"what only a newer version knows");
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..16]);
        fs::write(dir.path().join("epochs"), &bytes).unwrap();
        assert!(matches!(read_epochs(dir.path()), Err(Error::Newer { found: 2, supported: 1, .. })));
        assert_eq!(fs::read(dir.path().join("epochs")).unwrap(), bytes);
    }

    #[test]
    fn the_epoch_history_survives_and_every_flipped_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_epochs(dir.path()).unwrap(), Epochs::default());
        let mut history = EpochHistory::default();
        history.push(EpochStart { epoch: Epoch::new(1, 2), first: 3, before: Checksum::EMPTY });
        for own in [false, true] {
            write_epochs(dir.path(), &history, own).unwrap();
            assert_eq!(read_epochs(dir.path()).unwrap(), Epochs { history: history.clone(), own });
        }
        let path = dir.path().join("epochs");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(read_epochs(dir.path()), Err(Error::Corrupt { .. })), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read_epochs(dir.path()).is_err(), "cut at {at}");
        }
    }
}
