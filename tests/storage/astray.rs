//! Files that somebody removes, replaces or writes over while a node has them open.
#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::*;
use http::Request;
use replite::{Db, Error, Event};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// From the deed to the refusal; a machine that is busy with other tests takes its time, too.
const TOLD_LIMIT: Duration = Duration::from_secs(5);

/// Runs a program of the system, as an operator does. In this process a closed descriptor of a
/// database would drop SQLite's locks.
fn system(words: &[&str]) {
    assert!(Command::new(words[0]).args(&words[1..]).status().unwrap().success(), "{words:?}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}", path.display()))
}

async fn opened(path: &Path) -> Db {
    Db::open(primary(path, 0)).await.unwrap()
}

async fn follower(path: &Path, of: &Db) -> Db {
    let r = Db::open(replica(path, &of.node().addresses.replication)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    r
}

/// Writes of a node until one failed.
struct Written {
    /// How many rows were acknowledged.
    acknowledged: i64,
    /// Whether there is one more of which it is not known whether it is kept.
    unknown: bool,
}

impl Written {
    /// All that was acknowledged is there, and of the rest only what is known to be unknown.
    fn assert_kept(&self, db: &Db, before: i64, how: &str) {
        let (rows, least) = (count(db), before + self.acknowledged);
        assert!((least..=least + i64::from(self.unknown)).contains(&rows), "{how}: {rows} rows of {least}");
    }
}

/// Writes until that is refused.
async fn write_on(db: &Db) -> Written {
    let begin = Instant::now();
    let mut unknown = false;
    for n in 0.. {
        let write = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(n) VALUES (?1)", [n])?)
        };
        match db.write(write).await {
            Ok(_) => assert!(!unknown, "a write that is acknowledged after one that is not"),
            // Refused before it was committed.
            Err(Error::Stopped(_)) => return Written { acknowledged: n - i64::from(unknown), unknown },
            Err(Error::OutcomeUnknown { .. }) => {
                assert!(!unknown, "one is under way at a time");
                unknown = true;
            }
            Err(error) => panic!("{error:?}"),
        }
        assert!(begin.elapsed() < TOLD_LIMIT, "writes go on");
        tokio::task::yield_now().await;
    }
    unreachable!("the numbers do not end")
}

/// A primary whose files are others is loud, and refuses all.
fn assert_stopped(db: &Db, word: &str) {
    // Who writes hears it first.
    until("it is told", || !db.health().live);
    let health = db.health();
    assert!(!health.live && !health.can_read && !health.can_write, "{health:?}");
    let problem = db.status().problem.unwrap();
    assert!(problem.contains(word) && problem.contains("start"), "{problem}");
    let read =
        db.read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?));
    assert!(matches!(&read, Err(Error::Stopped(why)) if why.text().contains(word)), "{read:?}");
}

/// A backup is put over the file of a running primary, by another inode or in place. The last
/// anchor vouched for whatever file was there: the next start had the old position and checksum
/// with other rows, and nobody said anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_put_over_the_file_of_a_running_primary_is_never_vouched_for() {
    for how in ["mv", "cp"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, backup) = (dir.path().join("p.db"), dir.path().join("backup.db"));
        let p = opened(&path).await;
        let r = follower(&dir.path().join("r.db"), &p).await;
        let mut events = p.events();
        for n in 0..500 {
            insert(&p, "before", n).await;
        }
        p.snapshot_to(&backup).await.unwrap();
        for n in 0..500 {
            insert(&p, "after", n).await;
        }
        let right = dir.path().join("right.db");
        system(&["ln", text(&path), text(&right)]);
        system(&[how, text(&backup), text(&path)]);
        let more = write_on(&p).await;
        assert_stopped(&p, if how == "mv" { "another file" } else { "somebody else" });
        within("the event", async {
            while !matches!(events.next().await.unwrap(), Event::Stopped { why, .. } if why.contains("p.db"))
            {
            }
        })
        .await;
        r.shutdown().await;
        p.shutdown().await;

        // Either it is refused, or the log makes it good, or it is no state that anybody has.
        match Db::open(primary(&path, 0)).await {
            Err(error) => {
                assert!(matches!(error, Error::Damaged { .. }), "{error:?}");
                assert_eq!(how, "mv", "the log has all pages that were changed");
                // With the right file all is there.
                system(&["mv", text(&right), text(&path)]);
                let again = opened(&path).await;
                more.assert_kept(&again, 1000, how);
                again.shutdown().await;
            }
            Ok(again) => {
                assert!(again.verify().await.unwrap().holds(), "{how}");
                // What was acknowledged is in the log.
                more.assert_kept(&again, 1000, how);
                again.shutdown().await;
            }
        }
    }
}

