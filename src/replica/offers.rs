//! A lease that the primary offers: when this node has everything, its election answers.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::context::NodeContext;
use crate::replica::Feed;
use crate::txid::Position;
use crate::wire::{Accept, LeaseOffer};

/// Offers that wait for their answer: the primary gives one up after a second.
pub(super) const OFFERS_MAX: usize = 4;
/// How long a node tries to get to what it is offered. Longer than the primary waits.
const LIMIT: Duration = Duration::from_secs(3);

/// Answers the primary's offers, one after the other. Returns never.
pub(super) async fn answer<F: Feed>(
    node: &NodeContext,
    feed: &F,
    mut offers: mpsc::Receiver<LeaseOffer>,
    accepts: mpsc::Sender<Accept>,
) -> Infallible {
    while let Some(LeaseOffer { attempt, position }) = offers.recv().await {
        let answer = match has(node, feed, position).await {
            Ok(()) => node.lease.offers.offered(attempt, position).await,
            Err(why) => Err(why.to_string()),
        };
        if accepts.send(Accept { attempt, answer }).await.is_err() {
            break;
        }
    }
    pending().await
}

/// Returns when this is the state that the node has, and has on its disk; or why it has not.
async fn has<F: Feed>(node: &NodeContext, feed: &F, position: Position) -> Result<(), &'static str> {
    if node.lease.fixed {
        return Err("its primary is fixed by configuration");
    }
    let there = async {
        let mut applied = node.applied.watch();
        let is_there =
            |applied: &Option<Position>| applied.is_some_and(|at| at.number() >= position.number());
        // The sender is the node's.
        let _ = applied.wait_for(is_there).await;
        if node.applied.position() != Some(position) {
            return Err("it has another state");
        }
        let synced = feed.synced();
        if *synced.borrow() != Some(position)
            && let Err(error) = feed.sync().await
        {
            tracing::warn!(%error, "a lease is declined: what is here can't be synced");
            return Err("its disk does not take what it has");
        }
        if *synced.borrow() != Some(position) {
            return Err("its state changed meanwhile");
        }
        Ok(())
    };
    tokio::time::timeout(LIMIT, there).await.unwrap_or(Err("it does not have the last state yet"))
}
