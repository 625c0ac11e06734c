use std::future::poll_fn;
use std::task::Poll;

use serde_json::json;
use tokio::time::{Instant, timeout};

use self::fake::{Fake, Mishap};
use super::*;
use crate::error::Error;

mod fake;

/// Nothing takes so long.
const LIMIT: Duration = Duration::from_secs(20);

/// A handle to an etcd of this many members.
async fn etcd(fake: &Fake, members: usize) -> Etcd {
    let mut urls = Vec::new();
    for _ in 0..members {
        urls.push(fake.member().await);
    }
    Etcd::new(urls).unwrap()
}

async fn read(etcd: &Etcd) -> Result<Option<Stored>, String> {
    let read = timeout(LIMIT, etcd.read()).await.expect("a read ends");
    read.map_err(|error| error.to_string())
}

async fn swap(etcd: &Etcd, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
    timeout(LIMIT, etcd.swap(expected, record)).await.expect("a swap ends")
}

async fn current(etcd: &Etcd) -> Stored {
    read(etcd).await.unwrap().expect("there is a record")
}

/// One of these, and what it says.
#[track_caller]
fn unknown(swapped: Result<Version, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unknown(why)) => why,
        swapped => panic!("{swapped:?}"),
    }
}

#[track_caller]
fn unavailable(swapped: Result<Version, SwapError>) -> String {
    match swapped {
        Err(SwapError::Unavailable(why)) => why,
        swapped => panic!("{swapped:?}"),
    }
}

#[track_caller]
fn conflict(swapped: Result<Version, SwapError>) {
    assert!(matches!(swapped, Err(SwapError::Conflict)), "{swapped:?}");
}

fn refusal(why: &str, code: u64) -> String {
    json!({ "error": why, "message": why, "code": code }).to_string()
}

