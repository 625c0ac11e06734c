//! One node: a database with a lease, its layer, and a small application on it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use replite::lease::Lease;
use replite::rusqlite::Transaction;
use replite::{Config, Db, Epoch, Error, NodeId, Position, Secret, SessionTokens, Txid, lease};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::clock::{Micros, now};

pub const CLUSTER: &str = "failover";
pub const SECRET: &str = "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c";
/// Between two looks at who votes.
const VOTES_PAUSE: Duration = Duration::from_millis(500);
const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS log(client TEXT NOT NULL, op INTEGER NOT NULL, pad BLOB);
    CREATE INDEX IF NOT EXISTS by_client ON log(client, op);
    CREATE TABLE IF NOT EXISTS led(epoch INTEGER)";
/// How long connections may take to end.
const CONNECTIONS_LIMIT: Duration = Duration::from_secs(4);
/// How long the hook may take.
const HOOK_LIMIT: Duration = Duration::from_secs(2);

/// What a client asks to be written.
#[derive(Serialize, Deserialize, Debug)]
pub struct Append {
    pub client: String,
    pub op: u64,
    /// What the handler takes before it writes, in milliseconds.
    pub pause: u64,
}

/// What it is told about it.
#[derive(Serialize, Deserialize, Debug)]
pub struct Appended {
    pub txid: Txid,
    /// Who wrote: its name, and its run.
    pub node: String,
    pub run: String,
    /// The instants before the write and after it, on the machine's clock.
    pub began: Micros,
    pub acked: Micros,
}

/// All that a read sees.
#[derive(Serialize, Deserialize, Debug)]
pub struct Seen {
    pub node: String,
    pub position: Option<Position>,
    /// How many rows of each client there are.
    pub counts: BTreeMap<String, u64>,
    /// The rows of the one who asks.
    pub own: Vec<u64>,
}

/// How the node stands.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Standing {
    pub run: String,
    pub id: String,
    pub role: String,
    pub epoch: Epoch,
    pub position: Option<Position>,
    pub waits_for: Option<String>,
    pub primary: Option<String>,
    pub problem: Option<String>,
    /// It has a vote among those that keep the lease's record.
    pub votes: bool,
}

/// Who leads after a handoff.
#[derive(Serialize, Deserialize, Debug)]
pub struct Handed {
    pub node: String,
    pub app: String,
}

/// A branch that the node keeps in `lost`, or something else there.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Kept {
    pub path: PathBuf,
    pub fork: Option<Position>,
    pub tip: Option<Position>,
    pub truncated: bool,
    /// What the branch had and the history that replaced it does not have.
    pub rows: Vec<(String, u64)>,
    /// What else it is, in words.
    pub what: String,
}

#[derive(Deserialize)]
struct Who {
    #[serde(default)]
    client: String,
}

#[derive(Deserialize)]
struct To {
    to: Option<NodeId>,
}

#[derive(Clone)]
struct App {
    db: Db,
    name: String,
    votes: Arc<AtomicBool>,
}

impl App {
    fn votes(&self) -> bool {
        self.votes.load(Ordering::Relaxed)
    }

    /// Looks again and again whether this node has a vote, as all members see it.
    async fn watch_votes(self) {
        loop {
            let view = self.db.members().await;
            let url = &self.db.node().addresses.replication;
            let votes = view.is_ok_and(|view| {
                let own = view.members.iter().any(|member| member.url == *url && member.votes);
                own && view.agree
            });
            self.votes.store(votes, Ordering::Relaxed);
            tokio::time::sleep(VOTES_PAUSE).await;
        }
    }
}

/// Reads `--name value` pairs.
fn arguments() -> BTreeMap<String, String> {
    let mut words = std::env::args().skip(2);
    let mut all = BTreeMap::new();
    while let (Some(name), Some(value)) = (words.next(), words.next()) {
        all.insert(name.trim_start_matches("--").to_string(), value);
    }
    all
}

/// Runs a node until SIGTERM, or until the one that started it is gone.
///
/// # Errors
/// Why it could not be one.
pub fn run() -> Result<(), Box<dyn std::error::Error>> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(arguments()))
}

