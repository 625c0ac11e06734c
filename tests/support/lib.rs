//! What the cluster tests share: nodes in processes of their own, a TCP proxy that delays and cuts, comparisons.
#![allow(dead_code, unused_imports, reason = "each test binary uses its part of it")]

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use replite::rusqlite::Connection;
use replite::{Config, Db, Error, Secret, Txid, lease};

/// The secret of all tests' clusters.
pub(crate) fn secret() -> Secret {
    Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").unwrap()
}

pub(crate) const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, who, n, v)";

/// A primary's configuration: small WAL, so that it is restarted often.
pub(crate) fn primary(path: &Path, port: u16) -> Config {
    Config::new(path)
        .database("app")
        .secret(secret())
        .wal_limit(256 * 1024)
        .listen(SocketAddr::from(([127, 0, 0, 1], port)))
        .migrate(|conn| conn.execute_batch(SCHEMA))
}

pub(crate) fn replica(path: &Path, url: &str) -> Config {
    Config::new(path)
        .database("app")
        .secret(secret())
        .wal_limit(256 * 1024)
        .lease(lease::Fixed::replica_of(url))
}

/// A port that is free, and that no connection is given by chance while a node that had it is closed: below those that systems give away.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + (std::process::id() % 400) as u16 * 50;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 50;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

pub(crate) async fn insert(db: &Db, who: &'static str, n: i64) -> Txid {
    let commit = db
        .write(move |tx| {
            Ok::<_, Error>(tx.execute("INSERT INTO t(who, n, v) VALUES (?1, ?2, randomblob(200))", (who, n))?)
        })
        .await
        .unwrap();
    commit.txid.unwrap()
}

pub(crate) fn count(db: &Db) -> i64 {
    db.read(|conn| Ok::<_, Error>(conn.query_row("SELECT count(*) FROM t", [], |r| r.get(0))?)).unwrap()
}

pub(crate) async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("timed out: {what}"))
}

/// Waits for a condition that nothing announces.
pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// A plain connection that knows nothing of us, but that it leaves the WAL alone when it is the last to close: a node
/// that was killed may have commits there that its log does not have yet.
pub(crate) fn plain(path: &Path) -> Connection {
    let connection = Connection::open(path).unwrap();
    connection.busy_timeout(Duration::from_secs(20)).unwrap();
    connection
        .set_db_config(replite::rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
        .unwrap();
    connection
}

/// All pages of a database as plain SQLite reads them, after it found them whole.
pub(crate) fn image(path: &Path) -> Vec<u8> {
    let mut connection = plain(path);
    let ok: String = connection.query_row("PRAGMA integrity_check", [], |r| r.get(0)).unwrap();
    assert_eq!(ok, "ok", "{}", path.display());
    connection.serialize("main").unwrap().to_vec()
}

pub(crate) fn assert_same_pages(one: &Path, other: &Path) {
    let (a, b) = (image(one), image(other));
    assert_eq!(a.len(), b.len(), "sizes differ");
    if let Some(at) = a.iter().zip(&b).position(|(x, y)| x != y) {
        panic!("the databases differ at byte {at} of {}", a.len());
    }
}

/// This test binary run again, as a node.
pub(crate) struct Process {
    child: std::process::Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Process {
    /// Runs the test function `entry` of this binary with these variables. It speaks in lines that begin with `@`.
    pub(crate) fn start(entry: impl Fn(), variables: &[(&str, &str)]) -> Process {
        Process::start_limited(entry, variables, None)
    }

    /// The same with files that can't grow beyond so many bytes.
    pub(crate) fn start_limited(entry: impl Fn(), variables: &[(&str, &str)], bytes: Option<u64>) -> Process {
        let exe = std::env::current_exe().unwrap();
        let mut command = match bytes {
            None => Command::new(exe),
            Some(bytes) => {
                let mut shell = Command::new("sh");
                // The unit of `ulimit -f` is 512 bytes. Without the trap the first write beyond it would kill.
                shell.args(["-c", "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"", "sh"]);
                shell.arg((bytes / 512).to_string()).arg(exe);
                shell
            }
        };
        let mut child = command
            .args([test_name(&entry), "--exact", "--nocapture", "--include-ignored"])
            .env("REPLITE_TEST_CHILD", "1")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // The harness's own words may stand before ours on a line.
                if let Some((_, line)) = line.split_once('@')
                    && sender.send(line.to_string()).is_err()
                {
                    break;
                }
            }
        });
        Process { child, stdin, lines }
    }

    /// The next line that begins with the word; others are dropped.
    pub(crate) fn expect(&self, word: &str) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.split(' ').next() == Some(word) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("timed out: {word}"),
                Err(RecvTimeoutError::Disconnected) => panic!("the process ended before it said {word}"),
            }
        }
    }

    pub(crate) fn next_line(&self) -> Option<String> {
        self.lines.recv_timeout(LIMIT).ok()
    }

    pub(crate) fn pending_lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    /// SIGKILL; what it had said before is returned.
    pub(crate) fn kill(mut self) -> Vec<String> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // The reader's end closes with the pipe.
        self.lines.iter().collect()
    }

    /// SIGTERM, and its end.
    pub(crate) fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

/// Not even a test that fails leaves a process behind: its outputs are this process's own, so whoever reads those would wait for it.
impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The name of a test function, as a filter takes it: its path without the crate.
pub(crate) fn test_name<F: Fn()>(_: &F) -> &'static str {
    let path = std::any::type_name::<F>();
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// Whether this process runs the test alone, as what it counts or sets is all of a process's. If not, it has run in a
/// process of its own when this returns.
pub(crate) fn alone(test: impl Fn()) -> bool {
    if is_child() {
        return true;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args([test_name(&test), "--exact", "--nocapture", "--include-ignored"])
        .env("REPLITE_TEST_CHILD", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}{}", String::from_utf8_lossy(&child.stderr));
    assert!(said.contains("1 passed"), "{said}");
    false
}

/// Whether this process is a child that [`Process::start`] made; a test function for children returns at once if not.
pub(crate) fn is_child() -> bool {
    std::env::var_os("REPLITE_TEST_CHILD").is_some()
}

pub(crate) fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

pub(crate) fn speak(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "@{line}").unwrap();
    out.flush().unwrap();
}

/// Waits for a line on standard input.
pub(crate) fn hear() -> String {
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim().to_string()
}

mod ends;
#[path = "../../src/testing/link.rs"]
mod link;

pub(crate) use ends::{Ends, LIMIT, comes};

/// A TCP proxy on loopback that delays each piece of data, and cuts connections when told to.
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    link: link::Link,
}

impl Wire {
    pub(crate) async fn start(to: SocketAddr, delay: Duration) -> Wire {
        let link = link::Link::start(to, delay).await.unwrap();
        Wire { address: link.address, link }
    }

    /// Cuts every connection.
    pub(crate) fn cut(&self) {
        self.link.cut();
    }

    /// So many bytes a second come through, either way.
    pub(crate) fn throttle(&self, rate: u64) {
        self.link.throttle(Some(rate));
    }

    /// Whether new connections are let in.
    pub(crate) fn let_in(&self, yes: bool) {
        self.link.let_in(yes);
    }
}
