//! How a replica gets a state that it has not, or not any more: by a snapshot, from a copy that was
//! put there, after the primary's pages changed their size.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use replite::rusqlite::Connection;
use replite::{Db, Error, Event, Events};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use crate::fork::{self, run};
use crate::support::*;

const ROWS: &str = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 500)
                    INSERT INTO t(who, n, v) SELECT 'old', i, randomblob(50000) FROM c";

fn pages(path: &Path) -> u64 {
    plain(path).query_row("PRAGMA page_count", [], |r| r.get::<_, i64>(0)).unwrap() as u64
}

/// A proxy in front of a primary that has it commit for what goes through: so much more slowly does
/// the link bring a state than the log grows.
struct Slow {
    url: String,
    came: Arc<AtomicU64>,
    /// Whether it still commits; held for as long as a commit takes.
    commits: Arc<Mutex<bool>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Bytes of the stream for each of which the primary commits.
const STEP: u64 = 100_000;

impl Slow {
    async fn start(db: Db, port: u16) -> Slow {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (came, commits) = (Arc::<AtomicU64>::default(), Arc::new(Mutex::new(true)));
        let (counted, may) = (came.clone(), commits.clone());
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                carry(client, server, &db, &counted, &may).await;
            }
        });
        Slow { url, came, commits, task }
    }
}

async fn carry(client: TcpStream, server: TcpStream, db: &Db, came: &AtomicU64, commits: &Mutex<bool>) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let down = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
            let before = came.fetch_add(n as u64, Ordering::SeqCst);
            for at in before / STEP..(before + n as u64) / STEP {
                let commits = commits.lock().await;
                if !*commits {
                    break;
                }
                let sql = "UPDATE t SET v = randomblob(50000) WHERE id = ?1 % 20 + 1";
                db.write(move |tx| Ok::<_, Error>(tx.execute(sql, [at as i64])?)).await.unwrap();
            }
            if to_client.write_all(&buffer[..n]).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = down => {}
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fill_that_is_slower_than_the_log_ends_and_no_page_comes_twice_that_did_not_change() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
    let config = primary(&p, port).log_retention(1 << 20, Duration::from_secs(3600)).log_quota(4 << 20);
    let source = Db::open(config).await.unwrap();
    run(&source, ROWS.into()).await;
    let size = pages(&p) * 4096;
    assert!(size > 20 << 20, "{size}");
    let slow = Slow::start(source.clone(), port).await;
    let target = Db::open(replica(&r, &slow.url)).await.unwrap();
    let mut ready = Box::pin(target.ready());
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    loop {
        tokio::select! {
            done = within("the fill", &mut ready) => break done.unwrap(),
            _ = tick.tick() => {}
        }
        let came = slow.came.load(Ordering::SeqCst);
        assert!(came < size * 2, "{came} bytes came for a database of {size}: {:?}", target.status().problem);
    }
    drop(ready);
    let came = slow.came.load(Ordering::SeqCst);
    assert!(came > size, "the log was never behind");
    *slow.commits.lock().await = false;
    let last = insert(&source, "last", 1).await;
    within("the last", target.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &r);
    assert!(target.verify().await.unwrap().holds());
    assert!(target.lost().await.unwrap().is_empty());
    target.shutdown().await;
    source.shutdown().await;
}

/// What was told so far, up to the end of a heal: how many pages it replaced, and whether a
/// snapshot came.
async fn healed_without_snapshot(events: &mut Events) -> u64 {
    within("the heal", async {
        loop {
            match events.next().await.expect("an event") {
                Event::Healed { pages, .. } => return pages,
                Event::SnapshotStarted { why, .. } => panic!("a whole snapshot: {why}"),
                _ => {}
            }
        }
    })
    .await
}

