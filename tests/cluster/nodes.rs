//! A primary and its replicas in one process, over real sockets.

use std::path::Path;
use std::time::Duration;

use replite::{Addresses, Config, Db, Error, Role, Secret, lease};

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)";

const LIMIT: Duration = Duration::from_secs(30);

fn secret() -> Secret {
    Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap()
}

async fn primary(dir: &Path) -> Db {
    let config = Config::new(dir.join("p.db"))
        .database("app")
        .secret(secret())
        .listen("127.0.0.1:0".parse().unwrap())
        .migrate(|conn| conn.execute_batch(SCHEMA));
    Db::open(config).await.unwrap()
}

async fn replica(dir: &Path, name: &str, of: &Db) -> Db {
    let Addresses { replication, .. } = &of.node().addresses;
    let config = Config::new(dir.join(name))
        .database("app")
        .secret(secret())
        .lease(lease::Fixed::replica_of(replication));
    Db::open(config).await.unwrap()
}

async fn insert(db: &Db, value: i64) -> replite::Txid {
    let commit = db
        .write(move |tx| Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (?1)", [value])?))
        .await
        .unwrap();
    commit.txid.unwrap()
}

fn count(db: &Db) -> i64 {
    db.read(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?)).unwrap()
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_on_the_primary_is_read_on_every_replica_after_a_wait() {
    let dir = tempfile::tempdir().unwrap();
    let p = primary(dir.path()).await;
    for i in 0..10 {
        insert(&p, i).await;
    }
    let (a, b) = (replica(dir.path(), "a.db", &p).await, replica(dir.path(), "b.db", &p).await);
    within("ready", async {
        a.ready().await.unwrap();
        b.ready().await.unwrap();
    })
    .await;
    assert_eq!((p.role(), a.role()), (Role::Primary, Role::Replica));
    for i in 10..200 {
        let txid = insert(&p, i).await;
        for r in [&a, &b] {
            r.wait_for_timeout(txid, LIMIT).await.unwrap();
            assert_eq!(count(r), i + 1);
        }
    }
    assert_eq!(a.position(), p.position());
    let refused = a.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (0)", [])?)).await;
    let Err(Error::NotPrimary { primary: Some(known) }) = refused else { panic!("{refused:?}") };
    assert_eq!(known.node, p.node_id());
    assert_eq!(p.status().replicas.len(), 2);
    within("shutdown", async {
        for db in [a, b, p] {
            db.shutdown().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_opens_before_its_primary_and_survives_its_restarts() {
    let dir = tempfile::tempdir().unwrap();
    // The replica goes on looking for its primary there.
    let port = crate::support::own_port();
    let url = format!("http://127.0.0.1:{port}");
    let primary = || {
        let config = Config::new(dir.path().join("p.db")).database("app").secret(secret());
        let config = config.listen(format!("127.0.0.1:{port}").parse().unwrap());
        Db::open(config.migrate(|conn| conn.execute_batch(SCHEMA)))
    };
    primary().await.unwrap().shutdown().await;
    let config = Config::new(dir.path().join("r.db"))
        .database("app")
        .secret(secret())
        .lease(lease::Fixed::replica_of(&url));
    let r = Db::open(config).await.unwrap();
    assert!(matches!(
        r.read(|conn| Ok::<_, Error>(conn.query_row("SELECT 1", [], |_| Ok(()))?)),
        Err(Error::NoState(_))
    ));
    let mut rows = 0;
    for _ in 0..3 {
        let p = primary().await.unwrap();
        let mut txid = None;
        for i in 0..20 {
            txid = Some(insert(&p, i).await);
            rows += 1;
        }
        within("ready", r.ready()).await.unwrap();
        r.wait_for_timeout(txid.unwrap(), LIMIT).await.unwrap();
        assert_eq!(count(&r), rows);
        p.shutdown().await;
    }
    r.shutdown().await;
}

/// Sends one request to a server on loopback and returns status, headers and body.
async fn send(
    address: std::net::SocketAddr,
    method: &str,
    path: &str,
    token: Option<&str>,
) -> (u16, http::HeaderMap, String) {
    let client: hyper_util::client::legacy::Client<_, String> =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    let mut request = http::Request::builder().method(method).uri(format!("http://{address}{path}"));
    if let Some(token) = token {
        request = request.header("replite-token", token);
    }
    let response = client.request(request.body(String::new()).unwrap()).await.unwrap();
    let (head, body) = response.into_parts();
    let body = http_body_util::BodyExt::collect(body).await.unwrap().to_bytes();
    (head.status.as_u16(), head.headers, String::from_utf8(body.to_vec()).unwrap())
}

/// An axum app over a node: `POST /` adds a row, `GET /` counts them.
fn app(db: &Db) -> axum::Router {
    use axum::routing::get;
    let (reads, writes) = (db.clone(), db.clone());
    axum::Router::new()
        .route(
            "/",
            get(move || async move { count(&reads).to_string() })
                .post(move || async move { insert(&writes, 1).await.number().to_string() }),
        )
        .layer(db.replay_layer())
        .nest_service("/_replite", db.service())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_instance_takes_every_request_and_clients_read_their_own_writes() {
    let dir = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    let mut first = None;
    for name in ["p.db", "a.db", "b.db"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let config = Config::new(dir.path().join(name)).database("app").secret(secret()).advertise(&url);
        let config = match &first {
            None => config.migrate(|c| c.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v)")),
            Some(primary) => config.lease(lease::Fixed::replica_of(primary)),
        };
        first.get_or_insert(url);
        let db = Db::open(config).await.unwrap();
        tokio::spawn(axum::serve(listener, app(&db)).into_future());
        nodes.push((db, address));
    }
    for (db, _) in &nodes {
        within("ready", db.ready()).await.unwrap();
    }
    for i in 1..=60 {
        let (_, address) = &nodes[i % 3];
        let (status, headers, number) = send(*address, "POST", "/", None).await;
        assert_eq!(status, 200, "{number}");
        let token = headers["replite-token"].to_str().unwrap();
        for (_, other) in &nodes {
            assert_eq!(send(*other, "GET", "/", Some(token)).await.2, i.to_string());
        }
    }
    for (db, _) in nodes {
        within("shutdown", db.shutdown()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_heads_and_strange_requests_get_a_clean_answer_and_service_goes_on() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = Config::new(dir.path().join("p.db"))
        .database("app")
        .secret(secret())
        .advertise(format!("http://{address}"))
        .migrate(|c| c.execute_batch("CREATE TABLE t(id INTEGER PRIMARY KEY, v)"));
    let db = Db::open(config).await.unwrap();
    tokio::spawn(axum::serve(listener, app(&db)).into_future());
    let long = "x".repeat(2 << 20);
    for (request, statuses) in [
        (format!("GET / HTTP/1.1\r\nhost: x\r\ncookie: {long}\r\n\r\n"), &["431", "400"][..]),
        (format!("GET /{long} HTTP/1.1\r\nhost: x\r\n\r\n"), &["414", "431", "400"]),
        ("GET / HTTP/1.1\r\nhost: x\r\nreplite-token: v1.zzz\r\nreplite-hop: v1.1.x.y.z\r\nconnection: close\r\n\r\n".into(), &["200"]),
        ("CONNECT x:1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".into(), &["405", "404", "400"]),
        ("garbage\r\n\r\n".into(), &["400"]),
    ] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(n) = within("an answer", stream.read(&mut buffer)).await {
            if n == 0 {
                break;
            }
            answer.extend_from_slice(&buffer[..n]);
        }
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).unwrap_or("cut").to_string();
        // A connection that is closed with unread bytes may be reset before its answer is read.
        assert!(statuses.contains(&status.as_str()) || (request.len() > 1 << 20 && status == "cut"), "{status}: {answer}");
    }
    let (status, _, _) = send(address, "POST", "/", None).await;
    assert_eq!(status, 200);
    assert_eq!(send(address, "GET", "/", None).await.2, "1");
    within("shutdown", db.shutdown()).await;
}
