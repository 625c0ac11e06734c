//! The example application as its users run it: real processes.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant};

use http::Request;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use replite::rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::http_support::*;
use crate::support::{LIMIT, plain, three_ports, until, within};

/// What nodes say that could not start a cluster, because there are two databases.
const SEVERAL: &str = "several nodes of a first start have a database with content";
/// What the documentation promises for the end of everything.
const END_LIMIT: Duration = Duration::from_secs(10);

fn json(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|e| panic!("{e}: {answer:?}"))
}

async fn send(method: &str, url: &str, body: &str) -> Result<Answer, String> {
    let request = Request::builder().method(method).uri(url).header("content-type", "application/json");
    Http::new().send(request.body(body.to_string()).unwrap()).await
}

async fn add(url: &str, text: &str) -> Answer {
    let body = serde_json::json!({ "text": text }).to_string();
    send("POST", &format!("{url}/api/notes"), &body).await.unwrap()
}

/// Waits until an instance lists a note.
async fn listed(url: &str, word: &str) {
    let url = format!("{url}/api/notes?q={word}");
    within("the note", async {
        while !Http::new().get(&url).await.is_ok_and(|a| a.status == 200 && a.text().contains(word)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// An open feed.
async fn feed(url: &str) -> Incoming {
    let client: hyper_util::client::legacy::Client<_, String> =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    let response = client.get(format!("{url}/api/events").parse().unwrap()).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    response.into_body()
}

/// The number in the next event that tells of a position; none at the end.
async fn event(feed: &mut Incoming) -> Option<u64> {
    loop {
        let data = within("an event", feed.frame()).await?.unwrap().into_data().unwrap();
        let text = String::from_utf8(data.to_vec()).unwrap();
        if text.starts_with("event: role\n") {
            continue;
        }
        let number =
            text.trim().strip_prefix("event: position\ndata: ").unwrap_or_else(|| panic!("{text:?}"));
        return Some(number.parse().unwrap());
    }
}

/// The processes that this one started.
fn children(of: Pid) -> Vec<Pid> {
    // Each thread has its own.
    let threads = std::fs::read_dir(format!("/proc/{}/task", of.as_raw_nonzero())).unwrap();
    let read = |thread: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(thread.unwrap().path().join("children")).unwrap_or_default()
    };
    let all: String = threads.map(read).collect();
    all.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_instances_share_their_notes_survive_a_kill_and_end_together() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, urls }, table) =
        tokio::task::block_in_place(|| Example::fixed(dir.path()));
    let urls: [String; 3] = urls.try_into().unwrap();
    let nodes = urls.clone().map(|url| format!("{url}/api/node"));
    let launcher = example.pid();
    assert_eq!(table.each_ref().map(|row| &*row.role), ["primary", "replica", "replica"]);
    let pids = table.each_ref().map(|row| row.pid);
    assert_eq!(HashSet::from(pids), HashSet::from_iter(children(launcher)));

    // A note that was added anywhere is everywhere, and each feed tells.
    let mut feeds = Vec::new();
    for url in &urls {
        let mut feed = feed(url).await;
        event(&mut feed).await.expect("one at once");
        feeds.push(feed);
    }
    let note = add(&urls[2], "kept").await;
    assert_eq!(note.status, 201, "{note:?}");
    let txid = json(&Http::new().get(&nodes[0]).await.unwrap())["txid"].as_u64().unwrap();
    for (url, feed) in urls.iter().zip(&mut feeds) {
        while event(feed).await.expect("the feed goes on") < txid {}
        // Whoever was told sees it.
        let answer = Http::new().get(&format!("{url}/api/notes?q=kept")).await.unwrap();
        assert!(answer.text().contains("kept"), "{url} told of {txid}: {}", answer.text());
    }
    drop(feeds);

    // The primary is killed, and started again.
    let id = json(&Http::new().get(&nodes[0]).await.unwrap())["id"].clone();
    kill_process(pids[0], Signal::KILL).unwrap();
    tokio::task::block_in_place(|| example.line("it is started again"));
    within("a write", async { while add(&urls[1], "after").await.status != 201 {} }).await;
    listed(&urls[0], "kept").await;
    listed(&urls[2], "after").await;
    assert_eq!(json(&Http::new().get(&nodes[0]).await.unwrap())["id"], id, "the same node");
    let pids = children(launcher);
    assert_eq!(pids.len(), 3);

    // Asked to end, with feeds and idle connections open.
    let idle: Vec<_> = [Http::new(), Http::new(), Http::new()].into();
    let mut feeds = Vec::new();
    for (url, client) in urls.iter().zip(&idle) {
        client.get(&format!("{url}/livez")).await.unwrap();
        let mut feed = feed(url).await;
        event(&mut feed).await.unwrap();
        feeds.push(feed);
    }
    let took = tokio::task::block_in_place(|| example.end());
    println!("ended after {took:?}");
    assert!(took < END_LIMIT, "{took:?}");
    for feed in &mut feeds {
        while event(feed).await.is_some() {}
    }
    for pid in pids {
        assert!(!runs(pid), "{pid:?} still runs");
    }
    for url in &urls {
        assert!(Http::new().get(&format!("{url}/livez")).await.is_err());
    }
}

/// How an instance says that it is.
async fn described(url: &str) -> Value {
    Http::new().get(&format!("{url}/api/node")).await.map_or(Value::Null, |answer| json(&answer))
}

/// All notes in the file of an instance that has ended, which is whole.
fn rows(data: &Path, url: &str) -> Vec<(i64, String, String)> {
    let conn = plain(&data.join(url.rsplit(':').next().unwrap()).join("notes.db"));
    let whole: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(whole, "ok", "{url}");
    let mut all = conn.prepare("SELECT id, text, node FROM notes ORDER BY id").unwrap();
    all.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_instance_takes_over_from_a_primary_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, urls }, table) =
        tokio::task::block_in_place(|| Example::three(dir.path()));
    let (leading, others): (Vec<Row>, Vec<Row>) = table.into_iter().partition(|row| row.role == "primary");
    let [killed] = &leading[..] else { panic!("{leading:?}") };
    assert!(others.iter().all(|row| row.role == "replica"), "{others:?}");
    for url in &urls {
        assert_eq!(add(url, "before").await.status, 201);
    }
    let before = described(&killed.url).await;

    tokio::task::block_in_place(|| kill(killed.pid));
    let begin = Instant::now();
    // Held until there is a primary again.
    let note = add(&others[0].url, "after").await;
    assert_eq!(note.status, 201, "{note:?}");
    println!("the first note after {:?}", begin.elapsed());
    listed(&others[1].url, "after").await;
    let mut leads = Vec::new();
    for row in &others {
        let node = described(&row.url).await;
        assert!(node["epoch"].as_u64() > before["epoch"].as_u64(), "{node}");
        let roles: Vec<&str> = node["changes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|change| change["role"].as_str().unwrap())
            .collect();
        if node["role"] == "primary" {
            assert!(roles.ends_with(&["electing", "promoting", "primary"]), "{roles:?}");
            leads.push(row.url.clone());
        }
    }
    assert_eq!(leads.len(), 1, "{leads:?}");

    // Started again, it follows.
    listed(&killed.url, "after").await;
    let back = described(&killed.url).await;
    assert_eq!((&back["id"], &back["role"]), (&before["id"], &"replica".into()), "{back}");
    assert_eq!(back["changes"].as_array().unwrap().last().unwrap()["primary"], *leads[0]);
    assert_eq!(add(&killed.url, "last").await.status, 201);
    for url in &urls {
        listed(url, "last").await;
    }
    tokio::task::block_in_place(|| example.end());
    let notes = rows(dir.path(), &urls[0]);
    assert_eq!(notes.len(), 5, "{notes:?}");
    for url in &urls[1..] {
        assert_eq!(rows(dir.path(), url), notes, "{url}");
    }
}

