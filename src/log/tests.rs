use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::BytesMut;
use tempfile::TempDir;

use super::*;
use crate::checksum::{Checksum, PageKey};
use crate::ends::Ends;
use crate::page::{PageNo, PageSize};
use crate::txid::{Epoch, Txid};
use crate::wire::{self, Decoder, Kind, Message, SEGMENT_BYTES, TxnBegin, TxnEnd};
use std::time::SystemTime;

const KEY: PageKey = PageKey::from_bytes([7; 28]);

const OPTIONS: LogOptions = LogOptions {
    page_key: KEY,
    segment_bytes: 4000,
    keep_bytes: 1 << 30,
    keep_age: Duration::from_secs(3600),
    quota_bytes: 1 << 30,
    tail_bytes: 1 << 20,
};
const HEAD: u64 = SEGMENT_BYTES as u64;

fn position(n: u64) -> Position {
    Position::new(Txid::new(Epoch::new(1, 9), n), Checksum::from_u128(u128::from(n) * 77))
}

/// The record of transaction `n`: pages that differ by transaction.
fn record(n: u64, pages: u32) -> Bytes {
    let mut out = BytesMut::new();
    let page_size = PageSize::new(512).unwrap();
    let begin = TxnBegin { before: position(n - 1), epoch: Epoch::new(1, 9), page_size };
    wire::encode(&Message::TxnBegin(begin), &mut out);
    for p in 1..=pages {
        let (number, page) = (PageNo::new(p).unwrap(), [(n % 251) as u8; 512]);
        wire::encode_page(number, KEY.hash(number, &page), &page, &mut out);
    }
    let end = TxnEnd { after: position(n), pages, changed: pages, unix_micros: n };
    wire::encode(&Message::TxnEnd(end), &mut out);
    out.freeze()
}

fn put(log: &Log, n: u64, pages: u32) {
    log.append(record(n, pages), Some(position(n))).unwrap();
}

fn open(dir: &TempDir) -> Arc<Log> {
    Log::open(dir.path(), OPTIONS).unwrap()
}

/// A log from position 0 with records 1 to `n`, each of one page.
fn filled(dir: &TempDir, n: u64, options: LogOptions) -> Arc<Log> {
    let log = Log::open(dir.path(), options).unwrap();
    log.reset(position(0)).unwrap();
    for i in 1..=n {
        put(&log, i, 1);
    }
    log
}

fn files_of(dir: &TempDir) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
}

fn copy_of(dir: &TempDir) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for file in files_of(dir) {
        fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    copy
}

fn contents(dir: &TempDir) -> BTreeMap<PathBuf, Vec<u8>> {
    files_of(dir).into_iter().map(|f| (f.file_name().unwrap().into(), fs::read(f).unwrap())).collect()
}

/// All bytes from transaction `number` on, read from disk in small pieces.
fn read_from(log: &Log, number: u64) -> Vec<u8> {
    let Lookup::At { mut lsn, before } = log.find(number).unwrap() else { panic!("{number} is not there") };
    assert_eq!(before, position(number));
    let mut all = Vec::new();
    loop {
        lsn = log.step_over(lsn);
        let piece = log.read_disk(lsn, 333).unwrap();
        if piece.is_empty() {
            assert_eq!(lsn, log.end());
            return all;
        }
        lsn += piece.len() as u64;
        all.extend_from_slice(&piece);
    }
}

/// Asserts that the log has exactly the records `first` to `last`, and that it goes on.
fn assert_records(log: &Log, first: u64, last: u64) {
    assert_eq!(log.tip(), Some(position(last)));
    assert_eq!(log.start(), Some(position(first - 1)));
    let expected: Vec<u8> = (first..=last).flat_map(|n| record(n, 1)).collect();
    assert!(read_from(log, first - 1) == expected, "not the records {first} to {last}");
    put(log, last + 1, 1);
    assert!(read_from(log, last) == record(last + 1, 1), "record {} is not where it belongs", last + 1);
}

