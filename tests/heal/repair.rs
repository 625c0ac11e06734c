//! A primary's bad pages, and the right ones from a replica.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::{Db, Error, Event, Position};

use crate::fork::*;
use crate::support::*;

/// Both are connected, and the replica has what the primary has.
async fn joined(fork: &Fork) -> (Db, Db) {
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    let last = insert(&a, "joined", 0).await;
    within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
    (a, b)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_pages_of_a_primary_are_found_proved_and_written_anew() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    let sound = image(&fork.path("b"));
    flip_row(&fork, "a", 4500);
    flip_row(&fork, "a", 7100);
    let (a, b) = joined(&fork).await;
    let before = position(&a);
    let repair = a.find_repair().await.unwrap().expect("an offer");
    assert_eq!(repair.pages(), repair.verification.bad_pages);
    assert_eq!(repair.pages().len(), 2);
    assert_eq!(repair.from.node, b.node_id());
    let numbers: Vec<u32> = repair.pages().iter().map(|page| page.get()).collect();
    let bad = fs::read(a.path()).unwrap();
    for number in &numbers {
        let at = (*number as usize - 1) * 4096;
        assert!(sound[at..at + 4096] != bad[at..at + 4096], "page {number} is right");
    }
    let mut events = a.events();
    let verified = repair.apply().await.unwrap();
    assert!(verified.holds());
    assert_eq!(position(&a), before, "a repair is no transaction");
    assert_eq!(a.status().problem, None);
    within("the event", async {
        loop {
            if let Some(Event::Repaired { pages, .. }) = events.next().await {
                assert_eq!(pages.iter().map(|page| page.get()).collect::<Vec<_>>(), numbers);
                break;
            }
        }
    })
    .await;
    assert!(a.find_repair().await.unwrap().is_none(), "nothing is wrong any more");
    equal(&a, &b).await;
    a.shutdown().await;
    b.shutdown().await;
    // The position is found again without a new state of unknown origin.
    let last = position(&a);
    let a = open(fork.primary("a")).await;
    assert_eq!(position(&a), last);
    assert!(a.verify().await.unwrap().holds());
    a.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_primary_is_repaired_too() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    flip_row(&fork, "a", 4500);
    let (a, b) = joined(&fork).await;
    let (busy, stop) = (a.clone(), Arc::new(AtomicBool::new(false)));
    let writing = stop.clone();
    let writer = tokio::spawn(async move {
        while !writing.load(Ordering::SeqCst) {
            insert(&busy, "meanwhile", 0).await;
        }
    });
    let verified = within("a repair", async {
        loop {
            // The replica may be behind, or the log may not be there yet.
            match a.find_repair().await {
                Ok(Some(repair)) => break repair.apply().await.unwrap(),
                Ok(None) => panic!("nothing is wrong"),
                Err(error) => assert!(matches!(error, Error::Damaged { .. }), "{error}"),
            }
        }
    })
    .await;
    stop.store(true, Ordering::SeqCst);
    writer.await.unwrap();
    assert!(verified.holds());
    equal(&a, &b).await;
    a.shutdown().await;
    b.shutdown().await;
}

