//! Stores for a lease's record: those of the crate, and what the suite says of broken ones.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use replite::lease::{Directory, ReadError, Store, StoreFuture, Stored, SwapError, Version};
use replite::testing::lease::{Broken, Faulty, Memory, conformance};

use crate::support::within;

#[tokio::test]
async fn a_register_in_memory_keeps_the_contract() {
    let register = Memory::new();
    within("the suite", conformance(|| Arc::new(register.clone()))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_directory_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    // A handle of its own for each, as for processes.
    within("the suite", conformance(|| Arc::new(Directory::new(dir.path().join("lease"))))).await.unwrap();
}

/// All that the contract allows, for each handle in another way.
fn unlucky(store: Arc<dyn Store>, seed: u64) -> Faulty {
    let store = Faulty::over(store, seed);
    store.lose_requests(0.05);
    store.lose_answers(0.1);
    store.hang(0.02);
    store.read_old(0.2);
    store
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn faults_that_the_contract_allows_break_no_rule() {
    let dir = tempfile::tempdir().unwrap();
    let memory: Arc<dyn Store> = Arc::new(Memory::new());
    let directory: Arc<dyn Store> = Arc::new(Directory::new(dir.path().join("lease")));
    for (store, seed) in [(memory.clone(), 100), (directory, 300)] {
        let seed = AtomicU64::new(seed);
        let make = || {
            let store: Arc<dyn Store> =
                Arc::new(unlucky(store.clone(), seed.fetch_add(1, Ordering::Relaxed)));
            store
        };
        within("the suite", conformance(make)).await.unwrap();
    }
}

/// What is wrong with a store.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// The newest swap wins.
    LooksAtNoVersion,
    /// Reads, compares, and then writes.
    ComparesBefore,
    /// Two may write the first record.
    FirstRecordIsPlain,
    /// The version is a hash of the record.
    VersionIsTheRecord,
    /// Says that it did what it did not.
    Forgets,
    /// Says that it did not what it did.
    ConflictForDone,
    /// The same by another error.
    UnavailableForDone,
    /// A swap that was refused is done later.
    DoesItLater,
    /// Writes a record whose future is dropped over any other.
    ForcesDropped,
    /// Cuts long records.
    Cuts,
    /// Takes bytes for text.
    IsText,
    /// Makes up a record where there is none.
    MakesUp,
    /// Each handle has a register.
    Alone,
    /// Never gets anything done.
    Idle,
}

#[derive(Debug)]
struct BrokenStore {
    fault: Fault,
    register: Memory,
    swaps: AtomicU64,
    lease_time: Duration,
    /// For the version that is the record.
    known: Mutex<Vec<(Version, Version)>>,
}

struct Forces<'a>(&'a Memory, Option<&'a [u8]>);

impl Drop for Forces<'_> {
    fn drop(&mut self) {
        self.1.map(|record| self.0.put(record));
    }
}

impl BrokenStore {
    async fn over_whatever(&self, record: &[u8]) -> Result<Version, SwapError> {
        Ok(self.register.put(record))
    }

    /// The text of a record for its version, and the version that the register has for it.
    fn named(&self, stored: Stored) -> Stored {
        let sum = stored.record.iter().fold(0_u64, |sum, byte| sum.wrapping_mul(31) + u64::from(*byte));
        let version = Version::new(format!("{sum:x}-{}", stored.record.len()));
        self.known.lock().unwrap().push((version.clone(), stored.version));
        Stored::new(stored.record, version)
    }

    fn unnamed(&self, version: Option<&Version>) -> Option<Version> {
        let Some(newest) = self.register.stored() else { return version.cloned() };
        let name = self.named(newest.clone()).version;
        if version == Some(&name) { Some(newest.version) } else { version.cloned() }
    }

    async fn do_swap(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let register = &self.register;
        let every_ninth = self.swaps.fetch_add(1, Ordering::Relaxed) % 9 == 8;
        match self.fault {
            Fault::LooksAtNoVersion => self.over_whatever(record).await,
            Fault::ComparesBefore => {
                if register.stored().map(|stored| stored.version).as_ref() != expected {
                    return Err(SwapError::Conflict);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
                self.over_whatever(record).await
            }
            Fault::FirstRecordIsPlain if expected.is_none() => self.over_whatever(record).await,
            Fault::VersionIsTheRecord => {
                let version = register.swap(self.unnamed(expected).as_ref(), record).await?;
                Ok(self.named(Stored::new(record.to_vec(), version)).version)
            }
            Fault::Forgets if every_ninth && expected.is_some() => {
                static FORGOTTEN: AtomicU64 = AtomicU64::new(0);
                Ok(Version::new(format!("forgotten {}", FORGOTTEN.fetch_add(1, Ordering::Relaxed))))
            }
            Fault::ConflictForDone if every_ninth => {
                register.swap(expected, record).await.and(Err(SwapError::Conflict))
            }
            Fault::UnavailableForDone if every_ninth => {
                register.swap(expected, record).await.and(Err(SwapError::Unavailable("a timeout".into())))
            }
            Fault::DoesItLater if every_ninth => {
                let (register, expected, record) = (register.clone(), expected.cloned(), record.to_vec());
                tokio::spawn(async move { register.swap(expected.as_ref(), &record).await });
                Err(SwapError::Unavailable("a timeout".into()))
            }
            Fault::ForcesDropped => {
                let mut force = Forces(register, Some(record));
                tokio::time::sleep(Duration::from_millis(2)).await;
                force.1 = None;
                register.swap(expected, record).await
            }
            Fault::Cuts => register.swap(expected, &record[..record.len().min(8192)]).await,
            Fault::IsText => register.swap(expected, String::from_utf8_lossy(record).as_bytes()).await,
            Fault::Idle => Err(SwapError::Unknown("a timeout".into())),
            _ => register.swap(expected, record).await,
        }
    }
}

impl Store for BrokenStore {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(async {
            let stored = self.register.stored();
            Ok(match self.fault {
                Fault::MakesUp => stored.or_else(|| Some(Stored::new(Vec::new(), Version::new("")))),
                Fault::VersionIsTheRecord => stored.map(|stored| self.named(stored)),
                _ => stored,
            })
        })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(self.do_swap(expected, record))
    }