#[test]
fn an_empty_log_has_no_position_and_a_reset_gives_it_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(&dir);
    assert_eq!((log.tip(), log.start(), log.end(), log.bytes()), (None, None, 0, 0));
    assert_eq!(log.find(0).unwrap(), Lookup::TooOld);
    assert!(matches!(log.append(record(1, 1), None), Err(Error::Internal(_))));
    log.reset(position(41)).unwrap();
    drop(log);
    let log = open(&dir);
    assert_eq!((log.tip(), log.start(), log.bytes()), (Some(position(41)), Some(position(41)), HEAD));
    assert_eq!(log.find(41).unwrap(), Lookup::At { lsn: 0, before: position(41) });
    assert_eq!((log.find(40).unwrap(), log.find(42).unwrap()), (Lookup::TooOld, Lookup::NotYet));
    assert!(log.read_disk(0, 10).unwrap().is_empty());
    assert!(log.read_disk(1, 10).is_err());
    assert!(log.read_memory(0, 10).is_none());
}

#[test]
fn records_rotate_are_found_and_read_alike_from_memory_and_disk() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 60, OPTIONS);
    assert!(files_of(&dir).len() >= 8, "{:?}", files_of(&dir));
    for reopened in [false, true] {
        let log = if reopened { open(&dir) } else { log.clone() };
        for n in 0..=60 {
            let expected: Vec<u8> = (n + 1..=60).flat_map(|n| record(n, 1)).collect();
            assert!(read_from(&log, n) == expected, "from {n}, reopened: {reopened}");
        }
        assert_eq!(log.find(61).unwrap(), Lookup::NotYet);
    }
    let (mut lsn, mut all) = (0, Vec::new());
    while let Some(piece) = log.read_memory(lsn, 100) {
        lsn += piece.len() as u64;
        all.extend_from_slice(&piece);
    }
    assert_eq!(lsn, log.end());
    assert!(all == read_from(&log, 0));
    let mut decoder = Decoder::new(Some(KEY));
    decoder.push(all.into());
    while let Some(unit) = decoder.next().unwrap() {
        assert!(unit.kind != Kind::Segment && unit.decode().is_ok());
    }
}

#[test]
fn a_record_in_parts_stays_in_one_segment_and_counts_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 2, OPTIONS);
    let big = record(3, 40);
    let most = big.len() - 80;
    for part in big[..most].chunks(700) {
        log.append(Bytes::copy_from_slice(part), None).unwrap();
        assert_eq!(log.tip(), Some(position(2)));
    }
    assert_eq!(files_of(&dir).len(), 1);
    let found = log.find(2).unwrap();
    assert!(matches!(found, Lookup::At { lsn, .. } if lsn < log.end()));
    // Reopened without its end: gone.
    let copy = copy_of(&dir);
    log.append(big.slice(most..), Some(position(3))).unwrap();
    assert_eq!(files_of(&dir).len(), 1);
    assert!(read_from(&log, 2) == big);
    put(&log, 4, 1);
    assert!(read_from(&log, 3) == record(4, 1));
    assert_records(&open(&copy), 1, 2);
}

#[test]
fn the_tail_is_bounded_and_older_bytes_come_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let one = record(1, 1).len() as u64;
    let log = filled(&dir, 10, LogOptions { tail_bytes: 3 * one as usize, ..OPTIONS });
    assert!(log.read_memory(6 * one, 10).is_none());
    for n in 7..10 {
        assert!(log.read_memory(n * one, usize::MAX).unwrap() == record(n + 1, 1));
        assert!(log.read_disk(n * one, one as usize).unwrap() == record(n + 1, 1));
    }
    // Larger than the tail: read from disk.
    put(&log, 11, 40);
    assert!(log.read_memory(10 * one, 10).is_none());
    assert!(log.read_disk(10 * one, 10).unwrap() == record(11, 40)[..10]);
}

#[test]
fn cut_at_any_byte_the_log_has_the_whole_records_before() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(&dir, 8, OPTIONS));
    let files = files_of(&dir);
    let last = files.last().unwrap();
    let (before, length) = (files.len() as u64 - 1, fs::metadata(last).unwrap().len());
    let one = record(1, 1).len() as u64;
    let in_last = (length - HEAD) / one;
    assert!(before > 0 && in_last > 0);
    for cut in 0..length {
        let copy = copy_of(&dir);
        let file = fs::OpenOptions::new().write(true).open(files_of(&copy).last().unwrap()).unwrap();
        file.set_len(cut).unwrap();
        let whole = cut.saturating_sub(HEAD) / one;
        assert_records(&open(&copy), 1, 8 - in_last + whole);
    }
}

