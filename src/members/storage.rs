//! What a member has on the disk: its id, its vote, its part of the log, and a snapshot.
//!
//! | file in `members/` | what is there |
//! |---|---|
//! | `identity` | the id, and what a copy is told by: see `src/files/member.rs` |
//! | `vote` | the newest vote, or that there was none yet |
//! | `log/<first index>` | the entries of one call that appended, or a part of them |
//! | `purged` | the last entry that the log does without; there is none before the first purge |
//! | `snapshot` | the state up to an entry |
//! | `went-back` | the id, once a leader has seen that the member has not what it said to have |
//!
//! Each is a sealed file whose fields are JSON. It is written beside, fsynced and renamed, and then
//! its directory is fsynced. So a file with a name is whole, and a torn one has no name: it ends in
//! `.new` and is removed at open. A damaged file with a name, a gap, and two files for one entry
//! are no work of a crash: they are errors, and nothing is cut off.
//!
//! Raft hears of a call when all of it is on the disk. One that fails is an error that ends Raft,
//! whose other calls fail then (`Fatal::StorageError`). No later call touches the files, because an
//! fsync after one that failed may say what is not so. To go on, Raft is ended, its parts are
//! dropped, and the directory is opened again.
//!
//! # What a crash leaves
//!
//! | call | steps, each on the disk before the next | found then |
//! |---|---|---|
//! | create | 1 directories, 2 `vote` | no member: it is made anew |
//! | | 3 `identity` | the member |
//! | vote | `vote` is replaced | the vote before, or this one |
//! | append | a file for each part, in their order | the parts that have a name |
//! | truncate | 1 files after the cut go, the last first | the log up to an entry after the cut |
//! | | 2 the file with the cut becomes shorter | the log up to the cut |
//! | snapshot | `snapshot` is replaced | the one before, or this one |
//! | purge | 1 `purged` is replaced | before it the whole log, after it what follows |
//! | | 2 files without a later entry go, in any order | the same: the others go at open |
//!
//! Two calls never overlap, so there is no other combination. A log that a truncation left too long
//! is one that Raft cuts again, as the leader has other entries there. Between `snapshot` and
//! `purged` the log may end before the snapshot, or not have begun: Raft purges up to the snapshot
//! when it starts.
//!
//! What holds of all files together is checked at open. Purged entries are in the snapshot, and the
//! log goes on after them. The snapshot is of the log's entries, and none of these is of a later
//! leader than the vote.
//!
//! What is not seen: the loss of the last files of the log, and files of an earlier day that were
//! put back in the place of the present ones, all of them and without a new `identity`.
//!
//! # What is not kept
//!
//! How far the log counts. After a start the state is that of the snapshot. The leader's next
//! message says how far entries count, and they are applied anew, a few hundred at most.
//!
//! A member that led is no leader after a start, though Raft would let it lead on with the vote
//! that it has. It has to be elected anew: if it had lost entries, it would give their ids to
//! others.

mod disk;
mod formats;
mod log;
mod log_store;
mod machine;
mod steps;
#[cfg(test)]
mod tests;
mod worker;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::watch;

use crate::error::{Error, Result, Unsupported};
use crate::files;
use crate::lock::lock;
use crate::members::types::{Agreed, AgreedRecord};

use disk::Disk;
use formats::WENT_BACK;
use worker::Worker;

#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use formats::fuzz_members;
#[cfg(test)]
pub(crate) use formats::fuzz_members_seeds;
pub(crate) use log_store::LogStore;
pub(crate) use machine::StateMachine;

const WENT_BACK_NAME: &str = "went-back";

/// The directory of a member, open. No other process opens it, nor this one again, before this and
/// its parts are dropped; an open waits a second for that.
#[derive(Debug)]
pub(crate) struct Storage {
    disk: Disk,
    state: watch::Sender<Arc<Agreed>>,
}

impl Storage {
    /// Opens the directory of a member; `None` when there is none, or one that was not made to its
    /// end. Blocks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the directory is a copy, or went back. [`Error::AlreadyOpen`].
    /// [`Error::Corrupt`], [`Error::Newer`], [`Error::Older`], [`Error::Io`]: nothing was changed
    /// but for what a crash left over.
    ///
    /// [`Error::Unsupported`]: crate::Error::Unsupported
    /// [`Error::AlreadyOpen`]: crate::Error::AlreadyOpen
    /// [`Error::Corrupt`]: crate::Error::Corrupt
    /// [`Error::Newer`]: crate::Error::Newer
    /// [`Error::Older`]: crate::Error::Older
    /// [`Error::Io`]: crate::Error::Io
    pub(crate) fn open(directory: &Path) -> Result<Option<Storage>> {
        let (path, reason) = (directory.to_path_buf(), Unsupported::CopiedMember);
        let mark = directory.join(WENT_BACK_NAME);
        if formats::read::<u64>(&WENT_BACK, &mark)?.is_some() {
            return Err(Error::Unsupported { path, reason });
        }
        files::remove(&files::beside(&mark, ".new"))?;
        Ok(Disk::open(directory)?.map(Storage::new))
    }

    /// No open succeeds from now on: a leader has seen that this member has not what it said to
    /// have. It is on the disk when this returns. Raft may run meanwhile. Blocks.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub(crate) fn mark_went_back(directory: &Path, id: u64) -> Result<()> {
        WENT_BACK.replace(&directory.join(WENT_BACK_NAME), &formats::encode(&id)?)
    }

    /// Makes the directory of a new member, with an id that no member ever had. It is on the disk
    /// when this returns. Blocks.
    ///
    /// # Errors
    /// [`Error::FileExists`] where a member's is there. [`Error::NoRandom`], [`Error::Io`].
    ///
    /// [`Error::FileExists`]: crate::Error::FileExists
    /// [`Error::NoRandom`]: crate::Error::NoRandom
    /// [`Error::Io`]: crate::Error::Io
    pub(crate) fn create(directory: &Path) -> Result<Storage> {
        Disk::create(directory).map(Storage::new)
    }

    fn new(mut disk: Disk) -> Storage {
        let id = disk.id();
        if let Some(vote) = disk.vote.as_mut().filter(|vote| vote.leader_id.node_id == id) {
            vote.committed = false;
        }
        let state = watch::Sender::new(disk.snapshot.clone().unwrap_or_default());
        Storage { disk, state }
    }

    /// The member's id in Raft.
    pub(crate) fn id(&self) -> u64 {
        self.disk.id()
    }

    /// Whether the member ever voted, or got anything.
    pub(crate) fn has_state(&self) -> bool {
        let Disk { vote, purged, snapshot, entries, .. } = &self.disk;
        vote.is_some() || purged.is_some() || snapshot.is_some() || !lock(entries).is_empty()
    }

    /// The record that the log ends with, whether it was agreed on or not.
    pub(crate) fn newest_record(&self) -> Option<AgreedRecord> {
        let Disk { snapshot, entries, .. } = &self.disk;
        let mut state = snapshot.as_deref().cloned().unwrap_or_default();
        for kept in lock(entries).values() {
            if Some(kept.entry.log_id) > state.last_applied {
                state.apply(kept.entry.clone());
            }
        }
        state.register
    }

    /// The state that was applied: after a start that of the snapshot, until the leader says which
    /// entries count. It ends with the state machine.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<Agreed>> {
        self.state.subscribe()
    }

    /// The parts that Raft is begun with.
    pub(crate) fn into_parts(self) -> (LogStore, StateMachine) {
        let worker = Worker::new(self.disk);
        (LogStore::new(worker.clone()), StateMachine::new(worker, self.state))
    }
}
