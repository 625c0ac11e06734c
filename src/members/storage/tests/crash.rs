//! Every combination of files that a crash can leave, made from the files before and after a call.

use super::*;
use crate::members::storage::steps::testing;

/// What the files have, by their path in the directory.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

fn tree(directory: &Path) -> Tree {
    let mut found = Tree::new();
    for folder in ["", "log"] {
        for entry in fs::read_dir(directory.join(folder)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                let bytes = fs::read(entry.path()).unwrap();
                found.insert(Path::new(folder).join(entry.file_name()), bytes);
            }
        }
    }
    found
}

/// Makes the directory's files these. The identity stays: another file would be a copy.
fn plant(directory: &Path, tree: &Tree) {
    for name in self::tree(directory).keys().filter(|name| !tree.contains_key(*name)) {
        fs::remove_file(directory.join(name)).unwrap();
    }
    for (name, bytes) in tree.iter().filter(|(name, _)| !name.ends_with("identity")) {
        fs::write(directory.join(name), bytes).unwrap();
    }
}

/// What a file goes through when it is written: nothing of it, pieces, all of it, and the name.
fn written(base: &Tree, name: &Path, bytes: &[u8]) -> Vec<Tree> {
    let mut new = name.as_os_str().to_owned();
    new.push(".new");
    let pieces = [0, 1, 11, bytes.len() / 2, bytes.len() - 1, bytes.len()];
    let mut states = vec![base.clone()];
    states.extend(pieces.map(|cut| {
        let mut state = base.clone();
        state.insert(PathBuf::from(&new), bytes[..cut].to_vec());
        state
    }));
    states
}

fn with(base: &Tree, name: &Path, bytes: &[u8]) -> Tree {
    let mut state = base.clone();
    state.insert(name.to_path_buf(), bytes.to_vec());
    state
}

fn without(base: &Tree, name: &Path) -> Tree {
    let mut state = base.clone();
    state.remove(name).expect("it is there");
    state
}

/// Opens each of these states, finds what it must have, and again at a second open. Then the log
/// goes on.
async fn opens_as(directory: &Path, states: &[Tree], expected: &View) {
    for state in states {
        plant(directory, state);
        let names: Vec<_> = state.iter().map(|(name, bytes)| (name, bytes.len())).collect();
        assert_eq!(&view(directory), expected, "{names:?}");
        assert_eq!(&view(directory), expected, "{names:?}");
        let left = tree(directory);
        assert!(left.keys().all(|name| !name.to_str().unwrap().ends_with(".new")), "{left:?}");
        let last = expected.log.last().map(|entry| entry.log_id).or(expected.purged);
        let next = last.map_or(0, |last| last.index + 1);
        let (mut log, machine) = opened(directory).into_parts();
        log.save_vote(&Vote::new_committed(6, 7)).await.unwrap();
        log.blocking_append(entries(6, next..next + 2)).await.unwrap();
        drop((log, machine));
        let mut longer = expected.log.clone();
        longer.extend(entries(6, next..next + 2));
        assert_eq!(view(directory).log, longer, "{names:?}");
    }
}

fn log_file(index: u64) -> PathBuf {
    Path::new("log").join(format!("{index:016x}"))
}

struct Case {
    _dir: TempDir,
    directory: PathBuf,
    before: Tree,
    seen: View,
}

async fn case() -> Case {
    case_up_to(4).await
}

async fn case_up_to(covered: u64) -> Case {
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("members");
    drop(full_up_to(&directory, covered).await);
    let (before, seen) = (tree(&directory), view(&directory));
    Case { _dir: dir, directory, before, seen }
}

impl Case {
    /// The files after a call, from those before it.
    async fn after(&self, call: impl AsyncFnOnce(&mut LogStore, &mut StateMachine)) -> Tree {
        let (mut log, mut machine) = opened(&self.directory).into_parts();
        call(&mut log, &mut machine).await;
        drop((log, machine));
        tree(&self.directory)
    }
}

