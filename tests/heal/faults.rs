//! Heals that are killed, cut, watched, or that find no room.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::{Db, Error, Event, Txid};

use crate::fork::*;
use crate::support::*;

/// Both sides have rows of one generation each: whoever sees two sees a mix.
const ROWS: &str = "CREATE TABLE g(id INTEGER PRIMARY KEY, generation, v);
    WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 6000)
    INSERT INTO g SELECT i, 'before', randomblob(1500) FROM c";

/// A fork of two closed nodes, each with a generation of its own, and a copy of the file of the one
/// that is to be healed.
async fn forked(fork: &Fork, with_log: bool) -> Vec<u8> {
    let a = open(fork.primary("a")).await;
    run(&a, ROWS.into()).await;
    a.shutdown().await;
    fork.copy("a", "b");
    let (a, b) = (open(fork.primary("a")).await, open(fork.alone("b")).await);
    run(&a, "UPDATE g SET generation = 'kept' WHERE id % 3 = 0; UPDATE g SET generation = 'kept'".into())
        .await;
    run(&b, "UPDATE g SET generation = 'lost'".into()).await;
    a.shutdown().await;
    b.shutdown().await;
    if !with_log {
        fs::remove_dir_all(fork.dir.path().join("b.db-replite/log")).unwrap();
    }
    image(&fork.path("b"))
}

/// Every page of the lost state that differs from the primary's is kept, as it was.
async fn complete(db: &Db, lost: &[u8]) {
    let branch = only_branch(db).await;
    let kept = image(db.path());
    let mut pages = 0;
    branch
        .visit_pages(|number, page| {
            pages += 1;
            let at = (number.get() as usize - 1) * 4096;
            assert!(lost[at..at + 4096] == *page, "{number:?} is not as it was");
            Ok(())
        })
        .unwrap();
    let differing = lost.chunks_exact(4096).zip(kept.chunks_exact(4096)).filter(|(a, b)| a != b).count();
    // The last row has changed a page since.
    assert!(pages + 1 >= differing && pages > 1000, "{pages} of {differing} pages are kept");
}

