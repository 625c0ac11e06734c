//! Requests that two servers could read in two ways: what a replica sends on is one request, the
//! one that it read.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::ConnectInfo;
use replite::{Addresses, Db, ReplayLayer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::recorder::{Recorder, Request};
use crate::support::*;

/// A replica with the layer, whose primary's app is a recorder.
struct Front {
    _dir: tempfile::TempDir,
    primary: Db,
    replica: Db,
    recorder: Recorder,
    address: SocketAddr,
}

impl Front {
    async fn start(options: impl FnOnce(ReplayLayer) -> ReplayLayer) -> Front {
        let dir = tempfile::tempdir().unwrap();
        let recorder = Recorder::start().await;
        let addresses = Addresses::new(format!("http://{}", recorder.address));
        let primary = Db::open(primary(&dir.path().join("p.db"), 0).addresses(addresses)).await.unwrap();
        let url = primary.node().addresses.replication.clone();
        let replica = Db::open(replica(&dir.path().join("r.db"), &url)).await.unwrap();
        within("ready", replica.ready()).await.unwrap();
        let layer = options(replica.replay_layer())
            .client_ip(|parts| parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|client| client.0.ip()));
        let app = axum::Router::new().fallback(|| async { "here" }).layer(layer);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(axum::serve(listener, app).into_future());
        Front { _dir: dir, primary, replica, recorder, address }
    }

    /// Sends bytes on a connection of their own, and then its end once so many answers came.
    /// Returns the statuses of all answers.
    async fn send(&self, bytes: &[u8], answers: usize) -> Vec<u16> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        // The server may answer and close before it has read everything.
        let _ = stream.write_all(bytes).await;
        let mut got = Vec::new();
        let mut ended = false;
        while !ended && statuses(&got).len() < answers {
            ended = !matches!(within("an answer", stream.read_buf(&mut got)).await, Ok(n) if n > 0);
        }
        let _ = stream.shutdown().await;
        // A connection that is closed with unread bytes is reset.
        let _ = within("the end", stream.read_to_end(&mut got)).await;
        statuses(&got)
    }

    /// The same, and what the primary got. A request of a client without guile comes last, so that
    /// everything before it has arrived, also what hides in a connection that is used again.
    async fn exchange(&self, bytes: &[u8], answers: usize) -> (Vec<u16>, Vec<Request>) {
        let statuses = self.send(bytes, answers).await;
        let honest = b"POST /honest HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc";
        assert_eq!(self.send(honest, 1).await, [201]);
        let mut requests = self.recorder.take();
        // One that was cut may be seen to be after the honest one.
        let at = requests.iter().position(|r| r.line == "POST /honest HTTP/1.1").expect("the honest one");
        let last = requests.remove(at);
        assert_eq!((last.body.as_slice(), last.cut), (&b"abc"[..], false), "{last:?}");
        (statuses, requests)
    }

    async fn stop(self) {
        within("shutdown", self.replica.shutdown()).await;
        within("shutdown", self.primary.shutdown()).await;
    }
}

/// The statuses of answers that follow each other, each with a content-length.
fn statuses(mut bytes: &[u8]) -> Vec<u16> {
    let mut all = Vec::new();
    while let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
        let length = head.lines().find_map(|l| l.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |l| l.parse().unwrap());
        if bytes.len() < end + 4 + length {
            break;
        }
        bytes = &bytes[end + 4 + length..];
        if status >= 200 {
            all.push(status);
        }
    }
    all
}

/// What the primary sees of a request with the body `abcd`.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Sees {
    /// One request with that body.
    One,
    /// One request without a body.
    Empty,
    /// Nothing, or the beginning of a request that never ends: what came was refused on the way.
    NoneWhole,
    /// Nothing; the head was refused.
    Nothing,
}

