//! The steps of a read and a swap. All of them block.
//!
//! A swap over the record with number n writes a file of its own, makes it durable, and links it to
//! the number n + 1, which only one can do. That alone is not enough. A process that was stopped
//! before the link may find the number free again, long after others took and removed it. So a link
//! counts only when afterwards
//!
//! - the file that was read is still there. Files are removed in the order of their numbers, and
//!   that of n + 1 would have been removed later. So the number was never taken before.
//! - a listing shows the number as the highest, or the next file names this one as that before it.
//!   The first file of a directory has nothing before it, and only this counts for it.
//!
//! Where that does not hold, it is not known what became of the swap: others may have read the
//! record and gone on from it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::entry::{Entry, NoEntry};
use super::names::{self, Listing, Name};
use crate::error::{Error, Result, Unsupported};
use crate::files::{self, Inode};
use crate::lease::record::RECORD_MAX_BYTES;
use crate::lease::store::{SwapError, Version};
use crate::random;

/// So many records stay, with the newest.
pub(super) const KEPT: u64 = 16;
/// So many stay where the disk is full: the newest, and the one before it.
const KEPT_WHEN_FULL: u64 = 2;
/// A read tries so often while others write.
const TRIES: usize = 64;

#[derive(Debug)]
pub(super) struct NumberedFiles {
    directory: PathBuf,
}

/// A record whose file is complete and has no number yet.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) entry: Entry,
    /// The number before it; none for the first.
    before: Option<u64>,
    file: PathBuf,
}

/// What a look at the directory showed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Glance {
    stamp: Option<(Option<Inode>, SystemTime)>,
    /// The stamp was another one the time before. Two changes may have the same, so the next look
    /// lists the files again.
    fresh: bool,
    pub(super) highest: Option<u64>,
}

impl NumberedFiles {
    pub(super) fn new(directory: PathBuf) -> NumberedFiles {
        NumberedFiles { directory }
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory
    }

    /// The newest record. What went wrong is said in words.
    pub(super) fn current(&self) -> Result<Option<Entry>, String> {
        if !self.is_there()? {
            return Ok(None);
        }
        for _ in 0..TRIES {
            let highest = self.highest()?;
            let entry = match highest.map(|number| Entry::read(&self.directory, number)).transpose() {
                Ok(entry) => entry,
                Err(NoEntry::Gone) => continue,
                Err(NoEntry::Bad(what)) => return Err(what),
            };
            // One that was made while others wrote may lack names that came and went.
            if self.highest()? == highest {
                return Ok(entry);
            }
        }
        Err(format!("{}: others write faster than it can be read", self.directory.display()))
    }

