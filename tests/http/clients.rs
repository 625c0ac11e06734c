//! An application that lets private addresses only into its admin pages, on a primary and a replica:
//! who is refused at the one is refused at the other, whatever the client says of itself.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{get, post};
use replite::{Db, Error, Forwarded, Proxies, Role, Route};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

use crate::support::*;

/// The private address, which the nodes have, too.
const PRIVATE: [u8; 4] = [127, 0, 0, 1];
const PUBLIC: [u8; 4] = [127, 0, 0, 2];
/// A proxy's.
const PROXY: [u8; 4] = [127, 0, 0, 3];

async fn only_private(
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Result<Response, StatusCode> {
    if client.ip() == std::net::IpAddr::from(PRIVATE) {
        Ok(next.run(request).await)
    } else {
        Err(StatusCode::FORBIDDEN)
    }
}

/// Says where it ran, who took the request, and what the headers say.
async fn told(db: &Db, headers: &HeaderMap, forwarded: Option<Forwarded>) -> String {
    let all = ["x-real-ip", "x-forwarded-for", "forwarded", "cookie"].map(|name| {
        let values = headers.get_all(name).iter().map(|value| value.to_str().unwrap());
        format!("{name}={}", values.collect::<Vec<_>>().join(","))
    });
    let role = if db.role() == Role::Primary { "primary" } else { "replica" };
    format!("on {role} by {:?}: {}", forwarded.map(|forwarded| forwarded.node()), all.join(" "))
}

async fn write(State(db): State<Db>, request: Request) -> Result<String, Error> {
    db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES ('admin')", [])?)).await?;
    Ok(read(State(db), request).await)
}

async fn read(State(db): State<Db>, request: Request) -> String {
    told(&db, request.headers(), request.extensions().get().copied()).await
}

fn app(db: &Db, proxies: Proxies) -> Router {
    // `/admin/late` writes in a GET: a replica finds out in the handler that it can't.
    let admin = Router::new()
        .route("/admin", get(read).post(write))
        .route("/admin/late", get(write))
        .route("/admin/primary", get(read))
        .layer(from_fn(only_private));
    let layer = db.replay_layer().proxies(proxies).route_prefix("/admin/primary", Route::Primary);
    admin.route("/open", get(read).post(post(write))).with_state(db.clone()).layer(layer)
}

/// How requests go from the replica to the primary.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    /// By the application's address.
    Address,
    Channel,
}

struct Node {
    db: Db,
    address: SocketAddr,
}

impl Node {
    async fn start(dir: &tempfile::TempDir, follows: Option<&Node>, proxies: Proxies, way: Way) -> Node {
        let listener = TcpListener::bind(SocketAddr::from((PRIVATE, 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = match follows {
            None => primary(&dir.path().join("p.db"), 0),
            Some(node) => replica(&dir.path().join("r.db"), &node.db.node().addresses.replication),
        };
        let db = Db::open(config.advertise(format!("http://{address}"))).await.unwrap();
        let app = app(&db, proxies);
        if way == Way::Channel {
            db.serve_forwarded(app.clone()).unwrap();
        }
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(axum::serve(listener, app).into_future());
        within("ready", db.ready()).await.unwrap();
        Node { db, address }
    }
}

async fn pair(proxies: Proxies, way: Way) -> (tempfile::TempDir, Node, Node) {
    let dir = tempfile::tempdir().unwrap();
    let primary = Node::start(&dir, None, proxies.clone(), way).await;
    let replica = Node::start(&dir, Some(&primary), proxies, way).await;
    (dir, primary, replica)
}

/// A request of this source, with further headers; the answer's status and body.
async fn send(source: [u8; 4], node: &Node, line: &str, headers: &[&str]) -> (u16, String) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((source, 0).into()).unwrap();
    let mut stream = within("a connection", socket.connect(node.address)).await.unwrap();
    let mut request = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n");
    headers.iter().for_each(|header| request.extend([header, "\r\n"]));
    stream.write_all(format!("{request}\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer)).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_string())
}

const LINES: [&str; 4] = ["GET /admin", "POST /admin", "GET /admin/late", "GET /admin/primary"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_at_the_primary_is_refused_through_a_replica() {
    refused_alike(Way::Address).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_refused_at_the_primary_is_refused_through_a_replica_on_the_channel() {
    refused_alike(Way::Channel).await;
}

async fn refused_alike(way: Way) {
    let (_dir, primary, replica) = pair(Proxies::Unknown, way).await;
    for line in LINES {
        for node in [&primary, &replica] {
            let (status, body) = send(PRIVATE, node, line, &[]).await;
            assert_eq!(status, 200, "{line}: {body}");
            let goes_on = node.address == replica.address && line != "GET /admin";
            let by = goes_on.then(|| replica.db.node().node);
            let role =
                if line == "GET /admin" && node.address == replica.address { "replica" } else { "primary" };
            assert!(body.contains(&format!("on {role} by {by:?}:")), "{line}: {body}");
            for spoofed in [
                &[][..],
                &["x-forwarded-for: 127.0.0.1"],
                &["x-real-ip: 127.0.0.1", "forwarded: for=127.0.0.1"],
                &["connection: x-real-ip, cookie, x-forwarded-for, host", "cookie: a=1"],
                &["replite-client: 127.0.0.1", "replite-forwarded: 127.0.0.1", "replite-outcome: x"],
            ] {
                assert_eq!(send(PUBLIC, node, line, spoofed).await.0, 403, "{line} {spoofed:?}");
                assert_eq!(send(PRIVATE, node, line, spoofed).await.0, 200, "{line} {spoofed:?}");
            }
            // One that says that it came by a node has no address at all, wherever it comes from.
            for hop in ["replite-hop: v1.1.x.y.z", "replite-hop: v1.0", "replite-hop:"] {
                for source in [PUBLIC, PRIVATE] {
                    let (status, body) = send(source, node, line, &[hop]).await;
                    assert_eq!(status, 500, "{line} {hop}: {body}");
                }
            }
        }
    }
    stop(primary, replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_takes_nothing_of_what_a_proxy_says_from_the_primarys_sight() {
    for way in [Way::Address, Way::Channel] {
        kept_alike(way).await;
    }
}

async fn kept_alike(way: Way) {
    let (_dir, primary, replica) = pair(Proxies::at(["127.0.0.3"]).unwrap(), way).await;
    let headers = [
        "connection: x-real-ip, cookie, x-forwarded-for, forwarded",
        "x-real-ip: 203.0.113.9",
        "x-forwarded-for: 203.0.113.9",
        "forwarded: for=203.0.113.9",
        "cookie: a=1",
    ];
    let of_proxy = "x-real-ip=203.0.113.9 x-forwarded-for=203.0.113.9 forwarded=for=203.0.113.9 cookie=a=1";
    let of_client = "x-real-ip= x-forwarded-for= forwarded= cookie=a=1";
    for line in ["GET /open", "POST /open"] {
        for node in [&primary, &replica] {
            for (source, told) in [(PROXY, of_proxy), (PUBLIC, of_client), (PRIVATE, of_client)] {
                let (status, body) = send(source, node, line, &headers).await;
                assert_eq!(status, 200, "{line}: {body}");
                assert!(body.ends_with(told), "{line} {source:?}: {body}");
            }
        }
    }
    stop(primary, replica).await;
}

async fn stop(primary: Node, replica: Node) {
    within("shutdown", replica.db.shutdown()).await;
    within("shutdown", primary.db.shutdown()).await;
}
