//! Three nodes with a lease, each in a process of its own, with an application and its layer.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::routing::{get, post};
use http::Request;
use replite::{Db, Durability, Error, lease};
use rustix::process::Signal;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::io::InspectReader;

use crate::home::{INSERT, SCHEMA, config, directory, runtime};
use crate::http_support::Http;
use crate::support::{Process, hear, own_port, speak, variable};

const NODES: usize = 3;
const LEASE_TIME: Duration = Duration::from_secs(2);
/// The one of members where the configuration does not say it.
const LEASE_TIME_OF_MEMBERS: Duration = Duration::from_secs(3);
/// The longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);
/// Where a process finds its database, if it is one of the nodes.
const MEMBER: &str = "REPLITE_BENCH_MEMBER";

/// Runs as one of the nodes, if this is one.
pub(crate) fn child() -> bool {
    let Some(path) = std::env::var_os(MEMBER) else { return false };
    runtime().block_on(member(&PathBuf::from(path)));
    true
}

/// What happened in this process, and when.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<(SystemTime, String)>>>);

impl Told {
    fn say(&self, what: String) {
        self.0.lock().expect("a list").push((SystemTime::now(), what));
    }

    /// With what was decided, in the order of time: milliseconds and words in each line.
    fn lines(&self, db: &Db) -> String {
        let mut all = self.0.lock().expect("a list").clone();
        all.extend(db.status().decisions.into_iter().map(|decision| (decision.at, decision.what)));
        all.sort();
        all.iter().map(|(at, what)| format!("{} {what}\n", millis(*at))).collect()
    }
}

fn millis(at: SystemTime) -> u128 {
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis())
}

async fn member(path: &Path) {
    let told = Told::default();
    told.say("runs".into());
    let (name, port) = (variable("NAME"), variable("PORT"));
    let (urls, lease_time) = (variable("URLS"), variable("LEASE_MS"));
    let urls: Vec<&str> = urls.split(' ').collect();
    let listener = TcpListener::bind(format!("127.0.0.1:{port}")).await.expect("a port");
    let config = config(path)
        .durability(Durability::Synced)
        .advertise(urls[name.parse::<usize>().expect("a number")])
        .lease_time(Duration::from_millis(lease_time.parse().expect("a number")))
        .migrate(|c| c.execute_batch(SCHEMA));
    let config = if variable("STORE") == "members" {
        config.lease(lease::Members::new(urls))
    } else {
        config.lease(lease::Directory::new(path.with_file_name("lease"))).bootstrap(NODES)
    };
    let db = Db::open(config).await.expect("a node");
    told.say("is open".into());
    let (mut roles, changes) = (db.roles(), told.clone());
    tokio::spawn(async move {
        loop {
            let now = roles.borrow_and_update().clone();
            changes.say(format!("{:?} {:?}", now.role, now.waits_for));
            if roles.changed().await.is_err() {
                return;
            }
        }
    });
    let writing = db.clone();
    let write = move || {
        let (db, name) = (writing.clone(), name.clone());
        async move {
            db.write(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([1])?)).await?;
            Ok::<_, Error>(name)
        }
    };
    let standing = {
        let db = db.clone();
        move || async move { format!("{:?} {:?}", db.role(), db.position()) }
    };
    let leads = {
        let db = db.clone();
        move || async move {
            let view = db.members().await;
            view.is_ok_and(|view| view.members.iter().any(|m| m.leads && m.url.contains(&port))).to_string()
        }
    };
    let lines = {
        let db = db.clone();
        move || async move { told.lines(&db) }
    };
    let app = Router::new()
        .route("/", post(write))
        .layer(db.replay_layer())
        .route("/standing", get(standing))
        .route("/leads", get(leads))
        .route("/told", get(lines))
        .nest_service("/_replite", db.service());
    // It ends with the process that started it.
    std::thread::spawn(hear);
    speak("serves");
    axum::serve(listener, app).await.expect("a server");
}

/// Passes on to a port of this machine what comes, and counts it, either way.
async fn relay(listener: TcpListener, port: u16, bytes: Arc<AtomicU64>) {
    while let Ok((from, _)) = listener.accept().await {
        let bytes = bytes.clone();
        tokio::spawn(async move {
            let Ok(to) = TcpStream::connect(("127.0.0.1", port)).await else { return };
            let _ = (from.set_nodelay(true), to.set_nodelay(true));
            let count = |piece: &[u8]| {
                bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
            };
            let (mut from, mut to) = (InspectReader::new(from, count), InspectReader::new(to, count));
            let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
        });
    }
}

/// Where the record of their lease is.
#[derive(Clone, Copy)]
pub(crate) enum Record {
    Directory,
    Members,
}

/// The processes, as the one that started them sees them.
pub(crate) struct Members {
    processes: Vec<Process>,
    ports: Vec<u16>,
    /// Where they reach each other.
    urls: String,
    record: Record,
    lease_time: Duration,
    dir: tempfile::TempDir,
}

