//! What a replica says to its primary while the stream runs: what it has, what a heal wants, and
//! what the primary asked for.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::context::NodeContext;
use crate::net::RequestBody;
use crate::replica::Feed;
use crate::report::Condition;
use crate::wire::{self, Accept, Ack, Message, Want};

/// Acknowledgements of what is applied come at most this often; those of what is synced at once.
const ACK_PAUSE: Duration = Duration::from_millis(100);
/// An acknowledgement comes at least this often, also as a sign of life.
const ACK_EVERY: Duration = Duration::from_secs(1);

/// What else is said: what a heal wants, what the primary asks, and answers to its offers.
pub(super) type WhatElse = (mpsc::Receiver<Want>, Option<mpsc::Receiver<Want>>, mpsc::Receiver<Accept>);

/// Says what was applied and synced, and asks for what a heal wants. Returns when the connection
/// takes nothing any more.
pub(super) async fn acknowledge<F: Feed>(
    node: &NodeContext,
    feed: &F,
    dialled: Instant,
    (mut wants, mut asked, mut accepts): WhatElse,
    mut request: RequestBody,
    drained: CancellationToken,
) {
    let mut answered = pin!(async {
        drained.cancelled().await;
        node.forwards_answered().await;
    });
    let mut quiet = false;
    let mut synced = feed.synced();
    let mut said = None;
    let mut synced_moves = true;
    loop {
        let has = (node.applied.position(), *synced.borrow_and_update());
        let due = said.is_none_or(|(last, at): (_, Instant)| last != has || at.elapsed() >= ACK_EVERY);
        if due {
            let clock = dialled.elapsed().as_micros() as u64;
            let ack = Ack { applied: has.0, synced: has.1, clock };
            if request.send_data(encoded(&Message::Ack(ack))).await.is_err() {
                return;
            }
            said = Some((has, Instant::now()));
        }
        tokio::select! {
            Some(accept) = accepts.recv() => {
                if request.send_data(encoded(&Message::Accept(accept))).await.is_err() {
                    return;
                }
            }
            Some(want) = wants.recv() => {
                if request.send_data(encoded(&Message::Want(want))).await.is_err() {
                    return;
                }
            }
            Some(want) = next_of(&mut asked) => {
                // Pages that can't be read are not answered for: the primary asks another replica.
                let answer = feed.answer(want).await.unwrap_or_else(|error| {
                    Condition::PagesNotAnswered { error: &error }.say();
                    Bytes::new()
                });
                if request.send_data(answer).await.is_err() {
                    return;
                }
            }
            () = &mut answered, if !quiet => {
                quiet = true;
                if request.send_data(encoded(&Message::Drain)).await.is_err() {
                    return;
                }
            }
            moved = synced.changed(), if synced_moves => synced_moves = moved.is_ok(),
            () = tokio::time::sleep(ACK_PAUSE) => {}
        }
    }
}

async fn next_of(receiver: &mut Option<mpsc::Receiver<Want>>) -> Option<Want> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => None,
    }
}

pub(super) fn encoded(message: &Message<'_>) -> Bytes {
    let mut bytes = BytesMut::new();
    wire::encode(message, &mut bytes);
    bytes.freeze()
}
