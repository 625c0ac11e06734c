//! The log's quota of the disk.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use replite::{Config, Db, Error, Event};

use crate::support::*;

/// Bytes of a node's log on the disk, at the least: what was there at one instant. Files come, grow
/// and go while they are looked at, so those count that a second look finds as well.
fn on_disk(path: &Path) -> u64 {
    let look = || -> HashMap<OsString, u64> {
        let entries = fs::read_dir(path).unwrap().map(Result::unwrap);
        entries.filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?.len()))).collect()
    };
    let (first, second) = (look(), look());
    first.iter().filter(|(name, _)| second.contains_key(*name)).map(|(_, bytes)| bytes).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_logs_quota_is_kept_and_costs_no_commit() {
    const QUOTA: u64 = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (p, r, port) = (dir.path().join("p.db"), dir.path().join("r.db"), own_port());
    let small = |config: Config| config.log_retention(1 << 20, Duration::from_secs(60)).log_quota(QUOTA);
    let a = Db::open(small(primary(&p, port))).await.unwrap();
    let b = Db::open(small(replica(&r, &format!("http://127.0.0.1:{port}")))).await.unwrap();
    within("ready", b.ready()).await.unwrap();
    let mut events = a.events();
    let (logs, stop) = (
        [dir.path().join("p.db-replite/log"), dir.path().join("r.db-replite/log")],
        Arc::new(AtomicBool::new(false)),
    );
    let ends = Ends(&stop);
    let (watched, seen) = (logs.clone(), stop.clone());
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        while !seen.load(Ordering::SeqCst) {
            most = watched.iter().map(|log| on_disk(log)).max().unwrap().max(most);
        }
        most
    });
    for round in 0..4 {
        for n in 0..40 {
            a.write(move |tx| {
                Ok::<_, Error>(tx.execute("INSERT INTO t(n, v) VALUES (?1, randomblob(60000))", [n])?)
            })
            .await
            .unwrap();
        }
        // One that is larger than the quota.
        let huge = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c WHERE i < 60)
                    INSERT INTO t(who, n, v) SELECT 'huge', i, randomblob(100000) FROM c";
        a.write(move |tx| Ok::<_, Error>(tx.execute(huge, [])?)).await.unwrap();
        let last = insert(&a, "last", round).await;
        within("the replica", b.wait_for_timeout(last, LIMIT)).await.unwrap();
        assert_same_pages(&p, &r);
    }
    drop(ends);
    let most = watch.join().unwrap();
    assert!(most > QUOTA / 4 && most <= QUOTA, "{most} bytes of {QUOTA}");
    within("the gap", async { while !matches!(events.next().await, Some(Event::LogGap { .. })) {} }).await;
    a.shutdown().await;
    b.shutdown().await;
}