impl Members {
    pub(crate) fn start(record: Record) -> Members {
        let ports: Vec<u16> = (0..NODES).map(|_| own_port()).collect();
        Members::at(record, LEASE_TIME, ports.clone(), &ports)
    }

    /// They keep the record, and all that goes from one to another is counted.
    pub(crate) fn counted(bytes: &Arc<AtomicU64>) -> Members {
        let ports: Vec<u16> = (0..NODES).map(|_| own_port()).collect();
        let relays = ports.iter().map(|port| {
            let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).expect("a port");
            let at = listener.local_addr().expect("an address").port();
            runtime().spawn(relay(listener, *port, bytes.clone()));
            at
        });
        let relays: Vec<u16> = relays.collect();
        Members::at(Record::Members, LEASE_TIME_OF_MEMBERS, ports, &relays)
    }

    /// Processes at these ports, which reach each other at those.
    fn at(record: Record, lease_time: Duration, ports: Vec<u16>, reached: &[u16]) -> Members {
        let urls: Vec<String> = reached.iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
        let (processes, urls, dir) = (Vec::new(), urls.join(" "), directory());
        let mut members = Members { processes, ports, urls, record, lease_time, dir };
        for node in 0..NODES {
            let process = members.process(node);
            members.processes.push(process);
        }
        members
    }

    fn process(&self, node: usize) -> Process {
        let path = self.dir.path().join(format!("{node}.db"));
        let (path, name, port) =
            (path.to_str().expect("text"), node.to_string(), self.ports[node].to_string());
        let store = match self.record {
            Record::Directory => "directory",
            Record::Members => "members",
        };
        let time = self.lease_time.as_millis().to_string();
        let lease = [("STORE", store), ("URLS", self.urls.as_str()), ("LEASE_MS", time.as_str())];
        let node = [(MEMBER, path), ("NAME", &name), ("PORT", &port)];
        Process::start(crate::node_process, &[&node[..], &lease[..]].concat())
    }

    pub(crate) fn start_again(&mut self, node: usize) {
        self.processes[node] = self.process(node);
    }

    /// SIGKILL, and when.
    pub(crate) fn kill(&self, node: usize) -> SystemTime {
        self.processes[node].signal(Signal::KILL);
        SystemTime::now()
    }

    /// Returns when a node that was killed has ended.
    pub(crate) fn reap(&mut self, node: usize) {
        self.processes[node].wait(LIMIT);
    }

    /// Another node. Which one changes every second round: of two nodes that lead in turn it is
    /// sometimes the next one, and sometimes the third.
    pub(crate) fn other(&self, node: usize, round: usize) -> usize {
        (node + 1 + round / 2 % (NODES - 1)) % NODES
    }

    fn url(&self, node: usize, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.ports[node])
    }

    fn get(&self, node: usize, path: &str) -> Option<String> {
        let answer = runtime().block_on(Http::new().get(&self.url(node, path))).ok()?;
        (answer.status == 200).then(|| answer.text())
    }

    /// Whether it leads those that keep the record.
    pub(crate) fn leads_members(&self, node: usize) -> bool {
        self.get(node, "/leads").is_some_and(|leads| leads == "true")
    }

    /// Waits until one leads and all have what it has. Which one that is.
    pub(crate) fn level(&self) -> usize {
        let begin = Instant::now();
        loop {
            let all: Vec<Option<String>> = (0..NODES).map(|node| self.get(node, "/standing")).collect();
            let words: Vec<(&str, &str)> =
                all.iter().flatten().filter_map(|standing| standing.split_once(' ')).collect();
            let leads = words.iter().position(|(role, _)| *role == "Primary");
            if let Some(leads) = leads
                && words.len() == NODES
                && words.iter().all(|(role, _)| matches!(*role, "Primary" | "Replica"))
                && words.iter().filter(|(role, _)| *role == "Primary").count() == 1
                && words.iter().all(|(_, position)| *position == words[0].1)
            {
                return leads;
            }
            assert!(begin.elapsed() < LIMIT, "they are never level: {all:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Writes through a node's layer until that says that it is done. Which node did it.
    pub(crate) fn write(&self, through: usize) -> usize {
        let (client, begin) = (Http::new(), Instant::now());
        loop {
            let request = Request::post(self.url(through, "/")).body("").expect("a request");
            match runtime().block_on(client.send(request)) {
                Ok(answer) if answer.status == 200 => return answer.text().parse().expect("a name"),
                other => assert!(begin.elapsed() < LIMIT, "nothing is written: {other:?}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Shows what the nodes did since.
    pub(crate) fn show(&self, since: SystemTime) {
        for node in 0..NODES {
            for line in self.get(node, "/told").unwrap_or_default().lines() {
                let (at, what) = line.split_once(' ').unwrap_or_default();
                let after = at.parse::<i128>().unwrap_or(0) - millis(since) as i128;
                if after > -600 {
                    eprintln!("  {node}: {after:5} ms {what}");
                }
            }
        }
    }
}