fn config(arguments: &BTreeMap<String, String>) -> Result<Config, Box<dyn std::error::Error>> {
    let argument = |name: &str| arguments.get(name).map(String::as_str);
    let millis =
        |name: &str| argument(name).map(|text| text.parse::<u64>().map(Duration::from_millis)).transpose();
    let dir = PathBuf::from(argument("dir").ok_or("--dir is missing")?);
    let mut config = Config::new(dir.join("app.db"))
        .cluster(CLUSTER)
        .secret(Secret::new(SECRET)?)
        .advertise(argument("advertise").ok_or("--advertise is missing")?)
        .wal_limit(256 * 1024)
        .migrate(|conn| conn.execute_batch(SCHEMA));
    if let Some(bytes) = argument("log-bytes") {
        config = config.log_retention(bytes.parse()?, Duration::from_secs(3600));
    }
    if let Some(primary) = argument("follows") {
        return Ok(config.lease(lease::Fixed::replica_of(primary)));
    }
    let Some(lease) = argument("lease") else { return Ok(config) };
    if let Some(limit) = millis("failover-loss")? {
        config = config.failover_loss(limit);
    }
    if let Some(limit) = millis("drain-limit")? {
        config = config.drain_limit(limit);
    }
    if let Some(time) = millis("lease-time")? {
        config = config.lease_time(time);
    }
    let hook = PathBuf::from(argument("hook").unwrap_or_default());
    config = config
        .lease(lease_of(lease)?)
        .bootstrap(argument("nodes").ok_or("--nodes is missing")?.parse()?)
        .role_timeout(HOOK_LIMIT)
        .on_promote(move |db| promoted(db, hook.clone()));
    Ok(config)
}

/// Where the record is, by the command line.
fn lease_of(text: &str) -> Result<Lease, Error> {
    if let Some(urls) = text.strip_prefix("members:") {
        return Ok(lease::Members::new(urls.split(',')).into());
    }
    if text.starts_with("s3://") {
        return Ok(lease::ObjectStore::new(text)?.into());
    }
    if text.starts_with("etcd://") {
        return Ok(lease::Etcd::from_url(text)?.into());
    }
    Ok(lease::Directory::new(text).into())
}

/// What an application does when it leads: it writes; and it fails or hangs where a file says so.
async fn promoted(db: Db, hook: PathBuf) -> Result<(), Error> {
    match std::fs::read_to_string(hook).unwrap_or_default().as_str() {
        "fail" => return Err(Error::Disturbed("the hook was told to fail".into())),
        "hang" => std::future::pending().await,
        _ => {}
    }
    let epoch = db.roles().borrow().epoch.number();
    let write = move |tx: &mut Transaction<'_>| {
        tx.execute("DELETE FROM led WHERE epoch < ?1 - 100", [epoch as i64])?;
        Ok::<_, Error>(tx.execute("INSERT INTO led VALUES (?1)", [epoch as i64])?)
    };
    db.write(write).await.map(drop)
}

async fn serve(arguments: BTreeMap<String, String>) -> Result<(), Box<dyn std::error::Error>> {
    let name = arguments.get("name").cloned().unwrap_or_default();
    let listener = TcpListener::bind(arguments.get("listen").ok_or("--listen is missing")?).await?;
    let mut asked = signal(SignalKind::terminate())?;
    let db = Db::open(config(&arguments)?).await?;
    tracing::info!("{name} is {} in run {}", db.node_id(), db.node().incarnation);
    let app = App { db: db.clone(), name, votes: Arc::default() };
    let watch = tokio::spawn(app.clone().watch_votes());
    let draining = db.clone();
    let endpoint = db.service();
    let app = routes(app);
    db.serve_forwarded(app.clone())?;
    let mut server = tokio::spawn(
        axum::serve(listener, app.nest_service("/_replite", endpoint))
            .with_graceful_shutdown(async move {
                asked.recv().await;
                tracing::info!("asked to end");
                draining.drain().await;
            })
            .into_future(),
    );
    tokio::select! {
        served = &mut server => served??,
        () = async { db.draining().await; tokio::time::sleep(CONNECTIONS_LIMIT).await } => server.abort(),
    }
    watch.abort();
    db.shutdown().await;
    tracing::info!("ends");
    Ok(())
}

