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

impl Example {
    fn start(urls: Vec<String>, configure: impl FnOnce(&mut Command)) -> Example {
        let mut command = Command::new(example());
        configure(&mut command);
        command.env_remove("RUST_LOG").env("NO_COLOR", "1");
        Example { process: Process::program(&mut command), urls }
    }

    /// Three instances with their launcher, on three ports in a row.
    pub(crate) fn launcher(port: u16, data: &Path) -> Example {
        let urls = (port..port + 3).map(|port| format!("http://127.0.0.1:{port}")).collect();
        Example::start(urls, |command| {
            command.arg("--base-port").arg(port.to_string()).arg("--data").arg(data);
        })
    }

    /// The same when they are ready.
    pub(crate) fn three(data: &Path) -> Example {
        let example = Example::launcher(three_ports(), data);
        example.process.line("add a note");
        example
    }

    /// One instance, a primary.
    pub(crate) fn one(data: &Path, options: &[&str]) -> Example {
        let address = format!("127.0.0.1:{}", own_port());
        let url = format!("http://{address}");
        Example::start(vec![url.clone()], |c| {
            c.args(["node", "--listen", &address, "--primary", &url, "--data"]).arg(data).args(options);
            c.env("REPLITE_SECRET", "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c");
        })
    }
}
