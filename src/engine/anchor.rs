//! Anchors: which position a frame of the WAL stands for, kept beside the database.
//!
//! `<side>/anchors` has two slots of 256 bytes, at 0 and 4096, written in turn, so that a torn write leaves the
//! other. `<side>/epochs` holds the epoch history and is replaced by rename.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::checksum::PageHash;
use crate::engine::reserve;
use crate::engine::wal_file::{read_exact_at, sync_directory, write_all_at};
use crate::error::{Error, Result};
use crate::page::PageNo;
use crate::txid::{EpochHistory, Position};
use crate::wal::{Salts, WalSum, le_u32};

const MAGIC: [u8; 8] = *b"repanchr";
const EPOCHS_MAGIC: [u8; 8] = *b"repepoch";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 256;
/// The slots lie in different sectors and pages of any disk.
const SLOT_OFFSETS: [u64; 2] = [0, 4096];
const CHECK_AT: usize = SLOT_BYTES - 16;
const WITNESSES_AT: usize = 144;
const WITNESS_BYTES: usize = 12;
/// Largest epochs file that is read: a full history and its frame.
const EPOCHS_MAX_BYTES: u64 = (EpochHistory::MAX * EpochHistory::ENTRY_BYTES + 64) as u64;

/// What was known of the database file alone when an anchor was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FileState {
    /// The file alone, without the WAL, is the state at `position`, and nobody has written to it since
    /// `modified` (nanoseconds since 1970).
    AtRest { position: Position, modified: i64 },
    /// Frames up to the anchor are being copied into it, or may have been: it need not be a committed state.
    Backfilling(Witnesses),
}

/// A page that the WAL has and that the file has an older image of, by that image's hash. While the file has it still, nobody has copied all of
/// the WAL back; and SQLite gives up no WAL before that.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Witness {
    page: PageNo,
    older: [u8; 8],
}

impl Witness {
    pub(crate) fn new(page: PageNo, older: PageHash) -> Witness {
        let hash = older.to_bytes();
        let mut older = [0; 8];
        older.copy_from_slice(&hash[..8]);
        Witness { page, older }
    }

    pub(crate) fn page(self) -> PageNo {
        self.page
    }
}

/// What is written behind the end of a file that frames are being copied into: whoever puts another file in its place, or cuts it, takes that away.
/// To SQLite it is nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mark {
    pub(crate) offset: u64,
    pub(crate) nonce: [u8; Mark::BYTES],
}

impl Mark {
    pub(crate) const BYTES: usize = 16;
}

/// Some pages of those that a copy changes, as many as an anchor has room for; and how the file is known again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Witnesses {
    pages: [Option<Witness>; Witnesses::MAX],
    pub(crate) mark: Option<Mark>,
}

impl Witnesses {
    pub(crate) const MAX: usize = (CHECK_AT - WITNESSES_AT) / WITNESS_BYTES;

    pub(crate) fn iter(&self) -> impl Iterator<Item = Witness> + '_ {
        self.pages.iter().flatten().copied()
    }

    pub(crate) fn marked(self, mark: Option<Mark>) -> Witnesses {
        Witnesses { mark, ..self }
    }

    fn decode(bytes: &[u8]) -> Witnesses {
        bytes
            .chunks_exact(WITNESS_BYTES)
            .filter_map(|b| {
                let mut older = [0; 8];
                older.copy_from_slice(&b[4..]);
                Some(Witness { page: PageNo::new(le_u32(b))?, older })
            })
            .collect()
    }
}

/// The first ones, as many as there is room for.
impl FromIterator<Witness> for Witnesses {
    fn from_iter<I: IntoIterator<Item = Witness>>(all: I) -> Witnesses {
        let mut witnesses = Witnesses::default();
        for (place, witness) in witnesses.pages.iter_mut().zip(all) {
            *place = Some(witness);
        }
        witnesses
    }
}

/// The position that a frame of the WAL stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Anchor {
    /// Counts the WAL generations that this node began; never reused, so that salts are not either.
    pub(crate) generation: u64,
    pub(crate) salts: Salts,
    /// A commit frame of that generation; zero: only what `file` says counts.
    pub(crate) frame: u32,
    pub(crate) sum: WalSum,
    pub(crate) position: Position,
    /// The database's size in pages.
    pub(crate) pages: u32,
    pub(crate) file: FileState,
    /// Written before its commit frame, which may not have come to be: then the anchor counts for nothing.
    pub(crate) ahead: bool,
}

