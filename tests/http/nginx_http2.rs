//! A primary behind nginx as Debian packages it, which is spoken to in HTTP/2.

use crate::app::*;
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;

use crate::http_support::*;
use crate::support::*;

/// What a client of the replica hears that names the host `app.example`, in HTTP/1.1 and in HTTP/2
/// as gRPC's clients do.
async fn hosts(pass: impl FnOnce(u16) -> String, replica: &[(&str, &str)]) -> [(u16, String); 2] {
    let dir = tempfile::tempdir().unwrap();
    let [door, primary_port, port] = [own_port(), own_port(), own_port()];
    // It speaks HTTP/2 on its one port, and the primary's own HTTP/1.1, or gRPC, on the other side.
    let pass = pass(primary_port);
    let server = format!("server {{ listen 127.0.0.1:{door} http2; location / {{ {pass} }} }}");
    let _nginx = nginx(dir.path(), door, &server);
    let advertised = format!("http://127.0.0.1:{door}");
    let primary = node(dir.path(), primary_port, None, "", &[("ADVERTISE", &advertised)]);
    primary.expect("ready");
    let follows = format!("http://127.0.0.1:{primary_port}");
    let replica = node(dir.path(), port, None, &follows, replica);
    replica.expect("ready");

    let ask = async |version: Version| {
        let http2 = version == Version::HTTP_2;
        let client: Client<_, Full<bytes::Bytes>> =
            Client::builder(TokioExecutor::new()).http2_only(http2).build_http();
        let mut request = Request::post(format!("http://127.0.0.1:{port}/host"));
        request =
            if http2 { request.header("te", "trailers") } else { request.header("host", "app.example") };
        let request = request.body(Full::from("x")).unwrap();
        let (head, body) = within("an answer", client.request(request)).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    };
    let answers = [ask(Version::HTTP_11).await, ask(Version::HTTP_2).await];
    tokio::task::block_in_place(|| {
        replica.end();
        primary.end();
    });
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn a_primary_behind_nginx_is_asked_in_http2_by_the_name_that_the_client_used() {
    let pass = |port| {
        format!(
            "proxy_pass http://127.0.0.1:{port}; proxy_http_version 1.1; proxy_set_header Host $http_host;"
        )
    };
    let [one, two] = hosts(pass, &[("HTTP2", "yes")]).await;
    assert_eq!(one, (200, "app.example app.example".into()));
    assert_eq!(two.0, 200, "{two:?}");
    assert!(two.1.starts_with("127.0.0.1:"), "{two:?}");
}

/// As gRPC is passed on: what the client asks in HTTP/2 is HTTP/2 on all of its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn a_primary_behind_nginx_answers_grpc() {
    let pass = |port| format!("grpc_pass grpc://127.0.0.1:{port};");
    let [_, two] = hosts(pass, &[]).await;
    assert_eq!(two.0, 200, "{two:?}");
}