#[test]
fn a_flipped_bit_anywhere_in_the_last_segment_cuts_the_log_there() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(&dir, 8, OPTIONS));
    let last = files_of(&dir).pop().unwrap();
    let good = fs::read(&last).unwrap();
    let one = record(1, 1).len() as u64;
    let in_last = (good.len() as u64 - HEAD) / one;
    for at in 0..good.len() {
        let copy = copy_of(&dir);
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(copy.path().join(last.file_name().unwrap()), &bad).unwrap();
        let whole = (at as u64).saturating_sub(HEAD) / one;
        assert_records(&open(&copy), 1, 8 - in_last + whole);
    }
}

#[test]
fn missing_and_damaged_segments_leave_the_newest_run() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(&dir, 40, OPTIONS));
    let names: Vec<_> = files_of(&dir).iter().map(|f| f.file_name().unwrap().to_owned()).collect();
    let head_of = |name: &std::ffi::OsStr| fs::read(dir.path().join(name)).unwrap()[..SEGMENT_BYTES].to_vec();
    let first_of = |i: usize| {
        let mut decoder = Decoder::new(Some(KEY));
        decoder.push(head_of(&names[i]).into());
        match decoder.next().unwrap().unwrap().decode().unwrap() {
            Message::Segment(head) => head.before.number() + 1,
            other => panic!("{other:?}"),
        }
    };
    let latest = names.len() - 1;
    for (i, name) in names[..latest].iter().enumerate() {
        let whole = fs::read(dir.path().join(name)).unwrap();
        let flipped = |at: usize| {
            let mut bad = whole.clone();
            bad[at] ^= 4;
            Some(bad)
        };
        let mut damages = vec![None, Some(Vec::new()), Some(whole[..40].to_vec()), flipped(50), flipped(4)];
        damages.push(Some(whole[..whole.len() - 1].to_vec()));
        if i + 1 == latest {
            // It may not have been fsynced, so it is verified in full.
            damages.push(flipped(whole.len() / 2));
        }
        for damage in damages {
            let copy = copy_of(&dir);
            match damage {
                None => fs::remove_file(copy.path().join(name)).unwrap(),
                Some(bytes) => fs::write(copy.path().join(name), bytes).unwrap(),
            }
            assert_records(&open(&copy), first_of(i + 1), 40);
            assert!(!files_of(&copy).iter().any(|f| f.ends_with(name)));
        }
    }
    // All gone but a torn one: nothing is left, nothing fails.
    let copy = copy_of(&dir);
    for name in &names {
        fs::write(copy.path().join(name), b"").unwrap();
    }
    assert_eq!(open(&copy).tip(), None);
    // Other files are none of our business.
    let copy = copy_of(&dir);
    fs::write(copy.path().join("notes.log"), b"x").unwrap();
    assert_records(&open(&copy), 1, 40);
    assert_eq!(fs::read(copy.path().join("notes.log")).unwrap(), b"x");
}

#[test]
fn damage_in_an_older_segment_is_an_error_where_it_is_met() {
    let dir = tempfile::tempdir().unwrap();
    drop(filled(&dir, 40, OPTIONS));
    let first = files_of(&dir)[0].clone();
    let mut bytes = fs::read(&first).unwrap();
    bytes[SEGMENT_BYTES + 1] ^= 0xff;
    fs::write(&first, bytes).unwrap();
    let log = open(&dir);
    let told = log.find(3).unwrap_err();
    assert!(matches!(&told, Error::Corrupt { path, .. } if *path == first), "{told}");
    assert!(
        told.to_string().contains("has transactions for replicas")
            && told.to_string().contains("move the directory")
    );
    let Lookup::At { lsn: until, .. } = log.find(39).unwrap() else { panic!() };
    let told = log.records(0, until, |_, _| Ok(())).unwrap_err();
    assert!(matches!(&told, Error::Corrupt { path, .. } if *path == first), "{told}");
    assert!(matches!(log.find(39).unwrap(), Lookup::At { .. }));
}

