//! Links that carry little, and a primary that stands still: a replica knows, says so, and goes on
//! with what has come. The primary is a process of its own.

use std::time::{Duration, Instant};

use crate::support::*;
use replite::{Db, Error, Event, Events};
use rustix::process::Signal;

/// Bytes a second.
const RATE: u64 = 10_000;
/// Longest wait for what a slow link carries: some times as long as it takes.
const PATIENCE: Duration = Duration::from_secs(300);

/// The process of the primary: it fills its database, and commits when it is told to.
#[test]
fn primary_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let _runs = runtime.enter();
    let db = runtime.block_on(Db::open(primary(variable("DB").as_ref(), 0))).unwrap();
    speak(&format!("open {}", db.node().addresses.replication));
    loop {
        let (rows, bytes): (u32, u32) = {
            let line = hear();
            let (rows, bytes) = line.split_once(' ').unwrap();
            (rows.parse().unwrap(), bytes.parse().unwrap())
        };
        let commit = db.write_blocking(move |tx| {
            for n in 0..rows {
                tx.execute("INSERT INTO t(who, n, v) VALUES ('p', ?1, randomblob(?2))", (n, bytes))?;
            }
            Ok::<_, Error>(())
        });
        speak(&format!("committed {}", commit.unwrap().txid.unwrap()));
    }
}

struct World {
    primary: Process,
    url: String,
    dir: tempfile::TempDir,
}

impl World {
    fn start() -> World {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.db");
        let primary = Process::start(primary_process, &[("DB", path.to_str().unwrap())]);
        let url = primary.expect("open").split(' ').nth(1).unwrap().to_string();
        World { primary, url, dir }
    }

    /// One transaction of so many rows of so many bytes.
    fn commit(&mut self, rows: u32, bytes: u32) -> replite::Txid {
        self.primary.say(&format!("{rows} {bytes}"));
        let line = self.primary.expect("committed");
        line.split(' ').nth(1).unwrap().parse().unwrap()
    }

    async fn link(&self) -> Wire {
        Wire::start(address(&self.url), Duration::ZERO).await
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("r.db")
    }
}

