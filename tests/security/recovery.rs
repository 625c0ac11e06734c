//! A primary that asks its replicas: for what a power cut took from it, and for right images of bad
//! pages.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replite::{Config, Db, Durability, Error};

use crate::fork::copy_tree;
use crate::relay::*;
use crate::support::*;
use crate::world::*;

fn unsynced(path: &Path, port: u16) -> Config {
    primary(path, port).durability(Durability::Unsynced).wal_limit(1 << 30)
}

#[test]
#[ignore = "runs as the child of other tests"]
fn unsynced_process() {
    if !is_child() {
        return;
    }
    let (path, port) = (PathBuf::from(variable("DB")), variable("PORT").parse().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let db = runtime.block_on(Db::open(unsynced(&path, port))).unwrap();
    speak("open");
    let mut n = 0;
    loop {
        let rows: i64 = hear().parse().unwrap();
        for _ in 0..rows {
            let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                let sql = "INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(2000))";
                Ok::<_, Error>(tx.execute(sql, (ROW, n))?)
            };
            db.write_blocking(insert).unwrap();
            n += 1;
        }
        speak(&format!("has {n}"));
    }
}

/// The files of one node become those of another.
fn take_over(from: &Path, to: &Path) {
    for end in ["db", "db-wal"] {
        fs::copy(from.with_extension(end), to.with_extension(end)).unwrap();
    }
    let state = to.with_extension("db-replite");
    let _ = fs::remove_dir_all(&state);
    copy_tree(&from.with_extension("db-replite"), &state);
}

/// What a power cut took, before it is asked for: the primary's path and port, and the replica that
/// has it all, behind a relay.
struct Lost {
    dir: tempfile::TempDir,
    path: PathBuf,
    port: u16,
    relay: Relay,
    replica: Db,
}

const KEPT: i64 = 20;
const ALL: i64 = 320;

async fn lose() -> Lost {
    let dir = tempfile::tempdir().unwrap();
    let (path, port) = (dir.path().join("p.db"), own_port());
    let named = port.to_string();
    let mut process = Process::start(unsynced_process, &[("DB", path.to_str().unwrap()), ("PORT", &named)]);
    process.expect("open");
    let relay = Relay::start(([127, 0, 0, 1], port).into()).await;
    let replica = Db::open(replica(&dir.path().join("r.db"), &Door::Own.url(relay.address))).await.unwrap();
    process.say(&KEPT.to_string());
    process.expect("has");
    within("a state", replica.ready()).await.unwrap();
    comes("the first rows", || count(&replica) == KEPT).await;
    fs::create_dir(dir.path().join("disk")).unwrap();
    let disk = dir.path().join("disk/p.db");
    take_over(&path, &disk);
    process.say(&(ALL - KEPT).to_string());
    process.expect("has");
    comes("all rows", || count(&replica) == ALL).await;
    process.kill();
    take_over(&disk, &path);
    fs::remove_dir_all(disk.parent().unwrap()).unwrap();
    let _ = fs::remove_file(path.with_extension("db-shm"));
    fs::write(path.with_extension("db-replite").join("unsynced"), "another boot").unwrap();
    Lost { dir, path, port, relay, replica }
}