#[test]
fn a_newer_segment_is_refused_and_nothing_is_changed() {
    for which in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        drop(filled(&dir, 8, OPTIONS));
        let file = files_of(&dir)[which].clone();
        let mut bytes = fs::read(&file).unwrap();
        bytes[6] = 4;
        let mut hasher = blake3::Hasher::new_keyed(b"replite unit hash, version 1 ...");
        hasher.update(&bytes[..8]).update(&bytes[24..SEGMENT_BYTES]);
        bytes[8..24].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        // And a torn tail, which must not be cut either.
        bytes.truncate(bytes.len() - 5);
        fs::write(&file, bytes).unwrap();
        let before = contents(&dir);
        let found = Log::open(dir.path(), OPTIONS).unwrap_err();
        assert!(matches!(found, Error::Newer { found: 4, supported: 3, .. }), "{found}");
        assert_eq!(contents(&dir), before);
    }
}

/// A segment of the first version had no fingerprint.
#[test]
fn an_older_segment_is_refused_with_the_cure_and_nothing_is_changed() {
    let dir = tempfile::tempdir().unwrap();
    let mut head = 56u32.to_le_bytes().to_vec();
    head.extend_from_slice(&[13, 0, 1, 0]);
    head.extend_from_slice(&[0; 16]);
    head.extend_from_slice(&[0; 8]);
    head.extend_from_slice(&position(0).to_bytes());
    head.extend_from_slice(&[0xff; 8]);
    let mut hasher = blake3::Hasher::new_keyed(b"replite unit hash, version 1 ...");
    hasher.update(&head[..8]).update(&head[24..]);
    head[8..24].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    for records in [0, 5000] {
        fs::write(dir.path().join("0000000000000000.log"), [&head[..], &vec![1; records]].concat()).unwrap();
        let before = contents(&dir);
        let found = Log::open(dir.path(), OPTIONS).unwrap_err();
        assert!(matches!(found, Error::Older { found: 1, supported: 3, .. }), "{found}");
        assert!(found.to_string().contains("move its state directory away"), "{found}");
        assert_eq!(contents(&dir), before);
    }
}

#[test]
fn segments_of_another_page_key_are_moved_away_and_none_of_ours() {
    let (dir, kept) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let other = LogOptions { page_key: PageKey::from_bytes([8; 28]), ..OPTIONS };
    let ours = KEY.fingerprint();
    drop(filled(&dir, 8, other));
    let files = files_of(&dir);
    assert!(files.len() > 1, "the case needs more than one");
    let before = contents(&dir);
    assert!(matches!(Log::open(dir.path(), OPTIONS), Err(Error::Internal(_))), "it is never begun over");
    assert_eq!((contents(&dir), key_of(dir.path())), (before.clone(), Some(other.page_key.fingerprint())));
    let to = kept.path().to_path_buf();
    // A process that dies when the first is moved.
    fs::rename(&files[0], to.join(files[0].file_name().unwrap())).unwrap();
    let moved = move_other(dir.path(), ours, || Ok(to.clone())).unwrap();
    assert_eq!(moved.map(|(kept, _)| kept), Some(to));
    assert_eq!(contents(&kept), before);
    assert!(contents(&dir).is_empty());
    drop(filled(&dir, 8, OPTIONS));
    let before = contents(&dir);
    assert_eq!(move_other(dir.path(), ours, || panic!("nothing is to be kept")).unwrap(), None);
    assert_eq!(contents(&dir), before);
    // Without a record there is nothing to keep.
    let empty = tempfile::tempdir().unwrap();
    drop(filled(&empty, 0, other));
    assert_eq!(move_other(empty.path(), ours, || panic!("nothing is to be kept")).unwrap(), None);
    assert!(contents(&empty).is_empty());
}

