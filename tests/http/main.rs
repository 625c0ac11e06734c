//! The doors: the layer, the endpoint, proxies before them, and applications as a whole.

#[path = "../support/app.rs"]
mod app;
mod busy;
mod drain;
mod endpoint;
mod example;
#[path = "../support/http.rs"]
mod http_support;
mod mounted;
mod nginx;
mod nginx_http2;
mod page;
#[path = "../support/recorder.rs"]
mod recorder;
mod restart;
mod smuggling;
mod stack;
#[path = "../support/lib.rs"]
mod support;
mod two_databases;

/// The process of a node that `app` starts.
#[test]
#[ignore = "runs as the child of other tests"]
fn node_process() {
    if support::is_child() {
        app::run_node();
    }
}
