//! `lease::ObjectStore` over an S3 server, and all that such a server may answer.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use replite::lease::{ObjectStore, Store, Stored, SwapError, Version};
use replite::testing::lease::{Faulty, conformance};
use replite_stores::s3::{ACCESS_KEY, BUCKET, Counts, Fault, Rule, S3Server, SECRET_KEY};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// The longest wait for a thing that happens.
const LIMIT: Duration = Duration::from_secs(30);
/// The limit that a node would give a call, scaled down.
const CALL: Duration = Duration::from_millis(500);

async fn server() -> S3Server {
    S3Server::start(Path::new(env!("CARGO_BIN_EXE_s3-server"))).await.unwrap()
}

fn store(server: &S3Server) -> ObjectStore {
    ObjectStore::with_options(&format!("s3://{BUCKET}/app"), server.options()).unwrap()
}

const OBJECT: &str = "app/lease.json";

fn answer(status: u16, code: &str) -> Fault {
    Fault::Answer { status, code: code.into() }
}

/// With one record, and past the first request.
async fn begun(server: &S3Server) -> (ObjectStore, Version) {
    let store = store(server);
    let version = store.swap(None, b"{\"first\": 1}").await.unwrap();
    (store, version)
}

fn unavailable<T: std::fmt::Debug>(swapped: Result<T, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unavailable(why)) => why,
        other => panic!("it is {other:?}"),
    }
}

fn unknown<T: std::fmt::Debug>(swapped: Result<T, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unknown(why)) => why,
        other => panic!("it is {other:?}"),
    }
}

fn conflict<T: std::fmt::Debug>(swapped: Result<T, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Conflict)), "it is {swapped:?}");
}

async fn current(store: &ObjectStore) -> Stored {
    store.read().await.unwrap().expect("there is a record")
}

#[tokio::test]
async fn it_keeps_the_contract() {
    let server = server().await;
    conformance(|| Arc::new(store(&server))).await.unwrap();
}

#[tokio::test]
async fn it_keeps_the_contract_where_the_network_does_not_help() {
    let server = server().await;
    let seed = AtomicU64::new(0);
    conformance(|| {
        let faulty = Faulty::new(store(&server), seed.fetch_add(1, Ordering::Relaxed));
        faulty.lose_requests(0.1);
        faulty.lose_answers(0.1);
        faulty.hang(0.005);
        faulty.read_old(0.1);
        Arc::new(faulty)
    })
    .await
    .unwrap();
}