#[test]
fn an_abort_takes_back_the_unfinished_record_and_never_reuses_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 5, OPTIONS);
    let clean = log.end();
    log.abort().unwrap();
    assert_eq!(log.end(), clean, "nothing to take back");
    let watch = log.watch();
    log.append(record(6, 3).slice(..900), None).unwrap();
    let old_end = log.end();
    log.abort().unwrap();
    assert!(log.end() > old_end && watch.has_changed().unwrap());
    for lsn in clean..=old_end {
        assert!(log.read_memory(lsn, 1).is_none() && log.read_disk(lsn, 1).is_err(), "{lsn}");
    }
    assert_eq!(log.step_over(clean), log.end());
    assert_eq!(log.step_over(clean + 1), clean + 1);
    assert_eq!(log.find(5).unwrap(), Lookup::At { lsn: log.end(), before: position(5) });
    put(&log, 6, 1);
    assert!(log.read_memory(old_end + 1, usize::MAX).unwrap() == record(6, 1));
    assert_eq!(log.step_over(clean), old_end + 1);
    log.sync().unwrap();
    assert_records(&open(&copy_of(&dir)), 1, 6);
    // A power loss may bring back what was cut off: the next segment's head decides.
    let copy = copy_of(&dir);
    let file = files_of(&copy)[files_of(&copy).len() - 2].clone();
    let mut bytes = fs::read(&file).unwrap();
    bytes.extend_from_slice(&record(6, 3)[..900]);
    fs::write(&file, bytes).unwrap();
    assert_records(&open(&copy), 1, 6);
    // The log's first record.
    let fresh = tempfile::tempdir().unwrap();
    let first = filled(&fresh, 0, OPTIONS);
    first.append(record(1, 1).slice(..100), None).unwrap();
    first.abort().unwrap();
    assert_eq!(open(&copy_of(&fresh)).tip(), Some(position(0)));
    assert_records(&first, 1, 0);
    // A record that is a segment's first.
    let log = open(&dir);
    for n in 7..15 {
        for _ in 0..2 {
            log.append(record(n, 2).slice(..100), None).unwrap();
            log.abort().unwrap();
        }
        put(&log, n, 1);
    }
    assert_records(&open(&copy_of(&dir)), 1, 14);
    assert_records(&log, 1, 14);
}

#[test]
fn a_reset_declares_a_gap() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 20, OPTIONS);
    let old_end = log.end();
    log.append(record(21, 3).slice(..900), None).unwrap();
    let before = copy_of(&dir);
    log.reset(position(100)).unwrap();
    assert!(log.end() > old_end + 900);
    assert!(log.read_disk(old_end, 1).is_err() && log.read_memory(0, 1).is_none());
    assert_eq!((log.find(20).unwrap(), log.find(99).unwrap()), (Lookup::TooOld, Lookup::TooOld));
    assert_eq!(files_of(&dir).len(), 1);
    assert_records(&open(&copy_of(&dir)), 101, 100);
    put(&log, 101, 1);
    // Old segments that a power loss brought back do not belong to the new one.
    for file in files_of(&before) {
        fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    drop(log);
    assert_records(&open(&dir), 101, 101);
}

#[test]
fn the_oldest_segments_go_by_size_by_age_and_not_while_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let sized = LogOptions { keep_bytes: 12_000, quota_bytes: 20_000, ..OPTIONS };
    let log = filled(&dir, 100, sized);
    assert!(log.bytes() <= 12_000 + 5_000, "{}", log.bytes());
    assert_eq!(log.find(0).unwrap(), Lookup::TooOld);
    assert!(log.read_disk(0, 1).is_err());
    assert!(files_of(&dir).len() <= log.lock().segments.len() + GARBAGE_MAX, "{:?}", files_of(&dir));
    log.sync().unwrap();
    let on_disk = files_of(&dir).iter().map(|f| fs::metadata(f).unwrap().len()).sum::<u64>();
    assert_eq!(on_disk, log.bytes());

    let start = log.start().unwrap().number();
    let Lookup::At { lsn, .. } = log.find(start).unwrap() else { panic!() };
    let pin = log.pin(lsn);
    let mut n = 100;
    while log.bytes() < 19_000 {
        n += 1;
        put(&log, n, 1);
    }
    assert_eq!(log.start().unwrap().number(), start, "what is pinned is gone");
    for _ in 0..20 {
        n += 1;
        put(&log, n, 1);
    }
    assert!(log.start().unwrap().number() > start && log.bytes() < 26_000, "a pin has no limit");
    let Lookup::At { lsn, .. } = log.find(n).unwrap() else { panic!() };
    pin.advance(lsn);
    assert!(log.bytes() <= 12_000);
    drop(pin);
    let first = log.start().unwrap().number() + 1;
    assert_records(&log, first, n);
    drop(log);

    // By age, which no clock of the system tells: not what the files say, but for how long the
    // records have been there since the log was opened.
    for file in files_of(&dir) {
        let file = fs::OpenOptions::new().write(true).open(file).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
    }
    assert!(files_of(&dir).len() > 1);
    let log = Log::open(dir.path(), sized).unwrap();
    assert!(files_of(&dir).len() > 1, "its clock may have been wrong, or is now");
    drop(log);
    let log = Log::open(dir.path(), LogOptions { keep_age: Duration::ZERO, ..sized }).unwrap();
    until_one_is_left(&dir, &log);
    assert_eq!(log.tip(), Some(position(n + 1)));
    assert!(!log.drop_oldest());
    drop(log);
    let log = Log::open(dir.path(), sized).unwrap();
    for _ in 0..10 {
        n += 1;
        put(&log, n + 1, 1);
    }
    log.sync().unwrap();
    let count = files_of(&dir).len();
    assert!(log.drop_oldest());
    assert_eq!(files_of(&dir).len(), count - 1);
}

