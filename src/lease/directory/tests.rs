use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use tempfile::TempDir;

use super::entry::Entry;
use super::names::new_record;
use super::register::{KEPT, NumberedFiles};
use super::*;
use crate::lease::record::RECORD_MAX_BYTES;

struct Place {
    temporary: TempDir,
    register: NumberedFiles,
}

impl Place {
    fn new() -> Place {
        let temporary = tempfile::tempdir().unwrap();
        let register = NumberedFiles::new(temporary.path().join("lease"));
        Place { temporary, register }
    }

    fn with(records: u64) -> Place {
        let place = Place::new();
        place.go_on(records);
        place
    }

    fn file(&self, name: &str) -> PathBuf {
        self.register.path().join(name)
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.register.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn current(&self) -> Option<(Vec<u8>, Version)> {
        self.register.current().unwrap().map(|entry| (entry.record, entry.version))
    }

    fn version(&self) -> Option<Version> {
        self.current().map(|(_, version)| version)
    }

    /// So many more records.
    fn go_on(&self, records: u64) -> Version {
        (0..records).for_each(|_| drop(self.write("on")));
        self.version().unwrap()
    }

    fn write(&self, record: &str) -> Version {
        self.register.swap(self.version().as_ref(), record.as_bytes()).unwrap()
    }
}

fn assert_conflict(swapped: Result<Version, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Conflict)), "{swapped:?}");
}

fn assert_unknown(swapped: Result<Version, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Unknown(_))), "{swapped:?}");
}

fn unavailable<T: std::fmt::Debug>(swapped: Result<T, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unavailable(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_record_takes_the_place_of_the_one_that_was_read_and_a_few_stay() {
    let place = Place::new();
    assert_eq!(place.current(), None);
    let first = place.register.swap(None, b"one").unwrap();
    assert_conflict(place.register.swap(None, b"two"));
    fs::write(place.file("notes.txt"), "not ours").unwrap();
    fs::write(place.file("lease-7.txt"), "nor this").unwrap();
    let second = place.register.swap(Some(&first), b"one").unwrap();
    assert_ne!(first, second);
    assert_conflict(place.register.swap(Some(&first), b"three"));
    place.go_on(100);
    assert_eq!(place.current().unwrap().0, b"on");
    let mut left: BTreeSet<String> = (102 - KEPT + 1..=102).map(names::record).collect();
    left.extend(["notes.txt".into(), "lease-7.txt".into()]);
    assert_eq!(place.names(), left);
    // What an operator sees.
    let text = fs::read_to_string(place.file("lease-00000000000000000102")).unwrap();
    assert_eq!(text.split_once('\n').unwrap().1, "on");
    assert!(text.starts_with("replite-lease 1 00000000000000000102 "));
}

#[cfg(unix)]
#[test]
fn directory_and_files_are_their_owners() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    let place = Place::with(2);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(place.register.path()), 0o700);
    assert_eq!(mode(&place.file(&names::record(2))), 0o600);
    let chmod = |mode| fs::set_permissions(place.register.path(), fs::Permissions::from_mode(mode)).unwrap();
    // That others see the files is for its owner to say.
    chmod(0o755);
    let version = place.go_on(1);
    assert_eq!(mode(place.register.path()), 0o755);
    for open in [0o777, 0o1777, 0o770, 0o702] {
        chmod(open);
        assert!(place.register.current().unwrap_err().contains("chmod 700"));
        assert!(unavailable(place.register.swap(Some(&version), b"x")).contains("chmod 700"));
    }
    chmod(0o700);
    assert_eq!(place.version(), Some(version));
    let link = place.temporary.path().join("link");
    symlink(place.register.path(), &link).unwrap();
    let linked = NumberedFiles::new(link);
    assert!(linked.current().unwrap_err().contains("symbolic link"));
    assert!(unavailable(linked.swap(None, b"x")).contains("symbolic link"));
}

#[test]
fn a_writer_that_was_stopped_finds_its_number_taken() {
    let place = Place::with(3);
    let stopped = place.register.prepare(place.version().as_ref(), b"late").unwrap();
    let newest = place.go_on(2);
    assert_conflict(place.register.publish(&stopped));
    assert_eq!(place.version(), Some(newest));
    // Also the first.
    let place = Place::new();
    let stopped = place.register.prepare(None, b"late").unwrap();
    place.go_on(1);
    assert_conflict(place.register.publish(&stopped));
}