    fn lease_time(&self) -> Duration {
        self.lease_time
    }
}

async fn judged(fault: Fault, lease_time: Duration) -> Broken {
    let register = Memory::new();
    let make = || {
        let register = if matches!(fault, Fault::Alone) { Memory::new() } else { register.clone() };
        let (swaps, known) = (AtomicU64::new(0), Mutex::default());
        let store: Arc<dyn Store> = Arc::new(BrokenStore { fault, register, swaps, lease_time, known });
        store
    };
    conformance(make).await.expect_err(&format!("{fault:?} is seen"))
}

#[tokio::test(start_paused = true)]
async fn a_broken_store_is_told_which_rule_it_breaks() {
    for (fault, rule) in [
        (Fault::LooksAtNoVersion, Some(1)),
        (Fault::ComparesBefore, Some(1)),
        (Fault::FirstRecordIsPlain, Some(1)),
        (Fault::VersionIsTheRecord, Some(2)),
        (Fault::Forgets, Some(1)),
        (Fault::ConflictForDone, Some(4)),
        (Fault::UnavailableForDone, Some(4)),
        (Fault::DoesItLater, Some(4)),
        (Fault::ForcesDropped, Some(1)),
        (Fault::Cuts, Some(3)),
        (Fault::IsText, Some(3)),
        (Fault::MakesUp, Some(3)),
        (Fault::Alone, Some(1)),
        (Fault::Idle, None),
    ] {
        let broken = judged(fault, Duration::from_secs(1)).await;
        println!("{fault:?}: {broken}");
        assert_eq!(broken.rule(), rule, "{fault:?}: {broken}");
    }
    for lease_time in [Duration::from_millis(999), Duration::from_millis(60_001)] {
        assert!(judged(Fault::Idle, lease_time).await.to_string().contains("lease time"));
    }
}

#[tokio::test]
async fn a_library_that_repeats_swaps_by_itself_is_told_apart() {
    let store = Faulty::new(Memory::new(), 1);
    store.repeat(0.2);
    assert_eq!(conformance(|| Arc::new(store.clone())).await.unwrap_err().rule(), Some(4));
}

fn assert_unknown(swapped: Result<Version, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Unknown(_))), "{swapped:?}");
}

async fn never<T>(call: impl Future<Output = T>) {
    assert!(tokio::time::timeout(Duration::from_secs(3600), call).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn each_fault_is_the_one_that_it_is_said_to_be() {
    let register = Memory::new();
    let store = Faulty::new(register.clone(), 3);
    let bytes = |register: &Memory| register.stored().map(|stored| stored.record);
    let one = store.swap(None, b"one").await.unwrap();

    store.away(true);
    assert!(store.read().await.is_err());
    assert!(matches!(store.swap(Some(&one), b"two").await, Err(SwapError::Unavailable(_))));
    store.away(false);

    store.stall(true);
    never(store.read()).await;
    never(store.swap(Some(&one), b"two")).await;
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.read().await.unwrap() }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    store.stall(false);
    assert_eq!(waiting.await.unwrap(), register.stored(), "it goes on; what was dropped does not");

    store.lose_requests(1.0);
    assert_unknown(store.swap(Some(&one), b"two").await);
    assert_eq!(bytes(&register).unwrap(), b"one");
    store.calm();

    store.hang(1.0);
    never(store.swap(Some(&one), b"two")).await;
    assert_eq!(bytes(&register).unwrap(), b"two", "it was done");
    never(store.read()).await;
    store.calm();

    store.repeat(1.0);
    let two = register.stored().unwrap().version;
    assert!(matches!(store.swap(Some(&two), b"three").await, Err(SwapError::Conflict)));
    assert_eq!(bytes(&register).unwrap(), b"three", "it was done");
    store.calm();

    let three = store.read().await.unwrap().unwrap();
    store.delay(1.0, Duration::from_secs(60));
    let dropped = tokio::time::timeout(Duration::ZERO, store.swap(Some(&three.version), b"four")).await;
    assert!(dropped.is_err());
    assert_eq!(bytes(&register).unwrap(), b"three", "not yet");
    within("it lands though its future was dropped", register.changed()).await;
    assert_eq!(bytes(&register).unwrap(), b"four");
    store.calm();

    store.read_old(1.0);
    let mut old = Vec::new();
    while !old.contains(&b"one".to_vec()) {
        old.push(store.read().await.unwrap().unwrap().record);
    }
    store.calm();

    register.remove();
    store.go_back(2).await.unwrap();
    let back = register.stored().unwrap();
    assert_eq!(back.record, b"two");
    assert!(back.version != two, "a version is never used again");
}

#[tokio::test]
async fn a_seed_makes_the_same_faults_again() {
    let run = async |seed| {
        let store = Faulty::new(Memory::new(), seed);
        store.lose_requests(0.3);
        store.lose_answers(0.3);
        let mut answers = Vec::new();
        for _ in 0..100 {
            let over = store.read().await.unwrap().map(|stored| stored.version);
            answers.push(store.swap(over.as_ref(), b"x").await.map_err(|error| error.to_string()).err());
        }
        answers
    };
    assert_eq!(run(1).await, run(1).await);
    assert_ne!(run(1).await, run(2).await);
}
