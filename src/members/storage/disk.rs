//! All files of a member, and what is in them. Its calls block.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use openraft::{LogId, LogState, Vote};

use super::formats::{PURGED, SNAPSHOT, VOTE, encode, follows, read};
use super::log::{Entries, LogFiles};
use super::steps;
use crate::error::{Error, Result};
use crate::files;
use crate::files::member::{self, IDENTITY, OpenIdentity};
use crate::lock::lock;
use crate::members::types::{Agreed, LogEntry, TypeConfig};

#[derive(Debug)]
pub(super) struct Disk {
    directory: PathBuf,
    claim: OpenIdentity,
    log: LogFiles,
    /// The entries that the files have, for those who read.
    pub(super) entries: Arc<Mutex<Entries>>,
    pub(super) vote: Option<Vote<u64>>,
    pub(super) purged: Option<LogId<u64>>,
    pub(super) snapshot: Option<Arc<Agreed>>,
    /// Why no call is made any more: one failed, and what it left is not known.
    failed: Option<String>,
    /// The suite of `openraft` begins logs anywhere, writes over entries, and purges without a
    /// snapshot.
    #[cfg(test)]
    pub(super) lenient: bool,
}

/// Where the files are.
fn paths(directory: &Path) -> [PathBuf; 5] {
    ["identity", "vote", "purged", "snapshot", "log"].map(|name| directory.join(name))
}

impl Disk {
    /// Makes the directory of a new member, durably. What a call that was cut short left is written
    /// over.
    pub(super) fn create(directory: &Path) -> Result<Disk> {
        let [id, vote, .., log] = paths(directory);
        files::absent(&id)?;
        without_state(directory)?;
        files::make_directory(directory)?;
        files::sync_name(directory)?;
        files::make_directory(&log)?;
        VOTE.replace(&vote, &encode(&None::<Vote<u64>>)?)?;
        let claim = member::create(&id)?;
        Disk::read(directory, claim)
    }

    /// Opens the directory of a member; `None` when there is none.
    pub(super) fn open(directory: &Path) -> Result<Option<Disk>> {
        if files::list(directory)?.is_none() {
            return Ok(None);
        }
        files::make_directory(directory)?;
        match member::open(&directory.join("identity"))? {
            Some(claim) => Disk::read(directory, claim).map(Some),
            None => without_state(directory).map(|()| None),
        }
    }

    fn read(directory: &Path, claim: OpenIdentity) -> Result<Disk> {
        let all = paths(directory);
        for path in &all {
            files::remove(&files::beside(path, ".new"))?;
        }
        let [_, vote_path, purged_path, snapshot_path, log] = all;
        let vote = read::<Option<Vote<u64>>>(&VOTE, &vote_path)?;
        let vote = vote.ok_or_else(|| VOTE.corrupt(&vote_path, "it is missing"))?;
        let purged: Option<LogId<u64>> = read(&PURGED, &purged_path)?;
        let snapshot: Option<Agreed> = read(&SNAPSHOT, &snapshot_path)?;
        let covered = snapshot.as_ref().and_then(|state| state.last_applied);
        if purged.is_some_and(|purged| !covers(covered, purged)) {
            return Err(SNAPSHOT.corrupt(&snapshot_path, "it lacks entries that were purged"));
        }
        let (log, entries) = LogFiles::open(&log, purged.as_ref())?;
        let at_snapshot = covered.and_then(|id| entries.get(&id.index).map(|kept| (id, kept.entry.log_id)));
        if at_snapshot.is_some_and(|(covered, found)| covered != found) {
            return Err(SNAPSHOT.corrupt(&snapshot_path, "it was made of other entries than the log's"));
        }
        let last = entries.last_key_value().map(|(_, kept)| kept.entry.log_id);
        let leader = [last, covered].into_iter().flatten().map(|id| id.leader_id).max();
        if leader.unwrap_or_default() > vote.unwrap_or_default().leader_id {
            return Err(VOTE.corrupt(&vote_path, "it is older than the log"));
        }
        Ok(Disk {
            directory: directory.to_path_buf(),
            claim,
            log,
            entries: Arc::new(Mutex::new(entries)),
            vote,
            purged,
            snapshot: snapshot.map(Arc::new),
            failed: None,
            #[cfg(test)]
            lenient: false,
        })
    }

    pub(super) fn id(&self) -> u64 {
        self.claim.id
    }

    /// Makes a call, unless one before it failed: what that left on the disk is not known before
    /// the files are opened again. After an fsync that failed, the next one may say that all is
    /// well.
    pub(super) fn call<T>(&mut self, call: impl FnOnce(&mut Disk) -> Result<T>) -> Result<T> {
        if let Some(why) = &self.failed {
            return Err(Error::Internal(format!("the members' log is not written after a failure: {why}")));
        }
        self.failed = Some("a call did not end".into());
        let done = call(self);
        self.failed = done.as_ref().err().map(ToString::to_string);
        done
    }

