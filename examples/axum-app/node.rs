//! One instance: database, layer, server.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use replite::rusqlite::backup::{Backup, StepResult};
use replite::rusqlite::{Connection, OpenFlags};
use replite::{Config, Db, Secret, lease};
use tokio_util::sync::CancellationToken;

use crate::{Error, NodeArguments, api, store};

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
    let is_primary = arguments.primary.trim_end_matches('/') == url;
    if let Some(import) = arguments.import.as_deref().filter(|_| is_primary && !path.exists()) {
        copy(import, &path)?;
    }
    let config = Config::new(&path)
        .cluster(CLUSTER)
        .advertise(&url)
        .secret(secret(&arguments.secret)?)
        .migrate(store::migrate)
        .lease(if is_primary {
            lease::Fixed::primary()
        } else {
            lease::Fixed::replica_of(&arguments.primary)
        });
    // Before the database: an instance that can't have the port should not touch the data.
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    let db = Db::open(config).await?;
    let end = CancellationToken::new();
    let app = api::router(&db, url, arguments.peers.clone(), end.clone());
    let (draining, asked, with_parent) = (db.clone(), end.clone(), arguments.with_parent);
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        tokio::select! {
            () = crate::asked_to_end() => {}
            () = parent_gone(), if with_parent => {}
        }
        // Ends the feeds; the server waits for its connections.
        asked.cancel();
        draining.drain().await;
    });
    tokio::select! {
        served = async { server.await } => served?,
        () = async {
            end.cancelled().await;
            tokio::time::sleep(CONNECTIONS_LIMIT).await;
        } => eprintln!("some connections did not end in time"),
    }
    db.shutdown().await;
    Ok(())
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