/// Bits of a slot's state word.
const BACKFILLING: u32 = 1;
const AHEAD: u32 = 2;

impl Anchor {
    fn encode(&self, sequence: u64) -> [u8; SLOT_BYTES] {
        let mut b = [0; SLOT_BYTES];
        b[0..8].copy_from_slice(&MAGIC);
        b[8..12].copy_from_slice(&VERSION.to_le_bytes());
        b[12..16].copy_from_slice(&self.frame.to_le_bytes());
        b[16..24].copy_from_slice(&sequence.to_le_bytes());
        b[24..32].copy_from_slice(&self.generation.to_le_bytes());
        b[32..40].copy_from_slice(&self.salts.0);
        b[40..44].copy_from_slice(&self.sum.0.to_le_bytes());
        b[44..48].copy_from_slice(&self.sum.1.to_le_bytes());
        b[48..88].copy_from_slice(&self.position.to_bytes());
        b[88..92].copy_from_slice(&self.pages.to_le_bytes());
        let ahead = if self.ahead { AHEAD } else { 0 };
        match self.file {
            FileState::AtRest { position, modified } => {
                b[92..96].copy_from_slice(&ahead.to_le_bytes());
                b[96..104].copy_from_slice(&modified.to_le_bytes());
                b[104..144].copy_from_slice(&position.to_bytes());
            }
            FileState::Backfilling(witnesses) => {
                b[92..96].copy_from_slice(&(BACKFILLING | ahead).to_le_bytes());
                if let Some(Mark { offset, nonce }) = witnesses.mark {
                    b[96..104].copy_from_slice(&offset.to_le_bytes());
                    b[104..120].copy_from_slice(&nonce);
                }
                for (place, witness) in
                    b[WITNESSES_AT..CHECK_AT].chunks_exact_mut(WITNESS_BYTES).zip(witnesses.iter())
                {
                    place[..4].copy_from_slice(&witness.page.get().to_le_bytes());
                    place[4..].copy_from_slice(&witness.older);
                }
            }
        }
        let check = blake3::hash(&b[..CHECK_AT]);
        b[CHECK_AT..].copy_from_slice(&check.as_bytes()[..16]);
        b
    }

    fn decode(b: &[u8; SLOT_BYTES]) -> Result<Option<(u64, Anchor)>, u32> {
        if b[0..8] != MAGIC || blake3::hash(&b[..CHECK_AT]).as_bytes()[..16] != b[CHECK_AT..] {
            return Ok(None);
        }
        let version = le_u32(&b[8..12]);
        if version > VERSION {
            return Err(version);
        }
        let long =
            |at: usize| u64::from(le_u32(&b[at..at + 4])) | u64::from(le_u32(&b[at + 4..at + 8])) << 32;
        let position = |at: usize| {
            let mut bytes = [0; Position::BYTES];
            bytes.copy_from_slice(&b[at..at + Position::BYTES]);
            Position::from_bytes(&bytes)
        };
        let mut salts = [0; 8];
        salts.copy_from_slice(&b[32..40]);
        let Some(at_frame) = position(48) else { return Ok(None) };
        let state = le_u32(&b[92..96]);
        let file = if state & BACKFILLING == 0 {
            let Some(position) = position(104) else { return Ok(None) };
            FileState::AtRest { position, modified: long(96) as i64 }
        } else {
            let mut nonce = [0; Mark::BYTES];
            nonce.copy_from_slice(&b[104..120]);
            // The end of no database is at its begin.
            let mark = Some(Mark { offset: long(96), nonce }).filter(|mark| mark.offset > 0);
            FileState::Backfilling(Witnesses::decode(&b[WITNESSES_AT..CHECK_AT]).marked(mark))
        };
        let anchor = Anchor {
            generation: long(24),
            salts: Salts(salts),
            frame: le_u32(&b[12..16]),
            sum: WalSum(le_u32(&b[40..44]), le_u32(&b[44..48])),
            position: at_frame,
            pages: le_u32(&b[88..92]),
            file,
            ahead: state & AHEAD != 0,
        };
        Ok(Some((long(16), anchor)))
    }
}

