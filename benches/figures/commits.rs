//! Commits.

use std::time::Instant;

use replite::rusqlite::Connection;
use replite::{Db, Durability, Error};

use crate::figure;
use crate::home::{INSERT, Other, directory, primary, raw, runtime};

const RUNS: usize = 7;

/// Microseconds a commit of one row by raw SQLite.
fn raw_commits(connection: &Connection, count: i64) -> f64 {
    let mut insert = connection.prepare(INSERT).expect("sql");
    let begin = Instant::now();
    for k in 0..count {
        insert.execute([k]).expect("a row");
    }
    begin.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn blocking_commits(db: &Db, count: i64) -> f64 {
    let begin = Instant::now();
    for k in 0..count {
        db.write_blocking(|tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?)).expect("a commit");
    }
    begin.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn async_commits(db: &Db, count: i64) -> f64 {
    let db = db.clone();
    let run = async move {
        let begin = Instant::now();
        for k in 0..count {
            db.write(move |tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?))
                .await
                .expect("a commit");
        }
        begin.elapsed().as_secs_f64() * 1e6 / count as f64
    };
    runtime().block_on(async { runtime().spawn(run).await.expect("a task") })
}

pub(crate) fn normal() {
    let dir = directory();
    let raw = raw(&dir.path().join("raw.db"), "NORMAL");
    let db = primary(&dir.path().join("p.db"), Durability::Unsynced);
    let _other = Other::start(&dir.path().join("r.db"), &db);
    let (mut ratios, mut guarded) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let base = raw_commits(&raw, 5000);
        ratios.push(blocking_commits(&db, 5000) / base);
        let mut guard = db.writer().expect("the writer");
        guarded.push(raw_commits(&guard, 5000) / base);
        guard.flush().expect("flushed");
    }
    figure("commit_normal_ratio", "x", ratios);
    figure("commit_normal_guard_ratio", "x", guarded);
}

pub(crate) fn full() {
    let dir = directory();
    let raw = raw(&dir.path().join("raw.db"), "FULL");
    let db = primary(&dir.path().join("p.db"), Durability::Synced);
    let mut raws = Vec::new();
    let mut ratios = Vec::new();
    for _ in 0..RUNS {
        let base = raw_commits(&raw, 800);
        raws.push(base);
        ratios.push(async_commits(&db, 800) / base);
    }
    figure("commit_full_ratio", "x", ratios);
    figure("commit_full_raw", "us", raws);
}

pub(crate) fn group() {
    const WRITERS: i64 = 64;
    let dir = directory();
    let raw = raw(&dir.path().join("raw.db"), "FULL");
    let db = primary(&dir.path().join("p.db"), Durability::Synced);
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let base = 1e6 / raw_commits(&raw, 800);
        let begin = Instant::now();
        let tasks: Vec<_> = (0..WRITERS)
            .map(|_| {
                let db = db.clone();
                runtime().spawn(async move {
                    for k in 0..250 {
                        db.write(move |tx| Ok::<_, Error>(tx.prepare_cached(INSERT)?.execute([k])?))
                            .await
                            .expect("a commit");
                    }
                })
            })
            .collect();
        runtime().block_on(async {
            for task in tasks {
                task.await.expect("a task");
            }
        });
        let rate = (WRITERS * 250) as f64 / begin.elapsed().as_secs_f64();
        rates.push(rate);
        ratios.push(rate / base);
    }
    figure("group_commit_ratio", "x", ratios);
    figure("group_commit_rate", "/s", rates);
}

pub(crate) fn hop() {
    let dir = directory();
    let db = primary(&dir.path().join("p.db"), Durability::Unsynced);
    let mut extra = Vec::new();
    for _ in 0..RUNS {
        let base = blocking_commits(&db, 4000);
        extra.push(async_commits(&db, 4000) - base);
    }
    figure("write_hop_us", "us", extra);
}
