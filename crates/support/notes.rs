//! Three instances of an example application, as processes that share a lease. Both crates have
//! the same application: `/` has the notes, and `/visit` is a GET that writes.
#![allow(dead_code, reason = "the figures use a part of it")]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use ureq::Agent;
use ureq::http::Response;

use crate::support::{LIMIT, Process, assert_same_pages, own_port, until};

const LEASE_TIME: &str = "2s";

pub(crate) struct Instance {
    process: Option<Process>,
    pub(crate) url: String,
    listen: u16,
    app: u16,
    pub(crate) path: PathBuf,
}

/// A response that was read to its end.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) token: Option<String>,
    pub(crate) text: String,
}

pub(crate) struct Notes {
    program: PathBuf,
    directory: tempfile::TempDir,
    agent: Agent,
    pub(crate) instances: Vec<Instance>,
}

impl Notes {
    /// Starts all three, and waits until each shows what is there.
    pub(crate) fn start(program: &str) -> Notes {
        let directory = tempfile::tempdir().unwrap();
        let agent = Agent::config_builder().http_status_as_error(false).timeout_global(Some(LIMIT)).build();
        let instances = (0..3).map(|n| {
            let (listen, app) = (own_port(), own_port());
            let path = directory.path().join(format!("{n}/notes.db"));
            Instance { process: None, url: format!("http://127.0.0.1:{app}"), listen, app, path }
        });
        let instances = instances.collect();
        let program = example(program);
        let mut notes = Notes { program, directory, agent: agent.into(), instances };
        (0..3).for_each(|n| notes.restart(n));
        (0..3).for_each(|n| notes.until_shown(n, None, ""));
        notes
    }

    /// Starts the process of an instance that has none.
    pub(crate) fn restart(&mut self, n: usize) {
        let lease = format!("directory:{}", self.directory.path().join("lease").display());
        let instance = &mut self.instances[n];
        let mut command = Command::new(&self.program);
        // What is set for these tests is no setting of the program.
        let inherited = std::env::vars_os().map(|(name, _)| name);
        for name in inherited.filter(|name| name.to_string_lossy().starts_with("REPLITE_")) {
            command.env_remove(name);
        }
        command
            .arg(format!("127.0.0.1:{}", instance.app))
            .env("REPLITE_PATH", &instance.path)
            .env("REPLITE_SECRET", "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c")
            .env("REPLITE_LISTEN", format!("127.0.0.1:{}", instance.listen))
            .env("REPLITE_ADVERTISE", &instance.url)
            .env("REPLITE_LEASE", lease)
            .env("REPLITE_BOOTSTRAP", "3")
            .env("REPLITE_LEASE_TIME", LEASE_TIME);
        instance.process = Some(Process::program(&mut command));
    }

    pub(crate) fn kill(&mut self, n: usize) {
        self.instances[n].process.take().unwrap().kill();
    }

    /// None: no response came.
    pub(crate) fn get(&self, n: usize, path: &str, token: Option<&str>) -> Option<Answer> {
        let request = self.agent.get(format!("{}{path}", self.instances[n].url));
        let request =
            token.into_iter().fold(request, |request, token| request.header("replite-token", token));
        request.call().ok().and_then(answer)
    }

    fn post(&self, n: usize, text: &str) -> Option<Answer> {
        self.agent.post(&self.instances[n].url).send(text).ok().and_then(answer)
    }

    /// Adds a note through an instance, and asks again until it has. The token of the response.
    pub(crate) fn add(&self, n: usize, text: &str) -> String {
        let mut token = None;
        until("a note is added", || {
            let added = self.post(n, text).filter(|answer| answer.status == 200);
            added.map(|answer| token = Some(answer.token.expect("a response without a token"))).is_some()
        });
        token.unwrap()
    }

    /// The notes that the client with this token has from an instance.
    pub(crate) fn shown(&self, n: usize, token: &str) -> String {
        let answer = self.get(n, "/", Some(token)).expect("an instance that answers");
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.text
    }

