//! A disk that is full: here, files that may not grow (`ulimit -f`), in a process of its own.
#![cfg(unix)]

use std::path::PathBuf;

use crate::support::*;
use replite::{Db, Error, Event};

/// A primary whose files may not grow beyond a mebibyte: its log soon can't be written.
#[test]
#[ignore = "runs as the child of another test"]
fn cramped_primary() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime
        .block_on(Db::open(primary(&PathBuf::from(variable("DB")), variable("PORT").parse().unwrap())));
    let db = db.unwrap();
    let mut events = db.events();
    runtime.spawn(async move {
        while let Some(event) = events.next().await {
            if matches!(event, Event::LogGap { .. }) {
                speak("gap");
            }
        }
    });
    speak("open");
    for n in 0..600i64 {
        let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
            let sql = "INSERT OR REPLACE INTO t(id, n, v) VALUES (?1 % 20, ?1, randomblob(3000))";
            Ok::<_, Error>(tx.execute(sql, [n])?)
        };
        // The log is never the reason that a commit fails.
        db.write_blocking(write).unwrap();
    }
    speak("written");
    while db.writer().unwrap().flush().is_err() {}
    speak(&format!("rest {}", db.position().unwrap()));
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_cannot_be_written_costs_no_commit_and_replicas_come_to_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
    let mut process = Process::start_limited(
        cramped_primary,
        &[("DB", p.to_str().unwrap()), ("PORT", &port.to_string())],
        1024 * 1024,
    );
    process.expect("open");
    let db = Db::open(replica(&r, &format!("http://127.0.0.1:{port}"))).await.unwrap();
    process.expect("gap");
    process.expect("written");
    let rest = process.expect("rest");
    let position: replite::Position = rest.split(' ').nth(1).unwrap().parse().unwrap();
    db.wait_for_timeout(position.txid(), LIMIT).await.unwrap();
    assert_eq!(db.position(), Some(position));
    assert_same_pages(&p, &r);
    process.say("end");
    db.shutdown().await;
}

/// A replica whose files may not grow: it can't take what comes, says so, and stays alive.
#[test]
#[ignore = "runs as the child of another test"]
fn cramped_replica() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(replica(&PathBuf::from(variable("DB")), &variable("URL"))).await.unwrap();
        if db.position().is_some() {
            db.ready().await.unwrap();
            speak("ready");
        }
        loop {
            if let Some(problem) = db.status().problem {
                speak(&format!("problem {problem}"));
                break;
            }
            tokio::task::yield_now().await;
        }
    });
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_room_says_so_and_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let primary = Db::open(primary(&p, 0)).await.unwrap();
    let url = primary.node().addresses.replication.clone();
    let db = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", db.ready()).await.unwrap();
    db.shutdown().await;
    drop(db);
    // More than its files may hold.
    let mut last = None;
    for n in 0..400 {
        let write = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(n, v) VALUES (?1, randomblob(4000))", [n])?)
        };
        last = primary.write(write).await.unwrap().txid;
    }
    let variables = [("DB", r.to_str().unwrap()), ("URL", url.as_str())];
    let process = Process::start_limited(cramped_replica, &variables, 512 * 1024);
    process.expect("problem");
    process.kill();
    let db = Db::open(replica(&r, &url)).await.unwrap();
    db.wait_for_timeout(last.unwrap(), LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    db.shutdown().await;
    primary.shutdown().await;
}

/// A replica whose database file may not grow, while its WAL and its log may.
#[test]
#[ignore = "runs as the child of another test"]
fn replica_with_a_full_file() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let db = Db::open(replica(&PathBuf::from(variable("DB")), &variable("URL"))).await.unwrap();
        let mut events = db.events();
        within("the stream", async {
            while !matches!(events.next().await, Some(Event::Connected { .. })) {}
        })
        .await;
        tokio::spawn(async move {
            while let Some(event) = events.next().await {
                if let Event::Disconnected { why, .. } = event {
                    speak(&format!("disconnected {why}"));
                }
            }
        });
        speak("ready");
        let last: replite::Txid = tokio::task::spawn_blocking(hear).await.unwrap().parse().unwrap();
        let applied = db.wait_for_timeout(last, LIMIT).await;
        until("it is told", || db.status().problem.is_some_and(|p| p.contains("can't be copied back")));
        speak(&format!("applied {applied:?} {}", db.status().problem.unwrap_or_default()));
    });
    hear();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_without_room_for_its_database_file_says_so_and_goes_on_in_its_wal() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let primary = Db::open(primary(&p, 0)).await.unwrap();
    let url = primary.node().addresses.replication.clone();
    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(who, v) VALUES ('row', randomblob(4000))", [])?)
    };
    for _ in 0..500 {
        primary.write(write).await.unwrap();
    }
    // By a snapshot, so that its log is empty.
    let db = Db::open(replica(&r, &url)).await.unwrap();
    within("ready", db.ready()).await.unwrap();
    let last = insert(&primary, "before", 0).await;
    db.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_eq!(db.checkpoint(LIMIT).await.unwrap(), replite::Checkpoint::Done);
    db.shutdown().await;
    let bytes = std::fs::metadata(&r).unwrap().len();
    let variables = [("DB", r.to_str().unwrap()), ("URL", url.as_str())];
    let mut process = Process::start_limited(replica_with_a_full_file, &variables, bytes);
    process.expect("ready");
    let mut last = None;
    // More than its WAL is to have, and not twice as much as that.
    for _ in 0..60 {
        last = primary.write(write).await.unwrap().txid;
    }
    process.say(&last.unwrap().to_string());
    let line = loop {
        let line = process.next_line().expect("the replica goes on");
        assert!(!line.starts_with("disconnected"), "{line}");
        if line.starts_with("applied") {
            break line;
        }
    };
    assert!(line.starts_with("applied Ok"), "{line}");
    process.kill();
    let db = Db::open(replica(&r, &url)).await.unwrap();
    let last = insert(&primary, "after", 0).await;
    db.wait_for_timeout(last, LIMIT).await.unwrap();
    within("its own", primary.wait_for(last)).await.unwrap();
    assert_eq!(db.checkpoint(LIMIT).await.unwrap(), replite::Checkpoint::Done);
    assert_same_pages(&p, &r);
    db.shutdown().await;
    primary.shutdown().await;
}

