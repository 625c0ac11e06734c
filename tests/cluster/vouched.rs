//! What counts as applied on a replica: states that a primary vouches for, of epochs that are
//! known.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{LIMIT, plain, within};
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::routing::get;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use replite::testing::{Cluster, Node};
use replite::{Db, Error};
use tower::ServiceExt;

/// A limit that is meant to pass.
const SHORT: Duration = Duration::from_millis(100);

async fn list(State(db): State<Db>) -> Result<String, Error> {
    db.read(|conn| {
        Ok(conn.query_row("SELECT coalesce(group_concat(text), '') FROM notes", [], |row| row.get(0))?)
    })
}

async fn add(State(db): State<Db>, text: String) -> Result<(), Error> {
    db.write(move |tx| Ok::<_, Error>(tx.execute("INSERT INTO notes VALUES (?1)", [text])?)).await?;
    Ok(())
}

fn app(db: &Db) -> Router {
    let layer = db.replay_layer().wait_timeout(SHORT).hold_timeout(SHORT).held_requests(8);
    Router::new().route("/notes", get(list).post(add)).with_state(db.clone()).layer(layer)
}

/// A primary and a replica that has its first row.
async fn cluster() -> Cluster<Router> {
    let schema = "CREATE TABLE IF NOT EXISTS notes (text TEXT)";
    let cluster =
        Cluster::start(2).config(|c| c.migrate(|conn| conn.execute_batch(schema))).app(app).await.unwrap();
    post(cluster.node(0), "one").await;
    cluster.caught_up().await.unwrap();
    cluster
}

/// Writes a row, and says the token.
async fn post(node: &Node<Router>, text: &'static str) -> String {
    let request = Request::post("/notes").body(Body::from(text)).unwrap();
    let response = within("a POST", node.app().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), 200);
    response.headers()["replite-token"].to_str().unwrap().to_owned()
}

async fn read(node: &Node<Router>, token: &str) -> (StatusCode, String) {
    let request = Request::get("/notes").header("replite-token", token).body(Body::empty()).unwrap();
    let response = within("a GET", node.app().oneshot(request)).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// Neither the layer nor a wait takes the token's transaction for one that is here.
async fn is_not_there(node: &Node<Router>, token: &str) {
    let (status, body) = read(node, token).await;
    assert_eq!(status, 503, "{body}");
    let txid = node.db().verify_token(token).unwrap();
    let waited = node.db().wait_for_timeout(txid, SHORT).await;
    assert!(matches!(waited, Err(Error::Timeout { .. })), "{waited:?}");
}

/// It comes, and is read.
async fn comes(node: &Node<Router>, token: &str, rows: &str) {
    let txid = node.db().verify_token(token).unwrap();
    node.db().wait_for_timeout(txid, LIMIT).await.unwrap();
    assert_eq!(read(node, token).await, (StatusCode::OK, rows.into()));
}

fn path(node: &Node<Router>) -> PathBuf {
    node.db().path().to_path_buf()
}

fn state_dir(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}-replite", path.display()))
}

/// Somebody wrote to the file of a replica that was closed: the commits got the numbers of
/// transactions of its primary, and satisfied their tokens.
#[tokio::test]
async fn commits_of_strangers_on_a_replica_are_no_transactions_of_its_primary() {
    let cluster = cluster().await;
    let (primary, replica) = (cluster.node(0), cluster.node(1));
    let (path, before) = (path(replica), replica.db().position());
    replica.kill().await;
    for _ in 0..3 {
        plain(&path).execute("INSERT INTO notes VALUES ('strange')", []).unwrap();
    }
    let token = post(primary, "two").await;
    replica.cut();
    replica.start().await.unwrap();
    assert_eq!(replica.db().position(), before, "what its log led to");
    assert!(replica.db().status().problem.is_some_and(|problem| problem.contains("no primary")));
    assert_eq!(read(replica, "").await, (StatusCode::OK, "one,strange,strange,strange".into()));
    is_not_there(replica, &token).await;
    // Nor after a further start, whatever is said of the state meanwhile.
    replica.kill().await;
    replica.start().await.unwrap();
    is_not_there(replica, &token).await;
    replica.mend();
    comes(replica, &token, "one,two").await;
    assert_eq!(replica.db().position(), primary.db().position());
    assert_eq!(replica.db().lost().await.unwrap().len(), 1);
    cluster.shutdown().await;
}