/// What is expected is no warning, and no terminal is there that would show colours.
#[test]
fn an_orderly_end_of_all_warns_of_nothing() {
    for fixed in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let example = Example::talkative(dir.path(), fixed);
        example.table();
        example.process.signal(Signal::TERM);
        let said = example.process.success();
        assert!(said.iter().any(|line| line.contains(" INFO ")), "{said:#?}");
        let wrong = |line: &&String| ["WARN", "ERROR", "\u{1b}"].iter().any(|word| line.contains(word));
        let wrong: Vec<_> = said.iter().filter(wrong).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// Its server has connections of the other members, which would not end by themselves.
#[test]
fn a_member_ends_in_good_order_while_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (Example { process: example, .. }, table) = Example::three(dir.path());
    for row in &table {
        kill_process(row.pid, Signal::TERM).unwrap();
        loop {
            let line = example.next_line().expect("its end");
            assert!(!line.contains("did not end in time"), "{line}");
            if line.starts_with(&format!("{} ended (exit status: 0)", row.url)) {
                break;
            }
        }
        let back = || children(example.pid()).len() == 3;
        until("its restart", back);
        let ready = format!("{}/healthz", row.url);
        until("its word", || {
            let asked = std::process::Command::new("curl").args(["-sf", &ready]).output();
            asked.is_ok_and(|answer| answer.status.success())
        });
    }
    example.end();
}