impl Lost {
    async fn end(self, primary: Db) {
        let txid = insert(&primary, "last", 0).await;
        within("the last row", self.replica.wait_for_timeout(txid, LIMIT)).await.unwrap();
        self.replica.shutdown().await;
        primary.shutdown().await;
        assert_same_pages(primary.path(), self.replica.path());
        assert_no_mark(self.dir.path());
        assert_nothing_seen(&self.relay);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_given_back_through_an_attacker_is_a_prefix_or_nothing() {
    let mut all = tokio::task::JoinSet::new();
    for deed in [Deed::Finish, Deed::Reset, Deed::Flip(4), Deed::Overwrite] {
        all.spawn(give_back(deed));
    }
    all.join_all().await;
}

async fn give_back(deed: Deed) {
    let lost = lose().await;
    // What goes up is what the primary gets back. Once it is cut, the rest comes by more
    // connections, all of them with the same fault.
    lost.relay.fault(Some(Fault { way: Way::Up, at: 60_000, deed }));
    lost.relay.cut();
    let config = unsynced(&lost.path, lost.port).recovery_timeout(Duration::from_secs(2));
    let primary = within("an opening", Db::open(config)).await.unwrap();
    assert!(lost.relay.done() > 0, "nothing was attacked");
    let recovered = primary.status().recovered;
    println!("{deed:?}: {recovered} came back");
    assert_eq!(count(&primary) as u64, KEPT as u64 + recovered, "{deed:?}");
    assert!(recovered <= (ALL - KEPT) as u64);
    assert!(primary.verify().await.unwrap().holds());
    lost.relay.fault(None);
    lost.relay.cut();
    lost.end(primary).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_but_a_node_with_the_secret_gives_a_primary_something_back() {
    let lost = lose().await;
    // In the replica's place are a stranger's bytes: what it said when it was asked before.
    let said = lost.relay.passed();
    lost.relay.let_in(false);
    lost.relay.cut();
    let port = lost.port;
    let playing = tokio::spawn(async move {
        for passed in said.iter().cycle() {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let Ok(mut io) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let _ = io.write_all(&passed.up).await;
            let _ = io.read_to_end(&mut Vec::new()).await;
        }
    });
    let config = unsynced(&lost.path, lost.port).recovery_timeout(Duration::from_secs(3));
    let primary = within("an opening", Db::open(config)).await.unwrap();
    playing.abort();
    assert_eq!((primary.status().recovered, count(&primary)), (0, KEPT));
    // The replica was ahead of it: it is led back, and keeps what it had.
    lost.relay.let_in(true);
    let replica = lost.replica.clone();
    within(
        "the primary",
        replica.wait_until(|conn| {
            Ok(conn.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0))? == KEPT)
        }),
    )
    .await
    .unwrap();
    assert_eq!(replica.lost().await.unwrap().len(), 1);
    drop(replica);
    lost.end(primary).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_through_an_attacker_brings_the_right_page_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let (path, port) = (dir.path().join("a.db"), own_port());
    let open = async || Db::open(primary(&path, port)).await.unwrap();
    let relay = Relay::start(([127, 0, 0, 1], port).into()).await;
    let a = open().await;
    let b = Db::open(replica(&dir.path().join("b.db"), &Door::Own.url(relay.address))).await.unwrap();
    for n in 0..1500 {
        insert(&a, "many", n).await;
    }
    let last = insert(&a, "many", 0).await;
    within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
    a.shutdown().await;
    drop(a);
    let value: Vec<u8> =
        plain(b.path()).query_row("SELECT v FROM t WHERE id = 700", [], |row| row.get(0)).unwrap();
    crate::fork::flip_where(&path, &value);
    let a = open().await;
    comes("the replica", || a.status().replicas.len() == 1).await;
    let last = insert(&a, "joined", 0).await;
    within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
    let bad = a.verify().await.unwrap();
    assert_eq!(bad.bad_pages.len(), 1, "{bad:?}");
    // The page goes up, after some thousand bytes of acknowledgements at most.
    for deed in [Deed::Finish, Deed::Reset, Deed::Flip(1), Deed::Overwrite] {
        let before = relay.done();
        let sent = relay.passed().pop().unwrap().up.len();
        relay.fault(Some(Fault { way: Way::Up, at: sent + 2500, deed }));
        let found = within("an answer", a.find_repair()).await;
        match found {
            // The line broke before the page was there.
            Err(Error::Damaged { what, .. }) => println!("{deed:?}: {what}"),
            Ok(Some(repair)) => assert!(relay.done() == before, "{deed:?}: {repair:?} came in spite of it"),
            other => panic!("{deed:?}: {other:?}"),
        }
        relay.fault(None);
        relay.cut();
        comes("the replica", || a.status().replicas.len() == 1).await;
        let last = insert(&a, "again", 0).await;
        within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
    }
    let repair = within("a repair", a.find_repair()).await.unwrap().expect("an offer");
    assert!(repair.apply().await.unwrap().holds());
    let last = insert(&a, "last", 0).await;
    within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
    a.shutdown().await;
    b.shutdown().await;
    assert_same_pages(a.path(), b.path());
    assert_no_mark(dir.path());
    assert_nothing_seen(&relay);
}