#[tokio::test]
async fn a_crash_while_a_small_file_is_replaced_leaves_the_one_or_the_other() {
    let case = case().await;
    let vote = Vote::new(5, 8);
    let after = case.after(async |log, _| log.save_vote(&vote).await.unwrap()).await;
    let name = Path::new("vote");
    opens_as(&case.directory, &written(&case.before, name, &after[name]), &case.seen).await;
    let seen = View { vote: Some(vote), ..case.seen.clone() };
    opens_as(&case.directory, &[with(&case.before, name, &after[name])], &seen).await;

    plant(&case.directory, &case.before);
    let mut state = Agreed::default();
    let snapshot = case.after(async |_, machine| {
        machine.apply(entries(3, 5..8)).await.unwrap();
        machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
        state = Agreed::clone(&machine.now());
    });
    let after = snapshot.await;
    let name = Path::new("snapshot");
    opens_as(&case.directory, &written(&case.before, name, &after[name]), &case.seen).await;
    let seen = View { snapshot: Some(state), ..case.seen.clone() };
    opens_as(&case.directory, &[with(&case.before, name, &after[name])], &seen).await;
}

#[tokio::test]
async fn a_crash_while_entries_are_appended_leaves_the_first_of_them() {
    let case = case().await;
    // Parts of a call are files in their order, as these two are.
    let after = case.after(async |log, _| {
        log.blocking_append(entries(3, 10..12)).await.unwrap();
        log.blocking_append(entries(3, 12..15)).await.unwrap();
    });
    let after = after.await;
    let [first, second] = [10, 12].map(log_file);
    opens_as(&case.directory, &written(&case.before, &first, &after[&first]), &case.seen).await;
    let one = with(&case.before, &first, &after[&first]);
    let seen = View { log: entries(3, 2..12), ..case.seen.clone() };
    opens_as(&case.directory, &written(&one, &second, &after[&second]), &seen).await;
    let seen = View { log: entries(3, 2..15), ..case.seen.clone() };
    opens_as(&case.directory, &[after], &seen).await;
}

#[tokio::test]
async fn a_crash_while_entries_are_taken_back_leaves_the_beginning_of_the_log() {
    let case = case_up_to(1).await;
    let [first, second, third] = [1, 4, 7].map(log_file);
    for cut in 2..10 {
        plant(&case.directory, &case.before);
        let after = case.after(async |log, _| log.truncate(id(3, cut)).await.unwrap()).await;
        let log = |end| View { log: entries(3, 2..end), ..case.seen.clone() };
        opens_as(&case.directory, std::slice::from_ref(&after), &log(cut)).await;
        // The steps: files that go, from the end, and one that becomes shorter.
        let mut now = case.before.clone();
        for (name, begin) in [(&third, 7), (&second, 4), (&first, 1)] {
            if cut <= begin {
                now = without(&now, name);
                opens_as(&case.directory, std::slice::from_ref(&now), &log(begin)).await;
            } else if let Some(bytes) = after.get(name).filter(|bytes| **bytes != now[name]) {
                opens_as(&case.directory, &written(&now, name, bytes), &log(begin + 3)).await;
                now = with(&now, name, bytes);
            }
        }
        if cut == 2 {
            // Nothing that counts would be left in the first file.
            now = without(&now, &first);
        }
        assert_eq!(now, after, "cut at {cut}");
    }
}

#[tokio::test]
async fn a_crash_while_the_log_is_purged_leaves_it_whole_or_purged() {
    let case = case().await;
    let covered = case.after(async |_, machine| {
        machine.apply(entries(3, 5..10)).await.unwrap();
        machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
    });
    let before = covered.await;
    let seen = view(&case.directory);
    for upto in 2..10 {
        plant(&case.directory, &before);
        let after = case.after(async |log, _| log.purge(id(3, upto)).await.unwrap()).await;
        let name = Path::new("purged");
        opens_as(&case.directory, &written(&before, name, &after[name]), &seen).await;
        let purged = with(&before, name, &after[name]);
        let gone: Vec<PathBuf> = before.keys().filter(|name| !after.contains_key(*name)).cloned().collect();
        assert_eq!(gone.len(), [3, 6, 9].iter().filter(|last| **last <= upto).count(), "{upto}");
        // The files may be gone in any order, as one fsync is for all of them.
        let subsets = (0..1 << gone.len()).map(|subset: usize| {
            let gone = gone.iter().enumerate().filter(|(at, _)| subset >> at & 1 == 1);
            gone.fold(purged.clone(), |state, (_, name)| without(&state, name))
        });
        let seen = View { purged: Some(id(3, upto)), log: entries(3, upto + 1..10), ..seen.clone() };
        opens_as(&case.directory, &subsets.collect::<Vec<_>>(), &seen).await;
    }
}

