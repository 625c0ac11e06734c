//! What comes from a replica: its hello, acknowledgements, questions and answers.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::checksum::PageKey;
use crate::context::NodeContext;
use crate::error::{Error, PeerProblem, Result};
use crate::handshake;
use crate::net::Incoming;
use crate::primary::Peer;
use crate::primary::clock::ReplicaClock;
use crate::primary::handoff::Accepts;
use crate::primary::page_requests::Answers;
use crate::primary::registry::ReplicaSlot;
use crate::primary::stream::End;
use crate::secret::Proved;
use crate::wire::{Decoder, HELLO_MAX_BYTES, Hello, Kind, Message, Unit, Want, WireError};

/// Longest wait for more of a hello after a knock.
const HELLO_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Longest wait for all of it: with the longest history, on a slow link.
const HELLO_TIMEOUT: Duration = Duration::from_secs(60);
/// A replica of which nothing came for this long is gone: it acknowledges each second. On a slow
/// link pages that it sends come before the next acknowledgement, and count, too.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(15);

/// The hello, and by which secret it is proved.
pub(super) async fn hello(
    node: &NodeContext,
    peer: &Peer,
    units: &mut ReceivedUnits,
) -> Result<(Hello, Proved)> {
    let name = peer.knock.node.to_string();
    let unit = match tokio::time::timeout(HELLO_TIMEOUT, units.next(HELLO_SILENCE_MAX)).await {
        Ok(unit) => unit.map_err(|e| e.at(&name))?,
        Err(_) => {
            let slow = format!("its hello took longer than {HELLO_TIMEOUT:?}");
            return Err(Error::peer(name, PeerProblem::Connection(slow)));
        }
    };
    let Some(unit) = unit else {
        return Err(Error::peer(name, PeerProblem::Connection("ended before its hello".into())));
    };
    if unit.kind != Kind::Hello {
        return Err(Error::garbled(name, format!("{:?} in place of a hello", unit.kind)));
    }
    let message = unit.decode().map_err(|e| Error::garbled(&name, e.to_string()))?;
    let Message::Hello(hello) = message else {
        return Err(Error::garbled(name, "a hello that is none"));
    };
    let proved = handshake::hello_holds(&hello, unit.payload(), &peer.knock, &peer.nonce, &node.keys);
    // It was answered as one that has the rights of its knock.
    let proved = proved.filter(|proved| proved.rights() == peer.proved.rights());
    proved.map(|proved| (hello, proved)).ok_or_else(|| Error::peer(name, PeerProblem::Secret))
}

/// Reads acknowledgements, and what a heal asks for, until the replica leaves, is silent for too
/// long or sends something else.
pub(super) async fn acks(
    node: &NodeContext,
    units: &mut ReceivedUnits,
    slot: &ReplicaSlot,
    clock: &ReplicaClock,
    asks: &mpsc::Sender<Want>,
    (answers, accepts): (&Answers, &Accepts),
    quiet: &CancellationToken,
) -> End {
    units.expect_pages(node.database_keys.get().page);
    let peer = slot.node().to_string();
    loop {
        let unit = match units.now() {
            Ok(Some(unit)) => unit,
            Ok(None) => match units.more(SILENCE_MAX).await {
                Ok(true) => {
                    slot.alive();
                    continue;
                }
                Ok(false) => return End::Left,
                Err(Unheard::Silent(limit)) => {
                    return End::Said(format!("nothing was heard from this replica for {limit:?}"));
                }
                Err(error) => return End::Failed(error.at(&peer)),
            },
            Err(error) => return End::Failed(Error::garbled(peer, error.to_string())),
        };
        match unit.decode() {
            Ok(Message::Ack(ack)) => {
                clock.said(ack.clock);
                // A word for an epoch that is over counts for nothing.
                if node.is_superseded() { slot.alive() } else { slot.heard(ack) }
            }
            Ok(Message::Want(want)) => {
                // One question at a time, and none outside of a heal.
                if asks.try_send(want).is_err() {
                    return End::Failed(Error::garbled(peer, "a question out of place"));
                }
            }
            Ok(Message::SnapPiece { run, .. }) if answers.pages(run.first(), run.bytes()) => {}
            Ok(Message::Sent(sent)) if answers.end(sent) => {}
            Ok(Message::Accept(accept)) => {
                if !accepts.answered(accept) {
                    return End::Failed(Error::garbled(peer, "an answer to no offer"));
                }
            }
            Ok(Message::Drain) => quiet.cancel(),
            Ok(Message::Goodbye(_)) => return End::Left,
            Ok(_) => {
                let what = format!("{:?} in place of an acknowledgement", unit.kind);
                return End::Failed(Error::garbled(peer, what));
            }
            Err(error) => return End::Failed(Error::garbled(peer, error.to_string())),
        }
    }
}

/// The units of a request's body.
pub(super) struct ReceivedUnits {
    upstream: Incoming,
    decoder: Decoder,
}

/// Why there is no next unit.
#[derive(Debug)]
pub(super) enum Unheard {
    /// Nothing came for so long.
    Silent(Duration),
    Garbled(WireError),
}

impl Unheard {
    /// As an error of this peer.
    pub(super) fn at(self, peer: &str) -> Error {
        match self {
            Unheard::Silent(limit) => Error::peer(peer, PeerProblem::Silent(limit)),
            Unheard::Garbled(error) => Error::garbled(peer, error.to_string()),
        }
    }
}

impl From<WireError> for Unheard {
    fn from(error: WireError) -> Unheard {
        Unheard::Garbled(error)
    }
}

impl ReceivedUnits {
    /// The first of them is to be a hello.
    pub(super) fn new(upstream: Incoming) -> ReceivedUnits {
        let mut decoder = Decoder::default();
        decoder.expect_at_most(HELLO_MAX_BYTES);
        ReceivedUnits { upstream, decoder }
    }

    /// From now on pages may come, which are hashed with this key.
    pub(super) fn expect_pages(&mut self, key: PageKey) {
        self.decoder.set_page_key(key);
    }

    /// The next unit; `None` when the body ended, or broke off, as connections do. A unit may take
    /// longer than the limit to come, as long as something comes.
    pub(super) async fn next(&mut self, silence: Duration) -> Result<Option<Unit>, Unheard> {
        loop {
            if let Some(unit) = self.now()? {
                return Ok(Some(unit));
            }
            if !self.more(silence).await? {
                return Ok(None);
            }
        }
    }

    /// The next unit if it has come.
    pub(super) fn now(&mut self) -> Result<Option<Unit>, WireError> {
        self.decoder.next()
    }

    /// Waits for more bytes of it; false when the body ended.
    async fn more(&mut self, silence: Duration) -> Result<bool, Unheard> {
        match tokio::time::timeout(silence, self.upstream.next()).await {
            Ok(Some(Ok(bytes))) => {
                self.decoder.push(bytes);
                Ok(true)
            }
            Ok(Some(Err(_)) | None) => Ok(false),
            Err(_) => Err(Unheard::Silent(silence)),
        }
    }
}
