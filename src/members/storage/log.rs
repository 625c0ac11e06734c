//! The files of the log: one for each call that appended, named by its first entry's index in
//! sixteen hexadecimal digits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use openraft::LogId;

use super::formats::{ENTRIES, FILE_MAX_BYTES, decode, encode, follows, read};
use super::steps;
use crate::error::{Error, Result};
use crate::files::sealed::{CHECK_BYTES, HEAD_BYTES};
use crate::files::{self, sync_directory};
use crate::hex::unhex_u64;
use crate::members::types::{LogEntry, check_entry};

/// An entry, and the bytes of its JSON.
#[derive(Clone, Debug)]
pub(super) struct StoredEntry {
    pub(super) entry: LogEntry,
    pub(super) bytes: usize,
}

/// Entries by their index.
pub(super) type Entries = BTreeMap<u64, StoredEntry>;

#[derive(Debug)]
pub(super) struct LogFiles {
    directory: PathBuf,
    /// The last index in each file, by the first.
    files: BTreeMap<u64, u64>,
}

impl LogFiles {
    /// Reads the files, and removes what a crash left over: files that did not get their name, and
    /// those that are purged. The entries after the purged one come with it.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Newer`], [`Error::Older`], [`Error::Io`].
    pub(super) fn open(directory: &Path, purged: Option<&LogId<u64>>) -> Result<(LogFiles, Entries)> {
        let mut log = LogFiles { directory: directory.to_path_buf(), files: BTreeMap::new() };
        let mut entries = Entries::new();
        let mut last: Option<LogId<u64>> = None;
        for first in list(directory)? {
            let path = log.path(first);
            let Some(read) = read::<Vec<LogEntry>>(&ENTRIES, &path)? else { continue };
            let corrupt = |what: &str| Err(ENTRIES.corrupt(&path, what));
            let (Some(begin), Some(end)) = (read.first(), read.last()) else { continue };
            if begin.log_id.index != first {
                return corrupt("its first entry is not the one that it is named by");
            }
            let end = end.log_id;
            if last.is_none() && purged.is_some_and(|purged| end.index <= purged.index) {
                files::remove(&path)?;
                continue;
            }
            match (&last, purged) {
                (Some(last), _) if !follows(last, &begin.log_id) => {
                    return corrupt("it does not go on where the file before it ends");
                }
                (None, Some(purged)) if first > purged.index.saturating_add(1) => {
                    return corrupt("entries between the purged ones and it are missing");
                }
                (None, None) if first > 0 => return corrupt("entries before it are missing"),
                _ => {}
            }
            last = Some(end);
            log.files.insert(first, end.index);
            for entry in read {
                if let Some(what) = purged.and_then(|purged| not_after(purged, &entry.log_id)) {
                    return corrupt(what);
                }
                if purged.is_none_or(|purged| entry.log_id.index > purged.index) {
                    let bytes = encode(&entry)?.len();
                    entries.insert(entry.log_id.index, StoredEntry { entry, bytes });
                }
            }
        }
        sync_directory(directory)?;
        Ok((log, entries))
    }

    /// Writes entries that go on where the log ends, durably. A crash leaves the first of them, or
    /// none.
    pub(super) fn append(&mut self, entries: Vec<LogEntry>) -> Result<Vec<StoredEntry>> {
        let mut kept = Vec::with_capacity(entries.len());
        let mut file = Vec::new();
        let mut first = None;
        for entry in entries {
            check_entry(&entry).map_err(|what| Error::Internal(format!("an entry to append: {what}")))?;
            let json = encode(&entry)?;
            let index = entry.log_id.index;
            if file.len() + json.len() > ROOM_BYTES {
                self.write(&mut first, index, &mut file)?;
            }
            first.get_or_insert(index);
            file.push(if file.is_empty() { b'[' } else { b',' });
            file.extend_from_slice(&json);
            kept.push(StoredEntry { bytes: json.len(), entry });
        }
        let end = kept.last().map_or(0, |last| last.entry.log_id.index.saturating_add(1));
        self.write(&mut first, end, &mut file)?;
        Ok(kept)
    }

    /// Writes a file of the entries from `first` to the one before `end`, if there are any.
    fn write(&mut self, first: &mut Option<u64>, end: u64, file: &mut Vec<u8>) -> Result<()> {
        let Some(first) = first.take() else { return Ok(()) };
        file.push(b']');
        let fields = std::mem::take(file);
        if fields.len() + HEAD_BYTES + CHECK_BYTES > FILE_MAX_BYTES as usize {
            return Err(Error::Internal(format!("entry {first} of the members' log is too long")));
        }
        steps::replace(&ENTRIES, &self.path(first), &fields)?;
        self.files.insert(first, end.saturating_sub(1));
        Ok(())
    }

    /// Removes the entries from this index on, durably and from the end: what a crash leaves is the
    /// beginning of the log.
    pub(super) fn truncate(&mut self, index: u64, purged: Option<u64>) -> Result<()> {
        while let Some((&first, &last)) = self.files.last_key_value() {
            if last < index {
                break;
            }
            let path = self.path(first);
            // A file without an entry that counts is not kept.
            let nothing_left =
                first >= index || purged.is_some_and(|purged| index <= purged.saturating_add(1));
            if nothing_left {
                steps::remove(&path)?;
                steps::sync(&self.directory)?;
                self.files.remove(&first);
                continue;
            }
            // It may begin with entries that are purged, which are only there.
            let fields = ENTRIES.read(&path)?.ok_or_else(|| ENTRIES.corrupt(&path, "it is gone"))?;
            let mut entries: Vec<LogEntry> = decode(&ENTRIES, &path, &fields)?;
            entries.retain(|entry| entry.log_id.index < index);
            steps::replace(&ENTRIES, &path, &encode(&entries)?)?;
            self.files.insert(first, index.saturating_sub(1));
        }
        Ok(())
    }

    /// Removes the files that have no entry after this index.
    pub(super) fn purge(&mut self, index: u64) -> Result<()> {
        while let Some((&first, &last)) = self.files.first_key_value() {
            if last > index {
                break;
            }
            steps::remove(&self.path(first))?;
            self.files.remove(&first);
        }
        steps::sync(&self.directory)
    }

    fn path(&self, first: u64) -> PathBuf {
        self.directory.join(format!("{first:016x}"))
    }
}

/// Room for the entries of a file, before the bracket at its end.
const ROOM_BYTES: usize = FILE_MAX_BYTES as usize / 2;

/// What is wrong with an entry of a log of which all up to `purged` was purged.
fn not_after(purged: &LogId<u64>, id: &LogId<u64>) -> Option<&'static str> {
    let other = id.index == purged.index && id != purged;
    let earlier = id.index > purged.index && id.leader_id < purged.leader_id;
    (other || earlier).then_some("its entries are not those that were purged, nor do they follow them")
}

/// The indexes that files are named by, in order. Those that did not get their name are removed.
fn list(directory: &Path) -> Result<Vec<u64>> {
    let mut firsts = Vec::new();
    let names = files::list(directory)?.ok_or_else(|| ENTRIES.corrupt(directory, "the directory is missing"));
    for name in names? {
        match unhex_u64(&name) {
            Some(first) if format!("{first:016x}") == name => firsts.push(first),
            _ if name.ends_with(".new") => {
                files::remove(&directory.join(name))?;
            }
            _ => {}
        }
    }
    firsts.sort_unstable();
    Ok(firsts)
}
