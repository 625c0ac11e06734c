//! An application with two databases, each with a layer, a secret and a primary of its own:
//! processes of which one is the primary of the first, one of the second, and one of neither.

use std::path::Path;

use crate::http_support::{Answer, Http};
use crate::support::*;
use axum::Router;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use http::Request;
use replite::{Config, Db, Epoch, Error, Route, Secret, Txid, lease};

const SECRETS: [&str; 2] =
    ["tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c", "Xw3Jk9_ZqLm2VtB7cRy5NfHd8-sGpTa1EuQ4iPoK6M0"];

async fn open(name: &str, secret: &str, upper: &str, app: &str) -> Db {
    let config = Config::new(Path::new(&variable("DIR")).join(format!("{name}.db")))
        .secret(Secret::new(secret).unwrap())
        .advertise(app)
        .listen(format!("127.0.0.1:{}", variable(&format!("{upper}_PORT"))).parse().unwrap())
        .migrate(|conn| conn.execute_batch(SCHEMA));
    let primary = variable(&format!("{upper}_PRIMARY"));
    let config = if primary.is_empty() { config } else { config.lease(lease::Fixed::replica_of(primary)) };
    Db::open(config).await.unwrap()
}

async fn write(db: &Db) -> Result<String, Error> {
    let insert = |tx: &mut replite::rusqlite::Transaction<'_>| {
        Ok::<_, Error>(tx.execute("INSERT INTO t(who) VALUES ('request')", [])?)
    };
    Ok(db.write(insert).await?.txid.unwrap().to_string())
}

fn read(db: &Db) -> Result<i64, Error> {
    db.read(|conn| Ok(conn.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?))
}

/// Writes to the databases that the path names, in its order; goes on without those in capitals
/// that it can't write to.
async fn writes(names: &str, a: &Db, b: &Db) -> Result<String, Error> {
    let mut done = Vec::new();
    for name in names.chars() {
        match write(if name.eq_ignore_ascii_case(&'a') { a } else { b }).await {
            Err(Error::NotPrimary { .. }) if name.is_ascii_uppercase() => {}
            wrote => done.push(wrote?),
        }
    }
    Ok(done.join(" "))
}

/// As the guide has it: what is about one database below its layer, what is about both below both.
fn app(a: &Db, b: &Db) -> Router {
    let one = |path: &str, db: &Db| {
        let (reads, writes) = (db.clone(), db.clone());
        let get = get(async move || read(&reads).map(|n| n.to_string()));
        Router::new().route(path, get.post(async move || write(&writes).await)).layer(db.replay_layer())
    };
    let both = {
        let (a, b) = (a.clone(), b.clone());
        get({
            let (a, b) = (a.clone(), b.clone());
            async move || Ok::<_, Error>(format!("{} {}", read(&a)?, read(&b)?))
        })
        .post(async move || writes("ab", &a, &b).await)
    };
    // POSTs that find out where they belong.
    let open = {
        let (a, b) = (a.clone(), b.clone());
        post(async move |axum::extract::Path(names): axum::extract::Path<String>| {
            writes(&names, &a, &b).await
        })
    };
    let headers = get(async |headers: HeaderMap| {
        let ours = headers.keys().filter(|name| name.as_str().starts_with("replite-h")).count();
        (StatusCode::OK, ours.to_string())
    });
    let of_both = Router::new()
        .route("/both", both)
        .route("/open/{names}", open)
        .route("/headers", headers)
        .layer(b.replay_layer().route_prefix("/open", Route::LocalThenReplay))
        .layer(a.replay_layer().route_prefix("/open", Route::LocalThenReplay));
    Router::new().merge(one("/a", a)).merge(one("/b", b)).merge(of_both)
}

#[test]
#[ignore = "runs as the child of another test"]
fn node_process() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let listener =
            tokio::net::TcpListener::bind(format!("127.0.0.1:{}", variable("APP_PORT"))).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let a = open("a", SECRETS[0], "A", &url).await;
        let b = open("b", SECRETS[1], "B", &url).await;
        let app = app(&a, &b);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        a.ready().await.unwrap();
        b.ready().await.unwrap();
        let tag = |db: &Db| db.token(Txid::new(Epoch::new(1, 1), 1)).unwrap().as_str()[3..11].to_string();
        speak(&format!("ready {} {}", tag(&a), tag(&b)));
    });
    // Until the parent ends.
    hear();
}

