//! What a forwarded request costs: on the private channel, and in the clear to the application's
//! address. The client and both nodes are processes of their own.

use std::time::Instant;

use http::Request;
use http_body_util::BodyExt;

use crate::app::{self, ForwardWay};
use crate::home::{directory, runtime};
use crate::support::{Process, own_port};
use crate::{figure, quantile};

const RUNS: usize = 9;
/// POSTs of one run, one after the other.
const POSTS: usize = 1500;
/// Connections of the clients that are counted by the second, and their POSTs.
const CONNECTIONS: usize = 64;
const EACH: usize = 100;

struct Nodes {
    at_primary: u16,
    at_replica: u16,
    _processes: [Process; 2],
    _dir: tempfile::TempDir,
}

impl Nodes {
    fn new(way: ForwardWay) -> Nodes {
        let dir = directory();
        let [at_primary, at_replica, streams, own] = [(); 4].map(|()| own_port());
        let more = way.variables();
        let primary = app::node(dir.path(), at_primary, Some(streams), "", more);
        primary.expect("ready");
        let follows = format!("replite://127.0.0.1:{streams}");
        let replica = app::node(dir.path(), at_replica, Some(own), &follows, more);
        replica.expect("ready");
        Nodes { at_primary, at_replica, _processes: [primary, replica], _dir: dir }
    }
}

/// POSTs over one connection.
async fn posts(port: u16, number: usize) -> Vec<f64> {
    let io = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
    io.set_nodelay(true).expect("an option");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(io)).await.expect("HTTP");
    tokio::spawn(connection);
    let mut samples = Vec::with_capacity(number);
    for _ in 0..number {
        let request = Request::post("/host").header("host", "bench").body("a note".to_string());
        let begin = Instant::now();
        let response = sender.send_request(request.expect("a request")).await.expect("a response");
        assert!(response.status().is_success());
        response.into_body().collect().await.expect("a body");
        samples.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    samples
}

fn post_us(port: u16) -> f64 {
    let mut samples =
        runtime().block_on(async { runtime().spawn(posts(port, POSTS)).await.expect("a task") });
    quantile(&mut samples, 0.5)
}

fn rate(port: u16) -> f64 {
    runtime().block_on(async {
        let begin = Instant::now();
        let clients: Vec<_> = (0..CONNECTIONS).map(|_| runtime().spawn(posts(port, EACH))).collect();
        for client in clients {
            client.await.expect("a client");
        }
        (CONNECTIONS * EACH) as f64 / begin.elapsed().as_secs_f64()
    })
}

pub(crate) fn forwards() {
    let ways = [ForwardWay::Channel, ForwardWay::Http1, ForwardWay::Http2];
    let names = ["channel", "clear", "clear_http2"];
    let nodes = ways.map(Nodes::new);
    let mut over: [Vec<f64>; 3] = Default::default();
    let mut rates: [Vec<f64>; 3] = Default::default();
    for _ in 0..RUNS {
        for (n, nodes) in nodes.iter().enumerate() {
            let direct = post_us(nodes.at_primary);
            over[n].push(post_us(nodes.at_replica) - direct);
            rates[n].push(rate(nodes.at_replica));
        }
    }
    for (n, name) in names.into_iter().enumerate() {
        figure(&format!("forward_{name}_post_us"), "us", std::mem::take(&mut over[n]));
        figure(&format!("forward_{name}_req_per_s"), "/s", std::mem::take(&mut rates[n]));
    }
}
