//! A little room that the node keeps for a full disk: with it the database can still be opened and
//! read.
//!
//! The first small file that finds no room gives up `<state directory>/reserve`. The node makes it
//! again when there is room, and so finds out whether there is.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files;
use crate::files::paths::{EPOCHS, RESERVE, beside};
use crate::files::sync_directory;
use crate::random;
use crate::report::Condition;

/// For a WAL's first frames and the names of new files.
const SPARE_BYTES: u64 = 16 * 1024;
const BLOCK_BYTES: u64 = 4096;

pub(crate) fn is_there(directory: &Path) -> bool {
    directory.join(RESERVE).exists()
}

/// Makes the reserve, also in the place of one that is there. Its bytes are random: no file system
/// makes less of them.
pub(crate) fn make(directory: &Path) -> Result<()> {
    let epochs = fs::metadata(directory.join(EPOCHS)).map_or(0, |meta| meta.len());
    let mut bytes = vec![0; (SPARE_BYTES + epochs.next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES) as usize];
    random::fill(&mut bytes)?;
    replace(&directory.join(RESERVE), &bytes, || Ok(()))
}

/// Whether there was one.
fn give_up(directory: &Path) -> bool {
    let gone = fs::remove_file(directory.join(RESERVE)).is_ok();
    if gone {
        Condition::ReserveGivenUp { directory }.say();
        if let Err(error) = sync_directory(directory) {
            Condition::ReserveNotFreed { error: &error }.say();
        }
    }
    gone
}

/// Does something that needs a little room. If that finds none, this gives up the reserve and does
/// it once more. What is replaced gives its own room back: as a rule there is a reserve again at
/// once.
pub(crate) fn with<T>(directory: &Path, mut run: impl FnMut() -> Result<T>) -> Result<T> {
    match run() {
        Err(error) if error.no_room() && give_up(directory) => {
            let done = run();
            if let Err(error) = make(directory) {
                Condition::ReserveNotMade { error: &error }.say();
            }
            done
        }
        done => done,
    }
}

/// Replaces a small file by rename, durably. One that finds no room takes none. `ready` is asked
/// when the bytes are on the disk, and the name is still that of the file before.
fn replace(path: &Path, bytes: &[u8], ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let new = beside(path, ".new");
    let written = files::create(&new).and_then(|mut file| {
        file.write_all(bytes).map_err(Error::io("write", &new))?;
        file.sync_all().map_err(Error::io("fsync", &new))?;
        ready()?;
        fs::rename(&new, path).map_err(Error::io("rename", path))
    });
    if let Err(error) = written {
        // What is left of it is written over the next time.
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    files::sync_name(path)
}

/// Replaces a small file by rename, durably; on a full disk with the reserve of its directory.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    replace_file_when(path, bytes, || Ok(()))
}

/// The same, but nothing is replaced before `ready` says so. It may be asked twice.
pub(crate) fn replace_file_when(path: &Path, bytes: &[u8], ready: impl Fn() -> Result<()>) -> Result<()> {
    with(files::parent_of(path), || replace(path, bytes, &ready))
}
