//! The doors: the layer, forwarding, temporary databases.

use std::net::SocketAddr;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use http::Request;
use replite::{Db, Durability, Error, lease};
use tempfile::TempDir;
use tower::ServiceExt;

use crate::app::ForwardWay;
use crate::home::{SCHEMA, config, directory, runtime};
use crate::{app, figure, quantile};

const RUNS: usize = 7;

fn app() -> Router {
    Router::new().route("/", get(|| async { "read" })).route("/", post(|| async { "written" }))
}

fn gets(app: &Router) -> f64 {
    const GETS: u32 = 20_000;
    runtime().block_on(async {
        let begin = Instant::now();
        for _ in 0..GETS {
            let request = Request::builder().uri("/").body(Body::empty()).expect("a request");
            app.clone().oneshot(request).await.expect("a response");
        }
        begin.elapsed().as_secs_f64() * 1e6 / f64::from(GETS)
    })
}

fn serve(listener: tokio::net::TcpListener, app: Router) {
    runtime().spawn(async move { axum::serve(listener, app).await });
}

fn posts(address: std::net::SocketAddr) -> f64 {
    use hyper_util::client::legacy::Client;
    let client: Client<_, String> = Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    let run = async move {
        let mut samples = Vec::new();
        for _ in 0..1500 {
            let request =
                Request::post(format!("http://{address}/")).body("a note".to_string()).expect("a request");
            let begin = Instant::now();
            let response = client.request(request).await.expect("a response");
            http_body_util::BodyExt::collect(response.into_body()).await.expect("a body");
            samples.push(begin.elapsed().as_secs_f64() * 1e6);
        }
        quantile(&mut samples, 0.5)
    };
    runtime().block_on(async { runtime().spawn(run).await.expect("a task") })
}

/// A primary and a replica whose applications are served, and the replica's application with its
/// layer.
struct Pair {
    primary: Db,
    replica: Db,
    at_primary: SocketAddr,
    at_replica: SocketAddr,
    _dir: TempDir,
}

impl Pair {
    fn new(app: impl Fn(&Db) -> Router) -> Pair {
        let dir = directory();
        let (listen, other) = runtime().block_on(async {
            let bind = || tokio::net::TcpListener::bind("127.0.0.1:0");
            (bind().await.expect("a port"), bind().await.expect("a port"))
        });
        let (at_primary, at_replica) =
            (listen.local_addr().expect("bound"), other.local_addr().expect("bound"));
        // The primary is reached by its app's address; its stream by a listener of its own.
        let config = |name: &str| config(&dir.path().join(name)).durability(Durability::Synced);
        let p = config("p.db")
            .advertise(format!("http://{at_primary}"))
            .listen("127.0.0.1:0".parse().expect("an address"))
            .migrate(|c| c.execute_batch(SCHEMA));
        let primary = runtime().block_on(Db::open(p)).expect("a primary");
        let r = config("r.db").lease(lease::Fixed::replica_of(&primary.node().addresses.replication));
        let replica = runtime().block_on(Db::open(r)).expect("a replica");
        runtime().block_on(replica.ready()).expect("ready");
        serve(listen, app(&primary).layer(primary.replay_layer()));
        serve(other, app(&replica).layer(replica.replay_layer()));
        Pair { primary, replica, at_primary, at_replica, _dir: dir }
    }
}

pub(crate) fn layer() {
    let pair = Pair::new(|_| app());
    let (plain, layered) = (app(), app().layer(pair.replica.replay_layer()));
    let (mut over, mut replayed) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let base = gets(&plain);
        over.push(gets(&layered) - base);
        let direct = posts(pair.at_primary);
        replayed.push(posts(pair.at_replica) - direct);
    }
    figure("layer_get_us", "us", over);
    figure("replay_post_us", "us", replayed);
}