/// The log lost its tail, as by a power cut: the state is the primary's, but only the primary can
/// say so. It need not write anything for that.
#[tokio::test]
async fn an_idle_primary_vouches_for_a_state_that_is_its_own() {
    let cluster = cluster().await;
    let (primary, replica) = (cluster.node(0), cluster.node(1));
    let path = path(replica);
    let (log, copy) = (state_dir(&path).join("log"), state_dir(&path).join("copy"));
    replica.kill().await;
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(&log).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    replica.start().await.unwrap();
    let token = post(primary, "two").await;
    cluster.caught_up().await.unwrap();
    let position = primary.db().position();
    replica.kill().await;
    fs::remove_dir_all(&log).unwrap();
    fs::rename(&copy, &log).unwrap();
    replica.cut();
    replica.start().await.unwrap();
    assert_ne!(replica.db().position(), position);
    is_not_there(replica, &token).await;
    assert!(replica.db().status().problem.is_some_and(|problem| problem.contains("no primary")));

    let mut positions = replica.db().watch();
    replica.mend();
    within("the word", positions.wait_for(|now| *now == position)).await.unwrap();
    comes(replica, &token, "one,two").await;
    assert_eq!(primary.db().position(), position, "nothing was written");
    assert_eq!(replica.db().status().heals, 0);
    let said = |problem: String| problem.contains("no primary");
    assert!(!replica.db().status().problem.is_some_and(said));
    // It is written down: another start without the primary knows it.
    replica.cut();
    replica.kill().await;
    replica.start().await.unwrap();
    assert_eq!(replica.db().position(), position);
    assert_eq!(read(replica, &token).await, (StatusCode::OK, "one,two".into()));
    cluster.shutdown().await;
}

/// A primary whose state directory is gone begins again at epoch 1. Its replica, which knew another
/// epoch 1, took the tokens of the new one for lost, and answered without what was written.
#[tokio::test]
async fn tokens_of_a_primary_that_began_again_are_not_taken_for_lost() {
    let cluster = cluster().await;
    let (primary, replica) = (cluster.node(0), cluster.node(1));
    let old = post(primary, "old").await;
    cluster.caught_up().await.unwrap();
    let mut roles = replica.db().roles();
    replica.cut();
    within("the break", roles.wait_for(|state| state.primary.is_none())).await.unwrap();
    let path = path(primary);
    primary.kill().await;
    fs::remove_dir_all(state_dir(&path)).unwrap();
    primary.start().await.unwrap();
    let token = post(primary, "two").await;
    let (epoch, known) = (primary.db().position().unwrap().epoch(), replica.db().position().unwrap().epoch());
    assert!(epoch != known && epoch.number() <= known.number(), "{epoch}, {known}");
    assert_eq!(read(replica, &old).await, (StatusCode::OK, "one,old".into()));
    // With its state directory the primary lost the database's keys, and has new ones since. Before
    // the replica follows it, that one can't tell its tokens from what somebody made up.
    let old = replica.db().verify_token(&old).unwrap();
    assert_eq!(replica.db().verify_token(&token), None);
    let waited = replica.db().wait_for_timeout(primary.db().verify_token(&token).unwrap(), SHORT).await;
    assert!(matches!(waited, Err(Error::Timeout { .. })), "{waited:?}");
    replica.mend();
    within("the new keys", async {
        while replica.db().verify_token(&token).is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    comes(replica, &token, "one,old,two").await;
    // The epoch that the replica has left is known to be.
    for node in cluster.nodes() {
        let waited = node.db().wait_for_timeout(old, SHORT).await;
        assert!(matches!(waited, Err(Error::Lost { .. })), "{waited:?}");
    }
    cluster.shutdown().await;
}
