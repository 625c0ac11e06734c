//! Anchors: which position a frame of the WAL stands for. The node keeps them beside the database.
//!
//! `<state directory>/anchors` has two slots of 256 bytes, at 0 and 4096. The node writes them in
//! turn, so a torn write leaves the other. `<state directory>/epochs` holds the epoch history; the
//! node replaces it by rename.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::checksum::{FINGERPRINT_BYTES, Fingerprint};
use crate::descriptors::NodeFile;
use crate::engine::file::witnesses::CopyTag;
use crate::engine::file::witnesses::WitnessPage;
use crate::engine::file::witnesses::Witnesses;
use crate::error::{Error, Result};
use crate::files::sealed::{CHECK_BYTES, HEAD_BYTES, Sealed, Unsealed};
use crate::files::{Paths, read_exact_at, sync_directory, write_all_at};
use crate::txid::Position;
use crate::wal::{Salts, WalSum, le_u32};

const SLOT_BYTES: usize = 256;
/// A slot is a sealed file in the file.
const SLOT: Sealed = Sealed {
    magic: *b"repanchr",
    oldest: 2,
    version: 2,
    max_bytes: SLOT_BYTES as u64,
    cure: "says what the database file is; the other slot counts",
};
/// The slots lie in different sectors and pages of any disk.
const SLOT_OFFSETS: [u64; 2] = [0, 4096];
const CHECK_AT: usize = SLOT_BYTES - CHECK_BYTES;
const WITNESSES_AT: usize = 120;
const KEY_AT: usize = CHECK_AT - FINGERPRINT_BYTES;
const _: () = assert!(WITNESSES_AT + Witnesses::MAX * WitnessPage::BYTES <= KEY_AT);

/// What was known of the database file alone when an anchor was written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FileState {
    /// The file alone, without the WAL, is the state at `position`. No process has written to it
    /// since `modified` (nanoseconds since 1970).
    AtRest { position: Position, modified: i64 },
    /// The node is copying frames up to the anchor into the file, or may have begun to: it need not
    /// be a committed state.
    Backfilling(Witnesses),
}

/// The position that a frame of the WAL stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Anchor {
    /// Counts the WAL generations that this node began. The node never reuses a number, so it never
    /// reuses salts either.
    pub(crate) generation: u64,
    pub(crate) salts: Salts,
    /// A commit frame of that generation; zero: only what `file` says counts.
    pub(crate) frame: u32,
    pub(crate) sum: WalSum,
    pub(crate) position: Position,
    /// The database's size in pages.
    pub(crate) pages: u32,
    pub(crate) file: FileState,
    /// The node wrote the anchor before its commit frame, which may not have come to be. Then the
    /// anchor counts for nothing.
    pub(crate) ahead: bool,
}

/// Bits of a slot's state word.
const BACKFILLING: u32 = 1;
const AHEAD: u32 = 2;

impl Anchor {
    fn encode(&self, sequence: u64, key: Fingerprint) -> [u8; SLOT_BYTES] {
        let mut b = [0; SLOT_BYTES];
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
                if let Some(CopyTag { offset, nonce }) = witnesses.mark {
                    b[96..104].copy_from_slice(&offset.to_le_bytes());
                    b[104..120].copy_from_slice(&nonce);
                }
                for (place, witness) in
                    b[WITNESSES_AT..KEY_AT].chunks_exact_mut(WitnessPage::BYTES).zip(witnesses.iter())
                {
                    place.copy_from_slice(&witness.to_bytes());
                }
            }
        }
        b[KEY_AT..CHECK_AT].copy_from_slice(&key.0);
        let sealed = SLOT.seal(&b[HEAD_BYTES..CHECK_AT]);
        b.copy_from_slice(&sealed);
        b
    }

    /// Also says which page key it goes with.
    fn decode(b: &[u8; SLOT_BYTES]) -> Result<Option<(u64, Anchor, Fingerprint)>, Unsealed> {
        match SLOT.open(b) {
            Ok(_) => {}
            // As a rule a torn write, or none yet.
            Err(Unsealed::Damaged(_)) => return Ok(None),
            Err(other) => return Err(other),
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
            let mut nonce = [0; CopyTag::BYTES];
            nonce.copy_from_slice(&b[104..120]);
            // The end of no database is at its begin.
            let mark = Some(CopyTag { offset: long(96), nonce }).filter(|mark| mark.offset > 0);
            FileState::Backfilling(
                Witnesses::decode(&b[WITNESSES_AT..WITNESSES_AT + Witnesses::MAX * WitnessPage::BYTES])
                    .marked(mark),
            )
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
        let mut key = [0; FINGERPRINT_BYTES];
        key.copy_from_slice(&b[KEY_AT..CHECK_AT]);
        Ok(Some((long(16), anchor, Fingerprint(key))))
    }
}

