//! What orchestrators, balancers and Prometheus get to know, wherever the service is put.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Empty};
use replite::testing::Cluster;
use replite::{Config, Db, Route};
use serde_json::Value;
use tower::{Service, ServiceExt};

use crate::support::*;

const GUIDE: &str = include_str!("../../docs/guide.md");
const PATHS: [&str; 4] = ["/livez", "/readyz", "/healthz", "/metrics"];
const FOR_EVER: Duration = Duration::from_secs(3600);

fn schema(config: Config) -> Config {
    config.migrate(|conn| conn.execute_batch(SCHEMA))
}

fn request(method: &Method, path: &str) -> Request<Body> {
    Request::builder().method(method).uri(path).body(Body::empty()).unwrap()
}

/// Status, headers, and text.
struct Told {
    status: u16,
    headers: http::HeaderMap,
    text: String,
}

impl Told {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }
}

async fn told<B: http_body::Body<Error: std::fmt::Debug>>(response: Response<B>) -> Told {
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    Told { status: parts.status.as_u16(), headers: parts.headers, text }
}

async fn ask(app: &Router, method: &Method, path: &str) -> Told {
    told(within(path, app.clone().oneshot(request(method, path))).await.unwrap()).await
}

async fn get_of(app: &Router, path: &str) -> Told {
    ask(app, &Method::GET, path).await
}

