//! What the tests of the doors share: an HTTP client, and other programs that end with the test.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustix::process::{Pid, Signal, kill_process};

/// Longest wait for another program.
const LIMIT: Duration = Duration::from_secs(60);

/// A response that was read to its end.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The token cookie, as it is sent back.
    pub(crate) fn cookie(&self) -> Option<String> {
        let set = self.headers.get_all("set-cookie").iter().filter_map(|v| v.to_str().ok());
        set.filter(|v| v.starts_with("replite_")).find_map(|v| v.split(';').next()).map(str::to_string)
    }
}

/// A client that sends each request once.
#[derive(Clone)]
pub(crate) struct Http(Client<HttpConnector, Full<Bytes>>);

impl Http {
    pub(crate) fn new() -> Http {
        Http(Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http())
    }

    /// Fails when no whole response came.
    pub(crate) async fn send<B: Into<Bytes>>(&self, request: Request<B>) -> Result<Answer, String> {
        let response = self.0.request(request.map(|body| Full::new(body.into()))).await;
        let (head, body) = response.map_err(|e| format!("{e:?}"))?.into_parts();
        let body = body.collect().await.map_err(|e| format!("{e:?}"))?.to_bytes();
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
    }

    pub(crate) async fn get(&self, url: &str) -> Result<Answer, String> {
        self.send(Request::get(url).body("").unwrap()).await
    }
}

/// Another program, killed when the test is done with it.
pub(crate) struct Program(pub(crate) Child);

impl Program {
    pub(crate) fn start(command: &mut Command) -> Program {
        Program(command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of the system; servers are not on everybody's search path.
pub(crate) fn installed(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).chain(["/usr/sbin".into()]).map(|dir| dir.join(name));
    found.into_iter().find(|file| file.is_file()).unwrap_or_else(|| panic!("{name} is not installed"))
}

/// The example application, which `cargo test` builds beside the tests.
pub(crate) fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let example = test.parent().unwrap().parent().unwrap().join("examples").join("axum-app");
    assert!(example.is_file(), "run `cargo build --example axum-app` (with the tests' profile) first");
    example
}

/// A running example application, by what it prints.
pub(crate) struct Example {
    pub(crate) program: Program,
    /// Lines of both outputs.
    lines: Receiver<String>,
}

impl Example {
    pub(crate) fn start(configure: impl FnOnce(&mut Command)) -> Example {
        let mut command = Command::new(example());
        configure(&mut command);
        command.env_remove("RUST_LOG").env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut program = Program::start(&mut command);
        let (sender, lines) = channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(program.0.stdout.take().unwrap()), Box::new(program.0.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    println!("| {line}");
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Example { program, lines }
    }

    /// Three instances with their launcher, on three ports in a row.
    pub(crate) fn launcher(port: u16, data: &Path) -> Example {
        Example::start(|command| {
            command.arg("--base-port").arg(port.to_string()).arg("--data").arg(data);
        })
    }

    /// The same when they are ready, and their URLs.
    pub(crate) fn three(data: &Path) -> (Example, Vec<String>) {
        let port = three_ports();
        let example = Example::launcher(port, data);
        example.line("add a note");
        (example, (port..port + 3).map(|port| format!("http://127.0.0.1:{port}")).collect())
    }

    /// One instance, a primary.
    pub(crate) fn one(data: &Path, options: &[&str]) -> (Example, String) {
        let address = format!("127.0.0.1:{}", three_ports());
        let url = format!("http://{address}");
        let example = Example::start(|c| {
            c.args(["node", "--listen", &address, "--primary", &url, "--data"]).arg(data).args(options);
            c.env("REPLITE_SECRET", "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c");
        });
        (example, url)
    }

    /// The next line with this in it.
    pub(crate) fn line(&self, part: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(part) => return line,
                Ok(_) => {}
                Err(error) => panic!("{part:?} was not printed: {error}"),
            }
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.program.0)
    }

    /// Asks it to end and waits until it did.
    pub(crate) fn end(mut self) -> (ExitStatus, Duration) {
        let begin = Instant::now();
        kill_process(self.pid(), Signal::TERM).unwrap();
        (self.program.0.wait().unwrap(), begin.elapsed())
    }
}

/// The first of three free ports in a row.
pub(crate) fn three_ports() -> u16 {
    let free = |port| TcpListener::bind(("127.0.0.1", port)).ok();
    // Below those that the system gives out by itself, and elsewhere for each process.
    let begin = 10_000 + u16::try_from(std::process::id() % 1000).unwrap() * 20;
    let mut ports = (begin..32_000).chain(10_000..begin);
    static TAKEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap();
    let fits = |port: &u16| {
        let apart = taken.iter().all(|other| other.abs_diff(*port) >= 3);
        apart && (*port..port + 3).all(|port| free(port).is_some())
    };
    let port = ports.find(fits).expect("three free ports");
    taken.push(port);
    port
}
