//! The leader is killed again and again, while many swap. etcd's own history is what they are
//! checked with.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use replite::lease::{Store, SwapError, Version};
use replite_stores::etcd::Options;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::{KEY, LIMIT, PAUSE, members, read, store, store_from, swap, write};

const WRITERS: usize = 4;
const KILLS: usize = 6;
/// Swaps that are done after each.
const SWAPS: usize = 8;

/// What the writers know. Each record is written once, and names the version that it was to
/// replace.
#[derive(Default)]
struct Notes {
    /// Of each record that was read or acknowledged.
    versions: Mutex<HashMap<String, Version>>,
    done: Mutex<Vec<String>>,
    refused: Mutex<HashSet<String>>,
    /// Whose outcome was settled by reading, and whether they were done.
    settled: Mutex<Vec<(String, bool)>>,
    swaps: AtomicUsize,
    unknown: AtomicUsize,
    enough: AtomicBool,
}

impl Notes {
    fn saw(&self, record: &[u8], version: &Version) {
        let record = String::from_utf8(record.to_vec()).unwrap();
        let known =
            self.versions.lock().unwrap().entry(record.clone()).or_insert_with(|| version.clone()).clone();
        assert_eq!(known, *version, "{record:?} has two versions");
    }

    async fn writer(&self, store: &dyn Store, number: usize) {
        let mut open: Option<String> = None;
        for attempt in 0.. {
            if self.enough.load(Ordering::Relaxed) && open.is_none() {
                return;
            }
            let Ok(Some(stored)) = read(store).await else {
                sleep(PAUSE).await;
                continue;
            };
            self.saw(&stored.record, &stored.version);
            let record = format!("{attempt} of {number} over {}", stored.version.as_str());
            let swapped = swap(store, Some(&stored.version), record.as_bytes()).await;
            match swapped {
                Ok(version) => {
                    self.saw(record.as_bytes(), &version);
                    self.done.lock().unwrap().push(record);
                    self.swaps.fetch_add(1, Ordering::Relaxed);
                    // It took the place of what was read: whether the open one was done is settled.
                    if let Some(open) = open.take() {
                        self.settled.lock().unwrap().push((open.clone(), stored.record == open.as_bytes()));
                    }
                }
                Err(SwapError::Unknown(_)) => {
                    self.unknown.fetch_add(1, Ordering::Relaxed);
                    open = open.or(Some(record));
                }
                Err(SwapError::Conflict | SwapError::Unavailable(_)) => {
                    self.refused.lock().unwrap().insert(record);
                    sleep(PAUSE).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// The history is one sequence, in which each took the place of what it names.
    fn check(&self, history: &[String]) {
        let (versions, refused) = (self.versions.lock().unwrap(), self.refused.lock().unwrap());
        let mut seen = HashSet::new();
        for (before, record) in history.iter().zip(&history[1..]) {
            assert!(seen.insert(record), "{record:?} was written twice");
            assert!(!refused.contains(record), "{record:?} was refused, and is there");
            let Some((_, over)) = record.split_once(" over ") else { continue };
            assert_eq!(versions[before].as_str(), over, "{record:?} took the place of {before:?}");
        }
        for record in self.done.lock().unwrap().iter() {
            assert!(seen.contains(record), "{record:?} was acknowledged, and was never there");
        }
        // One that was open and that was read when a later swap was done, was done. Otherwise it
        // may have been, and be replaced.
        for (record, was_read) in self.settled.lock().unwrap().iter() {
            assert!(!was_read || seen.contains(record), "{record:?}");
        }
        let replaced: HashSet<&str> =
            history.iter().filter_map(|record| Some(record.split_once(" over ")?.1)).collect();
        let writes = history.iter().filter(|record| record.contains(" over ")).count();
        assert_eq!(replaced.len(), writes, "two swaps were done over one version");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_swap_is_lost_or_done_twice_while_leaders_are_killed() {
    let Some((mut cluster, _alone)) = members(Options::default()).await else { return };
    let notes = Arc::new(Notes::default());
    let version = write(&store(&cluster), b"first").await;
    notes.saw(b"first", &version);
    let mut writers = JoinSet::new();
    for number in 0..WRITERS {
        let (notes, store) = (notes.clone(), store_from(&cluster, number));
        writers.spawn(async move { notes.writer(&store, number).await });
    }
    for kill in 0..KILLS {
        let leader = cluster.leader().await.unwrap();
        cluster.kill(leader).await.unwrap();
        let enough = notes.swaps.load(Ordering::Relaxed) + SWAPS;
        let end = Instant::now() + LIMIT;
        while notes.swaps.load(Ordering::Relaxed) < enough {
            assert!(Instant::now() < end, "after kill {kill} nothing is done any more");
            sleep(PAUSE).await;
        }
        cluster.restart(leader).unwrap();
        cluster.healthy(leader).await.unwrap();
    }
    notes.enough.store(true, Ordering::Relaxed);
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    write(&store(&cluster), b"last").await;
    let mut history = Vec::new();
    for value in cluster.history(KEY, b"\nlast").await.unwrap() {
        let text = String::from_utf8(value).unwrap();
        history.push(text.split_once('\n').unwrap().1.to_owned());
    }
    println!(
        "{} swaps in the history, {} acknowledged, {} unknown",
        history.len(),
        notes.done.lock().unwrap().len(),
        notes.unknown.load(Ordering::Relaxed)
    );
    notes.check(&history);
}
