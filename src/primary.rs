//! Serves this node's history to replicas: catch up from the log or by a snapshot, then every
//! commit.

mod acks;
mod boundary;
mod clock;
#[cfg(test)]
pub(crate) mod fake;
mod handoff;
mod key_search;
#[cfg(test)]
mod model;
mod page_requests;
mod plan;
mod read_ahead;
mod recovery;
mod registry;
mod send_queue;
mod source;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::context::{NodeContext, Seldom};
use crate::error::{Error, Result};
use crate::handshake::{Knock, Nonce};
use crate::net::Incoming;
use crate::report::Condition;
use crate::secret::{Proved, Rights};
use crate::status::{PeerInfo, ReplicaStatus};
use crate::threads::blocking;
use crate::txid::Position;
use crate::wire::{
    self, Goodbye, Handed, HandoffStage, Hello, LeaseOffer, Message, NOT_PRIMARY, SHUTTING_DOWN,
};

pub(crate) use handoff::NotAccepted;
pub(crate) use key_search::KeySearch;
pub(crate) use page_requests::{PeerChannel, QUESTION_BYTES};
pub(crate) use recovery::Recovery;
pub(crate) use registry::{Conflict, Credentials};
pub(crate) use send_queue::{StreamReceiver, StreamSender, queue};
pub(crate) use source::{LogPin, StreamSource};

use acks::{ReceivedUnits, acks, hello};
use clock::ReplicaClock;
use handoff::Handoffs;
use page_requests::PeerChannels;
use registry::Registry;
use send_queue::Closed;
use stream::{End, ReplicaStream};

/// Replicas that are served at one time, a database.
pub(crate) const STREAMS_MAX: usize = 64;
/// Followers among them: they leave room for members.
pub(crate) const FOLLOWERS_MAX: usize = 32;
/// Peers at one time that knocked and have not said hello, half of them followers at the most. They
/// have a cap of their own: recorded knocks can't take the places of the replicas.
pub(crate) const HANDSHAKES_MAX: usize = 32;
/// Replicas whose pages are compared with ours at one time; more wait. Each costs a hash of the
/// whole database.
const COMPARISONS_MAX: usize = 2;
/// The same for followers: no member waits for them.
const FOLLOWERS_COMPARISONS_MAX: usize = 1;
/// How long a node that drains waits for what its replicas have sent to its application.
const LAST_REQUESTS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a stream may go on after that, until it has sent what is captured.
const LAST_RECORDS_TIMEOUT: Duration = Duration::from_secs(1);
/// What a peer is told when this node's replication has failed.
const STOPPED: &str = "replication stopped on the primary";
/// Why a stream ends when the secret that let it in was dropped.
const DROPPED: &str = "the secret that this stream was opened with is not valid any more";
/// Why a stream ends when the peer's key was shut out.
const SHUT_OUT: &str = "this replica's key is shut out";
/// Why a stream ends when the same node opened another.
const REPLACED: &str = "a newer stream of this node took over";
/// Questions of a heal that may wait to be answered. A replica waits for the answer before it asks
/// the next one.
const WANTS_MAX: usize = 1;
/// Longest wait until a last word is handed to the connection.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a node has to serve.
#[derive(Clone)]
enum Serving {
    /// It is not the primary.
    Nothing,
    /// It will be, and lacks the keys of the database, which a replica may have.
    Keys(Arc<KeySearch>),
    /// It will be, when replicas had the time to give back what a power cut took.
    Recovery(Arc<Recovery>),
    StreamSource(Arc<dyn StreamSource>),
    /// It is about to be the primary no more: streams go on to their end, and no other begins.
    Leaving(Arc<dyn StreamSource>),
}

/// What there is to serve on this node, if it is the primary, and who is being served.
pub(crate) struct ReplicaServer {
    node: Arc<NodeContext>,
    serving: watch::Sender<Serving>,
    registry: Registry,
    channels: PeerChannels,
    handoffs: Handoffs,
    streams: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    comparisons: Arc<Semaphore>,
    followers: Arc<Semaphore>,
    followers_comparisons: Arc<Semaphore>,
    refusals: Seldom,
}

