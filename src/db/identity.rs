//! Which node a state directory belongs to.
//!
//! `node` is a sealed file, `repnodid`, of version 1. Its fields: node id (UUID v7) 16, device 8
//! and inode 8 of the directory, then cluster and database, each after its length (`u16`).

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
#[cfg(test)]
use crate::files::sealed::CHECK_BYTES;
use crate::files::sealed::Sealed;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::files::{Inode, Paths};
use crate::peer::NodeId;
use crate::report::Condition;

const SEALED: Sealed = Sealed {
    magic: *b"repnodid",
    oldest: 1,
    version: 1,
    max_bytes: 1024,
    cure: "says which node this is, and no more than that: remove it, and the node gets a new id",
};
/// Where a database's name comes from.
const OF_FILE: &str = "the name is the file's without its extension if that is not set";
/// Fields before the names.
const FIXED_BYTES: usize = 16 + 8 + 8;

/// Reads the node's id, or makes one: at the first start, and when the directory is a copy of
/// another node's.
pub(super) fn node_id(paths: &Paths, cluster: &str, database: &str) -> Result<NodeId> {
    let directory = paths.state_dir();
    let here = place(directory)?;
    let path = paths.node();
    if let Some(fields) = SEALED.read(&path)? {
        let known = decode(&path, &fields)?;
        for (what, theirs, ours, origin) in [
            ("cluster", &known.cluster, cluster, "the name is `default` if that is not set"),
            ("database", &known.database, database, OF_FILE),
        ] {
            if theirs != ours {
                let directory = directory.display();
                return Err(Error::Config(format!(
                    "{directory} belongs to {what} {theirs:?}, not {ours:?}: give that name by \
                     `Config::{what}` ({origin}); or move the directory away, and this is a new node"
                )));
            }
        }
        if known.place == here {
            return Ok(known.id);
        }
        Condition::NodeIdRenewed { directory }.say();
    }
    let id = NodeId::random();
    SEALED.replace(&path, &encode(id, here, cluster, database))?;
    Ok(id)
}

#[derive(Debug)]
struct KnownIdentity {
    id: NodeId,
    place: Inode,
    cluster: String,
    database: String,
}

fn encode(id: NodeId, place: Inode, cluster: &str, database: &str) -> Vec<u8> {
    let mut fields = id.as_bytes().to_vec();
    fields.extend_from_slice(&place.device.to_le_bytes());
    fields.extend_from_slice(&place.number.to_le_bytes());
    for name in [cluster, database] {
        fields.extend_from_slice(&(name.len() as u16).to_le_bytes());
        fields.extend_from_slice(name.as_bytes());
    }
    fields
}

fn decode(path: &Path, fields: &[u8]) -> Result<KnownIdentity> {
    let (fixed, names) =
        fields.split_first_chunk::<FIXED_BYTES>().ok_or_else(|| SEALED.corrupt(path, "too short"))?;
    let long = |at: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&fixed[at..at + 8]);
        u64::from_le_bytes(eight)
    };
    let mut id = [0; 16];
    id.copy_from_slice(&fixed[..16]);
    let mut rest = names;
    let mut name = || -> Option<String> {
        let (length, tail) = rest.split_first_chunk::<2>()?;
        let (name, tail) = tail.split_at_checked(u16::from_le_bytes(*length) as usize)?;
        rest = tail;
        String::from_utf8(name.to_vec()).ok()
    };
    let (Some(cluster), Some(database)) = (name(), name()) else {
        return Err(SEALED.corrupt(path, "its names are cut short"));
    };
    let place = Inode { device: long(16), number: long(24) };
    Ok(KnownIdentity { id: NodeId::from_u128(u128::from_be_bytes(id)), place, cluster, database })
}

/// Reads bytes as such a file, as they are and before a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_identity(data: &[u8]) {
    let path = Path::new("node");
    let sealed = [data, &check_of(data)].concat();
    for bytes in [data, &sealed] {
        if let Ok(known) = SEALED.decode(path, bytes).and_then(|fields| decode(path, fields)) {
            let _ = encode(known.id, known.place, &known.cluster, &known.database);
        }
    }
}

#[cfg(test)]
pub(crate) fn fuzz_identity_seed() -> Vec<u8> {
    let whole = SEALED.seal(&encode(NodeId::from_u128(5), Inode { device: 1, number: 2 }, "main", "app"));
    whole[..whole.len() - CHECK_BYTES].to_vec()
}

/// What tells a directory from its copy. Zeros where there is no such thing.
fn place(directory: &Path) -> Result<Inode> {
    let meta = fs::metadata(directory).map_err(Error::io("stat", directory))?;
    Ok(Inode::of(&meta).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hex::{hex, unhex_lossy};

    #[test]
    fn an_id_stays_with_its_directory_and_not_with_a_copy() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [one, two] = [0, 1].map(|at| Paths::fresh(dirs[at].path()));
        let id = node_id(&one, "c", "d").unwrap();
        assert_eq!(node_id(&one, "c", "d").unwrap(), id);
        fs::copy(one.node(), two.node()).unwrap();
        let copy = node_id(&two, "c", "d").unwrap();
        assert_ne!(copy, id);
        assert_eq!(node_id(&two, "c", "d").unwrap(), copy);
        assert!(matches!(node_id(&one, "other", "d"), Err(Error::Config(_))));
        assert!(matches!(node_id(&one, "c", "other"), Err(Error::Config(_))));
    }

    /// The file of node 5 of cluster "main" and database "app", in inode 2 of device 1.
    const BYTES: &str = concat!(
        "7265706e6f646964010000000000000000000000000000000000000501000000000000000200000000000000",
        "04006d61696e03006170705d5b651ccefabcc43541bab714b7feeb",
    );

    #[test]
    fn the_files_bytes_stay_what_they_are() {
        let (id, place) = (NodeId::from_u128(5), Inode { device: 1, number: 2 });
        assert_eq!(hex(&SEALED.seal(&encode(id, place, "main", "app"))), BYTES);
        let path = Path::new("node");
        let bytes = unhex_lossy(BYTES);
        let known = SEALED.decode(path, &bytes).and_then(|fields| decode(path, fields)).unwrap();
        assert_eq!((known.id, known.place), (id, place));
        assert_eq!((known.cluster.as_str(), known.database.as_str()), ("main", "app"));
    }

    #[test]
    fn a_damaged_or_newer_file_is_told_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        node_id(&paths, "c", "d").unwrap();
        let path = paths.node();
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(node_id(&paths, "c", "d"), Err(Error::Corrupt { .. })), "byte {at}");
            assert_eq!(fs::read(&path).unwrap(), flipped);
            fs::write(&path, &whole[..at]).unwrap();
            assert!(node_id(&paths, "c", "d").is_err(), "cut at {at}");
        }
        fs::write(&path, Sealed { version: 9, ..SEALED }.seal(b"of a newer version")).unwrap();
        assert!(matches!(node_id(&paths, "c", "d"), Err(Error::Newer { found: 9, .. })));
    }
}