fn check(what: &str, statuses: &[u16], requests: &[Request], line: &str, sees: Sees) {
    let shown = format!("{what}: {statuses:?} {requests:?}");
    for request in requests {
        assert_eq!(request.line, line, "{shown}");
        let hops = request.all("replite-hop");
        // The node's own; one that was made up only makes its request's hops fewer.
        let count = if what == "spoofed" { "v1.2." } else { "v1.1." };
        assert!(hops.len() == 1 && hops[0].starts_with(count) && hops[0].len() > 100, "{shown}");
        for name in ["connection", "keep-alive", "upgrade", "http2-settings", "proxy-connection"] {
            assert!(request.all(name).is_empty(), "{shown}");
        }
    }
    let whole = requests.iter().filter(|r| !r.cut).count();
    match sees {
        Sees::One | Sees::Empty => {
            let body: &[u8] = if sees == Sees::One { b"abcd" } else { b"" };
            assert_eq!((statuses, requests.len(), whole), (&[201][..], 1, 1), "{shown}");
            assert_eq!(requests[0].body, body, "{shown}");
        }
        Sees::NoneWhole => {
            assert_eq!(whole, 0, "{shown}");
            assert!(statuses.iter().all(|s| *s >= 400), "{shown}");
        }
        Sees::Nothing => {
            assert_eq!(requests.len(), 0, "{shown}");
            assert!(statuses.len() == 1 && (400..500).contains(&statuses[0]), "{shown}");
        }
    }
}

