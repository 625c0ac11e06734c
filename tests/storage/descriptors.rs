//! A process whose descriptors are used up, because strangers hold connections to its application.
#![cfg(target_os = "linux")]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use replite::{Config, Db, Error};

use crate::support::*;

/// What `ulimit -n` says in the child. The half of a usual one: the strangers are sooner there.
const LIMIT_OF_DESCRIPTORS: usize = 512;
/// More than that.
const STRANGERS: usize = 600;
/// Readers of a node at one time: as many as its pool lets be, and as many again.
const READERS: usize = 32;
/// For a read of an honest client.
const SOON: Duration = Duration::from_secs(1);

/// Takes what comes, as any server does, and keeps it until the client leaves.
fn serve(public: TcpListener) {
    public.set_nonblocking(true).unwrap();
    std::thread::spawn(move || {
        let mut taken: Vec<TcpStream> = Vec::new();
        loop {
            match public.accept() {
                Ok((stranger, _)) => {
                    stranger.set_nonblocking(true).unwrap();
                    taken.push(stranger);
                }
                // Much sooner again than any real server.
                Err(_) => {
                    taken.retain(|stranger| !matches!(stranger.peek(&mut [0]), Ok(0)));
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    });
}

/// A log whose files are of a megabyte.
fn small_segments(config: Config) -> Config {
    config.log_retention(8 << 20, Duration::from_secs(60))
}

fn used_up() -> bool {
    std::fs::File::open("/dev/null").is_err()
}

/// Reads with many threads at one time, none of which has a connection yet.
fn read_at_once(db: &Db) -> Duration {
    let read = || {
        let begin = Instant::now();
        let sum = db.read(|conn| {
            let sql = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 10000)
                       SELECT (SELECT count(*) FROM t) + 0 * count(*) FROM c";
            Ok::<_, Error>(conn.query_row(sql, [], |row| row.get::<_, i64>(0))?)
        });
        (sum.unwrap(), begin.elapsed())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(read)).collect();
        let read: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        assert!(read.iter().all(|(rows, _)| *rows == read[0].0), "{read:?}");
        read.into_iter().map(|(_, took)| took).max().unwrap()
    })
}

#[test]
#[ignore = "runs as the child of another test"]
fn process_full_of_strangers() {
    if !is_child() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = PathBuf::from(variable("DIR"));
    let none = placeholders();
    let public = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let p = runtime
        .block_on(Db::open(small_segments(primary(&dir.join("p.db"), variable("PORT").parse().unwrap()))))
        .unwrap();
    speak(&format!("listens {}", public.local_addr().unwrap()));
    let r = small_segments(replica(&dir.join("r.db"), &format!("replite://{}", hear())));
    let r = runtime.block_on(async {
        let r = Db::open(r).await.unwrap();
        within("ready", r.ready()).await.unwrap();
        r
    });
    serve(public);
    let whole = placeholders();
    assert!(whole >= none + 32);
    speak("ready");
    until("no descriptor", used_up);

    // Cold: none of the two has opened a connection to read with.
    for (name, db) in [("primary", &p), ("replica", &r)] {
        let took = read_at_once(db);
        println!("the slowest of {READERS} reads of the {name} took {took:?}");
        assert!(took < SOON, "{name}: {took:?}");
        assert!(db.health().can_read, "{name}: {:?}", db.health());
    }
    // What is written is on the replica; the log and the WAL begin new files meanwhile.
    let write = async |rows| {
        let mut last = None;
        for n in 0..rows {
            last = Some(insert(&p, "full", n).await);
        }
        within("the replica", r.wait_for_timeout(last.unwrap(), LIMIT)).await.unwrap();
        assert_eq!(count(&p), count(&r));
    };
    runtime.block_on(write(600));
    assert!(used_up(), "the strangers have what is free");
    // The stream breaks, and comes back.
    speak("cut");
    hear();
    runtime.block_on(write(1));
    assert!(used_up(), "they still do");
    assert!(read_at_once(&r) < SOON);

    speak("enough");
    hear();
    until("descriptors", || !used_up());
    until("a whole reserve", || placeholders() == whole);
    runtime.block_on(async {
        r.shutdown().await;
        p.shutdown().await;
    });
    assert_eq!(placeholders(), none, "what is closed keeps nothing");
    speak("ended");
    hear();
}

fn placeholders() -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.flatten()
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("/dev/null")))
        .count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_read_commit_and_follow_while_strangers_have_all_descriptors() {
    let (dir, port) = (tempfile::tempdir().unwrap(), own_port());
    let wire = Wire::start(([127, 0, 0, 1], port).into(), Duration::ZERO).await;
    let limited = shell(&format!("ulimit -n {LIMIT_OF_DESCRIPTORS}; exec \"$@\""));
    let variables = [("DIR", dir.path().to_str().unwrap()), ("PORT", &port.to_string())];
    let mut child = Process::start_by(limited, process_full_of_strangers, &variables);
    let begun = tokio::task::block_in_place(|| child.expect("listens"));
    let public: std::net::SocketAddr = begun.split(' ').nth(1).unwrap().parse().unwrap();
    child.say(&wire.address.to_string());
    tokio::task::block_in_place(|| child.expect("ready"));
    let strangers: Vec<_> =
        (0..STRANGERS).map(|_| tokio::spawn(tokio::net::TcpStream::connect(public))).collect();
    tokio::task::block_in_place(|| child.expect("cut"));
    wire.cut();
    child.say("cut");
    tokio::task::block_in_place(|| child.expect("enough"));
    for stranger in strangers {
        stranger.abort();
        drop(stranger.await);
    }
    child.say("gone");
    tokio::task::block_in_place(|| child.expect("ended"));
}
