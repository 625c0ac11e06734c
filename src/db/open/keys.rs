//! The keys of the database, as a node finds them when it opens.

use crate::checksum::Fingerprint;
use crate::engine::key_of_files;
use crate::error::Result;
use crate::files::{self, Paths};
use crate::keys::DatabaseKeys;
use crate::report::Condition;
use crate::status::Role;

/// The keys of the database.
pub(super) struct KeysFound {
    pub(super) keys: DatabaseKeys,
    /// A primary's files go with this page key, which is not here. Other keys are in its place, and
    /// not on the disk.
    pub(super) lost: Option<Fingerprint>,
}

/// The keys of the database; new ones where there are none. A replica takes those of its primary in
/// their place.
pub(super) fn keys_of(paths: &Paths, role: Role) -> Result<KeysFound> {
    if let Some(keys) = files::keys::read(paths)? {
        return Ok(KeysFound { keys, lost: None });
    }
    let keys = DatabaseKeys::random()?;
    let gone = key_of_files(paths);
    if role == Role::Starting && gone.is_some() {
        Condition::KeysOfPrimary.say();
    }
    let lost = gone.filter(|_| role == Role::Promoting);
    if lost.is_none() {
        files::keys::write(paths, &keys)?;
    }
    Ok(KeysFound { keys, lost })
}
