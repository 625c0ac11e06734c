//! Three nodes with a lease, each a process with an application, and clients that check what they
//! wrote: for tests and figures of what a handoff and a deploy cost.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path as Param, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use bytes::Bytes;
use http::Request;
use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Role, lease};
use rustix::fs::{FlockOperation, flock};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::app::ForwardWay;
use crate::http_support::Http;
use crate::support::*;

mod load;

pub(crate) use load::{Load, Seen};

pub(crate) const NODES: usize = 3;
/// For how long a node that drained still takes connections: until the balancer knows.
const LINGER: Duration = Duration::from_millis(250);

const TABLE: &str = "CREATE TABLE IF NOT EXISTS t(who TEXT, n INTEGER, size INTEGER);
    CREATE INDEX IF NOT EXISTS i ON t(who, n)";

/// `POST /{who}/{n}` notes the number and the body's size, `GET /{who}` says the highest number and
/// how many there are.
fn routes(db: &Db) -> Router {
    async fn add(
        State(db): State<Db>,
        Param((who, n)): Param<(String, i64)>,
        body: Bytes,
    ) -> Result<String, Error> {
        let size = body.len() as i64;
        db.write(move |tx| Ok::<_, Error>(tx.execute("INSERT INTO t VALUES (?1, ?2, ?3)", (who, n, size))?))
            .await?;
        Ok(n.to_string())
    }
    async fn last(State(db): State<Db>, Param(who): Param<String>) -> Result<String, Error> {
        let sql = "SELECT coalesce(max(n), 0), count(*) FROM t WHERE who = ?1";
        let read = move |c: &Connection| {
            Ok::<_, Error>(c.query_row(sql, [who], |r| Ok((r.get::<_, i64>(0)?, r.get::<_, i64>(1)?)))?)
        };
        let (last, rows) = db.read_async(read).await?;
        Ok(format!("{last} {rows}"))
    }
    Router::new()
        .route("/{who}/{n}", post(add))
        .route("/{who}", get(last))
        .layer(DefaultBodyLimit::max(16 * 1024 * 1024))
        .with_state(db.clone())
}

/// A node as the documentation's `main` runs it, until SIGTERM.
pub(crate) fn run_member() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let port: u16 = variable("PORT").parse().unwrap();
        let path = PathBuf::from(variable("DB"));
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let config = Config::new(&path)
            .database("app")
            .secret(secret())
            .advertise(format!("http://127.0.0.1:{port}"))
            .lease(lease::Directory::new(path.with_file_name("lease")))
            .bootstrap(NODES)
            .migrate(|conn| conn.execute_batch(TABLE));
        let db = Db::open(config).await.unwrap();
        let standing = {
            let db = db.clone();
            move || async move { format!("{} {:?}", db.role(), db.position()) }
        };
        let ready = {
            let db = db.clone();
            move || async move {
                if db.health().can_read { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
            }
        };
        let tenures = Tenures::default();
        for _ in 0..std::env::var("WRITERS").map_or(0, |number| number.parse().unwrap()) {
            tokio::spawn(tenures.clone().write(db.clone()));
        }
        let hand_over = {
            let db = db.clone();
            move || async move { Ok::<_, Error>(db.handoff(None).await?.addresses.app) }
        };
        let app = routes(&db)
            .layer(db.replay_layer())
            .route("/-/standing", get(standing))
            .route("/-/ready", get(ready))
            .route("/-/handoff", post(hand_over))
            .route("/-/tenure", get(move || async move { tenures.last() }));
        if std::env::var_os("CHANNEL").is_some() {
            db.serve_forwarded(app.clone()).unwrap();
        }
        let app = app.nest_service("/_replite", db.service());
        let mut asked = signal(SignalKind::terminate()).unwrap();
        let draining = db.clone();
        let mut server = tokio::spawn(
            axum::serve(listener, app)
                .with_graceful_shutdown(async move {
                    asked.recv().await;
                    draining.drain().await;
                    tokio::time::sleep(LINGER).await;
                })
                .into_future(),
        );
        db.ready().await.unwrap();
        let open = Open::say(&path);
        speak("ready");
        // It ends with the process that started it.
        std::thread::spawn(hear);
        tokio::select! {
            served = &mut server => served.unwrap().unwrap(),
            () = async { db.draining().await; tokio::time::sleep(Duration::from_secs(10)).await } => server.abort(),
        }
        drop(open);
        note_decisions(&db, &path);
        db.shutdown().await;
        std::process::exit(0);
    });
}

