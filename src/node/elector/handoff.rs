//! The lease goes from this node to a replica, or comes to this node from its primary.

use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::context::HandoffWord;
use crate::election::{Command, Input, NotHanded};
use crate::error::{Error, Result};
use crate::lease::Version;
use crate::lease::record::{Attempt, Record};
use crate::node::elector::perform::RoleTask;
use crate::node::elector::withhold::Withhold;
use crate::node::elector::{Drive, Elector};
use crate::peer::NodeId;
use crate::report::Condition;
use crate::status::PeerInfo;
use crate::wire::HandoffStage;

/// A caller that asks for a handoff, to this node or to the best one.
pub(super) type HandoffAsk = (Option<NodeId>, oneshot::Sender<Result<NodeId>>);

impl Elector {
    /// Hands the lease over: to this node, or to the best one. Returns who has it.
    ///
    /// # Errors
    /// [`Error::NotPrimary`], [`Error::HandoffFailed`] and [`Error::ShutDown`].
    ///
    /// # Cancel safety
    /// What was begun goes on.
    pub(crate) async fn handoff(&self, to: Option<NodeId>) -> Result<NodeId> {
        let (reply, answer) = oneshot::channel();
        self.handoffs.send((to, reply)).await.map_err(|_| Error::ShutDown)?;
        answer.await.unwrap_or(Err(Error::ShutDown))
    }
}

/// What a driver knows of handoffs.
#[derive(Default)]
pub(super) struct Handing {
    /// Who asked for the one that is under way.
    askers: Vec<oneshot::Sender<Result<NodeId>>>,
    /// Who asks just now.
    asks: Option<oneshot::Sender<Result<NodeId>>>,
    /// Gives up what is withheld.
    withholds: Option<CancellationToken>,
    /// The lease was offered, and it is not known yet whose it is.
    offers: bool,
    /// What this node is offered, and where the answer goes.
    offered: Option<(Attempt, oneshot::Sender<Result<String, String>>)>,
}

impl Handing {
    /// The role changes in another way: what is withheld is given up.
    pub(super) fn give_up(&mut self) {
        if let Some(withholds) = self.withholds.take() {
            withholds.cancel();
        }
    }

    /// Whether the lease was offered to another node.
    pub(super) fn offers(&self) -> bool {
        self.offers
    }

    /// This node's answer to an offer.
    pub(super) fn answer(&mut self, attempt: Attempt, answer: Result<String, String>) {
        if let Some((_, reply)) = self.offered.take_if(|(of, _)| *of == attempt) {
            // The stream may have ended.
            let _ = reply.send(answer);
        }
    }
}

impl Drive {
    /// Someone asks for a handoff.
    pub(super) async fn ask_handoff(&mut self, (to, reply): HandoffAsk) {
        self.handing.askers.retain(|asker| !asker.is_closed());
        self.handing.asks = Some(reply);
        self.decide(Input::Command(Command::Handoff { to })).await;
        self.handing.askers.extend(self.handing.asks.take());
    }

    /// The primary says something of its handoff.
    pub(super) async fn hear_handoff(&mut self, word: HandoffWord) {
        let input = match word {
            HandoffWord::Offered { attempt, position, answer } => {
                let attempt = Attempt(attempt);
                self.handing.offered = Some((attempt, answer));
                Input::Offered { attempt, position }
            }
            HandoffWord::Handed { attempt, record, version } => {
                match Record::decode(&record, &self.node.cluster, &self.node.database) {
                    Ok(record) if record.attempt.0 == attempt => {
                        Input::Handed { record: Box::new(record), version: Version::new(version) }
                    }
                    // The store has what is right.
                    _ => Input::Changed,
                }
            }
        };
        self.decide(input).await;
    }

    pub(super) fn withhold(&mut self, to: Option<PeerInfo>, attempt: Attempt) {
        self.handing.give_up();
        let given_up = CancellationToken::new();
        self.handing.withholds = Some(given_up.clone());
        self.handing.offers = to.is_some();
        self.queue(RoleTask::Withhold(Withhold { to, attempt, given_up }));
    }

    /// Another node has the lease by now.
    pub(super) fn handed(&mut self, to: PeerInfo, record: &Record, version: &Version) {
        self.replica_server.handed(&to, record.attempt.0, version.as_str(), &record.encode());
        self.replica_server.tell_handoff(HandoffStage::Done);
        self.node.report(Condition::LeaseHandedOver { database: &self.node.database, node: to.node });
    }

    pub(super) fn handoff_ended(&mut self, outcome: Result<NodeId, NotHanded>) {
        self.handing.offers = false;
        // A node that ends without another one gives the lease back, and says so.
        if let Err(why) = &outcome
            && !(self.leaving && *why == NotHanded::NoTarget)
        {
            self.node.report(Condition::HandoffFailed { database: &self.node.database, why });
        }
        let askers = std::mem::take(&mut self.handing.askers);
        for asker in askers.into_iter().chain(self.handing.asks.take()) {
            // Who asked may have gone.
            let _ = asker.send(outcome.clone().map_err(|why| self.not_handed(&why)));
        }
    }

    pub(super) fn handoff_refused(&mut self, why: &NotHanded) {
        if let Some(asker) = self.handing.asks.take() {
            let _ = asker.send(Err(self.not_handed(why)));
        }
    }

    fn not_handed(&self, why: &NotHanded) -> Error {
        match why {
            NotHanded::NotPrimary => {
                Error::NotPrimary { primary: self.node.roles.borrow().primary.clone().map(Box::new) }
            }
            why => Error::HandoffFailed(why.to_string()),
        }
    }
}

/// What comes of the words that streams hear; never anything where others take them.
pub(super) async fn next_word(words: &mut Option<mpsc::Receiver<HandoffWord>>) -> HandoffWord {
    match words {
        Some(words) => match words.recv().await {
            Some(word) => word,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}
