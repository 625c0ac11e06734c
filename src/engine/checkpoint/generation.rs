//! A new generation of the WAL: its salts, its header and the frame that it begins with.

use crate::engine::file::anchor::{Anchor, FileState};
use crate::engine::file::database::{OpenDatabase, Tip, index_header};
use crate::engine::file::witnesses::Witnesses;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::page::PageNo;
use crate::random;
use crate::sqlite::Handle;
use crate::wal::{READ_MARK_UNUSED, Salts, push_frame, wal_header};

/// Writes the header and the identity frame of a new generation over the WAL's begin, and publishes
/// it. The file alone holds the tip's state and is synced. The caller holds CKPT and WRITE, and no
/// reader reads from the WAL.
pub(in crate::engine) fn begin_generation(
    base: &OpenDatabase,
    handle: &mut Handle,
    tip: &Tip,
) -> Result<Tip> {
    let file = base.at_rest(tip.position)?;
    begin_over(base, handle, tip, file)
}

/// The same over a file that may be no committed state.
pub(in crate::engine) fn begin_unproved(base: &OpenDatabase, handle: &mut Handle, tip: &Tip) -> Result<Tip> {
    begin_over(base, handle, tip, FileState::Backfilling(Witnesses::default()))
}

fn begin_over(base: &OpenDatabase, handle: &mut Handle, tip: &Tip, file: FileState) -> Result<Tip> {
    let mut page = vec![0; base.page_size.bytes()];
    handle.read(&mut page, 0)?;
    let generation = lock(&base.anchors).generation() + 1;
    let salts = salts_of(tip, generation)?;
    let (header, sum) = wal_header(base.page_size, generation as u32, salts);
    let mut bytes = header.to_vec();
    let big_endian = cfg!(target_endian = "big");
    let sum = push_frame(&mut bytes, PageNo::FIRST, tip.pages, salts, &page, sum, big_endian);
    let new = Tip { salts, frame: 1, sum, ..*tip };
    let (position, pages) = (tip.position, tip.pages);
    let anchor = Anchor { generation, salts, frame: 1, sum, position, pages, file, ahead: false };
    // Before the first byte of the new generation: a start that finds that generation finds its
    // meaning.
    lock(&base.anchors).write(anchor, true)?;
    overwrite(base, handle, &new, &bytes).map_err(|error| {
        // The index says by now that the WAL is empty, and the file may be neither the old WAL nor
        // the new one. Readers have all in the database. But a writer that went on from the old tip
        // would mix two generations.
        let error = Error::Stopped(error.cause().of("the WAL could not be begun anew"));
        base.give_up(&error);
        error
    })?;
    base.set_tip(new);
    base.bound.restarted();
    Ok(new)
}

/// Puts a new generation of one frame in the place of the old one, first in the index, then in the
/// file.
fn overwrite(base: &OpenDatabase, handle: &Handle, new: &Tip, bytes: &[u8]) -> Result<()> {
    let big_endian = cfg!(target_endian = "big");
    base.index.set_backfilled(0);
    base.index.set_attempted(0);
    let change = base.header().map_or(0, |h| h.change);
    let mut index = index_header(base, new, change.wrapping_add(1), big_endian);
    index.max_frame = 0;
    base.index.publish(&index);
    base.index.set_read_mark(1, 0);
    for mark in 2..5 {
        base.index.set_read_mark(mark, READ_MARK_UNUSED);
    }
    let long = base.wal.bytes()? > base.options.wal_limit_bytes.saturating_mul(2);
    base.wal.write(bytes, 0)?;
    base.sync_wal()?;
    if long {
        // The node gives back to the file system what a long reader or a large transaction made of
        // the WAL.
        base.wal.truncate(base.options.wal_limit_bytes.max(bytes.len() as u64))?;
    }
    base.index.append(handle, 1, 1)?;
    base.index.publish(&index_header(base, new, change.wrapping_add(2), big_endian));
    Ok(())
}

/// Salts that no other generation of this database, nor of another branch of it, has had. The
/// second follows from the first: see [`are_ours`].
fn salts_of(tip: &Tip, generation: u64) -> Result<Salts> {
    let random = random::array::<16>()?;
    let mut hasher = blake3::Hasher::new_derive_key("replite 2026 v1 wal salts");
    hasher.update(&tip.position.to_bytes());
    hasher.update(&generation.to_le_bytes());
    hasher.update(&random);
    let mut first = [0; 4];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    Ok(salts_from(first))
}

fn salts_from(first: [u8; 4]) -> Salts {
    let mut salts = [0; 8];
    let hash = blake3::derive_key("replite 2026 v1 second wal salt", &first);
    salts[..4].copy_from_slice(&first);
    salts[4..].copy_from_slice(&hash[..4]);
    Salts(salts)
}

/// Whether a node began a generation. SQLite adds one to the first salt and draws the second, when
/// it begins a WAL anew.
pub(in crate::engine) fn are_ours(salts: Salts) -> bool {
    let mut first = [0; 4];
    first.copy_from_slice(&salts.0[..4]);
    salts == salts_from(first)
}
