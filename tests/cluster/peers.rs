//! Wrong and hostile peers; thousands of reconnects.

use std::time::Duration;

use crate::support::*;
use replite::{Db, Error, Secret};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_another_secret_cluster_or_database_gets_nothing_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let at = |name: &str| replica(&dir.path().join(name), &url);
    let wrong = [
        (at("a.db").secret(Secret::generate().unwrap()), "secret"),
        (at("b.db").cluster("other"), "cluster"),
        (at("c.db").database("other"), "database"),
    ];
    for (config, word) in wrong {
        let r = Db::open(config).await.unwrap();
        within(word, async {
            while !r.status().problem.is_some_and(|p| p.contains(word)) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let read = r.read(|c| Ok::<_, Error>(c.query_row("SELECT 1", [], |_| Ok(()))?));
        assert!(matches!(read, Err(Error::NoState(_))));
        let tables = "SELECT count(*) FROM sqlite_schema";
        let tables: i64 = plain(r.path()).query_row(tables, [], |row| row.get(0)).unwrap();
        assert_eq!(tables, 0, "{word}: something was received");
        r.shutdown().await;
    }
    let r = Db::open(at("d.db")).await.unwrap();
    within("the right one", r.ready()).await.unwrap();
    r.shutdown().await;
    p.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_strangers_are_turned_away_and_service_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let to = address(&p.node().addresses.replication);
    for garbage in [
        &b"\0\xff\xfe garbage \r\n\r\n"[..],
        b"GET /",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let mut stream = tokio::net::TcpStream::connect(to).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        // Whatever it says, it ends the connection.
        let _ = within("the end", stream.read_to_end(&mut answer)).await;
    }
    let mut stream = tokio::net::TcpStream::connect(to).await.unwrap();
    let head = format!(
        "POST /_replite/v1/stream HTTP/1.1\r\nhost: x\r\nreplite-version: 1\r\nreplite-nonce: {}\r\nreplite-proof: {}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        "0".repeat(64),
        "1".repeat(64)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert!(!answer.to_lowercase().contains("replite"), "a stranger learns nothing: {answer}");
    let r = Db::open(replica(&dir.path().join("r.db"), &p.node().addresses.replication)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    r.shutdown().await;
    p.shutdown().await;
}

#[cfg(target_os = "linux")]
fn usage() -> (usize, usize, usize) {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kib = kib.split_whitespace().nth(1).unwrap().parse().unwrap();
    (entries("/proc/self/fd"), entries("/proc/self/task"), kib)
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reconnects_leave_no_handle_thread_or_memory_behind() {
    if !alone(reconnects_leave_no_handle_thread_or_memory_behind) {
        return;
    }
    const CUTS: i64 = 300;
    const REPLICAS: usize = 4;
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let wire = Wire::start(address(&p.node().addresses.replication), Duration::ZERO).await;
    let url = format!("http://{}", wire.address);
    let mut replicas = Vec::new();
    for n in 0..REPLICAS {
        let r = Db::open(replica(&dir.path().join(format!("r{n}.db")), &url)).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        replicas.push(r);
    }
    let mut before = None;
    for n in 0..CUTS {
        let txid = insert(&p, "w", n).await;
        for r in &replicas {
            r.wait_for_timeout(txid, LIMIT).await.unwrap();
        }
        if n == CUTS / 5 {
            before = Some(usage());
        }
        wire.cut();
    }
    let (fds, threads, kib) = before.unwrap();
    within("everything given back", async {
        loop {
            let now = usage();
            if now.0 <= fds + 2 * REPLICAS && now.1 <= threads + 4 {
                assert!(now.2 < kib + 20 * 1024, "memory grew from {kib} to {} KiB", now.2);
                break;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    for r in replicas {
        r.shutdown().await;
    }
    p.shutdown().await;
}
