//! Read your writes over slow and cut connections; readers that stay.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::*;
use replite::{Db, Error, Event};

async fn behind(delay: Duration, dir: &tempfile::TempDir) -> (Db, Db, Wire) {
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let wire = Wire::start(address(&url), delay).await;
    let url = format!("http://{}", wire.address);
    let r = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    (p, r, wire)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wait_makes_the_write_seen_and_without_it_the_read_is_stale() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, _wire) = behind(Duration::from_millis(50), &dir).await;
    let mut stale = 0;
    for n in 1..=15 {
        let txid = insert(&p, "w", n).await;
        // The control: the same read without the wait.
        stale += i64::from(count(&r) < n);
        r.wait_for_timeout(txid, LIMIT).await.unwrap();
        assert_eq!(count(&r), n);
    }
    assert!(stale > 0, "the control never read an old state: this test proves nothing");
    p.shutdown().await;
    r.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_is_made_again_and_nothing_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, wire) = behind(Duration::from_millis(5), &dir).await;
    let mut events = r.events();
    for n in 1..=200 {
        let txid = insert(&p, "w", n).await;
        if n % 20 == 0 {
            wire.cut();
        }
        if n % 50 == 0 {
            wire.let_in(false);
            wire.cut();
            let late = insert(&p, "late", n).await;
            let early = r.wait_for_timeout(late, Duration::from_millis(30)).await;
            assert!(matches!(early, Err(Error::Timeout { .. })), "{early:?}");
            wire.let_in(true);
            r.wait_for_timeout(late, LIMIT).await.unwrap();
        }
        if n % 10 == 0 {
            r.wait_for_timeout(txid, LIMIT).await.unwrap();
        }
    }
    let last = insert(&p, "w", 201).await;
    p.wait_for(last).await.unwrap();
    r.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(p.path(), r.path());
    let paths = (p.path().to_path_buf(), r.path().to_path_buf());
    p.shutdown().await;
    r.shutdown().await;
    drop((p, r));
    assert_same_pages(&paths.0, &paths.1);
    let mut connected = 0;
    while let Some(event) = events.next().await {
        assert!(
            !matches!(event, Event::SnapshotStarted { .. } | Event::Missed { .. }),
            "{event:?}: a cut cost more"
        );
        connected += usize::from(matches!(event, Event::Connected { .. }));
    }
    assert!(connected >= 4, "{connected} connections, with as many that were let in again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_reader_lets_the_wal_grow_and_nothing_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, _wire) = behind(Duration::ZERO, &dir).await;
    insert(&p, "w", 0).await;
    let reader = plain(r.path());
    let held = reader.unchecked_transaction().unwrap();
    let before: i64 = held.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).unwrap();
    let mut last = None;
    for n in 0..1500 {
        last = Some(insert(&p, "w", n).await);
    }
    r.wait_for_timeout(last.unwrap(), LIMIT).await.unwrap();
    let long = r.status().wal_frames;
    assert!(long > 1000, "{long} frames, although a reader needs the first");
    assert_eq!(held.query_row("SELECT count(*) FROM t", [], |r| r.get::<_, i64>(0)).unwrap(), before);
    drop(held);
    // Afterwards the WAL is begun anew.
    within("a shorter WAL", async {
        while r.status().wal_frames >= long {
            let txid = insert(&p, "w", 0).await;
            r.wait_for_timeout(txid, LIMIT).await.unwrap();
        }
    })
    .await;
    p.shutdown().await;
    r.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_beside_apply_are_never_refused_and_see_whole_transactions_only() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r, _wire) = behind(Duration::ZERO, &dir).await;
    let stop = Arc::new(AtomicBool::new(false));
    let ends = Ends(&stop);
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let (r, stop) = (r.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut reads = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let sum: i64 = r
                        .read(|c| {
                            let sql = "SELECT coalesce(sum(n), 0) FROM t";
                            Ok::<_, Error>(c.prepare_cached(sql)?.query_row([], |row| row.get(0))?)
                        })
                        .expect("never busy");
                    assert_eq!(sum, 0, "half a transaction was seen");
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    let mut last = None;
    for n in 1..400i64 {
        let commit = p
            .write(move |tx| {
                tx.execute("INSERT INTO t(n, v) VALUES (?1, randomblob(1500))", [n])?;
                tx.execute("INSERT INTO t(n, v) VALUES (?1, randomblob(1500))", [-n])?;
                if n % 50 == 0 {
                    tx.execute("DELETE FROM t", [])?;
                }
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        last = commit.txid;
    }
    r.wait_for_timeout(last.unwrap(), LIMIT).await.unwrap();
    drop(ends);
    for reader in readers {
        assert!(reader.join().unwrap() > 0);
    }
    p.shutdown().await;
    r.shutdown().await;
}