impl ReplicaServer {
    /// A source that has nothing yet.
    pub(crate) fn new(node: Arc<NodeContext>) -> Arc<ReplicaServer> {
        Arc::new(ReplicaServer {
            node,
            serving: watch::Sender::new(Serving::Nothing),
            registry: Registry::default(),
            channels: PeerChannels::default(),
            handoffs: Handoffs::default(),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            comparisons: Arc::new(Semaphore::new(COMPARISONS_MAX)),
            followers: Arc::new(Semaphore::new(FOLLOWERS_MAX)),
            followers_comparisons: Arc::new(Semaphore::new(FOLLOWERS_COMPARISONS_MAX)),
            refusals: Seldom::default(),
        })
    }

    /// From now on this node is the primary with this database, or (`None`) it is not the primary.
    /// Streams of what it had before end.
    pub(crate) fn set(&self, source: Option<Arc<dyn StreamSource>>) {
        if source.is_some() {
            self.handoffs.tell(HandoffStage::GoesOn);
        }
        self.serving.send_replace(source.map_or(Serving::Nothing, Serving::StreamSource));
    }

    /// The same for a source that may be served already: its streams go on then.
    pub(crate) fn go_on(&self, source: Arc<dyn StreamSource>) {
        self.handoffs.tell(HandoffStage::GoesOn);
        self.serving.send_if_modified(|serving| {
            if matches!(serving, Serving::StreamSource(_)) {
                return false;
            }
            *serving = Serving::StreamSource(source);
            true
        });
    }

    /// Until something else is said, replicas are asked for the keys of the database.
    pub(crate) fn find_keys(&self, search: Arc<KeySearch>) {
        self.serving.send_replace(Serving::Keys(search));
    }

    /// Until it is served, replicas are asked for what the database may miss.
    pub(crate) fn recover(&self, recovery: Arc<Recovery>) {
        self.serving.send_replace(Serving::Recovery(recovery));
    }

    /// Streams end when they have sent what is still to be sent ([`StreamSource::last`]), and no
    /// other begins.
    pub(crate) fn leave(&self) {
        self.serving.send_if_modified(|serving| {
            let Serving::StreamSource(source) = serving else { return false };
            *serving = Serving::Leaving(source.clone());
            true
        });
    }

    /// Whether this node is the primary, or is about to be.
    pub(crate) fn serves(&self) -> bool {
        !matches!(*self.serving.borrow(), Serving::Nothing | Serving::Leaving(_))
    }

    /// What there is to serve, once it is there; an end for a replica that gave what this node
    /// lacked. Nothing is taken of a follower, which waits.
    async fn source(
        &self,
        (hello, rights): (&Hello, Rights),
        units: &mut ReceivedUnits,
        sender: &StreamSender,
    ) -> Result<Arc<dyn StreamSource>, End> {
        let mut serving = self.serving.subscribe();
        let search = match &*serving.borrow() {
            Serving::Keys(search) => Some(search.clone()),
            _ => None,
        };
        if let Some(search) = search {
            if rights == Rights::Member {
                search.offer(hello);
            }
            let over = serving.wait_for(|serving| !matches!(serving, Serving::Keys(_))).await;
            over.map_err(|_| Error::ShutDown)?;
        }
        let recovery = match &*serving.borrow() {
            Serving::Recovery(recovery) if rights == Rights::Member => Some(recovery.clone()),
            _ => None,
        };
        if let Some(recovery) = recovery {
            let mut moved = recovery.watch();
            loop {
                moved.mark_unchanged();
                if let Some(end) = recovery.ask(&self.node, hello, units, sender).await {
                    return Err(End::Said(end));
                }
                tokio::select! {
                    over = serving.wait_for(|serving| !matches!(serving, Serving::Recovery(_))) => {
                        over.map_err(|_| Error::ShutDown)?;
                        break;
                    }
                    // What this replica has may go on from there.
                    Ok(()) = moved.changed() => {}
                }
            }
        }
        let serving = serving.wait_for(|serving| !matches!(serving, Serving::Recovery(_))).await;
        match &*serving.map_err(|_| Error::ShutDown)? {
            Serving::StreamSource(source) => Ok(source.clone()),
            Serving::Leaving(_) => Err(End::Said(NOT_PRIMARY.into())),
            _ => Err(End::Said(SHUTTING_DOWN.into())),
        }
    }

