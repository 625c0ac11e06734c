//! A small notes application on three replicated instances.
//!
//! `cargo run --release --example axum-app` starts three processes;
//! `-- node --listen A --data DIR --primary URL` runs one.

mod api;
mod launcher;
mod node;
mod page;
mod store;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Notes, replicated by replite: without a command, three instances on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The first of the three ports.
    #[arg(long, default_value_t = 8081)]
    base_port: u16,
    /// Where the databases are.
    #[arg(long, default_value = "target/axum-app")]
    data: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one instance.
    Node(NodeArguments),
}

#[derive(Parser, Clone)]
struct NodeArguments {
    /// The address to serve on; also how the others reach this instance.
    #[arg(long)]
    listen: SocketAddr,
    /// The directory of the database.
    #[arg(long)]
    data: PathBuf,
    /// The primary's URL; this instance is the primary when it is its own.
    #[arg(long)]
    primary: String,
    /// A SQLite file to begin with, where there is no database yet (on the primary).
    #[arg(long)]
    import: Option<PathBuf>,
    /// The URLs of all instances, for the page.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// The cluster's secret: what `openssl rand -base64 32` prints, or a phrase.
    #[arg(long, env = "REPLITE_SECRET", hide_env_values = true)]
    secret: String,
    /// End when standard input ends: no instance outlives its launcher.
    #[arg(long, hide = true)]
    with_parent: bool,
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let done = runtime.block_on(async {
        match arguments.command {
            Some(Command::Node(node)) => node::run(node).await,
            None => launcher::run(arguments.base_port, &arguments.data).await,
        }
    });
    // Blocking work that is still under way must not keep the process from ending.
    runtime.shutdown_timeout(RUNTIME_LIMIT);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&*error),
    }
}

/// How long the runtime may take to end, once everything else has.
const RUNTIME_LIMIT: Duration = Duration::from_secs(1);

type Error = Box<dyn std::error::Error + Send + Sync>;

fn fail(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("axum-app: {error}");
    ExitCode::FAILURE
}

/// Returns when the process is asked to end.
async fn asked_to_end() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => {}
                    _ = terminate.recv() => {}
                }
            }
            Err(_) => {
                let _ = tokio::signal::ctrl_c().await;
            }
        }
    }
    #[cfg(not(unix))]
    {
        let _ = tokio::signal::ctrl_c().await;
    }
}