/// Every way of going wrong, one after the other, while eight handles write.
#[tokio::test]
async fn it_keeps_the_contract_while_the_server_errs() {
    let server = server().await;
    let checked = conformance(|| Arc::new(store(&server)));
    let err = async {
        let executed = |status, code: &str| Fault::Executed { status, code: code.into() };
        let faults = [
            executed(412, "PreconditionFailed"),
            executed(409, "ConditionalRequestConflict"),
            executed(500, "InternalError"),
            answer(409, "ConditionalRequestConflict"),
            answer(412, "PreconditionFailed"),
            answer(503, "SlowDown"),
            answer(403, "ExpiredToken"),
            Fault::LoseAnswer,
            Fault::LoseRequest,
            Fault::Delay { millis: 100 },
        ];
        for fault in faults.iter().cycle() {
            server.fault(Rule::puts(fault.clone()).of(OBJECT).times(1)).await.unwrap();
            server.fault(Rule::gets(fault.clone()).times(1)).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        checked = checked => checked.unwrap(),
        () = err => {}
    }
    assert!(server.counts().await.unwrap().faults > 20, "it did err");
}

/// History: no version has two that took its place, and all are one line.
#[tokio::test]
async fn of_many_that_race_one_wins_each_version() {
    const RACERS: usize = 6;
    const WINS: usize = 15;
    let server = server().await;
    let (first, version) = begun(&server).await;
    let done = Arc::new(Mutex::new(vec![]));
    let mut tasks = tokio::task::JoinSet::new();
    for racer in 0..RACERS {
        let (store, done) = (store(&server), done.clone());
        tasks.spawn(async move {
            let mut wins = 0;
            while wins < WINS {
                let over = current(&store).await.version;
                // All write the same bytes.
                match store.swap(Some(&over), b"{}").await {
                    Ok(version) => {
                        wins += 1;
                        done.lock().unwrap().push((over, version));
                    }
                    Err(SwapError::Conflict | SwapError::Unknown(_)) => {}
                    Err(error) => panic!("racer {racer}: {error}"),
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    let mut next: HashMap<Version, Version> = HashMap::new();
    for (over, version) in done.lock().unwrap().drain(..) {
        assert_eq!(next.insert(over, version), None, "two swaps over one version");
    }
    assert_eq!(next.len(), RACERS * WINS);
    let mut at = version;
    while let Some(version) = next.remove(&at) {
        at = version;
    }
    assert_eq!(current(&first).await.version, at);
    assert!(next.is_empty(), "two lines");
}

#[tokio::test]
async fn throttling_and_errors_leave_open_whether_it_was_done() {
    let server = server().await;
    let (store, mut version) = begun(&server).await;
    for (status, code) in
        [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError"), (408, "RequestTimeout")]
    {
        for done in [false, true] {
            let fault = match done {
                false => answer(status, code),
                true => Fault::Executed { status, code: code.into() },
            };
            server.fault(Rule::puts(fault).times(1)).await.unwrap();
            let puts = server.counts().await.unwrap().put;
            let why = unknown(store.swap(Some(&version), b"{}").await);
            assert!(why.contains(code) && why.contains(&format!("s3://{BUCKET}/{OBJECT}")), "{why}");
            assert_eq!(server.counts().await.unwrap().put, puts + 1, "it was sent once");
            let there = current(&store).await;
            assert_eq!(there.version != version, done, "{code}");
            version = store.swap(Some(&there.version), b"{\"next\": 1}").await.unwrap();
            server.fault(Rule::gets(answer(status, code)).times(1)).await.unwrap();
            let why = store.read().await.unwrap_err().to_string();
            assert!(why.contains(code), "{why}");
        }
    }
}

#[tokio::test]
async fn a_412_to_the_second_try_of_something_on_the_way_is_no_conflict() {
    let server = server().await;
    let again = [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict"), (404, "NoSuchKey")];
    for (status, code) in again {
        let executed = Rule::puts(Fault::Executed { status, code: code.into() }).of(OBJECT);
        let store = store(&server);
        let before = store.read().await.unwrap().map(|stored| stored.version);
        server.fault(executed.times(1)).await.unwrap();
        let version = store.swap(before.as_ref(), b"{\"ours\": 1}").await.unwrap();
        assert_eq!(current(&store).await, Stored::new(b"{\"ours\": 1}".to_vec(), version.clone()));
        assert_ne!(before, Some(version));
    }
    // The first record, too.
    fs::remove_file(server.file(OBJECT)).unwrap();
    let executed = Rule::puts(Fault::Executed { status: 412, code: "PreconditionFailed".into() }).of(OBJECT);
    server.fault(executed.clone().times(1)).await.unwrap();
    let store = store(&server);
    let version = store.swap(None, b"{}").await.unwrap();
    assert_eq!(current(&store).await.version, version);
    // And where it can't be asked.
    server.fault(executed.times(1)).await.unwrap();
    server.fault(Rule::gets(answer(500, "InternalError")).times(1)).await.unwrap();
    unknown(store.swap(Some(&version), b"{}").await);
}

#[tokio::test]
async fn a_condition_that_does_not_hold_is_a_conflict_where_that_can_be_proved() {
    let server = server().await;
    let (store, first) = begun(&server).await;
    let other = self::store(&server);
    let second = other.swap(Some(&first), b"{\"second\": 2}").await.unwrap();
    conflict(store.swap(Some(&first), b"{}").await);
    // Another has gone on from what may have been ours.
    let third = other.swap(Some(&second), b"{}").await.unwrap();
    unknown(store.swap(Some(&first), b"{}").await);
    conflict(store.swap(Some(&Version::new("1")), b"{}").await);
    // There is a first one, and others after it.
    unknown(store.swap(None, b"{}").await);
    assert_eq!(current(&store).await.version, third);
    // Another put is on its way, and may fail.
    for (status, code) in [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")] {
        server.fault(Rule::puts(answer(status, code)).times(1)).await.unwrap();
        let why = unknown(store.swap(Some(&third), b"{}").await);
        assert!(why.contains(code) && why.contains("still the one"), "{why}");
    }
    store.swap(Some(&third), b"{}").await.unwrap();
}

#[tokio::test]
async fn what_is_not_allowed_was_not_done_and_is_said() {
    let server = server().await;
    let (store, version) = begun(&server).await;
    for (status, code) in
        [(403, "ExpiredToken"), (401, "Unauthorized"), (400, "InvalidRequest"), (301, "PermanentRedirect")]
    {
        server.fault(Rule::all(answer(status, code)).times(2)).await.unwrap();
        let why = unavailable(store.swap(Some(&version), b"{}").await);
        assert!(why.contains(code), "{why}");
        let why = store.read().await.unwrap_err().to_string();
        assert!(why.contains(code), "{why}");
    }
    server.fault(Rule::puts(answer(403, "ExpiredToken")).times(1)).await.unwrap();
    let why = unavailable(store.swap(Some(&version), b"{}").await);
    assert!(why.contains("the credentials must be renewed"), "{why}");
    store.swap(Some(&version), b"{}").await.unwrap();
    // Another key than the server's.
    let mut options = server.options();
    options[1].1 = "another-secret".into();
    let stranger = ObjectStore::with_options(&format!("s3://{BUCKET}/app"), options).unwrap();
    let why = unavailable(stranger.swap(Some(&version), b"{}").await);
    assert!(why.contains("SignatureDoesNotMatch") && why.contains("are the credentials right"), "{why}");
    assert!(!why.contains("another-secret"), "{why}");
    // No bucket: that is not "no record".
    let nowhere = ObjectStore::with_options("s3://no-such-bucket/app", server.options()).unwrap();
    let why = nowhere.read().await.unwrap_err().to_string();
    assert!(why.contains("make the bucket first"), "{why}");
    let why = unavailable(nowhere.swap(None, b"{}").await);
    assert!(why.contains("make the bucket first"), "{why}");
    // Not by TLS, and not said to be so.
    let mut options = server.options();
    options.retain(|(key, _)| *key != "aws_allow_http");
    let plain = ObjectStore::with_options(&format!("s3://{BUCKET}/app"), options).unwrap();
    let why = unavailable(plain.swap(None, b"{}").await);
    assert!(why.contains("allow_http"), "{why}");
}

#[tokio::test]
async fn a_node_that_only_reads_needs_no_right_to_put() {
    let server = server().await;
    let (_, version) = begun(&server).await;
    let reader = store(&server);
    server.fault(Rule::puts(answer(403, "AccessDenied"))).await.unwrap();
    for _ in 0..3 {
        assert_eq!(current(&reader).await.version, version);
    }
    let asked = server.counts().await.unwrap();
    assert_eq!(asked.faults, 1, "it is found out once");
    unavailable(reader.swap(Some(&version), b"{}").await);
    server.calm().await.unwrap();
    reader.swap(Some(&version), b"{}").await.unwrap();
}

#[tokio::test]
async fn an_answer_that_is_lost_leaves_it_open() {
    let server = server().await;
    let (store, version) = begun(&server).await;
    server.fault(Rule::puts(Fault::LoseAnswer).times(1)).await.unwrap();
    unknown(store.swap(Some(&version), b"{\"lost\": 1}").await);
    let there = current(&store).await;
    assert_eq!(there.record, b"{\"lost\": 1}");
    server.fault(Rule::puts(Fault::LoseRequest).times(1)).await.unwrap();
    unknown(store.swap(Some(&there.version), b"{}").await);
    assert_eq!(current(&store).await, there);
    // A call that is given up is not done again by itself.
    server.fault(Rule::puts(Fault::Hang).times(1)).await.unwrap();
    let hangs = tokio::time::timeout(CALL, store.swap(Some(&there.version), b"{\"hangs\": 1}")).await;
    assert!(hangs.is_err());
    assert_eq!(current(&store).await, there);
    server.fault(Rule::puts(Fault::HangExecuted).times(1)).await.unwrap();
    let hangs = tokio::time::timeout(CALL, store.swap(Some(&there.version), b"{\"hangs\": 2}")).await;
    assert!(hangs.is_err());
    let done = current(&store).await;
    assert_eq!(done.record, b"{\"hangs\": 2}");
    // It comes late: only if nothing took its place.
    server.fault(Rule::puts(Fault::Delay { millis: 3000 }).times(1)).await.unwrap();
    let late = tokio::time::timeout(CALL, store.swap(Some(&done.version), b"{\"late\": 1}")).await;
    assert!(late.is_err());
    let after = store.swap(Some(&done.version), b"{\"after\": 1}").await.unwrap();
    eventually(async || server.counts().await.unwrap().late == 1).await;
    assert_eq!(current(&store).await.version, after);
    // Reads that hang are given up, too.
    server.fault(Rule::gets(Fault::Hang).times(1)).await.unwrap();
    assert!(tokio::time::timeout(CALL, store.read()).await.is_err());
    assert_eq!(current(&store).await.version, after);
}

async fn eventually(mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < end, "it never happens");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// For a while there is nothing but errors. What was not known to be done is settled by what is
/// there afterwards.
#[tokio::test]
async fn after_a_while_of_errors_it_goes_on() {
    for fault in [answer(500, "InternalError"), Fault::Hang, Fault::LoseRequest] {
        let server = server().await;
        let (store, version) = begun(&server).await;
        server.fault(Rule::all(fault).lasting(Duration::from_secs(2))).await.unwrap();
        let mut failed = 0;
        let mut done = None;
        eventually(async || {
            match tokio::time::timeout(CALL, store.swap(Some(&version), b"{}")).await {
                Ok(Ok(version)) => done = Some(version),
                Ok(Err(SwapError::Unknown(_))) | Err(_) => failed += 1,
                Ok(Err(error)) => panic!("{error}"),
            }
            done.is_some()
        })
        .await;
        assert!(failed > 0);
        assert_eq!(Some(current(&store).await.version), done);
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_was_sent_nothing_and_comes_back_with_the_record() {
    let mut server = server().await;
    let (store, version) = begun(&server).await;
    server.kill().await.unwrap();
    // The first may still have gone to a connection that was open.
    let _ = store.swap(Some(&version), b"{}").await;
    let why = unavailable(store.swap(Some(&version), b"{}").await);
    assert!(why.contains("refused"), "{why}");
    store.read().await.unwrap_err();
    server.restart().await.unwrap();
    assert_eq!(current(&store).await.version, version);
    store.swap(Some(&version), b"{}").await.unwrap();
}

#[tokio::test]
async fn a_store_that_ignores_conditions_is_refused_by_name() {
    let ignores = [(Fault::IgnoreIfNoneMatch, "`If-None-Match: *`"), (Fault::IgnoreIfMatch, "`If-Match`")];
    for (fault, condition) in ignores {
        let server = server().await;
        server.fault(Rule::puts(fault)).await.unwrap();
        let store = store(&server);
        for _ in 0..2 {
            let why = store.read().await.unwrap_err().to_string();
            assert!(why.contains(&format!("ignores {condition}")), "{why}");
            let why = unavailable(store.swap(None, b"{}").await);
            assert!(why.contains(&format!("ignores {condition}")), "{why}");
        }
        assert!(!server.file(OBJECT).exists(), "nothing was written");
        // It is mended, and needs no restart of the nodes.
        server.calm().await.unwrap();
        let version = store.swap(None, b"{}").await.unwrap();
        assert_eq!(current(&store).await.version, version);
    }
}

#[tokio::test]
async fn an_object_that_is_deleted_begins_anew_with_other_versions() {
    let server = server().await;
    let (store, first) = begun(&server).await;
    fs::remove_file(server.file(OBJECT)).unwrap();
    assert_eq!(store.read().await.unwrap(), None);
    conflict(store.swap(Some(&first), b"{}").await);
    // The same bytes.
    let again = store.swap(None, b"{\"first\": 1}").await.unwrap();
    assert_ne!(first, again);
    assert_eq!(current(&store).await.version, again);
    unknown(store.swap(Some(&first), b"{}").await);
    store.swap(Some(&again), b"{}").await.unwrap();
}

#[tokio::test]
async fn the_object_is_json_that_may_be_edited() {
    let server = server().await;
    let (store, first) = begun(&server).await;
    let text = fs::read(server.file(OBJECT)).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(json["record"]["first"], 1);
    json["record"]["first"] = 2.into();
    fs::write(server.file(OBJECT), serde_json::to_vec_pretty(&json).unwrap()).unwrap();
    let there = current(&store).await;
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&there.record).unwrap()["first"], 2);
    conflict(store.swap(Some(&first), b"{}").await);
    let next = store.swap(Some(&there.version), b"{}").await.unwrap();
    // What replite did not write is told, and nothing takes its place.
    for garbled in ["", "{}", "[1]", "not json", &"x".repeat(500_000)] {
        fs::write(server.file(OBJECT), garbled).unwrap();
        store.read().await.unwrap_err();
        unknown(store.swap(Some(&next), b"{}").await);
        unknown(store.swap(None, b"{}").await);
        assert_eq!(fs::read(server.file(OBJECT)).unwrap(), garbled.as_bytes());
    }
}

/// What the documentation says that it costs.
#[tokio::test]
async fn a_read_is_a_get_and_a_swap_is_a_put() {
    let server = server().await;
    let counts = async || {
        let counts = server.counts().await.unwrap();
        (counts.put, counts.get, counts.other)
    };
    let node = store(&server);
    assert!(node.read().await.unwrap().is_none());
    assert_eq!(counts().await, (3, 1, 0), "the first start of the first node");
    let mut version = node.swap(None, b"{}").await.unwrap();
    for _ in 0..5 {
        version = node.swap(Some(&version), b"{}").await.unwrap();
        node.read().await.unwrap();
    }
    assert_eq!(counts().await, (9, 6, 0));
    // Each other start.
    store(&server).read().await.unwrap();
    assert_eq!(counts().await, (11, 7, 0));
}

#[tokio::test]
async fn no_secret_is_in_what_is_printed() {
    let server = server().await;
    let (store, _) = begun(&server).await;
    let shown = format!("{store:?}");
    assert!(shown.contains(&format!("s3://{BUCKET}/{OBJECT}")), "{shown}");
    assert!(!shown.contains(SECRET_KEY), "{shown}");
    let unknown = ObjectStore::with_options("s3://bucket/app", [("aws_secret_acess_key", "of no one")]);
    let error = unknown.unwrap_err().to_string();
    assert!(error.contains("aws_secret_acess_key") && !error.contains("of no one"), "{error}");
}

/// Answers as a machine's own service of credentials does, with these credentials one after the
/// other. Returns its address.
async fn machine(credentials: Vec<[String; 3]>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let mut credentials = credentials.into_iter();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            let mut request = String::new();
            while !request.ends_with("\r\n\r\n") {
                stream.read_line(&mut request).await.unwrap();
            }
            let body = match request.split(' ').nth(1).unwrap() {
                "/latest/api/token" => "of-this-session".to_owned(),
                "/latest/meta-data/iam/security-credentials/" => "role".to_owned(),
                "/latest/meta-data/iam/security-credentials/role" => {
                    assert!(request.contains("x-aws-ec2-metadata-token: of-this-session"), "{request}");
                    let [key, secret, expires] = credentials.next().expect("it is not asked so often");
                    serde_json::json!({
                        "AccessKeyId": key, "SecretAccessKey": secret, "Token": "", "Expiration": expires
                    })
                    .to_string()
                }
                other => panic!("{other}"),
            };
            let head =
                format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).await.unwrap();
        }
    });
    address
}

#[tokio::test]
async fn the_credentials_of_a_machine_are_fetched_and_renewed_when_they_end() {
    let server = server().await;
    let role = |secret: &str, expires: &str| [ACCESS_KEY.to_owned(), secret.to_owned(), expires.to_owned()];
    // The first have ended by the time they are used.
    let given = vec![role("old", "2020-01-01T00:00:00Z"), role(SECRET_KEY, "2099-01-01T00:00:00Z")];
    let machine = machine(given).await;
    let mut options = server.options();
    options.retain(|(key, _)| !key.contains("access_key"));
    options.push(("aws_metadata_endpoint", machine));
    let store = ObjectStore::with_options(&format!("s3://{BUCKET}/app"), options).unwrap();
    let why = unavailable(store.swap(None, b"{}").await);
    assert!(why.contains("SignatureDoesNotMatch"), "{why}");
    let version = store.swap(None, b"{}").await.unwrap();
    for _ in 0..3 {
        assert_eq!(current(&store).await.version, version);
    }
}

#[tokio::test]
async fn credentials_that_can_not_be_fetched_are_said_to_be_so() {
    let server = server().await;
    let nothing = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut options = server.options();
    options.retain(|(key, _)| !key.contains("access_key"));
    options.push(("aws_metadata_endpoint", format!("http://{nothing}")));
    let store = ObjectStore::with_options(&format!("s3://{BUCKET}/app"), options).unwrap();
    let why = unavailable(store.swap(None, b"{}").await);
    assert!(why.contains(&nothing.to_string()), "{why}");
    let why = store.read().await.unwrap_err().to_string();
    assert!(why.contains(&nothing.to_string()), "{why}");
    assert_eq!(server.counts().await.unwrap(), Counts::default());
}
