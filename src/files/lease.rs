//! What a node that may lead by a lease keeps of others in its state directory.
//!
//! - `heard` is a sealed file, `repheard`, of version 1. Its field: the highest epoch number that
//!   was heard of, 8.
//! - `lease-clock` is a sealed file, `repclock`, of version 1. Its fields: epoch 16, microseconds
//!   of that epoch's lease clock 8, position 40.

use std::path::Path;
use std::time::Duration;

use crate::context::{ClockPair, EpochsHeard, LeaseContext, SyncedClock, ToDisk};
use crate::error::Result;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::files::sealed::{CHECK_BYTES, HEAD_BYTES, Sealed};
use crate::files::{self, Paths};
use crate::report::Condition;
use crate::txid::{Epoch, NUMBER_MAX, Position};

const HEARD: Sealed = Sealed {
    magic: *b"repheard",
    oldest: 1,
    version: 1,
    max_bytes: (HEAD_BYTES + 8 + CHECK_BYTES) as u64,
    cure: "says of which epochs this node has heard, so that it follows and serves no older one: remove \
        it when no older primary runs any more",
};

const CLOCK: Sealed = Sealed {
    magic: *b"repclock",
    oldest: 1,
    version: 1,
    max_bytes: (HEAD_BYTES + PAIR_BYTES + CHECK_BYTES) as u64,
    cure: "says how old this node's state was when it was synced last; without it the node may not \
        become the primary by itself before it has followed one",
};

/// Bytes of the fields of a pair.
const PAIR_BYTES: usize = Epoch::BYTES + 8 + Position::BYTES;

/// What is kept of others, and will be. A node takes over when it lags by no more than
/// `failover_loss`. Blocks.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Newer`] and [`Error::Io`] for `heard`. Without it a node could
/// serve an epoch that it was told is over. A pair that can't be read counts as none, which is
/// told.
///
/// [`Error::Corrupt`]: crate::Error::Corrupt
/// [`Error::Newer`]: crate::Error::Newer
/// [`Error::Io`]: crate::Error::Io
pub(crate) fn open(paths: &Paths, failover_loss: Duration) -> Result<LeaseContext> {
    let number = read_heard(paths)?;
    let pair = read_clock(paths).unwrap_or_else(|error| {
        Condition::LeaseClockUnreadable { error: &error }.say();
        None
    });
    let heard = paths.clone();
    let heard = EpochsHeard::new(
        number,
        ToDisk::new(move |number: u64| HEARD.replace(&heard.heard(), &number.to_le_bytes())),
    );
    let clock = paths.clone();
    let keep = ToDisk::new(move |pair| write_clock(&clock, pair));
    Ok(LeaseContext::leased(SyncedClock::new(pair, failover_loss, keep), heard))
}

/// 0: no file is there.
fn read_heard(paths: &Paths) -> Result<u64> {
    let path = paths.heard();
    let Some(fields) = HEARD.read(&path)? else { return Ok(0) };
    decode_heard(&path, &fields)
}

fn decode_heard(path: &Path, fields: &[u8]) -> Result<u64> {
    let number = fields.try_into().map(u64::from_le_bytes).ok().filter(|number| *number <= NUMBER_MAX);
    number.ok_or_else(|| HEARD.corrupt(path, "it names no epoch number"))
}

fn read_clock(paths: &Paths) -> Result<Option<ClockPair>> {
    let path = paths.lease_clock();
    CLOCK.read(&path)?.map(|fields| decode_clock(&path, &fields)).transpose()
}

fn decode_clock(path: &Path, fields: &[u8]) -> Result<ClockPair> {
    let pair = || {
        let (epoch, rest) = fields.split_first_chunk()?;
        let (clock, rest) = rest.split_first_chunk()?;
        let position = rest.try_into().ok()?;
        Some(ClockPair {
            epoch: Epoch::from_bytes(epoch)?,
            clock: Duration::from_micros(u64::from_le_bytes(*clock)),
            position: Position::from_bytes(position)?,
        })
    };
    pair().ok_or_else(|| CLOCK.corrupt(path, "it is no time and position"))
}

fn write_clock(paths: &Paths, pair: Option<ClockPair>) -> Result<()> {
    let path = paths.lease_clock();
    match pair {
        Some(pair) => CLOCK.replace(&path, &encode_clock(&pair)),
        None => files::remove(&path).and_then(|_| files::sync_name(&path)),
    }
}

fn encode_clock(pair: &ClockPair) -> Vec<u8> {
    let clock = (pair.clock.as_micros() as u64).to_le_bytes();
    [pair.epoch.to_bytes().as_slice(), &clock, &pair.position.to_bytes()].concat()
}

/// Reads bytes as such files, as they are and before a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_lease(data: &[u8]) {
    let path = Path::new("lease");
    let sealed = [data, &check_of(data)].concat();
    for bytes in [data, &sealed] {
        if let Ok(fields) = CLOCK.decode(path, bytes)
            && let Ok(pair) = decode_clock(path, fields)
        {
            assert_eq!(encode_clock(&pair), fields);
        }
        if let Ok(fields) = HEARD.decode(path, bytes) {
            let _ = decode_heard(path, fields);
        }
    }
}