/// Waits until what the replica says of itself is this.
async fn says(db: &Db, words: &[&str]) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let problem = db.status().problem.unwrap_or_default();
        if words.iter().all(|word| problem.contains(word)) {
            return problem;
        }
        assert!(Instant::now() < end, "{words:?} was not said, but: {problem}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How old its state is.
fn age(db: &Db) -> Duration {
    db.status().lag.and_then(|lag| lag.age).expect("it was level once")
}

/// How many events there were since the last call, and the words of those that tell of a stream's
/// end.
async fn endings(events: &mut Events) -> (usize, Vec<String>) {
    let (mut told, mut all) = (0, Vec::new());
    while let Ok(Some(event)) = tokio::time::timeout(Duration::from_millis(1), events.next()).await {
        told += 1;
        if let Event::Disconnected { why, .. } = event {
            all.push(why);
        }
    }
    (told, all)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_of_10_kb_a_second_is_slow_and_works() {
    let mut world = World::start();
    let last = world.commit(300, 1000);
    let link = world.link().await;
    link.throttle(RATE);
    let db = Db::open(replica(&world.path(), &format!("http://{}", link.address))).await.unwrap();
    let mut events = db.events();
    let said = says(&db, &["is being filled: ", " kB of ", " kB have come, at ", " kB/s"]).await;
    assert!(!said.contains("nothing was heard"), "{said}");
    db.wait_for_timeout(last, PATIENCE).await.unwrap();
    // One transaction that takes long on its way: the replica is as old as it is, and says so. More
    // may be queued after it.
    let last = world.commit(200, 1000);
    says(&db, &["behind is unknown: ", " kB/s come on its stream, and at least 1 transactions are still"])
        .await;
    let status = db.status();
    let lag = status.lag.unwrap();
    assert!(lag.connected && age(&db) >= Duration::from_secs(5) && lag.transactions.is_none(), "{lag:?}");
    assert!(db.health().can_write, "the primary is there");
    db.wait_for_timeout(last, PATIENCE).await.unwrap();
    assert_eq!(count(&db), 500);
    let (told, endings) = endings(&mut events).await;
    assert!(told > 0, "not even of the fill");
    assert_eq!(endings, [""; 0], "a slow link is no broken one");
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_came_of_a_fill_stays_when_the_link_breaks() {
    let mut world = World::start();
    let last = world.commit(300, 1000);
    let link = world.link().await;
    link.throttle(RATE * 3);
    let db = Db::open(replica(&world.path(), &format!("http://{}", link.address))).await.unwrap();
    // The pages come into the file, which is empty to everybody until all are there.
    let here = || std::fs::metadata(world.path()).map_or(0, |m| m.len());
    let mut cuts = 0;
    while db.position().is_none() {
        // As much again came as in a few seconds.
        let before = here();
        until("more pages, or all", || here() != before || db.position().is_some());
        let before = here();
        until("more pages, or all", || {
            here() >= before + 60_000 || here() < before || db.position().is_some()
        });
        link.cut();
        cuts += 1;
        assert!(cuts < 15, "with each connection the fill begins anew");
    }
    assert!(cuts >= 3, "{cuts}");
    db.wait_for_timeout(last, PATIENCE).await.unwrap();
    db.shutdown().await;
}

/// It stands still, as a virtual machine does, or one without memory: its connection stands, and
/// nothing comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_stands_still_is_noticed_before_its_stream_is_given_up() {
    let mut world = World::start();
    let last = world.commit(1, 10);
    let db = Db::open(replica(&world.path(), &world.url)).await.unwrap();
    db.wait_for_timeout(last, PATIENCE).await.unwrap();
    until("the replica is well", || db.health().can_write && db.status().problem.is_none());
    let mut events = db.events();
    world.primary.signal(Signal::STOP);
    until("it is noticed", || !db.health().can_write);
    let (health, status) = (db.health(), db.status());
    let lag = status.lag.unwrap();
    assert!(!lag.connected && lag.age >= Some(Duration::from_secs(2)), "{lag:?}");
    assert!(health.can_read, "what is here can be read");
    let said = status.problem.unwrap_or_default();
    assert!(said.contains("nothing was heard from the primary for"), "{said}");
    says(&db, &["nothing was heard from the primary for", "how far this node is behind is unknown"]).await;
    let lag = db.status().lag.unwrap();
    assert!(lag.transactions.is_none() && lag.age > Some(Duration::from_secs(5)), "{lag:?}");
    assert_eq!(endings(&mut events).await.1, [""; 0], "the stream still stands");
    world.primary.signal(Signal::CONT);
    until("all is well again", || db.health().can_write && db.status().problem.is_none());
    until("and level", || age(&db) < Duration::from_secs(2));
    assert!(db.status().lag.unwrap().connected);
    db.shutdown().await;
}

/// What is on the path lets some bytes through, so that the connection lives, and no word of the
/// primary in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_kept_from_news_does_not_take_itself_for_level() {
    let mut world = World::start();
    let last = world.commit(1, 10);
    let link = world.link().await;
    let db = Db::open(replica(&world.path(), &format!("http://{}", link.address))).await.unwrap();
    db.wait_for_timeout(last, PATIENCE).await.unwrap();
    until("the replica is level", || db.status().lag.is_some_and(|lag| lag.transactions == Some(0)));
    let mut events = db.events();
    // A heartbeat has some 80 bytes, and comes each second.
    link.throttle(20);
    world.commit(1, 10);
    says(&db, &["how far this node is behind is unknown: the primary's newest word"]).await;
    let status = db.status();
    let lag = status.lag.unwrap();
    assert!(lag.connected && lag.transactions.is_none(), "{lag:?}");
    let told = serde_json::to_value(status.public()).unwrap();
    assert_eq!(told["lag"].get("transactions"), None, "{told}");
    assert_eq!(told["problems"], serde_json::json!(["this instance is behind the primary, or may be"]));
    assert!(db.health().reasons.iter().any(|why| why.contains("is unknown")), "{:?}", db.health());
    let (before, frozen) = (age(&db), db.position());
    until("its state grows old", || age(&db) > before + Duration::from_secs(2));
    assert_eq!(db.position(), frozen, "the commit did not come");
    assert_eq!(endings(&mut events).await.1, [""; 0], "the stream stands");
    link.let_through();
    until("all is well again", || {
        let status = db.status();
        status.problem.is_none() && status.lag.is_some_and(|lag| lag.transactions == Some(0))
    });
    assert_eq!(count(&db), 2);
    assert!(age(&db) < Duration::from_secs(5));
    db.shutdown().await;
}

/// Small commits, compressed and not, behind a link that is far and narrow: 50 ms away, 50 KB a
/// second. Whole pages would need a minute for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_commits_keep_up_behind_a_far_and_narrow_link() {
    const COMMITS: u32 = 500;
    for compressed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.db");
        let p = Db::open(primary(&path, 0).compression(compressed)).await.unwrap();
        let wire = Wire::start(address(&p.node().addresses.replication), Duration::from_millis(50)).await;
        let follow = replica(&dir.path().join("r.db"), &format!("replite://{}", wire.address));
        let r = Db::open(follow).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        let last = insert(&p, "the first has its page whole", 0).await;
        r.wait_for_timeout(last, LIMIT).await.unwrap();
        wire.throttle(50_000);
        let (begin, mut last) = (Instant::now(), last);
        for n in 0..COMMITS {
            last = insert(&p, "small", n.into()).await;
        }
        r.wait_for_timeout(last, Duration::from_secs(20)).await.unwrap();
        println!("compressed {compressed}: {COMMITS} commits in {:?}", begin.elapsed());
        assert_eq!((count(&p), p.position()), (count(&r), r.position()));
        r.shutdown().await;
        p.shutdown().await;
    }
}
