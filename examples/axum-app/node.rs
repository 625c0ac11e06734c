//! One instance: database, layer, server.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use replite::lease::{self, Lease};
use replite::rusqlite::backup::{Backup, StepResult};
use replite::rusqlite::{Connection, OpenFlags};
use replite::{Config, Db, Secret, Witness};
use tokio_util::sync::CancellationToken;

use crate::guard::Names;
use crate::{Error, NodeArguments, WitnessArguments, api, server, store};

/// The lease whose record the instances of `--peers` keep themselves.
pub(crate) const MEMBERS: &str = "members";
const CLUSTER: &str = "notes";
/// How long connections may take to end. With what `Db::shutdown` may take, and the rest of main, a
/// shutdown stays below the launcher's limit.
const CONNECTIONS_LIMIT: Duration = Duration::from_secs(2);
/// How long the file to import may be locked.
const IMPORT_LIMIT: Duration = Duration::from_secs(30);

pub(crate) async fn run(arguments: NodeArguments) -> Result<(), Error> {
    std::fs::create_dir_all(&arguments.data)?;
    let path = arguments.data.join("notes.db");
    let url = format!("http://{}", arguments.listen);
    if let Some(import) = &arguments.import
        && !path.exists()
        && imports(&arguments, &url)?
    {
        copy(import, &path)?;
    }
    let config = Config::new(&path)
        .cluster(CLUSTER)
        .advertise(&url)
        .secret(secret(&arguments.secret.secret)?)
        .migrate(store::migrate);
    let config = with_roles(config, &arguments, &url)?;
    // Before the database: an instance that can't have the port should not touch the data.
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    // With a lease there need not be a primary yet: the others may have to reach this instance first.
    let db = Db::open(config).await?;
    let end = CancellationToken::new();
    let names = Names::new(arguments.listen, &arguments.peers, &arguments.host);
    let app = api::router(&db, url, arguments.peers.clone(), names, end.clone());
    // What other instances forward comes in TLS, too.
    db.serve_forwarded(app.clone())?;
    let (draining, asked, with_parent) = (db.clone(), end.clone(), arguments.with_parent);
    let served = server::serve(listener, app, async move {
        tokio::select! {
            () = crate::asked_to_end() => {}
            () = parent_gone(), if with_parent => {}
        }
        // Ends the feeds; the server waits for its connections.
        asked.cancel();
        draining.drain().await;
    });
    tokio::select! {
        () = served => {}
        () = async {
            end.cancelled().await;
            tokio::time::sleep(CONNECTIONS_LIMIT).await;
        } => eprintln!("some connections did not end in time"),
    }
    db.shutdown().await;
    Ok(())
}

/// A member without a database, with a listener of its own.
pub(crate) async fn witness(arguments: WitnessArguments) -> Result<(), Error> {
    std::fs::create_dir_all(&arguments.data)?;
    // The names of cluster and database are those of the instances.
    let config = Config::new(arguments.data.join("notes.db"))
        .cluster(CLUSTER)
        .listen(arguments.listen)
        .secret(secret(&arguments.secret.secret)?)
        .lease(arguments.lease);
    Witness::run(with_lease_time(config, arguments.lease_time), crate::asked_to_end()).await?;
    Ok(())
}

/// Says how the primary is found. With a lease, all instances have the same configuration.
fn with_roles(config: Config, arguments: &NodeArguments, url: &str) -> Result<Config, Error> {
    let config = match (arguments.roles.lease.as_deref(), arguments.roles.fixed_primary()) {
        // The endpoint is in each instance's own server, so that its URL is the instance's.
        (Some(MEMBERS), _) => config.lease(lease::Members::new(arguments.peers.clone())),
        (Some(text), _) => {
            let nodes = arguments.nodes.unwrap_or(arguments.peers.len().max(1));
            config.lease(text.parse::<Lease>()?).bootstrap(nodes)
        }
        (None, Some(primary)) if primary != url => config.lease(lease::Fixed::replica_of(primary)),
        (None, _) => config.lease(lease::Fixed::primary()),
    };
    Ok(with_lease_time(config, arguments.lease_time))
}

fn with_lease_time(config: Config, time: Option<Duration>) -> Config {
    match time {
        Some(time) => config.lease_time(time),
        None => config,
    }
}

/// Whether this instance is the one that imports. With a lease all may be told to, and two databases
/// would make no cluster. It is the first of the peers, or with a lease in a directory the first to
/// come. That one notes its URL beside the directory, and stays the one, also after an import that
/// did not get to its end.
fn imports(arguments: &NodeArguments, url: &str) -> Result<bool, Error> {
    let Some(text) = arguments.roles.lease.as_deref() else {
        return Ok(arguments.roles.fixed_primary() == Some(url));
    };
    if text.starts_with(MEMBERS) || text.contains("://") {
        return Ok(arguments.peers.first().is_none_or(|first| first == url));
    }
    let directory = Path::new(text.strip_prefix("directory:").unwrap_or(text)).to_path_buf();
    if let Some(parent) = directory.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let beside = |extension: &str| {
        let mut path = directory.clone().into_os_string();
        path.push(extension);
        PathBuf::from(path)
    };
    let (importer, mine) = (beside(".import"), beside(&format!(".import-{}", std::process::id())));
    // What has the one name later has its content from the first moment on.
    std::fs::write(&mine, url)?;
    let noted = std::fs::hard_link(&mine, &importer);
    std::fs::remove_file(&mine)?;
    match noted {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error.into()),
        _ => Ok(std::fs::read_to_string(&importer)? == url),
    }
}

/// The cluster's secret. Anything that is none is taken for a phrase, which takes a moment.
fn secret(text: &str) -> Result<Secret, replite::Error> {
    Secret::new(text).or_else(|error| {
        tracing::warn!("a phrase is used for the secret: {error}");
        Secret::from_phrase(text, CLUSTER)
    })
}

/// Returns when standard input ends.
async fn parent_gone() {
    let (gone, wait) = tokio::sync::oneshot::channel();
    // A thread of its own: a blocked read would keep the runtime from ending.
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while matches!(std::io::stdin().read(&mut buffer), Ok(n) if n > 0) {}
        let _ = gone.send(());
    });
    let _ = wait.await;
}

/// Copies a database by SQLite itself, which copies one that is in use whole.
fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let new = to.with_extension("importing");
    // What an import left that did not get to its end.
    if let Err(error) = std::fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error.into());
    }
    let source = Connection::open_with_flags(from, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let mut target = Connection::open(&new)?;
    // We wait ourselves, and say so.
    source.busy_timeout(Duration::ZERO)?;
    let end = Instant::now() + IMPORT_LIMIT;
    let backup = Backup::new(&source, &mut target)?;
    let mut said = false;
    // A busy source is no error: nothing was copied.
    while backup.step(-1)? != StepResult::Done {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!("{} is locked by somebody; the import waits", from.display());
        }
        if Instant::now() > end {
            return Err(format!("{} stays locked", from.display()).into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    drop(backup);
    target.close().map_err(|(_, e)| e)?;
    std::fs::rename(&new, to)?;
    Ok(())
}
