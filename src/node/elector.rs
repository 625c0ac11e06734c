//! Drives the election: reads and swaps the lease's record, asks peers, tells the supervisor what
//! to do. On a thread and runtime of its own, with the store's client: an application that starves
//! its runtime loses no lease by that.

mod commands;
mod facts;
mod handoff;
mod perform;
mod store;
mod withhold;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

use crate::context::NodeContext;
use crate::election::{Command, Election, Input, Instant, Settings, Shown, Swapped, Unread};
use crate::error::{Error, Result};
use crate::fence::boot_time;
use crate::files::Paths;
use crate::lease::record::Record;
use crate::lease::{ReadError, Store, Stored, Version};
use crate::lock::lock;
use crate::node::slot::EngineSlot;
use crate::node::supervisor::Supervisor;
use crate::primary::ReplicaServer;
use crate::report::Condition;
use crate::status::{Decision, PeerStanding, Role};
use crate::threads::{self, caught_task};

pub(crate) use facts::FactsSource;
pub(crate) use store::LeaseStore;
pub(crate) use withhold::WITHHOLD_LIMIT;

use handoff::{Handing, HandoffAsk, next_word};
use withhold::Hands;

/// The longest sleep between two decisions: an input that is lost does not stop the election.
const WAKE_MAX: Duration = Duration::from_secs(5);
/// The least time between two hints of the store.
const HINT_PAUSE: Duration = Duration::from_millis(20);
/// Between two tries to have random numbers.
const RANDOM_PAUSE: Duration = Duration::from_millis(100);
/// Inputs that wait to be decided on. More come only from a caller that sends commands in a loop.
const INPUTS_MAX: usize = 256;

/// What was decided, for the status.
type Decisions = Arc<Mutex<VecDeque<Decision>>>;
/// So many are kept.
const DECISIONS_MAX: usize = 100;

/// What a read of the register gave, and when it was begun.
pub(crate) type RecordLook = (Instant, Result<Option<(Record, Version)>, Unread>);

/// The thread that drives an election.
pub(crate) struct Elector {
    inputs: mpsc::Sender<Input>,
    handoffs: mpsc::Sender<HandoffAsk>,
    begin: Mutex<Option<oneshot::Sender<Parts>>>,
    left: watch::Receiver<bool>,
    decisions: Decisions,
    store: Arc<dyn Store>,
    /// Where the store's client runs.
    runtime: Arc<OnceLock<Handle>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// All that the election needs of an opened node.
pub(crate) struct Parts {
    pub(crate) settings: Settings,
    pub(crate) supervisor: Arc<Supervisor>,
    pub(crate) slot: Arc<EngineSlot>,
    pub(crate) replica_server: Arc<ReplicaServer>,
    pub(crate) paths: Paths,
    /// How long a handoff waits for requests that run.
    pub(crate) drain_limit: Duration,
    /// The database has content, and is no state of a cluster.
    pub(crate) has_content: bool,
}

/// What the thread works with.
struct Thread {
    node: Arc<NodeContext>,
    store: LeaseStore,
    lease_time: Duration,
    sender: mpsc::Sender<Input>,
    inputs: mpsc::Receiver<Input>,
    handoffs: mpsc::Receiver<HandoffAsk>,
    first: Option<oneshot::Sender<RecordLook>>,
    parts: Option<oneshot::Receiver<Parts>>,
    left: watch::Sender<bool>,
    decisions: Decisions,
    runtime: Arc<OnceLock<Handle>>,
}

impl Elector {
    /// Starts the thread, which looks at the record and then waits for [`Elector::begin`]. Returns
    /// the look, too.
    pub(crate) fn start(
        node: Arc<NodeContext>,
        store: LeaseStore,
        lease_time: Duration,
    ) -> Result<(Elector, oneshot::Receiver<RecordLook>)> {
        node.lease.set_time(lease_time);
        let (sender, inputs) = mpsc::channel(INPUTS_MAX);
        let (handoffs, asked) = mpsc::channel(INPUTS_MAX);
        let ((first, look), (begin, parts)) = (oneshot::channel(), oneshot::channel());
        let (left, is_left) = watch::channel(false);
        let decisions = Decisions::default();
        let runtime = Arc::<OnceLock<Handle>>::default();
        let state = Thread {
            node,
            store: store.clone(),
            lease_time,
            sender: sender.clone(),
            inputs,
            handoffs: asked,
            first: Some(first),
            parts: Some(parts),
            left,
            decisions: decisions.clone(),
            runtime: runtime.clone(),
        };
        let thread = threads::start("replite-lease", state, Thread::work, Thread::end)?;
        let elector = Elector {
            inputs: sender,
            handoffs,
            begin: Mutex::new(Some(begin)),
            left: is_left,
            decisions,
            store: store.store,
            runtime,
            thread: Mutex::new(Some(thread)),
        };
        Ok((elector, look))
    }

