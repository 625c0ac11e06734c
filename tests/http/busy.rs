//! A write that can't begin because another program writes: the client is told that it may send it
//! again.

use http::Request;

use crate::app::*;
use crate::http_support::*;
use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_behind_another_program_s_is_said_to_have_had_no_effect_on_every_node() {
    let dir = tempfile::tempdir().unwrap();
    let ports = [own_port(), own_port()];
    let urls = ports.map(|port| format!("http://127.0.0.1:{port}"));
    let follows = ["", &urls[0]];
    let nodes = [0, 1].map(|n| {
        let node = node(dir.path(), ports[n], None, follows[n], &[]);
        node.expect("ready");
        node
    });
    let other = plain(&database(dir.path(), ports[0]));
    other.execute_batch("BEGIN IMMEDIATE; INSERT INTO notes VALUES ('other')").unwrap();
    let http = Http::new();
    let post = async |n: usize| {
        let request = Request::post(&urls[n]).body(format!("note {n}")).unwrap();
        within("an answer", http.send(request)).await.unwrap()
    };
    let answers: [Answer; 2] = tokio::join!(post(0), post(1)).into();
    for answer in answers {
        assert_eq!((answer.status, answer.header("replite-outcome")), (503, "not-executed"), "{answer:?}");
        assert!(!answer.header("retry-after").is_empty(), "{answer:?}");
    }
    other.execute_batch("COMMIT").unwrap();
    for n in [0, 1] {
        assert_eq!(post(n).await.status, 201);
    }
    let notes: i64 = other.query_row("SELECT count(*) FROM notes", [], |row| row.get(0)).unwrap();
    assert_eq!(notes, 3);
    drop(other);
    tokio::task::block_in_place(|| nodes.map(Process::end));
}
