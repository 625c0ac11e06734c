//! The directory of a member: what Raft relies on, and what a crash or a bad disk leaves.

mod crash;
mod damage;
mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{
    EntryPayload, LeaderId, LogId, Membership, RaftLogReader, RaftSnapshotBuilder, StorageError, Vote,
};
use tempfile::TempDir;

use super::*;
use crate::error::{Error, Unsupported};
use crate::lease::record::RECORD_MAX_BYTES;
use crate::members::types::{Holds, LogEntry, Member, Proposal, Ruling, TypeConfig, version_of};

/// Makes storage for the suite of `openraft`, whose logs begin anywhere.
struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<u64>> {
        let dir = tempfile::tempdir().unwrap();
        let mut storage = Storage::create(&dir.path().join("members")).unwrap();
        storage.disk.lenient = true;
        let (log, machine) = storage.into_parts();
        Ok((dir, log, machine))
    }
}

#[test]
fn the_suite_of_openraft_passes() {
    Suite::test_all(Builder).unwrap();
}

fn id(term: u64, index: u64) -> LogId<u64> {
    LogId::new(LeaderId::new(term, 7), index)
}

fn members() -> Membership<u64, Member> {
    let member = |n| Member { url: format!("replite://node-{n}:8081"), witness: n == 9 };
    let nodes: BTreeMap<u64, Member> = [7, 8, 9].map(|n| (n, member(n))).into();
    Membership::new(vec![BTreeSet::from([7, 8, 9])], nodes)
}

/// The first entry has the members; the others write records, each over the one before it.
fn entry(term: u64, index: u64) -> LogEntry {
    let payload = match index {
        0 => EntryPayload::Membership(members()),
        1 => EntryPayload::Blank,
        _ => {
            let expected = (index > 2).then(|| version_of(&id(term, index - 1)));
            EntryPayload::Normal(Proposal::Swap {
                expected,
                nonce: index,
                record: format!("record {index}").into(),
            })
        }
    };
    LogEntry { log_id: id(term, index), payload }
}

fn entries(term: u64, indexes: std::ops::Range<u64>) -> Vec<LogEntry> {
    indexes.map(|index| entry(term, index)).collect()
}

/// What a directory is seen to have when it is opened.
#[derive(Clone, PartialEq, Debug)]
struct View {
    vote: Option<Vote<u64>>,
    purged: Option<LogId<u64>>,
    snapshot: Option<Agreed>,
    log: Vec<LogEntry>,
}

fn view_of(storage: &Storage) -> View {
    let disk = &storage.disk;
    View {
        vote: disk.vote,
        purged: disk.purged,
        snapshot: disk.snapshot.as_deref().cloned(),
        log: lock(&disk.entries).values().map(|kept| kept.entry.clone()).collect(),
    }
}

fn opened(directory: &Path) -> Storage {
    Storage::open(directory).unwrap().expect("a member")
}

fn view(directory: &Path) -> View {
    view_of(&opened(directory))
}

fn refusal(directory: &Path) -> Error {
    match Storage::open(directory) {
        Err(error) => error,
        Ok(storage) => panic!("{:?}", storage.map(|storage| view_of(&storage))),
    }
}

/// A directory in which all files are: entries 2 to 9 after a purge, in files of three, of which
/// the first begins with a purged one. The snapshot has entry 4.
async fn full(directory: &Path) -> (LogStore, StateMachine) {
    full_up_to(directory, 4).await
}

/// The same with a snapshot that has another entry.
async fn full_up_to(directory: &Path, covered: u64) -> (LogStore, StateMachine) {
    let (mut log, mut machine) = Storage::create(directory).unwrap().into_parts();
    log.save_vote(&Vote::new_committed(3, 7)).await.unwrap();
    log.blocking_append(entries(3, 0..1)).await.unwrap();
    for first in [1, 4, 7] {
        log.blocking_append(entries(3, first..first + 3)).await.unwrap();
    }
    machine.apply(entries(3, 0..covered + 1)).await.unwrap();
    machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    log.purge(id(3, 1)).await.unwrap();
    (log, machine)
}

