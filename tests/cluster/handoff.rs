//! The lease goes from a primary that lives to a replica that lives: when all is well, when one of
//! them is killed or stopped in the middle of it, over a link that is cut, and under load.
//!
//! `REPLITE_ROUNDS` sets how often a node is killed or stopped (8 if not set), `REPLITE_SEED` when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use replite::rusqlite::Transaction;
use replite::testing::lease::{Faulty, Memory};
use replite::{Config, Db, Error, NodeId, Role, Txid, lease};
use rustix::process::Signal;

use crate::support::*;

/// A node that is stopped for longer may lose its lease.
const LEASE_TIME: Duration = Duration::from_secs(2);
/// So long that a node which is killed is back before another takes its lease: it comes back with
/// all that it acknowledged.
const LONG_LEASE_TIME: Duration = Duration::from_secs(20);

fn elected(dir: &Path, name: &str, port: u16, nodes: usize) -> Config {
    primary(&dir.join(name), port)
        .lease(lease::Directory::new(dir.join("lease")))
        .lease_time(LEASE_TIME)
        .bootstrap(nodes)
}

/// Nodes in this process, with one lease.
async fn open_all(dir: &Path, nodes: usize) -> Vec<Db> {
    let mut dbs = Vec::new();
    for name in ["a.db", "b.db", "c.db"].iter().take(nodes) {
        dbs.push(Db::open(elected(dir, name, 0, nodes)).await.unwrap());
    }
    for db in &dbs {
        within("a state", db.ready()).await.unwrap();
    }
    let led = leader(&dbs).await;
    comes("the replicas", || dbs[led].status().replicas.len() == nodes - 1).await;
    dbs
}

async fn leader(dbs: &[Db]) -> usize {
    comes("a primary", || dbs.iter().any(|db| db.role() == Role::Primary)).await;
    dbs.iter().position(|db| db.role() == Role::Primary).unwrap()
}

async fn all_have(dbs: &[Db], txid: Txid) {
    for db in dbs {
        within("the transaction", db.wait_for_timeout(txid, LIMIT)).await.unwrap();
    }
}

async fn end(dbs: Vec<Db>) {
    for db in dbs {
        within("the end", db.shutdown()).await;
    }
}