/// A transaction that has read what somebody put over the file is not committed, however soon that
/// is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_read_a_file_that_was_written_over_is_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, backup) = (dir.path().join("p.db"), dir.path().join("backup.db"));
    let p = opened(&path).await;
    insert(&p, "before", 0).await;
    p.snapshot_to(&backup).await.unwrap();
    for n in 0..500 {
        insert(&p, "after", n).await;
    }
    // All of it is in the file, from where it is read.
    let done = p.checkpoint(LIMIT).await.unwrap();
    assert!(matches!(done, replite::Checkpoint::Done), "{done:?}");
    let to = path.clone();
    let write = p.write(move |tx| {
        system(&["cp", text(&backup), text(&to)]);
        Ok::<_, Error>(tx.execute("INSERT INTO t(n) VALUES (1)", [])?)
    });
    let refused = write.await;
    assert!(
        matches!(&refused, Err(Error::Stopped(why)) if why.text().contains("somebody else")),
        "{refused:?}"
    );
    assert_stopped(&p, "somebody else");
    p.shutdown().await;
    let again = opened(&path).await;
    assert_eq!(count(&again), 501);
    assert!(again.verify().await.unwrap().holds());
    again.shutdown().await;
}

/// Without its WAL, or any other of its files, a primary acknowledged writes that nobody could
/// read, and was healthy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_files_are_removed_stops_and_has_what_the_log_has() {
    for (name, kept) in [("-wal", true), ("-shm", true), ("", false), ("-replite", false), ("*", false)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.db");
        let p = opened(&path).await;
        for n in 0..300 {
            insert(&p, "before", n).await;
        }
        let begin = Instant::now();
        match name {
            "*" => system(&["find", text(dir.path()), "-mindepth", "1", "-delete"]),
            name => system(&["rm", "-r", text(&beside(&path, name))]),
        }
        // Nobody writes: the look alone finds it.
        until("it is told", || !p.health().can_write);
        assert!(begin.elapsed() < TOLD_LIMIT, "{name}: {:?}", begin.elapsed());
        let more = write_on(&p).await;
        assert!((more.acknowledged, more.unknown) == (0, false), "{name}");
        assert_stopped(&p, "was removed");
        let position = p.position().unwrap();
        p.shutdown().await;
        if kept {
            let again = opened(&path).await;
            assert_eq!(count(&again), 300, "{name}");
            assert_eq!(again.position().unwrap().checksum(), position.checksum(), "{name}");
            assert!(again.verify().await.unwrap().holds());
            again.shutdown().await;
        }
    }
}