#[test]
fn a_writer_whose_number_was_removed_meanwhile_has_not_swapped() {
    for first in [true, false] {
        let place = Place::new();
        if !first {
            place.go_on(3);
        }
        let stopped = place.register.prepare(place.version().as_ref(), b"late").unwrap();
        let (number, bytes) = (stopped.entry.number, stopped.entry.encode());
        let newest = place.go_on(KEPT + 3);
        assert!(!place.file(&names::record(number)).exists());
        // Its own file was removed with the number.
        assert_conflict(place.register.publish(&stopped));
        assert_eq!(place.version().as_ref(), Some(&newest));
        // It had only compared, and writes its file now: the number can be taken once more.
        fs::write(place.file(&new_record(number, stopped.entry.id)), bytes).unwrap();
        assert_unknown(place.register.publish(&stopped));
        assert!(place.file(&names::record(number)).exists());
        assert_eq!(place.version().as_ref(), Some(&newest));
        place.go_on(1);
        assert!(!place.file(&names::record(number)).exists(), "removed by the next");
    }
}

/// The listing alone would say that the number counts.
#[test]
fn a_number_counts_only_while_the_record_before_it_is_there() {
    let place = Place::with(3);
    let stopped = place.register.prepare(place.version().as_ref(), b"late").unwrap();
    fs::remove_file(place.file(&names::record(3))).unwrap();
    assert_unknown(place.register.publish(&stopped));
    // Another record with that number is not the one before it.
    let place = Place::with(3);
    let stopped = place.register.prepare(place.version().as_ref(), b"late").unwrap();
    fs::remove_file(place.file(&names::record(3))).unwrap();
    place.go_on(1);
    assert_unknown(place.register.publish(&stopped));
}

#[test]
fn a_writer_that_was_stopped_after_it_took_its_number_knows_what_became_of_it() {
    // Others went on from its record.
    let place = Place::with(3);
    let ours = place.register.prepare(place.version().as_ref(), b"ours").unwrap();
    fs::hard_link(place.file(&new_record(4, ours.entry.id)), place.file(&names::record(4))).unwrap();
    assert_eq!(place.version().as_ref(), Some(&ours.entry.version));
    place.go_on(2);
    place.register.settle(&ours).unwrap();
    // They went on for so long that nothing is left to ask.
    place.go_on(KEPT);
    assert!(matches!(place.register.settle(&ours), Err(SwapError::Unknown(_))));
}

#[test]
fn a_writer_that_was_killed_leaves_nothing_that_stays() {
    let place = Place::with(2);
    let version = place.version();
    // Before the link, with half of its file.
    fs::write(place.file(&new_record(3, 7)), "replite-le").unwrap();
    place.register.prepare(version.as_ref(), b"never linked").unwrap();
    assert_eq!(place.version(), version);
    // After the link: it counts.
    let linked = place.register.prepare(version.as_ref(), b"linked").unwrap();
    fs::hard_link(place.file(&new_record(3, linked.entry.id)), place.file(&names::record(3))).unwrap();
    assert_eq!(place.version().as_ref(), Some(&linked.entry.version));
    assert_conflict(place.register.swap(version.as_ref(), b"x"));
    place.go_on(1);
    assert_eq!(place.names(), (1..=4).map(names::record).collect());
}

#[cfg(unix)]
#[test]
fn what_others_put_under_our_names_is_told_and_not_taken() {
    let place = Place::with(2);
    let (version, nine) = (place.version(), place.file(&names::record(9)));
    let told = |what: &str| {
        for why in [
            place.register.current().unwrap_err(),
            unavailable(place.register.swap(version.as_ref(), b"x")),
            unavailable(place.register.swap(None, b"x")),
        ] {
            assert!(why.contains(what) && why.contains("00000000000000000009"), "{why}");
        }
    };
    fs::write(&nine, "").unwrap();
    told("did not write");
    fs::write(&nine, vec![b'x'; 1 << 20]).unwrap();
    told("longer than any record");
    fs::copy(place.file(&names::record(2)), &nine).unwrap();
    told("did not write");
    fs::remove_file(&nine).unwrap();
    fs::create_dir(&nine).unwrap();
    told("no file");
    fs::remove_dir(&nine).unwrap();
    std::os::unix::fs::symlink(place.file(&names::record(2)), &nine).unwrap();
    told("symbolic link");
    fs::remove_file(&nine).unwrap();
    // A pipe that no one writes to.
    assert!(std::process::Command::new("mkfifo").arg(&nine).status().unwrap().success());
    told("no file");
    fs::remove_file(&nine).unwrap();
    assert_eq!(place.version(), version);
    // Low ones are in nobody's way.
    fs::create_dir(place.file(&names::record(0))).unwrap();
    place.go_on(KEPT + 3);
    assert!(!place.file(&names::record(2)).exists());
    // There is none after the highest.
    let last = Entry::new(u64::MAX, 1, 2, b"x");
    fs::write(place.file(&names::record(u64::MAX)), last.encode()).unwrap();
    assert_eq!(place.version().as_ref(), Some(&last.version));
    unavailable(place.register.swap(Some(&last.version), b"y"));
}