/// The two anchors and the epoch history of a database.
#[derive(Debug)]
pub(crate) struct Anchors {
    file: File,
    path: PathBuf,
    sequence: u64,
    /// Of an anchor that was forgotten.
    generation: u64,
    /// The file was there, and no anchor was ever written to it.
    unwritten: bool,
    /// It was made just now.
    made: bool,
    slots: [Option<(u64, Anchor)>; 2],
}

impl Anchors {
    /// Opens the file, or makes an empty one.
    pub(crate) fn open(side: &Path) -> Result<Anchors> {
        let path = side.join("anchors");
        let (file, created) = crate::side::open_or_create(&path)?;
        if created {
            sync_directory(side)?;
        }
        let bytes = file.metadata().map_err(Error::io("stat", &path))?.len();
        let mut slots = [None; 2];
        for (slot, offset) in slots.iter_mut().zip(SLOT_OFFSETS) {
            let mut bytes = [0; SLOT_BYTES];
            // A file that is too short has no such slot yet.
            if read_exact_at(&file, &mut bytes, offset).is_ok() {
                *slot = Anchor::decode(&bytes).map_err(|found| Error::Newer {
                    path: path.clone(),
                    found,
                    supported: VERSION,
                })?;
            }
        }
        let sequence = slots.iter().flatten().map(|(s, _)| *s).max().unwrap_or(0);
        let unwritten = !created && bytes <= SLOT_BYTES as u64 && slots[0].is_none();
        Ok(Anchors { file, path, sequence, generation: 0, unwritten, made: created, slots })
    }

    /// The anchors that are there, newest first.
    pub(crate) fn newest_first(&self) -> Vec<Anchor> {
        let mut all: Vec<_> = self.slots.iter().flatten().copied().collect();
        all.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
        all.into_iter().map(|(_, anchor)| anchor).collect()
    }

    /// Whether a node that made the file died before it had written the first anchor: then nothing is missing.
    pub(crate) fn unwritten(&self) -> bool {
        self.unwritten
    }

    /// Beside a history there must have been anchors: a file that was made just now is not to be taken for that of a first start.
    pub(crate) fn miss(&mut self) -> Result<()> {
        if std::mem::take(&mut self.made) {
            let bytes = SLOT_OFFSETS[1] + SLOT_BYTES as u64;
            self.file.set_len(bytes).map_err(Error::io("extend", &self.path))?;
            self.file.sync_all().map_err(Error::io("fsync", &self.path))?;
        }
        Ok(())
    }

    /// Forgets anchors that are of no use: the next one is written over them.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Anchor) -> bool) {
        self.generation = self.generation();
        for slot in &mut self.slots {
            *slot = slot.filter(|(_, anchor)| keep(anchor));
        }
    }

    /// The highest generation that was ever used.
    pub(crate) fn generation(&self) -> u64 {
        let known = self.slots.iter().flatten().map(|(_, a)| a.generation);
        known.max().unwrap_or(0).max(self.generation)
    }

    /// Writes an anchor over the older one; durable on return when `durable`.
    pub(crate) fn write(&mut self, anchor: Anchor, durable: bool) -> Result<()> {
        let older = match (&self.slots[0], &self.slots[1]) {
            (None, _) => 0,
            (_, None) => 1,
            (Some((a, _)), Some((b, _))) => usize::from(a > b),
        };
        self.sequence += 1;
        let bytes = anchor.encode(self.sequence);
        write_all_at(&self.file, &bytes, SLOT_OFFSETS[older]).map_err(Error::io("write", &self.path))?;
        if durable {
            self.file.sync_data().map_err(Error::io("fsync", &self.path))?;
        }
        self.slots[older] = Some((self.sequence, anchor));
        Ok(())
    }
}

/// When a file was last modified, in nanoseconds since 1970.
pub(crate) fn modified_of(meta: &Metadata, path: &Path) -> Result<i64> {
    let time = meta.modified().map_err(Error::io("stat", path))?;
    Ok(time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i64))
}