/// The same between two commits that wait for nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_when_the_wal_was_removed_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let p = opened(&path).await;
    let removed = beside(&path, "-wal");
    let (written, ()) = tokio::join!(write_on(&p), async {
        tokio::task::spawn_blocking(move || system(&["rm", text(&removed)])).await.unwrap();
    });
    p.shutdown().await;
    let again = opened(&path).await;
    written.assert_kept(&again, 0, "rm");
    assert!(again.verify().await.unwrap().holds());
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_applications_readiness_follows() {
    let dir = tempfile::tempdir().unwrap();
    let example = crate::http_support::Example::one(dir.path(), &[]);
    let url = &example.urls[0];
    let http = crate::http_support::Http::new();
    let status = async |path: &str| http.get(&format!("{url}{path}")).await.map_or(0, |answer| answer.status);
    within("ready", async { while status("/readyz").await != 200 {} }).await;
    system(&["rm", text(&dir.path().join("notes.db-wal"))]);
    within("not ready", async { while status("/readyz").await != 503 {} }).await;
    let note = Request::post(format!("{url}/api/notes")).header("content-type", "application/json");
    let answer = http.send(note.body(r#"{"text":"lost"}"#).unwrap()).await.unwrap();
    assert!(answer.status >= 500, "{answer:?}");
    let health = http.get(&format!("{url}/healthz")).await.unwrap();
    assert_eq!(health.status, 503);
    // What everybody can ask for has no paths.
    let node = http.get(&format!("{url}/api/node")).await.unwrap();
    for answer in [health.text(), node.text()] {
        assert!(answer.contains("replication stopped"), "{answer}");
        assert!(!answer.contains(text(dir.path())) && !answer.contains("notes.db"), "{answer}");
    }
    drop(example);
}

/// A process without descriptors, also in reserve: what it reads fails, and it says so until it can
/// again.
#[test]
#[ignore = "runs as the child of another test"]
fn process_without_descriptors() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(opened(&PathBuf::from(variable("DB"))));
    assert!(db.health().can_read, "{:?}", db.health());
    // Not even those of the reserve are below this limit.
    let usual = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..usual }).unwrap();
    // No connection is open for it yet.
    let failed =
        db.read(|c| Ok::<_, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0))?));
    assert!(matches!(failed, Err(Error::Sqlite(_))), "{failed:?}");
    let health = db.health();
    assert!(!health.can_read && health.can_write, "{health:?}");
    assert!(db.status().problem.unwrap().contains("can't be read"));
    setrlimit(Resource::Nofile, usual).unwrap();
    // Nobody reads: it finds out by itself.
    until("it can read", || db.health().can_read);
    assert_eq!(db.status().problem, None);
    runtime.block_on(db.shutdown());
    speak("recovered");
    hear();
}

#[test]
fn health_follows_from_reads_that_fail() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    Process::start(process_without_descriptors, &[("DB", text(&path))]).expect("recovered");
}

fn sum(db: &Db) -> Result<i64, Error> {
    db.read(|c| Ok(c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))
}

/// The same on a replica's files: they are opened anew, and led to the primary's state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_files_are_others_is_healed() {
    for deed in ["mv", "cp", "rm -wal", "rm -shm", "rm ", "rm -replite", "wipe"] {
        let dir = tempfile::tempdir().unwrap();
        let (path, backup) = (dir.path().join("r").join("r.db"), dir.path().join("backup.db"));
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let p = opened(&dir.path().join("p.db")).await;
        let r = follower(&path, &p).await;
        for n in 0..500 {
            insert(&p, "before", n).await;
        }
        p.snapshot_to(&backup).await.unwrap();
        let mut last = insert(&p, "after", 0).await;
        for n in 1..500 {
            last = insert(&p, "after", n).await;
        }
        within("all", r.wait_for_timeout(last, LIMIT)).await.unwrap();
        assert_eq!(count(&r), 1000);
        match deed {
            "wipe" => system(&["find", text(path.parent().unwrap()), "-mindepth", "1", "-delete"]),
            "mv" | "cp" => system(&[deed, text(&backup), text(&path)]),
            rm => system(&["rm", "-r", text(&beside(&path, &rm[3..]))]),
        }
        let last = insert(&p, "later", 0).await;
        let waited = r.wait_for_timeout(last, LIMIT / 2).await;
        assert!(waited.is_ok(), "{deed}: {waited:?} {:?}", r.status());
        until(deed, || {
            let rows = sum(&r);
            assert!(rows.as_ref().map_or(true, |rows| *rows >= 1000), "{deed}: {rows:?}");
            rows.is_ok_and(|rows| rows == 1001)
                && r.position() == p.position()
                && r.status().problem.is_none()
        });
        assert!(r.health().can_read, "{deed}: {:?}", r.health());
        assert!(r.verify().await.unwrap().holds(), "{deed}");
        assert_same_pages(p.path(), &path);
        // And it is what the next start finds.
        r.shutdown().await;
        let r = follower(&path, &p).await;
        within("again", r.wait_for_timeout(last, LIMIT)).await.unwrap();
        assert!(r.verify().await.unwrap().holds(), "{deed}");
        r.shutdown().await;
        p.shutdown().await;
    }
}