#[test]
fn files_that_are_still_to_be_removed_count_for_the_quota() {
    let dir = tempfile::tempdir().unwrap();
    let sized = LogOptions { keep_bytes: 12_000, quota_bytes: 20_000, ..OPTIONS };
    let log = filled(&dir, 10, sized);
    let on_disk = || files_of(&dir).iter().map(|f| fs::metadata(f).unwrap().len()).sum::<u64>();
    let mut n = 10;
    let mut most = 0;
    for _ in 0..3 {
        // What a replica needs is kept, up to the quota. Once it needs that no more, it is garbage.
        let Lookup::At { lsn, .. } = log.find(log.start().unwrap().number()).unwrap() else { panic!() };
        let pin = log.pin(lsn);
        while log.bytes() < 18_500 {
            n += 1;
            put(&log, n, 1);
            most = on_disk().max(most);
        }
        drop(pin);
    }
    assert!(most > 18_500 && most <= 20_000, "{most} bytes on the disk");
}

#[test]
fn a_reader_beside_an_appender_sees_the_same_bytes() {
    const RECORDS: u64 = 3000;
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { segment_bytes: 40_000, tail_bytes: 20_000, ..OPTIONS };
    let log = filled(&dir, 0, options);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ends = Ends(&done);
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let (mut lsn, mut hasher, mut disk) = (0, blake3::Hasher::new(), 0);
                    loop {
                        let finished = done.load(Ordering::Acquire);
                        let piece = match log.read_memory(lsn, 5000) {
                            Some(piece) => piece,
                            None => {
                                disk += 1;
                                log.read_disk(lsn, 5000).unwrap()
                            }
                        };
                        if piece.is_empty() && finished {
                            return (hasher.finalize(), disk);
                        }
                        hasher.update(&piece);
                        lsn += piece.len() as u64;
                    }
                })
            })
            .collect();
        let mut expected = blake3::Hasher::new();
        for n in 1..=RECORDS {
            let bytes = record(n, (n % 5) as u32);
            let middle = bytes.len() / 2;
            log.append(bytes.slice(..middle), None).unwrap();
            log.append(bytes.slice(middle..), Some(position(n))).unwrap();
            expected.update(&bytes);
            if n % 500 == 0 {
                log.sync().unwrap();
                assert!(matches!(log.find(n / 2).unwrap(), Lookup::At { .. }));
            }
        }
        drop(ends);
        for reader in readers {
            let (hash, disk) = reader.join().unwrap();
            assert_eq!(hash, expected.finalize());
            assert!(disk > 0);
        }
    });
}

#[test]
fn the_index_leads_past_records_larger_than_its_step() {
    let dir = tempfile::tempdir().unwrap();
    let options = LogOptions { segment_bytes: 1 << 30, ..OPTIONS };
    let log = filled(&dir, 0, options);
    let sizes = [1, 700, 1, 1, 600, 30, 1, 1200, 1];
    for (n, pages) in sizes.into_iter().enumerate() {
        put(&log, n as u64 + 1, pages);
    }
    for log in [&log, &Log::open(copy_of(&dir).path(), options).unwrap()] {
        let mut lsn = 0;
        for (n, pages) in sizes.into_iter().enumerate() {
            let n = n as u64;
            assert_eq!(log.find(n).unwrap(), Lookup::At { lsn, before: position(n) });
            lsn += record(n + 1, pages).len() as u64;
        }
        assert_eq!(log.end(), lsn);
    }
}