#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let members = dir.path().join("members");
    assert!(Storage::open(&members).unwrap().is_none());
    let storage = Storage::create(&members).unwrap();
    assert!(!storage.has_state());
    let id_of_member = storage.id();
    drop(storage);
    let storage = opened(&members);
    assert!(!storage.has_state());
    assert_eq!(storage.id(), id_of_member);
    let (mut log, _) = storage.into_parts();
    log.save_vote(&Vote::new(1, 8)).await.unwrap();
    drop(log);
    assert!(opened(&members).has_state());
    assert!(matches!(Storage::create(&members), Err(Error::FileExists { .. })));
    fs::remove_dir_all(&members).unwrap();
    drop(full(&members).await);
    let storage = opened(&members);
    assert_ne!(storage.id(), id_of_member);
    let state = storage.watch().borrow().clone();
    assert_eq!(storage.newest_record().unwrap().version, "3-7-9", "agreed on or not");
    let seen = view_of(&storage);
    assert_eq!(seen.log, entries(3, 2..10));
    assert_eq!((seen.purged, seen.vote), (Some(id(3, 1)), Some(Vote::new_committed(3, 7))));
    assert_eq!(seen.snapshot.as_ref(), Some(&*state));
    assert_eq!(state.last_applied, Some(id(3, 4)));
    let register = state.register.as_ref().unwrap();
    assert_eq!((register.record.as_slice(), register.version.as_str()), (&b"record 4"[..], "3-7-4"));
    let names: BTreeSet<_> =
        fs::read_dir(members.join("log")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

/// It might have lost entries whose ids it would use again.
#[tokio::test]
async fn a_member_that_led_does_not_lead_on_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::create(dir.path()).unwrap();
    let me = storage.id();
    let (mut log, machine) = storage.into_parts();
    log.save_vote(&Vote::new_committed(4, me)).await.unwrap();
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new_committed(4, me)));
    drop((log, machine));
    let (mut log, machine) = opened(dir.path()).into_parts();
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(4, me)));
    log.save_vote(&Vote::new_committed(5, me ^ 1)).await.unwrap();
    drop((log, machine));
    let (mut log, _machine) = opened(dir.path()).into_parts();
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new_committed(5, me ^ 1)));
}

#[tokio::test]
async fn a_record_is_replaced_over_its_version_only_and_versions_differ() {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::create(dir.path()).unwrap();
    let mut seen = storage.watch();
    let (_log, mut machine) = storage.into_parts();
    let swap = |index, expected: Option<&str>, record: &[u8]| LogEntry {
        log_id: id(2, index),
        payload: EntryPayload::Normal(
            Proposal::swap(expected.map(crate::lease::Version::new).as_ref(), index, record).unwrap(),
        ),
    };
    let done = |version: &str| Ruling::Done(version.into());
    let conflict = |version: &str, nonce| Ruling::Conflict(Some(Holds { version: version.into(), nonce }));
    let swaps = [
        (swap(1, Some("2-7-0"), b"a"), Ruling::Conflict(None)),
        (swap(2, None, b"a"), done("2-7-2")),
        (swap(3, None, b"b"), conflict("2-7-2", 2)),
        (swap(4, Some("2-7-2"), b"a"), done("2-7-4")),
        (swap(5, Some("2-7-2"), b"c"), conflict("2-7-4", 4)),
        (swap(26, Some("2-7-4"), b"c"), done("2-7-1a")),
        (entry(2, 0), Ruling::Nothing),
        (entry(2, 1), Ruling::Nothing),
    ];
    for (entry, applied) in swaps {
        let state = seen.borrow_and_update().clone();
        assert_eq!(machine.apply(vec![entry.clone()]).await.unwrap(), vec![applied.clone()], "{entry}");
        assert!(seen.has_changed().unwrap(), "who watches is told");
        let unchanged = seen.borrow().register == state.register;
        assert_eq!(unchanged, !matches!(applied, Ruling::Done(_)));
    }
    assert_eq!(seen.borrow().membership.membership(), &members());
    let long = crate::lease::Version::new("a".repeat(51));
    assert!(matches!(Proposal::swap(Some(&long), 1, b""), Err(crate::lease::SwapError::Conflict)));
    let long = vec![0; RECORD_MAX_BYTES + 1];
    assert!(matches!(Proposal::swap(None, 1, &long), Err(crate::lease::SwapError::Unavailable(_))));
}

/// The lease's supervisor drops a call that takes too long.
#[tokio::test]
async fn a_call_that_is_dropped_goes_on_and_the_next_one_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, machine) = Storage::create(dir.path()).unwrap().into_parts();
    log.save_vote(&Vote::new_committed(3, 7)).await.unwrap();
    for index in 0..20 {
        {
            let call = std::pin::pin!(log.blocking_append([entry(3, index)]));
            let waker = std::task::Waker::noop();
            let _ = call.poll(&mut std::task::Context::from_waker(waker));
        }
        assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(id(3, index)));
    }
    drop((log, machine));
    assert_eq!(view(dir.path()).log, entries(3, 0..20));
}