    /// A peer is not let in. Anyone who recorded a knock can have that as often as he likes, so a
    /// log line says it only now and then.
    pub(crate) fn refused(&self, knock: &Knock, why: impl std::fmt::Display) {
        match self.refusals.happened() {
            Some(times) => {
                let (node, key) = (knock.node, knock.binding.client());
                self.node.report(Condition::PeerRefused { node, key, times, why: &why });
            }
            None => tracing::debug!(node = %knock.node, "refused a peer: {why}"),
        }
    }

    /// The replicas that are connected.
    pub(crate) fn replicas(&self) -> Vec<ReplicaStatus> {
        self.registry.list()
    }

    /// Ways to ask the replicas that are connected.
    pub(crate) fn channels(&self) -> Vec<PeerChannel> {
        self.channels.list()
    }

    /// Tells all replicas how far a handoff of the lease is.
    pub(crate) fn tell_handoff(&self, stage: HandoffStage) {
        self.handoffs.tell(stage);
    }

    /// Whether the replicas were told that another node has the lease, and all that is here.
    pub(crate) fn has_handed(&self) -> bool {
        self.handoffs.is_done()
    }

    /// Offers the lease to a replica, which has everything up to this position then: the last one
    /// of this node's log, to which nothing is added. Returns the id of the boot of its machine.
    /// The caller limits the time.
    ///
    /// # Cancel safety
    /// What was offered stays so. An answer that comes later is nothing to anyone.
    pub(crate) async fn offer(
        &self,
        to: &PeerInfo,
        attempt: u128,
        position: Position,
    ) -> Result<String, NotAccepted> {
        self.handoffs.offer(to, LeaseOffer { attempt, position }).await
    }

    /// Tells the replica that accepted that it has the lease. Waits for nothing, and says so only
    /// where a stream stands: the replica finds the record in the store, too.
    pub(crate) fn handed(&self, to: &PeerInfo, attempt: u128, version: &str, record: &[u8]) {
        if let Err(error) = self.handoffs.handed(to, &Handed { attempt, version, record }) {
            tracing::debug!(node = %to.node, %error, "the new primary is not told");
        }
    }

    /// Whether another live process serves under this node id.
    pub(crate) fn conflict(&self, knock: &Knock, rights: Rights) -> Option<Conflict> {
        if knock.node == self.node.me.node {
            return Some(Conflict { key: self.node.channel.key() });
        }
        let by = Credentials { key: knock.binding.client(), rights };
        self.registry.conflict((knock.node, knock.incarnation), by)
    }

    /// A place for a handshake, if there is one, and if there is room for one more replica.
    pub(crate) fn place(&self, rights: Rights) -> Option<OwnedSemaphorePermit> {
        let full = match rights {
            Rights::Member => self.streams.available_permits() == 0,
            Rights::Follower => {
                let left = self.streams.available_permits().min(self.followers.available_permits());
                left == 0 || self.handshakes.available_permits() <= HANDSHAKES_MAX / 2
            }
        };
        if full { None } else { self.handshakes.clone().try_acquire_owned().ok() }
    }

    /// A place for a stream.
    fn stream_place(&self, rights: Rights) -> Option<StreamPlace> {
        let follower = match rights {
            Rights::Member => None,
            Rights::Follower => Some(self.followers.clone().try_acquire_owned().ok()?),
        };
        Some(StreamPlace(self.streams.clone().try_acquire_owned().ok()?, follower))
    }