/// Files can't grow beyond some kilobytes in the child, as on a full disk: a part of a write
/// succeeds.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_log_as_it_was() {
    const CHILD: &str = "REPLITE_TEST_FULL_DISK";
    if let Some(dir) = std::env::var_os(CHILD) {
        return full_disk_child(Path::new(&dir));
    }
    let dir = tempfile::tempdir().unwrap();
    let test = "log::tests::a_full_disk_leaves_the_log_as_it_was";
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD, dir.path())
        .stdout(std::process::Stdio::piped())
        .status()
        .unwrap();
    assert!(status.success());
    assert!(!files_of(&dir).is_empty(), "the child did nothing");
}

#[cfg(unix)]
fn full_disk_child(dir: &Path) {
    let options = LogOptions { segment_bytes: 1 << 30, ..OPTIONS };
    let log = Log::open(dir, options).unwrap();
    log.reset(position(0)).unwrap();
    let mut n = 0;
    let error = loop {
        match log.append(record(n + 1, 1), Some(position(n + 1))) {
            Ok(()) => n += 1,
            Err(error) => break error,
        }
        assert!(n < 1000, "no limit on the file's size");
    };
    assert!(matches!(error, Error::Io { op: "append to", .. }), "{error}");
    let end = log.end();
    let on_disk = || fs::read_dir(dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum::<u64>();
    assert_eq!((log.tip(), on_disk()), (Some(position(n)), log.bytes()));
    assert!(log.read_memory(end, 1).is_none() && log.read_disk(end, 1).unwrap().is_empty());
    // It fails again, also within a record, and what was taken of that record can be given back.
    assert!(log.append(record(n + 1, 1), Some(position(n + 1))).is_err());
    let _ = log.append(record(n + 1, 1).slice(..84), None);
    assert!(log.append(record(n + 1, 9).slice(84..), None).is_err());
    log.abort().unwrap();
    assert!(read_from(&log, 0) == (1..=n).flat_map(|n| record(n, 1)).collect::<Vec<_>>());
    assert_eq!(Log::open(dir, options).unwrap().tip(), Some(position(n)));
    log.reset(position(n + 10)).unwrap();
    put(&log, n + 11, 1);
    assert_eq!(Log::open(dir, options).unwrap().tip(), Some(position(n + 11)));
}

#[test]
fn transactions_are_listed_across_segments_and_from_any_place() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 40, OPTIONS);
    assert!(files_of(&dir).len() > 3);
    let all = log.list(0, 1000).unwrap();
    assert_eq!(
        all.iter().map(|t| t.position).collect::<Vec<_>>(),
        (1..=40).map(position).collect::<Vec<_>>()
    );
    for one in &all {
        assert_eq!((one.changed_pages, one.pages, one.log_bytes), (1, 1, record(1, 1).len() as u64));
        assert_eq!(one.time, SystemTime::UNIX_EPOCH + Duration::from_micros(one.position.number()));
    }
    for after in 0..=41 {
        let some = log.list(after, 7).unwrap();
        let numbers: Vec<_> = some.iter().map(|t| t.position.number()).collect();
        assert_eq!(numbers, (after + 1..=40).take(7).collect::<Vec<_>>());
    }
    // A record that is not complete is none.
    let half = record(41, 2);
    log.append(half.slice(..half.len() - 80), None).unwrap();
    assert_eq!(log.list(38, 10).unwrap().len(), 2);
    // What was dropped is left out; a log of an earlier opening has no index yet.
    while files_of(&dir).len() > 2 {
        log.drop_oldest();
    }
    drop(log);
    let log = open(&dir);
    let first = log.list(0, 1).unwrap()[0].position.number();
    assert!(first > 1);
    assert_eq!(log.list(0, 100).unwrap().len() as u64, 41 - first);
    let empty = tempfile::tempdir().unwrap();
    assert!(open(&empty).list(0, 10).unwrap().is_empty());
}

