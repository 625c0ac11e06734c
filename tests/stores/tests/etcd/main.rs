//! `lease::Etcd` over three members that run, and all that befalls them.

mod leader;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use replite::lease::{Etcd, ReadError, Store, Stored, SwapError, Version};
use replite::testing::lease::{Faulty, conformance};
use replite_stores::etcd::{EtcdCluster, Options, PASSWORD, USER};
use tokio::time::{Instant, sleep, timeout};

/// The longest wait for a thing that happens.
const LIMIT: Duration = Duration::from_secs(30);
/// The limit that a node gives a call: a quarter of the store's lease time.
const CALL: Duration = Duration::from_millis(1250);
const PAUSE: Duration = Duration::from_millis(20);
const KEY: &str = "replite/app";

/// One test at a time: three processes each, on machines with two cores.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Three members, or a word that there are none.
async fn members(options: Options) -> Option<(EtcdCluster, tokio::sync::MutexGuard<'static, ()>)> {
    let alone = ALONE.lock().await;
    let cluster = EtcdCluster::start_with(3, options).await.unwrap();
    if cluster.is_none() {
        println!("skipped: etcd is not here");
    }
    Some((cluster?, alone))
}

fn store(cluster: &EtcdCluster) -> Etcd {
    store_from(cluster, 0)
}

/// A handle that asks this member first.
fn store_from(cluster: &EtcdCluster, first: usize) -> Etcd {
    let mut urls = cluster.urls();
    let members = urls.len();
    urls.rotate_left(first % members);
    let mut etcd = Etcd::new(urls).unwrap().key(KEY);
    if let Some(files) = cluster.certificates() {
        let [chain, key] = &files.client;
        etcd = etcd.roots(&files.roots).client_certificate(chain, key);
    }
    etcd
}

/// As a node calls it.
async fn read(store: &dyn Store) -> Result<Option<Stored>, ReadError> {
    timeout(CALL, store.read()).await.unwrap_or_else(|_| Err(ReadError::new("no answer in time")))
}

async fn swap(store: &dyn Store, over: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
    let swapped = timeout(CALL, store.swap(over, record)).await;
    swapped.unwrap_or_else(|_| Err(SwapError::Unknown("no answer in time".into())))
}