#[tokio::test]
async fn long_entries_are_split_into_files_and_read_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut log, machine) = Storage::create(dir.path()).unwrap().into_parts();
    log.save_vote(&Vote::new_committed(3, 7)).await.unwrap();
    let long = |index| {
        let command = Proposal::swap(None, 1, &[255; RECORD_MAX_BYTES]).unwrap();
        LogEntry { log_id: id(3, index), payload: EntryPayload::Normal(command) }
    };
    let all: Vec<LogEntry> = (0..30).map(long).collect();
    log.blocking_append(all.clone()).await.unwrap();
    for file in fs::read_dir(dir.path().join("log")).unwrap() {
        assert!(file.unwrap().metadata().unwrap().len() <= formats::FILE_MAX_BYTES);
    }
    let mut reader = log.get_log_reader().await;
    let (mut read, mut parts) = (Vec::new(), 0);
    while read.len() < all.len() {
        let part = reader.limited_get_log_entries(read.len() as u64, 30).await.unwrap();
        assert!(!part.is_empty() && part.len() < 5, "{}", part.len());
        read.extend(part);
        parts += 1;
    }
    assert!(read == all && parts > 6);
    assert!(reader.try_get_log_entries(7..7).await.unwrap().is_empty());
    #[expect(clippy::reversed_empty_ranges, reason = "it must not panic")]
    let reversed = 9..7;
    assert!(reader.try_get_log_entries(reversed).await.unwrap().is_empty());
    drop((log, machine));
    assert!(view(dir.path()).log == all);
}

#[tokio::test]
async fn a_snapshot_of_the_leader_takes_the_place_of_the_state_and_an_older_one_does_not() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_leaders_log, mut leader) = full(&dirs[0].path().join("members")).await;
    leader.apply(entries(3, 5..8)).await.unwrap();
    let snapshot = leader.get_snapshot_builder().await.build_snapshot().await.unwrap();
    assert_eq!(snapshot.meta.snapshot_id, "3-7-7");
    let storage = Storage::create(dirs[1].path()).unwrap();
    let seen = storage.watch();
    let (mut log, mut machine) = storage.into_parts();
    log.save_vote(&Vote::new_committed(3, 7)).await.unwrap();
    machine.apply(entries(3, 0..3)).await.unwrap();
    let mut older = machine.get_snapshot_builder().await;
    let mut other = snapshot.clone();
    other.meta.last_log_id = Some(id(3, 6));
    assert!(machine.install_snapshot(&other.meta, other.snapshot).await.is_err());
    machine.install_snapshot(&snapshot.meta, snapshot.snapshot.clone()).await.unwrap();
    assert_eq!(**seen.borrow(), *snapshot.snapshot);
    assert_eq!(older.build_snapshot().await.unwrap().meta, snapshot.meta);
    assert_eq!(machine.get_current_snapshot().await.unwrap().unwrap().meta, snapshot.meta);
    log.purge(id(3, 7)).await.unwrap();
    assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(id(3, 7)));
    log.blocking_append(entries(3, 8..9)).await.unwrap();
    drop((log, machine, older));
    let seen = view(dirs[1].path());
    assert_eq!((seen.log, seen.snapshot), (entries(3, 8..9), Some(*snapshot.snapshot)));
}

/// Raft asks for it when its other task has not yet saved the snapshot of the leader.
#[tokio::test]
async fn a_purge_waits_for_the_snapshot_that_has_what_is_to_go() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_leaders_log, mut leader) = full(&dirs[0].path().join("members")).await;
    leader.apply(entries(3, 5..8)).await.unwrap();
    let snapshot = leader.get_snapshot_builder().await.build_snapshot().await.unwrap();
    let (mut log, mut machine) = Storage::create(dirs[1].path()).unwrap().into_parts();
    log.save_vote(&Vote::new_committed(3, 7)).await.unwrap();
    let (purged, installed) = tokio::join!(
        log.purge(id(3, 7)),
        machine.install_snapshot(&snapshot.meta, snapshot.snapshot.clone())
    );
    purged.unwrap();
    installed.unwrap();
    assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, Some(id(3, 7)));
}

/// What would make a log that no one can open again is refused before it is written.
#[tokio::test]
async fn a_call_that_contradicts_the_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = async |call: &str| {
        let directory = dir.path().join(call);
        let (mut log, machine) = full(&directory).await;
        let refused = match call {
            "gap" => log.blocking_append(entries(3, 11..12)).await,
            "overlap" => log.blocking_append(entries(3, 9..11)).await,
            "earlier leader" => log.blocking_append(entries(2, 10..11)).await,
            "too high" => log.blocking_append([entry(1 << 60, 10)]).await,
            "purged is truncated" => log.truncate(id(3, 1)).await,
            "covered is truncated" => log.truncate(id(3, 4)).await,
            "purged beyond the snapshot" => log.purge(id(3, 5)).await,
            _ => log.purge(id(2, 3)).await,
        };
        assert!(refused.is_err(), "{call}");
        assert!(log.save_vote(&Vote::new(9, 9)).await.is_err(), "{call}: Raft has ended");
        drop((log, machine));
        let seen = view(&directory);
        assert_eq!((seen.log, seen.purged), (entries(3, 2..10), Some(id(3, 1))), "{call}");
    };
    for call in ["gap", "overlap", "earlier leader", "too high", "another entry is purged"] {
        refused(call).await;
    }
    for call in ["purged is truncated", "covered is truncated", "purged beyond the snapshot"] {
        refused(call).await;
    }
}