struct World {
    _dir: tempfile::TempDir,
    nodes: Vec<Process>,
    urls: Vec<String>,
    tags: Vec<String>,
    http: Http,
}

/// The first is the primary of `a`, the second of `b`.
fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let ports: Vec<String> = (0..9).map(|_| own_port().to_string()).collect();
    let of = |index: usize| format!("http://127.0.0.1:{}", ports[index]);
    let nodes: Vec<Process> = (0..3)
        .map(|n| {
            let own = dir.path().join(n.to_string());
            std::fs::create_dir(&own).unwrap();
            let primaries =
                (if n == 0 { String::new() } else { of(1) }, if n == 1 { String::new() } else { of(5) });
            let variables = [
                ("DIR", own.to_str().unwrap()),
                ("APP_PORT", &ports[3 * n]),
                ("A_PORT", &ports[3 * n + 1]),
                ("B_PORT", &ports[3 * n + 2]),
                ("A_PRIMARY", &primaries.0),
                ("B_PRIMARY", &primaries.1),
            ];
            Process::start(node_process, &variables)
        })
        .collect();
    let mut tags = Vec::new();
    for node in &nodes {
        tags = node.expect("ready").split(' ').skip(1).map(str::to_string).collect();
    }
    let urls = (0..3).map(|n| of(3 * n)).collect();
    World { _dir: dir, nodes, urls, tags, http: Http::new() }
}

impl World {
    async fn post(&self, node: usize, path: &str) -> Answer {
        let request = Request::post(format!("{}{path}", self.urls[node])).body("").unwrap();
        within(path, self.http.send(request)).await.unwrap()
    }

    async fn rows(&self, node: usize, path: &str, headers: &[(&str, &str)]) -> String {
        let mut request = Request::get(format!("{}{path}", self.urls[node]));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = within(path, self.http.send(request.body("").unwrap())).await.unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.text()
    }

    /// What the tokens say, as tag and transaction; and the cookies, as they are sent back.
    fn tokens(&self, answer: &Answer) -> (Vec<(usize, String)>, Vec<String>) {
        let tokens = answer.headers.get_all("replite-token").iter().map(|value| {
            let fields: Vec<_> = value.to_str().unwrap().split('.').collect();
            let database = self.tags.iter().position(|tag| tag == fields[1]).unwrap();
            (database, format!("{}-{}", fields[2], fields[3]))
        });
        let cookies = answer.headers.get_all("set-cookie").iter().map(|v| v.to_str().unwrap());
        let cookies = cookies.map(|cookie| cookie.split(';').next().unwrap().to_string());
        (tokens.collect(), cookies.collect())
    }

