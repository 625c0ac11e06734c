//! What a primary that hands its lease over tells its replicas, and what the one that is to have
//! the lease answers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot, watch};

use crate::lease::record::{BOOT_MAX_BYTES, RECORD_MAX_BYTES};
use crate::lock::lock;
use crate::secret::Rights;
use crate::status::PeerInfo;
use crate::txid::Position;
use crate::wire::{
    self, Accept, BOOT_ID_MAX_BYTES, Handed, HandoffStage, LEASE_RECORD_MAX_BYTES, LeaseOffer, Message,
};

/// What may wait to be put on one stream. An election makes one offer at a time.
const WORDS_MAX: usize = 4;
/// Offers of one stream that have no answer yet. The election gave the older ones up.
const PENDING_MAX: usize = 4;

const _: () = assert!(RECORD_MAX_BYTES <= LEASE_RECORD_MAX_BYTES && BOOT_MAX_BYTES <= BOOT_ID_MAX_BYTES);

/// Why an offer came to nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum NotAccepted {
    /// None of its streams has all of the log, or its stream ended.
    #[error("it is not connected, or its stream ended")]
    Gone,
    /// It has not answered earlier ones.
    #[error("it does not answer")]
    Busy,
    /// It does not take it, and says why.
    #[error("it declined: {0}")]
    Declined(String),
}

/// The streams to which a lease can be offered, and how far a handoff is.
#[derive(Clone, Debug)]
pub(crate) struct Handoffs {
    streams: Arc<Mutex<Vec<Followed>>>,
    stage: watch::Sender<HandoffStage>,
}

impl Default for Handoffs {
    fn default() -> Handoffs {
        Handoffs { streams: Arc::default(), stage: watch::Sender::new(HandoffStage::GoesOn) }
    }
}

/// A replica that follows the log, and the way to tell it something.
type Followed = (PeerInfo, mpsc::Sender<Word>);

/// What one replica is told.
#[derive(Debug)]
enum Word {
    Offer(LeaseOffer, oneshot::Sender<Result<String, NotAccepted>>),
    /// Encoded.
    Handed(Bytes),
}

impl Handoffs {
    /// How far a handoff is. All replicas are told, those that come later, too.
    pub(super) fn tell(&self, stage: HandoffStage) {
        self.stage.send_if_modified(|now| std::mem::replace(now, stage) != stage);
    }

    pub(super) fn is_done(&self) -> bool {
        *self.stage.borrow() == HandoffStage::Done
    }

    /// Offers the lease, and waits for the answer: the id of the boot of the replica's machine.
    ///
    /// # Cancel safety
    /// What was offered stays so. The answer comes to nothing.
    pub(super) async fn offer(&self, to: &PeerInfo, offer: LeaseOffer) -> Result<String, NotAccepted> {
        let (reply, answer) = oneshot::channel();
        self.send(to, Word::Offer(offer, reply))?;
        answer.await.unwrap_or(Err(NotAccepted::Gone))
    }

    /// Says that the swap was done. Where that has no room, the replica finds the record by itself.
    pub(super) fn handed(&self, to: &PeerInfo, handed: &Handed<'_>) -> Result<(), NotAccepted> {
        if !handed.fits() {
            return Ok(());
        }
        let mut bytes = BytesMut::new();
        wire::encode(&Message::Handed(handed.clone()), &mut bytes);
        self.send(to, Word::Handed(bytes.freeze()))
    }

    fn send(&self, to: &PeerInfo, word: Word) -> Result<(), NotAccepted> {
        let mut streams = lock(&self.streams);
        streams.retain(|(_, words)| !words.is_closed());
        let is_to = |peer: &PeerInfo| (peer.node, peer.incarnation) == (to.node, to.incarnation);
        let newest = streams.iter().rev().find(|(peer, _)| is_to(peer));
        let (_, words) = newest.ok_or(NotAccepted::Gone)?;
        words.try_send(word).map_err(|full| match full {
            mpsc::error::TrySendError::Full(_) => NotAccepted::Busy,
            mpsc::error::TrySendError::Closed(_) => NotAccepted::Gone,
        })
    }

