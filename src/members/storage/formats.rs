//! What is in the files of a member: JSON as the fields of sealed files.

use std::path::Path;

use openraft::{LogId, Vote};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::files::member::CURE;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::member::fuzz_member_identity;
use crate::files::sealed::Sealed;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
use crate::files::sealed::check_of;
use crate::members::types::{Agreed, LogEntry, check_entry, check_log_id, check_vote};

/// The most bytes that a file of entries has, and one of a state. The longest entry has less than
/// half of it.
pub(super) const FILE_MAX_BYTES: u64 = 256 * 1024;
/// The most bytes of any other file.
const SMALL_MAX_BYTES: u64 = 1024;
/// The newest vote.
pub(super) const VOTE: Sealed =
    Sealed { magic: *b"repmvote", oldest: 1, version: 1, max_bytes: SMALL_MAX_BYTES, cure: CURE };
/// The last entry that was purged.
pub(super) const PURGED: Sealed =
    Sealed { magic: *b"repmpurg", oldest: 1, version: 1, max_bytes: SMALL_MAX_BYTES, cure: CURE };
/// A state.
pub(super) const SNAPSHOT: Sealed =
    Sealed { magic: *b"repmsnap", oldest: 1, version: 1, max_bytes: FILE_MAX_BYTES, cure: CURE };
/// The id of a member that has not what it said to have.
pub(super) const WENT_BACK: Sealed =
    Sealed { magic: *b"repmback", oldest: 1, version: 1, max_bytes: SMALL_MAX_BYTES, cure: CURE };
/// Entries that were appended at one time.
pub(super) const ENTRIES: Sealed =
    Sealed { magic: *b"repmlogf", oldest: 1, version: 1, max_bytes: FILE_MAX_BYTES, cure: CURE };

/// The bytes of a value.
///
/// # Errors
/// [`Error::Internal`] when it is none that could be read again.
pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::Internal(format!("a member's state: {error}")))
}

/// Reads the fields of a file of this kind.
///
/// # Errors
/// [`Error::Corrupt`].
pub(super) fn decode<T: Checked>(kind: &Sealed, path: &Path, fields: &[u8]) -> Result<T> {
    let value: T = serde_json::from_slice(fields)
        .map_err(|error| kind.corrupt(path, &format!("it is not the JSON of such a file: {error}")))?;
    value.check().map_err(|what| kind.corrupt(path, what))?;
    Ok(value)
}

/// Reads a file of this kind; `None` when it is not there.
///
/// # Errors
/// [`Error::Corrupt`], [`Error::Newer`], [`Error::Older`], [`Error::Io`].
pub(super) fn read<T: Checked>(kind: &Sealed, path: &Path) -> Result<Option<T>> {
    kind.read(path)?.map(|fields| decode(kind, path, &fields)).transpose()
}

/// What is read, and more is asked of than its form.
pub(super) trait Checked: DeserializeOwned + Serialize {
    fn check(&self) -> Result<(), &'static str>;
}

impl Checked for Option<Vote<u64>> {
    fn check(&self) -> Result<(), &'static str> {
        self.iter().try_for_each(check_vote)
    }
}

impl Checked for u64 {
    fn check(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

impl Checked for LogId<u64> {
    fn check(&self) -> Result<(), &'static str> {
        check_log_id(self)
    }
}

impl Checked for Agreed {
    fn check(&self) -> Result<(), &'static str> {
        Agreed::check(self)
    }
}

impl Checked for Vec<LogEntry> {
    fn check(&self) -> Result<(), &'static str> {
        if self.is_empty() {
            return Err("it has no entry");
        }
        self.iter().try_for_each(check_entry)?;
        match self.windows(2).all(|pair| follows(&pair[0].log_id, &pair[1].log_id)) {
            true => Ok(()),
            false => Err("its entries do not follow each other"),
        }
    }
}

/// Whether an entry can be the next one: no leader comes before an earlier one's.
pub(super) fn follows(before: &LogId<u64>, next: &LogId<u64>) -> bool {
    next.index == before.index.saturating_add(1) && next.leader_id >= before.leader_id
}

/// Reads bytes as each of these files, as they are and before a hash that fits.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn fuzz_members(data: &[u8]) {
    fn read<T: Checked + PartialEq + std::fmt::Debug>(kind: &Sealed, data: &[u8]) {
        let (path, sealed) = (Path::new("file"), [data, &check_of(data)].concat());
        for bytes in [data, &sealed] {
            let Ok(fields) = kind.decode(path, bytes) else { continue };
            let Ok(value) = decode::<T>(kind, path, fields) else { continue };
            let again = encode(&value).expect("what was read can be written");
            assert_eq!(decode::<T>(kind, path, &again).expect("and read again"), value);
        }
    }
    fuzz_member_identity(data);
    read::<Option<Vote<u64>>>(&VOTE, data);
    read::<LogId<u64>>(&PURGED, data);
    read::<Agreed>(&SNAPSHOT, data);
    read::<Vec<LogEntry>>(&ENTRIES, data);
}

/// A file of each kind, without its hash.
#[cfg(test)]
pub(crate) fn fuzz_members_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let log_id = r#"{"leader_id":{"term":3,"node_id":7},"index":4}"#;
    let members =
        r#"{"configs":[[7],[7,8]],"nodes":{"7":{"url":"replite://a:1"},"8":{"url":"b","witness":true}}}"#;
    let entry = |index: u64, payload: &str| {
        format!(
            r#"{{"log_id":{{"leader_id":{{"term":3,"node_id":7}},"index":{index}}},"payload":{payload}}}"#
        )
    };
    let swap = r#"{"Normal":{"swap":{"expected":"3-7-4","nonce":9,"record":"cmVjb3JkIDI"}}}"#;
    let entries =
        [entry(5, "\"Blank\""), entry(6, swap), entry(7, &format!(r#"{{"Membership":{members}}}"#))];
    let state =
        format!(r#"{{"last_applied":{log_id},"membership":{{"log_id":{log_id},"membership":{members}}},"#)
            + r#""register":{"version":"3-7-4","nonce":9,"record":"cmVjb3JkIDI"}}"#;
    let files = [
        ("identity", &crate::files::member::IDENTITY, r#"{"id":7,"inode":5,"born_ns":9}"#.to_owned()),
        ("vote", &VOTE, r#"{"leader_id":{"term":3,"node_id":7},"committed":true}"#.to_owned()),
        ("purged", &PURGED, log_id.to_owned()),
        ("snapshot", &SNAPSHOT, state),
        ("went_back", &WENT_BACK, "7".to_owned()),
        ("entries", &ENTRIES, format!("[{}]", entries.join(","))),
    ];
    let without_hash = |kind: &Sealed, fields: &str| {
        let mut whole = kind.seal(fields.as_bytes());
        whole.truncate(whole.len() - crate::files::sealed::CHECK_BYTES);
        whole
    };
    files.into_iter().map(|(name, kind, fields)| (name, without_hash(kind, &fields))).collect()
}