#[cfg(feature = "testing")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 3).await;
    // Each with connections of its own.
    let make = || Arc::new(Etcd::of(etcd.settings.clone())) as Arc<dyn Store>;
    crate::testing::lease::conformance(make).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_is_none_is_told() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    let header = r#"{"cluster_id":"77","revision":"2"}"#;
    let key_value =
        |value: &str| format!(r#"{{"header":{header},"kvs":[{{"mod_revision":"2","value":{value}}}]}}"#);
    let odd = [
        String::new(),
        "{}".into(),
        "null".into(),
        "[".repeat(60_000),
        r#"{"header":{}}"#.into(),
        r#"{"header":{"cluster_id":"-1","revision":"2"}}"#.into(),
        r#"{"header":{"cluster_id":"99999999999999999999999","revision":"2"}}"#.into(),
        format!(r#"{{"header":{header},"kvs":{{}}}}"#),
        format!(r#"{{"header":{header},"kvs":[{{"value":"YQ=="}}]}}"#),
        key_value("7"),
        key_value("\"*\""),
        key_value("\"YQ\""),
    ];
    for odd in odd {
        fake.mishap("kv/range", Mishap::Answer(200, odd.clone()));
        let why = read(&etcd).await.unwrap_err();
        assert!(why.contains("none of etcd's") && why.len() < 600, "{odd:.99}: {why}");
        fake.mishap("kv/txn", Mishap::Answer(200, odd.clone()));
        // A transaction has no keys beside its responses.
        if !odd.contains("kvs") {
            unknown(swap(&etcd, Some(&first), b"second").await);
        }
        fake.with(|state| state.mishaps.clear());
    }
    // It is another's, empty, or longer than any record.
    for value in [json!(""), json!("YQ=="), json!("cmVwbGl0ZS1sZWFzZSAx")] {
        fake.mishap("kv/range", Mishap::Answer(200, key_value(&value.to_string())));
        assert!(read(&etcd).await.unwrap_err().contains("did not write"));
        fake.mishap("kv/range", Mishap::Answer(200, key_value(&value.to_string())));
        assert!(unavailable(swap(&etcd, Some(&first), b"x").await).contains("did not write"));
    }
    let long = key_value(&format!("\"{}\"", "YWFh".repeat(20_000)));
    for mishap in [Mishap::Answer(200, long), Mishap::Endless] {
        fake.mishap("kv/range", mishap.clone());
        assert!(read(&etcd).await.unwrap_err().contains("longer than"));
        fake.mishap("kv/txn", mishap);
        assert!(unknown(swap(&etcd, Some(&first), b"x").await).contains("longer than"));
    }
    // It says that it is done, and not which revision that is.
    let done = format!(r#"{{"header":{header},"succeeded":true}}"#);
    fake.mishap("kv/txn", Mishap::Answer(200, done));
    unknown(swap(&etcd, Some(&first), b"x").await);
    assert_eq!(current(&etcd).await, Stored::new(b"first".to_vec(), first));
}

#[tokio::test]
async fn only_what_was_surely_not_done_is_called_so() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    let mut version = swap(&etcd, None, b"first").await.unwrap();
    let cases = [
        // Before etcd does anything.
        (400, refusal("etcdserver: request is too large", 3), Some("too large")),
        (403, refusal("etcdserver: permission denied", 7), Some("a user and a password")),
        (401, refusal("etcdserver: invalid auth token", 16), Some("a user and a password")),
        (400, refusal("etcdserver: user name is empty", 3), Some("a user and a password")),
        (404, "Not FoundKey".into(), Some("no JSON gateway")),
        (501, refusal("unknown service", 12), Some("no JSON gateway")),
        (403, "<html>".into(), Some("403")),
        (400, "CommonName is set".into(), Some("400 Bad Request: CommonName is set")),
        // Anything may be under way.
        (503, refusal("etcdserver: request timed out", 14), None),
        (503, refusal("etcdserver: leader changed", 14), None),
        (504, refusal("context deadline exceeded", 4), None),
        (500, refusal("etcdserver: corrupt cluster", 15), None),
        (408, refusal("context canceled", 1), None),
        (409, refusal("aborted", 10), None),
        (502, "<html>".into(), None),
        (503, String::new(), None),
        (307, String::new(), None),
        (200, String::new(), None),
    ];
    for (status, body, words) in cases {
        let mishap = if words.is_some() { Mishap::Answer } else { Mishap::DoneAndAnswer };
        fake.mishap("kv/txn", mishap(status, body.clone()));
        let swapped = swap(&etcd, Some(&version), b"again").await;
        match words {
            Some(words) => assert!(unavailable(swapped).contains(words), "{body}"),
            None => drop(unknown(swapped)),
        }
        let now = current(&etcd).await.version;
        assert_eq!(now == version, words.is_some(), "{body}");
        version = now;
        // A read is told of all of them.
        fake.mishap("kv/range", Mishap::Answer(status, body));
        let why = read(&etcd).await.unwrap_err();
        assert!(why.contains("http://127.0.0.1:") && words.is_none_or(|words| why.contains(words)), "{why}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_leaves_a_swap_unknown_and_it_is_not_repeated() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 3).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    fake.mishap("kv/txn", Mishap::Close);
    unknown(swap(&etcd, Some(&first), b"lost").await);
    assert_eq!(current(&etcd).await.version, first);
    fake.mishap("kv/txn", Mishap::DoneAndClose);
    unknown(swap(&etcd, Some(&first), b"done").await);
    assert_eq!(current(&etcd).await.record, b"done");
    assert_eq!(fake.asked("kv/txn"), 3);
    // What was sent twice on the way, and done the first time, is done.
    let version = current(&etcd).await.version;
    fake.mishap("kv/txn", Mishap::Twice);
    let twice = swap(&etcd, Some(&version), b"twice").await.unwrap();
    assert_eq!(current(&etcd).await, Stored::new(b"twice".to_vec(), twice));
    conflict(swap(&etcd, Some(&version), b"late").await);
}

#[tokio::test]
async fn a_swap_that_came_twice_is_a_conflict_only_where_its_place_was_taken() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    for is_first in [true, false] {
        for (times, is_conflict) in [(0, true), (1, false)] {
            let expected = read(&etcd).await.unwrap().map(|stored| stored.version);
            assert_eq!(expected.is_none(), is_first);
            fake.mishap("kv/txn", Mishap::Overtaken(times));
            let swapped = swap(&etcd, expected.as_ref(), b"mine").await;
            match is_conflict {
                // The other one was sooner.
                true => conflict(swapped),
                // It was done, and the other one went on from it.
                false => assert!(unknown(swapped).contains("since the look")),
            }
            assert_eq!(current(&etcd).await.record, b"other");
            if is_first && is_conflict {
                fake.with(|state| state.found = None);
            }
        }
    }
}

#[tokio::test]
async fn another_member_is_asked_where_one_does_not_answer() {
    let fake = Fake::new();
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let etcd = Etcd::new([gone.clone(), fake.member().await, fake.member().await]).unwrap();
    let first = swap(&etcd, None, b"first").await.unwrap();
    assert_eq!(current(&etcd).await.version, first);
    assert_eq!(etcd.shared.gateway.order(&etcd.settings).next(), Some(1), "the one that answered");
    // It hangs, and comes to be the last.
    fake.mishap("kv/range", Mishap::Hang);
    let begun = Instant::now();
    let second = swap(&etcd, Some(&first), b"second").await.unwrap();
    assert!(begun.elapsed() >= LOOK_LIMIT);
    assert_eq!(etcd.shared.gateway.order(&etcd.settings).collect::<Vec<_>>(), [2, 0, 1]);
    // One that answers badly is none either.
    fake.mishap("kv/range", Mishap::Answer(503, refusal("etcdserver: no leader", 14)));
    assert_eq!(current(&etcd).await.version, second);
    // The caller gives up: the next call begins elsewhere.
    let at = etcd.shared.gateway.order(&etcd.settings).next().unwrap();
    fake.mishap("kv/txn", Mishap::Hang);
    let mut given_up = etcd.swap(Some(&second), b"given up");
    while fake.asked("kv/txn") < 3 {
        poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context).is_ready())).await;
        tokio::task::yield_now().await;
    }
    drop(given_up);
    assert_eq!(etcd.shared.gateway.order(&etcd.settings).next(), Some((at + 1) % 3));
    assert_eq!(current(&etcd).await.version, second);
    // None is left.
    let alone = Etcd::new([&gone, &gone]).unwrap();
    assert!(read(&alone).await.unwrap_err().contains("refused"));
    assert!(unavailable(swap(&alone, None, b"x").await).contains(&gone["http://".len()..]));
}

