//! The operator's command over whole nodes, each in a process of its own.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use replite::lease::{self, Store};
use replite::{Config, Db, Error, NodeId};
use serde_json::Value;

use crate::support::*;

const SECRET: &str = "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c";

#[test]
#[ignore = "runs as the child of another test"]
fn node_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let db = runtime.block_on(async {
        let config = Config::new(variable("DATABASE"))
            .secret(secret())
            .listen(format!("127.0.0.1:{}", variable("PORT")).parse().unwrap())
            .lease(variable("LEASE").parse::<lease::Lease>().unwrap())
            .bootstrap(variable("NODES").parse().unwrap())
            .migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, v)"));
        Db::open(config).await.unwrap()
    });
    speak(&format!("node {} {}", db.node_id(), db.node().addresses.replication));
    loop {
        let said = hear();
        let (word, value) = said.split_once(' ').unwrap_or((&said, ""));
        runtime.block_on(async {
            match word {
                "write" => {
                    let value: i64 = value.parse().unwrap();
                    let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
                        Ok::<_, Error>(tx.execute("INSERT INTO t(v) VALUES (?1)", [value])?)
                    };
                    match db.write(insert).await {
                        Ok(commit) => speak(&format!("wrote {}", commit.txid.unwrap())),
                        Err(error) => speak(&format!("wrote not: {error}")),
                    }
                }
                "has" => {
                    db.wait_for_timeout(value.parse().unwrap(), LIMIT).await.unwrap();
                    speak("has");
                }
                "rows" => {
                    let count = |conn: &replite::rusqlite::Connection| {
                        Ok::<i64, Error>(conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)
                    };
                    speak(&format!("rows {}", db.read(count).unwrap()));
                }
                "lost" => speak(&format!("lost {}", db.lost().await.unwrap().len())),
                "role" => speak(&format!("role {}", db.role())),
                "pause" => speak(&format!("paused {}", db.pause_failover().await.is_ok())),
                "end" => {
                    db.shutdown().await;
                    speak("ended");
                    std::process::exit(0);
                }
                other => panic!("{other}"),
            }
        });
    }
}

struct Node {
    name: &'static str,
    process: Process,
    id: NodeId,
    url: String,
}

impl Node {
    /// Says a line and returns the rest of the answer, whose first word this is.
    fn ask(&mut self, line: &str, answer: &str) -> String {
        self.process.say(line);
        let said = self.process.expect(answer);
        said.strip_prefix(answer).unwrap().trim().to_string()
    }

    fn rows(&mut self) -> u64 {
        self.ask("rows", "rows").parse().unwrap()
    }

    fn end(mut self) {
        self.ask("end", "ended");
    }
}

/// Databases, and directories that have a lease.
struct World {
    dir: tempfile::TempDir,
    nodes: usize,
    /// Of the nodes `a`, `b` and so on, where their addresses are known before; any otherwise.
    ports: Vec<u16>,
}

impl World {
    fn new(nodes: usize) -> World {
        World { dir: tempfile::tempdir().unwrap(), nodes, ports: Vec::new() }
    }

    /// With nodes at addresses that they keep, so that they can be members.
    fn with_addresses(nodes: usize) -> World {
        World { ports: (0..nodes).map(|_| own_port()).collect(), ..World::new(nodes) }
    }

    fn port(&self, name: &str) -> u16 {
        self.ports.get(usize::from(name.as_bytes()[0] - b'a')).copied().unwrap_or(0)
    }

    fn url(&self, name: &str) -> String {
        format!("replite://127.0.0.1:{}", self.port(name))
    }

    /// The lease that these nodes keep.
    fn members(&self, names: &[&str]) -> String {
        let urls: Vec<String> = names.iter().map(|name| self.url(name)).collect();
        format!("members:{}", urls.join(","))
    }

