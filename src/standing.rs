//! Asking a peer how it stands, and answering.
//!
//! Every node answers, whatever its role, and also one without a state. Question and answer are
//! proved with fresh nonces of both: see `handshake`.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::context::{Fitness, NodeContext};
use crate::election::{ENTRIES_MOST, PeerAnswer};
use crate::error::{Error, PeerProblem, Result};
use crate::handshake::{self, Answer, Asker, Knock, Nonce, STANDING_PATH};
use crate::net::{self, Endpoint, Incoming};
use crate::primary::StreamSender;
use crate::replica::foreign;
use crate::secret::PROOF_BYTES;
use crate::status::{PeerInfo, Role};
use crate::wire::{self, Decoder, HEADER_BYTES, Kind, Message, STANDING_MAX_BYTES, Standing};

/// Peers at one time that knocked to ask, and have not been answered.
pub(crate) const ASKING_MAX: usize = 32;
/// Peers that are asked at one time; those that are named first.
pub(crate) const ASKED_MAX: usize = ENTRIES_MOST;
/// Longest wait for the question after a knock, and for all of the exchange.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(2);

/// A peer that asks, and whose knock was answered.
pub(crate) struct AskingPeer {
    pub(crate) knock: Knock,
    /// The nonce that it was answered with.
    pub(crate) nonce: Nonce,
    pub(crate) place: OwnedSemaphorePermit,
}

/// Answers a peer that proves the secret by our nonce. For any other the response breaks off.
pub(crate) async fn answer(
    node: Arc<NodeContext>,
    peer: AskingPeer,
    upstream: Incoming,
    sender: StreamSender,
) {
    let AskingPeer { knock, nonce, place: _place } = peer;
    let answered = async {
        let question = question(upstream).await?;
        let proved = handshake::question_holds(&question, &knock, &nonce, &node.keys)?;
        let mut standing = of(&node);
        handshake::seal_standing(&mut standing, &knock, &nonce, &node.keys.towards(proved));
        let mut bytes = BytesMut::new();
        wire::encode(&Message::Standing(standing), &mut bytes);
        sender.send(bytes.freeze()).await.ok()?;
        sender.finish().await.ok()
    };
    if !matches!(tokio::time::timeout(EXCHANGE_TIMEOUT, answered).await, Ok(Some(()))) {
        tracing::debug!(node = %knock.node, "a peer knocked to ask how this node stands, and did not");
    }
}

/// The request's body, if it is a proof.
async fn question(mut upstream: Incoming) -> Option<[u8; PROOF_BYTES]> {
    let mut question = Vec::with_capacity(PROOF_BYTES);
    while let Some(bytes) = upstream.next().await {
        let bytes = bytes.ok()?;
        if question.len() + bytes.len() > PROOF_BYTES {
            return None;
        }
        question.extend_from_slice(&bytes);
    }
    question.try_into().ok()
}

/// How this node stands, not proved yet.
fn of(node: &NodeContext) -> Standing {
    let position = node.applied.position();
    let known =
        || Fitness { has_state: position.is_some(), has_content: position.is_some(), ..Fitness::default() };
    let Fitness { fit, has_state, has_content, .. } = node.lease.fitness().unwrap_or_else(known);
    let ends = node.drain.is_cancelled() || node.roles.borrow().role == Role::Stopped;
    Standing {
        proof: [0; PROOF_BYTES],
        position,
        epoch: node.highest_epoch(),
        fit: fit && !ends,
        has_state,
        has_content,
        peer: node.me.clone(),
    }
}

/// Asks a node how it stands, at its replication endpoint. The tasks of the connection are the
/// tracker's, and run where this is awaited.
///
/// # Errors
/// [`Error::Peer`]: it can't be reached, is another node, of another cluster or another database,
/// or what it says is not proved. [`Error::Config`] for an address that is none.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(crate) async fn ask(node: &NodeContext, peer: &PeerInfo, tracker: &TaskTracker) -> Result<PeerAnswer> {
    let to = Endpoint::parse(&peer.addresses.replication)?;
    let blame = |problem| Error::peer(to.to_string(), problem);
    let exchange = exchange(node, &to, tracker);
    let answered = match tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await {
        Ok(answered) => answered.map_err(blame)?,
        Err(_) => {
            return Err(blame(PeerProblem::Connection(format!("no answer within {EXCHANGE_TIMEOUT:?}"))));
        }
    };
    match answered.peer.node {
        found if found == peer.node => Ok(answered),
        found => Err(blame(PeerProblem::AnotherNode(found))),
    }
}

