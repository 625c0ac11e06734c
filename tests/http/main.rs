//! The doors: the layer, the endpoint, proxies before them, and applications as a whole.

#[path = "../support/app.rs"]
mod app;
mod busy;
mod channel;
mod clients;
mod deploy;
mod drain;
mod endpoint;
mod example;
#[path = "../support/fleet.rs"]
mod fleet;
#[path = "../support/http.rs"]
mod http_support;
mod minimal;
mod mounted;
mod nginx;
mod nginx_http2;
mod nginx_https;
mod page;
mod past;
#[path = "../support/recorder.rs"]
mod recorder;
mod restart;
mod rolling;
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

/// The process of a node that `fleet` starts.
#[test]
#[ignore = "runs as the child of other tests"]
fn fleet_process() {
    if support::is_child() {
        fleet::run_member();
    }
}
