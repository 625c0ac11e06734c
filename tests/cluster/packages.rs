//! A realistic database: a package index with edges, indexes and full-text search, built while a
//! replica follows.

use std::fmt::Write;
use std::io::Read;
use std::path::Path;

use crate::support::*;
use replite::{Db, Error};

/// The table, if it lies beside the project; else one of the same shape.
fn table() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data/packages.tsv.gz");
    let mut text = String::new();
    match std::fs::File::open(path) {
        Ok(file) => {
            flate2::read::GzDecoder::new(file).read_to_string(&mut text).unwrap();
        }
        Err(_) => {
            text.push_str("package\tversion\tsection\tinstalled_kb\tdownload_bytes\tdepends\tdescription\n");
            for i in 0..20_000 {
                let depends = format!("lib{}, lib{} (>= {}.1) | other{}", i % 97, i % 31, i % 7, i % 13);
                writeln!(
                    text,
                    "package{i}\t{}.{}\tsection{}\t{i}\t{}\t{depends}\tdoes the work of number {}",
                    i % 9,
                    i % 7,
                    i % 40,
                    i * 311,
                    i % 1000
                )
                .unwrap();
            }
        }
    }
    text
}

const TABLES: &str =
    "CREATE TABLE packages(name TEXT PRIMARY KEY, version, section, kb INTEGER, bytes INTEGER, description);
    CREATE TABLE depends(package TEXT, relation TEXT);
    CREATE INDEX by_section ON packages(section);
    CREATE INDEX by_relation ON depends(relation);
    CREATE VIRTUAL TABLE words USING fts5(description, content='packages')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_package_index_is_the_same_on_both_sides_page_by_page_and_answer_by_answer() {
    let dir = tempfile::tempdir().unwrap();
    let p = Db::open(primary(&dir.path().join("p.db"), 0).wal_limit(4 << 20)).await.unwrap();
    let url = p.node().addresses.replication.clone();
    let r = Db::open(replica(&dir.path().join("r.db"), &url).wal_limit(4 << 20)).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    p.write(|tx| Ok::<_, Error>(tx.execute_batch(TABLES)?)).await.unwrap();
    let table = table();
    let rows: Vec<Vec<String>> =
        table.lines().skip(1).map(|line| line.split('\t').map(str::to_string).collect()).collect();
    assert!(rows.len() >= 20_000);
    for chunk in rows.chunks(2000) {
        let chunk = chunk.to_vec();
        p.write(move |tx| {
            for row in &chunk {
                tx.prepare_cached("INSERT OR REPLACE INTO packages VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
                    .execute([&row[0], &row[1], &row[2], &row[3], &row[4], &row[6]])?;
                for relation in row[5].split(", ").filter(|r| !r.is_empty()) {
                    tx.prepare_cached("INSERT INTO depends VALUES (?1, ?2)")?.execute([&row[0], relation])?;
                }
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    }
    p.write(|tx| Ok::<_, Error>(tx.execute_batch("INSERT INTO words(words) VALUES ('rebuild')")?))
        .await
        .unwrap();
    let last = p.write(|tx| Ok::<_, Error>(tx.execute("DELETE FROM depends WHERE rowid % 3 = 0", [])?)).await;
    let last = last.unwrap().txid.unwrap();
    p.wait_for_timeout(last, LIMIT).await.unwrap();
    r.wait_for_timeout(last, LIMIT).await.unwrap();
    for sql in [
        "SELECT group_concat(section || n, ',') FROM (SELECT section, count(*) n FROM packages GROUP BY section ORDER BY 1)",
        "SELECT count(*) || '/' || sum(length(relation)) FROM depends",
        "SELECT count(*) || '' FROM words WHERE words MATCH 'work OR library'",
    ] {
        let ask =
            |db: &Db| db.read(|c| Ok::<_, Error>(c.query_row(sql, [], |r| r.get::<_, String>(0))?)).unwrap();
        let answer = ask(&p);
        assert!(answer.len() > 3, "{sql}: {answer}");
        assert_eq!(answer, ask(&r), "{sql}");
    }
    assert_same_pages(p.path(), r.path());
    r.shutdown().await;
    p.shutdown().await;
}
