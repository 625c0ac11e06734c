//! Code of the application that panics on a thread or task of ours, such as its tracing subscriber:
//! that is told, and nothing goes on as if all were well.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use replite::{Config, Db, Error, Event, Role};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

use crate::support::*;

/// Panics with each event of a thread, or with the first one that says something certain.
struct Bomb {
    thread: String,
    says: Option<String>,
}

/// Said within a heal.
const KEPT: &str = "they are kept";

static DISARMED: AtomicBool = AtomicBool::new(false);

struct Message(String);

impl tracing::field::Visit for Message {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl<S: tracing::Subscriber> Layer<S> for Bomb {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let here = std::thread::current();
        let meant = self.thread == "any" || here.name() == Some(&self.thread);
        if DISARMED.load(Ordering::SeqCst) || !meant {
            return;
        }
        if let Some(says) = &self.says {
            let mut message = Message(String::new());
            event.record(&mut message);
            if !message.0.contains(says) || DISARMED.swap(true, Ordering::SeqCst) {
                return;
            }
        }
        panic!("the subscriber panics");
    }
}

/// Runs the test function of this binary in a process of its own, because a subscriber is there for
/// all of a process.
fn child(entry: impl Fn(), thread: &str, says: &str) {
    let process = Process::start(entry, &[("THREAD", thread), ("SAYS", says)]);
    process.expect("done");
    process.kill();
}

fn arm() -> bool {
    if !is_child() {
        return false;
    }
    let says = Some(variable("SAYS")).filter(|says| !says.is_empty());
    let bomb = Bomb { thread: variable("THREAD"), says };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(bomb)).unwrap();
    true
}

fn small_log(config: Config) -> Config {
    config.log_retention(1 << 20, Duration::from_secs(60)).log_quota(4 << 20)
}

/// A transaction that no log of this quota has room for: that is told on the thread that captures,
/// or applies.
async fn large(db: &Db) {
    let sql = "INSERT INTO t(who, n, v) VALUES ('large', 0, randomblob(9000000))";
    // It is committed when its capture begins.
    let _ = db.write(move |tx| Ok::<_, Error>(tx.execute(sql, [])?)).await;
}

async fn stopped(db: &Db) -> String {
    let mut roles = db.roles();
    within("the end of replication", roles.wait_for(|state| state.role == Role::Stopped)).await.unwrap();
    let health = db.health();
    assert!(!health.live && !health.can_write && !health.can_read, "{health:?}");
    let why = db.status().problem.unwrap();
    assert!(health.reasons.contains(&why), "{health:?}");
    assert!(!health.reasons.contains(&"shut down".to_string()), "{health:?}");
    why
}

async fn refused(db: &Db) {
    let one = |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(who, n) VALUES ('late', 1)", [])?)
    };
    let refused = within("an answer", db.write(one)).await;
    assert!(matches!(refused, Err(Error::Stopped(_))), "{refused:?}");
    let blocking = db.clone();
    let refused = tokio::task::spawn_blocking(move || blocking.write_blocking(one).map(drop));
    let refused = within("an answer", refused).await.unwrap();
    assert!(matches!(refused, Err(Error::Stopped(_))), "{refused:?}");
}

