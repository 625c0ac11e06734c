//! Members of etcd as processes, where it is installed: Debian's `etcd-server` and `etcd-client`.

mod files;

use std::env;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use serde_json::Value as Json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

pub use self::files::Certificates;

/// The longest that it takes to listen, or to elect.
const LIMIT: Duration = Duration::from_secs(60);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);
/// The user that may write the keys below [`KEYS`], where there are users.
pub const USER: &str = "app";
/// Its password.
pub const PASSWORD: &str = "open sesame";
/// What the keys begin with that it may write.
pub const KEYS: &str = "replite/";
/// The password of `root`.
const ROOT_PASSWORD: &str = "root's own";
/// Ports below those that the system gives to connections: a member that is started anew has to
/// find its own free.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// What members are started with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Clients come by TLS, and show a certificate.
    pub tls: bool,
    /// Clients are users. Tokens end after so many seconds without use.
    pub users: Option<u32>,
}

/// Members of one etcd, which may be killed and started anew. Dropped, they are killed, and their
/// files removed.
#[derive(Debug)]
pub struct EtcdCluster {
    root: tempfile::TempDir,
    options: Options,
    certificates: Option<Certificates>,
    members: Vec<Member>,
    /// Of which backup they are.
    life: usize,
    token: String,
}

#[derive(Debug)]
struct Member {
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

/// Where both binaries are.
fn installed() -> bool {
    let found = |name: &str| {
        env::var_os("PATH")
            .is_some_and(|path| env::split_paths(&path).any(|place| place.join(name).is_file()))
    };
    found("etcd") && found("etcdctl")
}

fn free_port() -> io::Result<u16> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 500) as u16 * 20;
    for _ in PORTS {
        let next = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % (PORTS.end - PORTS.start);
        let port = PORTS.start + next;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::other("no port is free"))
}

impl EtcdCluster {
    /// Starts so many members; none where etcd is not installed.
    ///
    /// # Errors
    /// The system's, and an etcd that does not come to work within a minute.
    pub async fn start(members: usize) -> io::Result<Option<EtcdCluster>> {
        EtcdCluster::start_with(members, Options::default()).await
    }

    /// The same with TLS and users.
    ///
    /// # Errors
    /// As for [`EtcdCluster::start`].
    pub async fn start_with(members: usize, options: Options) -> io::Result<Option<EtcdCluster>> {
        if !installed() {
            return Ok(None);
        }
        let root = tempfile::tempdir()?;
        let certificates = options.tls.then(|| Certificates::make(root.path())).transpose()?;
        let member = || Ok(Member { client_port: free_port()?, peer_port: free_port()?, child: None });
        let members = (0..members).map(|_| member()).collect::<io::Result<_>>()?;
        let token = "first".into();
        let mut cluster = EtcdCluster { root, options, certificates, members, life: 0, token };
        for member in 0..cluster.members.len() {
            cluster.spawn(member)?;
        }
        for member in 0..cluster.members.len() {
            cluster.healthy(member).await?;
        }
        if cluster.options.users.is_some() {
            cluster.make_users().await?;
        }
        Ok(Some(cluster))
    }

