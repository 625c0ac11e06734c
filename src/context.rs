//! What every part of a running node shares: identity, keys, role, position, events, shutdown.

mod command;
mod counting;
mod heard;
mod lease;
mod offers;
mod role;
mod running;
mod seldom;
mod to_disk;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::applied::Applied;
use crate::channel::Channel;
use crate::error::{Cause, Error};
use crate::fence::Fence;
use crate::keys::{DatabaseKeys, KeysInUse};
use crate::lock::lock;
use crate::peer::{Incarnation, NodeId, PeerKey};
use crate::report::{Condition, Part, Reports};
use crate::secret::Keyring;
use crate::status::{Event, Lag, PeerInfo, Role};
use crate::txid::Txid;

pub(crate) use command::{CommandAnswer, CommandDoor, Description, OperatorCommand};
use counting::AskCounting;
pub(crate) use counting::{Counting, Counts};
pub(crate) use heard::{EpochsHeard, is_near};
#[cfg(test)]
pub(crate) use heard::{RAISE_STEP_MAX, RAISED_MAX};
pub(crate) use lease::{ClockPair, Fitness, LeaseContext, SyncedClock};
pub(crate) use offers::{HandoffWord, Offers};
pub(crate) use role::{RoleChange, RoleValue};
pub(crate) use running::{CountOnce, HeldRequest, RunningRequest};
use running::{HeldCount, Requests};
pub(crate) use seldom::Seldom;
pub(crate) use to_disk::ToDisk;

/// A lag that was said longer ago tells nothing: a node that follows says it ten times a second.
const LAG_SAID_MAX: Duration = Duration::from_secs(2);
/// After a read failed: for how long no other may fail before a read that works says that reads
/// work again.
const READS_QUIET: Duration = Duration::from_secs(1);

struct CloseIdle(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for CloseIdle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloseIdle").finish_non_exhaustive()
    }
}

/// A running node, as its parts see it.
#[derive(Debug)]
pub(crate) struct NodeContext {
    /// The stable id and the addresses of this node.
    pub(crate) me: PeerInfo,
    pub(crate) cluster: String,
    /// The database's name in the cluster.
    pub(crate) database: String,
    pub(crate) keys: Keyring,
    /// How it speaks with other nodes.
    pub(crate) channel: Channel,
    /// Those of the database.
    pub(crate) database_keys: KeysInUse,
    pub(crate) applied: Arc<Applied>,
    /// The role; doors look here to decide whether to forward.
    pub(crate) roles: RoleValue,
    /// Until when it may acknowledge commits.
    pub(crate) fence: Arc<Fence>,
    /// What has to do with a lease.
    pub(crate) lease: LeaseContext,
    /// On a replica, how far it lags.
    lag: Mutex<Option<(Lag, tokio::time::Instant)>>,
    /// Why replication has stopped for good.
    failure: Mutex<Option<Cause>>,
    /// Its problems and events.
    reports: Reports,
    /// This replica has what was committed late, and no primary vouches for it.
    late: AtomicBool,
    /// The database's files are not those that the node opened: it reads nothing from them.
    astray: AtomicBool,
    /// Counts how often the node opened the files.
    files: Arc<AtomicU64>,
    /// Closes what is idle of connections to files that are not there any more.
    close_idle: OnceLock<CloseIdle>,
    /// Says whether the position has all that is committed.
    counting: AskCounting,
    /// When a read failed: milliseconds since `begun`, and one. Zero: no read has failed, or one
    /// has worked since.
    read_failed: AtomicU64,
    begun: Instant,
    /// Knocks with another secret.
    strangers: Seldom,
    /// Cancelled when the node stops: every task ends.
    pub(crate) stop: CancellationToken,
    /// Cancelled before that, when the application's server is to end. Long streams end and nothing
    /// new begins, but what runs already runs on.
    pub(crate) drain: CancellationToken,
    /// [`NodeContext::begin_draining`] was called.
    draining: AtomicBool,
    /// No other node can become the primary soon.
    alone: AtomicBool,
    /// Requests that are on their way to another node's application, and have no answer yet.
    forwards: watch::Sender<usize>,
    /// Requests that run here because this node is the primary.
    requests: Requests,
    /// Requests that wait for a primary, whichever layer holds them.
    held: HeldCount,
    /// The application asked for the service that answers probes.
    probed: AtomicBool,
    /// The last run of a node that handed its lease to another.
    handed: Mutex<Option<(NodeId, Incarnation)>>,
}

