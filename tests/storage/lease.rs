//! A lease's record in a directory: many processes write it, and some of them are killed or stopped
//! on the way. And a file system that is full, or can't be written.
//!
//! `REPLITE_ROUNDS` sets how often a process is killed or stopped (40 if not set), `REPLITE_SEED`
//! which one.
#![cfg(unix)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::lease::{Directory, Store, Stored, SwapError};
use rustix::process::Signal;

use crate::support::*;

const PROCESSES: usize = 6;
/// More than the directory keeps: who is stopped for so long finds its number free again.
const FAR: u64 = 24;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// The count of a record, and the id of the swap that wrote it.
fn parsed(stored: &Stored) -> (u64, String) {
    let text = std::str::from_utf8(&stored.record).unwrap();
    let (count, id) = text.split_once(' ').unwrap();
    (count.parse().unwrap(), id.into())
}

#[test]
#[ignore = "runs as the child of another test"]
fn counting_process() {
    if !is_child() {
        return;
    }
    let (store, name) = (Directory::new(variable("DIR")), variable("NAME"));
    let ends = Arc::new(AtomicBool::new(false));
    std::thread::spawn({
        let ends = ends.clone();
        move || {
            assert_eq!(hear(), "end");
            ends.store(true, Ordering::SeqCst);
        }
    });
    let runtime = runtime();
    for attempt in 1.. {
        if ends.load(Ordering::SeqCst) {
            return;
        }
        let stored = runtime.block_on(store.read()).unwrap().expect("a record is there");
        let (count, over) = parsed(&stored);
        let (count, id) = (count + 1, format!("{name}.{attempt}"));
        speak(&format!("try {id} {over} {count}"));
        let record = format!("{count} {id}");
        match runtime.block_on(store.swap(Some(&stored.version), record.as_bytes())) {
            Ok(_) => speak(&format!("done {id}")),
            Err(SwapError::Conflict) => speak(&format!("refused {id}")),
            Err(SwapError::Unknown(_)) => speak(&format!("unknown {id}")),
            Err(error) => panic!("{error}"),
        }
    }
}

/// What the processes said.
#[derive(Default)]
struct Said {
    /// Of each swap: what it was done over, and its count.
    tried: BTreeMap<String, (String, u64)>,
    answers: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Said {
    fn take(&mut self, lines: Vec<String>) {
        for line in lines {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["try", id, over, count] => {
                    let count = count.parse().unwrap();
                    assert!(self.tried.insert(id.into(), (over.into(), count)).is_none());
                }
                [answer, id] => {
                    let answers = ["done", "refused", "unknown"];
                    let answer = answers.into_iter().find(|known| *known == answer).unwrap();
                    self.answers.entry(answer).or_default().insert(id.into());
                }
                _ => panic!("{line}"),
            }
        }
    }

    /// All that were acknowledged are in the one sequence that leads to this record, and none that
    /// was refused; each is in it once, and each counted on by one.
    fn check(&self, last: (u64, String)) -> usize {
        let (mut count, mut id) = last;
        let mut sequence = BTreeSet::new();
        while id != "start" {
            let (over, of) = &self.tried[&id];
            assert_eq!(*of, count, "{id} counted otherwise");
            assert!(sequence.insert(std::mem::replace(&mut id, over.clone())), "twice in the sequence");
            count -= 1;
        }
        assert_eq!(count, 0, "increments are missing");
        let none = BTreeSet::new();
        let of = |answer| self.answers.get(answer).unwrap_or(&none);
        let lost: Vec<_> = of("done").difference(&sequence).collect();
        assert!(lost.is_empty(), "acknowledged, and not in the sequence: {lost:?}");
        let wrong: Vec<_> = of("refused").intersection(&sequence).collect();
        assert!(wrong.is_empty(), "refused, and in the sequence: {wrong:?}");
        sequence.len()
    }
}

