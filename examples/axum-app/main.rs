//! A small notes application on three replicated instances.
//!
//! `cargo run --release --example axum-app` starts three processes, which find out by a lease who
//! is the primary, and keep its record themselves. `--lease` has it kept elsewhere.
//!
//! `-- node --listen A --data DIR --lease members --peers URL,URL,URL` runs one of them, and
//! `-- witness` a member without a database. With `--primary URL` in place of the lease, the
//! primary is that one and stays it.

mod api;
mod changes;
mod guard;
mod launcher;
mod node;
mod page;
mod server;
mod store;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

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
    #[command(flatten)]
    roles: LauncherRoles,
}

/// How the three instances find their primary.
#[derive(Args)]
struct LauncherRoles {
    /// Where the record of the lease is: `members`, `directory`, `s3://bucket/prefix` or
    /// `etcd://host:port,host:port/key`.
    #[arg(long, default_value = node::MEMBERS)]
    lease: String,
    /// The URL of a fixed primary. Without it the instances find one by a lease.
    #[arg(long, conflicts_with = "lease")]
    primary: Option<String>,
    /// How long the lease counts when its holder does not renew it, in seconds.
    #[arg(long, value_parser = seconds, conflicts_with = "primary")]
    lease_time: Option<Duration>,
    /// When an instance that died is started again, in seconds. With a lease, that is not before
    /// another one had time to take over.
    #[arg(long, value_parser = seconds)]
    restart_after: Option<Duration>,
}

#[derive(Subcommand)]
enum Command {
    /// Runs one instance.
    Node(NodeArguments),
    /// Runs a member without a database: it keeps the record of the lease with two instances.
    Witness(WitnessArguments),
}

#[derive(Parser, Clone)]
struct NodeArguments {
    /// The address to serve on; also how the others reach this instance.
    #[arg(long)]
    listen: SocketAddr,
    /// The directory of the database.
    #[arg(long)]
    data: PathBuf,
    #[command(flatten)]
    roles: Roles,
    /// How long the lease counts when its holder does not renew it, in seconds.
    #[arg(long, value_parser = seconds, conflicts_with = "primary")]
    lease_time: Option<Duration>,
    /// How many instances start the cluster together; as many as `--peers` names if not set.
    #[arg(long, conflicts_with = "primary")]
    nodes: Option<usize>,
    /// A SQLite file to begin with, where there is no database yet. Of several instances that are
    /// told so one imports it, and becomes the first primary.
    #[arg(long)]
    import: Option<PathBuf>,
    /// The URLs of all instances.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Names under which browsers ask for this instance, besides its address, those of the peers and
    /// `localhost`: `notes.example.org,notes.example.org:8443`.
    #[arg(long, value_delimiter = ',')]
    host: Vec<String>,
    #[command(flatten)]
    secret: SecretArguments,
    /// End when standard input ends: no instance outlives its launcher.
    #[arg(long, hide = true)]
    with_parent: bool,
}

#[derive(Args, Clone)]
struct SecretArguments {
    /// The cluster's secret: what `openssl rand -base64 32` prints, or a phrase.
    #[arg(long, env = "REPLITE_SECRET", hide_env_values = true)]
    secret: String,
}

#[derive(Parser, Clone)]
struct WitnessArguments {
    /// The address of its listener. The members name it as `replite://` and this.
    #[arg(long)]
    listen: SocketAddr,
    /// The directory of its files.
    #[arg(long)]
    data: PathBuf,
    /// The members, as on the instances: `members:URL,URL,URL`.
    #[arg(long)]
    lease: replite::lease::Lease,
    /// How long the lease counts when its holder does not renew it, in seconds; as on the instances.
    #[arg(long, value_parser = seconds)]
    lease_time: Option<Duration>,
    #[command(flatten)]
    secret: SecretArguments,
}

/// Who is the primary: exactly one of both.
#[derive(Args, Clone)]
#[group(required = true, multiple = false)]
struct Roles {
    /// Where the record of the lease is, the same for all instances: the one that holds the lease is
    /// the primary. `members`, which are those of `--peers`; `members:URL,URL,URL`; a directory on
    /// this machine; `s3://bucket/prefix`; `etcd://host:port,host:port/key`.
    #[arg(long)]
    lease: Option<String>,
    /// The URL of a fixed primary; this instance is it when the URL is its own.
    #[arg(long)]
    primary: Option<String>,
}

impl Roles {
    fn fixed_primary(&self) -> Option<&str> {
        self.primary.as_deref().map(|url| url.trim_end_matches('/'))
    }
}

fn seconds(text: &str) -> Result<Duration, Error> {
    Ok(Duration::try_from_secs_f64(text.parse()?)?)
}

fn main() -> ExitCode {
    // The members' Raft repeats itself while one of them is away; replite says it once.
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    // A file or another program would get the codes of the colours.
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let done = runtime.block_on(async {
        match arguments.command {
            Some(Command::Node(node)) => node::run(node).await,
            Some(Command::Witness(witness)) => node::witness(witness).await,
            None => launcher::run(arguments.base_port, &arguments.data, arguments.roles).await,
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