    /// Takes part in elections from now on.
    pub(crate) fn begin(&self, parts: Parts) {
        if let Some(begin) = lock(&self.begin).take() {
            // A thread that has ended has said why.
            let _ = begin.send(parts);
        }
    }

    /// Takes the lease with what is here, whatever others have.
    ///
    /// # Errors
    /// [`Error::ShutDown`].
    pub(crate) async fn promote_unchecked(&self) -> Result<()> {
        let command = Input::Command(Command::PromoteUnchecked);
        self.inputs.send(command).await.map_err(|_| Error::ShutDown)
    }

    /// Gives the lease back, if this node has it, and returns when it has.
    pub(crate) async fn leave(&self) {
        if self.inputs.send(Input::Command(Command::Leave)).await.is_ok() {
            // The sender is the thread's: without it there is nothing to give back.
            let _ = self.left.clone().wait_for(|left| *left).await;
        }
    }

    /// What was decided last, oldest first.
    pub(crate) fn decisions(&self) -> Vec<Decision> {
        lock(&self.decisions).iter().cloned().collect()
    }

    /// Waits for the thread, which ends when the node stops. Blocks.
    pub(crate) fn close(&self) {
        drop(lock(&self.begin).take());
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            // It has said how it ended.
            let _ = thread.join();
        }
    }
}

impl Thread {
    fn work(&mut self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("start a runtime for", "the lease"))?;
        let _ = self.runtime.set(runtime.handle().clone());
        let node = self.node.clone();
        let ended = runtime.block_on(async {
            tokio::select! {
                ended = caught_task("the election", self.run()) => ended,
                () = node.stop.cancelled() => Ok(()),
            }
        });
        // What the members still write comes to its end.
        runtime.block_on(self.store.end());
        // What a store's client still does blocks nothing of ours.
        runtime.shutdown_background();
        ended
    }

    fn end(self, ended: Result<()>) {
        // Without the election the lease ends.
        self.node.fence.close();
        if let Err(error) = ended {
            self.node.report_aside(Condition::ElectionFailed { error: &error });
            self.node.fail(&error);
        }
    }

    async fn run(&mut self) {
        let limit = self.lease_time / 4;
        self.store.start();
        if let Some(first) = self.first.take() {
            let mut seen = look(&*self.store.store, &self.node, limit).await;
            // Members that were all down at once may not reach each other before they are opened.
            // What this one had then tells whether it held the lease; only a swap takes it over.
            if let (Err(Unread::Unavailable(_)), Some(stored)) = (&seen.1, self.store.on_disk()) {
                seen.1 = understood(Some(stored), &self.node);
            }
            // A node that is not opened after all does not want to know.
            let _ = first.send(seen);
        }
        let Some(Ok(parts)) = (match self.parts.take() {
            Some(parts) => Some(parts.await),
            None => None,
        }) else {
            return;
        };
        Drive::new(self, parts).run(&mut self.inputs, &mut self.handoffs).await;
    }
}

/// Reads the record, for at most so long.
async fn look(store: &dyn Store, node: &NodeContext, limit: Duration) -> RecordLook {
    let begun = boot_time();
    let read = caught_task("the lease's store", store.read());
    let read = async { read.await.unwrap_or_else(|panic| Err(ReadError::new(panic.to_string()))) };
    let outcome = match tokio::time::timeout(limit, read).await {
        Err(_) => Err(Unread::Unavailable(format!("no answer within {limit:?}"))),
        Ok(Err(error)) => Err(Unread::Unavailable(error.to_string())),
        Ok(Ok(stored)) => understood(stored, node),
    };
    (begun, outcome)
}

/// The record that a register holds, if it is that of this database's lease.
fn understood(stored: Option<Stored>, node: &NodeContext) -> Result<Option<(Record, Version)>, Unread> {
    let Some(Stored { record, version }) = stored else { return Ok(None) };
    match Record::decode(&record, &node.cluster, &node.database) {
        Ok(record) => {
            node.lease.set_time(record.lease_time);
            Ok(Some((record, version)))
        }
        Err(error) => Err(Unread::NotOurs { version, why: error.to_string() }),
    }
}

/// An election under way.
struct Drive {
    node: Arc<NodeContext>,
    store: LeaseStore,
    /// The lease time that limits calls of the store: that of the record, once it is known.
    limit: Duration,
    inputs: mpsc::Sender<Input>,
    election: Election,
    facts: FactsSource,
    supervisor: Arc<Supervisor>,
    replica_server: Arc<ReplicaServer>,
    handing: Handing,
    /// Changes of the role, in order: a task makes one after the other.
    changes: mpsc::UnboundedSender<perform::RoleTask>,
    paths: Paths,
    tasks: TaskTracker,
    left: watch::Sender<bool>,
    wake: Instant,
    decisions: Decisions,
    /// What others are to see of the node, where the election says it.
    shown: Option<Shown>,
    /// It was asked to give the lease back.
    leaving: bool,
    /// What was said to be wrong with the store or its record.
    said: Option<Unread>,
}