/// What a response costs more that names where the database ended: of a POST whose handler wrote
/// nothing, on the primary, beside one whose kind writes nothing (GET). The plain application's two
/// are taken off, and the token is not one that the client has.
pub(crate) fn last_resort() {
    const REQUESTS: u32 = 20_000;
    let pair = Pair::new(|_| app());
    let (plain, layered) = (app(), app().layer(pair.primary.replay_layer()));
    let of = |app: &Router, method: &'static str| {
        runtime().block_on(async {
            let begin = Instant::now();
            for _ in 0..REQUESTS {
                let request = Request::builder().method(method).uri("/").body(Body::empty());
                let request = request.expect("a request");
                let response = app.clone().oneshot(request).await.expect("a response");
                let names = response.headers().contains_key("replite-token");
                assert_eq!(names, method == "POST" && std::ptr::eq(app, &layered));
            }
            begin.elapsed().as_secs_f64() * 1e6 / f64::from(REQUESTS)
        })
    };
    let mut over = Vec::new();
    for _ in 0..RUNS {
        let gets = of(&layered, "GET") - of(&plain, "GET");
        over.push(of(&layered, "POST") - of(&plain, "POST") - gets);
    }
    figure("last_resort_token_us", "us", over);
}

/// POSTs a second of 32 clients, each on a connection of its own.
fn rate(address: SocketAddr) -> f64 {
    const CLIENTS: usize = 32;
    const POSTS: usize = 150;
    let client = move || async move {
        let io = tokio::net::TcpStream::connect(address).await.expect("a connection");
        io.set_nodelay(true).expect("an option");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(io)).await.expect("HTTP");
        tokio::spawn(connection);
        for _ in 0..POSTS {
            let request = Request::post("/").header("host", "bench").body("a note".to_string());
            let response = sender.send_request(request.expect("a request")).await.expect("a response");
            assert!(response.status().is_success());
            http_body_util::BodyExt::collect(response.into_body()).await.expect("a body");
        }
    };
    runtime().block_on(async {
        let begin = Instant::now();
        let clients: Vec<_> = (0..CLIENTS).map(|_| runtime().spawn(client())).collect();
        for client in clients {
            client.await.expect("a client");
        }
        (CLIENTS * POSTS) as f64 / begin.elapsed().as_secs_f64()
    })
}

pub(crate) fn forwarded() {
    let writing = Pair::new(|db| {
        let db = db.clone();
        Router::new().route(
            "/",
            post(move |note: String| async move {
                let insert = "INSERT INTO t(v) VALUES (?1)";
                db.write(move |tx| Ok::<_, Error>(tx.prepare_cached(insert)?.execute([note])?)).await?;
                Ok::<_, Error>("written")
            }),
        )
    });
    let plain = Pair::new(|_| app());
    for (name, pair) in [("proxy_req_per_s_ratio", writing), ("proxy_plain_req_per_s_ratio", plain)] {
        let mut ratios = Vec::new();
        let mut direct = Vec::new();
        for _ in 0..RUNS {
            direct.push(rate(pair.at_primary));
            ratios.push(rate(pair.at_replica) / direct[direct.len() - 1]);
        }
        figure(name, "x", ratios);
        figure(&name.replace("_ratio", "_direct"), "/s", direct);
        assert_eq!(pair.primary.status().problem, None);
    }
}

/// From nothing to a database that takes writes.
pub(crate) fn temporary() {
    let mut times = Vec::new();
    for _ in 0..21 {
        let begin = Instant::now();
        let db = runtime()
            .block_on(Db::temporary(|config| config.migrate(|c| c.execute_batch(SCHEMA))))
            .expect("a database");
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        runtime().block_on(db.shutdown());
    }
    figure("temporary_db_ms", "ms", times);
}

/// Eight clients of a replica whose primary is restarted in good order, again and again; all in
/// processes of their own.
pub(crate) fn restarted() {
    const RESTARTS: usize = 50;
    for (way, how) in [
        (ForwardWay::Http1, "forwarded in HTTP/1.1"),
        (ForwardWay::Http2, "forwarded in HTTP/2"),
        (ForwardWay::Channel, "forwarded on the channel"),
    ] {
        let setting = app::Setting { way, own_listener: false };
        // On a thread of the runtime, as waiting for processes blocks.
        let run = async move { app::restarts(setting, RESTARTS).await };
        let seen = runtime().block_on(async { runtime().spawn(run).await.expect("a task") });
        for failed in &seen.failed {
            eprintln!("{failed}");
        }
        println!(
            "orderly_restart_failed: {} of {} requests, {RESTARTS} restarts, {how}",
            seen.failed.len(),
            seen.requests
        );
        println!("orderly_restart_longest_ms: {:.0} ms", seen.longest.as_secs_f64() * 1e3);
    }
}