#[test]
fn a_directory_that_is_emptied_removed_or_lost_begins_anew_with_other_versions() {
    let place = Place::new();
    let mut versions = BTreeSet::new();
    for how in ["emptied", "removed", "lost"] {
        // The same bytes under the same numbers.
        assert_eq!(place.current(), None, "{how}");
        for _ in 0..3 {
            assert!(versions.insert(place.write("same").as_str().to_owned()));
        }
        let version = place.version().unwrap();
        let prepared = place.register.prepare(Some(&version), b"prepared").unwrap();
        match how {
            "emptied" => place.names().iter().for_each(|name| fs::remove_file(place.file(name)).unwrap()),
            _ => fs::remove_dir_all(place.register.path()).unwrap(),
        }
        assert_eq!(place.current(), None, "{how}");
        assert_conflict(place.register.swap(Some(&version), b"x"));
        assert_conflict(place.register.publish(&prepared));
    }
    fs::remove_dir_all(place.temporary.path()).unwrap();
    // The volume is not mounted.
    assert!(place.register.current().unwrap_err().contains("no such directory"));
    unavailable(place.register.swap(None, b"x"));
}

#[test]
fn a_newest_record_that_is_removed_or_edited_by_hand_makes_another_version() {
    let place = Place::with(3);
    let third = place.version().unwrap();
    fs::remove_file(place.file(&names::record(3))).unwrap();
    assert_conflict(place.register.swap(Some(&third), b"x"));
    let again = place.go_on(1);
    assert_ne!(third, again);
    let text = fs::read_to_string(place.file(&names::record(3))).unwrap();
    fs::write(place.file(&names::record(3)), text + " ").unwrap();
    assert_eq!(place.current().unwrap().0, b"on ");
    assert_conflict(place.register.swap(Some(&again), b"x"));
    place.go_on(1);
}

#[test]
fn records_of_any_bytes_and_up_to_the_bound_come_back() {
    let place = Place::new();
    for bytes in [0, 1, 255, RECORD_MAX_BYTES] {
        let record: Vec<u8> = (0..bytes).map(|at| at as u8).collect();
        let version = place.register.swap(place.version().as_ref(), &record).unwrap();
        assert_eq!(place.current(), Some((record, version)));
    }
    let version = place.version();
    unavailable(place.register.swap(version.as_ref(), &[0; RECORD_MAX_BYTES + 1]));
    assert_eq!(place.version(), version);
}

#[test]
fn room_is_made_of_old_records_only() {
    let place = Place::with(9);
    let version = place.version();
    let prepared = place.register.prepare(version.as_ref(), b"next").unwrap();
    assert!(place.register.make_room(9));
    let left = [names::record(8), names::record(9), new_record(10, prepared.entry.id)];
    assert_eq!(place.names(), left.into_iter().collect());
    assert!(!place.register.make_room(9));
    place.register.publish(&prepared).unwrap();
}

#[tokio::test]
async fn a_change_is_told_to_those_who_wait_for_it() {
    let place = Place::with(1);
    let directory = Directory::new(place.register.path());
    // A look that finds nothing new goes on.
    assert!(tokio::time::timeout(Duration::from_millis(1), directory.changed()).await.is_err());
    let version = place.version().unwrap();
    let waiting = async { tokio::time::timeout(Duration::from_secs(60), directory.changed()).await };
    let write = async {
        tokio::task::yield_now().await;
        // Not before the first look: it may have seen this.
        let mut version = version;
        loop {
            version = directory.swap(Some(&version), b"another").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        told = waiting => told.expect("it is told"),
        () = write => {}
    }
}