/// All but the current segment are older than no time at all.
fn until_one_is_left(dir: &TempDir, log: &Log) {
    let end = Instant::now() + Duration::from_secs(60);
    while files_of(dir).len() > 1 {
        assert!(Instant::now() < end, "what is old is kept");
        log.sync().unwrap();
    }
}

/// Descriptors of a file that stand for another one until this is dropped.
#[cfg(target_os = "linux")]
pub(crate) struct Broken {
    right: Vec<(i32, std::os::fd::OwnedFd)>,
    stand_for: std::path::PathBuf,
}

#[cfg(target_os = "linux")]
impl Broken {
    /// For one that takes all that is written and can't be synced, or for one that can't be
    /// written.
    pub(crate) fn at(path: &Path, writable: bool) -> Broken {
        let stand_for = if writable { Path::new("/dev/null") } else { path };
        let other = fs::File::options().read(true).write(writable).open(stand_for).unwrap();
        let mut right = Vec::new();
        for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            if number != std::os::fd::AsRawFd::as_raw_fd(&other)
                && fs::read_link(entry.path()).is_ok_and(|to| to == path)
            {
                right.push((number, lead(number, &other)));
            }
        }
        assert!(!right.is_empty(), "{} is not open", path.display());
        Broken { right, stand_for: stand_for.to_path_buf() }
    }
}

#[cfg(target_os = "linux")]
impl Drop for Broken {
    fn drop(&mut self) {
        for (number, right) in &self.right {
            // One that was closed meanwhile may have its number for another file.
            if fs::read_link(format!("/proc/self/fd/{number}")).is_ok_and(|to| to == self.stand_for) {
                drop(lead(*number, right));
            }
        }
    }
}

/// Has a descriptor stand for what another does; what it stood for.
#[cfg(target_os = "linux")]
fn lead(number: i32, to: &impl std::os::fd::AsRawFd) -> std::os::fd::OwnedFd {
    use std::os::fd::BorrowedFd;
    // SAFETY: the log whose descriptor it is lives on; only what the number stands for changes.
    unsafe {
        let before = BorrowedFd::borrow_raw(number).try_clone_to_owned().unwrap();
        assert_eq!(libc::dup2(to.as_raw_fd(), number), number);
        before
    }
}

/// The second fsync says that all is well, as it does on a system that has thrown away what it
/// could not write.
#[test]
#[cfg(target_os = "linux")]
fn after_an_fsync_that_failed_nothing_counts_as_synced_until_the_records_are_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let log = filled(&dir, 20, OPTIONS);
    log.sync().unwrap();
    let current = files_of(&dir).into_iter().max().unwrap();
    {
        let _broken = Broken::at(&current, true);
        put(&log, 21, 1);
        assert!(log.sync().is_err());
    }
    assert!(log.sync().is_err(), "what the first one lost is forgotten");
    let refused = log.append(record(22, 1), Some(position(22)));
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(log.tip(), Some(position(21)));
    assert_eq!(log.renew().unwrap(), Some(position(21)));
    assert_eq!(log.renew().unwrap(), None);
    assert_eq!((log.start(), log.tip()), (Some(position(21)), Some(position(21))));
    log.sync().unwrap();
    put(&log, 22, 1);
    log.sync().unwrap();
    assert_eq!(files_of(&dir).len(), 1);
    drop(log);
    let log = open(&dir);
    assert_eq!(log.start(), Some(position(21)));
    assert_records(&log, 22, 22);
    // Within a record it waits for the end of that; and it is the same when a new segment has the
    // one before synced.
    let half = record(23, 2);
    log.append(half.slice(..100), None).unwrap();
    let broken = Broken::at(&files_of(&dir)[0], true);
    assert!(log.sync().is_err());
    assert_eq!(log.renew().unwrap(), None);
    log.reset(position(23)).unwrap();
    drop(broken);
    let broken = Broken::at(&files_of(&dir)[0], true);
    let mut n = 24;
    while log.append(record(n, 8), Some(position(n))).is_ok() {
        assert!(n < 100, "no new segment, or none that is synced");
        n += 1;
    }
    drop(broken);
    assert!(log.doubtful() && log.sync().is_err());
    assert_eq!(log.renew().unwrap(), Some(position(n - 1)));
}
