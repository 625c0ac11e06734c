//! What the tests of the doors share: an HTTP client, and other programs that end with the test.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::path::PathBuf;
use std::process::{Child, Command};

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

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