/// Keeps what a run decided, for a test that fails.
fn note_decisions(db: &Db, path: &Path) {
    let mut options = File::options();
    let mut file = options.create(true).append(true).open(path.with_extension("decisions")).unwrap();
    let port = variable("PORT");
    for decision in db.status().decisions {
        let at = decision.at.duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap().as_millis();
        writeln!(file, "{at} {port}: {} {:?}", decision.what, decision.answers).unwrap();
    }
}

/// When a process that writes all the time was told of its first commit, and of its last one: of each
/// time that it led.
#[derive(Clone, Default)]
struct Tenures(Arc<Mutex<Vec<(u64, u64)>>>);

impl Tenures {
    /// Writes while this node leads.
    async fn write(self, db: Db) {
        let mut roles = db.roles();
        while roles.wait_for(|now| now.role == Role::Primary).await.is_ok() {
            let insert = "INSERT INTO t VALUES ('writer', 0, 0)";
            let written = db.write(|tx| Ok::<_, Error>(tx.prepare_cached(insert)?.execute([])?)).await;
            self.note(written.is_ok());
            tokio::task::yield_now().await;
        }
    }

    fn note(&self, written: bool) {
        let mut all = self.0.lock().unwrap();
        match all.last_mut() {
            Some((_, last)) if written && *last != 0 => *last = micros(),
            _ if written => all.push((micros(), micros())),
            // The next one is of the next time.
            Some((_, last)) if *last != 0 => all.push((0, 0)),
            _ => {}
        }
    }

    fn last(&self) -> String {
        let all = self.0.lock().unwrap();
        let (first, last) = all.iter().rfind(|(_, last)| *last != 0).copied().unwrap_or_default();
        format!("{first} {last}")
    }
}

/// Of a clock that all processes share.
fn micros() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// Says by a lock that a node has its database open, and by what is in the file which run it is.
struct Open {
    _locked: File,
}

impl Open {
    fn path(database: &Path) -> PathBuf {
        database.with_extension("open")
    }

    fn say(database: &Path) -> Open {
        let mut options = File::options();
        let mut file = options.create(true).truncate(false).write(true).open(Open::path(database)).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        file.set_len(0).unwrap();
        file.write_all(std::process::id().to_string().as_bytes()).unwrap();
        Open { _locked: file }
    }

    /// The run that has it open.
    fn run(database: &Path) -> Option<String> {
        let mut file = File::open(Open::path(database)).ok()?;
        let free = flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
        let mut run = String::new();
        file.read_to_string(&mut run).ok()?;
        (!free && !run.is_empty()).then_some(run)
    }
}

/// The nodes, as the one that started them sees them.
pub(crate) struct Fleet {
    processes: Vec<Option<Process>>,
    ports: Vec<u16>,
    dir: tempfile::TempDir,
    /// So many tasks of each process write while it leads.
    writers: usize,
    way: ForwardWay,
    runtime: tokio::runtime::Runtime,
}

impl Fleet {
    pub(crate) fn start(dir: tempfile::TempDir, writers: usize, way: ForwardWay) -> Fleet {
        let ports = (0..NODES).map(|_| own_port()).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut fleet = Fleet { processes: Vec::new(), ports, dir, writers, way, runtime };
        for node in 0..NODES {
            let process = fleet.process(node);
            fleet.processes.push(Some(process));
        }
        for process in fleet.processes.iter().flatten() {
            process.expect("ready");
        }
        fleet
    }

    fn process(&self, node: usize) -> Process {
        let (path, port, writers) = (self.path(node), self.ports[node].to_string(), self.writers.to_string());
        let path = path.to_str().unwrap();
        let mut variables = vec![("DB", path), ("PORT", &*port), ("WRITERS", &writers)];
        variables.extend(self.way.variables());
        Process::start(crate::fleet_process, &variables)
    }

