//! An S3 server as a process: `s3s` and `s3s-fs` over a directory.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use replite_stores::s3::{Fault, Rule, S3Server};
//!
//! # async fn example() -> std::io::Result<()> {
//! // In a test of this package: `env!("CARGO_BIN_EXE_s3-server")`.
//! let mut server = S3Server::start(Path::new("s3-server")).await?;
//! // The next three puts are refused.
//! server.fault(Rule::puts(Fault::Answer { status: 503, code: "SlowDown".into() }).times(3)).await?;
//! server.kill();
//! server.restart().await?;
//! # Ok(())
//! # }
//! ```

mod fault;
mod server;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

pub use self::fault::{Counts, Fault, Rule};
pub use self::server::run;

/// The one bucket.
pub const BUCKET: &str = "leases";
pub const ACCESS_KEY: &str = "replite-test";
pub const SECRET_KEY: &str = "no-secret-of-anyone";

/// The longest that a server takes to say that it listens, or to answer on its control.
const LIMIT: Duration = Duration::from_secs(20);

/// A server with one bucket in a directory of its own. Dropped, it is killed.
#[derive(Debug)]
pub struct S3Server {
    binary: PathBuf,
    root: tempfile::TempDir,
    child: Option<Child>,
    address: SocketAddr,
    control: SocketAddr,
}

impl S3Server {
    /// Starts this binary, which is `s3-server` or any other that calls [`run`] in its `main`.
    ///
    /// # Errors
    /// The system's, and a server that says nothing for 20 s.
    pub async fn start(binary: &Path) -> io::Result<S3Server> {
        let root = tempfile::tempdir()?;
        fs::create_dir(root.path().join(BUCKET))?;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut server =
            S3Server { binary: binary.to_owned(), root, child: None, address: any, control: any };
        server.restart().await?;
        Ok(server)
    }

    /// Starts it again at the same addresses, killed before if it runs.
    ///
    /// # Errors
    /// Those of [`S3Server::start`].
    pub async fn restart(&mut self) -> io::Result<()> {
        self.kill().await?;
        let mut child = Command::new(&self.binary)
            .arg(self.root.path())
            .arg(self.address.to_string())
            .arg(self.control.to_string())
            // The server ends with it.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let said = child.stdout.take().ok_or_else(|| io::Error::other("no output"))?;
        self.child = Some(child);
        let mut line = String::new();
        let read = BufReader::new(said);
        tokio::time::timeout(LIMIT, { read }.read_line(&mut line)).await??;
        let mut addresses = line.split_whitespace().map(str::parse);
        let (Some(Ok(address)), Some(Ok(control))) = (addresses.next(), addresses.next()) else {
            return Err(io::Error::other(format!("the server said {line:?}")));
        };
        (self.address, self.control) = (address, control);
        Ok(())
    }

    /// Kills it. What it keeps stays.
    ///
    /// # Errors
    /// The system's.
    pub async fn kill(&mut self) -> io::Result<()> {
        match self.child.take() {
            Some(mut child) => child.kill().await,
            None => Ok(()),
        }
    }

    /// Where it listens: `http://127.0.0.1:<port>`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What a client needs to reach it, by the names of `object_store`'s options. As variables of
    /// the environment they are in capitals.
    #[must_use]
    pub fn options(&self) -> Vec<(&'static str, String)> {
        vec![
            ("aws_access_key_id", ACCESS_KEY.into()),
            ("aws_secret_access_key", SECRET_KEY.into()),
            ("aws_region", "us-east-1".into()),
            ("aws_endpoint", self.endpoint()),
            ("aws_allow_http", "true".into()),
        ]
    }

    /// The file of an object of the bucket, to look at, write and remove.
    #[must_use]
    pub fn file(&self, key: &str) -> PathBuf {
        self.root.path().join(BUCKET).join(key)
    }

    /// Adds a fault.
    ///
    /// # Errors
    /// The system's.
    pub async fn fault(&self, rule: Rule) -> io::Result<()> {
        self.ask(&fault::Ask::Add(rule)).await.map(drop)
    }

    /// Ends all faults. What hangs goes on hanging.
    ///
    /// # Errors
    /// The system's.
    pub async fn calm(&self) -> io::Result<()> {
        self.ask(&fault::Ask::Calm).await.map(drop)
    }

    /// The requests since it was started.
    ///
    /// # Errors
    /// The system's.
    pub async fn counts(&self) -> io::Result<Counts> {
        self.ask(&fault::Ask::Count).await
    }

    async fn ask(&self, ask: &fault::Ask) -> io::Result<Counts> {
        let answered = async {
            let mut stream = TcpStream::connect(self.control).await?;
            let line = serde_json::to_string(ask)? + "\n";
            stream.write_all(line.as_bytes()).await?;
            let mut answer = String::new();
            BufReader::new(stream).read_line(&mut answer).await?;
            Ok(serde_json::from_str(&answer)?)
        };
        tokio::time::timeout(LIMIT, answered).await?
    }
}
