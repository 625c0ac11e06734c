//! The replay layer.

use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::routing::{get, post};
use http::Request;
use replite::{Db, Durability, lease};
use tower::ServiceExt;

use crate::home::{config, directory, runtime};
use crate::{figure, quantile};

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

pub(crate) fn layer() {
    let dir = directory();
    let (listen, other) = runtime().block_on(async {
        let bind = || tokio::net::TcpListener::bind("127.0.0.1:0");
        (bind().await.expect("a port"), bind().await.expect("a port"))
    });
    let (address, replicas) = (listen.local_addr().expect("bound"), other.local_addr().expect("bound"));
    let p = {
        // The primary is reached by its app's address; its stream by a listener of its own.
        let config = config(&dir.path().join("p.db"))
            .durability(Durability::Synced)
            .advertise(format!("http://{address}"))
            .listen("127.0.0.1:0".parse().expect("an address"));
        runtime().block_on(Db::open(config)).expect("a primary")
    };
    let r = {
        let config =
            config(&dir.path().join("r.db")).lease(lease::Fixed::replica_of(&p.node().addresses.replication));
        runtime().block_on(Db::open(config)).expect("a replica")
    };
    runtime().block_on(r.ready()).expect("ready");
    let (plain, layered) = (app(), app().layer(r.replay_layer()));
    serve(listen, app().layer(p.replay_layer()));
    serve(other, layered.clone());
    let (mut over, mut replayed) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let base = gets(&plain);
        over.push(gets(&layered) - base);
        let direct = posts(address);
        replayed.push(posts(replicas) - direct);
    }
    figure("layer_get_us", "us", over);
    figure("replay_post_us", "us", replayed);
}
