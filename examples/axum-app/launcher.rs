//! Starts three instances as three processes, and ends them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, ChildStdin, Command};
use tokio::time::Instant;

use crate::Error;
use crate::api::get_json;

/// How long the instances may take to end by themselves.
const END_LIMIT: Duration = Duration::from_secs(9);
/// Pause before an instance that died is started again.
const RESTART_PAUSE: Duration = Duration::from_secs(1);
/// How long the table waits for all instances.
const READY_LIMIT: Duration = Duration::from_secs(60);

struct Instance {
    url: String,
    listen: String,
    directory: PathBuf,
}

pub(crate) async fn run(base_port: u16, data: &Path) -> Result<(), Error> {
    fs::create_dir_all(data)?;
    let secret = secret(data)?;
    let mut instances = Vec::new();
    for port in base_port..base_port.checked_add(3).ok_or("no such ports")? {
        let listen = format!("127.0.0.1:{port}");
        // Otherwise another process that has the port would be taken for our instance.
        std::net::TcpListener::bind(&listen).map_err(|e| format!("{listen}: {e}"))?;
        let (url, directory) = (format!("http://{listen}"), data.join(port.to_string()));
        instances.push(Instance { url, listen, directory });
    }
    let urls: Vec<String> = instances.iter().map(|i| i.url.clone()).collect();
    let mut children = Vec::new();
    for instance in &instances {
        children.push(start(instance, &urls, &secret)?);
    }
    let mut end = std::pin::pin!(crate::asked_to_end());
    let begun = tokio::select! {
        () = &mut end => Ok(false),
        (index, status) = died(&mut children) => {
            // Not started again: it would only happen again.
            Err(format!("{} ended before all were ready ({})", urls[index], describe(status)).into())
        }
        ready = tokio::time::timeout(READY_LIMIT, all_ready(&urls)) => {
            if ready.is_err() {
                eprintln!("not all instances are ready yet; see the messages above");
            }
            Ok(true)
        }
    };
    let done = match begun {
        Ok(true) => {
            print_table(&instances, &children).await;
            println!("\nOpen {}/ and add a note. Ctrl-C ends all.", urls[2]);
            std::io::stdout().flush()?;
            watch(&instances, &mut children, &urls, &secret, end).await
        }
        Ok(false) => Ok(()),
        Err(error) => Err(error),
    };
    stop(children).await;
    done
}

/// A running instance. It ends when its standard input does.
struct Running {
    child: Child,
    /// Apart from the child, because waiting for that would close it.
    stdin: Option<ChildStdin>,
}

/// Starts again what dies, until the end is asked for.
async fn watch(
    instances: &[Instance],
    children: &mut [Running],
    urls: &[String],
    secret: &str,
    mut end: std::pin::Pin<&mut impl Future<Output = ()>>,
) -> Result<(), Error> {
    loop {
        let (index, status) = tokio::select! {
            () = &mut end => return Ok(()),
            died = died(children) => died,
        };
        eprintln!("{} ended ({}); it is started again", instances[index].url, describe(status));
        tokio::select! {
            () = &mut end => return Ok(()),
            () = tokio::time::sleep(RESTART_PAUSE) => {}
        }
        children[index] = start(&instances[index], urls, secret)?;
    }
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

fn start(instance: &Instance, urls: &[String], secret: &str) -> Result<Running, Error> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["node", "--with-parent", "--listen", &instance.listen, "--primary", &urls[0]])
        .args(["--peers", &urls.join(",")])
        .arg("--data")
        .arg(&instance.directory)
        .env("REPLITE_SECRET", secret)
        // Kept open for as long as we live; a Ctrl-C at the terminal reaches them as well.
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    Ok(Running { stdin: child.stdin.take(), child })
}

async fn all_ready(urls: &[String]) {
    for url in urls {
        while get_json(&format!("{url}/readyz")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn print_table(instances: &[Instance], children: &[Running]) {
    println!("{:<24} {:<8} {:>8}  database", "url", "role", "pid");
    for (instance, child) in instances.iter().zip(children) {
        let node = get_json(&format!("{}/api/node", instance.url)).await.unwrap_or_default();
        let role = node["role"].as_str().unwrap_or("?").to_string();
        let pid = child.child.id().map_or_else(|| "-".into(), |id| id.to_string());
        let file = instance.directory.join("notes.db");
        println!("{:<24} {role:<8} {pid:>8}  {}", instance.url, file.display());
    }
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
