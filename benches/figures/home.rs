//! Directories, nodes, and a replica in another process.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use replite::rusqlite::Connection;
use replite::{Config, Db, Durability, Error, Plaintext, Secret, Txid, lease};
use tokio::runtime::Runtime;

pub(crate) const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS t(id INTEGER PRIMARY KEY, k INTEGER, v)";
pub(crate) const INSERT: &str = "INSERT INTO t(k, v) VALUES (?1, 'about as long as a short line of text')";

pub(crate) fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().expect("a runtime"))
}

/// A directory on a real disk, below the one that cargo builds in.
pub(crate) fn directory() -> tempfile::TempDir {
    let home = std::env::current_exe().expect("a path");
    tempfile::tempdir_in(home.parent().expect("a directory")).expect("a directory")
}

pub(crate) fn config(path: &Path) -> Config {
    Config::new(path)
        .database("bench")
        .secret(Secret::new("tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c").expect("32 bytes"))
}

pub(crate) fn primary(path: &Path, durability: Durability) -> Db {
    primary_of(config(path).durability(durability))
}

/// The same with what else its configuration says.
pub(crate) fn primary_of(config: Config) -> Db {
    let listens =
        config.listen("127.0.0.1:0".parse().expect("an address")).migrate(|c| c.execute_batch(SCHEMA));
    runtime().block_on(Db::open(listens)).expect("a primary")
}

pub(crate) fn replica(path: &Path, of: &Db) -> Db {
    let config = config(path).lease(lease::Fixed::replica_of(&of.node().addresses.replication));
    let db = runtime().block_on(Db::open(config)).expect("a replica");
    runtime().block_on(db.ready()).expect("ready");
    db
}

/// Bytes that a relay passed on.
#[derive(Clone, Default)]
pub(crate) struct Counted {
    to_primary: Arc<AtomicU64>,
    to_replica: Arc<AtomicU64>,
}

impl Counted {
    /// Begins anew.
    pub(crate) fn reset(&self) {
        self.to_primary.store(0, Ordering::Relaxed);
        self.to_replica.store(0, Ordering::Relaxed);
    }

    pub(crate) fn both_ways(&self) -> u64 {
        self.to_primary.load(Ordering::Relaxed) + self.to_replica()
    }

    pub(crate) fn to_replica(&self) -> u64 {
        self.to_replica.load(Ordering::Relaxed)
    }
}

/// Passes a primary's bytes on and counts them. The URL for its replica.
pub(crate) fn counted(of: &Db) -> (String, Counted) {
    let to = of.node().addresses.replication.split('/').nth(2).expect("an address").to_string();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let counted = Counted::default();
    let counts = counted.clone();
    std::thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = TcpStream::connect(&to) else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            for (from, into, count) in [(&near, &far, &counts.to_primary), (&far, &near, &counts.to_replica)]
            {
                let (from, into) = (from.try_clone().expect("fd"), into.try_clone().expect("fd"));
                let count = count.clone();
                std::thread::spawn(move || pass_on(from, into, &count));
            }
        }
    });
    (format!("replite://{address}"), counted)
}

fn pass_on(mut from: TcpStream, mut into: TcpStream, count: &AtomicU64) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(got @ 1..) = from.read(&mut buffer) {
        count.fetch_add(got as u64, Ordering::Relaxed);
        if into.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    let _ = into.shutdown(std::net::Shutdown::Both);
}

/// Raw SQLite in WAL mode.
pub(crate) fn raw(path: &Path, synchronous: &str) -> Connection {
    let connection = Connection::open(path).expect("a database");
    connection
        .execute_batch(&format!("PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous}; {SCHEMA}"))
        .expect("a schema");
    connection
}

/// Another process of this program, spoken to by lines.
pub(crate) struct Spoken {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Spoken {
    /// With these variables. It says when it is ready.
    pub(crate) fn start(variables: &[(&str, &OsStr)]) -> Spoken {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut spoken = Spoken { child, stdin, stdout };
        assert_eq!(spoken.hear(), "ready");
        spoken
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("a process that listens");
    }

    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a process that speaks");
        line.trim().to_string()
    }
}

impl Drop for Spoken {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A replica in another process.
pub(crate) struct Other(Spoken);

impl Other {
    pub(crate) fn start(path: &Path, of: &Db) -> Other {
        Other::start_in(path, of, false)
    }

    /// The same without TLS, or with it.
    pub(crate) fn start_in(path: &Path, of: &Db, clear: bool) -> Other {
        Other::start_at(path, &of.node().addresses.replication, clear)
    }

    /// The same of a primary that has this URL.
    pub(crate) fn start_at(path: &Path, url: &str, clear: bool) -> Other {
        let clear = if clear { "yes" } else { "" };
        Other(Spoken::start(&[
            ("REPLITE_BENCH_REPLICA", path.as_os_str()),
            ("REPLITE_BENCH_URL", url.as_ref()),
            ("REPLITE_BENCH_CLEAR", clear.as_ref()),
        ]))
    }

    pub(crate) fn say(&mut self, line: &str) {
        self.0.say(line);
    }

    pub(crate) fn hear(&mut self) -> String {
        self.0.hear()
    }

