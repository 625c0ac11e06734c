//! An operator's command: how it comes to a node, and how one is given.
//!
//! A node takes it whatever its role, but for one whose primary is fixed by configuration. Command
//! and answer are proved with fresh nonces of both, by keys of their own: see `handshake`. Each is
//! a proof and then JSON, of bounded length.
//!
//! A command that was proved runs to its end, also when the connection breaks.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::context::{CommandAnswer, Description, Fitness, NodeContext, OperatorCommand};
use crate::error::{PeerProblem, shown};
use crate::handshake::{self, Asker, COMMAND_PATH};
use crate::net::{self, Endpoint, Incoming};
use crate::peer::NodeId;
use crate::primary::StreamSender;
use crate::replica::foreign;
use crate::report::Condition;
use crate::secret::PROOF_BYTES;
use crate::standing::AskingPeer;
use crate::status::{Addresses, Role};

/// Commands that a node carries out at one time.
pub(crate) const COMMANDS_MAX: usize = 4;
/// Longest wait for the command after a knock.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest that a command runs: the longest lease time, and a promotion with the application's
/// part in it.
const RUN_LIMIT: Duration = Duration::from_secs(155);
/// The most bytes of a command's JSON.
const COMMAND_MAX_BYTES: usize = 1024;
/// The most bytes of the JSON that a node says to it.
const ANSWER_MAX_BYTES: usize = 16 * 1024;
/// What a node says that was started with the store of before.
const MOVED: &str = "it runs with a store from which the lease was moved: start it with the other one";
/// Bytes of the name of who gives a command, and of a node's words, that are shown.
const BY_MAX_BYTES: usize = 128;
const WORDS_MAX_BYTES: usize = 1024;

/// A command, and who gives it, as that one says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GivenCommand {
    by: String,
    command: OperatorCommand,
}

/// Takes a peer's command, carries it out and answers. One that does not prove the secret by our
/// nonce sees a response that breaks off.
pub(crate) async fn answer(
    node: Arc<NodeContext>,
    peer: AskingPeer,
    upstream: Incoming,
    sender: StreamSender,
    commanding: Arc<Semaphore>,
) {
    let AskingPeer { knock, nonce, place } = peer;
    let body = tokio::time::timeout(COMMAND_TIMEOUT, read(upstream, PROOF_BYTES + COMMAND_MAX_BYTES)).await;
    // One that takes long keeps out no peer that only asks.
    drop(place);
    let proved = match &body {
        Ok(Some(body)) => body
            .split_at_checked(PROOF_BYTES)
            .filter(|(proof, json)| handshake::command_holds(proof, json, (&knock, &nonce), &node.keys)),
        _ => None,
    };
    let Some((_, json)) = proved else {
        tracing::debug!(node = %knock.node, "a peer knocked to give a command, and gave none");
        return;
    };
    let said = match serde_json::from_slice(json) {
        Ok(given) => obey(&node, given, &commanding).await,
        Err(_) => refused("this node does not know this command: it may have another version of replite"),
    };
    let json = encoded(said);
    let proof = handshake::prove_command_answer(&knock, &nonce, &json, &node.keys);
    // The operator may be gone.
    if sender.send([&proof[..], &json].concat().into()).await.is_ok() {
        let _ = sender.finish().await;
    }
}

fn refused(why: impl Into<String>) -> CommandAnswer {
    CommandAnswer::Refused { why: why.into() }
}

async fn obey(node: &Arc<NodeContext>, given: GivenCommand, commanding: &Semaphore) -> CommandAnswer {
    let GivenCommand { by, command } = given;
    if command == OperatorCommand::Describe {
        return CommandAnswer::Described(Box::new(describe(node)));
    }
    if node.keys.is_open() {
        return refused("this node has no secret, so that any process could command it");
    }
    if node.lease.fixed {
        return refused("its primary is fixed by configuration: there is no lease");
    }
    if node.lease.fitness().is_some_and(|fitness| fitness.moved) {
        return refused(MOVED);
    }
    if command == OperatorCommand::PromoteUnchecked && node.drain.is_cancelled() {
        return refused("it is about to end");
    }
    let Ok(_place) = commanding.try_acquire() else {
        return refused("it carries out other commands at the moment");
    };
    let (by, what) = (shown(&by, BY_MAX_BYTES), command.to_string());
    node.report_aside(Condition::OperatorAsks { database: &node.database, by: &by, what: &what });
    let Some(carried_out) = node.lease.commands.carry_out(command) else {
        return refused("it is being opened");
    };
    let ended = tokio::select! {
        ended = tokio::time::timeout(RUN_LIMIT, carried_out) => {
            ended.unwrap_or_else(|_| Err(format!("it did not come to its end within {RUN_LIMIT:?}")))
        }
        () = node.stop.cancelled() => Err("it is being shut down".into()),
    };
    let outcome = match &ended {
        Ok(holder) => format!("node {holder} has the lease"),
        Err(why) => format!("refused: {why}"),
    };
    node.report_aside(Condition::OperatorAnswered { by: &by, what: &what, outcome: &outcome });
    match ended {
        Ok(holder) => CommandAnswer::Done { holder },
        Err(why) => refused(why),
    }
}