    /// The URLs for clients.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        (0..self.members.len()).map(|member| self.url(member)).collect()
    }

    fn url(&self, member: usize) -> String {
        let scheme = if self.options.tls { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.members[member].client_port)
    }

    /// The files for TLS.
    #[must_use]
    pub fn certificates(&self) -> Option<&Certificates> {
        self.certificates.as_ref()
    }

    fn peers(&self) -> String {
        let peer = |(at, member): (usize, &Member)| format!("m{at}=http://127.0.0.1:{}", member.peer_port);
        self.members.iter().enumerate().map(peer).collect::<Vec<_>>().join(",")
    }

    fn data(&self, member: usize) -> PathBuf {
        self.root.path().join(format!("m{member}-{}", self.life))
    }

    fn spawn(&mut self, member: usize) -> io::Result<()> {
        let (url, peer) = (self.url(member), format!("http://127.0.0.1:{}", self.members[member].peer_port));
        let log = self.root.path().join(format!("m{member}.log"));
        let log = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new("etcd");
        command
            .args([
                "--name",
                &format!("m{member}"),
                "--heartbeat-interval",
                "50",
                "--election-timeout",
                "300",
            ])
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.peers(), "--initial-cluster-token", &self.token])
            .arg("--data-dir")
            .arg(self.data(member));
        if let Some(seconds) = self.options.users {
            command.args(["--auth-token", "simple", "--auth-token-ttl", &seconds.to_string()]);
        }
        if let Some(certificates) = &self.certificates {
            let [chain, key] = &certificates.server;
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(&certificates.roots);
            command.arg("--cert-file").arg(chain).arg("--key-file").arg(key);
        }
        let command = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        self.members[member].child = Some(command.spawn()?);
        Ok(())
    }

    /// Waits until the member answers what the majority has to be asked for.
    ///
    /// # Errors
    /// It does not within a minute; with the end of its log.
    pub async fn healthy(&self, member: usize) -> io::Result<()> {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            if self.ctl_at(&[member], &["endpoint", "health"]).await.is_ok() {
                return Ok(());
            }
            sleep(PAUSE).await;
        }
        let log = fs::read_to_string(self.root.path().join(format!("m{member}.log"))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(5).collect();
        Err(io::Error::other(format!("etcd {member} does not work: {lines:?}")))
    }

    /// Kills a member at once.
    ///
    /// # Errors
    /// The system's.
    pub async fn kill(&mut self, member: usize) -> io::Result<()> {
        match self.members[member].child.take() {
            Some(mut child) => child.kill().await,
            None => Ok(()),
        }
    }

    /// Starts one again that was killed. It is not waited for: see [`EtcdCluster::healthy`].
    ///
    /// # Errors
    /// The system's.
    pub fn restart(&mut self, member: usize) -> io::Result<()> {
        self.spawn(member)
    }

    /// Stops a member where it is, or lets it go on.
    ///
    /// # Errors
    /// The system's; it does not run.
    pub async fn freeze(&self, member: usize, frozen: bool) -> io::Result<()> {
        let id = self.members[member].child.as_ref().and_then(Child::id);
        let id = id.ok_or_else(|| io::Error::other("it does not run"))?;
        let signal = if frozen { "-STOP" } else { "-CONT" };
        let sent = Command::new("kill").args([signal, &id.to_string()]).status().await?;
        if sent.success() { Ok(()) } else { Err(io::Error::other("no signal was sent")) }
    }

    /// The member that leads; waits until there is one.
    ///
    /// # Errors
    /// There is none within a minute.
    pub async fn leader(&self) -> io::Result<usize> {
        let end = Instant::now() + LIMIT;
        while Instant::now() < end {
            for member in self.running() {
                let Ok(said) = self.ctl_at(&[member], &["endpoint", "status", "-w", "json"]).await else {
                    continue;
                };
                let said: Json = serde_json::from_str(&said)?;
                let status = &said[0]["Status"];
                if status["leader"].as_u64().is_some_and(|leader| leader != 0)
                    && status["leader"] == status["header"]["member_id"]
                {
                    return Ok(member);
                }
            }
            sleep(PAUSE).await;
        }
        Err(io::Error::other("no member leads"))
    }

    fn running(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|member| self.members[*member].child.is_some()).collect()
    }

    /// What `etcdctl` says, of members that run.
    ///
    /// # Errors
    /// It fails, or takes too long.
    pub async fn ctl(&self, arguments: &[&str]) -> io::Result<String> {
        self.ctl_at(&self.running(), arguments).await
    }

    async fn ctl_at(&self, members: &[usize], arguments: &[&str]) -> io::Result<String> {
        let mut command = self.ctl_command(members);
        let output = timeout(LIMIT, command.args(arguments).output()).await??;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(said);
        }
        Err(io::Error::other(format!("{said}{}", String::from_utf8_lossy(&output.stderr))))
    }

    /// A command of these members' `etcdctl`, as root.
    fn ctl_command(&self, members: &[usize]) -> Command {
        let urls: Vec<String> = members.iter().map(|member| self.url(*member)).collect();
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &urls.join(",")]).kill_on_drop(true);
        if let Some(certificates) = &self.certificates {
            let [chain, key] = &certificates.client;
            command.arg("--cacert").arg(&certificates.roots).arg("--cert").arg(chain).arg("--key").arg(key);
        }
        if self.options.users.is_some() && self.root.path().join("users").exists() {
            command.args(["--user", "root", "--password", ROOT_PASSWORD]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    async fn make_users(&self) -> io::Result<()> {
        let (root, user) = (format!("root:{ROOT_PASSWORD}"), format!("{USER}:{PASSWORD}"));
        for arguments in [
            &["user", "add", &root][..],
            &["user", "add", &user],
            &["user", "grant-role", "root", "root"],
            &["role", "add", USER],
            &["role", "grant-permission", USER, "readwrite", KEYS, "--prefix=true"],
            &["user", "grant-role", USER, USER],
            &["auth", "enable"],
        ] {
            self.ctl(arguments).await?;
        }
        File::create(self.root.path().join("users")).map(drop)
    }

    /// Makes a backup.
    ///
    /// # Errors
    /// As for [`EtcdCluster::ctl`].
    pub async fn backup(&self) -> io::Result<PathBuf> {
        let path = self.root.path().join("backup");
        let member = self.running().into_iter().take(1).collect::<Vec<_>>();
        self.ctl_at(&member, &["snapshot", "save", &path.display().to_string()]).await?;
        Ok(path)
    }

    /// Kills all members and starts them from the backup, as the etcd of this token.
    ///
    /// # Errors
    /// The system's, and an etcd that does not come to work.
    pub async fn restore(&mut self, backup: &Path, token: &str) -> io::Result<()> {
        for member in 0..self.members.len() {
            self.kill(member).await?;
        }
        (self.life, self.token) = (self.life + 1, token.into());
        for member in 0..self.members.len() {
            let (name, data) = (format!("m{member}"), self.data(member).display().to_string());
            let peer = format!("http://127.0.0.1:{}", self.members[member].peer_port);
            let backup = backup.display().to_string();
            let command = ["snapshot", "restore", &backup, "--name", &name, "--data-dir", &data];
            let cluster = ["--initial-cluster", &self.peers(), "--initial-cluster-token", token];
            let own = ["--initial-advertise-peer-urls", &peer];
            self.ctl_at(&[member], &[&command[..], &cluster, &own].concat()).await?;
            self.spawn(member)?;
        }
        for member in 0..self.members.len() {
            self.healthy(member).await?;
        }
        Ok(())
    }

    /// Says that there is no room, as etcd does at its quota, until `alarm disarm`.
    ///
    /// # Errors
    /// The system's; it is not taken. With TLS or users it never is.
    pub async fn raise_no_space(&self) -> io::Result<()> {
        let member = self.leader().await?;
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.members[member].client_port)).await?;
        let status = self.ctl_at(&[member], &["endpoint", "status", "-w", "json"]).await?;
        let status: Json = serde_json::from_str(&status)?;
        let id = &status[0]["Status"]["header"]["member_id"];
        let body = format!(r#"{{"action":"ACTIVATE","memberID":"{id}","alarm":"NOSPACE"}}"#);
        let request = format!(
            "POST /v3/maintenance/alarm HTTP/1.1\r\nhost: etcd\r\nconnection: close\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(io::Error::other(answer)) }
    }

    /// All values that the key ever had, oldest first, up to one with this end.
    ///
    /// # Errors
    /// etcd fails, or there is no such value within a minute.
    pub async fn history(&self, key: &str, last: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut watch = self.ctl_command(&self.running());
        let mut child = watch.args(["watch", key, "--rev", "1", "-w", "json"]).spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("no output"))?;
        let mut lines = BufReader::new(stdout).lines();
        let mut values = Vec::new();
        let read = async {
            while let Some(line) = lines.next_line().await? {
                let line: Json = serde_json::from_str(&line)?;
                for event in line["Events"].as_array().into_iter().flatten() {
                    let value = event["kv"]["value"].as_str().unwrap_or_default();
                    let value = base64_simd::STANDARD.decode_to_vec(value).map_err(io::Error::other)?;
                    let ended = value.ends_with(last);
                    values.push(value);
                    if ended {
                        return Ok(());
                    }
                }
            }
            Err(io::Error::other("the watch ended"))
        };
        timeout(LIMIT, read).await??;
        child.kill().await?;
        Ok(values)
    }
}
