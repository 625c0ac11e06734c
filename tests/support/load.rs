//! Clients of a fleet's nodes, and a writer that knows nothing of this crate.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::unfold;
use http::Request;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use replite::rusqlite::Connection;

use super::{Fleet, NODES, Open};
use crate::http_support::Http;
use crate::support::*;

/// Clients at one time. Of each four one sends large bodies, slowly.
const CLIENTS: usize = 8;
/// Requests of all of them between two ends of a node.
const BETWEEN: usize = 60;
/// The pieces of a large body, and the pause between two.
const PIECES: usize = 8;
const PIECE_BYTES: usize = 32 * 1024;
const PIECE_PAUSE: Duration = Duration::from_millis(15);
/// Between two questions whether a node is ready.
const PROBE: Duration = Duration::from_millis(20);
/// The name of what the foreign writer writes.
const FOREIGN: &str = "foreign";

/// What the clients saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) requests: usize,
    /// Requests that were not done, and answers that were wrong.
    pub(crate) failed: Vec<String>,
    pub(crate) longest: Duration,
    /// The last number of each client that it was told is there.
    acknowledged: BTreeMap<String, i64>,
    /// What the foreign writer was told.
    pub(crate) foreign: usize,
    pub(crate) refused: usize,
}

/// Clients of all nodes, and a writer that knows nothing of this crate.
pub(crate) struct Load {
    seen: Arc<Mutex<Seen>>,
    requests: Arc<AtomicUsize>,
    end: Arc<AtomicBool>,
    runtime: tokio::runtime::Runtime,
    clients: Vec<tokio::task::JoinHandle<()>>,
    foreign: JoinHandle<()>,
    balancer: tokio::task::JoinHandle<()>,
}

impl Load {
    pub(crate) fn start(fleet: &Fleet) -> Load {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (seen, requests, end) =
            (Arc::<Mutex<Seen>>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let nodes: Arc<Vec<Node>> = Arc::new(fleet.urls().into_iter().map(Node::new).collect());
        let balancer = runtime.spawn(balance(nodes.clone()));
        let clients = (0..CLIENTS).map(|number| {
            let client = Client {
                kept: Pool::builder(TokioExecutor::new()).build_http(),
                fresh: Pool::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http(),
                nodes: nodes.clone(),
                next: number,
                number,
                token: String::new(),
                seen: seen.clone(),
                requests: requests.clone(),
            };
            runtime.spawn(client.run(end.clone()))
        });
        let clients = clients.collect();
        let paths = (0..NODES).map(|node| fleet.path(node)).collect();
        let (told, stop) = (seen.clone(), end.clone());
        let foreign = std::thread::spawn(move || write_beside(paths, &told, &stop));
        Load { seen, requests, end, runtime, clients, foreign, balancer }
    }

    /// Waits until the clients have made some more requests.
    pub(crate) fn more(&self) {
        let from = self.requests.load(Ordering::Relaxed);
        until("more requests", || self.requests.load(Ordering::Relaxed) >= from + BETWEEN);
    }

    /// Ends all of it. What was acknowledged is there once on every node, and nothing is there
    /// twice.
    pub(crate) fn end(self, fleet: &Fleet) -> Seen {
        self.end.store(true, Ordering::Relaxed);
        self.runtime.block_on(within("the clients' end", async {
            for client in self.clients {
                client.await.unwrap();
            }
        }));
        self.balancer.abort();
        self.foreign.join().unwrap();
        fleet.level();
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        for node in 0..NODES {
            check(&plain(&fleet.path(node)), &seen);
        }
        for node in 1..NODES {
            assert_same_pages(&fleet.path(0), &fleet.path(node));
        }
        seen
    }
}

fn check(connection: &Connection, seen: &Seen) {
    let mut twice = connection.prepare("SELECT who, n FROM t GROUP BY who, n HAVING count(*) > 1").unwrap();
    let twice: Vec<(String, i64)> =
        twice.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).unwrap().map(Result::unwrap).collect();
    assert!(twice.is_empty(), "more than once: {twice:?}");
    for (who, last) in &seen.acknowledged {
        let sql = "SELECT count(*) FROM t WHERE who = ?1 AND n <= ?2";
        let rows: i64 = connection.query_row(sql, (who, last), |r| r.get(0)).unwrap();
        assert_eq!(rows, *last, "{who} was told that {last} are there");
    }
}

/// A node as a balancer has it.
struct Node {
    url: String,
    ready: AtomicBool,
}

impl Node {
    fn new(url: String) -> Node {
        Node { url, ready: AtomicBool::new(true) }
    }
}

/// Asks each node all the time whether it is ready, as balancers do. One that drains is not.
async fn balance(nodes: Arc<Vec<Node>>) {
    let client = Http::new();
    loop {
        for node in nodes.iter() {
            let answer = client.get(&format!("{}/-/ready", node.url)).await;
            node.ready.store(answer.is_ok_and(|answer| answer.status == 200), Ordering::Relaxed);
        }
        tokio::time::sleep(PROBE).await;
    }
}

/// Whether a connection ended before the first byte of a response.
fn ended(error: &hyper_util::client::legacy::Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<hyper::Error>());
    source.is_some_and(hyper::Error::is_incomplete_message)
}

