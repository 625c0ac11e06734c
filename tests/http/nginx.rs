//! nginx as Debian packages it, with its own retries, round robin before three nodes that are
//! processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::Request;

use crate::app::*;
use crate::http_support::*;
use crate::support::*;

/// How far the replicas are behind: long enough that a read without a token misses its write.
const DELAY: Duration = Duration::from_millis(15);
/// Clients with a cookie, and as many with the header.
const CLIENTS: usize = 8;

/// Three nodes, whose stream is delayed, and nginx before them.
struct Site {
    dir: tempfile::TempDir,
    ports: [u16; 3],
    layer: &'static str,
    primary: Option<Process>,
    _replicas: Vec<Process>,
    _wire: Wire,
    _nginx: Process,
    url: String,
}

impl Site {
    async fn start(layer: &'static str) -> Site {
        let dir = tempfile::tempdir().unwrap();
        let ports = [own_port(), own_port(), own_port()];
        let wire = Wire::start(([127, 0, 0, 1], ports[0]).into(), DELAY).await;
        let follows = format!("http://{}", wire.address);
        let primary = start(dir.path(), ports[0], "", layer);
        primary.expect("ready");
        let replicas: Vec<Process> =
            ports[1..].iter().map(|port| start(dir.path(), *port, &follows, layer)).collect();
        let (nginx, url) = tokio::task::block_in_place(|| {
            replicas.iter().for_each(|replica| drop(replica.expect("ready")));
            balancer(dir.path(), ports)
        });
        let primary = Some(primary);
        let site = Site { dir, ports, layer, primary, _replicas: replicas, _wire: wire, _nginx: nginx, url };
        let client = Http::new();
        within("nginx answers", async {
            while !client.get(&site.url).await.is_ok_and(|a| a.status == 200) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        site
    }

    fn database(&self) -> PathBuf {
        database(self.dir.path(), self.ports[0])
    }

    fn kill_primary(&mut self) {
        self.primary.take().unwrap().kill();
    }

    fn start_primary(&mut self) {
        let primary = start(self.dir.path(), self.ports[0], "", self.layer);
        primary.expect("ready");
        self.primary = Some(primary);
    }

    /// How often each note is in the primary's table.
    fn notes(&self) -> BTreeMap<String, i64> {
        let conn = plain(&self.database());
        let mut all = conn.prepare("SELECT text, count(*) FROM notes GROUP BY text").unwrap();
        all.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(Result::unwrap).collect()
    }
}

/// With or without the layer.
fn start(dir: &Path, port: u16, follows: &str, layer: &str) -> Process {
    node(dir, port, None, follows, &[("LAYER", layer)])
}

/// nginx that sends each request to the next node in turn.
fn balancer(dir: &Path, ports: [u16; 3]) -> (Process, String) {
    let port = own_port();
    let [a, b, c] = ports;
    let http = format!(
        "upstream nodes {{
             server 127.0.0.1:{a}; server 127.0.0.1:{b}; server 127.0.0.1:{c};
             keepalive 16;
         }}
         server {{
             listen 127.0.0.1:{port};
             location / {{
                 proxy_pass http://nodes;
                 proxy_http_version 1.1;
                 proxy_set_header Connection \"\";
                 proxy_set_header Host $host;
             }}
         }}"
    );
    (nginx(dir, port, &http), format!("http://127.0.0.1:{port}/"))
}

/// How a client carries its token.
#[derive(Clone, Copy, PartialEq)]
enum Carries {
    Cookie,
    Header,
}

/// What a client saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) acknowledged: Vec<String>,
    /// Failed, and said to have had no effect.
    pub(crate) not_executed: Vec<String>,
    /// Failed otherwise.
    pub(crate) unknown: Vec<String>,
    /// Those of them that a node said this of.
    pub(crate) said_unknown: usize,
    /// Reads that succeeded but missed the client's own write.
    pub(crate) missed: Vec<String>,
    /// Reads that had to find a write.
    reads: usize,
}

struct User {
    name: String,
    http: Http,
    carries: Carries,
    token: Option<String>,
    seen: Seen,
}

impl User {
    fn request(&self, method: &str, url: &str) -> http::request::Builder {
        let request = Request::builder().method(method).uri(url);
        match (&self.token, self.carries) {
            (None, _) => request,
            (Some(token), Carries::Cookie) => request.header("cookie", format!("a=b; {token}")),
            (Some(token), Carries::Header) => request.header("replite-token", token),
        }
    }

    fn learn(&mut self, answer: &Answer) {
        let token = match self.carries {
            Carries::Cookie => answer.cookie(),
            Carries::Header => answer.headers.get("replite-token").map(|v| v.to_str().unwrap().to_string()),
        };
        self.token = token.or(self.token.take());
    }

    /// Writes to one address and reads from the other.
    async fn turn(&mut self, write_to: &str, read_from: &str, n: usize) {
        let text = format!("{}-{n}", self.name);
        let request = self.request("POST", write_to).body(text.clone()).unwrap();
        let answer = self.http.send(request).await;
        match &answer {
            Ok(answer) if answer.status == 201 => self.learn(answer),
            Ok(answer) if answer.header("replite-outcome") == "not-executed" => {
                return self.seen.not_executed.push(format!("{text}: {}", answer.text()));
            }
            Ok(answer) => {
                // nginx's own have no outcome: nobody knows.
                let outcome = answer.header("replite-outcome");
                assert!(["unknown", ""].contains(&outcome), "{answer:?}");
                assert!([500, 502, 503, 504].contains(&answer.status), "{answer:?}");
                self.seen.said_unknown += usize::from(!outcome.is_empty());
                return self.seen.unknown.push(text);
            }
            Err(_) => return self.seen.unknown.push(text),
        }
        self.seen.acknowledged.push(text.clone());
        let request = self.request("GET", &format!("{read_from}?{text}")).body("").unwrap();
        match self.http.send(request).await {
            Ok(answer) if answer.status == 200 => {
                self.learn(&answer);
                self.seen.reads += 1;
                if answer.text() != "1" {
                    self.seen.missed.push(format!("{text} is there {} times", answer.text()));
                }
            }
            Ok(answer) => assert!([502, 503, 504].contains(&answer.status), "{answer:?}"),
            Err(_) => {}
        }
    }
}