#[test]
fn three_instances_share_their_notes_with_a_lease_in_a_directory_too() {
    let dir = tempfile::tempdir().unwrap();
    let example = Example::launcher(three_ports(), dir.path(), &["--lease", "directory"]);
    let table = example.table();
    assert_eq!(table.iter().filter(|row| row.role == "primary").count(), 1, "{table:?}");
    assert!(dir.path().join("lease").is_dir());
    example.process.end();
    let example = Example::launcher(three_ports(), dir.path(), &["--lease", "redis://x"]);
    example.process.line("it is none of the forms");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_and_a_witness_survive_the_primary() {
    let dir = tempfile::tempdir().unwrap();
    let first = three_ports();
    let lease = format!(
        "members:http://127.0.0.1:{first},http://127.0.0.1:{},replite://127.0.0.1:{}",
        first + 1,
        first + 2
    );
    let witness = Example::witness(first + 2, dir.path(), &lease);
    let mut two: Vec<Example> =
        (0..2).map(|index| Example::with_lease(first, index, dir.path(), &lease)).collect();
    for instance in &two {
        listening(&instance.urls[0]).await;
        let added = within("a primary", async {
            loop {
                let answer = add(&instance.urls[0], "before").await;
                if answer.status == 201 {
                    return answer;
                }
            }
        });
        added.await;
    }
    let first_leads = described(&two[0].urls[0]).await["role"] == "primary";
    let killed = two.remove(usize::from(!first_leads));
    tokio::task::block_in_place(|| killed.process.kill());
    let left = &two[0].urls[0];
    within("the other one", async { while add(left, "after").await.status != 201 {} }).await;
    assert_eq!(described(left).await["role"], "primary");
    assert!(!dir.path().join("witness/notes.db").exists());
    drop(witness);
}

#[test]
fn no_instance_outlives_a_launcher_that_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let example = Example::three(dir.path()).0.process;
    let pids = children(example.pid());
    assert_eq!(pids.len(), 3);
    example.kill();
    until("their end", || !pids.iter().any(|pid| runs(*pid)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_is_json() {
    let dir = tempfile::tempdir().unwrap();
    let Example { process: example, urls } = Example::one(dir.path(), &[]);
    let url = &urls[0];
    listening(url).await;
    let large = serde_json::json!({ "text": "x".repeat(100_000) }).to_string();
    for (method, path, body, status) in [
        ("GET", "/api/notes?limit=many", "", 400),
        ("GET", "/?limit=-1", "", 400),
        ("PUT", "/api/notes/first", r#"{"text":"x"}"#, 400),
        ("DELETE", "/api/notes/first", "", 400),
        ("DELETE", "/api/notes/77", "", 404),
        ("PUT", "/api/notes/77", r#"{"text":"x"}"#, 404),
        ("POST", "/api/notes", "{", 400),
        ("POST", "/api/notes", r#"{"words":"x"}"#, 422),
        ("POST", "/api/notes", r#"{"text":"  "}"#, 400),
        ("POST", "/api/notes", &large, 413),
        ("GET", "/nothing", "", 404),
        ("PATCH", "/api/notes", "", 405),
    ] {
        let answer = send(method, &format!("{url}{path}"), body).await.unwrap();
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        assert!(json(&answer)["error"].is_string(), "{method} {path}: {answer:?}");
    }
    let took = tokio::task::block_in_place(|| example.end());
    assert!(took < END_LIMIT, "{took:?}");
}

/// No page of another site reads what is here, or shows it in a frame.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_instance_answers_to_its_own_names_and_says_what_its_page_may_do() {
    let dir = tempfile::tempdir().unwrap();
    let Example { process: example, urls } = Example::one(dir.path(), &["--host", "notes.example.org"]);
    let url = &urls[0];
    listening(url).await;
    let own = url.strip_prefix("http://").unwrap();
    let port = own.rsplit(':').next().unwrap();
    let ask = async |path: &str, host: &str| {
        Http::new()
            .send(Request::get(format!("{url}{path}")).header("host", host).body("").unwrap())
            .await
            .unwrap()
    };
    for (host, status) in [
        (own, 200),
        (&*format!("localhost:{port}"), 200),
        ("Notes.Example.org", 200),
        ("notes.example.org:80", 200),
        ("notes.example.org:81", 400),
        ("localhost", 400),
        ("rebound.example", 400),
        ("", 400),
    ] {
        for path in ["/", "/page.js", "/api/notes", "/api/node"] {
            assert_eq!(ask(path, host).await.status, status, "{host}{path}");
        }
        assert_eq!(ask("/readyz", host).await.status, 200, "{host}: a probe");
        assert_eq!(ask("/metrics", host).await.status, status, "{host}: no probe, and not for other pages");
    }
    for path in ["/", "/page.css", "/page.js", "/nothing", "/api/notes?limit=many"] {
        for host in [own, "rebound.example"] {
            let answer = ask(path, host).await;
            let policy = answer.header("content-security-policy");
            assert!(policy.contains("frame-ancestors 'none'") && policy.contains("default-src 'none'"));
            assert!(!policy.contains("unsafe"), "{policy}");
            assert_eq!(answer.header("x-content-type-options"), "nosniff");
            assert_eq!(answer.header("referrer-policy"), "no-referrer");
        }
    }
    let page = ask("/", own).await.text();
    assert!(!page.contains("<style") && !page.contains("<script>") && !page.contains(" style="), "{page}");
    tokio::task::block_in_place(|| example.end());
}

/// What one forwards has its own name, which the other does not know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_that_were_not_told_each_others_names_forward_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let Example { process: primary, urls } = Example::one(&dir.path().join("p"), &[]);
    listening(&urls[0]).await;
    let replica = Example::replica_of(&urls[0], &dir.path().join("r"));
    listening(&replica.urls[0]).await;
    let added = add(&replica.urls[0], "forwarded").await;
    assert_eq!(added.status, 201, "{added:?}");
    listed(&urls[0], "forwarded").await;
    tokio::task::block_in_place(|| {
        replica.process.end();
        primary.end();
    });
}

/// Clients that say nothing, or half of something, are hung up on, and others are served meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_ask_nothing_are_hung_up_on() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let Example { process: example, urls } = Example::one(dir.path(), &[]);
    let url = &urls[0];
    listening(url).await;
    let address = url.strip_prefix("http://").unwrap();
    let mut silent = Vec::new();
    for said in [&b""[..], b"G", b"GET / HTTP/1.1\r\nhost:", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        for _ in 0..20 {
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            client.write_all(said).await.unwrap();
            silent.push(client);
        }
    }
    let begin = Instant::now();
    assert_eq!(add(url, "meanwhile").await.status, 201);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    for mut client in silent {
        // An end, or a reset.
        let _ = within("the end of it", client.read_to_end(&mut Vec::new())).await;
    }
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    tokio::task::block_in_place(|| example.end());
}

async fn listening(url: &str) {
    within("the instance", async {
        while Http::new().get(&format!("{url}/readyz")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_waits_for_a_locked_file_and_its_notes_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let (old, data) = (dir.path().join("old.db"), dir.path().join("data"));
    let source = Connection::open(&old).unwrap();
    source
        .execute_batch(
            "CREATE TABLE notes(id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL,
                 node TEXT NOT NULL DEFAULT '', created TEXT NOT NULL DEFAULT '');
             INSERT INTO notes(text) VALUES ('an early bird'), ('a late worm');
             BEGIN EXCLUSIVE; INSERT INTO notes(text) VALUES ('under way')",
        )
        .unwrap();
    let Example { process: example, urls } = Example::one(&data, &["--import", old.to_str().unwrap()]);
    let url = &urls[0];
    tokio::task::block_in_place(|| example.line("the import waits"));
    assert!(!data.join("notes.db").exists());
    source.execute_batch("COMMIT").unwrap();
    listening(url).await;
    for (word, found) in [("early", 1), ("worm", 1), ("under", 1), ("", 3), ("nothing", 0)] {
        let answer = Http::new().get(&format!("{url}/api/notes?q={word}")).await.unwrap();
        assert_eq!(json(&answer).as_array().unwrap().len(), found, "{word}: {answer:?}");
    }
    // Also after a change, for which the index must have had the old words.
    let answer = send("PUT", &format!("{url}/api/notes/1"), r#"{"text":"an owl"}"#).await.unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    for (word, found) in [("early", 0), ("owl", 1)] {
        let answer = Http::new().get(&format!("{url}/api/notes?q={word}")).await.unwrap();
        assert_eq!(json(&answer).as_array().unwrap().len(), found, "{word}: {answer:?}");
    }
    tokio::task::block_in_place(|| example.end());
}

/// A database with a note, as another program made it.
fn made_elsewhere(path: &Path, note: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let made = Connection::open(path).unwrap();
    made.execute_batch(
        "CREATE TABLE notes(id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL,
             node TEXT NOT NULL DEFAULT '', created TEXT NOT NULL DEFAULT '')",
    )
    .unwrap();
    made.execute("INSERT INTO notes(text) VALUES (?1)", [note]).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_all_instances_are_told_to_import_is_imported_once() {
    let dir = tempfile::tempdir().unwrap();
    let old = dir.path().join("old.db");
    made_elsewhere(&old, "imported");
    let port = three_ports();
    let three = [0, 1, 2]
        .map(|index| Example::elected(port, index, dir.path(), &["--import", old.to_str().unwrap()]));
    for instance in &three {
        listed(&instance.urls[0], "imported").await;
    }
    let importer = std::fs::read_to_string(dir.path().join("lease.import")).unwrap();
    assert_eq!(described(&importer).await["role"], "primary");
    assert_eq!(add(&three[0].urls[0], "more").await.status, 201);
    for instance in three {
        listed(&instance.urls[0], "more").await;
        let url = instance.urls[0].clone();
        tokio::task::block_in_place(|| instance.process.end());
        assert_eq!(rows(dir.path(), &url).len(), 2, "{url}");
        assert!(!dir.path().join(url.rsplit(':').next().unwrap()).join("notes.importing").exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_databases_make_no_cluster_and_it_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let port = three_ports();
    for port in [port, port + 1] {
        made_elsewhere(&dir.path().join(port.to_string()).join("notes.db"), &format!("of {port}"));
    }
    let three = [0, 1, 2].map(|index| Example::elected(port, index, dir.path(), &[]));
    for instance in &three {
        within("the reason", async {
            while !described(&instance.urls[0]).await["waits_for"].to_string().contains(SEVERAL) {}
        })
        .await;
    }
    for (index, instance) in three.into_iter().enumerate() {
        let url = instance.urls[0].clone();
        tokio::task::block_in_place(|| instance.process.end());
        if index < 2 {
            assert_eq!(rows(dir.path(), &url), [(1, format!("of {}", port + index as u16), String::new())]);
        }
    }
}

#[test]
fn a_port_that_is_taken_ends_the_launcher_and_what_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let port = three_ports();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port + 2)).unwrap();
    let begin = Instant::now();
    let mut example = Example::launcher(port, dir.path(), &[]).process;
    example.line(&format!("127.0.0.1:{}", port + 2));
    assert!(!example.wait(LIMIT).success());
    assert!(begin.elapsed() < END_LIMIT);
}

#[test]
fn an_instance_that_can_not_begin_ends_the_others() {
    let dir = tempfile::tempdir().unwrap();
    // The first instance's database can't be one.
    let port = three_ports();
    let database = dir.path().join(port.to_string()).join("notes.db");
    std::fs::create_dir_all(database.parent().unwrap()).unwrap();
    std::fs::write(database, "this is no database, whoever asks for it".repeat(100)).unwrap();
    let mut example = Example::launcher(port, dir.path(), &[]).process;
    example.line("ended before all were ready");
    assert!(!example.wait(LIMIT).success());
    for port in port..port + 3 {
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}
