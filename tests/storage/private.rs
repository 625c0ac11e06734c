//! Who may not read the database reads nothing that lies beside it, and nobody can have a node
//! write to a file of his choice.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use replite::{Db, Error, Event, Unsupported};

use crate::support::*;

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn state_dir(database: &Path) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push("-replite");
    name.into()
}

/// The mask that is usual for new files, which is all of a process's: see [`alone`].
fn usual_mask() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
}

/// Everything below the directory beside a database; the modes of its files are at most that of the
/// database.
fn all_private(database: &Path, least: &[&str]) {
    let allowed = mode(database) & 0o666;
    let mut seen = Vec::new();
    let mut todo = vec![state_dir(database)];
    while let Some(directory) = todo.pop() {
        assert_eq!(mode(&directory), 0o700, "{}", directory.display());
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                assert_eq!(mode(&path) & !allowed, 0, "{} is {:o}", path.display(), mode(&path));
                seen.push(path.strip_prefix(state_dir(database)).unwrap().to_str().unwrap().to_string());
            }
        }
    }
    for name in least {
        assert!(seen.iter().any(|seen| seen.contains(name)), "no {name} among {seen:?}");
    }
    for end in ["-wal", "-shm"] {
        let mut name = database.as_os_str().to_owned();
        name.push(end);
        assert_eq!(mode(Path::new(&name)) & !allowed, 0, "{end}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_beside_a_database_is_no_more_open_than_the_database() {
    if !alone(what_lies_beside_a_database_is_no_more_open_than_the_database) {
        return;
    }
    usual_mask();
    let dir = tempfile::tempdir().unwrap();
    chmod(dir.path(), 0o755);
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(primary(&p, 0).database_mode(0o640).durability(replite::Durability::Unsynced))
        .await
        .unwrap();
    assert_eq!(mode(&p), 0o640);
    let url = db.node().addresses.replication.clone();
    let open = || Db::open(replica(&r, &url));
    let follower = open().await.unwrap();
    let first = insert(&db, "a", 1).await;
    within("the replica", follower.wait_for_timeout(first, LIMIT)).await.unwrap();
    assert_eq!(mode(&r), 0o600, "a database that nothing was said of");
    follower.shutdown().await;
    drop(follower);
    plain(&r).execute("INSERT INTO t(who, n) VALUES ('stranger', 1)", []).unwrap();
    let follower = open().await.unwrap();
    let mut events = follower.events();
    let healed = async { while !matches!(events.next().await.unwrap(), Event::Healed { .. }) {} };
    within("the heal", healed).await;
    let last = insert(&db, "a", 2).await;
    within("the replica", follower.wait_for_timeout(last, LIMIT)).await.unwrap();
    let branch = follower.lost().await.unwrap().remove(0);
    for (node, path) in [(&db, &p), (&follower, &r)] {
        let snapshot = node.snapshot().await.unwrap();
        all_private(path, &["snapshot-", "log/", "anchors", "epochs", "node"]);
        drop(snapshot);
        let copy = path.with_extension("copy");
        node.snapshot_to(&copy).await.unwrap();
        assert_eq!(mode(&copy), mode(path));
    }
    all_private(&p, &["unsynced"]);
    all_private(&r, &["branch.json", "rows.jsonl", "pages", "records"]);
    let export = dir.path().join("export.db");
    branch.branch().unwrap().export(&export).unwrap();
    assert_eq!(mode(&export), 0o600);
    db.shutdown().await;
    follower.shutdown().await;
    // As an earlier version left it.
    chmod(&state_dir(&r), 0o755);
    let follower = open().await.unwrap();
    assert_eq!(mode(&state_dir(&r)), 0o700);
    follower.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replicas_file_gets_the_mode_that_is_asked_for() {
    if !alone(a_replicas_file_gets_the_mode_that_is_asked_for) {
        return;
    }
    usual_mask();
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let db = Db::open(primary(&p, 0)).await.unwrap();
    assert_eq!(mode(&p), 0o644, "as SQLite makes it");
    let url = db.node().addresses.replication.clone();
    let follower = Db::open(replica(&r, &url).database_mode(0o664)).await.unwrap();
    within("the replica", follower.ready()).await.unwrap();
    assert_eq!(mode(&r), 0o664);
    all_private(&r, &["log/"]);
    follower.shutdown().await;
    db.shutdown().await;
}

async fn refused(path: &Path) -> &'static str {
    match Db::open(primary(path, 0)).await {
        Err(Error::Unsupported { path: named, reason: Unsupported::StateDirectory(why) }) => {
            assert_eq!(named.file_name(), state_dir(path).file_name());
            why
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_somebody_prepared_is_refused_and_no_link_in_one_is_followed() {
    if !alone(a_directory_that_somebody_prepared_is_refused_and_no_link_in_one_is_followed) {
        return;
    }
    usual_mask();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.db");
    let (victim, state_dir) = (dir.path().join("victim"), state_dir(&path));
    fs::write(&victim, "precious").unwrap();
    let prepare = || {
        fs::create_dir(&state_dir).unwrap();
        for name in ["epochs.new", "node.new"] {
            symlink(&victim, state_dir.join(name)).unwrap();
        }
        fs::create_dir(state_dir.join("log")).unwrap();
        symlink(&victim, state_dir.join("log").join(format!("{:016x}.log", 0))).unwrap();
    };
    prepare();
    chmod(&state_dir, 0o777);
    assert!(refused(&path).await.contains("chmod 700"));
    assert!(!path.exists(), "nothing was made");
    if rustix::process::geteuid().is_root() {
        chmod(&state_dir, 0o755);
        std::os::unix::fs::chown(&state_dir, Some(4321), None).unwrap();
        assert!(refused(&path).await.contains("belongs neither"));
        std::os::unix::fs::chown(&state_dir, Some(0), None).unwrap();
    }
    // Ours, with links in it.
    chmod(&state_dir, 0o700);
    let opened = Db::open(primary(&path, 0)).await;
    assert!(
        matches!(&opened, Err(Error::Io { source, .. }) if source.to_string().contains("symbolic link")),
        "{opened:?}"
    );
    fs::remove_file(state_dir.join("log").join(format!("{:016x}.log", 0))).unwrap();
    let db = Db::open(primary(&path, 0)).await.unwrap();
    insert(&db, "a", 1).await;
    db.shutdown().await;
    drop(db);
    fs::rename(&state_dir, dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), &state_dir).unwrap();
    assert!(refused(&path).await.contains("symbolic link"));
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
}
