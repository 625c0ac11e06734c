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