/// The file as the next node finds it.
async fn whole(path: &Path, rows: i64) {
    DISARMED.store(true, Ordering::SeqCst);
    let db = Db::open(primary(path, 0)).await.unwrap();
    assert_eq!(count(&db), rows);
    assert!(db.verify().await.unwrap().holds());
    insert(&db, "a", 99).await;
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn primary_process() {
    if !arm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(small_log(primary(&path, 0))).await.unwrap();
    let mut events = db.events();
    let url = db.node().addresses.replication.clone();
    let follower = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
    within("the replica", follower.ready()).await.unwrap();
    insert(&db, "a", 1).await;
    let mut rows = 1;
    match variable("THREAD").as_str() {
        "replite-capture" => {
            large(&db).await;
            rows += 1;
        }
        // Closing any descriptor of the database drops the process's locks, which the checkpointer
        // tells.
        "replite-ckpt" => drop(std::fs::read(&path).unwrap()),
        other => panic!("nothing makes {other} speak"),
    }
    let why = stopped(&db).await;
    assert!(why.contains("a panic in replite-") && why.contains("the subscriber panics"), "{why}");
    refused(&db).await;
    let told = async { while !matches!(events.next().await.unwrap(), Event::Stopped { .. }) {} };
    within("the event", told).await;
    let ahead = db.position().unwrap().txid();
    let ahead = replite::Txid::new(ahead.epoch(), ahead.number() + 5);
    let waited = within("a wait", db.wait_for_timeout(ahead, LIMIT * 2)).await;
    assert!(matches!(waited, Err(Error::ShutDown)), "{waited:?}");
    // Who followed hears of it.
    let mut roles = follower.roles();
    within("the replica", roles.wait_for(|state| state.primary.is_none())).await.unwrap();
    assert!(!follower.health().can_write);
    within("the end", db.shutdown()).await;
    within("the end", follower.shutdown()).await;
    drop((db, follower));
    whole(&path, rows).await;
    speak("done");
}

#[test]
fn a_panic_of_the_capture_thread_stops_replication_loudly() {
    child(primary_process, "replite-capture", "");
}

#[test]
fn a_panic_of_the_checkpointer_stops_replication_loudly() {
    child(primary_process, "replite-ckpt", "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn replica_process() {
    if !arm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("r.db");
    let db = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    insert(&db, "a", 1).await;
    let url = db.node().addresses.replication.clone();
    let mut follower = Db::open(small_log(replica(&path, &url))).await.unwrap();
    if variable("SAYS") == KEPT {
        within("the replica", follower.ready()).await.unwrap();
        follower.shutdown().await;
        plain(&path).execute("INSERT INTO t(who, n) VALUES ('stranger', 1)", []).unwrap();
        follower = Db::open(replica(&path, &url)).await.unwrap();
    }
    let mut events = follower.events();
    if variable("SAYS").is_empty() {
        DISARMED.store(true, Ordering::SeqCst);
        within("the replica", follower.ready()).await.unwrap();
        DISARMED.store(false, Ordering::SeqCst);
        large(&db).await;
    }
    let why = stopped(&follower).await;
    assert!(why.contains("a panic in replite-apply"), "{why}");
    let told = async { while !matches!(events.next().await.unwrap(), Event::Stopped { .. }) {} };
    within("the event", told).await;
    let read = follower.read(|c| Ok::<i64, Error>(c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?));
    assert!(matches!(&read, Err(Error::NoState(why)) if why.contains("a panic in")), "{read:?}");
    let ready = within("an answer", follower.ready()).await;
    assert!(matches!(ready, Err(Error::Stopped(_))), "{ready:?}");
    let verified = within("an answer", follower.verify()).await;
    assert!(verified.is_err(), "{verified:?}");
    // Everything is given back while the handle is still there: a stranger can write, who is the
    // last to close.
    if path.exists() {
        until("the write lock", || {
            let connection = replite::rusqlite::Connection::open(&path).unwrap();
            connection.execute_batch("BEGIN IMMEDIATE; ROLLBACK; PRAGMA wal_checkpoint(TRUNCATE)").is_ok()
        });
    }
    within("the end", follower.shutdown()).await;
    drop(follower);
    DISARMED.store(true, Ordering::SeqCst);
    let follower = Db::open(replica(&path, &url)).await.unwrap();
    let last = insert(&db, "a", 2).await;
    within("the primary", db.wait_for_timeout(last, LIMIT)).await.unwrap();
    // The whole position: a stranger's commit may have that number.
    let (goal, mut positions) = (db.position(), follower.watch());
    within("the replica", positions.wait_for(|position| *position == goal)).await.unwrap();
    assert_same_pages(&dir.path().join("p.db"), &path);
    within("the end", db.shutdown()).await;
    within("the end", follower.shutdown()).await;
    speak("done");
}

#[test]
fn a_panic_of_the_apply_thread_gives_everything_back_and_is_told() {
    child(replica_process, "replite-apply", "");
}

#[test]
fn a_panic_within_a_heal_gives_everything_back_and_is_told() {
    child(replica_process, "replite-apply", KEPT);
}

#[test]
fn a_panic_of_the_apply_thread_without_a_state_is_told() {
    child(replica_process, "replite-apply", "a snapshot begins");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn following_process() {
    if !arm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let url = db.node().addresses.replication.clone();
    let follower = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
    let told = async {
        while !follower.status().problem.is_some_and(|why| why.contains("the subscriber panics")) {
            tokio::task::yield_now().await;
        }
    };
    within("the problem", told).await;
    let last = insert(&db, "a", 1).await;
    within("the next try", follower.wait_for_timeout(last, LIMIT)).await.unwrap();
    let over = async {
        while follower.status().problem.is_some() {
            tokio::task::yield_now().await;
        }
    };
    within("the problem's end", over).await;
    assert!(follower.health().can_write);
    db.shutdown().await;
    follower.shutdown().await;
    speak("done");
}

#[test]
fn a_panic_while_following_is_told_and_the_next_stream_is_tried() {
    child(following_process, "any", "following the primary");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn verifying_process() {
    if !arm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let db = Db::open(primary(&path, 0)).await.unwrap();
    let failed = within("an answer", db.verify()).await;
    let Err(Error::ThreadPanicked { place, .. }) = &failed else { panic!("{failed:?}") };
    assert_eq!(place, "replite-verify");
    assert!(db.status().problem.unwrap().contains("could not be verified"));
    assert!(db.health().can_write, "nothing depends on it");
    assert!(within("the next one", db.verify()).await.unwrap().holds());
    assert_eq!(db.status().problem, None);
    within("the end", db.shutdown()).await;
    speak("done");
}

#[test]
fn a_panic_of_a_verification_is_told_and_the_next_one_runs() {
    child(verifying_process, "replite-verify", "verified: the pages");
}

/// A recorder that panics wherever something is counted.
struct Recorder;

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}
    fn register_counter(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        assert!(DISARMED.load(Ordering::SeqCst), "the recorder panics");
        metrics::Counter::noop()
    }
    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        metrics::Gauge::noop()
    }
    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        metrics::Histogram::noop()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child of another test"]
async fn metrics_process() {
    if !is_child() {
        return;
    }
    metrics::set_global_recorder(Recorder).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("p.db");
    let db = Db::open(small_log(primary(&path, 0))).await.unwrap();
    insert(&db, "a", 1).await;
    large(&db).await;
    let why = stopped(&db).await;
    assert!(why.contains("the recorder panics"), "{why}");
    refused(&db).await;
    within("the end", db.shutdown()).await;
    drop(db);
    whole(&path, 2).await;
    speak("done");
}

#[test]
fn a_recorder_that_panics_stops_replication_loudly() {
    child(metrics_process, "", "");
}
