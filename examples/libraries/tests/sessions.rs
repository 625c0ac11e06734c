//! Sessions of tower-sessions on three instances.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use axum::{Router, routing::get};
use http::{HeaderMap, StatusCode};
use replite::Db;
use replite::testing::Cluster;
use replite_libraries_example::sessions::{config, sessions, with_sessions};
use tokio::sync::OnceCell;
use tower::ServiceExt;
use tower_sessions::Session;
use tower_sessions::cookie::time::{Duration, OffsetDateTime};
use tower_sessions::session::{Id, Record};
use tower_sessions::session_store::SessionStore;

/// Counts in the session. A POST does, and so does a GET.
async fn count(session: Session) -> String {
    let seen: u64 = session.get("seen").await.unwrap().unwrap_or_default();
    session.insert("seen", seen + 1).await.unwrap();
    (seen + 1).to_string()
}

async fn look(session: Session) -> String {
    session.get::<u64>("seen").await.unwrap().unwrap_or_default().to_string()
}

/// An instance, whose store is opened when there is a state to read.
fn app(db: &Db) -> Router {
    let inner = Arc::new(OnceCell::new());
    Router::new().fallback(begun).with_state((db.clone(), inner))
}

async fn begun(State((db, inner)): State<(Db, Arc<OnceCell<Router>>)>, request: Request) -> Response {
    let begin = async || {
        db.ready().await.unwrap();
        let app = Router::new().route("/", get(look).post(count)).route("/count", get(count));
        with_sessions(app, sessions(&db).unwrap(), &db)
    };
    inner.get_or_init(begin).await.clone().oneshot(request).await.unwrap()
}

/// What a browser keeps.
#[derive(Default)]
struct Jar(Vec<(String, String)>);

impl Jar {
    fn take(&mut self, headers: &HeaderMap) {
        for set in headers.get_all("set-cookie") {
            let pair = set.to_str().unwrap().split(';').next().unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            self.0.retain(|(kept, _)| kept != name);
            self.0.push((name.to_owned(), value.to_owned()));
        }
    }

    async fn ask(&mut self, app: Router, method: &str, path: &str) -> String {
        let cookies: Vec<String> = self.0.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let request = Request::builder().method(method).uri(path).header("cookie", cookies.join("; "));
        let response = app.oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let text = String::from_utf8(to_bytes(body, 10_000).await.unwrap().to_vec()).unwrap();
        assert_eq!(parts.status, StatusCode::OK, "{text}");
        self.take(&parts.headers);
        text
    }
}

#[test]
fn the_code_is_that_of_the_page() {
    let (page, code) = (include_str!("../../../docs/libraries.md"), include_str!("../src/sessions.rs"));
    let blocks = page.split("```rust\n").skip(1).map(|block| block.split("```").next().unwrap());
    let of_page = blocks.flat_map(str::lines).filter(|line| !line.contains("use ") && !line.is_empty());
    for line in of_page {
        assert!(code.lines().any(|own| own.trim_start_matches("pub ") == line), "{line}");
    }
}

#[tokio::test]
async fn a_store_follows_the_role_of_its_node() {
    let db = Db::temporary(config).await.unwrap();
    let store = sessions(&db).unwrap();
    let create = async || {
        let expiry = OffsetDateTime::now_utc() + Duration::minutes(1);
        let mut record = Record { id: Id::default(), data: Default::default(), expiry_date: expiry };
        store.create(&mut record).await
    };
    create().await.unwrap();
    // Not "database is locked", after five seconds.
    let refused = async || create().await.is_err_and(|error| error.to_string().contains("readonly"));
    let until = async |what: bool| {
        let changes = async {
            while refused().await != what {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), changes).await.unwrap();
    };
    db.demote("http://127.0.0.1:1").await.unwrap();
    until(true).await;
    db.promote().await.unwrap();
    until(false).await;
    create().await.unwrap();
}

#[tokio::test]
async fn a_session_goes_from_instance_to_instance_and_a_get_that_changes_it_runs_on_the_primary() {
    let cluster = Cluster::start(3).config(config).app(app).await.unwrap();
    let mut jar = Jar::default();
    assert_eq!(jar.ask(cluster.node(1).app(), "POST", "/").await, "1");
    for node in [0, 1, 2, 0] {
        assert_eq!(jar.ask(cluster.node(node).app(), "GET", "/").await, "1", "{node}");
    }
    // Through the primary itself such a GET has no token: the page says so.
    for (node, seen) in [(2, "2"), (1, "3"), (2, "4")] {
        assert_eq!(jar.ask(cluster.node(node).app(), "GET", "/count").await, seen, "{node}");
        let next = (node + 1) % 3;
        assert_eq!(jar.ask(cluster.node(next).app(), "GET", "/").await, seen, "{next}");
    }
    cluster.shutdown().await;
}
