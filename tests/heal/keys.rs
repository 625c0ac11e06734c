//! The keys of a database: what is hashed and proved with them, and what comes of others.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replite::{Db, Error, PageSize, Secret};

use crate::fork::*;
use crate::support::*;

fn state_dir(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-replite", path.display()))
}

fn keys(path: &Path) -> Vec<u8> {
    fs::read(state_dir(path).join("database-keys")).unwrap()
}

fn lost(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(state_dir(path).join("lost")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A closed node loses its keys.
fn lose_keys(path: &Path) {
    fs::remove_file(state_dir(path).join("database-keys")).unwrap();
}

async fn closed_pair(fork: &Fork) -> replite::Position {
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    for n in 0..20 {
        insert(&a, "both", n).await;
    }
    equal(&a, &b).await;
    b.shutdown().await;
    a.shutdown().await;
    position(&a)
}

async fn rows(db: &Db, who: &'static str) -> i64 {
    let count = "SELECT count(*) FROM t WHERE who = ?1";
    db.read_async(move |conn| Ok::<_, Error>(conn.query_row(count, [who], |row| row.get(0))?)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_databases_have_other_hashes_of_the_same_pages_and_other_tokens() {
    let fork = Fork::new();
    let a = open(fork.primary("a")).await;
    let last = insert(&a, "row", 1).await;
    within("the position", a.wait_for(last)).await.unwrap();
    a.snapshot_to(fork.path("copy")).await.unwrap();
    let copy = open(fork.alone("copy")).await;
    let token = a.token(last).unwrap().to_string();
    assert_eq!(copy.verify_token(&token), None, "of the same name, and of another birth");
    // The secret has nothing to do with it.
    let old = a.token(last).unwrap();
    a.rotate_secrets(&[Secret::generate().unwrap()]).unwrap();
    assert_eq!(a.verify_token(old.as_str()), Some(last));
    assert_eq!(a.token(last), Some(old));
    a.shutdown().await;
    copy.shutdown().await;
    let (size, pages) = (PageSize::new(4096).unwrap(), image(&fork.path("a")));
    assert_eq!(a.checksum_of(&pages, size), position(&a).checksum());
    assert_ne!(copy.checksum_of(&pages, size), a.checksum_of(&pages, size));
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_are_for_their_owner_alone_and_a_replica_has_the_primarys() {
    use std::os::unix::fs::PermissionsExt;
    let fork = Fork::new();
    let config = |config: replite::Config| config.database_mode(0o644);
    let (a, b) = (open(config(fork.primary("a"))).await, open(config(fork.replica("b"))).await);
    let last = insert(&a, "row", 1).await;
    within("the row", b.wait_for(last)).await.unwrap();
    for name in ["a", "b"] {
        let mode =
            fs::metadata(state_dir(&fork.path(name)).join("database-keys")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    assert_eq!(keys(&fork.path("a")), keys(&fork.path("b")));
    assert_eq!(lost(&fork.path("b")), [""; 0], "a replica that had nothing has nothing to keep");
    assert_eq!(b.status().heals, 0);
    assert_eq!(b.verify_token(a.token(last).unwrap().as_str()), Some(last));
    a.shutdown().await;
    b.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_another_birth_ends_with_the_primarys_keys_and_pages_and_keeps_its_own() {
    let fork = Fork::new();
    closed_pair(&fork).await;
    // As a primary of its own it began anew, with other keys.
    lose_keys(&fork.path("b"));
    let b = open(fork.alone("b").recovery_timeout(Duration::ZERO)).await;
    insert(&b, "mine", 1).await;
    b.shutdown().await;
    assert_ne!(keys(&fork.path("a")), keys(&fork.path("b")));
    let before = lost(&fork.path("b"));
    let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
    let mut events = b.events();
    if b.status().heals == 0 {
        healed(&mut events).await;
    }
    equal(&a, &b).await;
    assert_eq!(keys(&fork.path("a")), keys(&fork.path("b")));
    assert_eq!((rows(&a, "mine").await, rows(&b, "mine").await), (0, 0));
    let all = b.lost().await.unwrap();
    let branch = all.iter().find_map(|lost| lost.branch()).expect("what differed is kept");
    let kept = branch.rows().unwrap().unwrap().rows;
    assert!(kept.iter().any(|row| row.lost.as_ref().is_some_and(|lost| lost["who"] == "mine")), "{kept:?}");
    // The pages are readable, whatever the keys are by now.
    let mut pages = 0;
    branch
        .visit_pages(|_, _| {
            pages += 1;
            Ok(())
        })
        .unwrap();
    assert_eq!(pages, branch.pages);
    let logs = |names: &[String]| names.iter().filter(|name| name.starts_with("log-")).count();
    assert_eq!(logs(&lost(&fork.path("b"))), logs(&before) + 1, "its log may have what no page shows");
    assert!(b.verify().await.unwrap().holds());
    b.shutdown().await;
    // A state like any other from now on.
    let b = open(fork.replica("b")).await;
    assert!(b.position().is_some());
    equal(&a, &b).await;
    assert_eq!(b.status().heals, 0);
    b.shutdown().await;
    a.shutdown().await;
}

/// The node dies after each step of the change of its keys. What is left is made of its files from
/// before and those that the step had written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_dies_while_it_takes_the_keys_compares_its_pages() {
    for step in ["keys written", "half of the log moved", "opened again"] {
        let fork = Fork::new();
        closed_pair(&fork).await;
        let (a, b) = (fork.path("a"), fork.path("b"));
        lose_keys(&b);
        let own = open(fork.alone("b").recovery_timeout(Duration::ZERO)).await;
        insert(&own, "mine", 1).await;
        own.shutdown().await;
        fs::copy(state_dir(&a).join("database-keys"), state_dir(&b).join("database-keys")).unwrap();
        match step {
            "keys written" => {}
            "half of the log moved" => {
                let kept = state_dir(&b).join("lost").join("log-1");
                fs::create_dir_all(&kept).unwrap();
                let logs = fs::read_dir(state_dir(&b).join("log")).unwrap();
                let mut logs: Vec<_> = logs.map(|entry| entry.unwrap().path()).collect();
                logs.sort();
                fs::rename(&logs[0], kept.join(logs[0].file_name().unwrap())).unwrap();
            }
            _ => {
                // No primary is there: it is not read from.
                let b = open(replica(&b, "http://127.0.0.1:1")).await;
                assert_eq!(b.position(), None, "nothing that was here has a name");
                b.shutdown().await;
            }
        }
        let (a, b) = (open(fork.primary("a")).await, open(fork.replica("b")).await);
        equal(&a, &b).await;
        let all = b.lost().await.unwrap();
        let branch = all.iter().find_map(|lost| lost.branch()).expect("what differed is kept");
        // They are written after the heal.
        until("the rows", || branch.rows().unwrap().is_some());
        let kept = branch.rows().unwrap().unwrap().rows;
        let mine = kept.iter().any(|row| row.lost.as_ref().is_some_and(|lost| lost["who"] == "mine"));
        assert!(mine, "{step}: {kept:?}");
        assert!(lost(b.path()).iter().any(|name| name.starts_with("log-")), "{step}");
        assert!(b.verify().await.unwrap().holds(), "{step}");
        b.shutdown().await;
        a.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_lost_its_keys_has_them_back_from_its_replica_and_nothing_is_compared() {
    let fork = Fork::new();
    let before = closed_pair(&fork).await;
    let had = keys(&fork.path("a"));
    lose_keys(&fork.path("a"));
    let b = open(fork.replica("b")).await;
    let a = within("the keys", Db::open(fork.primary("a").recovery_timeout(LIMIT))).await.unwrap();
    assert_eq!(keys(&fork.path("a")), had);
    assert_eq!(position(&a), before, "the state has its name");
    equal(&a, &b).await;
    assert_eq!(position(&a).number(), before.number() + 1);
    assert_eq!((b.status().heals, lost(a.path()), lost(b.path())), (0, Vec::new(), Vec::new()));
    within("what was acknowledged", a.wait_for(before.txid())).await.unwrap();
    b.shutdown().await;
    a.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_lost_its_keys_and_has_no_replica_begins_a_new_branch() {
    // No answer in time; not asked.
    for limit in [Duration::from_millis(10), Duration::ZERO] {
        let fork = Fork::new();
        let before = closed_pair(&fork).await;
        let had = keys(&fork.path("a"));
        lose_keys(&fork.path("a"));
        let a = open(fork.primary("a").recovery_timeout(limit)).await;
        assert_ne!(keys(&fork.path("a")), had);
        assert_ne!(position(&a).checksum(), before.checksum(), "the same pages have another sum");
        assert_eq!(rows(&a, "both").await, 20);
        assert!(lost(a.path()).iter().any(|name| name.starts_with("log-")), "{:?}", lost(a.path()));
        // The replica has what the primary has, and the primary's names for it.
        let b = open(fork.replica("b")).await;
        equal(&a, &b).await;
        assert_eq!((rows(&b, "both").await, keys(&fork.path("b"))), (20, keys(&fork.path("a"))));
        assert!(!matches!(b.wait_for_timeout(before.txid(), Duration::ZERO).await, Ok(())));
        assert!(b.verify().await.unwrap().holds());
        b.shutdown().await;
        a.shutdown().await;
    }
}
