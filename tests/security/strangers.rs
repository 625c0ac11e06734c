//! Who has no place on the path and no secret: at both doors, with TLS, HTTP in the clear, and
//! garbage.

use std::net::SocketAddr;

use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::keys::Key;
use crate::support::*;
use crate::world::*;

/// What begins a connection, and is none that a node speaks.
fn garbage() -> Vec<Vec<u8>> {
    let hello = |length: u16| [&[22, 3, 1][..], &length.to_be_bytes(), &[1, 0, 0, 200, 3, 3]].concat();
    vec![
        b"\0\xff\xfe garbage \r\n\r\n".to_vec(),
        vec![0; 70_000],
        vec![22; 70_000],
        // Records that are longer, and shorter, than they say.
        [hello(0xffff), vec![7; 70_000]].concat(),
        [hello(0), vec![0; 100]].concat(),
        [hello(16_384), vec![0xaa; 16_378]].concat(),
        // An alert, data before a handshake, and a version of the last century.
        vec![21, 3, 3, 0, 2, 2, 40],
        [&[23, 3, 3, 0x40, 0][..], &[1; 0x4000]].concat(),
        vec![0x80, 46, 1, 0, 2, 0, 21, 0, 0, 0, 16],
        // Empty records without an end.
        [22, 3, 3, 0, 0].repeat(10_000),
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
    ]
}

/// What a stranger is told: nothing of the node.
fn assert_tells_nothing(answer: &[u8]) {
    assert!(answer.len() < 4096, "{} bytes came", answer.len());
    let text = String::from_utf8_lossy(answer).to_lowercase();
    for word in ["replite-", "sqlite", ROW, "app.db", "p.db"] {
        assert!(!text.contains(word), "{word:?} in {text:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_hung_up_on_and_the_honest_replica_is_served_meanwhile() {
    let world = World::new().await;
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        for bytes in garbage() {
            let mut io = TcpStream::connect(world.at(door)).await.unwrap();
            // It may hang up before it has read all.
            let _ = io.write_all(&bytes).await;
            let _ = io.shutdown().await;
            let mut answer = Vec::new();
            let _ = within("the end", io.read_to_end(&mut answer)).await;
            assert_tells_nothing(&answer);
            world.level(&replica).await;
        }
        replica.shutdown().await;
    }
    world.end(Vec::new(), &[]).await;
}

/// One request in HTTP/2 on a connection; the status, whether the head is bare, and the body.
async fn ask<I>(io: I, uri: &str, fields: &[(&str, &str)]) -> Option<(u16, bool, Vec<u8>)>
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let (mut client, connection) = h2::client::handshake(io).await.ok()?;
    tokio::spawn(connection);
    let mut request = Request::post(uri);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    let (answer, mut up) = client.send_request(request.body(()).unwrap(), false).ok()?;
    let _ = up.send_data(Bytes::from_static(MARK), true);
    let answer = answer.await.ok()?;
    let (status, bare) = (answer.status().as_u16(), answer.headers().keys().all(|name| name == "date"));
    let (mut body, mut came) = (answer.into_body(), Vec::new());
    while let Some(Ok(bytes)) = body.data().await {
        came.extend(bytes);
    }
    Some((status, bare, came))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_secret_gets_a_bare_404_in_tls_and_in_the_clear() {
    let world = World::new().await;
    let (zeros, ones) = ("0".repeat(64), "1".repeat(64));
    let node = world.primary.node_id().to_string();
    let knock = [
        ("replite-version", "3"),
        ("replite-cluster", "default"),
        ("replite-database", "app"),
        ("replite-node", node.as_str()),
        ("replite-incarnation", node.as_str()),
        ("replite-nonce", zeros.as_str()),
        ("replite-proof", ones.as_str()),
    ];
    let paths = ["/v1/stream", "/v1/standing", "/v1/command", "/v1/tunnel", "/", "/v1/other"];
    for path in paths {
        for fields in [&knock[..], &[], &knock[..6]] {
            let io = TcpStream::connect(world.at(Door::Own)).await.unwrap();
            let io = Key::new().connect(io).await.unwrap();
            let answer = within("an answer", ask(io, &format!("http://x{path}"), fields)).await;
            assert_eq!(answer, Some((404, true, Vec::new())), "TLS {path}");
            for (door, prefix) in [(Door::Own, ""), (Door::Own, "/_replite"), (Door::Mounted, "/_replite")] {
                let io = TcpStream::connect(world.at(door)).await.unwrap();
                let uri = format!("http://{}{prefix}{path}", world.at(door));
                let answer = within("an answer", ask(io, &uri, fields)).await;
                assert_eq!(answer, Some((404, true, Vec::new())), "{door:?} {uri}");
            }
        }
    }
    assert!(world.primary.status().replicas.is_empty());
    world.end(Vec::new(), &[]).await;
}

fn usage() -> (usize, usize, usize) {
    let entries = |path: &str| std::fs::read_dir(path).unwrap().count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let kib = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let kib = kib.split_whitespace().nth(1).unwrap().parse().unwrap();
    (entries("/proc/self/fd"), entries("/proc/self/task"), kib)
}

/// Connections on which a stranger says as little as he can, and leaves them open.
async fn hold(to: SocketAddr, first: &[u8]) -> Vec<TcpStream> {
    let mut held = Vec::new();
    for _ in 0..100 {
        let mut io = TcpStream::connect(to).await.unwrap();
        let _ = io.write_all(first).await;
        held.push(io);
    }
    held
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_cost_no_memory_for_long_and_keep_no_replica_out() {
    if !alone(strangers_cost_no_memory_for_long_and_keep_no_replica_out) {
        return;
    }
    let world = World::new().await;
    let relay = world.relay(Door::Own).await;
    let replica = world.replica("r.db", Door::Own, &relay).await;
    world.level(&replica).await;
    let before = usage();
    let firsts: [&[u8]; 4] =
        [b"", &[22], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[22, 3, 1, 0x3f, 0xff, 1, 0, 0x3f]];
    for first in firsts {
        let held = hold(world.at(Door::Own), first).await;
        // One that comes anew is let in beside them.
        relay.cut();
        world.level(&replica).await;
        let during = usage();
        assert!(during.2 < before.2 + 40 * 1024, "memory grew from {} to {} KiB", before.2, during.2);
        for mut io in held {
            // The node hangs up by itself.
            let _ = within("the end", io.read_to_end(&mut Vec::new())).await;
        }
    }
    comes("everything given back", || {
        let now = usage();
        now.0 <= before.0 + 4 && now.1 <= before.1 + 4
    })
    .await;
    world.end(vec![replica], &[&relay]).await;
}
