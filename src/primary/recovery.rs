//! What a power cut took from this node, taken back from the logs of its replicas before anybody can write.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use uuid::Uuid;

use super::outlet::Outlet;
use super::{Units, blocking};
use crate::engine::Opening;
use crate::error::{Error, PeerProblem, Result};
use crate::node::Node;
use crate::status::PeerInfo;
use crate::txid::{Place, Position};
use crate::wire::{self, Hello, Kind, Message, Plan, Unit, Welcome};

/// Longest wait for more of a replica's records.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Longest time that one replica may take for all of them.
const TAKE_MAX: Duration = Duration::from_secs(60);

/// A database that is not served yet, and the replicas that were asked for what it may miss.
#[derive(Debug)]
pub(crate) struct Recovery {
    /// None when no replica is asked any more.
    opening: Mutex<Option<Opening>>,
    /// Held while one replica is asked.
    turn: tokio::sync::Mutex<()>,
    /// Replicas that had nothing: they are not asked again.
    in_vain: Mutex<HashSet<Uuid>>,
}

impl Recovery {
    pub(crate) fn new(opening: Opening) -> Arc<Recovery> {
        let (opening, turn) = (Mutex::new(Some(opening)), tokio::sync::Mutex::default());
        Arc::new(Recovery { opening, turn, in_vain: Mutex::default() })
    }

    /// Asks no more replicas, when the one that is being asked has given what it has. None the second time.
    pub(crate) async fn end(&self) -> Option<Opening> {
        let _turn = self.turn.lock().await;
        lock(&self.opening).take()
    }

    /// Takes what this replica has, if it has what this node lacks. Why its stream ends then: it comes again, and is served.
    pub(super) async fn ask(
        self: &Arc<Self>,
        node: &Node,
        hello: &Hello,
        units: &mut Units,
        outlet: &Outlet,
    ) -> Option<String> {
        let _turn = self.turn.lock().await;
        let welcome = self.welcome(node, hello)?;
        let before = welcome.position;
        // Who was asked before may have broken off.
        let recovery = self.clone();
        blocking(move || recovery.with(settle)).await.ok()?;
        tracing::info!(node = %hello.peer.node, %before, "asking a replica for what this node may have lost");
        let mut bytes = BytesMut::new();
        wire::encode(&Message::Welcome(welcome), &mut bytes);
        let taken = async {
            let gone =
                |_| Error::peer(hello.peer.node.to_string(), PeerProblem::Connection("it left".into()));
            outlet.send(bytes.freeze()).await.map_err(gone)?;
            self.take(&hello.peer, units).await
        };
        let taken = match tokio::time::timeout(TAKE_MAX, taken).await {
            Ok(taken) => taken,
            Err(_) => Err(Error::Timeout { what: "a replica's records".into(), after: TAKE_MAX }),
        };
        if let Err(error) = &taken {
            tracing::warn!(node = %hello.peer.node, %error, "not all of a replica's records could be taken");
        }
        let recovery = self.clone();
        let position = blocking(move || recovery.with(settle)).await.unwrap_or(before);
        let transactions = position.number() - before.number();
        // Who was cut off has more to give.
        let cut_off = matches!(&taken, Err(Error::Peer { problem: PeerProblem::Connection(_), .. }));
        if transactions == 0 && !cut_off {
            lock(&self.in_vain).insert(hello.peer.node);
        }
        if transactions > 0 {
            tracing::warn!(
                node = %hello.peer.node, transactions, %position,
                "transactions that this node had lost are taken back from a replica"
            );
        }
        Some(format!("{transactions} transactions are taken back from this replica"))
    }

    /// What a replica is told that goes on where this node's history ends.
    fn welcome(&self, node: &Node, hello: &Hello) -> Option<Welcome> {
        let opening = lock(&self.opening);
        let opening = opening.as_ref()?;
        let (tip, history) = (opening.tip(), opening.history());
        let theirs = hello.position.filter(|p| p.number() > tip.number() && !hello.suspect)?;
        // In the same history, as far as both know it; whether it does go on from here, its records say.
        let ahead =
            history.place(theirs.txid()) == Place::OnHistory && hello.history.epoch() == history.epoch();
        let in_vain = lock(&self.in_vain).contains(&hello.peer.node);
        (ahead && !in_vain).then(|| Welcome {
            peer: node.me.clone(),
            epoch: history.epoch(),
            plan: Plan::Recover,
            position: tip,
            page_size: opening.page_size(),
        })
    }

    /// Takes records until the replica says that these are all.
    async fn take(self: &Arc<Self>, peer: &PeerInfo, units: &mut Units) -> Result<()> {
        let peer = peer.node.to_string();
        loop {
            let next = tokio::time::timeout(SILENCE_MAX, units.next()).await;
            let next = next.map_err(|_| Error::peer(&peer, PeerProblem::Silent(SILENCE_MAX)))?;
            let mut unit = next.map_err(|e| Error::garbled(&peer, e.to_string()))?;
            let mut batch: Vec<Unit> = Vec::new();
            let end = loop {
                match unit.take() {
                    Some(unit) if unit.kind == Kind::Goodbye => break Some(Ok(())),
                    Some(unit) => batch.push(unit),
                    None if batch.is_empty() => {
                        let left = PeerProblem::Connection("it left".into());
                        break Some(Err(Error::peer(&peer, left)));
                    }
                    None => break None,
                }
                // What has come with it.
                match units.decoder.next() {
                    Ok(next) => unit = next,
                    Err(error) => break Some(Err(Error::garbled(&peer, error.to_string()))),
                }
            };
            if !batch.is_empty() {
                let recovery = self.clone();
                blocking(move || recovery.with(|opening| opening.take(&batch))).await?;
            }
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn with<T>(&self, run: impl FnOnce(&mut Opening) -> Result<T>) -> Result<T> {
        run(lock(&self.opening).as_mut().ok_or(Error::ShutDown)?)
    }
}

/// Only whole transactions count.
fn settle(opening: &mut Opening) -> Result<Position> {
    opening.abort();
    Ok(opening.tip())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