/// Hands over, as soon as the replicas know enough to take it.
async fn hand_over(db: &Db, to: Option<NodeId>) -> NodeId {
    within("a handoff", async {
        loop {
            match db.handoff(to).await {
                Ok(primary) => return primary.node,
                Err(Error::HandoffFailed(why)) => eprintln!("not yet: {why}"),
                Err(error) => panic!("{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_handed_to_the_best_replica_and_to_each_that_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let dbs = open_all(dir.path(), 3).await;
    let id = |node: usize| dbs[node].node().node;
    let mut led = leader(&dbs).await;
    let mut n = 0;
    let mut last = insert(&dbs[led], "first", n).await;
    let same = within("to itself", dbs[led].handoff(Some(id(led)))).await.unwrap();
    assert_eq!((same.node, dbs[led].role()), (id(led), Role::Primary));
    for to in [None, Some(0), Some(1), Some(2), Some(0), None] {
        if to == Some(led) {
            continue;
        }
        let node = hand_over(&dbs[led], to.map(id)).await;
        assert!(to.is_none_or(|to| id(to) == node));
        let now = dbs.iter().position(|db| db.node().node == node).unwrap();
        assert_ne!(now, led);
        // The old one follows it, so it leads.
        assert_eq!((dbs[now].role(), dbs[led].role()), (Role::Primary, Role::Replica));
        led = now;
        n += 1;
        let next = insert(&dbs[led], "next", n).await;
        assert!(next.epoch().number() == last.epoch().number() + 1 && next.number() > last.number());
        last = next;
        all_have(&dbs, last).await;
        comes("all streams", || dbs[led].status().replicas.len() == 2).await;
    }
    for db in &dbs {
        assert_eq!(count(db), n + 1);
        assert!(db.lost().await.unwrap().is_empty());
    }
    end(dbs).await;
    assert_same_pages(&dir.path().join("a.db"), &dir.path().join("b.db"));
    assert_same_pages(&dir.path().join("a.db"), &dir.path().join("c.db"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_that_can_not_be_says_why_and_the_primary_leads_on() {
    let dir = tempfile::tempdir().unwrap();
    let alone = open_all(dir.path(), 1).await.remove(0);
    insert(&alone, "alone", 1).await;
    let failed = within("no replica", alone.handoff(None)).await.unwrap_err();
    assert!(matches!(&failed, Error::HandoffFailed(why) if why.contains("no replica")), "{failed:?}");
    insert(&alone, "alone", 2).await;
    within("the drain", alone.drain()).await;
    assert_ne!(alone.role(), Role::Primary, "it is given back");
    within("the end", alone.shutdown()).await;

    let fixed = Db::open(primary(&dir.path().join("fixed.db"), 0)).await.unwrap();
    let failed = within("no lease", fixed.handoff(None)).await.unwrap_err();
    assert!(matches!(failed, Error::Config(_)), "{failed:?}");
    within("the end", fixed.shutdown()).await;

    let dir = tempfile::tempdir().unwrap();
    let dbs = open_all(dir.path(), 2).await;
    let led = leader(&dbs).await;
    let failed = within("a replica", dbs[1 - led].handoff(None)).await.unwrap_err();
    assert!(matches!(failed, Error::NotPrimary { .. }), "{failed:?}");
    let stranger: NodeId = "00000000-0000-0000-0000-00000000000a".parse().unwrap();
    let failed = within("a stranger", dbs[led].handoff(Some(stranger))).await.unwrap_err();
    assert!(
        matches!(&failed, Error::HandoffFailed(why) if why.contains(&stranger.to_string())),
        "{failed:?}"
    );

    // Another connection writes for longer than a handoff waits.
    let foreign = plain(dbs[led].path());
    foreign.execute_batch("BEGIN IMMEDIATE; INSERT INTO t(who, n) VALUES ('foreign', 1)").unwrap();
    let failed = within("a foreign writer", async {
        loop {
            match dbs[led].handoff(None).await.unwrap_err() {
                Error::HandoffFailed(why) if why.contains("no replica") => {}
                failed => break failed,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(matches!(&failed, Error::HandoffFailed(why) if why.contains("write lock")), "{failed:?}");
    assert_eq!(dbs[led].role(), Role::Primary);
    let primary = |db: &Db| db.roles().borrow().primary.as_ref().map(|primary| primary.node);
    let me = dbs[led].node().node;
    comes("requests are taken", || primary(&dbs[led]) == Some(me) && primary(&dbs[1 - led]) == Some(me))
        .await;
    foreign.execute_batch("COMMIT").unwrap();
    let txid = insert(&dbs[led], "after", 1).await;
    all_have(&dbs, txid).await;
    // And now it goes.
    hand_over(&dbs[led], None).await;
    let txid = insert(&dbs[1 - led], "after", 2).await;
    all_have(&dbs, txid).await;
    assert_eq!((count(&dbs[0]), count(&dbs[1])), (3, 3));
    end(dbs).await;
}

/// What a primary whose application ends does with its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_drains_hands_its_lease_over() {
    let dir = tempfile::tempdir().unwrap();
    let mut dbs = open_all(dir.path(), 3).await;
    // The record of a cluster's very first epoch does not say for a moment where that began.
    let led = leader(&dbs).await;
    hand_over(&dbs[led], None).await;
    for n in 0..3 {
        let led = leader(&dbs).await;
        let txid = insert(&dbs[led], "before", n).await;
        all_have(&dbs, txid).await;
        let gone = dbs.remove(led);
        within("the drain", gone.drain()).await;
        if !dbs.is_empty() {
            let decisions = gone.status().decisions;
            assert!(decisions.iter().any(|decision| decision.what.contains("handed")), "{decisions:#?}");
            let led = leader(&dbs).await;
            // Requests that wait on the one that drains find it.
            let node = dbs[led].node().node;
            let knows = || gone.roles().borrow().primary.as_ref().is_some_and(|now| now.node == node);
            comes("it follows", knows).await;
        }
        within("the end", gone.shutdown()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_cut_ends_a_handoff_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let ports = [own_port(), own_port()];
    let mut dbs = Vec::new();
    let mut wires = Vec::new();
    for (name, port) in ["a.db", "b.db"].iter().zip(ports) {
        let wire = Wire::start(([127, 0, 0, 1], port).into(), Duration::ZERO).await;
        let config = elected(dir.path(), name, port, 2).advertise(format!("http://{}", wire.address));
        dbs.push(Db::open(config).await.unwrap());
        wires.push(wire);
    }
    for db in &dbs {
        within("a state", db.ready()).await.unwrap();
    }
    let led = leader(&dbs).await;
    comes("the replica", || dbs[led].status().replicas.len() == 1).await;
    let mut n = 0;
    for pause in [0, 1, 2, 5, 10, 20, 50] {
        let now = leader(&dbs).await;
        let txid = insert(&dbs[now], "before", n).await;
        all_have(&dbs, txid).await;
        let asked = dbs[now].clone();
        let handoff = tokio::spawn(async move { asked.handoff(None).await });
        tokio::time::sleep(Duration::from_millis(pause)).await;
        for wire in &wires {
            wire.let_in(false);
            wire.cut();
        }
        // It fails, or was done before.
        comes("a primary without a link", || dbs.iter().any(|db| db.role() == Role::Primary)).await;
        for wire in &wires {
            wire.let_in(true);
        }
        let outcome = within("its end", handoff).await.unwrap();
        assert!(matches!(outcome, Ok(_) | Err(Error::HandoffFailed(_))), "{outcome:?}");
        n += 1;
    }
    let last = within("a write", next(&dbs)).await;
    all_have(&dbs, last).await;
    for db in &dbs {
        assert_eq!(count(db), n + 1);
        assert!(db.lost().await.unwrap().is_empty());
    }
    end(dbs).await;
}

/// Where the swap that names the other node is done, and no one says so; where it comes late; and
/// where the store is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handoff_over_a_store_that_loses_answers_ends_with_one_primary_and_every_write() {
    let dir = tempfile::tempdir().unwrap();
    let store = Faulty::new(Memory::new().with_lease_time(Duration::from_secs(2)), 7);
    let mut dbs = Vec::new();
    for name in ["a.db", "b.db"] {
        let shared: Arc<dyn lease::Store> = Arc::new(store.clone());
        let config = primary(&dir.path().join(name), 0).lease(shared).bootstrap(2);
        dbs.push(Db::open(config).await.unwrap());
    }
    let led = leader(&dbs).await;
    within("a state", dbs[1 - led].ready()).await.unwrap();
    hand_over(&dbs[led], None).await;
    let (mut handed, mut kept, mut n) = (0, 0, 0);
    for round in 0..12 {
        let led = leader(&dbs).await;
        let txid = within("a write", next(&dbs)).await;
        n += 1;
        all_have(&dbs, txid).await;
        let asked = dbs[led].clone();
        match round % 3 {
            0 => store.lose_answers(0.5),
            1 => store.delay(0.5, Duration::from_millis(700)),
            _ => store.lose_requests(0.5),
        }
        let outcome = within("its end", asked.handoff(None)).await;
        store.calm();
        match outcome {
            Ok(_) => handed += 1,
            Err(Error::HandoffFailed(_) | Error::NotPrimary { .. }) => kept += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    eprintln!("handed over {handed} times, kept {kept} times");
    assert!(handed > 0, "no answer that was lost is found again");
    let txid = within("a write", next(&dbs)).await;
    all_have(&dbs, txid).await;
    comes("one primary", || dbs.iter().filter(|db| db.role() == Role::Primary).count() == 1).await;
    for db in &dbs {
        assert_eq!(count(db), n + 1);
        assert!(db.lost().await.unwrap().is_empty());
    }
    end(dbs).await;
}

/// Writes through whichever leads.
async fn next(dbs: &[Db]) -> Txid {
    loop {
        let led = leader(dbs).await;
        let write = |tx: &mut Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(who, n) VALUES ('next', 1)", [])?)
        };
        match dbs[led].write(write).await {
            Ok(commit) => return commit.txid.unwrap(),
            Err(Error::NotPrimary { .. }) => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(error) => panic!("{error:?}"),
        }
    }
}

/// A node that does what it hears, and writes meanwhile.
#[test]
#[ignore = "runs as the child of another test"]
fn handoff_process() {
    if !is_child() {
        return;
    }
    let (dir, name) = (PathBuf::from(variable("DIR")), variable("NAME"));
    let lease_time = Duration::from_secs(variable("LEASE_TIME").parse().unwrap());
    let config = elected(&dir, &name, variable("PORT").parse().unwrap(), 3).lease_time(lease_time);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let db = runtime.block_on(async { Db::open(config).await.unwrap() });
    let writes = Arc::new(AtomicBool::new(false));
    let writer = Writer { db: db.clone(), name: name.leak(), writes: writes.clone() };
    let busy = writer.busy();
    speak(&format!("open {}", db.node().node));
    loop {
        let line = hear();
        let mut words = line.split(' ');
        match (words.next().unwrap(), words.next()) {
            ("write", None) => writes.store(true, Ordering::SeqCst),
            ("rest", None) => {
                writes.store(false, Ordering::SeqCst);
                drop(busy.lock().unwrap());
                speak("rests");
            }
            ("role", None) => speak(&format!("role {:?}", db.role())),
            ("replicas", None) => speak(&format!("replicas {}", db.status().replicas.len())),
            ("handoff", to) => {
                let to = to.map(|to| to.parse().unwrap());
                let (db, handle) = (db.clone(), runtime.handle().clone());
                std::thread::spawn(move || match handle.block_on(db.handoff(to)) {
                    Ok(primary) => speak(&format!("handed {}", primary.node)),
                    Err(Error::HandoffFailed(why)) => speak(&format!("kept {why}")),
                    Err(Error::NotPrimary { .. }) => speak("kept: it does not lead"),
                    Err(error) => speak(&format!("error {error:?}")),
                });
            }
            // On the primary, once all rest.
            ("where", None) => {
                let sql = "INSERT INTO t(who, n) VALUES ('last', 1)";
                let write = move |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute(sql, [])?);
                match runtime.block_on(db.write(write)) {
                    Ok(commit) => speak(&format!("at {}", commit.txid.unwrap())),
                    Err(_) => speak("at -"),
                }
            }
            ("reach", Some(txid)) => {
                let txid: Txid = txid.parse().unwrap();
                runtime.block_on(db.wait_for_timeout(txid, LIMIT)).unwrap();
                // A kill between the two writes of a commit's last frame leaves what a flipped bit
                // leaves. The node keeps that WAL; nothing acknowledged is in what it cut off.
                let mut lost = runtime.block_on(db.lost()).unwrap();
                lost.retain(|lost| lost.kind != replite::LostKind::Wal);
                speak(&format!("reached {}", lost.len()));
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Writes for as long as its node leads, again and again.
struct Writer {
    db: Db,
    name: &'static str,
    writes: Arc<AtomicBool>,
}

impl Writer {
    /// What it holds while it writes.
    fn busy(self) -> Arc<std::sync::Mutex<()>> {
        let busy = Arc::<std::sync::Mutex<()>>::default();
        let while_it_writes = busy.clone();
        std::thread::spawn(move || {
            loop {
                let writing = while_it_writes.lock().unwrap();
                let wrote = self.writes.load(Ordering::SeqCst).then(|| self.write());
                drop(writing);
                match wrote {
                    Some(Ok(n)) => speak(&format!("ack {} {n} {}", self.name, micros())),
                    Some(Err(Error::NotPrimary { .. } | Error::OutcomeUnknown { .. } | Error::ShutDown)) => {
                        std::thread::park_timeout(Duration::from_micros(200));
                    }
                    Some(Err(error)) => speak(&format!("error {error:?}")),
                    None => std::thread::park_timeout(Duration::from_millis(1)),
                }
            }
        });
        busy
    }

    fn write(&self) -> Result<i64, Error> {
        let name = self.name;
        let write = move |tx: &mut Transaction<'_>| {
            let next = "SELECT coalesce(max(n), 0) + 1 FROM t WHERE who = ?1";
            let n: i64 = tx.query_row(next, [name], |row| row.get(0))?;
            tx.execute("INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(200))", (name, n))?;
            Ok::<_, Error>(n)
        };
        self.db.write_blocking(write).map(|commit| commit.value)
    }
}

fn micros() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros()
}

/// Three processes with one lease.
struct Three {
    dir: tempfile::TempDir,
    ports: [u16; 3],
    lease_time: Duration,
    nodes: Vec<Process>,
    ids: Vec<String>,
    acknowledged: BTreeMap<String, i64>,
}

const HOMES: [&str; 3] = ["a.db", "b.db", "c.db"];

impl Three {
    fn start(lease_time: Duration) -> Three {
        let dir = tempfile::tempdir().unwrap();
        let ports = [own_port(), own_port(), own_port()];
        let (nodes, ids) = (Vec::new(), Vec::new());
        let mut three = Three { dir, ports, lease_time, nodes, ids, acknowledged: BTreeMap::new() };
        for node in 0..3 {
            let process = three.process(node);
            three.ids.push(opened(&process));
            three.nodes.push(process);
        }
        // The record of a cluster's very first epoch does not say for a moment where that began.
        let limit = Instant::now() + LIMIT;
        loop {
            let led = three.leader();
            if three.hand_over(led, None).is_ok() {
                return three;
            }
            assert!(Instant::now() < limit, "no handoff works");
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// Who has the lease then, or why this node keeps it.
    fn hand_over(&mut self, from: usize, to: Option<usize>) -> Result<usize, String> {
        let to = to.map(|to| format!(" {}", self.ids[to])).unwrap_or_default();
        self.nodes[from].say(&format!("handoff{to}"));
        self.handed_over(from)
    }

    fn handed_over(&mut self, from: usize) -> Result<usize, String> {
        loop {
            let line = self.nodes[from].next_line().expect("the handoff's end");
            match line.split_once(' ') {
                Some(("handed", node)) => return Ok(self.ids.iter().position(|id| id == node).unwrap()),
                Some(("kept", why)) => return Err(why.to_string()),
                _ => self.heard(&line),
            }
        }
    }

    fn process(&self, node: usize) -> Process {
        let port = self.ports[node].to_string();
        let dir = self.dir.path().to_str().unwrap();
        let time = self.lease_time.as_secs().to_string();
        let variables = [("DIR", dir), ("NAME", HOMES[node]), ("PORT", &port), ("LEASE_TIME", &time)];
        Process::start(handoff_process, &variables)
    }

    fn kill(&mut self, node: usize) {
        // The others stay where they are.
        let killed = self.nodes.remove(node);
        let lines = killed.kill();
        let again = self.process(node);
        self.nodes.insert(node, again);
        lines.iter().for_each(|line| self.heard(line));
    }

    fn heard(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "ack" => {
                let last = self.acknowledged.entry(words[1].into()).or_default();
                *last = words[2].parse::<i64>().unwrap().max(*last);
            }
            "error" => panic!("{line}"),
            _ => {}
        }
    }

    /// Asks a node, and takes in all that it says until it answers.
    fn ask(&mut self, node: usize, what: &str, answer: &str) -> String {
        self.nodes[node].say(what);
        self.expect(node, answer)
    }

    fn expect(&mut self, node: usize, answer: &str) -> String {
        loop {
            let line =
                self.nodes[node].next_line().unwrap_or_else(|| panic!("{} says no {answer}", HOMES[node]));
            if let Some(rest) = line.strip_prefix(answer) {
                return rest.trim().to_string();
            }
            self.heard(&line);
        }
    }

    /// Which one leads, with both others as its replicas.
    fn leader(&mut self) -> usize {
        let limit = Instant::now() + LIMIT;
        loop {
            for node in 0..3 {
                if self.ask(node, "role", "role") == "Primary"
                    && self.ask(node, "replicas", "replicas") == "2"
                {
                    return node;
                }
            }
            assert!(Instant::now() < limit, "no primary with both replicas");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    fn writes(&mut self, yes: bool) {
        for node in 0..3 {
            match yes {
                true => self.nodes[node].say("write"),
                false => drop(self.ask(node, "rest", "rests")),
            }
        }
    }

    /// Without writers: there is one primary, and all have what it has, which is all that was
    /// acknowledged.
    fn compare(&mut self, when: &str) {
        self.writes(false);
        let limit = Instant::now() + LIMIT;
        let at = loop {
            let led = self.leader();
            let at = self.ask(led, "where", "at");
            if at != "-" {
                break at;
            }
            assert!(Instant::now() < limit, "{when}: no primary that writes");
        };
        let mut led = 0;
        for node in 0..3 {
            let lost = self.ask(node, &format!("reach {at}"), "reached");
            assert_eq!(lost, "0", "{when}: something was put aside");
            led += usize::from(self.ask(node, "role", "role") == "Primary");
        }
        assert_eq!(led, 1, "{when}: primaries");
        for name in HOMES {
            let connection = plain(&self.dir.path().join(name));
            for (who, last) in &self.acknowledged {
                let sql = "SELECT count(*), coalesce(max(n), 0) FROM t WHERE who = ?1";
                let (rows, most): (i64, i64) =
                    connection.query_row(sql, [who], |r| Ok((r.get(0)?, r.get(1)?))).unwrap();
                assert!(most >= *last, "{when}: {who} had {last} acknowledged, and {most} are there");
                assert_eq!(rows, most, "{when}: a hole in what {who} wrote, or something twice");
            }
        }
        for name in &HOMES[1..] {
            assert_same_pages(&self.dir.path().join(HOMES[0]), &self.dir.path().join(name));
        }
    }
}

fn opened(process: &Process) -> String {
    process.expect("open").split(' ').nth(1).unwrap().to_string()
}

/// What is done to a node in the middle of a handoff.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Blow {
    KillTarget,
    StopTarget,
    KillHolder,
}

fn under_blows(blow: Blow) {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (rounds, seed) = (number("REPLITE_ROUNDS", 8), number("REPLITE_SEED", 1));
    eprintln!("{blow:?} REPLITE_ROUNDS={rounds} REPLITE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let stops = blow == Blow::StopTarget;
    let mut three = Three::start(if stops { LEASE_TIME } else { LONG_LEASE_TIME });
    let (mut handed, mut kept) = (0, BTreeMap::<String, u32>::new());
    for round in 0..rounds {
        three.writes(true);
        let led = three.leader();
        let to = (led + 1 + rng.random_range(0..2)) % 3;
        if stops {
            // As a primary that is stopped for long it would lose what it had not sent by then.
            three.ask(to, "rest", "rests");
        }
        let id = three.ids[to].clone();
        three.nodes[led].say(&format!("handoff {id}"));
        // From a millisecond to 65 ms, each doubling as likely as the next: before that no replica
        // has answered how it stands.
        std::thread::park_timeout(Duration::from_micros(2_f64.powf(rng.random_range(10.0..16.0)) as u64));
        match blow {
            Blow::KillTarget => three.kill(to),
            Blow::KillHolder => three.kill(led),
            Blow::StopTarget => {
                three.nodes[to].signal(Signal::STOP);
                std::thread::park_timeout(Duration::from_millis(rng.random_range(1..3000)));
                three.nodes[to].signal(Signal::CONT);
            }
        }
        if blow == Blow::KillHolder {
            opened(&three.nodes[led]);
        } else {
            if blow == Blow::KillTarget {
                opened(&three.nodes[to]);
            }
            match three.handed_over(led) {
                Ok(_) => handed += 1,
                Err(why) => {
                    *kept.entry(why.split(' ').skip(2).collect::<Vec<_>>().join(" ")).or_insert(0) += 1
                }
            }
        }
        three.compare(&format!("{blow:?}, round {round}"));
    }
    eprintln!("{blow:?}: handed over {handed} times, kept: {kept:#?}");
}

#[test]
fn a_target_that_is_killed_within_a_handoff_loses_nothing_that_was_acknowledged() {
    under_blows(Blow::KillTarget);
}

#[test]
fn a_target_that_is_stopped_within_a_handoff_loses_nothing_that_was_acknowledged() {
    under_blows(Blow::StopTarget);
}

#[test]
fn a_holder_that_is_killed_within_a_handoff_loses_nothing_that_was_acknowledged() {
    under_blows(Blow::KillHolder);
}

/// The time without a commit, as those that write see it.
#[test]
fn a_lease_goes_around_under_load_and_no_acknowledged_write_is_lost() {
    let mut three = Three::start(LEASE_TIME);
    let mut pauses = Vec::new();
    three.writes(true);
    for round in 0..20 {
        let led = three.leader();
        std::thread::park_timeout(Duration::from_millis(50));
        three.nodes[led].say("handoff");
        let mut last = 0;
        let node = loop {
            let line = three.nodes[led].next_line().expect("the handoff's end");
            if let Some(when) = line.strip_prefix("ack ").and_then(|ack| ack.split(' ').nth(2)) {
                last = when.parse::<u128>().unwrap();
            }
            if let Some(node) = line.strip_prefix("handed ") {
                break node.to_string();
            }
            assert!(!line.starts_with("kept"), "round {round}: {line}");
            three.heard(&line);
        };
        let now = three.ids.iter().position(|id| *id == node).unwrap();
        let first: u128 = loop {
            let line = three.nodes[now].next_line().expect("its first commit");
            three.heard(&line);
            if let Some(when) = line.strip_prefix("ack ").and_then(|ack| ack.split(' ').nth(2)) {
                let when = when.parse::<u128>().unwrap();
                if when > last {
                    break when;
                }
            }
        };
        pauses.push((first - last) / 1000);
    }
    pauses.sort_unstable();
    eprintln!("from the last commit here to the first one there, in ms: {pauses:?}");
    three.compare("at the end");
}
