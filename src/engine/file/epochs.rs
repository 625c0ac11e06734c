//! The epoch history of a database, kept beside it. The node replaces it by rename.

use crate::checksum::Fingerprint;
use crate::error::Result;
use crate::files::Paths;
use crate::files::sealed::Sealed;
use crate::txid::{Epoch, EpochHistory};

const SEALED: Sealed = Sealed {
    magic: *b"repepoch",
    oldest: 2,
    version: 2,
    // A full history and its frame.
    max_bytes: (EpochHistory::MAX * EpochHistory::ENTRY_BYTES + 64) as u64,
    cure: "says which transactions are of which epoch; it is put aside as `epochs.corrupt`, and made good \
        from the log at the next start",
};

/// The epochs of a database's history, and whether this node opened the newest one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Epochs {
    pub(crate) history: EpochHistory,
    pub(crate) own: bool,
}

/// Reads the epoch history; empty when there is none, or when its checksums are of another page
/// key.
pub(crate) fn read_epochs(paths: &Paths, key: Fingerprint) -> Result<Epochs> {
    match read(paths)? {
        Some((of, epochs)) if of == key => Ok(epochs),
        _ => Ok(Epochs::default()),
    }
}

/// Which page key the epoch history goes with, if there is one that can be read.
pub(crate) fn key_of_epochs(paths: &Paths) -> Option<Fingerprint> {
    read(paths).ok()?.map(|(key, _)| key)
}

fn read(paths: &Paths) -> Result<Option<(Fingerprint, Epochs)>> {
    let path = paths.epochs();
    let Some(fields) = SEALED.read(&path)? else { return Ok(None) };
    let corrupt = |what: &str| SEALED.corrupt(&path, what);
    let (own, rest) = fields.split_first_chunk::<4>().ok_or_else(|| corrupt("too short"))?;
    let (key, history) = rest.split_first_chunk().ok_or_else(|| corrupt("too short"))?;
    let own = match u32::from_le_bytes(*own) {
        own @ 0..2 => own == 1,
        _ => return Err(corrupt("it does not say whose its newest epoch is")),
    };
    Ok(Some((Fingerprint(*key), Epochs { history: EpochHistory::decode(history).map_err(corrupt)?, own })))
}

/// The newest epoch of the history, if that can be read.
pub(crate) fn newest_epoch(paths: &Paths, key: Fingerprint) -> Option<Epoch> {
    read_epochs(paths, key).ok()?.history.last().map(|start| start.epoch)
}

/// Replaces the epoch history, durably. `own`: this node opened the newest epoch.
pub(crate) fn write_epochs(
    (paths, key): (&Paths, Fingerprint),
    history: &EpochHistory,
    own: bool,
) -> Result<()> {
    write_epochs_when((paths, key), history, own, || Ok(()))
}

/// The same, but the history before stands until `ready` says so. It may be asked twice.
pub(crate) fn write_epochs_when(
    (paths, key): (&Paths, Fingerprint),
    history: &EpochHistory,
    own: bool,
    ready: impl Fn() -> Result<()>,
) -> Result<()> {
    let fields = [&u32::from(own).to_le_bytes()[..], &key.0, &history.encode()].concat();
    SEALED.replace_when(&paths.epochs(), &fields, ready)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checksum::Checksum;
    use crate::engine::tests::KEY;
    use crate::error::Error;
    use crate::hex::{hex, unhex_lossy};
    use crate::txid::EpochStart;

    #[test]
    fn a_newer_epoch_history_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let bytes = Sealed { version: 3, ..SEALED }.seal(b"what only a newer version knows");
        fs::write(paths.epochs(), &bytes).unwrap();
        assert!(matches!(
            read_epochs(&paths, KEY.fingerprint()),
            Err(Error::Newer { found: 3, supported: 2, .. })
        ));
        assert_eq!(fs::read(paths.epochs()).unwrap(), bytes);
    }

    /// The file of a history of one epoch, which the node opened itself.
    const BYTES: &str = concat!(
        "72657065706f63680200000001000000879da2dd53acbf762fed258221cda48f0100000001000000000000000200",
        "000000000000030000000000000005000000000000000000000000000000b99f8aff252515b53774ccbdf045a0ce",
    );

    #[test]
    fn the_files_bytes_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let path = paths.epochs();
        let mut history = EpochHistory::default();
        history.push(EpochStart { epoch: Epoch::new(1, 2), first: 3, before: Checksum::from_u128(5) });
        fs::write(&path, unhex_lossy(BYTES)).unwrap();
        assert_eq!(
            read_epochs(&paths, KEY.fingerprint()).unwrap(),
            Epochs { history: history.clone(), own: true }
        );
        write_epochs((&paths, KEY.fingerprint()), &history, true).unwrap();
        assert_eq!(hex(&fs::read(&path).unwrap()), BYTES);
    }

    #[test]
    fn the_epoch_history_survives_and_every_flipped_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        assert_eq!(read_epochs(&paths, KEY.fingerprint()).unwrap(), Epochs::default());
        let mut history = EpochHistory::default();
        history.push(EpochStart { epoch: Epoch::new(1, 2), first: 3, before: Checksum::EMPTY });
        for own in [false, true] {
            write_epochs((&paths, KEY.fingerprint()), &history, own).unwrap();
            assert_eq!(
                read_epochs(&paths, KEY.fingerprint()).unwrap(),
                Epochs { history: history.clone(), own }
            );
        }
        let path = paths.epochs();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert!(
                matches!(read_epochs(&paths, KEY.fingerprint()), Err(Error::Corrupt { .. })),
                "byte {at}"
            );
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read_epochs(&paths, KEY.fingerprint()).is_err(), "cut at {at}");
        }
    }
}
