//! A member in a process of its own, for those that are killed.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use replite::{Db, Error, lease};
use serde_json::{Value, json};

use crate::support::*;
use crate::world::{TIME, World, config, raft_leader, words, write_on};

/// Between two writes of a client.
const PAUSE: Duration = Duration::from_millis(2);

/// What a client that writes all the time saw.
#[derive(Default)]
struct Written {
    last: i64,
    longest: Duration,
    failed: Vec<String>,
}

#[test]
#[ignore = "runs as the child of another test"]
fn node_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let members = lease::Members::new(variable("MEMBERS").split(' '));
    let path = variable("DATABASE");
    let config = config(Path::new(&path), variable("PORT").parse().unwrap(), members);
    let db = runtime.block_on(Db::open(config)).unwrap();
    speak("open");
    let (written, stop) = (Arc::<Mutex<Written>>::default(), Arc::<AtomicBool>::default());
    loop {
        let said = hear();
        match said.as_str() {
            "look" => speak(&format!("look {}", runtime.block_on(look(&db)))),
            "write" => {
                stop.store(false, Ordering::SeqCst);
                runtime.spawn(write_on_and_on(db.clone(), written.clone(), stop.clone()));
            }
            "written" => {
                let Written { last, longest, failed } = &*written.lock().unwrap();
                speak(&format!("written {}", json!([last, longest.as_millis() as u64, failed])));
            }
            "end" => {
                runtime.block_on(db.shutdown());
                speak("ended");
                std::process::exit(0);
            }
            other => panic!("{other}"),
        }
    }
}

async fn look(db: &Db) -> Value {
    let view = db.members().await.unwrap();
    let count = |conn: &replite::rusqlite::Connection| {
        Ok::<i64, Error>(conn.query_row("SELECT coalesce(max(v), 0) FROM t", [], |row| row.get(0))?)
    };
    json!({
        "role": db.role().to_string(),
        "leads": raft_leader(&view),
        "agree": view.agree,
        "last": db.read(count).ok(),
        "words": words(db),
    })
}

/// Until the node is the primary no more, or the test says so. A write that was acknowledged is
/// told at once.
async fn write_on_and_on(db: Db, written: Arc<Mutex<Written>>, stop: Arc<AtomicBool>) {
    let mut value = written.lock().unwrap().last;
    while !stop.load(Ordering::SeqCst) {
        value += 1;
        let begun = Instant::now();
        let wrote = write_on(&db, value).await;
        if !note(&mut written.lock().unwrap(), wrote.err(), value, begun.elapsed()) {
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether the write was done.
fn note(seen: &mut Written, error: Option<Error>, value: i64, took: Duration) -> bool {
    seen.longest = seen.longest.max(took);
    match &error {
        None => {
            seen.last = value;
            speak(&format!("ack {value}"));
        }
        Some(error) => seen.failed.push(format!("after {took:?}: {error}")),
    }
    error.is_none()
}

pub(crate) struct Node {
    pub(crate) number: usize,
    pub(crate) url: String,
    pub(crate) process: Process,
}

/// What one says of itself and the others.
#[derive(Clone, Debug)]
pub(crate) struct Look(pub(crate) Value);

impl Look {
    pub(crate) fn is_primary(&self) -> bool {
        self.0["role"] == "primary"
    }

    /// Whether it takes writes. Where the lease was slow to come, it may have passed by then, until
    /// it is renewed.
    fn leads(&self) -> bool {
        self.is_primary() && !self.words().contains("the lease has ended")
    }

    pub(crate) fn leader(&self) -> Option<&str> {
        self.0["leads"].as_str()
    }

    pub(crate) fn agree(&self) -> bool {
        self.0["agree"] == true
    }

    pub(crate) fn words(&self) -> &str {
        self.0["words"].as_str().unwrap()
    }

    pub(crate) fn last(&self) -> Option<i64> {
        self.0["last"].as_i64()
    }
}

impl Node {
    pub(crate) fn start(world: &World, number: usize) -> Node {
        let path = world.path(number);
        let urls: Vec<String> = (0..world.listed).map(|node| world.url(node)).collect();
        let variables = [
            ("DATABASE", path.to_str().unwrap()),
            ("PORT", &world.ports[number].to_string()),
            ("MEMBERS", &urls.join(" ")),
        ];
        let process = Process::start(node_process, &variables);
        process.expect("open");
        Node { number, url: world.url(number), process }
    }

    /// All of the members, once one of them is the primary.
    pub(crate) fn start_all(world: &World) -> Vec<Node> {
        let mut nodes: Vec<Node> = (0..world.listed).map(|number| Node::start(world, number)).collect();
        let primary = primary(&mut nodes);
        let mut looks = || nodes[primary].look();
        until("a primary that all follow", || looks().agree());
        nodes
    }

    pub(crate) fn look(&mut self) -> Look {
        self.process.say("look");
        let said = self.process.expect("look");
        Look(serde_json::from_str(said.strip_prefix("look ").unwrap()).unwrap())
    }

    /// Has a client of it write all the time.
    pub(crate) fn write(&mut self) {
        self.process.say("write");
        self.process.expect("ack");
    }

    /// The last value that was acknowledged, how long the longest write took, and what failed.
    pub(crate) fn written(&mut self) -> (i64, Duration, Vec<String>) {
        self.process.say("written");
        let said = self.process.expect("written");
        let (last, longest, failed): (i64, u64, Vec<String>) =
            serde_json::from_str(said.strip_prefix("written ").unwrap()).unwrap();
        (last, Duration::from_millis(longest), failed)
    }

    /// Kills it. The last value that it acknowledged and told of, if any of what is still to be
    /// heard tells one.
    pub(crate) fn kill(self) -> Option<i64> {
        last_acknowledged(&self.process.kill())
    }

    pub(crate) fn end(mut self) {
        self.process.say("end");
        self.process.expect("ended");
    }
}

fn last_acknowledged(lines: &[String]) -> Option<i64> {
    lines.iter().filter_map(|line| line.strip_prefix("ack ")?.parse().ok()).max()
}

/// The place of the primary, once there is one.
pub(crate) fn primary(nodes: &mut [Node]) -> usize {
    let end = Instant::now() + LIMIT;
    loop {
        for (place, node) in nodes.iter_mut().enumerate() {
            if node.look().leads() {
                return place;
            }
        }
        let words: Vec<Look> = nodes.iter_mut().map(Node::look).collect();
        assert!(Instant::now() < end, "timed out: a primary: {words:#?}");
        std::thread::park_timeout(TIME / 100);
    }
}