/// The two anchors and the epoch history of a database.
#[derive(Debug)]
pub(crate) struct Anchors {
    file: NodeFile,
    path: PathBuf,
    sequence: u64,
    /// Of the page key that the positions in them go with.
    key: Fingerprint,
    /// What the newest anchor of another page key says of the file. It names no state of this
    /// database.
    other: Option<FileState>,
    /// The highest generation of an anchor that was forgotten.
    generation: u64,
    /// The file was there, and no node ever wrote an anchor to it.
    unwritten: bool,
    /// This node made the file just now.
    made: bool,
    slots: [Option<(u64, Anchor)>; 2],
}

impl Anchors {
    /// Opens the file, or makes an empty one. Anchors of another page key say nothing.
    pub(crate) fn open(paths: &Paths, key: Fingerprint) -> Result<Anchors> {
        let path = paths.anchors();
        let (file, created) = crate::files::open_or_create(&path)?;
        if created {
            sync_directory(paths.state_dir())?;
        }
        let bytes = file.metadata().map_err(Error::io("stat", &path))?.len();
        let read = read(&file, &path)?;
        let all = || read.iter().flatten();
        let sequence = all().map(|(sequence, ..)| *sequence).max().unwrap_or(0);
        // No number of a generation is used twice, whatever it went with.
        let generation = all().map(|(_, anchor, _)| anchor.generation).max().unwrap_or(0);
        let others = all().filter(|(.., of)| *of != key);
        let other = others.max_by_key(|(sequence, ..)| *sequence).map(|(_, anchor, _)| anchor.file);
        let slots = read.map(|slot| slot.filter(|(.., of)| *of == key).map(|(s, anchor, _)| (s, anchor)));
        let unwritten = !created && bytes <= SLOT_BYTES as u64 && slots[0].is_none();
        Ok(Anchors { file, path, sequence, key, other, generation, unwritten, made: created, slots })
    }

    /// The anchors that are there, newest first.
    pub(crate) fn newest_first(&self) -> Vec<Anchor> {
        let mut all: Vec<_> = self.slots.iter().flatten().copied().collect();
        all.sort_by_key(|(sequence, _)| std::cmp::Reverse(*sequence));
        all.into_iter().map(|(_, anchor)| anchor).collect()
    }

    /// Whether an anchor of another page key was there.
    pub(crate) fn has_others(&self) -> bool {
        self.other.is_some()
    }

    /// Whether an anchor of another page key was there that says that a node was copying frames
    /// into the file.
    pub(crate) fn copied_by_others(&self) -> bool {
        matches!(self.other, Some(FileState::Backfilling(_)))
    }

    /// Whether a node that made the file died before it had written the first anchor. Then nothing
    /// is missing.
    pub(crate) fn unwritten(&self) -> bool {
        self.unwritten
    }

    /// Notes that anchors are missing: beside a history there must have been some. A file that was
    /// made just now must not pass for that of a first start.
    pub(crate) fn miss(&mut self) -> Result<()> {
        if std::mem::take(&mut self.made) {
            let bytes = SLOT_OFFSETS[1] + SLOT_BYTES as u64;
            self.file.set_len(bytes).map_err(Error::io("extend", &self.path))?;
            self.file.sync_all().map_err(Error::io("fsync", &self.path))?;
        }
        Ok(())
    }

    /// Forgets anchors that are of no use. The next one overwrites them.
    pub(crate) fn retain(&mut self, keep: impl Fn(&Anchor) -> bool) {
        self.generation = self.generation();
        for slot in &mut self.slots {
            *slot = slot.filter(|(_, anchor)| keep(anchor));
        }
    }

    /// The highest generation that this database ever used.
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
        let bytes = anchor.encode(self.sequence, self.key);
        write_all_at(&self.file, &bytes, SLOT_OFFSETS[older]).map_err(Error::io("write", &self.path))?;
        if durable {
            self.file.sync_data().map_err(Error::io("fsync", &self.path))?;
        }
        self.slots[older] = Some((self.sequence, anchor));
        Ok(())
    }
}

type ReadSlot = Option<(u64, Anchor, Fingerprint)>;

fn read(file: &File, path: &Path) -> Result<[ReadSlot; 2]> {
    let mut slots = [None; 2];
    for (slot, offset) in slots.iter_mut().zip(SLOT_OFFSETS) {
        let mut bytes = [0; SLOT_BYTES];
        // A file that is too short has no such slot yet.
        if read_exact_at(file, &mut bytes, offset).is_ok() {
            *slot = Anchor::decode(&bytes).map_err(|why| SLOT.refused(path, why))?;
        }
    }
    Ok(slots)
}