/// Reads until there is an answer.
async fn current(store: &dyn Store) -> Stored {
    let end = Instant::now() + LIMIT;
    loop {
        match read(store).await {
            Ok(Some(stored)) => return stored,
            Ok(None) => panic!("the record is gone"),
            Err(error) if Instant::now() > end => panic!("{error}"),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

/// Swaps until that is done, whatever is there.
async fn write(store: &dyn Store, record: &[u8]) -> Version {
    let end = Instant::now() + LIMIT;
    loop {
        let over = read(store).await.map(|stored| stored.map(|stored| stored.version));
        let swapped = match over {
            Ok(over) => swap(store, over.as_ref(), record).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match swapped {
            Ok(version) => return version,
            Err(why) if Instant::now() > end => panic!("{why}"),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

fn unavailable(swapped: Result<Version, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unavailable(why)) => why,
        swapped => panic!("{swapped:?}"),
    }
}

fn conflict(swapped: Result<Version, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Conflict)), "{swapped:?}");
}

/// Handles that ask one member after the other first.
fn handles(make: impl Fn(usize) -> Arc<dyn Store>) -> impl Fn() -> Arc<dyn Store> {
    let next = AtomicUsize::new(0);
    move || make(next.fetch_add(1, Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_over_three_members() {
    let Some((cluster, _alone)) = members(Options::default()).await else { return };
    conformance(handles(|first| Arc::new(store_from(&cluster, first)))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_through_faults() {
    let Some((cluster, _alone)) = members(Options::default()).await else { return };
    let make = handles(|first| {
        let faulty = Faulty::new(store_from(&cluster, first), first as u64);
        faulty.lose_requests(0.05);
        faulty.lose_answers(0.05);
        faulty.read_old(0.1);
        Arc::new(faulty)
    });
    conformance(make).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds_with_tls_and_a_user() {
    let options = Options { tls: true, users: Some(300) };
    let Some((cluster, _alone)) = members(options).await else { return };
    let user = |etcd: Etcd| etcd.user(USER, PASSWORD);
    let first = user(store(&cluster)).read().await;
    assert!(matches!(first, Ok(None)), "{first:?}");
    conformance(handles(|first| Arc::new(user(store_from(&cluster, first))))).await.unwrap();
    let version = current(&user(store(&cluster))).await.version;
    // Others do not get in, and see why.
    let files = cluster.certificates().unwrap();
    let bare = || Etcd::new(cluster.urls()).unwrap().key(KEY);
    for (etcd, why) in [
        (store(&cluster), "a user and a password"),
        (store(&cluster).user(USER, "guessed"), "invalid user ID or password"),
        (user(store(&cluster).key("another/app")), "permission `readwrite`"),
        (user(bare().roots(&files.roots)), "ertificate"),
        (user(bare()), "ertificate"),
    ] {
        let said = etcd.read().await.unwrap_err().to_string();
        assert!(said.contains(why) && !said.contains("guessed"), "{said}");
        let swapped = etcd.swap(Some(&version), b"x").await;
        assert!(!matches!(swapped, Ok(_) | Err(SwapError::Conflict)), "{swapped:?}");
    }
    assert_eq!(current(&user(store(&cluster))).await.version, version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_ended_is_made_anew() {
    let Some((mut cluster, _alone)) = members(Options { tls: false, users: Some(1) }).await else { return };
    let etcd = store(&cluster).user(USER, PASSWORD);
    let mut version = etcd.swap(None, b"first").await.unwrap();
    // It ends by itself, two seconds after its last use. A member that has no token refuses it at
    // once, whatever the handle holds.
    for _ in 0..2 {
        sleep(Duration::from_millis(2500)).await;
        version = etcd.swap(Some(&version), b"after a while").await.unwrap();
    }
    // Members forget tokens with their end.
    for member in 0..3 {
        cluster.kill(member).await.unwrap();
        cluster.restart(member).unwrap();
    }
    for member in 0..3 {
        cluster.healthy(member).await.unwrap();
    }
    let version = etcd.swap(Some(&version), b"after a restart").await.unwrap();
    assert_eq!(current(&etcd).await.version, version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_the_store_is_away_and_comes_back_by_itself() {
    let Some((mut cluster, _alone)) = members(Options::default()).await else { return };
    let etcd = store(&cluster);
    let version = write(&etcd, b"before").await;
    // With one of three gone it goes on.
    cluster.kill(0).await.unwrap();
    let version = match swap(&etcd, Some(&version), b"without one").await {
        Ok(version) => version,
        // That one may have been the leader.
        Err(_) => write(&etcd, b"without one").await,
    };
    cluster.kill(1).await.unwrap();
    // The one that is left has the record, and does not show it: it may be an old one.
    let end = Instant::now() + LIMIT;
    while read(&etcd).await.is_ok() {
        assert!(Instant::now() < end, "a member that is alone goes on answering");
        sleep(PAUSE).await;
    }
    for handle in [etcd.clone(), store_from(&cluster, 2)] {
        assert!(read(&handle).await.is_err());
        let swapped = swap(&handle, Some(&version), b"lost").await;
        assert!(matches!(swapped, Err(SwapError::Unavailable(_) | SwapError::Unknown(_))), "{swapped:?}");
    }
    // No member at all: that is said at once, and surely nothing was done.
    cluster.kill(2).await.unwrap();
    let why = unavailable(swap(&etcd, Some(&version), b"lost").await);
    assert!(cluster.urls().iter().all(|url| why.contains(&url["http://".len()..])), "{why}");
    for member in 0..3 {
        cluster.restart(member).unwrap();
    }
    assert_eq!(current(&etcd).await.record, b"without one");
    write(&etcd, b"back").await;
    assert_eq!(current(&etcd).await.record, b"back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_hangs_costs_one_call_at_most() {
    let Some((cluster, _alone)) = members(Options::default()).await else { return };
    let etcd = store_from(&cluster, cluster.leader().await.unwrap());
    let mut version = write(&etcd, b"first").await;
    let leader = cluster.leader().await.unwrap();
    cluster.freeze(leader, true).await.unwrap();
    let begun = Instant::now();
    // A new leader has to be elected: until then nothing is possible.
    let mut failed = 0;
    loop {
        match swap(&etcd, Some(&version), b"second").await {
            Ok(now) => break version = now,
            Err(_) => failed += 1,
        }
        version = current(&etcd).await.version;
    }
    assert!(begun.elapsed() < LIMIT && failed <= 3, "{failed} calls failed");
    // The members that are left answer, while this one hangs.
    for _ in 0..10 {
        version = swap(&etcd, Some(&version), b"more").await.unwrap();
    }
    cluster.freeze(leader, false).await.unwrap();
    cluster.healthy(leader).await.unwrap();
    // What it has is not the newest, and it says nothing old.
    assert_eq!(read(&store_from(&cluster, leader)).await.unwrap().unwrap().version, version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_restored_takes_no_version_from_before() {
    let Some((mut cluster, _alone)) = members(Options::default()).await else { return };
    let etcd = store(&cluster);
    write(&etcd, b"earlier").await;
    let saved = write(&etcd, b"saved").await;
    let mut backup = cluster.backup().await.unwrap();
    let mut before = vec![saved.clone()];
    // With the token that it had, as the one that restores may do it. Then with another one.
    for token in ["first", "second"] {
        for _ in 0..3 {
            before.push(write(&etcd, b"after the backup").await);
        }
        cluster.restore(&backup, token).await.unwrap();
        let restored = current(&etcd).await;
        assert_eq!(restored.record, b"saved");
        assert!(!before.contains(&restored.version), "{token}: {restored:?}");
        for version in &before {
            conflict(swap(&etcd, Some(version), b"x").await);
        }
        // Revisions come again, and no version does.
        for _ in 0..4 {
            let version = write(&etcd, b"after the backup").await;
            assert!(!before.contains(&version), "{token}");
        }
        for version in &before {
            conflict(swap(&etcd, Some(version), b"x").await);
        }
        before.push(restored.version);
        write(&etcd, b"saved").await;
        before.push(current(&etcd).await.version);
        backup = cluster.backup().await.unwrap();
    }
    // A handle that saw nothing of before knows it by the cluster's id.
    conflict(swap(&store(&cluster), Some(&saved), b"x").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_without_room_says_so() {
    let Some((cluster, _alone)) = members(Options::default()).await else { return };
    let etcd = store(&cluster);
    let version = write(&etcd, b"first").await;
    cluster.raise_no_space().await.unwrap();
    let end = Instant::now() + LIMIT;
    let mut version = version;
    let why = loop {
        // A member may be told a moment later.
        match swap(&etcd, Some(&version), b"more").await {
            Ok(now) => version = now,
            swapped => break unavailable(swapped),
        }
        assert!(Instant::now() < end);
    };
    assert!(why.contains("alarm NOSPACE"), "{why}");
    assert_eq!(current(&etcd).await.version, version);
    cluster.ctl(&["alarm", "disarm"]).await.unwrap();
    write(&etcd, b"again").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_told() {
    let Some((mut cluster, _alone)) = members(Options::default()).await else { return };
    let etcd = store(&cluster);
    write(&etcd, b"first").await;
    for round in 0..3 {
        // Also one that was before the watch began, and after the last look.
        let watcher = store_from(&cluster, round);
        current(&watcher).await;
        write(&etcd, b"meanwhile").await;
        timeout(LIMIT, watcher.changed()).await.unwrap();
        current(&watcher).await;
        assert!(timeout(Duration::from_millis(300), watcher.changed()).await.is_err(), "nothing changed");
        let waiting = tokio::spawn({
            let watcher = watcher.clone();
            async move { timeout(LIMIT, watcher.changed()).await }
        });
        // The member that watches is gone.
        cluster.kill(round).await.unwrap();
        write(&etcd, b"later").await;
        waiting.await.unwrap().unwrap();
        cluster.restart(round).unwrap();
        cluster.healthy(round).await.unwrap();
    }
}