/// A file that leaves no room for others. It is in the way until it is removed.
#[cfg(target_os = "linux")]
fn fill(directory: &std::path::Path) -> PathBuf {
    use std::io::Write;

    let ballast = directory.join("ballast");
    let mut file = std::fs::File::create(&ballast).unwrap();
    let mut block = vec![1; 1 << 20];
    while !block.is_empty() {
        if file.write_all(&block).is_err() {
            block.truncate(block.len() / 2);
        }
    }
    file.sync_all().unwrap();
    ballast
}

/// Opens a primary, fills its disk and writes until there is no room. How many rows are there;
/// killed or shut down.
#[cfg(target_os = "linux")]
async fn fill_below(path: &std::path::Path) -> (Db, PathBuf, i64) {
    let db = Db::open(primary(path, 0)).await.unwrap();
    for n in 0..50 {
        insert(&db, "before", n).await;
    }
    until("the reserve", || path.with_file_name("p.db-replite").join("reserve").exists());
    let ballast = fill(path.parent().unwrap());
    let mut rows = 50;
    let write = |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(who, v) VALUES ('full', randomblob(3000))", [])?)
    };
    // The log makes room once more, when it can't be written either.
    let mut refused = 0;
    while refused < 20 {
        match db.write(write).await {
            Ok(_) => (rows, refused) = (rows + 1, 0),
            Err(_) => refused += 1,
        }
    }
    let health = db.health();
    assert!(health.can_read && !health.can_write, "{health:?}");
    assert!(health.reasons.iter().any(|why| why.contains("the disk is full")), "{health:?}");
    assert_eq!(count(&db), rows);
    (db, ballast, rows)
}

#[test]
#[ignore = "runs as the child of another test, on a disk of its own"]
#[cfg(target_os = "linux")]
fn filling_process() {
    if is_child() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (_db, _, rows) = runtime.block_on(fill_below(&PathBuf::from(variable("DB"))));
        speak(&format!("full {rows}"));
        hear();
    }
}

#[test]
#[ignore = "runs as the child of another test, on a disk of its own"]
#[cfg(target_os = "linux")]
fn process_on_a_small_disk() {
    if !is_child() {
        return;
    }
    let path = PathBuf::from(variable("DB"));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let rows: i64 = if variable("KILL") == "yes" {
        let process = Process::start(filling_process, &[("DB", path.to_str().unwrap())]);
        let said = process.expect("full");
        process.kill();
        said.split(' ').nth(1).unwrap().parse().unwrap()
    } else {
        runtime.block_on(async {
            let (db, _, rows) = fill_below(&path).await;
            db.shutdown().await;
            rows
        })
    };
    runtime.block_on(async {
        // Twice: the first one has used the reserve.
        for _ in 0..2 {
            let db = Db::open(primary(&path, 0)).await.unwrap();
            assert_eq!(count(&db), rows);
            until("it is told", || !db.health().can_write);
            assert!(db.health().can_read, "{:?}", db.health());
            db.shutdown().await;
        }
        let db = Db::open(primary(&path, 0)).await.unwrap();
        std::fs::remove_file(path.with_file_name("ballast")).unwrap();
        until("there is room", || db.health().can_write);
        until("no problem", || db.status().problem.is_none());
        insert(&db, "after", 0).await;
        assert_eq!(count(&db), rows + 1);
        assert!(db.verify().await.unwrap().holds());
        until("the reserve", || path.with_file_name("p.db-replite").join("reserve").exists());
        db.shutdown().await;
    });
    speak("survived");
}

/// On a full disk a primary could not be opened, so that nobody could read; and while it ran, its
/// health was good.
#[test]
#[cfg(target_os = "linux")]
fn a_primary_on_a_full_disk_is_opened_and_read_and_says_that_it_can_not_write() {
    for kill in ["no", "yes"] {
        let dir = tempfile::tempdir().unwrap();
        // A file system of memory, which nobody but this process sees.
        let mut unshare = std::process::Command::new("unshare");
        unshare
            .args(["-rm", "sh", "-c", "mount -t tmpfs -o size=8m tmpfs \"$1\" && shift && exec \"$@\"", "sh"])
            .arg(dir.path())
            .arg(this_binary());
        let path = dir.path().join("p.db");
        let variables = [("DB", path.to_str().unwrap()), ("KILL", kill)];
        let said = Process::start_by(unshare, process_on_a_small_disk, &variables).success();
        assert_eq!(said, ["survived"]);
    }
}
