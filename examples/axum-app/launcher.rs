//! Starts three instances as three processes, and ends them.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use replite::lease::{Lease, Members};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::Instant;

use crate::api::get_json;
use crate::node::MEMBERS;
use crate::{Error, LauncherRoles};

/// How long the instances may take to end by themselves.
const END_LIMIT: Duration = Duration::from_secs(9);
/// Pause before an instance that died is started again, where the primary is fixed.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// The same with a lease, beyond the lease time. An instance that is back in time takes its own
/// lease over at once, and there would be no election to see.
const ELECTION_PAUSE: Duration = Duration::from_secs(3);
/// How long the table waits for all instances.
const READY_LIMIT: Duration = Duration::from_secs(60);

struct Instance {
    url: String,
    listen: String,
    directory: PathBuf,
}

/// What all instances have in common.
struct Launcher {
    instances: Vec<Instance>,
    secret: String,
    /// Who is the primary, as the command line of each instance says it.
    roles: Vec<OsString>,
    restart_after: Duration,
}

pub(crate) async fn run(base_port: u16, data: &Path, roles: LauncherRoles) -> Result<(), Error> {
    fs::create_dir_all(data)?;
    let launcher = Launcher::new(base_port, data, roles)?;
    let mut children = Vec::new();
    for instance in &launcher.instances {
        children.push(launcher.start(instance)?);
    }
    let mut end = std::pin::pin!(crate::asked_to_end());
    let begun = tokio::select! {
        () = &mut end => Ok(false),
        (index, status) = died(&mut children) => {
            // Not started again: it would only happen again.
            let url = &launcher.instances[index].url;
            Err(format!("{url} ended before all were ready ({})", describe(status)).into())
        }
        ready = tokio::time::timeout(READY_LIMIT, launcher.all_ready()) => {
            if ready.is_err() {
                launcher.say_what_is_missing().await;
            }
            Ok(true)
        }
    };
    let done = match begun {
        Ok(true) => {
            launcher.print_table(&children).await;
            let last = &launcher.instances[launcher.instances.len() - 1].url;
            println!("\nOpen {last}/ and add a note. Ctrl-C ends all.");
            std::io::stdout().flush()?;
            launcher.watch(&mut children, end).await
        }
        Ok(false) => Ok(()),
        Err(error) => Err(error),
    };
    stop(children).await;
    done
}

impl Launcher {
    fn new(base_port: u16, data: &Path, roles: LauncherRoles) -> Result<Launcher, Error> {
        let mut instances = Vec::new();
        for port in base_port..base_port.checked_add(3).ok_or("no such ports")? {
            let listen = format!("127.0.0.1:{port}");
            // Otherwise another process that has the port would be taken for our instance.
            std::net::TcpListener::bind(&listen).map_err(|e| format!("{listen}: {e}"))?;
            let (url, directory) = (format!("http://{listen}"), data.join(port.to_string()));
            instances.push(Instance { url, listen, directory });
        }
        let (arguments, restart_after) = match roles.primary {
            Some(primary) => (vec!["--primary".into(), primary.into()], RESTART_PAUSE),
            None => {
                let (text, lease) = match roles.lease.as_str() {
                    MEMBERS => {
                        let urls = instances.iter().map(|instance| instance.url.clone());
                        (MEMBERS.to_owned(), Members::new(urls).into())
                    }
                    "directory" => {
                        let text = format!("directory:{}", data.join("lease").display());
                        (text.clone(), text.parse::<Lease>()?)
                    }
                    text => (text.to_owned(), text.parse()?),
                };
                let time = roles.lease_time.or(lease.lease_time()).unwrap_or_default();
                let seconds = time.as_secs_f64().to_string().into();
                let arguments = vec!["--lease".into(), text.into(), "--lease-time".into(), seconds];
                (arguments, time + ELECTION_PAUSE)
            }
        };
        let restart_after = roles.restart_after.unwrap_or(restart_after);
        Ok(Launcher { instances, secret: secret(data)?, roles: arguments, restart_after })
    }