    /// A lease in words; a name alone is a directory here.
    fn lease(&self, lease: &str) -> String {
        if lease.contains(':') { lease.into() } else { self.path(lease).to_str().unwrap().into() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&self, name: &'static str, lease: &str) -> Node {
        std::fs::create_dir_all(self.path(name)).unwrap();
        let database = self.path(name).join("app.db");
        let variables = [
            ("DATABASE", database.to_str().unwrap()),
            ("LEASE", &self.lease(lease)),
            ("PORT", &self.port(name).to_string()),
            ("NODES", &self.nodes.to_string()),
        ];
        let process = Process::start(node_process, &variables);
        let said = process.expect("node");
        let [_, id, url] = said.split(' ').collect::<Vec<_>>()[..] else { panic!("{said}") };
        Node { name, id: id.parse().unwrap(), url: url.to_string(), process }
    }

    /// All of them, once one leads and all answer.
    fn start_all(&self) -> Vec<Node> {
        let names = ["a", "b", "c"];
        self.start_these(&names[..self.nodes], "lease")
    }

    fn start_these(&self, names: &[&'static str], lease: &str) -> Vec<Node> {
        let nodes: Vec<Node> = names.iter().map(|name| self.start(name, lease)).collect();
        self.comes("all nodes", lease, |view| {
            let roles: Vec<&Value> = answers(view).map(|answer| &answer["role"]).collect();
            let replicas = roles.iter().filter(|role| **role == "replica").count();
            view["record"]["renewed"] == true && replicas + 1 == self.nodes && roles.len() == self.nodes
        });
        nodes
    }

    fn command(&self, lease: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_replite"));
        command.args(args).arg("--lease").arg(self.lease(lease));
        command.env("REPLITE_SECRET", SECRET).stdin(Stdio::null());
        command
    }

    fn run(&self, lease: &str, args: &[&str]) -> Said {
        Said::of(self.command(lease, args).output().unwrap())
    }

    fn view(&self, lease: &str) -> Value {
        serde_json::from_str(&self.run(lease, &["show", "--json"]).code(0).out).unwrap()
    }

    fn comes(&self, what: &str, lease: &str, done: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        until(what, || {
            // Members that have not begun can't be reached.
            last = serde_json::from_str(&self.run(lease, &["show", "--json"]).out).unwrap();
            done(&last)
        });
        last
    }
}

fn answers(view: &Value) -> impl Iterator<Item = &Value> {
    view["nodes"].as_array().unwrap().iter().map(|node| &node["answer"]).filter(|answer| !answer.is_null())
}

fn holder(view: &Value) -> NodeId {
    view["record"]["holder"]["node"].as_str().unwrap().parse().unwrap()
}

/// Takes the node that leads out of the list.
fn leader(world: &World, nodes: &mut Vec<Node>) -> Node {
    leader_by(world, "lease", nodes)
}

fn leader_by(world: &World, lease: &str, nodes: &mut Vec<Node>) -> Node {
    let holder = holder(&world.view(lease));
    nodes.remove(nodes.iter().position(|node| node.id == holder).unwrap())
}

/// How the command ended.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    fn of(output: Output) -> Said {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }

    #[track_caller]
    fn code(self, code: i32) -> Said {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    #[track_caller]
    fn says(self, part: &str) -> Said {
        assert!(self.out.contains(part) || self.err.contains(part), "no {part:?}: {self:?}");
        self
    }
}

#[test]
fn a_paused_cluster_has_no_failover_until_it_is_resumed() {
    let world = World::new(3);
    let mut nodes = world.start_all();
    let mut led = leader(&world, &mut nodes);
    let txid = led.ask("write 1", "wrote");
    for node in &mut nodes {
        node.ask(&format!("has {txid}"), "has");
    }
    // While the holder renews the record, which carries it on.
    world.run("lease", &["pause"]).code(0).says("paused");
    world.run("lease", &["pause"]).code(0);
    let version = world.view("lease")["record"]["version"].clone();
    let view = world.comes("renewals", "lease", |view| view["record"]["version"] != version);
    assert_eq!((&view["record"]["paused"], holder(&view)), (&Value::Bool(true), led.id));
    led.ask("write 2", "wrote");

    let epoch = view["record"]["holder"]["epoch"].clone();
    let gone = led.id;
    led.process.kill();
    world.comes("the pause at the others", "lease", |view| {
        let waits =
            |answer: &Value| answer["waits_for"] == "elections are paused" && answer["paused"] == true;
        answers(view).count() == 2 && answers(view).all(waits)
    });
    // A lease time is two seconds, and each look takes one.
    for _ in 0..4 {
        let view = world.view("lease");
        assert_eq!((holder(&view), &view["record"]["renewed"]), (gone, &Value::Bool(false)), "{view:#}");
        assert!(answers(&view).all(|answer| answer["role"] != "primary"), "{view:#}");
    }
    world
        .run("lease", &["show"])
        .code(0)
        .says("not renewed")
        .says("paused: no node takes over")
        .says("waits");

    world.run("lease", &["resume"]).code(0).says("on");
    let view = world.comes("another primary", "lease", |view| {
        holder(view) != gone && answers(view).any(|answer| answer["role"] == "primary")
    });
    assert_ne!(view["record"]["holder"]["epoch"], epoch);
    assert_eq!(view["record"]["paused"], false);
    let mut led = leader(&world, &mut nodes);
    led.ask("write 3", "wrote");
    assert!(led.rows() >= 2);
    // By the call of a node, too.
    assert_eq!(led.ask("pause", "paused"), "true");
    assert_eq!(world.view("lease")["record"]["paused"], true);
}

#[test]
fn the_lease_goes_to_the_node_that_the_operator_names_and_to_the_best_one_also_while_paused() {
    let world = World::new(3);
    let mut nodes = world.start_all();
    let mut led = leader(&world, &mut nodes);
    let txid = led.ask("write 1", "wrote");
    for node in &mut nodes {
        node.ask(&format!("has {txid}"), "has");
    }
    world.run("lease", &["pause"]).code(0);
    let mut named = nodes.pop().unwrap();
    let id = named.id.to_string();
    let mut handed = world.run("lease", &["handoff", "--to", &id]);
    // A node that was not fit at that very moment is in the next one.
    until("a fit node", || {
        handed.code == Some(0) || {
            handed = world.run("lease", &["handoff", "--to", &id]);
            false
        }
    });
    handed.says(&format!("node {id} has the lease"));
    until("the new primary", || named.ask("role", "role") == "primary");
    let txid = named.ask("write 2", "wrote");
    let view = world.view("lease");
    assert_eq!((holder(&view), &view["record"]["paused"]), (named.id, &Value::Bool(true)), "{view:#}");
    // To the node that has it already, and to the best.
    world.run("lease", &["handoff", "--to", &id]).code(0).says(&id);
    for node in nodes.iter_mut().chain([&mut led]) {
        node.ask(&format!("has {txid}"), "has");
    }
    world.comes("fit nodes", "lease", |view| {
        answers(view).filter(|answer| answer["fit"] == true).count() == 2
    });
    world.run("lease", &["handoff"]).code(0).says("has the lease");
    assert_ne!(holder(&world.view("lease")), named.id);
    world.comes("a primary", "lease", |view| answers(view).any(|answer| answer["role"] == "primary"));
    for node in [&mut led, &mut nodes[0], &mut named] {
        assert_eq!(node.ask("lost", "lost"), "0");
    }
}

#[test]
fn a_promotion_says_first_what_will_be_lost() {
    let world = World::new(2);
    let mut nodes = world.start_all();
    let mut led = leader(&world, &mut nodes);
    let mut other = nodes.pop().unwrap();
    let txid = led.ask("write 1", "wrote");
    other.ask(&format!("has {txid}"), "has");
    world.run("lease", &["pause"]).code(0);
    let (name, id) = (other.name, other.id.to_string());

    // A holder that lives keeps its lease, and the node says so.
    let alive = world.run("lease", &["promote", "--unchecked", "--yes", &id]).code(1);
    alive.says("this will be refused").says("holds and renews");

    other.process.kill();
    for value in 2..=4 {
        led.ask(&format!("write {value}"), "wrote");
    }
    let end = led.ask("write 5", "wrote");
    let number = u64::from_str_radix(end.rsplit('-').next().unwrap(), 16).unwrap();
    world.comes("the position in the record", "lease", |view| {
        let position = view["record"]["holder"]["position"].as_str().unwrap_or_default().to_string();
        position.split('-').nth(2).is_some_and(|n| u64::from_str_radix(n, 16) == Ok(number))
    });
    let (gone, gone_name) = (led.id, if name == "a" { "b" } else { "a" });
    led.process.kill();
    let mut other = world.start(name, "lease");

    world.run("lease", &["promote", &id]).code(2).says("--unchecked");
    // There is no terminal to ask on.
    let asked = world.run("lease", &["promote", "--unchecked", &other.url]).code(2).says("--yes");
    let asked = asked.says(&format!("node {id} is to lead")).says("by its record, 4 transactions more");
    asked.says(&format!("node {gone} at")).says("did not answer");
    assert_ne!(other.ask("role", "role"), "primary");

    let done = world.run("lease", &["promote", "--unchecked", "--yes", &other.url]).code(0);
    done.says("4 transactions more").says(&format!("node {id} is the primary"));
    assert_eq!((other.ask("role", "role"), other.rows()), ("primary".into(), 1));
    assert_eq!(world.view("lease")["record"]["paused"], true, "it is carried on");
    let txid = other.ask("write 9", "wrote");
    // What the other one had is kept when it returns.
    let mut back = world.start(gone_name, "lease");
    back.ask(&format!("has {txid}"), "has");
    assert_eq!((back.rows(), back.ask("lost", "lost")), (2, "1".into()));
}

#[test]
fn a_lease_goes_to_another_store_and_no_node_leads_by_the_old_one() {
    let world = World::new(2);
    let mut nodes = world.start_all();
    let mut led = leader(&world, &mut nodes);
    let mut other = nodes.pop().unwrap();
    let txid = led.ask("write 1", "wrote");
    other.ask(&format!("has {txid}"), "has");
    let to = world.path("new");
    let moves = ["move", "--to", to.to_str().unwrap()];
    let refused = world.run("lease", &moves).code(1).says("holds the lease and renews it");
    refused.says(&led.id.to_string());
    assert!(!to.exists(), "nothing is copied");

    // Without a word: the record says that it is held.
    let name = led.name;
    led.process.kill();
    other.end();
    let taken = lease::Directory::new(world.path("taken"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { taken.swap(None, b"something else").await }).unwrap();
    let occupied = ["move", "--to", taken.path().to_str().unwrap()];
    world.run("lease", &occupied).code(1).says("not empty").says("a lease of node").says("can't be used");
    assert_eq!(world.view("lease")["record"]["found"], "lease", "it is where it was");

    world.run("lease", &moves).code(0).says("start the nodes");
    world.run("lease", &["show"]).code(0).says("was moved to").says(to.to_str().unwrap());
    world.run("lease", &["resume"]).code(1).says("was moved");
    world.run("lease", &moves).code(1).says("was moved");
    let view = world.view("new");
    assert_eq!((&view["record"]["state"], &view["record"]["paused"]), (&"held".into(), &false.into()));

    // The last holder, started with the old store by mistake, does not take its lease over.
    let mut wrong = world.start(name, "lease");
    until("its word", || wrong.ask("role", "role") == "waiting");
    let promotes = ["promote", "--unchecked", "--yes", &wrong.url];
    world.run("lease", &promotes).code(1).says("was moved");
    let mut right = world.start(if name == "a" { "b" } else { "a" }, "new");
    until("a primary", || right.ask("role", "role") == "primary");
    let by_new = [&promotes[..], &["--node", &wrong.url]].concat();
    world.run("new", &by_new).code(1).says("start it with the other one");
    let txid = right.ask("write 2", "wrote");
    assert_eq!((wrong.ask("role", "role"), wrong.rows()), ("waiting".into(), 1), "it serves reads");
    wrong.end();
    let mut again = world.start(name, "new");
    again.ask(&format!("has {txid}"), "has");
    assert_eq!((right.rows(), again.rows(), again.ask("lost", "lost")), (2, 2, "0".into()));
    again.end();
    right.end();
    // And back: the mark gives way.
    let back = world.path("lease");
    world.run("new", &["move", "--to", back.to_str().unwrap()]).code(0);
    world.run("new", &["show"]).code(0).says("was moved to");
    let mut home = world.start(name, "lease");
    until("a primary", || home.ask("role", "role") == "primary");
    assert_eq!(home.rows(), 2);
}

#[test]
fn a_lease_goes_from_a_directory_to_members_and_back() {
    let world = World::with_addresses(3);
    let mut nodes = world.start_all();
    let mut led = leader(&world, &mut nodes);
    let txid = led.ask("write 1", "wrote");
    for node in &mut nodes {
        node.ask(&format!("has {txid}"), "has");
    }
    let members = &world.members(&["a", "b", "c"]);
    // The replicas first, so that the lease goes to none of them.
    let mut replicas = Vec::new();
    for node in nodes {
        let name = node.name;
        node.end();
        replicas.push(world.start(name, members));
    }
    // The primary has not ended: its state directory is another store's.
    world.run(members, &["member", "begin"]).code(1).says("the members have not changed");
    led.ask("write 2", "wrote");
    let name = led.name;
    led.end();
    let mut led = world.start(name, members);
    // Refused until all of them are there. The record can be moved at once then.
    until("members that have begun", || world.run(members, &["member", "begin"]).code == Some(0));
    world.run("lease", &["move", "--to", members]).code(0).says(&format!("the lease is in {members}"));
    until("a primary", || led.ask("role", "role") == "primary");
    let txid = led.ask("write 3", "wrote");
    for node in &mut replicas {
        node.ask(&format!("has {txid}"), "has");
        assert_eq!((node.rows(), node.ask("lost", "lost")), (3, "0".into()));
    }
    world.run("lease", &["show"]).code(0).says("was moved to").says(members);

    // And back. Paused, so that no other takes the lease of the one that is killed.
    world.run(members, &["pause"]).code(0);
    let home = &world.lease("home");
    world.run(members, &["move", "--to", home]).code(1).says("holds the lease and renews it");
    led.process.kill();
    world.run(members, &["move", "--to", home]).code(0).says("start the nodes");
    // The others have the old store: only this one can take it.
    world.run(home, &["resume"]).code(0);
    let mut led = world.start(name, home);
    until("a primary", || led.ask("role", "role") == "primary");
    let txid = led.ask("write 4", "wrote");
    for node in replicas {
        let name = node.name;
        node.end();
        let mut node = world.start(name, home);
        node.ask(&format!("has {txid}"), "has");
        assert_eq!((node.rows(), node.ask("lost", "lost")), (4, "0".into()));
        node.process.kill();
    }
    assert_eq!((led.rows(), led.ask("lost", "lost")), (4, "0".into()));
}

#[test]
fn members_are_shown_added_and_removed() {
    let world = World::with_addresses(4);
    let (three, four) = (&world.members(&["a", "b", "c"]), &world.members(&["a", "b", "c", "d"]));
    // None of them is there.
    world.run(three, &["members"]).code(3).says("no member can be reached").says("does not answer");
    world.run(three, &["show"]).code(3);
    world.run(three, &["member", "add", &world.url("d")]).code(3);
    let world = World { nodes: 3, ..world };
    let mut nodes = world.start_these(&["a", "b", "c"], three);
    let mut led = leader_by(&world, three, &mut nodes);
    let txid = led.ask("write 1", "wrote");
    let voters = |lease: &str| {
        let said = world.run(lease, &["members", "--json"]).code(0);
        let view: Value = serde_json::from_str(&said.out).unwrap();
        let all = view["members"].as_array().unwrap().clone();
        let urls = all.iter().filter(|member| member["votes"] == true).map(|member| &member["url"]);
        let urls: Vec<String> = urls.map(|url| url.as_str().unwrap().into()).collect();
        (view["agree"] == true, urls)
    };
    let urls = |names: &[&str]| {
        let mut urls: Vec<String> = names.iter().map(|name| world.url(name)).collect();
        urls.sort();
        urls
    };
    until("members that agree", || voters(three) == (true, urls(&["a", "b", "c"])));
    world.run(three, &["members"]).code(0).says("the leader").says("a voter");

    world.run(three, &["member", "begin"]).code(1).says("have begun");
    world.run(three, &["member", "add", &world.url("d")]).code(1).says(&world.url("d"));
    world.run(three, &["member", "add", "ftp://x"]).code(2);
    world.run("lease", &["members"]).code(2).says("not kept by members");
    let mut none = world.command(three, &["members"]);
    Said::of(none.env_remove("REPLITE_SECRET").output().unwrap()).code(2).says("secret");

    let mut fourth = world.start("d", four);
    world.run(three, &["member", "add", &world.url("d")]).code(0).says("is a member");
    until("four voters", || voters(four) == (true, urls(&["a", "b", "c", "d"])));
    fourth.ask(&format!("has {txid}"), "has");
    // One that is gone is removed all the same.
    let gone = nodes.pop().unwrap();
    let name = gone.name;
    drop(gone);
    // Where it led the members, the others elect another one first.
    until("the removal", || {
        let said = world.run(four, &["member", "remove", &world.url(name)]);
        let is_removed = said.code == Some(0);
        assert!(is_removed || matches!(said.code, Some(1 | 3)), "{said:?}");
        is_removed
    });
    world.run(four, &["member", "remove", &world.url(name)]).code(1).says("is no member");
    let left: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|other| *other != name).collect();
    until("three voters", || voters(&world.members(&left)) == (true, urls(&left)));
    led.ask("write 2", "wrote");
}

#[test]
fn the_command_says_what_is_wrong_and_ends_with_a_code_of_its_own() {
    let world = World::new(1);
    let node = world.start_all().pop().unwrap();
    let bare = |args: &[&str]| {
        Said::of(
            Command::new(env!("CARGO_BIN_EXE_replite")).args(args).stdin(Stdio::null()).output().unwrap(),
        )
    };
    bare(&[]).code(2);
    bare(&["dance"]).code(2);
    bare(&["--help"]).code(0).says("Usage");
    bare(&["show"]).code(2).says("--lease");
    bare(&["handoff", "--to", "nobody", "--lease", "x"]).code(2);
    bare(&["show", "--lease", "redis://app:hunter2@x"]).code(2).says("members:URL,URL,URL");
    world.run("lease", &["move", "--to", "members"]).code(2).says("not where");
    let mut by_variable = world.command("lease", &["show"]);
    by_variable.env("REPLITE_LEASE", "/no/such/place");
    Said::of(by_variable.output().unwrap()).code(0);
    let nowhere = world.path("no/such/place");
    bare(&["show", "--lease", nowhere.to_str().unwrap()]).code(3).says("no such directory");
    bare(&["pause", "--lease", nowhere.to_str().unwrap()]).code(3).says("no such directory");
    world.run("empty", &["show"]).code(0).says("no record");
    world.run("empty", &["pause"]).code(1).says("no record");
    let other = world.run("lease", &["show", "--database", "other"]).code(0);
    other.says("that of database \"app\"");

    // Secrets: none, a weak one, another, and one in a file.
    let show = |secret: Option<&str>, args: &[&str]| {
        let mut command = world.command("lease", args);
        match secret {
            Some(secret) => command.env("REPLITE_SECRET", secret),
            None => command.env_remove("REPLITE_SECRET"),
        };
        Said::of(command.output().unwrap())
    };
    show(None, &["show"]).code(0).says("held, and renewed").says("needs the cluster's secret");
    show(None, &["handoff"]).code(2).says("needs the cluster's secret");
    show(Some("hunter2"), &["show"]).code(2).says("REPLITE_SECRET").says("no secret to rely on");
    let stranger = "AK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c";
    show(Some(stranger), &["show"]).code(0).says("an empty 404");
    show(Some(stranger), &["handoff"]).code(3).says("an empty 404");
    let file = world.path("secret");
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    let from_file = ["show", "--secret-file", file.to_str().unwrap()];
    show(None, &from_file).code(0).says("primary").says(&node.id.to_string());
    show(None, &["show", "--secret-file", nowhere.to_str().unwrap()]).code(2);

    // Commands that the node refuses, or that come to none.
    let no_one = "0198c5a0-4f3e-7cc1-b2a4-9d6f00e1c7aa";
    world.run("lease", &["handoff", "--to", no_one]).code(1).says("has not done it");
    world.run("lease", &["promote", "--unchecked", "--yes", no_one]).code(1).says("does not name");
    let dead = "http://127.0.0.1:9";
    world.run("lease", &["promote", "--unchecked", "--yes", dead]).code(3).says(dead);
    world.run("lease", &["show", "--node", dead]).code(0).says(dead).says("connection failed");
    world.run("lease", &["show", "--node", "ftp://x"]).code(0).says("http://");

    // A reader that has enough is no failure.
    let mut command = world.command("lease", &["show"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    Said::of(child.wait_with_output().unwrap()).code(0);
}