/// Which page key the newest anchor goes with, if there is one that can be read.
pub(crate) fn anchored_key(paths: &Paths) -> Option<Fingerprint> {
    let path = paths.anchors();
    let slots = read(&*crate::files::open(&path).ok()?, &path).ok()?;
    let newest = slots.into_iter().flatten().max_by_key(|(sequence, ..)| *sequence);
    newest.map(|(.., key)| key)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;
    use crate::checksum::Checksum;
    use crate::engine::file::modified::modified_of;
    use crate::engine::file::modified::stamp;
    use crate::engine::tests::KEY;
    use crate::hex::{hex, unhex_lossy};
    use crate::page::PageNo;
    use crate::txid::{Epoch, Txid};

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

    /// A slot up to its last field that is not zero, the page key's fingerprint, and its hash.
    const FIELDS: &str = concat!(
        "726570616e63687202000000010000000100000000000000030000000000000001020304050607080a0000000b00",
        "0000020000000000000009000000000000004d00000000000000050000000000000000000000000000000c000000",
        "00000000fbffffffffffffff020000000000000009000000000000004d000000000000000500000000000000",
    );
    const KEY_NAME: &str = "879da2dd53acbf762fed258221cda48f";
    const CHECK: &str = "6038a347fef4ca986656355289b98250";

    #[test]
    fn a_slots_bytes_stay_what_they_are() {
        let mut bytes = anchor(1).encode(1, KEY.fingerprint());
        let (fields, check) = (hex(&bytes[..FIELDS.len() / 2]), hex(&bytes[CHECK_AT..]));
        assert_eq!((fields.as_str(), check.as_str()), (FIELDS, CHECK));
        assert!(bytes[FIELDS.len() / 2..KEY_AT].iter().all(|byte| *byte == 0));
        assert_eq!(hex(&bytes[KEY_AT..CHECK_AT]), KEY_NAME);
        bytes.fill(0);
        bytes[..FIELDS.len() / 2].copy_from_slice(&unhex_lossy(FIELDS));
        bytes[KEY_AT..CHECK_AT].copy_from_slice(&unhex_lossy(KEY_NAME));
        bytes[CHECK_AT..].copy_from_slice(&unhex_lossy(CHECK));
        assert_eq!(Anchor::decode(&bytes), Ok(Some((1, anchor(1), KEY.fingerprint()))));
    }

    #[test]
    fn a_torn_slot_leaves_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let mut anchors = Anchors::open(&paths, KEY.fingerprint()).unwrap();
        assert!(anchors.newest_first().is_empty());
        for frame in 1..=3 {
            anchors.write(anchor(frame), true).unwrap();
        }
        let again = Anchors::open(&paths, KEY.fingerprint()).unwrap();
        assert_eq!(again.newest_first(), vec![anchor(3), anchor(2)]);
        // Frame 3 went over frame 1, into the first slot.
        for at in 0..SLOT_BYTES {
            let path = paths.anchors();
            let whole = fs::read(&path).unwrap();
            let mut torn = whole.clone();
            torn[at] ^= 0x40;
            fs::write(&path, &torn).unwrap();
            assert_eq!(
                Anchors::open(&paths, KEY.fingerprint()).unwrap().newest_first(),
                vec![anchor(2)],
                "byte {at}"
            );
            fs::write(&path, &whole[..at]).unwrap();
            assert!(Anchors::open(&paths, KEY.fingerprint()).unwrap().newest_first().is_empty());
            fs::write(&path, &whole).unwrap();
        }
    }

    #[test]
    fn who_was_copying_and_which_pages_were_missing_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let mut anchors = Anchors::open(&paths, KEY.fingerprint()).unwrap();
        let number = |n| PageNo::new(n).unwrap();
        let all = (1..=20).map(|n| WitnessPage::new(number(n), KEY.hash(number(n), &[n as u8; 512])));
        for count in [0, 1, Witnesses::MAX, Witnesses::MAX + 5] {
            let witnesses: Witnesses = all.clone().take(count).collect();
            let written = Anchor { file: FileState::Backfilling(witnesses), ..anchor(1) };
            anchors.write(written, true).unwrap();
            assert_eq!(Anchors::open(&paths, KEY.fingerprint()).unwrap().newest_first()[0], written);
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
        assert!(stamp(std::path::Path::new("/nowhere"), None).unwrap().is_none());
    }

    #[test]
    fn a_newer_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::fresh(dir.path());
        let bytes =
            Sealed { version: 3, ..SLOT }.seal(&anchor(1).encode(1, KEY.fingerprint())[HEAD_BYTES..CHECK_AT]);
        fs::write(paths.anchors(), bytes).unwrap();
        assert!(matches!(Anchors::open(&paths, KEY.fingerprint()), Err(Error::Newer { found: 3, .. })));
    }
}