/// Clients that write and read until they are told to stop.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<Seen>>,
}

impl Load {
    pub(crate) fn start(write_to: &str, read_from: &str) -> Load {
        let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for (carries, kind) in [(Carries::Cookie, "cookie"), (Carries::Header, "header")] {
            for i in 0..CLIENTS {
                let (stop, acknowledged) = (stop.clone(), acknowledged.clone());
                let (write_to, read_from) = (write_to.to_string(), read_from.to_string());
                tasks.push(tokio::spawn(async move {
                    let (name, seen) = (format!("{kind}{i}"), Seen::default());
                    let mut user = User { name, http: Http::new(), carries, token: None, seen };
                    for n in 0.. {
                        if stop.load(Ordering::SeqCst) {
                            break;
                        }
                        let before = user.seen.acknowledged.len();
                        user.turn(&write_to, &read_from, n).await;
                        acknowledged.fetch_add(user.seen.acknowledged.len() - before, Ordering::SeqCst);
                    }
                    user.seen
                }));
            }
        }
        Load { stop, acknowledged, tasks }
    }

    /// Returns once so many more writes are acknowledged.
    pub(crate) async fn more(&self, writes: usize) {
        let goal = self.acknowledged.load(Ordering::SeqCst) + writes;
        within("more writes", async {
            while self.acknowledged.load(Ordering::SeqCst) < goal {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    pub(crate) async fn end(self) -> Seen {
        self.stop.store(true, Ordering::SeqCst);
        let mut all = Seen::default();
        for task in self.tasks {
            let seen = within("a client", task).await.unwrap();
            assert!(!seen.acknowledged.is_empty(), "a client got nothing done");
            all.acknowledged.extend(seen.acknowledged);
            all.not_executed.extend(seen.not_executed);
            all.unknown.extend(seen.unknown);
            all.said_unknown += seen.said_unknown;
            all.missed.extend(seen.missed);
            all.reads += seen.reads;
        }
        println!(
            "acknowledged {}, not executed {}, unknown {}, reads {}, missed {}",
            all.acknowledged.len(),
            all.not_executed.len(),
            all.unknown.len(),
            all.reads,
            all.missed.len()
        );
        all
    }
}

/// Writes that were refused without effect, one of each of so many clients.
async fn refusals(url: &str, number: usize) -> Vec<String> {
    let one = async |client: usize| {
        let http = Http::new();
        for n in 0.. {
            let text = format!("refused{client}-{n}");
            let answer = http.send(Request::post(url).body(text.clone()).unwrap()).await;
            if answer.is_ok_and(|a| a.header("replite-outcome") == "not-executed") {
                return text;
            }
        }
        unreachable!()
    };
    futures_util::future::join_all((0..number).map(one)).await
}

/// Compares what the clients were told with what is in the table.
pub(crate) fn assert_told_the_truth(seen: &Seen, notes: &BTreeMap<String, i64>) {
    for text in &seen.acknowledged {
        assert_eq!(notes.get(text), Some(&1), "{text} was acknowledged");
    }
    for text in &seen.not_executed {
        assert_eq!(notes.get(text), None, "{text} was said to have had no effect");
    }
    let twice: Vec<_> = notes.iter().filter(|(_, n)| **n > 1).collect();
    assert!(twice.is_empty(), "executed twice: {twice:?}");
    let known = seen.acknowledged.len() + seen.unknown.len();
    assert!(notes.len() <= known, "{} notes of {known}", notes.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn behind_nginx_every_client_reads_its_own_writes_and_no_write_runs_twice() {
    let site = Site::start("yes").await;
    let load = Load::start(&site.url, &site.url);
    load.more(600).await;
    let seen = load.end().await;
    assert_eq!(seen.missed, [""; 0]);
    assert!(seen.reads >= 600, "{} reads", seen.reads);
    assert_eq!((seen.unknown.len(), seen.not_executed.len()), (0, 0), "nothing failed");
    assert_told_the_truth(&seen, &site.notes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn behind_nginx_a_primary_that_is_killed_under_load_makes_no_write_run_twice_and_none_is_lost() {
    let mut site = Site::start("yes").await;
    let load = Load::start(&site.url, &site.url);
    for _ in 0..3 {
        load.more(150).await;
        tokio::task::block_in_place(|| {
            site.kill_primary();
            site.start_primary();
        });
    }
    load.more(150).await;
    // Away until requests are refused.
    site.kill_primary();
    let refused = within("refusals", refusals(&site.url, 5)).await;
    tokio::task::block_in_place(|| site.start_primary());
    load.more(150).await;
    let mut seen = load.end().await;
    assert_eq!(seen.missed, [""; 0]);
    seen.not_executed.extend(refused);
    assert_told_the_truth(&seen, &site.notes());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn behind_nginx_without_the_layer_clients_miss_their_own_writes() {
    let site = Site::start("no").await;
    let primary = format!("http://127.0.0.1:{}/", site.ports[0]);
    let load = Load::start(&primary, &site.url);
    load.more(300).await;
    let seen = load.end().await;
    assert!(
        seen.missed.len() > seen.reads / 10,
        "{} of {} reads: the other tests prove nothing",
        seen.missed.len(),
        seen.reads
    );
}