impl Drive {
    fn new(thread: &Thread, parts: Parts) -> Drive {
        let Parts { settings, supervisor, slot, replica_server, paths, drain_limit, has_content } = parts;
        let (node, inputs) = (thread.node.clone(), thread.sender.clone());
        let hands = Hands { node: node.clone(), replica_server: replica_server.clone(), drain_limit };
        let changes = perform::changes(supervisor.clone(), hands, inputs.clone());
        let facts = FactsSource::new(node.clone(), slot, replica_server.clone(), has_content);
        Drive {
            node,
            store: thread.store.clone(),
            limit: thread.lease_time / 4,
            inputs,
            election: Election::new(settings),
            facts,
            supervisor,
            replica_server,
            handing: Handing::default(),
            changes,
            paths,
            tasks: TaskTracker::new(),
            left: thread.left.clone(),
            wake: boot_time(),
            decisions: thread.decisions.clone(),
            shown: None,
            leaving: false,
            said: None,
        }
    }

    async fn run(mut self, inputs: &mut mpsc::Receiver<Input>, handoffs: &mut mpsc::Receiver<HandoffAsk>) {
        let store = self.store.store.clone();
        // Not more often: a store may hint all the time.
        let hinted = || async {
            tokio::time::sleep(HINT_PAUSE).await;
            if let Err(panic) = caught_task("the lease's store", store.changed()).await {
                Condition::LeaseStorePanicked { error: &panic }.say();
                std::future::pending::<()>().await;
            }
        };
        let mut heard = self.node.lease.heard.watch();
        let mut roles = self.node.roles.subscribe();
        let mut hint = Box::pin(hinted());
        let node = self.node.clone();
        let mut words = node.lease.offers.take();
        self.decide(Input::Tick).await;
        loop {
            let pause = self.wake.saturating_sub(boot_time()).min(WAKE_MAX);
            let input = tokio::select! {
                input = inputs.recv() => match input {
                    Some(input) => input,
                    None => return,
                },
                () = tokio::time::sleep(pause) => Input::Tick,
                () = &mut hint => {
                    hint = Box::pin(hinted());
                    Input::Changed
                }
                // The senders are the node's.
                _ = roles.changed() => {
                    let now = roles.borrow_and_update().clone();
                    if now.role == Role::Replica && now.primary.is_none() {
                        self.show_again();
                    }
                    continue;
                }
                _ = heard.changed() => Input::Heard(*heard.borrow_and_update()),
                () = node.lease.offers.hinted() => Input::Changed,
                word = next_word(&mut words) => {
                    self.hear_handoff(word).await;
                    continue;
                }
                Some(ask) = handoffs.recv() => {
                    self.ask_handoff(ask).await;
                    continue;
                }
            };
            self.decide(input).await;
        }
    }

    async fn decide(&mut self, input: Input) {
        self.leaving |= matches!(input, Input::Command(Command::Leave));
        if let Input::Read { outcome, .. } = &input {
            if let Ok(Some((record, _))) = outcome {
                self.node.lease.set_time(record.lease_time);
                self.limit = record.lease_time / 4;
            }
            self.tell_store(&outcome.as_ref().map(drop).map_err(Clone::clone));
        }
        // A holder reads only where a swap is not settled.
        match &input {
            Input::Swapped { outcome: Swapped::Done(_), .. } => self.tell_store(&Ok(())),
            Input::Swapped { outcome: Swapped::Unavailable(why) | Swapped::Unknown(why), .. } => {
                self.tell_store(&Err(Unread::Unavailable(why.clone())));
            }
            _ => {}
        }
        let (now, facts) = loop {
            // Before the facts: a position is never older than its clock.
            let now = boot_time();
            match self.facts.now() {
                Ok(facts) => break (now, facts),
                // Without random numbers nothing can be asked for. What is held ends by itself.
                Err(error) => tracing::error!(%error, "the election waits for random numbers"),
            }
            tokio::time::sleep(RANDOM_PAUSE).await;
        };
        if let Some(starters) = self.store.starters() {
            self.election.set_starters(starters);
        }
        let actions = self.election.decide(input, &facts, now);
        self.keep_decisions(now);
        for action in actions {
            self.perform(action).await;
        }
        match self.election.took() {
            Some((epoch, at)) => self.node.lease.clock.take(epoch, at),
            None => self.node.lease.clock.clear(),
        }
        self.facts.tell(&self.election, &facts);
    }

    /// Keeps what was decided at this instant, and forgets the oldest.
    fn keep_decisions(&self, now: Instant) {
        let mut kept = lock(&self.decisions);
        for decided in self.election.decisions().filter(|decided| decided.at == now) {
            if kept.len() == DECISIONS_MAX {
                kept.pop_front();
            }
            let answers = decided.answers.iter().map(|answer| PeerStanding {
                node: answer.peer.node,
                position: answer.position,
                epoch: answer.epoch,
                fit: answer.fit,
            });
            kept.push_back(Decision {
                at: SystemTime::now(),
                what: decided.what.to_string(),
                answers: answers.collect(),
            });
        }
    }
}
