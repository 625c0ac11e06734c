//! What an operator asks a node to do, from outside of it, and what the node says to that.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::peer::{NodeId, PeerKey};
use crate::status::{PeerInfo, Role};
use crate::txid::{Epoch, Position};

/// What is asked of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum OperatorCommand {
    /// Say how you stand. Nothing is done.
    Describe,
    /// Hand the lease over: to this node, or to the best one.
    Handoff { to: Option<NodeId> },
    /// Take the lease with what is there, whatever others have.
    PromoteUnchecked,
}

impl fmt::Display for OperatorCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            OperatorCommand::Describe => f.write_str("say how it stands"),
            OperatorCommand::Handoff { to: None } => f.write_str("hand the lease over to the best node"),
            OperatorCommand::Handoff { to: Some(to) } => write!(f, "hand the lease over to node {to}"),
            OperatorCommand::PromoteUnchecked => f.write_str("take the lease unchecked"),
        }
    }
}

/// How a node stands, with all that an operator wants to know of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) peer: PeerInfo,
    /// Its key, as it says. Who asks in TLS knows better.
    #[serde(default)]
    pub(crate) key: Option<PeerKey>,
    pub(crate) role: Role,
    /// The newest epoch of its history.
    pub(crate) epoch: Epoch,
    /// The highest epoch number that it has heard of.
    pub(crate) heard: u64,
    pub(crate) position: Option<Position>,
    /// The primary that it knows.
    pub(crate) primary: Option<NodeId>,
    /// It would take the lease, and could.
    pub(crate) fit: bool,
    /// Why it would not, in words.
    pub(crate) why_not: Option<String>,
    /// What it waits for, in words, while it waits.
    pub(crate) waits_for: Option<String>,
    pub(crate) draining: bool,
    /// Whether the record that it saw last says that elections are paused.
    pub(crate) paused: Option<bool>,
    /// All problems that last.
    pub(crate) problem: Option<String>,
}

/// What a node says to a command.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CommandAnswer {
    Described(Box<Description>),
    /// It is done, and this node has the lease.
    Done {
        holder: NodeId,
    },
    /// It is not done, for this reason.
    Refused {
        why: String,
    },
}

/// How a command ends: with the node that has the lease then, or with why it was not done.
pub(crate) type CommandEnd = Pin<Box<dyn Future<Output = Result<NodeId, String>> + Send>>;

/// Carries commands out.
type CarryOut = dyn Fn(OperatorCommand) -> CommandEnd + Send + Sync;

/// Leads from the doors to what carries commands out, once the node is complete.
#[derive(Default)]
pub(crate) struct CommandDoor(OnceLock<Box<CarryOut>>);

impl CommandDoor {
    pub(crate) fn open(&self, carry_out: impl Fn(OperatorCommand) -> CommandEnd + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(carry_out));
    }

    /// None: the node is not complete yet, or has a fixed primary.
    pub(crate) fn carry_out(&self, command: OperatorCommand) -> Option<CommandEnd> {
        self.0.get().map(|carry_out| carry_out(command))
    }
}

impl fmt::Debug for CommandDoor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandDoor").field("open", &self.0.get().is_some()).finish()
    }
}