/// The two ways to seed a replica that the documentation names, each with the primary running and
/// going on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_seeded_with_a_copy_gets_only_what_was_written_since() {
    let dir = tempfile::tempdir().unwrap();
    let p = dir.path().join("p.db");
    let source = Db::open(primary(&p, 0)).await.unwrap();
    run(&source, ROWS.into()).await;
    let pages = pages(&p);
    for (n, way) in ["snapshot_to", "backup"].into_iter().enumerate() {
        let r = dir.path().join(format!("{way}.db"));
        match way {
            "snapshot_to" => drop(source.snapshot_to(&r).await.unwrap()),
            _ => {
                // What `.backup` of the shell does.
                let (from, mut to) = (plain(&p), Connection::open(&r).unwrap());
                let backup = replite::rusqlite::backup::Backup::new(&from, &mut to).unwrap();
                assert_eq!(backup.step(-1).unwrap(), replite::rusqlite::backup::StepResult::Done);
            }
        }
        let change = format!("UPDATE t SET v = randomblob(50000) WHERE id = {}", 100 + n);
        run(&source, change).await;
        let last = insert(&source, "since", n as i64).await;
        let target = Db::open(replica(&r, &source.node().addresses.replication)).await.unwrap();
        let replaced = healed_without_snapshot(&mut target.events()).await;
        assert!(replaced < pages / 20, "{way}: {replaced} of {pages} pages");
        within("the last", target.wait_for_timeout(last, LIMIT)).await.unwrap();
        assert_same_pages(&p, &r);
        assert!(target.verify().await.unwrap().holds());
        assert_eq!(target.status().problem, None);
        target.shutdown().await;
        // It is a replica like others from then on.
        let target = Db::open(replica(&r, &source.node().addresses.replication)).await.unwrap();
        let last = insert(&source, "later", n as i64).await;
        within("the last", target.wait_for_timeout(last, LIMIT)).await.unwrap();
        assert_eq!(target.status().heals, 0);
        target.shutdown().await;
    }
    // All files of a replica that is stopped: it goes on from its log.
    let (from, to) = (dir.path().join("backup.db"), dir.path().join("copy.db"));
    let beside = |path: &Path, end: &str| PathBuf::from(format!("{}{end}", path.display()));
    fs::copy(&from, &to).unwrap();
    fs::copy(beside(&from, "-wal"), beside(&to, "-wal")).unwrap();
    fork::copy_tree(&beside(&from, "-replite"), &beside(&to, "-replite"));
    let last = insert(&source, "again", 0).await;
    let target = Db::open(replica(&to, &source.node().addresses.replication)).await.unwrap();
    within("the last", target.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_eq!(target.status().heals, 0);
    assert_same_pages(&p, &to);
    target.shutdown().await;
    // The file of one that is stopped, alone.
    let alone = dir.path().join("alone.db");
    fs::copy(&to, &alone).unwrap();
    let target = Db::open(replica(&alone, &source.node().addresses.replication)).await.unwrap();
    let replaced = healed_without_snapshot(&mut target.events()).await;
    assert!(replaced < pages / 10, "{replaced} of {pages} pages");
    within("the last", target.wait_for_timeout(last, LIMIT)).await.unwrap();
    assert_same_pages(&p, &alone);
    target.shutdown().await;
    source.shutdown().await;
}

/// Gives the pages of a closed database another size.
fn vacuum_into_pages_of(path: &Path, bytes: u32) {
    let connection = Connection::open(path).unwrap();
    let sql = format!("PRAGMA journal_mode = DELETE; PRAGMA page_size = {bytes}; VACUUM");
    connection.execute_batch(&sql).unwrap();
}

fn kept(path: &Path) -> Vec<PathBuf> {
    let lost = PathBuf::from(format!("{}-replite/lost", path.display()));
    fs::read_dir(lost).map_or(Vec::new(), |all| all.map(|entry| entry.unwrap().path()).collect())
}

async fn reads(db: &Db) -> i64 {
    db.read_async(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?))
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_follows_a_primary_whose_pages_have_another_size() {
    let dir = tempfile::tempdir().unwrap();
    let (p, port) = (dir.path().join("p.db"), own_port());
    let url = format!("http://127.0.0.1:{port}");
    let (running, stopped) = (dir.path().join("running.db"), dir.path().join("stopped.db"));
    let mut source = Db::open(primary(&p, port)).await.unwrap();
    let last = insert(&source, "a", 0).await;
    let mut targets = Vec::new();
    for r in [&running, &stopped] {
        let target = Db::open(replica(r, &url)).await.unwrap();
        within("the first", target.wait_for_timeout(last, LIMIT)).await.unwrap();
        targets.push(target);
    }
    targets.pop().unwrap().shutdown().await;
    // What a stranger writes there nobody else has.
    plain(&stopped).execute("INSERT INTO t(who, n) VALUES ('stranger', 1)", []).unwrap();
    for (round, bytes) in [8192, 1024].into_iter().enumerate() {
        source.shutdown().await;
        assert_eq!(reads(&targets[0]).await, 1 + round as i64, "it is read from meanwhile");
        vacuum_into_pages_of(&p, bytes);
        source = Db::open(primary(&p, port)).await.unwrap();
        let last = insert(&source, "b", round as i64).await;
        if round == 1 {
            targets.push(Db::open(replica(&stopped, &url)).await.unwrap());
        }
        for target in &targets {
            within("the next", target.wait_for_timeout(last, LIMIT)).await.unwrap();
            assert_same_pages(&p, target.path());
            assert_eq!(reads(target).await, 2 + round as i64);
            assert!(target.verify().await.unwrap().holds());
            until("no problem", || target.status().problem.is_none());
        }
    }
    let strangers: i64 = {
        let database = kept(&stopped).into_iter().find(|path| path.join("stopped.db").exists());
        let database = database.expect("the stranger's row is kept").join("stopped.db");
        let sql = "SELECT count(*) FROM t WHERE who = 'stranger'";
        Connection::open(database).unwrap().query_row(sql, [], |r| r.get(0)).unwrap()
    };
    assert_eq!(strangers, 1);
    for target in targets {
        target.shutdown().await;
    }
    source.shutdown().await;
}