    fn descriptors(&self) -> usize {
        let count = |node: &Process| std::fs::read_dir(format!("/proc/{}/fd", node.id())).unwrap().count();
        self.nodes.iter().map(count).max().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_commit_is_in_the_token_of_its_database_and_read_on_every_node() {
    let world = world();
    let mut counts = [0, 0];
    for (path, database) in [("/a", 0), ("/b", 1), ("/open/a", 0), ("/open/b", 1)] {
        for node in 0..3 {
            let answer = world.post(node, path).await;
            assert_eq!(answer.status, 200, "{path} on {node}: {answer:?}");
            counts[database] += 1;
            let (tokens, cookies) = world.tokens(&answer);
            assert_eq!(tokens, [(database, answer.text())], "{path} on {node}");
            assert_eq!(cookies.len(), 1);
            assert!(cookies[0].starts_with(&format!("replite_{}=v1.", world.tags[database])), "{cookies:?}");
            let token = answer.header("replite-token");
            for reader in 0..3 {
                for headers in [("replite-token", token), ("cookie", cookies[0].as_str())] {
                    let one = world.rows(reader, ["/a", "/b"][database], &[headers]).await;
                    assert_eq!(one, counts[database].to_string());
                    let both = world.rows(reader, "/both", &[headers]).await;
                    assert_eq!(both.split(' ').nth(database).unwrap(), counts[database].to_string());
                }
            }
        }
    }
    // Both tokens at once, as headers, as one header, and as cookies.
    for _ in 0..5 {
        let (a, b) = (world.post(2, "/a").await, world.post(2, "/b").await);
        counts = counts.map(|count| count + 1);
        let expected = format!("{} {}", counts[0], counts[1]);
        let (ta, tb) = (a.header("replite-token"), b.header("replite-token"));
        let cookies = format!("{}; {}", a.cookie().unwrap(), b.cookie().unwrap());
        for node in 0..3 {
            assert_eq!(
                world.rows(node, "/both", &[("replite-token", ta), ("replite-token", tb)]).await,
                expected
            );
            assert_eq!(
                world.rows(node, "/both", &[("replite-token", &format!("{ta}, {tb}"))]).await,
                expected
            );
            assert_eq!(world.rows(node, "/both", &[("cookie", &cookies)]).await, expected);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_needs_two_primaries_on_different_nodes_is_refused_and_nothing_goes_in_circles() {
    let world = world();
    for node in 0..3 {
        let answer = world.post(node, "/both").await;
        assert_eq!((answer.status, answer.header("replite-outcome")), (508, "not-executed"), "{answer:?}");
        assert!(answer.text().contains("several databases"), "{}", answer.text());
    }
    assert!(world.descriptors() < 200, "{}", world.descriptors());
    for node in 0..3 {
        assert_eq!(world.rows(node, "/both", &[]).await, "0 0");
    }
    // By a handler that finds it out: what it committed before is kept, once, and the answer does
    // not say that nothing was.
    for (n, path) in ["/open/ab", "/open/ba"].into_iter().enumerate() {
        for node in 0..3 {
            let answer = world.post(node, path).await;
            assert_eq!(
                (answer.status, answer.header("replite-outcome")),
                (503, "unknown"),
                "{path}: {answer:?}"
            );
            let (tokens, cookies) = world.tokens(&answer);
            assert_eq!(tokens.iter().map(|(database, _)| *database).collect::<Vec<_>>(), [n], "{path}");
            let counts = if n == 0 { (node + 1, 0) } else { (3, node + 1) };
            let expected = [counts.0.to_string(), counts.1.to_string()][n].clone();
            let rows = world.rows(2, "/both", &[("cookie", &cookies[0])]).await;
            assert_eq!(rows.split(' ').nth(n).unwrap(), expected, "{path} on {node}");
        }
    }
    let counts = async || (world.rows(0, "/a", &[]).await, world.rows(1, "/b", &[]).await);
    assert_eq!(counts().await, ("3".into(), "3".into()));
    // One that takes what it gets is sent on once, by the inner layer, and not by the outer one as
    // well.
    let answer = world.post(2, "/open/AB").await;
    assert_eq!((answer.status, answer.text().split(' ').count()), (200, 1), "{answer:?}");
    assert_eq!(counts().await, ("3".into(), "4".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hop_that_a_stranger_makes_up_harms_nobody_but_its_request() {
    let world = world();
    let hop = |count: u8| format!("v1.{count}.{}.{}.{}", "ab".repeat(16), Epoch::new(1, 1), "0".repeat(64));
    let send = |node: usize, path: &'static str, hop: String| {
        let request = Request::post(format!("{}{path}", world.urls[node])).header("replite-hop", hop);
        world.http.send(request.body("").unwrap())
    };
    for (node, path) in [(0, "/b"), (1, "/a"), (2, "/a"), (2, "/open/b")] {
        for made_up in [hop(0), hop(1), "v1".into(), "x".repeat(5000)] {
            let answer = within(path, send(node, path, made_up)).await.unwrap();
            assert_eq!(answer.status, 200, "{answer:?}");
            assert!(!answer.headers.contains_key("replite-primary"));
        }
        for made_up in [hop(3), hop(255)] {
            let answer = within(path, send(node, path, made_up)).await.unwrap();
            assert_eq!(
                (answer.status, answer.header("replite-outcome")),
                (508, "not-executed"),
                "{answer:?}"
            );
            assert!(!answer.headers.contains_key("replite-primary"));
        }
    }
    // Where the primary is, it runs; and no handler sees it.
    assert_eq!(within("/a", send(0, "/a", hop(255))).await.unwrap().status, 200);
    assert_eq!(world.rows(2, "/headers", &[("replite-hop", &hop(1))]).await, "0");
}