    /// Starts again what dies, until the end is asked for.
    async fn watch(
        &self,
        children: &mut [Running],
        end: std::pin::Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), Error> {
        let kept = self.instances.iter().zip(children).map(|(i, running)| Box::pin(self.keep(i, running)));
        tokio::select! {
            () = end => Ok(()),
            (Err(error), ..) = futures_util::future::select_all(kept) => Err(error),
        }
    }

    /// Fails when the instance can't be started again.
    async fn keep(&self, instance: &Instance, running: &mut Running) -> Result<Infallible, Error> {
        loop {
            let (status, pause) = (running.child.wait().await, self.restart_after);
            eprintln!("{} ended ({}); it is started again after {pause:?}", instance.url, describe(status));
            tokio::time::sleep(pause).await;
            *running = self.start(instance)?;
        }
    }

    /// One command line for all, but for the address and the place of the database.
    fn start(&self, instance: &Instance) -> Result<Running, Error> {
        let urls: Vec<&str> = self.instances.iter().map(|instance| instance.url.as_str()).collect();
        let mut child = Command::new(std::env::current_exe()?)
            .args(["node", "--with-parent", "--peers", &urls.join(",")])
            .args(&self.roles)
            .args(["--listen", &instance.listen, "--data"])
            .arg(&instance.directory)
            .env("REPLITE_SECRET", &self.secret)
            // Kept open for as long as we live; a Ctrl-C at the terminal reaches them as well.
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Running { stdin: child.stdin.take(), child })
    }

    /// All can be read, and reach a primary.
    async fn all_ready(&self) {
        for instance in &self.instances {
            while get_json(&format!("{}/healthz", instance.url)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }

    async fn say_what_is_missing(&self) {
        eprintln!("not all instances are ready yet; see the messages above");
        for instance in &self.instances {
            let node = get_json(&format!("{}/api/node", instance.url)).await.unwrap_or_default();
            if let Some(reason) = node["waits_for"].as_str() {
                eprintln!("{} waits: {reason}", instance.url);
            }
        }
    }

    async fn print_table(&self, children: &[Running]) {
        println!("{:<24} {:<8} {:>8}  database", "url", "role", "pid");
        for (instance, child) in self.instances.iter().zip(children) {
            let node = get_json(&format!("{}/api/node", instance.url)).await.unwrap_or_default();
            let role = node["role"].as_str().unwrap_or("?").to_string();
            let pid = child.child.id().map_or_else(|| "-".into(), |id| id.to_string());
            let file = instance.directory.join("notes.db");
            println!("{:<24} {role:<8} {pid:>8}  {}", instance.url, file.display());
        }
    }
}

/// A running instance. It ends when its standard input does.
struct Running {
    child: Child,
    /// Apart from the child, because waiting for that would close it.
    stdin: Option<ChildStdin>,
}

/// The next instance that ends, and how.
async fn died(children: &mut [Running]) -> (usize, std::io::Result<ExitStatus>) {
    let waits =
        children.iter_mut().enumerate().map(|(i, c)| Box::pin(async move { (i, c.child.wait().await) }));
    futures_util::future::select_all(waits).await.0
}

fn describe(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|e| e.to_string(), |s| s.to_string())
}

/// Closes each instance's standard input, which asks it to end, and kills what does not.
async fn stop(mut children: Vec<Running>) {
    for running in &mut children {
        drop(running.stdin.take());
    }
    // One limit for all: they end at the same time.
    let limit = Instant::now() + END_LIMIT;
    for Running { mut child, .. } in children {
        if tokio::time::timeout_at(limit, child.wait()).await.is_err() {
            // It had its time; what it acknowledged is on the disk.
            let _ = child.kill().await;
        }
    }
}

/// The secret of this machine's three instances: random, kept beside the databases.
fn secret(data: &Path) -> Result<String, Error> {
    let path = data.join("secret");
    if let Ok(secret) = fs::read_to_string(&path) {
        return Ok(secret);
    }
    let secret = replite::Secret::generate()?.to_text();
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(&path)?.write_all(secret.as_bytes())?;
    Ok(secret)
}