/// A request on its way; counted until this is dropped.
pub(crate) struct Forward<'a>(&'a watch::Sender<usize>);

impl Drop for Forward<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|number| *number -= 1);
    }
}

impl NodeContext {
    pub(crate) fn new(
        me: PeerInfo,
        cluster: String,
        database: String,
        (keys, channel): (Keyring, Channel),
        role: Role,
        lease: LeaseContext,
        database_keys: DatabaseKeys,
    ) -> Arc<NodeContext> {
        let stop = CancellationToken::new();
        Arc::new(NodeContext {
            me,
            cluster,
            database,
            keys,
            channel,
            database_keys: KeysInUse::new(database_keys),
            applied: Applied::new(),
            roles: RoleValue::new(role),
            fence: Arc::new(Fence::unlimited()),
            lease,
            lag: Mutex::new(None),
            failure: Mutex::default(),
            reports: Reports::new(),
            late: AtomicBool::new(false),
            astray: AtomicBool::new(false),
            files: Arc::default(),
            close_idle: OnceLock::new(),
            counting: AskCounting::default(),
            read_failed: AtomicU64::new(0),
            begun: Instant::now(),
            strangers: Seldom::default(),
            drain: stop.child_token(),
            draining: AtomicBool::new(false),
            alone: AtomicBool::new(false),
            forwards: watch::Sender::new(0),
            requests: Requests::default(),
            held: HeldCount::default(),
            probed: AtomicBool::new(false),
            handed: Mutex::default(),
            stop,
        })
    }

    /// Does with a condition what its row in the table says.
    pub(crate) fn report(&self, condition: Condition<'_>) {
        self.reports.report(&self.database, condition);
    }

    /// The same where what comes next matters more than a panic of the application's code.
    pub(crate) fn report_aside(&self, condition: Condition<'_>) {
        self.reports.report_aside(&self.database, condition);
    }

    /// What was counted since the node was opened.
    #[cfg(feature = "prometheus")]
    pub(crate) fn counters(&self) -> &crate::metrics::CounterStore {
        self.reports.counters()
    }

