//! Answering other members, and nodes that only ask for the record.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::handshake;
use crate::members::door::SharedRoom;
use crate::members::node::MemberNode;
use crate::members::words::{self, Ask, AskFrames, FRAME_MAX_BYTES, MemberAnswer};
use crate::net::Incoming;
use crate::primary::StreamSender;
use crate::secret::{PROOF_BYTES, Rights};
use crate::standing::AskingPeer;

/// Longest wait for the proof after a knock.
const PROOF_LIMIT: Duration = Duration::from_secs(2);
/// Who asks nothing for so long is not there any more.
const IDLE_LIMIT: Duration = Duration::from_secs(90);
/// Longest wait until an answer is taken.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Questions of one peer that are answered at one time; the next ones wait.
const AT_ONCE_MAX: usize = 16;
/// A question that is longer waits for room: only Raft's own are, which wait for no other question.
const LONG_BYTES: usize = 64 * 1024;
/// The most bytes of what a follower asks: it may only read. And it reads once at a time.
const FOLLOWERS_MAX_BYTES: usize = 256;

/// Answers what a peer asks on one connection, until it hangs up. One that does not prove the
/// secret by our nonce sees a response that breaks off. A guest that finds no place to keep is
/// answered once.
pub(crate) async fn serve(
    member: Arc<MemberNode>,
    peer: AskingPeer,
    SharedRoom { guests, long }: SharedRoom,
    mut upstream: Incoming,
    sender: StreamSender,
) {
    let AskingPeer { knock, nonce, place: _place } = peer;
    let keys = &member.context().keys;
    let mut frames = AskFrames::default();
    let proof = async {
        let (proof, rest) = proof(&mut upstream).await?;
        frames.push(&rest);
        handshake::members_hold(&proof, &knock, &nonce, keys)
    };
    let Ok(Some(proved)) = timeout(PROOF_LIMIT, proof).await else {
        tracing::debug!(node = %knock.node, "a peer knocked to ask the members, and did not");
        return;
    };
    let sender = Arc::new(sender);
    let rights = proved.rights();
    let (longest, at_once) = asks_at_most(rights);
    let places = Arc::new(Semaphore::new(at_once));
    let mut seat = Seat { guests, kept: None, is_member: false };
    // They end with the connection: what they began goes on by itself.
    let mut answering = JoinSet::new();
    loop {
        while answering.try_join_next().is_some() {}
        let json = match frames.next_of(longest) {
            Ok(Some(json)) => json,
            Ok(None) => {
                let came = tokio::select! {
                    came = timeout(IDLE_LIMIT, upstream.next()) => came,
                    // A secret that is not valid any more lets in no more.
                    () = keys.dropped(proved) => return,
                };
                let Ok(Some(Ok(bytes))) = came else { return };
                frames.push(&bytes);
                continue;
            }
            Err(error) => {
                tracing::warn!(node = %knock.node, %error, "a member says what can't be read");
                return;
            }
        };
        let Some((place, room)) = turn(&places, &long, json.len()).await else { return };
        let Some((number, asked)) = understood(&json, rights) else { continue };
        // It may be long, and the answer take its time.
        drop(json);
        let stays = seat.stays(&asked);
        let (member, sender) = (member.clone(), sender.clone());
        answering.spawn(async move {
            let answer = answer(&member, number, asked).await;
            drop(room);
            if let Some(frame) = answer {
                // Who asked may be gone.
                let _ = timeout(SEND_LIMIT, sender.send(frame)).await;
            }
            drop(place);
        });
        if !stays {
            break;
        }
    }
    while answering.join_next().await.is_some() {}
    if let Some(sender) = Arc::into_inner(sender) {
        let _ = timeout(SEND_LIMIT, sender.finish()).await;
    }
}

/// The most bytes of a question, and the most of them at one time.
fn asks_at_most(rights: Rights) -> (usize, usize) {
    match rights {
        Rights::Follower => (FOLLOWERS_MAX_BYTES, 1),
        Rights::Member => (FRAME_MAX_BYTES, AT_ONCE_MAX),
    }
}

/// Waits until a question of so many bytes may be worked on: its place, and room if it is long.
async fn turn(
    places: &Arc<Semaphore>,
    long: &Arc<Semaphore>,
    bytes: usize,
) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.ok()?;
    let room = if bytes > LONG_BYTES { bytes as u32 } else { 0 };
    Some((place, long.clone().acquire_many_owned(room).await.ok()?))
}

/// The first bytes of a body, and what came with them.
async fn proof(upstream: &mut Incoming) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut bytes = Vec::with_capacity(PROOF_BYTES);
    while bytes.len() < PROOF_BYTES {
        bytes.extend_from_slice(&upstream.next().await?.ok()?);
    }
    let rest = bytes.split_off(PROOF_BYTES);
    Some((bytes, rest))
}

/// Where a peer stays. One that brings Raft's messages is a member; any other is a guest.
struct Seat {
    guests: Arc<Semaphore>,
    kept: Option<OwnedSemaphorePermit>,
    is_member: bool,
}

impl Seat {
    /// Whether it may ask more than this. So guests can't take all places from members.
    fn stays(&mut self, asked: &Result<Ask, String>) -> bool {
        self.is_member |= asked.as_ref().is_ok_and(Ask::is_of_raft);
        if self.is_member {
            self.kept = None;
        } else if self.kept.is_none() {
            self.kept = self.guests.clone().try_acquire_owned().ok();
        }
        self.is_member || self.kept.is_some()
    }
}

/// What is asked, or why it is not done. None: there is no number to answer to.
fn understood(json: &[u8], rights: Rights) -> Option<(u64, Result<Ask, String>)> {
    Some(match words::read::<Ask>(json) {
        Ok((number, ask)) => match ask.check() {
            Err(error) => (number, Err(error.to_string())),
            Ok(()) if rights == Rights::Follower && !matches!(ask, Ask::Read) => {
                (number, Err("it is a follower, and may only read".into()))
            }
            Ok(()) => (number, Ok(ask)),
        },
        Err(error) => {
            let (number, _) = words::read::<serde::de::IgnoredAny>(json).ok()?;
            (number, Err(error.to_string()))
        }
    })
}

async fn answer(member: &Arc<MemberNode>, number: u64, asked: Result<Ask, String>) -> Option<Bytes> {
    let unable = |why: String| MemberAnswer::Unable { may_be_done: false, why };
    let said = match asked {
        Ok(ask) => member.answer(ask).await,
        Err(why) => unable(why),
    };
    let too_long = |_| words::frame(number, &unable("its answer is too long".into()));
    words::frame(number, &said).or_else(too_long).ok()
}

#[cfg(test)]
mod tests;
