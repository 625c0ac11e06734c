//! What was recorded on the path is said again: a whole connection, to either side, and the head
//! that begins a channel at a mounted door.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::ending::{Ender, Inside, tunnel};
use crate::keys::Key;
use crate::support::*;
use crate::world::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_connection_is_worth_nothing_to_either_side() {
    let world = World::new().await;
    let (mut relays, mut replicas) = (Vec::new(), Vec::new());
    for door in DOORS {
        let relay = world.relay(door).await;
        let replica = world.replica(&format!("{door:?}.db"), door, &relay).await;
        world.level(&replica).await;
        let recorded = relay.passed().remove(0);
        let streams = world.primary.status().replicas.len();

        // To the primary, which answers what it would to any dialler, and hangs up.
        for _ in 0..3 {
            let mut io = TcpStream::connect(world.at(door)).await.unwrap();
            // It may hang up before it has read all.
            let _ = io.write_all(&recorded.up).await;
            let _ = io.shutdown().await;
            let mut answer = Vec::new();
            let _ = within("the end", io.read_to_end(&mut answer)).await;
            assert!(answer.len() < 8 * 1024, "{} bytes came", answer.len());
        }
        assert_eq!(world.primary.status().replicas.len(), streams, "it counts no other replica");

        // To the replica, in the place of the primary.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        relay.lead_to(listener.local_addr().unwrap());
        let down = recorded.down.clone();
        let playing = tokio::spawn(async move {
            while let Ok((mut io, _)) = listener.accept().await {
                let _ = io.write_all(&down).await;
                let _ = io.read_to_end(&mut Vec::new()).await;
            }
        });
        relay.cut();
        let missed = world.write(3).await;
        says(&replica, "that the line is cut").await;
        let came = relay.came();
        comes("some more tries", || relay.came() > came + 3).await;
        assert!(replica.position().unwrap().number() < missed.number());
        playing.abort();
        relay.lead_to(world.at(door));
        relay.cut();
        world.level(&replica).await;
        replicas.push(replica);
        relays.push(relay);
    }
    world.end(replicas, &relays.iter().collect::<Vec<_>>()).await;
}

/// All that hyper says by itself.
fn is_bare(headers: &HeaderMap) -> bool {
    headers.keys().all(|name| name == "date")
}

/// The head keeps strangers away from TLS, and is no more than that: one that was recorded and came
/// to no node begins a channel, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recorded_head_begins_tls_once_and_a_recorded_knock_gets_nothing_in_it() {
    let world = World::new().await;
    let door = Door::Mounted;
    let passing = Ender::start(door, world.at(door), Inside::Pass).await;
    let (used, _) = heads_of(&world, &passing, "u.db", 1).await;
    let (answer, _) = tunnel(world.at(door), &used[0]).await.unwrap();
    assert!(answer.status() == 404 && is_bare(answer.headers()), "{answer:?}");

    let keeping = Ender::start(door, world.at(door), Inside::Answer).await;
    let (outer, inner) = heads_of(&world, &keeping, "k.db", 1).await;
    let (outer, inner) = (outer[0].clone(), inner[0].clone());
    let (answer, io) = tunnel(world.at(door), &outer).await.unwrap();
    assert_eq!(answer.status(), 200);
    let (mounted, connection) = h2::client::handshake(Key::new().connect(io).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let io = TcpStream::connect(world.at(Door::Own)).await.unwrap();
    let (own, connection) = h2::client::handshake(Key::new().connect(io).await.unwrap()).await.unwrap();
    tokio::spawn(connection);
    let mut doors = [mounted, own];
    for path in ["/v1/stream", "/v1/standing", "/v1/command", "/v1/tunnel", "/"] {
        for client in &mut doors {
            let mut request = Request::post(format!("http://x{path}")).body(()).unwrap();
            *request.headers_mut() = if path == "/v1/tunnel" { outer.clone() } else { inner.clone() };
            let (answer, mut up) = client.send_request(request, false).unwrap();
            let _ = up.send_data(Bytes::from_static(MARK), true);
            let answer = within("an answer", answer).await.unwrap();
            assert!(answer.status() == 404 && is_bare(answer.headers()), "{path}: {answer:?}");
            let mut body = answer.into_body();
            assert!(within("the end", body.data()).await.is_none());
        }
    }
    let (answer, _) = tunnel(world.at(door), &outer).await.unwrap();
    assert!(answer.status() == 404 && is_bare(answer.headers()), "again: {answer:?}");
    // The same head on another path, and another method, is no head.
    let io = TcpStream::connect(world.at(door)).await.unwrap();
    let (mut client, connection) = h2::client::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut request =
        Request::post(format!("http://{}/_replite/v1/stream", world.at(door))).body(()).unwrap();
    *request.headers_mut() = outer;
    let (answer, _) = client.send_request(request, true).unwrap();
    assert_eq!(within("an answer", answer).await.unwrap().status(), 404);
    world.end(Vec::new(), &[]).await;
}

/// One who recorded heads holds channels open; the honest replica has its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channels_that_nothing_is_asked_in_end_by_themselves() {
    let world = World::new().await;
    let door = Door::Mounted;
    let relay = world.relay(door).await;
    let honest = world.replica("r.db", door, &relay).await;
    world.level(&honest).await;
    let ender = Ender::start(door, world.at(door), Inside::Answer).await;
    let (heads, _) = heads_of(&world, &ender, "v.db", 3).await;
    let mut held = Vec::new();
    for head in &heads {
        let (answer, io) = tunnel(world.at(door), head).await.unwrap();
        assert_eq!(answer.status(), 200);
        held.push(io);
    }
    world.level(&honest).await;
    for mut io in held {
        // Ten seconds, and then some on a busy machine.
        let mut buffer = [0; 64];
        let ended = tokio::time::timeout(Duration::from_secs(40), async {
            while io.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
        });
        ended.await.expect("a channel without TLS ends");
    }
    world.end(vec![honest], &[&relay]).await;
}

/// So many heads, outside of TLS and inside, of a replica that dials the one between.
async fn heads_of(
    world: &World,
    ender: &Ender,
    name: &str,
    count: usize,
) -> (Vec<HeaderMap>, Vec<HeaderMap>) {
    let url = Door::Mounted.url(ender.address);
    let replica = replite::Db::open(replica(&world.dir.path().join(name), &url)).await.unwrap();
    comes("so many heads", || ender.seen.lock().unwrap().heads.len() >= count).await;
    replica.shutdown().await;
    let seen = ender.seen.lock().unwrap();
    (seen.tunnels.clone(), seen.heads.clone())
}
