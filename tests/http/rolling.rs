//! Nodes with a lease that leave one after the other, under clients that notice nothing.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, StatusCode};
use axum::routing::{get, post};
use replite::{Config, Db, Error, Role, lease};
use tokio::net::TcpListener;
use tower::ServiceExt;

use crate::app::*;
use crate::http_support::*;
use crate::nginx::{Load, assert_told_the_truth};
use crate::support::*;

/// How long an ending node answers on: longer than nginx keeps an idle connection.
const LINGER_MS: &str = "400";

/// nginx as the guide has it.
fn balancer(dir: &Path, ports: [u16; 3]) -> (Process, String) {
    let port = own_port();
    let [a, b, c] = ports;
    let http = format!(
        "upstream nodes {{
             server 127.0.0.1:{a} max_fails=0; server 127.0.0.1:{b} max_fails=0;
             server 127.0.0.1:{c} max_fails=0;
             keepalive 16;
             keepalive_timeout 200ms;
         }}
         server {{
             listen 127.0.0.1:{port};
             location / {{
                 proxy_pass http://nodes;
                 proxy_http_version 1.1;
                 proxy_set_header Connection \"\";
                 proxy_set_header Host $host;
                 proxy_next_upstream error timeout;
             }}
         }}"
    );
    (nginx(dir, port, &http), format!("http://127.0.0.1:{port}/"))
}

/// What a node's table has of each note.
fn notes(dir: &Path, port: u16) -> BTreeMap<String, i64> {
    let conn = plain(&database(dir, port));
    let mut all = conn.prepare("SELECT text, count(*) FROM notes GROUP BY text").unwrap();
    all.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn behind_nginx_a_rolling_restart_of_all_nodes_fails_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let ports = [own_port(), own_port(), own_port()];
    let leases = dir.path().join("lease");
    std::fs::create_dir(&leases).unwrap();
    let start = |port| {
        let more = [("LEASES", leases.to_str().unwrap()), ("LINGER_MS", LINGER_MS)];
        node(dir.path(), port, None, "", &more)
    };
    let mut nodes: Vec<Process> = ports.into_iter().map(start).collect();
    let (_nginx, url) = tokio::task::block_in_place(|| {
        nodes.iter().for_each(|node| drop(node.expect("ready")));
        balancer(dir.path(), ports)
    });
    let load = Load::start(&url, &url);
    for _ in 0..2 {
        for (i, port) in ports.into_iter().enumerate() {
            load.more(300).await;
            tokio::task::block_in_place(|| {
                let old = nodes.remove(i);
                old.end();
                let new = start(port);
                new.expect("ready");
                nodes.insert(i, new);
            });
        }
    }
    load.more(300).await;
    let seen = load.end().await;
    assert_eq!((seen.missed.as_slice(), seen.not_executed.as_slice()), (&[][..], &[][..]));
    assert_eq!(seen.said_unknown, 0, "{:?}", seen.unknown);
    // nginx sends on to a node until that takes no connection any more. What was in that node's
    // queue just then is cut off, and nginx does not repeat a POST.
    assert!(seen.unknown.len() <= seen.acknowledged.len() / 200, "{:?}", seen.unknown);
    // The primary has all, and the others have it soon.
    for port in ports {
        let has_all = || {
            let notes = notes(dir.path(), port);
            seen.acknowledged.iter().all(|text| notes.contains_key(text))
        };
        comes("all notes", has_all).await;
        assert_told_the_truth(&seen, &notes(dir.path(), port));
    }
}

/// Waits for what only a try tells.
async fn comes_async(what: &str, mut done: impl AsyncFnMut() -> bool) {
    within(what, async {
        while !done().await {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn add(State(db): State<Db>) -> Result<StatusCode, Error> {
    db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO t(who, n, v) VALUES ('add', 1, '')", [])?)).await?;
    Ok(StatusCode::CREATED)
}

/// A node that serves until the test ends, and its application without a connection.
async fn leased(dir: &Path, name: &str) -> (Db, Router) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let leases = dir.join("lease");
    std::fs::create_dir_all(&leases).unwrap();
    let config = Config::new(dir.join(name))
        .database("app")
        .secret(secret())
        .advertise(format!("http://{address}"))
        .migrate(|conn| conn.execute_batch(SCHEMA))
        .lease(lease::Directory::new(leases))
        .bootstrap(2);
    let db = Db::open(config).await.unwrap();
    let app = Router::new()
        .route("/", get(|| async { "here" }))
        .route("/", post(add))
        .with_state(db.clone())
        .layer(db.replay_layer());
    let served = app.clone().nest_service("/_replite", db.service());
    tokio::spawn(async move { axum::serve(listener, served).await.unwrap() });
    (db, app)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_to_a_primary_that_drains_is_done_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = tokio::join!(leased(dir.path(), "a.db"), leased(dir.path(), "b.db"));
    let leads = |db: &Db| db.role() == Role::Primary;
    comes("a primary", || leads(&a.0) || leads(&b.0)).await;
    let (next, old) = if leads(&a.0) { (a, b) } else { (b, a) };
    // As soon as the other one is fit to lead. After that both are.
    comes_async("a handoff", async || next.0.handoff(None).await.is_ok()).await;
    comes("the stream", || leads(&old.0) && old.0.status().replicas.len() == 1).await;
    let send = async || -> Result<_, Infallible> {
        let post = Request::post("/").body(Body::empty()).unwrap();
        let response = within("an answer", old.1.clone().oneshot(post)).await?;
        let closes = response.headers().get("connection").is_some_and(|value| value == "close");
        let status = response.status();
        let decisions = || old.0.status().decisions.iter().map(|d| d.what.clone()).collect::<Vec<_>>();
        assert_eq!(status, StatusCode::CREATED, "{:?} {:#?}", response.headers(), decisions());
        Ok(closes)
    };
    assert!(!send().await.unwrap());
    let drain = tokio::spawn({
        let db = old.0.clone();
        async move { db.drain().await }
    });
    let mut sent = 1;
    while !drain.is_finished() {
        send().await.unwrap();
        sent += 1;
    }
    comes("the next primary", || leads(&next.0)).await;
    for _ in 0..3 {
        assert!(send().await.unwrap(), "it says that it ends");
        sent += 1;
    }
    assert!(!old.0.health().can_write);
    assert_eq!(count(&next.0), sent, "each ran once");
    old.0.shutdown().await;
    next.0.shutdown().await;
}