    pub(crate) fn usage(&mut self) -> Usage {
        self.say("usage");
        let said = self.hear();
        let mut numbers = said.split(' ').map(|n| n.parse().expect("a number"));
        let mut next = || numbers.next().expect("two numbers");
        Usage { cpu_ns: next(), switches: next() }
    }
}

/// What the threads of a process have used that run now.
#[derive(Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) cpu_ns: u64,
    /// How often a thread gave its core up, or lost it.
    pub(crate) switches: u64,
}

impl Usage {
    pub(crate) fn now() -> Usage {
        let mut all = Usage { cpu_ns: 0, switches: 0 };
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let text = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let number = |word: Option<&str>| word.and_then(|n| n.parse().ok()).unwrap_or(0);
            all.cpu_ns += number(text("schedstat").split_whitespace().next());
            for line in text("status").lines().filter(|line| line.contains("ctxt_switches:")) {
                all.switches += number(line.split_whitespace().nth(1));
            }
        }
        all
    }
}

impl std::ops::Add for Usage {
    type Output = Usage;

    fn add(self, other: Usage) -> Usage {
        Usage { cpu_ns: self.cpu_ns + other.cpu_ns, switches: self.switches + other.switches }
    }
}

/// A thread that ended meanwhile is missing from what there is later.
impl std::ops::Sub for Usage {
    type Output = Usage;

    fn sub(self, before: Usage) -> Usage {
        Usage {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            switches: self.switches.saturating_sub(before.switches),
        }
    }
}

/// Runs as the other process, if this is it.
pub(crate) fn child() -> bool {
    let (Some(path), Ok(url)) =
        (std::env::var_os("REPLITE_BENCH_REPLICA"), std::env::var("REPLITE_BENCH_URL"))
    else {
        return false;
    };
    let mut config = config(&PathBuf::from(path)).lease(lease::Fixed::replica_of(url));
    if std::env::var("REPLITE_BENCH_CLEAR").is_ok_and(|clear| !clear.is_empty()) {
        config = config.plaintext(Plaintext::Loopback);
    }
    let db = runtime().block_on(Db::open(config)).expect("a replica");
    runtime().block_on(db.ready()).expect("ready");
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            // Spins until each of the rows is there, and says when.
            "watch" => {
                let (from, count): (i64, i64) = (words[1].parse().expect("n"), words[2].parse().expect("n"));
                println!("watching");
                let mut seen = String::new();
                for id in from..from + count {
                    while !has(&db, id) {
                        std::hint::spin_loop();
                    }
                    seen.push_str(&format!("{} ", monotonic_ns()));
                }
                println!("{seen}");
            }
            // Waits for each of the transactions, and says how long after its application the
            // waiter ran again.
            "wakeups" => {
                let from = db.position().expect("a state").txid();
                println!("watching");
                let mut late = String::new();
                for n in 1..=words[1].parse::<u64>().expect("n") {
                    let (db, txid) = (db.clone(), Txid::new(from.epoch(), from.number() + n));
                    let waiting = {
                        let db = db.clone();
                        runtime().spawn(async move {
                            db.wait_for(txid).await.expect("applied");
                            monotonic_ns()
                        })
                    };
                    while db.position().is_none_or(|p| p.number() < txid.number()) {
                        std::hint::spin_loop();
                    }
                    let applied = monotonic_ns();
                    let resumed = runtime().block_on(waiting).expect("a task");
                    late.push_str(&format!("{} ", resumed.saturating_sub(applied)));
                }
                println!("{late}");
            }
            // A task sleeps until each of the transactions is here, and says when it ran again.
            "sleep" => {
                let from = db.position().expect("a state").txid();
                let count = words[1].parse::<u64>().expect("n");
                println!("sleeps");
                let db = db.clone();
                let sleeps = async move {
                    let mut seen = String::new();
                    for n in 1..=count {
                        db.wait_for(Txid::new(from.epoch(), from.number() + n)).await.expect("applied");
                        seen.push_str(&format!("{} ", monotonic_ns()));
                    }
                    seen
                };
                println!("{}", runtime().block_on(async { runtime().spawn(sleeps).await.expect("a task") }));
            }
            "usage" => {
                let Usage { cpu_ns, switches } = Usage::now();
                println!("{cpu_ns} {switches}");
            }
            "wait" => {
                let txid = words[1].parse().expect("a transaction");
                let limit = std::time::Duration::from_secs(600);
                runtime().block_on(db.wait_for_timeout(txid, limit)).expect("applied");
                println!("applied");
            }
            "memory" => println!("{}", idle_memory()),
            "peak" => println!("{}", peak_memory()),
            _ => break,
        }
    }
    true
}

pub(crate) fn has(db: &Db, id: i64) -> bool {
    db.read(|c| {
        let mut statement = c.prepare_cached("SELECT 1 FROM t WHERE id = ?1")?;
        Ok::<_, Error>(statement.exists([id])?)
    })
    .expect("a read")
}

/// Nanoseconds of a clock that all processes of this machine share.
pub(crate) fn monotonic_ns() -> u64 {
    let uptime = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    uptime.tv_sec as u64 * 1_000_000_000 + uptime.tv_nsec as u64
}

fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Resident KiB now; the peak counts from here.
pub(crate) fn idle_memory() -> u64 {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    memory("VmRSS:")
}

pub(crate) fn peak_memory() -> u64 {
    memory("VmHWM:")
}