/// Asks the first [`ASKED_MAX`] of these nodes at once, and returns what came until the limit.
pub(crate) async fn ask_all(
    node: &Arc<NodeContext>,
    peers: &[PeerInfo],
    limit: Duration,
    tracker: &TaskTracker,
) -> Vec<PeerAnswer> {
    // Those that are still on their way end with the set.
    let mut asking = JoinSet::new();
    for peer in peers.iter().take(ASKED_MAX) {
        let (node, peer, tracker) = (node.clone(), peer.clone(), tracker.clone());
        asking.spawn(async move { ask(&node, &peer, &tracker).await });
    }
    let mut answers = Vec::new();
    let all = async {
        while let Some(asked) = asking.join_next().await {
            match asked {
                Ok(Ok(answer)) => answers.push(answer),
                Ok(Err(error)) => tracing::debug!(%error, "a peer does not say how it stands"),
                Err(error) => tracing::debug!(%error, "a peer could not be asked"),
            }
        }
    };
    // What has not come by then counts as no answer.
    let _ = tokio::time::timeout(limit, all).await;
    answers
}

async fn exchange(
    node: &NodeContext,
    to: &Endpoint,
    tracker: &TaskTracker,
) -> Result<PeerAnswer, PeerProblem> {
    let (knock, opened) = Asker::of(node).knock(to, STANDING_PATH, tracker).await?;
    answer_of(node, &knock, opened).await
}

/// Asks in the body, and reads the answer.
async fn answer_of(
    node: &NodeContext,
    knock: &Knock,
    opened: net::OpenResponse,
) -> Result<PeerAnswer, PeerProblem> {
    let net::OpenResponse { status, headers, mut body, mut request, guard: _guard, .. } = opened;
    let answer = match handshake::read_head((status, &headers), knock, &node.keys) {
        Ok((answer, _)) => answer,
        Err(Some(problem)) => return Err(problem),
        Err(None) => return Err(foreign(status, &headers, &mut body).await),
    };
    let question = handshake::question(knock, &answer.nonce, &node.keys);
    let sent = request.send_data(Bytes::copy_from_slice(&question)).await;
    sent.map_err(|_| PeerProblem::Connection("it hung up before the question".into()))?;
    drop(request);
    said(node, knock, &answer, body).await
}

/// What the body says: one unit, and no more.
async fn said(
    node: &NodeContext,
    knock: &Knock,
    answer: &Answer,
    mut body: Incoming,
) -> Result<PeerAnswer, PeerProblem> {
    let garbled = |what: &str| PeerProblem::Garbled(what.into());
    let mut bytes = BytesMut::new();
    while let Some(more) = body.next().await {
        let more = more.map_err(|_| PeerProblem::Connection("the answer broke off".into()))?;
        if bytes.len() + more.len() > STANDING_MAX_BYTES {
            return Err(garbled("an answer that is too long"));
        }
        bytes.extend_from_slice(&more);
    }
    let length = bytes.len();
    let mut decoder = Decoder::default();
    decoder.push(bytes.freeze());
    let unit = decoder.next().map_err(|error| garbled(&error.to_string()))?;
    let unit = unit.ok_or_else(|| garbled("an answer that is cut short"))?;
    if unit.raw.len() != length || unit.kind != Kind::Standing {
        return Err(garbled("something else than how it stands"));
    }
    let message = unit.decode().map_err(|error| garbled(&error.to_string()))?;
    let Message::Standing(standing) = message else {
        return Err(garbled("something else than how it stands"));
    };
    let payload = &unit.raw[HEADER_BYTES..];
    if !handshake::standing_holds(&standing, payload, (knock, answer), &node.keys) {
        return Err(PeerProblem::Secret);
    }
    let Standing { position, epoch, fit, has_state, has_content, peer, proof: _ } = standing;
    Ok(PeerAnswer { peer, position, epoch, fit, has_state, has_content })
}