    /// Whose turn it is to have all pages compared.
    fn comparisons(&self, rights: Rights) -> Arc<Semaphore> {
        match rights {
            Rights::Member => self.comparisons.clone(),
            Rights::Follower => self.followers_comparisons.clone(),
        }
    }

    /// The peer's hello, and by which secret it is proved. None: the peer is refused.
    async fn greeted(&self, peer: &Peer, units: &mut ReceivedUnits) -> Option<(Hello, Proved)> {
        let hello = tokio::select! {
            hello = hello(&self.node, peer, units) => hello,
            () = self.node.drain.cancelled() => Err(Error::ShutDown),
        };
        // The peer proved nothing by a fresh nonce, so it is told nothing: the stream breaks off.
        hello.inspect_err(|error| self.refused(&peer.knock, error)).ok()
    }

    /// Returns when this is not what there is to serve any more.
    async fn withdrawn(&self, source: &Arc<dyn StreamSource>) -> End {
        let other = |now: &Serving| match now {
            Serving::StreamSource(now) | Serving::Leaving(now) => !Arc::ptr_eq(now, source),
            Serving::Nothing | Serving::Keys(_) | Serving::Recovery(_) => true,
        };
        // The sender is ours.
        let _ = self.serving.subscribe().wait_for(other).await;
        // A node that is closed withdraws what it serves, too.
        End::Said(if self.node.stop.is_cancelled() { SHUTTING_DOWN } else { NOT_PRIMARY }.into())
    }

    /// Returns when no replica is served any more. For a node that drains: it lets none in
    /// meanwhile.
    pub(crate) async fn deserted(&self) {
        // In this order, because a peer that is let in goes from the one to the other. Neither is
        // ever closed.
        let _ = self.handshakes.acquire_many(HANDSHAKES_MAX as u32).await;
        let _ = self.streams.acquire_many(STREAMS_MAX as u32).await;
    }
}

/// A peer whose knock was answered.
pub(crate) struct Peer {
    pub(crate) knock: Knock,
    /// The nonce that it was answered with.
    pub(crate) nonce: Nonce,
    /// By which secret it knocked.
    pub(crate) proved: Proved,
    pub(crate) place: OwnedSemaphorePermit,
}

/// One among the streams, and perhaps among those of followers.
struct StreamPlace(
    #[expect(dead_code, reason = "it is held")] OwnedSemaphorePermit,
    #[expect(dead_code, reason = "it is held")] Option<OwnedSemaphorePermit>,
);