/// Gives a file a modification time that no later write will give it, and says which. The kernel takes the time of a write from a clock that may
/// stand still for milliseconds, and some file systems keep whole seconds: two writes may have the same. Nothing where the time can't be set,
/// which is for the file's owner to do. Nobody else may be writing. By its descriptor where there is one: at the path there may be another by now.
pub(crate) fn stamp(path: &Path, open: Option<&File>) -> Result<Option<i64>> {
    /// What the coarsest file systems keep.
    const COARSEST_MICROS: i64 = 2_000_000;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64);
    for micros in [now, now - COARSEST_MICROS] {
        if let Err(error) = set_modified(path, open, micros) {
            tracing::debug!(path = %path.display(), %error, "the modification time can't be set");
            return Ok(None);
        }
        let meta =
            open.map_or_else(|| fs::metadata(path), File::metadata).map_err(Error::io("stat", path))?;
        let found = modified_of(&meta, path)?;
        // One that was rounded may come again as long as its second lasts: then one that is over.
        if found == micros * 1000 || micros < now {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// By name, or by a descriptor that stays open: to close one of a database would drop SQLite's locks on it.
#[cfg(unix)]
fn set_modified(path: &Path, open: Option<&File>, micros: i64) -> std::io::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, futimens, utimensat};

    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let (tv_sec, rest) = (micros.div_euclid(1_000_000), micros.rem_euclid(1_000_000));
    let last_modification = Timespec { tv_sec, tv_nsec: (rest * 1000) as _ };
    let times = Timestamps { last_access, last_modification };
    match open {
        Some(file) => Ok(futimens(file, &times)?),
        None => Ok(utimensat(CWD, path, &times, AtFlags::empty())?),
    }
}

#[cfg(not(unix))]
fn set_modified(path: &Path, _: Option<&File>, micros: i64) -> std::io::Result<()> {
    let time = UNIX_EPOCH + std::time::Duration::from_micros(micros.max(0) as u64);
    fs::OpenOptions::new().write(true).open(path)?.set_modified(time)
}

/// The epochs of a database's history, and whether this node opened the newest one.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Epochs {
    pub(crate) history: EpochHistory,
    pub(crate) own: bool,
}

/// Reads the epoch history; empty when there is none.
pub(crate) fn read_epochs(side: &Path) -> Result<Epochs> {
    let path = side.join("epochs");
    let mut bytes = Vec::new();
    match crate::side::open(&path) {
        Ok(file) => file.take(EPOCHS_MAX_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", &path))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Epochs::default()),
        Err(e) => return Err(Error::io("open", &path)(e)),
    };
    let cure = "says which transactions are of which epoch; it is put aside as `epochs.corrupt`, and made good from the log at the next start";
    let corrupt = |what: &str| Error::Corrupt { path: path.clone(), offset: 0, what: what.into(), cure };
    let (body, check) = bytes.split_last_chunk::<16>().ok_or_else(|| corrupt("too short"))?;
    if blake3::hash(body).as_bytes()[..16] != *check || body.len() < 12 || body[..8] != EPOCHS_MAGIC {
        return Err(corrupt("its checksum does not match"));
    }
    let version = le_u32(&body[8..12]);
    if version > VERSION {
        return Err(Error::Newer { path, found: version, supported: VERSION });
    }
    let own = match body.get(12..16).map(le_u32) {
        Some(own @ 0..2) => own == 1,
        _ => return Err(corrupt("too short")),
    };
    Ok(Epochs { history: EpochHistory::decode(&body[16..]).map_err(corrupt)?, own })
}

/// Replaces the epoch history, durably. `own`: this node opened the newest epoch.
pub(crate) fn write_epochs(side: &Path, history: &EpochHistory, own: bool) -> Result<()> {
    let mut bytes = EPOCHS_MAGIC.to_vec();
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&u32::from(own).to_le_bytes());
    bytes.extend_from_slice(&history.encode());
    let check = blake3::hash(&bytes);
    bytes.extend_from_slice(&check.as_bytes()[..16]);
    replace_file(side, "epochs", &bytes)
}