#[tokio::test]
async fn wherever_they_are_they_answer_get_and_head_and_no_other_method() {
    let db = Db::temporary(schema).await.unwrap();
    let app = || Router::new().route("/", get(async || "app"));
    let places = [
        ("", app().layer(db.replay_layer()).merge(db.probes())),
        ("", app().fallback_service(db.probes())),
        ("/internal", app().layer(db.replay_layer()).nest_service("/internal", db.probes())),
        ("", app().merge(db.probes()).layer(db.replay_layer())),
    ];
    for (prefix, app) in places {
        for path in PATHS.map(|path| format!("{prefix}{path}")) {
            let told = get_of(&app, &path).await;
            assert_eq!(told.status, 200, "{path}: {}", told.text);
            assert_eq!(told.headers["cache-control"], "no-store", "{path}");
            let head = ask(&app, &Method::HEAD, &path).await;
            assert_eq!((head.status, &*head.text), (200, ""), "{path}");
            for name in ["content-type", "content-length", "cache-control"] {
                // A second may pass between two scrapes, and a number change.
                if !(path.ends_with("/metrics") && name == "content-length") {
                    assert_eq!(head.headers[name], told.headers[name], "{path}: {name}");
                }
            }
            for method in [Method::POST, Method::PUT, Method::DELETE, Method::OPTIONS] {
                let told = ask(&app, &method, &path).await;
                assert_eq!(told.status, 405, "{method} {path}");
                assert_eq!(told.headers["allow"], "GET, HEAD", "{method} {path}");
            }
        }
        assert_eq!(get_of(&app, &format!("{prefix}/livez/x")).await.status, 404);
    }
    // As hyper has it: without axum's bodies.
    let mut service = db.probes();
    for (path, status) in [("/livez", 200), ("/metrics", 200), ("/", 404), ("/internal/livez", 404)] {
        let request = Request::get(path).body(Empty::<Bytes>::new()).unwrap();
        let response = Service::call(&mut service, request).await.unwrap();
        assert_eq!(told(response).await.status, status, "{path}");
    }
    let quiet = Router::new().merge(db.probes().metrics(false));
    assert_eq!(get_of(&quiet, "/metrics").await.status, 404);
    assert_eq!(get_of(&quiet, "/livez").await.text, r#"{"live":true}"#);
}

#[tokio::test]
async fn they_keep_no_database_open_and_say_when_it_is_closed() {
    let (db, other) = (Db::temporary(schema).await.unwrap(), Db::temporary(schema).await.unwrap());
    let app = Router::new().merge(db.probes().and(other.probes()));
    for path in PATHS {
        assert_eq!(get_of(&app, path).await.status, 200, "{path}");
    }
    let path = db.path().to_owned();
    db.shutdown().await;
    for path in ["/livez", "/readyz", "/healthz"] {
        assert_eq!(get_of(&app, path).await.status, 503, "{path}: of one of two");
    }
    drop(db);
    until("its directory is removed with it", || !path.exists());
    assert_eq!(get_of(&app, "/livez").await.status, 503);
    let told = get_of(&app, "/healthz").await.json();
    assert_eq!((&told["can_read"], &told["databases"][1]["can_read"]), (&false.into(), &true.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_primary_is_away_a_replica_stays_ready_for_its_grace_time() {
    let cluster = Cluster::start(3)
        .config(|config| schema(config).grace(FOR_EVER))
        .app(|db| Router::new().layer(db.replay_layer()).merge(db.probes()))
        .await
        .unwrap();
    let replica = cluster.node(1).app();
    comes_true("all is well", async || get_of(&replica, "/healthz").await.status == 200).await;
    cluster.node(0).kill().await;
    comes_true("it is told", async || get_of(&replica, "/healthz").await.status == 503).await;
    let told = get_of(&replica, "/healthz").await.json();
    assert_eq!((&told["can_read"], &told["can_write"]), (&true.into(), &false.into()), "{told}");
    assert_eq!(get_of(&replica, "/readyz").await.status, 200);
    assert_eq!(get_of(&replica, "/livez").await.status, 200);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_grace_time_it_is_alive_and_not_ready() {
    let cluster = Cluster::start(2)
        .config(|config| schema(config).grace(Duration::from_secs(2)))
        .app(|db| Router::new().layer(db.replay_layer()).merge(db.probes()))
        .await
        .unwrap();
    let replica = cluster.node(1).app();
    cluster.node(0).kill().await;
    comes_true("it is late", async || get_of(&replica, "/readyz").await.status == 503).await;
    assert_eq!(get_of(&replica, "/livez").await.status, 200);
    cluster.shutdown().await;
}

/// Below the layer a probe with a client's cookie would wait for that token's transaction, and then
/// for the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn below_the_layer_they_wait_for_no_token_and_no_primary() {
    let cluster = Cluster::start(2)
        .config(|config| schema(config).grace(FOR_EVER))
        .app(|db| {
            let layer = db.replay_layer().wait_timeout(FOR_EVER).hold_timeout(FOR_EVER);
            let probes = db.probes();
            let app = Router::new().route("/page", get(async || "page")).merge(probes.clone());
            app.nest_service("/internal", probes).layer(layer.route_prefix("/internal", Route::Local))
        })
        .await
        .unwrap();
    let (primary, replica) = (cluster.node(0).db(), cluster.node(1));
    cluster.caught_up().await.unwrap();
    replica.cut();
    let txid = insert(&primary, "unknown to the replica", 1).await;
    let token = primary.token(txid).unwrap();
    cluster.node(0).kill().await;
    let with_token = |path: &str| {
        let request = Request::get(path).header("replite-token", token.as_str());
        replica.app().oneshot(request.body(Body::empty()).unwrap())
    };
    let mut page = std::pin::pin!(with_token("/page"));
    for path in ["/livez", "/readyz", "/metrics", "/internal/readyz", "/internal/metrics"] {
        tokio::select! {
            biased;
            answered = within(path, with_token(path)) => assert_eq!(answered.unwrap().status(), 200, "{path}"),
            _ = &mut page => panic!("a page does wait"),
        }
    }
    assert_eq!(within("/healthz", with_token("/healthz")).await.unwrap().status(), 503);
    cluster.shutdown().await;
}

#[tokio::test]
async fn strangers_see_no_paths_ids_and_addresses_and_operators_do() {
    let db = Db::temporary(|config| schema(config).advertise("http://10.9.8.7:8080").secret(secret()))
        .await
        .unwrap();
    let secrets = [
        db.path().parent().unwrap().to_str().unwrap().to_string(),
        db.node_id().to_string(),
        "10.9.8.7".into(),
    ];
    let (open, closed) = (Router::new().merge(db.probes()), Router::new().merge(db.probes().detailed(true)));
    for path in PATHS {
        let told = get_of(&open, path).await;
        for secret in &secrets {
            assert!(!told.text.contains(secret), "{path} tells {secret}: {}", told.text);
        }
    }
    let told = get_of(&open, "/healthz").await.json();
    assert_eq!(told["databases"][0]["status"]["role"], "primary", "{told}");
    assert_eq!(told["databases"][0]["database"], "app");
    let told = get_of(&closed, "/healthz").await.json();
    let of = &told["databases"][0];
    assert_eq!(of["status"]["node"], *db.node_id().to_string(), "{told}");
    assert_eq!((&of["health"]["can_read"], &told["can_write"]), (&true.into(), &true.into()), "{told}");
}

/// Asks until the condition holds. The pause lets the limit be noticed: these answers wait for
/// nothing.
async fn comes_true(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let asked = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(what, asked).await;
}

/// The samples of a text, by name and labels. What each is, it says before.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut of = BTreeMap::new();
    let (mut helped, mut typed) = (BTreeSet::new(), BTreeSet::new());
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            assert!(helped.insert(rest.split(' ').next().unwrap()), "said twice: {line}");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(typed.insert(name), "said twice: {line}");
            assert_eq!(kind, if name.ends_with("_total") { "counter" } else { "gauge" }, "{line}");
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            assert!(helped.contains(name) && typed.contains(name), "{line}");
            assert_eq!(of.insert(series.to_string(), value.parse().unwrap()), None, "{line}");
        }
    }
    of
}

/// What is told of now: the text of a new service, which has none of before.
async fn scrape(db: &Db) -> BTreeMap<String, f64> {
    let told = get_of(&Router::new().merge(db.probes()), "/metrics").await;
    assert_eq!(told.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    samples(&told.text)
}

fn of(database: &str, name: &str) -> String {
    format!("{name}{{database=\"{database}\"}}")
}

fn of_role(name: &str) -> String {
    format!("replite_role{{database=\"app\",role=\"{name}\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prometheus_gets_what_the_status_says_under_the_names_of_the_guide() {
    let cluster = Cluster::start(2)
        .config(schema)
        .app(|db| Router::new().route("/", get(async || "").post(async || "")).layer(db.replay_layer()))
        .await
        .unwrap();
    let (primary, replica) = (cluster.node(0).db(), cluster.node(1).db());
    let txid = insert(&primary, "one", 1).await;
    cluster.caught_up().await.unwrap();
    comes_true("the word of the primary", async || {
        scrape(&replica).await.get(&of("app", "replite_lag_transactions")) == Some(&0.0)
    })
    .await;
    let (here, there) = (scrape(&primary).await, scrape(&replica).await);
    let epoch = primary.status().epoch.number() as f64;
    for (name, at_primary, at_replica) in [
        ("replite_live", Some(1.0), Some(1.0)),
        ("replite_problems", Some(0.0), Some(0.0)),
        ("replite_transaction", Some(txid.number() as f64), Some(txid.number() as f64)),
        ("replite_epoch", Some(epoch), Some(epoch)),
        ("replite_replicas", Some(1.0), Some(0.0)),
        ("replite_stream_connected", None, Some(1.0)),
        ("replite_lag_transactions", None, Some(0.0)),
        ("replite_lost_entries", Some(0.0), Some(0.0)),
        ("replite_held_requests", Some(0.0), Some(0.0)),
        ("replite_heals_total", Some(0.0), Some(0.0)),
        ("replite_replicas_joined_total", Some(1.0), Some(0.0)),
        ("replite_snapshots_total", Some(0.0), Some(1.0)),
    ] {
        assert_eq!(here.get(&of("app", name)).copied(), at_primary, "{name} of the primary");
        assert_eq!(there.get(&of("app", name)).copied(), at_replica, "{name} of the replica");
    }
    assert_eq!((here[&of_role("primary")], here[&of_role("replica")]), (1.0, 0.0));
    assert_eq!((there[&of_role("primary")], there[&of_role("replica")]), (0.0, 1.0));
    let size = std::fs::metadata(primary.path()).unwrap().len() as f64;
    assert_eq!(here[&of("app", "replite_database_bytes")], size);
    assert!(here[&of("app", "replite_log_bytes")] > 0.0 && here[&of("app", "replite_wal_bytes")] > 0.0);

    // All that there may be is in the guide, and the other way round.
    assert!(primary.verify().await.unwrap().holds());
    let mut told = BTreeSet::new();
    // A replica says what it has with the next transaction.
    insert(&primary, "one more", 1).await;
    comes_true("the position of the replica", async || {
        told = [scrape(&primary).await, scrape(&replica).await]
            .iter()
            .flat_map(|samples| samples.keys().map(|series| series.split('{').next().unwrap().to_string()))
            .collect();
        told.contains("replite_replica_lag_transactions")
    })
    .await;
    let words = GUIDE.split('`').filter(|word| word.starts_with("replite_"));
    let named: BTreeSet<String> = words.filter(|word| !word.contains(['<', '{'])).map(String::from).collect();
    assert_eq!(told, named);

    // A request that waits for a primary, and one that is not there any more.
    cluster.node(0).kill().await;
    until("it is away", || replica.status().primary.is_none());
    let post = tokio::spawn(cluster.node(1).app().oneshot(request(&Method::POST, "/")));
    comes_true("the request is held", async || {
        scrape(&replica).await[&of("app", "replite_held_requests")] == 1.0
    })
    .await;
    post.abort();
    comes_true("it is gone", async || scrape(&replica).await[&of("app", "replite_held_requests")] == 0.0)
        .await;
    cluster.shutdown().await;
}

#[tokio::test]
async fn one_text_has_several_databases_each_under_its_name() {
    let (notes, orders) = (
        Db::temporary(|config| schema(config).database("notes")).await.unwrap(),
        Db::temporary(|config| schema(config).database("orders")).await.unwrap(),
    );
    insert(&notes, "one", 1).await;
    let alone = notes.probes();
    let app = Router::new().merge(alone.clone().and(orders.probes()));
    let told = get_of(&app, "/metrics").await.text;
    let samples = samples(&told);
    let names = ["replite_live{database=\"notes\"}", "replite_live{database=\"orders\"}"];
    for name in names {
        assert_eq!(samples.get(name), Some(&1.0), "{name} in {told}");
    }
    let results = "replite_verifications_total{database=\"notes\",result=\"holds\"}";
    assert_eq!(samples.get(results), Some(&0.0));
    promtool(&told);
    let alone = get_of(&Router::new().merge(alone), "/metrics").await;
    assert!(!alone.text.contains("orders"), "{}", alone.text);
    let closed = notes.probes().and(orders.probes().metrics(false));
    assert_eq!(get_of(&Router::new().merge(closed), "/metrics").await.status, 404);
}

/// Prometheus's own opinion of a text, where it is installed.
fn promtool(text: &str) {
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = spawned else {
        println!("skipped: promtool is not installed, and did not look at the metrics");
        return;
    };
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    assert!(said.status.success(), "{}{}", String::from_utf8_lossy(&said.stderr), text);
}

/// A stranger who asks without end has no files looked at for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_scrapes_of_one_service_share_a_text() {
    let db = Db::temporary(schema).await.unwrap();
    let app = Router::new().merge(db.probes());
    let begun = Instant::now();
    let first = get_of(&app, "/metrics").await.text;
    insert(&db, "one", 1).await;
    let second = get_of(&app, "/metrics").await.text;
    assert!(second == first || begun.elapsed() >= Duration::from_secs(1), "it was made anew");
    comes_true("a new one", async || get_of(&app, "/metrics").await.text != first).await;
}
