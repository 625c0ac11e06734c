//! An orderly restart of the primary under clients that go through a replica: all nodes are
//! processes, and no request fails.

use crate::app::*;

/// How often the primary is restarted. The figure `orderly_restart_failed` does it more often.
const ROUNDS: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_restart_loses_no_request() {
    none_fails(Setting { way: ForwardWay::Http1, own_listener: false }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_restart_loses_no_request_in_http2() {
    none_fails(Setting { way: ForwardWay::Http2, own_listener: false }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orderly_restart_loses_no_request_on_the_channel() {
    for own_listener in [false, true] {
        none_fails(Setting { way: ForwardWay::Channel, own_listener }).await;
    }
}

/// The stream stands before the application listens again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_listens_late_loses_no_request() {
    none_fails(Setting { way: ForwardWay::Http1, own_listener: true }).await;
}

async fn none_fails(setting: Setting) {
    let result = restarts(setting, ROUNDS).await;
    println!("{} requests, the longest took {:?}", result.requests, result.longest);
    assert!(result.failed.is_empty(), "{} of {}: {:#?}", result.failed.len(), result.requests, result.failed);
}