#[test]
fn of_swaps_by_many_processes_none_is_lost_or_done_twice_whoever_is_killed_or_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lease");
    let (store, runtime) = (Directory::new(&path), runtime());
    runtime.block_on(store.swap(None, b"0 start")).unwrap();
    let last = || parsed(&runtime.block_on(store.read()).unwrap().unwrap());
    let mut names = 0;
    let mut start = || {
        names += 1;
        let variables = [("DIR", path.to_str().unwrap()), ("NAME", &format!("p{names}"))];
        Process::start(counting_process, &variables)
    };
    let mut processes: Vec<Process> = (0..PROCESSES).map(|_| start()).collect();
    let mut rng = StdRng::seed_from_u64(number("REPLITE_SEED", 1));
    let mut said = Said::default();
    for _ in 0..number("REPLITE_ROUNDS", 40) {
        let victim = rng.random_range(0..PROCESSES);
        let before = last().0;
        if rng.random() {
            let killed = std::mem::replace(&mut processes[victim], start());
            said.take(killed.kill());
            until("the others go on", || last().0 >= before + 3);
        } else {
            processes[victim].signal(Signal::STOP);
            let far = if rng.random() { FAR } else { 3 };
            until("the others go on", || last().0 >= before + far);
            processes[victim].signal(Signal::CONT);
        }
    }
    for mut process in processes {
        process.say("end");
        said.take(process.success());
    }
    let swaps = said.check(last());
    println!("{swaps} swaps, {:?}", said.answers.iter().map(|(how, of)| (how, of.len())).collect::<Vec<_>>());
    // What was left half done is removed by the next.
    let version = runtime.block_on(store.read()).unwrap().unwrap().version;
    runtime.block_on(store.swap(Some(&version), b"the end")).unwrap();
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 16);
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Writes a file until the disk has no room for one more byte.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    while file.write_all(&[1; 512]).is_ok() {}
}

fn remount(place: &Path, how: &str) {
    let done =
        std::process::Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(place).status();
    assert!(done.unwrap().success());
}

#[test]
#[ignore = "runs as the child of another test"]
fn process_on_a_small_disk() {
    if !is_child() {
        return;
    }
    let (place, runtime) = (PathBuf::from(variable("PLACE")), runtime());
    let (ballast, store) = (place.join("ballast"), Directory::new(place.join("lease")));
    let read = || runtime.block_on(store.read()).unwrap();
    let swap = |over: &Option<Stored>| {
        runtime.block_on(store.swap(over.as_ref().map(|stored| &stored.version), &[b'x'; 3000]))
    };
    let kept = || std::fs::read_dir(store.path()).unwrap().count();
    (0..20).for_each(|_| drop(swap(&read()).unwrap()));
    fill(&ballast);
    // Old records give their room, and what was given is gone, too.
    for at in 0..10 {
        swap(&read()).unwrap();
        fill(&place.join(format!("ballast-{at}")));
    }
    assert_eq!(kept(), 3, "the newest, the one before it, and one whose room the next takes");
    let before = read();
    let version = before.as_ref().map(|stored| &stored.version);
    let long = runtime.block_on(store.swap(version, &[b'x'; 16 * 1024]));
    assert!(matches!(long, Err(SwapError::Unavailable(_))), "{long:?}");
    assert_eq!(read(), before);
    assert_eq!(kept(), 2, "nothing half done is left");
    swap(&before).unwrap();
    std::fs::remove_file(&ballast).unwrap();

    let before = read();
    remount(&place, "ro");
    assert!(matches!(swap(&before), Err(SwapError::Unavailable(_))));
    assert_eq!(read(), before);
    remount(&place, "rw");
    swap(&before).unwrap();
    speak("well");
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full_or_cannot_be_written_refuses_swaps_and_old_records_give_their_room() {
    let alone = std::process::Command::new("unshare").args(["-rm", "true"]).status();
    if !alone.is_ok_and(|ended| ended.success()) {
        eprintln!("skipped: a file system of its own can't be mounted here");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mount = "exec unshare -rm sh -c 'mount -t tmpfs -o size=256k,mode=700 lease \"$PLACE\" \
                 && exec \"$@\"' sh \"$@\"";
    let variables = [("PLACE", dir.path().to_str().unwrap())];
    let process = Process::start_by(shell(mount), process_on_a_small_disk, &variables);
    assert_eq!(process.success(), ["well"]);
}