#[tokio::test]
async fn a_token_that_is_not_good_any_more_is_made_anew_once() {
    let fake = Fake::new();
    let open = etcd(&fake, 1).await;
    let user = |password: &str| open.clone().user("app", password);
    // Without users in etcd nothing is asked of them.
    let etcd = user("open sesame");
    let first = swap(&etcd, None, b"first").await.unwrap();
    fake.with(|state| state.user = Some(("app", "open sesame")));
    assert!(read(&open).await.unwrap_err().contains("a user and a password"));
    let second = swap(&etcd, Some(&first), b"second").await.unwrap();
    let before = fake.asked("auth/authenticate");
    read(&etcd).await.unwrap();
    assert_eq!(fake.asked("auth/authenticate"), before, "it is kept");
    // Members were started anew.
    fake.with(|state| state.token += 1);
    let third = swap(&etcd, Some(&second), b"third").await.unwrap();
    assert_eq!(fake.asked("auth/authenticate"), before + 1);
    // It ends between the look and the transaction.
    let old = refusal("etcdserver: revision of auth store is old", 3);
    fake.mishap("kv/txn", Mishap::Answer(400, old.clone()));
    let fourth = swap(&etcd, Some(&third), b"fourth").await.unwrap();
    // Once, and no more.
    fake.mishap("kv/txn", Mishap::Answer(400, old.clone()));
    fake.mishap("kv/txn", Mishap::Answer(400, old));
    assert!(unavailable(swap(&etcd, Some(&fourth), b"x").await).contains("auth store is old"));
    assert_eq!(current(&etcd).await.version, fourth);
    let denied = refusal("etcdserver: permission denied", 7);
    fake.mishap("kv/txn", Mishap::Answer(403, denied));
    assert!(unavailable(swap(&etcd, Some(&fourth), b"x").await).contains("permission `readwrite`"));
    // The password is another.
    let wrong = user("guessed");
    let why = read(&wrong).await.unwrap_err();
    assert!(why.contains("user \"app\": ") && why.contains("invalid user ID or password"), "{why}");
    unavailable(swap(&wrong, Some(&fourth), b"x").await);
    for text in [why, format!("{wrong:?}"), format!("{:?}", crate::lease::Lease::from(wrong))] {
        assert!(!text.contains("guessed"), "{text}");
    }
}

