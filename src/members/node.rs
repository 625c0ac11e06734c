//! A node as one that keeps the record with others.
//!
//! What it reads is its own state, as Raft has brought it here: a stale record does no harm, since
//! each swap names the version that it replaces. Only when this node has heard of no leader for a
//! lease time is its state not the answer any more: the others are asked, and where none of them
//! knows one either, the record can't be read.
//!
//! A swap goes to the leader. One whose answer did not come is sent again as it was, with its
//! nonce, for the version that it replaces comes back never. So the second answer tells of both:
//! done, or the register holds what the first one wrote, or another record is there.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use openraft::raft::AppendEntriesResponse;
use openraft::{Raft, Snapshot};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::context::NodeContext;
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::handshake::Asker;
use crate::lease::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::lock::lock;
use crate::members::client::{self, Swapping};
use crate::members::contact::{Contact, Metrics};
use crate::members::link::MemberLinks;
use crate::members::storage::Storage;
use crate::members::types::{Agreed, AgreedRecord, Proposal, Ruling, TypeConfig, newer};
use crate::members::words::{Ask, Introduction, MemberAnswer, SwapOutcome};
use crate::net::Endpoint;
use crate::threads::blocking;

/// Longest wait for its end.
const END_LIMIT: Duration = Duration::from_secs(4);

/// A node that keeps the record, or that asks those who do.
pub(crate) struct MemberNode {
    pub(super) node: Arc<NodeContext>,
    pub(super) links: Arc<MemberLinks>,
    pub(super) settings: MemberSettings,
    /// Raft, while it runs; none on a node that is no member.
    pub(super) running: watch::Sender<Option<RunningRaft>>,
    runtime: OnceLock<Handle>,
    /// What runs Raft.
    task: Mutex<Option<JoinHandle<()>>>,
    contact: Mutex<Contact>,
    /// Why the members have not begun, as far as this one knows.
    pub(super) waits: Mutex<Option<String>>,
    /// The leader says that this member has not what it said to have.
    pub(super) went_back: CancellationToken,
    /// One change of the members at a time.
    pub(super) changing: tokio::sync::Mutex<()>,
}

/// What the configuration says of the members.
pub(crate) struct MembersConfig {
    /// The members at the beginning, each URL in its normal form.
    pub(crate) list: Vec<String>,
    pub(crate) witness: bool,
    /// Others reach it through the application's server alone.
    pub(crate) mounted: bool,
    pub(crate) lease_time: Duration,
}

/// The same, and what the files say.
pub(super) struct MemberSettings {
    pub(super) config: MembersConfig,
    /// Where this node is one of them.
    pub(super) own: Option<OwnPlace>,
    /// The node took part in beginning a cluster once.
    marked: bool,
}

/// A member's own.
pub(super) struct OwnPlace {
    pub(super) url: String,
    pub(super) id: u64,
    /// It had voted, or got something, when it was opened.
    begun: bool,
    /// The newest record in its log then.
    newest: Option<AgreedRecord>,
    pub(super) directory: PathBuf,
    /// As it was opened with the node, until Raft runs.
    pub(super) storage: Mutex<Option<Storage>>,
}

/// A Raft that runs.
#[derive(Clone)]
pub(super) struct RunningRaft {
    pub(super) raft: Raft<TypeConfig>,
    pub(super) state: watch::Receiver<Arc<Agreed>>,
}

impl MemberNode {
    /// Opens the Raft directory, or makes it, where this node is a member. Blocks.
    ///
    /// # Errors
    /// What is wrong with the directory.
    pub(crate) fn open(
        node: Arc<NodeContext>,
        paths: &Paths,
        config: MembersConfig,
    ) -> Result<Arc<MemberNode>> {
        let directory = paths.members();
        let url = Endpoint::parse(&node.me.addresses.replication)?.to_string();
        let own = match config.list.contains(&url) {
            true => {
                let storage = match Storage::open(&directory)? {
                    Some(storage) => storage,
                    None => Storage::create(&directory)?,
                };
                let (id, begun) = (storage.id(), storage.has_state());
                let newest = storage.newest_record();
                Some(OwnPlace { url, id, begun, newest, directory, storage: Mutex::new(Some(storage)) })
            }
            false => None,
        };
        let path = paths.bootstrapped();
        let marked = path.try_exists().map_err(Error::io("stat", &path))?;
        // Less than a swap may take: one that hangs is sent again.
        let patience = (config.lease_time / 8).max(Duration::from_millis(250));
        let links = Arc::new(MemberLinks::new(Asker::of(&node), patience));
        Ok(Arc::new(MemberNode {
            node,
            links,
            settings: MemberSettings { config, own, marked },
            running: watch::Sender::new(None),
            runtime: OnceLock::new(),
            task: Mutex::default(),
            contact: Mutex::default(),
            waits: Mutex::default(),
            went_back: CancellationToken::new(),
            changing: tokio::sync::Mutex::default(),
        }))
    }