const CHUNKED: &str = "4\r\nabcd\r\n0\r\n\r\n";
const HIDDEN: &str = "POST /hidden HTTP/1.1\r\nhost: x\r\n\r\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_with_two_possible_ends_is_refused_or_sent_on_with_one() {
    let front = Front::start(|layer| layer).await;
    for (head, body, sees) in [
        // The length counts for nothing beside the coding, and what follows the body is not looked
        // at.
        ("content-length: 40\r\ntransfer-encoding: chunked", &format!("0\r\n\r\n{HIDDEN}")[..], Sees::Empty),
        ("transfer-encoding: chunked\r\ncontent-length: 6", &format!("{CHUNKED}{HIDDEN}"), Sees::One),
        ("transfer-encoding: chunked\r\ncontent-length: 4", CHUNKED, Sees::One),
        ("content-length: 4\r\ncontent-length: 5", "abcde", Sees::Nothing),
        ("content-length: 5\r\ncontent-length: 4", "abcde", Sees::Nothing),
        ("content-length: 4\r\ncontent-length: 4", "abcd", Sees::One),
        ("content-length: 4, 4", "abcd", Sees::Nothing),
        ("content-length: 4, 5", "abcde", Sees::Nothing),
        ("content-length: +4", "abcd", Sees::Nothing),
        ("content-length: -1", "abcd", Sees::Nothing),
        ("content-length: 0x4", "abcd", Sees::Nothing),
        ("content-length: 4 4", "abcd", Sees::Nothing),
        ("content-length: ", "abcd", Sees::Nothing),
        ("content-length: 99999999999999999999", "abcd", Sees::Nothing),
        ("transfer-encoding: chunked, identity", CHUNKED, Sees::Nothing),
        ("transfer-encoding: identity\r\ncontent-length: 4", "abcd", Sees::Nothing),
        ("transfer-encoding: xchunked\r\ncontent-length: 4", "abcd", Sees::Nothing),
        ("transfer-encoding: chunked\r\ntransfer-encoding: identity", CHUNKED, Sees::Nothing),
        ("transfer-encoding: \x0bchunked", CHUNKED, Sees::Nothing),
        ("transfer-encoding: \"chunked\"", CHUNKED, Sees::Nothing),
        ("transfer-encoding:\tchunked", CHUNKED, Sees::One),
        ("transfer-encoding: ChUnKeD", CHUNKED, Sees::One),
        // Other codings before the last one are dropped with it: the primary reads the same bytes.
        ("transfer-encoding: identity, chunked", CHUNKED, Sees::One),
        ("transfer-encoding: gzip\r\ntransfer-encoding: chunked", CHUNKED, Sees::One),
        ("transfer-encoding: chunked, chunked", CHUNKED, Sees::One),
        // These names only look like the framing's.
        ("content_length: 9\r\ntransfer_encoding: chunked\r\ncontent-length: 4", "abcd", Sees::One),
        // The headers of the framing are not for a client to take away.
        ("content-length: 4\r\nconnection: content-length", "abcd", Sees::One),
        ("transfer-encoding: chunked\r\nconnection: transfer-encoding", CHUNKED, Sees::One),
        ("content-length: 4\r\nexpect: 100-continue", "abcd", Sees::One),
        // What some clients offer with each first request; the connection stays as it is.
        (
            "upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AA\r\ncontent-length: 4",
            "abcd",
            Sees::One,
        ),
    ] {
        let bytes = format!("POST /a?b=c HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}");
        let (statuses, requests) = front.exchange(bytes.as_bytes(), 1).await;
        check(head, &statuses, &requests, "POST /a?b=c HTTP/1.1", sees);
    }
    let bytes = format!("POST /a HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{CHUNKED}");
    let (statuses, requests) = front.exchange(bytes.as_bytes(), 1).await;
    check("an old version", &statuses, &requests, "", Sees::Nothing);
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_are_made_anew_and_bad_ones_end_the_request() {
    let front = Front::start(|layer| layer).await;
    for (body, sees) in [
        ("4;a=b\r\nabcd\r\n0;c\r\n\r\n", Sees::One),
        ("4 \r\nabcd\r\n0\r\n\r\n", Sees::One),
        ("2\r\nab\r\n02\r\ncd\r\n000\r\n\r\n", Sees::One),
        // Trailers that were not announced stay behind, above all those that would be taken for
        // headers.
        ("4\r\nabcd\r\n0\r\nhost: evil\r\ncontent-length: 9\r\nx-sum: 1\r\n\r\n", Sees::One),
        ("4;a=\"\r\n\"\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("4;a=\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("zz\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("-4\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("+4\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("0x4\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        (" 4\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("4\nabcd\n0\n\n", Sees::NoneWhole),
        ("4\r\nabcdX0\r\n\r\n", Sees::NoneWhole),
        ("4\r\nabcd\n0\r\n\r\n", Sees::NoneWhole),
        ("4\r\nabcde\r\n0\r\n\r\n", Sees::NoneWhole),
        ("ffffffffffffffff1\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
        ("10000000000000004\r\nabcd\r\n0\r\n\r\n", Sees::NoneWhole),
    ] {
        let bytes = format!("POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        let (statuses, requests) = front.exchange(bytes.as_bytes(), 1).await;
        check(body, &statuses, &requests, "POST /a HTTP/1.1", sees);
        assert!(requests.iter().all(|r| r.trailers.is_empty()), "{body}: {requests:?}");
        let status = if sees == Sees::One { 201 } else { 400 };
        assert_eq!(statuses, [status], "{body}: it is the client's fault");
    }
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_header_is_refused() {
    let front = Front::start(|layer| layer).await;
    let many: String = (0..500).map(|n| format!("x-{n}: 1\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(1 << 20));
    for head in [
        "content-length : 4\r\n",
        " content-length: 4\r\n",
        "x: a\r\n b\r\n",
        "x: a\r\n\tcontent-length: 9\r\n",
        "x: a\rcontent-length: 9\r\n",
        "x: a\0b\r\n",
        "x: a\x01b\r\n",
        "x\0: a\r\n",
        ": a\r\n",
        "(x): a\r\n",
        "x y: a\r\n",
        "x\r\n",
        &many,
        &long,
    ] {
        let bytes = format!("POST /a HTTP/1.1\r\nhost: x\r\n{head}content-length: 4\r\n\r\nabcd");
        let (statuses, requests) = front.exchange(bytes.as_bytes(), 1).await;
        let shown: String = head.chars().take(40).collect();
        assert!(requests.is_empty(), "{shown:?}: {requests:?}");
        // A connection that is closed with unread bytes may be reset before its answer is read.
        let cut = statuses.is_empty() && head.len() > 1000;
        assert!(cut || (statuses.len() == 1 && (400..500).contains(&statuses[0])), "{shown:?}: {statuses:?}");
    }
    // Taken for the end of a line by the one parser there is; the primary is sent whole line ends.
    let bytes = b"POST /a HTTP/1.1\nhost: x\nx: a\ncontent-length: 4\n\nabcd";
    let (statuses, requests) = front.exchange(bytes, 1).await;
    check("bare LF", &statuses, &requests, "POST /a HTTP/1.1", Sees::One);
    assert_eq!(requests[0].all("x"), ["a"]);
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_primary_gets_path_and_query_as_they_came_whatever_stands_around_them() {
    let front = Front::start(|layer| layer).await;
    for (line, sent) in [
        ("POST //evil/a HTTP/1.1", Some("POST //evil/a HTTP/1.1")),
        ("POST /../%2e%2E/a%2Fb?c=%0d%0a&d HTTP/1.1", Some("POST /../%2e%2E/a%2Fb?c=%0d%0a&d HTTP/1.1")),
        ("POST /a HTTP/1.0", Some("POST /a HTTP/1.1")),
        ("post /a HTTP/1.1", Some("post /a HTTP/1.1")),
        ("POST /a#b HTTP/1.1", Some("POST /a HTTP/1.1")),
        // The connection goes to the primary all the same.
        ("POST http://127.0.0.1:1/a?b HTTP/1.1", Some("POST /a?b HTTP/1.1")),
        ("POST http://user@evil:80/a HTTP/1.1", Some("POST /a HTTP/1.1")),
        ("POST @evil/ HTTP/1.1", None),
        ("POST http:///a HTTP/1.1", None),
        ("POST ?a HTTP/1.1", None),
        ("POST  /a HTTP/1.1", None),
        ("POST /a  HTTP/1.1", None),
        ("POST /a b HTTP/1.1", None),
        ("POST /a\tb HTTP/1.1", None),
        ("POST /a?b=\x01 HTTP/1.1", None),
        ("POST /a?b=\r HTTP/1.1", None),
        ("POST /a", None),
        ("POST /a HTTP/2.0", None),
        ("POST /a HTTP/1.2", None),
        ("PO(ST /a HTTP/1.1", None),
        ("CONNECT evil:80 HTTP/1.1", None),
    ] {
        let bytes = format!("{line}\r\nhost: x\r\ncontent-length: 4\r\n\r\nabcd");
        let (statuses, requests) = front.exchange(bytes.as_bytes(), 1).await;
        match sent {
            Some(sent) => check(line, &statuses, &requests, sent, Sees::One),
            None => {
                assert!(requests.is_empty(), "{line}: {requests:?}");
                assert!(!statuses.is_empty(), "{line}: no answer");
                assert!(statuses.iter().all(|s| (400..500).contains(s)), "{line}: {statuses:?}");
            }
        }
        assert!(requests.iter().all(|r| r.all("host") == ["x"]), "{line}: {requests:?}");
    }
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_can_neither_pretend_to_be_a_node_nor_take_headers_from_the_primarys_sight() {
    let front = Front::start(|layer| layer).await;
    let bytes = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\
        replite-hop: v1.1.x.y.z\r\nReplite-Hop: v1.2.x.y.z\r\nreplite-primary: http://evil\r\nREPLITE-OUTCOME: no\r\n\
        replite-other: 1\r\nreplite_hop: 1\r\nreplite-token: v1.mine\r\n\
        x-forwarded-for: 1.1.1.1\r\nx-forwarded-for: 2.2.2.2\r\nx-forwarded-host: shop\r\nx-forwarded-proto: https\r\n\
        connection: close, host, x-mine, te, x-forwarded-for, replite-hop\r\nconnection: keep-alive\r\n\
        x-mine: 1\r\nx-other: 1\r\nkeep-alive: 9\r\nproxy-connection: x\r\nte: gzip, trailers\r\n\
        cookie: a=b\r\ncookie: c=d\r\n\r\nabcd";
    let (statuses, requests) = front.exchange(bytes, 1).await;
    check("spoofed", &statuses, &requests, "POST /a HTTP/1.1", Sees::One);
    let all = |name| requests[0].all(name).join(" + ");
    let none = ["replite-primary", "replite-outcome", "replite-other", "keep-alive", "proxy-connection"];
    assert!(none.iter().all(|name| all(name).is_empty()), "{requests:?}");
    assert!(!all("replite-hop").contains(".x.y.z"));
    assert_eq!((all("replite-token"), all("x-other")), ("v1.mine".into(), "1".into()));
    assert_eq!(all("x-mine"), "1", "the client can't have it taken away");
    assert_eq!((all("host"), all("te"), all("cookie")), ("x".into(), "trailers".into(), "a=b; c=d".into()));
    assert_eq!(all("x-forwarded-for"), "1.1.1.1, 2.2.2.2, 127.0.0.1");
    // What the proxies before this node said is kept.
    let bytes = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\nx-forwarded-for: 1.1.1.1\r\n\
        x-forwarded-for: 2.2.2.2\r\nx-forwarded-host: shop\r\nx-forwarded-proto: https\r\n\r\nabcd";
    let (_, requests) = front.exchange(bytes, 1).await;
    let all = |name| requests[0].all(name).join(" + ");
    assert_eq!(all("x-forwarded-for"), "1.1.1.1, 2.2.2.2, 127.0.0.1");
    assert_eq!((all("x-forwarded-host"), all("x-forwarded-proto")), ("shop".into(), "https".into()));
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_follow_each_other_on_one_connection_stay_apart() {
    let front = Front::start(|layer| layer).await;
    let bytes = "POST /1 HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nabcd\
        GET /2 HTTP/1.1\r\nhost: x\r\n\r\n\
        POST /3 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n\
        POST /4 HTTP/1.1\r\nhost: x\r\n\r\n";
    let (statuses, requests) = front.exchange(bytes.as_bytes(), 4).await;
    assert_eq!(statuses, [201, 200, 201, 201]);
    let seen: Vec<_> = requests.iter().map(|r| (r.line.as_str(), r.body.as_slice())).collect();
    let lines = ["POST /1 HTTP/1.1", "POST /3 HTTP/1.1", "POST /4 HTTP/1.1"];
    assert_eq!(seen, [(lines[0], &b"abcd"[..]), (lines[1], b"abcd"), (lines[2], b"")]);
    // More than the length says is the next request, and this one is none.
    let bytes = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\nabcdefgh\r\n\r\n";
    let (statuses, requests) = front.exchange(bytes, 2).await;
    assert_eq!(statuses, [201, 400]);
    check("too long", &statuses[..1], &requests, "POST /a HTTP/1.1", Sees::One);
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_stops_frees_the_connection_to_the_primary() {
    let front = Front::start(|layer| layer.idle_timeout(Duration::from_millis(300))).await;
    // A short one is whole before the primary is asked. Of any other that has the beginning.
    for (head, asked) in
        [("content-length: 9", false), ("content-length: 100000", true), ("transfer-encoding: chunked", true)]
    {
        // The client stays connected, and the answer comes all the same.
        let bytes = format!("POST /a HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n4\r\nabcd");
        let mut stream = TcpStream::connect(front.address).await.unwrap();
        stream.write_all(bytes.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        while statuses(&got).is_empty() {
            assert!(within("an answer", stream.read_buf(&mut got)).await.unwrap() > 0, "{head}: closed");
        }
        assert_eq!(statuses(&got), [408], "{head}");
        let outcome = if asked { "unknown" } else { "not-executed" };
        let said = format!("replite-outcome: {outcome}");
        assert!(String::from_utf8_lossy(&got).contains(&said), "{head}");
        within("the primary's connection ends", async {
            while front.recorder.open() > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let requests = front.recorder.take();
        assert_eq!(requests.len(), usize::from(asked), "{head}: {requests:?}");
        assert!(requests.iter().all(|request| request.cut), "{head}: {requests:?}");
    }
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_within_its_body_leaves_no_whole_request() {
    let front = Front::start(|layer| layer).await;
    for (head, body) in [("content-length: 9", "abcd"), ("transfer-encoding: chunked", "4\r\nabcd\r\n")] {
        let bytes = format!("POST /a HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n{body}");
        let (statuses, requests) = front.exchange(bytes.as_bytes(), 0).await;
        check(head, &statuses, &requests, "POST /a HTTP/1.1", Sees::NoneWhole);
    }
    within("no connection is left but the honest one", async {
        while front.recorder.open() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    front.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_2_requests_that_mean_something_else_in_http_1_are_refused() {
    let front = Front::start(|layer| layer).await;
    let usual = [(":method", "POST"), (":scheme", "http"), (":path", "/a"), (":authority", "x")];
    for (name, value, sees) in [
        ("x-plain", "1", Sees::One),
        ("content-length", "4", Sees::One),
        ("content-length", "0", Sees::NoneWhole),
        ("content-length", "3", Sees::NoneWhole),
        ("content-length", "9", Sees::NoneWhole),
        ("content-length", "4, 4", Sees::NoneWhole),
        ("content-length", "+4", Sees::NoneWhole),
        ("transfer-encoding", "chunked", Sees::NoneWhole),
        ("connection", "content-length", Sees::NoneWhole),
        ("upgrade", "websocket", Sees::NoneWhole),
        ("x", "a\r\ntransfer-encoding: chunked", Sees::NoneWhole),
        ("x", "a\nb", Sees::NoneWhole),
        ("x", "a\0b", Sees::NoneWhole),
        ("x: y\r\nz", "a", Sees::NoneWhole),
        ("x y", "a", Sees::NoneWhole),
        ("X", "a", Sees::NoneWhole),
        (":path", "/a HTTP/1.1\r\nhost: evil\r\n\r\n", Sees::NoneWhole),
        (":path", "/a b", Sees::NoneWhole),
        (":method", "POST /hidden HTTP/1.1\r\nx:", Sees::NoneWhole),
        (":authority", "x\r\ncontent-length: 0", Sees::NoneWhole),
    ] {
        let mut headers: Vec<_> = usual.into_iter().filter(|(n, _)| *n != name).collect();
        // What begins with a colon must come first.
        headers.insert(if name.starts_with(':') { 0 } else { headers.len() }, (name, value));
        let answered = http_2(front.address, &headers, b"abcd").await;
        let (_, requests) = front.exchange(b"", 0).await;
        let shown = format!("{name:?}: {value:?}");
        if sees == Sees::One {
            assert!(answered, "{shown}");
            check(&shown, &[201], &requests, "POST /a HTTP/1.1", sees);
            assert_eq!(requests[0].all("host"), ["x"]);
        } else {
            check(&shown, &[], &requests, "POST /a HTTP/1.1", sees);
        }
    }
    front.stop().await;
}

/// Sends one request in frames of our own, which no library looks at. Says whether the answer was a
/// response.
async fn http_2(address: SocketAddr, headers: &[(&str, &str)], body: &[u8]) -> bool {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const SETTINGS: u8 = 4;
    const GO_AWAY: u8 = 7;
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0); // a literal that enters no table
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    let (end_stream, end_headers) = (1, 4);
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(SETTINGS, 0, 0, b""));
    bytes.extend(frame(HEADERS, end_headers, 1, &block));
    bytes.extend(frame(DATA, end_stream, 1, body));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&bytes).await.unwrap();
    loop {
        let mut head = [0; 9];
        if within("a frame", stream.read_exact(&mut head)).await.is_err() {
            return false;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        match head[3] {
            HEADERS => return true,
            RESET | GO_AWAY => return false,
            _ => within("a frame", stream.read_exact(&mut payload)).await.unwrap(),
        };
    }
}
