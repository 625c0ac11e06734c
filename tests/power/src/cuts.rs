//! Where a trace is cut, and how many states are tried.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::disk::{Disk, Names, STYLES, Style};
use crate::trace::{Change, kind};

/// States of one kind of sync that are tried at each such sync, at most: styles, before and after.
const EACH_MAX: usize = 16;

/// One state to try.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// The trace up to here has happened.
    pub at: usize,
    pub names: Names,
    pub style: Style,
    pub seed: u64,
    /// It is beside the sync of such a file.
    pub kind: &'static str,
}

/// A number from the environment.
#[must_use]
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// How many syncs of each kind a trace has.
#[must_use]
pub fn syncs(changes: &[Change]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for change in changes {
        if let Change::Synced { path, .. } = change {
            *counts.entry(kind(path)).or_default() += 1;
        }
    }
    counts
}

/// Beside how many syncs of each kind the states are.
#[must_use]
pub fn stopped(cuts: &[Cut]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    cuts.iter().for_each(|cut| *counts.entry(cut.kind).or_default() += 1);
    counts
}

/// Chooses so many states, all kinds of syncs evenly, and some at any place.
#[must_use]
pub fn choose(changes: &[Change], rounds: usize, seed: u64) -> Vec<Cut> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut syncs: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, change) in changes.iter().enumerate() {
        if let Change::Synced { path, .. } = change {
            syncs.entry(kind(path)).or_default().push(at);
        }
    }
    let mut queues: Vec<(&str, Vec<usize>)> = syncs
        .into_iter()
        .map(|(kind, places)| {
            let mut all = Vec::new();
            for _ in 0..EACH_MAX / 2 {
                let mut turn: Vec<usize> = places.iter().flat_map(|at| [*at, at + 1]).collect();
                turn.shuffle(&mut rng);
                // Taken from the end.
                all.splice(0..0, turn);
            }
            (kind, all)
        })
        .collect();
    let mut cuts = Vec::new();
    let beside_syncs = rounds * 4 / 5;
    while cuts.len() < beside_syncs && queues.iter().any(|(_, q)| !q.is_empty()) {
        for (kind, queue) in &mut queues {
            if let Some(at) = queue.pop() {
                cuts.push(draw(at, kind, &mut rng));
            }
        }
    }
    while cuts.len() < rounds {
        let at = rng.random_range(0..=changes.len());
        cuts.push(draw(at, "any place", &mut rng));
    }
    cuts.sort_by_key(|cut| cut.at);
    cuts
}

fn draw(at: usize, kind: &'static str, rng: &mut StdRng) -> Cut {
    let names = if rng.random_bool(0.5) { Names::Journal } else { Names::Strict };
    Cut { at, names, style: STYLES[rng.random_range(0..STYLES.len())], seed: rng.random(), kind }
}

/// Makes one state.
pub fn make(start: &dyn Fn(Names) -> Disk, changes: &[Change], cut: &Cut, to: &Path) {
    let mut disk = start(cut.names);
    changes[..cut.at].iter().for_each(|change| disk.apply(change));
    disk.cut(cut.style, &mut StdRng::seed_from_u64(cut.seed), to);
}

/// Where states are made: in memory if possible, for they need not outlive anything.
#[must_use]
pub fn fast_directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let make = |dir: &Path| tempfile::Builder::new().prefix("replite-power-").tempdir_in(dir);
    make(memory).or_else(|_| make(&std::env::temp_dir())).unwrap()
}

/// Tries all states on two threads. A state that fails is made once more beside the trace, for a look.
pub fn run(
    start: &dyn Fn(Names) -> Disk,
    changes: &[Change],
    cuts: &[Cut],
    keep: &Path,
    check: &(dyn Fn(&Path, &Cut) -> Result<(), String> + Sync),
) {
    let room = fast_directory();
    let failures: Mutex<Vec<(Cut, String)>> = Mutex::new(Vec::new());
    let (sender, receiver) = mpsc::sync_channel::<(PathBuf, Cut)>(4);
    // Gone with the last worker: what is sent to nobody is an error.
    let receiver = Arc::new(Mutex::new(receiver));
    std::thread::scope(|scope| {
        let failures = &failures;
        let workers: Vec<_> = [receiver.clone(), receiver]
            .into_iter()
            .map(|receiver| {
                scope.spawn(move || {
                    loop {
                        let next = receiver.lock().unwrap().recv();
                        let Ok((dir, cut)) = next else { break };
                        if let Err(what) = check(&dir, &cut) {
                            println!("{cut:?}: {what}");
                            failures.lock().unwrap().push((cut, what));
                        }
                        std::fs::remove_dir_all(&dir).unwrap();
                    }
                })
            })
            .collect();
        let mut disks = [start(Names::Journal), start(Names::Strict)];
        let mut done = 0;
        for (number, cut) in cuts.iter().enumerate() {
            for change in &changes[done..cut.at] {
                disks.iter_mut().for_each(|disk| disk.apply(change));
            }
            done = cut.at;
            let dir = room.path().join(number.to_string());
            let disk = &disks[usize::from(cut.names == Names::Strict)];
            disk.cut(cut.style, &mut StdRng::seed_from_u64(cut.seed), &dir);
            sender.send((dir, *cut)).unwrap();
        }
        drop(sender);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
    let failures = failures.into_inner().unwrap();
    if let Some((cut, what)) = failures.first() {
        let state = keep.join("state");
        make(start, changes, cut, &state);
        panic!(
            "{} of {} states failed. The first: {cut:?}: {what}; kept in {}",
            failures.len(),
            cuts.len(),
            keep.display()
        );
    }
}