    /// Starts Raft and all that belongs to it on this runtime. Ends when the node does.
    pub(crate) fn start(self: &Arc<Self>) {
        if self.runtime.set(Handle::current()).is_ok() && self.settings.own.is_some() {
            *lock(&self.task) = Some(tokio::spawn(self.clone().run()));
        }
    }

    /// Returns when Raft has ended, which the end of the node asks for.
    pub(crate) async fn end(&self) {
        let task = lock(&self.task).take();
        if let Some(task) = task {
            // A panic there was told.
            let _ = timeout(END_LIMIT, task).await;
        }
    }

    pub(crate) fn context(&self) -> &NodeContext {
        &self.node
    }

    /// Where it runs, once it does.
    pub(crate) fn runtime(&self) -> Option<&Handle> {
        self.runtime.get()
    }

    /// The newest record that this node had before this start, whether it was agreed on or not.
    pub(crate) fn on_disk(&self) -> Option<Stored> {
        let AgreedRecord { version, record, .. } = self.settings.own.as_ref()?.newest.clone()?;
        Some(Stored::new(record, Version::new(version)))
    }

    /// Whether it keeps the record.
    pub(crate) fn is_one(&self) -> bool {
        self.settings.own.is_some()
    }

    pub(super) fn own_url(&self) -> Option<&str> {
        self.settings.own.as_ref().map(|own| own.url.as_str())
    }

    pub(super) fn id(&self) -> Option<u64> {
        self.settings.own.as_ref().map(|own| own.id)
    }

    pub(super) fn raft(&self) -> Option<RunningRaft> {
        self.running.borrow().clone()
    }

    /// Takes note of whether this node leads, and the others follow.
    pub(super) fn note(&self, metrics: &Metrics) {
        lock(&self.contact).note(metrics, self.settings.config.lease_time);
    }

    /// Raft starts: what it has is that of a snapshot, which may be old.
    pub(super) fn begins_anew(&self) {
        *lock(&self.contact) = Contact::default();
    }

    /// Whether what is here is what the members agree on, or was a lease time ago.
    fn is_in_contact(&self) -> bool {
        lock(&self.contact).is_in(self.settings.config.lease_time)
    }

    /// The register, by this node's own state. None: that may be long past.
    pub(super) fn register_here(&self) -> Option<Option<AgreedRecord>> {
        let running = self.raft()?;
        let state = running.state.borrow().clone();
        let contact = lock(&self.contact);
        let counts = contact.has_all(state.last_applied) && contact.is_in(self.settings.config.lease_time);
        counts.then(|| state.register.clone())
    }

    /// What it says of itself.
    pub(super) fn introduction(&self) -> Introduction {
        let fitness = self.node.lease.fitness();
        let metrics = self.raft().map(|running| running.raft.metrics().borrow().clone());
        let begun = self.settings.own.as_ref().is_some_and(|own| own.begun)
            || metrics.as_ref().is_some_and(|metrics| {
                metrics.membership_config.log_id().is_some() || metrics.vote.leader_id.term > 0
            });
        let metrics = metrics.as_ref();
        Introduction {
            id: metrics.and(self.id()),
            witness: self.settings.config.witness,
            list: self.settings.config.list.clone(),
            begun,
            membership: metrics.map(|metrics| (*metrics.membership_config).clone()).unwrap_or_default(),
            leader: metrics.and_then(|metrics| metrics.current_leader).filter(|_| self.is_in_contact()),
            last_index: metrics.and_then(|metrics| metrics.last_log_index),
            ready: self.settings.config.witness || fitness.is_some(),
            has_state: self.settings.marked || fitness.is_some_and(|fitness| fitness.has_state),
            has_content: fitness.is_some_and(|fitness| fitness.has_content),
        }
    }

    /// Where other members may be: those that are, then those of the configuration.
    pub(super) fn others(&self) -> Vec<String> {
        let mut urls: Vec<String> = Vec::new();
        if let Some(running) = self.raft() {
            let metrics = running.raft.metrics();
            let metrics = metrics.borrow();
            urls.extend(metrics.membership_config.nodes().map(|(_, member)| member.url.clone()));
        }
        urls.extend(self.settings.config.list.iter().cloned());
        let mut seen = BTreeSet::new();
        urls.retain(|url| Some(url.as_str()) != self.own_url() && seen.insert(url.clone()));
        urls
    }

