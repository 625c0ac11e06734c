//! The first program of the README, as its first reader runs it: pasted, and twice.

use std::path::{Path, PathBuf};
use std::process::Command;

use http::Request;
use rustix::process::Signal;

use crate::http_support::*;
use crate::support::{Process, own_port, within};

/// The blocks of code of README.md of this kind, in their order.
fn blocks(kind: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let begins = |block: &&str| block.lines().next().is_some_and(|first| first.starts_with(kind));
    // Each odd part is inside of a block.
    let inside = readme.split("```").skip(1).step_by(2).filter(begins);
    inside.map(|block| block.split_once('\n').unwrap().1.to_owned()).collect()
}

/// The command lines that run the program: their variables, and the address that they say.
fn runs() -> Vec<(Vec<(String, String)>, String)> {
    let lines = blocks("sh").join("\n").replace("\\\n", " ");
    let runs = lines.lines().filter(|line| line.contains("REPLITE_PATH=")).map(|line| {
        let (variables, address) = line.split_once("cargo run -- ").unwrap();
        let pairs = variables.split_whitespace().map(|word| word.split_once('=').unwrap());
        let variables = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        (variables, address.trim().to_owned())
    });
    runs.collect()
}

#[test]
fn the_readme_shows_the_example_that_is_built() {
    let example = include_str!("../../examples/minimal.rs");
    assert_eq!(blocks("rust")[0], example);
    assert!(example.lines().count() <= 40);
    // What the program needs of other crates is what it is told to add.
    let added = &blocks("sh")[0];
    for needed in ["cargo add replite --features axum", "cargo add axum", "cargo add tokio --features full"] {
        assert!(added.contains(needed), "{added}");
    }
}

struct Instance {
    process: Process,
    url: String,
}

impl Instance {
    fn start(directory: &Path, variables: &[(String, String)], address: &str) -> Instance {
        let test = std::env::current_exe().unwrap();
        let binary: PathBuf = test.parent().unwrap().parent().unwrap().join("examples").join("minimal");
        assert!(binary.is_file(), "run `cargo build --example minimal` (with the tests' profile) first");
        let mut command = Command::new(binary);
        // What is set for these tests is no setting of the program.
        let inherited = std::env::vars_os().map(|(name, _)| name);
        for name in inherited.filter(|name| name.to_string_lossy().starts_with("REPLITE_")) {
            command.env_remove(name);
        }
        command.arg(address).current_dir(directory).envs(variables.iter().cloned());
        Instance { process: Process::program(&mut command), url: format!("http://{address}/") }
    }

    async fn answer(&self, request: http::request::Builder, body: &str) -> Answer {
        let request = || request_of(&request, body);
        within("an instance that answers", async {
            loop {
                match Http::new().send(request()).await {
                    Ok(answer) if answer.status == 200 => return answer,
                    _ => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        })
        .await
    }

    /// Waits until the notes are these.
    async fn shows(&self, notes: &str) {
        within("the notes", async {
            while self.answer(Request::get(&self.url), "").await.text() != notes {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

fn request_of(head: &http::request::Builder, body: &str) -> Request<String> {
    let builder = Request::builder().method(head.method_ref().unwrap()).uri(head.uri_ref().unwrap());
    let token = head.headers_ref().and_then(|headers| headers.get("replite-token"));
    let builder = token.into_iter().fold(builder, |builder, token| builder.header("replite-token", token));
    builder.body(body.to_owned()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_that_is_pasted_replicates_when_it_is_run_twice() {
    let dir = tempfile::tempdir().unwrap();
    let told = runs();
    assert_eq!(told.len(), 2, "{told:?}");
    // The ports may be in use here.
    let ports: Vec<(&str, String)> =
        [":7001", ":8081", ":8082"].map(|port| (port, format!(":{}", own_port()))).into();
    let moved = |text: &str| ports.iter().fold(text.to_owned(), |text, (told, own)| text.replace(told, own));
    let start = |(variables, address): &(Vec<(String, String)>, String)| {
        let variables: Vec<_> = variables.iter().map(|(name, value)| (name.clone(), moved(value))).collect();
        Instance::start(dir.path(), &variables, &moved(address))
    };
    let (one, two) = (start(&told[0]), start(&told[1]));

    // What is written through the replica is on both; its client sees it at once.
    one.shows("\n").await;
    let posted = two.answer(Request::post(&two.url), "hello").await;
    let read = Request::get(&two.url).header("replite-token", posted.header("replite-token"));
    assert_eq!(two.answer(read, "").await.text(), "hello\n");
    one.shows("hello\n").await;
    one.answer(Request::post(&one.url), "again").await;
    two.shows("hello\nagain\n").await;

    for Instance { mut process, .. } in [two, one] {
        process.signal(Signal::INT);
        let status = process.wait(crate::support::LIMIT);
        assert!(status.success(), "{status}");
    }
    for path in ["one/notes.db", "two/notes.db"] {
        let conn = replite::rusqlite::Connection::open(dir.path().join(path)).unwrap();
        let notes: i64 = conn.query_row("SELECT count(*) FROM notes", [], |row| row.get(0)).unwrap();
        assert_eq!(notes, 2, "{path}");
    }
}

#[test]
fn a_program_that_can_not_start_says_what_to_do_in_a_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let variables = |all: &[(&str, &str)]| -> Vec<(String, String)> {
        all.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    };
    for (set, said) in [
        (&[][..], "Error: the environment variable REPLITE_PATH: it is not set: give the path"),
        (&[("REPLITE_PATH", "a.db"), ("REPLITE_LISTEN", "127.0.0.1:1")], "Error: configuration: nodes that"),
        (&[("REPLITE_PATH", ":memory:")], "Error: :memory:: what is in memory has no file to replicate"),
    ] {
        let Instance { mut process, .. } = Instance::start(dir.path(), &variables(set), "127.0.0.1:0");
        let line = process.line("Error: ");
        assert!(line.starts_with(said), "{line}");
        assert!(!process.wait(crate::support::LIMIT).success());
    }
}