/// The sum of all pages' hashes can be made to come out by who chooses many pages; so a page that
/// nothing here names is nobody's to offer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_the_log_does_not_name_is_not_taken_from_anybody() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    fs::remove_dir_all(fork.path("a").with_extension("db-replite").join("log")).unwrap();
    flip_row(&fork, "a", 4500);
    let (a, b) = joined(&fork).await;
    let error = a.find_repair().await.unwrap_err();
    assert!(matches!(&error, Error::Damaged { what, .. } if what.contains("does not tell")), "{error}");
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_the_same_page_bad_is_not_believed_and_one_that_has_it_is() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    fork.copy("b", "c");
    flip_row(&fork, "a", 4500);
    // Another bit of it.
    let sound: String = {
        let sql = "SELECT v FROM t WHERE id = 4500";
        plain(&fork.path("c")).query_row(sql, [], |r| r.get(0)).unwrap()
    };
    flip_where(&fork.path("b"), &sound.as_bytes()[20..]);
    let (a, b) = joined(&fork).await;
    let error = a.find_repair().await.unwrap_err();
    assert!(
        matches!(&error, Error::Damaged { what, .. } if what.contains("does not have the right")),
        "{error}"
    );
    let c = open(fork.replica("c")).await;
    let last = insert(&a, "joined", 1).await;
    within("the other replica", c.wait_for_timeout(last, LIMIT)).await.unwrap();
    let repair = a.find_repair().await.unwrap().expect("an offer");
    assert_eq!(repair.from.node, c.node_id());
    assert!(repair.apply().await.unwrap().holds());
    assert!(b.status().heals == 0 && !b.verify().await.unwrap().holds(), "nobody looked at it");
    until("the heal", || b.status().heals > 0);
    for db in [a, b, c] {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bad_page_spreads() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    flip_row(&fork, "a", 4500);
    flip_row(&fork, "b", 7100);
    let (a, b) = joined(&fork).await;
    assert!(matches!(b.find_repair().await, Err(Error::NotPrimary { .. })));
    // The replica finds its own, and compares: the primary's pages do not make up the primary's
    // position.
    assert!(!b.verify().await.unwrap().holds());
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(5));
    within("the refusal", async {
        while !b.status().problem.is_some_and(|problem| problem.contains("position mismatch")) {
            tick.tick().await;
        }
    })
    .await;
    assert_eq!(b.status().heals, 0);
    let row = |id: i64| {
        let sql = "SELECT v FROM t WHERE id = ?1";
        let [ours, theirs]: [String; 2] =
            ["a", "b"].map(|side| plain(&fork.path(side)).query_row(sql, [id], |r| r.get(0)).unwrap());
        ours == theirs
    };
    assert!(!row(4500), "the primary's bad page came to the replica");
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_replica_the_primary_says_what_it_knows() {
    let fork = Fork::new();
    equal_pair(&fork).await;
    flip_row(&fork, "a", 4500);
    let a = open(fork.primary("a")).await;
    let error = a.find_repair().await.unwrap_err();
    assert!(
        matches!(&error, Error::Damaged { what, .. } if what.contains("no connected replica")),
        "{error}"
    );
    // Nor does an empty replica take such pages for a state.
    let c = open(fork.replica("c")).await;
    let mut tick = tokio::time::interval(std::time::Duration::from_millis(5));
    within("the refusal", async {
        while !c.status().problem.is_some_and(|problem| problem.contains("position mismatch")) {
            tick.tick().await;
        }
    })
    .await;
    assert_eq!(c.position(), None);
    a.shutdown().await;
    c.shutdown().await;
}

#[test]
#[ignore = "runs as the child of another test"]
fn repairing_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = open(primary(&path, port)).await;
        speak(&format!("open {}", position(&db)));
        let repair = loop {
            match db.find_repair().await {
                // After a kill the node may have made its pages right from the log when it opened.
                Ok(repair) => break repair,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        speak("apply");
        if let Some(repair) = repair {
            assert!(repair.apply().await.unwrap().holds());
        }
        speak("done");
    });
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_that_is_killed_leaves_bad_pages_bad_and_no_new_history() {
    let mut rng = StdRng::seed_from_u64(8);
    let fork = Fork::new();
    equal_pair(&fork).await;
    let file = fork.path("a");
    let b = open(fork.replica("b")).await;
    let variables = [("DB", file.to_str().unwrap().to_string()), ("PORT", fork.port.to_string())];
    let variables = variables.each_ref().map(|(name, value)| (*name, value.as_str()));
    let sound = fs::read(&file).unwrap();
    let (mut partly, mut expected) = (0, None);
    for round in 0..40 {
        let modified = fs::metadata(&file).unwrap().modified().unwrap();
        let mut bad = fs::read(&file).unwrap();
        for page in 100..600 {
            bad[page * 4096 + 3000] = sound[page * 4096 + 3000] ^ 1;
        }
        fs::write(&file, &bad).unwrap();
        fs::File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
        let process = Process::start(repairing_process, &variables);
        let now: Position = process.expect("open").split_once(' ').unwrap().1.parse().unwrap();
        let same = (now.number(), now.checksum());
        assert_eq!(*expected.get_or_insert(same), same, "round {round}: {now}");
        process.expect("apply");
        std::thread::park_timeout(Duration::from_micros(rng.random_range(0..8_000)));
        process.kill();
        let now = fs::read(&file).unwrap();
        let still = (100..600).filter(|page| now[page * 4096 + 3000] != sound[page * 4096 + 3000]).count();
        partly += usize::from(0 < still && still < 500);
        if partly == 3 {
            break;
        }
    }
    assert!(partly > 0, "no kill came in the middle");
    let a = open(fork.primary("a")).await;
    assert_eq!(
        (position(&a).number(), Some(position(&a).checksum())),
        (expected.unwrap().0, expected.map(|e| e.1))
    );
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    within("a repair", async {
        while !a.verify().await.unwrap().holds() {
            // The replica may not be there yet.
            if let Ok(Some(repair)) = a.find_repair().await {
                repair.apply().await.unwrap();
            }
            tick.tick().await;
        }
    })
    .await;
    equal(&a, &b).await;
    assert_eq!(b.status().heals, 0);
    a.shutdown().await;
    b.shutdown().await;
}