#[cfg(test)]
pub(crate) fn fuzz_lease_seeds() -> [(&'static str, Vec<u8>); 2] {
    let whole = [HEARD.seal(&7u64.to_le_bytes()), CLOCK.seal(&encode_clock(&tests::pair()))];
    let [heard, clock] = whole.map(|whole| whole[..whole.len() - CHECK_BYTES].to_vec());
    [("heard", heard), ("lease-clock", clock)]
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::checksum::Checksum;
    use crate::error::Error;
    use crate::hex::{hex, unhex_lossy};
    use crate::txid::Txid;

    const LOSS: Duration = Duration::from_secs(10);

    pub(super) fn pair() -> ClockPair {
        let epoch = Epoch::new(3, 4);
        let position = Position::new(Txid::new(Epoch::new(2, 5), 6), Checksum::from_u128(7));
        ClockPair { epoch, clock: Duration::from_micros(0x0102_0304), position }
    }

    /// Epoch number 7 was heard of.
    const HEARD_BYTES: &str = "7265706865617264010000000700000000000000c19dcbebbd2b0ae2d94dfaa8a8172f69";
    /// At 0x01020304 microseconds of epoch 3 on branch 4 the primary was at transaction 6 of epoch
    /// 2.
    const CLOCK_BYTES: &str = concat!(
        "726570636c6f636b01000000030000000000000004000000000000000403020100000000020000000000000005",
        "00000000000000060000000000000007000000000000000000000000000000ad739cc4cd089b3c67ed65d7ab07dd24",
    );

    #[test]
    fn the_files_bytes_stay_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        fs::write(paths.heard(), unhex_lossy(HEARD_BYTES)).unwrap();
        fs::write(paths.lease_clock(), unhex_lossy(CLOCK_BYTES)).unwrap();
        let lease = open(&paths, LOSS).unwrap();
        assert_eq!((lease.heard.number(), lease.synced.get()), (7, Some(pair())));
        fs::remove_file(paths.heard()).unwrap();
        fs::remove_file(paths.lease_clock()).unwrap();
        let lease = open(&paths, LOSS).unwrap();
        assert_eq!((lease.heard.number(), lease.synced.get()), (0, None));
        assert!(lease.heard.note(7).unwrap());
        lease.synced.set(Some(pair()));
        lease.synced.keep().unwrap();
        assert_eq!(hex(&fs::read(paths.heard()).unwrap()), HEARD_BYTES);
        assert_eq!(hex(&fs::read(paths.lease_clock()).unwrap()), CLOCK_BYTES);
    }

    #[test]
    fn what_is_kept_is_there_after_a_restart_and_never_falls() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let lease = open(&paths, LOSS).unwrap();
        for (number, new) in [(5, true), (4, false), (5, false), (9, true), (1, false)] {
            assert_eq!(lease.heard.note(number).unwrap(), new, "{number}");
            assert_eq!(open(&paths, LOSS).unwrap().heard.number(), lease.heard.number());
        }
        lease.synced.set(Some(pair()));
        lease.synced.keep().unwrap();
        assert_eq!(open(&paths, LOSS).unwrap().synced.get(), Some(pair()));
        lease.synced.set(None);
        lease.synced.keep().unwrap();
        assert!(!paths.lease_clock().exists());
    }

    /// A number that is not on the disk is not heard: no one acts on it.
    #[test]
    fn a_number_that_finds_no_disk_is_not_heard() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let lease = open(&paths, LOSS).unwrap();
        fs::remove_dir_all(paths.state_dir()).unwrap();
        let seen = lease.heard.watch();
        assert!(matches!(lease.heard.note(5), Err(Error::Io { .. })));
        assert_eq!(lease.heard.number(), 0);
        assert!(!seen.has_changed().unwrap());
    }

    #[test]
    fn a_damaged_pair_counts_as_none_and_a_damaged_number_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let lease = open(&paths, LOSS).unwrap();
        lease.heard.note(7).unwrap();
        lease.synced.set(Some(pair()));
        lease.synced.keep().unwrap();
        let whole = [paths.heard(), paths.lease_clock()].map(|path| (fs::read(&path).unwrap(), path));
        for (at, (bytes, path)) in whole.iter().enumerate() {
            let cuts = (0..bytes.len()).map(|cut| bytes[..cut].to_vec());
            let flips = (0..bytes.len()).map(|flip| {
                let mut flipped = bytes.clone();
                flipped[flip] ^= 4;
                flipped
            });
            let long = std::iter::once([bytes.as_slice(), b"x"].concat());
            for damaged in cuts.chain(flips).chain(long) {
                fs::write(path, &damaged).unwrap();
                let opened = open(&paths, LOSS);
                match at {
                    0 => assert!(matches!(opened, Err(Error::Corrupt { .. })), "{opened:?}"),
                    _ => assert_eq!(opened.unwrap().synced.get(), None),
                }
                if at == 1 {
                    assert!(matches!(read_clock(&paths), Err(Error::Corrupt { .. })), "it is typed");
                }
            }
            fs::write(path, bytes).unwrap();
        }
        // A number beyond all numbers, and fields of other lengths, after a hash that holds.
        HEARD.replace(&paths.heard(), &u64::MAX.to_le_bytes()).unwrap();
        assert!(matches!(open(&paths, LOSS), Err(Error::Corrupt { .. })));
        fs::write(paths.heard(), Sealed { version: 2, ..HEARD }.seal(b"")).unwrap();
        assert!(matches!(open(&paths, LOSS), Err(Error::Newer { found: 2, .. })));
        CLOCK.replace(&paths.lease_clock(), &[0; PAIR_BYTES - 1]).unwrap();
        assert!(matches!(read_clock(&paths), Err(Error::Corrupt { .. })));
    }
}
