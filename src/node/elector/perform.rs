//! What the election decided, done. What takes time is a task, whose end is an input.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::context::RoleChange;
use crate::election::{Action, Input, Note, Shown, Swapped, Unread};
use crate::error::{Error, Result};
use crate::lease::record::Record;
use crate::lease::{SwapError, Version};
use crate::net::Endpoint;
use crate::node::elector::withhold::{Hands, Withhold};
use crate::node::elector::{Drive, look};
use crate::node::supervisor::Supervisor;
use crate::node::tenancy;
use crate::report::Condition;
use crate::standing;
use crate::status::{PeerInfo, Role};
use crate::threads::{blocking, caught_task};
use crate::txid::Epoch;

/// Between two tries of a change of the role.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const RETRIES_MAX: u32 = 300;

/// A change of what the node does.
#[derive(Debug)]
pub(super) enum RoleTask {
    Prepare,
    Promote { epoch: Epoch, unchecked: bool },
    Renew { epoch: Epoch },
    Demote,
    Follow(Option<PeerInfo>),
    Withhold(Withhold),
    GoOn,
}

/// Starts the task that makes changes, one after the other, in the order in which they come.
pub(super) fn changes(
    supervisor: Arc<Supervisor>,
    hands: Hands,
    inputs: mpsc::Sender<Input>,
) -> mpsc::UnboundedSender<RoleTask> {
    // No more wait than the election asked for: it asks for the next one when one has
    // ended.
    let (sender, mut changes) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(change) = changes.recv().await {
            if let Some(input) = make(&supervisor, &hands, change).await
                && inputs.send(input).await.is_err()
            {
                return;
            }
        }
    });
    sender
}

/// Makes a change. What fails for want of a thread or a descriptor is tried again: the election
/// relies on it, and asks for nothing twice.
async fn make(supervisor: &Supervisor, hands: &Hands, change: RoleTask) -> Option<Input> {
    let text = |error: Error| error.to_string();
    match change {
        RoleTask::Prepare => {
            let position = insist(|| supervisor.prepare()).await.flatten();
            Some(Input::Prepared { position })
        }
        RoleTask::Promote { epoch, unchecked } => {
            Some(Input::Promoted(supervisor.promote(epoch, unchecked).await.map_err(text)))
        }
        RoleTask::Renew { epoch } => Some(Input::Renewed(supervisor.renew(epoch).await.map_err(text))),
        RoleTask::Demote => {
            let position = insist(|| supervisor.demote()).await.flatten();
            Some(Input::Demoted { position })
        }
        RoleTask::Follow(primary) => {
            // An address that is none was refused where it was given.
            let endpoint = primary.and_then(|peer| Endpoint::parse(&peer.addresses.replication).ok());
            insist(|| supervisor.follow(endpoint.clone())).await;
            None
        }
        RoleTask::Withhold(offer) => Some(hands.withhold(supervisor, &offer).await),
        RoleTask::GoOn => {
            // Where the fence has ended it is renewed, or stops leading.
            insist(|| supervisor.release_hold()).await;
            None
        }
    }
}