fn routes(app: App) -> Router {
    let layer = app.db.replay_layer().session(SessionTokens::Monotonic);
    Router::new()
        .route("/append", post(append))
        .route("/read", get(read))
        .layer(layer)
        .route("/status", get(status))
        .route("/handoff", post(handoff))
        .route("/lost", get(lost))
        .route("/decisions", get(decisions))
        .with_state(app)
}

async fn append(State(app): State<App>, Json(asked): Json<Append>) -> Result<Json<Appended>, Error> {
    tokio::time::sleep(Duration::from_millis(asked.pause)).await;
    let began = now();
    let commit = app.db.write(move |tx| {
        let mut insert = tx.prepare_cached("INSERT INTO log VALUES (?1, ?2, randomblob(200))")?;
        Ok::<_, Error>(insert.execute((&asked.client, asked.op as i64))?)
    });
    let commit = commit.await?;
    let acked = now();
    let txid = commit.txid.ok_or_else(|| Error::Disturbed("a commit without a number".into()))?;
    Ok(Json(Appended { txid, node: app.name, run: app.db.node().incarnation.to_string(), began, acked }))
}

async fn read(State(app): State<App>, Query(who): Query<Who>) -> Result<Json<Seen>, Error> {
    let position = app.db.position();
    let seen = app.db.read_async(move |conn| {
        let tx = conn.unchecked_transaction()?;
        let mut all = tx.prepare_cached("SELECT client, count(*) FROM log GROUP BY client")?;
        let counts = all.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
        let counts = counts.collect::<Result<BTreeMap<String, u64>, _>>()?;
        let mut own = tx.prepare_cached("SELECT op FROM log WHERE client = ?1 ORDER BY op")?;
        let own = own.query_map([&who.client], |row| Ok(row.get::<_, i64>(0)? as u64))?;
        let own = own.collect::<Result<Vec<u64>, _>>()?;
        Ok::<_, Error>((counts, own))
    });
    let (counts, own) = seen.await?;
    Ok(Json(Seen { node: app.name, position, counts, own }))
}

async fn status(State(app): State<App>) -> Json<Standing> {
    let (roles, status) = (app.db.roles().borrow().clone(), app.db.status());
    Json(Standing {
        run: app.db.node().incarnation.to_string(),
        id: app.db.node_id().to_string(),
        role: roles.role.to_string(),
        epoch: roles.epoch,
        position: app.db.position(),
        waits_for: roles.waits_for.map(|reason| reason.to_string()),
        primary: roles.primary.map(|primary| primary.addresses.app),
        problem: status.problem,
        votes: app.votes(),
    })
}

/// An operator's word, with all that there is to say of an error.
async fn handoff(State(app): State<App>, Query(to): Query<To>) -> Result<Json<Handed>, (StatusCode, String)> {
    let handed = app.db.handoff(to.to).await;
    let primary = handed.map_err(|error| (StatusCode::CONFLICT, error.to_string()))?;
    Ok(Json(Handed { node: primary.node.to_string(), app: primary.addresses.app }))
}

/// The last decisions of the election, a line each.
async fn decisions(State(app): State<App>) -> String {
    app.db.status().decisions.iter().map(|decision| format!("{decision:?}\n")).collect()
}

async fn lost(State(app): State<App>) -> Result<Json<Vec<Kept>>, Error> {
    let mut all = Vec::new();
    for lost in app.db.lost().await? {
        let mut kept = Kept {
            path: lost.path.clone(),
            fork: None,
            tip: None,
            truncated: true,
            rows: Vec::new(),
            what: format!("{:?}", lost.kind).chars().take(200).collect(),
        };
        if let Some(branch) = lost.branch() {
            (kept.fork, kept.tip) = (branch.fork, Some(branch.tip));
            if let Some(told) = branch.rows()? {
                kept.truncated = told.truncated;
                let row = |row: &replite::LostRow| {
                    let lost = row.lost.as_ref()?;
                    Some((lost.get("client")?.as_str()?.to_string(), lost.get("op")?.as_u64()?))
                };
                kept.rows = told.rows.iter().filter(|row| row.table == "log").filter_map(row).collect();
            }
        }
        all.push(kept);
    }
    Ok(Json(all))
}
