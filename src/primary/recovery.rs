//! Takes back what a power cut took from this node, from the logs of its replicas, before any
//! connection can write.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::checksum::PageKey;
use crate::context::NodeContext;
use crate::engine::Opening;
use crate::error::{Error, PeerProblem, Result};
use crate::lock::lock;
use crate::peer::NodeId;
use crate::primary::acks::ReceivedUnits;
use crate::primary::blocking;
use crate::primary::send_queue::StreamSender;
use crate::report::Condition;
use crate::status::PeerInfo;
use crate::txid::{Place, Position};
use crate::wire::{self, Hello, Kind, Message, PeerKeys, Plan, Unit, Welcome};

/// Longest wait for more of a replica's records.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Longest time that one replica may take for all of them.
const TAKE_MAX: Duration = Duration::from_secs(60);
/// How much longer than asked for the node waits for a replica that is known to have more.
const LATE_MAX: Duration = Duration::from_secs(20);
/// Pause between looks whether it has come.
const LATE_STEP: Duration = Duration::from_millis(50);

/// A database that is not served yet, and the replicas that the node asks for what it may miss.
#[derive(Debug)]
pub(crate) struct Recovery {
    state: Mutex<RecoveryState>,
    /// Held while one replica is asked.
    turn: tokio::sync::Mutex<()>,
    /// The number of the last transaction that this node has by now.
    tip: watch::Sender<u64>,
}

#[derive(Debug)]
struct RecoveryState {
    /// Of this database: another one names other states.
    page_key: PageKey,
    /// None when no replica is asked any more.
    opening: Option<Opening>,
    /// Counts the replicas that were asked. The node takes nothing more from one of them when it
    /// asks the next one.
    asking: u64,
    replicas: HashMap<NodeId, Giver>,
}

/// What is known of a replica that has more than this node.
#[derive(Clone, Copy, Debug)]
struct Giver {
    /// The number of its last transaction.
    has: u64,
    /// It had nothing that goes on from this transaction.
    nothing_after: Option<u64>,
}

impl Recovery {
    pub(crate) fn new(opening: Opening) -> Arc<Recovery> {
        let tip = watch::Sender::new(opening.tip().number());
        let page_key = opening.page_key();
        let state = RecoveryState { page_key, opening: Some(opening), asking: 0, replicas: HashMap::new() };
        Arc::new(Recovery { state: Mutex::new(state), turn: tokio::sync::Mutex::default(), tip })
    }

    /// Asks for so long, and a while longer when a replica is known to have more. None the second
    /// time.
    pub(crate) async fn finish(self: &Arc<Self>, limit: Duration) -> Option<Opening> {
        let end = Instant::now() + limit;
        tokio::time::sleep_until(end).await;
        while Instant::now() < end + LATE_MAX {
            let turn = self.turn.lock().await;
            if !self.lock().misses_more() {
                break;
            }
            drop(turn);
            tokio::time::sleep(LATE_STEP).await;
        }
        // From here on the node asks no replica.
        let mut opening = self.lock().opening.take()?;
        blocking(move || {
            opening.abort();
            Ok(opening)
        })
        .await
        .ok()
    }

