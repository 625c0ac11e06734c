//! Other processes at our files: the `sqlite3` shell where there is one, else this binary run again
//! with a connection of its own.

use std::path::Path;
use std::process::Command;

use crate::support::*;
use replite::Db;
use replite::rusqlite::Connection;

/// Stands in for the shell.
#[test]
#[ignore = "runs as the child of another test"]
fn shell_process() {
    if !is_child() {
        return;
    }
    let connection = Connection::open(variable("DB")).unwrap();
    connection.busy_timeout(std::time::Duration::ZERO).unwrap();
    let said = connection.prepare(&variable("SQL")).and_then(|mut statement| {
        let mut rows = statement.query([])?;
        Ok(rows.next()?.map_or_else(String::new, |row| format!("{:?}", row.get_ref(0).unwrap())))
    });
    match said {
        Ok(row) => speak(&format!("done {row}")),
        Err(error) => speak(&format!("failed {error}")),
    }
}

/// Runs one statement in another process: what it said, or why it failed.
fn shell(path: &Path, sql: &str) -> Result<String, String> {
    if let Ok(done) = Command::new("sqlite3").arg(path).arg(sql).output() {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        return if done.status.success() { Ok(text(done.stdout)) } else { Err(text(done.stderr)) };
    }
    let variables = [("DB", path.to_str().unwrap()), ("SQL", sql)];
    let said = Process::start(shell_process, &variables).success().pop().expect("a word of the process");
    match said.split_once(' ').unwrap() {
        ("done", row) => Ok(row.to_string()),
        (_, why) => Err(why.to_string()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_process_writes_on_the_primary_arrives_and_a_replica_refuses_it() {
    let dir = tempfile::tempdir().unwrap();
    let (p, r) = (dir.path().join("p.db"), dir.path().join("r.db"));
    let primary = Db::open(primary(&p, 0)).await.unwrap();
    let replica = Db::open(replica(&r, &primary.node().addresses.replication)).await.unwrap();
    within("ready", replica.ready()).await.unwrap();
    let mut rows = 0;
    for i in 0..20 {
        let mut positions = replica.watch();
        let before = replica.position().unwrap();
        shell(&p, "INSERT INTO t(who, n) VALUES ('shell', 1)").unwrap();
        rows += 1;
        within("arrival", positions.wait_for(|at| at.is_some_and(|at| at != before))).await.unwrap();
        assert_eq!(count(&replica), rows);
        if i % 5 == 0 {
            // Neither of these may take a commit away from capture.
            shell(&p, "PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
            shell(&p, "VACUUM").unwrap();
        }
        let ours = insert(&primary, "ours", i).await;
        rows += 1;
        replica.wait_for_timeout(ours, LIMIT).await.unwrap();
        assert_eq!(count(&replica), rows);
    }
    for sql in ["INSERT INTO t(who) VALUES ('shell')", "DELETE FROM t", "DROP TABLE t", "VACUUM"] {
        let refused = shell(&r, sql).unwrap_err();
        assert!(refused.contains("locked"), "{sql}: {refused:?}");
    }
    let read = shell(&r, "SELECT count(*) FROM t").unwrap();
    assert!(read.contains(&rows.to_string()), "{read:?}");
    let last = insert(&primary, "ours", 99).await;
    primary.wait_for(last).await.unwrap();
    replica.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    primary.shutdown().await;
    replica.shutdown().await;
}
