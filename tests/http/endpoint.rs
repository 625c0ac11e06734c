//! The replication endpoint among the things of an application: other layers, rotation of secrets,
//! addresses, wrong peers.

use std::future::IntoFuture;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::*;
use axum::Router;
use axum::http::{HeaderValue, Method, Request, StatusCode, header};
use axum::response::{Html, IntoResponse, Redirect};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use replite::{Addresses, Config, Db, Event, Events, Secret};
use tokio::net::TcpListener;
use tower_http::compression::CompressionLayer;
use tower_http::timeout::TimeoutLayer;

fn key(byte: u8) -> Secret {
    Secret::from_bytes(std::array::from_fn(|n| n as u8 ^ byte)).unwrap()
}

async fn listen(at: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(at).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn serve(listener: TcpListener, app: Router) {
    tokio::spawn(axum::serve(listener, app).into_future());
}

/// A primary whose endpoint is mounted in an application, with other layers around all of it.
async fn mounted(path: &Path, around: impl FnOnce(Router) -> Router) -> (Db, String) {
    let (listener, address) = listen("127.0.0.1:0").await;
    let url = format!("http://{address}");
    let config = Config::new(path)
        .database("app")
        .secret(secret())
        .advertise(&url)
        .migrate(|conn| conn.execute_batch(SCHEMA));
    let p = Db::open(config).await.unwrap();
    serve(listener, around(Router::new().layer(p.replay_layer()).nest_service("/_replite", p.service())));
    (p, url)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_below_a_timeout_begins_again_where_it_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let cut = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_millis(50));
    let bodies = tower_http::timeout::ResponseBodyTimeoutLayer::new(Duration::from_millis(50));
    let (p, url) = mounted(&dir.path().join("p.db"), move |app| app.layer(cut).layer(bodies)).await;
    let r = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    let mut events = r.events();
    let mut last = None;
    for n in 0..20 {
        last = Some(insert(&p, "x", n).await);
        if n % 5 == 4 {
            // Silence is what the layer cuts.
            while !matches!(within("a cut", events.next()).await, Some(Event::Disconnected { .. })) {}
        }
    }
    r.wait_for_timeout(last.unwrap(), LIMIT).await.unwrap();
    assert_same_pages(p.path(), r.path());
    r.shutdown().await;
    p.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compression_around_everything_leaves_the_stream_alone() {
    let dir = tempfile::tempdir().unwrap();
    let encodings = Arc::<Mutex<Vec<Option<HeaderValue>>>>::default();
    let seen = encodings.clone();
    // It would even where nobody asked.
    let ask = move |mut request: axum::extract::Request, next: axum::middleware::Next| {
        let seen = seen.clone();
        async move {
            request.headers_mut().insert(header::ACCEPT_ENCODING, "gzip".parse().unwrap());
            let response = next.run(request).await;
            seen.lock().unwrap().push(response.headers().get(header::CONTENT_ENCODING).cloned());
            response
        }
    };
    let (p, url) = mounted(&dir.path().join("p.db"), |app| {
        app.layer(CompressionLayer::new()).layer(axum::middleware::from_fn(ask))
    })
    .await;
    let r = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    // Far from what would fill a compressor's window: it must come at once.
    for n in 0..5 {
        let last = insert(&p, "x", n).await;
        r.wait_for_timeout(last, LIMIT).await.unwrap();
    }
    r.shutdown().await;
    p.shutdown().await;
    let encodings = encodings.lock().unwrap();
    let identity = Some(HeaderValue::from_static("identity"));
    assert!(!encodings.is_empty() && encodings.iter().all(|e| *e == identity), "{encodings:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_are_rotated_while_everything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let open = |config: Config| Db::open(config.secrets([key(1)]));
    let p = open(primary(&dir.path().join("p.db"), 0)).await.unwrap();
    let wire = Wire::start(address(&p.node().addresses.replication), Duration::ZERO).await;
    let url = format!("http://{}", wire.address);
    let mut nodes = vec![p];
    for name in ["a.db", "b.db"] {
        let r = open(replica(&dir.path().join(name), &url)).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        nodes.push(r);
    }
    let old = nodes[0].token(insert(&nodes[0], "x", 0).await).unwrap().to_string();
    let writing = Arc::new(AtomicBool::new(true));
    let writer = {
        let (p, writing) = (nodes[0].clone(), writing.clone());
        tokio::spawn(async move {
            let mut last = None;
            while writing.load(Ordering::Relaxed) {
                last = Some(insert(&p, "w", 0).await);
            }
            last.unwrap()
        })
    };
    for stage in [&[key(1), key(2)][..], &[key(2), key(1)], &[key(2)]] {
        for node in &nodes {
            node.rotate_secrets(stage).unwrap();
            // Also a stream that has to prove itself anew, between nodes of two stages.
            wire.cut();
            let reached = insert(&nodes[0], "stage", 0).await;
            for r in &nodes[1..] {
                r.wait_for_timeout(reached, LIMIT).await.unwrap();
            }
        }
        // Tokens have nothing to do with the secrets.
        for node in &nodes {
            assert!(node.verify_token(&old).is_some());
        }
    }
    writing.store(false, Ordering::Relaxed);
    let last = writer.await.unwrap();
    for r in &nodes[1..] {
        r.wait_for_timeout(last, LIMIT).await.unwrap();
        assert_same_pages(nodes[0].path(), r.path());
    }
    // Who was forgotten is refused from now on.
    let late = open(replica(&dir.path().join("late.db"), &url)).await.unwrap();
    until("the refusal", || late.status().problem.is_some_and(|p| p.contains("secret")));
    late.shutdown().await;
    for node in nodes.into_iter().rev() {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_all_get_the_same_bare_404() {
    let dir = tempfile::tempdir().unwrap();
    let (p, mounted_at) = mounted(&dir.path().join("p.db"), |app| app).await;
    let own = Db::open(primary(&dir.path().join("q.db"), 0).database("other")).await.unwrap();
    let own_at = format!("http://{}", address(&own.node().addresses.replication));
    let mut seen = Vec::new();
    for base in [&mounted_at, &own_at] {
        for http2 in [false, true] {
            let client: Client<_, Empty<bytes::Bytes>> =
                Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
            for path in ["", "/", "/v1/stream", "/v1/tunnel", "/v2/tunnel", "/x?y"]
                .map(|rest| format!("/_replite{rest}"))
            {
                for method in [Method::GET, Method::POST, Method::PUT, Method::OPTIONS, Method::DELETE] {
                    let request = Request::builder()
                        .method(&method)
                        .uri(format!("{base}{path}"))
                        .header("replite-version", "3")
                        .header("replite-node", own.node_id().to_string())
                        .header("replite-nonce", "0".repeat(64))
                        .header("replite-proof", "1".repeat(64));
                    let response = client.request(request.body(Empty::new()).unwrap()).await.unwrap();
                    assert_eq!(response.status(), 404, "{method} {path}");
                    let (head, body) = response.into_parts();
                    assert!(body.collect().await.unwrap().to_bytes().is_empty());
                    let mut names: Vec<String> = head.headers.keys().map(|n| n.to_string()).collect();
                    // These are about the connection and the version of HTTP.
                    names.retain(|name| name != "connection" && name != "content-length");
                    names.sort();
                    seen.push(names);
                }
            }
        }
    }
    seen.dedup();
    assert_eq!(seen, [["date"]], "nothing tells one from another");
    own.shutdown().await;
    p.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_answers_in_place_of_a_primary_is_named_in_the_status() {
    let dir = tempfile::tempdir().unwrap();
    let app = Router::new()
        .route("/html/v1/tunnel", axum::routing::any(|| async { Html("<html>Welcome!") }))
        .route("/login/v1/tunnel", axum::routing::any(|| async { Redirect::to("/sign-in").into_response() }))
        .route(
            "/private/v1/tunnel",
            axum::routing::any(|| async { (StatusCode::UNAUTHORIZED, "who are you?").into_response() }),
        )
        .route(
            "/broken/v1/tunnel",
            axum::routing::any(|| async {
                (StatusCode::INTERNAL_SERVER_ERROR, axum::Json("oh no")).into_response()
            }),
        );
    let (listener, address) = listen("127.0.0.1:0").await;
    serve(listener, app.clone());
    // The same without HTTP/2.
    let (http1, http1_address) = listen("127.0.0.1:0").await;
    tokio::spawn(async move {
        while let Ok((io, _)) = http1.accept().await {
            let service = hyper_util::service::TowerToHyperService::new(app.clone());
            let serving = hyper::server::conn::http1::Builder::new()
                .serve_connection(hyper_util::rt::TokioIo::new(io), service);
            tokio::spawn(serving);
        }
    });
    for (n, (url, words)) in [
        (format!("http://{address}/html"), &["200", "<html>Welcome!"][..]),
        (format!("http://{address}/login"), &["303"]),
        (format!("http://{address}/private"), &["401", "who are you?"]),
        (format!("http://{address}/broken"), &["500", "oh no"]),
        (format!("http://{address}"), &["secret", "404"]),
        (format!("http://{http1_address}/html"), &["HTTP/2", "http2"]),
    ]
    .into_iter()
    .enumerate()
    {
        let r = Db::open(replica(&dir.path().join(format!("{n}.db")), &url)).await.unwrap();
        until(&url, || r.status().problem.is_some_and(|p| words.iter().all(|w| p.contains(w))));
        r.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_and_labels_are_known_on_the_other_side_also_in_ipv6() {
    let mut ips = vec!["127.0.0.1", "[::1]"];
    if TcpListener::bind("[::1]:0").await.is_err() {
        println!("this machine has no IPv6; only IPv4 is tried");
        ips.pop();
    }
    for ip in ips {
        let dir = tempfile::tempdir().unwrap();
        let app_listener = TcpListener::bind(format!("{ip}:0")).await.unwrap();
        let url = format!("http://{}", app_listener.local_addr().unwrap());
        let addresses = |name: &str, app: &str| {
            Addresses::new(app).public(format!("https://{name}.example")).label("machine", name)
        };
        let config = primary(&dir.path().join("p.db"), 0)
            .listen(format!("{ip}:0").parse().unwrap())
            .addresses(addresses("p", &url));
        let p = Db::open(config).await.unwrap();
        let db = p.clone();
        let add = move || async move { insert(&db, "x", 1).await.to_string() };
        serve(app_listener, Router::new().route("/", axum::routing::post(add)).layer(p.replay_layer()));
        let replication = p.node().addresses.replication.clone();
        assert!(replication.starts_with(&format!("replite://{ip}:")), "{replication}");
        let config = replica(&dir.path().join("r.db"), &replication).addresses(addresses("r", "http://r:1"));
        let r = Db::open(config).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        let known = r.roles().borrow().primary.clone().unwrap();
        assert_eq!(known.addresses, p.node().addresses);
        assert_eq!(known.addresses.labels["machine"], "p");
        until("the replica is seen", || p.status().replicas.len() == 1);
        assert_eq!(p.status().replicas[0].peer.addresses, r.node().addresses);
        // Forwarded to that very address.
        let (listener, address) = listen(&format!("{ip}:0")).await;
        serve(
            listener,
            Router::new().layer(r.replay_layer()).fallback(|| async { "here" }).layer(r.replay_layer()),
        );
        let client: Client<_, Empty<bytes::Bytes>> = Client::builder(TokioExecutor::new()).build_http();
        let request = Request::post(format!("http://{address}/")).body(Empty::new()).unwrap();
        let response = client.request(request).await.unwrap();
        assert_eq!(response.status(), 200, "{ip}");
        r.shutdown().await;
        p.shutdown().await;
    }
}

/// The text with which a stream ends.
async fn ended(events: &mut Events) -> String {
    within("the end of a stream", async {
        loop {
            match events.next().await {
                Some(Event::Disconnected { why, .. }) => return why,
                Some(_) => {}
                None => panic!("the node ended"),
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_a_dropped_secret_end_on_both_sides() {
    for by_server in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let p = Db::open(primary(&dir.path().join("p.db"), 0).secrets([key(1)])).await.unwrap();
        let url = p.node().addresses.replication.clone();
        let r = Db::open(replica(&dir.path().join("r.db"), &url).secrets([key(1)])).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        let (mut told, mut events) = (p.events(), r.events());
        // As long as it is valid, whatever its place, nothing ends.
        for node in [&p, &r] {
            node.rotate_secrets(&[key(1), key(2)]).unwrap();
            node.rotate_secrets(&[key(2), key(1)]).unwrap();
        }
        let last = insert(&p, "x", 1).await;
        r.wait_for_timeout(last, LIMIT).await.unwrap();
        let (one, other) = if by_server { (&p, &r) } else { (&r, &p) };
        other.rotate_secrets(&[key(1)]).unwrap();
        one.rotate_secrets(&[key(2)]).unwrap();
        let why = ended(&mut events).await;
        assert!(why.contains("secret") && why.contains("not valid"), "{by_server}: {why}");
        // And none begins. Both operators are told.
        until("the replica says so", || r.status().problem.is_some_and(|p| p.contains("an empty 404")));
        within("the primary says so", async {
            while !matches!(told.next().await, Some(Event::OtherSecret { node, .. }) if node == r.node().node)
            {
            }
        })
        .await;
        assert!(p.status().problem.unwrap().contains("another secret"));
        let before = r.position();
        insert(&p, "x", 2).await;
        assert!(!r.health().can_write && r.position() == before);
        r.shutdown().await;
        p.shutdown().await;
    }
}