    /// When this node has more than before: a replica that had nothing for it may have something
    /// now.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.tip.subscribe()
    }

    /// Takes what this replica has, if it has what this node lacks. Returns why its stream ends
    /// then: it comes again, and is served.
    pub(super) async fn ask(
        self: &Arc<Self>,
        node: &NodeContext,
        hello: &Hello,
        units: &mut ReceivedUnits,
        sender: &StreamSender,
    ) -> Option<String> {
        // Before its turn: only then does the node wait for it.
        self.lock().note(hello);
        let _turn = self.turn.lock().await;
        let asking = self.begin().await?;
        units.expect_pages(node.database_keys.get().page);
        let welcome = self.lock().welcome(node, hello)?;
        let before = welcome.position;
        tracing::info!(node = %hello.peer.node, %before, "asking a replica for what this node may have lost");
        let mut bytes = BytesMut::new();
        wire::encode(&Message::Welcome(welcome), &mut bytes);
        let taken = async {
            let gone =
                |_| Error::peer(hello.peer.node.to_string(), PeerProblem::Connection("it left".into()));
            sender.send(bytes.freeze()).await.map_err(gone)?;
            self.take(asking, &hello.peer, units).await
        };
        let taken = match tokio::time::timeout(TAKE_MAX, taken).await {
            Ok(taken) => taken,
            Err(_) => Err(Error::Timeout { what: "a replica's records".into(), after: TAKE_MAX }),
        };
        if let Err(error) = &taken {
            node.report(Condition::RecordsMissing { node: hello.peer.node, error });
        }
        let position = self.settled().await.unwrap_or(before);
        let transactions = position.number().saturating_sub(before.number());
        if transactions > 0 {
            node.report(Condition::RecordsTaken { node: hello.peer.node, transactions, position });
        } else if is_all(&taken) {
            self.lock().has_nothing(hello.peer.node, position.number());
        }
        self.tip.send_replace(position.number());
        Some(format!("{transactions} transactions are taken back from this replica"))
    }

    /// Begins a replica's turn, and returns its number. Nothing of an earlier turn is left, nor
    /// comes any more.
    async fn begin(self: &Arc<Self>) -> Option<u64> {
        let asking = {
            let mut state = self.lock();
            state.asking += 1;
            state.asking
        };
        self.settled().await.ok()?;
        Some(asking)
    }

    /// The last whole transaction. The node forgets what is after it.
    async fn settled(self: &Arc<Self>) -> Result<Position> {
        let recovery = self.clone();
        blocking(move || {
            let mut state = recovery.lock();
            let opening = state.opening.as_mut().ok_or(Error::ShutDown)?;
            opening.abort();
            Ok(opening.tip())
        })
        .await
    }

    /// Takes records until the replica says that these are all.
    async fn take(self: &Arc<Self>, asking: u64, peer: &PeerInfo, units: &mut ReceivedUnits) -> Result<()> {
        let peer = peer.node.to_string();
        loop {
            let mut unit = units.next(SILENCE_MAX).await.map_err(|e| e.at(&peer))?;
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
                match units.now() {
                    Ok(next) => unit = next,
                    Err(error) => break Some(Err(Error::garbled(&peer, error.to_string()))),
                }
            };
            if !batch.is_empty() {
                let (recovery, peer) = (self.clone(), peer.clone());
                blocking(move || {
                    let mut state = recovery.lock();
                    let current = state.asking == asking;
                    state
                        .opening
                        .as_mut()
                        .filter(|_| current)
                        .ok_or(Error::ShutDown)?
                        .take(&batch)
                        .map_err(|error| error.of_peer(peer))
                })
                .await?;
            }
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, RecoveryState> {
        lock(&self.state)
    }
}

impl RecoveryState {
    /// The number of the last transaction of a replica that is further on in the same history, as
    /// far as both know it. Whether it does go on from here, its records say.
    fn ahead(&self, hello: &Hello) -> Option<u64> {
        let opening = self.opening.as_ref()?;
        let history = opening.history();
        let theirs = hello.position.filter(|_| !hello.suspect && hello.keys.page == self.page_key)?;
        let known = hello.history.last().is_some_and(|newest| history.iter().any(|start| start == newest));
        let ahead = theirs.number() > opening.tip().number();
        (known && ahead && history.place(theirs.txid()) == Place::OnHistory).then(|| theirs.number())
    }

    fn note(&mut self, hello: &Hello) {
        if let Some(has) = self.ahead(hello) {
            let replica = Giver { has, nothing_after: None };
            self.replicas.entry(hello.peer.node).or_insert(replica).has = has;
        }
    }

    fn has_nothing(&mut self, replica: NodeId, after: u64) {
        if let Some(replica) = self.replicas.get_mut(&replica) {
            replica.nothing_after = Some(after);
        }
    }

    /// Whether a replica may give more than this node has.
    fn misses_more(&self) -> bool {
        let Some(opening) = &self.opening else { return false };
        let tip = opening.tip().number();
        self.replicas.values().any(|replica| replica.has > tip && replica.nothing_after != Some(tip))
    }

    /// What a replica is told that has more; nothing when it has not.
    fn welcome(&self, node: &NodeContext, hello: &Hello) -> Option<Welcome> {
        let opening = self.opening.as_ref()?;
        self.ahead(hello)?;
        let tip = opening.tip();
        let known = self.replicas.get(&hello.peer.node);
        (known.is_none_or(|replica| replica.nothing_after != Some(tip.number()))).then(|| Welcome {
            peer: node.me.clone(),
            epoch: opening.history().epoch(),
            plan: Plan::Recover,
            position: tip,
            page_size: opening.page_size(),
            keys: PeerKeys::of(node.database_keys.get(), true),
            packed: false,
        })
    }
}

/// Whether a replica has nothing more, or nothing that can be taken; not when it, or this node, was
/// hindered.
fn is_all(taken: &Result<()>) -> bool {
    match taken {
        Ok(()) | Err(Error::Peer { problem: PeerProblem::Garbled(_) | PeerProblem::Mismatch { .. }, .. }) => {
            true
        }
        Err(_) => false,
    }
}
