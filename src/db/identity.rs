//! Which node a data directory belongs to.
//!
//! `<database>-replite/node`: `repnodid`, version `u32` = 1, node id (UUID v7) 16, device 8, inode 8 of the directory, then
//! cluster and database, each behind its length (`u16`), then the first 16 bytes of BLAKE3 over all of it.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files::{self, replace_file};
use crate::peer::NodeId;
use crate::report::Condition;

const MAGIC: [u8; 8] = *b"repnodid";
const VERSION: u32 = 1;
/// The largest such file that is read.
const MAX_BYTES: u64 = 1024;
const FIXED_BYTES: usize = 8 + 4 + 16 + 8 + 8;

/// Reads the node's id, or makes one: at the first start, and when the directory is a copy of another node's.
pub(super) fn node_id(side: &Path, cluster: &str, database: &str) -> Result<NodeId> {
    let here = place(side)?;
    let path = side.join("node");
    match fs::symlink_metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io("stat", &path)(e)),
        Ok(meta) if meta.len() > MAX_BYTES => return Err(corrupt(&path, "too long")),
        Ok(_) => {
            let bytes = files::read(&path).map_err(Error::io("read", &path))?;
            let known = decode(&path, &bytes)?;
            for (what, theirs, ours) in
                [("cluster", &known.cluster, cluster), ("database", &known.database, database)]
            {
                if theirs != ours {
                    return Err(Error::Config(format!(
                        "{} belongs to {what} {theirs:?}, not {ours:?}",
                        side.display()
                    )));
                }
            }
            if known.place == here {
                return Ok(known.id);
            }
            Condition::NodeIdRenewed { directory: side }.say();
        }
    }
    let id = NodeId::random();
    replace_file(side, "node", &encode(id, here, cluster, database))?;
    Ok(id)
}

#[derive(Debug)]
struct KnownIdentity {
    id: NodeId,
    place: (u64, u64),
    cluster: String,
    database: String,
}

fn encode(id: NodeId, place: (u64, u64), cluster: &str, database: &str) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(&place.0.to_le_bytes());
    bytes.extend_from_slice(&place.1.to_le_bytes());
    for name in [cluster, database] {
        bytes.extend_from_slice(&(name.len() as u16).to_le_bytes());
        bytes.extend_from_slice(name.as_bytes());
    }
    let check = blake3::hash(&bytes);
    bytes.extend_from_slice(&check.as_bytes()[..16]);
    bytes
}

fn decode(path: &Path, bytes: &[u8]) -> Result<KnownIdentity> {
    let (body, check) = bytes.split_last_chunk::<16>().ok_or_else(|| corrupt(path, "too short"))?;
    if blake3::hash(body).as_bytes()[..16] != *check || body.len() < FIXED_BYTES || body[..8] != MAGIC {
        return Err(corrupt(path, "its checksum does not match"));
    }
    let version = crate::wal::le_u32(&body[8..12]);
    if version > VERSION {
        return Err(Error::Newer { path: path.to_path_buf(), found: version, supported: VERSION });
    }
    let long = |at: usize| {
        let mut eight = [0; 8];
        eight.copy_from_slice(&body[at..at + 8]);
        u64::from_le_bytes(eight)
    };
    let mut id = [0; 16];
    id.copy_from_slice(&body[12..28]);
    let mut rest = &body[FIXED_BYTES..];
    let mut name = || -> Option<String> {
        let (length, tail) = rest.split_first_chunk::<2>()?;
        let (name, tail) = tail.split_at_checked(u16::from_le_bytes(*length) as usize)?;
        rest = tail;
        String::from_utf8(name.to_vec()).ok()
    };
    let (cluster, database) = (name(), name());
    match (cluster, database) {
        (Some(cluster), Some(database)) => Ok(KnownIdentity {
            id: NodeId::from_u128(u128::from_be_bytes(id)),
            place: (long(28), long(36)),
            cluster,
            database,
        }),
        _ => Err(corrupt(path, "its names are cut short")),
    }
}

/// Reads bytes as such a file, as they are and behind a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_identity(data: &[u8]) {
    let sealed = [data, &blake3::hash(data).as_bytes()[..16]].concat();
    for bytes in [data, &sealed] {
        if let Ok(known) = decode(Path::new("node"), bytes) {
            let _ = encode(known.id, known.place, &known.cluster, &known.database);
        }
    }
}

#[cfg(test)]
pub(crate) fn fuzz_identity_seed() -> Vec<u8> {
    let whole = encode(NodeId::from_u128(5), (1, 2), "main", "app");
    whole[..whole.len() - 16].to_vec()
}

fn corrupt(path: &Path, what: &str) -> Error {
    let cure = "says which node this is, and no more than that: remove it, and the node gets a new id";
    Error::Corrupt { path: path.to_path_buf(), offset: 0, what: what.into(), cure }
}

/// What tells a directory from its copy: device and inode. Zeros where there is no such thing.
fn place(side: &Path) -> Result<(u64, u64)> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let meta = fs::metadata(side).map_err(Error::io("stat", side))?;
        Ok((meta.dev(), meta.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = side;
        Ok((0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stays_with_its_directory_and_not_with_a_copy() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = node_id(one.path(), "c", "d").unwrap();
        assert_eq!(node_id(one.path(), "c", "d").unwrap(), id);
        fs::copy(one.path().join("node"), two.path().join("node")).unwrap();
        let copy = node_id(two.path(), "c", "d").unwrap();
        assert_ne!(copy, id);
        assert_eq!(node_id(two.path(), "c", "d").unwrap(), copy);
        assert!(matches!(node_id(one.path(), "other", "d"), Err(Error::Config(_))));
        assert!(matches!(node_id(one.path(), "c", "other"), Err(Error::Config(_))));
    }

    #[test]
    fn a_damaged_or_newer_file_is_told_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        node_id(dir.path(), "c", "d").unwrap();
        let path = dir.path().join("node");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(node_id(dir.path(), "c", "d"), Err(Error::Corrupt { .. })), "byte {at}");
            assert_eq!(fs::read(&path).unwrap(), flipped);
            fs::write(&path, &whole[..at]).unwrap();
            assert!(node_id(dir.path(), "c", "d").is_err(), "cut at {at}");
        }
        let mut newer = whole[..whole.len() - 16].to_vec();
        newer[8] = 9;
        let check = blake3::hash(&newer);
        newer.extend_from_slice(&check.as_bytes()[..16]);
        fs::write(&path, newer).unwrap();
        assert!(matches!(node_id(dir.path(), "c", "d"), Err(Error::Newer { found: 9, .. })));
    }
}