#[tokio::test]
async fn after_a_call_that_failed_none_is_made_before_the_files_are_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("members");
    let (mut log, machine) = full(&directory).await;
    let (there, away) = (directory.join("log"), directory.join("away"));
    fs::rename(&there, &away).unwrap();
    let error = log.blocking_append(entries(3, 10..11)).await.unwrap_err();
    assert!(error.to_string().contains("000000000000000a"), "{error}");
    fs::rename(&away, &there).unwrap();
    assert!(log.blocking_append(entries(3, 10..11)).await.is_err());
    assert!(log.save_vote(&Vote::new(9, 9)).await.is_err());
    assert!(log.truncate(id(3, 9)).await.is_err());
    assert!(log.purge(id(3, 3)).await.is_err());
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), entries(3, 2..10));
    drop((log, machine));
    let (mut log, _machine) = opened(&directory).into_parts();
    log.blocking_append(entries(3, 10..11)).await.unwrap();
}

/// Files can't grow beyond some kilobytes in the child, as on a full disk: a part of a write
/// succeeds.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_nothing_that_was_not_written_is_there() {
    const CHILD: &str = "REPLITE_TEST_FULL_MEMBERS";
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    if let Some(directory) = std::env::var_os(CHILD) {
        return runtime.block_on(full_disk_child(Path::new(&directory)));
    }
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("members");
    drop(runtime.block_on(full(&directory)));
    let before = view(&directory);
    let test = "members::storage::tests::a_full_disk_is_an_error_and_nothing_that_was_not_written_is_there";
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact \"$1\" --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD, &directory)
        .stdout(std::process::Stdio::piped())
        .status()
        .unwrap();
    assert!(status.success());
    let after = view(&directory);
    assert_eq!(after.vote, Some(Vote::new(4, 9)), "the child did nothing");
    assert_eq!(View { vote: before.vote, ..after }, before);
}

#[cfg(unix)]
async fn full_disk_child(directory: &Path) {
    let (mut log, _machine) = opened(directory).into_parts();
    log.save_vote(&Vote::new(4, 9)).await.unwrap();
    let command = Proposal::swap(None, 1, &[255; RECORD_MAX_BYTES]).unwrap();
    let long = LogEntry { log_id: id(4, 10), payload: EntryPayload::Normal(command) };
    assert!(log.blocking_append([long]).await.is_err());
    assert_eq!(log.get_log_state().await.unwrap().last_log_id, Some(id(3, 9)));
    let left: Vec<PathBuf> =
        fs::read_dir(directory.join("log")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_copy_is_refused_and_a_directory_that_was_renamed_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let [first, renamed, copy] = ["first", "renamed", "copy"].map(|name| dir.path().join(name));
    drop(full(&first).await);
    let (before, id) = (view(&first), opened(&first).id());
    fs::rename(&first, &renamed).unwrap();
    let storage = opened(&renamed);
    assert_eq!((view_of(&storage), storage.id()), (before.clone(), id));
    assert!(matches!(Storage::open(&renamed), Err(Error::AlreadyOpen { .. })), "it is open");
    drop(storage);
    let cp = |from: &Path, to: &Path| {
        assert!(std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
    };
    let is_refused = |directory: &Path| match refusal(directory) {
        Error::Unsupported { path, reason: Unsupported::CopiedMember } => assert_eq!(path, directory),
        other => panic!("{other:?}"),
    };
    cp(&renamed, &copy);
    is_refused(&copy);
    is_refused(&copy);
    // The original is gone, and its copy takes its name.
    fs::remove_dir_all(&renamed).unwrap();
    fs::rename(&copy, &renamed).unwrap();
    is_refused(&renamed);
    fs::remove_dir_all(&renamed).unwrap();
    assert_ne!(Storage::create(&renamed).unwrap().id(), id);
}

#[tokio::test]
async fn a_directory_that_went_back_is_refused_until_it_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("members");
    // Raft still runs.
    let parts = full(&directory).await;
    Storage::mark_went_back(&directory, 7).unwrap();
    drop(parts);
    for _ in 0..2 {
        match refusal(&directory) {
            Error::Unsupported { path, reason: Unsupported::CopiedMember } => assert_eq!(path, directory),
            other => panic!("{other:?}"),
        }
    }
    fs::remove_dir_all(&directory).unwrap();
    drop(Storage::create(&directory).unwrap());
    opened(&directory);
}