    pub(crate) fn path(&self, node: usize) -> PathBuf {
        self.dir.path().join(format!("{node}.db"))
    }

    fn urls(&self) -> Vec<String> {
        self.ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect()
    }

    /// SIGTERM, the end, and a new process that is ready. How long the end took.
    pub(crate) fn restart(&mut self, node: usize) -> Duration {
        let took = self.processes[node].take().expect("a process").end();
        let next = self.process(node);
        next.expect("ready");
        self.processes[node] = Some(next);
        took
    }

    /// Waits until one leads and all have what it has. Which one that is.
    pub(crate) fn level(&self) -> usize {
        let mut led = None;
        until("they are level", || {
            let all: Vec<String> = (0..NODES).filter_map(|node| self.get(node, "/-/standing")).collect();
            let words: Vec<_> = all.iter().filter_map(|standing| standing.split_once(' ')).collect();
            led = words.iter().position(|(role, _)| *role == "primary");
            words.len() == NODES
                && words.iter().all(|(_, position)| *position == words[0].1)
                && words.iter().filter(|(role, _)| *role == "replica").count() == NODES - 1
        });
        led.expect("a primary")
    }

    fn get(&self, node: usize, path: &str) -> Option<String> {
        let answer = self.runtime.block_on(Http::new().get(&format!("{}{path}", self.urls()[node]))).ok()?;
        (answer.status == 200).then(|| answer.text())
    }

    /// The node that leads.
    fn leads(&self) -> usize {
        let mut led = None;
        until("one leads", || {
            let leads =
                |node: &usize| self.get(*node, "/-/standing").is_some_and(|s| s.starts_with("primary "));
            led = (0..NODES).find(leads);
            led.is_some()
        });
        led.expect("a primary")
    }

    /// When a node was told of its first and of its last commit, since it leads.
    fn tenure(&self, node: usize) -> (u64, u64) {
        let said = self.get(node, "/-/tenure").unwrap_or_default();
        said.split_once(' ').map_or((0, 0), |(first, last)| (first.parse().unwrap(), last.parse().unwrap()))
    }

    /// Has the primary hand its lease over, while all write that lead. The time between the last
    /// commit on the one side and the first one on the other.
    pub(crate) fn hand_over(&self) -> Duration {
        let led = self.leads();
        let begun = micros();
        until("it writes", || self.tenure(led).1 > begun);
        let request = Request::post(format!("{}/-/handoff", self.urls()[led])).body("").unwrap();
        let answer = self.runtime.block_on(Http::new().send(request)).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let leads = self.urls().iter().position(|url| *url == answer.text()).expect("one of them");
        until("the next one writes", || self.tenure(leads).0 > begun);
        let (last, first) = (self.tenure(led).1, self.tenure(leads).0);
        assert!(first > last, "two wrote at once: {last} on the one side, {first} on the other");
        Duration::from_micros(first - last)
    }

    pub(crate) fn end(mut self) {
        for process in self.processes.iter_mut().filter_map(Option::take) {
            process.end();
        }
    }
}

/// Ends and starts each node in turn, so many times, under load. How long each end took.
pub(crate) fn roll(dir: tempfile::TempDir, rounds: usize, way: ForwardWay) -> (Seen, Vec<Duration>) {
    let mut fleet = Fleet::start(dir, 0, way);
    fleet.level();
    let load = Load::start(&fleet);
    let mut ends = Vec::new();
    for round in 0..rounds {
        for node in 0..NODES {
            load.more();
            ends.push(fleet.restart((node + round) % NODES));
        }
    }
    load.more();
    let seen = load.end(&fleet);
    let files = (0..NODES).map(|node| fleet.path(node).with_extension("decisions"));
    if !seen.failed.is_empty() {
        let mut lines: Vec<String> = Vec::new();
        for text in files.filter_map(|file| std::fs::read_to_string(file).ok()) {
            lines.extend(text.lines().map(str::to_string));
        }
        lines.sort();
        lines.iter().for_each(|line| eprintln!("{line}"));
    }
    fleet.end();
    (seen, ends)
}