    /// All events from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<Event> {
        self.reports.subscribe()
    }

    /// Replication of the database has stopped for good. The node's state says so first. Then the
    /// application is told, whose code may be what failed.
    pub(crate) fn fail(&self, error: &Error) {
        let cause = error.cause();
        *lock(&self.failure) = Some(cause.clone());
        let why = cause.to_string();
        let condition = Condition::ReplicationStopped { database: &self.database, why: &why };
        self.reports.change_problems(condition);
        let changed = self.roles.change(RoleChange::Stopped);
        self.applied.close();
        self.report_aside(condition);
        if let Some(state) = changed {
            self.reports.send(Event::Role { state });
        }
    }

    /// Returns when replication has failed, or the node is closed.
    pub(crate) async fn stopped(&self) {
        // The sender is ours.
        let _ = self.roles.subscribe().wait_for(|state| state.role == Role::Stopped).await;
    }

    /// Changes the role, or what is known of the primary; silent when nothing changed.
    pub(crate) fn change_role(&self, change: RoleChange) {
        if let Some(state) = self.roles.change(change) {
            self.reports.send(Event::Role { state });
        }
    }

    /// Whether it is the primary, and may acknowledge commits.
    pub(crate) fn leads(&self) -> bool {
        self.roles.borrow().role == Role::Primary && self.fence.is_open()
    }

    /// Whether the application may begin requests here: it leads, and hands its lease to no other
    /// node.
    pub(crate) fn takes_requests(&self) -> bool {
        let takes = {
            let state = self.roles.borrow();
            state.role == Role::Primary && state.primary.is_some()
        };
        takes && self.fence.is_open()
    }

    /// Whether it was the primary until its lease ended, and no other has vouched for what it has
    /// since. What is here may have commits that no other node will ever have.
    pub(crate) fn is_fenced(&self) -> bool {
        let fenced = match self.roles.borrow().role {
            Role::Primary => !self.fence.is_open(),
            role => role == Role::Fencing,
        };
        fenced || self.late.load(Ordering::Acquire)
    }

    /// Says whether it has commits that came after its lease had ended, and that no primary vouches
    /// for. Set before the role changes.
    pub(crate) fn set_late(&self, late: bool) {
        self.late.store(late, Ordering::Release);
    }

    /// Counts a request from now on. The caller does this before it looks up where to send the
    /// request. So no uncounted request goes to a primary that is not the primary any more.
    pub(crate) fn forward(&self) -> Forward<'_> {
        self.forwards.send_modify(|number| *number += 1);
        Forward(&self.forwards)
    }

    /// Returns when all requests that were on their way are answered.
    pub(crate) async fn forwards_answered(&self) {
        // The sender is ours.
        let _ = self.forwards.subscribe().wait_for(|number| *number == 0).await;
    }

    /// Counts a request that is to run here because this node is the primary. None: the node takes
    /// no requests. It is counted before the look at that: once the node takes none, and none is
    /// counted, none begins any more.
    pub(crate) fn request(&self) -> Option<RunningRequest> {
        let running = self.requests.begin();
        self.takes_requests().then_some(running)
    }

    /// Counts a request that waits for a primary.
    pub(crate) fn hold(&self) -> HeldRequest {
        self.held.begin()
    }

    /// Requests that wait for a primary, that are on their way to it, and that run here because
    /// this node is it.
    pub(crate) fn requests_at_work(&self) -> (usize, usize, usize) {
        (self.held.number(), *self.forwards.borrow(), self.requests.number())
    }

    /// From now on the layer leaves alone what asks the probes.
    pub(crate) fn set_probed(&self) {
        self.probed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_probed(&self) -> bool {
        self.probed.load(Ordering::Relaxed)
    }

    /// Returns when none of these requests runs.
    pub(crate) async fn requests_done(&self) {
        self.requests.done().await;
    }

    /// This run of a node handed its lease to another one, and lives: what was sent to it will be
    /// answered. Said before the role names the next primary.
    pub(crate) fn set_handed(&self, run: (NodeId, Incarnation)) {
        *lock(&self.handed) = Some(run);
    }

    pub(crate) fn has_handed(&self, run: (NodeId, Incarnation)) -> bool {
        *lock(&self.handed) == Some(run)
    }

    /// The application's server is about to end: its clients are told to open their next connection
    /// elsewhere. That is before `drain` is cancelled, while a lease is handed over. `alone`: no
    /// other node can become the primary soon.
    pub(crate) fn begin_draining(&self, alone: bool) {
        self.alone.store(alone, Ordering::Relaxed);
        self.draining.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed) || self.drain.is_cancelled()
    }

    /// Whether a node that drains may soon hear of a primary that it knows nothing of now.
    pub(crate) fn has_prospect(&self) -> bool {
        !self.lease.fixed && !self.alone.load(Ordering::Relaxed) && !self.stop.is_cancelled()
    }

    /// The first eight hex digits that tell this database's tokens and cookies from those of
    /// others.
    pub(crate) fn database_tag(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("replite 2026 v1 database tag");
        for part in [&self.cluster, &self.database] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex()[..8].to_string()
    }

    /// Whether a part has a problem.
    pub(crate) fn has_problem(&self, part: Part) -> bool {
        self.reports.has_problem(part)
    }

    /// Says whether the database's files are others than those that were opened.
    pub(crate) fn set_astray(&self, astray: bool) {
        self.astray.store(astray, Ordering::Relaxed);
    }

    /// The node opens the files anew: connections to what was there before are of no use.
    pub(crate) fn renew_files(&self) {
        self.files.fetch_add(1, Ordering::Release);
        if let Some(CloseIdle(close)) = self.close_idle.get() {
            close();
        }
    }

    /// Sets what closes those connections.
    pub(crate) fn when_renewed(&self, close: impl Fn() + Send + Sync + 'static) {
        let _ = self.close_idle.set(CloseIdle(Box::new(close)));
    }

    /// Sets what says whether the position has all that is committed.
    pub(crate) fn count_by(&self, counts: impl Counts + 'static) {
        self.counting.set(counts);
    }

    /// None: the position has all that a read here may have seen until now, and so all that any
    /// connection has committed. Otherwise this is what waits for that.
    pub(crate) fn counting(&self) -> Option<Counting> {
        self.counting.ask()
    }

    /// The last commit that there is, where this node's own writer made it. The position may not
    /// have it yet.
    pub(crate) fn last_of_ours(&self) -> Option<Txid> {
        self.counting.last_of_ours()
    }

    /// How often the node opened the files, still counting.
    pub(crate) fn files(&self) -> Arc<AtomicU64> {
        self.files.clone()
    }

    pub(crate) fn astray(&self) -> bool {
        self.astray.load(Ordering::Relaxed)
    }

    /// Something of ours found no room on the disk.
    pub(crate) fn no_room(&self, what: impl std::fmt::Display) {
        let new = !self.has_problem(Part::Room);
        self.report(Condition::DiskFull { database: &self.database, what: &what, new });
    }

    /// A read failed, and not for its own sake.
    pub(crate) fn read_failed(&self, why: &str) {
        let now = self.begun.elapsed().as_millis() as u64 + 1;
        if self.read_failed.swap(now, Ordering::Relaxed) == 0 {
            self.report(Condition::ReadsFail { database: &self.database, why });
        }
    }

    /// A read worked. Where some work and some don't, it is too early to say that all is well.
    pub(crate) fn read_worked(&self) {
        if self.reads_may_work() {
            self.read_failed.store(0, Ordering::Relaxed);
            self.report(Condition::ReadsWork);
        }
    }

    /// Whether reads failed, and none has for a while.
    pub(crate) fn reads_may_work(&self) -> bool {
        let failed = self.read_failed.load(Ordering::Relaxed);
        failed != 0 && self.begun.elapsed() >= Duration::from_millis(failed) + READS_QUIET
    }

    /// A peer that claims to be `node` knocked with another secret. Strangers can do that as often
    /// as they like, so the node reports it only now and then.
    pub(crate) fn other_secret(&self, node: NodeId, key: Option<PeerKey>) {
        if let Some(times) = self.strangers.happened() {
            self.report(Condition::OtherSecret { database: &self.database, node, key, times });
        }
    }

    /// All problems that last.
    pub(crate) fn problem(&self) -> Option<String> {
        self.forget_strangers();
        let all = self.reports.problems();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// The same without anything that only operators should know.
    pub(crate) fn public_problems(&self) -> Vec<&'static str> {
        self.forget_strangers();
        self.reports.public_problems()
    }

    fn forget_strangers(&self) {
        if !self.strangers.lasts() {
            self.report(Condition::NoOtherSecret);
        }
    }

    /// Why replication has failed, if it has.
    pub(crate) fn failure(&self) -> Option<Cause> {
        lock(&self.failure).clone()
    }

    /// What is wrong with one part.
    pub(crate) fn problem_of(&self, part: Part) -> Option<String> {
        self.reports.problem_of(part)
    }

    pub(crate) fn set_lag(&self, lag: Option<Lag>) {
        *lock(&self.lag) = lag.map(|lag| (lag, tokio::time::Instant::now()));
    }

    /// How far it lags by now. What was said before it stopped to follow, or while its runtime runs
    /// nothing, grows old.
    pub(crate) fn lag(&self) -> Option<Lag> {
        let (lag, said) = (*lock(&self.lag))?;
        let since = said.elapsed();
        let is_new = since <= LAG_SAID_MAX;
        Some(Lag {
            transactions: lag.transactions.filter(|_| is_new),
            age: lag.age.map(|age| age + since),
            connected: lag.connected && is_new,
            stale: lag.stale + since,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::fake::{SECRET, node};

    #[test]
    fn what_is_public_of_problems_says_what_is_and_nothing_more() {
        let node = node(1, &SECRET, Role::Replica);
        assert_eq!((node.problem(), node.public_problems()), (None, vec![]));
        node.report(Condition::LogRetried { text: "write /home/me/app.db-replite/log/1.log: no space" });
        node.report(Condition::StreamLost { problem: "peer http://10.0.0.7:7000/_replite: it is away" });
        assert!(node.problem().unwrap().contains("/home/me"));
        let public = node.public_problems();
        assert_eq!(public, ["the primary can't be followed", "the log can't be written"]);
    }
}