    /// The two ends of a new stream: where words come out, and where answers go in.
    pub(super) fn open(&self, peer: &PeerInfo, rights: Rights) -> (StreamWords, Accepts) {
        let accepts = Accepts::default();
        let words = StreamWords {
            handoffs: self.clone(),
            peer: peer.clone(),
            rights,
            words: None,
            next: None,
            pending: accepts.clone(),
            stage: self.stage.subscribe(),
            told: HandoffStage::GoesOn,
        };
        (words, accepts)
    }
}

/// The end that speaks.
#[derive(Debug)]
pub(super) struct StreamWords {
    handoffs: Handoffs,
    peer: PeerInfo,
    rights: Rights,
    /// None while the replica has not got to the log yet, and on the stream of a follower.
    words: Option<mpsc::Receiver<Word>>,
    /// It waits until all of the log is sent.
    next: Option<Word>,
    pending: Accepts,
    stage: watch::Receiver<HandoffStage>,
    told: HandoffStage,
}

impl StreamWords {
    /// From now on the stream sends the log: this replica can be offered the lease, unless it is a
    /// follower.
    pub(super) fn follows(&mut self) {
        if self.rights == Rights::Follower {
            return;
        }
        let (sender, words) = mpsc::channel(WORDS_MAX);
        self.words = Some(words);
        let mut streams = lock(&self.handoffs.streams);
        streams.retain(|(_, words)| !words.is_closed());
        streams.push((self.peer.clone(), sender));
    }

    /// The stage, where the replica was not told.
    pub(super) fn stage(&mut self) -> Option<HandoffStage> {
        let now = *self.stage.borrow_and_update();
        (std::mem::replace(&mut self.told, now) != now).then_some(now)
    }

    /// Returns when there is something to say.
    ///
    /// # Cancel safety
    /// Nothing is lost by dropping the future.
    pub(super) async fn changed(&mut self) {
        let next = async {
            match &mut self.words {
                Some(words) if self.next.is_none() => words.recv().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(word) = next => self.next = Some(word),
            Ok(()) = self.stage.changed() => {}
            // The senders outlive the stream.
            else => std::future::pending().await,
        }
    }

    /// What to say next, encoded. All of the log is sent, and `tip` is its end.
    pub(super) fn now(&mut self, tip: Option<Position>) -> Option<Bytes> {
        loop {
            let next = self.next.take().or_else(|| self.words.as_mut()?.try_recv().ok())?;
            match next {
                Word::Handed(bytes) => return Some(bytes),
                // Something was committed after what is offered.
                Word::Offer(offer, reply) if tip != Some(offer.position) => {
                    let _ = reply.send(Err(NotAccepted::Gone));
                }
                Word::Offer(offer, reply) => {
                    if self.pending.begin(offer.attempt, reply) {
                        let mut bytes = BytesMut::new();
                        wire::encode(&Message::Offer(offer), &mut bytes);
                        return Some(bytes.freeze());
                    }
                }
            }
        }
    }
}

/// The end that hears.
#[derive(Clone, Debug, Default)]
pub(super) struct Accepts(Arc<Mutex<VecDeque<PendingOffer>>>);

type PendingOffer = (u128, oneshot::Sender<Result<String, NotAccepted>>);

impl Accepts {
    /// False: too many have no answer.
    fn begin(&self, attempt: u128, reply: oneshot::Sender<Result<String, NotAccepted>>) -> bool {
        let mut pending = lock(&self.0);
        if pending.len() >= PENDING_MAX {
            let _ = reply.send(Err(NotAccepted::Busy));
            return false;
        }
        pending.push_back((attempt, reply));
        true
    }

    /// An answer came. False when no one asked.
    pub(super) fn answered(&self, accept: Accept) -> bool {
        let mut pending = lock(&self.0);
        let Some(at) = pending.iter().position(|(attempt, _)| *attempt == accept.attempt) else {
            return false;
        };
        if let Some((_, reply)) = pending.remove(at) {
            // The one that asked may have given up.
            let _ = reply.send(accept.answer.map_err(NotAccepted::Declined));
        }
        true
    }
}