#[tokio::test]
async fn an_etcd_without_room_says_so_and_a_look_tells_whether_it_was_done() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    let full = refusal("etcdserver: mvcc: database space exceeded", 8);
    fake.mishap("kv/txn", Mishap::Answer(429, full.clone()));
    assert!(unavailable(swap(&etcd, Some(&first), b"second").await).contains("alarm NOSPACE"));
    // At the limit it is done, and then refused.
    fake.mishap("kv/txn", Mishap::DoneAndAnswer(429, full.clone()));
    let second = swap(&etcd, Some(&first), b"second").await.unwrap();
    assert_eq!(current(&etcd).await, Stored::new(b"second".to_vec(), second.clone()));
    // No look is to be had after it.
    fake.mishap("kv/range", Mishap::None);
    fake.mishap("kv/range", Mishap::Answer(503, String::new()));
    fake.mishap("kv/txn", Mishap::DoneAndAnswer(429, full));
    assert!(unknown(swap(&etcd, Some(&second), b"third").await).contains("space exceeded"));
    assert_eq!(current(&etcd).await.record, b"third");
}

#[tokio::test]
async fn an_etcd_that_was_restored_takes_no_version_from_before() {
    for id in [77, 78] {
        let fake = Fake::new();
        let (etcd, other) = (etcd(&fake, 1).await, etcd(&fake, 1).await);
        let first = swap(&etcd, None, b"first").await.unwrap();
        let (revision, backup) = fake.with(|state| (state.revision, state.found.clone()));
        let second = swap(&etcd, Some(&first), b"second").await.unwrap();
        current(&other).await;
        fake.with(|state| (state.cluster, state.revision, state.found) = (id, revision, backup));
        // The revision and the value are those of the backup.
        conflict(swap(&other, Some(&second), b"x").await);
        conflict(swap(&etcd, Some(&first), b"x").await);
        let restored = current(&etcd).await;
        assert_eq!(restored.record, b"first");
        assert!(restored.version != first && restored.version != second);
        // Revisions come again, and versions do not.
        let again = swap(&etcd, Some(&restored.version), b"second").await.unwrap();
        assert_ne!(again, second);
        conflict(swap(&etcd, Some(&second), b"x").await);
        assert_eq!(current(&etcd).await, Stored::new(b"second".to_vec(), again));
    }
    // Between a look and its transaction.
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    let done = r#"{"header":{"cluster_id":"78","revision":"3"},"succeeded":true,
        "responses":[{"response_put":{"header":{"revision":"3"}}}]}"#;
    fake.mishap("kv/txn", Mishap::Answer(200, done.into()));
    assert!(unknown(swap(&etcd, Some(&first), b"x").await).contains("another etcd"));
}

#[tokio::test]
async fn a_key_that_is_written_by_hand_has_another_version() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 1).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    // The same bytes; then others.
    fake.with(|state| {
        let (revision, value) = state.found.take().unwrap();
        (state.revision, state.found) = (revision + 1, Some((revision + 1, value)));
    });
    let second = current(&etcd).await;
    assert!(second.record == b"first" && second.version != first);
    conflict(swap(&etcd, Some(&first), b"x").await);
    // It is removed, and there is a first one again.
    fake.with(|state| state.found = None);
    assert_eq!(read(&etcd).await.unwrap(), None);
    conflict(swap(&etcd, Some(&second.version), b"x").await);
    let again = swap(&etcd, None, b"first").await.unwrap();
    assert!(again != first && again != second.version);
    conflict(swap(&etcd, None, b"x").await);
    assert!(unavailable(swap(&etcd, Some(&again), &[0; RECORD_MAX_BYTES + 1]).await).contains("too long"));
}

