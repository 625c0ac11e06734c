//! What a node with a lease keeps of its own runs: that no other process has the state directory,
//! which incarnations were its own, and that it took part in making a first record.

use std::fs::TryLockError;
use std::path::Path;

use crate::descriptors::NodeFile;
use crate::error::{Error, Result};
use crate::files::sealed::Sealed;
use crate::files::{self, Paths};
use crate::peer::Incarnation;
use crate::report::Condition;

/// Runs that are remembered. A node that could not become the primary for so many starts waits as
/// others do.
const RUNS_MAX: usize = 256;
const ID_BYTES: usize = 16;

const RUNS: Sealed = Sealed {
    magic: *b"repruns\0",
    oldest: 1,
    version: 1,
    max_bytes: (RUNS_MAX * ID_BYTES + 64) as u64,
    cure: "says which runs of this node wrote here; without it the node does not take its own lease \
        over at once, and waits as others do: remove it",
};

const BOOTSTRAPPED: Sealed = Sealed {
    magic: *b"repboots",
    oldest: 1,
    version: 1,
    max_bytes: 64,
    cure: "says that this node took part in making the first record of a lease: see that the record is \
        there, and remove the file",
};

/// Who was here, and who is.
#[derive(Debug)]
pub(crate) struct Tenancy {
    /// The runs of this node, this one among them.
    pub(crate) incarnations: Vec<Incarnation>,
    /// No other process has the state directory, since before anything in it was opened.
    pub(crate) alone: bool,
    pub(crate) bootstrapped: bool,
    /// Held until the process ends, or the node.
    _lock: NodeFile,
}

impl Tenancy {
    /// Enters this run, durably. Blocks.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Newer`], [`Error::Io`].
    pub(crate) fn enter(paths: &Paths, me: Incarnation) -> Result<Tenancy> {
        let (lock, alone) = lock_file(&paths.process_lock())?;
        let path = paths.runs();
        let mut incarnations = match RUNS.read(&path) {
            Ok(fields) => decode(&fields.unwrap_or_default()),
            Err(error @ Error::Corrupt { .. }) => {
                Condition::RunsForgotten { error: &error }.say();
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        incarnations.push(me);
        let excess = incarnations.len().saturating_sub(RUNS_MAX);
        incarnations.drain(..excess);
        RUNS.replace(&path, &encode(&incarnations))?;
        let bootstrapped = BOOTSTRAPPED.read(&paths.bootstrapped())?.is_some();
        Ok(Tenancy { incarnations, alone, bootstrapped, _lock: lock })
    }
}

/// This node takes part in making a first record, durably.
pub(crate) fn mark_bootstrapped(paths: &Paths) -> Result<()> {
    BOOTSTRAPPED.replace(&paths.bootstrapped(), &[])
}

/// A lock that belongs to an open file: it ends with the process, however that ends.
fn lock_file(path: &Path) -> Result<(NodeFile, bool)> {
    let (file, _) = files::open_or_create(path)?;
    match file.try_lock() {
        Ok(()) => Ok((file, true)),
        Err(TryLockError::WouldBlock) => Ok((file, false)),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
    }
}

fn encode(incarnations: &[Incarnation]) -> Vec<u8> {
    incarnations.iter().flat_map(|run| run.as_u128().to_be_bytes()).collect()
}

fn decode(fields: &[u8]) -> Vec<Incarnation> {
    let (ids, _) = fields.as_chunks::<ID_BYTES>();
    ids.iter().map(|id| Incarnation::from_u128(u128::from_be_bytes(*id))).collect()
}

/// The id of this boot of the machine; empty where the system has none.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(number: u128) -> Incarnation {
        Incarnation::from_u128(number)
    }

    #[test]
    fn runs_are_remembered_newest_last_and_a_second_process_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let one = Tenancy::enter(&paths, run(1)).unwrap();
        assert!(one.alone && !one.bootstrapped);
        let two = Tenancy::enter(&paths, run(2)).unwrap();
        assert!(!two.alone, "the first one has the lock");
        assert_eq!(two.incarnations, [run(1), run(2)]);
        drop((one, two));
        mark_bootstrapped(&paths).unwrap();
        let three = Tenancy::enter(&paths, run(3)).unwrap();
        assert!(three.alone && three.bootstrapped);
        for number in 4..1000 {
            RUNS.replace(&paths.runs(), &encode(&[run(number); RUNS_MAX])).unwrap();
        }
        let last = Tenancy::enter(&paths, run(1000)).unwrap();
        assert_eq!((last.incarnations.len(), last.incarnations.last()), (RUNS_MAX, Some(&run(1000))));
    }

    #[test]
    fn a_damaged_list_counts_as_none_and_a_newer_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        drop(Tenancy::enter(&paths, run(1)).unwrap());
        let mut bytes = std::fs::read(paths.runs()).unwrap();
        bytes[14] ^= 1;
        std::fs::write(paths.runs(), &bytes).unwrap();
        assert_eq!(Tenancy::enter(&paths, run(2)).unwrap().incarnations, [run(2)]);
        std::fs::write(paths.runs(), Sealed { version: 9, ..RUNS }.seal(b"")).unwrap();
        assert!(matches!(Tenancy::enter(&paths, run(3)), Err(Error::Newer { found: 9, .. })));
    }
}