/// How the node stands at this moment.
pub(crate) fn describe(node: &NodeContext) -> Description {
    let state = node.roles.borrow().clone();
    let Fitness { fit, why_not, paused, moved, .. } = node.lease.fitness().unwrap_or_default();
    let moved = moved.then(|| MOVED.to_owned());
    let draining = node.drain.is_cancelled();
    let ends = draining || state.role == Role::Stopped;
    Description {
        peer: node.me.clone(),
        key: node.channel.key(),
        role: state.role,
        epoch: state.epoch,
        heard: node.highest_epoch(),
        position: node.applied.position(),
        primary: state.primary.map(|primary| primary.node),
        fit: fit && !ends,
        why_not: moved.clone().or(why_not.map(|reason| reason.to_string())),
        waits_for: state.waits_for.map(|reason| moved.unwrap_or(reason.to_string())),
        draining,
        paused,
        problem: node.problem().map(|problem| shown(&problem, WORDS_MAX_BYTES)),
    }
}

/// An answer that is too long is told without its addresses.
fn encoded(mut said: CommandAnswer) -> Vec<u8> {
    match &mut said {
        CommandAnswer::Refused { why } => *why = shown(why, WORDS_MAX_BYTES),
        CommandAnswer::Described(description) => {
            let long = serde_json::to_vec(&description).is_ok_and(|json| json.len() > ANSWER_MAX_BYTES / 2);
            if long {
                description.peer.addresses = Addresses::default();
            }
        }
        CommandAnswer::Done { .. } => {}
    }
    // It has nothing that JSON can't have.
    serde_json::to_vec(&said).unwrap_or_default()
}

/// The whole body, if it is not longer than that.
async fn read(mut body: Incoming, most: usize) -> Option<Vec<u8>> {
    let mut whole = Vec::new();
    while let Some(bytes) = body.next().await {
        let bytes = bytes.ok()?;
        if whole.len() + bytes.len() > most {
            return None;
        }
        whole.extend_from_slice(&bytes);
    }
    Some(whole)
}

/// Why a command has no answer.
#[derive(Debug)]
pub(crate) struct NoAnswer {
    /// It was sent, and may be carried out.
    pub(crate) sent: bool,
    pub(crate) problem: PeerProblem,
}

/// Gives a command to the node at an endpoint: to this one, if it is named. Returns which node
/// answered, and what. The tasks of the connection are the tracker's.
///
/// # Cancel safety
/// Dropping the future closes the connection. A command that was sent is carried out.
pub(crate) async fn give(
    asker: &Asker,
    (to, expected): (&Endpoint, Option<NodeId>),
    (by, command): (&str, OperatorCommand),
    limit: Duration,
    tracker: &TaskTracker,
) -> Result<(NodeId, CommandAnswer), NoAnswer> {
    let given = GivenCommand { by: shown(by, BY_MAX_BYTES), command };
    let json = serde_json::to_vec(&given).unwrap_or_default();
    let mut sent = false;
    let exchange = exchange(asker, (to, expected), &json, &mut sent, tracker);
    match tokio::time::timeout(limit, exchange).await {
        Ok(Ok(answered)) => Ok(answered),
        Ok(Err(problem)) => Err(NoAnswer { sent, problem }),
        Err(_) => {
            let problem = PeerProblem::Connection(format!("no answer within {limit:?}"));
            Err(NoAnswer { sent, problem })
        }
    }
}

async fn exchange(
    asker: &Asker,
    (to, expected): (&Endpoint, Option<NodeId>),
    json: &[u8],
    sent: &mut bool,
    tracker: &TaskTracker,
) -> Result<(NodeId, CommandAnswer), PeerProblem> {
    let (knock, opened) = asker.knock(to, COMMAND_PATH, tracker).await?;
    let net::OpenResponse { status, headers, mut body, mut request, guard: _guard, .. } = opened;
    let answer = match handshake::read_head((status, &headers), &knock, &asker.keys) {
        Ok((answer, _)) => answer,
        Err(Some(problem)) => return Err(problem),
        Err(None) => return Err(foreign(status, &headers, &mut body).await),
    };
    if expected.is_some_and(|expected| expected != answer.node) {
        return Err(PeerProblem::AnotherNode(answer.node));
    }
    let proof = handshake::prove_command(&knock, &answer.nonce, json, &asker.keys);
    *sent = true;
    let whole = Bytes::from([&proof[..], json].concat());
    let hung_up = |_| PeerProblem::Connection("it hung up before the command".into());
    request.send_data(whole).await.map_err(hung_up)?;
    drop(request);
    let said = read(body, PROOF_BYTES + ANSWER_MAX_BYTES).await;
    let said = said.ok_or_else(|| PeerProblem::Connection("the answer broke off".into()))?;
    let (proof, said) = said
        .split_at_checked(PROOF_BYTES)
        .ok_or_else(|| PeerProblem::Garbled("an answer of no length".into()))?;
    if !handshake::command_answer_holds(proof, said, (&knock, &answer.nonce), &asker.keys) {
        return Err(PeerProblem::Secret);
    }
    let garbled = |_| PeerProblem::Garbled("an answer that makes no sense to this version".into());
    let mut said = plain(serde_json::from_slice(said).map_err(garbled)?)?;
    if let CommandAnswer::Described(described) = &mut said
        && knock.binding.is_private()
    {
        described.key = knock.binding.server();
    }
    Ok((answer.node, said))
}

/// What a node says is shown on terminals.
fn plain(said: CommandAnswer) -> Result<CommandAnswer, PeerProblem> {
    let text = |text: String| shown(&text, WORDS_MAX_BYTES);
    Ok(match said {
        CommandAnswer::Refused { why } => CommandAnswer::Refused { why: text(why) },
        CommandAnswer::Described(mut described) => {
            if !described.peer.addresses.are_plain() {
                return Err(PeerProblem::Garbled("addresses or labels with control characters".into()));
            }
            described.why_not = described.why_not.map(text);
            described.waits_for = described.waits_for.map(text);
            described.problem = described.problem.map(text);
            CommandAnswer::Described(described)
        }
        done @ CommandAnswer::Done { .. } => done,
    })
}
