//! The operator's command; its page is `docs/operator.md`.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use replite::lease::Lease;
use replite::operator::{Operator, OperatorError, Target};
use replite::{Certificates, NodeId, Secret};

/// Something was refused, or failed.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;
/// Neither the store nor a node could be reached.
const UNREACHABLE: u8 = 3;

/// The most bytes of a file with a secret.
const SECRET_MAX_BYTES: u64 = 4096;

/// Looks at the lease of a database's primary, and changes it.
///
/// It needs no node that runs for `show`, `pause`, `resume` and `move`.
#[derive(Parser)]
#[command(name = "replite", version, arg_required_else_help = true)]
struct Line {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    lease: LeaseArgs,
}

#[derive(Args)]
struct LeaseArgs {
    /// Where the lease's record is: a directory, members:URL,URL,URL, s3://bucket/prefix,
    /// etcd://host:port,host:port/key. Otherwise the variable REPLITE_LEASE says it.
    #[arg(long, value_name = "LEASE", global = true)]
    lease: Option<String>,
    /// The cluster's name.
    #[arg(long, value_name = "NAME", global = true, default_value = "default")]
    cluster: String,
    /// The database's name: that of its file without the extension, unless configured.
    #[arg(long, value_name = "NAME", global = true, default_value = "app")]
    database: String,
    /// A file with the cluster's secret; otherwise the variable REPLITE_SECRET has it.
    #[arg(long, value_name = "FILE", global = true)]
    secret_file: Option<PathBuf>,
    /// This command's certificate, for nodes that have certificates.
    #[arg(long, value_name = "FILE", global = true)]
    tls_cert: Option<PathBuf>,
    /// The private key of that certificate.
    #[arg(long, value_name = "FILE", global = true)]
    tls_key: Option<PathBuf>,
    /// The roots of the nodes' certificates.
    #[arg(long, value_name = "FILE", global = true)]
    tls_roots: Option<PathBuf>,
    /// A name that a node's certificate may have; as often as wanted.
    #[arg(long = "tls-name", value_name = "NAME", global = true)]
    tls_names: Vec<String>,
    /// One more node to look at, by the URL of its replication endpoint; as often as wanted.
    #[arg(long = "node", value_name = "URL", global = true)]
    nodes: Vec<String>,
}

#[derive(Subcommand)]
enum What {
    /// Shows the lease, whether it is renewed, and how its nodes stand.
    Show {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Has the primary hand the lease over to another node.
    Handoff {
        /// To this one; otherwise to the best.
        #[arg(long, value_name = "NODE")]
        to: Option<NodeId>,
    },
    /// No node takes the lease by itself from now on.
    Pause,
    /// Nodes may take the lease by themselves again.
    Resume,
    /// Has a node lead with what it has, whatever others have.
    Promote {
        /// Says that nothing is checked: what the node has not is lost to the cluster.
        #[arg(long)]
        unchecked: bool,
        /// Does not ask.
        #[arg(long)]
        yes: bool,
        /// The node's id, or the URL of its replication endpoint.
        #[arg(value_name = "NODE|URL")]
        node: String,
    },
    /// Moves the lease of a cluster that is stopped to another store.
    Move {
        /// The other store.
        #[arg(long, value_name = "LEASE")]
        to: String,
    },
    /// Shows the members that keep the record, where the lease is kept by members.
    #[cfg(feature = "members")]
    Members {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Changes the members that keep the record.
    #[cfg(feature = "members")]
    Member {
        #[command(subcommand)]
        what: MemberWhat,
    },
}

#[cfg(feature = "members")]
#[derive(Subcommand)]
enum MemberWhat {
    /// Makes a node a member; its own configuration names it as one.
    Add {
        /// The URL of its replication endpoint.
        url: String,
    },
    /// Removes a member, which may be gone.
    Remove {
        /// The URL of its replication endpoint.
        url: String,
    },
    /// Has the members begin though their nodes have a state already: after a move from another
    /// store, or when most of them lost what they had agreed on.
    Begin,
}

/// Why the command did not do it, and with which code it ends.
struct Failure(u8, String);

impl From<OperatorError> for Failure {
    fn from(error: OperatorError) -> Failure {
        let code = match &error {
            error if error.is_unreachable() => UNREACHABLE,
            OperatorError::Invalid(_) | OperatorError::NoSecret => USAGE,
            _ => FAILED,
        };
        Failure(code, error.to_string())
    }
}

fn usage(why: impl Into<String>) -> Failure {
    Failure(USAGE, why.into())
}

fn main() -> ExitCode {
    // It ends with 2 where the line is wrong, and with 0 where help was asked for.
    let line = Line::parse();
    match run(line) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(code, why)) => {
            // There is nowhere else to say it.
            let _ = writeln!(io::stderr(), "replite: {why}");
            ExitCode::from(code)
        }
    }
}

fn run(line: Line) -> Result<(), Failure> {
    let operator = operator(&line.lease)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure(FAILED, error.to_string()))?;
    let done = runtime.block_on(carry_out(line.what, &operator));
    // A disk that hangs holds up no exit.
    runtime.shutdown_background();
    done
}