#[test]
#[ignore = "runs as the child of another test"]
fn healing_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = open(replica(&PathBuf::from(variable("DB")), &variable("URL"))).await;
        let mut events = db.events();
        speak("open");
        let mut said = None;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::HealStarted { .. }) => speak("begun"),
                    Some(Event::Healed { .. }) => speak("healed"),
                    Some(_) => {}
                    None => break,
                },
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
            let problem = db.status().problem;
            if let Some(problem) = problem.filter(|now| said.as_ref() != Some(now)) {
                speak(&format!("problem {problem}"));
                said = Some(problem);
            }
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_that_is_killed_is_made_again_and_its_branch_is_kept_once() {
    let mut rng = StdRng::seed_from_u64(5);
    for with_log in [true, false] {
        let fork = Fork::new();
        let lost = forked(&fork, with_log).await;
        let a = open(fork.primary("a")).await;
        let url = format!("http://127.0.0.1:{}", fork.port);
        let (path, mut done, mut within) = (fork.path("b"), 0, 0);
        for _ in 0..12 {
            let process = Process::start(healing_process, &[("DB", path.to_str().unwrap()), ("URL", &url)]);
            process.expect("open");
            // Anywhere between its begin and what follows its end.
            std::thread::park_timeout(Duration::from_micros(rng.random_range(0..400_000)));
            let said = process.kill();
            let has = |word: &str| said.iter().any(|line| line == word);
            done += usize::from(has("healed"));
            within += usize::from(has("begun") && !has("healed"));
            let file = plain(&path);
            let generations: i64 =
                file.query_row("SELECT count(DISTINCT generation) FROM g", [], |r| r.get(0)).unwrap();
            assert_eq!(generations, 1, "a mix of both sides");
            let ok: String = file.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
            assert_eq!(ok, "ok");
        }
        assert!(within > 0, "no kill hit a heal, and {done} came after its end");
        let b = open(fork.replica("b")).await;
        if done == 0 && b.lost().await.unwrap().is_empty() {
            healed(&mut b.events()).await;
        }
        equal(&a, &b).await;
        complete(&b, &lost).await;
        a.shutdown().await;
        b.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_without_room_on_the_disk_for_what_it_replaces_waits_and_says_so() {
    let fork = Fork::new();
    forked(&fork, true).await;
    // More records than pages.
    let b = open(fork.alone("b")).await;
    run(&b, "UPDATE g SET generation = 'lose'".into()).await;
    run(&b, "UPDATE g SET generation = 'lost'".into()).await;
    b.shutdown().await;
    let (path, url) = (fork.path("b"), format!("http://127.0.0.1:{}", fork.port));
    let lost = image(&path);
    let a = open(fork.primary("a")).await;
    let variables = [("DB", path.to_str().unwrap()), ("URL", url.as_str())];
    let limit = lost.len() as u64 * 5 / 4;
    let process = Process::start_limited(healing_process, &variables, limit);
    process.expect("open");
    let problem = process.expect("problem");
    assert!(problem.contains("write") && problem.contains("/lost/"), "{problem}");
    assert!(!process.kill().iter().any(|line| line == "healed"));
    assert_eq!(image(&path), lost, "something was replaced that is not kept");
    let b = open(fork.replica("b")).await;
    until("the heal", || b.status().heals == 1);
    equal(&a, &b).await;
    complete(&b, &lost).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_whose_connection_breaks_goes_on_and_readers_see_one_side_or_the_other() {
    let mut rng = StdRng::seed_from_u64(6);
    for with_log in [true, false] {
        let fork = Fork::new();
        let lost = forked(&fork, with_log).await;
        let a = open(fork.primary("a")).await;
        let wire = Wire::start(([127, 0, 0, 1], fork.port).into(), Duration::from_millis(2)).await;
        let b = open(replica(&fork.path("b"), &format!("http://{}", wire.address))).await;
        let mut events = b.events();
        let stop = Arc::new(AtomicBool::new(false));
        let ends = Ends(&stop);
        let readers: Vec<_> = (0..2)
            .map(|n| {
                let (b, stop) = (b.clone(), stop.clone());
                std::thread::spawn(move || {
                    let sql = "SELECT count(DISTINCT generation), min(generation) FROM g";
                    let other = plain(b.path());
                    let mut seen = Vec::new();
                    while !stop.load(Ordering::SeqCst) {
                        let read = |c: &replite::rusqlite::Connection| {
                            c.query_row(sql, [], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, String>(1)?)))
                        };
                        let (sides, side) = match n {
                            0 => b.read(|c| Ok::<_, Error>(read(c)?)).unwrap(),
                            _ => read(&other).unwrap(),
                        };
                        assert_eq!(sides, 1, "a mix of both sides");
                        if seen.last() != Some(&side) {
                            seen.push(side);
                        }
                    }
                    seen
                })
            })
            .collect();
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(rng.random_range(5..120))).await;
            wire.cut();
        }
        if b.status().heals == 0 {
            healed(&mut events).await;
        }
        let last: Txid = insert(&a, "last", 0).await;
        within("the last row", b.wait_for_timeout(last, LIMIT)).await.unwrap();
        drop(ends);
        for reader in readers {
            let seen = reader.join().unwrap();
            assert_eq!(seen.last().unwrap(), "kept");
            assert!(seen.len() <= 2, "{seen:?}");
        }
        assert_same_pages(a.path(), b.path());
        complete(&b, &lost).await;
        a.shutdown().await;
        b.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heal_that_finds_no_room_for_what_it_replaces_waits_and_changes_nothing() {
    let fork = Fork::new();
    let lost = forked(&fork, true).await;
    let a = open(fork.primary("a")).await;
    let b = open(fork.replica("b").lost_quota(100_000)).await;
    let mut statuses = tokio::time::interval(Duration::from_millis(5));
    within("the problem", async {
        while !b.status().problem.is_some_and(|problem| problem.contains("move some of it away")) {
            statuses.tick().await;
        }
    })
    .await;
    b.shutdown().await;
    assert!(image(&fork.path("b")) == lost, "something was replaced");
    let b = open(fork.replica("b")).await;
    healed(&mut b.events()).await;
    equal(&a, &b).await;
    complete(&b, &lost).await;
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_behind_the_log_gets_what_differs_and_keeps_nothing() {
    let fork = Fork::new();
    let forget =
        |fork: &Fork| fork.primary("a").log_retention(1 << 20, Duration::from_secs(60)).log_quota(4 << 20);
    let (a, b) = (open(forget(&fork)).await, open(fork.replica("b")).await);
    run(&a, ROWS.into()).await;
    equal(&a, &b).await;
    b.shutdown().await;
    for n in 0..3 {
        run(
            &a,
            format!("UPDATE g SET v = randomblob(1500) WHERE id BETWEEN {} AND {}", n * 900, n * 900 + 900),
        )
        .await;
    }
    let b = open(fork.replica("b")).await;
    let (pages, kept) = healed(&mut b.events()).await;
    let size = fs::metadata(a.path()).unwrap().len() / 4096;
    assert!(pages < size * 6 / 10 && kept.is_none(), "{pages} of {size} pages, kept at {kept:?}");
    equal(&a, &b).await;
    assert!(b.lost().await.unwrap().is_empty());
    a.shutdown().await;
    b.shutdown().await;
}