/// The leader's snapshot is there, and the log that it takes the place of is not yet purged.
#[tokio::test]
async fn a_crash_after_a_snapshot_came_leaves_a_log_that_ends_before_it() {
    let case = case().await;
    let mut state = case.seen.snapshot.clone().unwrap();
    for entry in entries(3, 5..30) {
        state.apply(entry);
    }
    let snapshot = crate::members::types::snapshot_of(state.clone());
    let after = case.after(async |_, machine| {
        machine.install_snapshot(&snapshot.meta, snapshot.snapshot.clone()).await.unwrap();
    });
    let installed = after.await;
    let seen = View { snapshot: Some(state), ..case.seen.clone() };
    assert_eq!(view(&case.directory), seen);
    let after = case.after(async |log, machine| {
        let mut helper = openraft::StorageHelper::new(log, machine);
        let begun = helper.get_initial_state().await.unwrap();
        assert_eq!(begun.committed, Some(id(3, 29)), "as Raft begins");
    });
    let after = after.await;
    assert!(after.keys().all(|name| !name.starts_with("log")));
    let name = Path::new("purged");
    let purged = with(&installed, name, &after[name]);
    let seen = View { purged: Some(id(3, 29)), log: Vec::new(), ..seen };
    opens_as(&case.directory, &[purged, after], &seen).await;
}

#[test]
fn a_crash_while_a_member_is_made_leaves_none() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    drop(Storage::create(&whole).unwrap());
    let (vote, identity) = (fs::read(whole.join("vote")).unwrap(), fs::read(whole.join("identity")).unwrap());
    let steps: [&[(&str, &[u8])]; 7] = [
        &[],
        &[("log", b"")],
        &[("log", b""), ("vote.new", &vote[..vote.len() / 2])],
        &[("log", b""), ("vote", &vote)],
        &[("log", b""), ("vote", &vote), ("identity.new", b"")],
        &[("log", b""), ("vote", &vote), ("identity.new", &identity[..20])],
        &[("log", b""), ("vote", &vote), ("identity.new", &identity)],
    ];
    for (at, step) in steps.iter().enumerate() {
        let directory = dir.path().join(at.to_string());
        fs::create_dir(&directory).unwrap();
        for (name, bytes) in *step {
            match bytes.is_empty() && *name == "log" {
                true => fs::create_dir(directory.join(name)).unwrap(),
                false => fs::write(directory.join(name), bytes).unwrap(),
            }
        }
        assert!(Storage::open(&directory).unwrap().is_none(), "step {at}");
        let made = Storage::create(&directory).unwrap();
        assert!(!made.has_state() && made.id() != 0);
        let id = made.id();
        drop(made);
        assert_eq!(opened(&directory).id(), id);
    }
}

/// Each call is ended after each of its steps, whatever these are.
#[tokio::test]
async fn a_crash_between_two_steps_leaves_what_was_there_or_what_comes() {
    type Call = fn(&mut Disk) -> Result<()>;
    let calls: [(&str, Call); 6] = [
        ("vote", |disk| disk.save_vote(Vote::new(9, 9))),
        ("append", |disk| disk.append(entries(3, 10..13))),
        ("truncate", |disk| disk.truncate(id(3, 3))),
        ("truncate all", |disk| disk.truncate(id(3, 2))),
        ("purge", |disk| disk.purge(id(3, 1)).and_then(|()| disk.purge(id(3, 8)))),
        ("snapshot", |disk| {
            let mut state = Agreed::default();
            entries(3, 0..7).into_iter().for_each(|entry| drop(state.apply(entry)));
            disk.save_snapshot(Arc::new(state)).map(drop)
        }),
    ];
    for (name, call) in calls {
        let covered = if name == "purge" { 8 } else { 1 };
        let case = case_up_to(covered).await;
        let mut storage = opened(&case.directory);
        call(&mut storage.disk).unwrap();
        let after = view_of(&storage);
        drop(storage);
        assert_ne!(after, case.seen, "{name}");
        for steps in 0.. {
            plant(&case.directory, &case.before);
            let mut storage = opened(&case.directory);
            let done = testing::after(steps, || call(&mut storage.disk));
            drop(storage);
            let found = view(&case.directory);
            match name {
                // The beginning of the log, and not less than is to stay.
                "truncate" | "truncate all" if !done => {
                    assert_eq!(View { log: case.seen.log.clone(), ..found.clone() }, case.seen);
                    assert!(case.seen.log.starts_with(&found.log) && found.log.starts_with(&after.log));
                }
                _ if done => assert_eq!(found, after, "{name}"),
                _ => assert!(found == case.seen || found == after, "{name}, {steps} steps: {found:?}"),
            }
            if done {
                break;
            }
        }
    }
}