    /// Answers another node.
    pub(crate) async fn answer(self: &Arc<Self>, ask: Ask) -> MemberAnswer {
        match self.answered(ask).await {
            Ok(said) => said,
            Err(why) => MemberAnswer::Unable { may_be_done: false, why },
        }
    }

    async fn answered(self: &Arc<Self>, ask: Ask) -> Result<MemberAnswer, String> {
        Ok(match ask {
            Ask::Introduce => MemberAnswer::Introduced(Box::new(self.introduction())),
            Ask::Append { to, rpc } => {
                let committed = rpc.leader_commit;
                let said = self.addressed(to)?.append_entries(rpc).await;
                let said = said.map_err(|error| error.to_string())?;
                if !matches!(said, AppendEntriesResponse::HigherVote(_)) {
                    lock(&self.contact).heard_of_leader(committed);
                }
                MemberAnswer::Appended(said)
            }
            Ask::Vote { to, rpc } => {
                let said = self.addressed(to)?.vote(rpc).await;
                MemberAnswer::Voted(said.map_err(|error| error.to_string())?)
            }
            Ask::Snapshot { to, vote, meta, state } => {
                let snapshot = Snapshot { meta, snapshot: state };
                let said = self.addressed(to)?.install_full_snapshot(vote, snapshot).await;
                MemberAnswer::Installed(said.map_err(|error| error.to_string())?)
            }
            Ask::Read => MemberAnswer::Register(self.register_here().ok_or_else(|| self.why_not())?),
            Ask::Swap { command, passed } => MemberAnswer::Swapped(self.swap_once(command, passed).await),
            Ask::Change { change, passed } => self.change(change, passed).await,
            Ask::WentBack { to } => {
                self.addressed(to)?;
                self.went_back.cancel();
                self.remember_that_it_went_back().await?;
                MemberAnswer::Changed
            }
            Ask::Begin => {
                self.begin_unchecked().await?;
                MemberAnswer::Changed
            }
        })
    }

    /// So that it does not run again after a start of the process.
    async fn remember_that_it_went_back(&self) -> Result<(), String> {
        let Some(own) = &self.settings.own else { return Ok(()) };
        let (directory, id) = (own.directory.clone(), own.id);
        let marked = blocking(move || Storage::mark_went_back(&directory, id)).await;
        marked.map_err(|error| {
            tracing::error!(%error, "it can't be kept that this member went back: do not start it again");
            error.to_string()
        })
    }

    /// Raft, where this is the member with that id.
    fn addressed(&self, to: u64) -> Result<Raft<TypeConfig>, String> {
        match (self.raft(), self.id()) {
            (Some(running), Some(id)) if id == to => Ok(running.raft),
            (Some(_), Some(id)) => Err(format!("here is member {id:x}, not {to:x}")),
            _ => Err("it is no member".into()),
        }
    }

    /// Why the record can't be read here.
    pub(super) fn why_not(&self) -> String {
        if let Some(why) = &*lock(&self.waits) {
            return why.clone();
        }
        let time = self.settings.config.lease_time;
        match self.raft() {
            Some(_) => format!("no leader of the members has been heard of for {time:?}"),
            None if self.settings.own.is_some() => "this member does not run".into(),
            None => "this node is no member".into(),
        }
    }