/// Tries until it works. After any error that is not the system's, replication has stopped.
async fn insist<T, F: Future<Output = Result<T>>>(change: impl Fn() -> F) -> Option<T> {
    for _ in 0..RETRIES_MAX {
        match change().await {
            Ok(value) => return Some(value),
            Err(error @ Error::Io { .. }) => Condition::RoleChangeRetried { error: &error }.say(),
            Err(_) => return None,
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    None
}

/// What a store says that panics is not known.
fn flat(swapped: Result<Result<Version, SwapError>>) -> Result<Version, SwapError> {
    swapped.unwrap_or_else(|panic| Err(SwapError::Unknown(panic.to_string())))
}

impl Drive {
    pub(super) async fn perform(&mut self, action: Action) {
        match action {
            Action::Read => self.read(),
            Action::Swap { expected, record } => self.swap(expected, *record),
            Action::AskPeers { round, peers, limit } => self.ask(round, peers, limit),
            Action::Prepare => self.change(RoleTask::Prepare),
            Action::Promote { epoch, unchecked } => self.change(RoleTask::Promote { epoch, unchecked }),
            Action::Renew { epoch } => self.change(RoleTask::Renew { epoch }),
            Action::Demote => self.change(RoleTask::Demote),
            Action::Follow(primary) => self.change(RoleTask::Follow(primary)),
            Action::Withhold { to, attempt } => self.withhold(to, attempt),
            Action::GoOn => self.change(RoleTask::GoOn),
            Action::Handed { to, record, version } => self.handed(to, &record, &version),
            Action::HandoffEnded(outcome) => self.handoff_ended(outcome),
            Action::HandoffRefused(why) => self.handoff_refused(&why),
            Action::Accept { attempt, boot } => self.handing.answer(attempt, Ok(boot)),
            Action::Decline { attempt, why } => self.handing.answer(attempt, Err(why)),
            Action::Lease { epoch, until } => self.node.acknowledge_until(epoch, until),
            Action::Fence => {
                self.shown = None;
                self.supervisor.fence();
                let database = &self.node.database;
                match (self.handing.offers(), self.leaving) {
                    // What comes of it is said.
                    (true, _) => {}
                    (false, true) => self.node.report(Condition::LeaseGivenBack { database }),
                    (false, false) => self.node.report(Condition::LeaseEnded { database }),
                }
            }
            Action::Hear(number) => self.hear(number).await,
            Action::MarkBootstrapped => {
                let paths = self.paths.clone();
                let marked = blocking(move || tenancy::mark_bootstrapped(&paths)).await;
                self.kept(marked.map(drop));
            }
            Action::Show(shown) => self.show(shown),
            Action::Wake(at) => self.wake = at,
            Action::Note(note) => self.note(note),
            Action::Left => {
                self.left.send_replace(true);
            }
        }
    }

    fn change(&mut self, change: RoleTask) {
        self.handing.give_up();
        self.queue(change);
    }

    pub(super) fn queue(&self, change: RoleTask) {
        // The task ends with the runtime.
        let _ = self.changes.send(change);
    }

    pub(super) fn read(&self) {
        let (store, node, inputs, limit) =
            (self.store.store.clone(), self.node.clone(), self.inputs.clone(), self.limit);
        self.tasks.spawn(async move {
            let (begun, outcome) = look(&*store, &node, limit).await;
            let _ = inputs.send(Input::Read { begun, outcome }).await;
        });
    }

    fn swap(&mut self, expected: Option<Version>, record: Record) {
        // The shorter one counts from now on: an answer that comes later is of no use.
        self.limit = self.limit.min(record.lease_time / 4);
        self.node.lease.set_time(record.lease_time);
        let (store, inputs, limit) = (self.store.store.clone(), self.inputs.clone(), record.lease_time / 4);
        self.tasks.spawn(async move {
            let (attempt, bytes) = (record.attempt, record.encode());
            let swap = caught_task("the lease's store", store.swap(expected.as_ref(), &bytes));
            let outcome = match tokio::time::timeout(limit, swap).await.map(flat) {
                Err(_) => Swapped::Unknown(format!("no answer within {limit:?}")),
                Ok(Ok(version)) => Swapped::Done(version),
                Ok(Err(SwapError::Conflict)) => Swapped::Conflict,
                Ok(Err(SwapError::Unavailable(why))) => Swapped::Unavailable(why),
                Ok(Err(SwapError::Unknown(why))) => Swapped::Unknown(why),
            };
            let _ = inputs.send(Input::Swapped { attempt, outcome }).await;
        });
    }

    /// Asks all of them at once.
    fn ask(&self, round: u64, peers: Vec<PeerInfo>, limit: Duration) {
        let (node, inputs, tasks) = (self.node.clone(), self.inputs.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            let answers = standing::ask_all(&node, &peers, limit, &tasks).await;
            let _ = inputs.send(Input::Peers { round, answers }).await;
        });
    }

    /// Nothing that this number forbids is done before it is on the disk.
    async fn hear(&self, number: u64) {
        let node = self.node.clone();
        self.kept(blocking(move || node.hear(number)).await);
    }

    /// What can't be kept can't be relied on: replication stops.
    fn kept(&self, kept: Result<()>) {
        if let Err(error) = kept
            && !matches!(error, Error::ShutDown)
        {
            self.node.fence.close();
            self.node.fail(&error);
        }
    }

    fn show(&mut self, shown: Shown) {
        self.shown = Some(shown);
        self.show_again();
    }

    /// What is to be shown, if it is not.
    pub(super) fn show_again(&self) {
        let (role, waits_for) = match &self.shown {
            Some(Shown::Replica) => (Role::Replica, None),
            Some(Shown::Electing) => (Role::Electing, None),
            Some(Shown::Waiting(reason)) => (Role::Waiting, Some(*reason)),
            Some(Shown::Promoting) => (Role::Promoting, None),
            // The supervisor says these itself, when it is so.
            Some(Shown::Primary | Shown::Fencing) | None => return,
        };
        self.node.change_role(RoleChange::Stands { role, waits_for });
    }

    fn note(&self, note: Note) {
        let node = &self.node;
        match note {
            Note::StoreWentBack(what) => node.report(Condition::LeaseStoreWentBack { what: &what }),
            Note::SameNode { incarnation } => node.report(Condition::LeaseOfSameNode { incarnation }),
            Note::SeveralWithContent(nodes) => {
                node.report(Condition::FirstStartDisputed { nodes: &nodes });
            }
            Note::NoFirstStart(peer) => node.report(Condition::NoFirstStart { node: peer }),
            Note::NotTaken { holder } => node.report(Condition::LeaseNotTaken { node: holder }),
        }
    }

    /// Says once what is wrong with the store, and once that nothing is any more.
    pub(super) fn tell_store(&mut self, read: &Result<(), Unread>) {
        match read {
            Ok(()) if self.said.take().is_some() => self.node.report(Condition::LeaseStoreBack),
            Ok(()) => {}
            Err(why) => {
                let new = self.said.as_ref() != Some(why);
                match why {
                    Unread::Unavailable(problem) => {
                        self.node.report(Condition::LeaseStoreAway { problem, new });
                    }
                    Unread::NotOurs { why: problem, .. } => {
                        self.node.report(Condition::LeaseRecordNotOurs { problem, new });
                    }
                }
                self.said = Some(why.clone());
            }
        }
    }
}
