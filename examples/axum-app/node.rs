//! One instance: database, layer, server.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use replite::rusqlite::{Connection, backup::Backup};
use replite::{Config, Db, Secret, lease};

use crate::{Error, NodeArguments, api, store};

/// How long the whole shutdown may take.
const END_LIMIT: Duration = Duration::from_secs(10);

pub(crate) async fn run(arguments: NodeArguments) -> Result<(), Error> {
    std::fs::create_dir_all(&arguments.data)?;
    let path = arguments.data.join("notes.db");
    let url = format!("http://{}", arguments.listen);
    let is_primary = arguments.primary.trim_end_matches('/') == url;
    if let Some(import) = arguments.import.as_deref().filter(|_| is_primary && !path.exists()) {
        copy(import, &path)?;
    }
    let config = Config::new(&path)
        .cluster("notes")
        .advertise(&url)
        .secret(Secret::new(&arguments.secret)?)
        .migrate(store::migrate)
        .lease(if is_primary {
            lease::Fixed::primary()
        } else {
            lease::Fixed::replica_of(&arguments.primary)
        });
    // Before the database: who can't have the port should not touch the data.
    let listener = tokio::net::TcpListener::bind(arguments.listen).await?;
    let db = Db::open(config).await?;
    let app = api::router(&db, url, arguments.peers.clone());
    let (draining, with_parent) = (db.clone(), arguments.with_parent);
    let (asked, was_asked) = tokio::sync::oneshot::channel();
    let server = axum::serve(listener, app).with_graceful_shutdown(async move {
        tokio::select! {
            () = crate::asked_to_end() => {}
            () = parent_gone(), if with_parent => {}
        }
        // The server waits for its connections; whoever waits for the server does so with a bound.
        let _ = asked.send(());
        draining.drain().await;
    });
    tokio::select! {
        served = async { server.await } => served?,
        () = async {
            let _ = was_asked.await;
            tokio::time::sleep(END_LIMIT).await;
        } => eprintln!("some connections did not end in time"),
    }
    db.shutdown().await;
    Ok(())
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

/// Copies a database by SQLite itself, so that one that is in use is copied whole.
fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    let source = Connection::open_with_flags(from, replite::rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let new = to.with_extension("importing");
    let mut target = Connection::open(&new)?;
    Backup::new(&source, &mut target)?.step(-1)?;
    target.close().map_err(|(_, e)| e)?;
    std::fs::rename(&new, to)?;
    Ok(())
}