    /// Has the leader swap, if one is known. Passed on already it goes no further.
    pub(super) async fn swap_once(&self, command: Proposal, passed: bool) -> SwapOutcome {
        let leader = match self.leader() {
            // Each try would stay in its log.
            Ok(Leader::Here(_)) if !self.is_in_contact() => {
                return SwapOutcome::NotSent("this member leads, and hears nothing of the others".into());
            }
            Ok(Leader::Here(raft)) => {
                return match raft.client_write(command).await {
                    Ok(written) => match written.data {
                        Ruling::Done(version) => SwapOutcome::Done(version),
                        Ruling::Conflict(holds) => SwapOutcome::Conflict(holds),
                        Ruling::Nothing => SwapOutcome::Unknown("the entry is none of a swap".into()),
                    },
                    // A leader that is none any more may have written it into its log before.
                    Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                        SwapOutcome::Unknown("this member leads no more".into())
                    }
                    Err(error) => SwapOutcome::Unknown(error.to_string()),
                };
            }
            Ok(Leader::At(url)) => url,
            Err(why) => return SwapOutcome::NotSent(why),
        };
        if passed {
            return SwapOutcome::NotSent("this member does not lead".into());
        }
        client::swap_at(&self.links, &leader, command, true).await
    }

    /// Who leads, as far as this node knows.
    pub(super) fn leader(&self) -> Result<Leader, String> {
        let running = self.raft().ok_or_else(|| self.why_not())?;
        let metrics = running.raft.metrics();
        let metrics = metrics.borrow();
        let leader = metrics.current_leader.filter(|_| self.is_in_contact());
        let leader = leader.ok_or("no leader of the members is known")?;
        // One that was removed leads on until it has heard that all agree, and begins nothing.
        let member = metrics.membership_config.membership().get_node(&leader);
        let member = member.ok_or("the leader of the members was removed, and they choose another one")?;
        match Some(leader) == self.id() {
            true => Ok(Leader::Here(running.raft)),
            false => Ok(Leader::At(member.url.clone())),
        }
    }

    /// Returns when another leader is known, or after a while.
    async fn leader_may_have_changed(&self) {
        let pause = (self.settings.config.lease_time / 40).max(Duration::from_millis(20));
        let Some(running) = self.raft() else { return sleep(pause).await };
        let mut metrics = running.raft.metrics();
        let before = metrics.borrow().current_leader;
        let changed = metrics.wait_for(|metrics| metrics.current_leader != before);
        let _ = timeout(pause * 2, changed).await;
        sleep(pause / 4).await;
    }

    async fn read(&self) -> Result<Option<Stored>, ReadError> {
        let known = async {
            loop {
                if let Some(register) = self.register_here() {
                    return register;
                }
                // Raft may be about to find its leader.
                sleep(Duration::from_millis(10)).await;
            }
        };
        let wait =
            if self.settings.own.is_some() { self.settings.config.lease_time / 8 } else { Duration::ZERO };
        let register = match timeout(wait, known).await {
            Ok(register) => register,
            Err(_) => {
                let others = self.others();
                let read = client::read(&self.links, &others).await;
                let theirs = read.map_err(|theirs| format!("{}; {theirs}", self.why_not()));
                // One that is late may have less than this node has seen.
                let ours = self.raft().and_then(|running| running.state.borrow().register.clone());
                newer(theirs.map_err(ReadError::new)?, ours)
            }
        };
        Ok(register.map(|register| Stored::new(register.record, Version::new(register.version))))
    }

    async fn swap(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let mut swapping = Swapping::begin(expected, record, self.settings.config.lease_time)?;
        loop {
            let tried = timeout(swapping.try_limit(), self.swap_somewhere(swapping.command())).await;
            let outcome = tried.unwrap_or_else(|_| SwapOutcome::Unknown("no answer in time".into()));
            if let Some(ended) = swapping.hear(outcome) {
                return ended;
            }
            self.leader_may_have_changed().await;
        }
    }

    /// By the leader that this node knows of, or by another node that may know one.
    async fn swap_somewhere(&self, command: Proposal) -> SwapOutcome {
        match self.swap_once(command.clone(), false).await {
            SwapOutcome::NotSent(why) if self.leader().is_err() => {
                client::swap_at_any(&self.links, &self.others(), command, why).await
            }
            outcome => outcome,
        }
    }

    async fn register_changed(&self) {
        let mut running = self.running.subscribe();
        let before = self.raft().map(|running| version_in(&running.state.borrow()));
        loop {
            let Some(now) = running.borrow_and_update().clone() else {
                if running.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            };
            let mut state = now.state;
            let changed = async {
                let changed = state.wait_for(|state| Some(version_in(state)) != before).await;
                changed.is_ok()
            };
            tokio::select! {
                true = changed => return,
                _ = running.changed() => {}
            }
        }
    }
}

fn version_in(state: &Agreed) -> Option<String> {
    state.register.as_ref().map(|register| register.version.clone())
}

/// Where the leader is.
pub(super) enum Leader {
    Here(Raft<TypeConfig>),
    At(String),
}

impl fmt::Debug for MemberNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemberNode").field("list", &self.settings.config.list).finish_non_exhaustive()
    }
}

impl Store for MemberNode {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(self.read())
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(self.swap(expected, record))
    }

    fn changed(&self) -> StoreFuture<'_, ()> {
        Box::pin(self.register_changed())
    }

    fn lease_time(&self) -> Duration {
        self.settings.config.lease_time
    }
}