/// Replaces a small file by rename, durably; on a full disk by means of the reserve.
pub(crate) fn replace_file(side: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    reserve::with(side, || reserve::replace(side, name, bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::checksum::Checksum;
    use crate::txid::{Epoch, EpochStart, Txid};

    fn anchor(frame: u32) -> Anchor {
        let position = Position::new(Txid::new(Epoch::new(2, 9), 77), Checksum::from_u128(5));
        Anchor {
            generation: 3,
            salts: Salts([1, 2, 3, 4, 5, 6, 7, 8]),
            frame,
            sum: WalSum(10, 11),
            position,
            pages: 12,
            file: FileState::AtRest { position, modified: -5 },
            ahead: frame.is_multiple_of(2),
        }
    }

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut anchors = Anchors::open(dir.path()).unwrap();
        assert!(anchors.newest_first().is_empty());
        for frame in 1..=3 {
            anchors.write(anchor(frame), true).unwrap();
        }
        let again = Anchors::open(dir.path()).unwrap();
        assert_eq!(again.newest_first(), vec![anchor(3), anchor(2)]);
        // Frame 3 went over frame 1, into the first slot.
        for at in 0..SLOT_BYTES {
            let path = dir.path().join("anchors");
            let whole = fs::read(&path).unwrap();
            let mut torn = whole.clone();
            torn[at] ^= 0x40;
            fs::write(&path, &torn).unwrap();
            assert_eq!(Anchors::open(dir.path()).unwrap().newest_first(), vec![anchor(2)], "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(Anchors::open(dir.path()).unwrap().newest_first().is_empty());
            fs::write(&path, &whole).unwrap();
        }
    }

    #[test]
    fn who_was_copying_and_which_pages_were_missing_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut anchors = Anchors::open(dir.path()).unwrap();
        let number = |n| PageNo::new(n).unwrap();
        let all = (1..=20).map(|n| Witness::new(number(n), PageHash::of(number(n), &[n as u8; 512])));
        for count in [0, 1, Witnesses::MAX, Witnesses::MAX + 5] {
            let witnesses: Witnesses = all.clone().take(count).collect();
            let written = Anchor { file: FileState::Backfilling(witnesses), ..anchor(1) };
            anchors.write(written, true).unwrap();
            assert_eq!(Anchors::open(dir.path()).unwrap().newest_first()[0], written);
            assert_eq!(
                witnesses.iter().collect::<Vec<_>>(),
                all.clone().take(count.min(8)).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn a_stamped_time_is_the_files_and_no_other_writes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let now = || modified_of(&fs::metadata(file.path()).unwrap(), file.path()).unwrap();
        for round in 0..100 {
            let before = now();
            let open = (round % 2 == 1).then_some(file.as_file());
            let stamped = stamp(file.path(), open).unwrap().unwrap();
            assert_eq!(now(), stamped);
            assert_ne!(stamped, before);
            file.as_file().write_all(b"more").unwrap();
            assert_ne!(now(), stamped);
        }
        assert!(stamp(Path::new("/nowhere"), None).unwrap().is_none());
    }

    #[test]
    fn a_newer_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = anchor(1).encode(1);
        bytes[8] = 2;
        let check = blake3::hash(&bytes[..CHECK_AT]);
        bytes[CHECK_AT..].copy_from_slice(&check.as_bytes()[..16]);
        fs::write(dir.path().join("anchors"), bytes).unwrap();
        assert!(matches!(Anchors::open(dir.path()), Err(Error::Newer { found: 2, .. })));
    }

    #[test]
    fn a_newer_epoch_history_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = EPOCHS_MAGIC.to_vec();
        bytes.extend_from_slice(&(VERSION + 1).to_le_bytes());
        bytes.extend_from_slice(b"what only a newer version knows");
        let check = blake3::hash(&bytes);
        bytes.extend_from_slice(&check.as_bytes()[..16]);
        fs::write(dir.path().join("epochs"), &bytes).unwrap();
        assert!(matches!(read_epochs(dir.path()), Err(Error::Newer { found: 2, supported: 1, .. })));
        assert_eq!(fs::read(dir.path().join("epochs")).unwrap(), bytes);
    }

    #[test]
    fn the_epoch_history_survives_and_every_flipped_byte_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_epochs(dir.path()).unwrap(), Epochs::default());
        let mut history = EpochHistory::default();
        history.push(EpochStart { epoch: Epoch::new(1, 2), first: 3, before: Checksum::EMPTY });
        for own in [false, true] {
            write_epochs(dir.path(), &history, own).unwrap();
            assert_eq!(read_epochs(dir.path()).unwrap(), Epochs { history: history.clone(), own });
        }
        let path = dir.path().join("epochs");
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            fs::write(&path, &flipped).unwrap();
            assert!(matches!(read_epochs(dir.path()), Err(Error::Corrupt { .. })), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(read_epochs(dir.path()).is_err(), "cut at {at}");
        }
    }
}
