//! What the tests of the doors share: an HTTP client, nginx, and the example application.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustix::process::{Pid, Signal, kill_process};

use crate::support::*;

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

/// A program of the system; servers are not on everybody's search path.
pub(crate) fn installed(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).chain(["/usr/sbin".into()]).map(|dir| dir.join(name));
    found.into_iter().find(|file| file.is_file()).unwrap_or_else(|| panic!("{name} is not installed"))
}

/// nginx that listens on a port, with this in its section `http`.
pub(crate) fn nginx(dir: &Path, port: u16, http: &str) -> Process {
    // One process, so that no worker outlives the test, or is another user who can't enter the
    // directory.
    let d = dir.display();
    let config = format!(
        "daemon off; master_process off; pid {d}/nginx.pid; error_log {d}/nginx.log;
         events {{}}
         http {{
             access_log off;
             client_body_temp_path {d}/body; proxy_temp_path {d}/proxy;
             fastcgi_temp_path {d}/fastcgi; uwsgi_temp_path {d}/uwsgi; scgi_temp_path {d}/scgi;
             {http}
         }}"
    );
    let file = dir.join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(installed("nginx"));
    command.arg("-e").arg(dir.join("nginx.log")).arg("-p").arg(dir).arg("-c").arg(file);
    let mut nginx = Process::program(&mut command);
    nginx.until("nginx listens", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    nginx
}

/// The example application, which `cargo test` builds beside the tests.
pub(crate) fn example() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let example = test.parent().unwrap().parent().unwrap().join("examples").join("axum-app");
    assert!(example.is_file(), "run `cargo build --example axum-app` (with the tests' profile) first");
    example
}

/// A running example application.
pub(crate) struct Example {
    pub(crate) process: Process,
    /// Its instances.
    pub(crate) urls: Vec<String>,
}

/// What the launcher's table says of an instance.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) url: String,
    pub(crate) role: String,
    pub(crate) pid: Pid,
}

impl Example {
    fn start(urls: Vec<String>, configure: impl FnOnce(&mut Command)) -> Example {
        let mut command = Command::new(example());
        command.env_remove("RUST_LOG").env("REPLITE_SECRET", "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c");
        configure(&mut command);
        Example { process: Process::program(&mut command), urls }
    }

    /// Three instances with their launcher, on three ports in a row.
    pub(crate) fn launcher(port: u16, data: &Path, options: &[&str]) -> Example {
        Example::start(urls(port), |command| {
            command.arg("--base-port").arg(port.to_string()).arg("--data").arg(data).args(options);
        })
    }

    /// The same with a log of all that is told.
    pub(crate) fn talkative(data: &Path, fixed: bool) -> Example {
        let port = three_ports();
        Example::start(urls(port), |command| {
            command.arg("--base-port").arg(port.to_string()).arg("--data").arg(data).env("RUST_LOG", "info");
            match fixed {
                true => command.args(["--primary", &urls(port)[0]]),
                // Members that end at one time lose each other, and say so.
                false => command.args(["--lease", "directory"]),
            };
        })
    }

    /// Three instances that find their primary by a lease, when they are ready.
    pub(crate) fn three(data: &Path) -> (Example, [Row; 3]) {
        let example = Example::launcher(three_ports(), data, &[]);
        let table = example.table();
        (example, table)
    }

    /// The same with the first one as the fixed primary.
    pub(crate) fn fixed(data: &Path) -> (Example, [Row; 3]) {
        let port = three_ports();
        let example = Example::launcher(port, data, &["--primary", &urls(port)[0]]);
        let table = example.table();
        (example, table)
    }

    /// Waits until all are ready.
    pub(crate) fn table(&self) -> [Row; 3] {
        let row = |url: &String| {
            let line = self.process.line(&format!("{url} "));
            let mut words = line.split_whitespace().map(str::to_string);
            let mut word = || words.next().unwrap();
            let (url, role) = (word(), word());
            Row { url, role, pid: Pid::from_raw(word().parse().unwrap()).unwrap() }
        };
        let rows: Vec<Row> = self.urls.iter().map(row).collect();
        self.process.line("add a note");
        rows.try_into().unwrap()
    }

    /// One instance, a primary.
    pub(crate) fn one(data: &Path, options: &[&str]) -> Example {
        let address = format!("127.0.0.1:{}", own_port());
        let url = format!("http://{address}");
        Example::start(vec![url.clone()], |c| {
            c.args(["node", "--listen", &address, "--primary", &url, "--data"]).arg(data).args(options);
        })
    }

    /// A replica of that one, which does not know it by a name of its own, and is not known by one.
    pub(crate) fn replica_of(primary: &str, data: &Path) -> Example {
        let address = format!("127.0.0.1:{}", own_port());
        Example::start(vec![format!("http://{address}")], |c| {
            c.args(["node", "--listen", &address, "--primary", primary, "--data"]).arg(data);
        })
    }

    /// One of the three instances from this port on, with this lease.
    pub(crate) fn with_lease(first: u16, index: u16, data: &Path, lease: &str) -> Example {
        let (urls, port) = (urls(first), first + index);
        Example::start(vec![urls[usize::from(index)].clone()], |c| {
            c.args(["node", "--listen", &format!("127.0.0.1:{port}"), "--lease", lease, "--data"]);
            c.arg(data.join(port.to_string())).args(["--peers", &urls.join(",")]);
        })
    }

    /// A member without a database.
    pub(crate) fn witness(port: u16, data: &Path, lease: &str) -> Example {
        Example::start(Vec::new(), |c| {
            c.args(["witness", "--listen", &format!("127.0.0.1:{port}"), "--lease", lease, "--data"]);
            c.arg(data.join("witness"));
        })
    }

    /// One of the three instances from this port on, with the lease beside the directories of all.
    pub(crate) fn elected(first: u16, index: u16, data: &Path, options: &[&str]) -> Example {
        let (urls, port) = (urls(first), first + index);
        let peers = urls.join(",");
        Example::start(vec![urls[usize::from(index)].clone()], |c| {
            c.args(["node", "--listen", &format!("127.0.0.1:{port}"), "--peers", &peers, "--lease"]);
            c.arg(data.join("lease")).arg("--data").arg(data.join(port.to_string())).args(options);
        })
    }
}

/// Those of three instances on ports in a row.
fn urls(port: u16) -> Vec<String> {
    (port..port + 3).map(|port| format!("http://127.0.0.1:{port}")).collect()
}

/// Kills an instance, and returns when its launcher knows. Its connections have ended then: a process
/// whose exit status is there may still have threads.
pub(crate) fn kill(pid: Pid) {
    kill_process(pid, Signal::KILL).unwrap();
    until("its end", || !Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
}

/// Whether the process is there, and not only its exit status, which nobody may have asked for.
pub(crate) fn runs(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| !stat.rsplit(") ").next().unwrap().starts_with('Z'))
}