async fn carry_out(what: What, operator: &Operator) -> Result<(), Failure> {
    match what {
        What::Show { json } => show(operator, json).await,
        What::Handoff { to } => {
            let holder = operator.handoff(to).await?;
            say(&format!("node {holder} has the lease\n"))
        }
        What::Pause => {
            operator.pause().await?;
            say("elections are paused: no node takes over by itself\n")
        }
        What::Resume => {
            operator.resume().await?;
            say("elections are on\n")
        }
        What::Promote { unchecked: false, .. } => Err(usage(
            "promote takes what the node has and drops what it has not: say --unchecked if that is meant",
        )),
        What::Promote { node, yes, .. } => promote(operator, Target::from(node.as_str()), yes).await,
        What::Move { to } => {
            let (other, named) = (lease(&to)?, named(&to));
            operator.move_to(other, &named).await?;
            say(&format!("the lease is in {named} now: start the nodes with that\n"))
        }
        #[cfg(feature = "members")]
        What::Members { json } => members(operator, json).await,
        #[cfg(feature = "members")]
        What::Member { what: MemberWhat::Add { url } } => {
            operator.add_member(&url).await?;
            say(&format!("{url} is a member\n"))
        }
        #[cfg(feature = "members")]
        What::Member { what: MemberWhat::Remove { url } } => {
            operator.remove_member(&url).await?;
            say(&format!("{url} is no member any more\n"))
        }
        #[cfg(feature = "members")]
        What::Member { what: MemberWhat::Begin } => {
            operator.begin_members().await?;
            say("the members have begun: their record is empty, move the lease there or promote a node\n")
        }
    }
}

/// Shows who the members are. It fails where none can be reached.
#[cfg(feature = "members")]
async fn members(operator: &Operator, json: bool) -> Result<(), Failure> {
    let view = operator.members().await?;
    say(&if json { to_json(&view)? } else { view.to_string() })?;
    match view.members.iter().all(|member| member.problem.is_some()) {
        true => Err(Failure(UNREACHABLE, "no member can be reached".into())),
        false => Ok(()),
    }
}

fn lease(text: &str) -> Result<Lease, Failure> {
    text.parse().map_err(|error: replite::Error| usage(error.to_string()))
}

/// A store's name for the mark that stays in the old one. That of a directory counts from anywhere.
fn named(text: &str) -> String {
    if text.starts_with("members:") || text.contains("://") {
        return text.to_owned();
    }
    let path = PathBuf::from(text.strip_prefix("directory:").unwrap_or(text));
    std::path::absolute(&path).unwrap_or(path).display().to_string()
}

fn to_json(view: &impl serde::Serialize) -> Result<String, Failure> {
    let json = serde_json::to_string_pretty(view);
    Ok(json.map_err(|error| Failure(FAILED, error.to_string()))? + "\n")
}

async fn show(operator: &Operator, json: bool) -> Result<(), Failure> {
    let view = operator.show().await;
    say(&if json { to_json(&view)? } else { view.to_string() })?;
    if view.is_dark() {
        return Err(Failure(UNREACHABLE, "neither the store nor a node can be reached".into()));
    }
    Ok(())
}

async fn promote(operator: &Operator, node: Target, yes: bool) -> Result<(), Failure> {
    let promotion = operator.promotion(node).await?;
    say(&promotion.to_string())?;
    if !yes && !agreed()? {
        return Err(Failure(FAILED, "nothing was done".into()));
    }
    let holder = promotion.confirm().await?;
    say(&format!("node {holder} is the primary\n"))
}

/// Asks on the terminal.
fn agreed() -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        return Err(usage("there is no terminal to ask on: say --yes if it is to be done"));
    }
    say("Type yes to go on: ")?;
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line);
    read.map_err(|error| Failure(FAILED, error.to_string()))?;
    Ok(line.trim() == "yes")
}

fn operator(args: &LeaseArgs) -> Result<Operator, Failure> {
    let from_environment = std::env::var("REPLITE_LEASE").ok().filter(|text| !text.is_empty());
    let Some(text) = args.lease.clone().or(from_environment) else {
        return Err(usage("say with --lease, or REPLITE_LEASE, where the lease's record is"));
    };
    let store = lease(&text)?;
    let by = std::env::var("USER").unwrap_or_else(|_| "an operator".into());
    let mut operator = Operator::new(store, &args.cluster, &args.database).by(by);
    if let Some(secret) = secret(args.secret_file.as_deref())? {
        operator = operator.secret(secret);
    }
    match (&args.tls_cert, &args.tls_key, &args.tls_roots) {
        (None, None, None) if args.tls_names.is_empty() => {}
        (Some(chain), Some(key), Some(roots)) if !args.tls_names.is_empty() => {
            operator = operator.tls(Certificates::new(chain, key, roots).names(&args.tls_names));
        }
        _ => return Err(usage("--tls-cert, --tls-key, --tls-roots and --tls-name go together")),
    }
    Ok(args.nodes.iter().fold(operator, |operator, url| operator.node(url)))
}

/// The secret never stands on the command line, where every process sees it.
fn secret(file: Option<&Path>) -> Result<Option<Secret>, Failure> {
    let (text, from) = match file {
        Some(path) => {
            let from = path.display().to_string();
            let bad = |error: io::Error| usage(format!("{from}: {error}"));
            let mut text = String::new();
            let file = std::fs::File::open(path).map_err(bad)?;
            file.take(SECRET_MAX_BYTES).read_to_string(&mut text).map_err(bad)?;
            (text, from)
        }
        None => match std::env::var("REPLITE_SECRET") {
            // For instances there may be older ones after it.
            Ok(text) => {
                (text.split(',').next().unwrap_or_default().trim().to_string(), "REPLITE_SECRET".into())
            }
            Err(std::env::VarError::NotPresent) => return Ok(None),
            Err(error) => return Err(usage(format!("REPLITE_SECRET: {error}"))),
        },
    };
    Secret::new(text).map(Some).map_err(|error| usage(format!("{from}: {error}")))
}

/// Writes to standard output. A reader that has enough, such as `head`, is no failure.
fn say(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure(FAILED, format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}