    pub(super) fn log_state(&self) -> LogState<TypeConfig> {
        let last = lock(&self.entries).last_key_value().map(|(_, kept)| kept.entry.log_id);
        LogState { last_purged_log_id: self.purged, last_log_id: last.or(self.purged) }
    }

    pub(super) fn save_vote(&mut self, vote: Vote<u64>) -> Result<()> {
        steps::replace(&VOTE, &self.path(1), &encode(&Some(vote))?)?;
        self.vote = Some(vote);
        Ok(())
    }

    pub(super) fn append(&mut self, entries: Vec<LogEntry>) -> Result<()> {
        let mut last = self.log_state().last_log_id;
        for entry in &entries {
            let next = match &last {
                Some(last) => follows(last, &entry.log_id),
                None => entry.log_id.index == 0,
            };
            if !next && !self.is_lenient() {
                return Err(Error::Internal(format!("entry {} can't follow {last:?}", entry.log_id)));
            }
            last = Some(entry.log_id);
        }
        let kept = self.log.append(entries)?;
        lock(&self.entries).extend(kept.into_iter().map(|kept| (kept.entry.log_id.index, kept)));
        Ok(())
    }

    pub(super) fn truncate(&mut self, since: LogId<u64>) -> Result<()> {
        // What is purged is in it.
        if self.covered().is_some_and(|covered| since.index <= covered.index) {
            return Err(Error::Internal(format!("entry {since} is in the snapshot and can't be taken back")));
        }
        // Those that read do without at once.
        lock(&self.entries).split_off(&since.index);
        self.log.truncate(since.index, self.purged.map(|purged| purged.index))
    }

    /// The last entry that the snapshot has.
    pub(super) fn covered(&self) -> Option<LogId<u64>> {
        self.snapshot.as_ref().and_then(|state| state.last_applied)
    }

    /// Whether the snapshot has all up to this entry.
    pub(super) fn may_purge(&self, upto: LogId<u64>) -> bool {
        covers(self.covered(), upto) || self.is_lenient()
    }

    pub(super) fn purge(&mut self, upto: LogId<u64>) -> Result<()> {
        if self.purged.is_some_and(|purged| upto.index <= purged.index) {
            return Ok(());
        }
        if !self.may_purge(upto) {
            return Err(Error::Internal(format!("no snapshot covers entry {upto}, which is to be purged")));
        }
        let there = lock(&self.entries).get(&upto.index).map(|kept| kept.entry.log_id);
        if there.is_some_and(|there| there != upto) {
            return Err(Error::Internal(format!("entry {upto} is to be purged, and the log has another")));
        }
        steps::replace(&PURGED, &self.path(2), &encode(&upto)?)?;
        self.purged = Some(upto);
        {
            let mut entries = lock(&self.entries);
            let rest = entries.split_off(&upto.index.saturating_add(1));
            *entries = rest;
        }
        self.log.purge(upto.index)
    }

    /// Replaces the snapshot, unless it covers as much: one that comes from the leader may have
    /// passed one that was being made. Returns the one that is there then.
    pub(super) fn save_snapshot(&mut self, state: Arc<Agreed>) -> Result<Arc<Agreed>> {
        if let Some(there) = self.snapshot.clone().filter(|there| there.last_applied >= state.last_applied) {
            return Ok(there);
        }
        steps::replace(&SNAPSHOT, &self.path(3), &encode(&*state)?)?;
        self.snapshot = Some(state.clone());
        Ok(state)
    }

    fn path(&self, at: usize) -> PathBuf {
        let mut all = paths(&self.directory);
        std::mem::take(&mut all[at])
    }

    fn is_lenient(&self) -> bool {
        #[cfg(test)]
        return self.lenient;
        #[cfg(not(test))]
        false
    }
}

/// The identity is the last file that is made: where it is missing, there is nothing yet.
fn without_state(directory: &Path) -> Result<()> {
    let [id, _, purged, snapshot, log] = paths(directory);
    let entries = files::list(&log)?.unwrap_or_default();
    if purged.exists() || snapshot.exists() || entries.iter().any(|name| !name.ends_with(".new")) {
        return Err(IDENTITY.corrupt(&id, "it is missing, and a log is there"));
    }
    Ok(())
}

/// Whether a state that has all up to `covered` has this entry.
pub(super) fn covers(covered: Option<LogId<u64>>, id: LogId<u64>) -> bool {
    covered.is_some_and(|covered| id.index <= covered.index && id.leader_id <= covered.leader_id)
}