/// Writes to the file of each node that runs, past the crate. It is told that it may not, or what it
/// wrote stays.
fn write_beside(paths: Vec<PathBuf>, seen: &Mutex<Seen>, end: &AtomicBool) {
    let open = |path: &PathBuf| {
        let connection = plain(path);
        connection.busy_timeout(Duration::from_millis(2)).unwrap();
        connection
    };
    let connections: Vec<Connection> = paths.iter().map(open).collect();
    let mut n = 0;
    while !end.load(Ordering::Relaxed) {
        for (path, connection) in paths.iter().zip(&connections) {
            // Nothing can refuse what is written to a file that no node has open.
            let Some(run) = Open::run(path) else { continue };
            n += 1;
            let who = format!("{FOREIGN}{n}");
            let done = connection.execute("INSERT INTO t VALUES (?1, 1, 0)", [&who]);
            let same = Open::run(path).is_some_and(|now| now == run);
            let mut seen = seen.lock().unwrap();
            match done {
                Ok(_) if !same => {}
                Ok(_) => {
                    seen.foreign += 1;
                    seen.acknowledged.insert(who, 1);
                }
                Err(replite::rusqlite::Error::SqliteFailure(..)) => seen.refused += 1,
                Err(error) => seen.failed.push(format!("the foreign writer: {error}")),
            }
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

struct Client {
    /// Reads reuse connections.
    kept: Pool<HttpConnector, Body>,
    /// A client can't tell whether a request was read that it sent on a connection which ends.
    fresh: Pool<HttpConnector, Body>,
    nodes: Arc<Vec<Node>>,
    /// The node of the next request.
    next: usize,
    number: usize,
    token: String,
    seen: Arc<Mutex<Seen>>,
    requests: Arc<AtomicUsize>,
}

impl Client {
    /// Writes, and looks for it on another node. After a failure it goes on under another name.
    async fn run(mut self, end: Arc<AtomicBool>) {
        for life in 0.. {
            let who = format!("client{}-{life}", self.number);
            let mut n = 0;
            while !end.load(Ordering::Relaxed) {
                n += 1;
                if self.send("POST", &format!("/{who}/{n}")).await.is_none() {
                    break;
                }
                self.seen.lock().unwrap().acknowledged.insert(who.clone(), n);
                let Some(said) = self.send("GET", &format!("/{who}")).await else { break };
                if said != format!("{n} {n}") {
                    self.seen.lock().unwrap().failed.push(format!("{who} wrote {n}, and is told {said}"));
                }
            }
            if end.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    fn body(&self, method: &str) -> Body {
        match (method, self.number % 4) {
            ("GET", _) => http_body_util::Empty::new().boxed_unsync(),
            (_, 0) => {
                let pieces = unfold(0, |sent| async move {
                    if sent == PIECES {
                        return None;
                    }
                    tokio::time::sleep(PIECE_PAUSE).await;
                    Some((Ok(Frame::data(Bytes::from(vec![b'x'; PIECE_BYTES]))), sent + 1))
                });
                StreamBody::new(pieces).boxed_unsync()
            }
            _ => http_body_util::Full::new(Bytes::from_static(b"small")).boxed_unsync(),
        }
    }

    /// Sends a request to the next node that takes connections. Anything but success is a failure.
    async fn send(&mut self, method: &str, path: &str) -> Option<String> {
        let begin = Instant::now();
        loop {
            self.next += 1;
            let node = &self.nodes[self.next % NODES];
            if !node.ready.load(Ordering::Relaxed) {
                tokio::task::yield_now().await;
                continue;
            }
            let url = format!("{}{path}", node.url);
            let mut request = Request::builder().method(method).uri(&url);
            if !self.token.is_empty() {
                request = request.header("replite-token", &self.token);
            }
            let pool = if method == "GET" { &self.kept } else { &self.fresh };
            let got = pool.request(request.body(self.body(method)).unwrap()).await;
            // As a load balancer does: this node does not listen, so it has seen nothing of it.
            let away = got.as_ref().is_err_and(|error| error.is_connect());
            // As browsers do: the connection was idle, and its end was under way.
            let ended = method == "GET" && got.as_ref().is_err_and(ended);
            if (away || ended) && begin.elapsed() < LIMIT {
                continue;
            }
            return self.note(method, &url, begin, got).await;
        }
    }

    async fn note(
        &mut self,
        method: &str,
        url: &str,
        begin: Instant,
        got: Result<http::Response<hyper::body::Incoming>, hyper_util::client::legacy::Error>,
    ) -> Option<String> {
        let whole = async {
            let (head, body) = got.map_err(|error| format!("{error:?}"))?.into_parts();
            let body = body.collect().await.map_err(|error| format!("{error:?}"))?.to_bytes();
            Ok::<_, String>((head, String::from_utf8_lossy(&body).into_owned()))
        };
        let whole = whole.await;
        let took = begin.elapsed();
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut seen = self.seen.lock().unwrap();
        seen.requests += 1;
        seen.longest = seen.longest.max(took);
        match whole {
            Ok((head, text)) if head.status.is_success() => {
                if let Some(token) = head.headers.get("replite-token") {
                    self.token = token.to_str().unwrap().to_string();
                }
                Some(text)
            }
            Ok((head, text)) => {
                let outcome = head.headers.get("replite-outcome");
                seen.failed
                    .push(format!("{method} {url}: {} {outcome:?} after {took:?}: {text}", head.status));
                None
            }
            Err(error) => {
                seen.failed.push(format!("{method} {url} after {took:?}: {error}"));
                None
            }
        }
    }
}