/// Serves one replica until it leaves, lags, lies or the node stops.
pub(crate) async fn serve(
    replica_server: Arc<ReplicaServer>,
    peer: Peer,
    upstream: Incoming,
    sender: StreamSender,
) {
    let node = replica_server.node.clone();
    let mut units = ReceivedUnits::new(upstream);
    let Some((hello, proved)) = replica_server.greeted(&peer, &mut units).await else { return };
    let Peer { place, knock, .. } = peer;
    let peer = hello.peer.clone();
    let rights = proved.rights();
    let by = Credentials { key: knock.binding.client(), rights };
    let Some(_stream) = replica_server.stream_place(rights) else {
        return farewell(sender, "too many replicas".into()).await;
    };
    drop(place);
    let slot = match replica_server.registry.join(&peer, by) {
        Ok(slot) => slot,
        Err(conflict) => {
            replica_server.refused(&knock, conflict.words(by.key));
            return farewell(sender, "duplicate node id".into()).await;
        }
    };
    node.report(Condition::ReplicaJoined { peer: &peer, key: by.key, follower: by.is_follower() });

    let source = tokio::select! {
        source = replica_server.source((&hello, rights), &mut units, &sender) => source,
        () = node.drain.cancelled() => Err(End::Said(SHUTTING_DOWN.into())),
        () = slot.replaced() => Err(End::Said(REPLACED.into())),
        end = unwelcome(&node, by, proved) => Err(end),
    };
    let source = match source {
        Ok(source) => source,
        Err(end) => {
            left(&node, (&peer, by), &end);
            drop(slot);
            return last_word(Some(sender), end).await;
        }
    };
    let of = source.clone();
    let (questions, answers) = replica_server.channels.open(&peer, rights);
    let clock = ReplicaClock::default();
    let turns = replica_server.comparisons(rights);
    let (words, accepts) = replica_server.handoffs.open(&peer, rights);
    let heard = (questions, words);
    let mut stream = ReplicaStream::new(node.clone(), source, sender, heard, (turns, clock.clone()), rights);
    let (asks, wants) = mpsc::channel(WANTS_MAX);
    let quiet = stream.quiet();
    let end = tokio::select! {
        end = stream.run(&hello, wants) => end,
        end = acks(&node, &mut units, &slot, &clock, &asks, (&answers, &accepts), &quiet) => end,
        () = cut_off(&node) => End::Said(SHUTTING_DOWN.into()),
        // No replica gets what it commits from now on.
        () = node.stopped() => End::Said(STOPPED.into()),
        end = replica_server.withdrawn(&of) => end,
        () = slot.replaced() => End::Said(REPLACED.into()),
        end = unwelcome(&node, by, proved) => end,
    };
    left(&node, (&peer, by), &end);
    drop(slot);
    last_word(stream.sender_between_units(), end).await;
}

/// Returns when a peer that was let in would be let in no more.
async fn unwelcome(node: &NodeContext, by: Credentials, proved: Proved) -> End {
    tokio::select! {
        () = node.keys.dropped(proved) => End::Said(DROPPED.into()),
        () = node.channel.shut_out(by.key) => End::Said(SHUT_OUT.into()),
    }
}

/// Says why a stream ends, where it may still be said.
async fn last_word(sender: Option<StreamSender>, end: End) {
    let reason = match end {
        End::Left => return,
        End::Said(reason) => reason,
        End::Failed(error) => error.to_string(),
    };
    if let Some(sender) = sender {
        farewell(sender, reason).await;
    }
}

/// Returns when a stream must end, whether it has sent everything or not.
async fn cut_off(node: &NodeContext) {
    node.drain.cancelled().await;
    // Without a limit a replica that takes nothing would hold up the end of the application's
    // server.
    let _ = tokio::time::timeout(LAST_REQUESTS_TIMEOUT + LAST_RECORDS_TIMEOUT, node.stop.cancelled()).await;
}

fn left(node: &NodeContext, (peer, by): (&PeerInfo, Credentials), end: &End) {
    let key = by.key;
    node.report(match end {
        // Its connection was cut, which the stream may see first.
        _ if node.channel.is_shut_out(key) => Condition::ReplicaSentAway { peer, key, reason: SHUT_OUT },
        End::Left => Condition::ReplicaLeft { peer, key },
        End::Said(reason) => Condition::ReplicaSentAway { peer, key, reason },
        End::Failed(error) => Condition::ReplicaFailed { peer, key, error },
    });
}

/// The last word, and a clean end; a peer that takes nothing any more gets a broken stream instead.
async fn farewell(sender: StreamSender, reason: String) {
    let last = async {
        let mut bytes = BytesMut::new();
        wire::encode(&Message::Goodbye(Goodbye { reason }), &mut bytes);
        sender.send(bytes.freeze()).await?;
        sender.finish().await
    };
    if !matches!(tokio::time::timeout(GOODBYE_TIMEOUT, last).await, Ok(Ok(()))) {
        tracing::debug!("a peer did not take the last word");
    }
}

impl From<Closed> for End {
    fn from(_: Closed) -> End {
        End::Left
    }
}

/// The error of a body that ended without a clean end.
fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the stream was broken off")
}
