//! Other processes at our files: the `sqlite3` shell where there is one, else this binary run again with a connection of its own.

use std::path::Path;
use std::process::{Command, Output};

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
    let mut statement = connection.prepare(&variable("SQL")).unwrap();
    let columns = statement.column_count();
    let run = || -> replite::rusqlite::Result<()> {
        if columns == 0 {
            return statement.execute([]).map(drop);
        }
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            println!("{:?}", row.get_ref(0)?);
        }
        Ok(())
    };
    let mut run = run;
    if let Err(error) = run() {
        eprintln!("{error}");
        std::process::exit(5);
    }
}

/// Runs one statement in another process.
fn shell(path: &Path, sql: &str) -> Output {
    match Command::new("sqlite3").arg(path).arg(sql).output() {
        Ok(output) => output,
        Err(_) => Command::new(std::env::current_exe().unwrap())
            .args([test_name(&shell_process), "--exact", "--nocapture", "--include-ignored"])
            .env("REPLITE_TEST_CHILD", "1")
            .env("DB", path)
            .env("SQL", sql)
            .output()
            .unwrap(),
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
        let done = shell(&p, "INSERT INTO t(who, n) VALUES ('shell', 1)");
        assert!(done.status.success(), "{done:?}");
        rows += 1;
        within("arrival", positions.wait_for(|at| at.is_some_and(|at| at != before))).await.unwrap();
        assert_eq!(count(&replica), rows);
        if i % 5 == 0 {
            // Neither of these may take a commit away from capture.
            shell(&p, "PRAGMA wal_checkpoint(TRUNCATE)");
            assert!(shell(&p, "VACUUM").status.success());
        }
        let ours = insert(&primary, "ours", i).await;
        rows += 1;
        replica.wait_for_timeout(ours, LIMIT).await.unwrap();
        assert_eq!(count(&replica), rows);
    }
    for sql in ["INSERT INTO t(who) VALUES ('shell')", "DELETE FROM t", "DROP TABLE t", "VACUUM"] {
        let refused = shell(&r, sql);
        assert!(!refused.status.success(), "{sql}: {refused:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("locked"), "{refused:?}");
    }
    let read = shell(&r, "SELECT count(*) FROM t");
    assert!(String::from_utf8_lossy(&read.stdout).contains(&rows.to_string()), "{read:?}");
    let last = insert(&primary, "ours", 99).await;
    primary.wait_for(last).await.unwrap();
    replica.wait_for_timeout(last, LIMIT).await.unwrap();
    assert_same_pages(&p, &r);
    primary.shutdown().await;
    replica.shutdown().await;
}