#[tokio::test]
async fn a_change_is_told_to_those_who_watch() {
    let fake = Fake::new();
    let etcd = etcd(&fake, 2).await;
    let first = swap(&etcd, None, b"first").await.unwrap();
    // One member does not watch.
    fake.mishap("watch", Mishap::Answer(503, String::new()));
    let watcher = etcd.clone();
    let watching = tokio::spawn(async move { watcher.changed().await });
    while fake.asked("watch") < 2 {
        tokio::task::yield_now().await;
    }
    assert!(!watching.is_finished());
    let mut version = first;
    let end = Instant::now() + LIMIT;
    while !watching.is_finished() {
        assert!(Instant::now() < end, "it is not told");
        version = swap(&etcd, Some(&version), b"more").await.unwrap();
    }
    watching.await.unwrap();
}

#[test]
fn urls_are_read_and_bad_ones_refused_with_a_reason() {
    let members = |etcd: &Etcd| etcd.settings.members.iter().map(ToString::to_string).collect::<Vec<_>>();
    let etcd = Etcd::new(["http://a", "http://[::1]:1/"]).unwrap();
    assert_eq!(members(&etcd), ["http://a:2379", "http://[::1]:1"]);
    assert_eq!(etcd.settings.key, "replite/lease");
    let etcd = Etcd::from_url("etcd://a:1,b,[::1]:3/replite/app").unwrap();
    assert_eq!(members(&etcd), ["http://a:1", "http://b:2379", "http://[::1]:3"]);
    assert_eq!(etcd.settings.key, "replite/app");
    let tls = Etcd::from_url("etcds://a/k");
    if cfg!(feature = "tls") {
        assert_eq!(members(&tls.unwrap()), ["https://a:2379"]);
    } else {
        assert!(tls.unwrap_err().to_string().contains("feature `tls`"));
    }
    let refused = |etcd: Result<Etcd>, why: &str| {
        let error = etcd.map(drop).unwrap_err();
        assert!(matches!(&error, Error::Config(text) if text.contains(why)), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    };
    refused(Etcd::new::<&str>([]), "0 URLs");
    refused(Etcd::new(vec!["http://a"; 17]), "17 URLs");
    for (url, why) in [
        ("", "no URL"),
        ("a:2379", "begin with http"),
        ("ftp://a", "begin with http"),
        ("http://u:secret@a", "Etcd::user"),
        ("http://a/path", "path"),
        ("http://a?q", "path"),
        ("http://a:0", "port"),
        ("http://a:99999", ""),
        ("http://", ""),
    ] {
        refused(Etcd::new([url]), why);
    }
    for (url, why) in [
        ("etcd://a", "no key"),
        ("etcd://a/", "no key"),
        ("etcd:///k", ""),
        ("etcd://a,/k", ""),
        ("http://a/k", "begin with etcd"),
        ("etcd://u:secret@a/k", "Etcd::user"),
        ("etcd://a/k?x", "can't have"),
    ] {
        refused(Etcd::from_url(url), why);
    }
    refused(Etcd::from_url(&format!("etcd://a/{}", "k".repeat(5000))), "too long");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn files_are_named_that_can_not_be_used() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    std::fs::write(file("none.pem"), "no certificate").unwrap();
    let etcd = || Etcd::new(["https://127.0.0.1:1"]).unwrap();
    for (etcd, name) in [
        (etcd().roots(file("missing.pem")), "missing.pem"),
        (etcd().roots(file("none.pem")), "none.pem"),
        (etcd().client_certificate(file("none.pem"), file("key.pem")), "key.pem"),
    ] {
        let why = read(&etcd).await.unwrap_err();
        assert!(why.contains(name), "{why}");
        assert!(unavailable(swap(&etcd, None, b"x").await).contains(name));
    }
}