    /// Whether the directory is there, and private. Where that above it is missing, a volume may
    /// be.
    fn is_there(&self) -> Result<bool, String> {
        match files::check_directory(&self.directory) {
            Ok(()) => Ok(true),
            Err(Error::Io { op: "stat", source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let above = files::parent_of(&self.directory);
                if above.is_dir() {
                    Ok(false)
                } else {
                    Err(format!("{}: no such directory", above.display()))
                }
            }
            Err(error) => Err(said(error)),
        }
    }

    fn highest(&self) -> Result<Option<u64>, String> {
        Ok(self.list(0, 0)?.highest)
    }

    fn list(&self, records_to: u64, new_to: u64) -> Result<Listing, String> {
        match Listing::of(&self.directory, records_to, new_to) {
            // Removed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Listing::default()),
            listed => listed.map_err(|error| said(Error::io("list", &self.directory)(error))),
        }
    }

    pub(super) fn swap(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let prepared = self.prepare(expected, record)?;
        self.publish(&prepared)
    }

    /// Compares, and writes the file of the next record.
    pub(super) fn prepare(&self, expected: Option<&Version>, record: &[u8]) -> Result<Prepared, SwapError> {
        if record.len() > RECORD_MAX_BYTES {
            let bytes = record.len();
            return Err(SwapError::Unavailable(format!("the record has {bytes} bytes: too many")));
        }
        let unavailable = |error| SwapError::Unavailable(said(error));
        if expected.is_none() {
            files::make_named_directory(&self.directory).map_err(unavailable)?;
            files::sync_name(&self.directory).map_err(unavailable)?;
        }
        let current = self.current().map_err(SwapError::Unavailable)?;
        if current.as_ref().map(|entry| &entry.version) != expected {
            return Err(SwapError::Conflict);
        }
        let before = current.as_ref().map(|entry| entry.number);
        let number = before.unwrap_or(0).checked_add(1);
        let number = number.ok_or_else(|| SwapError::Unavailable("there is no higher number".into()))?;
        let id = u128::from_be_bytes(random::array().map_err(unavailable)?);
        let entry = Entry::new(number, id, current.map_or(0, |entry| entry.id), record);
        let file = self.directory.join(names::new_record(number, id));
        let bytes = entry.encode();
        let written = write(&file, &bytes).or_else(|error| match before {
            Some(before) if error.no_room() && self.make_room(before) => write(&file, &bytes),
            _ => Err(error),
        });
        written.map_err(unavailable)?;
        Ok(Prepared { entry, before, file })
    }

    /// Gives the next record its number.
    pub(super) fn publish(&self, prepared: &Prepared) -> Result<Version, SwapError> {
        let linked = self.link(prepared);
        // One that stays has a number that is taken: a later swap removes it.
        let _ = fs::remove_file(&prepared.file);
        linked?;
        files::sync_directory(&self.directory).map_err(|error| SwapError::Unknown(said(error)))?;
        self.settle(prepared)?;
        Ok(prepared.entry.version.clone())
    }

    fn link(&self, prepared: &Prepared) -> Result<(), SwapError> {
        let name = self.directory.join(names::record(prepared.entry.number));
        let link = || fs::hard_link(&prepared.file, &name).map_err(Error::io("link", &name));
        let linked = link().or_else(|error| match prepared.before {
            Some(before) if error.no_room() && self.make_room(before) => link(),
            _ => Err(error),
        });
        let Err(error) = linked else { return Ok(()) };
        use io::ErrorKind::*;
        let kind = if let Error::Io { source, .. } = &error { source.kind() } else { Other };
        match kind {
            AlreadyExists => Err(SwapError::Conflict),
            // Another swap took the number and cleaned up; or all of it was removed by hand.
            NotFound => match self.current() {
                Ok(current) if current.as_ref().map(|entry| entry.number) != prepared.before => {
                    Err(SwapError::Conflict)
                }
                _ => Err(SwapError::Unavailable(said(error))),
            },
            PermissionDenied | ReadOnlyFilesystem | StorageFull | QuotaExceeded | Unsupported => {
                Err(SwapError::Unavailable(said(error)))
            }
            _ => Err(SwapError::Unknown(said(error))),
        }
    }

    /// Whether a number that was taken counts.
    pub(super) fn settle(&self, prepared: &Prepared) -> Result<(), SwapError> {
        let unknown = |why: &str| Err(SwapError::Unknown(why.into()));
        let Entry { number, id, after, .. } = prepared.entry;
        let is = |number, wanted: fn(&Entry) -> u128, id| {
            Entry::read(&self.directory, number).is_ok_and(|entry| wanted(&entry) == id)
        };
        // This listing began after the link. It has every record up to the number that is not
        // removed meanwhile, so that removing goes on in their order.
        let listing = self.list(number.saturating_sub(KEPT), number).map_err(SwapError::Unknown)?;
        if prepared.before.is_some_and(|before| !is(before, |entry| entry.id, after)) {
            return unknown("the record that it was to take the place of is gone");
        }
        match listing.highest {
            Some(highest) if highest == number => {}
            Some(highest) if highest > number => {
                if !is(number + 1, |entry| entry.after, id) {
                    return unknown("others have written since");
                }
            }
            _ => return unknown("it is not the newest record"),
        }
        self.remove(&listing);
        Ok(())
    }

    /// Removes what is not needed to compare. Whether that was anything.
    pub(super) fn make_room(&self, newest: u64) -> bool {
        let listing = self.list(newest.saturating_sub(KEPT_WHEN_FULL), newest);
        listing.is_ok_and(|listing| self.remove(&listing))
    }

    fn remove(&self, listing: &Listing) -> bool {
        let mut removed = false;
        for name in &listing.old {
            match files::remove(&self.directory.join(name.text())) {
                Ok(was_there) => removed |= was_there,
                Err(_) => {
                    // No higher record goes before it. Something else under its name counts for
                    // nothing.
                    if let Name::Record(number) = name
                        && Entry::read(&self.directory, *number).is_ok()
                    {
                        break;
                    }
                }
            }
        }
        removed
    }

    /// Looks whether there may be another record than at the last look.
    pub(super) fn glance(&self, last: Option<Glance>) -> Glance {
        let meta = fs::metadata(&self.directory);
        let stamp = meta.ok().and_then(|meta| Some((Inode::of(&meta), meta.modified().ok()?)));
        let same = last.as_ref().is_some_and(|last| last.stamp == stamp);
        match last {
            Some(last) if same && !last.fresh => last,
            _ => Glance { stamp, fresh: !same, highest: self.highest().ok().flatten() },
        }
    }
}

/// Writes a new file, durably. One that can't be written leaves nothing.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = files::create(path)?;
    let written = file.write_all(bytes).map_err(Error::io("write", path));
    let synced = written.and_then(|()| file.sync_all().map_err(Error::io("fsync", path)));
    if synced.is_err() {
        let _ = fs::remove_file(path);
    }
    synced
}

fn said(error: Error) -> String {
    match error {
        Error::Unsupported { path, reason: Unsupported::StateDirectory(why) } => {
            format!("{}: {why}", path.display())
        }
        error => error.to_string(),
    }
}
