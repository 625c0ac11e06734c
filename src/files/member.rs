//! The file `members/identity`: which member a directory is of, and whether it is still that
//! directory.
//!
//! It names its own inode and the time when it was made. A copy has others, be it made with all
//! times and modes, and so has one that a backup gave back. A directory that is renamed keeps them,
//! and so does a volume that goes to another machine: numbers of devices change there and are not
//! looked at. The inode alone would not do, as a new file system gives the same numbers again.
//!
//! A file system that makes up inodes anew at each mount (FAT) is none for a member, which would be
//! refused at each start.
//!
//! What can't be seen is a volume or a machine that was put back as a whole, by a snapshot below
//! the file system.

use std::fs::{self, File, Metadata, TryLockError};
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::descriptors::NodeFile;
use crate::error::{Error, Result, Unsupported};
use crate::files::sealed::Sealed;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::files::{self, Inode, beside};
use crate::random;

/// What to do about a file of a member that can't be read.
pub(crate) const CURE: &str = "is of this member's part of the lease's record: look at the disk, remove the \
                               directory `members`, and the node joins anew, as a new member";

pub(crate) const IDENTITY: Sealed =
    Sealed { magic: *b"repmemid", oldest: 1, version: 1, max_bytes: 1024, cure: CURE };

/// The JSON of the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    pub(crate) id: u64,
    /// The file's own; zero where the system has none.
    pub(crate) inode: u64,
    /// When the file was made, in nanoseconds since 1970; none where its file system does not say.
    pub(crate) born_ns: Option<u64>,
}

/// So long an open waits for the one before it to end.
const LOCK_WAIT: Duration = Duration::from_secs(1);
const LOCK_POLL: Duration = Duration::from_millis(2);

/// The member that a directory is of. No other process opens it meanwhile.
#[derive(Debug)]
pub(crate) struct OpenIdentity {
    pub(crate) id: u64,
    /// Locked, until it is dropped.
    _file: NodeFile,
}

/// Draws an id and writes the file, durably.
///
/// # Errors
/// [`Error::NoRandom`], [`Error::Io`].
pub(crate) fn create(path: &Path) -> Result<OpenIdentity> {
    let id = loop {
        match u64::from_be_bytes(random::array()?) {
            0 => {}
            id => break id,
        }
    };
    let new = beside(path, ".new");
    let mut file = files::create(&new)?;
    lock(&file, path)?;
    let identity = of_file(id, &file.metadata().map_err(Error::io("stat", &new))?);
    file.write_all(&IDENTITY.seal(&encode(&identity)?)).map_err(Error::io("write", &new))?;
    file.sync_all().map_err(Error::io("fsync", &new))?;
    fs::rename(&new, path).map_err(Error::io("rename", path))?;
    files::sync_name(path)?;
    Ok(OpenIdentity { id, _file: file })
}

/// Reads the file; `None` when it is not there.
///
/// # Errors
/// [`Unsupported::CopiedMember`] for a copy. [`Error::AlreadyOpen`], [`Error::Corrupt`],
/// [`Error::Newer`], [`Error::Older`], [`Error::Io`].
pub(crate) fn open(path: &Path) -> Result<Option<OpenIdentity>> {
    let mut file = match files::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    // One byte more than it may have is enough to see that it is none of ours.
    let read = (&mut file).take(IDENTITY.max_bytes + 1).read_to_end(&mut bytes);
    read.map_err(Error::io("read", path))?;
    let known = decode(path, IDENTITY.decode(path, &bytes)?)?;
    let now = of_file(known.id, &file.metadata().map_err(Error::io("stat", path))?);
    // A file system may have learned to tell the time.
    if known.inode != now.inode || known.born_ns.is_some() && known.born_ns != now.born_ns {
        let path = files::parent_of(path).to_path_buf();
        return Err(Error::Unsupported { path, reason: Unsupported::CopiedMember });
    }
    lock(&file, path)?;
    Ok(Some(OpenIdentity { id: known.id, _file: file }))
}

fn encode(identity: &Identity) -> Result<Vec<u8>> {
    serde_json::to_vec(identity).map_err(|error| Error::Internal(format!("a member's identity: {error}")))
}

fn decode(path: &Path, fields: &[u8]) -> Result<Identity> {
    match serde_json::from_slice(fields) {
        Ok(Identity { id: 0, .. }) => Err(IDENTITY.corrupt(path, "no member has the id 0")),
        Ok(identity) => Ok(identity),
        Err(error) => Err(IDENTITY.corrupt(path, &format!("it is not the JSON of such a file: {error}"))),
    }
}

/// Reads bytes as such a file, as they are and before a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_member_identity(data: &[u8]) {
    let (path, sealed) = (Path::new("identity"), [data, &check_of(data)].concat());
    for bytes in [data, &sealed] {
        if let Ok(identity) = IDENTITY.decode(path, bytes).and_then(|fields| decode(path, fields)) {
            let again = encode(&identity).expect("what was read can be written");
            assert_eq!(decode(path, &again).expect("and read again"), identity);
        }
    }
}

fn of_file(id: u64, meta: &Metadata) -> Identity {
    let inode = Inode::of(meta).unwrap_or_default().number;
    let born = meta.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Identity { id, inode, born_ns: born.and_then(|since| u64::try_from(since.as_nanos()).ok()) }
}

/// Waits for a moment: Raft may have ended, and a task of it still be dropped on another thread.
fn lock(file: &File, path: &Path) -> Result<()> {
    let until = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOCK_POLL),
            Err(TryLockError::WouldBlock) => {
                let path = files::parent_of(path).to_path_buf();
                return Err(Error::AlreadyOpen { path, holder: "this process or another" });
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
    }
}