    /// Waits for an instance that may not be up.
    pub(crate) fn until_shown(&self, n: usize, token: Option<&str>, text: &str) {
        until("an instance shows the notes", || {
            self.get(n, "/", token).is_some_and(|answer| answer.status == 200 && answer.text.contains(text))
        });
    }

    /// A GET that writes, through an instance: how many there were, and how long it took.
    pub(crate) fn visit(&self, n: usize) -> (u64, Duration) {
        let begin = Instant::now();
        let answer = self.get(n, "/visit", None).expect("an instance that answers");
        let took = begin.elapsed();
        assert_eq!(answer.status, 200, "{}", answer.text);
        (answer.text.parse().unwrap(), took)
    }

    /// Ends all processes, as an orchestrator does. The files are the same then, and whole.
    pub(crate) fn end(mut self) {
        let last = self.add(0, "the last");
        (1..3).for_each(|n| self.until_shown(n, Some(&last), "the last"));
        for instance in &mut self.instances {
            instance.process.take().unwrap().end();
        }
        let [one, others @ ..] = &self.instances[..] else { unreachable!() };
        others.iter().for_each(|other| assert_same_pages(&one.path, &other.path));
    }
}

fn answer(mut response: Response<ureq::Body>) -> Option<Answer> {
    let status = response.status().as_u16();
    let token = response.headers().get("replite-token").map(|value| value.to_str().unwrap().to_owned());
    let text = response.body_mut().read_to_string().ok()?;
    Some(Answer { status, token, text })
}

/// The example, which is built with the tests.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().unwrap().parent().unwrap().join("examples").join(name);
    assert!(binary.is_file(), "run `cargo build --example {name}` (with the tests' profile) first");
    binary
}

/// What each instance takes, every other shows to the same client at once; whoever is killed, the
/// others go on with the pools that they have.
pub(crate) fn every_instance_takes_every_request(program: &str) {
    let mut notes = Notes::start(program);
    for n in 0..3 {
        let text = format!("through {n}");
        let token = notes.add(n, &text);
        (0..3).for_each(|other| assert!(notes.shown(other, &token).contains(&text), "{n}, {other}"));
    }
    for n in 0..3 {
        let (count, took) = notes.visit(n);
        assert_eq!(count, n as u64 + 1, "it ran once, on the primary");
        println!("a GET that writes, through instance {n}: {took:?}");
    }
    // One of them is the primary.
    for gone in 0..3 {
        notes.kill(gone);
        let others: Vec<usize> = (0..3).filter(|n| *n != gone).collect();
        for n in &others {
            let text = format!("through {n} without {gone}");
            let token = notes.add(*n, &text);
            others.iter().for_each(|other| assert!(notes.shown(*other, &token).contains(&text)));
        }
        notes.restart(gone);
        let text = format!("{gone} is there again");
        let token = notes.add(others[0], &text);
        notes.until_shown(gone, Some(&token), &text);
        // Whatever it was before, it takes writes, and sends on those that it can't do.
        let (before, _) = notes.visit(others[1]);
        let (after, _) = notes.visit(gone);
        assert_eq!(after, before + 1);
    }
    notes.end();
}

/// The lines of one source that the other has not, and is without.
pub(crate) fn lines_of_difference(with: &str, without: &str) -> (usize, usize) {
    let (with, without): (Vec<&str>, Vec<&str>) = (with.lines().collect(), without.lines().collect());
    // The longest common subsequence of lines.
    let mut longest = vec![vec![0; without.len() + 1]; with.len() + 1];
    for (i, one) in with.iter().enumerate().rev() {
        for (j, other) in without.iter().enumerate().rev() {
            longest[i][j] = match one == other {
                true => longest[i + 1][j + 1] + 1,
                false => longest[i + 1][j].max(longest[i][j + 1]),
            };
        }
    }
    (with.len() - longest[0][0], without.len() - longest[0][0])
}
